"""Everything public has a docstring that says what its types do not, and what the examples in them show is so."""

from __future__ import annotations

import doctest
import importlib
import inspect
import logging
import pkgutil
import re
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import masksurgery

FUNCTIONS = [name for name in masksurgery.__all__ if inspect.isfunction(getattr(masksurgery, name))]
CLASSES = [name for name in masksurgery.__all__ if inspect.isclass(getattr(masksurgery, name))]
# What is long, or needs files, is shown in the README, whose blocks are run too.
WITHOUT_EXAMPLE = {"evaluate", "export", "export_program", "finetune", "load", "push_to_hub", "write_report"}


def modules() -> Iterator[ModuleType]:
    yield masksurgery
    for found in pkgutil.walk_packages(masksurgery.__path__, "masksurgery."):
        if found.name != "masksurgery.__main__" and not found.name.startswith("masksurgery.keras"):  # keras: test_keras
            yield importlib.import_module(found.name)


def examples() -> list[doctest.DocTest]:
    finder = doctest.DocTestFinder(exclude_empty=True)
    names: dict[str, Any] = {"masksurgery": masksurgery, "torch": torch, "nn": nn, "np": np}
    return [test for module in modules() for test in finder.find(module, globs=names) if test.examples]


EXAMPLES = {test.name: test for test in examples()}


@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_the_examples_show_what_is_so(name, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.ERROR, "masksurgery")
    told: list[str] = []
    doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(EXAMPLES[name], out=told.append)
    assert not told, "".join(told)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_say_what_they_take_return_and_raise(name):
    function = getattr(masksurgery, name)
    text = inspect.getdoc(function)
    assert text, f"{name} has no docstring"
    sections = {line.strip().rstrip(":") for line in text.splitlines() if line == line.lstrip() and line.endswith(":")}
    assert "Args" in sections
    assert "Raises" in sections
    documented = text[text.index("Args:") :]
    for parameter in inspect.signature(function).parameters.values():
        kind = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        told = rf"^\s+{re.escape(kind + parameter.name)}\b.*:"
        assert re.search(told, documented, re.M), f"{name}: {parameter.name} is not told"
    assert ("Returns" in sections) == (inspect.signature(function).return_annotation not in (None, "None"))
    has_example = function.__module__ + "." + name in EXAMPLES
    assert has_example == (name not in WITHOUT_EXAMPLE), (
        f"{name}: an example is {'there' if has_example else 'missing'}"
    )


@pytest.mark.parametrize("name", CLASSES)
def test_classes_and_what_they_offer_say_what_it_is(name):
    kind = getattr(masksurgery, name)
    assert vars(kind).get("__doc__"), f"{name} has no docstring of its own"
    assert not vars(kind)["__doc__"].startswith(f"{name}("), f"{name} has only the docstring that dataclasses write"
    for attribute, value in vars(kind).items():
        function = getattr(value, "fget", None) or getattr(value, "__func__", value)
        if not attribute.startswith("_") and inspect.isfunction(function):
            assert inspect.getdoc(function), f"{name}.{attribute} has no docstring"
