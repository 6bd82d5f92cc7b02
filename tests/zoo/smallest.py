"""The smallest architecture of every family of timm, and the smallest images that it takes.

    python tests/zoo/smallest.py    # writes smallest.json again, for the installed timm; some minutes

Everything is found without weights, on the meta device. What is written down is only what takes long to find out.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import timm
import torch
from rich.progress import track
from timm.models import _registry
from torch import nn

PATH = Path(__file__).with_name("smallest.json")
SIZES = (32, 48, 56, 64, 96, 112, 128, 160, 192, 224, 240, 256, 288, 320, 384, 448, 512)
DROP_RATES = {"drop_rate": 0.2, "drop_path_rate": 0.2, "attn_drop_rate": 0.2}


def families() -> dict[str, list[str]]:
    """The architectures of every module under timm.models."""
    found: dict[str, list[str]] = {}
    for name in timm.list_models():
        found.setdefault(_registry._model_to_module[name], []).append(name)
    return found


def create(name: str, wanted: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """The architecture with ten classes and with those of the arguments that it takes, which are returned as well."""
    kwargs = dict(wanted)
    while True:
        try:
            return timm.create_model(name, num_classes=10, **kwargs), kwargs
        except TypeError as error:
            refused = [key for key in kwargs if repr(key) in str(error)]
            if "unexpected keyword" not in str(error) or not refused:
                raise
            kwargs = {key: value for key, value in kwargs.items() if key not in refused}


def count(name: str) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in timm.create_model(name).parameters())


def smallest_images(name: str) -> dict[str, Any]:
    """The smallest size that the architecture takes, and the arguments to make it with.

    A size is left out as long as a training step on one image fails there: BatchNorm would see a map of one pixel.
    Where that is so at every size (BatchNorm after a global pooling), the smallest that two images pass is taken.
    """
    for batch in (1, 2):
        for size in SIZES:
            kwargs = {"img_size": size}
            if _runs(name, size, kwargs, batch):
                with torch.device("meta"):
                    return {"size": size, "kwargs": create(name, {**kwargs, **DROP_RATES})[1]}
    raise ValueError(f"{name} takes images of none of the sizes {SIZES}")


def _runs(name: str, size: int, kwargs: dict[str, Any], batch: int) -> bool:
    try:
        with torch.device("meta"), torch.no_grad():
            model, _ = create(name, {**kwargs, **DROP_RATES})
            x = torch.zeros(batch, model.default_cfg["input_size"][0], size, size)
            return all(0 not in model.train(mode)(x).shape for mode in (False, True))
    except Exception:  # a size that a model does not take may fail in any way
        return False


def main() -> None:
    found = {}
    for family, names in track(sorted(families().items())):
        counts = {name: count(name) for name in names}
        name = min(counts, key=lambda name: (counts[name], name))
        found[family] = {"name": name, "parameters": counts[name], **smallest_images(name)}
    text = ",\n".join(f'  "{family}": {json.dumps(entry)}' for family, entry in found.items())
    PATH.write_text(f'{{"timm": "{timm.__version__}", "families": {{\n{text}\n}}}}\n', encoding="utf-8")


if __name__ == "__main__":
    main()
