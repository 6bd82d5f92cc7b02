"""The card of a model on the hub: what it is, how to load it, and how good it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.utils._pytree import tree_leaves

from masksurgery.evaluation import DETECTION, METRICS, SCORE_TITLES, Evaluation, ModelEvaluation
from masksurgery.inputs import is_described_tensor
from masksurgery.record import Record

CARD, REPORT, FIGURES = "README.md", "report.html", "evaluation.json"
PIPELINES = {"classification": "image-classification", "multilabel": "image-classification"}


def write_card(
    record: Record,
    repository: str,
    found: ModelEvaluation | None = None,
    evaluation: Evaluation | None = None,
    has_report: bool = False,
    base_model: str | None = None,
    license: str | None = None,
) -> str:
    """The text of a model card, with the hub's metadata on top.

    Args:
        record: The model's config.json.
        repository: "user/name".
        found: What `evaluate` found for it.
        evaluation: That this stands in.
        has_report: There is a report beside the card.
        base_model, license: For the metadata.
    """
    parts = [
        _metadata(record, repository, found, evaluation, base_model, license),
        f"# {repository.partition('/')[2]}",
        f"{record.n} models in one set of weights: every prediction has a mean, a variance, and a part of its "
        f"uncertainty that is the members' disagreement. Made of {_base(record)} by masksurgery, with *Masksembles for "
        f"Uncertainty Estimation* (Durasov et al., CVPR 2021, [arXiv:2012.08334](https://arxiv.org/abs/2012.08334)).",
        "## How to use it",
        _usage(record, repository),
        "## What it is",
        _table(("", ""), _facts(record)),
    ]
    if found is not None and evaluation is not None:
        parts += ["## How good it is", *_results(found, evaluation, has_report)]
    elif has_report:
        parts += [f"How good it is: [{REPORT}]({REPORT})."]
    return "\n\n".join(parts) + "\n"


def _metadata(
    record: Record,
    repository: str,
    found: ModelEvaluation | None,
    evaluation: Evaluation | None,
    base_model: str | None,
    license: str | None,
) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    of_timm = str((record.pretrained_cfg or {}).get("hf_hub_id") or "")
    results = None
    if found is not None and evaluation is not None:
        results = [
            EvalResult(
                task_type=_pipeline(record) or record.task,
                dataset_type=evaluation.data,
                dataset_name=evaluation.data,
                metric_type=name,
                metric_name=METRICS[name].title,
                metric_value=value,
            )
            for name, value in found.figures.items()
        ]
    data = ModelCardData(
        base_model=base_model or (of_timm if of_timm.count("/") == 1 and not of_timm.endswith("/") else None),
        library_name="masksurgery",
        license=license,
        pipeline_tag=_pipeline(record),
        tags=["masksurgery", "masksembles", "uncertainty", "ensemble"],
        model_name=repository.partition("/")[2] if results else None,
        eval_results=results,
    )
    return f"---\n{data.to_yaml()}\n---"


def _pipeline(record: Record) -> str | None:
    """What timm's models do with an image; of others it is not known what they return."""
    known = (
        record.base is not None and record.base.source == "timm" and [len(shape) for shape in _shapes(record)] == [4]
    )
    return PIPELINES.get(record.task) if known else None


def _shapes(record: Record) -> list[list[int]]:
    """Of the example inputs."""
    leaves = tree_leaves([record.inputs.args, record.inputs.kwargs], is_leaf=is_described_tensor)
    return [leaf["shape"] for leaf in leaves if is_described_tensor(leaf)]


def _base(record: Record) -> str:
    return f"`{record.base.name}`" if record.base else f"a `{record.base_type}`"


def _usage(record: Record, repository: str) -> str:
    own = record.base is None or record.base.source == "factory"
    base = ", base=my_model" if own else ""
    fields = "p.mean, p.variance" + ("" if record.task == "regression" else ", p.entropy, p.mutual_information")
    lines = [
        "```python", "import masksurgery", "",
        f'model = masksurgery.load("hf-hub:{repository}"{base})',
        *(['model.output = "prediction"'] if record.output != "prediction" else []),
        f"p = model(x)  # {fields}",
        *(["model.unsure(p)  # which of them get no answer"] if record.threshold else []),
        "```",
    ]  # fmt: skip
    text = "\n".join(lines)
    return f"{text}\n\n`my_model` is a `{record.base_type}` of yours, with any weights." if own else text


def _facts(record: Record) -> dict[str, str]:
    facts = {
        "base model": _base(record),
        "members": str(record.n),
        "scale": f"{record.scale:g}",
        "masked layers": str(len(record.sites)),
        "task": record.task,
        "example input": ", ".join(str(shape[1:]) for shape in _shapes(record)),
        "packed": "no: it can be trained on" if record.packed is None else f"yes ({record.packed.layout})",
    }
    if record.temperature:
        facts["temperature"] = f"{record.temperature:.3g}"
    if record.threshold:
        facts["threshold"] = f"{SCORE_TITLES[record.threshold.score]} {record.threshold.value:.4g}"
    return facts


def _results(found: ModelEvaluation, evaluation: Evaluation, has_report: bool) -> list[str]:
    figures = {METRICS[name].title: f"{value:.4g}" for name, value in found.figures.items()}
    parts = [f"On {evaluation.images} images of `{evaluation.data}`:", _table(("metric", "value"), figures)]
    rows = [
        f"| {name} | {SCORE_TITLES[score]} | {' | '.join(f'{row[figure]:.3f}' for figure in DETECTION)} |"
        for name, scores in found.detection.items()
        for score, row in scores.items()
    ]
    if rows:
        titles = " | ".join(metric.title for metric in DETECTION.values())
        heading = f"| unknown images | score | {titles} |\n|---|---|{'---|' * len(DETECTION)}"
        parts += ["Against images of another kind:", "\n".join([heading, *rows])]
    where = f"`{FIGURES}` has it all" + (f", [{REPORT}]({REPORT}) shows it." if has_report else ".")
    return [*parts, where]


def _table(titles: tuple[str, str], rows: Mapping[str, Any]) -> str:
    return "\n".join([f"| {titles[0]} | {titles[1]} |", "|---|---|", *(f"| {k} | {v} |" for k, v in rows.items())])
