"""Small data sets, written to files."""

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image


def write_image(path: Path, seed: int = 0, size: tuple[int, int] = (24, 20), mode: str = "RGB") -> Path:
    """An image of noise; the same seed gives the same pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise(seed, size, mode).save(path)
    return path


def noise(seed: int, size: tuple[int, int] = (24, 20), mode: str = "RGB") -> Image.Image:
    shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def write_classes(folder: Path, count: int, classes: Sequence[str] = ("ant", "bee", "cat"), first: int = 0) -> Path:
    """A folder for each class, with `count` images in all."""
    for k in range(first, first + count):
        write_image(folder / classes[k % len(classes)] / f"{k}.png", k)
    return folder


def write_fashion_mnist(root: Path, train: int = 30, test: int = 12) -> Path:
    """Files as torchvision's FashionMNIST wants them, with few images: image k is of the grey value k, class k % 10."""
    raw = root / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", train), ("t10k", test)):
        images = np.broadcast_to(np.arange(count, dtype=np.uint8)[:, None, None], (count, 28, 28))
        labels = (np.arange(count) % 10).astype(np.uint8)
        for name, values in ((f"{part}-images-idx3", images), (f"{part}-labels-idx1", labels)):
            header = np.array([0x0800 + values.ndim, *values.shape], ">i4").tobytes()
            (raw / f"{name}-ubyte").write_bytes(header + values.tobytes())
    return root


def write_shard(path: Path, numbers: Sequence[int], bad: Sequence[int] = (), no_label: Sequence[int] = ()) -> Path:
    """A tar of images and their classes (k % 3), those of `bad` broken."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for k in numbers:
            stream = io.BytesIO()
            noise(k).save(stream, "PNG")
            files = {"png": b"broken" if k in bad else stream.getvalue()}
            if k not in no_label:
                files["cls"] = str(k % 3).encode()
            for suffix, content in files.items():
                info = tarfile.TarInfo(f"{k:04}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def write_shards(folder: Path, lengths: Sequence[int] = (10, 9, 8, 7), val: int = 7, **more: Sequence[int]) -> Path:
    """Shards of a training part of these lengths, one of a validation part, and their list."""
    splits, number = {}, 0
    for split, counts in (("train", lengths), ("validation", (val,))):
        files = []
        for k, count in enumerate(counts):
            files.append(write_shard(folder / f"{split}-{k:03}.tar", range(number, number + count), **more).name)
            number += count
        splits[split] = {
            "name": split, "num_samples": sum(counts), "filenames": files, "shard_lengths": list(counts)
        }  # fmt: skip
    (folder / "_info.json").write_text(json.dumps({"splits": splits}))
    return folder
