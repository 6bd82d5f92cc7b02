"""The training loop: what a step computes, what is saved, and that a run that was stopped goes on as if it had not."""

from __future__ import annotations

import copy
import csv
import os
import random
import signal
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.data import Mixup
from torch import Tensor, nn

import masksurgery
from finetuning import tensors_of
from masksurgery.events import Interrupted
from masksurgery.types import CheckpointError, TrainingError
from training import CLASSES, SIZE, STEPS, Batches, make_base, make_model, make_trainer

# --- a run that was stopped ------------------------------------------------------------------------------------------


class Crash(Exception):
    """What stops a run without warning."""


def crash_at(step: int) -> Any:
    def at(now: int) -> None:
        if now == step:
            raise Crash

    return at


RICH = {
    "ema_decay": 0.9,
    "label_smoothing": 0.1,
    "warmup_epochs": 0.6,
    "layer_decay": 0.8,
    "checkpoint_every": 2,
    "log_every": 3,
}


def rich_model() -> masksurgery.ConvertedModel:
    return make_model(drop_rate=0.2)


def rich_mixup() -> Mixup:
    return Mixup(0.4, 0.4, num_classes=CLASSES)


@pytest.mark.parametrize("step", [0, 1, 4, 5, 7, 9])
def test_a_run_that_crashed_ends_as_if_it_had_not(tmp_path: Path, step: int) -> None:
    whole, observed = make_trainer(tmp_path / "whole", rich_model(), mixup=rich_mixup(), **RICH)
    whole.run()
    broken, _ = make_trainer(tmp_path / "broken", rich_model(), Batches(at=crash_at(step)), mixup=rich_mixup(), **RICH)
    with pytest.raises(Crash):
        broken.run()
    torch.manual_seed(step)  # the state of the process is another one
    resumed, later = make_trainer(tmp_path / "broken", rich_model(), resume=True, mixup=rich_mixup(), **RICH)
    resumed.run()
    assert later[0].step == (step // 2 * 2 if step < STEPS else max(STEPS, step // 2 * 2))
    assert tensors_of(tmp_path / "broken") == tensors_of(tmp_path / "whole")
    assert figures(tmp_path / "broken") == figures(tmp_path / "whole")
    states = [torch.load(tmp_path / run / "resume.pt", weights_only=True) for run in ("whole", "broken")]
    for part in ("model", "ema"):
        assert all(torch.equal(x, states[1][part][name]) for name, x in states[0][part].items())
    assert states[0]["best"] == states[1]["best"] == min(event.val["nll"] for event in observed.epochs)


def figures(folder: Path) -> list[list[str]]:
    """The rows of metrics.csv without the times."""
    with (folder / "metrics.csv").open(newline="") as file:
        return [row[:-2] for row in csv.reader(file)]


def test_runs_of_one_seed_are_equal_and_of_two_differ(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        make_trainer(tmp_path / name, rich_model(), mixup=rich_mixup(), **{**RICH, "seed": seed})[0].run()
    assert tensors_of(tmp_path / "a") == tensors_of(tmp_path / "b") != tensors_of(tmp_path / "c")


def test_the_global_random_state_is_given_back(tmp_path: Path) -> None:
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()
    make_trainer(tmp_path / "run", rich_model(), mixup=rich_mixup(), **RICH)[0].run()
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == random.getstate()
    assert np.array_equal(before[2][1], np.random.get_state()[1]) and before[2][2] == np.random.get_state()[2]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_stops(tmp_path: Path, number: signal.Signals) -> None:
    make_trainer(tmp_path / "whole")[0].run()
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]

    def at(step: int) -> None:
        if step == 3:
            os.kill(os.getpid(), number)

    stopped, _ = make_trainer(tmp_path / "run", batches=Batches(at=at))
    with pytest.raises(Interrupted, match=rf"{number.name}: stopped after step 4 of 10\. It is saved\."):
        stopped.run()
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    resumed, observed = make_trainer(tmp_path / "run", resume=True)
    resumed.run()
    assert observed[0].step == 4
    assert tensors_of(tmp_path / "run") == tensors_of(tmp_path / "whole")
    assert figures(tmp_path / "run") == figures(tmp_path / "whole")


def test_a_signal_in_the_validation_saves_and_stops(tmp_path: Path) -> None:
    make_trainer(tmp_path / "whole")[0].run()

    class Stopping(Batches):
        def val(self) -> Any:
            for k, batch in enumerate(super().val()):
                if k == 1:
                    os.kill(os.getpid(), signal.SIGINT)
                yield batch

    stopped, observed = make_trainer(tmp_path / "run", batches=Stopping())
    with pytest.raises(Interrupted, match=r"SIGINT: stopped in the validation after step 5\. It is saved\."):
        stopped.run()
    assert not observed.epochs
    resumed, observed = make_trainer(tmp_path / "run", resume=True)
    resumed.run()
    assert [event.step for event in observed.epochs] == [5, 10]
    assert tensors_of(tmp_path / "run") == tensors_of(tmp_path / "whole")
    assert figures(tmp_path / "run") == figures(tmp_path / "whole")


def test_a_second_interrupt_does_not_wait(tmp_path: Path) -> None:
    def at(step: int) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path / "run", batches=Batches(at=at))[0].run()


