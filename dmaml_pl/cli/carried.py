"""Settings that a class has from another, which stood in its place before: the parser keeps those of the same name."""

from collections.abc import Iterable, Iterator
from itertools import accumulate
from typing import Any


def carried_over(given: Iterable[dict[str, Any]], config: dict[str, Any]) -> Iterator[str]:
    """Tell of each class in force which settings were given for another.

    Args:
        given: the settings of each file and option, in their order.
        config: what all of them came to.

    Yields:
        A line for each place where that is so.
    """
    in_force = dict(_by_name(config))
    classes: dict[str, Any] = {}
    given_for: dict[str, dict[str, Any]] = {}
    for settings in given:
        named = dict(_by_name(settings))
        classes |= named
        for name in named:
            above = list(accumulate(name.split("."), "{}.{}".format))[:-1]
            given_for[name] = {place: classes[place] for place in above if place in classes}
    kept: dict[tuple[str, str], list[str]] = {}
    for name, places in given_for.items():
        for place, before in places.items():
            if name in in_force and _last(before) != _last(in_force.get(place)):
                short = name.removeprefix(f"{place}.")
                kept.setdefault((place, _last(before)), []).append(f"{short} {in_force[name]}")
                break
    for (place, before), settings_kept in kept.items():
        yield f"{place} is {_last(in_force[place])}, and keeps what was set for {before}: {', '.join(settings_kept)}."


def _by_name(settings: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Settings by the names that they have on a command line, where a class is the value of its own."""
    if not isinstance(settings, dict):
        yield name, settings
        return
    for part, value in settings.items():
        yield from _by_name(value, name if part in ("class_path", "init_args") else f"{name}.{part}".lstrip("."))


def _last(class_path: Any) -> str:
    return str(class_path).rpartition(".")[2]
