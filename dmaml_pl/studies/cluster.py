"""Trainings on what clusters have: each a job of SLURM (by submitit), or a task of Ray. Light: no PyTorch.

The machines share the folder in which the study was begun, and its Python.
"""

import ctypes
import importlib
import json
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from dmaml_pl.errors import ConfigError, DmamlError
from dmaml_pl.launching.server import ROLES
from dmaml_pl.studies.local import VISIBLE, Local, settings_of_trainings
from dmaml_pl.studies.runner import GRACE_S, Job, Launcher

LAUNCHERS = ("local", "slurm", "ray")
OURS = ("MLFLOW_", "OMP_", "DMAML_")
"""How variables begin that are the study's on every machine; others are, where a machine has none of its own."""

CUT_OFF = 1 << 16
"""Bytes of a log, from its end, that are sent back."""

KNOCK_S = 5.0
_DIES_WITH_PARENT = 1  # PR_SET_PDEATHSIG


def check_launcher(name: str) -> None:
    """Check that there is what a launcher needs, without loading it.

    Raises:
        ConfigError: names what is missing.
    """
    package = {"slurm": "submitit", "ray": "ray"}.get(name, "")
    if package and find_spec(package) is None:
        raise ConfigError(f"--launcher {name} needs {package}: pip install 'dmaml_pl[{name}]'.")
    commands = ("sbatch", "srun", "sacct", "scancel") if name == "slurm" else ()
    missing = [each for each in commands if shutil.which(each) is None]
    if missing:
        raise ConfigError(
            f"--launcher is slurm, but there is no {missing[0]} on the PATH: begin the study where SLURM's commands "
            "are, or use --launcher local."
        )
    address = os.environ.get("RAY_ADDRESS", "") if name == "ray" else ""
    if address in ("", "local", "auto"):
        return
    place = urlsplit(address if "://" in address else f"//{address}")
    try:
        with socket.create_connection((place.hostname or "", place.port or 6379), KNOCK_S):
            pass
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"RAY_ADDRESS is {address}, where no Ray cluster answers ({why}): set it to HOST:PORT of its head, or "
            "unset it for a cluster on this machine."
        ) from error


def read_resources(words: Sequence[str], launcher: str) -> dict[str, Any]:
    """Read NAME=VALUE of `--resources`; values as in JSON, else texts.

    Raises:
        ConfigError: it is no such word, or this machine is asked.
    """
    read: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not name.isidentifier():
            raise ConfigError(f"--resources has {word}, but must be made of NAME=VALUE, such as time=120.")
        if launcher == "local":
            raise ConfigError(f"--resources {word} is for --launcher slurm or ray: leave it out.")
        try:
            read[name] = json.loads(value)
        except ValueError:
            read[name] = value
    return read


def choose(name: str, resources: Mapping[str, Any], folder: Path, accelerator: str) -> Launcher:
    """The launcher of a name, ready to start trainings.

    Args:
        name: one of `LAUNCHERS`.
        resources: what each training is to have, in the words of SLURM or Ray.
        folder: of the study, for files of SLURM's jobs.
        accelerator: `trainer.accelerator`, by which a training needs GPUs or none.

    Raises:
        ConfigError: the cluster does not know these resources, or does not answer.
    """
    if name == "slurm":
        return Slurm(importlib.import_module("submitit").SlurmExecutor(folder / "slurm"), resources, accelerator)
    return Ray(resources, accelerator) if name == "ray" else Local()


class Slurm(Launcher):
    """Submits each training as a job of its own; a study that was killed takes over those that wait or run.

    Args:
        executor: submitit's.
        resources: parameters of the executor, such as partition, account, and time in minutes, 1440 by default.
        accelerator: see `choose`.
    """

    def __init__(self, executor: Any, resources: Mapping[str, Any], accelerator: str) -> None:
        importlib.import_module("submitit.core.logger").get_logger().setLevel("ERROR")
        self._executor, self._resources = executor, {"time": 1440, "job_name": "dmaml"} | dict(resources)
        self._on_gpus = accelerator in ("gpu", "cuda")
        try:
            executor.update_parameters(**self._resources)
        except (TypeError, ValueError) as error:
            known = sorted(executor._valid_parameters() - {"num_gpus"})  # noqa: SLF001 - asked in no other way
            raise ConfigError(
                f"--resources: {_line(error)} SLURM's are {', '.join(known)}; others go into additional_parameters."
            ) from error

    def start(self, job: Job) -> tuple[Any, Job]:
        """Submit it, unless it was submitted before and goes on."""
        if (known := self._known(job)) is not None:
            return known, job
        needs = {"cpus_per_task": max(job.workers, 1)} | ({"gpus_per_node": job.workers} if self._on_gpus else {})
        self._executor.folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # command lines may hold a password
        self._executor.update_parameters(**{**needs, **self._resources})
        try:
            submitted = self._executor.submit(train, job.words, Path.cwd(), job.log.absolute(), settings_of_trainings())
        except Exception as error:
            given = " ".join(f"{name}={value}" for name, value in self._resources.items())
            raise DmamlError(f"SLURM takes no job: {_line(error)} --resources are {given}.") from error
        self._note(job).write_text(submitted.job_id)
        return submitted, job

    def code(self, started: tuple[Any, Job]) -> int | None:
        """By the file in which submitit keeps a result, or else SLURM's accounting, which is asked seldom."""
        submitted, job = started
        if not submitted.done():
            return None
        try:
            return int(submitted.result()[0])
        except Exception as error:  # whatever has ended it
            return _lost(job, f"SLURM's job {submitted.job_id} ended before its training did: {error}")

    def end(self, started: tuple[Any, Job], *, kill: bool = False) -> None:
        """By scancel, which sends SIGTERM, and SIGKILL after SLURM's own grace."""
        if not kill:
            started[0].cancel(check=False)

    def goes_on(self, job: Job) -> bool:
        """Whether a job of it was submitted, and has not ended."""
        return self._known(job) is not None

    def _note(self, job: Job) -> Path:
        return Path(self._executor.folder, f"{job.digest}.job")

    def _known(self, job: Job) -> Any:
        with suppress(FileNotFoundError):
            submitted = self._executor.job_class(self._executor.folder, self._note(job).read_text())
            return None if submitted.done(force_check=True) or submitted.state == "UNKNOWN" else submitted
        return None


