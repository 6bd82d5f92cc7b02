"""Where base models come from besides timm: torchvision, and factories of one's own; and what can go wrong anywhere."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from masksurgery.types import ConfigError

NO_WEIGHTS = "Pass --no-pretrained for random weights, or --checkpoint FILE for your own"


def build_model(make: Callable[[bool], nn.Module], name: str, kwargs: Mapping[str, Any], pretrained: bool) -> nn.Module:
    """make(pretrained), which may raise anything.

    Raises:
        ConfigError: It does; says whether only the weights are missing, or the arguments are wrong.
    """
    try:
        return make(pretrained)
    except Exception as error:  # whatever a model, a file system or a network raises
        failure = error
    if pretrained:
        try:
            make(False)
        except Exception as error:
            failure = error
        else:
            raise ConfigError(
                f"The pretrained weights of '{name}' cannot be had: {one_line(failure)}. {NO_WEIGHTS}."
            ) from failure
    raise ConfigError(
        f"'{name}' cannot be built with model_kwargs={dict(kwargs)!r}: {one_line(failure)}. Change or leave out "
        f"the argument."
    ) from failure


def one_line(error: BaseException) -> str:
    """An error of another library, short enough for a message of ours."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].strip().rstrip('.')[:300]}" if lines else type(error).__name__


def no_such(what: str, name: str, known: Iterable[str], hint: str) -> ConfigError:
    """The error for an unknown name, with close matches, else the hint."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=5, cutoff=0.5) or [other for other in known if name in other][:5]
    if close:
        hint = f"Did you mean {', '.join(close)}?"
    return ConfigError(f"There is no {what} '{name}'. {hint}")


# --- torchvision -----------------------------------------------------------------------------------------------------


def _find_builder(name: str) -> Callable[..., nn.Module]:
    try:
        from torchvision import models
    except ImportError as error:
        raise ConfigError(f"'torchvision:{name}' needs torchvision. Install it: pip install torchvision.") from error
    if name not in models.list_models():
        raise no_such(
            "torchvision model", name, models.list_models(), "`torchvision.models.list_models()` lists them all."
        )
    return cast(Callable[..., nn.Module], models.get_model_builder(name))


def make_torchvision(name: str, kwargs: Mapping[str, Any]) -> nn.Module:
    """A model without weights: of no part of it are any loaded."""
    return _without_weights(_find_builder(name), kwargs)


def _without_weights(builder: Callable[..., nn.Module], kwargs: Mapping[str, Any]) -> nn.Module:
    names = set(inspect.signature(builder).parameters) & {"weights", "weights_backbone"}
    return builder(**dict.fromkeys(names), **kwargs)


SIZE_ARGUMENTS = {"vision_transformer": "image_size", "maxvit": "input_size"}
"""What torchvision calls the size of the image, in the modules whose models are built for one."""


def create_torchvision(
    name: str, pretrained: bool, kwargs: Mapping[str, Any], img_size: int | None = None
) -> tuple[nn.Module, dict[str, Any], tuple[Tensor]]:
    """A model, the arguments that make it again without weights, and example inputs."""
    builder = _find_builder(name)
    from torchvision import models

    argument = SIZE_ARGUMENTS.get(builder.__module__.rpartition(".")[2])
    if img_size is not None and argument is not None:
        kwargs = {**kwargs, argument: img_size if argument == "image_size" else (img_size, img_size)}
    weights = getattr(models.get_model_weights(name), "DEFAULT", None)
    classes = len(weights.meta.get("categories") or ()) if weights else 0
    if pretrained and weights is None:
        raise ConfigError(f"torchvision has no pretrained weights for '{name}'. {NO_WEIGHTS}.")
    if pretrained and kwargs.get("num_classes", classes) != classes:
        raise ConfigError(
            f"num_classes={kwargs['num_classes']}: the pretrained weights of 'torchvision:{name}' have {classes} "
            f"classes, and torchvision adapts none. {NO_WEIGHTS}."
        )
    model = build_model(
        lambda full: builder(weights=weights, **kwargs) if full else _without_weights(builder, kwargs),
        f"torchvision:{name}", kwargs, pretrained,
    )  # fmt: skip
    cfg = _pretrained_cfg(model, weights, kwargs)
    shape = cfg["input_size"]
    if builder.__module__.startswith("torchvision.models.video"):
        shape = (shape[0], weights.meta.get("min_temporal_size", 16) if weights else 16, *shape[1:])
    else:
        model.pretrained_cfg = cfg  # type: ignore[assignment]  # what a prediction is prepared and labelled by
    # Some weights choose these arguments, so that the model would not come back without them.
    chosen = {
        key: getattr(model, key) for key in ("transform_input", "aux_logits", "image_size") if hasattr(model, key)
    }
    if "transform_input" in chosen:
        chosen["init_weights"] = False  # else it draws them, slowly, and warns of that
    if hasattr(model, "aux_classifier"):
        chosen["aux_loss"] = model.aux_classifier is not None
    return model, {**(chosen if pretrained else {}), **kwargs}, (torch.zeros(1, *shape),)


def _pretrained_cfg(model: nn.Module, weights: Any, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What the transforms of the weights do, in timm's words."""
    transforms = weights.transforms() if weights else None
    crop = list(getattr(transforms, "crop_size", None) or (224,))
    size = getattr(model, "image_size", None) or kwargs.get("input_size") or (crop * 2)[:2]
    cfg: dict[str, Any] = {"input_size": (3, *((size, size) if isinstance(size, int) else size))}
    if transforms is not None and hasattr(transforms, "mean"):
        resize = list(getattr(transforms, "resize_size", None) or crop)
        interpolation = getattr(getattr(transforms, "interpolation", None), "value", "bilinear")
        cfg |= {"mean": tuple(transforms.mean), "std": tuple(transforms.std), "interpolation": interpolation}
        cfg["crop_pct"] = crop[0] / resize[0]
    categories = weights.meta.get("categories") if weights else None
    if categories and kwargs.get("num_classes", len(categories)) == len(categories):
        cfg |= {"num_classes": len(categories), "label_names": tuple(categories)}
    return cfg


