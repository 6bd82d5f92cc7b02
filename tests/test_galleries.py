"""Which images come into the galleries, and what is said of them."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import masksurgery
from masksurgery import ConfigError, Prediction, RegressionPrediction
from masksurgery.data import IGNORED
from masksurgery.evaluation import GALLERIES, Sample
from masksurgery.galleries import Galleries
from masksurgery.prediction import classification, regression
from masksurgery.scores import Score, Threshold, image_scores
from masksurgery.subjects import Subject, open_subject

LABELS = ("ant", "bee", "cat", "<script>")
SIZE = 12


class Net(nn.Module):
    def __init__(self, dense: bool = False, channels: int = 3) -> None:
        super().__init__()
        self.conv, self.dense = nn.Conv2d(channels, 4, 3, padding=1), dense
        self.example_inputs = (torch.zeros(1, channels, SIZE, SIZE),)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if self.dense else self.conv(x).mean((2, 3))


def subject_of(task: str = "classification", n: int = 3, **kwargs: Any) -> Subject:
    base = Net(**kwargs)
    if n == 1:
        return open_subject(base, task=task)  # type: ignore[arg-type]
    return open_subject(masksurgery.convert(base, n, include=["conv"], example_inputs=base.example_inputs, task=task))  # type: ignore[arg-type]


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def logits(b: int, n: int = 3, *dims: int, seed: int = 0) -> Tensor:
    return 3 * torch.randn(b, n, 4, *dims, generator=draws(seed))


def open_it(subject: Subject, **more: Any) -> Galleries:
    return Galleries(subject, **{"called": "file {}".format, "labels": LABELS, **more})


def run(
    galleries: Galleries, p: Any, y: Tensor, batch: int = 7, rows: Tensor | None = None, x: Tensor | None = None
) -> Galleries:
    """All rows, or some, in batches."""
    x = torch.zeros(len(y), 3, SIZE, SIZE) if x is None else x
    rows = torch.arange(len(y)) if rows is None else rows
    for part in rows.split(batch):
        galleries.update(x[part], type(p)(*(field[part] for field in p)), y[part], part)
    return galleries


def alone(candidates: list[Any]) -> list[Any]:
    return candidates


def image_of(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content))


# --- which -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 7, 100])
@pytest.mark.parametrize("score", ["entropy", "max_probability", "mutual_information", "variance"])
def test_the_ends_of_the_ranking(score: Score, batch: int) -> None:
    p, y = classification(logits(100), 2, "classification"), torch.randint(4, (100,), generator=draws())
    found = run(open_it(subject_of(), size=5, score=score), p, y, batch).collect(alone)
    assert list(found) == ["surest", "uncertain", "wrong"] and set(found) < set(GALLERIES)
    scores = image_scores(p, "classification")[score].numpy()
    order, wrong = np.argsort(scores), (p.mean.argmax(1) != y).numpy()
    wanted = {"surest": order[:5], "uncertain": order[::-1][:5], "wrong": [k for k in order if wrong[k]][:5]}
    for name, samples in found.items():
        assert [sample.name for sample in samples] == [f"file {k}" for k in wanted[name]]
        for k, sample in zip(wanted[name], samples, strict=True):
            assert sample.scores == {
                key: pytest.approx(x[k].item()) for key, x in image_scores(p, "classification").items()
            }
            assert sample.right is bool(not wrong[k]) and sample.unsure is None and sample.maps == ()
            assert (sample.truth, sample.predicted) == (LABELS[y[k]], LABELS[p.mean[k].argmax()])


def gathering(*others: Galleries) -> Callable[[list[Any]], list[Any]]:
    """What accelerate's gather_object does with the lists of several processes."""
    taken: list[list[Any]] = []
    for other in others:
        other.collect(lambda candidates: taken.append(pickle.loads(pickle.dumps(candidates))) or candidates)
    return lambda candidates: [c for part in (*taken, candidates) for c in part]


@pytest.mark.parametrize("world", [2, 3])
def test_processes_change_nothing(world: int) -> None:
    p, y = classification(logits(40).round(), 2, "classification"), torch.randint(4, (40,), generator=draws())
    p = p._replace(entropy=p.entropy.mul(4).round())  # many ties
    x = torch.randn(40, 3, SIZE, SIZE, generator=draws())
    subject = subject_of()
    whole = run(open_it(subject, size=6), p, y, x=x).collect(alone)
    parts = [run(open_it(subject, size=6), p, y, 3, torch.arange(rank, 40, world), x) for rank in range(world)]
    for k, part in enumerate(parts):
        found = part.collect(gathering(*parts[:k], *parts[k + 1 :]))
        assert found == whole and all(len(samples) == 6 for samples in whole.values())
    places = [int(sample.name.split()[1]) for sample in whole["uncertain"]]
    assert places == sorted(places, key=lambda k: (-p.entropy[k], k))


