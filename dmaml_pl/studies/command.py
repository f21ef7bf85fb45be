"""`dmaml study ...`: the command line of the studies. Light: its help needs no PyTorch."""

import argparse
import math
import os
import re
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from dmaml_pl.cli.command_line import check_config_files, check_own_data
from dmaml_pl.cli.configs import find
from dmaml_pl.console.options import Options, whole
from dmaml_pl.errors import ConfigError, DmamlError
from dmaml_pl.launching.signals import raised_at
from dmaml_pl.provenance.commands import command
from dmaml_pl.studies.cluster import LAUNCHERS, check_launcher, read_resources

if TYPE_CHECKING:
    from dmaml_pl.studies.plan import Request
    from dmaml_pl.studies.study import Study

_OWN = {
    "--trainer.devices": "--workers says how many workers there are",
    "--trainer.num_nodes": "each of a study's trainings runs on one machine",
    "--ckpt_path": "a study's trainings begin at the beginning, and the same command goes on with a study",
    "--print_config": "dmaml fit prints it",
}
"""Settings of `dmaml fit` that a study sets itself, and what to do instead."""

_FURTHER = """\
All other settings, as --trainer.max_steps 2000, are passed on to `dmaml fit` for every training. Trainings are compared
by the metric of checkpoint.monitor after every run (trainer.val_check_interval), without a meta-test or checkpoints;
those of a table are meta-tested at their best checkpoint. Every worker has one thread, unless OMP_NUM_THREADS is set.
Results are in mlruns/studies/NAME, and in MLflow. The same command again goes on: trainings that have finished are not
made again.
"""


def _finite(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"is {text}, but must be a number")
    return value


def _name(text: str) -> str:
    if not re.fullmatch(r"[\w][\w.+-]*", text):
        raise argparse.ArgumentTypeError(f"is {text!r}, but must be made of letters, digits, and . _ + -")
    return text


def _parser() -> Options:
    parser = Options("dmaml study", description="Experiments made of many trainings.", allow_abbrev=False)
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND", parser_class=Options)
    for kind, summary in (
        ("workers", "the validation metric over runs, for several numbers of workers"),
        ("scaling", "a factor of tasks more, through each knob in turn: what it costs and gains"),
        ("sweep", "the best setting of each number of workers, found by Optuna"),
        ("table", "the meta-test of each of some settings, such as of all algorithms"),
    ):
        add = kinds.add_parser(
            kind, help=summary, description=summary, epilog=_FURTHER, allow_abbrev=False
        ).add_argument
        if kind == "workers":
            compared = "numbers of workers; the others are compared with the first (default: 1 2 4 8)"
            add("--workers", type=whole(1), nargs="+", default=[1, 2, 4, 8], metavar="W", help=compared)
            add("--own", type=find, metavar="FILE", help="YAML: W: {NAME: VALUE}, settings of W workers alone")
            reach = "count the runs to this metric, not to what the first ends with"
            add("--target", type=_finite, metavar="X", help=reach)
            many = "all workers in one process, up to hundreds, and predict the time that as many machines would take"
            add("--simulate", action="store_true", help=many)
            lengths = "simulated: of runs, besides the configuration's"
            add("--run_lengths", type=whole(1), nargs="+", default=[], metavar="H", help=lengths)
            shared = "simulated: as --own; average gradients at every meta-iteration, too, with each of these"
            add("--gradients", type=find, metavar="FILE", help=shared)
            joined = "simulated: what joins the machines: machine, rack, internet (default: all), or MS,MBIT_PER_S"
            add("--network", nargs="+", default=None, metavar="NET", help=joined)
        elif kind == "scaling":
            add("--factor", type=whole(2), default=4, metavar="F", help="times the tasks (default: 4)")
            alone = "of the training to compare with (default: 1)"
            add("--workers", type=whole(1), default=1, metavar="W", help=alone)
        elif kind == "table":
            add(
                "--rows", type=find, required=True, metavar="FILE", help="YAML: LABEL: {NAME: VALUE}, settings of a row"
            )
            shown = "adaptation steps after which the meta-test is shown (default: 1 5 10)"
            add("--steps", type=whole(0), nargs="+", default=[1, 5, 10], metavar="N", help=shown)
            add("--workers", type=whole(1), default=1, metavar="W", help="of each training (default: 1)")
        else:
            form = "YAML: NAME: {int: [5, 200], log: true}, or float, or choice"
            add("--space", type=find, required=True, metavar="FILE", help=form)
            each = "each searched alone (default: 1 4)"
            add("--workers", type=whole(1), nargs="+", default=[1, 4], metavar="W", help=each)
            add("--trials", type=whole(1), default=20, metavar="N", help="settings tried for each (default: 20)")
            add("--startup", type=whole(1), default=8, metavar="N", help="of these, random ones first (default: 8)")
            add("--sampler_seed", type=whole(0), default=0, metavar="N", help="of Optuna's sampler (default: 0)")
            fewest = "search for the fewest runs to this metric, not the best final one"
            add("--target", type=_finite, metavar="X", help=fewest)
            kept = "where Optuna keeps the trials: a journal file, or the URL of a database, by which several machines "
            kept += "share a sweep (default: OPTUNA_STORAGE, else optuna.journal beside the results)"
            add("--storage", default=os.environ.get("OPTUNA_STORAGE"), metavar="FILE|URL", help=kept)
            ended = "end trials whose first seed is worse than the median was at that step (default: none)"
            add("--pruner", choices=("none", "median"), default="none", help=ended)
        add("-c", "--config", action="append", required=True, metavar="FILE", help="as of `dmaml fit`; may be repeated")
        add(
            "--seeds", type=whole(1), default=3, metavar="N", help="trainings that differ in the seed only (default: 3)"
        )
        add("--name", type=_name, help=f"of the study (default: {kind}-CONFIG); the same name goes on with it")
        together = "trainings at the same time (default: 1; on a cluster all, of a sweep those of one trial)"
        add("--jobs", type=whole(1), metavar="J", help=together)
        where = "where trainings run: on this machine, as jobs of SLURM, as tasks of Ray (default: local)"
        add("--launcher", choices=LAUNCHERS, default="local", help=where)
        what = "of each training, in SLURM's or Ray's words, as partition=long time=120, or num_gpus=1"
        add("--resources", nargs="+", default=[], metavar="NAME=VALUE", help=what)
    return parser


