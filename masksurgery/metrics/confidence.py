"""Does what is said with 80% confidence hold in 80%? Tables of bins of equal width or of equal count."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from masksurgery.evaluation import Reliability
from masksurgery.metrics.bins import BINS, bin_index, tally
from masksurgery.metrics.sums import Sums

SECTIONS = 15


class _Confidence(Sums):
    """Items by bins of their confidence: their number, the sum of their confidences, how many of them are right."""

    counts: Tensor
    confidence: Tensor
    right: Tensor

    def __init__(self, bins: int) -> None:
        super().__init__()
        self.add_count("counts", bins)
        self.add_sum("confidence", bins)
        self.add_count("right", bins)

    def update(self, unsure: Tensor, right: Tensor) -> None:
        """Count m items: 1 less their confidence [m], and whether they are right, bool [m]."""
        index = self.index(unsure)
        tally(self.counts, index)
        tally(self.right, index[right])
        self.confidence.index_add_(0, index, 1 - unsure)

    def index(self, unsure: Tensor) -> Tensor:
        """The bin of each item [m]."""
        raise NotImplementedError


class EqualWidth(_Confidence):
    """15 bins of equal width, each closed on the right, as Guo et al. 2017 (arXiv:1706.04599) define them.

    torchmetrics' CalibrationError keeps every sample and closes its bins on the left; the two differ only for
    confidences that lie on an edge (and put 1 into a bin of its own).
    """

    def __init__(self) -> None:
        super().__init__(SECTIONS)

    def index(self, unsure: Tensor) -> Tensor:
        inner = torch.arange(1, SECTIONS, dtype=torch.float64, device=unsure.device) / SECTIONS
        return torch.bucketize(1 - unsure, inner)

    def compute(self) -> Tensor:
        """Counts, sums of confidences and numbers of right items, float64 [3, 15]."""
        return torch.stack([self.counts.double(), self.confidence, self.right.double()]).cpu()


class EqualCount(_Confidence):
    """15 bins of nearly equal count, as numpy.array_split cuts the items in the order of their confidence.

    They are cut out of bins of 0.025% of the distance from certainty; one that is cut gives each side its proportion.

    Source:
        Nixon et al. 2019, arXiv:1904.01685.
    """

    def __init__(self) -> None:
        super().__init__(BINS)

    def index(self, unsure: Tensor) -> Tensor:
        return bin_index(unsure)

    def compute(self) -> Tensor:
        """Counts, sums of confidences and numbers of right items, float64 [3, 15]."""
        fine = torch.stack([self.counts.double(), self.confidence, self.right.double()]).cpu().numpy()
        fine = fine[:, fine[0] > 0][:, ::-1]  # the least confident first
        total = np.insert(fine.cumsum(1), 0, 0, axis=1)
        size, longer = divmod(int(total[0, -1]), SECTIONS)
        ends = np.arange(SECTIONS + 1) * size + np.arange(SECTIONS + 1).clip(max=longer)
        return torch.from_numpy(np.stack([np.diff(np.interp(ends, total[0], row)) for row in total]))


def calibration_error(table: Tensor) -> float:
    """Mean over the items of the distance between confidence and accuracy of their bin, of a table [3, bins]."""
    counts, confidence, right = table
    return ((confidence - right).abs().sum() / counts.sum()).item()


def reliability(table: Tensor) -> Reliability:
    """The bins of a table [3, bins] as a diagram shows them."""
    counts, confidence, right = table.tolist()
    return Reliability(
        tuple(s / c if c else None for s, c in zip(confidence, counts, strict=True)),
        tuple(r / c if c else None for r, c in zip(right, counts, strict=True)),
        tuple(c / sum(counts) for c in counts),
    )