def test_memory_does_not_grow() -> None:
    p, y = classification(logits(400), 2, "classification"), torch.zeros(400, dtype=torch.int64)
    galleries = open_it(subject_of(), size=3)
    x = torch.zeros(400, 3, 300, 260)
    for rows in torch.arange(400).split(50):
        run(galleries, p, y, 50, rows, x)
        kept = [candidate for found in galleries._found.values() for candidate in found]
        assert len(kept) == 9
        assert all(c.picture.untyped_storage().nbytes() == 3 * 128 * 111 and c.sample.image == b"" for c in kept)


def test_unknown_images() -> None:
    p, y = classification(logits(30), 2, "classification"), torch.zeros(30, dtype=torch.int64)
    found = run(open_it(subject_of(), known=False, size=4), p, y).collect(alone)
    assert list(found) == ["unknown"]
    order = p.entropy.argsort()[:4].tolist()
    assert [(s.name, s.truth, s.right) for s in found["unknown"]] == [(f"file {k}", None, None) for k in order]


def test_what_is_empty_is_left_out() -> None:
    p = classification(logits(3), 2, "classification")
    assert open_it(subject_of()).collect(alone) == {}
    found = run(open_it(subject_of()), p, p.mean.argmax(1)).collect(alone)
    assert list(found) == ["surest", "uncertain"] and all(len(samples) == 3 for samples in found.values())


def test_no_score_of_that_name() -> None:
    with pytest.raises(ConfigError, match="score='margin' is not one of 'max_probability', 'entropy'"):
        open_it(subject_of(), score="margin")


# --- what is said of them --------------------------------------------------------------------------------------------


def one(galleries: Galleries, p: Any, y: Tensor, **more: Any) -> Sample:
    (sample,) = run(galleries, p, y, **more).collect(alone)["surest"]
    return sample


def test_votes_of_classes() -> None:
    members = torch.log(torch.tensor([[[0.7, 0.1, 0.1, 0.1], [0.2, 0.2, 0.1, 0.5], [0.6, 0.2, 0.1, 0.1]]]))
    for task in ("classification", "probabilities"):
        p = classification(members.exp() if task == "probabilities" else members, 2, task)  # type: ignore[arg-type]
        sample = one(open_it(subject_of()), p, torch.tensor([3]))
        assert [vote.label for vote in sample.votes] == ["ant", "<script>", "ant"]
        assert [vote.probability for vote in sample.votes] == pytest.approx([0.7, 0.5, 0.6])
        assert (sample.predicted, sample.truth, sample.right) == ("ant", "<script>", False)
    numbered = one(open_it(subject_of(), labels=("too", "few")), p, torch.tensor([3]))
    assert (numbered.predicted, numbered.truth) == ("class 0", "class 3")
    assert one(open_it(subject_of(), labels=None), p, torch.tensor([0])).truth == "class 0"


def test_votes_of_labels() -> None:
    members = torch.tensor([[[4.0, -4.0, 4.0, -4.0], [4.0, -4.0, -1.0, -4.0], [-1.0, -4.0, -2.0, -4.0]]])
    p = classification(members, 2, "multilabel")
    galleries = open_it(subject_of("multilabel"))
    sample = one(galleries, p, torch.tensor([[1.0, 0.0, 0.0, 0.0]]))
    assert [vote.label for vote in sample.votes] == ["ant, cat", "ant", "none"]
    assert [vote.probability for vote in sample.votes] == [None] * 3
    assert (sample.predicted, sample.truth, sample.right) == ("ant", "ant", True)
    wrong = run(galleries, p, torch.tensor([[1.0, 0.0, 1.0, 0.0]])).collect(alone)["wrong"]
    assert [s.truth for s in wrong] == ["ant, cat"]


def test_numbers() -> None:
    members = torch.tensor([[[1.0, 2.0], [3.0, 2.25]], [[1.0, 1.0], [1.0, 1.0]]])
    p, galleries = regression(members), open_it(subject_of("regression", n=2), score="entropy")
    found = run(galleries, p, torch.tensor([[1.5, 1e6], [0.0, 0.0]])).collect(alone)
    assert list(found) == ["surest", "uncertain"]
    sample = found["uncertain"][0]
    assert (sample.predicted, sample.truth, sample.right) == ("2, 2.125", "1.5, 1e+06", None)
    assert [(vote.label, vote.probability) for vote in sample.votes] == [("1, 2", None), ("3, 2.25", None)]
    assert sample.scores == {"variance": pytest.approx((1 + 1 / 64) / 2)}
    many = regression(torch.arange(16.0).view(1, 2, 8))
    assert one(open_it(subject_of("regression", n=2)), many, torch.zeros(1, 8)).predicted == "4, 5, 6, 7, 8 ..."


def test_a_threshold() -> None:
    p, y = classification(logits(50), 2, "classification"), torch.zeros(50, dtype=torch.int64)
    threshold = Threshold("max_probability", 0.7)
    found = run(open_it(subject_of(), size=50, threshold=threshold), p, y).collect(alone)
    for sample in found["surest"]:
        assert sample.unsure is (p.mean[int(sample.name.split()[1])].max().item() < 0.7)
    assert {sample.unsure for sample in found["surest"]} == {True, False}


