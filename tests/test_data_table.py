"""CSV files of images and targets."""

from pathlib import Path

import numpy as np
import pytest

from masksurgery import ConfigError
from masksurgery.data import Data, DataConfig, DataError, Source, open_data
from pictures import write_image


def write(folder: Path, text: str, images: int = 6) -> Path:
    for k in range(images):
        write_image(folder / f"{k}.png", k)
    (folder / "table.csv").write_text(text, encoding="utf-8")
    return folder / "table.csv"


def open_it(table: Path, task: str, num_classes: int | None = None, **more: object) -> Data:
    return open_data(DataConfig(str(table), **more), task=task, num_classes=num_classes)


def rows(source: object) -> dict[str, object]:
    assert isinstance(source, Source)
    return {Path(source.name(k)).name: np.asarray(source.read(k)[1]).tolist() for k in range(len(source))}


def test_a_regression(tmp_path: Path) -> None:
    lines = "".join(f"{k}.png,{k / 2},{-k}\n" for k in range(6))
    data = open_it(write(tmp_path, "\ufefffile , x,y\n" + lines + "\n"), "regression")
    found = {**rows(data.train), **rows(data.val)}
    assert found == {f"{k}.png": [k / 2, -k] for k in range(6)}
    assert (data.classes, len(data.train), len(data.val)) == (None, 5, 1)
    assert data.train.read(0)[1].dtype == np.float32


def test_the_file_column_and_the_split(tmp_path: Path) -> None:
    text = "age,split,path\n1.5,train,0.png\n2.5,val,1.png\n3.5,test,2.png\n4.5,train,3.png\n"
    data = open_it(write(tmp_path, text), "regression")
    assert (rows(data.train), rows(data.val)) == ({"0.png": [1.5], "3.png": [4.5]}, {"1.png": [2.5]})
    data = open_it(tmp_path / "table.csv", "regression", val_split="test")
    assert (rows(data.train), rows(data.val)) == ({"0.png": [1.5], "3.png": [4.5]}, {"2.png": [3.5]})
    (tmp_path / "table.csv").write_text(text.replace(",val,", ",,"))
    data = open_it(tmp_path / "table.csv", "regression")
    assert rows(data.train) | rows(data.val) == {"0.png": [1.5], "3.png": [4.5]}


def test_several_labels(tmp_path: Path) -> None:
    data = open_it(write(tmp_path, "photo,sun,sea\n0.png,0,1\n1.png,1,1\n2.png,0.0,1.0\n"), "multilabel")
    assert data.classes == ("sun", "sea")
    assert rows(data.train) | rows(data.val) == {"0.png": [0, 1], "1.png": [1, 1], "2.png": [0, 1]}


def test_a_classification(tmp_path: Path) -> None:
    data = open_it(write(tmp_path, "file,label\n0.png,dog\n1.png,cat\n2.png,dog\n"), "classification")
    assert data.classes == ("cat", "dog")
    assert rows(data.train) | rows(data.val) == {"0.png": 1, "1.png": 0, "2.png": 1}
    (tmp_path / "table.csv").write_text("file,label\n0.png,3\n1.png,0\n")
    data = open_it(tmp_path / "table.csv", "probabilities")
    assert data.classes == ("0", "1", "2", "3")
    assert rows(data.train) | rows(data.val) == {"0.png": 3, "1.png": 0}


def test_the_images_lie_elsewhere(tmp_path: Path) -> None:
    table = write(tmp_path / "a", "file,x\n0.png,1\n1.png,2\n")
    moved = tmp_path / "table.csv"
    table.rename(moved)
    data = open_it(moved, "regression", data_dir=str(tmp_path / "a"))
    assert isinstance(data.train, Source) and data.train.items.place == tmp_path / "a"
    absolute = tmp_path / "absolute.csv"
    absolute.write_text(f"file,x\n{tmp_path}/a/0.png,1\n{tmp_path}/a/1.png,2\n")
    assert len(open_it(absolute, "regression").train) == 1


@pytest.mark.parametrize(
    ("text", "task", "message"),
    [
        ("", "regression", r"table.csv' is empty. Its first line has to name the columns"),
        ("file,x\n", "regression", r"table.csv' has a header and no line: file,x"),
        ("file,x,x\n0.png,1,2\n", "regression", r"table.csv', line 1: two columns have one name: file,x,x"),
        ("file\n0.png\n", "regression", r"table.csv', line 1: a column of targets is missing beside file"),
        ("file,x\n0.png,1\n1.png\n", "regression", r"table.csv', line 3: 1 cells where the header has 2 columns"),
        ("file,x\n0.png,1\n9.png,1\n", "regression", r"table.csv', line 3: there is no file '.*/9.png'"),
        ("file,x\n0.png,1\n\n1.png,tall\n", "regression", r"', line 4, column 'x': 'tall' is not a number"),
        ("file,x\n0.png,\n", "regression", r"', line 2, column 'x': '' is not a number"),
        ("file,x\n0.png,nan\n", "regression", r"', line 2, column 'x': 'nan' is not a finite number"),
        ("file,x\n0.png,-inf\n", "regression", r"', line 2, column 'x': '-inf' is not a finite number"),
        ("file,x\n0.png,1e39\n", "regression", r"', line 2, column 'x': '1e39' is not a finite number of 32 bits"),
        ("file,x\n0.png,2\n", "multilabel", r"', line 2, column 'x': '2' is neither 0 nor 1"),
        ("file,x,y\n0.png,1,2\n", "classification", r"', line 1: 2 columns of targets \(x,y\) where a classification"),
        ("file,x\n0.png,\n", "classification", r"', line 2, column 'x': the label is missing"),
        (
            "file,x\n0.png,1\n1.png,3\n",
            "classification",
            r"', line 3, column 'x': the model has no class 3, only",
        ),
        ("file,x,split\n0.png,1,val\n", "regression", r"no line has the split 'train' for training. There are val"),
    ],
)
def test_tables_that_are_not_what_they_should_be(tmp_path: Path, text: str, task: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_it(write(tmp_path, text), task, num_classes=3)


def test_tables_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone.csv' cannot be read as a CSV file: .*No such file"):
        open_it(tmp_path / "gone.csv", "regression")
    table = write(tmp_path, "file,x\n0.png,1\n1.png,2\n")
    with pytest.raises(ConfigError, match=r"table.csv' has no column 'split' to find the parts by"):
        open_it(table, "regression", val_split="val")
    table.write_text("file,x,split\n0.png,1,train\n1.png,2,val\n")
    with pytest.raises(DataError, match=r"no line has the split 'tset' for validation. There are train, val"):
        open_it(table, "regression", val_split="tset")
    table.write_bytes(b"file,x\n\xff\xfe.png,1\n")
    with pytest.raises(DataError, match=r"table.csv' cannot be read as a CSV file: 'utf-8' codec"):
        open_it(table, "regression")


def test_broken_images_of_a_table(tmp_path: Path) -> None:
    table = write(tmp_path, "file,x\n" + "".join(f"{k}.png,{k}\n" for k in range(6)))
    (tmp_path / "4.png").write_bytes(b"broken")
    with pytest.raises(DataError, match=r"1 image is broken:\n  '.*/4.png' cannot be read as an image: it is of no"):
        open_it(table, "regression")
    data = open_it(table, "regression", max_bad=1)
    assert rows(data.train) | rows(data.val) == {f"{k}.png": [k] for k in (0, 1, 2, 3, 5)}
