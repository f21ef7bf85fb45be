"""The parser's pages of errors as one line each; what the parser says was copied from jsonargparse 4.53."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dmaml_pl.cli.messages import check_config_files, explain, explain_interpolation, explain_trainer
from dmaml_pl.errors import ConfigError

KNOWN = ["config", "data", "model", "trainer.max_steps", "trainer.max_epochs", "checkpoint.monitor"]

NESTED_UNION = """\
Parser key "trainer.strategy":
  Does not validate against any of the Union subtypes
  Subtypes: [<class 'str'>, <class 'pytorch_lightning.strategies.strategy.Strategy'>]
  Errors:
    - Expected a <class 'str'>
    - Problem with given class_path 'dmaml_pl.DMAMLStrategy':
        Parser key "run_length":
          Does not validate against any of the Union subtypes
          Subtypes: [<class 'int'>, <class 'NoneType'>]
          Errors:
            - Expected a <class 'int'>
            - Expected a <class 'NoneType'>
          Given value type: <class 'str'>
          Given value: long
  Given value type: <class 'dict'>
  Given value: {'class_path': 'dmaml_pl.DMAMLStrategy', 'init_args': {'run_length': 'long'}}"""

IN_CLASS = """\
Parser key "model":
  Does not validate against any of the Union subtypes
  Subtypes: [<class 'dmaml_pl.modules.meta_learning.FewShotModule'>, <class 'NoneType'>]
  Errors:
    - Problem with given class_path 'dmaml_pl.MAML':
        Parser key "{key}":
          {reason}
    - Expected a <class 'NoneType'>
  Given value type: <class 'dict'>
  Given value: {{'class_path': 'dmaml_pl.MAML'}}"""

OPTIMIZER = "Type typing.Callable[[collections.abc.Iterable], torch.optim.optimizer.Optimizer] expects a function or a "


def in_class(key: str, reason: str) -> str:
    return explain(IN_CLASS.format(key=key, reason=reason), KNOWN)


def test_a_misspelt_setting_comes_with_the_nearest_one() -> None:
    text = explain("Subcommand 'fit' does not accept option 'trainer.max_stepz'", KNOWN)
    assert text.startswith("trainer.max_stepz is not a setting. Did you mean trainer.max_steps?")


def test_a_misspelt_group_is_told_of_the_group_not_of_a_setting_deep_inside() -> None:
    text = explain("Subcommand 'fit' does not accept option 'trainr.strategy.init_args.merge.class_path'", KNOWN)
    assert text.startswith("trainr is not a setting. Did you mean trainer?")


def test_a_word_without_dashes_is_told_of_the_dashes() -> None:
    text = explain("unrecognized arguments: configs/sinusoid.yaml", KNOWN)
    assert text.endswith("Did you mean --config configs/sinusoid.yaml?")


def test_an_option_of_nobody_is_named_without_its_dashes() -> None:
    assert explain("unrecognized arguments: --modl=3", KNOWN).startswith("modl is not a setting. Did you mean model?")


def test_a_misspelt_command_comes_with_the_nearest_one() -> None:
    text = explain("argument subcommand: invalid choice: 'fitt' (choose from 'fit', 'validate', 'test')", KNOWN)
    assert text == "fitt is not a command. Did you mean fit? dmaml --help lists all."


def test_what_is_not_set_is_named_with_what_to_do() -> None:
    text = explain("the following arguments are required: data, model", KNOWN)
    assert text == "Not set: data, model. Give a --config file, such as configs/sinusoid.yaml."


def test_a_setting_of_a_class_is_told_with_all_settings_of_the_class() -> None:
    text = in_class("init_args", "Option 'inner_lrr' is not accepted").replace(".init_args", "")
    assert text.startswith(
        "model.inner_lrr is not a setting of dmaml_pl.MAML. Did you mean inner_lr? It has: network, "
    )


def test_a_value_of_another_type_is_told_with_the_value_and_the_type() -> None:
    text = in_class("inner_lr", "Expected a <class 'float'>. Got value: fast")
    assert text == "model.inner_lr is 'fast', but must be of type float."


def test_a_type_is_named_as_a_person_names_it() -> None:
    text = in_class("hidden", "Expected a <class 'collections.abc.Sequence'>. Got value: wide")
    assert text == "model.hidden is 'wide', but must be of type list."


def test_a_value_that_is_not_a_choice_is_told_with_the_choices() -> None:
    text = in_class("objective", "Expected a typing.Literal['regression', 'classification']. Got value: clasification")
    assert text == "model.objective is 'clasification', but must be one of 'regression', 'classification'."


def test_of_a_union_all_members_are_named_and_none_of_the_unions_around_it() -> None:
    assert explain(NESTED_UNION, KNOWN) == "trainer.strategy.run_length is 'long', but must be of type int or null."


def test_a_misspelt_class_path_comes_with_the_nearest_one() -> None:
    text = explain(
        "Parser key \"model\":\n  Problem with given class_path 'dmaml_pl.MAMM':\n"
        "    module 'dmaml_pl' has no attribute 'MAMM'",
        KNOWN,
    )
    assert text == (
        "model cannot be dmaml_pl.MAMM: module 'dmaml_pl' has no attribute 'MAMM'. Did you mean dmaml_pl.MAML?"
    )


def test_a_misspelt_class_of_an_optimizer_is_not_blamed_on_the_class_around_it() -> None:
    text = in_class(
        "meta_optimizer",
        f"{OPTIMIZER}callable class: module 'torch.optim' has no attribute 'Adamm'. Got value: "
        "Namespace(class_path='torch.optim.Adamm', init_args=Namespace(lr=0.003))",
    )
    assert text.startswith("model.meta_optimizer cannot be torch.optim.Adamm: ")
    assert text.endswith("Did you mean torch.optim.Adam?")


def test_a_wrong_setting_of_an_optimizer_is_named_to_the_end() -> None:
    text = in_class(
        "meta_optimizer",
        f"{OPTIMIZER}callable class: Parser key \"lr\":\n                Expected a <class 'float'>. Got value: quick. "
        "Got value: Namespace(class_path='torch.optim.Adam', init_args=Namespace(lr='quick'))",
    )
    assert text == "model.meta_optimizer.lr is 'quick', but must be of type float."


def test_a_class_of_another_kind_is_refused_with_the_kind_that_is_wanted() -> None:
    text = explain(
        'Parser key "data":\n  Errors:\n    - Import path torch.nn.Linear does not correspond to a subclass of '
        "TaskDataModule\n    - Expected a <class 'NoneType'>",
        KNOWN,
    )
    assert text == "data cannot be torch.nn.Linear: it must be a TaskDataModule."


def test_what_is_not_understood_is_passed_on() -> None:
    assert explain("something new", KNOWN) == "something new"


@pytest.mark.parametrize(
    ("error", "start"),
    [
        ("You requested gpu: [0, 1]\n But your machine only has: [0]", "trainer.devices is 2, which cannot be had: "),
        ("You selected an invalid strategy name: `strategy='dmamll'`.", "trainer.strategy is 'dmamll', but must be "),
        ("No supported gpu backend found!", "trainer.accelerator is 'gpu': No supported gpu backend found! Set it to "),
        ("`max_steps` must be -1 or more.", "trainer: `max_steps` must be"),
    ],
)
def test_what_the_trainer_refuses_is_one_line_with_the_setting(error: str, start: str) -> None:
    text = explain_trainer(ValueError(error), {"devices": 2, "strategy": "dmamll", "accelerator": "gpu"})
    assert text.startswith(start)
    assert "\n" not in text


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("${fit.data.init_args.wayz}", "fit.ways refers to ${data.init_args.wayz}, but there is no such setting."),
        ("${fit.data", "another setting in a way that cannot be read"),
    ],
)
def test_a_reference_to_nothing_is_told_with_who_refers_and_to_what(value: str, expected: str) -> None:
    with pytest.raises(OmegaConfBaseException) as caught:
        OmegaConf.to_container(OmegaConf.create({"fit": {"data": {}, "ways": value}}), resolve=True)
    assert expected.removeprefix("fit.") in explain_interpolation(caught.value)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"data:\n  shots: [1, 2\nmodel: }\n", "a.yaml is not valid YAML in line 3"),
        (b"data:\n\tshots: 1\n", "a.yaml is not valid YAML in line 2, column 1"),
        (bytes(range(256)), "a.yaml is not a YAML file, or not in UTF-8"),
        (b"", "a.yaml holds no settings"),
        (b"- 1\n- 2\n", "a.yaml holds no settings"),
    ],
)
@pytest.mark.parametrize("words", [["--config", "a.yaml"], ["--config=a.yaml"], ["-c", "a.yaml"]])
def test_a_broken_file_is_named(words: list[str], content: bytes, expected: str) -> None:
    Path("a.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=expected):
        check_config_files(["fit", *words, "--trainer.max_steps", "1"])


def test_a_file_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match=r"--config is nope.yaml, but there is no such file"):
        check_config_files(["fit", "--config", "nope.yaml"])


@pytest.mark.parametrize("words", [[], ["fit"], ["fit", "--config"], ["fit", "--config", "-"]])
def test_without_a_file_there_is_nothing_to_check(words: list[str]) -> None:
    check_config_files(words)
