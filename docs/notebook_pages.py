"""The notebooks of the documentation: `python -m docs.notebook_pages` executes them anew, and keeps what they show.

They are executed in an empty folder, so that nothing in them is of this machine. The site has them as pages, made of
what was kept.
"""

from __future__ import annotations

import base64
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).with_name("notebooks")
SECONDS = 600


def files() -> list[Path]:
    """All of them."""
    return sorted(FOLDER.glob("*.ipynb"))


def execute(file: Path, folder: Path) -> Any:
    """Execute a notebook in a folder; returns it with what it has shown.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
    """
    import nbformat  # noqa: PLC0415 - the site is made without Jupyter
    from nbclient import NotebookClient  # noqa: PLC0415 - the same

    notebook = nbformat.read(file, as_version=4)
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # where `dmaml` is
    NotebookClient(notebook, timeout=SECONDS, kernel_name="python3", resources={"metadata": {"path": folder}}).execute()
    return notebook


def keep(file: Path, notebook: Any) -> None:
    """Write a notebook with what it has shown, without what is of this machine or time."""
    for cell in notebook.cells:
        cell.metadata = {}
        for output in cell.get("outputs", ()):
            output.pop("transient", None)
            output.get("data", {}).pop("text/html", None) if "image/png" in output.get("data", {}) else None
        cell.get("outputs", [])[:] = [output for output in _joined(cell.get("outputs", ())) if _shows_something(output)]
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    file.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def as_markdown(file: Path) -> tuple[str, dict[str, bytes]]:
    """A notebook as a page, and its pictures by name."""
    pictures: dict[str, bytes] = {}
    parts = [f"[This page is a notebook]({file.name}), to be opened in Jupyter."]
    for cell in json.loads(file.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```py\n{source}\n```")
        for output in cell["outputs"]:
            if png := output.get("data", {}).get("image/png"):
                name = f"{file.stem}_{len(pictures)}.png"
                pictures[name] = base64.b64decode("".join(png))
                parts.append(f"![]({name})")
            elif table := output.get("data", {}).get("text/markdown"):
                parts.append("".join(table))
            elif (text := _text(output)) and parts[-1].startswith("```text"):  # goes on
                parts[-1] = f"{parts[-1].removesuffix('```')}\n{text}\n```"
            elif text:
                parts.append(f"```text\n{text}\n```")
    title = parts.pop(1)  # the page begins with its title
    return "\n\n".join([title, *parts]) + "\n", pictures


def _text(output: dict[str, Any]) -> str:
    text = "".join(output.get("text", "")) or "".join(output.get("data", {}).get("text/plain", ""))
    return re.sub(r"\x1b\[[\d;]*m", "", text).strip("\n")  # without colours


def _joined(outputs: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Outputs, with a text that came in pieces made whole."""
    joined: list[dict[str, Any]] = []
    for output in outputs:
        if joined and "name" in output and output["name"] == joined[-1].get("name"):
            joined[-1]["text"] += output["text"]
        else:
            joined.append(output)
    return joined


def _shows_something(output: dict[str, Any]) -> bool:
    return "image/png" in output.get("data", {}) or bool(_text(output).strip())


def _main() -> Iterator[str]:
    for file in files():
        with tempfile.TemporaryDirectory() as folder:
            keep(file, execute(file, Path(folder)))
        yield file.name


if __name__ == "__main__":
    for name in _main():
        print(name)
