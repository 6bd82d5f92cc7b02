"""What `quality.py` found, by setting; and which settings are chosen: by the validation part, here and nowhere else."""

from __future__ import annotations

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

TITLES = {
    "base": "base model",
    "temperature": "base model, temperature",
    "dropout4": "MC dropout, 4 passes",
    "dropout30": "MC dropout, 30 passes",
    "masksembles": "Masksembles",
    "masksembles temperature": "Masksembles, temperature",
    "own statistics": "Masksembles, BatchNorm by member",
    "tuned ensemble": "4 models from the one base model",
    "ensemble": "deep ensemble of 4",
}
SCORES = ("entropy", "mutual_information")
"""What tells unknown images; there are AUROCs of."""
DEFAULT: dict[str, Any] = {}
"""Options of Masksembles as they are."""
MASK_OPTIONS = {"n", "scale", "sites", "rescale"}
"""Options that change the masks, and not what training costs."""
AFFORDED = 2.0
"""Of the base model's multiply-adds what a prediction may cost to be chosen: half a deep ensemble of 4."""


@dataclass(frozen=True)
class Setting:
    """One method with one set of options, over the seeds.

    Attributes:
        name: As in TITLES.
        epochs, lr, options: What it was trained with.
        results: By seed.
    """

    name: str
    epochs: int
    lr: float
    options: Mapping[str, Any]
    results: Mapping[int, Mapping[str, Any]]

    def values(self, figure: str, part: str = "test") -> list[float]:
        """A figure of each seed, in the order of the seeds; empty where it has none."""
        rows = [self.results[seed] for seed in sorted(self.results)]
        if figure in SCORES:
            rows = [row.get("auroc", {}) for row in rows]
        elif figure == "calibrated":
            rows = [{figure: row.get("calibrated", row["test"])["nll"]} for row in rows]
        else:
            rows = [row[part] for row in rows]
        return [row[figure] for row in rows] if all(figure in row for row in rows) else []

    def of(self, seeds: Collection[int]) -> Setting:
        """The same with these seeds alone."""
        return replace(self, results={seed: self.results[seed] for seed in sorted(seeds)})

    @property
    def val_nll(self) -> float:
        """What settings are chosen by."""
        return statistics.fmean(self.values("nll", "val"))

    @property
    def label(self) -> str:
        """The options."""
        default = "n 4, scale 2" if self.name.startswith("masksembles") else ""
        return ", ".join(f"{name} {value}" for name, value in self.options.items()) or default

    @property
    def text(self) -> str:
        """All that was chosen."""
        return ", ".join(filter(None, (f"{self.epochs} epochs", f"lr {self.lr:g}", self.label)))


def collect(rows: Iterable[Mapping[str, Any]]) -> list[Setting]:
    """All of them, each with the seeds that it was run with."""
    found: dict[tuple[Any, ...], dict[int, Mapping[str, Any]]] = defaultdict(dict)
    for row in rows:
        for result in row["results"]:
            key = (result["name"], row["epochs"], row["lr"], tuple(sorted(row["options"].items())))
            found[key][row["seed"]] = result
    return [Setting(name, epochs, lr, dict(options), found) for (name, epochs, lr, options), found in found.items()]


def settings_of(rows: Iterable[Mapping[str, Any]]) -> list[Setting]:
    """Those that can be compared: with the seeds that most methods have, for a seed may only have begun."""
    found = collect(rows)
    counts = Counter(seed for setting in found for seed in setting.results)
    furthest = [seed for seed, _ in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))]
    choices = [set(furthest[: k + 1]) for k in range(len(furthest))]

    def worth(some: set[int]) -> int:
        return len(some) * len({setting.name for setting in found if some <= setting.results.keys()})

    seeds = max(choices, key=worth, default=set())
    return [setting.of(seeds) for setting in found if seeds <= setting.results.keys()]


def best(settings: Iterable[Setting]) -> Setting:
    """The setting with the lowest NLL on the validation part."""
    return min(settings, key=lambda setting: setting.val_nll)


def chosen(settings: Sequence[Setting], base_macs: int) -> dict[str, Setting]:
    """By title the setting of each method; of Masksembles also of those that cost as much to train as the default.

    Of these only what can be afforded.
    """
    found: dict[str, list[Setting]] = {}
    for name, title in TITLES.items():
        mine = [setting for setting in settings if setting.name == name]
        if name == "masksembles":
            found[f"{title}, n=4, scale=2"] = [setting for setting in mine if setting.options == DEFAULT]
        if name.startswith("masksembles"):
            found[f"{title}, chosen"] = [setting for setting in mine if is_afforded(setting, base_macs)]
        else:
            found[title] = mine
    return {title: best(some) for title, some in found.items() if some}


def variations_of(rows: Iterable[Mapping[str, Any]]) -> list[list[tuple[Setting, Setting]]]:
    """What was tried of Masksembles, each beside n=4, scale 2 with the same epochs, learning rate and seeds.

    Returns:
        A list for each budget and rate, first that with which most was tried; in it first n=4, scale 2 itself.
    """
    mine = [setting for setting in collect(rows) if setting.name == "masksembles"]
    found = []
    for usual in [setting for setting in mine if setting.options == DEFAULT]:
        alike = [setting for setting in mine if (setting.epochs, setting.lr) == (usual.epochs, usual.lr)]
        shared = [(setting, setting.results.keys() & usual.results.keys()) for setting in alike]
        pairs = [(setting.of(seeds), usual.of(seeds)) for setting, seeds in shared if seeds]
        found.append(sorted(pairs, key=lambda pair: pair[0].options != DEFAULT))
    return sorted((pairs for pairs in found if len(pairs) > 1), key=len, reverse=True)


def relative_macs(setting: Setting, base_macs: int) -> dict[str, float]:
    """By how it is computed, of the base model's; means over the seeds."""
    rows = [result["macs"] for result in setting.results.values()]
    return {name: statistics.fmean(row[name] for row in rows) / base_macs for name in rows[0]}


def prediction_macs(setting: Setting, base_macs: int) -> float:
    """Of the base model's: of Masksembles packed."""
    macs = relative_macs(setting, base_macs)
    return macs.get("packed", next(iter(macs.values())))


def is_afforded(setting: Setting, base_macs: int) -> bool:
    """Whether these are masks that cost less than half a deep ensemble, and no more training than others."""
    return setting.options.keys() <= MASK_OPTIONS and prediction_macs(setting, base_macs) < AFFORDED


def standard_error(values: Sequence[float]) -> float:
    """Of the mean; NaN for one value."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
