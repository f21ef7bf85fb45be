"""`make gpu-check`, small and on the CPU: it is there to be run where nobody can mend it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu_check import sections
from benchmarks.gpu_check.__main__ import NO_GPU, SECTIONS, main
from benchmarks.gpu_check.sections import Row, Section, Setting, Tell
from dmaml_pl.engines import compiled


# Lightning's command line calls a function of jsonargparse that is on its way out.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_every_section_runs_through_small_and_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def traced(graph: Callable[..., Any], examples: list[torch.Tensor]) -> Callable[..., Any]:
        return graph

    monkeypatch.setattr(compiled, "machine_code", traced)  # which takes long
    assert main(["--device", "cpu", "--small", "--seconds", "1500", "--output", "results"]) == 0
    written = json.loads(Path("results/gpu_check.json").read_text())
    assert {row["section"] for row in written["rows"]} == SECTIONS.keys()
    assert not [row for row in written["rows"] if "failed" in row], Path("results/gpu_check.log").read_text()
    assert Path("results/gpu_check.md").read_text().count("\n## ") == len(SECTIONS)
    assert " 0 of them failed" in capsys.readouterr().out


def _rows(section: Section, folder: Path, seconds: float = 60.0) -> list[Row]:
    setting = Setting("cpu", small=True, ends=time.monotonic() + seconds)
    return list(sections.run(section, setting, folder / "log"))


def test_a_row_that_fails_is_told_and_the_next_ones_go_on(tmp_path: Path) -> None:
    def section(setting: Setting, tell: Tell) -> None:
        sections.attempt(tell, {"what": "first"}, lambda: {"ms": 1 / 0})
        sections.attempt(tell, {"what": "second"}, lambda: {"ms": 1})

    failed = {"what": "first", "failed": "ZeroDivisionError: division by zero"}
    assert _rows(section, tmp_path) == [failed, {"what": "second", "ms": 1}]
    assert "Traceback" in (tmp_path / "log").read_text()


def test_what_a_section_told_before_it_was_cut_off_or_died_is_kept(tmp_path: Path) -> None:
    def hangs(setting: Setting, tell: Tell) -> None:
        tell({"what": "first"})
        time.sleep(600)

    def dies(setting: Setting, tell: Tell) -> None:
        tell({"what": "first"})
        raise SystemExit(3)

    for section, why, seconds in ((hangs, "cut off by its budget", 0.5), (dies, "SystemExit: 3", 60.0)):
        first, failure = _rows(section, tmp_path, seconds)
        assert first == {"what": "first"}
        assert why in failure["failed"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_line_says_how_to_run_it_on_the_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--output", "results"]) == 2
    assert capsys.readouterr().out == f"{NO_GPU}\n"
