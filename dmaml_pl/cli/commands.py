"""The names of all commands, and where they are."""

from collections.abc import Callable
from importlib import import_module

TRAININGS = ["fit", "validate", "test", "predict"]

LIGHT = {
    "adapt": "dmaml_pl.adapting.command",
    "study": "dmaml_pl.studies.command",
    "compare": "dmaml_pl.studies.compare",
    "configs": "dmaml_pl.cli.configs_command",
    "completion": "dmaml_pl.cli.completion",
    "ui": "dmaml_pl.tracking.ui",
    "sync": "dmaml_pl.tracking.sync",
    "export": "dmaml_pl.serving.export",
    "push": "dmaml_pl.serving.hub:push",
    "pull": "dmaml_pl.serving.hub:pull",
}
"""Commands that begin without PyTorch: the module of their `main`, or of another function after a colon."""


def light_command(name: str) -> Callable[[list[str]], int]:
    """The function that carries out one of `LIGHT`: from the words after the command to the exit code."""
    module, _, function = LIGHT[name].partition(":")
    found: Callable[[list[str]], int] = getattr(import_module(module), function or "main")
    return found
