"""What types and class paths of settings stand for, in words and as the classes that they name."""

import importlib
import inspect
import pkgutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from dmaml_pl.checks import suggest
from dmaml_pl.errors import ConfigError, reason_of


def ways_of(kind: Any) -> tuple[Any, ...]:
    """The types of which a setting may be any."""
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def name_of(way: Any) -> str:
    """The word by which a type is called: of mappings dict, of other collections list."""
    origin = get_origin(way) or way
    if inspect.isclass(origin) and issubclass(origin, Mapping):
        return "dict"
    return "list" if getattr(origin, "__module__", "") == "collections.abc" else getattr(origin, "__name__", "")


def classes_of(way: Any) -> dict[type, int]:
    """The classes that such a setting names by their path, and how many arguments they get when they are made later."""
    arguments = 0
    if get_origin(way) is Callable and get_args(way):
        taken, way = get_args(way)
        arguments = len(taken) if isinstance(taken, list) else 0
    kinds = [get_origin(each) or each for each in ways_of(way)]
    built_in = sys.stdlib_module_names
    made: list[type] = [each for each in kinds if inspect.isclass(each)]
    return {each: arguments for each in made if each.__module__.partition(".")[0] not in built_in}


def in_words(ways: tuple[Any, ...]) -> str:
    """What a setting may be, in words."""
    choices = [repr(choice) for way in ways if get_origin(way) is Literal for choice in get_args(way)]
    classes = [made for way in ways for made in classes_of(way)]
    plain = [way for way in ways if get_origin(way) not in (Literal, Callable) and not classes_of(way)]
    names = dict.fromkeys(name_of(way) for way in plain if way is not NoneType)
    said = [f"one of {', '.join(choices)}"] if choices else []
    said += [f"of type {' or '.join(names)}"] if names else []
    said += [f"the class path of {_one_of(classes)}"] if classes else []
    said += ["a class path"] if not classes and any(get_origin(way) is Callable for way in ways) else []
    return " or ".join(said + ["null"] * (NoneType in ways))


def meant_by(value: str, wanted: str, classes: list[type]) -> str:
    """What may have been meant by a value that names none of the classes."""
    if wanted.startswith("the class path") and not value.isidentifier():
        return " That is MODULE.CLASS, as Python imports it."
    package = importlib.import_module("dmaml_pl")
    ours = [name for name in package.__all__ if classes and _fits(getattr(package, name), tuple(classes))]
    return suggest(value, ours, "dmaml_pl.") or suggest(
        value, [each.__name__ for kind in classes for each in _below(kind)]
    )


def _one_of(classes: list[type] | tuple[type, ...]) -> str:
    names = " or ".join(dict.fromkeys(each.__name__ for each in classes))
    return f"{'an' if names.startswith(tuple('AEIOU')) else 'a'} {names}"


def find_class(setting: str, path: str, kinds: tuple[type, ...]) -> Any:
    """What a class path names; None where it is one word that no class is called.

    Raises:
        ConfigError: there is no such thing, or it is of another kind.
    """
    if "." not in path:
        return next((each for kind in kinds for each in _below(kind) if each.__name__ == path), None)
    try:
        try:
            found = pkgutil.resolve_name(path)
        except AttributeError as error:
            module = importlib.import_module(path.rpartition(".")[0])  # whose own error says more
            own, found_in = Path(f"{path.partition('.')[0]}.py"), getattr(module, "__file__", None)
            if own.is_file() and found_in and "." not in module.__name__ and not own.samefile(found_in):
                raise AttributeError(f"{found_in} hides {own}, which needs another name") from error
            raise
        made = found if inspect.isclass(found) else get_type_hints(found).get("return")
    except Exception as error:  # of a user's own module, too
        raise ConfigError(f"{setting} cannot be {path}: {reason_of(error)}.{suggest(path, _beside(path))}") from error
    if not _fits(made, kinds):
        raise ConfigError(f"{setting} cannot be {path}: it must be {_one_of(kinds)}.")
    if lacking := sorted(getattr(found, "__abstractmethods__", ())):
        raise ConfigError(f"{setting} cannot be {path}: it is abstract, and needs {', '.join(lacking)}.")
    return found


def _fits(made: Any, kinds: tuple[type, ...]) -> bool:
    try:
        return inspect.isclass(made) and issubclass(made, kinds)
    except TypeError:  # a protocol, which cannot be asked
        return True


def _below(kind: type) -> Iterator[type]:
    """A class, and all that are made of it."""
    yield kind
    subclasses: list[type] = kind.__subclasses__()
    for each in subclasses:
        yield from _below(each)


def _beside(class_path: str) -> list[str]:
    """The full names of the classes in the module of a class path, or in this package."""
    try:
        module = importlib.import_module(class_path.rpartition(".")[0])
    except Exception:  # of a user's own module, too
        module = importlib.import_module("dmaml_pl")
    names = getattr(module, "__all__", dir(module))
    return [f"{module.__name__}.{name}" for name in names if inspect.isclass(getattr(module, name, None))]
