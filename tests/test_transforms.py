"""From images to tensors, for training and for evaluation."""

import pickle
import re

import numpy as np
import pytest
import torch
from PIL import Image

from masksurgery import ConfigError
from masksurgery.transforms import Augmentation, Preprocessing
from pictures import noise

CFG = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25), "interpolation": "bilinear", "crop_pct": 1.0}


def test_evaluation_follows_the_pretrained_cfg() -> None:
    preprocessing = Preprocessing((3, 16, 24), torch.float64, CFG)
    x, target = preprocessing.evaluation()(Image.new("RGB", (90, 60), (255, 0, 0)), 7)
    assert (x.shape, x.dtype, target) == ((3, 16, 24), torch.float64, 7)
    assert x[:, 8, 8].tolist() == [2.0, -2.0, -2.0]
    grey, _ = Preprocessing((1, 16, 24), pretrained_cfg={"mean": (0.1, 0.2, 0.3)}).evaluation()(
        Image.new("L", (9, 9)), 0
    )
    assert grey.shape == (1, 16, 24)
    assert grey[0, 0, 0].item() == pytest.approx(-0.2 / ((0.229 + 0.224 + 0.225) / 3), rel=1e-5)


def test_training_draws_anew() -> None:
    preprocessing, image = Preprocessing((3, 16, 16), pretrained_cfg=CFG), noise(0)
    training = preprocessing.training(Augmentation(color_jitter=0.4, random_erasing=1.0))
    a, b = training(image, 1)[0], training(image, 1)[0]
    assert a.shape == b.shape == (3, 16, 16)
    assert not torch.equal(a, b)
    plain = preprocessing.training(Augmentation.none())
    assert torch.equal(plain(image, 1)[0], preprocessing.evaluation()(image, 1)[0])


def test_each_option_of_the_augmentation_is_used() -> None:
    preprocessing, image = Preprocessing((3, 20, 20), pretrained_cfg=CFG), noise(0, (20, 20))
    whole = {"crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0)}
    plain, _ = preprocessing.evaluation()(image, 0)

    def train(**options: object) -> torch.Tensor:
        return preprocessing.training(Augmentation(**{**whole, "hflip": 0.0, **options}))(image, 0)[0]

    assert torch.equal(train(), plain)
    assert torch.equal(train(hflip=1.0), plain.flip(-1))
    assert torch.equal(train(vflip=1.0), plain.flip(-2))
    for option in ({"color_jitter": 0.9}, {"auto_augment": "rand-m9-n3"}, {"random_erasing": 1.0}):
        assert any(not torch.equal(train(**option), plain) for _ in range(5)), option
    assert not torch.equal(train(crop_scale=(0.3, 0.4)), plain)


def test_image_and_mask_move_together() -> None:
    rng = np.random.default_rng(0)
    mask = rng.integers(0, 4, (20, 24)).astype(np.int32).repeat(4, 0).repeat(4, 1)
    mask[:8] = 255
    image = Image.fromarray(mask.astype(np.uint8)[..., None].repeat(3, 2))
    preprocessing = Preprocessing((3, 80, 96), torch.float32, {"mean": (0, 0, 0), "std": (1, 1, 1)} | CFG)
    moved = preprocessing.training(Augmentation(crop_scale=(0.3, 1.0), vflip=0.5), masks=True)
    seen = set()
    for _ in range(8):
        x, y = moved(image, mask)
        assert (x.shape, y.shape, y.dtype) == ((3, 80, 96), (80, 96), torch.int64)
        assert set(y.unique().tolist()) <= {0, 1, 2, 3, 255}
        values = (x[0] * 0.25 + 0.5) * 255
        assert ((values - y).abs() < 0.5).float().mean() > 0.4  # inside of the blocks nothing is mixed
        seen.add(values.sum().item())
    assert len(seen) == 8
    x, y = preprocessing.evaluation(masks=True)(image, mask)
    assert torch.equal(y, torch.from_numpy(mask).long())
    assert torch.allclose((x[0] * 0.25 + 0.5) * 255, y.float(), atol=1e-3)


def test_masks_of_evaluation_are_resized_as_a_whole() -> None:
    mask = np.zeros((40, 80), np.int32)
    mask[:, :2] = 3  # a centre crop would cut it off
    _, y = Preprocessing((3, 20, 20)).evaluation(masks=True)(Image.new("RGB", (80, 40)), mask)
    assert y.shape == (20, 20) and set(y.unique().tolist()) == {0, 3}


def test_transforms_can_be_sent_to_another_process() -> None:
    preprocessing, image = Preprocessing((3, 16, 16), pretrained_cfg=CFG), noise(0)
    for transform in (preprocessing.evaluation(), preprocessing.evaluation(masks=True)):
        twin = pickle.loads(pickle.dumps(transform))
        mask = np.ones((20, 24), np.int32)
        assert torch.equal(twin(image, mask)[0], transform(image, mask)[0])
    for masks in (False, True):
        pickle.dumps(preprocessing.training(Augmentation(color_jitter=0.1), masks=masks))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop_scale": (0.0, 1.0)}, r"crop_scale=(0.0, 1.0) is not a range inside of 0 to 1"),
        ({"crop_scale": (0.5, 1.5)}, r"crop_scale=(0.5, 1.5) is not a range inside of 0 to 1"),
        ({"crop_ratio": (2.0, 1.0)}, r"crop_ratio=(2.0, 1.0) is not a range of positive numbers"),
        ({"hflip": 1.5}, r"hflip=1.5 is not a probability"),
        ({"random_erasing": -0.1}, r"random_erasing=-0.1 is not a probability"),
        ({"color_jitter": float("nan")}, r"color_jitter=nan is not a strength"),
    ],
)
def test_options_that_cannot_be(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        Augmentation(**options)


def test_policies_that_cannot_be() -> None:
    preprocessing = Preprocessing((3, 16, 16))
    with pytest.raises(ConfigError, match=r"auto_augment='bogus': Unknown AA policy bogus. Policies look like \"rand-"):
        preprocessing.training(Augmentation(auto_augment="bogus"))
    with pytest.raises(ConfigError, match=r"auto_augment='3a' moves or erases pixels without their mask"):
        preprocessing.training(Augmentation(auto_augment="3a"), masks=True)
    with pytest.raises(ConfigError, match=r"random_erasing=0.5 moves or erases pixels without their mask"):
        preprocessing.training(Augmentation(random_erasing=0.5), masks=True)
