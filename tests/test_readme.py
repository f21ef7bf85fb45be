"""What README and map promise in code."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from tests.trainings import environment


def test_the_python_example_of_the_readme_learns_something_and_says_so_once(repository: Path, tmp_path: Path) -> None:
    text = (repository / "README.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert (
        len([line for line in example.splitlines() if line.strip() and not line.startswith(("import", "from"))]) <= 10
    )
    script = tmp_path / "example.py"
    script.write_text(example)
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    ((before, after),) = re.findall(r"(\d\.\d+) before adaptation, (\d\.\d+) after", done.stdout)
    assert float(after) < float(before) / 4


def test_every_room_on_the_map_is_there_and_no_other(repository: Path) -> None:
    text = (repository / "docs" / "map.md").read_text()
    (drawn,) = re.findall(r"```text\n(dmaml_pl/.*?)```", text, re.DOTALL)
    mapped = {line.split()[0].rstrip("/") for line in drawn.splitlines() if line.startswith("  ")}
    rooms = {
        path.name
        for path in (repository / "dmaml_pl").iterdir()
        if not path.name.startswith("_") and (path.suffix == ".py" or (path.is_dir() and list(path.glob("*.py"))))
    }
    assert mapped == rooms


def test_every_command_of_make_that_the_readme_names_exists(repository: Path) -> None:
    makefile = (repository / "Makefile").read_text()
    for target in set(re.findall(r"`make (\w+)", (repository / "README.md").read_text())):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
