"""The one place that imports learn2learn, quietly and only when it is needed (the import takes seconds)."""

import importlib
import warnings
from importlib.util import find_spec
from types import ModuleType

from dmaml_pl.errors import ConfigError

INSTALL = (
    "pip install 'dmaml_pl[learn2learn]' && "
    "pip install --no-deps --config-settings=--build-option=build_ext learn2learn==0.2.0"
)
"""It asks for packages that neither it nor we use here, and that would forbid NumPy 2; and for a C compiler."""

MISSING = f"learn2learn is not installed ({INSTALL})"


def installed() -> bool:
    """Whether learn2learn is there; nothing is imported."""
    return all(find_spec(name) is not None for name in ("learn2learn", "gym_notices"))


def load() -> ModuleType:
    """The learn2learn package.

    It imports gym 0.26, which we never use, and which prints an advertisement for its successor on every import: the
    notice is taken out of the table that gym prints from.

    Raises:
        ConfigError: it is not installed.
    """
    if not installed():
        raise ConfigError(f"{MISSING}.")
    notices = importlib.import_module("gym_notices.notices").notices
    notices.clear()
    with warnings.catch_warnings():
        # learn2learn and gym call APIs of NumPy and setuptools that are on their way out.
        warnings.simplefilter("ignore", DeprecationWarning)
        return importlib.import_module("learn2learn")
