"""What a training step of a converted model costs, relative to one of its base model.

    python examples/benchmarks/step_cost.py [--threads N] [--repeats N] [--only MODEL]

Both models take turns in one process, so that a busy moment of the machine meets them both. A step is zero_grad,
forward, cross-entropy, backward and SGD with momentum: a dearer optimiser would only hide the share of the masks. Takes
about four minutes on one thread. Exit code 1: a model costs more than --limit times its base model.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import timm
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

import masksurgery

# Batch size, and side of the images in pixels.
MODELS = {"resnet50": (16, 160), "vit_tiny_patch16_224": (32, 224)}
WARM_UP = 3  # pairs: the first steps allocate the optimiser's state and warm the caches
Step = Callable[[], None]


@dataclass(frozen=True)
class Cost:
    """Median seconds of a step of both models, and the median of the ratios of the pairs with its 95% interval."""

    model: str
    base: float
    converted: float
    ratio: float
    low: float
    high: float


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="MODEL", help=f"any timm architecture (default: {' and '.join(MODELS)})")
    parser.add_argument("--batch", type=int, help="samples in a step (default: resnet50 16, others 32)")
    parser.add_argument("--repeats", type=int, default=20, help="pairs of steps, at least 6 (default: 20)")
    parser.add_argument("--threads", type=int, help="threads of torch (default: torch's own)")
    parser.add_argument("--limit", type=float, default=1.15, help="highest median ratio (default: 1.15)")
    options = parser.parse_args(arguments)
    if options.repeats < 6:
        parser.error("--repeats: fewer than 6 pairs have no 95% interval")
    if options.threads:
        torch.set_num_threads(options.threads)
    names = [options.only] if options.only else list(MODELS)
    costs = [measure(name, options.batch, options.repeats) for name in names]
    console = Console(width=80)
    console.print(as_table(costs))
    console.print(
        f"Medians of {options.repeats} pairs, {torch.get_num_threads()} of {os.cpu_count()} CPUs, "
        f"load {os.getloadavg()[0]:.1f}, torch {torch.__version__}, timm {timm.__version__}."
    )
    over = [cost.model for cost in costs if cost.ratio > options.limit]
    if over:
        print(f"More than {options.limit} times the base model: {', '.join(over)}", file=sys.stderr)
    return 1 if over else 0


def as_table(costs: list[Cost]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, width=80)
    for heading in ("model", "base", "converted", "ratio", "95% interval"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for cost in costs:
        seconds = (f"{cost.base:.3f} s", f"{cost.converted:.3f} s")
        table.add_row(cost.model, *seconds, f"{cost.ratio:.3f}", f"{cost.low:.3f} to {cost.high:.3f}")
    return table


def measure(name: str, batch: int | None, repeats: int) -> Cost:
    """Times of training steps of a timm model with random weights, and of its conversion (n=4, scale=2)."""
    base = timm.create_model(name)
    known_batch, size = MODELS.get(name, (32, base.pretrained_cfg["input_size"][-1]))
    shape = (batch or known_batch, 3, size, size)
    converted = masksurgery.convert(base, n=4, scale=2.0, example_inputs=(torch.zeros(1, *shape[1:]),))
    random = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=random)
    y = torch.randint(base.num_classes, shape[:1], generator=random)
    seconds = take_turns(make_step(base, x, y), make_step(converted, x, y), repeats)
    ratio, low, high = median_interval([b / a for a, b in zip(*seconds, strict=True)])
    return Cost(name, statistics.median(seconds[0]), statistics.median(seconds[1]), ratio, low, high)


def make_step(model: nn.Module, x: Tensor, y: Tensor) -> Step:
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def take_turns(first: Step, second: Step, repeats: int) -> tuple[list[float], list[float]]:
    """Seconds of each repetition of both. Which one goes first alternates; the warm-up is not counted."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for k in range(WARM_UP + repeats):
        for i in (0, 1) if k % 2 else (1, 0):
            start = time.perf_counter()
            (first, second)[i]()
            seconds[i].append(time.perf_counter() - start)
    return seconds[0][WARM_UP:], seconds[1][WARM_UP:]


def median_interval(values: list[float], level: float = 0.95) -> tuple[float, float, float]:
    """Median of the values, and an interval that holds the true median with probability `level` or more.

    Whatever the distribution, how many of n values lie below its median is binomial (n, 1/2). So the interval from
    the k-th smallest to the k-th largest misses the median with probability 2 P(fewer than k).

    Raises:
        ValueError: Even the range of all values holds the median with less probability than `level`.
    """
    n, ordered = len(values), sorted(values)
    k = 0  # values left out at each side
    tail = 2 / 2**n  # probability to miss the median, as k stands
    if tail > 1 - level:
        raise ValueError(f"{n} values are too few for a {level:.0%} interval of their median.")
    while (wider := tail + 2 * math.comb(n, k + 1) / 2**n) <= 1 - level:
        k, tail = k + 1, wider
    return statistics.median(ordered), ordered[k], ordered[n - 1 - k]


if __name__ == "__main__":
    sys.exit(main())
