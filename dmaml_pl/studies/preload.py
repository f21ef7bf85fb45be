"""Imported once by the process from which a study forks its workers, so that no worker waits for the imports.

Imports, and what is the same for all: nothing here may start a thread or touch a device, as neither survives a fork.
"""

from __future__ import annotations

import importlib

from dmaml_pl import _learn2learn
from dmaml_pl.provenance.environment import packages

for _name in ("dmaml_pl.cli.run", "dmaml_pl.studies.checks", "mlflow.store.tracking.sqlalchemy_store"):
    importlib.import_module(_name)
_learn2learn.load()
packages()  # which each training logs
