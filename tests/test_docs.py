"""The documentation as a site."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

import dmaml_pl
from tests.trainings import environment

FOLDERS = ("configs", "deploy", "docs", "dmaml_pl", "data_modules")
FILES = ("mkdocs.yml", "pyproject.toml", "README.md", "CONTRIBUTING.md", "CHANGELOG.md")


@pytest.fixture(scope="module")
def copy(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("copy")
    for name in FOLDERS:
        shutil.copytree(repository / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy(repository / name, folder)
    return folder


def build(folder: Path) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "mkdocs", "build", "--strict"]
    settings = environment() | {"NO_MKDOCS_2_WARNING": "1", "REPO_URL": "https://host.test/us/it"}
    return subprocess.run(words, cwd=folder, env=settings, capture_output=True, text=True, timeout=200, check=False)


REFERENCE = re.compile(r"  - Reference:\n(?: {6}.*\n)+")


class Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.targets: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.targets += [value for name, value in attrs if name in ("href", "src") and value]


def test_the_site_holds_every_page_and_all_that_it_links_to(copy: Path) -> None:
    version = dmaml_pl.__version__
    for earlier in ("0.0.9", "0.0.10"):
        (copy / "site" / earlier).mkdir(parents=True)
    built = build(copy)
    assert built.returncode == 0, built.stderr
    assert "WARNING" not in built.stderr
    listed = json.loads((copy / "site" / "versions.json").read_text())
    assert [each["version"] for each in listed] == [version, "0.0.10", "0.0.9"]
    assert f"url={version}/index.html" in (copy / "site" / "index.html").read_text()
    site = copy / "site" / version
    for page in ("", "merging/", "studies/", "machines/", "configs/", "CONTRIBUTING/", "CHANGELOG/"):
        assert (site / page / "index.html").is_file(), page
    for notebook in ("first_training", "reading_a_study"):
        shown = (site / "notebooks" / notebook / "index.html").read_text()
        assert f"{notebook}_0.png" in shown
        assert (site / "notebooks" / f"{notebook}.ipynb").is_file()
    searched = (site / "search" / "search_index.json").read_text().lower()
    for words in ("early stopping", "notebook", "resnet", "timm", "windows", "wandb"):
        assert words in searched, words
    for page, source in (("", "README.md"), ("merging", "docs/merging.md"), ("configs", "configs/README.md")):
        shown = (site / page / "index.html").read_text()
        assert f'href="https://host.test/us/it/edit/main/{source}"' in shown
        assert f"dmaml_pl {version}" in shown
    assert "first_order" in (site / "reference" / "algorithms" / "index.html").read_text()
    for page_file in site.rglob("index.html"):
        links = Links()
        links.feed(page_file.read_text())
        for target in links.targets:
            path = target.partition("#")[0]
            if path and ":" not in path and not path.startswith("//"):
                assert (page_file.parent / path).resolve().exists(), (page_file, target)


def test_a_broken_link_fails_the_build(copy: Path) -> None:
    page = copy / "docs" / "merging.md"
    page.write_text(page.read_text() + "\n[nowhere](nowhere.md)\n")
    # Without the reference, which takes longest and links to no page.
    settings = copy / "mkdocs.yml"
    before, _, after = settings.read_text().partition("  - mkdocstrings:")
    settings.write_text(before + after[after.index("nav:") :].replace(REFERENCE.search(after)[0], ""))  # type: ignore[index]
    shutil.rmtree(copy / "docs" / "reference")
    built = build(copy)
    assert built.returncode != 0
    assert "nowhere.md" in built.stderr
