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

OURS = ("dmaml_pl", "data_modules")
REFERENCE = Path(__file__).parents[1] / "docs" / "reference"
SHOWN = [name for page in sorted(REFERENCE.glob("*.md")) for name in re.findall(r"(?m)^::: (\S+)", page.read_text())]


def test_the_reference_shows_every_public_name_once() -> None:
    shown = [pkgutil.resolve_name(name) for name in SHOWN]
    assert len({id(each) for each in shown}) == len(shown)
    missing = [name for name in dmaml_pl.__all__ if getattr(dmaml_pl, name) not in shown]
    assert not missing


def settings_of(made: type) -> set[str]:
    """What a class of ours takes, by its own name or handed on to its bases."""
    found: set[str] = set()
    for each in (each for each in made.__mro__ if each.__module__.startswith(OURS) and "__init__" in vars(each)):
        parameters = inspect.signature(each).parameters.values()
        found |= {one.name for one in parameters if one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL)}
        if all(one.kind != one.VAR_KEYWORD for one in parameters):
            break
    return found


@pytest.mark.parametrize("name", [name for name in SHOWN if inspect.isclass(pkgutil.resolve_name(name))])
def test_the_reference_describes_each_setting_of_a_class_with_it_or_with_its_bases(name: str) -> None:
    made, shown = pkgutil.resolve_name(name), [pkgutil.resolve_name(each) for each in SHOWN]
    described = "".join(inspect.getdoc(each) or "" for each in made.__mro__ if each in shown)
    assert not [each for each in settings_of(made) if not re.search(rf"(?m)^\s+{each}:", described)]


@pytest.mark.parametrize("name", SHOWN)
def test_the_example_of_a_name_in_the_reference_gives_what_it_shows(name: str) -> None:
    known = {each: getattr(dmaml_pl, each) for each in dmaml_pl.__all__} | {"nn": nn, "pl": pl, "torch": torch}
    (example,) = doctest.DocTestFinder(recurse=False).find(pkgutil.resolve_name(name), name, globs=known)
    assert example.examples
    told: list[str] = []
    failed, _ = doctest.DocTestRunner(verbose=False, optionflags=doctest.ELLIPSIS).run(example, out=told.append)
    assert not failed, "".join(told)
