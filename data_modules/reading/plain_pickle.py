"""Data sets that are published as pickles, read without running what a pickle may hold.

A pickle is a program; unpickling a file from elsewhere runs whatever it names. Those of the few-shot benchmarks need
arrays and plain values only, so nothing else is made here.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

from dmaml_pl.errors import DataError

_MAKERS = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    # The module has moved; files name the one of the NumPy that wrote them.
    *((f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
    *((f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")),
    ("_codecs", "encode"),  # how bytes stand in old protocols
    ("collections", "OrderedDict"),
}


class _Refused(Exception):  # noqa: N818 - not an error of ours, but of the file
    pass


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Only what makes arrays."""
        if (module, name) not in _MAKERS:
            raise _Refused(f"{module}.{name}")
        return super().find_class(module, name)


def read_plain(path: Path) -> Any:
    """Arrays and plain values of a pickle, of Python 2 as well (texts there are taken for Latin-1).

    Raises:
        DataError: names the file, which is missing, damaged, or holds anything else.
    """
    try:
        with path.open("rb") as file:
            return _PlainUnpickler(file, encoding="latin1").load()
    except _Refused as refused:
        raise DataError(
            f"{path} asks for {refused} to be run, and a data set needs arrays and plain values only: it is not read. "
            "Fetch it from where it was published."
        ) from None
    except FileNotFoundError:
        raise DataError(f"{path} is not there.") from None
    except Exception as error:  # on damaged files pickle raises almost anything
        raise DataError(f"{path} is damaged, or no such data set ({error}): fetch it anew.") from error
