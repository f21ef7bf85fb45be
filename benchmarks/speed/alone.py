"""A part of the benchmark in a process of its own, in which nothing else has been."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from benchmarks.speed.training import ROOT


def alone(module: str, *words: str) -> Any:
    """What `python -m module words` prints in its last line, as JSON.

    Raises:
        subprocess.CalledProcessError: it failed; what it said stands on standard error.
    """
    done = subprocess.run(  # noqa: S603 - this project's own modules
        [sys.executable, "-m", module, *words],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])
