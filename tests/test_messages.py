"""What is wrong with a command line, in one line of our own words; see also `test_bad_input.py`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
from jsonargparse import ArgumentError, ArgumentParser
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn
from torch.optim import Optimizer

from dmaml_pl.cli.command_line import check_command, check_config_files
from dmaml_pl.cli.messages import explain_interpolation, explain_trainer
from dmaml_pl.cli.mistakes import refuse
from dmaml_pl.errors import ConfigError


class Own(nn.Module):
    """A user's class; jsonargparse and the messages read its signature."""

    def __init__(self, width: int, rates: Sequence[float] = (), inner: nn.Module | None = None) -> None:
        super().__init__()


OWN = f"{__name__}.Own"


def own(**settings: Any) -> dict[str, Any]:
    return {"class_path": OWN, "init_args": settings}


@pytest.mark.parametrize("words", [[], ["--config", "a.yaml"], ["-c", "a.yaml", "fit"]])
def test_a_command_comes_first(words: list[str]) -> None:
    with pytest.raises(ConfigError, match="A command comes first"):
        check_command(words, ["fit"])


def refused(wanted: Any, value: Any) -> str:
    """What is told of a value of the setting a that the parser refuses."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--a", type=wanted)
    words = ["--a", value if isinstance(value, str) else json.dumps(value)]
    with pytest.raises(ArgumentError) as raised:
        parser.parse_args(words)
    with pytest.raises(ConfigError) as told:
        refuse(parser, words, raised.value)
    return str(told.value)


@pytest.mark.parametrize(
    ("wanted", "value", "expected"),
    [
        (int, "many", "a is 'many', but must be of type int."),
        (int, 1.5, "a is '1.5', but must be of type int."),
        (int | None, "long", "a is 'long', but must be of type int or null."),
        (bool | int, "abc", "a is 'abc', but must be of type bool or int."),
        (Sequence[int], "wide", "a is 'wide', but must be of type list."),
        (list[int], ["1", "x"], "a is 'x', but must be of type int."),
        (dict[str, int], 3, "a is '3', but must be of type dict."),
        (dict[str, int], {"b": "x"}, "a.b is 'x', but must be of type int."),
        (Literal["min", "max"], "least", "a is 'least', but must be one of 'min', 'max'."),
        (Literal[1, 3] | None, 2, "a is '2', but must be one of 1, 3 or null."),
        (nn.Module, 3, "a is '3', but must be the class path of a Module. That is MODULE.CLASS, as Python imports it."),
        (nn.Module, "MPL", "a is 'MPL', but must be the class path of a Module. Did you mean dmaml_pl.MLP?"),
        (Optimizer, "adam", "a is 'adam', but must be the class path of an Optimizer. Did you mean Adam?"),
        (Literal["min"] | nn.Module, "x", "a is 'x', but must be one of 'min' or the class path of a Module."),
    ],
)
def test_a_value_of_another_type_is_told_with_what_it_may_be(wanted: Any, value: Any, expected: str) -> None:
    assert refused(wanted, value) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (own(width=1, inner=own(width="x")), "a.inner.width is 'x', but must be of type int."),
        (own(width=1, rates=[0.1, "x"]), "a.rates is 'x', but must be of type float."),
        (own(width=1, inner={"class_path": "torch.optim.Adam"}), "a.inner cannot be torch.optim.Adam: it must be a Mo"),
        (own(widht=1), f"a.widht is not a setting of {OWN}. Did you mean width? It has: width, rates, inner."),
        (own(), f"Not set: a.width, which {OWN} needs."),
        ({"class_path": OWN[:-1]}, f"a cannot be {OWN[:-1]}: "),
        ({"class_path": OWN, "init_args": 3}, f"a cannot be {OWN}: its init_args are 3, but must be settings by name."),
        ({"class_path": OWN, "width": 3}, "a.width stands beside class_path, but must be in init_args there."),
        ({"class_path": "torch.nn.functional.relu"}, "a cannot be torch.nn.functional.relu: it must be a Module."),
    ],
)
def test_in_a_class_the_setting_is_named_to_the_end(value: dict[str, Any], expected: str) -> None:
    for wanted, given in [(nn.Module, value), (int | nn.Module | None, value), (list[nn.Module], [value])]:
        assert refused(wanted, given).startswith(expected)


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("Adam", {"lrr": 1}, "a.lrr is not a setting of torch.optim.Adam. Did you mean lr?"),
        ("Adam", {"eps": "x"}, "a.eps is 'x', but must be of type float."),
        ("Adamm", {}, "a cannot be torch.optim.Adamm: module 'torch.optim' has no attribute 'Adamm'. Did you mean to"),
    ],
)
def test_a_class_that_is_called_later_is_told_of_as_any(name: str, settings: dict[str, Any], expected: str) -> None:
    value = {"class_path": f"torch.optim.{name}", "init_args": settings}
    assert refused(Callable[[Iterable[Any]], Optimizer], value).startswith(expected)


def test_options_are_laid_over_files_before_they_are_held_against_a_class() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("-c", "--config", action="config")
    parser.add_argument("--a", type=nn.Module)
    Path("a.yaml").write_text(json.dumps({"a": own(width=1, inner=own(width=2))}))
    for option, expected in [
        (["--a.inner.width", "x"], "a.inner.width is 'x', but must be of type int."),
        (["--a.inner", "torch.nn.Identity", "--a.width=x"], "a.width is 'x', but must be of type int."),
        (["--a", "torch.nn.Linear"], "Not set: a.in_features, a.out_features, which torch.nn.Linear needs."),
        (["--a.width"], "a.width has no value: give one after --a.width."),
    ]:
        words = ["--config", "a.yaml", *option]
        with pytest.raises(ArgumentError) as raised:
            parser.parse_args(words)
        with pytest.raises(ConfigError) as told:
            refuse(parser, words, raised.value)
        assert str(told.value) == expected


def test_what_is_not_recognized_is_told_in_one_line_as_the_parser_tells_it() -> None:
    with pytest.raises(ConfigError, match=r"^this is why\.$"):
        refuse(ArgumentParser(), [], ArgumentError(None, "this\nis why"))


@pytest.mark.parametrize(
    ("settings", "start"),
    [
        ({"devices": 0}, "trainer.devices is 0, which cannot be had: "),
        ({"strategy": "dmamll"}, "trainer.strategy is 'dmamll', but must be dmaml, auto, or a strategy's class path: "),
        ({"accelerator": "cpuu", "devices": 2}, "trainer.accelerator is 'cpuu', but must be auto, cpu, or one that "),
        ({"max_steps": -7}, "trainer.max_steps is -7: why"),
        ({"devices": 0, "max_steps": -7}, "trainer: why"),
    ],
)
def test_the_setting_without_which_the_trainer_can_be_made_is_blamed(settings: dict[str, Any], start: str) -> None:
    text = explain_trainer(ValueError("why\nelse"), {"accelerator": "cpu", "devices": 1} | settings)
    assert text.startswith(start)
    assert text.endswith("why else")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("${fit.data.init_args.wayz}", "ways refers to ${fit.data.init_args.wayz}, but there is no such setting."),
        ("${.data.init_args.wayz}", "ways refers to ${data.init_args.wayz}, but there is no such setting."),
        ("${fit.data", "ways refers to another setting in a way that cannot be read"),
        ("${nobody:3}", "ways refers to another setting in a way that cannot be read"),
    ],
)
def test_a_reference_to_nothing_is_told_with_who_refers_and_to_what(value: str, expected: str) -> None:
    with pytest.raises(OmegaConfBaseException) as caught:
        OmegaConf.to_container(OmegaConf.create({"fit": {"data": {}, "ways": value}}), resolve=True)
    assert explain_interpolation(caught.value).startswith(expected)


@pytest.mark.parametrize("words", [["--config", "a.yaml"], ["--config=a.yaml"], ["-c", "a.yaml"]])
def test_a_broken_file_is_named(words: list[str]) -> None:
    Path("a.yaml").write_text("data:\n\tshots: 1\n")
    with pytest.raises(ConfigError, match=r"a\.yaml is not valid YAML in line 2, column 1"):
        check_config_files(["fit", *words, "--trainer.max_steps", "1"])


@pytest.mark.parametrize("words", [[], ["fit"], ["fit", "--config"], ["fit", "--config", "-"]])
def test_without_a_file_there_is_nothing_to_check(words: list[str]) -> None:
    check_config_files(words)
