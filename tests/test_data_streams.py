"""WebDataset shards and other streams."""

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from masksurgery import ConfigError
from masksurgery.data import (
    Data,
    DataConfig,
    DataError,
    Stream,
    eval_batches,
    open_data,
    steps_per_epoch,
    train_batches,
)
from masksurgery.data.streams import Lane, Shards
from masksurgery.transforms import Augmentation, Preprocessing
from pictures import write_classes, write_shard, write_shards

PREPROCESSING = Preprocessing((3, 16, 16))
EVALUATION = PREPROCESSING.evaluation()
LENGTHS = (10, 9, 8, 7)  # 34 images, 8 steps of 4 an epoch

pytest.importorskip("webdataset")


def open_it(folder: Path, **more: object) -> Data:
    return open_data(DataConfig(f"wds/{folder}", **more), num_classes=3)


def run(stream: Stream, steps: tuple[int, int], **more: int) -> list[tuple[Tensor, Tensor]]:
    transform = PREPROCESSING.training(Augmentation(color_jitter=0.4))
    settings = {"batch_size": 4, "seed": 0, "workers": 0} | more
    return list(train_batches(stream, transform, steps=steps, **settings))


def same(a: list[tuple[Tensor, ...]], b: list[tuple[Tensor, ...]]) -> bool:
    return all(torch.equal(*pair) for x, y in zip(a, b, strict=True) for pair in zip(x, y, strict=True))


def keys(stream: Stream, epoch: int, count: int, lane: Lane = Lane()) -> list[int]:  # noqa: B008
    samples = stream.train_samples(lane, 0, epoch, 4)
    return [int(next(samples).name.rpartition("/")[2]) for _ in range(count)]


