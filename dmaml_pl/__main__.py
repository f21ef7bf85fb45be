"""The front door: `dmaml ...` and `python -m dmaml_pl ...`.

Light on purpose: what needs no PyTorch is answered before PyTorch is loaded.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

USAGE = """\
usage: dmaml COMMAND [--config FILE ...] [--SETTING VALUE ...]

Model-Agnostic Meta-Learning, trained by parallel workers.

commands:
  fit        train, then meta-test the best checkpoint
  validate   judge a network on the validation tasks
  test       meta-test a checkpoint: a table, figures, MLflow
  predict    write the predictions for the test tasks after adaptation
  study      compare trainings: numbers of workers, ways to see more tasks, best settings
  ui         open the MLflow UI on the local store

  dmaml fit --config configs/sinusoid.yaml             train
  dmaml fit --config configs/sinusoid.yaml --print_config      show every setting
  dmaml fit --config ... --ckpt_path last              go on with the last training
  dmaml test --config ... --ckpt_path best|last|FILE   meta-test
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
    if words[0] == "ui":
        return _ui(words[1:])
    if words[0] == "study":
        from dmaml_pl.studies.command import main as study  # noqa: PLC0415 - only when it is asked for

        return study(words[1:])
    try:
        return _train_or_test(words)
    except KeyboardInterrupt:  # before there is anything to save
        return 130


def _train_or_test(words: list[str]) -> int:
    from dmaml_pl import spares  # noqa: PLC0415 - what needs no PyTorch must not wait for it

    if str(Path.cwd()) not in sys.path and "" not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # a user's own classes, as `python -m` finds them
    spares.start(words)
    if sys.stderr.isatty():
        print("Loading PyTorch ...", end="\r", file=sys.stderr, flush=True)
    from dmaml_pl.cli import run  # noqa: PLC0415 - what needs no PyTorch must not wait for it

    return run(words)


def _ui(words: list[str]) -> int:
    from dmaml_pl.errors import DmamlError  # noqa: PLC0415 - what needs no PyTorch must not wait for it
    from dmaml_pl.tracking.ui import serve  # noqa: PLC0415 - what needs no PyTorch must not wait for it

    parser = argparse.ArgumentParser("dmaml ui", description="Open the MLflow UI on the local store.")
    parser.add_argument("--save_dir", default="mlruns", help="folder of the store (default: mlruns)")
    parser.add_argument("--port", type=int, default=5000, help="port to listen on (default: 5000)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine)")
    parser.add_argument("--run", help="id of an MLflow run to show first")
    given = parser.parse_args(words)
    try:
        return serve(save_dir=given.save_dir, port=given.port, host=given.host, run=given.run)
    except DmamlError as error:
        print(f"dmaml: error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
