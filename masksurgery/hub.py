"""Share a saved model on the Hugging Face hub."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from masksurgery.checkpoint import save
from masksurgery.ensemble import Ensemble
from masksurgery.evaluation import Evaluation, ModelEvaluation
from masksurgery.folders import SavedModel
from masksurgery.model_card import CARD, FIGURES, REPORT, write_card
from masksurgery.sources import one_line
from masksurgery.types import CheckpointError, ConfigError
from masksurgery.weights import CONFIG, WEIGHTS


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
        repository: "user/name". Made if there is none. What it holds of these files is replaced, and a report or
            figures of before are removed.
        evaluation: What `evaluate` found, for this folder, or of a model in memory for the only converted one with as
            many members. It stands in the card; the whole is `evaluation.json`, with the names of the data and the
            models as they were given to `evaluate`.
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
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    _check_name(repository)
    if not isinstance(model, (Ensemble, str, Path)):
        raise ConfigError(
            f"push_to_hub takes a converted or packed model, not {type(model).__name__}. Pass what convert or pack "
            f"returned, or the folder of a saved one."
        )
    files: dict[str, bytes | Path] = {}
    if report is not None:
        files[REPORT] = _existing(Path(report))
    if evaluation is not None:
        files[FIGURES] = evaluation.to_json().encode("utf-8")
    with _saved(model) as folder:
        record = SavedModel.read(folder).record
        found = None if evaluation is None else choose_model(evaluation, model, record.n)
        card = write_card(record, repository, found, evaluation, report is not None, base_model, license)
        files |= {CARD: card.encode("utf-8"), CONFIG: folder / CONFIG, WEIGHTS: folder / WEIGHTS}
        api = HfApi(token=token)
        with _explained(repository):
            url = api.create_repo(repository, private=private, exist_ok=True)
            # What was found for the weights before is none of these.
            old = [name for name in (REPORT, FIGURES) if name not in files and api.file_exists(repository, name)]
            operations = [CommitOperationAdd(name, content) for name, content in sorted(files.items())]
            deletions = [CommitOperationDelete(name) for name in old]
            api.create_commit(repository, [*operations, *deletions], commit_message=message)
    return str(url)


def _check_name(repository: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # it is documented

    try:
        validate_repo_id(repository)
        valid = repository.count("/") == 1
    except HFValidationError:
        valid = False
    if not valid:
        raise ConfigError(f"'{repository}' is no name of a repository. Pass 'user/name'.")


@contextmanager
def _explained(repository: str) -> Iterator[None]:
    """What the hub or the network refuses becomes a CheckpointError."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except (HfHubHTTPError, OSError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        todo = (
            "Log in with `hf auth login`, or pass a token that may write there" if status in (401, 403) else "Try again"
        )
        raise CheckpointError(f"{repository}: the hub did not take it ({one_line(error)}). {todo}.") from error


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


def choose_model(evaluation: Evaluation, model: Ensemble | str | Path, n: int) -> ModelEvaluation:
    """What was found for a model of n members: of a folder under its name, else what is alone of its kind.

    Raises:
        ConfigError: That cannot be told.
    """
    found = [one for one in evaluation.models if one.kind == "converted" and one.n == n]
    if not isinstance(model, Ensemble):
        found = [one for one in found if Path(one.name).resolve() == Path(model).resolve()]
    if len(found) != 1:
        names = ", ".join(f"{one.name} ({one.n} member{'' if one.n == 1 else 's'})" for one in evaluation.models)
        asked = f"a model of {n} members" if isinstance(model, Ensemble) else str(model)
        raise ConfigError(
            f"The evaluation is of {names}, and {asked} is pushed. Evaluate that, alone or by its folder."
        )
    return found[0]