def test_an_epoch_of_shards(tmp_path: Path) -> None:
    data = open_it(write_shards(tmp_path, LENGTHS))
    assert (data.classes, data.bad, len(data.train), len(data.val)) == (None, (), 34, 7)
    assert steps_per_epoch(data.train, 4) == 8
    first = keys(data.train, 0, 34)
    assert sorted(first) == list(range(34)) != first
    assert sorted(keys(data.train, 1, 34)) == sorted(first) and keys(data.train, 1, 34) != first
    halves = [keys(data.train, 0, 15, Lane(rank, 2)) for rank in range(2)]
    assert not set(halves[0]) & set(halves[1])  # two shards each
    quarters = [keys(data.train, 0, 7, Lane(rank, 2, worker, 2)) for rank in range(2) for worker in range(2)]
    assert len(set().union(*quarters)) == 28


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")
@pytest.mark.parametrize("workers", [0, *(pytest.param(k, marks=pytest.mark.slow) for k in (2, 3))])
@pytest.mark.parametrize("world", [1, 2])
def test_a_restart_at_any_step(tmp_path: Path, workers: int, world: int) -> None:
    train = open_it(write_shards(tmp_path, (5, 7, 6, 6, 7, 5))).train
    for rank in range(world):
        more = {"workers": workers, "rank": rank, "world": world}
        whole = run(train, (0, 20), **more)  # 9 steps an epoch
        assert [len(x) for x, _ in whole] == [4 // world] * 20
        for start in (1, 8, 9, 14):
            assert same(whole[start:], run(train, (start, 20), **more))
        assert not same(whole[:9], whole[9:18])


def test_no_worker_is_as_one(tmp_path: Path) -> None:
    train = open_it(write_shards(tmp_path, LENGTHS)).train
    assert same(run(train, (3, 12)), run(train, (3, 12), workers=1))
    assert not same(run(train, (0, 3)), run(train, (0, 3), seed=1))


def test_no_more_workers_than_shards(tmp_path: Path) -> None:
    train = open_it(write_shards(tmp_path, (9, 8))).train
    assert same(run(train, (0, 6), workers=2), run(train, (0, 6), workers=5))
    with pytest.raises(DataError, match=r"2 shards cannot be divided among 4 processes. Write more of them"):
        run(train, (0, 6), rank=3, world=4)


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_has_each_image_once(tmp_path: Path, workers: int) -> None:
    shard = write_shards(tmp_path, LENGTHS) / "_info.json"
    shard.write_text(
        shard.read_text().replace('"train"', '"x"').replace('"validation"', '"train"').replace('"x"', '"val"')
    )
    val = open_it(tmp_path).val
    assert len(val) == 34
    whole = list(eval_batches(val, EVALUATION, batch_size=8, workers=0))
    assert [len(x) for x, _ in whole] == [8, 8, 8, 8, 2]
    assert torch.cat([y for _, y in whole]).tolist() == [k % 3 for k in range(34)]
    rows = {tuple(row) for x, _ in whole for row in x.flatten(1).tolist()}
    assert len(rows) == 34
    for world in (2, 5):  # there are four shards
        parts = [
            list(eval_batches(val, EVALUATION, batch_size=2 * world, rank=rank, world=world, workers=workers))
            for rank in range(world)
        ]
        seen = [tuple(row) for part in parts for x, _ in part for row in x.flatten(1).tolist()]
        assert len(seen) == 34 and set(seen) == rows
    with pytest.raises(TypeError, match="How many batches a stream has is not known"):
        len(eval_batches(val, EVALUATION, batch_size=8))


# --- broken samples --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_samples_are_counted_and_named(tmp_path: Path, workers: int) -> None:
    folder = write_shards(tmp_path, LENGTHS, bad=(3, 12, 35), no_label=(20,))
    with pytest.raises(
        DataError, match=r"1 image is broken:\n  '.*train-00\d.tar/00\d\d.*' (cannot be read|has no label)"
    ):
        run(open_it(folder).train, (0, 16), workers=workers)
    data = open_it(folder, max_bad=3)
    batches = train_batches(data.train, EVALUATION, batch_size=4, steps=(0, 16), seed=0, workers=workers)
    assert len(list(batches)) == 16
    assert sorted(broken.path.rpartition("/")[2] for broken in batches.bad) == ["0003", "0012", "0020"]
    reasons = " ".join(broken.reason for broken in batches.bad)
    assert "train-000.tar/0003.png' cannot be read as an image" in reasons
    assert "train-002.tar/0020' has no label: its .cls is missing" in reasons
    batches = eval_batches(data.val, EVALUATION, batch_size=4, workers=workers)
    assert sum(len(x) for x, _ in batches) == 6 and [Path(broken.path).name for broken in batches.bad] == ["0035"]
    with pytest.raises(DataError, match=r"3 images are broken"):
        run(open_it(folder, max_bad=2).train, (0, 16), workers=workers)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_restart_leaves_the_same_samples_out(tmp_path: Path, workers: int) -> None:
    train = open_it(write_shards(tmp_path, LENGTHS, bad=(3, 12, 13, 20)), max_bad=4).train
    whole = run(train, (0, 16), workers=workers)
    for start in (3, 7, 13):
        assert same(whole[start:], run(train, (start, 16), workers=workers))


def test_a_truncated_shard(tmp_path: Path) -> None:
    folder = write_shards(tmp_path, LENGTHS)
    shard = folder / "train-001.tar"
    shard.write_bytes(shard.read_bytes()[: 512 * 17 + 100])
    with pytest.raises(DataError, match=r"1 image is broken:\n  '.*train-001.tar' cannot be read to its end: "):
        run(open_it(folder).train, (0, 8))
    train = open_it(folder, max_bad=1).train
    batches = train_batches(train, EVALUATION, batch_size=4, steps=(0, 8), seed=0, workers=0)
    assert len(list(batches)) == 8 and [Path(broken.path).name for broken in batches.bad] == ["train-001.tar"]


def test_shards_without_a_whole_sample(tmp_path: Path) -> None:
    folder = write_shards(tmp_path, (3, 3), bad=range(6))
    with pytest.raises(DataError, match=r"No training image can be read any more: '.*' cannot be read"):
        run(open_it(folder, max_bad=100).train, (0, 1))
    for k in range(2):
        write_shard(folder / f"train-00{k}.tar", ())
    with pytest.raises(DataError, match=r"There is no sample in .*train-00\d.tar, .*train-00\d.tar"):
        run(open_it(folder).train, (0, 1))


def test_shards_that_vanish(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "shards", LENGTHS)
    batches = iter(train_batches(open_it(folder).train, EVALUATION, batch_size=4, steps=(0, 99), seed=0, workers=1))
    next(batches)
    shutil.rmtree(folder)
    with pytest.raises(DataError, match=r"train-00\d.tar' cannot be read to its end: No such file"):
        list(batches)


# --- opening ---------------------------------------------------------------------------------------------------------


def test_patterns_of_names(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = write_shards(tmp_path, LENGTHS)
    (folder / "_info.json").unlink()
    config = {"data_dir": str(folder), "train_split": "train-{000..002}.tar|27", "val_split": "validation-000.tar|7"}
    data = open_data(DataConfig("wds/pictures", **config))
    assert isinstance(data.train, Shards)
    assert (len(data.train), len(data.train.files), len(data.val)) == (27, 3, 7)
    assert capfd.readouterr() == ("", "")
    with pytest.raises(DataError, match=r"wds/pictures cannot be opened: .*num_samples not specified"):
        open_data(DataConfig("wds/pictures", **{**config, "train_split": "train-{000..002}.tar"}))
    with pytest.raises(DataError, match=r"wds/pictures: 1 of 4 shards are missing, such as '.*train-004.tar'"):
        open_data(DataConfig("wds/pictures", **{**config, "train_split": "train-{001..004}.tar|9"}))


def test_streams_that_are_not_what_they_should_be(tmp_path: Path) -> None:
    folder = write_shards(tmp_path, LENGTHS)
    with pytest.raises(DataError, match=r"wds/.* cannot be opened: split tset not found in info"):
        open_it(folder, train_split="tset")
    info = folder / "_info.json"
    info.write_text(info.read_text().replace('"validation"', '"test"'))
    with pytest.raises(
        DataError, match=r"has none of the parts validation, val, .*Pass val_split. \(wds/.*not found in info"
    ):
        open_it(folder)
    assert len(open_it(folder, val_split="test").val) == 7
    with pytest.raises(ConfigError, match=r"max_train does not go with a stream such as wds/.*: name fewer shards"):
        open_it(folder, max_train=3)
    with pytest.raises(DataError, match=r"34 training images are less than one batch"):
        run(open_it(folder, val_split="test").train, (0, 1), batch_size=35)


def test_names_of_remote_shards() -> None:
    config = {"data_dir": "http://localhost:9/x", "val_split": "val-{0..1}.tar|2"}
    data = open_data(DataConfig("wds/pictures", train_split="a/train-{0..1}.tar|20", **config))
    assert isinstance(data.train, Shards)
    assert data.train.files == ("http://localhost:9/x/a/train-0.tar", "http://localhost:9/x/a/train-1.tar")
    with pytest.raises(DataError, match=r"\"a';touch b;'.tar\" is no name of a shard"):
        open_data(DataConfig("wds/pictures", train_split="a';touch b;'.tar|20", **config))


def test_labels_of_no_class(tmp_path: Path) -> None:
    data = open_data(DataConfig(f"wds/{write_shards(tmp_path, LENGTHS)}"), num_classes=2)
    with pytest.raises(DataError, match=r"has the label 2, and the model only classes 0 to 1"):
        run(data.train, (0, 8))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_iterable_data_set_of_hugging_face(tmp_path: Path, workers: int) -> None:
    pytest.importorskip("datasets")
    write_classes(tmp_path / "Pictures" / "train", 30)
    write_classes(tmp_path / "Pictures" / "validation", 7)
    data = open_data(DataConfig(f"hfids/{tmp_path / 'Pictures'}", data_dir=str(tmp_path / "cache"), download=True))
    assert (len(data.train), len(data.val)) == (30, 7)
    more = {"workers": workers, "rank": 1, "world": 2}
    whole = run(data.train, (0, 16), **more)  # 7 steps an epoch
    assert same(whole[9:], run(data.train, (9, 16), **more))
    assert not same(whole[:7], whole[7:14])
    seen = [
        tuple(row)
        for rank in range(2)
        for x, _ in eval_batches(data.val, EVALUATION, batch_size=4, rank=rank, world=2, workers=workers)
        for row in x.flatten(1).tolist()
    ]
    assert len(seen) == len(set(seen)) == 7
