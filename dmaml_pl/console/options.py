"""Command-line options of the light commands, which need no PyTorch to tell a mistake."""

import argparse
import re
from collections.abc import Callable
from typing import NoReturn

from dmaml_pl.errors import ConfigError


class Options(argparse.ArgumentParser):
    """An ArgumentParser whose complaints are our errors: one line that names the option, and no usage before it."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong.

        Raises:
            ConfigError: always.
        """
        message = re.sub(r"^argument (?:-\w/)?(\S+): ", r"\1 ", message)
        message = re.sub(r"^the following arguments are required: (.*)$", r"Not set: \1", message)
        command = " ".join(self.prog.split()[:2])
        raise ConfigError(f"{message.rstrip('.')}. {command} --help lists all.")


def whole(least: int, most: int | None = None) -> Callable[[str], int]:
    """The type of an option that is a whole number of at least `least`, and at most `most`."""

    def parse(text: str) -> int:
        if not re.fullmatch(r"[+-]?\d+", text) or int(text) < least or (most is not None and int(text) > most):
            upwards = f"of at least {least}" if most is None else f"from {least} to {most}"
            raise argparse.ArgumentTypeError(f"is {text}, but must be a whole number {upwards}")
        return int(text)

    return parse
