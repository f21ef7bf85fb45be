"""What can be logged to an MLflow run, as plain data that the outbox keeps, and how each is done.

Each may be done twice in a row without a difference, as a process may be killed after the store took one and before
that is written down. For metrics this rests on MLflow's stores: a value with the same name, step, time and run is one
row of their table, whose second insertion they leave out.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dmaml_pl.tracking.outbox import Entry, Operation
from dmaml_pl.tracking.params import clean_name

if TYPE_CHECKING:
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
    """A model's folder, as kept by `Outbox.make`, to be logged and registered; `key` is its own for ever."""
    return {"do": "model", "staged": staged, "name": name, "key": key}


def end(status: str) -> Operation:
    """The final status, and the time of now as the end."""
    return {"do": "end", "status": status, "time": now_ms()}


def restart() -> Operation:
    """The status RUNNING, without the error of a failure before."""
    return {"do": "restart"}


def now_ms() -> int:
    """Milliseconds since 1970."""
    return time.time_ns() // 1_000_000


def first_request(entries: Sequence[Entry]) -> tuple[Sequence[Entry], list[Any]]:
    """The first of some operations that go to the store together, and the rows of metrics that they are.

    Metrics that follow each other go together, up to 1000 values of them; all else goes alone, and has no rows.
    """
    taken: list[Entry] = []
    rows: list[Any] = []
    for entry in entries:
        more = entry.operation.get("rows", ())
        if entry.operation["do"] != "metrics" or (taken and len(rows) + len(more) > BATCH):
            break
        taken.append(entry)
        rows += more
    return taken or entries[:1], rows


def perform(run: MLflowRun, operation: Operation, folder: Path) -> None:
    """Do what is no metric; whatever goes wrong is raised.

    Args:
        run: the MLflow run.
        operation: made by one of the functions above.
        folder: of the outbox, where staged files are.
    """
    match operation:
        case {"do": "params", "params": values}:
            run.log_params(values)
        case {"do": "tags", "tags": values}:
            run.set_tags(values)
        case {"do": "text", "text": content, "file": file}:
            run.log_text(content, file)
        case {"do": "upload", "staged": staged, "folder": artifacts, "name": name}:
            run.log_file(folder / staged, artifacts, name)
        case {"do": "model", "staged": staged, "name": name, "key": key}:
            run.log_model(folder / staged, name, key)
        case {"do": "end", "status": status, "time": time_ms}:
            run.end(status, time_ms)
        case {"do": "restart"}:
            run.restart()


def is_refusal(error: Exception) -> bool:
    """Whether the store will never take what raised this, as opposed to a store that is away, full or locked."""
    return isinstance(error, FileNotFoundError) or getattr(error, "error_code", None) in REFUSALS


def title(operation: Operation) -> str:
    """What an operation carries, in a word or a file's name."""
    return str(operation.get("file") or operation.get("name") or operation.get("staged") or operation["do"])


def describe(operations: Iterable[Operation]) -> str:
    """What operations are, in a few words, such as `240 metric values, 2 files and the status FINISHED`."""
    count: Counter[str] = Counter()
    status = ""
    for operation in operations:
        match operation:
            case {"rows": rows}:
                count["metric value"] += len(rows)
            case {"params": values}:
                count["parameter"] += len(values)
            case {"tags": values}:
                count["tag"] += len(values)
            case {"do": "model"}:
                count["model"] += 1
            case {"do": "upload" | "text"}:
                count["file"] += 1
            case _:
                status = f"the status {operation.get('status', 'RUNNING')}"
    parts = [f"{number} {name}{'s' if number > 1 else ''}" for name, number in count.items() if number]
    parts += [status] if status else []
    return " and ".join(filter(None, [", ".join(parts[:-1]), *parts[-1:]])) or "nothing"
