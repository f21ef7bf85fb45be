"""What a run was made with: versions, machine, command and the state of the code."""

from __future__ import annotations

import getpass
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from importlib import metadata

from dmaml_pl.provenance.commands import command, program

COMMIT_VARIABLE = "DMAML_GIT_COMMIT"
"""Environment variable with the commit that the code was made from, where there is no repository, as in an image: the
hash, and `-dirty` at its end if files had been changed (`git describe --always --abbrev=40 --exclude '*' --dirty`)."""

_DIRTY = "-dirty"
_GIT_TIMEOUT_S = 10  # a status on a slow network drive must not hold up a training


@dataclass(frozen=True)
class GitState:
    """The commit of the code, and whether the files are those of the commit.

    Args:
        commit: full hash, or "unknown" outside a repository, without a commit, or without git.
        clean: "true" where no file is changed or untracked, "false", or "unknown".
    """

    @classmethod
    def current(cls) -> GitState:
        """What `DMAML_GIT_COMMIT` says, or else the repository that contains the current directory."""
        told = os.environ.get(COMMIT_VARIABLE, "").strip()
        if not told:
            return cls.of_current_directory()
        return cls(told.removesuffix(_DIRTY), str(not told.endswith(_DIRTY)).lower())

    commit: str = "unknown"
    clean: str = "unknown"

    @classmethod
    def of_current_directory(cls) -> GitState:
        """Ask git about the repository that contains the current directory; never raises."""
        commit = _git("rev-parse", "--verify", "HEAD")
        if commit is None:
            return cls()
        changes = _git("status", "--porcelain")
        return cls(commit, "unknown" if changes is None else str(not changes).lower())


@dataclass(frozen=True)
class Environment:
    """One process's surroundings, taken once and logged as a file and as tags."""

    packages: dict[str, str]
    git: GitState
    command: str
    user: str

    @classmethod
    def current(cls) -> Environment:
        """Describe this process."""
        return cls(packages(), GitState.current(), command(sys.argv[1:]), _user())

    def to_json(self) -> str:
        """Everything, as the text of `environment.json`."""
        facts = {
            "python": platform.python_version(),
            "platform": platform.platform(),
            "cpu_count": os.cpu_count(),
            "command": self.command,
            "git_commit": self.git.commit,
            "git_clean": self.git.clean,
            "packages": self.packages,
        }
        return json.dumps(facts, indent=2) + "\n"

    def to_tags(self) -> dict[str, str]:
        """The facts to search MLflow runs by; `mlflow.*` are the names that MLflow's own pages show."""
        tags = {
            "dmaml.git_commit": self.git.commit,
            "dmaml.git_clean": self.git.clean,
            "dmaml.command": self.command[:5000],
            "dmaml.torch": self.packages.get("torch", "unknown"),
            "dmaml.pytorch_lightning": self.packages.get("pytorch-lightning", "unknown"),
            "mlflow.user": self.user,
            "mlflow.source.name": shlex.join(program()),
            "mlflow.source.type": "LOCAL",
        }
        if self.git.commit != "unknown":
            tags["mlflow.source.git.commit"] = self.git.commit
        return tags


@cache
def packages() -> dict[str, str]:
    """Versions of all installed packages; they are read once, as it takes a while."""
    names = ((dist.metadata["Name"], dist.version) for dist in metadata.distributions())
    return dict(sorted((name.lower(), version) for name, version in names if name))


def _git(*arguments: str) -> str | None:
    """Run a git command that only reads; None where there is no git, no repository, or no answer in time."""
    git = shutil.which("git")
    if git is None:
        return None
    # Without optional locks, or `status` could make a `git commit` of the user's fail at that moment.
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    try:
        answer = subprocess.run(  # noqa: S603 (fixed arguments, and git found on the user's own path)
            [git, *arguments], capture_output=True, text=True, timeout=_GIT_TIMEOUT_S, env=environment, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container may run under a number that has no name
        return f"uid {os.getuid()}"
