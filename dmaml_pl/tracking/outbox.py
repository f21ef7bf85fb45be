"""What waits to be sent to one MLflow run, in order, on this machine's disk.

Everything that is to be logged is written here first, and sent from here. So it survives a store that is away, and a
process that is killed. A folder of its own for each MLflow run, below `{save_dir}/outbox`, holds

- `outbox.db`: a SQLite database of the operations that wait, and of which MLflow run of which store they wait for;
- `files/`: copies of what is to be uploaded;
- `refused.jsonl`: what the store will never take, and why.

An operation counts as sent once the store has taken it, so a process that is killed in between sends it again:
operations are such that this changes nothing (see `operations`). An operation is committed when it is written, but not
synchronised to the disk: it survives this process at once, and a power failure from the next `keep` on. The database is
locked for others as long as a process has it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sqlite3
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from dmaml_pl.errors import TrackingError

Operation = dict[str, Any]

_FOLDER, _DATABASE, _REFUSED, _FILES = "outbox", "outbox.db", "refused.jsonl", "files"
AT_ONCE = 500  # operations that are read together
_FAILURES = (OSError, sqlite3.Error)  # of the disk

# Exclusive: whoever is first has it, without a file of locks or shared memory. With a write-ahead log and NORMAL a
# commit is one write, and what a power failure leaves is whole; synchronised is at checkpoints.
_SETUP = """
PRAGMA locking_mode = EXCLUSIVE;
PRAGMA journal_mode = WAL;
PRAGMA synchronous = NORMAL;
CREATE TABLE IF NOT EXISTS waiting (number INTEGER PRIMARY KEY, operation TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS about (only INTEGER PRIMARY KEY CHECK (only = 1), text TEXT NOT NULL);
"""


class Entry(NamedTuple):
    """An operation that waits, and its place in the order."""

    number: int
    operation: Operation


class Outbox:
    """The operations that wait for one MLflow run; safe to be filled by one thread and emptied by another.

    Where the disk is full or cannot be written, operations wait in memory instead, and are written when that works.

    Args:
        folder: where they are kept; made when there is something to keep.
        about: for whoever finds the folder later: which MLflow run of which store; by default what is there already.
    """

    def __init__(self, folder: Path, about: Operation | None = None) -> None:
        self.folder = folder
        self.about = about or {}
        self._mutex = threading.RLock()
        self._database: sqlite3.Connection | None = None
        self._last = 0  # number of the last operation in the database
        self._sent = 0  # of the last one that the store has taken
        self._unwritten: deque[str] = deque()
        self._made: list[Path] = []

    @classmethod
    def claim(cls, save_dir: Path, run_id: str, about: Operation) -> Outbox:
        """The outbox of an MLflow run, for this process alone: what another one has left in it waits in it still.

        A second process that writes to the same MLflow run at the same time gets a folder beside the first.
        """
        outbox, number = cls(save_dir.absolute() / _FOLDER / run_id, about), 1
        with contextlib.suppress(*_FAILURES):  # then operations wait in memory
            while not outbox.adopt():
                number += 1
                outbox.folder = outbox.folder.with_name(f"{run_id}.{number}")
        return outbox

    def adopt(self) -> bool:
        """Take over what is in the folder; returns False if another process has it, and raises if it cannot be read."""
        try:
            self._open()
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY:
                raise
            return False
        return True

    # Filling

    def append(self, operation: Operation) -> None:
        """Add an operation at the end; never raises."""
        with self._mutex:
            self._unwritten.append(json.dumps(operation, separators=(",", ":"), default=str))
            self._write()

    def stage(self, path: Path, *, replaced_whole: bool) -> str:
        """Keep a file or folder as it is now; returns what to call it in an operation.

        A file that is later `replaced_whole`, by a new one in its place, needs no copy: a second name keeps it.
        """

        def copy(kept: Path) -> None:
            if replaced_whole:
                with contextlib.suppress(OSError):  # another disk, or a file system without links
                    os.link(path, kept)
                    return
            (shutil.copytree if path.is_dir() else shutil.copy2)(path, kept)

        try:
            return self.make(path.name, copy)
        except _FAILURES:  # no room for a copy: send it from where it is
            return str(path.absolute())

    def make(self, name: str, write: Callable[[Path], object]) -> str:
        """Keep a new file or folder of this name, which `write` writes; returns what to call it in an operation."""
        with self._mutex:
            if self._database is None:
                self._open()
            files = self.folder / _FILES
            files.mkdir(exist_ok=True)
        place = Path(tempfile.mkdtemp(dir=files))
        try:
            write(place / name)
        except BaseException:
            shutil.rmtree(place, ignore_errors=True)
            raise
        return (place / name).relative_to(self.folder).as_posix()

    def keep(self) -> bool:
        """Bring all that waits to the disk, so that it survives a power failure; returns whether it is there."""
        with self._mutex:
            self._write()
            if self._database is None or not self.waits or self._unwritten:
                return not self._unwritten
            try:
                (blocked, *_) = self._database.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            except sqlite3.Error:
                return False
            return not blocked

    # Emptying

    @property
    def waits(self) -> bool:
        """Whether any operation waits."""
        with self._mutex:
            return self._sent < self._last or bool(self._unwritten)

    def read(self, at_most: int = AT_ONCE) -> list[Entry]:
        """The first operations that wait; empty if there are none."""
        with self._mutex:
            self._write()
            found: list[tuple[int, str]] = []
            if self._database is not None and self._sent < self._last:
                wanted = "SELECT number, operation FROM waiting WHERE number > ? ORDER BY number LIMIT ?"
                found = self._database.execute(wanted, (self._sent, at_most)).fetchall()
            found += enumerate(islice(self._unwritten, at_most - len(found)), self._last + 1)
        return [Entry(number, json.loads(text)) for number, text in found]

    def everything(self) -> list[Operation]:
        """All operations that wait."""
        return [entry.operation for entry in self.read(1 << 62)]

    def acknowledge(self, entries: Sequence[Entry]) -> None:
        """The store has taken these, which are the first that wait; what was staged for them goes."""
        with self._mutex:
            self._sent = entries[-1].number
            while self._last < self._sent:
                self._unwritten.popleft()
                self._last += 1
            self._remove_sent()
        for entry in entries:
            staged = Path(entry.operation.get("staged", "/"))
            if not staged.is_absolute():
                shutil.rmtree((self.folder / staged).parent, ignore_errors=True)

    def set_aside(self, entry: Entry, reason: str) -> None:
        """The store will never take this one: keep it apart, with the reason, and go on with the next."""
        with contextlib.suppress(OSError), (self.folder / _REFUSED).open("a") as file:
            file.write(json.dumps(entry.operation | {"refused": reason}) + "\n")
        self.acknowledge([entry._replace(operation={})])

    @property
    def refused(self) -> int:
        """How many operations the store would not take."""
        file = self.folder / _REFUSED
        return len(file.read_text().splitlines()) if file.is_file() else 0

    def close(self) -> None:
        """Let other processes have the outbox; the folder goes where nothing is in it any more."""
        with self._mutex:
            if self._database is None:
                return
            self._remove_sent()
            empty = not self.waits and not self.refused
            self._database.close()
            self._database = None
            self._last = self._sent = 0
            if not empty:
                return
            shutil.rmtree(self.folder, ignore_errors=True)
            for folder in (self.folder.parent, *self._made):
                with contextlib.suppress(OSError):  # something else is in it
                    folder.rmdir()
            self._made.clear()

    # The database

    def _open(self) -> None:
        save_dir = self.folder.parent.parent
        self._made += [] if save_dir.exists() else [save_dir]
        self.folder.mkdir(0o700, parents=True, exist_ok=True)
        database = sqlite3.connect(self.folder / _DATABASE, timeout=0, isolation_level=None, check_same_thread=False)
        try:
            database.executescript(_SETUP)
            if self.about:
                database.execute("INSERT OR IGNORE INTO about VALUES (1, ?)", (json.dumps(self.about),))
            (about,) = database.execute("SELECT text FROM about").fetchone() or ("{}",)
            first, last = database.execute("SELECT min(number), max(number) FROM waiting").fetchone()
        except BaseException:
            database.close()
            raise
        self._database, self.about = database, json.loads(about)
        self._sent, self._last = (first or 1) - 1, last or 0

    def _remove_sent(self) -> None:
        if self._database is not None:
            with contextlib.suppress(sqlite3.Error):  # a full disk; what is sent again changes nothing
                self._database.execute("DELETE FROM waiting WHERE number <= ?", (self._sent,))

    def _write(self) -> None:
        """Write what waits in memory, as far as the disk takes it."""
        try:
            if self._unwritten and self._database is None:
                self._open()
            while self._unwritten and self._database is not None:
                self._database.execute("INSERT INTO waiting VALUES (?, ?)", (self._last + 1, self._unwritten[0]))
                self._unwritten.popleft()
                self._last += 1
        except _FAILURES:
            return


def find_outboxes(save_dir: Path) -> list[Path]:
    """The folders of outboxes that were left in a folder of tracking; each begins with the id of its MLflow run.

    Raises:
        TrackingError: what is called as their folder is none.
    """
    folder = save_dir.absolute() / _FOLDER
    if os.path.lexists(folder) and not folder.is_dir():
        raise TrackingError(f"{folder} is no folder, which trainings keep there for what waits: move it away.")
    return [file.parent for file in sorted(folder.glob(f"*/{_DATABASE}"))]
