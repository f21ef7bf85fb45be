"""How long a user waits: for `dmaml --help`, and for the first meta-iteration of `dmaml fit`."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from benchmarks.speed.training import CONFIG, run_cli, words
from dmaml_pl.engines.compiled import CACHE_VARIABLE

SETTINGS = {
    "trainer.max_steps": 1,
    "trainer.limit_val_batches": 0,
    "meta_test": "false",
}


class FirstMetaIteration(pl.Callback):
    """Writes down when the first meta-iteration was over.

    Args:
        output: file to write `time.time` to.
    """

    def __init__(self, output: str) -> None:
        self._output = Path(output)

    def on_meta_iteration_end(self, trainer: pl.Trainer, *told: Any) -> None:
        """The first is the only one."""
        if trainer.is_global_zero:
            self._output.write_text(str(time.time()))


def measure(repeats: int = 3) -> dict[str, float]:
    """Seconds of each kind of start, by what is started; the median of some, but for the cold one."""
    with tempfile.TemporaryDirectory() as folder:
        cache = {CACHE_VARIABLE: str(Path(folder) / "cache")}
        seconds = {
            "`dmaml --help`": statistics.median(_help(Path(folder)) for _ in range(repeats)),
            "`dmaml fit`, two workers": statistics.median(_fit(Path(folder), {}) for _ in range(repeats)),
            "the same, `--model.compile true`, nothing compiled before": _fit(Path(folder), cache, compiled=True),
        }
        warm = [_fit(Path(folder), cache, compiled=True) for _ in range(repeats)]
        return seconds | {"the same, compiled before": statistics.median(warm)}


def _help(folder: Path) -> float:
    began = run_cli(["--help"], folder)
    return time.time() - began


def _fit(folder: Path, environment: dict[str, str], *, compiled: bool = False) -> float:
    output, overlay = folder / "first", folder / "overlay.yaml"
    clock = {"class_path": "benchmarks.speed.startup.FirstMetaIteration", "init_args": {"output": str(output)}}
    overlay.write_text(json.dumps({"trainer": {"callbacks": [clock]}}))
    settings = SETTINGS | {"model.compile": str(compiled).lower()}
    began = run_cli(["fit", "--config", str(CONFIG), "--config", str(overlay), *words(settings)], folder, environment)
    return float(output.read_text()) - began
