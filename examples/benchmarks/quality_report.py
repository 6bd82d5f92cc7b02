"""Tables and a plot of what `quality.py` found. Settings are chosen by the validation part, here and nowhere else."""

from __future__ import annotations

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inference import markdown
from quality_tasks import TASKS

TITLES = {
    "base": "base model",
    "temperature": "base model, temperature",
    "dropout4": "MC dropout, 4 passes",
    "dropout30": "MC dropout, 30 passes",
    "masksembles": "Masksembles",
    "tuned ensemble": "4 models from the one base model",
    "ensemble": "deep ensemble of 4",
}
CLASSES = {
    "accuracy": "accuracy", "nll": "NLL", "calibrated": "at its temperature", "ece": "ECE", "brier": "Brier",
    "aurc": "AURC", "entropy": "AUROC entropy", "mutual_information": "AUROC MI",
}  # fmt: skip
NUMBERS = {
    "rmse": "RMSE", "nll": "NLL", "calibrated": "at its temperature", "crps": "CRPS", "coverage90": "in 90% interval",
    "aurc": "AURC",
}  # fmt: skip
DIGITS = 3
INTRODUCTION = """\
# Quality

Written by `examples/benchmarks/quality.py`. Mean ± standard error over the seeds. The epochs, learning rate and options
of each method (*settings*) are those with the lowest NLL on the validation part; all else is of the test part. *At its
temperature*: the NLL with a temperature fitted to the validation part, without which a method may win by what any other
could have too (Ashukha et al. 2020, arXiv:2002.06470). *Epochs* are all that were trained beyond the base model. *MACs*
are multiply-adds of a prediction, the base model's as 1, of Masksembles packed (and converted). Unknown images are
MNIST's."""
SCORES = ("entropy", "mutual_information")
"""What tells unknown images; there are AUROCs of."""
DEFAULT: dict[str, Any] = {}
"""Options of Masksembles as they are."""


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

    def by_seed(self, figure: str) -> dict[int, float]:
        return dict(zip(sorted(self.results), self.values(figure), strict=True))

    @property
    def val_nll(self) -> float:
        """What settings are chosen by."""
        return statistics.fmean(self.values("nll", "val"))

    @property
    def label(self) -> str:
        """The options."""
        default = "n 4, scale 2" if self.name == "masksembles" else ""
        return ", ".join(f"{name} {value}" for name, value in self.options.items()) or default

    @property
    def text(self) -> str:
        """All that was chosen."""
        return ", ".join(filter(None, (f"{self.epochs} epochs", f"lr {self.lr:g}", self.label)))


