"""Progress that moves with every meta-iteration: a bar on a terminal, else a plain line now and then."""

from __future__ import annotations

import math
import sys
import time
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

PLAIN_SECONDS = 60.0


class RunProgress(ProgressBar):
    """Shows the run, the loss, the last validation, the speed, and the time left, on standard error.

    Args:
        refresh_per_second: how often a terminal's bar is drawn at most.
    """

    def __init__(self, refresh_per_second: float = 5.0) -> None:
        super().__init__()
        self.refresh_per_second = refresh_per_second
        self._shown = True
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._began = 0.0
        self._last_line = 0.0
        self._next_look = 0.0
        self._done_before = 0
        self._validation = ""

    def enable(self) -> None:
        """Show progress."""
        self._shown = True

    def disable(self) -> None:
        """Lightning calls this on every worker but worker 0."""
        self._shown = False
        self._close()

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Open the bar at the place where a resumed training stands."""
        self._began = self._last_line = time.monotonic()
        self._done_before = trainer.global_step
        title = f"training with the {pl_module.engine_in_use} engine"
        self._open(title, _planned_iterations(trainer, pl_module), completed=trainer.global_step)

    def on_meta_iteration_end(self, trainer: pl.Trainer, pl_module: Any, done: int, length: float, loss: float) -> None:
        """One of the run's `length` meta-iterations (infinite: unknown) is over, the `done`-th."""
        now = time.monotonic()
        if now < self._next_look or not self._shown:
            return
        self._next_look = now + 1.0 / self.refresh_per_second  # so seldom that a meta-iteration may be short
        if self._bar is not None:
            text = f"run {pl_module.runs_done + 1}  loss {loss:.3f}{self._validation}"
            self._bar.update(self._task, completed=trainer.global_step, description=text)
        elif now - self._last_line >= PLAIN_SECONDS:
            place = f"{done}" if math.isinf(length) else f"{done}/{length:.0f}"
            self._plain(trainer, pl_module, f"run {pl_module.runs_done + 1} ({place}), loss {loss:.3f}")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Keep the last validation's figure beside the bar."""
        if trainer.sanity_checking or not self._shown or trainer.state.fn != "fit":
            return
        name = pl_module.objective.metric
        value = float(trainer.callback_metrics.get(f"val/{name}", math.nan))
        self._validation = f"  val/{name} {value:.3f}"

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Close the bar, and say in one line what was done."""
        self._close()
        if self._shown:
            seconds = time.monotonic() - self._began
            workers = f"{trainer.world_size} worker{'s' if trainer.world_size > 1 else ''}"
            _say(
                f"Trained {pl_module.runs_done} runs, {trainer.global_step} meta-iterations on each of {workers}, "
                f"{pl_module.tasks_seen} tasks, in {seconds:.0f} s."
            )

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave the terminal as it was."""
        self._close()

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open a bar over the meta-test's batches of tasks."""
        self._open("meta-test", float(sum(trainer.num_test_batches)), completed=0)

    def on_test_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """One batch of tasks more."""
        if self._bar is not None:
            self._bar.advance(self._task)

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Close the bar before the report is printed."""
        self._close()

    def _open(self, title: str, total: float, *, completed: int) -> None:
        if not self._shown:
            return
        console = Console(stderr=True)
        if not console.is_terminal:
            _say(f"{title.capitalize()} ...")
            return
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            console=console,
            refresh_per_second=self.refresh_per_second,
            transient=True,
        )
        self._task = self._bar.add_task(title, total=None if math.isinf(total) else total, completed=completed)
        self._bar.start()

    def _plain(self, trainer: pl.Trainer, module: Any, text: str) -> None:
        self._last_line = time.monotonic()
        total = _planned_iterations(trainer, module)
        left = ""
        done = trainer.global_step - self._done_before
        if done and not math.isinf(total):
            seconds = (self._last_line - self._began) / done * (total - trainer.global_step)
            left = f", about {seconds / 60:.0f} min left" if seconds >= 60 else ", less than a minute left"
        _say(f"{text}{self._validation.replace('  ', ', ')}, meta-iteration {trainer.global_step}/{total:.0f}{left}")

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _planned_iterations(trainer: pl.Trainer, module: Any) -> float:
    """Meta-iterations of one worker until the training ends by itself; infinite where nothing says so."""
    by_steps = math.inf if trainer.max_steps < 0 else trainer.max_steps
    epochs = math.inf if trainer.max_epochs in (None, -1) else float(trainer.max_epochs or 0)
    return float(min(by_steps, epochs * trainer.num_training_batches * module.planned_run_length()))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
