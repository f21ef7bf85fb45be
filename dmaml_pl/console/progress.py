"""Progress that moves with every meta-iteration, and with every batch of tasks that is evaluated."""

import math
import time
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ProgressBar

from dmaml_pl.console.meter import TASKS, Meter, brief, counted, say
from dmaml_pl.tasks import TaskBatch


class RunProgress(ProgressBar):
    """Shows the run, the metric, the tasks per second and the time left, on standard error.

    Examples:
        >>> trainer = pl.Trainer(callbacks=[RunProgress()], logger=False, max_steps=100)
        >>> trainer.max_steps
        100
    """

    def __init__(self) -> None:
        super().__init__()
        self._shown = True
        self._meter: Meter | None = None
        self._began = 0.0
        self._evaluated = 0.0
        self._validation = ""

    def enable(self) -> None:
        """Show progress."""
        self._shown = True

    def disable(self) -> None:
        """Lightning calls this on every worker but worker 0."""
        self._shown = False
        self._close()

    # -- training --------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Open the bar at the place where a resumed training stands."""
        self._began = time.monotonic()
        title = f"training with the {pl_module.engine_in_use} engine"
        total, done = _planned_iterations(trainer, pl_module), trainer.global_step
        counted, before = _counted(trainer, pl_module)
        self._open(title, total, done=done, unit="meta-iteration", counted=counted, before=before)

    def on_meta_iteration_end(self, trainer: pl.Trainer, pl_module: Any, done: int, length: float, loss: float) -> None:
        """One of the run's `length` meta-iterations (infinite: unknown) is over, the `done`-th."""
        if self._meter is None or not self._meter.wants():
            return
        place = f"{done}" if math.isinf(length) else f"{done}/{length:.0f}"
        shown = f"loss {loss:.3f}"
        if pl_module.objective.acts:
            now, before = (float(pl_module.under_way.latest[name]) for name in ("return", "return_before"))
            shown = f"return {_figure(pl_module, now)} (before {_figure(pl_module, before)})"
        text = f"run {pl_module.runs_done + 1} ({place}), {shown}{self._validation}"
        self._meter.show(trainer.global_step, text, _counted(trainer, pl_module)[1])

    def on_validation_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """In a training, count the tasks that are evaluated."""
        if trainer.state.fn == "fit" and self._meter is not None:
            self._evaluated = 0
            self._meter.restart_rate(0)

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: TaskBatch, batch_idx: int, *args: Any
    ) -> None:
        """One batch of validation tasks more, in a training or alone."""
        if trainer.state.fn != "fit":
            self._count(trainer, pl_module, batch, "validation", trainer.val_dataloaders)
            return
        self._evaluated += batch.tasks * trainer.world_size
        if self._meter is not None and not trainer.sanity_checking and self._meter.wants():
            batches = sum(trainer.num_val_batches)
            text = f"run {pl_module.runs_done}, validation ({batch_idx + 1}/{batches:.0f}){self._validation}"
            self._meter.show(trainer.global_step, text, self._evaluated)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Keep the last validation's figure beside the bar."""
        if trainer.state.fn == "validate":
            self._close()
        if trainer.sanity_checking or not self._shown or trainer.state.fn != "fit":
            return
        if self._meter is not None:
            counted, before = _counted(trainer, pl_module)
            self._meter.restart_rate(before, counted)
        name = pl_module.objective.metric
        value = float(trainer.callback_metrics.get(f"val/{name}", math.nan))
        self._validation = f", val/{name} {_figure(pl_module, value)}"

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Close the bar, and say in one line what was done."""
        self._close()
        if self._shown:
            seconds = time.monotonic() - self._began
            steps = counted(trainer.global_step, "meta-iteration")
            say(
                f"Trained {counted(pl_module.runs_done, 'run')}, {steps} on each of "
                f"{counted(trainer.world_size, 'worker')}, {counted(pl_module.tasks_seen, 'task')}, "
                + (f"{brief(pl_module.env_steps)} env steps, " if pl_module.env_steps else "")
                + f"in {seconds:.0f} s."
            )

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave the terminal as it was."""
        self._close()

    # -- evaluating ------------------------------------------------------------------------------------------------

    def on_baseline_step(self, trainer: pl.Trainer, pl_module: Any, done: int, steps: int, value: float) -> None:
        """The training of the baseline that a meta-test compares with has come so far.

        Its `steps` are those of its optimizer, and `value` is the loss; in environments steps in them, and the return.
        """
        acts = pl_module.objective.acts
        if self._meter is None:
            self._open("training the baseline", steps, unit="env step" if acts else "step")
        if done == steps:
            self._close()
        elif self._meter is not None and self._meter.wants():
            self._meter.show(done, f"training the baseline, {'return' if acts else 'loss'} {_figure(pl_module, value)}")

    def on_test_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: TaskBatch, *args: Any
    ) -> None:
        """One batch of meta-test tasks more."""
        self._count(trainer, pl_module, batch, "meta-test", trainer.test_dataloaders)

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Close the bar before the report is printed."""
        self._close()

    def on_predict_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: TaskBatch, *args: Any
    ) -> None:
        """One batch of predicted tasks more."""
        self._count(trainer, pl_module, batch, "prediction", trainer.predict_dataloaders)

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Close the bar before the file is told of."""
        self._close()

    def _count(self, trainer: pl.Trainer, module: Any, batch: TaskBatch, what: str, loaders: Any) -> None:
        loader = loaders[0] if isinstance(loaders, list | tuple) and loaders else loaders
        total = float(getattr(loader, "tasks", math.inf))  # of all workers together
        if self._meter is None:
            self._open(what, total, unit="task")
        self._evaluated = min(self._evaluated + batch.tasks * trainer.world_size, total)
        if self._meter is not None and self._meter.wants():
            value = module.metric_so_far()
            text = what if value is None else f"{what}, {module.objective.metric} {_figure(module, value)}"
            self._meter.show(self._evaluated, text, self._evaluated)

    # -- the bar ---------------------------------------------------------------------------------------------------

    def _open(
        self, title: str, total: float, *, unit: str, done: int = 0, counted: str = TASKS, before: float = 0
    ) -> None:
        self._close()
        self._evaluated = 0
        if self._shown:
            self._meter = Meter(title, total, done=done, unit=unit, counted=counted, before=before)

    def _close(self) -> None:
        if self._meter is not None:
            self._meter.close()
            self._meter = None


def _counted(trainer: pl.Trainer, module: Any) -> tuple[str, float]:
    """What is counted in a training, and how many there are: steps in environments where it makes some, else tasks."""
    if module.objective.acts:
        return "env steps", module.env_steps + module.under_way.env_steps * trainer.world_size
    return TASKS, module.tasks_seen + module.under_way.tasks * trainer.world_size


def _figure(module: Any, value: float) -> str:
    """A loss or a metric; returns may be large, and then need no thousandths."""
    return f"{value:,.1f}" if module.objective.acts and abs(value) >= 10 else f"{value:.3f}"


def _planned_iterations(trainer: pl.Trainer, module: Any) -> float:
    """Meta-iterations of one worker until the training ends by itself; infinite where nothing says so."""
    by_steps = math.inf if trainer.max_steps < 0 else trainer.max_steps
    epochs = math.inf if trainer.max_epochs in (None, -1) else float(trainer.max_epochs or 0)
    return float(min(by_steps, epochs * trainer.num_training_batches * module.planned_run_length()))
