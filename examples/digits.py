"""Train on the 8x8 digits of scikit-learn, make an ensemble in one line, fine-tune it with the very same loop."""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import masksurgery

x, y = torch.tensor(load_digits().images).float()[:, None] / 16, torch.tensor(load_digits().target)
criterion = nn.CrossEntropyLoss()


def fit(model: nn.Module, epochs: int) -> tuple[Tensor, Tensor]:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    model.train()
    for _ in range(epochs):
        for rows in torch.randperm(1200).split(32):
            optimizer.zero_grad()
            criterion(model(x[rows]), y[rows]).backward()
            optimizer.step()
    model.eval()
    with torch.no_grad():
        return (model(x[1200:]).argmax(1) == y[1200:]).float().mean(), criterion(model(x[1200:]), y[1200:])


def main() -> dict[str, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    convs = [nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    base = nn.Sequential(*convs, nn.Flatten(), nn.Linear(1024, 10))
    result = {"base: accuracy, NLL": fit(base, epochs=20)}
    model = masksurgery.convert(base, n=4, scale=2.0, example_inputs=(x[:1],))  # the one line
    model.output = "logits"  # what eval returns, so that criterion(model(x), y) stays as it is
    result["ensemble: accuracy, NLL"] = fit(model, epochs=10)
    model.output = "mutual_information"  # how far the members disagree
    return result | {"disagreement: digits, upside down": (model(x[1200:]).mean(), model(x[1200:].flip(2)).mean())}


if __name__ == "__main__":
    for name, (first, second) in main().items():
        print(f"{name:34} {first:.3f}  {second:.3f}")
