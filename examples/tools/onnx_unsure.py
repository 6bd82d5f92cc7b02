"""Predict photos with an exported model, and say "unsure": without torch, and without masksurgery.

    pip install onnxruntime pillow
    masksurgery export DIR -o model.onnx          (where masksurgery is)
    python examples/tools/onnx_unsure.py model.onnx photo.jpg ...

What the model wants its images to be, the names of its classes and the threshold that `masksurgery evaluate --coverage`
has stored stand in the file itself.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def prepare(file: str, preprocessing: Mapping[str, Any]) -> np.ndarray:
    """An image as the model wants it [1, c, h, w]: its middle, of the size and with the levels of the training."""
    channels, height, width = preprocessing["input_size"]
    image = ImageOps.exif_transpose(Image.open(file)).convert("RGB" if channels == 3 else "L")  # phones lie on the side
    scale = max(height / image.height, width / image.width) / preprocessing["crop_pct"]
    size = (round(image.width * scale), round(image.height * scale))
    image = image.resize(size, FILTERS.get(preprocessing["interpolation"], Image.Resampling.BICUBIC))
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    pixels = np.asarray(image.crop((left, top, left + width, top + height)), np.float32).reshape(
        height, width, channels
    )
    levels = (pixels / 255 - np.float32(preprocessing["mean"])) / np.float32(preprocessing["std"])
    return np.ascontiguousarray(levels.transpose(2, 0, 1)[None], np.float32)


def is_unsure(outputs: Mapping[str, np.ndarray], threshold: Mapping[str, Any]) -> bool:
    """Whether the prediction of one image is beyond the threshold; what is no number is."""
    if threshold["score"] == "max_probability":
        return not float(outputs["mean"].max()) >= threshold["value"]
    return not float(outputs[threshold["score"]].sum()) <= threshold["value"]  # the variance is summed over the classes


def main(model: str, files: Sequence[str]) -> dict[str, str]:
    """What is said of each file."""
    session = onnxruntime.InferenceSession(model)
    facts = json.loads(session.get_modelmeta().custom_metadata_map["masksurgery"])
    outputs = [output.name for output in session.get_outputs()]
    if (
        "preprocessing" not in facts
        or facts["task"] not in ("classification", "probabilities")
        or "mean" not in outputs
    ):
        sys.exit(f"{model} does not classify images: it is for {facts['task']}, and returns {', '.join(outputs)}.")
    answers = {}
    for file in files:
        found = session.run(None, {session.get_inputs()[0].name: prepare(file, facts["preprocessing"])})
        p = dict(zip(outputs, found, strict=True))
        best = int(p["mean"].argmax())
        label = facts["labels"][best] if "labels" in facts else f"class {best}"
        sure = f"{p['mean'].max():.2f} ± {p['variance'].flat[best] ** 0.5:.2f}"
        unsure = "threshold" in facts and is_unsure(p, facts["threshold"])
        answers[file] = f"unsure ({label} {sure})" if unsure else f"{label} {sure}"
    return answers


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    for file, answer in main(sys.argv[1], sys.argv[2:]).items():
        print(f"{file}: {answer}")
