"""Active learning: ask for the labels of the images about which the members disagree most.

    pip install masksurgery[demo]
    python examples/tools/active_learning.py

Digits of scikit-learn, 40 labels at first and 30 more in each round: chosen by mutual information, or at random.
"""

from __future__ import annotations

import logging

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import masksurgery

FIRST, MORE, ROUNDS = 40, 30, 5
logging.getLogger("masksurgery").setLevel(logging.ERROR)  # that a conversion is to be fine-tuned: it is


def make_base() -> nn.Module:
    convs = [nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*convs, nn.Flatten(), nn.Linear(1024, 64), nn.ReLU(), nn.Linear(64, 10))


def fit(model: nn.Module, x: Tensor, y: Tensor, epochs: int = 60) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    model.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(32):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
    model.eval()


def learn(by: str, seed: int) -> list[float]:
    """The accuracy after each round; `by` is "mutual_information" or "chance"."""
    digits = load_digits()
    x, y = torch.tensor(digits.images).float()[:, None] / 16, torch.tensor(digits.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    pool, test = order[:1200], order[1200:]
    torch.manual_seed(seed)
    known, found = pool[:FIRST], []
    for k in range(ROUNDS + 1):
        model = masksurgery.convert(make_base(), n=4, scale=2.0, seed=seed, example_inputs=(x[:1],))
        fit(model, x[known], y[known])
        with torch.no_grad():
            found.append(float((model(x[test]).mean.argmax(1) == y[test]).float().mean()))
            if k == ROUNDS:
                return found
            rest = pool[~torch.isin(pool, known)]
            score = model(x[rest]).mutual_information if by == "mutual_information" else torch.rand(len(rest))
        known = torch.cat([known, rest[score.argsort(descending=True)[:MORE]]])
    raise AssertionError


def main(seeds: int = 3) -> dict[str, list[float]]:
    return {
        by: torch.tensor([learn(by, seed) for seed in range(seeds)]).mean(0).tolist()
        for by in ("mutual_information", "chance")
    }


if __name__ == "__main__":
    print(f"{'labels':20}", *(f"{FIRST + k * MORE:6}" for k in range(ROUNDS + 1)))
    for by, accuracies in main().items():
        print(f"{by:20}", *(f"{accuracy:6.3f}" for accuracy in accuracies))