# --- pictures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "shown"),
    [
        ((28, 28), (84, 84)),
        ((8, 8), (96, 96)),
        ((64, 48), (128, 96)),
        ((65, 30), (65, 30)),
        ((128, 100), (128, 100)),
        ((300, 150), (128, 64)),
        ((10, 2000), (1, 128)),
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_the_size_of_pictures(size: tuple[int, int], shown: tuple[int, int], channels: int) -> None:
    p = classification(logits(1), 2, "classification")
    subject = subject_of(channels=channels)
    pixels = torch.rand(1, channels, *size, generator=draws())
    mean, std = (torch.tensor(subject.preprocessing.config[key]).view(1, -1, 1, 1) for key in ("mean", "std"))
    sample = one(open_it(subject), p, torch.tensor([0]), x=(pixels - mean) / std)
    image = image_of(sample.image)
    assert (image.height, image.width) == shown and image.mode == ("L" if channels == 1 else "RGB")
    if image.format == "PNG" and max(size) <= 64:
        factor = shown[0] // size[0]
        seen = torch.from_numpy(np.array(image)).view(*shown, channels).permute(2, 0, 1)
        wanted = (pixels[0] * 255).round().to(torch.uint8)
        assert torch.equal(seen, wanted.repeat_interleave(factor, 1).repeat_interleave(factor, 2))


def test_the_smaller_format_is_taken() -> None:
    p = classification(logits(1), 2, "classification")
    flat, photo = torch.zeros(1, 3, 120, 120), torch.randn(1, 3, 120, 120, generator=draws())
    formats = [image_of(one(open_it(subject_of()), p, torch.tensor([0]), x=x).image).format for x in (flat, photo)]
    assert formats == ["PNG", "JPEG"]
    half = one(open_it(subject_of()), p, torch.tensor([0]), x=photo.bfloat16())
    assert image_of(half.image).size == (120, 120)


def test_maps_of_a_segmentation() -> None:
    subject = subject_of(dense=True)
    y = torch.zeros(2, 32, 32, dtype=torch.int64)
    y[:, :8], y[:, 8:10] = 2, IGNORED
    z = 9 * nn.functional.one_hot(y.where(y != IGNORED, 3), 4).permute(0, 3, 1, 2).float()
    members = torch.stack([z, z, z], 1)
    members[0, 0, :, 20:] = 0  # one member does not know
    p = classification(members, 2, "classification")
    x = torch.randn(2, 3, 32, 32, generator=draws())
    found = run(open_it(subject), p, y, x=x).collect(alone)
    assert list(found) == ["surest", "uncertain"]
    sample = found["uncertain"][0]
    assert sample.name == "file 0" and sample.right is None and sample.votes == ()
    assert (sample.predicted, sample.truth) == ("ant 69%, cat 25%, <script> 6%", "ant 73%, cat 27%")
    maps = {title: image_of(content) for title, content in sample.maps}
    assert list(maps) == ["prediction", "truth", "variance"] and image_of(sample.image).size == (96, 96)
    assert all(image.size == (96, 96) and image.format == "PNG" for image in maps.values())
    assert [maps["truth"].getpixel((50, row)) for row in (0, 27, 31)] == [2, IGNORED, 0]
    assert [maps["prediction"].getpixel((50, row)) for row in (0, 27, 31)] == [2, 3, 0]
    colours = {maps["truth"].convert("RGB").getpixel((50, row)) for row in (0, 27, 31)}
    assert len(colours) == 3 and (128, 128, 128) in colours
    assert [maps["variance"].getpixel((50, row)) for row in (0, 95)] == [0, 255]
    assert sample.scores["variance"] == pytest.approx(p.variance[0].sum(0).mean().item())


def test_maps_of_unknown_images_and_of_one_member() -> None:
    p = classification(logits(3, 3, 6, 6), 2, "classification")
    y = torch.zeros(3, dtype=torch.int64)
    found = run(open_it(subject_of(dense=True), known=False), p, y).collect(alone)["unknown"]
    assert [[title for title, _ in sample.maps] for sample in found] == [["prediction", "variance"]] * 3
    assert image_of(found[0].maps[0][1]).size == image_of(found[0].image).size
    single = classification(logits(3, 1, 6, 6), 2, "classification")
    masks = torch.zeros(3, 6, 6, dtype=torch.int64)
    found = run(open_it(subject_of(n=1, dense=True)), single, masks).collect(alone)["surest"]
    assert [[title for title, _ in sample.maps] for sample in found] == [["prediction", "truth"]] * 3


def test_a_model_from_end_to_end() -> None:
    subject = subject_of(n=4)
    x = torch.randn(9, 3, SIZE, SIZE, generator=draws())
    with torch.inference_mode():
        p = subject.model(x)
    assert isinstance(p, Prediction) and not isinstance(p, RegressionPrediction)
    found = run(open_it(subject, size=2), p, p.mean.argmax(1), x=x).collect(alone)
    assert all(len(sample.votes) == 4 and sample.right for samples in found.values() for sample in samples)
