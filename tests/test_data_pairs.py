"""Images and masks, for segmentation."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from masksurgery.data import IGNORED, Data, DataConfig, DataError, Source, eval_batches, open_data, train_batches
from masksurgery.data.pairs import open_mask
from masksurgery.images import ImageError
from masksurgery.transforms import Preprocessing
from pictures import write_image


def write_pairs(folder: Path, names: list[str]) -> None:
    for k, name in enumerate(names):
        write_image(folder / "images" / f"{name}.jpg", k)
        mask = np.full((20, 24), k % 3, np.uint8)
        mask[0] = IGNORED
        path = folder / "masks" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask).save(path)


def open_it(folder: Path, num_classes: int | None = None, **more: object) -> Data:
    config = DataConfig(str(folder / "images"), masks=str(folder / "masks"), **more)
    return open_data(config, num_classes=num_classes)


def names(source: object) -> list[str]:
    assert isinstance(source, Source)
    return sorted(Path(source.name(k)).stem for k in range(len(source)))


def test_pairs_by_name(tmp_path: Path) -> None:
    write_pairs(tmp_path, ["a/0", "a/1", "b/0", "2", "3"])
    data = open_it(tmp_path, val_fraction=0.4)
    assert (data.masks, data.classes, len(data.train), len(data.val)) == (True, None, 3, 2)
    for source in (data.train, data.val):
        assert isinstance(source, Source)
        for k in range(len(source)):
            image, mask = source.read(k)
            assert image.size == (24, 20) and mask.shape == (20, 24)
            order = ["a/0", "a/1", "b/0", "2", "3"]
            name = Path(source.name(k)).relative_to(tmp_path / "images").with_suffix("").as_posix()
            assert set(np.unique(mask)) == {order.index(name) % 3, IGNORED}


def test_parts_are_folders(tmp_path: Path) -> None:
    write_pairs(tmp_path, ["train/0", "train/1", "valid/2", "test/3"])
    data = open_it(tmp_path)
    assert (names(data.train), names(data.val)) == (["0", "1"], ["2"])
    data = open_it(tmp_path, val_split="test")
    assert (names(data.train), names(data.val)) == (["0", "1"], ["3"])
    with pytest.raises(DataError, match=r"There is no folder 'tset' of images. The folders are: test, train, valid"):
        open_it(tmp_path, val_split="tset")
    write_pairs(tmp_path / "only", ["val/0", "1"])
    with pytest.raises(DataError, match=r"images' has a folder of validation images, and none called train"):
        open_it(tmp_path / "only")


def test_batches_of_masks(tmp_path: Path) -> None:
    write_pairs(tmp_path, [str(k) for k in range(9)])
    data, preprocessing = open_it(tmp_path), Preprocessing((3, 16, 16))
    (batch,) = train_batches(data.train, preprocessing.training(masks=True), batch_size=8, steps=(0, 1), seed=0)
    assert (batch[0].shape, batch[1].shape, batch[1].dtype) == ((8, 3, 16, 16), (8, 16, 16), torch.int64)
    ((x, y),) = eval_batches(data.val, preprocessing.evaluation(masks=True), batch_size=4)
    assert x.shape == (1, 3, 16, 16) and set(y[0, 0].tolist()) == {IGNORED} and len(y[0, 1:].unique()) == 1


@pytest.mark.parametrize(
    ("mode", "values"), [("1", [0, 1]), ("L", [0, 1, 255]), ("P", [0, 1, 255]), ("I;16", [0, 700])]
)
def test_indices_count_and_not_colours(tmp_path: Path, mode: str, values: list[int]) -> None:
    indices = np.random.default_rng(0).choice(values, (5, 7))
    image = Image.new(mode, (7, 5))
    if mode == "P":
        image.putpalette([200, 10, 10] * 256)
    image.putdata(indices.flatten().tolist())
    image.save(tmp_path / "mask.png")
    assert np.array_equal(open_mask(tmp_path / "mask.png"), indices)


def test_masks_that_are_none(tmp_path: Path) -> None:
    path = write_image(tmp_path / "mask.png")
    with pytest.raises(ImageError, match=r"mask.png' is no mask: its mode is RGB. Each pixel has to be the index"):
        open_mask(path)
    Image.fromarray(np.full((4, 4), 3, np.uint8)).save(path)
    assert open_mask(path, 4).max() == 3
    with pytest.raises(ImageError, match=r"mask.png' has a pixel of class 3, the model only classes 0 to 2"):
        open_mask(path, 3)
    path.write_bytes(b"broken")
    with pytest.raises(ImageError, match=r"mask.png' cannot be read as a mask: it is of no format"):
        open_mask(path)


def test_pairs_that_do_not_fit(tmp_path: Path) -> None:
    write_pairs(tmp_path, [str(k) for k in range(20)])
    Image.new("L", (20, 24)).save(tmp_path / "masks" / "1.png")
    with pytest.raises(DataError, match=r"1.jpg' is 24 x 20 pixels, its mask '.*1.png' 20 x 24"):
        open_it(tmp_path)
    assert [Path(broken.path).name for broken in open_it(tmp_path, max_bad=1).bad] == ["1.jpg"]
    with pytest.raises(DataError, match=r"masks/17.png' has a pixel of class 2, the model only classes 0 to 1"):
        open_it(tmp_path, num_classes=2, max_bad=1)
    (tmp_path / "masks" / "1.png").unlink()
    with pytest.raises(DataError, match=r"images/1.jpg' has no mask of that name in '.*masks'\."):
        open_it(tmp_path)
    (tmp_path / "masks" / "0.png").unlink()
    with pytest.raises(DataError, match=r"images/0.jpg' has no mask of that name in '.*masks' \(and so 1 more\)"):
        open_it(tmp_path)
    for k in (0, 1):
        (tmp_path / "images" / f"{k}.jpg").unlink()
    write_image(tmp_path / "masks" / "90.png", mode="L")
    with pytest.raises(DataError, match=r"masks/90.png' has no image of that name in '.*images'"):
        open_it(tmp_path)
    write_image(tmp_path / "images" / "2.png")
    with pytest.raises(DataError, match=r"2.png' and '.*2.jpg' have one name"):
        open_it(tmp_path)
    with pytest.raises(DataError, match=r"nowhere/images' is no folder of images"):
        open_it(tmp_path / "nowhere")


def test_masks_are_no_jpegs(tmp_path: Path) -> None:
    write_pairs(tmp_path, ["0", "1"])
    (tmp_path / "masks" / "1.png").unlink()
    write_image(tmp_path / "masks" / "1.jpg", mode="L")
    with pytest.raises(DataError, match=r"mask '.*1.jpg' is a JPEG, which changes the indices"):
        open_it(tmp_path)
