"""Tables for people."""

from __future__ import annotations

import io
from typing import Any

import pytest

from dmaml_pl.console.tables import fits, markdown, print_table

ROWS: list[dict[str, Any]] = [{"file": "a|b.png", "prediction": 0.5}, {"file": "c.png", "prediction": None}]


def test_markdown_lines_up_as_text_too_with_numbers_to_the_right() -> None:
    assert markdown([{"a": "x", "long name": "2 ± 0.1"}, {"a": "333", "long name": "4"}]) == (
        "| a   | long name |\n|-----|-----------|\n| x   |   2 ± 0.1 |\n| 333 |         4 |"
    )


def test_a_cell_of_markdown_cannot_end_its_column_and_a_long_one_is_not_folded() -> None:
    lines = markdown([*ROWS, {"file": "d" * 500, "prediction": 1.0}]).splitlines()
    assert lines[2].startswith("| a\\|b.png ")
    assert lines[3].endswith("|          - |")
    assert lines[4] == f"| {'d' * 500} |     1.0000 |"


def test_on_a_narrow_terminal_nothing_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr("sys.stdout", terminal)
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("TERM", "xterm")
    row = {"file": "a/picture_with_a_long_name.png", "prediction": "some long class"} | dict.fromkeys("abc", 0.25)
    assert not fits([row])
    assert fits([{"file": "a"}])
    print_table([row])
    shown = "".join(line.split("│")[1].strip() for line in terminal.getvalue().splitlines() if line.startswith("│"))
    assert shown == row["file"]
    assert "…" not in terminal.getvalue()


def test_without_rows_there_is_no_markdown() -> None:
    assert markdown([]) == ""


def test_a_printed_table_has_a_title_and_takes_nothing_for_markup(capsys: pytest.CaptureFixture[str]) -> None:
    print_table([{"class": "[red]", "p": 0.25}], title="Some [bold] predictions")
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["", "Some [bold] predictions"]
    assert "│ [red] │ 0.2500 │" in lines
