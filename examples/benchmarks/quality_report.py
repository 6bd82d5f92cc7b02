"""The tables of what `quality.py` found."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from inference import markdown
from quality_plan import SEEDS, longer, run_of, sweep
from quality_plots import plot_masks, plot_methods
from quality_settings import (
    MASK_OPTIONS,
    SCORES,
    TITLES,
    Setting,
    chosen,
    prediction_macs,
    relative_macs,
    settings_of,
    standard_error,
    variations_of,
)
from quality_tasks import TASKS

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

Written by `examples/benchmarks/quality.py`. Mean ± standard error over the seeds. The epochs and the learning rate of
each method (*settings*) are those with the lowest NLL on the validation part in a sweep, of which the last table of a
task tells; longer budgets are for the methods that were best with the longest before. What else is tried of
Masksembles is trained as was best for n=4, scale=2 with a budget that all of it can have, and its table has the
differences from that with the same seeds; the best few masks that cost less than half the ensemble are then trained
longest on one seed, and the best of these on all. All figures but those of validation are of the test part.

*At its temperature*: the NLL with a temperature fitted to the validation part, without which a method may win by what
any other could have too (Ashukha et al. 2020, arXiv:2002.06470). *Epochs* are all that were trained beyond the base
model. *MACs* are multiply-adds of a prediction, the base model's as 1, of Masksembles packed (and converted), of
dropout with what stands before it computed once. *BatchNorm by member*: the same weights, with statistics that are
re-estimated for each member on the training part. Unknown images are MNIST's. The share of a gain is told, with an
error by the jackknife, where the deep ensemble's is above two standard errors. "Chosen" are Masksembles with any n,
scale and sites that cost less than half the ensemble, trained at the same cost.

The seeds differ in initial weights, masks and batches; images are split in one way, so that the errors are those of
training. The patients of diabetes are split anew for each seed, but out of the same 442."""
BEGIN, END = "<!-- quality: begin -->\n", "<!-- quality: end -->\n"
CHOICES = "<!-- choices: begin -->\n", "<!-- choices: end -->\n"
GAINS = {"nll": "NLL", "calibrated": "NLL at its temperature", "entropy": "AUROC entropy"}
"""What shares of gains are said of."""


def write_report(rows: Sequence[Mapping[str, Any]], folder: Path, readme: Path | None = None) -> None:
    """Write quality.md, and if there is anything to show quality.png and quality_masks.png.

    Args:
        rows: What was run.
        folder: For these.
        readme: A file with a place for the main figures.
    """
    by_task = {task: [row for row in rows if row["task"] == task and row["results"]] for task in TASKS}
    found = {task: settings_of(some) for task, some in by_task.items() if some}
    base_macs = {row["task"]: row["base_macs"] for row in rows}
    (folder / "quality.md").write_text(document(found, base_macs, rows), encoding="utf-8")
    if not found:
        return
    if readme is not None:
        text = update_readme(readme.read_text(encoding="utf-8"), readme_tables(found, base_macs))
        choices = [heading(task, found[task]) + variations(by_task[task], base_macs[task]) for task in found]
        readme.write_text(update_readme(text, "\n".join(choices), *CHOICES), encoding="utf-8")
    plots = {task: (TASKS[task].title, base_macs[task], some) for task, some in found.items()}
    plot_methods({title: (macs, chosen(some, macs)) for title, macs, some in plots.values()}, folder / "quality.png")
    tried = {task: variations_of(by_task[task]) for task in found}
    masks = {
        TASKS[task].title: (
            base_macs[task],
            [[pair for pair in pairs if pair[0].options.keys() <= MASK_OPTIONS] for pairs in some],
        )
        for task, some in tried.items()
        if some
    }
    if masks:
        plot_masks(masks, folder / "quality_masks.png")


# --- tables ----------------------------------------------------------------------------------------------------------


def document(found: Mapping[str, Sequence[Setting]], base_macs: Mapping[str, int], rows: Sequence[Any]) -> str:
    """The text of quality.md."""
    versions = sorted({f"torch {row['versions']['torch']}, timm {row['versions']['timm']}" for row in rows})
    machines = sorted({row["machine"] for row in rows})
    parts = [f"{INTRODUCTION}\n\n{'; '.join(machines)}; {'; '.join(versions)}.\n"]
    for task, settings in found.items():
        seeds = sorted(settings[0].results)
        *some, last = map(str, sorted({setting.epochs for setting in settings}))
        budgets = f"{', '.join(some)} or {last}" if some else last
        had = f"The base model has had {TASKS[task].base_epochs} epochs, and each method {budgets} more."
        count = f"{len(seeds)} seeds" if len(seeds) > 1 else "One seed"
        parts.append(f"## {TASKS[task].title}\n\n{count}. {had}\n")
        methods, of_task = chosen(settings, base_macs[task]), [row for row in rows if row["task"] == task]
        parts.append(main_table(task, methods, base_macs[task]))
        parts += [shares(methods, base_macs[task]), corrupted(methods), variations(of_task, base_macs[task])]
        parts.append(tried(task, rows))
    return "\n".join(filter(None, parts))


def columns(task: str) -> Mapping[str, str]:
    return NUMBERS if TASKS[task].kind == "regression" else CLASSES


def readme_tables(found: Mapping[str, Sequence[Setting]], base_macs: Mapping[str, int]) -> str:
    """What a reader wants first: a table for each task, without what was chosen."""
    parts = []
    for task, settings in found.items():
        some, lines = chosen(settings, base_macs[task]), []
        shown = {figure: title for figure, title in columns(task).items() if figure not in ("brier", "aurc", "crps")}
        for title, setting in some.items():
            cells = [mean_and_error(setting.values(figure)) for figure in shown]
            lines.append([title, *cells, macs_cell(setting, base_macs[task])])
        parts.append(heading(task, settings) + markdown(["", *shown.values(), "MACs"], lines))
    return "\n".join(parts)


