"""Opening folders, named data sets and their parts; finding what is broken."""

import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from masksurgery import ConfigError
from masksurgery.data import Data, DataConfig, DataError, Source, open_data
from masksurgery.data.check import default_workers
from pictures import noise, write_classes, write_fashion_mnist, write_image, write_shards


def names(source: object) -> list[str]:
    assert isinstance(source, Source)
    return [Path(source.name(k)).name for k in range(len(source))]


def targets(source: object) -> list[int]:
    assert isinstance(source, Source)
    return [source.read(k)[1] for k in range(len(source))]


def test_a_folder_with_both_parts(tmp_path: Path) -> None:
    write_classes(tmp_path / "train", 10)
    write_classes(tmp_path / "val", 4, first=10)
    data = open_data(DataConfig(str(tmp_path)))
    assert (data.classes, data.masks, data.bad) == (("ant", "bee", "cat"), False, ())
    assert sorted(names(data.train)) == sorted(f"{k}.png" for k in range(10))
    assert sorted(names(data.val)) == ["10.png", "11.png", "12.png", "13.png"]
    for source in (data.train, data.val):
        assert [int(Path(name).stem) % 3 for name in names(source)] == targets(source)
        image, _ = source.read(0)
        assert np.array_equal(image, noise(int(Path(source.name(0)).stem)))


def test_parts_are_found_by_their_names(tmp_path: Path) -> None:
    for part, count in (("training", 5), ("evaluation", 4), ("test", 3), ("other", 6)):
        write_classes(tmp_path / part, count)

    def sizes(**more: str) -> tuple[int, int]:
        data = open_data(DataConfig(str(tmp_path), **more))
        return len(data.train), len(data.val)

    assert sizes() == (5, 4)
    assert sizes(val_split="test") == (5, 3)
    assert sizes(train_split="other", val_split="training") == (6, 5)


def test_a_part_is_held_out_by_the_seed(tmp_path: Path) -> None:
    write_classes(tmp_path, 20)
    parts = {}
    for seed in (0, 0, 1):
        data = open_data(DataConfig(str(tmp_path), val_fraction=0.25, seed=seed))
        assert (len(data.train), len(data.val)) == (15, 5)
        assert sorted(names(data.train) + names(data.val)) == sorted(f"{k}.png" for k in range(20))
        assert parts.setdefault(seed, names(data.val)) == names(data.val)
    assert parts[0] != parts[1]
    tiny = open_data(DataConfig(str(write_classes(tmp_path / "2", 2)), val_fraction=0.01))
    assert (len(tiny.train), len(tiny.val)) == (1, 1)


def test_some_images_are_drawn_by_the_seed(tmp_path: Path) -> None:
    write_classes(tmp_path, 40)
    drawn = {}
    for seed in (0, 0, 1):
        data = open_data(DataConfig(str(tmp_path), max_train=7, max_val=2, seed=seed))
        assert (len(data.train), len(data.val)) == (7, 2)
        assert not set(names(data.train)) & set(names(data.val))
        assert drawn.setdefault(seed, names(data.train)) == names(data.train)
    assert drawn[0] != drawn[1]
    assert len(open_data(DataConfig(str(tmp_path), max_train=1000)).train) == 36


def test_channels_are_those_of_the_model(tmp_path: Path) -> None:
    write_image(tmp_path / "a" / "0.png", mode="L")
    write_image(tmp_path / "b" / "1.png")
    for channels, mode in ((1, "L"), (3, "RGB")):
        data = open_data(DataConfig(str(tmp_path)), channels=channels)
        assert {data.train.read(0)[0].mode, data.val.read(0)[0].mode} == {mode}


def test_torchvision(tmp_path: Path) -> None:
    write_fashion_mnist(tmp_path)
    config = DataConfig("torch/fashion_mnist", data_dir=str(tmp_path))
    data = open_data(config, channels=1)
    assert data.classes is not None and data.classes[9] == "Ankle boot" and len(data.classes) == 10
    assert (len(data.train), len(data.val)) == (27, 3)  # the test part is left alone
    image, target = data.val.read(0)
    assert (image.mode, image.size, target) == ("L", (28, 28), image.getpixel((0, 0)) % 10)
    tested = open_data(DataConfig("torch/FASHION_MNIST", data_dir=str(tmp_path), val_split="test"))
    assert (len(tested.train), len(tested.val), tested.val.read(3)[0].getpixel((0, 0))) == (30, 12, (3, 3, 3))
    write_classes(tmp_path / "folder" / "train", 6)
    folder = open_data(DataConfig("torch/image_folder", data_dir=str(tmp_path / "folder"), max_val=1))
    assert folder.classes == ("ant", "bee", "cat")


