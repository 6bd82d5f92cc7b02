"""Finding and opening images, and preparing them for a model."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import masksurgery
from masksurgery import ConfigError
from masksurgery.images import Broken, ImageError, find_images, label_names, open_image, readable
from masksurgery.predict import Entry, Reader, Row, predict_images, write_csv, write_json
from masksurgery.scores import Threshold

GREEN = (0, 255, 0)


class Net(nn.Module):
    """A class for each channel, by its mean."""

    def __init__(self, channels: int = 3, classes: int = 4) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 8, 3, padding=1)
        self.fc = nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).relu().mean((2, 3)))


def convert(channels: int = 3, size: tuple[int, int] = (16, 24), **attributes: object) -> masksurgery.ConvertedModel:
    torch.manual_seed(0)
    base = Net(channels).eval()
    for name, value in attributes.items():
        setattr(base, name, value)
    return masksurgery.convert(base, where="head", example_inputs=(torch.zeros(1, channels, *size),))


@pytest.mark.parametrize(
    ("mode", "colour", "pixel"),
    [
        ("RGB", GREEN, GREEN),
        ("RGBA", (*GREEN, 128), GREEN),
        ("CMYK", (255, 0, 255, 0), GREEN),
        ("L", 77, (77, 77, 77)),
        ("LA", (77, 10), (77, 77, 77)),
        ("1", 1, (255, 255, 255)),
        ("I;16", 257 * 77, (77, 77, 77)),
        ("I", 77, (77, 77, 77)),
    ],
)
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str, colour: object, pixel: tuple[int, ...]) -> None:
    path = tmp_path / "image.tif"
    Image.new(mode, (5, 4), colour).save(path)  # type: ignore[arg-type]
    image = open_image(path)
    assert (image.mode, image.size, image.getpixel((2, 2))) == ("RGB", (5, 4), pixel)
    assert open_image(path, 1).mode == "L"


def test_a_palette_with_transparency(tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    Image.new("RGB", (5, 4), GREEN).convert("P").save(path, transparency=b"\x00" * 256)
    image = open_image(path)
    assert (image.mode, image.getpixel((0, 0))[1]) == ("RGB", 255)


def test_the_orientation_is_respected(tmp_path: Path) -> None:
    image = Image.new("RGB", (6, 4))
    image.putpixel((0, 0), GREEN)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    image.save(tmp_path / "image.png", exif=exif)
    upright = open_image(tmp_path / "image.png")
    assert (upright.size, upright.getpixel((3, 0))) == ((4, 6), GREEN)


def test_files_are_found_by_name(tmp_path: Path) -> None:
    for name in ("2.png", "1.JPEG", ".hidden.png", "text.txt", "sub/0.webp", "odd name.dat"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "folder.png").mkdir()
    found = find_images([tmp_path / "odd name.dat", tmp_path, tmp_path / "2.png"])
    assert [str(path.relative_to(tmp_path)) for path in found] == ["odd name.dat", "1.JPEG", "2.png", "sub/0.webp"]
    with pytest.raises(ImageError, match=r"No image in '.*folder.png'. Images end in .avif"):
        find_images([tmp_path / "folder.png"])
    with pytest.raises(ImageError, match=r"'.*gone' does not exist"):
        find_images([tmp_path, tmp_path / "gone"])
    assert readable(Path("caf\udce9")) == "caf\N{REPLACEMENT CHARACTER}"


def test_size_and_channels_come_from_the_inputs(tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    Image.new("RGB", (90, 60), (255, 255, 255)).save(path)
    x = Reader(convert())(path)
    assert (tuple(x.shape), x.dtype) == ((3, 16, 24), torch.float32)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    assert torch.allclose(x[:, 8, 8], (1 - mean) / std, atol=1e-5)
    grey = Reader(convert(1, pretrained_cfg={"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.5, 0.5)}))(path)
    assert torch.allclose(grey, torch.full((1, 16, 24), (1 - 0.2) / 0.5), atol=1e-5)


@pytest.mark.parametrize(("channels", "seen"), [(5, r"float32\[1, 5, 16, 24\]"), (2, r"float32\[1, 2, 16, 24\]")])
def test_other_inputs_are_no_images(channels: int, seen: str) -> None:
    with pytest.raises(ConfigError, match=f"files are for models of one image .* this one takes {seen}"):
        Reader(convert(channels))


def test_batches_keep_the_order(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    paths = [tmp_path / f"{k}.png" for k in range(7)]
    for k, path in enumerate(paths):
        Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(path)
        if k in (1, 4, 5):
            path.write_bytes(b"broken")
    model = convert().train()
    results = list(predict_images(model, paths, topk=9, batch_size=2))
    assert [isinstance(result, Broken) for result in results] == [k in (1, 4, 5) for k in range(7)]
    assert [result.path for result in results] == list(map(str, paths))
    reader, model = Reader(model), model.eval()
    for path, row in zip(paths, results, strict=True):
        if isinstance(row, Row):
            with torch.no_grad():
                p = model(reader(path)[None])
            assert [entry.index for entry in row.entries] == p.mean[0].argsort(descending=True).tolist()
            assert row.entries[0].mean == pytest.approx(p.mean.max().item(), rel=1e-5)
            assert row.entropy == pytest.approx(p.entropy.item(), rel=1e-5)


def test_maps_are_refused(tmp_path: Path) -> None:
    Image.new("RGB", (16, 16)).save(tmp_path / "image.png")
    base = nn.Sequential()
    base.inner, base.act, base.outer = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)
    model = masksurgery.convert(base.eval(), example_inputs=(torch.zeros(1, 3, 16, 16),))
    with pytest.raises(ConfigError, match=r"predict writes a row for each image; this model returns \[1, 4, 14, 14\]"):
        list(predict_images(model, [tmp_path / "image.png"]))


def test_names_of_classes() -> None:
    names = ("ant", "bee", "cat", "dog")
    assert label_names(convert()) is None
    assert label_names(convert(pretrained_cfg={"label_names": names})) == list(names)
    described = {"label_names": names, "label_descriptions": {"ant": "an ant"}}
    assert label_names(convert(pretrained_cfg=described)) == ["an ant", "bee", "cat", "dog"]
    imagenet = label_names(convert(pretrained_cfg={"num_classes": 1000}))
    assert imagenet is not None and (len(imagenet), imagenet[285]) == (1000, "Egyptian cat")


def test_names_that_do_not_fit_are_not_used(tmp_path: Path) -> None:
    Image.new("RGB", (16, 16)).save(tmp_path / "image.png")
    (row,) = predict_images(convert(pretrained_cfg={"num_classes": 1000}), [tmp_path / "image.png"])
    assert isinstance(row, Row)
    assert {entry.label for entry in row.entries} == {"class 0", "class 1", "class 2", "class 3"}


def saved_images(folder: Path, count: int = 6) -> list[Path]:
    rng = np.random.default_rng(1)
    for k in range(count):
        Image.fromarray(rng.integers(0, 60 + 30 * k, (20, 30, 3), dtype=np.uint8)).save(folder / f"{k}.png")
    return [folder / f"{k}.png" for k in range(count)]


def test_rows_have_the_temperature_and_say_where_they_are_unsure(tmp_path: Path) -> None:
    model, paths = convert(), saved_images(tmp_path)
    plain = list(predict_images(model, paths))
    model.temperature = 0.2
    rows = [row for row in predict_images(model, paths, batch_size=4) if isinstance(row, Row)]
    assert [row.unsure for row in rows] == [None] * 6
    with torch.no_grad():
        p = model(torch.stack(list(map(Reader(model), paths))))
    assert [row.entropy for row in rows] == pytest.approx(p.entropy.tolist(), rel=1e-5)
    assert all(row.entropy < before.entropy for row, before in zip(rows, plain, strict=True))  # type: ignore[union-attr, operator]
    level = sorted(p.entropy.tolist())[3]
    model.threshold = Threshold("entropy", level - 1e-9)
    refused = [row.unsure for row in predict_images(model, paths, batch_size=4)]  # type: ignore[union-attr]
    assert refused == model.unsure(p).tolist() and refused.count(True) == 3


def test_files_of_rows_that_are_unsure(tmp_path: Path) -> None:
    entries = (Entry(3, "crane", 0.5, 0.1), Entry(1, "bee", 0.25, 0.1))
    rows = [Row("a.png", entries, 0.7, 0.1, True), Row("b.png", entries[:1], 0.1, 0.0, False)]
    write_json(rows, tmp_path / "rows.json")
    written = json.loads((tmp_path / "rows.json").read_text())
    assert [row["unsure"] for row in written] == [True, False]
    assert [len(row["entries"]) for row in written] == [2, 1]  # what the answer would have been is there
    write_csv(rows, tmp_path / "rows.csv")
    lines = (tmp_path / "rows.csv").read_text().splitlines()
    assert [line.split(",")[-1] for line in lines] == ["unsure", "true", "true", "false"]


def test_files_of_rows(tmp_path: Path) -> None:
    rows = [Row("a.png", (Entry(3, "crane, bird", 0.5, float("nan")),), 0.7, 0.1), Row("b.png", (Entry(0, "x", 1, 2),))]
    write_json(rows, tmp_path / "rows.json")
    assert json.loads((tmp_path / "rows.json").read_text()) == [
        {
            "path": "a.png",
            "entries": [{"index": 3, "label": "crane, bird", "mean": 0.5, "std": None}],
            "entropy": 0.7,
            "mutual_information": 0.1,
        },
        {"path": "b.png", "entries": [{"index": 0, "label": "x", "mean": 1, "std": 2}]},
    ]
    write_csv(rows, tmp_path / "rows.csv")
    assert (tmp_path / "rows.csv").read_text().splitlines() == [
        "path,rank,index,label,mean,std,entropy,mutual_information,unsure",
        'a.png,1,3,"crane, bird",0.5,nan,0.7,0.1,',
        "b.png,1,0,x,1,2,,,",
    ]
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(ConfigError, match=r"folder.csv' cannot be written: Is a directory"):
        write_csv(rows, tmp_path / "folder.csv")
