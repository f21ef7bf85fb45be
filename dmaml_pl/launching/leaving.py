"""Ends a process at once, without taking apart first what it has loaded."""

import atexit
import gc
import io
import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn


def leave(call: Callable[[], object]) -> NoReturn:
    """Call a function, and end this process with the exit code that it returns, or gives `sys.exit`.

    Python takes every module apart before it ends, which takes seconds for PyTorch, Lightning and MLflow, longer in a
    forked process, which must copy all that it takes apart. As in processes of `multiprocessing`, the rest of an end is
    done: threads are waited for, what is registered with `atexit` is called, and open files are written out. Any other
    exception ends the process as Python does.
    """
    try:
        code = call()
    except SystemExit as stop:
        code = stop.code
    if not isinstance(code, int | None):
        print(code, file=sys.stderr)
        code = 1
    threading._shutdown()  # type: ignore[attr-defined] # noqa: SLF001 - as multiprocessing does
    atexit._run_exitfuncs()  # noqa: SLF001 - the same
    for stream in (sys.stdout, sys.stderr, *_files()):
        with suppress(OSError, ValueError):  # closed, here or at its other end
            stream.flush()
    os._exit(code or 0)


def _files() -> list[Any]:
    """Files that somebody may have left to Python to close; by a type, as an abstract class is slow to ask."""
    kind: Any = io.IOBase.__base__
    return [found for found in gc.get_objects() if issubclass(type(found), kind)]
