"""The part of a data set that a model is evaluated on, and images without targets."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from masksurgery import ConfigError
from masksurgery.data import (
    DataConfig,
    DataError,
    EvaluationData,
    Source,
    eval_batches,
    hold_out,
    name_of,
    open_data,
    open_evaluation,
    open_unlabelled,
)
from masksurgery.transforms import Preprocessing
from pictures import write_classes, write_fashion_mnist, write_image, write_shard, write_shards
from test_data import break_files, names, targets
from test_data_pairs import write_pairs


def open_it(data: object, everything: bool = False, **more: Any) -> EvaluationData:
    kwargs = {key: more.pop(key) for key in ("task", "num_classes", "channels") if key in more}
    return open_evaluation(DataConfig(str(data), **more), everything=everything, **kwargs)


def unlabelled(data: object, masks: bool = False, **more: Any) -> EvaluationData:
    return open_unlabelled(str(data), DataConfig("known", **more), masks=masks)


def pixels(source: Any) -> list[bytes]:
    return [np.asarray(source.read(k)[0]).tobytes() for k in range(len(source))]


# --- the part to evaluate on -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [{}, {"val_fraction": 0.3, "seed": 5}, {"max_val": 3}, {"max_val": 3, "max_bad": 2}])
def test_what_is_held_out_is_what_finetune_validates_on(tmp_path: Path, more: dict[str, Any]) -> None:
    write_classes(tmp_path, 40)
    if "max_bad" in more:
        val = open_data(DataConfig(str(tmp_path), max_val=3)).val
        broken = [int(Path(name).stem) for name in names(val)][:2]
        break_files(tmp_path, tuple(broken))
    config = DataConfig(str(tmp_path), **more)
    data, val = open_evaluation(config, num_classes=3), open_data(config).val
    assert isinstance(val, Source)
    assert names(data.source) == names(val) and targets(data.source) == targets(val)
    assert (data.classes, data.masks, len(data.bad)) == (("ant", "bee", "cat"), False, 2 if "max_bad" in more else 0)
    assert data.source.called == "validation"


def test_only_that_part_is_read(tmp_path: Path) -> None:
    write_classes(tmp_path / "val", 6)
    write_classes(tmp_path / "test", 3)
    shutil.copytree(tmp_path / "test", tmp_path / "train")
    break_files(tmp_path / "train", (0, 1, 2))
    assert sorted(names(open_it(tmp_path).source)) == [f"{k}.png" for k in range(6)]
    assert len(open_it(tmp_path, val_split="test").source) == 3
    shutil.rmtree(tmp_path / "train")
    assert len(open_it(tmp_path).source) == 6
    write_classes(tmp_path / "train", 20)
    shutil.rmtree(tmp_path / "val")
    held_out = open_it(tmp_path, val_fraction=0.2)
    assert len(held_out.source) == 4 and all("train" in held_out.source.name(k) for k in range(4))
    used = {int(Path(name).stem) for name in names(held_out.source)}
    break_files(tmp_path / "train", tuple(set(range(20)) - used))
    assert len(open_it(tmp_path, val_fraction=0.2).source) == 4
    break_files(tmp_path / "train", tuple(used)[:1])
    with pytest.raises(DataError, match="1 image is broken"):
        open_it(tmp_path, val_fraction=0.2)


def test_everything(tmp_path: Path) -> None:
    write_classes(tmp_path, 12)
    data = open_it(tmp_path, everything=True, max_val=10)
    assert len(data.source) == 10 and data.source.called == "validation"
    assert sorted(names(open_it(tmp_path, everything=True).source)) == sorted(f"{k}.png" for k in range(12))
    write_classes(tmp_path / "both" / "train", 4)
    write_classes(tmp_path / "both" / "val", 3)
    with pytest.raises(DataError, match=r"both has a validation part, so everything is not clear: .* pass val_split"):
        open_it(tmp_path / "both", everything=True)


def test_named_sets(tmp_path: Path) -> None:
    write_fashion_mnist(tmp_path)
    more = {"data_dir": str(tmp_path), "channels": 1}
    held_out = open_it("torch/fashion_mnist", **more)
    assert len(held_out.source) == 3 and held_out.classes is not None and held_out.classes[9] == "Ankle boot"
    for file in (tmp_path / "FashionMNIST" / "raw").glob("train-*"):
        file.write_bytes(b"")  # were it read, this would show; torchvision only wants it to be there
    tested = open_it("torch/fashion_mnist", val_split="test", **more)
    assert targets(tested.source) == [k % 10 for k in range(12)] and name_of(tested.source, 3).endswith("test[3]")


def test_hugging_face(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    write_classes(tmp_path / "Both" / "train", 6)
    write_classes(tmp_path / "Both" / "validation", 3)
    write_classes(tmp_path / "Train" / "train", 10)
    cache = str(tmp_path / "cache")
    both = open_it(f"hfds/{tmp_path / 'Both'}", data_dir=cache)
    assert (len(both.source), both.classes) == (3, ("ant", "bee", "cat"))
    for more, count in (({}, 1), ({"everything": True}, 10), ({"val_split": "train"}, 10)):
        assert len(open_it(f"hfds/{tmp_path / 'Train'}", data_dir=cache, **more).source) == count
    for name, count in (("Both", 3), ("Train", 10)):
        source = unlabelled(f"hfds/{tmp_path / name}", data_dir=cache).source
        assert targets(source) == [0] * count


def test_tables(tmp_path: Path) -> None:
    lines = ["file,split,a,b"]
    for k in range(9):
        write_image(tmp_path / f"{k}.png", k)
        lines.append(f"{k}.png,{('valid', 'test', 'other')[k % 3]},{k},0.5")
    (tmp_path / "table.csv").write_text("\n".join(lines))
    for more, first in (({}, 0), ({"val_split": "other"}, 2)):
        data = open_it(tmp_path / "table.csv", task="regression", **more)
        assert names(data.source) == [f"{k}.png" for k in range(first, 9, 3)]
        assert [row.tolist() for row in targets(data.source)] == [[k, 0.5] for k in range(first, 9, 3)]
    with pytest.raises(DataError, match=r"no line has the split 'nothing' for validation\. There are other, test"):
        open_it(tmp_path / "table.csv", task="regression", val_split="nothing")
    with pytest.raises(DataError, match=r"no line has the split 'train' for training"):
        open_data(DataConfig(str(tmp_path / "table.csv")), task="regression")


def test_pairs(tmp_path: Path) -> None:
    write_pairs(tmp_path, ["val/0", "val/1", "test/2"])
    config = {"masks": str(tmp_path / "masks")}
    data = open_it(tmp_path / "images", **config)
    assert data.masks and [Path(name).stem for name in names(data.source)] == ["0", "1"]
    (image, mask) = data.source.read(0)
    assert (image.size, mask.shape, data.classes) == ((24, 20), (20, 24), None)
    assert len(open_it(tmp_path / "images", val_split="test", **config).source) == 1


def test_streams(tmp_path: Path) -> None:
    pytest.importorskip("webdataset")
    write_shards(tmp_path)
    data = open_it(f"wds/{tmp_path}", num_classes=3)
    assert (len(data.source), data.classes, name_of(data.source, 17)) == (7, None, "image 17")
    y = torch.cat([y for _, y in eval_batches(data.source, Preprocessing((3, 16, 16)).evaluation(), batch_size=4)])
    assert y.tolist() == [k % 3 for k in range(34, 41)]
    with pytest.raises(ConfigError, match="max_val does not go with a stream"):
        open_it(f"wds/{tmp_path}", max_val=3)


def test_errors_are_those_of_open_data(tmp_path: Path) -> None:
    write_classes(tmp_path, 6)
    with pytest.raises(DataError, match=r"has 3 classes \(ant, bee, cat\), the model 2"):
        open_it(tmp_path, num_classes=2)
    with pytest.raises(ConfigError, match='task="regression" reads its targets from a CSV file'):
        open_it(tmp_path, task="regression")
    break_files(tmp_path, tuple(range(6)))
    with pytest.raises(DataError, match="no validation image that can be read"):
        open_it(tmp_path, max_bad=6)


def test_one_process_checks_for_all(tmp_path: Path) -> None:
    write_classes(tmp_path / "val", 6)
    break_files(tmp_path, (3,))
    for read in (
        lambda **more: open_evaluation(DataConfig(str(tmp_path), max_bad=1), **more),
        lambda **more: open_unlabelled(str(tmp_path), DataConfig("known", max_bad=1), **more),
    ):
        first = read()
        other = read(bad=first.bad)
        assert len(first.bad) == 1 and names(first.source) == names(other.source) and len(first.source) == 5
        assert len(read(bad=()).source) == 6


# --- images without targets ------------------------------------------------------------------------------------------


def test_a_folder_is_taken_flat(tmp_path: Path) -> None:
    for k, place in enumerate(("b.png", "a/1.jpg", "a/deep/2.png", "train/3.png", "val/x/4.png", ".hidden.png")):
        write_image(tmp_path / place, k)
    data = unlabelled(tmp_path)
    assert names(data.source) == ["1.jpg", "2.png", "b.png", "3.png", "4.png"] and targets(data.source) == [0] * 5
    assert (data.classes, data.masks, data.bad, data.source.called) == (None, False, (), "unlabelled")
    assert names(unlabelled(tmp_path, max_val=2, seed=3).source) == names(
        unlabelled(tmp_path, max_val=2, seed=3).source
    )
    assert len(unlabelled(tmp_path, max_val=2).source) == 2
    assert names(unlabelled("torch/image_folder", data_dir=str(tmp_path)).source) == names(data.source)
    grey = open_unlabelled(str(tmp_path), DataConfig("known"), channels=1)
    assert grey.source.read(0)[0].mode == "L"
    (tmp_path / "a/deep/2.png").write_bytes(b"broken")
    with pytest.raises(DataError, match=r"1 image is broken:\n.*2\.png"):
        unlabelled(tmp_path)
    assert names(unlabelled(tmp_path, max_bad=1).source) == ["1.jpg", "b.png", "3.png", "4.png"]
    assert len(unlabelled(tmp_path, check=False).source) == 5


def test_a_tar_with_and_without_folders(tmp_path: Path) -> None:
    write_classes(tmp_path / "classes", 4)
    for k in range(3):
        write_image(tmp_path / "flat" / f"{k}.png", k)
    for name, count in (("classes", 4), ("flat", 3)):
        tar = shutil.make_archive(str(tmp_path / name), "tar", tmp_path / name)
        source = unlabelled(tar).source
        assert targets(source) == [0] * count
        assert sorted(pixels(source)) == sorted(pixels(unlabelled(tmp_path / name).source))


def test_the_test_part_of_named_sets(tmp_path: Path) -> None:
    write_fashion_mnist(tmp_path)
    labels = tmp_path / "FashionMNIST" / "raw" / "t10k-labels-idx1-ubyte"
    labels.write_bytes(labels.read_bytes()[:-1] + bytes([170]))  # labels are nobody's business here
    source = unlabelled("torch/fashion_mnist", data_dir=str(tmp_path)).source
    assert [source.read(k)[0].getpixel((0, 0))[0] for k in range(12)] == list(range(12)) and targets(source) == [0] * 12


def test_a_table_of_files(tmp_path: Path) -> None:
    for k in range(4):
        write_image(tmp_path / f"{k}.png", k)
    (tmp_path / "one.csv").write_text("file\n0.png\n1.png\n2.png")
    assert names(unlabelled(tmp_path / "one.csv").source) == ["0.png", "1.png", "2.png"]
    (tmp_path / "parts.csv").write_text("file,split,x\n0.png,train,a\n1.png,test,\n2.png,test,b\n3.png,,c")
    source = unlabelled(tmp_path / "parts.csv").source
    assert names(source) == ["1.png", "2.png"] and targets(source) == [0, 0]
    (tmp_path / "gone.csv").write_text("file\nnothing.png")
    with pytest.raises(DataError, match=r"gone\.csv', line 2: there is no file '.*nothing\.png'"):
        unlabelled(tmp_path / "gone.csv")


def test_shards_without_labels(tmp_path: Path) -> None:
    pytest.importorskip("webdataset")
    write_shards(tmp_path)
    write_shard(tmp_path / "validation-000.tar", range(34, 41), no_label=range(34, 41))
    source = unlabelled(f"wds/{tmp_path}").source
    batches = list(eval_batches(source, Preprocessing((3, 16, 16)).evaluation(), batch_size=4))
    assert [y.tolist() for _, y in batches] == [[0] * 4, [0] * 3]
    with pytest.raises(DataError, match=r"1 image is broken:\n.*has no label"):
        list(eval_batches(open_it(f"wds/{tmp_path}").source, Preprocessing((3, 16, 16)).evaluation(), batch_size=4))


def test_segmentation_resizes_as_a_whole(tmp_path: Path) -> None:
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:, :4] = pixels[:, -4:] = 255  # a crop from the centre would lose it
    Image.fromarray(pixels).save(tmp_path / "0.png")
    preprocessing = Preprocessing((3, 20, 20), pretrained_cfg={"mean": (0.0,) * 3, "std": (1.0,) * 3})
    for masks, edge in ((True, 1), (False, 0)):
        data = unlabelled(tmp_path, masks=masks)
        assert data.masks is masks
        ((x, y),) = eval_batches(data.source, preprocessing.evaluation(masks=data.masks), batch_size=1)
        assert x.shape == (1, 3, 20, 20) and y.tolist() == [0]
        assert x[0, 0, 10, 0] == pytest.approx(edge, abs=0.05)
    mask = np.zeros((20, 40), np.int32)
    whole = preprocessing.evaluation(masks=True)
    assert torch.equal(whole(Image.fromarray(pixels), mask)[0], whole(Image.fromarray(pixels), 0)[0])


def test_places_where_nothing_is(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"No image in '.*empty'"):
        unlabelled(tmp_path / "empty")
    with pytest.raises(DataError, match=r"nowhere' does not exist"):
        unlabelled(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="torch/nothing is not known"):
        unlabelled("torch/nothing", data_dir=str(tmp_path))
    with pytest.raises(DataError, match="has none of the parts validation, val"):
        unlabelled(f"wds/{tmp_path}", max_val=1)  # which is for the data beside it


# --- what is made of them --------------------------------------------------------------------------------------------


def test_a_part_to_calibrate_on(tmp_path: Path) -> None:
    write_classes(tmp_path, 20)
    source = open_it(tmp_path, everything=True).source
    assert isinstance(source, Source)
    rest, held = hold_out(source, 0.25, 1)
    assert (len(rest), len(held)) == (15, 5) and set(names(rest)) | set(names(held)) == set(names(source))
    with pytest.raises(DataError, match="1 images cannot be divided into two parts"):
        hold_out(replace(source, indices=source.indices[:1]), 0.5, 0)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_positions_are_known(tmp_path: Path, world: int) -> None:
    write_classes(tmp_path, 11)
    source, transform = unlabelled(tmp_path).source, Preprocessing((3, 20, 24)).evaluation()
    for rank in range(world):
        batches = eval_batches(source, transform, batch_size=2 * world, rank=rank, world=world, workers=0)
        x = torch.cat([x for x, _ in batches])
        for i, image in enumerate(x):
            assert torch.equal(image, transform(*source.read(rank + world * i))[0])
            assert name_of(source, rank + world * i) == source.name(rank + world * i)
