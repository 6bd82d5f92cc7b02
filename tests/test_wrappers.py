"""What training libraries put around a model: mixed precision, DDP, a compiler. Both graphs stay within reach."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from timm.utils import ModelEmaV3
from torch import Tensor, fx, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

import masksurgery
from masksurgery import Prediction
from masksurgery.model import ConvertedModel
from nets import NETS

NET = NETS["auxiliary_head"]  # in training it returns a tuple of two logits


def convert() -> ConvertedModel:
    model = masksurgery.convert(NET.build().eval(), example_inputs=NET.inputs(2), **NET.convert_kwargs)
    assert model._graphs[True] is not model._graphs[False]
    return model


def images() -> Tensor:
    return NET.inputs(4)[0]


def assert_follows_the_mode(model: Any, x: Tensor) -> None:
    for _ in range(2):
        assert isinstance(model.eval()(x), Prediction)
        assert [y.shape for y in model.train()(x)] == [(4, 5)] * 2


class Shallow(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


@pytest.fixture
def accelerator() -> Iterator[Any]:
    accelerate = pytest.importorskip("accelerate")
    reset = accelerate.state.AcceleratorState._reset_state  # else the first precision of a process is that of all
    reset(reset_partial_state=True)
    yield accelerate.Accelerator(mixed_precision="bf16", cpu=True)
    reset(reset_partial_state=True)


def test_a_kept_forward_follows_the_mode() -> None:
    model, x = convert(), images()
    forward = type(model).forward
    assert isinstance(forward(model, x), Prediction)
    assert isinstance(forward(model.train(), x), tuple)
    assert isinstance(forward(model.eval(), x), Prediction)


def test_mixed_precision_of_accelerate(accelerator: Any) -> None:
    exact, x = convert(), images()
    model = accelerator.prepare_model(copy.deepcopy(exact))
    difference = (model(x).members - exact(x).members).abs().max()
    assert 0 < difference < 0.1  # bfloat16 inside
    assert model(x).mean.dtype == torch.float32
    assert_follows_the_mode(model, x)
    assert accelerator.unwrap_model(model, keep_fp32_wrapper=False) is model
    assert_follows_the_mode(model, x)


def test_copies_of_a_model_in_mixed_precision(accelerator: Any) -> None:
    model, x = accelerator.prepare_model(convert()), images()
    ema = ModelEmaV3(model, decay=0.5)
    assert_follows_the_mode(ema.module, x)
    assert ema.module.forward.__self__ is ema.module
    model = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.copy(model)):
        assert torch.equal(twin.eval()(x).mean, model.eval()(x).mean)
        assert twin.forward.__self__ is twin
        assert_follows_the_mode(twin, x)


def test_signature_graph_and_code() -> None:
    model, x = convert(), images()
    assert list(inspect.signature(model.forward).parameters) == ["x"]
    assert list(inspect.signature(type(model).forward).parameters) == ["self", "x"]
    code = {mode: model.train(mode).code for mode in (False, True)}
    assert "aux" in code[True] and "aux" not in code[False]
    for mode in (False, True):
        assert model.train(mode).graph is model._graphs[mode]
        again = fx.GraphModule(model, Shallow().trace(model))
        ours, theirs = (tree_leaves(m(x)) for m in (model, again))
        assert len(ours) == len(theirs) and (mode or all(map(torch.equal, ours, theirs)))


def test_edited_and_assigned_graphs() -> None:
    model, x = convert(), images()
    old = model(x)
    logits = next(node for node in model.graph.nodes if node.op == "output")
    logits.args = ([logits.args[0]],)
    assert model.recompile().src == model.code
    assert torch.equal(model(x)[0].mean, old.mean)
    assert isinstance(model.train()(x), tuple)
    assert isinstance(model.eval()(x), list)
    graph = fx.Graph()
    graph.output(graph.placeholder("x"))
    model.graph = graph
    assert torch.equal(model.train().eval()(x), x)
    assert isinstance(model.train()(x), tuple)


def test_one_graph_is_replaced_in_both_modes() -> None:
    model = masksurgery.convert(
        nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)), example_inputs=torch.ones(2, 3)
    )
    assert model._graphs[True] is model._graphs[False]
    graph = fx.Graph()
    graph.output(graph.placeholder("x"))
    model.graph = graph
    for mode in (True, False):
        assert torch.equal(model.train(mode)(torch.ones(2)), torch.ones(2))


def test_compiled_once_for_each_mode() -> None:
    compiled = []

    def backend(graph: fx.GraphModule, inputs: list[Tensor]) -> Any:
        compiled.append(graph)
        return graph.forward

    model, x = convert(), images()
    fast = torch.compile(model, backend=backend, fullgraph=True)
    for ours, theirs in zip(fast(x), model(x), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert_follows_the_mode(fast, x)
    assert len(compiled) == 2


def test_exported_in_eval(tmp_path: Path) -> None:
    model, x = convert().eval(), images()
    torch.export.save(torch.export.export(model, (x,)), tmp_path / "model.pt2")
    found = torch.export.load(tmp_path / "model.pt2").module()(x)
    assert isinstance(found, Prediction)
    torch.testing.assert_close(found.mean, model(x).mean)


def test_a_temperature_is_exported(tmp_path: Path) -> None:
    model, x = convert().eval(), images()
    plain = model(x)
    model.temperature = 3.0
    torch.export.save(torch.export.export(model, (x,)), tmp_path / "model.pt2")
    found = torch.export.load(tmp_path / "model.pt2").module()(x)
    torch.testing.assert_close(found.members, plain.members / 3)
    torch.testing.assert_close(found.entropy, model(x).entropy)


def test_compiled_code_follows_the_temperature() -> None:
    model, x = convert().eval(), images()
    plain = model(x).members
    fast = torch.compile(model, backend="eager", fullgraph=True)
    for temperature in (1.0, 3.0, 0.5, 1.0, 7.0):
        model.temperature = temperature
        found = fast(x)
        torch.testing.assert_close(found.members, plain / temperature)
        torch.testing.assert_close(found.mean, (plain / temperature).softmax(2).mean(1))
    fast.temperature = 2.0  # goes to the model that is inside
    assert model.temperature == 2.0
    torch.testing.assert_close(fast(x).members, plain / 2)


@pytest.fixture
def gloo(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("gloo")
def test_ddp() -> None:
    model, x = convert(), images()
    model.members_module.fixed = torch.arange(4)
    alone = copy.deepcopy(model).train()
    wrapped = DistributedDataParallel(model)
    for m in (wrapped.train(), alone):
        sum(y.square().sum() for y in m(x)).backward()
    expected = {name: p.grad for name, p in alone.named_parameters()}
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name])
    assert any(grad.abs().sum() > 0 for grad in expected.values())
    assert_follows_the_mode(wrapped, x)


def test_tasks_of_timm() -> None:
    """timm's engine of newer versions: a task wraps the model, and an evaluator takes its logits."""
    task = pytest.importorskip("timm.task", reason="this timm has no tasks")
    model = masksurgery.convert(NETS["conv_bn_relu"].build(), example_inputs=NETS["conv_bn_relu"].inputs(2))
    x = NETS["conv_bn_relu"].inputs(4)[0]
    wrapped = task.ClassificationTask(model, nn.CrossEntropyLoss(), verbose=False)
    wrapped.setup_ema(decay=0.5)
    y = torch.zeros(4, dtype=torch.long)
    found = wrapped.train()(x, y)
    found["loss"].backward()
    assert found["output"].shape == (4, model.eval()(x).mean.shape[1])
    wrapped.update_ema()
    assert isinstance(wrapped.get_eval_model(ema=True).eval()(x), Prediction)
    model.output = "logits"
    evaluator = wrapped.create_evaluator()
    evaluator.update(wrapped.get_eval_model().eval()(x), y)
    expected = nn.functional.cross_entropy(model(x), y).item()
    assert evaluator.summary()["loss"] == pytest.approx(expected, rel=1e-4)


def test_lightning_in_mixed_precision(tmp_path: Path) -> None:
    """The two losses of the training graph, and a checkpoint that loads into another conversion."""
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            super().__init__()
            self.model, self.seen = convert().train(), []  # fit leaves the mode as it is

        def training_step(self, x: Tensor) -> Tensor:
            return sum(y.float().square().mean() for y in self.model(x))

        def validation_step(self, x: Tensor) -> None:
            self.seen.append(self.model(x))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module, data = Module(), DataLoader(torch.cat([images(), images()]), batch_size=4)
    trainer = lightning.Trainer(
        max_epochs=2, accelerator="cpu", precision="bf16-mixed", default_root_dir=tmp_path, logger=False
    )
    trainer.fit(module, data, data)
    assert len(module.seen) >= 4 and all(isinstance(p, Prediction) for p in module.seen)
    assert {p.mean.dtype for p in module.seen} == {torch.float32}
    (path,) = (tmp_path / "checkpoints").glob("*.ckpt")
    twin = Module()
    twin.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    x = images()
    assert torch.equal(twin.model.eval()(x).mean, module.model.eval()(x).mean)
