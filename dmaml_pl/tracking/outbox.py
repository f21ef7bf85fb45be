"""What waits to be sent to one MLflow run, in order, on this machine's disk.

Everything that is to be logged is written here first, and sent from here. So it survives a store that is away, and a
process that is killed. A folder of its own for each MLflow run, below `{save_dir}/outbox`, holds

- `about.json`: which MLflow run of which store;
- `00000001.jsonl`: an operation a line, only ever appended to; a long training goes on in `00000002.jsonl`;
- `00000001.sent`: how many bytes of it the store has taken;
- `files/`: copies of what is to be uploaded;
- `refused.jsonl`: what the store will never take, and why.

An operation counts as sent once the store has taken it, so a process that is killed in between sends it again:
operations are such that this changes nothing (see `operations`). A line is not synchronised to the disk when it is
written: it survives this process at once, and a power failure from the next `keep` on.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

Operation = dict[str, Any]

FOLDER = "outbox"
_ABOUT, _LOCK, _REFUSED, _FILES = "about.json", "lock", "refused.jsonl", "files"
_CHUNK = 1 << 18  # bytes read at once
_LONG = 1 << 22  # bytes after which a new file is begun, once all of it is sent


class Entry(NamedTuple):
    """An operation that waits, and the bytes that it takes."""

    operation: Operation
    size: int


class Outbox:
    """The operations that wait for one MLflow run; safe to be filled by one thread and emptied by another.

    Where the disk is full or cannot be written, operations wait in memory instead, and are written when that works.

    Args:
        folder: where they are kept; made when there is something to keep.
        about: what `about.json` says, for whoever finds the folder later.
    """

    def __init__(self, folder: Path, about: Operation) -> None:
        self.folder = folder
        self._about = about
        self._mutex = threading.RLock()
        self._lock = FileLock(folder / _LOCK, thread_local=False)
        self._file: int | None = None
        self._acknowledged: int | None = None
        self._number = 1
        self._size = self._sent = 0
        self._unwritten: list[bytes] = []
        self._staged = 0
        self._made: list[Path] = []

    @classmethod
    def claim(cls, save_dir: Path, run_id: str, about: Operation) -> Outbox:
        """The outbox of an MLflow run, for this process alone: what another one has left in it waits in it still.

        A second process that writes to the same MLflow run at the same time gets a folder beside the first.
        """
        number = 1
        while True:
            name = run_id if number == 1 else f"{run_id}.{number}"
            outbox = cls(save_dir.absolute() / FOLDER / name, about)
            if outbox.adopt():
                return outbox
            number += 1

    def adopt(self) -> bool:
        """Take over what is in the folder, if anything is; False if another process has it."""
        with self._mutex:
            try:
                self._open()
            except Timeout:
                return False
            except OSError:  # then operations wait in memory
                pass
            return True

    # Filling

    def append(self, operation: Operation) -> None:
        """Add an operation at the end; never raises."""
        line = json.dumps(operation, separators=(",", ":")).encode() + b"\n"
        with self._mutex:
            self._unwritten.append(line)
            self._write()

    def stage(self, path: Path, *, replaced_whole: bool) -> str:
        """Keep a file or folder as it is now; returns what to call it in an operation.

        Args:
            path: the file or folder.
            replaced_whole: whether whoever changes the file later puts a new one in its place, so that a second name
                for it keeps its content without a copy.
        """
        with self._mutex:
            try:
                if self._file is None:
                    self._open()
                while (place := self.folder / _FILES / str(self._staged)).exists():
                    self._staged += 1
                place.mkdir(parents=True)
                kept = place / path.name
                if path.is_dir():
                    shutil.copytree(path, kept)
                elif not (replaced_whole and _linked(path, kept)):
                    shutil.copy2(path, kept)
            except (Timeout, OSError):  # no room for a copy: send it from where it is
                return str(path.absolute())
            return kept.relative_to(self.folder).as_posix()

    def keep(self) -> bool:
        """Bring all that waits to the disk, so that it survives a power failure; returns whether it is there."""
        with self._mutex:
            self._write()
            if self._file is None or self._unwritten:
                return not self._unwritten
            try:
                folder = os.open(self.folder, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    os.fsync(self._file)
                    os.fsync(folder)
                finally:
                    os.close(folder)
            except OSError:
                return False
            return True

    def unstage(self, name: str) -> None:
        """Remove what `stage` kept."""
        if not Path(name).is_absolute():
            shutil.rmtree((self.folder / name).parent, ignore_errors=True)

    # Emptying

    @property
    def waits(self) -> bool:
        """Whether any operation waits."""
        with self._mutex:
            return self._sent < self._size or bool(self._unwritten)

    def read(self) -> list[Entry]:
        """The first operations that wait, about 256 KB of them; empty if there are none."""
        with self._mutex:
            self._write()
            lines = self._lines(self._sent) if self._sent < self._size else self._unwritten[:1000]
        return [Entry(json.loads(line), len(line)) for line in lines]

    def acknowledge(self, entries: Sequence[Entry]) -> None:
        """The store has taken these, which are the first that wait."""
        with self._mutex:
            self._sent += sum(entry.size for entry in entries)
            while self._sent > self._size:
                self._sent -= len(self._unwritten.pop(0))
            if self._acknowledged is not None:
                with contextlib.suppress(OSError):  # what is sent again changes nothing
                    os.pwrite(self._acknowledged, b"%020d" % self._sent, 0)
            if self._sent == self._size > _LONG and not self._unwritten:
                with contextlib.suppress(OSError):
                    self._begin(self._number + 1)

    def set_aside(self, entry: Entry, reason: str) -> None:
        """The store will never take this one: keep it apart, with the reason, and go on with the next."""
        with contextlib.suppress(OSError), (self.folder / _REFUSED).open("a") as file:
            file.write(json.dumps(entry.operation | {"refused": reason}) + "\n")
        self.acknowledge([entry])

    def everything(self) -> Iterator[Operation]:
        """All operations that wait."""
        with self._mutex:
            place, lines = self._sent, list(self._unwritten)
            while place < self._size:
                part = self._lines(place)
                place += sum(map(len, part))
                yield from (json.loads(line) for line in part)
        yield from (json.loads(line) for line in lines)

    @property
    def refused(self) -> int:
        """How many operations the store would not take."""
        file = self.folder / _REFUSED
        return len(file.read_text().splitlines()) if file.is_file() else 0

    def last_written_ms(self) -> int:
        """When the last operation was written, in milliseconds since 1970."""
        with self._mutex:
            return 0 if self._file is None else os.fstat(self._file).st_mtime_ns // 1_000_000

    def close(self) -> None:
        """Let other processes have the outbox; the folder goes where nothing is in it any more."""
        with self._mutex:
            empty = not self.waits and not self.refused
            self._release()
            self._size = self._sent = 0
            self._unwritten.clear()
            if not empty:
                return
            shutil.rmtree(self.folder, ignore_errors=True)
            for folder in (self.folder.parent, *self._made):
                with contextlib.suppress(OSError):  # something else is in it
                    folder.rmdir()
            self._made.clear()

    # The files

    def _open(self) -> None:
        save_dir = self.folder.parent.parent
        self._made += [] if save_dir.exists() else [save_dir]
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock.acquire(timeout=0)
        try:
            about = self.folder / _ABOUT
            if not about.exists():
                about.touch(0o600)
                about.write_text(json.dumps(self._about, indent=1) + "\n")
            numbers = [int(file.stem) for file in self.folder.glob("*.jsonl") if file.stem.isdigit()]
            self._begin(max(numbers, default=1))
        except OSError:
            self._release()
            raise

    def _begin(self, number: int) -> None:
        """Go on in the file of this number, and remove those before, of which all is sent."""
        name = self.folder / f"{number:08d}"
        file = os.open(name.with_suffix(".jsonl"), os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        acknowledged = os.open(name.with_suffix(".sent"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._close_files()
        self._file, self._acknowledged, self._number = file, acknowledged, number
        self._size = _whole_lines(file)
        os.ftruncate(file, self._size)  # the process was killed in the middle of a line
        sent = os.pread(acknowledged, 20, 0)
        self._sent = min(int(sent), self._size) if len(sent) == 20 else 0
        for old in self.folder.glob("*.jsonl"):
            if old.stem.isdigit() and int(old.stem) < number:
                old.unlink(missing_ok=True)
                old.with_suffix(".sent").unlink(missing_ok=True)

    def _write(self) -> None:
        while self._unwritten:
            try:
                if self._file is None:
                    self._open()
                assert self._file is not None  # noqa: S101 (opened above)
                line, written = self._unwritten[0], 0
                while written < len(line):
                    written += os.write(self._file, line[written:])
            except (OSError, Timeout):
                if self._file is not None:
                    with contextlib.suppress(OSError):
                        os.ftruncate(self._file, self._size)
                return
            self._size += len(line)
            del self._unwritten[0]

    def _lines(self, place: int) -> list[bytes]:
        """Whole lines of the file from a place on: at least one."""
        assert self._file is not None  # noqa: S101 (something was written)
        length = _CHUNK
        while True:
            chunk = os.pread(self._file, min(length, self._size - place), place)
            end = chunk.rfind(b"\n") + 1
            if end:
                return chunk[:end].splitlines(keepends=True)
            length *= 4

    def _release(self) -> None:
        self._close_files()
        self._lock.release()

    def _close_files(self) -> None:
        for file in (self._file, self._acknowledged):
            if file is not None:
                os.close(file)
        self._file = self._acknowledged = None


def _linked(path: Path, place: Path) -> bool:
    try:
        os.link(path, place)
    except OSError:  # another disk, or a file system without links
        return False
    return True


def _whole_lines(file: int) -> int:
    """Bytes of a file up to the end of its last whole line."""
    end = os.fstat(file).st_size
    while end:
        start = max(end - _CHUNK, 0)
        found = os.pread(file, end - start, start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0


def find_outboxes(save_dir: Path) -> list[tuple[Path, Operation]]:
    """The folders of outboxes that were left in a folder of tracking, and what each says of itself."""
    found = []
    for about in sorted((save_dir.absolute() / FOLDER).glob(f"*/{_ABOUT}")):
        with contextlib.suppress(OSError, ValueError):
            found.append((about.parent, json.loads(about.read_text())))
    return found
