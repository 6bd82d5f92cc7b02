"""transformers: keyword inputs, ModelOutputs, losses, saved folders. Nothing is downloaded."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import modeling_outputs

import masksurgery
from proofs import prove, rows, skipped_as

VIT = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
    "image_size": 32, "patch_size": 8, "num_labels": 5,
}  # fmt: skip
SEGFORMER = {
    "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 2, 4],
    "decoder_hidden_size": 16, "num_labels": 5,
}  # fmt: skip
TEXT = {
    "vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
    "max_position_embeddings": 20, "num_labels": 5,
}  # fmt: skip
DISTIL = {"vocab_size": 100, "dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64, "max_position_embeddings": 20}


def make(name: str, config: str, **settings: Any) -> nn.Module:
    model: nn.Module = getattr(transformers, name)(getattr(transformers, config)(**settings))
    return model


def vit() -> nn.Module:
    return make("ViTForImageClassification", "ViTConfig", **VIT)


def bert(**settings: Any) -> nn.Module:
    return make("BertForSequenceClassification", "BertConfig", **TEXT, **settings)


def words(batch: int = 3) -> dict[str, Tensor]:
    """Token indices, and an attention mask that hides the end of the second text."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(batch, 12, dtype=torch.long)
    mask[1, 8:] = 0
    return {"input_ids": torch.randint(5, 90, (batch, 12), generator=generator), "attention_mask": mask}


SLIM = {key: value for key, value in VIT.items() if key != "intermediate_size"}
STAGES = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1], "num_labels": 5, "image_size": 32}
IMAGES: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "vit": (vit, 32),
    "dinov2": (lambda: make("Dinov2ForImageClassification", "Dinov2Config", **SLIM), 32),
    "convnextv2": (lambda: make("ConvNextV2ForImageClassification", "ConvNextV2Config", **STAGES), 32),
    "segformer": (lambda: make("SegformerForImageClassification", "SegformerConfig", **SEGFORMER), 64),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name != "vit")) for name in IMAGES])
def test_images(name: str) -> None:
    build, size = IMAGES[name]
    model, base = prove(build(), pixel_values=rows(3, 3, size, size))
    assert skipped_as(model, "output") == {"classifier"}
    given = {"pixel_values": rows(2, 3, size, size).double()}
    kind = type(base(**given))
    result = model(**given)
    assert type(result) is kind and list(result) == ["logits"]
    assert result.logits.mean.shape == result.logits.variance.shape == (2, 5)
    assert result[0] is result.logits
    result = model.train()(**given)
    assert type(result) is kind and result.logits.shape == (2, 5)


def test_sites_of_a_vit() -> None:
    model, _ = prove(vit(), pixel_values=rows(3, 3, 32, 32))
    # The patches, and in each of two blocks the projection of the attention and the two layers of the MLP.
    assert len(model.surgery.sites) == 1 + 2 * 3
    # Query, key and value are cut into heads.
    assert len(skipped_as(model, "reshaped")) == 2 * 3


@pytest.mark.slow
def test_semantic_segmentation() -> None:
    base = make("SegformerForSemanticSegmentation", "SegformerConfig", **SEGFORMER)
    model, _ = prove(base, pixel_values=rows(3, 3, 64, 64))
    assert skipped_as(model, "output") == {"decode_head.classifier"}
    p = model(pixel_values=rows(2, 3, 64, 64).double()).logits
    assert p.mean.shape == p.variance.shape == (2, 5, 16, 16)
    assert p.variance.max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert", "distilbert"])
def test_texts(name: str) -> None:
    distil = lambda: make("DistilBertForSequenceClassification", "DistilBertConfig", **DISTIL, num_labels=5)  # noqa: E731
    model, _ = prove(bert() if name == "bert" else distil(), **words())
    # Of each of two blocks the projection of the attention and the two layers of the MLP; and what pools.
    assert len(model.surgery.sites) == 2 * 3 + 1
    assert list(inspect.signature(model.forward).parameters) == ["input_ids", "attention_mask"]
    result = model(**words())
    assert type(result) is modeling_outputs.SequenceClassifierOutput
    # The mask is repeated for the members: what it hides reaches none of them.
    other = words()
    other["input_ids"][1, 8:] = 7
    torch.testing.assert_close(model(**other).logits.members, result.logits.members, rtol=1e-12, atol=1e-12)
    shown = model(**{**other, "attention_mask": torch.ones(3, 12, dtype=torch.long)}).logits.members
    assert ((shown - result.logits.members)[1].abs().amax(1) > 1e-3).all()


@pytest.mark.slow
def test_hidden_states() -> None:
    given = {**words(), "output_hidden_states": True}
    model, _ = prove(bert(), **given)
    result = model(**given)
    assert type(result.hidden_states) is tuple and len(result.hidden_states) == 3
    assert result.hidden_states[-1].mean.shape == (3, 12, 32)
    assert result.logits.entropy.shape == (3,)


