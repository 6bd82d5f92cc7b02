"""Share a saved model on the Hugging Face hub, with a card that says what it is, how to load it, and how good it is."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from masksurgery.checkpoint import save
from masksurgery.ensemble import Ensemble
from masksurgery.evaluation import DETECTION, METRICS, SCORE_TITLES, Evaluation, ModelEvaluation
from masksurgery.folders import SavedModel
from masksurgery.record import Record
from masksurgery.sources import one_line
from masksurgery.types import CheckpointError, ConfigError
from masksurgery.weights import CONFIG, WEIGHTS

CARD, REPORT, FIGURES = "README.md", "report.html", "evaluation.json"
PIPELINES = {"classification": "image-classification", "multilabel": "image-classification"}


def push_to_hub(
    model: Ensemble | str | Path,
    repository: str,
    *,
    evaluation: Evaluation | None = None,
    report: str | Path | None = None,
    base_model: str | None = None,
    license: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    message: str = "Upload a model of masksurgery",
) -> str:
    """Upload a converted or packed model to the Hugging Face hub in one commit: `load("hf-hub:user/name")` loads it.

    With the two files of `save` go a model card, and what `evaluate` found, if there is anything.

    Args:
        model: What `convert`, `pack` or `load` returned, or a folder that `save` or `finetune` wrote.
        repository: "user/name". Made if there is none; what it holds of these files is replaced.
        evaluation: What `evaluate` found. Of several models the one whose name is the folder's, or the only converted
            one, stands in the card; the whole is `evaluation.json`.
        report: A file that `write_report` wrote.
        base_model: Of the hub, for the card; by default that of timm's pretrained_cfg.
        license: Of the weights, by the hub's identifiers, such as "apache-2.0".
        private: Of a new repository; by default what the user or the organisation has set.
        token: By default the one that `hf auth login` stored.
        message: Of the commit.
    Returns:
        The address of the repository.
    Raises:
        ConfigError: The model is of another kind, the repository has no such name, or the evaluation is of others.
        CheckpointError: The folder or the report cannot be read, or the hub refuses.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    if repository.count("/") != 1 or not all(repository.split("/")):
        raise ConfigError(f"'{repository}' is no name of a repository. Pass 'user/name'.")
    if not isinstance(model, (Ensemble, str, Path)):
        raise ConfigError(
            f"push_to_hub takes a converted or packed model, not {type(model).__name__}. Pass what convert or pack "
            f"returned, or the folder of a saved one."
        )
    files: dict[str, bytes | Path] = {}
    if report is not None:
        files[REPORT] = _existing(Path(report))
    found = None if evaluation is None else choose_model(evaluation, model)
    if evaluation is not None:
        files[FIGURES] = evaluation.to_json().encode("utf-8")
    with _saved(model) as folder:
        record = SavedModel.read(folder).record
        card = write_card(record, repository, found, evaluation, report is not None, base_model, license)
        files |= {CARD: card.encode("utf-8"), CONFIG: folder / CONFIG, WEIGHTS: folder / WEIGHTS}
        api = HfApi(token=token)
        try:
            url = api.create_repo(repository, private=private, exist_ok=True)
            operations = [CommitOperationAdd(name, content) for name, content in sorted(files.items())]
            api.create_commit(repository, operations, commit_message=message)
        except Exception as error:  # a network fails in many ways
            raise CheckpointError(
                f"{repository}: the hub did not take it ({one_line(error)}). Log in with `hf auth login`, or pass a "
                f"token that may write there."
            ) from error
    return str(url)


@contextmanager
def _saved(model: Ensemble | str | Path) -> Iterator[Path]:
    if not isinstance(model, Ensemble):
        yield Path(model)
        return
    with tempfile.TemporaryDirectory() as folder:
        yield save(model, folder)  # type: ignore[arg-type]


def _existing(file: Path) -> Path:
    if not file.is_file():
        raise CheckpointError(f"{file}: there is no such file. Pass a report that write_report wrote.")
    return file


def choose_model(evaluation: Evaluation, model: Ensemble | str | Path) -> ModelEvaluation:
    """What was found for a model; a ConfigError where that cannot be told."""
    mine = [one for one in evaluation.models if not isinstance(model, Ensemble) and Path(one.name) == Path(model)]
    found = mine or [one for one in evaluation.models if one.kind == "converted"]
    if len(found) != 1:
        names = ", ".join(one.name for one in evaluation.models)
        raise ConfigError(f"The evaluation is of {names}: which of them is pushed cannot be told. Evaluate it alone.")
    return found[0]


# --- the card --------------------------------------------------------------------------------------------------------


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
                task_type=PIPELINES.get(record.task, record.task),
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
        pipeline_tag=PIPELINES.get(record.task),
        tags=["masksurgery", "masksembles", "uncertainty", "ensemble"],
        model_name=repository.partition("/")[2] if results else None,
        eval_results=results,
    )
    return f"---\n{data.to_yaml()}\n---"


def _base(record: Record) -> str:
    return f"`{record.base.name}`" if record.base else f"a `{record.base_type}`"


def _usage(record: Record, repository: str) -> str:
    own = record.base is None or record.base.source == "factory"
    base = ", base=my_model" if own else ""
    fields = "p.mean, p.variance" + ("" if record.task == "regression" else ", p.entropy, p.mutual_information")
    lines = [
        "```python", "import masksurgery", "",
        f'model = masksurgery.load("hf-hub:{repository}"{base})',
        f"p = model(x)  # {fields}",
        *(["model.unsure(p)  # which of them get no answer"] if record.threshold else []),
        "```",
    ]  # fmt: skip
    text = "\n".join(lines)
    return f"{text}\n\n`my_model` is a `{record.base_type}` of yours, with any weights." if own else text


def _facts(record: Record) -> dict[str, str]:
    shapes = [x["shape"] for x in (*record.inputs.args, *record.inputs.kwargs.values()) if isinstance(x, Mapping)]
    facts = {
        "base model": _base(record),
        "members": str(record.n),
        "scale": f"{record.scale:g}",
        "masked layers": str(len(record.sites)),
        "task": record.task,
        "example input": ", ".join(str(shape[1:]) for shape in shapes),
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
