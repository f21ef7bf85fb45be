"""Every mistake of a user is one line on standard error that names what to change, before anything is trained.

All in this process: the mistakes are found before workers are started.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import yaml
from mlflow import MlflowClient

from data_modules import Sinusoid
from dmaml_pl import MAML, MLP, MetaLearning
from dmaml_pl.__main__ import main
from dmaml_pl.cli.run import run
from dmaml_pl.cli.training import DmamlCLI
from dmaml_pl.errors import ConfigError
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
from tests.recipes import small_data
from tests.test_omniglot import make_folders

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
        (
            "trainer.strategy.on_worker_failure",
            "trainer.strategy.on_worker_failure is no more: leave it out, or set trainer.strategy.elastic instead.",
        ),
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
        ("seed_everything", -5, "seed_everything is -5, but must be from 0 to 4294967295."),
        ("trainer.max_steps", -2, "trainer.max_steps is -2: "),
        ("trainer.val_check_interval", 0, "trainer.val_check_interval is 0, but must be at least 1 (runs)."),
        ("trainer.gradient_clip_val", 1.0, "trainer.gradient_clip_val is 1.0, but a run clips its own meta-gradients"),
        ("trainer.max_epochs", 0, "trainer.max_epochs is 0, but must be at least 1, or -1 "),
        ("trainer.max_time", {"minutes": -1}, "trainer.max_time is -60 s, but must be greater than 0."),
        ("trainer.max_time", "00:00:00:00", "trainer.max_time is 0 s, but must be greater than 0."),
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
        ("trainer.limit_train_batches", 0, "trainer.limit_train_batches is 0, which leaves no run of the 10 of an ep"),
        ("trainer.limit_train_batches", 0.01, "trainer.limit_train_batches is 0.01, which leaves no run of the 10 "),
        ("trainer", None, "trainer is null, but must be settings by name: leave it out for its defaults."),
        ("trainer.check_val_every_n_epoch", 0, "trainer.check_val_every_n_epoch is 0, but must be at least 1."),
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
        ("trainer.overfit_batches", 2, "trainer.overfit_batches is 2, but must be 0: every run draws tasks of its ow"),
        ("trainer.num_nodes", 2, "trainer.num_nodes is 2, but must be 1 where dmaml alone starts the workers: for mor"),
        ("trainer.accumulate_grad_batches", 4, "trainer.accumulate_grad_batches is 4, but must be 1: for a larger me"),
        ("checkpoint.monitor", "val/los", "checkpoint.monitor is val/los, but must be one of val/loss, train/loss, v"),
        ("checkpoint.monitor", "val/accuracy", "checkpoint.monitor is val/accuracy, but must be one of val/loss, tra"),
        ("checkpoint.mode", "max", "checkpoint.mode is max, but must be min for val/loss."),
        ("checkpoint.dirpath", "/proc/nope", "checkpoint.dirpath is /proc/nope, which cannot be written (No such fil"),
        ("checkpoint.dirpath", "/" + "a" * 300, f"checkpoint.dirpath is /{'a' * 300}, which cannot be written (File "),
        (f"{LOGGER}.experiment_name", "../out", "trainer.logger.init_args.experiment_name is '../out', but must be a"),
        (f"{LOGGER}.experiment_name", "/out", "trainer.logger.init_args.experiment_name is '/out', but must be a nam"),
    ],
)
def test_a_value_out_of_range_is_told_with_the_range(path: str, value: Any, expected: str, refusal: Refusal) -> None:
    assert refusal(config=changed(SINUSOID, {path: value})).startswith(expected)


def test_a_port_in_use_is_told_before_workers_start(refusal: Refusal, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setenv("MASTER_PORT", str(port))
        text = refusal(config=changed(SINUSOID, {"trainer.devices": 2}))
    assert text.startswith(f"MASTER_PORT is {port}, which cannot be used here (Address already in use): set it to anot")


def test_a_place_for_the_outcome_that_cannot_be_written_is_found_before_the_work(refusal: Refusal) -> None:
    told = ", which cannot be written (No such file or directory): set it to another one."
    config = changed(SINUSOID, {"report.folder": "/proc/nope/report", "meta_test": True})
    assert refusal(config=config) == f"report.folder is /proc/nope/report{told}"
    assert refusal("test", "--ckpt_path", "best", config=config) == f"report.folder is /proc/nope/report{told}"
    config = changed(SINUSOID, {"predictions.file": "/proc/nope/out.csv"})
    assert refusal("predict", "--ckpt_path", "best", config=config) == f"predictions.file is /proc/nope/out.csv{told}"
    Path("taken").mkdir()
    config = changed(SINUSOID, {"predictions.file": "taken"})
    assert refusal("predict", "--ckpt_path", "best", config=config).startswith("predictions.file is taken, which cann")


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("baseline_budget", -1, "report.baseline_budget is -1.0, but must be 0 or greater, and finite."),
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
    class EnoughError(Exception): ...

    def stop(*args: Any, **kwargs: Any) -> None:
        raise EnoughError

    monkeypatch.setattr(pl.Trainer, "fit", stop)
    config = changed(SINUSOID, {"checkpoint.monitor": "val/mse_step_3", "trainer.logger": False})
    Path("a.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(EnoughError):
        run(["fit", "--config", "a.yaml"])


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
        (bytes(range(256)), "--config b.yaml is not a YAML file, or not in UTF-8."),
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


def test_more_samples_than_memory_holds_are_one_line(refusal: Refusal) -> None:
    assert refusal(config=changed(SINUSOID, {f"{DATA}.shots": 10**12})).startswith("There is not enough memory. Unabl")


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


def test_a_class_of_the_users_that_ends_the_command_is_no_success(
    refusal: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(Path.cwd())
    Path("ends_all.py").write_text("import sys\nsys.exit(0)\n")
    text = refusal(config=changed(SINUSOID, {f"{MODEL}.network": {"class_path": "ends_all.Net"}}))
    assert text.startswith("ends_all has ended the command, by sys.exit or the like: let it raise an error instead.")
    Path("raises_one.py").write_text("raise RuntimeError('two\\nlines')\n")
    text = refusal(config=changed(SINUSOID, {f"{MODEL}.network": {"class_path": "raises_one.Net"}}))
    assert text.startswith("model.network cannot be raises_one.Net: two lines.")


def test_what_a_class_of_the_users_raises_before_the_work_is_one_line_with_its_place(
    refusal: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(Path.cwd())
    Path("my_classes.py").write_text(
        "from data_modules import Sinusoid\nfrom dmaml_pl import MLP\n\n\nclass Data(Sinusoid):\n"
        "    def sample_task(self, split, seed):\n        return {}['sample']\n\n\nclass Net(MLP):\n"
        "    def __init__(self):\n        raise KeyError\n"
    )
    text = refusal(config=changed(SINUSOID, {"data.class_path": "my_classes.Data"}))
    assert text.startswith(f"KeyError in {Path.cwd()}/my_classes.py, line 7: 'sample'. PYTHONDEVMODE=1 shows ")
    text = refusal(config=changed(SINUSOID, {f"{MODEL}.network": {"class_path": "my_classes.Net"}}))
    assert text == "model.network is Net, which cannot be made: KeyError."


def test_a_variable_that_names_what_is_not_there_is_told(refusal: Refusal, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in LSF.items():
        monkeypatch.setenv(name, value)
    text = refusal(config=SINUSOID)
    assert text == "trainer: [Errno 2] No such file or directory: '/nope' (LSB_DJOB_RANKFILE)"


# ---- data


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"ways": 47}, "data.ways is 47, but the val split of Glyphs has 46 classes: choose 2 to 46."),
        ({"ways": 1}, "data.ways is 1, but a task needs at least 2 classes to tell apart."),
        (
            {"shots": 20},
            "data.shots + data.queries is 20 + 5, but a class of Glyphs has 24 samples: choose them to be ",
        ),
    ],
)
def test_tasks_that_the_data_cannot_give_are_refused(settings: dict[str, int], expected: str, refusal: Refusal) -> None:
    config = changed(GLYPHS, {f"{DATA}.{name}": value for name, value in settings.items()})
    assert refusal(config=config).startswith(expected)


def test_a_data_folder_that_is_missing_is_named_with_what_is_expected_in_it(refusal: Refusal) -> None:
    text = refusal(config=OMNIGLOT)
    assert text.startswith("data.root (omniglot) does not hold Omniglot: images_background and images_evaluation are ")


def test_a_data_folder_without_pictures_is_named(refusal: Refusal) -> None:
    for part in ("images_background", "images_evaluation"):
        Path("omniglot", part).mkdir(parents=True)
    assert refusal(config=OMNIGLOT).startswith("omniglot/images_background holds no pictures: ")


def test_a_picture_that_is_corrupt_is_named(refusal: Refusal) -> None:
    make_folders(Path("omniglot"))
    picture = sorted(Path("omniglot").rglob("*.png"))[7]
    picture.write_bytes(picture.read_bytes()[:60])
    assert refusal(config=changed(OMNIGLOT, {f"{DATA}.cache_dir": "cache"})).startswith(
        f"{picture} is not a picture that can be read"
    )


@pytest.mark.parametrize(("command", "split"), [("fit", "val"), ("fit", "test"), ("validate", "val")])
def test_fewer_tasks_than_workers_are_refused_before_workers_are_started(
    command: str, split: str, refusal: Refusal
) -> None:
    config = changed(SINUSOID, {f"{DATA}.{split}_tasks": 1, "trainer.devices": 2, "meta_test": True})
    assert refusal(command, config=config).startswith(f"data.{split}_tasks is 1, but there are 2 workers to share the ")


# ---- network, objective and data that do not fit together


@pytest.mark.parametrize(
    ("config", "settings", "expected"),
    [
        (
            GLYPHS,
            {f"{MODEL}.network": {"class_path": "dmaml_pl.networks.MLP"}},
            "model.network cannot take samples of shape (1, 28, 28) ",
        ),
        (
            GLYPHS,
            {f"{DATA}.ways": 10},
            "The network's output has shape (10, 5), but the tasks have 10 ways: set the network's ways",
        ),
        (
            GLYPHS,
            {f"{MODEL}.objective": "regression"},
            "The network's output has shape (5, 5), but the targets (5,): set the network's number of outputs",
        ),
        (
            SINUSOID,
            {f"{MODEL}.objective": "classification"},
            "model.objective is classification, but the data has real targets: set it to regression.",
        ),
        (
            SINUSOID,
            {f"{MODEL}.network.init_args.outputs": 2},
            "The network's output has shape (10, 2), but the targets (10, 1): set the network's number of outputs",
        ),
    ],
)
def test_a_network_that_does_not_fit_the_data_is_refused(
    config: dict[str, Any], settings: dict[str, Any], expected: str, refusal: Refusal
) -> None:
    assert refusal(config=changed(config, settings)).startswith(expected)


class InPlace(torch.nn.Linear):
    """Changes the samples that it is given."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.mul_(2.0))


