"""Files of weights: read without running what is in them, loaded into a model key by key, and written whole or not."""

from __future__ import annotations

import contextlib
import os
import pickle
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from masksurgery.sources import one_line
from masksurgery.types import CheckpointError

CONFIG = "config.json"
WEIGHTS = "model.safetensors"

NESTINGS = ("state_dict_ema", "model_ema", "state_dict", "model_state_dict", "model")
"""Where training scripts put the weights in their checkpoints; averaged weights first, as timm has it."""

PREFIXES = ("_orig_mod.", "module.")
"""What torch.compile and DistributedDataParallel put before every key."""


Shape = tuple[int, ...]
Change = Callable[[Mapping[str, Tensor], nn.Module], Mapping[str, Tensor]]
"""Makes a state dict fit a model, such as `adapt.renew_classifier`."""


def load_weights(model: nn.Module, path: Path, changes: Sequence[Change] = ()) -> None:
    """Load a checkpoint into a base model, strictly.

    Args:
        changes: What may be done to the checkpoint first.
    Raises:
        CheckpointError: The file cannot be read, or its keys or shapes are not the model's.
    """
    state: Mapping[str, Tensor] = unwrap(read_tensors(path), path)
    for change in changes:
        state = change(state, model)
    check_keys(state, model.state_dict(), path, _adapt_hint)
    model.load_state_dict(dict(state), strict=True)


def read_tensors(path: Path) -> Any:
    """What a .safetensors, .pth, .pt or .bin file holds, on the CPU; no code in it is ever run.

    Raises:
        CheckpointError: It is missing, damaged, of another kind, or holds more than `weights_only` allows.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file. Pass a file of weights.")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
            raise CheckpointError(
                f"{path}: not a safetensors file, or cut short ({error}). Copy or save it again."
            ) from error
    if path.suffix not in (".pth", ".pt", ".bin"):
        raise CheckpointError(
            f"{path}: a file of weights ends in .safetensors, .pth, .pt or .bin, not in '{path.suffix}'."
        )
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: refused, for it is damaged or holds more than tensors, and loading that could run code "
            f"(torch.load(weights_only=True) does not read it). Save model.state_dict() alone, best as .safetensors."
        ) from error
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise CheckpointError(
            f"{path}: not a file of torch.save, or cut short ({type(error).__name__}). Save it again."
        ) from error


def unwrap(content: Any, path: Path) -> dict[str, Tensor]:
    """The state dict in a checkpoint, without what training scripts put around it.

    Raises:
        CheckpointError: There is none.
    """
    while isinstance(content, Mapping) and not _is_state(content):
        inner = next((content[key] for key in NESTINGS if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            break
        content = inner
    if not isinstance(content, Mapping) or not _is_state(content):
        seen = (
            f"keys {', '.join(map(repr, list(content)[:5]))}"
            if isinstance(content, Mapping)
            else type(content).__name__
        )
        raise CheckpointError(f"{path}: holds no state dict (it has {seen}). Save model.state_dict().")
    state = dict(content)
    for prefix in (*PREFIXES, *PREFIXES):  # in either order
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _is_state(content: Mapping[Any, Any]) -> bool:
    return bool(content) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items())


def check_keys(
    found: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    path: Path,
    hint: Any = lambda wrong: "",
    model: str = "the model",
) -> None:
    """Raise a CheckpointError that names the first keys that are missing, unexpected or of another shape."""
    wrong = other_shapes(found, wanted)
    faults = [
        _first("missing", [key for key in wanted if key not in found]),
        _first("unexpected", [key for key in found if key not in wanted]),
        _first("of another shape", [f"{key} {shape} instead of {other}" for key, (shape, other) in wrong.items()]),
    ]
    if any(faults):
        text = "; ".join(fault for fault in faults if fault)
        raise CheckpointError(
            f"{path}: the keys are not those of {model}. {text}.{hint(wrong) if set(found) == set(wanted) else ''}"
        )


def other_shapes(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, tuple[Shape, Shape]]:
    """The shapes in both of the keys whose shapes differ."""
    return {
        key: (tuple(found[key].shape), tuple(wanted[key].shape))
        for key in wanted
        if key in found and found[key].shape != wanted[key].shape
    }


def other_rows(shapes: Mapping[str, tuple[Shape, Shape]]) -> dict[str, tuple[int, int]]:
    """The numbers of rows of each layer in `shapes`, if they are all that differs; else nothing."""
    rows: dict[str, tuple[int, int]] = {}
    for key, (found, wanted) in shapes.items():
        if not found or not wanted or found[1:] != wanted[1:]:
            return {}
        if rows.setdefault(key.rpartition(".")[0], (found[0], wanted[0])) != (found[0], wanted[0]):
            return {}
    return rows


def _first(what: str, names: list[str], count: int = 3) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return f"{what}: {', '.join(names[:count])}{more}" if names else ""


def _adapt_hint(wrong: Mapping[str, tuple[Shape, Shape]]) -> str:
    """What to do where only the classifier differs."""
    rows = other_rows(wrong)
    if len(rows) != 1:
        return ""
    ((layer, (found, wanted)),) = rows.items()
    return (
        f" The checkpoint's classifier '{layer}' has {found} classes, the model's {wanted}: "
        f"pass num_classes={found} (--num-classes {found})."
    )


# --- writing ---------------------------------------------------------------------------------------------------------


def parameter_groups(model: nn.Module) -> set[frozenset[str]]:
    """The names of each parameter that has more than one."""
    names: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), set()).add(name)
    return {frozenset(group) for group in names.values() if len(group) > 1}


def collect_tensors(model: nn.Module, path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a model as they are written, each parameter once, and the further names of tied ones.

    Raises:
        CheckpointError: Something in the state dict is no tensor, or holds no values; `path` is for the message.
    """
    aliases: dict[str, str] = {}
    for group in parameter_groups(model):
        first, *others = [name for name in model.state_dict() if name in group]
        aliases.update(dict.fromkeys(others, first))
    tensors: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor) or value.is_meta:
            what = "a tensor without data" if isinstance(value, Tensor) else type(value).__name__
            raise CheckpointError(f"{path}: '{name}' is {what}, which cannot be written. Give the model its values.")
        if name in aliases:
            continue
        tensor = value.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        tensors[name] = tensor.clone() if storage in storages else tensor  # a view of another: written as a copy
        storages.add(storage)
    return tensors, dict(sorted(aliases.items()))


