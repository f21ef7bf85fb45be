"""A resolved configuration as MLflow parameters: flat, dotted names and plain strings.

`{"model": {"class_path": "a.B", "init_args": {"lr": 0.1}}}` becomes `model.class_path: a.B` and `model.lr: 0.1`: the
names a person types in the configuration, less `init_args`, which says nothing.
"""

import json
import re
from argparse import Namespace
from collections.abc import Iterator, Mapping
from typing import Any

from dmaml_pl.errors import redact

MAX_NAME = 250  # characters of a metric's or parameter's name that MLflow takes
MAX_VALUE = 6000  # characters of a parameter's value that MLflow takes; it cuts longer ones without an error

_FORBIDDEN = re.compile(r"[^\w.\- :/]")


def clean_name(name: str) -> str:
    """Turn any text into a name that MLflow takes for a metric, parameter or tag.

    Characters outside `alphanumerics _ - . space : /` become `_`. MLflow reads names as paths and refuses those that
    are not in their shortest form, so empty, `.` and `..` path parts are left out.
    """
    parts = _FORBIDDEN.sub("_", name).split("/")
    return "/".join(part for part in parts if part not in ("", ".", ".."))[:MAX_NAME] or "_"


def flatten(config: Mapping[str, Any] | Namespace) -> dict[str, str]:
    """Flatten a configuration to parameters that MLflow keeps whole.

    List items are named by their index (`trainer.callbacks.0.monitor`). `None` becomes `null`, booleans `true` and
    `false`, as in YAML; other values their `str`. A value longer than 6000 characters goes on in `<name>.part2`,
    `<name>.part3`, ..., so that none is cut short.
    """
    flat: dict[str, str] = {}
    for name, value in _leaves("", config):
        key = clean_name(name)
        while key in flat:  # two names that differ in forbidden characters only: keep both
            key += "_"
        flat[key] = value[:MAX_VALUE]
        for part, start in enumerate(range(MAX_VALUE, len(value), MAX_VALUE), start=2):
            flat[f"{key}.part{part}"] = value[start : start + MAX_VALUE]
    return flat


def _leaves(name: str, node: object) -> Iterator[tuple[str, str]]:
    """Yield the dotted name and the text of every leaf below a node."""
    if isinstance(node, Namespace):
        node = vars(node)
    if isinstance(node, list | tuple) and node:
        node = dict(enumerate(node))
    if isinstance(node, Mapping) and node:
        for key, child in node.items():
            yield from _leaves(name if key == "init_args" else f"{name}.{key}".lstrip("."), child)
    else:
        yield name, redact(json.dumps(node) if node is None or isinstance(node, bool) else str(node))
