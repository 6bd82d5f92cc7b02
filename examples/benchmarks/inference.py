"""What a prediction costs: packed members beside the usual ways to an ensemble, for six architectures.

    pip install --no-deps masksembles
    python examples/benchmarks/inference.py [--models resnet50] [--threads 2] [--check]

Weights are random, nothing is downloaded. All variants of an architecture take turns in one process. What was measured
goes into inference.json, beside what stands there of other architectures, and from there into inference.md and the
README. Takes about ten minutes for an architecture on two cores, which nothing else should use. --check: exit code 1 if
packed resnet50 is slower or larger than it has to be.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from inference_models import AGREE, TITLES, largest_difference, open_variants
from rich.console import Console

from masksurgery.bench import measure, paired_ratio
from masksurgery.pack_tables import bench_table
from masksurgery.progress import Steps
from masksurgery.variants import Conditions, Variant

MODELS = (
    "resnet50", "efficientnet_b0", "mobilenetv3_large_100", "convnext_tiny", "vit_small_patch16_224",
    "swin_tiny_patch4_window7_224",
)  # fmt: skip
HERE = Path(__file__).parent
README = HERE.parents[1] / "README.md"
BEGIN, END = "<!-- inference: begin -->\n", "<!-- inference: end -->\n"
TOLERANCE = 1e-3
"""Relative: rounding in float32, which members of random networks enlarge. The tests prove more, in float64."""
CHECKED = "resnet50"

Results = dict[str, dict[str, Any]]
"""By architecture what `Bench.to_dict` says."""


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    results_file = options.output / "inference.json"
    results: Results = json.loads(results_file.read_text(encoding="utf-8")) if results_file.exists() else {}
    conditions = Conditions(options.threads, options.device, options.channels_last)
    for architecture in () if options.report else options.models:
        results[architecture] = run(architecture, options.variants, options.batch, conditions, options.repeats)
        results_file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (options.output / "inference.md").write_text(document(results), encoding="utf-8")
    if options.output == HERE:
        README.write_text(update_readme(README.read_text(encoding="utf-8"), results), encoding="utf-8")
    return check(results) if options.check else 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS, metavar="NAME", help="timm architectures (default: six)")
    parser.add_argument("--variants", nargs="+", default=list(TITLES), choices=list(TITLES), metavar="NAME",
                        help=f"of {', '.join(TITLES)} (default: all)")  # fmt: skip
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8], metavar="SIZE", help="default: 1 8")
    parser.add_argument("--repeats", type=int, default=10, help="forwards of each (default: 10)")
    parser.add_argument("--threads", type=int, default=2, help="of torch (default: 2)")
    parser.add_argument("--device", default="cpu", help="default: cpu")
    parser.add_argument("--channels-last", action="store_true", help="weights and images in this memory format")
    parser.add_argument("--output", type=Path, default=HERE, metavar="DIR", help="default: beside this script")
    parser.add_argument("--report", action="store_true", help="measure nothing, write the tables of what was measured")
    parser.add_argument(
        "--check", action="store_true", help=f"fail if packed {CHECKED} is slower or larger than stated"
    )
    options = parser.parse_args(arguments)
    if "reference" in options.variants and not options.report and importlib.util.find_spec("masksembles") is None:
        parser.error("masksembles is not installed: pip install --no-deps masksembles, or leave out reference")
    return options


def run(
    architecture: str, names: Sequence[str], batches: Sequence[int], conditions: Conditions, repeats: int
) -> dict[str, Any]:
    """Measure the variants of an architecture, once those that have to agree do."""
    with Steps() as steps:
        steps.say(f"making the variants of {architecture}")
        variants = list(open_variants(architecture, names, conditions))
        differences = compare(variants, conditions)
        found = measure(variants, batches, conditions, repeats=repeats, observer=steps)
    Console(width=80, highlight=False).print(bench_table(architecture, found))
    return {**found.to_dict(), "relative_differences": differences}


def compare(variants: Sequence[Variant], conditions: Conditions) -> dict[str, float]:
    """The largest difference between variants that compute the same."""
    outputs = {}
    with conditions.hold(), torch.inference_mode():
        for variant in variants:
            if any(variant.name in pair for pair in AGREE):
                args, kwargs = conditions.draw(variant.inputs(2))
                outputs[variant.name] = conditions.prepare(variant.model)(*args, **kwargs)
    pairs = [pair for pair in AGREE if outputs.keys() >= set(pair)]
    found = {f"{a}, {b}": largest_difference(outputs[a], outputs[b]) for a, b in pairs}
    wrong = [f"{pair}: {difference:.1e}" for pair, difference in found.items() if not difference <= TOLERANCE]
    if wrong:
        sys.exit(f"These should agree to {TOLERANCE:.0e}, and do not: {'; '.join(wrong)}.")
    return found


# --- tables ----------------------------------------------------------------------------------------------------------


def rows_of(result: Mapping[str, Any]) -> dict[tuple[str, int], dict[str, Any]]:
    """Measurements by variant and batch size."""
    return {(row["variant"], row["batch"]): row for row in result["measurements"]}


def ratio(result: Mapping[str, Any], one: str, other: str, batch: int) -> float | None:
    """Of two latencies, in pairs; None if one of them was not measured."""
    rows = rows_of(result)
    pair = rows.get((one, batch)), rows.get((other, batch))
    return None if pair[0] is None or pair[1] is None else paired_ratio(pair[0]["seconds"], pair[1]["seconds"])


def document(results: Results) -> str:
    """The text of inference.md."""
    parts = [
        "# Inference\n\nWritten by `examples/benchmarks/inference.py`. Each ensemble has four members or passes; masks "
        "are drawn with n=4 and scale=2. Milliseconds of a forward are medians, with the interquartile range; *to "
        "base* is the median of the ratios to the base model's forward of the same round. MiB are weights and one "
        "forward at its peak. MACs are those of one sample for all members.\n"
    ]
    order = [*(name for name in MODELS if name in results), *sorted(set(results) - set(MODELS))]
    parts += [f"## {name}\n\n{place(results[name])}\n\n{model_table(results[name])}" for name in order]
    return "\n".join(parts)


def place(result: Mapping[str, Any]) -> str:
    """Where an architecture was measured."""
    conditions, machine, versions = (result[key] for key in ("conditions", "machine", "versions"))
    where = machine.get("gpu") or f"threads: {conditions['threads']}, of {machine['cpus']} CPUs ({machine['cpu']})"
    memory_format = ", channels last" if conditions["channels_last"] else ""
    layouts = [
        f"{name}: {details['layout']}{', dense' if details['dense'] else ''}, {details['barriers']} barriers, "
        f"made in {details['packing_seconds']:.1f} s"
        for name, details in result["details"].items()
    ]
    return f"{where}{memory_format}; torch {versions['torch']}, timm {versions['timm']}. {'; '.join(layouts)}."


def model_table(result: Mapping[str, Any]) -> str:
    """A line for each variant."""
    rows = rows_of(result)
    batches = sorted({batch for _, batch in rows})
    head = ["", *(f"batch {batch}: {what}" for batch in batches for what in ("ms", "to base", "MiB"))]
    lines = []
    for name in dict.fromkeys(name for name, _ in rows):
        cells = [TITLES[name]]
        for batch in batches:
            row = rows[name, batch]
            cells += [f"{row['latency_ms']:.1f} ± {row['iqr_ms']:.1f}", times(row["ratio_to_base"])]
            cells.append("-" if row["peak_memory_mib"] is None else f"{row['peak_memory_mib']:.0f}")
        base = rows.get(("base", batches[0]), row)
        relative = [row[key] / base[key] for key in ("macs", "parameters")]
        lines.append([*cells, *map(times, relative)])
    return markdown([*head, "MACs to base", "parameters to base"], lines)


def readme_table(results: Results) -> str:
    """Latency to the base model: a line for each variant, a column for each architecture."""
    known = [name for name in MODELS if name in results]
    rows = []
    for variant, title in TITLES.items():
        cells = [[times(ratio(results[name], variant, "base", batch)) for batch in (8, 1)] for name in known]
        if any(cell != "-" for pair in cells for cell in pair) and variant != "base":
            rows.append([title, *(f"{eight} ({one})" if eight != "-" else "" for eight, one in cells)])
    return markdown(["", *(re.sub(r"(_patch\d+)?(_window\d+)?(_100)?(_224)?$", "", name) for name in known)], rows)


def update_readme(text: str, results: Results) -> str:
    start, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    return text[:start] + readme_table(results) + text[end:]


def times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def markdown(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table; everything but the first column is aligned to the right."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (head, rule, *lines))


# --- what has to hold ------------------------------------------------------------------------------------------------


def check(results: Results) -> int:
    """Print what has to hold for packed resnet50, and whether it does; 1 if something does not."""
    result = results.get(CHECKED)
    if result is None:
        print(f"{CHECKED} was not measured.", file=sys.stderr)
        return 1
    rows = rows_of(result)
    memory = [rows.get((name, 8), {}).get("peak_memory_mib") for name in ("repeat", "packed")]
    packed = result["details"].get("packed", {})
    figures = (
        ("batch 8: times faster than inputs repeated", ratio(result, "repeat", "packed", 8), 3.3, None),
        ("batch 1: times faster than inputs repeated", ratio(result, "repeat", "packed", 1), 1.9, None),
        ("batch 8: latency to the base model's", ratio(result, "packed", "base", 8), None, 1.9),
        ("batch 8: latency to that with BatchNorm folded", ratio(result, "packed", "folded", 8), None, 2.0),
        ("batch 8: times less memory than inputs repeated", memory[0] / memory[1] if all(memory) else None, 2.0, None),
        ("seconds to pack", packed.get("packing_seconds"), None, 5.0),
    )
    failed = 0
    for what, value, least, most in figures:
        limit = f"at least {least}" if most is None else f"at most {most}"
        good = value is not None and (value >= least if most is None else value <= most)
        failed += not good
        print(f"{'ok    ' if good else 'FAILED'}  {what}: {times(value)}, {limit}")
    layout = packed.get("layout")
    if layout not in (None, "unrolled"):
        print(f"        memory is that of the layout {layout}; the limit is one for unrolled")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