def write_folder(folder: Path, tensors: dict[str, Tensor], text: str, identity: str) -> None:
    """Write model.safetensors and config.json, both or neither.

    Both are written under other names first; config.json is put in place last, so a folder that has it is complete.

    Raises:
        CheckpointError: The folder cannot be written.
    """
    is_new = not folder.exists()
    token = f"{os.getpid()}-{secrets.token_hex(4)}"
    weights, config, backup = (folder / f".{name}.{token}.tmp" for name in (WEIGHTS, CONFIG, "backup"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, weights, metadata={"format": "pt", "masksurgery": identity})
        config.write_text(text, encoding="utf-8")
        weights.chmod(
            config.stat().st_mode & 0o777
        )  # safetensors writes for the owner alone, but a folder is to be shared
        for path in (weights, config):
            _sync(path)
        _replace_both(folder, weights, config, backup)
        _sync(folder)
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(
            f"{folder}: cannot be written ({one_line(error)}). What was there before is as it was."
        ) from error
    finally:
        for path in (weights, config, backup):
            with contextlib.suppress(OSError):
                path.unlink()
        if is_new:
            with contextlib.suppress(OSError):
                folder.rmdir()  # if nothing came into it


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file whole or not: under another name first, which then takes the place of what was there.

    Args:
        path: The file.
        write: Writes it to the path that it is given.
    Raises:
        CheckpointError: It cannot be written.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        write(draft)
        _sync(draft)
        os.replace(draft, path)
        _sync(path.parent)
    except (OSError, RuntimeError) as error:  # torch.save makes a RuntimeError of a full disk
        if "DataLoader worker" in str(error):  # torch raises it wherever the process is when one of its workers dies
            raise
        raise CheckpointError(
            f"{path}: cannot be written ({one_line(error)}). What was there before is as it was."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            draft.unlink()


def _replace_both(folder: Path, weights: Path, config: Path, backup: Path) -> None:
    """If the second file cannot be put in place, the first one goes back."""
    with contextlib.suppress(OSError):  # there is none, or the file system has no links
        os.link(folder / WEIGHTS, backup)
    os.replace(weights, folder / WEIGHTS)
    try:
        os.replace(config, folder / CONFIG)
    except BaseException:
        if backup.exists():
            os.rename(backup, folder / WEIGHTS)
        raise


def _sync(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
