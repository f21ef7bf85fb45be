"""docs/networks.md, followed: pretrained bodies, what is frozen, and adapters."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from tests.trainings import dmaml, flags

SHORT = {
    "data.val_tasks": 2,
    "data.test_tasks": 2,
    "data.meta_batch": 1,
    "trainer.devices": 1,
    "trainer.strategy.run_length": 1,
    "trainer.max_steps": 2,
    "trainer.logger": "false",
    "meta_test": "false",
}
SAID = (
    "Parameters: 0 frozen, 256 learned, 28,101 adapting",
    "Parameters: 341,792 frozen, 0 learned, 5,125 adapting",
    "Parameters: 0 frozen, 341,792 learned, 5,125 adapting",
    "Parameters: 341,792 frozen, 0 learned, 9,989 adapting",
)


@pytest.fixture(scope="module")
def letters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where they are drawn once."""
    return tmp_path_factory.mktemp("letters")


def commands(page: str) -> list[list[str]]:
    blocks = re.findall(r"```console\n(.*?)```", page, re.DOTALL)
    return [shlex.split(line)[1:] for block in blocks for line in block.replace("\\\n", "").splitlines()]


@pytest.mark.parametrize("number", [pytest.param(n, marks=pytest.mark.slow) if n != 1 else n for n in range(len(SAID))])
def test_every_command_of_the_page_works_and_says_which_weights_do_what(
    number: int, repository: Path, tmp_path: Path, letters: Path
) -> None:
    page = (repository / "docs/networks.md").read_text()
    for block in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL):
        (tmp_path / block.splitlines()[0].removeprefix("# ")).write_text(block)
    words = commands(page)
    assert len(words) == len(SAID)
    given = [str(repository / word) if word.startswith("configs/") else word for word in words[number]]
    trained = dmaml(tmp_path, *given, *flags(SHORT | {"data.cache_dir": str(letters)}))
    assert trained.returncode == 0, trained.stdout + trained.stderr
    assert SAID[number] in trained.stdout + trained.stderr
    assert next(tmp_path.rglob("last.ckpt")).is_file()


def test_the_page_names_a_body_of_torchvision_that_there_is(repository: Path) -> None:
    from torchvision.models import list_models

    named = re.findall(r"torchvision:([a-z0-9_]+)", (repository / "docs/networks.md").read_text())
    assert named
    assert set(named) <= set(list_models())
