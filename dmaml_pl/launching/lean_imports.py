"""Lets Lightning start without what torchmetrics loads at once and hardly anybody needs.

Lightning imports torchmetrics, and that torchvision and SciPy's signals for a few of its metrics: more than a second of
a core at each start, in each worker (https://github.com/Lightning-AI/torchmetrics/issues/3457, open in version 1.9).
"""

import importlib.util
import pkgutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

NOT_YET = ("scipy.signal", "torchvision", "torchvision.models", "torchvision.ops")
"""Modules that torchmetrics mends (SciPy's) or takes functions from for later."""


class Later(ModuleType):
    """Stands for a module, or for a function of one, which it loads when it is called."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None)  # by which others find out whether a library is there

    def __getattr__(self, name: str) -> "Later":
        if name.startswith("__"):
            raise AttributeError(name)
        return Later(f"{self.__name__}.{name}")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the real one makes of it."""
        return pkgutil.resolve_name(self.__name__)(*args, **kwargs)


class _Finder(MetaPathFinder):
    """Finds torchmetrics, once, so that its import is surrounded by placeholders."""

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "torchmetrics":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader.exec_module = _placeholders()(spec.loader.exec_module)  # type: ignore[method-assign]
        return spec


def install() -> None:
    """Have torchmetrics imported so, if it was not imported already."""
    if "torchmetrics" not in sys.modules and not any(isinstance(each, _Finder) for each in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


@contextmanager
def _placeholders() -> Iterator[None]:
    placed = {name: Later(name) for name in NOT_YET if name not in sys.modules}
    sys.modules.update(placed)
    try:
        yield
    finally:
        for name, placeholder in placed.items():
            if sys.modules.get(name) is placeholder:
                del sys.modules[name]
