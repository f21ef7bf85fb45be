"""Files that the studies read beside configurations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from dmaml_pl.errors import ConfigError


def read_settings(option: str, path: Path, form: str) -> dict[Any, Any]:
    """What a YAML file maps to what; not empty.

    Args:
        option: by which the user named the file.
        path: the file.
        form: what is expected in it, for messages.

    Raises:
        ConfigError: names the option, the file, and what is wrong with it.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{option} is {path}, which cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{option} {path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or not content:
        raise ConfigError(f"{option} {path} holds no settings: {form}.")
    return content
