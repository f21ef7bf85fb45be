"""Makes the site of what lies in the repository, not only of `docs/`: README, configs, deploy files, CONTRIBUTING.

In the repository these link to each other by their places in it; in the site `docs/` is the root. Notebooks become
pages. Each version has a folder of the site, beside those that were built before.
"""

from __future__ import annotations

import json
import posixpath
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from docs import notebook_pages  # noqa: E402 - MkDocs loads this file as if it stood alone

PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "configs/README.md")
FOLDERS = ("configs", "deploy")


def on_files(files: Files, config: Any) -> Files:
    """Add what lies outside of `docs/`, by its place in the repository."""
    others = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*")) if path.is_file()]
    for name in dict.fromkeys([*PAGES, *(path.relative_to(ROOT).as_posix() for path in others)]):
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    for file in notebook_pages.files():
        page, pictures = notebook_pages.as_markdown(file)
        files.append(File.generated(config, f"notebooks/{file.stem}.md", content=page))
        for picture, content in pictures.items():
            files.append(File.generated(config, f"notebooks/{picture}", content=content))
    return files


def on_config(config: Any) -> Any:
    """Build into a folder of this version, which every page says at its foot."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    config.copyright = f"{project['name']} {project['version']}"
    config.site_dir = str(Path(config.site_dir) / project["version"])
    return config


def on_post_build(config: Any) -> None:
    """List the versions that are there, from which the theme makes its switch, and lead to this one."""
    site, version = Path(config.site_dir).parent, Path(config.site_dir).name
    numbered = [folder.name for folder in site.iterdir() if re.fullmatch(r"\d+(\.\d+)*", folder.name)]
    newest_first = sorted(numbered, key=lambda name: [int(part) for part in name.split(".")], reverse=True)
    listed = [{"version": each, "title": each, "aliases": []} for each in newest_first]
    (site / "versions.json").write_text(json.dumps(listed), encoding="utf-8")
    (site / "index.html").write_text(f'<meta http-equiv="refresh" content="0; url={version}/index.html">\n')


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """Turn links from places in the repository into links from places in the site, and say where a page is edited."""
    outside = page.file.src_uri in PAGES
    here = page.file.src_uri if outside else f"docs/{page.file.src_uri}"

    if config.repo_url:
        file = here.removesuffix(".md") + ".ipynb" if here.startswith("docs/notebooks/") else here
        page.edit_url = f"{config.repo_url.rstrip('/')}/edit/main/{file}"

    def moved(link: re.Match[str]) -> str:
        path, mark, anchor = link["target"].partition("#")
        if not path or ":" in path:
            return link[0]
        place = posixpath.normpath(posixpath.join(posixpath.dirname(here), path))
        within = place.removeprefix("docs/")
        if within.endswith(".ipynb") and not here.startswith("docs/notebooks/"):  # where the page is to be read
            within = f"{within.removesuffix('.ipynb')}.md"
        return f"]({posixpath.relpath(within, posixpath.dirname(page.file.src_uri) or '.')}{mark}{anchor})"

    return re.sub(r"\]\((?P<target>[^)\s]+)\)", moved, markdown)
