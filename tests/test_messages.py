"""What is wrong with a command line, in one line of our own words; see also `test_bad_input.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
from jsonargparse import ArgumentError, ArgumentParser
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn
from torch.optim import Optimizer

from dmaml_pl.cli.command_line import check_command, check_config_files, given_settings, laid_over, options
from dmaml_pl.cli.messages import check_value, explain_interpolation, explain_trainer, refuse
from dmaml_pl.errors import ConfigError

KNOWN = ["data", "model", "trainer.max_steps", "trainer.strategy"]


class Own(nn.Module):
    """A user's class; jsonargparse and the messages read its signature."""

    def __init__(self, width: int, rates: Sequence[float] = (), inner: nn.Module | None = None) -> None:
        super().__init__()


OWN = f"{__name__}.Own"


def own(**settings: Any) -> dict[str, Any]:
    return {"class_path": OWN, "init_args": settings}


def refused(check: Callable[..., Any], *arguments: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        check(*arguments)
    return str(caught.value)


@pytest.mark.parametrize("words", [[], ["--config", "a.yaml"], ["-c", "a.yaml", "fit"]])
def test_a_command_comes_first(words: list[str]) -> None:
    with pytest.raises(ConfigError, match="A command comes first"):
        check_command(words, ["fit"])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--a=1", "--b", "2", "-c", "x.yaml"], [("a", "1"), ("b", "2"), ("c", "x.yaml")]),
        (["--a", "-1", "--b="], [("a", "-1"), ("b", "")]),
        (["--a", "--b"], [("a", None), ("b", None)]),
        (["x.yaml", "--help", "--a", "1"], [("", "x.yaml"), ("help", ""), ("a", "1")]),
    ],
)
def test_words_are_options_with_values(words: list[str], expected: list[tuple[str, str | None]]) -> None:
    assert list(options(words)) == expected


def test_settings_of_files_come_before_single_ones_with_their_place_below_the_known_ones() -> None:
    Path("a.yaml").write_text("trainer: {max_steps: 3, stepz: 4}\nmodel: {class_path: Net, init_args: {width: 2}}\n")
    words = ["--model.inner.width=5", "--config=a.yaml", "--trainer.strategy.init_args.merge.class_path", "Mean"]
    assert list(given_settings(words, KNOWN)) == [
        ("trainer.max_steps", 3),
        ("trainer.stepz", 4),
        ("model", {"class_path": "Net", "init_args": {"width": 2}}),
        ("model", {"init_args": {"inner": {"init_args": {"width": "5"}}}}),
        ("trainer.strategy", {"init_args": {"merge": {"class_path": "Mean"}}}),
    ]


def test_a_later_value_wins_and_another_class_drops_the_settings_of_the_class_before() -> None:
    first = {"class_path": "A", "init_args": {"x": 1, "y": 2}}
    assert laid_over(first, {"init_args": {"x": 3}}) == {"class_path": "A", "init_args": {"x": 3, "y": 2}}
    assert laid_over(first, {"class_path": "B", "init_args": {"z": 1}}) == {"class_path": "B", "init_args": {"z": 1}}
    assert laid_over("A", {"init_args": {"x": 3}}) == {"class_path": "A", "init_args": {"x": 3}}
    assert laid_over(first, "B") == "B"
    assert laid_over([{"class_path": "A"}, "B"], {"init_args": {"x": 3}}) == [
        {"class_path": "A"},
        {"class_path": "B", "init_args": {"x": 3}},
    ]


@pytest.mark.parametrize(
    ("wanted", "value", "expected"),
    [
        (int, "many", "a.b is 'many', but must be of type int."),
        (int, 1.5, "a.b is '1.5', but must be of type int."),
        (int | None, "long", "a.b is 'long', but must be of type int or null."),
        (bool | int, "abc", "a.b is 'abc', but must be of type bool or int."),
        (Sequence[int], "wide", "a.b is 'wide', but must be of type list."),
        (list[int], "[1, x]", "a.b is 'x', but must be of type int."),
        (dict[str, int], 3, "a.b is '3', but must be of type dict."),
        (Literal["min", "max"], "least", "a.b is 'least', but must be one of 'min', 'max'."),
        (Literal[1, 3] | None, 2, "a.b is '2', but must be one of 1, 3 or null."),
        (nn.Module, 3, "a.b is '3', but must be of type Module."),
        (nn.Module, "Ownn", "a.b cannot be Ownn: no such Module is known. Did you mean Own?"),
        (nn.Module, "{", "a.b cannot be {: no such Module is known."),
    ],
)
def test_a_value_of_another_type_is_told_with_what_it_may_be(wanted: Any, value: Any, expected: str) -> None:
    assert refused(check_value, "a.b", wanted, value) == expected


@pytest.mark.parametrize(
    ("wanted", "value"),
    [
        (int, "3"),
        (float, "1e-3"),
        (Sequence[int], "[1, 2]"),
        (str | nn.Module, "anything"),
        (int, "${data.init_args.ways}"),
        (nn.Module, own(width=1, rates=[0.1], inner=own(width="${x}"))),
        (list[nn.Module] | nn.Module, [own(width=1)]),
        (Callable[[Iterable[Any]], Optimizer], {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.1}}),
    ],
)
def test_a_value_that_fits_or_refers_to_another_setting_is_not_refused(wanted: Any, value: Any) -> None:
    check_value("a.b", wanted, value)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (own(width=1, inner=own(width="x")), "a.inner.width is 'x', but must be of type int."),
        (own(width=1, rates=[0.1, "x"]), "a.rates is 'x', but must be of type float."),
        (own(width=1, inner={"class_path": "torch.optim.Adam"}), "a.inner cannot be torch.optim.Adam: it must be a Mo"),
        (own(widht=1), f"a.widht is not a setting of {OWN}. Did you mean width? It has: width, rates, inner."),
        (own(), f"Not set: a.width, which {OWN} needs."),
        ({"class_path": "Own"}, "Not set: a.width, which Own needs."),
        ({"class_path": OWN[:-1]}, f"a cannot be {OWN[:-1]}: "),
        ({"init_args": {"width": 1}}, "Not set: a.class_path, the path of a Module."),
    ],
)
def test_in_a_class_the_setting_is_named_to_the_end(value: dict[str, Any], expected: str) -> None:
    for wanted, given in [(nn.Module, value), (int | nn.Module | None, value), (list[nn.Module], [value])]:
        assert refused(check_value, "a", wanted, given).startswith(expected)


def test_what_is_not_found_to_be_wrong_is_told_as_the_parser_tells_it() -> None:
    parser = ArgumentParser(exit_on_error=False)
    for name in ("--data", "--model"):
        parser.add_argument(name, type=int)
    error = ArgumentError(None, "all of it")
    error.__cause__ = ValueError("this\nis why")
    assert refused(refuse, parser, ["--data=1", "--model=2"], error) == "this is why"


def test_a_value_that_another_setting_lends_is_told_where_it_does_not_fit() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--data", type=dict)
    parser.add_argument("--model", type=nn.Module)
    Path("a.yaml").write_text("data: {ways: five}")
    words = ["--config=a.yaml", f"--model={OWN}", "--model.width=${data.ways}"]
    assert refused(refuse, parser, words, ValueError()) == "model.width is 'five', but must be of type int."


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
