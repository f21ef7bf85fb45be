"""Reaching an MLflow store: a SQLite file that is made where it is missing, or a server that must answer soon.

Whatever goes wrong here is a `TrackingError` that names the setting to change, seconds after the start: MLflow alone
asks an unreachable server for four minutes, and a damaged file for two, before it shows a page of traceback.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import socket
import sqlite3
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import Future, wait
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from dmaml_pl.errors import TrackingError, redact
from dmaml_pl.tracking.moved import follow
from dmaml_pl.tracking.patience import brief_requests, disable_telemetry

if TYPE_CHECKING:
    from mlflow import MlflowClient

SETTING = "trainer.logger.init_args"

PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
"""Of MLflow's databases, where an address names none."""

KNOCK_S = 5.0
ANSWER_S = 60.0  # also for a database in which MLflow makes its tables first
_LOCK_TIMEOUT_S = 120  # making a store takes 2 s; on a busy machine, behind other processes, perhaps 20


@dataclass(frozen=True)
class Store:
    """Where MLflow runs are kept."""

    uri: str  # MLflow's tracking URI, absolute for a SQLite file
    file: Path | None  # the SQLite file, None for a server or another database
    artifacts: Path | None  # folder for the files of the MLflow runs; None lets the server decide
    is_default: bool  # whether it is the store that `save_dir` alone implies

    @classmethod
    def find(cls, tracking_uri: str | None, save_dir: str) -> Store:
        """Choose the store: the given URI, else that of MLFLOW_TRACKING_URI, else `{save_dir}/mlflow.db`."""
        folder = Path(save_dir).absolute()
        default = folder / "mlflow.db"
        uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{default.as_posix()}"
        if not uri.startswith("sqlite:///"):
            return cls(uri, None, None, is_default=False)
        file = Path(uri.removeprefix("sqlite:///")).absolute()
        return cls(f"sqlite:///{file.as_posix()}", file, folder / "artifacts", file == default)

    @property
    def setting(self) -> str:
        """The setting that leads to another store."""
        return f"{SETTING}.{'save_dir' if self.is_default else 'tracking_uri'}"

    def ui_command(self, save_dir: str, page: str | None) -> str:
        """The command that opens the UI on a page of an MLflow run, if any, or the address where a server shows it."""
        if self.uri.startswith("http"):
            return redact(self.uri) if page is None else f"{redact(self.uri).rstrip('/')}/{page}"
        if not self.is_default:
            return f"mlflow ui --backend-store-uri {shlex.quote(redact(self.uri))}"
        return own_command("ui", save_dir, *([] if page is None else ["--run", page.rsplit("/", 1)[-1]]))

    def connect(self) -> MlflowClient:
        """Make the store if it is missing, and a client on it.

        Processes that start at the same moment take turns: two that make the same SQLite file at once crash.

        Raises:
            TrackingError: the folder cannot be written, the file is not MLflow's, the server does not answer.
        """
        if self.file is None:
            remedy = (
                f"Start it, or set {self.setting} (or MLFLOW_TRACKING_URI) to the address of one that runs, such as "
            )
            remedy += "http://127.0.0.1:5000, or unset both for a local store."
            with told_in_one_line(f"No MLflow server can be used at {self.uri}", remedy):
                return self._ask()
        place = "a folder that can be written" if self.is_default else "sqlite:///<a file that can be written>"
        with told_in_one_line(f"The tracking store {self.file} cannot be opened", f"Set {self.setting} to {place}."):
            check_path(self.file, self.setting)
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.file.parent):
                pass  # a lock would be waited for where none can be made
            with FileLock(f"{self.file}.lock", timeout=_LOCK_TIMEOUT_S):
                check_database(self.file, self.setting)
                if self.is_default:
                    follow(self.file.parent)
                # MLflow would try for 100 s to write to a file that cannot be written.
                with closing(sqlite3.connect(self.file, timeout=20, isolation_level=None)) as database:
                    database.execute("BEGIN IMMEDIATE")
                return _client(self.uri)

    def _ask(self) -> MlflowClient:
        """A client whose server has answered; in a thread, as no library bounds the time of a whole answer."""
        _load_client()  # in seconds in which no server is waited for
        answer: Future[MlflowClient] = Future()

        def ask() -> None:
            try:
                knock(self.uri)
                client = _client(self.uri)
                client.search_experiments(max_results=1)  # the client alone does not ask the server
                answer.set_result(client)
            except Exception as error:  # told by whoever waits
                answer.set_exception(error)

        threading.Thread(target=ask, daemon=True).start()
        if wait([answer], KNOCK_S).not_done:
            print(f"Waiting for the MLflow server at {redact(self.uri)} ...", file=sys.stderr, flush=True)
            if wait([answer], ANSWER_S - KNOCK_S).not_done:
                raise TimeoutError(f"it has not answered in {ANSWER_S:g} s")
        return answer.result()


