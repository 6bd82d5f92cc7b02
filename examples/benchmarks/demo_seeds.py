"""Base model against ensemble over several seeds of the demo: NLL, ECE, and AUROC for unseen digits by entropy.

Run it where `masksurgery[demo]` is installed:

    python examples/benchmarks/demo_seeds.py --out seeds.json

For each seed another split, other weights, masks and batches. The base model gets as many further epochs as the
ensemble, and both are evaluated as they are and with a temperature, on the same half of the test images: the other half
is what the temperature is fitted on. The score that tells unseen digits from known ones is the entropy: chosen before
any result was seen. The demo was set up with the seeds 0 to 2, which are therefore not among those that are compared.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from masksurgery.demo import EPOCHS, Demo
from masksurgery.evaluation_config import EvaluateConfig

FIGURES = ("accuracy", "nll", "ece", "auroc")


def figures_of(demo: Demo, temperature: bool) -> dict[str, dict[str, float]]:
    """By model its figures in `FIGURES`, and its temperature."""
    # Without a temperature the same images are held out, by a threshold that refuses none.
    fitted: dict[str, Any] = {"temperature": True} if temperature else {"coverage": 1.0}
    found = demo.evaluate(EvaluateConfig(ood=(str(demo.unseen),), workers=0, fit_fraction=0.5, **fitted))
    rows = {}
    for model in found.models:
        row = {name: model.figures[name] for name in FIGURES[:3]}
        row["auroc"] = model.detection[str(demo.unseen)]["entropy"]["auroc"]
        rows[Path(model.name).name] = {**row, "temperature": model.temperature or 1.0}
    return rows


def run_seed(seed: int, epochs: tuple[int, int]) -> dict[str, dict[str, float]]:
    """Everything for one seed."""
    with tempfile.TemporaryDirectory() as place:
        demo = Demo(Path(place) / "demo", seed)
        demo.prepare()
        demo.train(epochs[0])
        demo.convert()
        demo.finetune(demo.ensemble, epochs[1])
        demo.finetune(demo.base, epochs[1], base_only=True)
        plain = figures_of(demo, temperature=False)  # first: what is fitted is stored in the folder
        fitted = figures_of(demo, temperature=True)
    return {**plain, **{f"{name}, temperature": row for name, row in fitted.items()}}


def show(rows: Iterable[dict[str, dict[str, float]]]) -> None:
    """Mean and standard deviation over the seeds."""
    rows = list(rows)
    print(f"{'':24}" + "".join(f"{name:>18}" for name in (*FIGURES, "temperature")))
    for name in rows[0]:
        cells = []
        for key in (*FIGURES, "temperature"):
            values = [row[name][key] for row in rows]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.mean(values):.4f} ± {spread:.4f}")
        print(f"{name:24}" + "".join(f"{cell:>18}" for cell in cells))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[10, 11, 12, 13, 14])
    parser.add_argument("--epochs", type=int, nargs=2, default=None, metavar=("FIRST", "MORE"))
    parser.add_argument("--out", type=Path, metavar="FILE", help="all figures as JSON")
    options = parser.parse_args(arguments)
    rows = {}
    for seed in options.seeds:
        rows[seed] = run_seed(seed, tuple(options.epochs or EPOCHS))
        print(f"seed {seed}")
        show([rows[seed]])
    print(f"\nmean and standard deviation over {len(rows)} seeds")
    show(rows.values())
    if options.out:
        options.out.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
