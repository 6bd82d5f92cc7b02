"""What a hazard net is, the registry of them, and the randomising of parameters."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

Inputs = Callable[[int], tuple[Tensor, ...]]
ModuleType = TypeVar("ModuleType", bound=type[nn.Module])


@dataclass(frozen=True)
class Net:
    """A small network that holds one hazard, and what the graph pass has to answer.

    Attributes:
        build: Makes the network; parameters from torch's default generator.
        inputs: Batch size to the arguments of one forward, float32 (indices int64).
        sites: (layer, chain end) in the order of the graph. The end is a module's qualified name, or `fn:` and the
            name of a function, method or operator. A layer that is called twice stands here twice.
        skipped: Layer to a word that its reason contains.
        chained: Depthwise convolution to the layer whose site's chain it belongs to.
        dims: Layer to the (batch_dim, channel_dim) of its site, where they are worth a check.
        folded: Layers whose site has b*k rows, b outermost.
        outer: Layer to how many times its site has the whole batch, where that is more than once.
        unbatched: Names of the inputs without a batch dimension.
        stochastic: Draws random numbers in training mode.
        spreads_nan: In the base model a nan in one sample reaches the others.
        modes_differ: The graphs of training and of evaluation are not the same.
        half: Fit for bfloat16 and float16: nothing in it forces another dtype.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Inputs
    sites: tuple[tuple[str, str], ...]
    skipped: dict[str, str] = field(default_factory=dict)
    chained: dict[str, str] = field(default_factory=dict)
    dims: dict[str, tuple[int, int]] = field(default_factory=dict)
    folded: tuple[str, ...] = ()
    outer: dict[str, int] = field(default_factory=dict)
    unbatched: tuple[str, ...] = ()
    class_dim: int = 1
    task: str = "classification"
    stochastic: bool = False
    spreads_nan: bool = False
    modes_differ: bool = False
    half: bool = False

    @property
    def convert_kwargs(self) -> dict[str, Any]:
        """The arguments of `convert` that this network needs, without `example_inputs`."""
        return {"class_dim": self.class_dim, "task": self.task, "unbatched": self.unbatched}


@dataclass(frozen=True)
class RefusedNet:
    """A network that has to be refused with an error that names the node."""

    name: str
    build: Callable[[], nn.Module]
    inputs: Inputs
    node: str


NETS: dict[str, Net] = {}
REFUSED: dict[str, RefusedNet] = {}


def hazard(name: str, inputs: Inputs, sites: str, **answers: Any) -> Callable[[ModuleType], ModuleType]:
    """Register a module class under the name of its hazard; sites are written "layer->end layer->end"."""
    pairs = tuple((layer, end) for layer, end in (site.split("->") for site in sites.split()))

    def register(module_type: ModuleType) -> ModuleType:
        if name in NETS:
            raise ValueError(f"two hazard nets are called {name!r}")
        NETS[name] = Net(name, module_type, inputs, pairs, **answers)
        return module_type

    return register


def refused(name: str, inputs: Inputs, node: str) -> Callable[[ModuleType], ModuleType]:
    """Register a module class that conversion has to refuse, naming `node`."""

    def register(module_type: ModuleType) -> ModuleType:
        REFUSED[name] = RefusedNet(name, module_type, inputs, node)
        return module_type

    return register


def shaped(*shapes: tuple[int, ...]) -> Inputs:
    """Normal inputs, one for each shape (without the batch)."""
    return lambda batch: tuple(torch.randn(batch, *shape) for shape in shapes)


@torch.no_grad()
def randomise(model: nn.Module, seed: int | torch.Generator = 0) -> nn.Module:
    """Randomise all parameters and BatchNorm statistics in place, so that a mask changes the output.

    Weights that mix are scaled by their fan-in, scales lie in 0.5..1.5 and biases around zero, so that activations
    stay near 1 (a randomised resnet50 reaches 500; with a smaller gain efficientnet_b0 would forget its input).
    Equal seeds give equal values in every dtype; torch's default generator is not touched.

    Returns:
        The model itself.
    """
    generator = seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)

    def normal(tensor: Tensor, std: float) -> None:
        tensor.copy_(std * torch.randn(tensor.shape, generator=generator, dtype=torch.float64))

    def positive(tensor: Tensor) -> None:
        tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator, dtype=torch.float64))

    done: set[int] = set()
    for module in model.modules():
        tensors: dict[str, Tensor] = dict(module.named_parameters(recurse=False))
        if isinstance(getattr(module, "running_var", None), Tensor):
            named = {name: getattr(module, name, None) for name in ("weight", "bias", "running_mean", "running_var")}
            tensors.update({name: tensor for name, tensor in named.items() if isinstance(tensor, Tensor)})
        for name, tensor in tensors.items():
            if id(tensor) in done or not tensor.is_floating_point():
                continue
            done.add(id(tensor))
            if name.endswith("bias") or name == "running_mean":
                normal(tensor, 0.3)
            elif name == "weight" and isinstance(module, (_ConvNd, nn.Linear)):
                fan_out = tensor.shape[1 if isinstance(module, _ConvTransposeNd) else 0]
                normal(tensor, 1.2 * math.sqrt(fan_out / tensor.numel()))
            elif tensor.numel() == max(tensor.shape, default=1):  # a scale: one dimension, or [c, 1, 1]
                positive(tensor)
            else:  # a token, a position embedding, a fused weight matrix
                normal(tensor, min(0.5, 1.2 / math.sqrt(tensor.shape[-1])))
    return model


def settle(model: nn.Module, x: Tensor) -> nn.Module:
    """Let the running statistics of BatchNorm see images once, in place, so that activations stay near 1 in depth.

    A fifth of them stays as it is: no variance is zero. Without BatchNorm nothing is run.

    Returns:
        The model itself, in training mode.
    """
    norms = [module for module in model.train().modules() if isinstance(module, _BatchNorm)]
    for norm in norms:
        norm.momentum = 0.8
    if norms:
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(0)
            model(x)
    return model