class Ray(Launcher):
    """Has each training made by a task, on whatever node has room; that of a node that is lost by another.

    The cluster is that of RAY_ADDRESS, or one that runs on this machine, or else one that is begun here.

    Args:
        resources: options of a Ray task, such as num_cpus and num_gpus.
        accelerator: see `choose`.
    """

    def __init__(self, resources: Mapping[str, Any], accelerator: str) -> None:
        for name, value in {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}.items():
            os.environ.setdefault(name, value)
        self._ray = importlib.import_module("ray")
        handler = signal.getsignal(signal.SIGTERM)  # which Ray replaces
        try:
            if not self._ray.is_initialized():
                self._ray.init(logging_level="error", log_to_driver=False, include_dashboard=False)
            self._task = self._ray.remote(train)
            self._task.options(**resources)
        except Exception as error:
            raise ConfigError(f"Ray cannot be used (RAY_ADDRESS, --resources): {_line(error)}") from error
        finally:
            signal.signal(signal.SIGTERM, handler)
        self._resources = resources
        self._on_gpus = accelerator != "cpu" and self._ray.cluster_resources().get("GPU", 0) > 0
        ours = {name: value for name, value in os.environ.items() if name not in (*ROLES, VISIBLE)}
        self._environment = ours | settings_of_trainings() | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}

    def start(self, job: Job) -> tuple[Any, Job]:
        """Ask for it."""
        needs = {"num_cpus": max(job.workers, 1), "num_gpus": job.workers if self._on_gpus else 0}
        # Ray tries again what was lost with its node, not what failed.
        task = self._task.options(name=job.key.label, **{**needs, "max_retries": 3, **self._resources})
        return task.remote(job.words, Path.cwd(), job.log.absolute(), self._environment), job

    def code(self, started: tuple[Any, Job]) -> int | None:
        """Of the task, which sends the end of its log."""
        task, job = started
        if not self._ray.wait([task], timeout=0)[0]:
            return None
        try:
            code, said = self._ray.get(task)
        except Exception as error:  # whatever has ended it
            return _lost(job, f"Ray's task ended before its training did: {error}")
        if not job.log.exists():  # it is another machine's
            job.log.write_text(said)
        return int(code)

    def end(self, started: tuple[Any, Job], *, kill: bool = False) -> None:
        """By an exception in the task, which ends its training."""
        self._ray.cancel(started[0], force=kill)


def train(words: Sequence[str], folder: Path, log: Path, environment: Mapping[str, str]) -> tuple[int, str]:
    """Make a training in a process of its own, on the machine where this is called.

    Args:
        words: the command line, from `fit` on.
        folder: where; all machines share it.
        log: for all that its processes say.
        environment: variables of the study, which add to those of this machine.

    Returns:
        The exit code, and the end of the log.
    """
    if not folder.is_dir():
        return 1, f"{platform.node()} has no folder {folder}: the machines of a study share a disk."
    here = {name: value for name, value in os.environ.items() if name not in ROLES and not name.startswith("SLURM_")}
    forced = {name: value for name, value in environment.items() if name.startswith(OURS) or name == "PYTHONPATH"}
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as file:
        process = subprocess.Popen(  # noqa: S603 - our own words
            [sys.executable, "-m", "dmaml_pl", *words],
            cwd=folder,
            env={**environment, **here, **forced},
            stdout=file,
            stderr=file,
            preexec_fn=_die_with_parent,  # noqa: PLW1509 - a system call, which takes no lock
        )
        try:
            while process.poll() is None:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(0.5)  # Ray's KeyboardInterrupt comes between two of them
        except KeyboardInterrupt:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_S)
        finally:
            process.kill()
            process.wait()
    return process.returncode, log.read_bytes()[-CUT_OFF:].decode(errors="replace")


def _die_with_parent() -> None:
    """Be told to end when the process that has begun this one is killed, which cannot tell it itself."""
    ctypes.CDLL(None).prctl(_DIES_WITH_PARENT, signal.SIGTERM)


def _lost(job: Job, why: str) -> int:
    """Write down in the log of a training what has become of it; returns its exit code."""
    with job.log.open("a", encoding="utf-8") as file:
        file.write(f"{why}\n")
    return 1


def _line(error: Exception) -> str:
    return f"{' '.join(str(error).split())[:500].rstrip('.')}."
