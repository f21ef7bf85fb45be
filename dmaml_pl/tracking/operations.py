"""What can be logged to an MLflow run, as plain data that the outbox keeps: a method of `MLflowRun` and its arguments.

`do` is the method's name; `staged` is what the outbox calls a file that is its argument `path`.
Each may be done twice in a row without a difference, as a process may be killed after the store took one and before
that is written down. For metrics this rests on MLflow's stores: a value with the same name, step, time and run is one
row of their table, whose second insertion they leave out.
"""

import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dmaml_pl.tracking.outbox import Entry, Operation
from dmaml_pl.tracking.params import clean_name

_BATCH = 1000  # metrics in one request: MLflow's limit
_REFUSALS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_ALREADY_EXISTS")


def metrics(values: Mapping[str, float], step: int, time_ms: int | None = None) -> Operation:
    """Values of some metrics, with a time in ms since 1970, by default now; they may be infinite or not a number."""
    now = time.time_ns() // 1_000_000 if time_ms is None else time_ms
    rows = [[clean_name(name), float(value), now, step] for name, value in values.items()]
    return {"do": "log_metrics", "rows": rows}


def end(status: str) -> Operation:
    """The final status, and the time of now as the end."""
    return {"do": "end", "status": status, "time_ms": time.time_ns() // 1_000_000}


def first_request(entries: Sequence[Entry], folder: Path) -> tuple[Sequence[Entry], str, dict[str, Any]]:
    """The first operations that go to the store together, and which method of `MLflowRun` with which arguments that is.

    Metrics that follow each other go together, up to 1000 values; all else goes alone. `folder` has the staged files.
    """
    taken: list[Entry] = []
    rows: list[Any] = []
    for entry in entries:
        more = entry.operation.get("rows", ())
        if entry.operation["do"] != "log_metrics" or (taken and len(rows) + len(more) > _BATCH):
            break
        taken.append(entry)
        rows += more
    if taken:
        return taken, "log_metrics", {"rows": rows}
    arguments = dict(entries[0].operation)
    if "staged" in arguments:
        arguments["path"] = folder / arguments.pop("staged")
    return entries[:1], arguments.pop("do"), arguments


def is_refusal(error: Exception) -> bool:
    """Whether the store will never take what raised this, as opposed to a store that is away, full or locked."""
    return isinstance(error, FileNotFoundError) or getattr(error, "error_code", None) in _REFUSALS


def describe(operations: Iterable[Operation]) -> str:
    """What operations are, in a few words, such as `240 metric values, 2 files and the status FINISHED`."""
    count: Counter[str] = Counter()
    status = []
    for one in operations:
        match one:
            case {"rows": rows}:
                count["metric value"] += len(rows)
            case {"params": values}:
                count["parameter"] += len(values)
            case {"tags": values}:
                count["tag"] += len(values)
            case {"do": "log_model"}:
                count["model"] += 1
            case {"do": "log_file" | "log_text"}:
                count["file"] += 1
            case _:
                status = [f"the status {one.get('status', 'RUNNING')}"]
    parts = [f"{number} {name}{'s' if number > 1 else ''}" for name, number in count.items() if number]
    parts += status
    return " and ".join(filter(None, [", ".join(parts[:-1]), *parts[-1:]])) or "nothing"