class NoNumber(torch.nn.Linear):
    """Gives what no training can mend."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * float("nan")


class Broken(torch.nn.Linear):
    """Gives what PyTorch cannot differentiate."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x).exp()
        return y.mul_(2.0) if torch.is_grad_enabled() else y


@pytest.mark.parametrize(
    ("network", "expected"),
    [
        (InPlace(1, 1), "model.network is InPlace, which changes the samples that it is given: "),
        (
            NoNumber(1, 1),
            "model.network is NoNumber, which gives values that are not finite numbers before any trainin",
        ),
        (Broken(1, 1), "No engine can run model.network with model.algorithm: Broken cannot be adapted ("),
    ],
)
def test_a_users_network_that_cannot_be_trained_is_told(network: torch.nn.Module, expected: str) -> None:
    with pytest.raises(ConfigError) as refused:
        MetaLearning(network, MAML()).check_task(small_data().evaluation_task("val", 0))
    assert str(refused.value).startswith(expected)


# ---- tracking


def test_a_tracking_server_that_does_not_answer_is_named(refusal: Refusal) -> None:
    text = refusal(config=changed(SINUSOID, {f"{LOGGER}.tracking_uri": "http://127.0.0.1:9"}))
    assert text.startswith("No MLflow server can be used at http://127.0.0.1:9: Connection refused.")
    assert "set trainer.logger.init_args.tracking_uri" in text