def test_a_run_that_is_finished_is_not_run_again(tmp_path: Path) -> None:
    make_trainer(tmp_path / "run")[0].run()
    before = tensors_of(tmp_path / "run")
    again, observed = make_trainer(tmp_path / "run", batches=Batches(at=crash_at(0)), resume=True)
    assert again.run().step == 10
    assert [type(event).__name__ for event in observed] == ["Begun"]
    assert tensors_of(tmp_path / "run") == before


@pytest.mark.parametrize("when", ["row", "best", "last"])
def test_a_crash_between_the_validation_and_its_state(tmp_path: Path, when: str) -> None:
    make_trainer(tmp_path / "whole", rich_model(), **RICH)[0].run()

    def save(model: masksurgery.ConvertedModel, folder: Path) -> None:
        if when == "row" or folder.name == "last":
            raise Crash
        masksurgery.save(model, folder, force=True)
        if when == "best":
            raise Crash

    broken, _ = make_trainer(tmp_path / "run", rich_model(), save=save, **RICH)
    with pytest.raises(Crash):
        broken.run()
    resumed, observed = make_trainer(tmp_path / "run", rich_model(), resume=True, **RICH)
    resumed.run()
    assert [event.step for event in observed.epochs] == [5, 10]
    assert tensors_of(tmp_path / "run") == tensors_of(tmp_path / "whole")
    assert figures(tmp_path / "run") == figures(tmp_path / "whole")


def test_an_epoch_is_not_lost_when_its_validation_fails(tmp_path: Path) -> None:
    class Unreadable(Batches):
        def val(self) -> Any:
            yield next(super().val())
            raise Crash

    make_trainer(tmp_path / "whole", rich_model(), **RICH)[0].run()
    broken, _ = make_trainer(tmp_path / "run", rich_model(), Unreadable(), **RICH)
    with pytest.raises(Crash):
        broken.run()
    resumed, observed = make_trainer(tmp_path / "run", rich_model(), resume=True, **RICH)
    resumed.run()
    assert observed[0].step == STEPS and [event.step for event in observed.epochs] == [5, 10]
    assert tensors_of(tmp_path / "run") == tensors_of(tmp_path / "whole")
    assert figures(tmp_path / "run") == figures(tmp_path / "whole")


# --- what goes wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("step", "every"), [(0, 1), (7, 1), (7, 4), (9, 100)])
def test_a_loss_that_is_no_number_stops_and_the_last_state_is_kept(tmp_path: Path, step: int, every: int) -> None:
    trainer, _ = make_trainer(tmp_path / "run", batches=Batches(spoil=step), log_every=every)
    rest = "Begin anew" if step < STEPS else "What was saved before is kept"
    with pytest.raises(TrainingError, match=rf"the loss of step {step + 1} is nan\. {rest}"):
        trainer.run()
    if step < STEPS:
        assert not (tmp_path / "run" / "resume.pt").exists()
        return
    make_trainer(tmp_path / "sound", epochs=1, sched="none")[0].run()
    state = torch.load(tmp_path / "run" / "resume.pt", weights_only=True)
    assert state["step"] == STEPS
    assert all(x.isfinite().all() for x in state["model"].values())
    assert masksurgery.load(tmp_path / "run", base=make_base())(torch.zeros(2, 3, SIZE, SIZE)).mean.isfinite().all()


def test_weights_that_are_no_numbers_are_never_saved(tmp_path: Path) -> None:
    model = make_model()

    def at(step: int) -> None:
        if step == 6:  # after the loss of this step no other one is seen before the state is saved
            model.fc.weight.register_hook(lambda grad: grad * float("inf"))

    trainer, _ = make_trainer(tmp_path / "run", model, Batches(at=at), checkpoint_every=7, clip_grad=0.0)
    with pytest.raises(TrainingError, match=r"'fc\.weight' has values that are no numbers after step 7"):
        trainer.run()
    assert torch.load(tmp_path / "run" / "resume.pt", weights_only=True)["step"] == STEPS


def test_a_state_that_is_damaged_is_refused(tmp_path: Path) -> None:
    make_trainer(tmp_path / "run", epochs=1)[0].run()
    path = tmp_path / "run" / "resume.pt"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"resume\.pt: not a file of torch\.save, or cut short"):
        make_trainer(tmp_path / "run", resume=True, epochs=1)
    torch.save({"something": 1}, path)
    with pytest.raises(CheckpointError, match=r"resume\.pt: is not of a training run"):
        make_trainer(tmp_path / "run", resume=True, epochs=1)


# --- what a step computes --------------------------------------------------------------------------------------------


def test_members_are_dealt_out_evenly_over_a_run(tmp_path: Path) -> None:
    model, seen = make_model(n=3), []
    model.members_module.register_forward_hook(lambda module, args, out: seen.append(out.index))
    make_trainer(tmp_path / "run", model)[0].run()
    training = torch.stack([index for index in seen if index is not None])
    assert training.shape == (10, 8)
    assert training.flatten().tolist() == [k % 3 for k in range(80)]
    assert all(abs(row.bincount(minlength=3) - 8 / 3).max() < 1 for row in training)


