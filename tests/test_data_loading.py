"""Batches are a function of the seed and the step."""

import os
import pickle
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from masksurgery import ConfigError
from masksurgery.data import DataConfig, DataError, Source, eval_batches, open_data, steps_per_epoch, train_batches
from masksurgery.transforms import Augmentation, Preprocessing, Transform
from pictures import write_classes, write_fashion_mnist

PREPROCESSING = Preprocessing((3, 16, 16))
AUGMENTATION = Augmentation(color_jitter=0.4, auto_augment="rand-m5-n1", random_erasing=0.5)
COUNT, BATCH = 22, 4  # 5 steps an epoch


@pytest.fixture(scope="module")
def transform() -> Transform:
    return PREPROCESSING.training(AUGMENTATION)


@pytest.fixture
def source(tmp_path: Path) -> Source:
    write_classes(tmp_path / "data" / "train", COUNT)
    write_classes(tmp_path / "data" / "val", 7)
    train = open_data(DataConfig(str(tmp_path / "data"), check=False)).train
    assert isinstance(train, Source)
    return train


def run(source: Source, transform: Transform, steps: tuple[int, int], **more: int) -> list[tuple[Tensor, Tensor]]:
    settings = {"batch_size": BATCH, "seed": 0, "workers": 0} | more
    return list(train_batches(source, transform, steps=steps, **settings))


def same(a: list[tuple[Tensor, ...]], b: list[tuple[Tensor, ...]]) -> bool:
    return all(torch.equal(*pair) for x, y in zip(a, b, strict=True) for pair in zip(x, y, strict=True))


def test_any_number_of_workers(source: Source, transform: Transform) -> None:
    alone = run(source, transform, (0, 7))
    assert [x.shape for x, _ in alone] == [(BATCH, 3, 16, 16)] * 7
    assert alone[0][1].dtype == torch.int64
    assert same(alone, run(source, transform, (0, 7), workers=2))
    assert not same(alone, run(source, transform, (0, 7), seed=1))


@pytest.mark.parametrize("world", [2, 4])
def test_any_number_of_processes(source: Source, transform: Transform, world: int) -> None:
    ranks = [run(source, transform, (0, 7), rank=rank, world=world) for rank in range(world)]
    together = [tuple(map(torch.cat, zip(*parts, strict=True))) for parts in zip(*ranks, strict=True)]
    assert same(run(source, transform, (0, 7)), together)


def test_a_restart_at_any_step(source: Source, transform: Transform) -> None:
    whole = run(source, transform, (0, 12))
    for start in (1, 3, 5, 11):  # in the middle of an epoch, and between two
        assert same(whole[start:], run(source, transform, (start, 12), workers=start % 3))
    assert run(source, transform, (12, 12)) == []


def test_an_epoch_has_each_image_once_at_most(source: Source) -> None:
    seen = []
    for epoch in range(2):
        batches = run(
            source, lambda image, target: (torch.tensor(hash(image.tobytes())), target), (epoch * 5, epoch * 5 + 5)
        )
        seen.append(torch.cat([x for x, _ in batches]).tolist())
        assert len(set(seen[-1])) == len(seen[-1]) == 20
    assert seen[0] != seen[1]


def test_augmentation_differs_from_epoch_to_epoch(source: Source, transform: Transform) -> None:
    one = source.take(np.array([3]))
    (a, _), (b, _) = run(one, transform, (0, 2), batch_size=1)
    assert not torch.equal(a, b)


def test_global_generators_are_left_alone(source: Source, transform: Transform) -> None:
    def states() -> tuple[object, ...]:
        numpys = np.random.get_state()
        return random.getstate(), (numpys[0], numpys[1].tolist(), *numpys[2:]), torch.get_rng_state().tolist()

    before = states()
    for workers in (0, 2):
        batches = iter(train_batches(source, transform, batch_size=4, steps=(0, 3), seed=0, workers=workers))
        next(batches)
        assert states() == before  # in between too
        assert len(list(batches)) == 2
        list(eval_batches(source, PREPROCESSING.evaluation(), batch_size=4, workers=workers))
        assert states() == before
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    assert same(
        run(source, transform, (0, 3)), list(train_batches(source, transform, batch_size=4, steps=(0, 3), seed=0))
    )


def test_evaluation_has_each_image_once_and_in_order(source: Source) -> None:
    evaluation = PREPROCESSING.evaluation()
    whole = list(eval_batches(source, evaluation, batch_size=8, workers=0))
    assert [len(x) for x, _ in whole] == [8, 8, 6]
    assert torch.cat([y for _, y in whole]).tolist() == [source.read(k)[1] for k in range(COUNT)]
    assert same(whole, list(eval_batches(source, evaluation, batch_size=8, workers=2)))
    for world in (2, 4):
        parts = [
            torch.cat([x for x, _ in eval_batches(source, evaluation, batch_size=8, rank=rank, world=world, workers=0)])
            for rank in range(world)
        ]
        x = torch.cat([x for x, _ in whole])
        assert all(torch.equal(part, x[rank::world]) for rank, part in enumerate(parts))


def test_more_processes_than_images(source: Source) -> None:
    few = source.take(np.arange(2))
    counts = [
        len(list(eval_batches(few, PREPROCESSING.evaluation(), batch_size=4, rank=r, world=4, workers=0)))
        for r in range(4)
    ]
    assert counts == [1, 1, 0, 0]


