"""The converted model: functional, trained and saved as the base model was, with a dict for what it predicts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras
from keras import ops
from keras.src.backend import get_keras_mask, set_keras_mask

from masksurgery.keras.head import aggregate
from masksurgery.keras.layers import PACKAGE
from masksurgery.types import Site, Skipped, Surgery, TraceError


@keras.saving.register_keras_serializable(PACKAGE)
class ConvertedModel(keras.Model):
    """A Masksembles ensemble in one functional model; `masksurgery.keras.convert` makes it.

    With training=True it returns what the base model returned, each sample through one member; else a dict:
    `mean`, `variance` and `members`, and unless it is a regression `logits`, `entropy` and `mutual_information`
    (see `masksurgery.keras.head.aggregate`). `fit` and `evaluate` take the losses and metrics of the base model.

    Attributes:
        surgery: What is masked, and what is not and why; print(model.describe()) shows it.
        task: "classification", "multilabel" or "regression".
        from_logits: The base model ended in logits.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Take what a functional model takes, and `surgery`, `task` and `from_logits`.

        Only with these two parameters do all versions of Keras save and load a subclass as a functional model.
        """
        surgery, task, from_logits = (kwargs.pop(name) for name in ("surgery", "task", "from_logits"))
        super().__init__(*args, **kwargs)
        self.surgery = surgery if isinstance(surgery, Surgery) else _read_surgery(surgery)
        self.task, self.from_logits = task, from_logits

    def call(self, inputs: Any, training: bool | None = None, mask: Any = None) -> Any:
        # Told to every layer: left open, Keras takes over the mode of whichever layer the base model called with one.
        training = bool(training)
        rows = super().call(inputs, training=training, mask=mask)
        if training:
            return rows
        answer = aggregate(rows, self.surgery.n, self.task, self.from_logits)
        steps = get_keras_mask(rows)
        if steps is not None:  # which time steps are padding: losses and metrics look for it; all members have the same
            set_keras_mask(self.base_output(answer), steps[: ops.shape(steps)[0] // self.surgery.n])
        return answer

    def compute_output_spec(self, *args: Any, **kwargs: Any) -> Any:
        raise TraceError(
            f"'{self.name}' is a converted model: it returns a tensor in training and a dict otherwise, and cannot be "
            f"part of another functional model. Convert the whole model instead."
        )

    def compute_loss(
        self, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None, training: bool = True
    ) -> Any:
        y_pred = self.base_output(y_pred)
        return super().compute_loss(x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=training)

    def compute_metrics(self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        return super().compute_metrics(x, y, self.base_output(y_pred), sample_weight=sample_weight)

    def base_output(self, prediction: Any) -> Any:
        """The answer of the ensemble in the base model's terms: probabilities, logits or numbers, as it returned."""
        if not isinstance(prediction, Mapping):
            return prediction
        return prediction["logits" if self.from_logits else "mean"]

    def describe(self) -> str:
        """A line for each layer: what is masked, and why the others are not."""
        record = self.surgery
        count = len(record.sites)
        masks = f"{count} mask" if count == 1 else f"{count} masks"
        lines = [f"{record.n} members, scale {record.scale:g}, seed {record.seed}: {masks}"]
        for site in record.sites:
            call = f", call {site.call + 1}" if site.call else ""
            others = f", with {', '.join(site.chain)}" if site.chain else ""
            lines.append(f"  {site.layer}{call}{others}: {site.ones} of {site.channels} channels, after {site.node}")
        if record.skipped:
            lines.append(f"not masked: {len(record.skipped)}")
            lines.extend(f"  {skip.layer}: {skip.reason}" for skip in record.skipped)
        return "\n".join([*lines, *record.notes])

    def get_config(self) -> dict[str, Any]:
        own = {"surgery": self.surgery.to_dict(), "task": self.task, "from_logits": self.from_logits}
        return {**super().get_config(), **own}


def _read_surgery(record: Mapping[str, Any]) -> Surgery:
    """What `Surgery.to_dict` wrote, after JSON made lists of its tuples."""
    sites = tuple(Site(**_tuples(site)) for site in record["sites"])
    skipped = tuple(Skipped(**skip) for skip in record["skipped"])
    return Surgery(**{**_tuples(record), "sites": sites, "skipped": skipped})


def _tuples(record: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in record.items()}
