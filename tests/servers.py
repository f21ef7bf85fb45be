"""A real MLflow server, which tests kill and start again on the same store, and one that says yes to everything."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from http.client import HTTPConnection, HTTPException
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from tests.workers import free_port

START_TIMEOUT_S = 150  # 10 s alone; the machine may be busy with other tests


class Server:
    """An MLflow server on a port of its own.

    Args:
        folder: of its store, which is there before it and after it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def store(self) -> str:
        return f"sqlite:///{self.folder}/mlflow.db"

    def launch(self) -> None:
        """Start it, without waiting for it."""
        command = [sys.executable, "-m", "mlflow", "server", "--port", str(self.port), "--workers", "1"]
        command += ["--backend-store-uri", self.store, "--artifacts-destination", str(self.folder / "artifacts")]
        environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with (self.folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)

    def await_answer(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._answers():
            assert self._process is not None
            assert self._process.poll() is None, (self.folder / "server.log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.1)

    def _answers(self) -> bool:
        try:
            with closing(HTTPConnection("127.0.0.1", self.port, timeout=5)) as connection:
                connection.request("GET", "/health")
                return connection.getresponse().status == 200
        except (OSError, HTTPException):
            return False

    def kill(self) -> None:
        """End it and its helpers by SIGKILL, in the middle of whatever they do."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None
            while self._answers():  # a helper that is not gone yet
                time.sleep(0.01)


@contextmanager
def serving(folder: Path) -> Iterator[Server]:
    """A server that is ended with the block."""
    folder.mkdir(parents=True, exist_ok=True)
    server = Server(folder)
    server.launch()
    try:
        server.await_answer()
        yield server
    finally:
        server.kill()


@contextmanager
def agreeing(folder: Path) -> Iterator[str]:
    """The host and port of a server that takes whatever MLflow's client asks of it, for its one MLflow run."""
    info = {"run_id": "a" * 32, "run_uuid": "a" * 32, "run_name": "mine", "experiment_id": "1", "status": "RUNNING"}
    run = {"info": info | {"artifact_uri": str(folder), "lifecycle_stage": "active"}, "data": {}}
    experiment = {"experiment_id": "1", "name": "dmaml", "artifact_location": str(folder), "lifecycle_stage": "active"}
    answer = json.dumps({"run": run, "run_info": run["info"], "experiment": experiment, "experiments": []}).encode()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def do_POST(self) -> None:
            self.do_GET()

        def log_message(self, *words: object) -> None:
            pass

    with _answering(Handler) as place:
        yield place


@contextmanager
def serving_files(folder: Path) -> Iterator[str]:
    """The address of a server of a folder's files."""

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *words: object) -> None:
            pass

    with _answering(partial(Handler, directory=str(folder))) as place:
        yield f"http://{place}"


@contextmanager
def _answering(handler: Callable[..., BaseHTTPRequestHandler]) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
