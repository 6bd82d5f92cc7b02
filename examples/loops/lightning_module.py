"""Lightning: the ensemble takes the place of the base model in a LightningModule that stays as it is."""

import lightning as L
import timm
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate
from torch.utils.data import DataLoader, TensorDataset

import masksurgery

x = interpolate(torch.tensor(load_digits().images)[:, None].float() / 16, size=24, mode="bilinear")
y = torch.tensor(load_digits().target)
train = DataLoader(TensorDataset(x[:1200], y[:1200]), batch_size=32, shuffle=True)
test = DataLoader(TensorDataset(x[1200:], y[1200:]), batch_size=128)


class Classifier(L.LightningModule):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: list[Tensor]) -> Tensor:
        return cross_entropy(self.model(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor]) -> None:
        logits = self.model(batch[0])
        self.log("nll", cross_entropy(logits, batch[1]))
        self.log("accuracy", (logits.argmax(1) == batch[1]).float().mean())

    def predict_step(self, batch: list[Tensor]) -> masksurgery.Prediction:
        return self.model(batch[0])

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.trainer.max_epochs)]


def main() -> dict[str, dict[str, float]]:
    torch.manual_seed(0)
    base = timm.create_model("test_resnet", in_chans=1, num_classes=10)
    trainer = L.Trainer(max_epochs=4, accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.fit(Classifier(base), train)
    before = trainer.validate(Classifier(base), test)[0]  # prints accuracy and NLL
    model = masksurgery.convert(base, n=4, scale=2.0, example_inputs=(x[:1],))
    model.output = "logits"  # what eval returns, so that validation_step stays as it is
    trainer = L.Trainer(max_epochs=12, accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.fit(Classifier(model), train, test)
    after = trainer.validate(Classifier(model), test)[0]
    model.output = "prediction"  # all of it: mean, variance, logits, entropy, mutual_information, members
    p = masksurgery.Prediction(*map(torch.cat, zip(*trainer.predict(Classifier(model), test), strict=True)))
    right = p.logits.argmax(1) == y[1200:]
    mi = {"right": p.mutual_information[right].mean().item(), "wrong": p.mutual_information[~right].mean().item()}
    print("mutual information of right answers {right:.2f}, of wrong ones {wrong:.2f}".format(**mi))
    return {"base": before, "ensemble": after, "disagreement": mi}


if __name__ == "__main__":
    main()
