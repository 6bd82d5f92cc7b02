"""What the figures keep: sums of fixed size, which processes add, so that figures do not depend on how many run."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_sum

from masksurgery.calibration import TemperatureFit
from masksurgery.metrics import RankedScores, Suite, detect
from masksurgery.prediction import classification, regression
from masksurgery.scores import Threshold
from scoring import classes, draw, draw_classes, feed, metrics_of


def case(name: str, seed: int = 0) -> tuple[Suite, Any, Tensor]:
    """A suite with all of its figures, and something to feed it."""
    if name == "classes":
        members, y = draw_classes(seed, 90, 3, 7)
        threshold = Threshold("entropy", 1.0)
        return Suite("classification", n=3, outputs=7, threshold=threshold), classes(members), y
    if name == "pixels":
        y = torch.randint(0, 5, (20, 4, 4), generator=torch.Generator().manual_seed(seed))
        y[y == 4] = 255
        suite = Suite("classification", n=2, outputs=4, segmentation=True)
        return suite, classes(draw(seed, 20, 2, 4, 4, 4)), y
    if name == "labels":
        p = classification(draw(seed, 40, 2, 3), 2, "multilabel")
        return Suite("multilabel", n=2, outputs=3), p, (draw(seed + 1, 40, 3) > 0).long()
    return Suite("regression", n=3, outputs=2), regression(draw(seed, 40, 3, 2)), draw(seed + 1, 40, 2)


CASES = ("classes", "pixels", "labels", "numbers")


def states(metrics: list[Metric]) -> list[tuple[str, torch.Size, torch.dtype]]:
    return [(name, getattr(m, name).shape, getattr(m, name).dtype) for m in metrics for name in m._defaults]


@pytest.mark.parametrize("name", CASES)
def test_states_are_sums_of_fixed_size(name: str) -> None:
    suite, p, y = case(name)
    before = states(metrics_of(suite))
    feed(suite, p, y)
    assert states(metrics_of(suite)) == before
    assert all(reduction is dim_zero_sum for metric in metrics_of(suite) for reduction in metric._reductions.values())
    assert {dtype for _, _, dtype in before} <= {torch.int64, torch.float64}
    kept = sum(getattr(m, state).nbytes for m in metrics_of(suite) for state in m._defaults)
    assert kept < 40e6


@pytest.mark.parametrize("name", CASES)
def test_two_halves_added_are_the_whole(name: str) -> None:
    (suite, p, y), (first, _, _), (second, _, _) = (case(name) for _ in range(3))
    feed(suite, p, y)
    part = len(y) // 3
    feed(first, type(p)(*(x[:part] for x in p)), y[:part], seed=1)
    feed(second, type(p)(*(x[part:] for x in p)), y[part:], seed=2)
    for mine, other in zip(metrics_of(first), metrics_of(second), strict=True):
        for state in mine._defaults:
            setattr(mine, state, getattr(mine, state) + getattr(other, state))
    assert flat(first.compute()) == pytest.approx(flat(suite.compute()), rel=1e-12)


def flat(found: Any) -> list[float]:
    """All numbers of something, in order."""
    if hasattr(found, "__dataclass_fields__"):
        found = asdict(found)
    if isinstance(found, dict):
        found = [(key, found[key]) for key in found]
    if isinstance(found, (list, tuple)):
        return [number for part in found for number in flat(part)]
    return [] if found is None or isinstance(found, str) else [float(found)]


def test_figures_can_be_asked_for_on_the_way() -> None:
    suite, p, y = case("classes")
    suite.update(type(p)(*(x[:30] for x in p)), y[:30])
    assert suite.compute().images == 30
    suite.update(type(p)(*(x[30:] for x in p)), y[30:])
    whole, _, _ = case("classes")
    whole.update(p, y)
    assert flat(suite.compute()) == pytest.approx(flat(whole.compute()), rel=1e-12)


def test_updates_under_inference_mode() -> None:
    suite, p, y = case("classes")
    with torch.inference_mode():
        suite.update(p, y)
    suite.update(p, y)
    assert suite.compute().images == 2 * len(y)


# --- two processes ---------------------------------------------------------------------------------------------------


SHARES = ([[5, 3, 4], [8]], [[20], []])  # the sizes of the batches of each process: unequal numbers, also none


def evaluate_part(rank: int, folder: str) -> None:
    """What each of the processes does: its images of every case."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    begins = [rank * sum(shares[0]) for shares in SHARES]
    found = [
        [evaluate_batches(name, begin, shares[rank]) for name in CASES]
        for begin, shares in zip(begins, SHARES, strict=True)
    ]
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    time.sleep(0.5)  # torch 2.6 hangs in the next line if a thread of gloo has yet to let go of a tensor of Python's
    dist.destroy_process_group()


def evaluate_batches(name: str, begin: int, sizes: list[int]) -> list[list[float]]:
    suite, p, y = case(name)
    unknown, fit = RankedScores(suite.task, n=suite.n), TemperatureFit(suite.task, segmentation=suite.segmentation)
    for size in sizes:
        batch = slice(begin, begin + size)
        part = type(p)(*(x[batch] for x in p))
        suite.update(part, y[batch])
        unknown.update(part._replace(variance=part.variance * 2))
        fit.update(part, y[batch])
        begin += size
    return [flat(suite.compute()), flat(detect(suite.ranked, unknown)), [fit.compute_temperature()]]


@pytest.mark.slow
def test_two_processes_find_the_same_as_one(tmp_path: Path) -> None:
    mp.spawn(evaluate_part, (str(tmp_path),), nprocs=2)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    for found in first:
        for name, theirs in zip(CASES, found, strict=True):
            for mine, other in zip(evaluate_batches(name, 0, [20]), theirs, strict=True):
                assert other == pytest.approx(mine, rel=1e-12)
