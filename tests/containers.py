"""Images run by an engine, docker or podman, as `make image-test` names it."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

TRAINER, SERVER = "dmaml:latest", "dmaml-mlflow:latest"
USER = 10001
CLOSED = ["--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL", "--security-opt", "no-new-privileges"]  # noqa: S108
"""Nothing may be written but volumes and /tmp, and nothing done that needs a privilege."""

DEADLINE_S = 300


def engine(*words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """A command of the engine."""
    command = [*shlex.split(os.environ.get("ENGINE", "docker")), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    assert done.returncode == 0 or not check, f"{shlex.join(command)}\n{done.stdout}{done.stderr}"
    return done


def inspect(kind: str, name: str) -> Any:
    return json.loads(engine(kind, "inspect", name).stdout)[0]


def until(what: Callable[[], Any], running: Callable[[], bool] = lambda: True) -> Any:
    """What is asked for again and again, as soon as it is something."""
    deadline = time.monotonic() + DEADLINE_S
    while not (found := what()):
        assert running(), "it has ended"
        assert time.monotonic() < deadline
        time.sleep(0.2)
    return found


def answers(address: str) -> bool:
    try:
        with urlopen(address, timeout=5) as answer:  # noqa: S310 - our own server
            return bool(answer.status == 200)
    except (URLError, OSError):
        return False


@dataclass
class Container:
    name: str

    @property
    def running(self) -> bool:
        return bool(inspect("container", self.name)["State"]["Running"])

    @property
    def output(self) -> str:
        done = engine("logs", self.name)
        return done.stdout + done.stderr

    def wait(self) -> int:
        """Wait for its end; returns its exit code."""
        return int(engine("wait", self.name).stdout.split()[-1])

    def stop(self, grace_s: int = 30) -> int:
        """`docker stop`; returns the exit code, which is 137 where the grace was not enough."""
        engine("stop", "--time", str(grace_s), self.name)
        return self.wait()


@contextmanager
def started(*words: str, name: str) -> Iterator[Container]:
    """A container in the background, removed with its own volumes at the end."""
    own = f"dmaml-test-{os.getpid()}-{name}"
    try:
        engine("run", "--detach", "--name", own, *words)
        yield Container(own)
    finally:
        engine("rm", "--force", "--volumes", own, check=False)
