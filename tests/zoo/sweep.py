"""Convert every architecture of timm and torchvision without holding weights, and write down what happened.

    python tests/zoo/sweep.py                          # everything, on all cores; interrupt it and run it again
    python tests/zoo/sweep.py --only 'swin*' --fresh   # some of it, from the beginning
    python tests/zoo/coverage_report.py                # coverage.md and the README's table, from the results

Every architecture is made on the meta device and converted with the defaults. A result is a line of JSON, appended as
soon as it is known, so a sweep that is cut off goes on where it stopped.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import logging
import multiprocessing
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

import masksurgery
from masksurgery.convert import default_inputs
from masksurgery.kinds import is_layer
from masksurgery.prediction import Prediction, RegressionPrediction

RESULTS = Path(__file__).with_name("results.jsonl")
DETECTION = "detection: takes and returns lists; convert model.backbone"
QUANTISED = "quantised: int8 layers hold no floating-point channels to mask"


@dataclass
class Row:
    """What became of one architecture.

    Attributes:
        library: "timm" or "torchvision".
        name: As its library lists it.
        family: Module under timm.models; for torchvision the kind of model.
        parameters: Number of them.
        layers: Calls of a convolution or Linear, and those that are never called.
        sites: Masks.
        chained: Calls that the mask of another layer serves.
        skipped: How many others, by the first word of the reason.
        seconds: CPU seconds of the conversion.
        error: What failed, or None.
        excluded: Why it was not tried, or None.
    """

    library: str
    name: str
    family: str = ""
    parameters: int = 0
    layers: int = 0
    sites: int = 0
    chained: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    error: str | None = None
    excluded: str | None = None

    @property
    def share(self) -> float:
        """Of the calls of layers, those that are masked, by a mask of their own or of their chain."""
        return (self.sites + self.chained) / max(self.layers, 1)


def architectures() -> list[tuple[str, str]]:
    """(library, name) of everything that is swept."""
    return [("timm", name) for name in timm.list_models()] + [
        ("torchvision", name) for name in torchvision.models.list_models()
    ]


def check(library: str, name: str) -> Row:
    """Convert one architecture and look at the result; a failure is noted in the row."""
    row = Row(library, name, family_of(library, name))
    row.excluded = reason_to_exclude(library, name)
    if row.excluded is None:
        try:
            _check(row)
        except Exception as error:  # whatever a model raises is a result of the sweep
            place = traceback.extract_tb(error.__traceback__)[-1]
            row.error = f"{type(error).__name__}: {' '.join(str(error).split())[:300]} ({Path(place.filename).name})"
    return row


def family_of(library: str, name: str) -> str:
    if library == "timm":
        return str(timm.models._registry._model_to_module[name])
    module = torchvision.models.get_model_builder(name).__module__
    return module.removeprefix("torchvision.models.").split(".")[0] if module.count(".") > 2 else "classification"


def reason_to_exclude(library: str, name: str) -> str | None:
    family = family_of(library, name)
    return {"detection": DETECTION, "quantization": QUANTISED}.get(family) if library == "torchvision" else None


def create(library: str, name: str, **kwargs: Any) -> nn.Module:
    """The architecture without weights."""
    if library == "timm":
        with torch.device("meta"):
            return timm.create_model(name, **kwargs)
    if name.startswith("regnet"):  # their initialisation reads values
        return torchvision.models.get_model(name, weights=None, **kwargs).to("meta")
    with torch.device("meta"):
        kwargs = {
            "weights": None,
            **({"weights_backbone": None} if family_of(library, name) == "segmentation" else {}),
            **kwargs,
        }
        model: nn.Module = torchvision.models.get_model(name, **kwargs)
        return model


def inputs_of(library: str, name: str) -> tuple[Tensor] | None:
    """What one forward takes, where the model does not say it."""
    if library == "timm":
        return None
    if family_of(library, name) == "video":
        size = 112 if "resnet" in name or name.endswith("_18") else 224
        return (torch.zeros(1, 3, 16, size, size, device="meta"),)
    if family_of(library, name) == "optical_flow":
        return torch.zeros(1, 3, 128, 128, device="meta"), torch.zeros(1, 3, 128, 128, device="meta")
    size = 299 if name == "inception_v3" else 224
    return (torch.zeros(1, 3, size, size, device="meta"),)


def _check(row: Row) -> None:
    base = create(row.library, row.name)
    row.parameters = sum(p.numel() for p in base.parameters())
    inputs = inputs_of(row.library, row.name) or default_inputs(base)
    start = time.process_time()
    model = masksurgery.convert(base, example_inputs=inputs)
    row.seconds = round(time.process_time() - start, 2)
    surgery = model.surgery
    chained = [layer for site in surgery.sites for layer in site.chain]
    row.sites, row.chained = len(surgery.sites), len(chained)
    row.skipped = dict(Counter(skip.reason.split(":")[0] for skip in surgery.skipped))
    row.layers = row.sites + row.chained + len(surgery.skipped)
    named = {site.layer for site in surgery.sites} | {*chained} | {skip.layer for skip in surgery.skipped}
    layers = {name for name, module in base.named_modules() if is_layer(module)}
    if named != layers:
        raise AssertionError(f"not accounted for: {sorted(layers ^ named)[:5]}")
    keys = set(base.state_dict())
    if [key for key in model.state_dict() if key in keys] != list(base.state_dict()):
        raise AssertionError("the keys of the base model changed")
    for mode, batch in ((False, 2), (True, 5)):
        base.train(mode), model.train(mode)
        x = tuple(leaf.new_empty(batch, *leaf.shape[1:]) for leaf in inputs)
        with torch.no_grad():
            _compare(base(*x), model(*x), mode)


def _compare(theirs: Any, ours: Any, training: bool) -> None:
    """The same structure and shapes; in eval every tensor has become a prediction."""
    kinds = (Prediction, RegressionPrediction)
    leaves, spec = tree_flatten(theirs)
    found, other = tree_flatten(ours, is_leaf=lambda leaf: isinstance(leaf, kinds))
    if not training and not any(isinstance(leaf, kinds) for leaf in found):
        raise AssertionError("eval returns no prediction")
    ours_shapes = [_shape(leaf) for leaf in found]
    if other != spec or ours_shapes != [_shape(leaf) for leaf in leaves]:
        raise AssertionError(f"{'training' if training else 'eval'} returns {ours_shapes}")


def _shape(leaf: Any) -> Any:
    x = leaf.mean if isinstance(leaf, tuple) else leaf
    return list(x.shape) if isinstance(x, Tensor) else x


# --- the sweep -------------------------------------------------------------------------------------------------------


def read_results(path: Path = RESULTS) -> list[Row]:
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    return [Row(**json.loads(line)) for line in lines if line.endswith("}")]  # the last may be cut off


def sweep(todo: Sequence[tuple[str, str]], jobs: int) -> Iterator[Row]:
    """The rows of these architectures, in the order in which they are done."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, initializer=run_quietly) as pool:
        futures = [pool.submit(check, *which) for which in todo]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def run_quietly() -> None:
    """On one thread, without the advice to fine-tune."""
    torch.set_num_threads(1)
    logging.getLogger("masksurgery").setLevel(logging.ERROR)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--jobs", type=int, default=multiprocessing.cpu_count())
    parser.add_argument("--only", default="*", help="a glob of names")
    parser.add_argument("--fresh", action="store_true", help="forget what is known of them")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    chosen = [which for which in architectures() if fnmatch.fnmatch(which[1], options.only)]
    known = {(row.library, row.name): row for row in read_results(options.results)}
    if options.fresh:
        known = {which: row for which, row in known.items() if which not in set(chosen)}
        options.results.write_text("".join(json.dumps(asdict(row)) + "\n" for row in known.values()), encoding="utf-8")
    todo = [which for which in chosen if which not in known]
    columns = (TextColumn("{task.description:32}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    failed = 0
    with Progress(*columns) as progress, options.results.open("a", encoding="utf-8") as file:
        task = progress.add_task("", total=len(chosen), completed=len(chosen) - len(todo))
        for row in sweep(todo, options.jobs):
            file.write(json.dumps(asdict(row)) + "\n")
            file.flush()
            progress.update(task, advance=1, description=row.name[:32])
            if row.error:
                failed += 1
                progress.console.print(f"{row.name}: {row.error}", markup=False)
    print(f"{len(chosen)} architectures, {failed} failed now; results in {options.results}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
