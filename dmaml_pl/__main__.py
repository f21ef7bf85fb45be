"""The front door: `dmaml ...` and `python -m dmaml_pl ...`.

Light on purpose: what needs no PyTorch is answered before PyTorch is loaded.
"""

import os
import sys
from contextlib import suppress
from functools import partial
from typing import NoReturn

from dmaml_pl.checks import require_platform
from dmaml_pl.cli.command_line import check_checkpoint, check_command, check_config_files, check_own_data
from dmaml_pl.cli.commands import LIGHT, TRAININGS, light_command
from dmaml_pl.cli.configs import make_own_importable
from dmaml_pl.errors import DmamlError, in_one_line, tell
from dmaml_pl.launching.leaving import leave
from dmaml_pl.launching.memory import keep_freed
from dmaml_pl.launching.variables import check_variables

USAGE = """\
usage: dmaml COMMAND [--config FILE ...] [--SETTING VALUE ...]

Model-Agnostic Meta-Learning, trained by parallel workers.

commands:
  fit        train, then meta-test the best checkpoint
  validate   evaluate a network on the validation tasks
  test       meta-test a checkpoint: a table, figures, MLflow
  predict    write the predictions for the test tasks after adaptation
  adapt      adapt a trained network to your own samples, and ask it about others
  study      compare trainings: numbers of workers, ways to see more tasks, best settings
  compare    the settings in which trainings differ, their figures, and their curves
  configs    the configurations that come with the package: list them, copy one, print their schema for an editor
  ui         open the MLflow UI on the local store
  sync       send what trainings have kept while the MLflow server was away
  completion print a script that completes commands, configurations and settings in bash or zsh
  export     put a trained network into a folder, with a model card; push and pull bring it to a hub, and back

  dmaml fit --config sinusoid                          train
  dmaml fit --config sinusoid --print_config           show every setting
  dmaml fit --config ... --ckpt_path last              go on with the last training
  dmaml test --config ... --ckpt_path best|last|FILE   meta-test
  dmaml adapt --ckpt FILE --support DIR --query DIR    adapt it to your own pictures
  dmaml COMMAND --help                                 all settings of a command

Several --config files are laid over each other; single settings on the command line come last.
"""


def main(arguments: list[str] | None = None) -> int:
    """Run a command line; returns the exit code.

    Args:
        arguments: the words after `dmaml`; by default those of this process.
    """
    words = sys.argv[1:] if arguments is None else arguments
    if not words or words[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if words else 2
    if words[0] == "--version":
        from dmaml_pl import __version__  # noqa: PLC0415 - what needs no PyTorch must not wait for it

        print(f"dmaml_pl {__version__}")
        return 0
    try:
        require_platform()
        with in_one_line():
            if words[0] in LIGHT:
                return light_command(words[0])(words[1:])
            check_variables()
            if "LOCAL_RANK" not in os.environ:  # else worker 0 tells for all, once it is known which that is
                check_command(words, TRAININGS)
                check_config_files(words)
                check_checkpoint(words)
                check_own_data(words)
            make_own_importable(words)
            if sys.stderr.isatty():
                print("Loading PyTorch ...", end="\r", file=sys.stderr, flush=True)
            from dmaml_pl.cli.run import run  # noqa: PLC0415 - what needs no PyTorch must not wait for it
            from dmaml_pl.cli.training import DmamlCLI  # noqa: PLC0415 - the same
            from dmaml_pl.launching.server import stand_by  # noqa: PLC0415 - the same

        return run(words, partial(DmamlCLI, parsed=stand_by))
    except DmamlError as error:
        tell(error)
        return 1
    except KeyboardInterrupt:  # before there is anything to save
        return 130


def start() -> NoReturn:
    """Be the command, in a process that is for nothing else."""
    keep_freed()
    leave(_while_read)


def _while_read() -> int:
    try:
        return main()
    except BrokenPipeError:
        with suppress(BrokenPipeError):
            sys.stdout.flush()
            raise
        return 141  # whoever read what is printed has seen enough, such as `head`


if __name__ == "__main__":
    start()
