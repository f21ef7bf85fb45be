"""Adapted networks as ONNX, run by ONNX Runtime."""

from __future__ import annotations

import json
from pathlib import Path

import onnxruntime
import pytest
import torch

import dmaml_pl
from data_modules import Glyphs
from dmaml_pl.adapting import onnx as exporting
from dmaml_pl.errors import CheckpointError, ConfigError
from tests.adapting import first_task


def test_onnx_gives_the_same_probabilities_for_any_number_of_samples(
    letters: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """With batch norm by the statistics of the samples at hand, which has to depend on their number."""
    task = first_task(Glyphs(queries=2))
    names = ["abcde"[int(number)] for number in task.support_y]
    adapted = dmaml_pl.load(letters).adapt(task.support_x, names)
    adapted.to_onnx("adapted.onnx")
    session = onnxruntime.InferenceSession("adapted.onnx", providers=["CPUExecutionProvider"])
    for samples in (1, 2, 7):
        x = task.query_x[:samples]
        (found,) = session.run(["probabilities"], {"x": x.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), adapted.predict(x))
    assert json.loads(session.get_modelmeta().custom_metadata_map["classes"]) == ["a", "b", "c", "d", "e"]
    assert capfd.readouterr() == ("", "")


def test_onnx_of_a_regression_gives_values(sines: Path) -> None:
    adapted = dmaml_pl.load(sines).adapt([0.0, 1.0, 2.0], [0.0, 1.0, 0.5])
    adapted.to_onnx("adapted.onnx")
    session = onnxruntime.InferenceSession("adapted.onnx", providers=["CPUExecutionProvider"])
    x = torch.linspace(-1, 1, 5).unsqueeze(1)
    (found,) = session.run(["values"], {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), adapted.predict(x))


def test_missing_packages_are_named(sines: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting, "PACKAGES", ("onnx", "onnx_that_is_not_there"))
    with pytest.raises(ConfigError, match=r"needs onnx_that_is_not_there: install the extra, .*dmaml_pl\[onnx\]"):
        dmaml_pl.load(sines).adapt([0.0, 1.0], [0.0, 1.0]).to_onnx("adapted.onnx")


def test_a_file_that_cannot_be_written_is_named(sines: Path) -> None:
    Path("file").touch()
    adapted = dmaml_pl.load(sines).adapt([0.0, 1.0], [0.0, 1.0])
    with pytest.raises(CheckpointError, match=r"file/adapted\.pt could not be written"):
        adapted.save("file/adapted.pt")
