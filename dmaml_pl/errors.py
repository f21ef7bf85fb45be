"""The errors that a user can cause, and so can mend.

The command line prints the message of a `DmamlError` alone, without a traceback, and exits non-zero. A message
therefore names the setting to change and what it may be.
"""

import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

_OTHERS = (
    "site-packages",
    "<frozen",
    str(Path(os.__file__).parent),
    *(f"{Path(__file__).parents[1]}/{package}/" for package in ("dmaml_pl", "data_modules")),
)
"""What the file of a user's own code has not in its name."""


class DmamlError(Exception):
    """Base of every error whose message is written for the user.

    Examples:
        >>> try:
        ...     MLP(hidden=[0])
        ... except DmamlError as error:
        ...     print(error)
        model.network.hidden[0] is 0, but must be greater than 0.
    """

    def _render_traceback_(self) -> list[str]:
        """How a notebook shows it; IPython asks."""
        return [f"{type(self).__name__}: {self}"]


class ConfigError(DmamlError):
    """A setting that cannot work, or settings that do not fit together.

    Examples:
        >>> try:
        ...     Sinusoid(shots=0)
        ... except ConfigError as error:
        ...     print(error)
        data.shots is 0, but must be greater than 0.
    """


class DataError(DmamlError):
    """Data that is missing, unreadable, or too small for the tasks asked of it.

    Examples:
        >>> try:
        ...     ImageFolder(root="nowhere").prepare_data()
        ... except DataError as error:
        ...     print(error)
        data.root is nowhere, but there is no such folder: ...
    """


class CheckpointError(DmamlError):
    """A checkpoint that is missing, damaged, or made for another network.

    Examples:
        >>> try:
        ...     load("nowhere.ckpt")
        ... except CheckpointError as error:
        ...     print(error)
        nowhere.ckpt is not there: give the checkpoint of a training, such as best.ckpt.
    """


class TrackingError(DmamlError):
    """A tracking store that cannot be reached or written."""


class NonFiniteError(DmamlError):
    """A loss or weight that is no longer a finite number.

    Args:
        what: what went wrong, such as "the query loss".
        worker: rank of the worker, from 0.
        run: number of the run, from 0.
        iteration: number of the meta-iteration within the run, from 0.

    Examples:
        >>> from dmaml_pl.errors import NonFiniteError
        >>> str(NonFiniteError("the query loss", worker=1, run=3, iteration=7)).partition(".")[0]
        'the query loss of worker 1 is not finite in run 3, meta-iteration 7'
    """

    def __init__(self, what: str, *, worker: int, run: int, iteration: int) -> None:
        self.what = what
        self.worker = worker
        self.run = run
        self.iteration = iteration
        super().__init__(
            f"{what} of worker {worker} is not finite in run {run}, meta-iteration {iteration}. Training has stopped "
            "and the last good checkpoint is kept. Lower the meta-optimizer's lr or model.algorithm.inner_lr, or set "
            "model.gradient_clip."
        )

    def __reduce__(self) -> Any:
        """How it goes from process to process."""
        return partial(NonFiniteError, worker=self.worker, run=self.run, iteration=self.iteration), (self.what,)


class WorkerLostError(DmamlError):
    """A worker that died, or did not reach the merge in time."""


class LeftBehindError(DmamlError):
    """The other workers have gone on without this one, which can join them anew."""


class NobodyLeftError(LeftBehindError):
    """There are no other workers any more for this one to join."""


LONGEST, MOST = 400, 600
"""Characters of a word, and of a reason, that are told; more are a value gone wrong, such as a whole file."""


def tell(error: object) -> None:
    """Print a mistake of the user's as one line on standard error, without what a terminal would obey."""
    for_eyes = "".join(each if each.isprintable() or each.isspace() else ascii(each)[1:-1] for each in str(error))
    words = [word if len(word) <= LONGEST else f"{word[:LONGEST]}..." for word in for_eyes.split()]
    print("dmaml: error:", *words, file=sys.stderr, flush=True)


def out_of_memory(error: BaseException) -> bool:
    """Whether there was not enough memory, of which PyTorch tells in an error of no type of its own."""
    return isinstance(error, MemoryError) or "can't allocate memory" in str(error)


def reason_of(error: BaseException) -> str:
    """The words of an error on one line, without a full stop; its type where it has none, or no more than a key.

    Where it comes from a user's own code: its type, file and line before them.
    """
    words, name = " ".join(str(error).split())[:MOST].rstrip(". "), type(error).__name__
    before = _place_of(error) if _is_theirs(error) else name if isinstance(error, KeyError) or not words else ""
    return ": ".join(filter(None, (before, words)))


def _is_theirs(error: BaseException) -> bool:
    """Whether an error has come through a user's own code."""
    return any(_is_their_file(frame.filename) for frame in traceback.extract_tb(error.__traceback__))


def _is_their_file(name: str) -> bool:
    return not any(other in name for other in _OTHERS)


def _place_of(error: BaseException) -> str:
    """Its type, and the last line of a user's own that it has come through; where there is none, the last of all."""
    frames = traceback.extract_tb(error.__traceback__)
    last = ([frame for frame in frames if _is_their_file(frame.filename)] or frames)[-1]
    return f"{type(error).__name__} in {last.filename}, line {last.lineno}"


_TOLD = (DmamlError, BrokenPipeError, KeyboardInterrupt, SystemExit, GeneratorExit)
"""What ends a command otherwise."""


@contextmanager
def in_one_line(
    beyond: Callable[[], bool] = lambda: False, known: tuple[type[BaseException], ...] = ()
) -> Iterator[None]:
    """Turn what nobody foresaw (what the machine refuses, or a user's own class raises) into one line.

    Args:
        beyond: asked then, whether the work has begun, in which what comes neither from a user's own code nor from the
            machine may be a fault of ours, that a traceback shows.
        known: errors beside `DmamlError` that are told by whoever calls.

    Raises:
        ConfigError: names the file, and why.
    """
    try:
        yield
    except BaseException as error:  # of a user's own, too
        theirs = _is_theirs(error)
        outside = theirs or isinstance(error, OSError) or out_of_memory(error)
        if isinstance(error, (*_TOLD, *known)) or sys.flags.dev_mode or (beyond() and not outside):
            raise
        if out_of_memory(error):
            raise ConfigError(
                f"There is not enough memory ({reason_of(error)}): make the network, a task or data.meta_batch smaller."
            ) from error
        if isinstance(error, OSError) and error.filename and not theirs:
            raise ConfigError(f"{error.filename} cannot be used: {error.strerror or error}.") from error
        told = reason_of(error) if theirs else f"{_place_of(error)}: {reason_of(error)}"
        raise ConfigError(f"{told}. PYTHONDEVMODE=1 shows the way there.") from error