def test_hugging_face(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    write_classes(tmp_path / "Pictures" / "train", 10)
    cache = str(tmp_path / "cache")
    held_out = open_data(DataConfig(f"hfds/{tmp_path / 'Pictures'}", data_dir=cache))
    assert (held_out.classes, len(held_out.train), len(held_out.val)) == (("ant", "bee", "cat"), 9, 1)
    image, target = held_out.train.read(0)
    stem = int(Path(held_out.train.name(0)).stem)
    assert np.array_equal(image, noise(stem)) and target == stem % 3
    write_classes(tmp_path / "Both" / "train", 6)
    write_classes(tmp_path / "Both" / "validation", 3)
    both = open_data(DataConfig(f"hfds/{tmp_path / 'Both'}", data_dir=cache))
    assert (len(both.train), len(both.val)) == (6, 3)
    with pytest.raises(DataError, match=r"cannot be opened: Unknown split \"tset\""):
        open_data(DataConfig(f"hfds/{tmp_path / 'Both'}", data_dir=cache, train_split="tset"))
    with pytest.raises(DataError, match=r"hfds/.*nowhere cannot be opened: "):
        open_data(DataConfig(f"hfds/{tmp_path / 'nowhere'}", data_dir=cache))


def test_a_tar_of_class_folders(tmp_path: Path) -> None:
    write_classes(tmp_path / "pictures", 9)
    tar = shutil.make_archive(str(tmp_path / "pictures"), "tar", tmp_path / "pictures")
    data = open_data(DataConfig(tar))
    assert (data.classes, len(data.train), len(data.val)) == (("ant", "bee", "cat"), 8, 1)
    assert [int(Path(name).stem) % 3 for name in names(data.train)] == targets(data.train)


# --- broken images ---------------------------------------------------------------------------------------------------


def break_files(folder: Path, numbers: tuple[int, ...]) -> None:
    for k in numbers:
        (path,) = folder.rglob(f"{k}.png")
        path.write_bytes(path.read_bytes()[:-200])  # the header is fine


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_images_are_counted_and_named(tmp_path: Path, workers: int) -> None:
    write_classes(tmp_path / "train", 300)
    write_classes(tmp_path / "val", 6)
    break_files(tmp_path / "train", (3, 7, 299))
    break_files(tmp_path / "val", (1,))
    with pytest.raises(DataError, match=r"4 images are broken:\n.*3\.png' cannot be read as an image: .*trunc") as info:
        open_data(DataConfig(str(tmp_path), max_bad=3), workers=workers)
    assert all(re.search(rf"/{k}\.png'", str(info.value)) for k in (3, 7, 299, 1))
    assert str(info.value).endswith("leave them out with max_bad=4 or more.")
    data = open_data(DataConfig(str(tmp_path), max_bad=4), workers=workers)
    assert {Path(broken.path).name for broken in data.bad} == {"3.png", "7.png", "299.png", "1.png"}
    assert len(names(data.train)) == 297 and not {"3.png", "7.png", "299.png"} & set(names(data.train))
    assert sorted(names(data.val)) == ["0.png", "2.png", "3.png", "4.png", "5.png"]


def test_one_process_checks_for_all(tmp_path: Path) -> None:
    write_classes(tmp_path, 20)
    break_files(tmp_path, (3,))
    config = DataConfig(str(tmp_path), max_bad=1)
    first = open_data(config)
    shutil.copy(tmp_path / "ant" / "0.png", tmp_path / "ant" / "3.png")  # were it read, it would be whole
    other = open_data(config, bad=first.bad)
    assert names(other.train) == names(first.train) and names(other.val) == names(first.val)
    assert len(other.train) + len(other.val) == 19
    with pytest.raises(DataError, match="1 image is broken"):
        open_data(DataConfig(str(tmp_path)), bad=first.bad)


def test_a_check_can_be_left_out(tmp_path: Path) -> None:
    write_classes(tmp_path, 20)
    break_files(tmp_path, (3,))
    assert open_data(DataConfig(str(tmp_path), check=False)).bad == ()


def test_only_what_is_used_is_checked(tmp_path: Path) -> None:
    write_classes(tmp_path / "train", 30)
    write_classes(tmp_path / "val", 3)
    config = DataConfig(str(tmp_path), max_train=5)
    used = {Path(name).stem for name in names(open_data(config).train)}
    break_files(tmp_path / "train", tuple(k for k in range(30) if str(k) not in used))
    assert len(open_data(config).train) == 5


def test_a_long_list_is_cut(tmp_path: Path) -> None:
    write_classes(tmp_path, 40)
    break_files(tmp_path, tuple(range(30)))
    with pytest.raises(DataError, match=r"30 images are broken:(\n  .*){20}\n  And 10 more\.\nReplace them") as info:
        open_data(DataConfig(str(tmp_path)))
    assert str(info.value).count("cannot be read") == 20
    break_files(tmp_path, tuple(range(30, 40)))
    with pytest.raises(DataError, match=r"has no training image that can be read"):
        open_data(DataConfig(str(tmp_path), max_bad=40))


def test_jpegs_are_read_to_their_end(tmp_path: Path) -> None:
    for k in range(4):
        path = tmp_path / "ab"[k % 2] / f"{k}.jpg"
        path.parent.mkdir(exist_ok=True)
        noise(k, (200, 200)).save(path)
    path.write_bytes(path.read_bytes()[:-500])
    data = open_data(DataConfig(str(tmp_path), max_bad=1))
    assert [Path(broken.path).name for broken in data.bad] == ["3.jpg"]


def test_the_number_of_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(16)), raising=False)
    assert default_workers() == 4
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert default_workers() == 1
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0}, raising=False)
    assert default_workers() == 0


