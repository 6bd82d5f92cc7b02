"""Base models by name, from timm, torchvision or a factory of one's own, and the recipe that makes one again."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from masksurgery.adapt import adapt_channels, renew_classifier, resample
from masksurgery.sizes import at_size, takes_size
from masksurgery.sources import (
    NO_WEIGHTS,
    build_model,
    call_factory,
    create_own,
    create_torchvision,
    make_torchvision,
    no_such,
    one_line,
)
from masksurgery.types import ConfigError
from masksurgery.weights import Change, load_weights

Source = Literal["timm", "torchvision", "factory"]

RESERVED = (
    "pretrained", "checkpoint_path", "cache_dir", "pretrained_cfg_overlay", "weights", "weights_backbone",
    "scriptable", "exportable", "no_jit",
)  # fmt: skip
"""Arguments of timm and torchvision that load files or change global state: never in model kwargs or a recipe."""

SHAPING = (
    "architecture",
    "tag",
    "input_size",
    "fixed_input_size",
    "num_classes",
    "first_conv",
    "classifier",
    "pool_size",
)
"""The entries of timm's pretrained_cfg that a model is built by; the others tell of its weights and its use."""


@dataclass(frozen=True)
class Recipe:
    """How a base model is made again, without weights.

    Attributes:
        source: What makes it: "timm", "torchvision", or "factory" for a function of the user's.
        name: timm's architecture, with its tag; torchvision's name; or "module:factory".
        kwargs: The keyword arguments of the model, with `num_classes` and `in_chans` where they were given.
    """

    source: Source
    name: str
    kwargs: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Recipe:
        """Raises a ConfigError unless it is what `to_dict` gives."""
        if not isinstance(record, Mapping) or set(record) != {"source", "name", "kwargs"}:
            raise ConfigError(f"recipe={record!r} is not an object of source, name and kwargs.")
        if record["source"] not in get_args(Source):
            raise ConfigError(
                f"recipe: source={record['source']!r} is not one of {', '.join(map(repr, get_args(Source)))}."
            )
        if not isinstance(record["name"], str):
            raise ConfigError(f"recipe: name={record['name']!r} is not a string.")
        if not isinstance(record["kwargs"], Mapping) or not all(isinstance(key, str) for key in record["kwargs"]):
            raise ConfigError(f"recipe: kwargs={record['kwargs']!r} is not an object.")
        return cls(record["source"], record["name"], dict(record["kwargs"]))


def create_base(
    name: str,
    *,
    pretrained: bool = True,
    checkpoint: Path | str | None = None,
    num_classes: int | None = None,
    in_chans: int | None = None,
    img_size: int | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
) -> tuple[nn.Module, Recipe, tuple[Any, ...] | dict[str, Any] | None]:
    """Make a base model.

    Args:
        name: A timm name (`resnet50.a1_in1k`), `hf-hub:user/repo`, `local-dir:PATH`, `torchvision:resnet50`, or
            `module:factory` for a function (or class) of one's own that returns the model.
        pretrained: Load the weights that timm or torchvision has for it. A factory is not told.
        checkpoint: A file of weights; nothing is downloaded then.
        num_classes: Of the classifier; by default what the weights have. Where they have another number, it is a new
            output layer, and all other weights are loaded. (torchvision's own weights are not adapted.)
        in_chans: Channels of the input images; timm's weights, and a checkpoint of a timm model, are adapted.
        img_size: Height and width of the input images in pixels, of a model of timm or torchvision. Weights that depend
            on it, such as position embeddings, are resampled by timm.
        model_kwargs: Further keyword arguments of the model.
    Returns:
        The model in eval mode, its recipe, and example inputs for `convert`, None where its pretrained_cfg has them.
    Raises:
        ConfigError: There is no such model, it does not take the arguments or the size, or its weights cannot be had.
        CheckpointError: The checkpoint cannot be read, or is of another model.
    """
    kwargs = dict(model_kwargs or {})
    given = {"num_classes": num_classes, "in_chans": in_chans, "img_size": img_size}
    for key, value in given.items():
        if value is not None and kwargs.get(key, value) != value:
            raise ConfigError(
                f"{key}={value} and model_kwargs[{key!r}]={kwargs[key]!r} contradict each other. Pass one."
            )
    kwargs |= {key: given[key] for key in ("num_classes", "in_chans") if given[key] is not None}
    _check_reserved(kwargs)
    prefix, colon, rest = name.partition(":")
    pretrained = pretrained and checkpoint is None
    inputs: Any = None
    if prefix == "torchvision" and colon:
        model, kwargs, inputs = create_torchvision(rest, pretrained, kwargs, img_size)
        recipe = Recipe("torchvision", rest, kwargs)
    elif not colon or prefix in ("hf-hub", "hf_hub", "local-dir"):
        model, recipe = _create_timm(name, pretrained, kwargs, img_size)
    else:
        model, inputs = create_own(name, kwargs, img_size)
        recipe = Recipe("factory", name, kwargs)
    model.eval()
    if img_size is not None:
        inputs = at_size(model, name, inputs, img_size)
    if checkpoint is not None:
        load_weights(model, Path(checkpoint), _changes(kwargs, img_size))
    return model, recipe, inputs


def _changes(kwargs: Mapping[str, Any], img_size: int | None) -> list[Change]:
    """What may be done to a checkpoint, as far as the caller has asked for another model than it is of."""
    changes: list[Change] = [] if img_size is None else [resample]
    if kwargs.get("in_chans") is not None:
        changes.append(partial(adapt_channels, in_chans=kwargs["in_chans"]))
    if kwargs.get("num_classes") is not None:
        changes.append(partial(renew_classifier, num_classes=kwargs["num_classes"]))
    return changes


