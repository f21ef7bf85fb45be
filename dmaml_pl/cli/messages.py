"""Other libraries' errors in one line that names the setting."""

import inspect
import os
import warnings
from typing import Any

import pytorch_lightning as pl
from omegaconf.errors import InterpolationKeyError, OmegaConfBaseException

_ADVICE = {
    "strategy": ", but must be dmaml, auto, or a strategy's class path",
    "accelerator": ", but must be auto, cpu, or one that this machine has",
    "devices": ", which cannot be had",
}


def explain_interpolation(error: OmegaConfBaseException) -> str:
    """One line out of an error of OmegaConf, which reads the references such as `${data.init_args.ways}`."""
    place = (error.full_key or "").split(".")[1:]  # without the command
    name = ".".join(part for part in place if part != "init_args")
    where = f"{name} refers" if name else "The configuration refers"
    if not isinstance(error, InterpolationKeyError):
        return (
            f"{where} to another setting in a way that cannot be read ({str(error.msg).splitlines()[0]}): a reference "
            "looks like ${data.init_args.ways}."
        )
    wanted = str(error.child_node)
    inside = wanted.removeprefix("${").removesuffix("}")
    up = len(inside) - len(inside.lstrip("."))  # the parser has made it relative to where it stands
    if up and up <= len(place):
        wanted = f"${{{'.'.join([*place[: len(place) - up], inside.lstrip('.')])}}}"
    return f"{where} to {wanted}, but there is no such setting."


def explain_trainer(error: Exception, settings: dict[str, Any]) -> str:
    """One line out of an error of Lightning's Trainer: the setting without which it can be made is to blame."""
    while error.__cause__ is not None:
        error = error.__cause__  # type: ignore[assignment]
    reason = " ".join(str(error).split())
    parameters = inspect.signature(pl.Trainer).parameters
    defaults = {name: each.default for name, each in parameters.items()}
    apart: dict[str, Any] = {"callbacks": None, "logger": False}
    # An instance has been given devices by the Trainer that failed.
    plain = settings if isinstance(settings.get("strategy"), str) else settings | {"strategy": "auto"}
    tries = [] if plain is settings else [("strategy", plain)]
    tries += [(name, plain | {name: without}) for name, without in apart.items()]
    known = [name for name in ("barebones", *_ADVICE, *settings) if name in defaults]
    tries += [(name, {**plain, **apart, name: defaults[name]}) for name in known]
    for name, others in tries:
        given = settings.get(name)
        if given != defaults[name] and _can_be_made(others):
            shown = [type(each).__name__ for each in given] if name == "callbacks" and given else given
            must = f", but must be {inspect.formatannotation(parameters[name].annotation)}"
            advice = _ADVICE.get(name, must if isinstance(error, TypeError) else "")
            return f"trainer.{name} is {shown!r}{advice}: {reason}"
    variables = [name for name, value in os.environ.items() if repr(value) in reason]
    return f"trainer: {reason}" + (f" ({' or '.join(variables)})" if variables else "")


def _can_be_made(settings: dict[str, Any]) -> bool:
    try:
        with warnings.catch_warnings(action="ignore"):
            pl.Trainer(**settings)
    except Exception:  # whatever is wrong
        return False
    return True