# --- errors ----------------------------------------------------------------------------------------------------------


def open_it(data: object, **more: object) -> Data:
    task = more.pop("task", "classification")
    return open_data(DataConfig(str(data), **more), task=task)


def test_folders_that_are_not_what_they_should_be(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write_image(tmp_path / "flat" / "0.png")
    write_classes(tmp_path / "only" / "val", 3)
    write_classes(tmp_path / "differ" / "train", 4, ("ant", "bee", "cow"))
    write_classes(tmp_path / "differ" / "val", 4, ("ant", "bee", "cat"))
    write_classes(tmp_path / "one", 1)
    with pytest.raises(DataError, match=r"nowhere' does not exist. data is a folder, a CSV file, or a name"):
        open_it(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"empty cannot be opened: Found 0 images in subfolders"):
        open_it(tmp_path / "empty")
    with pytest.raises(DataError, match=r"flat' has images and no folders of classes, such as cat/1.jpg"):
        open_it(tmp_path / "flat")
    with pytest.raises(DataError, match=r"only' has a folder val, and none called train"):
        open_it(tmp_path / "only")
    with pytest.raises(DataError, match=r"has no folder 'tset'. Its folders are: train, val\."):
        open_it(tmp_path / "differ", val_split="tset")
    with pytest.raises(DataError, match=r"different classes \(only training: cow; only validation: cat\)"):
        open_it(tmp_path / "differ")
    with pytest.raises(DataError, match=r"1 images cannot be divided into two parts"):
        open_it(tmp_path / "one")
    with pytest.raises(DataError, match=r"has 3 classes \(ant, bee, cat\), the model 2"):
        open_data(DataConfig(str(write_classes(tmp_path / "three", 6))), num_classes=2)


def test_names_that_are_not_known(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"torch/nonsense is not known. There are torch/cifar10, .*torch/mnist"):
        open_it("torch/nonsense", data_dir=str(tmp_path))
    with pytest.raises(ConfigError, match=r"torch/mnist needs data_dir"):
        open_it("torch/mnist")
    with pytest.raises(DataError, match=r"torch/mnist cannot be opened: Dataset not found. .*download=True"):
        open_it("torch/mnist", data_dir=str(tmp_path))
    with pytest.raises(DataError, match=r"torch/imagenet cannot be opened: "):
        open_it("torch/imagenet", data_dir=str(tmp_path))
    with pytest.raises(ConfigError, match=r"torch/mnist has the splits train and test, not 'tset'"):
        open_it("torch/mnist", data_dir=str(tmp_path), val_split="tset")


@pytest.mark.parametrize(("prefix", "package"), [("hfds", "datasets"), ("hfids", "datasets"), ("wds", "webdataset")])
def test_a_missing_package_is_named(prefix: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(sys.modules):
        if name.split(".")[0] == package or name.startswith("timm.data.readers.reader_"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=f"{prefix}/.* needs the package {package}: pip install {package}"):
        open_it(f"{prefix}/{write_shards(tmp_path)}")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": ""}, 'data="" names nothing'),
        ({"val_fraction": 1.0}, "val_fraction=1.0 is not a share between 0 and 1"),
        ({"max_train": 0}, "max_train=0 leaves no image"),
        ({"max_bad": -1}, "max_bad=-1 is negative"),
        ({"seed": -1}, "seed=-1 is negative"),
    ],
)
def test_settings_that_cannot_be(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DataConfig(**{"data": "folder", **options})


def test_tasks_want_their_kind_of_data(tmp_path: Path) -> None:
    write_classes(tmp_path, 4)
    for task in ("regression", "multilabel"):
        with pytest.raises(ConfigError, match=rf'task="{task}" reads its targets from a CSV file'):
            open_it(tmp_path, task=task)
    with pytest.raises(ConfigError, match=r'masks go with a folder of images and task="classification", not with'):
        open_it(tmp_path, task="regression", masks=str(tmp_path))


def test_labels_of_no_class(tmp_path: Path) -> None:
    write_fashion_mnist(tmp_path)
    labels = tmp_path / "FashionMNIST" / "raw" / "train-labels-idx1-ubyte"
    labels.write_bytes(labels.read_bytes()[:-1] + bytes([17]))
    data = open_data(DataConfig("torch/fashion_mnist", data_dir=str(tmp_path), val_split="test"), num_classes=10)
    with pytest.raises(
        ValueError, match=r"fashion_mnist train\[29\]' has the label 17, and the model only classes 0 to 9"
    ):
        data.train.read(29)
