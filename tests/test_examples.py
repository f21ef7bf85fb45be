"""The examples in the docstrings of all that the reference shows, and it shows all public names."""

from __future__ import annotations

import doctest
import inspect
import pkgutil
import re
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

import dmaml_pl

REFERENCE = Path(__file__).parents[1] / "docs" / "reference"
OURS = ("dmaml_pl", "data_modules")
SHOWN = [name for page in sorted(REFERENCE.glob("*.md")) for name in re.findall(r"(?m)^::: (\S+)", page.read_text())]


def test_the_reference_shows_every_public_name_once() -> None:
    shown = [pkgutil.resolve_name(name) for name in SHOWN]
    assert len({id(each) for each in shown}) == len(shown)
    missing = [name for name in dmaml_pl.__all__ if getattr(dmaml_pl, name) not in shown]
    assert not missing


@pytest.mark.parametrize("name", [name for name in SHOWN if vars(pkgutil.resolve_name(name)).get("__init__")])
def test_a_class_in_the_reference_describes_each_of_its_settings(name: str) -> None:
    made = pkgutil.resolve_name(name)
    described = "".join(inspect.getdoc(each) or "" for each in made.__mro__ if each.__module__.startswith(OURS))
    settings = inspect.signature(made).parameters.keys() - {"args", "kwargs"}  # a protocol's
    assert not [each for each in settings if not re.search(rf"(?m)^\s+{each}:", described)]


@pytest.mark.parametrize("name", SHOWN)
def test_the_example_of_a_name_in_the_reference_gives_what_it_shows(name: str) -> None:
    known = {each: getattr(dmaml_pl, each) for each in dmaml_pl.__all__} | {"nn": nn, "pl": pl, "torch": torch}
    (example,) = doctest.DocTestFinder(recurse=False).find(pkgutil.resolve_name(name), name, globs=known)
    assert example.examples
    told: list[str] = []
    failed, _ = doctest.DocTestRunner(verbose=False, optionflags=doctest.ELLIPSIS).run(example, out=told.append)
    assert not failed, "".join(told)
