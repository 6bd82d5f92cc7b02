"""The settings of an evaluation."""

from __future__ import annotations

from dataclasses import dataclass

from masksurgery.corruptions import KINDS
from masksurgery.scores import SCORES, Score
from masksurgery.types import ConfigError


@dataclass(frozen=True)
class EvaluateConfig:
    """What is evaluated, and what is fitted.

    Attributes:
        ood: Out-of-distribution data: a folder of images, or a name as for the data.
        corrupt: Evaluate under corruption in 5 severities: "noise", "blur", "contrast", "rotation", or "all" four.
        temperature: Fit a temperature on the held-out part, and store it.
        coverage: Fit a threshold that answers this share of the held-out part, and store it.
        risk: Fit a threshold whose answers are wrong at most this often on the held-out part, and store it.
        score: What the threshold looks at: max_probability, entropy, mutual_information or variance.
        fit_fraction: Share of the images that temperature and threshold are fitted on; the others are evaluated.
        gallery: Images in each gallery of the report.
        batch_size: Images of a forward, over all processes together.
        workers: Processes that read images, for each one that evaluates; by default up to 4.
    """

    ood: tuple[str, ...] = ()
    corrupt: tuple[str, ...] = ()
    temperature: bool = False
    coverage: float | None = None
    risk: float | None = None
    score: Score | None = None
    fit_fraction: float = 0.2
    gallery: int = 8
    batch_size: int = 32
    workers: int | None = None

    def __post_init__(self) -> None:
        for kind in self.corrupt:
            if kind not in (*KINDS, "all"):
                raise ConfigError(f"corrupt={kind!r} is not one of {', '.join(map(repr, KINDS))} or 'all'.")
        if self.coverage is not None and self.risk is not None:
            raise ConfigError("coverage and risk are two rules for one threshold. Pass one of them.")
        if self.coverage is not None and not 0 < self.coverage <= 1:
            raise ConfigError(f"coverage={self.coverage} is not a share above 0, such as 0.9.")
        if self.risk is not None and not 0 <= self.risk < float("inf"):
            raise ConfigError(f"risk={self.risk} is not a share of errors, such as 0.01.")
        if self.score is not None and self.score not in SCORES:
            raise ConfigError(f"score={self.score!r} is not one of {', '.join(map(repr, SCORES))}.")
        if not 0 < self.fit_fraction < 1:
            raise ConfigError(f"fit_fraction={self.fit_fraction} is not a share between 0 and 1, such as 0.2.")
        if self.gallery < 0 or self.batch_size < 1 or (self.workers or 0) < 0:
            raise ConfigError("gallery and workers have to be 0 or more, batch_size 1 or more.")

    @property
    def kinds(self) -> tuple[str, ...]:
        """Of corruption, each once."""
        return KINDS if "all" in self.corrupt else tuple(dict.fromkeys(self.corrupt))

    @property
    def fits_threshold(self) -> bool:
        """Whether a threshold is fitted, which takes held-out images."""
        return self.coverage is not None or self.risk is not None

    @property
    def fits(self) -> bool:
        """Whether anything is fitted."""
        return self.temperature or self.fits_threshold
