"""`dmaml export ...`: a trained network in a folder to hand on, with a model card made from its report."""

from __future__ import annotations

import argparse
import json
import re
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jinja2

from dmaml_pl.adapting.exported import WEIGHTS, require_own, write_weights
from dmaml_pl.checks import or_last
from dmaml_pl.console.options import Options
from dmaml_pl.errors import CheckpointError, ConfigError

CARD = "README.md"


def main(words: list[str]) -> int:
    """Export as the words after `dmaml export` say; returns the exit code.

    Raises:
        DmamlError: what is wrong, in one line.
    """
    parser = Options(
        "dmaml export",
        description="Put a trained network into a folder to hand on: its weights as safetensors, and a model card.",
        epilog="The folder is a --ckpt for dmaml adapt, what dmaml_pl.load takes, and what dmaml push uploads.",
        allow_abbrev=False,
    )
    parser.add_argument("ckpt", type=Path, metavar="CHECKPOINT", help="of a training, such as best.ckpt")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="a new one, or one to be exported to again")
    parser.add_argument("--license", type=_license, help="of the weights, such as mit or cc-by-4.0, for the model card")
    given = parser.parse_args(words)
    export(given.ckpt, given.folder, given.license)
    print(f"Exported to {given.folder}: dmaml adapt --ckpt {given.folder} --support ... takes it as it is.")
    return 0


def _license(text: str) -> str:
    """The type of --license, which stands in the card as it is."""
    if not re.fullmatch(r"[\w.+-]+", text):
        raise argparse.ArgumentTypeError(f"is {text!r}, but must be a name such as mit or cc-by-4.0")
    return text


def export(ckpt: Path, folder: Path, license: str | None = None) -> None:  # noqa: A002 - the word of model cards
    """Write weights, model card and figures to a folder.

    Args:
        ckpt: the checkpoint. The report of its meta-test is looked for beside it, and one folder above.
        folder: where to; what an export before has left there is written over.
        license: of the weights; None does not say.

    Raises:
        CheckpointError: the checkpoint cannot be read, or does not say what network it is of.
        ConfigError: the folder cannot be written, or holds something else.
    """
    if folder.suffix == ".onnx":
        raise ConfigError(f"FOLDER is {folder}, but must be a folder: dmaml adapt --onnx FILE writes ONNX.")
    if not ckpt.is_file():
        raise CheckpointError(
            f"{ckpt} is {'a folder' if ckpt.is_dir() else 'not there'}: "
            f"{or_last(ckpt, 'give the checkpoint of a training, such as best.ckpt')}."
        )
    from dmaml_pl.checkpoints.lookup import read_plain  # noqa: PLC0415 - with PyTorch

    checkpoint = read_plain(ckpt, f"{ckpt} is truncated, damaged, or no checkpoint at all.")
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("config"), dict):
        raise CheckpointError(f"{ckpt} does not say what network it is of: export a checkpoint of dmaml fit.")
    require_own(folder)
    report = next((each for each in (ckpt.parent, ckpt.parent.parent) if (each / "report.json").is_file()), None)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_weights(checkpoint, folder / WEIGHTS)
        if report is not None and (report / "figures").is_dir():
            shutil.copytree(report / "figures", folder / "figures", dirs_exist_ok=True)
        card = _card(checkpoint["config"], report, folder.name, license)
        for of_this_machine in (ckpt.absolute().parent, Path.cwd()):
            card = card.replace(f"{of_this_machine}/", "")
        (folder / CARD).write_text(card, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written ({error.strerror or error}): give another FOLDER.") from error


def _card(config: dict[str, Any], report: Path | None, name: str, license_: str | None) -> str:
    from dmaml_pl.adapting.recipe import classes_named  # noqa: PLC0415 - with PyTorch

    settings = config["model"]["init_args"]
    parts = {"network": settings.get("network"), "algorithm": settings.get("algorithm"), "data": config.get("data")}
    named = {part: next(iter(classes_named(of)), "MAML").rpartition(".")[2] for part, of in parts.items()}
    template = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True).from_string(  # noqa: S701 - Markdown
        Path(__file__).with_name("card.md.j2").read_text(encoding="utf-8")
    )
    return template.render(
        named,
        name=name,
        license=license_,
        version=version("dmaml_pl"),
        acts="PolicyGradient" in str(settings.get("objective")),
        result=None if report is None else _result(json.loads((report / "report.json").read_text(encoding="utf-8"))),
        report=None if report is None else _deeper((report / "report.md").read_text(encoding="utf-8")),
    )


def _result(found: dict[str, Any]) -> dict[str, Any]:
    """The metric after as many steps of adaptation as training made."""
    step = next(each for each in found["steps"] if each["step"] == found["inner_steps"])
    return {"metric": found["metric"], "tasks": found["tasks"], "step": step["step"], "value": step["trained"]}


def _deeper(report: str) -> str:
    return "\n".join(f"#{line}" if line.startswith("#") else line for line in report.splitlines())