# --- a factory of one's own ------------------------------------------------------------------------------------------


def create_own(name: str, kwargs: Mapping[str, Any], img_size: int | None = None) -> tuple[nn.Module, Any]:
    """A model of the user's own, and its example inputs, None where its pretrained_cfg has them."""
    if img_size is not None:
        raise ConfigError(
            f"img_size={img_size} (--img-size) is for models of timm and torchvision. Let '{name}' set "
            f"model.example_inputs = (torch.zeros(1, 3, {img_size}, {img_size}),) before it returns the model."
        )
    model = call_factory(name, kwargs)
    inputs = getattr(model, "example_inputs", None)
    cfg = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    if inputs is None and "input_size" not in cfg:
        raise ConfigError(
            f"'{name}': {type(model).__name__} does not say what it takes. Set model.example_inputs = "
            f"(torch.zeros(1, 3, 224, 224),), or whatever one forward takes, before the factory returns it."
        )
    if inputs is not None and not isinstance(inputs, (tuple, dict)):
        inputs = tuple(inputs) if isinstance(inputs, list) else (inputs,)
    return model, inputs


def call_factory(name: str, kwargs: Mapping[str, Any]) -> nn.Module:
    """Import "module:factory", from the working directory too, and call it.

    Raises:
        ConfigError: There is no such module or function, it does not take the arguments, or returns no module.
    """
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise ConfigError(f"'{name}' is not of the form module:factory, such as my_models:small_net.")
    with _working_directory_on_path():
        factory = _import_factory(name, module_name, attribute)
        try:
            inspect.signature(factory).bind(**kwargs)
        except TypeError as error:
            signature = inspect.signature(factory)
            raise ConfigError(f"'{name}' takes {signature}, not model_kwargs={dict(kwargs)!r}: {error}.") from error
        except ValueError:  # a signature that Python does not know: the call will tell
            pass
        try:
            model = factory(**kwargs)
        except Exception as error:
            raise ConfigError(f"'{name}' raised {one_line(error)}. Call it in Python to see where.") from error
    if not isinstance(model, nn.Module):
        raise ConfigError(f"'{name}' returned {type(model).__name__}, not a torch.nn.Module. Return the model.")
    return model


def _import_factory(name: str, module_name: str, attribute: str) -> Callable[..., Any]:
    importlib.invalidate_caches()
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        missing = isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}.")
        if missing:
            raise ConfigError(
                f"'{name}': there is no module '{module_name}' in {os.getcwd()} nor among the installed packages. Run "
                f"where it is. (Names with a colon: torchvision:NAME, hf-hub:REPO, local-dir:PATH, module:factory.)"
            ) from error
        raise ConfigError(
            f"'{name}': importing '{module_name}' raised {one_line(error)}. Import it in Python to see where."
        ) from error
    factory = getattr(module, attribute, None)
    if factory is None:
        public = [other for other, value in vars(module).items() if callable(value) and not other.startswith("_")]
        raise no_such(
            f"factory in '{module_name}' called", attribute, public, f"It has {', '.join(public[:8]) or 'none'}."
        )
    if not callable(factory):
        raise ConfigError(f"'{name}' is {type(factory).__name__}, not a function that returns a model.")
    return cast(Callable[..., Any], factory)


@contextlib.contextmanager
def _working_directory_on_path() -> Iterator[None]:
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(here)