def from_recipe(recipe: Recipe, device: torch.device | str = "cpu") -> nn.Module:
    """Make the base model of a recipe again, in eval mode: no weights are read, and nothing is downloaded.

    On the meta device a model holds no values. On any other the values of its parameters are arbitrary: load them.
    A recipe whose source is "factory" imports and runs that function.

    Raises:
        ConfigError: There is no such model here, or it does not take the arguments.
    """
    _check_reserved(recipe.kwargs)
    kwargs = dict(recipe.kwargs)
    if recipe.source == "factory":
        return call_factory(recipe.name, kwargs).eval().to(device)
    if torch.device(device).type == "meta":
        try:
            return _make(recipe, kwargs, torch.device("meta"))
        except ConfigError:  # some models read values while they are built
            pass
    return _make(recipe, kwargs, _NoDraws()).to(device)


def _make(recipe: Recipe, kwargs: Mapping[str, Any], context: AbstractContextManager[Any]) -> nn.Module:
    make = _make_timm if recipe.source == "timm" else make_torchvision
    with torch.random.fork_rng(devices=[]), context:
        return build_model(lambda _: make(recipe.name, kwargs), recipe.name, kwargs, pretrained=False).eval()


class _NoDraws(TorchFunctionMode):
    """Leaves out the random initialisation of parameters: a third to most of the time that a model takes to build."""

    DRAWS = (Tensor.normal_, Tensor.uniform_)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0] if func in self.DRAWS else func(*args, **(kwargs or {}))


def _check_reserved(kwargs: Mapping[str, Any]) -> None:
    for key in RESERVED:
        if key in kwargs:
            raise ConfigError(f"model_kwargs: '{key}' is no argument of an architecture. Leave it out. {NO_WEIGHTS}.")


# --- timm ------------------------------------------------------------------------------------------------------------


def _create_timm(name: str, pretrained: bool, kwargs: dict[str, Any], img_size: int | None) -> tuple[nn.Module, Recipe]:
    import timm

    saved: dict[str, Any] = {}
    architecture = name
    if ":" in name:
        cfg, architecture, arguments = _timm_config(name)
        _check_timm_name(architecture)
        saved = {**arguments, "pretrained_cfg": cfg}
    else:
        _check_timm_name(name)
        cfg = timm.models.get_pretrained_cfg(name)
        if pretrained and not (cfg is not None and cfg.has_weights):
            raise ConfigError(f"timm has no pretrained weights for '{name}'. {NO_WEIGHTS}.")
    if img_size is not None and takes_size(from_recipe(Recipe("timm", architecture, {**saved, **kwargs}), "meta")):
        kwargs = {**kwargs, "img_size": img_size}
    model = build_model(lambda weights: timm.create_model(name, pretrained=weights, **kwargs), name, kwargs, pretrained)
    seen: Mapping[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    if saved:
        return model, Recipe("timm", architecture, {**saved, "pretrained_cfg": _shaping(seen), **kwargs})
    tag = seen.get("tag")
    return model, Recipe("timm", f"{timm.models.get_arch_name(name)}.{tag}" if tag else name, kwargs)


def _make_timm(name: str, kwargs: Mapping[str, Any]) -> nn.Module:
    import timm

    _check_timm_name(name)
    cfg = kwargs.get("pretrained_cfg")
    settings = {**kwargs, "pretrained_cfg": _shaping(cfg)} if cfg is not None else kwargs
    return timm.create_model(name, pretrained=False, **settings)


def _check_timm_name(name: str) -> None:
    """Raise a ConfigError with close matches unless timm knows the architecture, and the tag if there is one."""
    import timm

    architecture, _, tag = name.partition(".")
    if "/" in name or not timm.is_model(architecture):
        hint = "timm.list_models() lists them all. Other sources: hf-hub:user/repo, torchvision:NAME, module:factory."
        if "/" in name:
            hint = f"For a model of the hub write hf-hub:{name}, for a folder local-dir:{name}."
        raise no_such("timm model", name, timm.list_models(), hint)
    if tag:
        try:
            timm.models.get_pretrained_cfg(name)
        except RuntimeError as error:
            own = timm.list_models(f"{architecture}.*", include_tags=True)
            raise no_such(
                "timm model", name, own, f"'{architecture}' has {', '.join(own[:8]) or 'no tags'}."
            ) from error


def is_timm_name(name: str) -> bool:
    """timm has this architecture, and its tag if there is one."""
    try:
        _check_timm_name(name)
    except ConfigError:
        return False
    return True


def _timm_config(name: str) -> tuple[Any, str, dict[str, Any]]:
    """The pretrained_cfg, the architecture and the model's arguments in a hub repository or a folder."""
    import timm
    from timm.models import _hub

    prefix, _, place = name.partition(":")
    read: Any = timm.models.load_model_config_from_hf
    if prefix == "local-dir":
        if not hasattr(_hub, "load_model_config_from_path"):
            raise ConfigError(
                f"'{name}': timm {timm.__version__} reads no folders. Install a newer timm, or use --checkpoint."
            )
        read = _hub.load_model_config_from_path
    try:
        cfg, architecture, arguments = read(place)
    except Exception as error:
        raise ConfigError(
            f"The config.json of '{name}' cannot be had: {one_line(error)}. Check the name and the network, or build "
            f"the architecture by its timm name with --checkpoint FILE."
        ) from error
    return cfg, architecture, dict(arguments or {})


def _shaping(cfg: Mapping[str, Any]) -> dict[str, Any]:
    return {key: cfg[key] for key in SHAPING if key in cfg}
