"""The one place that imports learn2learn, quietly and only when it is needed (the import takes seconds)."""

import importlib
import warnings
from types import ModuleType


def load() -> ModuleType:
    """The learn2learn package.

    It imports gym 0.26, which we never use, and which prints an advertisement for its successor on every import: the
    notice is taken out of the table that gym prints from.
    """
    notices = importlib.import_module("gym_notices.notices").notices
    notices.clear()
    with warnings.catch_warnings():
        # learn2learn and gym call APIs of NumPy and setuptools that are on their way out.
        warnings.simplefilter("ignore", DeprecationWarning)
        return importlib.import_module("learn2learn")
