"""The examples in the docstrings of all public names."""

from __future__ import annotations

import doctest

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

import dmaml_pl


@pytest.mark.parametrize("name", dmaml_pl.__all__)
def test_the_example_of_a_public_name_gives_what_it_shows(name: str) -> None:
    known = {each: getattr(dmaml_pl, each) for each in dmaml_pl.__all__} | {"nn": nn, "pl": pl, "torch": torch}
    (example,) = doctest.DocTestFinder(recurse=False).find(known[name], name, globs=known)
    assert example.examples
    told: list[str] = []
    failed, _ = doctest.DocTestRunner(verbose=False, optionflags=doctest.ELLIPSIS).run(example, out=told.append)
    assert not failed, "".join(told)
