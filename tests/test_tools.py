"""With other tools: each example runs as it stands, and does what it says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient

import masksurgery
from masksurgery.predict import predict_images
from masksurgery.scores import Threshold
from test_examples import EXAMPLES, load_example

pytestmark = pytest.mark.slow


def test_lora_on_a_converted_vit() -> None:
    found = load_example("tools/lora").main()
    assert found["share of weights that was trained"] < 0.25
    assert found["accuracy of the ensemble"] > 0.8 > 0.6 > found["accuracy of the base model"]
    assert found["largest difference once merged, saved and loaded"] < 1e-5


def test_int8_weights_of_a_packed_model() -> None:
    found = load_example("tools/int8").main()
    assert found["MB after"] < 0.35 * found["MB before"]
    assert 0 < found["largest difference of a mean probability"] < 0.01
    assert found["largest difference of a variance, of the largest variance"] < 0.1


def test_active_learning_asks_well() -> None:
    found = load_example("tools/active_learning").main(seeds=2)
    asked, chance = found["mutual_information"], found["chance"]
    assert asked[0] == chance[0] and len(asked) == 6
    assert asked[-1] > chance[-1] and asked[-1] > 0.93


def test_segmentation_shows_where_it_is_unsure(tmp_path: Path) -> None:
    found = load_example("tools/segmentation").main(tmp_path / "picture.png")
    assert found["pixels that are right"] > 0.98
    assert found["variance where it is wrong, to where it is right"] > 10
    picture = matplotlib.image.imread(tmp_path / "picture.png")
    assert picture.shape[0] > 500 and len(np.unique(picture.reshape(-1, picture.shape[-1]), axis=0)) > 500


@pytest.mark.real
def test_onnx_says_unsure_without_torch(tmp_path: Path) -> None:
    photos = load_example("imagenet_photos")
    base = photos.load_base()
    files = [tmp_path / f"{name}.png" for name in photos.PHOTOS]
    for file, photo in zip(files, photos.load_photos().values(), strict=True):
        photo.save(file)
    model = masksurgery.convert(base, n=4, scale=2.0, where="head", seed=1)
    model.eval()
    rows = list(predict_images(model, files, topk=1))
    limit = sorted(row.mutual_information for row in rows)[-2]  # all but one get an answer
    model.threshold = Threshold("mutual_information", limit + 0.02)
    masksurgery.export(model, tmp_path / "model.onnx")
    code = (
        f"import runpy, sys; sys.modules.update(torch=None, masksurgery=None, timm=None); "
        f"sys.argv = {['onnx_unsure.py', str(tmp_path / 'model.onnx'), *map(str, files)]!r}; "
        f"runpy.run_path({str(EXAMPLES / 'tools' / 'onnx_unsure.py')!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    for line, row in zip(lines, predict_images(model, files, topk=1), strict=True):
        said = line.removeprefix(f"{row.path}: ")
        assert said != line and row.entries[0].label in said and said.startswith("unsure") == row.unsure
        assert abs(float(said.split(" ± ")[0].split()[-1]) - row.entries[0].mean) < 0.03
    assert sum(": unsure (" in line for line in lines) == 1


def test_the_notebook_runs(tmp_path: Path) -> None:
    notebook = nbformat.read(EXAMPLES / "from_model_to_report.ipynb", 4)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    said = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    base, ensemble = (line.split() for line in said.splitlines() if "accuracy" in line)
    assert min(float(base[2]), float(ensemble[2])) > 0.95 and float(ensemble[4]) < 0.1 and float(ensemble[6]) > 0.9
    assert (tmp_path / "digits" / "report.html").stat().st_size > 100_000
    assert (tmp_path / "digits" / "model.onnx").exists()
    pictures = [o for cell in notebook.cells for o in cell.get("outputs", []) if "image/png" in o.get("data", {})]
    assert len(pictures) == 1 and "relative error" in said
    assert json.loads((tmp_path / "digits" / "ensemble" / "config.json").read_text())["threshold"]["score"] == "entropy"
