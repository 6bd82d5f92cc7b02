"""Hugging Face's Trainer, on a timm model as transformers wraps it. Its checkpoints are in the folder `checkpoints`."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy, interpolate
from transformers import TimmWrapperConfig, TimmWrapperForImageClassification, Trainer, TrainingArguments

import masksurgery

x = interpolate(torch.tensor(load_digits().images)[:, None].float() / 16, size=24, mode="bilinear")
y = torch.tensor(load_digits().target)
rows = [{"pixel_values": image, "labels": label} for image, label in zip(x, y, strict=True)]


def compute_metrics(found) -> dict[str, float]:
    logits, labels = torch.tensor(found.predictions), torch.tensor(found.label_ids)
    return {"accuracy": (logits.argmax(1) == labels).float().mean().item(), "nll": cross_entropy(logits, labels).item()}


def make_trainer(model: nn.Module, epochs: int, folder: str) -> Trainer:
    arguments = TrainingArguments(
        folder,
        num_train_epochs=epochs,
        learning_rate=3e-3,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=128,
        save_strategy="epoch",
        save_total_limit=1,
        use_cpu=True,
        report_to="none",
    )
    return Trainer(model, arguments, None, rows[:1200], rows[1200:], compute_metrics=compute_metrics)


def convert(base: nn.Module) -> masksurgery.ConvertedModel:
    inputs = {"pixel_values": x[:2], "labels": y[:2]}  # with labels, for Trainer wants the loss
    model = masksurgery.convert(base, n=4, scale=2.0, example_inputs=inputs)
    model.output = "logits"  # what eval returns, for compute_metrics
    return model


def main() -> dict[str, dict[str, float]]:
    torch.manual_seed(0)
    config = TimmWrapperConfig(architecture="test_resnet", num_labels=10, model_args={"in_chans": 1})
    base = TimmWrapperForImageClassification(config)
    trainer = make_trainer(base, 4, "checkpoints/base")
    trainer.train()
    before = trainer.evaluate()
    trainer = make_trainer(convert(base), 12, "checkpoints/ensemble")
    trainer.train()
    after = trainer.evaluate()
    print("base model: accuracy {eval_accuracy:.3f}, NLL {eval_nll:.3f}".format(**before))
    print("ensemble:   accuracy {eval_accuracy:.3f}, NLL {eval_nll:.3f}".format(**after))
    print("mean NLL of the members alone: {eval_loss:.3f}".format(**after))
    return {"base": before, "ensemble": after}


if __name__ == "__main__":
    main()