def heading(task: str, settings: Sequence[Setting]) -> str:
    count = len(settings[0].results)
    return f"**{TASKS[task].title}**, {count} seed{'' if count == 1 else 's'}:\n\n"


def update_readme(text: str, tables: str, begin: str = BEGIN, end: str = END) -> str:
    """The README with these tables between its marks."""
    before, mark, rest = text.partition(begin)
    return before + mark + tables + rest[rest.index(end) :]


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


def variations(rows: Sequence[Mapping[str, Any]], base_macs: int) -> str:
    """A table for each budget that options of Masksembles were tried with."""
    return "\n".join(_variations(pairs, base_macs) for pairs in variations_of(rows))


def _variations(pairs: Sequence[tuple[Setting, Setting]], base_macs: int) -> str:
    """A line for each set of options: by how much it differs from n=4, scale 2 of the same seeds."""
    usual, figures = pairs[0][0], {"validation NLL": ("nll", "val"), **{t: (f, "test") for f, t in GAINS.items()}}
    shown = {title: of for title, of in figures.items() if usual.values(*of)}
    lines = []
    for one, other in pairs:
        values = [zip(one.values(*of), other.values(*of), strict=True) for of in shown.values()]
        apart = [mean_and_error([a - b for a, b in pair], sign=True) for pair in values]
        cells = apart if one is not usual else [mean_and_error(one.values(*of)) for of in shown.values()]
        lines.append([one.label, str(len(one.results)), *cells, macs_cell(one, base_macs)])
    return markdown([f"Masksembles, {usual.epochs} epochs, lr {usual.lr:g}", "seeds", *shown, "MACs"], lines)


def tried(task: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """A line for each method: the validation NLL by epochs and learning rate; empty without a sweep."""
    runs = [run for profile in SEEDS for run in (*sweep(task, profile), *longer(task, profile, rows))]
    swept = {run.key for run in runs}
    settings = settings_of([row for row in rows if run_of(row).key in swept])
    ways = sorted({(setting.epochs, setting.lr) for setting in settings})
    lines = []
    for name, title in TITLES.items():
        mine = {(setting.epochs, setting.lr): setting for setting in settings if setting.name == name}
        if mine:
            lines.append(
                [title, *(mean_and_error(mine[way].values("nll", "val") if way in mine else []) for way in ways)]
            )
    titles = [f"{epochs} epochs, lr {lr:g}" for epochs, lr in ways]
    return markdown(["validation NLL in the sweep", *titles], lines) if lines else ""


def mean_and_error(values: Sequence[float], sign: bool = False) -> str:
    if not values:
        return "-"
    mean = f"{statistics.fmean(values):{'+' if sign else ''}.{DIGITS}f}"
    return f"{mean} ± {standard_error(values):.{DIGITS}f}" if len(values) > 1 else mean


def macs_cell(setting: Setting, base_macs: int) -> str:
    at, macs = prediction_macs(setting, base_macs), relative_macs(setting, base_macs)
    return f"{at:.2f} ({macs['converted']:.2f})" if "packed" in macs else f"{at:.0f}"


def shares(settings: Mapping[str, Setting], base_macs: int) -> str:
    """A table: of a deep ensemble's gain over the base model what each method keeps; empty without both."""
    base, ensemble = settings.get(TITLES["base"]), settings.get(TITLES["ensemble"])
    if base is None or ensemble is None:
        return ""
    figures = {name: title for name, title in GAINS.items() if base.values(name)}
    lines = [["gain of the deep ensemble", *(_gain(ensemble, base, name) for name in figures), ""]]
    whole = prediction_macs(ensemble, base_macs)
    for title, setting in settings.items():
        if setting not in (base, ensemble):
            kept = [_share(setting, ensemble, base, name) for name in figures]
            lines.append([title, *kept, f"{prediction_macs(setting, base_macs) / whole:.2f}"])
    return markdown(["share of the gain", *figures.values(), "share of the MACs"], lines)


def _gain(ensemble: Setting, base: Setting, figure: str) -> str:
    return mean_and_error(paired(ensemble, base, figure))


def _share(setting: Setting, ensemble: Setting, base: Setting, figure: str) -> str:
    """With a standard error by the jackknife; nothing where there is no gain to speak of."""
    whole, own = paired(ensemble, base, figure), paired(setting, base, figure)
    if not statistics.fmean(whole) > 2 * standard_error(whole):
        return "-"
    without = [(sum(own) - a) / (sum(whole) - b) for a, b in zip(own, whole, strict=True)]
    error = math.sqrt((len(own) - 1) * statistics.pvariance(without))
    return f"{sum(own) / sum(whole):.0%} ± {error:.0%}"


def corrupted(settings: Mapping[str, Setting]) -> str:
    """A table: NLL by severity, the mean over the kinds of corruption; empty where there are none."""
    lines = []
    for title, setting in settings.items():
        rows = [result["corrupted"] for result in setting.results.values()]
        if all(rows):
            cells = [mean_and_error([row[severity]["nll"] for row in rows]) for severity in rows[0]]
            lines.append([title, *cells])
    return markdown(["NLL by severity", *rows[0]], lines) if lines else ""


def paired(one: Setting, base: Setting, figure: str) -> list[float]:
    """By how much it is better, seed by seed."""
    sign = 1 if figure in SCORES else -1
    return [sign * (a - b) for a, b in zip(one.values(figure), base.values(figure), strict=True)]
