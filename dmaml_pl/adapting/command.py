"""`dmaml adapt ...`. Light: its help, and its first checks, need no PyTorch."""

from __future__ import annotations

import sys
from pathlib import Path

from dmaml_pl.adapting.request import parse
from dmaml_pl.errors import DmamlError

INTERRUPTED = 130


def main(words: list[str]) -> int:
    """Adapt and predict; returns the exit code. A user's mistake is one line on standard error.

    Args:
        words: those after `dmaml adapt`.
    """
    try:
        request = parse(words)
        if request.trust and str(Path.cwd()) not in sys.path:
            sys.path.insert(0, str(Path.cwd()))  # a user's own classes, as `python -m` finds them
        if sys.stderr.isatty():
            print("Loading PyTorch ...", end="\r", file=sys.stderr, flush=True)
        from dmaml_pl.adapting.predicting import adapt_and_predict  # noqa: PLC0415 - what needs no PyTorch does not wait

        adapt_and_predict(request)
    except DmamlError as error:
        print(f"dmaml: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0
