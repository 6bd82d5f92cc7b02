"""What is measured side by side: models, what they take, and the conditions that they run under."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from masksurgery.inputs import random_inputs
from masksurgery.sources import one_line
from masksurgery.types import ConfigError


@dataclass(frozen=True, eq=False)
class Variant:
    """A model to measure beside others.

    Attributes:
        name: For tables.
        model: In eval mode. It is moved to the device of the measurement.
        inputs: Describes the inputs of a forward of so many samples, as `describe_inputs` does.
        again: Makes the model once more, in a process of its own where its memory is measured: a function that can be
            pickled. None: its memory is not measured.
        details: What there is to know of it, for JSON.
    """

    name: str
    model: nn.Module
    inputs: Callable[[int], Mapping[str, Any]]
    again: Callable[[], nn.Module] | None = None
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Conditions:
    """What all models are measured under.

    Attributes:
        threads: Of torch, on the CPU.
        device: As torch names it.
        channels_last: Weights and images have this memory format.
    Raises:
        ConfigError: There are no such threads, or no such device.
    """

    threads: int
    device: str = "cpu"
    channels_last: bool = False

    def __post_init__(self) -> None:
        if self.threads < 1:
            raise ConfigError(f"threads={self.threads} is too small. Pass at least 1.")
        try:
            torch.zeros((), device=self.device)
        except (RuntimeError, AssertionError) as error:  # the latter where torch was built without it
            raise ConfigError(f"device={self.device!r} cannot be used: {one_line(error)}. Pass 'cpu'.") from error

    def prepare(self, model: nn.Module) -> nn.Module:
        """The model itself in eval mode, its weights moved."""
        model = model.eval().to(self.device)
        return model.to(memory_format=torch.channels_last) if self.channels_last else model  # type: ignore[call-overload, no-any-return]

    def draw(self, inputs: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        """Args and kwargs of one forward, of described inputs."""

        def lay(leaf: Any) -> Any:
            is_image = self.channels_last and isinstance(leaf, Tensor) and leaf.dim() == 4
            return leaf.contiguous(memory_format=torch.channels_last) if is_image else leaf

        args, kwargs = random_inputs(inputs, self.device)
        return tree_map(lay, (args, kwargs))

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Set torch's threads, and put them back."""
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)


@torch.no_grad()
def fill_weights(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draw all parameters and BatchNorm statistics anew, in place, so that activations stay at an ordinary size.

    Numbers that are denormal, infinite or none at all would be computed at another speed. Weights that mix are scaled
    by what they read, scales and variances lie in 0.5 to 1.5, the rest is near zero; torch's default generator is not
    touched.

    Returns:
        The model itself.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, x in (*model.named_parameters(), *model.named_buffers()):
        last = name.rpartition(".")[2]
        if not x.is_floating_point() or not (isinstance(x, nn.Parameter) or last in ("running_mean", "running_var")):
            continue
        if x.dim() > 1:
            x.normal_(0, 1.2 * (len(x) / x.numel()) ** 0.5, generator=generator)
        elif last in ("bias", "running_mean"):
            x.normal_(0, 0.3, generator=generator)
        else:  # scales of norms and layers, variances
            x.uniform_(0.5, 1.5, generator=generator)
    return model