def write_report(rows: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Write quality.md and quality.png."""
    settings = {task: [*_settings(row for row in rows if row["task"] == task)] for task in TASKS}
    found = {task: some for task, some in settings.items() if some}
    base_macs = {row["task"]: row["base_macs"] for row in rows}
    (folder / "quality.md").write_text(document(found, base_macs, rows), encoding="utf-8")
    plot(found, base_macs, folder / "quality.png")


def _settings(rows: Iterable[Mapping[str, Any]]) -> Iterator[Setting]:
    """Those that can be compared: of the seeds with which most was run, what was run with all of these."""
    found: dict[tuple[Any, ...], dict[int, Mapping[str, Any]]] = defaultdict(dict)
    for row in rows:
        for result in row["results"]:
            key = (result["name"], row["epochs"], row["lr"], tuple(sorted(row["options"].items())))
            found[key][row["seed"]] = result
    counts = Counter(seed for results in found.values() for seed in results)
    seeds = {seed for seed, count in counts.items() if count == max(counts.values())}
    for (name, epochs, lr, options), results in found.items():
        if seeds <= results.keys():
            yield Setting(name, epochs, lr, dict(options), {seed: results[seed] for seed in seeds})


def best(settings: Iterable[Setting]) -> Setting:
    """The setting with the lowest NLL on the validation part."""
    return min(settings, key=lambda setting: setting.val_nll)


def chosen(settings: Sequence[Setting]) -> dict[str, Setting]:
    """By title the setting of each method; of Masksembles with the default masks, and with any."""
    found: dict[str, list[Setting]] = {}
    for name, title in TITLES.items():
        mine = [setting for setting in settings if setting.name == name]
        if name == "masksembles":
            found[f"{title}, n=4, scale=2"] = [setting for setting in mine if setting.options == DEFAULT]
            title = f"{title}, chosen"
        found[title] = mine
    return {title: best(some) for title, some in found.items() if some}


# --- tables ----------------------------------------------------------------------------------------------------------


def document(found: Mapping[str, Sequence[Setting]], base_macs: Mapping[str, int], rows: Sequence[Any]) -> str:
    """The text of quality.md."""
    versions = sorted({f"torch {row['versions']['torch']}, timm {row['versions']['timm']}" for row in rows})
    machines = sorted({row["machine"] for row in rows})
    parts = [f"{INTRODUCTION}\n\n{'; '.join(machines)}; {'; '.join(versions)}.\n"]
    for task, settings in found.items():
        seeds = sorted(settings[0].results)
        budgets = " or ".join(str(epochs) for epochs in sorted({setting.epochs for setting in settings}))
        had = f"The base model has had {TASKS[task].base_epochs} epochs, and each method {budgets} more."
        parts.append(f"## {TASKS[task].title}\n\n{len(seeds)} seeds. {had}\n")
        some = chosen(settings)
        parts.append(main_table(task, some, base_macs[task]))
        parts += [f"{text}\n" for text in shares(some, base_macs[task])]
        tried = variations(settings, base_macs[task])
        if tried:
            parts.append(f"What was tried of Masksembles:\n\n{tried}")
    return "\n".join(parts)


def columns(task: str) -> Mapping[str, str]:
    return NUMBERS if TASKS[task].kind == "regression" else CLASSES


def main_table(task: str, settings: Mapping[str, Setting], base_macs: int) -> str:
    """A line for each method."""
    lines = []
    for title, setting in settings.items():
        results = setting.results.values()
        cells = [mean_and_error(setting.values(figure)) for figure in columns(task)]
        epochs = next(f"{result['train_epochs']:g}" for result in results)
        seconds = f"{statistics.fmean(result['train_seconds'] for result in results):.0f}"
        lines.append([title, *cells, epochs, seconds, macs_cell(setting, base_macs), setting.text])
    return markdown(["", *columns(task).values(), "epochs", "seconds", "MACs", "settings"], lines)


def variations(settings: Sequence[Setting], base_macs: int) -> str:
    """A line for each set of options of Masksembles, trained as is best for it; empty if there is but one."""
    groups: dict[str, list[Setting]] = defaultdict(list)
    for setting in settings:
        if setting.name == "masksembles":
            groups[setting.label].append(setting)
    lines, named = [], [score for score in SCORES if settings[0].values("entropy")]
    for label, some in groups.items():
        one = best(some)
        shown = [one.values("nll", "val"), *(one.values(figure) for figure in ("nll", "calibrated", *named))]
        trained = f"{one.epochs} epochs, lr {one.lr:g}"
        lines.append([label, *map(mean_and_error, shown), macs_cell(one, base_macs), trained])
    head = ["", "validation NLL", "NLL", "at its temperature", *(CLASSES[score] for score in named), "MACs", "settings"]
    return markdown(head, lines) if len(lines) > 1 else ""


def mean_and_error(values: Sequence[float]) -> str:
    if not values:
        return "-"
    return f"{statistics.fmean(values):.{DIGITS}f} ± {standard_error(values):.{DIGITS}f}"


def standard_error(values: Sequence[float]) -> float:
    """Of the mean; NaN for one value."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def relative_macs(setting: Setting, base_macs: int) -> dict[str, float]:
    """By how it is computed, of the base model's; means over the seeds."""
    rows = [result["macs"] for result in setting.results.values()]
    return {name: statistics.fmean(row[name] for row in rows) / base_macs for name in rows[0]}


def macs_cell(setting: Setting, base_macs: int) -> str:
    macs = relative_macs(setting, base_macs)
    if "packed" in macs:
        return f"{macs['packed']:.2f} ({macs['converted']:.2f})"
    return f"{next(iter(macs.values())):.0f}"


def shares(settings: Mapping[str, Setting], base_macs: int) -> Iterator[str]:
    """Of a deep ensemble's gain over the base model what Masksembles keep, where there is one to speak of."""
    base, ensemble = settings.get(TITLES["base"]), settings.get(TITLES["ensemble"])
    if base is None or ensemble is None:
        return
    for figure, title, sign in (("nll", "NLL", -1), ("entropy", "AUROC by entropy", 1)):
        if not base.values(figure):
            continue
        gains = paired(ensemble, base, figure, sign)
        mean, error = statistics.fmean(gains), standard_error(gains)
        if not mean > 2 * error:
            yield f"{title}: the deep ensemble's gain, {mean:.4f} ± {error:.4f}, is not above two standard errors."
            continue
        kept = []
        for name, setting in settings.items():
            if setting.name == "masksembles":
                share = statistics.fmean(paired(setting, base, figure, sign)) / mean
                of_macs = relative_macs(setting, base_macs)["packed"] / relative_macs(ensemble, base_macs)["members"]
                kept.append(f"{name}: {share:.0%} at {of_macs:.2f} of its MACs")
        yield f"{title}: the deep ensemble gains {mean:.4f} ± {error:.4f}. Of that keep {'; '.join(kept)}."


def paired(one: Setting, base: Setting, figure: str, sign: int) -> list[float]:
    """By how much it is better, seed by seed."""
    mine, theirs = one.by_seed(figure), base.by_seed(figure)
    return [sign * (mine[seed] - theirs[seed]) for seed in sorted(mine.keys() & theirs.keys())]


# --- plot ------------------------------------------------------------------------------------------------------------


def plot(found: Mapping[str, Sequence[Setting]], base_macs: Mapping[str, int], file: Path) -> None:
    """NLL, and AUROC by entropy where there are unknown images, against the multiply-adds of a prediction."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = [(task, figure) for task in found for figure in ("nll", "entropy") if found[task][0].values(figure)]
    across = 2
    down = math.ceil(len(rows) / across)
    figure, grid = plt.subplots(down, across, figsize=(10, 3.6 * down), squeeze=False, layout="constrained")
    for axes, (task, what) in zip(grid.flat, rows, strict=False):
        for k, (title, setting) in enumerate(chosen(found[task]).items()):
            values = setting.values(what)
            mean, error = statistics.fmean(values), standard_error(values)
            macs = relative_macs(setting, base_macs[task])
            at = macs.get("packed", next(iter(macs.values())))
            axes.errorbar(
                at, mean, None if math.isnan(error) else error, fmt="o", color=f"C{k}", capsize=3, label=title
            )
            if "packed" in macs:
                axes.plot(macs["converted"], mean, "o", color=f"C{k}", fillstyle="none")
        axes.set_xscale("log")
        axes.set_xticks([1, 2, 4, 8, 30], ["1", "2", "4", "8", "30"])
        axes.minorticks_off()
        axes.set_xlabel("multiply-adds of a prediction, the base model as 1")
        axes.set_ylabel("NLL (lower is better)" if what == "nll" else "AUROC by entropy (higher is better)")
        axes.set_title(TASKS[task].title, fontsize=10)
        axes.grid(alpha=0.3)
    for axes in grid.flat[len(rows) :]:
        axes.set_axis_off()
    handles = {
        label: handle for axes in grid.flat for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(file, dpi=110)
    plt.close(figure)
