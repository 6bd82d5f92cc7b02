"""A plain PyTorch loop: train a model, make it an ensemble, and fine-tune it with the very same function."""

import timm
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy, interpolate
from torch.utils.data import DataLoader, TensorDataset

import masksurgery

digits = load_digits()
x = interpolate(torch.tensor(digits.images)[:, None].float() / 16, size=24, mode="bilinear")  # [1797, 1, 24, 24]
y = torch.tensor(digits.target)


def fit(model: nn.Module, epochs: int, lr: float = 3e-3) -> None:
    loader = DataLoader(TensorDataset(x[:1200], y[:1200]), batch_size=32, shuffle=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, epochs=epochs, steps_per_epoch=len(loader))
    model.train()
    for _ in range(epochs):
        for images, labels in loader:
            optimizer.zero_grad()
            cross_entropy(model(images), labels).backward()  # in training, what the base model returns: logits
            optimizer.step()
            schedule.step()


def main() -> dict[str, dict[str, float]]:
    torch.manual_seed(0)
    base = timm.create_model("test_resnet", in_chans=1, num_classes=10)
    fit(base, epochs=4)
    model = masksurgery.convert(base, n=4, scale=2.0, example_inputs=(x[:1],))
    fit(model, epochs=12)

    x_test, y_test = x[1200:], y[1200:]
    with torch.no_grad():
        logits = base.eval()(x_test)
        p = model.eval()(x_test)  # a Prediction: mean, variance, logits, entropy, mutual_information, members
    right = p.logits.argmax(1) == y_test
    accuracy = (logits.argmax(1) == y_test).float().mean().item()
    before = {"accuracy": accuracy, "nll": cross_entropy(logits, y_test).item()}
    after = {"accuracy": right.float().mean().item(), "nll": cross_entropy(p.logits, y_test).item()}
    entropy = {"right": p.entropy[right].mean().item(), "wrong": p.entropy[~right].mean().item()}
    mi = {"right": p.mutual_information[right].mean().item(), "wrong": p.mutual_information[~right].mean().item()}
    print("base model: accuracy {accuracy:.3f}, NLL {nll:.3f}".format(**before))
    print("ensemble:   accuracy {accuracy:.3f}, NLL {nll:.3f}".format(**after))
    print("entropy of right answers {right:.2f}, of wrong ones {wrong:.2f}".format(**entropy))
    print("mutual information of right answers {right:.2f}, of wrong ones {wrong:.2f}".format(**mi))
    return {"base": before, "ensemble": after, "entropy": entropy, "disagreement": mi}


if __name__ == "__main__":
    main()
