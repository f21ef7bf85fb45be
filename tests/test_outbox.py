"""What waits for MLflow waits on disk: in order, whole, and for whoever comes next."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from dmaml_pl.errors import TrackingError
from dmaml_pl.tracking.outbox import Outbox
from dmaml_pl.tracking.tracker import MLflowTracker
from tests.tracked import full_disk

ABOUT = {"run_id": "a" * 32}


def claim(folder: Path) -> Outbox:
    return Outbox.claim(folder, ABOUT["run_id"], ABOUT)


def numbers(outbox: Outbox) -> list[int]:
    return [operation["n"] for operation in outbox.everything()]


def test_operations_come_out_in_order_and_only_what_was_not_acknowledged_comes_again(tmp_path: Path) -> None:
    first = claim(tmp_path)
    for number in range(5):
        first.append({"n": number})
    entries = first.read()
    assert [entry.operation["n"] for entry in entries] == [0, 1, 2, 3, 4]
    first.acknowledge(entries[:2])
    first.close()
    second = claim(tmp_path)
    assert numbers(second) == [2, 3, 4]
    second.append({"n": 5})
    second.acknowledge(second.read())
    assert not second.waits
    second.close()
    assert not list(tmp_path.iterdir())


def test_a_second_writer_gets_a_folder_of_its_own(tmp_path: Path) -> None:
    first = claim(tmp_path)
    first.append({"n": 1})
    second = claim(tmp_path)
    second.append({"n": 2})
    assert (numbers(first), numbers(second)) == ([1], [2])
    assert first.folder != second.folder


def test_closing_twice_removes_nothing_that_waits(tmp_path: Path) -> None:
    outbox = claim(tmp_path)
    outbox.append({"n": 1})
    outbox.close()
    outbox.close()
    assert numbers(claim(tmp_path)) == [1]


def test_what_was_logged_while_the_outbox_was_closed_comes_after_what_waited_in_it(tmp_path: Path) -> None:
    outbox = claim(tmp_path)
    outbox.append({"n": 1})
    outbox.close()
    other = claim(tmp_path)
    outbox.append({"n": 2})
    assert numbers(outbox) == [2]
    other.close()
    outbox.append({"n": 3})
    assert numbers(outbox) == [1, 2, 3]


def test_the_outbox_of_a_long_training_stays_small(tmp_path: Path) -> None:
    outbox = claim(tmp_path)
    for number in range(20_000):
        outbox.append({"n": number})
        if number % 10 == 9:
            assert [entry.operation["n"] for entry in outbox.read()] == list(range(number - 9, number + 1))
            outbox.acknowledge(outbox.read())
    assert sum(file.stat().st_size for file in outbox.folder.iterdir()) < 6_000_000
    outbox.append({"n": 20_000})
    outbox.close()
    assert numbers(claim(tmp_path)) == [20_000]


def test_what_stands_where_outboxes_are_kept_and_is_no_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "outbox").write_text("x")
    with pytest.raises(TrackingError, match="/outbox is no folder, which trainings keep there for what waits: move it"):
        MLflowTracker(save_dir=str(tmp_path)).open()


def test_a_long_text_is_kept_whole(tmp_path: Path) -> None:
    outbox = claim(tmp_path)
    outbox.append({"n": 1, "text": "x" * 1_000_000})
    outbox.append({"n": 2})
    first = outbox.read()[0]
    assert len(first.operation["text"]) == 1_000_000
    outbox.acknowledge([first])
    assert numbers(outbox) == [2]


def test_where_no_more_can_be_written_operations_wait_in_memory_and_keep_their_order(tmp_path: Path) -> None:
    outbox = claim(tmp_path)
    outbox.append({"n": 0})
    with full_disk(bytes_left_in_a_file=20):
        for number in range(1, 4):
            outbox.append({"n": number})
        assert numbers(outbox) == [0, 1, 2, 3]
        outbox.acknowledge(outbox.read(at_most=2))
        assert [entry.operation["n"] for entry in outbox.read()] == [2, 3]
        outbox.acknowledge(outbox.read()[:1])
    outbox.append({"n": 4})
    outbox.close()
    assert numbers(claim(tmp_path)) == [3, 4]


@pytest.mark.parametrize("replaced_whole", [True, False])
def test_a_staged_file_stays_as_it_was(tmp_path: Path, *, replaced_whole: bool) -> None:
    file = tmp_path / "last.ckpt"
    file.write_text("first")
    outbox = claim(tmp_path)
    name = outbox.stage(file, replaced_whole=replaced_whole)
    outbox.append({"staged": name})
    if replaced_whole:
        other = tmp_path / "other"
        other.write_text("second")
        other.replace(file)
    else:
        file.write_text("second")
    assert (outbox.folder / name).read_text() == "first"
    outbox.acknowledge(outbox.read())
    assert not (outbox.folder / name).exists()


def test_keeping_brings_what_waits_into_the_database_and_tells_of_what_it_could_not_write(tmp_path: Path) -> None:
    """SQLite synchronises at such a checkpoint, unless it is told to synchronise never."""

    def kept() -> list[int]:
        """What the database has without the log beside it."""
        copy = tmp_path / "copy.db"
        copy.write_bytes((outbox.folder / "outbox.db").read_bytes())
        with closing(sqlite3.connect(copy)) as database:
            return [json.loads(text)["n"] for (text,) in database.execute("SELECT operation FROM waiting")]

    outbox = claim(tmp_path / "runs")
    outbox.append({"n": 0})
    assert outbox.keep()
    outbox.append({"n": 1})
    assert kept() == [0]
    assert outbox.keep()
    assert kept() == [0, 1]
    assert outbox._database is not None
    assert outbox._database.execute("PRAGMA synchronous").fetchone() != (0,)
    with full_disk(bytes_left_in_a_file=20):
        outbox.append({"n": "a" * 10_000})
        assert not outbox.keep()
    assert outbox.keep()
    assert kept() == [0, 1, "a" * 10_000]
