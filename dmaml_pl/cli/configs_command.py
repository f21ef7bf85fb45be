"""`dmaml configs`: lists the configurations that come with the package, copies one, and prints what they may hold."""

import argparse
import json
import shutil
from pathlib import Path

from dmaml_pl.checks import suggest
from dmaml_pl.cli import configs
from dmaml_pl.console.options import Options
from dmaml_pl.errors import ConfigError

EPILOG = """\
  dmaml fit --config sinusoid                   train with the one of that name
  dmaml configs copy sinusoid                   put it here, as sinusoid.yaml, to be changed
  dmaml configs copy sinusoid mine.yaml         under another name, or into a folder that is there
  dmaml configs schema > dmaml.schema.json      what they may hold, for an editor

Where a file of that name lies here, --config takes it. Files for `dmaml study` lie in studies/: --space
studies/moments finds one."""


def main(words: list[str]) -> int:
    """List the configurations, copy one, or print their schema; returns the exit code.

    Raises:
        ConfigError: there is none of that name, or the place to copy it to is taken.
    """
    parser = Options(
        prog="dmaml configs",
        description="List the configurations that come with dmaml_pl, copy one, or print their schema.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    copy = commands.add_parser("copy", help="put one here")
    copy.add_argument("name", metavar="NAME", help="as `dmaml configs` lists it")
    copy.add_argument("target", metavar="TARGET", nargs="?", type=Path, default=Path(), help="a file or a folder")
    commands.add_parser("schema", help="print what a configuration may hold, as a JSON schema for editors")
    given = parser.parse_args(words)
    if given.command == "schema":
        from dmaml_pl.cli.schema import config_schema  # noqa: PLC0415 - the other commands must not wait for PyTorch

        print(json.dumps(config_schema(), indent=1))
        return 0
    if given.command == "copy":
        _copy(given.name, given.target)
        return 0
    width = max(map(len, configs.names()))
    for name in configs.names():
        first = (configs.folder() / f"{name}.yaml").read_text(encoding="utf-8").partition("\n")[0]
        print(f"{name:{width}}  {first.removeprefix('# ')}")
    print(f"\nThey lie in {configs.folder()}; its README.md says what they give.\n\n{EPILOG}")
    return 0


def _copy(name: str, target: Path) -> None:
    name = name.removesuffix(".yaml").removeprefix("configs/")
    if name not in configs.names():
        raise ConfigError(f"There is no config {name}.{suggest(name, configs.names())} `dmaml configs` lists them.")
    if target.is_dir():
        target /= f"{Path(name).name}.yaml"
    if target.exists():
        raise ConfigError(f"{target} is there already: name another, as in dmaml configs copy {name} mine.yaml.")
    try:
        shutil.copyfile(configs.folder() / f"{name}.yaml", target)
    except OSError as error:
        raise ConfigError(f"{target} cannot be written: {error.strerror}.") from error
    print(target)