@pytest.mark.parametrize("folder", ["mlruns", "/proc/nope"])
def test_a_tracking_store_that_cannot_be_written_is_named(folder: str, refusal: Refusal) -> None:
    Path("mlruns").write_text("not a folder")
    text = refusal(config=changed(SINUSOID, {f"{LOGGER}.save_dir": folder}))
    assert text.startswith("The tracking store ")
    assert text.endswith("Set trainer.logger.init_args.save_dir to a folder that can be written.")


def _statuses() -> list[str]:
    client = MlflowClient("sqlite:///mlruns/mlflow.db")
    (experiment,) = [e for e in client.search_experiments() if e.name == "dmaml"]
    return [found.info.status for found in client.search_runs([experiment.experiment_id])]


def test_a_tracker_that_cannot_be_opened_leaves_no_other_one_running(refusal: Refusal) -> None:
    good = SINUSOID["trainer"]["logger"]
    bad = changed(good, {"init_args.tracking_uri": "http://127.0.0.1:9"})
    refusal(config=changed(SINUSOID, {"trainer.logger": [good, bad]}))
    assert _statuses() == ["FAILED"]


def test_an_error_after_the_training_does_not_leave_its_mlflow_run_finished(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: DmamlCLI) -> None:
        raise ConfigError("too late")

    monkeypatch.setattr(DmamlCLI, "after_fit", fail)
    Path("a.yaml").write_text(yaml.safe_dump(changed(SINUSOID, {"trainer.limit_val_batches": 0})))
    assert run(["fit", "--config", "a.yaml"]) == 1
    assert capfd.readouterr().err.endswith("dmaml: error: too late\n")
    assert _statuses() == ["FAILED"]