@pytest.mark.slow
def test_parts_of_a_step_are_the_step(tmp_path: Path) -> None:
    losses = []
    for accumulate in (1, 2, 4):
        trainer, observed = make_trainer(
            tmp_path / str(accumulate), make_model("test_vit", img_size=16), accumulate=accumulate
        )
        trainer.run()
        losses.append(observed.losses)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and losses[0] == pytest.approx(losses[2], rel=1e-4)
    assert losses[0] != losses[1]  # rounded otherwise: it was split


def test_pixels_count_alike_in_parts_of_a_step(tmp_path: Path) -> None:
    class Pixels(Batches):
        """Masks: of the first four images nearly nothing is known, of the fifth nothing at all."""

        def _make(self, seed: int) -> tuple[Tensor, Tensor]:
            x, y = super()._make(seed)
            masks = y[:, None, None].repeat(1, 4, 4)
            masks[:4, 1:] = masks[4] = 255
            return x, masks

    losses = []
    for accumulate in (1, 2, 8):
        base = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.ReLU(), nn.Conv2d(8, CLASSES, 1))
        for k, parameter in enumerate(base.parameters()):
            nn.init.normal_(parameter, 0, 0.2, torch.Generator().manual_seed(k))
        model = masksurgery.convert(base, example_inputs=(torch.zeros(1, 3, SIZE, SIZE),))
        save = partial(masksurgery.save, force=True)
        trainer, observed = make_trainer(tmp_path / str(accumulate), model, Pixels(), accumulate=accumulate, save=save)
        trainer.run()
        losses.append(observed.losses)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and losses[0] == pytest.approx(losses[2], rel=1e-4)


def test_repeat_trains_every_member_on_every_sample(tmp_path: Path) -> None:
    model = make_model(train_mode="repeat")
    twin = copy.deepcopy(model).train()
    trainer, observed = make_trainer(tmp_path / "run", model)
    trainer.run()
    x, y = next(Batches().train(0, 1))
    logits = twin(x)
    assert len(logits) == 4 * len(x)
    assert observed.losses[0] == pytest.approx(F.cross_entropy(logits, y.repeat(4)).item(), rel=1e-6)


def test_a_frozen_model_keeps_everything_but_its_output_layer(tmp_path: Path) -> None:
    model = make_model(drop_rate=0.5)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    make_trainer(tmp_path / "run", model, trained=("fc",))[0].run()
    changed = [name for name, x in model.state_dict().items() if not torch.equal(x, before[name])]
    assert changed == ["fc.weight", "fc.bias"]


def test_statistics_are_prepared_before_the_first_step_only(tmp_path: Path) -> None:
    calls: list[nn.Module] = []
    make_trainer(tmp_path / "run", prepare=calls.append, epochs=1)[0].run()
    make_trainer(tmp_path / "run", prepare=calls.append, epochs=1, resume=True)[0].run()
    assert len(calls) == 1


def test_the_schedule_is_timms_by_step(tmp_path: Path) -> None:
    trainer, observed = make_trainer(tmp_path / "run", lr=0.01, warmup_epochs=0.4, min_lr=0.001)
    trainer.run()
    rates = [event.lr for event in observed if getattr(event, "val", 1) is None]
    cosine = [0.001 + 0.009 * (1 + np.cos(np.pi * t / 10)) / 2 for t in range(2, 10)]
    assert rates == pytest.approx([0.0001, 0.0001 + 0.0099 / 2, *cosine])


def test_a_base_model_is_trained_by_the_same_loop(tmp_path: Path) -> None:
    base = make_base()
    trainer, observed = make_trainer(tmp_path / "run", base, save=lambda model, folder: None)
    trainer.run()
    assert len(observed.epochs) == 2 and set(observed.epochs[0].val or {}) == {"nll", "accuracy"}


def test_what_a_run_reports(tmp_path: Path) -> None:
    trainer, observed = make_trainer(tmp_path / "run", log_every=2, lr=0.003)
    trainer.run()
    first = observed.epochs[0]
    assert (first.epoch, first.step, observed.epochs[1].epoch) == (1, STEPS, 2)
    assert [e.step for e in observed[1:]] == [2, 4, 5, 6, 8, 10, 10]
    model = masksurgery.load(tmp_path / "run" / "last", base=make_base())
    x, y = zip(*Batches().val(), strict=True)
    with torch.no_grad():
        p = model(torch.cat(x))
    last = observed.epochs[-1].val or {}
    assert last["nll"] == pytest.approx(F.cross_entropy(p.logits, torch.cat(y)).item(), rel=1e-5)
    assert last["accuracy"] == pytest.approx((p.mean.argmax(1) == torch.cat(y)).float().mean().item())
    header, *rows = figures(tmp_path / "run")
    assert header[:4] == ["epoch", "step", "lr", "train_loss"]
    assert [row[1] for row in rows] == ["2", "4", "5", "6", "8", "10", "10"]
    assert float(rows[2][5]) == first.val["nll"]
