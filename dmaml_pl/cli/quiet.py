"""Third-party messages that tell a user nothing to act on, each silenced by its own words, for its own reason."""

import logging
import os
import warnings

_LINES = {
    "GPU available": "says what trainer.accelerator already decided",
    "TPU available": "nobody asked for a TPU",
    "HPU available": "nobody asked for an HPU",
    "💡 Tip": "advertisement",
    "`Trainer.fit` stopped": "the progress says so in our words",
    "Seed set to": "the seed stands in the configuration",
    "Initializing distributed": "one line per worker that the process group came up",
    "-----": "banner that the process group is up",
    "Restoring states from": "the command line says which checkpoint it goes on from",
    "Restored all states": "the same",
    "Loaded model weights": "the same",
    "`Trainer(": "announces a limit that the user has just set",
    "Detected KeyboardInterrupt": "the command line says so in our words",
    "No CUDA runtime is found": "says what trainer.accelerator already decided, too",
    "[rank: ": "signals and child processes, told by the command line",
}

_LOGGERS = (
    "pytorch_lightning.utilities.rank_zero",
    "lightning_fabric.utilities.rank_zero",
    "lightning_fabric.utilities.seed",
    "lightning_fabric.utilities.distributed",
    "pytorch_lightning.trainer.connectors.signal_connector",
    "torch.utils.cpp_extension",
)


class _Silence(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().lstrip("\n").startswith(tuple(_LINES))


def quieten() -> None:
    """Install the filters; only the command line and `dmaml_pl.fit` do, a library must not decide for its caller."""
    # Lightning calls a function of jsonargparse that is on its way out; a user's module may set other filters.
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    for name in _LOGGERS:
        logging.getLogger(name).addFilter(_Silence())
    # The error that follows tells it in one line.
    logging.getLogger("mlflow.utils.databricks_utils").setLevel(logging.ERROR)
    # Lightning warns that a loader has few workers or no length; ours are generators that cost nothing.
    warnings.filterwarnings("ignore", message=".*does not have many workers which may be a bottleneck")
    # Lightning compares its batches, which are our runs, with an interval that we count in meta-iterations.
    warnings.filterwarnings("ignore", message=".*smaller than the logging interval Trainer")
    # Lightning calls a function of PyTorch that is on its way out.
    warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated")
    # Lightning sees SLURM's commands, where a study or a person on its machines has not started the training by them.
    warnings.filterwarnings("ignore", message="The `srun` command is available on your system but is not used")
    # MLflow's progress bars want more of a notebook than ours.
    warnings.filterwarnings("ignore", message="IProgress not found")
    # Lightning asks for devices=1 in tests because its own sampler repeats samples to even the shares; ours does not.
    warnings.filterwarnings("ignore", message=".*it is recommended to use `Trainer\\(devices=1")
    # Said in a line of our own, which names the setting as a config has it.
    warnings.filterwarnings("ignore", message="GPU available but not used")
    # The network that gives such a thing is then refused in a line of our own.
    warnings.filterwarnings("ignore", message="coroutine .* was never awaited")
    # The parser then refuses the configuration, which is told in a line of our own.
    warnings.filterwarnings("ignore", message=r"\s*Unable to serialize instance")
