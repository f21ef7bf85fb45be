"""Real trainings by `dmaml fit`, disturbed at a chosen place."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.test_end_to_end import SMALL, Training, environment, flags

SETTINGS = SMALL | {"meta_test": "false", "trainer.val_check_interval": 4}


def fit(
    folder: Path, config: str, *words: str, disturb: dict[str, Any] | None = None, launcher: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    """`dmaml fit` in a process group of its own, disturbed by `tests/probe.py`."""
    shutil.copy(Path(__file__).with_name("probe.py"), folder)
    callbacks = [] if disturb is None else [{"class_path": "probe.Disturber", "init_args": disturb}]
    listed = [f"--trainer.callbacks={json.dumps(callbacks)}"] if callbacks else []
    return subprocess.run(
        [sys.executable, *launcher, "-m", "dmaml_pl", "fit", "--config", config, *flags(SETTINGS), *words, *listed],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        start_new_session=True,
    )


def of(folder: Path) -> Training:
    return Training(folder, [], subprocess.CompletedProcess([], 0))
