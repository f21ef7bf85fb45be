"""Every mistake of a user is one line on standard error that names what to change, before anything is trained.

All in this process: the mistakes are found before workers are started.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import yaml

from data_modules import Navigation2D, Sinusoid
from dmaml_pl import MAML, MLP, MetaLearning, MetaTestReport, PolicyGradient, RunCheckpoint
from dmaml_pl.cli.preflight import check_before
from dmaml_pl.cli.run import INTERRUPTED, run
from dmaml_pl.errors import ConfigError, in_one_line
from tests.bad_input import (  # noqa: F401 - two are fixtures
    DATA,
    GLYPHS,
    INNER,
    LOGGER,
    MODEL,
    OMNIGLOT,
    SINUSOID,
    STRATEGY,
    VIT,
    Refusal,
    as_the_user_left_it,
    changed,
    make_refusal,
)
from tests.recipes import small_data, small_maml, small_trainer

BOMB = b"a0: &a0 [x]\n" + b"".join(
    b"a%d: &a%d [%s]\n" % (n, n, b",".join([b"*a%d" % (n - 1)] * 9)) for n in range(1, 9)
)


LSF = {
    "LSB_JOBID": "1",
    "LSB_DJOB_RANKFILE": "/nope",
    "JSM_NAMESPACE_LOCAL_RANK": "0",
    "JSM_NAMESPACE_SIZE": "1",
}
STOPPING = {"class_path": "pytorch_lightning.callbacks.EarlyStopping", "init_args": {"monitor": "val/nope"}}


# ---- settings that do not exist


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("nonsense", "nonsense is not a setting."),
        ("trainer.loger.save_dir", "trainer.loger is not a setting. Did you mean trainer.logger?"),
        ("trainer.max_stepz", "trainer.max_stepz is not a setting. Did you mean trainer.max_steps?"),
        (
            "model.run_lenght",
            "model.run_lenght is not a setting of dmaml_pl.MetaLearning. Did you mean run_length? It has: ",
        ),
        (
            f"{MODEL}.run_lenght",
            "model.run_lenght is not a setting of dmaml_pl.MetaLearning. Did you mean run_length? It has: ",
        ),
        (f"{DATA}.shot", "data.shot is not a setting of data_modules.Sinusoid. Did you mean shots? It has: "),
    ],
)
def test_a_setting_that_does_not_exist_is_refused_on_the_command_line(
    name: str, expected: str, refusal: Refusal
) -> None:
    assert refusal(f"--{name}", "3", config=SINUSOID).startswith(expected)


@pytest.mark.parametrize(
    ("path", "misspelt", "expected"),
    [
        ("trainer", "trainr", "trainr is not a setting. Did you mean trainer?"),
        ("trainer.max_steps", "max_step", "trainer.max_step is not a setting. Did you mean trainer.max_steps?"),
        (
            f"{INNER}.inner_lr",
            "iner_lr",
            "model.algorithm.iner_lr is not a setting of dmaml_pl.MAML. Did you mean inner_lr?",
        ),
        (
            f"{MODEL}.meta_optimizer.init_args.lr",
            "lrr",
            "model.meta_optimizer.lrr is not a setting of torch.optim.Adam",
        ),
        (f"{LOGGER}.system_metrics", "system", "trainer.logger.system is not a setting of dmaml_pl.MLflowTracker."),
    ],
)
def test_a_misspelt_setting_in_a_file_is_refused(path: str, misspelt: str, expected: str, refusal: Refusal) -> None:
    assert refusal(config=changed(SINUSOID, {f"~{path}": misspelt})).startswith(expected)


@pytest.mark.parametrize(
    ("path", "misspelt", "meant"),
    [
        ("data.class_path", "data_modules.Sinus", "data_modules.Sinusoid"),
        (f"{MODEL}.network.class_path", "dmaml_pl.networks.MPL", "dmaml_pl.networks.MLP"),
        (f"{MODEL}.network.class_path", "dmaml_pl.network.MLP", "dmaml_pl.MLP"),
        (f"{MODEL}.meta_optimizer.class_path", "torch.optim.Adamm", "torch.optim.Adam"),
        (f"{STRATEGY}.merge.class_path", "dmaml_pl.MeanMerg", "dmaml_pl.MeanMerge"),
        ("trainer.logger.class_path", "dmaml_pl.MLFlowTracker", "dmaml_pl.MLflowTracker"),
        ("trainer.strategy", "dmaml_pl.DMAMLStrategi", "dmaml_pl.DMAMLStrategy"),
    ],
)
def test_a_misspelt_class_path_comes_with_the_nearest_one(
    path: str, misspelt: str, meant: str, refusal: Refusal
) -> None:
    text = refusal(config=changed(SINUSOID, {path: misspelt}))
    setting = path.removesuffix(".class_path").replace(".init_args", "")
    assert text.startswith(f"{setting} cannot be {misspelt}: ")
    assert text.endswith(f"Did you mean {meant}?")


def test_a_class_without_a_setting_that_it_needs_is_refused(refusal: Refusal) -> None:
    text = refusal(config=SINUSOID | {"model": {"class_path": "dmaml_pl.MetaLearning"}})
    assert text == "Not set: model.network, which dmaml_pl.MetaLearning needs."


def test_a_class_of_another_kind_is_refused(refusal: Refusal) -> None:
    text = refusal(config=changed(SINUSOID, {"data.class_path": "torch.nn.Linear"}))
    assert text == "data cannot be torch.nn.Linear: it must be a TaskDataModule."


# ---- values that a setting does not take


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("seed_everything", "abc", "seed_everything is 'abc', but must be of type bool or int."),
        (f"{INNER}.inner_steps", 1.5, "model.algorithm.inner_steps is '1.5', but must be of type int."),
        (f"{MODEL}.network.init_args.hidden", "wide", "model.network.hidden is 'wide', but must be of type list."),
        (
            f"{MODEL}.meta_optimizer.init_args.lr",
            "quick",
            "model.meta_optimizer.lr is 'quick', but must be of type float or the class path of a Tensor.",
        ),
        (
            f"{MODEL}.objective",
            "clasification",
            "model.objective is 'clasification', but must be one of 'regression', 'classification' or the class path",
        ),
        ("trainer.precision", "8", "trainer.precision is '8', but must be one of 64, 32, 16, 'transformer-engine', "),
    ],
)
def test_a_value_of_another_type_or_choice_is_told_with_what_it_may_be(
    path: str, value: Any, expected: str, refusal: Refusal
) -> None:
    assert refusal(config=changed(SINUSOID, {path: value})).startswith(expected)


def test_a_learning_rate_of_0_is_refused_with_its_value(refusal: Refusal) -> None:
    told = refusal(config=changed(SINUSOID, {f"{MODEL}.meta_optimizer.init_args.lr": 0.0}))
    assert told == "model.meta_optimizer.lr is 0.0, but must be greater than 0."


@pytest.mark.parametrize(
    ("make", "setting"),
    [
        (lambda: MAML(inner_steps=0), "model.algorithm.inner_steps is 0"),
        (lambda: MAML(inner_lr=-0.1), "model.algorithm.inner_lr is -0.1"),
        (lambda: MAML(inner_lr=float("nan")), "model.algorithm.inner_lr is nan"),
        (lambda: MetaLearning(MLP(), run_length=0), "model.run_length is 0"),
        (lambda: MetaLearning(MLP(), evaluation_steps=-1), "model.evaluation_steps is -1"),
        (lambda: MetaLearning(MLP(), gradient_clip=0.0), "model.gradient_clip is 0.0"),
        (lambda: Sinusoid(shots=0), "data.shots is 0"),
        (lambda: Sinusoid(queries=-1), "data.queries is -1"),
        (lambda: Sinusoid(meta_batch=0), "data.meta_batch is 0"),
        (lambda: Sinusoid(val_tasks=0), "data.val_tasks is 0"),
        (lambda: Sinusoid(runs_per_epoch=0), "data.runs_per_epoch is 0"),
    ],
)
def test_every_class_refuses_what_must_be_positive_by_the_name_of_its_setting(
    make: Callable[[], object], setting: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        make()
    assert str(refused.value) == f"{setting}, but must be greater than 0."


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        (f"{INNER}.inner_lr", float("inf"), "model.algorithm.inner_lr is inf, but must be finite."),
        (
            f"{MODEL}.meta_optimizer.init_args.lr",
            -0.1,
            "model.meta_optimizer refuses a setting: Invalid learning rate: -0.1.",
        ),
        ("trainer.num_nodes", 2, "trainer.num_nodes is 2, but must be 1 where dmaml alone starts the workers: for mor"),
        ("seed_everything", -5, "seed_everything is -5, but must be from 0 to 4294967295."),
        ("trainer.max_steps", -2, "trainer.max_steps is -2: "),
        (f"{DATA}.runs_per_epoch", 2**40, "data.runs_per_epoch is 1099511627776, but must be at most 1,000,000,000."),
        ("report.tasks", 1000, "report.tasks is 1000, but must be at most 100."),
        (
            "trainer.accelerator",
            "tpu",
            "trainer.accelerator is 'tpu', but must be auto, cpu, or one that this machine has",
        ),
        (
            f"{MODEL}.meta_schedule",
            {"class_path": "torch.optim.lr_scheduler.LinearLR", "init_args": {"start_factor": 0.0}},
            "model.meta_schedule refuses a setting: Starting multiplicative factor expected to be greater than 0 and ",
        ),
        ("trainer", None, "trainer is null, but must be settings by name: leave it out for its defaults."),
        ("report", [1], "report is [1], but must be settings by name: leave it out for its defaults."),
        ("trainer.barebones", True, "trainer.barebones is True: "),
        (
            "trainer.callbacks",
            [STOPPING],
            "trainer.callbacks has EarlyStopping, whose monitor is val/nope, but must be",
        ),
        (
            "trainer.callbacks",
            [{"class_path": "dmaml_pl.RunCheckpoint"}],
            "trainer.callbacks is ['RunCheckpoint', 'RunC",
        ),
        (f"{STRATEGY}.timeout", 0, "trainer.strategy.timeout is 0, but must be from 1 to 10,000,000 (s)."),
        (f"{STRATEGY}.timeout", 1e-9, "trainer.strategy.timeout is 1e-09, but must be from 1 to 10,000,000 (s)."),
        (f"{STRATEGY}.timeout", 1e300, "trainer.strategy.timeout is 1e+300, but must be from 1 to 10,000,000 (s)."),
        (
            f"{STRATEGY}.process_group_backend",
            "nope",
            "trainer.strategy.process_group_backend is nope, but must be gloo",
        ),
        (
            f"{STRATEGY}.process_group_backend",
            "nccl",
            "trainer.strategy.process_group_backend is nccl, but must be gloo",
        ),
        (
            f"{MODEL}.meta_schedule",
            {"class_path": "torch.optim.lr_scheduler.LRScheduler"},
            "model.meta_schedule refuses a setting: NotImplementedError.",
        ),
        (
            f"{LOGGER}.tracking_uri",
            "sqlite:////proc/x.db",
            "The tracking store /proc/x.db cannot be opened: [Errno 2] ",
        ),
        (f"{LOGGER}.experiment_name", "../out", "trainer.logger.init_args.experiment_name is '../out', but must be a"),
        (f"{LOGGER}.experiment_name", "/out", "trainer.logger.init_args.experiment_name is '/out', but must be a nam"),
    ],
)
def test_a_value_out_of_range_is_told_with_the_range(path: str, value: Any, expected: str, refusal: Refusal) -> None:
    assert refusal(config=changed(SINUSOID, {path: value})).startswith(expected)


@pytest.mark.parametrize(
    ("setting", "value", "expected"),
    [
        ("trainer.val_check_interval", 0, "trainer.val_check_interval is 0, but must be at least 1 (runs)."),
        ("trainer.gradient_clip_val", 1.0, "trainer.gradient_clip_val is 1.0, but a run clips its own meta-gradients"),
        ("trainer.max_epochs", 0, "trainer.max_epochs is 0, but must be at least 1, or -1 "),
        ("trainer.min_steps", 50, "trainer.min_steps is 50, but must be at most trainer.max_steps, 1."),
        (
            "trainer.val_check_interval",
            "00:01:00:00",
            "trainer.val_check_interval is a time, but must be a number of ru",
        ),
        ("trainer.max_time", {"minutes": -1}, "trainer.max_time is -60 s, but must be greater than 0."),
        ("trainer.max_time", "00:00:00:00", "trainer.max_time is 0 s, but must be greater than 0."),
        ("trainer.limit_train_batches", 0, "trainer.limit_train_batches is 0, which leaves no run of the 10 of an ep"),
        ("trainer.limit_train_batches", 0.01, "trainer.limit_train_batches is 0.01, which leaves no run of the 10 "),
        ("trainer.check_val_every_n_epoch", 0, "trainer.check_val_every_n_epoch is 0, but must be at least 1."),
        ("trainer.overfit_batches", 2, "trainer.overfit_batches is 2, but must be 0: every run draws tasks of its ow"),
        ("trainer.accumulate_grad_batches", 4, "trainer.accumulate_grad_batches is 4, but must be 1: for a larger me"),
        ("checkpoint.monitor", "val/los", "checkpoint.monitor is val/los, but must be one of val/loss, train/loss, v"),
        ("checkpoint.monitor", "val/accuracy", "checkpoint.monitor is val/accuracy, but must be one of val/loss, tra"),
        ("checkpoint.mode", "max", "checkpoint.mode is max, but must be min for val/loss."),
        ("checkpoint.dirpath", "/proc/nope", "checkpoint.dirpath is /proc/nope, which cannot be written (No such fil"),
        ("checkpoint.dirpath", "/" + "a" * 300, f"checkpoint.dirpath is /{'a' * 300}, which cannot be written (File "),
    ],
)
def test_a_setting_of_the_trainer_out_of_range_is_told_with_the_range(setting: str, value: Any, expected: str) -> None:
    group, _, name = setting.partition(".")
    kept = RunCheckpoint(**({name: value} if group == "checkpoint" else {}))
    settings: dict[str, Any] = {
        "max_steps": 1,
        "val_check_interval": 1,
        "check_val_every_n_epoch": None,
        "limit_val_batches": None,
    }
    settings |= {"enable_checkpointing": True, "callbacks": kept} | ({name: value} if group == "trainer" else {})
    trainer = small_trainer(**settings)
    with pytest.raises(ConfigError) as refused:
        check_before("fit", trainer, small_maml(), small_data(), meta_test=False)
    assert str(refused.value).startswith(expected)


def test_a_place_for_the_outcome_that_cannot_be_written_is_found_before_the_work(refusal: Refusal) -> None:
    told = ", which cannot be written (No such file or directory): set it to another one."
    config = changed(SINUSOID, {"report.folder": "/proc/nope/report", "meta_test": True})
    assert refusal(config=config) == f"report.folder is /proc/nope/report{told}"
    assert refusal("test", "--ckpt_path", "best", config=config) == f"report.folder is /proc/nope/report{told}"
    config = changed(SINUSOID, {"predictions.file": "/proc/nope/out.csv"})
    assert refusal("predict", "--ckpt_path", "best", config=config) == f"predictions.file is /proc/nope/out.csv{told}"
    Path("taken").mkdir()
    config = changed(SINUSOID, {"predictions.file": "taken"})
    assert refusal("predict", "--ckpt_path", "best", config=config).startswith("predictions.file is taken, which is")


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("baseline_budget", -1, "report.baseline_budget is -1.0, but must be 0 or greater."),
        ("tasks", 0, "report.tasks is 0, but must be greater than 0."),
    ],
)
def test_a_report_that_cannot_be_made_is_refused(name: str, value: float, expected: str, refusal: Refusal) -> None:
    assert refusal(config=changed(SINUSOID, {f"report.{name}": value})) == expected


def test_a_validation_that_would_never_come_in_an_epoch_is_refused(refusal: Refusal) -> None:
    config = changed(SINUSOID, {"trainer.val_check_interval": 50, "trainer.check_val_every_n_epoch": 1})
    assert refusal(config=config).startswith(
        "trainer.val_check_interval is 50, but an epoch has 10 runs: set it to 1 to 10, "
    )


def test_the_metric_after_any_adaptation_step_may_be_monitored(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pl.Trainer, "fit", stop)
    config = changed(SINUSOID, {"checkpoint.monitor": "val/mse_step_3", "trainer.logger": False})
    Path("a.yaml").write_text(yaml.safe_dump(config))
    assert run(["fit", "--config", "a.yaml"]) == INTERRUPTED


def test_a_default_that_a_config_with_references_cannot_hold_is_named_with_what_to_set(refusal: Refusal) -> None:
    network = {"class_path": "torchvision.models.VisionTransformer", "init_args": VIT}
    config = changed(SINUSOID, {f"{MODEL}.network": network, f"{DATA}.val_tasks": "${data.init_args.meta_batch}"})
    said = refusal(config=config)
    assert said.startswith(
        "model.network.norm_layer is functools.partial(<class 'torch.nn.modules.normalization.LayerN"
    )
    assert said.endswith("cannot hold: set it to a class path, such as torch.nn.modules.normalization.LayerNorm.")
    config = changed(config, {f"{MODEL}.network.init_args.norm_layer": "torch.nn.LayerNorm"})
    assert refusal(config=config).startswith("model.network cannot take samples of shape (1,)")


# ---- files and references


def test_a_config_file_that_is_not_there_is_named(refusal: Refusal) -> None:
    assert refusal("fit", "--config", "n" * 300) == f"--config {'n' * 300} cannot be read: File name too long."
    assert refusal("fit", "--config", "nope.yaml").startswith("--config is nope.yaml, but there is no such file.")


def test_a_config_comes_from_a_file_or_by_the_shells_pipes_and_nothing_else_is_waited_for(refusal: Refusal) -> None:
    os.mkfifo("p.yaml")  # which nobody writes
    for endless in ("p.yaml", "/dev/zero"):
        told = f"--config is {endless}, which is no file, and may never end or never come: give a file, /dev/stdin, or "
        assert refusal("fit", "--config", endless).startswith(told)
    reader, writer = os.pipe()
    os.write(writer, b"trainer:\n  max_epochs: 0\n")
    os.close(writer)
    said = refusal("--config", f"/dev/fd/{reader}", config=SINUSOID)
    os.close(reader)
    assert said.startswith("trainer.max_epochs is 0, but must be at least 1")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"data:\n  shots: [1, 2\nmodel: }\n", "--config b.yaml is not valid YAML in line 3, column 6: "),
        (b"data:\n\tshots: 1\n", "--config b.yaml is not valid YAML in line 2, column 1: "),
        (bytes(range(256)), "--config b.yaml is not a YAML file, or not in UTF-8 ("),
        (
            b"data:\n  shots: 1\n  shots: 2\n",
            "--config b.yaml has shots twice in one place, in lines 2 and 3: leave one",
        ),
        (b"data: 1\nmodel: 2\ndata: 3\n", "--config b.yaml has data twice in one place, in lines 1 and 3: leave one"),
        (b'data: 1\nmodel: "a\\0b"\n', "--config b.yaml has a NUL character in line 2: leave it out."),
        (b"#" * 1_000_001, "--config b.yaml has 1,000,001 bytes, but a configuration has at most 1,000,000."),
        (
            b"data: &a\n  init_args: *a\n",
            "--config b.yaml has a value that holds itself, in line 1: leave its reference",
        ),
        (BOMB, "--config b.yaml has more than 100,000 values, those repeated by references (*NAME) counted."),
        (b"data: " + b"[" * 900 + b"]" * 900, "--config b.yaml is nested too deeply to be read."),
        (b"? [1, 2]\n: 3\n", "--config b.yaml has a setting in line 1 whose name is no text."),
        (
            b"data: !!python/tuple [1]\n",
            "--config b.yaml is not valid YAML in line 1, column 7: could not determine a ",
        ),
        (b"data:\n  <<: 3\n", "--config b.yaml is not valid YAML in line 2, column 7: expected a mapping or list of "),
        (b"day: 2020-13-45\n", "--config b.yaml is not a YAML file, or not in UTF-8 (month must be in 1..12"),
        (b"", "--config b.yaml holds no settings"),
        (b"- 1\n", "--config b.yaml holds no settings"),
    ],
)
def test_a_config_file_that_is_broken_is_named_with_the_line(content: bytes, expected: str, refusal: Refusal) -> None:
    Path("b.yaml").write_bytes(content)
    assert refusal("--config", "b.yaml", config=SINUSOID).startswith(expected)


def test_a_reference_to_a_setting_that_is_not_there_is_told_with_both(refusal: Refusal) -> None:
    text = refusal(config=changed(SINUSOID, {f"{DATA}.shots": "${data.init_args.shotz}"}))
    assert text == "data.shots refers to ${data.init_args.shotz}, but there is no such setting."


def test_a_name_that_is_no_text_is_no_setting(refusal: Refusal) -> None:
    assert refusal(config=SINUSOID | {1: 2}) == "1 is not a setting. dmaml COMMAND --help lists all."


def test_more_steps_than_one_task_can_be_tried_with_are_refused(refusal: Refusal) -> None:
    text = refusal(config=changed(SINUSOID, {f"{INNER}.inner_steps": 10**9}))
    assert text == "model.algorithm.inner_steps is 1000000000, but must be at most 10,000."


def test_what_must_not_be_negative_is_no_nan_either() -> None:
    for value in (-1.0, float("nan")):
        with pytest.raises(ConfigError, match=f"model.objective.inner_penalty is {value}, but must be 0 or greater."):
            PolicyGradient(inner_penalty=value)
    with pytest.raises(ConfigError, match=r"report.baseline_budget is inf, but must be 0 or greater, and finite\."):
        MetaTestReport(baseline_budget=float("inf"))
    with pytest.raises(ConfigError, match=r"data.half_width is nan, but must be greater than 0\."):
        Navigation2D(half_width=float("nan"))


def test_more_samples_than_memory_holds_are_one_line() -> None:
    told = r"^There is not enough memory \(.*4 TiB\): make the network, a task or data.meta_batch smaller\.$"
    for error in (MemoryError("Unable to allocate 4 TiB"), RuntimeError("err == 0. can't allocate memory: 4 TiB")):
        with pytest.raises(ConfigError, match=told), in_one_line():
            raise error


def test_without_a_config_file_it_says_what_is_not_set(refusal: Refusal) -> None:
    assert refusal("fit") == "Not set: data, model. Give a --config file, such as --config sinusoid."


# ---- the command


def test_a_misspelt_command_comes_with_the_nearest_one(refusal: Refusal) -> None:
    assert refusal("fitt", config=SINUSOID) == "fitt is not a command. Did you mean fit? dmaml --help lists all."


@pytest.mark.parametrize("words", [[], ["fit"]])
def test_a_setting_before_the_command_is_refused(words: list[str], refusal: Refusal) -> None:
    Path("a.yaml").write_text(yaml.safe_dump(SINUSOID))
    assert refusal("--config", "a.yaml", *words).startswith("A command comes first: dmaml fit --config FILE.")


def test_a_file_without_config_before_it_is_told_how_to_give_it(refusal: Refusal) -> None:
    assert refusal("fit", "a.yaml").endswith("Did you mean --config a.yaml?")


def test_a_setting_without_a_value_is_named(refusal: Refusal) -> None:
    text = refusal("--trainer.max_steps", config=SINUSOID)
    assert text == "trainer.max_steps has no value: give one after --trainer.max_steps."