@contextmanager
def told_in_one_line(problem: str, remedy: str) -> Iterator[None]:
    """Give a block's requests little time, and turn what goes wrong into a `TrackingError`: problem, reason, remedy."""
    try:
        with brief_requests():
            yield
    except TrackingError:
        raise
    except Exception as error:
        raise TrackingError(f"{problem}: {reason(error)} {remedy}") from error


def check_path(file: Path, setting: str) -> None:
    """Raise a `TrackingError` where a path cannot be told to MLflow as a URI."""
    user = next((part for part in file.parts if part.startswith("~")), None)
    if user is not None and not file.parent.exists():
        raise TrackingError(f"{user} is a user who is not there. Set {setting} to another place than {file}.")
    if re.search("[%?]", str(file)):
        raise TrackingError(f"{file} holds a % or ?, which MLflow misreads. Set {setting} to a path without them.")


def check_database(file: Path, setting: str) -> None:
    """Raise a `TrackingError` where a SQLite file is there, and not MLflow's, who would put 50 tables into any."""
    if not file.exists():
        return
    try:
        with closing(sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True)) as database:
            tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    except sqlite3.DatabaseError as error:
        raise TrackingError(
            f"{file} is not a usable tracking store ({error}). Move it away, or set {setting} to another place."
        ) from error
    if tables and "experiments" not in tables:
        raise TrackingError(f"{file} is a database, but not one of MLflow. Set {setting} to another place.")


def reason(error: Exception) -> str:
    """The part of an error that helps a person: one line, without passwords, ending in a full stop."""
    text = redact(str(error).strip() or type(error).__name__)
    # Below the layers of requests and urllib3 lies the one plain cause.
    cause = re.search(r"\(Caused by .*?(?:\[Errno -?\d+\] ([^'\")]+)|(timed out))", text)
    line = next(filter(None, cause.groups())) if cause else text.splitlines()[0]
    return f"{line[:300].rstrip('. ')}."


def knock(uri: str) -> None:
    """Connect to a database's port once: MLflow tries for three minutes, and says nothing meanwhile.

    Raises:
        OSError: nobody answers there.
    """
    from sqlalchemy.engine import make_url  # noqa: PLC0415 (with MLflow's client)

    if uri.startswith(tuple(PORTS)):
        url = make_url(uri)
        port = url.port or next(port for kind, port in PORTS.items() if uri.startswith(kind))
        if url.host:  # else a socket of this machine
            socket.create_connection((url.host, port), timeout=KNOCK_S).close()


def _load_client() -> type[MlflowClient]:
    disable_telemetry()
    from mlflow import MlflowClient  # noqa: PLC0415 (3 s: not before it is needed, and on rank zero only)

    return MlflowClient


def _client(uri: str) -> MlflowClient:
    return _load_client()(tracking_uri=uri, registry_uri=uri)


def own_command(command: str, save_dir: str, *more: str) -> str:
    """What a person types for `dmaml COMMAND` on a folder of tracking: by a path where `dmaml` is not this very one."""
    program = Path(sys.executable).with_name("dmaml")
    found = shutil.which("dmaml")
    if found is not None and Path(found).resolve() == program.resolve():
        program = Path("dmaml")
    elif program.is_relative_to(Path.cwd()):
        program = program.relative_to(Path.cwd())
    folder = [] if save_dir == "mlruns" else ["--save_dir", save_dir]
    return shlex.join([str(program), command, *folder, *more])