def main(words: list[str]) -> int:
    """Run a study; returns the exit code.

    Args:
        words: the command line after `dmaml study`.

    Raises:
        DmamlError: it cannot be made, or one of its trainings failed.
    """
    given, rest = _parser().parse_known_args(words)
    _check(given, rest)
    try:
        with raised_at(KeyboardInterrupt, signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            _conduct(given, rest)
    except KeyboardInterrupt:
        print("\nStopped. The same command goes on: trainings that have finished are not made again.", file=sys.stderr)
        print(f"  {command(['study', *words])}", file=sys.stderr)
        return 130
    return 0


def _check(given: argparse.Namespace, rest: list[str]) -> None:
    files = [word for file in given.config for word in ("--config", str(file))]
    check_config_files(files)
    check_own_data([*files, *rest])
    simulate = given.kind == "workers" and given.simulate
    taken = _OWN | ({"--trainer.strategy": "--gradients averages them at every meta-iteration"} if simulate else {})
    for word in rest:
        name = word.partition("=")[0]
        if name in taken:
            raise ConfigError(f"{name} cannot be set in a study: {taken[name]}.")
    if not all(word.startswith("--") for word in rest[:1]):
        raise ConfigError(f"{rest[0]} is not a setting: those are given as --NAME VALUE, and files as --config FILE.")
    simulated = {"--run_lengths", "--gradients", "--network"} if given.kind == "workers" and not simulate else ()
    for name in simulated:
        if getattr(given, name.removeprefix("--")):
            raise ConfigError(f"{name} is given, but is for simulated workers: give --simulate, too.")
    if isinstance(given.workers, list) and len(set(given.workers)) < len(given.workers):
        raise ConfigError(f"--workers is {' '.join(map(str, given.workers))}, but each number may be given once.")
    given.resources = read_resources(given.resources, given.launcher)
    check_launcher(given.launcher)
    given.jobs = given.jobs or (1 if given.launcher == "local" else 0)


def _conduct(given: argparse.Namespace, rest: list[str]) -> None:
    # Loaded after the help was asked for, and after the command line was read; Optuna for sweeps only.
    from dmaml_pl.studies.plan import Request  # noqa: PLC0415
    from dmaml_pl.studies.study import Study  # noqa: PLC0415

    stem = re.sub(r"[^\w.+-]", "-", Path(given.config[0]).stem)
    simulate = given.kind == "workers" and given.simulate
    name = given.name or f"{'simulated-' * simulate}{given.kind}-{stem}"
    configs, words = tuple(given.config), tuple(rest)
    request = Request(given.kind, name, configs, words, given.seeds, given.jobs, given.launcher, given.resources)
    if simulate:
        study = _simulate(given, request)
    elif given.kind == "workers":
        from dmaml_pl.studies import settings_files, workers  # noqa: PLC0415

        own = settings_files.read_own(given.own, given.workers)
        study = Study(request)
        workers.conduct(study, given.workers, own, given.target)
    elif given.kind == "scaling":
        from dmaml_pl.studies import scaling  # noqa: PLC0415

        study = Study(request)
        scaling.conduct(study, given.factor, given.workers)
    elif given.kind == "table":
        from dmaml_pl.studies import settings_files, table  # noqa: PLC0415

        rows = settings_files.read_rows(given.rows)
        study = Study(request)
        table.conduct(study, rows, given.workers, given.steps)
    else:
        from dmaml_pl.studies import search, space, sweep  # noqa: PLC0415

        options = search.SearchSettings(
            space.read_space(given.space),
            given.trials,
            given.startup,
            given.sampler_seed,
            given.target,
            given.storage,
            prunes=given.pruner == "median",
        )
        study = Study(request)
        sweep.conduct(study, given.workers, options)
    if study.failed:
        labels = "; ".join(child.training.label for child in study.failed)
        many = f"{len(study.failed)} training{'s' if len(study.failed) > 1 else ''} failed"
        raise DmamlError(f"{many}: {labels}. The same command tries again.")


def _simulate(given: argparse.Namespace, request: "Request") -> "Study":
    from dmaml_pl.simulation.time_model import NETWORKS, Network  # noqa: PLC0415 - after the help was asked for
    from dmaml_pl.studies import settings_files, simulated  # noqa: PLC0415
    from dmaml_pl.studies.study import Study  # noqa: PLC0415

    networks = [*map(Network.read, given.network or [known.name for known in NETWORKS])]
    own = settings_files.read_own(given.own, given.workers)
    gradients = settings_files.read_own(given.gradients, given.workers, "--gradients")
    plan = simulated.Plan(given.workers, given.run_lengths, networks, own, gradients, given.target)
    study = Study(request)
    simulated.conduct(study, plan)
    return study