# ---- devices and workers


@pytest.mark.parametrize(
    ("gpus", "settings", "expected"),
    [
        (
            0,
            {"accelerator": "cuda"},
            "trainer.accelerator is 'cuda', but must be auto, cpu, or one that this machine has: ",
        ),
        (1, {"accelerator": "cuda", "devices": 4}, "trainer.devices is 4, which cannot be had: "),
        (0, {"devices": 0}, "trainer.devices is 0, which cannot be had: "),
        (
            0,
            {"strategy": "ddp", "devices": 2},
            "trainer.strategy is DDPStrategy, which does not know about runs: with ",
        ),
    ],
)
def test_devices_and_strategies_that_cannot_be_had_are_refused(
    gpus: int, settings: dict[str, Any], expected: str, refusal: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    config = changed(SINUSOID, {f"trainer.{name}": value for name, value in settings.items()})
    assert refusal(config=config).startswith(expected)


# ---- a user's own data


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("ImageFolder", {}, "Not set: data.root, which data_modules.ImageFolder needs."),
        ("ImageFolder", {"root": "none"}, "data.root is none, but there is no such folder: root/CLASS/PICTURE"),
        (
            "ImageFolder",
            {"root": ".", "image_size": 10**6},
            "data.image_size is 1000000, but must be at most 10,000.",
        ),
        ("ImageFolder", {"root": ".", "channels": 2}, "data.channels is '2', but must be one of 1, 3."),
        ("ImageFolder", {"root": ".", "fit": "cut"}, "data.fit is 'cut', but must be one of 'crop', 'pad', 'stretch'."),
        ("MiniImageNet", {"root": "none"}, "data.root (none) does not hold mini-ImageNet: expected are "),
        ("Tabular", {"path": "a.csv"}, "Not set: data."),
        (
            "Tabular",
            {"path": "none.csv", "task_column": "t", "inputs": ["x"], "targets": ["y"]},
            "data.path is none.csv, but there is no such file: a CSV or Parquet file is expected.",
        ),
    ],
)
def test_own_data_that_cannot_be_used_is_told_before_anything_is_trained(
    name: str, settings: dict[str, Any], expected: str, refusal: Refusal
) -> None:
    data = {"class_path": f"data_modules.{name}", "init_args": settings}
    assert refusal(config=GLYPHS | {"data": data}).startswith(expected)


def test_windows_is_told_where_it_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    assert main(["fit", "--config", "sinusoid"]) == 1
    told = "dmaml forks its workers, which Windows cannot: run it in WSL, Windows' own Linux."
    assert capsys.readouterr().err == f"dmaml: error: {told}\n"


def test_a_port_that_is_none_is_told_with_its_range(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ui", "--port", "99999"]) == 1
    told = "--port is 99999, but must be a whole number from 0 to 65535. dmaml ui --help lists all."
    assert capsys.readouterr().err == f"dmaml: error: {told}\n"
