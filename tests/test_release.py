"""What goes out with the package agrees: its version, who made it, and what checks it on other machines."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import yaml

import dmaml_pl


def read(file: Path) -> Any:
    return yaml.safe_load(file.read_text(encoding="utf-8"))


def test_version_and_authors_are_the_same_everywhere(repository: Path) -> None:
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    citation = read(repository / "CITATION.cff")
    assert project["version"] == dmaml_pl.__version__ == citation["version"]
    assert project["authors"] == citation["authors"] == [{"name": "dmaml_pl contributors"}]


def test_hosted_checks_call_make_targets_alone_for_every_python_that_is_promised(repository: Path) -> None:
    workflows = [read(file)["jobs"] for file in (repository / ".github/workflows").iterdir()]
    runs = [step["run"] for jobs in workflows for job in jobs.values() for step in job["steps"] if "run" in step]
    targets = re.findall(r"^([\w-]+):", (repository / "Makefile").read_text(), re.MULTILINE)
    assert "make advisories" in runs
    assert {run.removeprefix("make ") for run in runs} <= {*targets}
    classifiers = tomllib.loads((repository / "pyproject.toml").read_text())["project"]["classifiers"]
    promised = [each.rpartition(" ")[2] for each in classifiers if re.search(r":: 3\.\d+$", each)]
    jobs = read(repository / ".github/workflows/test.yml")["jobs"]
    assert jobs["test"]["strategy"]["matrix"]["python"] == promised


def test_hooks_before_a_commit_fetch_nothing(repository: Path) -> None:
    assert {each["repo"] for each in read(repository / ".pre-commit-config.yaml")["repos"]} == {"local"}
