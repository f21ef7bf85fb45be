"""What a run was made with: versions, machine, command and the state of the code."""

import getpass
import os
import platform
import shlex
import subprocess
import sys
from functools import cache
from importlib import metadata
from typing import Any, NamedTuple

from dmaml_pl.provenance.commands import command, program

COMMIT_VARIABLE = "DMAML_GIT_COMMIT"
"""Environment variable with the commit that the code was made from, where there is no repository, as in an image: the
hash, and `-dirty` at its end if files had been changed (`git describe --always --abbrev=40 --exclude '*' --dirty`)."""

_GIT_TIMEOUT_S = 10  # a status on a slow network drive must not hold up a training


class GitState(NamedTuple):
    """The commit of the code, and whether the files are those of the commit.

    Attributes:
        commit: full hash, or "unknown" outside a repository, without a commit, or without git.
        clean: "true" where no file is changed or untracked, "false", or "unknown".
    """

    commit: str
    clean: str


def git_state() -> GitState:
    """What `DMAML_GIT_COMMIT` says, or else git about the repository of the current directory; never raises."""
    if told := os.environ.get(COMMIT_VARIABLE, "").strip():
        return GitState(told.removesuffix("-dirty"), str(not told.endswith("-dirty")).lower())
    commit = _git("rev-parse", "--verify", "HEAD")
    changes = None if commit is None else _git("status", "--porcelain")
    return GitState(commit or "unknown", "unknown" if changes is None else str(not changes).lower())


def environment() -> dict[str, Any]:
    """This process's surroundings, as `environment.json` tells them."""
    git = git_state()
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "command": command(sys.argv[1:]),
        "git_commit": git.commit,
        "git_clean": git.clean,
        "packages": packages(),
    }


def environment_tags(facts: dict[str, Any]) -> dict[str, str]:
    """Those of an `environment` to search MLflow runs by; `mlflow.*` are the names that MLflow's own pages show."""
    commit = facts["git_commit"]
    return {
        "dmaml.git_commit": commit,
        "dmaml.git_clean": facts["git_clean"],
        "dmaml.command": facts["command"][:5000],
        "dmaml.torch": facts["packages"].get("torch", "unknown"),
        "dmaml.pytorch_lightning": facts["packages"].get("pytorch-lightning", "unknown"),
        "mlflow.user": _user(),
        "mlflow.source.name": shlex.join(program()),
        "mlflow.source.type": "LOCAL",
        **({} if commit == "unknown" else {"mlflow.source.git.commit": commit}),
    }


@cache
def packages() -> dict[str, str]:
    """Versions of all installed packages; they are read once, as it takes a while."""
    names = ((dist.metadata["Name"], dist.version) for dist in metadata.distributions())
    return dict(sorted((name.lower(), version) for name, version in names if name))


def _git(*arguments: str) -> str | None:
    """Run a git command that only reads; None where there is no git, no repository, or no answer in time."""
    # Without optional locks, or `status` could make a `git commit` of the user's fail at that moment.
    surroundings = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    try:
        answer = subprocess.run(  # noqa: S603 (fixed arguments)
            ["git", *arguments],  # noqa: S607 (found on the user's own path)
            capture_output=True,
            text=True,
            timeout=_GIT_TIMEOUT_S,
            env=surroundings,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container may run under a number that has no name
        return f"uid {os.getuid()}"