def test_tuples() -> None:
    model, base = prove(bert(return_dict=False), **words())
    assert type(base(**words())) is tuple
    (p,) = model(**words())
    assert p.mean.shape == (3, 5)


LABELS = torch.tensor([0, 3, 4])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit", "bert"])
def test_losses(name: str) -> None:
    given = {"pixel_values": rows(3, 3, 32, 32)} if name == "vit" else words()
    model, base = prove(vit() if name == "vit" else bert(), **given, labels=LABELS)
    given = {key: x.double() if x.is_floating_point() else x for key, x in given.items()}
    result = model(**given, labels=LABELS)
    assert type(result) is type(base(**given)) and list(result) == ["loss", "logits"]
    losses = [F.cross_entropy(result.logits.members[:, i], LABELS) for i in range(4)]
    torch.testing.assert_close(result.loss, torch.stack(losses).mean())
    result = model.train()(**given, labels=LABELS)
    torch.testing.assert_close(result.loss, F.cross_entropy(result.logits, LABELS))
    result.loss.backward()
    assert model.classifier.weight.grad.abs().max() > 0


def test_losses_in_repeat_mode() -> None:
    base = bert(attention_probs_dropout_prob=0.0)  # a function's dropout, which `verify` cannot switch off
    model, _ = prove(base, **words(), labels=LABELS, options={"train_mode": "repeat"})
    result = model.train()(**words(), labels=LABELS)
    torch.testing.assert_close(result.loss, F.cross_entropy(result.logits, masksurgery.repeat_targets(LABELS, 4)))


@pytest.mark.slow
def test_loss_of_a_segmentation() -> None:
    base = make("SegformerForSemanticSegmentation", "SegformerConfig", **SEGFORMER)
    labels = torch.randint(0, 5, (2, 64, 64), generator=torch.Generator().manual_seed(0))
    model, _ = prove(base, pixel_values=rows(2, 3, 64, 64), labels=labels)
    assert model(pixel_values=rows(2, 3, 64, 64).double(), labels=labels).loss.dim() == 0


def test_unknown_inputs_are_refused() -> None:
    model = masksurgery.convert(bert().eval(), example_inputs=words())
    with pytest.raises(masksurgery.TraceError, match=r"labels=Tensor: .* again, with labels among the example_inputs"):
        model(**words(), labels=LABELS)
    with pytest.raises(masksurgery.TraceError, match=r"output_attentions=True: .* input_ids, attention_mask"):
        model(**words(), output_attentions=True)
    assert model(**words(), labels=None).logits.mean.shape == (3, 5)


@pytest.mark.slow
def test_copies_and_saved_folders(tmp_path: Path) -> None:
    model, base = prove(bert(), **words(), labels=LABELS)
    assert model.config is not None and model.config.id2label == base.config.id2label
    expected = model(**words(), labels=LABELS)
    masksurgery.save(model, tmp_path / "bert")
    loaded = masksurgery.load(tmp_path / "bert", base=bert().double())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded.eval()):
        result = twin(**words(), labels=LABELS)
        assert type(result) is type(expected)
        assert torch.equal(result.logits.members, expected.logits.members)
        assert torch.equal(result.loss, expected.loss)


@pytest.mark.parametrize("name", ["roberta", "electra", "albert", "deberta", "swin", "mobilevit", "llama"])
@pytest.mark.slow
def test_others(name: str) -> None:
    pixels = {"pixel_values": rows(2, 3, 64, 64)}
    sizes = {"image_size": 64, "num_labels": 5}
    swin = {**sizes, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 2], "window_size": 4}
    neck = [8, 8, 8, 16, 16, 16, 32]
    mobilevit = {**sizes, "hidden_sizes": [16, 16, 24], "neck_hidden_sizes": neck}
    small = {key: value for key, value in TEXT.items() if key != "max_position_embeddings"}
    llama = {**small, "pad_token_id": 0, "use_cache": False}  # what it caches is no tensor
    kind, settings, given = {
        "roberta": ("Roberta", {**TEXT, "pad_token_id": 1}, words()),
        "electra": ("Electra", {**TEXT, "embedding_size": 16}, words()),
        "albert": ("Albert", {**TEXT, "embedding_size": 16}, words()),
        "deberta": ("DebertaV2", TEXT, words()),
        "swin": ("Swin", swin, pixels),
        "mobilevit": ("MobileViT", mobilevit, pixels),
        "llama": ("Llama", llama, words()),
    }[name]
    ending = "ForImageClassification" if given is pixels else "ForSequenceClassification"
    model, _ = prove(make(f"{kind}{ending}", f"{kind}Config", **settings), **given)
    assert len(skipped_as(model, "output")) == 1
