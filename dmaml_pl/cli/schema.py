"""What a configuration may hold, as a JSON schema: for editors, and for the shell's completion."""

import copy
import re
import sys
import threading
from importlib import import_module
from typing import Any
from unittest import mock

import pytorch_lightning as pl
from jsonargparse import capture_parser

# Private: jsonargparse's own schema is of all classes that are loaded, most of them PyTorch's modules, and fails at one
# whose setting is a class of classes. This one is of those that a configuration is likely to name.
from jsonargparse._completions_jsonschema import ParserJsonschema, anyof_schema, new_object
from jsonargparse._optionals import get_doc_short_description
from jsonargparse._typehints import get_all_subclass_paths, get_callable_return_type
from jsonargparse._util import import_object
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI

from dmaml_pl.algorithms import Algorithm
from dmaml_pl.cli.training import DmamlCLI
from dmaml_pl.learner import MetaLearner

KNOWN = ("dmaml_pl.", "data_modules.", "torch.optim.", "pytorch_lightning.callbacks.", "pytorch_lightning.loggers.")
"""Where the classes are whose settings are told; other classes may have any."""

NO_NETWORKS = (Algorithm, MetaLearner, pl.LightningModule)
"""Modules to PyTorch, but nothing to give where a module is asked for."""

REFERENCE = {"type": "string", "pattern": r"\$\{"}
"""`${...}` stands for a value of any type."""


def config_schema() -> dict[str, Any]:
    """The schema of a file after --config: names, types, defaults and descriptions of its settings.

    Files are laid over each other, so nothing is required. A class in `KNOWN` has its own settings, any other any.
    """
    package = import_module("dmaml_pl")
    for name in package.__all__:
        getattr(package, name)  # only classes that are loaded are found
    with mock.patch.object(sys, "argv", ["dmaml", "fit"]):
        parser: Any = capture_parser(_Bare, threading.Event())
    fit = parser._subcommands_action._name_parser_map["fit"]  # noqa: SLF001 - as in mistakes.py
    schema: Any = _ConfigSchema()  # type: ignore[no-untyped-call]  # theirs
    return {**schema.generate(fit), "title": "A configuration of dmaml_pl"}


class _Bare(DmamlCLI):
    """Makes the parser alone: what captures it raises an exception in place of parsing, which is no user's mistake."""

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        LightningCLI.parse_arguments(self, parser, args)


class _ConfigSchema(ParserJsonschema):
    def set_dest(self, schema: Any, dest: str, dest_schema: Any, _required: bool, descriptions: Any) -> None:
        super().set_dest(schema, dest, dest_schema, False, descriptions)

    def action_schema(self, action: Any, required: bool, consts: Any) -> dict[str, Any]:
        schema: dict[str, Any] = super().action_schema(action, required, consts)
        told: dict[str, Any] = {name: schema.pop(name) for name in ("description", "default") if name in schema}
        return {**anyof_schema([schema, REFERENCE]), **told} if schema else told

    def callable_schema(self, typehint: Any, action: Any) -> dict[str, Any]:
        made = get_callable_return_type(typehint)
        if made is None:
            return {"type": ["string", "object"]}
        later = copy.copy(action)  # the first arguments are those that it is called with
        later.sub_add_kwargs = {**action.sub_add_kwargs, "skip": {len(typehint.__args__) - 1}}
        schema: dict[str, Any] = self.typehint_schema(made, later)
        return schema

    def subclass_def(self, class_type: Any, action: Any) -> dict[str, Any]:
        known = {path: import_object(path) for path in get_all_subclass_paths(class_type) if path.startswith(KNOWN)}
        if not issubclass(class_type, NO_NETWORKS):
            known = {path: found for path, found in known.items() if not issubclass(found, NO_NETWORKS)}
        path = {"anyOf": [{"enum": [*known]}, {"type": "string"}]} if known else {"type": "string"}
        schema: dict[str, Any] = new_object(get_doc_short_description(class_type), schema_key=False)
        schema["type"] = ["object", "string"]
        schema["properties"] = {"class_path": path, "init_args": {"type": "object"}, "dict_kwargs": {"type": "object"}}
        for each, found in known.items():
            named = {"class_path": {"pattern": rf"^({re.escape(each.split('.')[0])}\.(.+\.)?)?{found.__name__}$"}}
            settings = self.class_parser_schema(each, action, get_doc_short_description(found))
            its_own = {"properties": {"init_args": settings}}
            is_it = {"properties": named, "required": ["class_path"]}
            schema.setdefault("allOf", []).append({"if": is_it, "then": its_own})
        return schema
