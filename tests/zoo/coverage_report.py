"""coverage.md from the results of the sweep, and the table of the README from coverage.md.

python tests/zoo/coverage_report.py             # writes both
python tests/zoo/coverage_report.py --readme    # the README alone, from coverage.md as it stands
"""

from __future__ import annotations

import re
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import timm
import torch
import torchvision

from sweep import Row, architectures, read_results

COVERAGE = Path(__file__).with_name("coverage.md")
README = Path(__file__).parents[2] / "README.md"
BEGIN, END = "<!-- coverage: begin -->\n", "<!-- coverage: end -->\n"
REASONS = ("reshaped", "gate", "masked", "output layer", "no batch", "no call")
COLUMNS = ("architecture", "family", "layers", "sites", "chain", *REASONS, "other", "s", "result")

# Calls of layers in a trial before this package was written: the smallest architecture of 98 families of timm 1.0.31.
TRIAL = {"layers": 7428, "sites": 6043, "chain": 410, "reshaped": 662, "output layer": 88, "gate": 63, "no batch": 50}


def table(head: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    """A table in Markdown; everything but the first column is aligned to the right if it is a number."""
    rows = [[str(cell) for cell in line] for line in lines]
    number = re.compile(r"[\d.,%]*$")
    right = [all(number.match(row[i]) for row in rows) for i in range(len(head))]
    rule = ["---:" if is_right and i else "---" for i, is_right in enumerate(right)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (list(head), rule, *rows))


def cells(row: Row) -> list[object]:
    known = [row.skipped.get(reason, 0) for reason in REASONS]
    other = sum(row.skipped.values()) - sum(known)
    result = row.excluded or row.error or "ok"
    return [
        row.name, f"{row.library} {row.family}", row.layers, row.sites, row.chained, *known, other,
        f"{row.seconds:.2f}", result.replace("|", "/"),
    ]  # fmt: skip


def parse(text: str) -> list[Row]:
    """The rows of coverage.md's last table."""
    rows = []
    for line in text[text.index("## Every architecture") :].splitlines():
        found = [cell.strip() for cell in line.strip("|").split(" | ")]
        if len(found) != len(COLUMNS) or found[0] in ("architecture", "---"):
            continue
        name, place, layers, sites, chain, *counts, seconds, result = found
        library, _, family = place.partition(" ")
        skipped = {reason: int(n) for reason, n in zip((*REASONS, "other"), counts, strict=True) if int(n)}
        excluded = result if result.startswith(("detection", "quantised")) else None
        error = None if excluded or result == "ok" else result
        row = Row(
            library, name, family, 0, int(layers), int(sites), int(chain), skipped, float(seconds), error, excluded
        )
        rows.append(row)
    return rows


def by(rows: Iterable[Row], key: Callable[[Row], str]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    return dict(sorted(found.items()))


def converted(rows: Sequence[Row]) -> int:
    return sum(row.error is None and row.excluded is None for row in rows)


def share(rows: Iterable[Row], count: Callable[[Row], int] = lambda row: row.sites + row.chained) -> str:
    """Of all calls of layers in per cent."""
    rows = list(rows)
    layers = sum(row.layers for row in rows)
    return f"{100 * sum(map(count, rows)) / max(layers, 1):.1f}%"


def skipped(rows: Iterable[Row]) -> Counter[str]:
    return sum((Counter(row.skipped) for row in rows), Counter())


def summary(rows: Sequence[Row]) -> str:
    """How many of which library were converted."""
    lines = []
    for library, own in by(rows, lambda row: row.library).items():
        tried = [row for row in own if row.excluded is None]
        lines.append(f"{converted(own)} of {len(tried)} {library} architectures are converted")
        excluded = Counter(row.excluded for row in own if row.excluded)
        lines += [f"{count} of {library} are not tried ({reason})" for reason, count in sorted(excluded.items())]
    return "\n".join(f"- {line}." for line in lines) + "\n"


def families(rows: Sequence[Row]) -> str:
    lines = []
    for family, own in by(rows, lambda row: f"{row.library} {row.family}").items():
        reasons = skipped(own)
        known = [reasons.get(reason, 0) for reason in REASONS]
        counts = [sum(row.layers for row in own), sum(row.sites for row in own), sum(row.chained for row in own)]
        seconds = statistics.median(row.seconds for row in own)
        done = f"{converted(own)} of {len(own)}"
        lines.append([family, done, *counts, share(own), *known, sum(reasons.values()) - sum(known), f"{seconds:.2f}"])
    return table(("family", "converted", "layers", "sites", "chain", "masked", *REASONS, "other", "s"), lines)


def trial(rows: Sequence[Row]) -> str:
    """The smallest architecture of each family of timm, beside the trial."""
    own = by((row for row in rows if row.library == "timm"), lambda row: row.family)
    smallest = [min(family, key=lambda row: (row.parameters, row.name)) for family in own.values()]
    reasons = skipped(smallest)
    seen = {"layers": sum(row.layers for row in smallest), "sites": sum(row.sites for row in smallest)}
    seen |= {"chain": sum(row.chained for row in smallest)} | {reason: reasons[reason] for reason in REASONS}
    seen["other"] = seen["layers"] - sum(n for name, n in seen.items() if name != "layers")
    lines = [
        [name, TRIAL.get(name, ""), count, f"{100 * TRIAL[name] / TRIAL['layers']:.1f}%" if name in TRIAL else "",
         f"{100 * count / seen['layers']:.1f}%"]
        for name, count in seen.items()
    ]  # fmt: skip
    return table(("calls", "trial", "now", "trial", "now"), lines)


def write(rows: Sequence[Row]) -> str:
    """The text of coverage.md."""
    rows = sorted(rows, key=lambda row: (row.library, row.name))
    versions = f"timm {timm.__version__}, torchvision {torchvision.__version__}, torch {torch.__version__}"
    versions = re.sub(r"\+\w+", "", versions)
    return f"""# Coverage

Written by `tests/zoo/sweep.py` and `tests/zoo/coverage_report.py`: {versions}.
Every architecture is made without weights and converted with the defaults. Every call of a convolution or Linear is a
*site* (it has a mask), in the *chain* of a site (it is served by that mask), or skipped with a reason; `s` is the CPU
seconds of the conversion (of a family the median).

{summary(rows)}
## The smallest architecture of each family of timm

{trial(rows)}
The trial counted calls over 98 families before this package was written, by a simpler rule. What was a site there and
is none here, each named in `model.surgery.skipped`:

- `gate`: both layers of squeeze-and-excitation, not the last alone; query and key where they are layers of their own;
  talking heads; the weights of split attention.
- `masked`: a layer that is channel-wise since the mask before it and stands outside of its chain, because the masked
  tensor has other readers too (ghost modules, nasnet's separable convolutions, convmixer), or that is multiplied by a
  masked branch (gated linear units). Its channels are zero already: the mask before it serves it as well.
- `reshaped`: value and fused projections in modules that the trial did not enter, and layers whose output is split
  before the next one (gmlp, xcit, efficientvit).
- `other`: layers with one channel, or whose channels stand nowhere alone (coat's position encoding works on heads), and
  layers that run in training only.

## Every family

{families(rows)}
## Every architecture

{table(COLUMNS, map(cells, rows))}"""


def readme_table(rows: Sequence[Row]) -> str:
    """The table of the README: what is supported."""

    def kind(row: Row) -> str:
        return row.library if row.library == "timm" else f"{row.library}: {row.family.replace('_', ' ')}"

    lines = []
    for name, own in by(rows, kind).items():
        if own[0].excluded:
            lines.append([name, len(own), "", "", f"not converted: {own[0].excluded.partition(': ')[2]}"])
            continue
        chain = share(own, lambda row: row.chained)
        reasons = [f"{reason} {share(own, lambda row, r=reason: row.skipped.get(r, 0))}" for reason in REASONS]
        largest = sorted(reasons, key=lambda text: -float(text.split()[-1].rstrip("%")))[:3]
        told = ", ".join(text for text in largest if not text.endswith(" 0.0%"))
        lines.append([name, len(own), converted(own), f"{share(own)} ({chain})", told])
    head = ("models", "architectures", "converted", "layers masked (by another's mask)", "layers not masked, mostly")
    return table(head, lines)


def update_readme(text: str, rows: Sequence[Row]) -> str:
    return between(text, BEGIN, END, readme_table(rows))


def between(text: str, begin: str, end: str, new: str) -> str:
    """The text with something new between two marks, both of which are in it."""
    return text[: text.index(begin) + len(begin)] + new + text[text.index(end) :]


def main() -> int:
    if "--readme" not in sys.argv:
        rows = {(row.library, row.name): row for row in read_results()}
        missing = [name for library, name in architectures() if (library, name) not in rows]
        if missing:
            print(f"{len(missing)} architectures are missing, such as {missing[0]}: run tests/zoo/sweep.py first")
            return 1
        COVERAGE.write_text(write([rows[which] for which in architectures()]), encoding="utf-8")
    rows_read = parse(COVERAGE.read_text(encoding="utf-8"))
    README.write_text(update_readme(README.read_text(encoding="utf-8"), rows_read), encoding="utf-8")
    print(summary(rows_read), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
