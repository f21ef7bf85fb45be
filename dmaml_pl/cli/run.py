"""Runs a command, and turns its end into an exit code; a mistake of the user's is one line on standard error."""

import os
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress

from omegaconf.errors import OmegaConfBaseException
from pytorch_lightning.cli import LightningCLI
from pytorch_lightning.utilities.exceptions import MisconfigurationException, SIGTERMException

from dmaml_pl.cli import quiet
from dmaml_pl.cli.command_line import check_command, check_config_files
from dmaml_pl.cli.messages import explain_interpolation
from dmaml_pl.cli.resume import is_worker_zero
from dmaml_pl.cli.training import DmamlCLI
from dmaml_pl.errors import (
    DmamlError,
    LeftBehindError,
    NobodyLeftError,
    NonFiniteError,
    WorkerLostError,
    in_one_line,
    noted,
    tell,
)
from dmaml_pl.launching import restarts
from dmaml_pl.launching.supervisor import LEFT_BEHIND, NOBODY_LEFT

INTERRUPTED, TERMINATED = 130, 143
"""Exit codes after Ctrl-C and after SIGTERM, as shells give them."""

KNOWN = (MisconfigurationException, OmegaConfBaseException)
"""Errors of other libraries whose words are for the user."""

ENDS = ("", "__main__", "argparse", "jsonargparse", "dmaml_pl", "pytorch_lightning", "lightning_fabric")
"""Packages that end the process where its work is done, as after --help, or has been told to be in vain."""


def run(arguments: list[str], front: Callable[[threading.Event], object] = DmamlCLI) -> int:
    """Run a command; returns the exit code. A user's mistake is one message on standard error, without a traceback.

    Args:
        arguments: the words after `dmaml`.
        front: what parses and runs them; it is told when all is checked by the event that it gets.
    """
    quiet.quieten()
    prepared = threading.Event()
    words, sys.argv = sys.argv, [sys.argv[0], *arguments]  # from which the other workers are started, too
    try:
        if restarts.was_refused():
            return 1
        check_command(arguments, list(LightningCLI.subcommands()))
        check_config_files(arguments)
        with in_one_line(KNOWN):
            front(prepared)
    except KeyboardInterrupt:
        return INTERRUPTED
    except SIGTERMException as stop:
        return _stopped(TERMINATED, stop)
    except SystemExit as stop:
        return _ended(stop)
    except (DmamlError, *KNOWN) as error:
        # What every worker knows alike is told once.
        alike = not prepared.is_set() or isinstance(error, NonFiniteError | WorkerLostError)
        left_behind = isinstance(error, LeftBehindError)  # told by whoever starts it again
        if not left_behind and (not alike or os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) == "0"):
            text = explain_interpolation(error) if isinstance(error, OmegaConfBaseException) else str(error)
            tell(noted(error, text))
            if not prepared.is_set():
                with suppress(DmamlError):  # where that cannot be, it has been told
                    restarts.remember(restarts.REFUSED)
        return NOBODY_LEFT if isinstance(error, NobodyLeftError) else LEFT_BEHIND if left_behind else 1
    finally:
        sys.argv = words
    return 0


def _ended(stop: SystemExit) -> int:
    """The exit code where something has ended the process; a module of a user's that did may look like success."""
    if isinstance(stop.__context__, KeyboardInterrupt):  # Lightning's answer to Ctrl-C
        return _stopped(INTERRUPTED, stop)
    modules = [str(frame.f_globals.get("__name__", "")) for frame, _ in traceback.walk_tb(stop.__traceback__)]
    module = next((name for name in reversed(modules) if name != "_sitebuiltins"), "")  # where `exit` stands
    if module.partition(".")[0] in ENDS:
        raise stop
    by = f"{module} has ended the command, by sys.exit or the like"
    tell(f"{by}: let it raise an error instead.")
    return 1


def _stopped(code: int, stop: BaseException) -> int:
    if is_worker_zero():
        print(*getattr(stop, "__notes__", ["Stopped."]), sep="\n", file=sys.stderr, flush=True)
    return code
