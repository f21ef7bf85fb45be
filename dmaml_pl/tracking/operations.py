"""What can be logged to an MLflow run, as plain data that a file keeps, and how each is done.

Each may be done twice in a row without a difference, as a process may be killed after the store took one and before
that is written down. For metrics this rests on MLflow's stores: a value with the same name, step, time and run is one
row of their table, whose second insertion they leave out.
"""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from dmaml_pl.tracking.mlflow_run import Row
from dmaml_pl.tracking.outbox import Entry, Operation
from dmaml_pl.tracking.params import clean_name

if TYPE_CHECKING:
    from mlflow.models import Model

    from dmaml_pl.tracking.mlflow_run import MLflowRun

BATCH = 1000  # metrics in one request: MLflow's limit
REFUSALS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_ALREADY_EXISTS")
"""MLflow's codes for what it will not take later, either."""


def metrics(values: Mapping[str, float], step: int) -> Operation:
    """Values of some metrics, with the time of now; they may be infinite or not a number."""
    now = now_ms()
    return {"do": "metrics", "rows": [[clean_name(name), float(value), now, step] for name, value in values.items()]}


def params(values: Mapping[str, str]) -> Operation:
    """Parameters; those that are there keep their value."""
    return {"do": "params", "params": dict(values)}


def tags(values: Mapping[str, str]) -> Operation:
    """Tags, in place of those of the same names."""
    return {"do": "tags", "tags": {name: str(value) for name, value in values.items()}}


def text(content: str, artifact_file: str) -> Operation:
    """A text as a file of the artifacts."""
    return {"do": "text", "text": content, "file": artifact_file}


def upload(staged: str, folder: str, name: str | None) -> Operation:
    """A file or folder, as kept by `Outbox.stage`, in a folder of the artifacts, under another name if one is given."""
    return {"do": "upload", "staged": staged, "folder": folder, "name": name}


def model(staged: str, name: str, key: str) -> Operation:
    """A model's folder, as kept by `Outbox.stage`, to be logged and registered; `key` is its own for ever."""
    return {"do": "model", "staged": staged, "name": name, "key": key}


def end(status: str) -> Operation:
    """The final status, and the time of now as the end."""
    return {"do": "end", "status": status, "time": now_ms()}


def restart(*, failed: bool) -> Operation:
    """The status RUNNING; `failed` takes away the error of a failure before."""
    return {"do": "restart", "failed": failed}


def now_ms() -> int:
    """Milliseconds since 1970."""
    return time.time_ns() // 1_000_000


class Request(NamedTuple):
    """The first operations that wait, as far as they go to the store together."""

    entries: Sequence[Entry]
    rows: Sequence[Row]

    @classmethod
    def first_of(cls, entries: Sequence[Entry], *, single: bool) -> Request:
        """Metrics that follow each other go together, up to 1000 of them; all else goes alone.

        Args:
            entries: what waits, at least one.
            single: whether metrics go alone, too, as when one of them was refused.
        """
        rows: list[Row] = []
        taken: list[Entry] = []
        for entry in entries:
            if entry.operation["do"] != "metrics":
                break
            more = [Row(*row) for row in entry.operation["rows"]]
            if taken and (single or len(rows) + len(more) > BATCH):
                break
            taken.append(entry)
            rows += more
        return cls(taken or entries[:1], rows)

    @property
    def name(self) -> str:
        """What it carries, in a word or a file's name."""
        operation = self.entries[0].operation
        return str(operation.get("file") or operation.get("name") or operation.get("staged") or operation["do"])

    def send(self, run: MLflowRun, folder: Path) -> None:
        """Do it; whatever goes wrong is raised.

        Args:
            run: the MLflow run.
            folder: of the outbox, where staged files are.
        """
        for start in range(0, len(self.rows), BATCH):
            run.send(self.rows[start : start + BATCH])
        if not self.rows:
            operation = self.entries[0].operation
            _ACTIONS[operation["do"]](run, operation, folder)


def _upload(run: MLflowRun, operation: Operation, folder: Path) -> None:
    run.log_file(folder / operation["staged"], operation["folder"], operation["name"])


def log_model(run: MLflowRun, folder: Path, name: str, key: str) -> str:
    """Log and register a model that was written without MLflow knowing of it; returns its version."""

    def place(there: Path, record: Model) -> None:
        from mlflow.models import Model  # noqa: PLC0415 (slow import)

        shutil.copytree(folder, there)
        kept = Model.load(str(there))
        for fact in ("artifact_path", "run_id", "model_uuid", "model_id"):
            setattr(kept, fact, getattr(record, fact))
        kept.save(str(there / "MLmodel"))

    return run.log_model(name, place, key)


_ACTIONS: dict[str, Callable[[MLflowRun, Operation, Path], object]] = {
    "metrics": lambda _run, _operation, _folder: None,  # none in it
    "params": lambda run, operation, _: run.log_params(operation["params"]),
    "tags": lambda run, operation, _: run.set_tags(operation["tags"]),
    "text": lambda run, operation, _: run.log_text(operation["text"], operation["file"]),
    "upload": _upload,
    "model": lambda run, operation, folder: log_model(
        run, folder / operation["staged"], operation["name"], operation["key"]
    ),
    "end": lambda run, operation, _: run.end(operation["status"], operation["time"]),
    "restart": lambda run, operation, _: run.restart(failed=operation["failed"]),
}


def is_refusal(error: Exception) -> bool:
    """Whether the store will never take what raised this, as opposed to a store that is away, full or locked."""
    return isinstance(error, FileNotFoundError) or getattr(error, "error_code", None) in REFUSALS


def describe(operations: Iterable[Operation]) -> str:
    """What operations are, in a few words, such as `240 metric values, 2 files and the status FINISHED`."""
    count: Counter[str] = Counter()
    status = ""
    for operation in operations:
        kind = operation["do"]
        if kind == "model":
            count["model"] += 1
        elif kind == "metrics":
            count["metric value"] += len(operation["rows"])
        elif kind in ("upload", "text"):
            count["file"] += 1
        elif kind in ("params", "tags"):
            count["parameter" if kind == "params" else "tag"] += len(operation[kind])
        else:
            status = f"the status {operation.get('status', 'RUNNING')}"
    parts = [f"{number} {name}{'s' if number > 1 else ''}" for name, number in count.items() if number]
    parts += [status] if status else []
    return " and ".join(filter(None, [", ".join(parts[:-1]), *parts[-1:]])) or "nothing"