def test_lengths(source: Source, transform: Transform) -> None:
    assert steps_per_epoch(source, 4) == 5
    assert len(train_batches(source, transform, batch_size=4, steps=(3, 9), seed=0, workers=0)) == 6
    assert len(eval_batches(source, transform, batch_size=4, workers=0)) == 6


def test_targets_of_a_table(tmp_path: Path) -> None:
    write_classes(tmp_path, 4, ("a",))
    (tmp_path / "t.csv").write_text("file,x,y\n" + "".join(f"a/{k}.png,{k},{-k}\n" for k in range(4)))
    data = open_data(DataConfig(str(tmp_path / "t.csv"), val_fraction=0.25), task="regression")
    ((_, y),) = run(data.train, PREPROCESSING.evaluation(), (0, 1), batch_size=3)
    assert (y.shape, y.dtype) == ((3, 2), torch.float32)
    assert torch.equal(y[:, 0], -y[:, 1])


def test_fashion_mnist(tmp_path: Path) -> None:
    write_fashion_mnist(tmp_path)
    data = open_data(DataConfig("torch/fashion_mnist", data_dir=str(tmp_path), max_train=20), channels=1)
    transform = Preprocessing((1, 28, 28), pretrained_cfg={"mean": (0,), "std": (1,), "crop_pct": 1.0}).evaluation()
    for x, y in train_batches(data.train, transform, batch_size=10, steps=(0, 4), seed=0, workers=2):
        assert x.shape == (10, 1, 28, 28)
        assert ((x[:, 0, 0, 0] * 255).round().long() % 10).tolist() == y.tolist()


# --- images that go while they are read ------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_vanishes_is_named(source: Source, transform: Transform, workers: int) -> None:
    batches = iter(train_batches(source, transform, batch_size=4, steps=(0, 500), seed=0, workers=workers))
    next(batches)
    name = Path(source.name(5))
    name.unlink()
    with pytest.raises(
        DataError, match=r"^A training image is missing or broken: '.*png' cannot be read .*No such file"
    ) as info:
        list(batches)
    assert str(name) in str(info.value) and "Traceback" not in str(info.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_folder_that_vanishes_is_named(source: Source, transform: Transform, tmp_path: Path, workers: int) -> None:
    batches = iter(train_batches(source, transform, batch_size=4, steps=(0, 500), seed=0, workers=workers))
    next(batches)
    (tmp_path / "data").rename(tmp_path / "moved")
    with pytest.raises(
        DataError, match=r"^'.*/data/train' is gone or empty, with the training images: is it still mounted\?"
    ):
        list(batches)


def test_an_image_that_breaks_in_evaluation(source: Source) -> None:
    Path(source.name(9)).write_bytes(b"broken")
    batches = iter(eval_batches(source, PREPROCESSING.evaluation(), batch_size=4, workers=1))
    next(batches)
    with pytest.raises(DataError, match=r"A training image is missing or broken: '.*' cannot be read .* no format"):
        list(batches)


def test_a_worker_that_dies(source: Source) -> None:
    batches = iter(train_batches(source, _Deadly(), batch_size=4, steps=(0, 500), seed=0, workers=1))
    with pytest.raises(DataError, match=r"A process that reads images has died. If memory is short, use fewer"):
        next(batches)


class _Deadly:
    def __call__(self, image: object, target: object) -> tuple[Tensor, object]:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError


def test_an_error_of_the_transform_is_not_hidden(source: Source) -> None:
    def broken(image: object, target: object) -> tuple[Tensor, object]:
        raise RuntimeError("a bug")

    for workers in (0, 1):
        with pytest.raises(RuntimeError, match="a bug"):
            run(source, broken, (0, 1), workers=workers)


# --- settings --------------------------------------------------------------------------------------------------------


def test_batches_that_cannot_be(source: Source, transform: Transform) -> None:
    with pytest.raises(
        DataError, match=r"22 training images are less than one batch. Pass batch_size=22 or less, not 23"
    ):
        run(source, transform, (0, 1), batch_size=23)
    with pytest.raises(ConfigError, match=r"batch_size=0 is not a number of images"):
        run(source, transform, (0, 1), batch_size=0)
    with pytest.raises(ConfigError, match=r"batch_size=4 cannot be divided among 3 processes. Pass a multiple of 3"):
        run(source, transform, (0, 1), world=3)
    with pytest.raises(ConfigError, match=r"batch_size=4 cannot be divided among 3 processes"):
        eval_batches(source, transform, batch_size=4, world=3)
    with pytest.raises(ConfigError, match=r"rank=2 is none of 2 processes"):
        run(source, transform, (0, 1), rank=2, world=2)


def test_what_is_sent_to_workers_can_be_sent(source: Source, transform: Transform) -> None:
    batches = train_batches(source, transform, batch_size=4, steps=(0, 2), seed=0, workers=1)
    twin = pickle.loads(pickle.dumps(batches.loader.dataset))
    assert same([batches.loader.dataset[1][0]], [twin[1][0]])
    pickle.dumps((batches.loader.collate_fn, batches.loader.worker_init_fn))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_other_ways_to_start_workers(source: Source, transform: Transform, method: str) -> None:
    batches = train_batches(source, transform, batch_size=4, steps=(0, 3), seed=0, workers=1)
    batches.loader.multiprocessing_context = method
    assert same(list(batches), run(source, transform, (0, 3)))


@pytest.fixture(autouse=True)
def _generators() -> Iterator[None]:
    """Tests here seed the global generators."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    yield
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
