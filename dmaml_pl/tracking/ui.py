"""Looking at what was tracked: MLflow's own server on the local store."""

import os
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import IO

from dmaml_pl.console.options import Options, whole
from dmaml_pl.errors import TrackingError
from dmaml_pl.launching.signals import raised_at
from dmaml_pl.tracking.moved import follow
from dmaml_pl.tracking.store import check_database, check_path, told_in_one_line
from dmaml_pl.tracking.sync import settle
from dmaml_pl.tracking.views import table_page

_STOP_TIMEOUT_S = 10.0
_POLL_S = 0.2


def main(words: list[str]) -> int:
    """Serve MLflow's UI until Ctrl-C, as the words after `dmaml ui` say.

    Returns 0 after Ctrl-C, else the exit code of the server, whose last words are then on stderr.

    Raises:
        TrackingError: there is no store in the folder, or no such MLflow run in it, or the port cannot be had.
    """
    parser = Options("dmaml ui", description="Open the MLflow UI on the local store.", allow_abbrev=False)
    parser.add_argument("--save_dir", default="mlruns", help="folder of the store (default: mlruns)")
    parser.add_argument("--port", type=whole(0, 65535), default=5000, help="port to listen on (default: 5000)")
    # The UI asks for no password, so it is reached from this machine only; a container needs 0.0.0.0.
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine)")
    parser.add_argument("--run", help="id of an MLflow run to show first")
    given = parser.parse_args(words)
    host, port = given.host, given.port
    folder = Path(given.save_dir).absolute()
    store = folder / "mlflow.db"
    check_path(store, "--save_dir")
    if not store.is_file():
        raise TrackingError(
            f"There is no tracking store in {given.save_dir} yet: `dmaml fit --config <file>` makes one. Or set "
            "--save_dir to the folder of another."
        )
    check_database(store, "--save_dir")
    follow(folder)
    settle(folder)
    page = ""
    unusable = told_in_one_line(f"{store} is not a usable tracking store", "Set --save_dir to the folder of another.")
    with unusable, closing(sqlite3.connect(f"{store.as_uri()}?mode=ro", uri=True)) as database:
        newest = database.execute("SELECT experiment_id FROM runs ORDER BY start_time DESC LIMIT 1").fetchone()
        row = database.execute("SELECT experiment_id FROM runs WHERE run_uuid = ?", (given.run,)).fetchone()
        if given.run is None and newest is not None:
            tags = database.execute("SELECT key FROM experiment_tags WHERE experiment_id = ?", newest).fetchall()
            page = f"/{table_page(str(newest[0]), {key for (key,) in tags})}"
    if given.run is not None:
        if row is None:
            raise TrackingError(
                f"There is no MLflow run {given.run} in {folder}: leave out --run, or give the id of one."
            )
        page = f"/#/experiments/{row[0]}/runs/{given.run}"
    _check_port(host, port)
    reached_at = "127.0.0.1" if host == "0.0.0.0" else host  # noqa: S104 (a comparison)
    with tempfile.TemporaryFile("w+") as said, _server(folder, host, port, said) as server:
        try:
            print("MLflow is starting ...", end=" ", flush=True)
            if _wait_until_it_answers(server, reached_at, port):
                print(f"open http://{reached_at}:{port}{page} (Ctrl-C stops it)", flush=True)
            code = server.wait()
        except KeyboardInterrupt:
            print(flush=True)
            return 0
        print(flush=True)
        said.seek(0)
        print("".join(said.readlines()[-20:]), file=sys.stderr)
        return code


def _check_port(host: str, port: int) -> None:
    """Try to listen where the server will, as its own error comes late and long."""
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as attempt:
            attempt.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            attempt.bind((host, port))
    except (OSError, OverflowError) as error:
        raise TrackingError(
            f"The UI cannot listen on port {port} of {host} ({error}). Set --port to a free one, such as {port + 1}."
        ) from error


@contextmanager
def _server(folder: Path, host: str, port: int, words: IO[str]) -> Iterator[subprocess.Popen[str]]:
    """The server as a process with its helpers; ends them all when the block is left, however it is left."""
    command = [sys.executable, "-m", "mlflow", "server", "--host", host, "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{(folder / 'mlflow.db').as_posix()}"]
    command += ["--artifacts-destination", str(folder / "artifacts"), "--uvicorn-opts", "--log-level warning"]
    environment = {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # a queue for language models' judges: two processes more
        "MLFLOW_LOGGING_LEVEL": "WARNING",
        **os.environ,
    }
    # In a session of its own, Ctrl-C reaches this process only, and none of the server's prints its farewell.
    with (
        # A closed terminal, too; else the server would outlive this process.
        raised_at(KeyboardInterrupt, signal.SIGINT, signal.SIGTERM, signal.SIGHUP),
        subprocess.Popen(  # noqa: S603 (our own arguments)
            command, stdout=words, stderr=words, env=environment, text=True, start_new_session=True
        ) as server,
    ):
        try:
            yield server
        finally:
            for sign in (signal.SIGTERM, signal.SIGKILL):
                try:
                    os.killpg(server.pid, sign)
                    server.wait(_STOP_TIMEOUT_S)
                except (ProcessLookupError, subprocess.TimeoutExpired):
                    continue


def _wait_until_it_answers(server: subprocess.Popen[str], host: str, port: int) -> bool:
    """Wait until the server is ready; False if it ends instead."""
    while server.poll() is None:
        try:
            with closing(HTTPConnection(host, port, timeout=5)) as connection:
                connection.request("GET", "/health")
                connection.getresponse()
                return True
        except (OSError, HTTPException):
            time.sleep(_POLL_S)
    return False
