"""The notebooks of the documentation, and what a notebook shows."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from docs import notebook_pages as notebooks

CELLS = """
import dmaml_pl, pytorch_lightning as pl
from tests.recipes import small_data, small_maml
data, settings = small_data(), {"accelerator": "cpu", "max_steps": 20, "logger": False}
# next cell
training = dmaml_pl.fit(small_maml(run_length=4), data, devices=2, **settings)
# next cell
training
# next cell
module, trainer = small_maml(), pl.Trainer(devices=2, strategy="dmaml", enable_progress_bar=False, **settings)
trainer.fit(module, data)
print(trainer.test(module, data, verbose=False)[0]["test/mse"])
# next cell
dmaml_pl.fit(small_maml(), data, devices="many", **settings)
"""


@pytest.fixture
def jupyter() -> Any:
    pytest.importorskip("ipykernel")
    return pytest.importorskip("nbclient")


@pytest.mark.parametrize("file", notebooks.files(), ids=lambda file: file.stem)
def test_a_notebook_of_the_documentation_keeps_what_it_shows_and_nothing_of_a_machine(file: Path) -> None:
    page, pictures = notebooks.as_markdown(file)
    assert page.startswith("# ")
    assert pictures
    assert not re.search(r"/tmp|/home|/root|Traceback|\x1b", page)  # noqa: S108 - looked for, not written to
    cells = json.loads(file.read_text())["cells"]
    assert all(cell["outputs"] for cell in cells if cell["cell_type"] == "code" and "fit(" in "".join(cell["source"]))


@pytest.mark.slow
@pytest.mark.usefixtures("jupyter")
@pytest.mark.parametrize("file", notebooks.files(), ids=lambda file: file.stem)
def test_a_notebook_of_the_documentation_runs_from_its_first_cell_to_its_last(file: Path, tmp_path: Path) -> None:
    executed = notebooks.execute(file, tmp_path)
    assert all(output.output_type != "error" for cell in executed.cells for output in cell.get("outputs", ()))


@pytest.mark.slow
def test_a_notebook_shows_table_and_figures_once_forks_workers_and_tells_a_mistake_in_one_line(
    jupyter: Any, tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import nbformat

    monkeypatch.setenv("PYTHONPATH", str(repository))
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(cell) for cell in CELLS.split("# next cell\n")]
    )
    place = {"metadata": {"path": tmp_path}}
    jupyter.NotebookClient(notebook, timeout=200, kernel_name="python3", allow_errors=True, resources=place).execute()
    _, fitted, shown, tested, refused = [cell.outputs for cell in notebook.cells]
    said = "".join(output.get("text", "") for output in fitted)
    pictures = [output for output in fitted if "image/png" in output.get("data", {})]
    tables = [output for output in fitted if "adaptation steps" in output.get("data", {}).get("text/plain", "")]
    assert (said.count("Trained 5 runs"), len(pictures), len(tables)) == (1, 2, 1)
    assert "meta-trained" in shown[-1].data["text/markdown"]
    assert float(tested[-1].text) > 0
    (error,) = refused
    assert error.traceback == [f"ConfigError: {error.evalue}"]
    assert error.evalue.startswith("trainer.devices is 'many'")
