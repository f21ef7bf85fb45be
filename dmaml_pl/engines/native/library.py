"""The C++ of the native engine, compiled for this machine once and kept on disk."""

import ctypes
import hashlib
import os
import shlex
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from pytorch_lightning.utilities import rank_zero_info

FOLDER = Path(__file__).parent
CONVOLUTIONS, LINEAR = "convolutions.cpp", "layers.cpp"
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC", "-pthread")
SUFFIX = {"float32": "float", "float64": "double"}


class NoLibraryError(Exception):
    """There is no library and none can be made; says why, in a few words."""


@cache
def library(*, linear: bool) -> ctypes.CDLL | str:
    """The library for networks of linear layers alone, or for all, or why there is none; asked once in a process."""
    try:
        return _typed(ctypes.CDLL(str(_compiled(FOLDER / (LINEAR if linear else CONVOLUTIONS)))))
    except (NoLibraryError, OSError) as error:
        return str(error)


def _typed(found: ctypes.CDLL) -> ctypes.CDLL:
    many = ctypes.c_void_p
    for kind in SUFFIX.values():
        make, run, free = (getattr(found, f"{verb}_{kind}") for verb in ("make", "run", "free"))
        make.restype, make.argtypes = ctypes.c_void_p, [many] * 6
        run.restype, run.argtypes = None, [ctypes.c_void_p, ctypes.c_int, ctypes.c_int, many, many]
        free.restype, free.argtypes = None, [ctypes.c_void_p]
    return found


def _compiled(source: Path) -> Path:
    """The file of the library, made if it is not there.

    Raises:
        NoLibraryError: there is no compiler, or it failed.
    """
    try:
        compiler = shlex.split(os.environ.get("CXX", "c++"))
    except ValueError as error:
        raise NoLibraryError(f"CXX is {os.environ['CXX']!r}: {error}") from error
    # What the compiler knows of itself and of this machine's processor: folders may be shared between machines.
    target = _run([*compiler, "-march=native", "-dM", "-E", "-x", "c++", os.devnull])
    text = b"".join(file.read_bytes() for file in (source, *sorted(FOLDER.glob("*.h"))))
    key = hashlib.blake2b(target + text + " ".join(FLAGS).encode(), digest_size=12).hexdigest()
    file = _folder() / f"{key}.so"
    if file.exists():
        return file
    takes = "ten seconds" if source.name == LINEAR else "half a minute"
    rank_zero_info(f"Compiling model.engine native for this machine, which takes {takes} once ...")
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        made = Path(folder, file.name)
        _run([*compiler, *FLAGS, str(source), "-o", str(made)])
        made.replace(file)  # whole or absent, whoever else makes it
    return file


def _run(words: list[str]) -> bytes:
    try:
        return subprocess.run(words, check=True, capture_output=True).stdout  # noqa: S603 - the user's own compiler
    except FileNotFoundError:
        raise NoLibraryError(f"there is no C++ compiler {words[0]}, which the variable CXX can name") from None
    except subprocess.CalledProcessError as error:
        said = error.stderr.decode(errors="replace").strip().splitlines() or [f"exit code {error.returncode}"]
        raise NoLibraryError(f"the C++ compiler {words[0]} failed: {said[0]}") from None


def _folder() -> Path:
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # no home folder
        home = Path(tempfile.gettempdir())
    return home / "dmaml_pl" / "native"
