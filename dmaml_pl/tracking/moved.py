"""A store that was moved or copied: MLflow keeps absolute paths of its files, which are led to where they are now."""

import sqlite3
import sys
from contextlib import closing
from pathlib import Path

PATHS = {
    "experiments": ("artifact_location",),
    "runs": ("artifact_uri",),
    "logged_models": ("artifact_location",),
    "model_versions": ("source", "storage_location"),
}
"""Columns of MLflow's database that hold them."""


def follow(folder: Path) -> None:
    """Lead the paths in `folder/mlflow.db` to the files in `folder/artifacts`, where they name another folder.

    Only where the experiment's files are in `folder`, and it is not the same folder by another name. Of a copy, what
    is in the first folder is left alone.

    Args:
        folder: of the store, absolute.
    """
    file, here = folder / "mlflow.db", folder / "artifacts"
    if not file.is_file() or not here.is_dir():
        return
    with closing(sqlite3.connect(file, timeout=20)) as database, database:
        tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if "experiments" not in tables:
            return
        before = set()
        for (location,) in database.execute("SELECT artifact_location FROM experiments").fetchall():
            root, found, name = str(location).rpartition("/artifacts/")
            there = Path(root, "artifacts")
            if found and root.startswith("/") and there != here and (here / name).is_dir() and not _same(there, here):
                before.add(root)
        for root in before:
            for table, columns in PATHS.items():
                known = {row[1] for row in database.execute(f"PRAGMA table_info({table})")}
                for column in known.intersection(columns):
                    database.execute(
                        f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE substr({column}, 1, ?) = ?",  # noqa: S608 - the names above
                        (str(folder), len(root) + 1, len(root) + 1, f"{root}/"),
                    )
            print(f"The tracking store was in {root}: its files are now looked for in {folder}.", file=sys.stderr)


def _same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:
        return False
