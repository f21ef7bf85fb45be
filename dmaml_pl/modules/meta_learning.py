"""The LightningModule of meta-learning: its settings, and Lightning's hooks around a training.

Legend: H meta-iterations of a run.
"""

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from pytorch_lightning.cli import LRSchedulerCallable, OptimizerCallable
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor, nn

from dmaml_pl.algorithms.base import Algorithm
from dmaml_pl.algorithms.maml import MAML
from dmaml_pl.checks import MOST_STEPS, require_at_most, require_counts, require_kind, require_one_of, require_positive
from dmaml_pl.engines import CompileSetting, EngineChoice, EngineName
from dmaml_pl.errors import ConfigError, reason_of
from dmaml_pl.evaluation.curves import Validation
from dmaml_pl.learner import MetaLearner
from dmaml_pl.modules.checking import CheckedModule
from dmaml_pl.modules.trainer_options import check_steps
from dmaml_pl.networks.batch_norm import BatchNormUse, use_batch_statistics, use_running_statistics
from dmaml_pl.networks.names import select
from dmaml_pl.objectives import Objective, ObjectiveName, objective_of
from dmaml_pl.optimizers import AskingOptimizer
from dmaml_pl.runs import CHECKPOINT_KEY
from dmaml_pl.tasks import Scaling


