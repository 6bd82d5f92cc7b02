"""Options of a command made of the fields of a settings class: one place for names, defaults and explanations."""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import typer

T = TypeVar("T")
Command = TypeVar("Command", bound=Callable[..., Any])


def with_settings(*kinds: type, without: tuple[str, ...] = ()) -> Callable[[Command], Command]:
    """Give a command an option for each field of these dataclasses, which it takes as keyword arguments.

    The text of an option is the field's in the section "Attributes" of the class. A field that several classes have,
    such as a seed, is one option.

    Args:
        kinds: Dataclasses all of whose fields are plain: numbers, strings, truth values, literals, tuples of them.
        without: Fields that the command declares itself.
    """

    def decorate(command: Command) -> Command:
        signature = inspect.signature(command, eval_str=True)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        known = {*without, *(p.name for p in own)}
        added: dict[str, inspect.Parameter] = {}
        for kind in kinds:
            texts, hints = _explanations(kind), get_type_hints(kind)
            for field in fields(kind):
                if field.name not in known and field.name not in added:
                    added[field.name] = _parameter(field.name, hints[field.name], field.default, texts[field.name])
        command.__signature__ = signature.replace(parameters=[*own, *added.values()])  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in (*own, *added.values())}
        return command

    return decorate


def pick(kind: type[T], values: Mapping[str, Any], **more: Any) -> T:
    """A settings object of the values of its options."""
    chosen = {field.name: values[field.name] for field in fields(kind) if field.name in values}  # type: ignore[arg-type]
    return kind(**{name: tuple(x) if isinstance(x, list) else x for name, x in chosen.items()}, **more)


def _explanations(kind: type) -> dict[str, str]:
    """The first sentence of each entry in the section Attributes."""
    text = inspect.getdoc(kind) or ""
    section = re.search(r"^Attributes:\n((?:    .*\n?|\n)*)", text, re.MULTILINE)
    entries = re.findall(r"^    (\w+): (.*(?:\n        .*)*)", section[1] if section else "", re.MULTILINE)
    found = {name: " ".join(entry.split()) for name, entry in entries}
    return {name: re.split(r"(?<=\.)\s", entry)[0].replace("`", "") for name, entry in found.items()}


def _parameter(name: str, hint: Any, default: Any, text: str) -> inspect.Parameter:
    optional = get_origin(hint) in (Union, types.UnionType) and type(None) in get_args(hint)
    inner = next(arg for arg in get_args(hint) if arg is not type(None)) if optional else hint
    flag = "--" + name.replace("_", "-")
    more: dict[str, Any] = {}
    if get_origin(inner) is Literal:
        more["metavar"], inner = "|".join(get_args(inner)), str
    elif get_origin(inner) is tuple and get_args(inner)[1] is Ellipsis:
        inner, default, text = list[get_args(inner)[0]], list(default), f"{text} May be repeated."  # type: ignore[misc]
    if inner is bool:
        flag += f"/--no-{flag[2:]}"
    option = typer.Option(flag, help=text, show_default=default not in (None, []), **more)
    annotation = Annotated[(inner | None if optional else inner), option]  # type: ignore[valid-type]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
