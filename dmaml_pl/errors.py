"""The errors that a user can cause, and so can mend.

The command line prints the message of a `DmamlError` alone, without a traceback, and exits non-zero. A message
therefore names the setting to change and what it may be.
"""

import os
import re
import sys
import tempfile
import traceback
from collections.abc import Iterator
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


BLANK = "***"

_OF_USER = re.compile(
    r"""(?<=://)                         # after the scheme:
    (?: [^\s/@:'"]+                      # a user, who may be a token,
      | (?! [^\s/@:]* : \d+ (?:[/?#\s'"]|$) )  # or, where that is no host with its port,
        [^\s/@:'"]* : [^\s'"]+           # a user and a password, in which even @ and / may stand,
    )(?=@)                               # before the host
    """,
    re.VERBOSE,
)
_IN_QUERY = re.compile(
    r"""([?&;] [\w.-]* (?:passw(?:or)?d|pwd|token|secret|key|signature|sig|credential) [\w.-]* =) [^&;#\s'"]+""",
    re.VERBOSE | re.IGNORECASE,
)


def redact(text: str) -> str:
    """Blank out user, password and tokens of every URI in a text: whoever sees the MLflow run must not get them.

    Where a password holds an unescaped slash after digits alone, it cannot be told from a port and a path.
    """
    return _IN_QUERY.sub(rf"\1{BLANK}", _OF_USER.sub(BLANK, text))


class DmamlError(Exception):
    """Base of every error whose message is written for the user; passwords and tokens in it are blanked out.

    Examples:
        >>> try:
        ...     MLP(hidden=[0])
        ... except DmamlError as error:
        ...     print(error)
        model.network.hidden[0] is 0, but must be greater than 0.
    """

    def __init__(self, *args: object) -> None:
        super().__init__(*(redact(str(each)) for each in args))

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


LONGEST_WORD, LONGEST_REASON = 400, 600
"""Characters of a word, and of a reason, that are told; more are a value gone wrong, such as a whole file."""


def tell(error: object) -> None:
    """Print a mistake of the user's as one line on standard error, without what a terminal would obey."""
    for_eyes = "".join(each if each.isprintable() or each.isspace() else ascii(each)[1:-1] for each in str(error))
    words = [word if len(word) <= LONGEST_WORD else f"{word[:LONGEST_WORD]}..." for word in for_eyes.split()]
    print("dmaml: error:", *words, file=sys.stderr, flush=True)


def out_of_memory(error: BaseException) -> bool:
    """Whether there was not enough memory, of which PyTorch tells in an error of no type of its own."""
    return isinstance(error, MemoryError) or "can't allocate memory" in words_of(error)


def words_of(error: BaseException) -> str:
    """What an error says; nothing where it cannot."""
    try:
        return str(error)
    except Exception:  # of a user's own
        return ""


def reason_of(error: BaseException) -> str:
    """The words of an error on one line, without a full stop; its type where it has none, or no more than a key.

    Where it comes from a user's own code: its type, file and line before them.
    """
    words, name = " ".join(words_of(error).split())[:LONGEST_REASON].rstrip(". "), type(error).__name__
    before = _place_of(error) if _is_theirs(error) else name if isinstance(error, KeyError) or not words else ""
    return ": ".join(filter(None, (before, words)))


def _is_theirs(error: BaseException) -> bool:
    """Whether an error has come through a user's own code."""
    return any(is_their_file(frame.filename) for frame in traceback.extract_tb(error.__traceback__))


def is_their_file(name: str) -> bool:
    """Whether a file is none of Python, of a package, or of this one."""
    return not any(other in name for other in _OTHERS)


def _place_of(error: BaseException) -> str:
    """Its type, and the last line of a user's own that it has come through; where there is none, the last of all."""
    frames = traceback.extract_tb(error.__traceback__)
    last = ([frame for frame in frames if is_their_file(frame.filename)] or frames)[-1]
    return f"{type(error).__name__} in {last.filename}, line {last.lineno}"


_TOLD = (DmamlError, BrokenPipeError, KeyboardInterrupt, SystemExit, GeneratorExit)
"""What ends a command otherwise."""


@contextmanager
def in_one_line(known: tuple[type[BaseException], ...] = ()) -> Iterator[None]:
    """Turn what nobody foresaw into one line: what the machine refuses, a user's own class or a library raises.

    Its notes come first, which name the setting that it is of. The traceback goes into a file, which is named.

    Args:
        known: errors beside `DmamlError` that are told by whoever calls.

    Raises:
        ConfigError: where it comes from, and why.
    """
    try:
        yield
    except BaseException as error:  # of a user's own, too
        if isinstance(error, (*_TOLD, *known)) or sys.flags.dev_mode:
            raise
        if out_of_memory(error):
            raise ConfigError(
                f"There is not enough memory ({reason_of(error)}): make the network, a task or data.meta_batch smaller."
            ) from error
        theirs = _is_theirs(error)
        if isinstance(error, OSError) and error.filename and not theirs:
            raise ConfigError(noted(error, f"{error.filename} cannot be used: {error.strerror or error}.")) from error
        told = reason_of(error) if theirs else f"{_place_of(error)}: {reason_of(error)}"
        raise ConfigError(noted(error, f"{told}. {_way_there(error)}")) from error


def noted(error: BaseException, told: str) -> str:
    """What is told of an error, behind its notes."""
    return ": ".join([*getattr(error, "__notes__", ()), told])


def _way_there(error: BaseException) -> str:
    """Write the traceback down, and say where; where nothing can be written, how to see it."""
    try:
        with tempfile.NamedTemporaryFile("w", prefix="dmaml-", suffix=".txt", delete=False, encoding="utf-8") as file:
            file.write(redact("".join(traceback.format_exception(error))))
    except (OSError, ValueError):
        return "PYTHONDEVMODE=1 shows the way there."
    return f"The way there stands in {file.name}."
