"""Whether the members of an ensemble answer alike, and how good each of them is alone."""

from __future__ import annotations

from torch import Tensor

from masksurgery.metrics.sums import Sums


class Agreement(Sums):
    """Counts, over items, of right members, of pairs that differ, and of items in which all members answer alike."""

    items: Tensor
    alike: Tensor
    right: Tensor
    differ: Tensor

    def __init__(self, n: int) -> None:
        super().__init__()
        self.n = n
        self.add_count("items")
        self.add_count("alike")
        self.add_count("right", n)
        self.add_count("differ", n, n)

    def update(self, members: Tensor, truth: Tensor) -> None:
        """Count m items: the members' answers [n, m] and the right ones [m]."""
        self.items += len(truth)
        self.alike += (members == members[0]).all(0).sum()
        self.right += (members == truth).sum(1)
        for i in range(self.n):  # row by row: [n, n, m] would be large for pixels
            self.differ[i] += (members != members[i]).sum(1)

    def compute(self) -> tuple[float, tuple[float, ...], tuple[tuple[float, ...], ...]]:
        """The agreement, each member's accuracy [n], and the disagreement of each pair [n][n]; shares of the items."""
        items = int(self.items)
        differ = tuple(tuple(x / items for x in row) for row in self.differ.tolist())
        return int(self.alike) / items, tuple(x / items for x in self.right.tolist()), differ


def mean_disagreement(differ: tuple[tuple[float, ...], ...]) -> float:
    """Over the pairs of different members."""
    n = len(differ)
    return sum(map(sum, differ)) / (n * (n - 1))


def diversity(disagreement: float, accuracy: float) -> float | None:
    """The disagreement relative to the error rate of the mean; None where that is 0.

    Source:
        Fort, Hu, Lakshminarayanan 2019, arXiv:1912.02757, section 4.
    """
    return disagreement / (1 - accuracy) if accuracy < 1 else None
