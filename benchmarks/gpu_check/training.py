"""Trainings by `dmaml fit`, watched from a callback: the MAML paper's Omniglot for as long as there is time."""

from __future__ import annotations

import json
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import yaml

from benchmarks.gpu_check.sections import Row, Setting, Tell, attempt
from benchmarks.speed.training import ROOT
from dmaml_pl.__main__ import main

WHOLE = 60_000
"""Meta-iterations of the paper's training."""

SPARE = 5.0
"""Seconds that the end of a training may take."""


class Watch(pl.Callback):
    """Writes down how far a training has come after each run, and ends it in time.

    Args:
        output: file that a line of JSON is added to for each run.
        ends: the time (`time.monotonic`) after which no further run begins.
    """

    def __init__(self, output: str, ends: float) -> None:
        self._output, self._ends, self._began = Path(output), ends, time.monotonic()

    def on_run_end(self, trainer: pl.Trainer, pl_module: Any, report: Any) -> None:
        """Between two runs."""
        group = torch.distributed.is_initialized()
        line = {
            "at": time.monotonic() - self._began,
            "step": trainer.global_step,
            "loss": float(report["loss"]),
            "engine": pl_module.engine_in_use,
            "backend": torch.distributed.get_backend() if group else "none",
            "workers": trainer.world_size,
            "accuracy": float(trainer.callback_metrics.get("val/accuracy", float("nan"))),
        }
        with self._output.open("a") as file:
            file.write(json.dumps(line) + "\n")
        if time.monotonic() > self._ends:
            trainer.should_stop = True


def train(
    config: str,
    setting: Setting,
    trainer: dict[str, Any],
    *,
    run_length: int,
    seconds: float,
    change: dict[str, Any] | None = None,
) -> list[Row]:
    """What `Watch` saw of a training of a shipped configuration; without MLflow, which is not there.

    Args:
        config: its name.
        setting: of the section.
        trainer: settings of the Trainer that differ.
        run_length: H.
        seconds: after which no further run begins.
        change: other settings that differ, by the names of their groups.

    Raises:
        RuntimeError: the training failed; what it said is in the log.
    """
    settings = yaml.safe_load((ROOT / "configs" / f"{config}.yaml").read_text())
    with tempfile.TemporaryDirectory() as folder:
        seen, own = Path(folder, "seen.jsonl"), Path(folder, "config.yaml")
        watch = {"output": str(seen), "ends": time.monotonic() + min(seconds, setting.left - SPARE)}
        settings["trainer"] |= trainer | {
            "accelerator": setting.device,
            "logger": False,
            "callbacks": [{"class_path": "benchmarks.gpu_check.training.Watch", "init_args": watch}],
            "enable_progress_bar": False,
        }
        settings["trainer"]["strategy"]["init_args"]["run_length"] = run_length
        for group, values in (change or {}).items():
            settings[group] = values
        settings |= {"meta_test": False, "report": {"folder": folder}}
        settings["checkpoint"] = settings.get("checkpoint", {}) | {"dirpath": folder}
        own.write_text(yaml.safe_dump(settings))
        if main(["fit", "--config", str(own)]):
            raise RuntimeError("dmaml fit failed, as the log says")
        return [json.loads(line) for line in seen.read_text().splitlines()]


def training(setting: Setting, tell: Tell) -> None:
    """The paper's Omniglot, not compiled for a quarter of the time, then as `model.compile: auto` has it.

    The first run, in which is compiled, is told apart.
    """
    attempt(tell, {"what": "not compiled"}, partial(_omniglot, setting, setting.left / 4, {"compile": False}))
    attempt(tell, {"what": "compile: auto"}, partial(_omniglot, setting, setting.left, {}))


def _omniglot(setting: Setting, seconds: float, change: Row) -> Row:
    settings = yaml.safe_load((ROOT / "configs" / "paper" / "omniglot.yaml").read_text())
    data, model, trainer = settings["data"], settings["model"], {"devices": 1}
    model["init_args"] |= change
    if setting.omniglot is None:
        data["class_path"] = "data_modules.Glyphs"
        del data["init_args"]["root"]
    else:
        data["init_args"]["root"] = str(setting.omniglot.resolve())
    if setting.small:
        data["init_args"] |= {"meta_batch": 2, "val_tasks": 2, "test_tasks": 2}
        model["init_args"]["network"]["init_args"]["filters"] = 4
        trainer |= {"max_steps": 8, "val_check_interval": 2}
    seen = train(
        "paper/omniglot",
        setting,
        trainer,
        run_length=2 if setting.small else 100,
        seconds=seconds,
        change={"data": data, "model": model},
    )
    first, last = seen[0], seen[-1]
    row: Row = {
        "data": "Omniglot" if setting.omniglot else "Glyphs",
        "engine": last["engine"],
        "meta-iterations": last["step"],
        "first run, s": f"{first['at']:.1f}",
    }
    if last is first:
        return row | {"failed": "there was time for one run only"}
    rate = (last["step"] - first["step"]) / (last["at"] - first["at"])
    return row | {
        "a second": f"{rate:.1f}",
        "minutes for 60,000": f"{(first['at'] + (WHOLE - first['step']) / rate) / 60:.1f}",
        "loss": f"{first['loss']:.3f} to {last['loss']:.3f}",
        "validation accuracy": f"{last['accuracy']:.4f}",
    }