class MetaLearning(CheckedModule):
    """Meta-learns a network by an algorithm of `dmaml_pl.algorithms`, or of a user's own.

    Args:
        network: any network from samples (B, ...) to predictions (B, D) or logits (B, N).
        algorithm: the inner loop; MAML with its own defaults where none is given.
        objective: "regression" (mean squared error), "classification" (cross-entropy, shown as accuracy), or an
            `Objective` of one's own.
        evaluation_steps: adaptation steps up to which validation and test evaluate; at least those of training are
            made. 10 as in the MAML paper. None where an algorithm makes none in training, such as `ProtoNet`.
        meta_optimizer: from parameters to the meta-optimizer; the MAML paper's Adam with lr 1e-3 by default.
        meta_schedule: from the meta-optimizer to a learning-rate schedule, stepped once a meta-iteration.
        gradient_clip: largest norm of the meta-gradient; None leaves it as it is.
        run_length: H, meta-iterations of a run where the strategy does not set it.
        engine: "learn2learn" adapts to one task after another, "per_task" as well, on all threads and faster for
            large networks on CPUs, "vectorized" to all of a meta-batch at once, "native" trains chains of convolutions
            and linear layers on CPUs by C++ that is compiled once; "auto" takes the fastest one that can run the
            network where it is, by the work in a task and the length of the training.
        compile: compile the meta-gradient of the vectorized engine, which takes a while once. "auto" does so where the
            training has enough meta-iterations for it to pay, but never convolutions on CPUs. Small linear layers, too,
            are then left to native by "auto". What the network decides in Python is decided when it is compiled.
        task_chunk: tasks that are in memory at a time, at most; the meta-gradients of chunks are added up. By default
            all where they are executed at once, and as many as there are threads where one after another.
        freeze: which weights stay as they are, as patterns of their names, such as `body.*`; one that begins with `!`
            takes out again. They get no gradient and no step, and are not sent at merges.
        batch_norm: "task" has batch norms use the statistics of the samples at hand, always: transductive, as in the
            MAML paper. "frozen" has them use their running statistics, and never write them, as pretrained bodies need.

    Attributes:
        shapes: axes of one "sample" and of one "output" of the network, as the data gave them; empty before.
        scaling: how the units of the data became those of its tasks, if they are not the same.
        trained_by: the number of workers that made the checkpoint loaded last.

    Raises:
        ConfigError: a setting out of its range.

    Examples:
        >>> adam = lambda weights: torch.optim.Adam(weights, lr=0.005)
        >>> module = MetaLearning(MLP(1, [40, 40], 1), MAML(inner_lr=0.01), meta_optimizer=adam)
        >>> module(torch.rand(10, 1)).shape
        torch.Size([10, 1])
    """

    def __init__(
        self,
        network: nn.Module,
        algorithm: Algorithm | None = None,
        objective: ObjectiveName | Objective = "regression",
        evaluation_steps: int = 10,
        meta_optimizer: OptimizerCallable = lambda params: torch.optim.Adam(params, lr=1e-3),
        meta_schedule: LRSchedulerCallable | None = None,
        gradient_clip: float | None = None,
        run_length: int = 100,
        engine: EngineName = "auto",
        compile: CompileSetting = "auto",  # noqa: A002 - the name of the setting
        task_chunk: int | None = None,
        freeze: Sequence[str] | None = None,
        batch_norm: BatchNormUse = "task",
    ) -> None:
        super().__init__()
        require_counts(**{"model.run_length": run_length, "model.evaluation_steps": evaluation_steps})
        require_at_most(MOST_STEPS, **{"model.evaluation_steps": evaluation_steps})
        if gradient_clip is not None:
            require_positive(**{"model.gradient_clip": gradient_clip})
        require_kind("model.network", network, nn.Module, "MLP()")  # a function may make it
        algorithm = MAML() if algorithm is None else algorithm
        require_kind("model.algorithm", algorithm, Algorithm, "MAML()")
        self.objective = objective_of(objective)
        if self.objective.metric in ("", "loss") or not isinstance(self.objective.metric, str):
            raise ConfigError(f"model.objective.metric is {self.objective.metric!r}, but must be a name of its own.")
        require_one_of("model.objective.better", self.objective.better, ("min", "max"))
        self.engine = EngineChoice(engine, self.objective, compiled=compile, task_chunk=task_chunk)
        self.evaluation_steps = max(evaluation_steps, algorithm.steps) if algorithm.makes_steps else 0
        self.meta_optimizer = meta_optimizer
        self.meta_schedule = meta_schedule
        self.gradient_clip = gradient_clip
        self.run_length = run_length
        require_one_of("model.batch_norm", batch_norm, ("task", "frozen"))
        self.batch_norm = batch_norm
        (use_batch_statistics if batch_norm == "task" else use_running_statistics)(network)
        for name in select([name for name, _ in network.named_parameters()], freeze or (), "model.freeze"):
            network.get_parameter(name).requires_grad_(False)
        self.learner = MetaLearner(network, algorithm)
        if not any(p.requires_grad for p in self.learner.parameters()):
            has = "frozen parameters alone" if list(network.parameters()) else "no parameters"
            why = f"model.freeze is {list(freeze)}, which" if freeze else f"model.network has {has}, which"
            raise ConfigError(f"{why} leaves nothing to learn.")
        self.trained_by: int | None = None
        self.shapes: dict[str, list[int]] = {}
        self.scaling: Scaling | None = None

    @property
    def network(self) -> nn.Module:
        """The network that is meta-learned, with the meta-weights."""
        return self.learner.network

    @property
    def engine_in_use(self) -> str:
        """Name of the engine that `model.engine` comes to."""
        return self.engine.name(self.learner)

    def configure_optimizers(self) -> Any:
        """The meta-optimizer over all meta-learned parameters, and its schedule.

        Raises:
            ConfigError: a setting that the optimizer refuses, or a learning rate that is not greater than zero.
        """
        optimizer = self._optimizer(self.learner.param_groups())
        schedule = self._schedule(optimizer)
        return optimizer if schedule is None else ([optimizer], [schedule])

    def check_outer_steps(self, meta_iterations: float = math.inf) -> None:
        """Check that the meta-optimizer and its schedule can make so many steps, by one with copies of the parameters.

        Raises:
            ConfigError: names the setting.
        """
        optimizer = self.trial_optimizer()
        check_steps(optimizer, self._schedule(optimizer), meta_iterations)

    def trial_optimizer(self) -> torch.optim.Optimizer:
        """The meta-optimizer over copies of the parameters, to try on them what the training is to do.

        Raises:
            ConfigError: as `configure_optimizers`.
        """
        groups = [
            {**group, "params": [p.detach().clone().requires_grad_() for p in group["params"]]}
            for group in self.learner.param_groups()
        ]
        return self._optimizer(groups)

    def _optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        try:
            optimizer = self.meta_optimizer(groups)
            rates = [float(group.get("lr", 1.0)) for group in optimizer.param_groups]  # one of a user's may have none
        except Exception as error:  # of a user's own class, too
            raise ConfigError(f"model.meta_optimizer refuses a setting: {reason_of(error)}.") from error
        if isinstance(optimizer, AskingOptimizer) and type(self.objective).constraint is Objective.constraint:
            raise ConfigError(
                f"model.meta_optimizer is {type(optimizer).__name__}, which bounds how far policies move, but "
                f"model.objective is {self.objective.name}, which has no such bound: set it to another optimizer, such "
                "as torch.optim.Adam."
            )
        for rate in rates:
            require_positive(**{"model.meta_optimizer.lr": rate})
        steps = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if not any(id(parameter) in steps for group in groups for parameter in group["params"]):
            raise ConfigError(
                f"model.meta_optimizer is {type(optimizer).__name__}, which steps none of the weights that it is given."
            )
        return optimizer

    def _schedule(self, optimizer: torch.optim.Optimizer) -> Any:
        try:
            return self.meta_schedule and self.meta_schedule(optimizer)
        except Exception as error:  # of a user's own class, too
            raise ConfigError(f"model.meta_schedule refuses a setting: {reason_of(error)}.") from error

    def forward(self, x: Tensor) -> Any:
        """The unadapted network's predictions (B, ...) of samples (B, ...)."""
        return self.network(x)

    def setup(self, stage: str) -> None:
        """Refuse what cannot work before it costs time, and remember the untrained weights for the meta-test.

        Raises:
            ConfigError: network, objective and data do not fit together, or the strategy cannot merge runs.
        """
        trainer = self.trainer
        self.check_workers_can_merge(trainer)
        self.check_trainer(trainer, getattr(trainer, "datamodule", None))
        self.engine.meta_iterations = self._longest() if stage == "fit" else None
        if stage == "fit":
            self.check_outer_steps(self._longest())
        data = getattr(trainer, "datamodule", None)
        self.scaling = getattr(data, "scaling", None) or self.scaling
        if hasattr(data, "evaluation_task"):
            self.check_data(data, "val" if stage == "fit" else "test")
        self.remember_untrained()

    def on_fit_start(self) -> None:
        """Say how many parameters do what."""
        super().on_fit_start()
        if self.batch_norm == "frozen":  # as it is meant to be
            warnings.filterwarnings("ignore", r"Found \d+ module\(s\) in eval mode at the start of training")
        counts = self.learner.states()
        rank_zero_info("Parameters: " + ", ".join(f"{count:,} {state}" for state, count in counts.items()))

    def _longest(self) -> float:
        """Meta-iterations of a worker in the whole training; infinite where nothing says."""
        trainer: Any = self.trainer
        by_steps = math.inf if trainer.max_steps < 0 else trainer.max_steps
        if not trainer.max_epochs or trainer.max_epochs < 0:
            return float(by_steps)
        runs = getattr(getattr(trainer, "datamodule", None), "runs_per_epoch", math.inf)
        return float(min(by_steps, trainer.max_epochs * runs * self.planned_run_length()))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the number of the next run, from which its tasks follow, and what the network was trained on."""
        checkpoint["runs"] = {"done": self.runs_done, "tasks_seen": self.tasks_seen, "env_steps": self.env_steps}
        checkpoint["validations"] = [each._asdict() for each in self.validations]
        checkpoint["shapes"] = self.shapes
        checkpoint["scaling"] = None if self.scaling is None else self.scaling._asdict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with the run after the last one that was merged."""
        runs = checkpoint.get("runs", {})
        self.runs_done = int(runs.get("done", 0))
        self.tasks_seen = int(runs.get("tasks_seen", 0))
        self.env_steps = int(runs.get("env_steps", 0))
        self._keep_validations([Validation(**each) for each in checkpoint.get("validations", ())])
        self._loaded_step = int(checkpoint.get("global_step", 0))
        self.trained_by = checkpoint.get(CHECKPOINT_KEY, {}).get("workers")
        self.shapes = self.shapes or checkpoint.get("shapes", {})

    def _keep_validations(self, loaded: list[Validation]) -> None:
        """Those of the checkpoint, unless it is an earlier one of the training that this module has just made."""
        own = [each.env_steps for each in self.validations[: len(loaded)]]
        goes_on = self._trainer is not None and self._trainer.state.fn == "fit"
        if goes_on or own != [each.env_steps for each in loaded]:
            self.validations = loaded
