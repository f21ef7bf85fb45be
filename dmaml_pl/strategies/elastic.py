"""DMAML by workers that come and go: what of the strategy is otherwise where any worker may be lost, or join.

Who is there, and how whoever joins gets the training, stands in `quorum.py`; docs/elastic.md has the promises.
"""

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.types import _PATH
from pytorch_lightning.trainer.states import TrainerFn
from pytorch_lightning.utilities import rank_zero_info
from pytorch_lightning.utilities.rank_zero import rank_zero_only
from torch import Tensor

from dmaml_pl.launching import supervisor
from dmaml_pl.runs import IN_MIND, RunReport
from dmaml_pl.strategies.dmaml import DMAMLStrategy
from dmaml_pl.strategies.exchange import Merged, Offer, Sent
from dmaml_pl.strategies.quorum import Quorum, digest_of
from dmaml_pl.strategies.replica import member_name


class ElasticStrategy(DMAMLStrategy):
    """A `DMAMLStrategy` whose worker is one of those that come and go; `among_those_who_come_and_go` makes it.

    Attributes:
        quorum: those who are there, from `join` on.
    """

    workers_may_change = True
    quorum: Quorum

    _in_group = False
    _validation_is_stale = False

    # -- workers ---------------------------------------------------------------------------------------------------

    def join(self) -> dict[str, Any] | None:
        """Become one of the workers; returns the training to go on with, None if this one begins it.

        Raises:
            NobodyLeftError: the training that it was to join has ended, or lost all its workers.
        """
        assert self.cluster_environment is not None, "Lightning sets it first"  # noqa: S101
        lighthouse, rank = os.environ[supervisor.LIGHTHOUSE], self.cluster_environment.local_rank()
        self._listen()
        self._at_once = True
        self.quorum = Quorum(lighthouse, member_name(rank), self.timeout, self.check_workers, tells=rank == 0)
        handed = self.quorum.join(self.num_processes * self.num_nodes, may_begin=supervisor.may_begin())
        self.set_world_ranks()
        return handed

    def setup_distributed(self) -> None:
        """Nothing to set up: `join` has met the others."""

    def setup(self, trainer: pl.Trainer) -> None:
        """Lightning's; in a test there are no weights to send, as all have read the same file."""
        if trainer.state.fn == TrainerFn.FITTING:
            super().setup(trainer)
            return
        self.accelerator.setup(trainer)  # type: ignore[union-attr]  # Lightning sets it first
        self.precision_plugin.convert_module(self._module())
        self.model_to_device()
        self.setup_precision_plugin()

    def configure_ddp(self) -> None:
        """Nothing to send: whoever joins was handed the weights."""

    def set_world_ranks(self) -> None:
        """The ranks of those who are there."""
        super().set_world_ranks()
        if self.cluster_environment is not None:
            self.cluster_environment.set_global_rank(self.quorum.rank)
            self.cluster_environment.set_world_size(self.quorum.size)
            rank_zero_only.rank = self.quorum.rank  # type: ignore[attr-defined]  # Lightning sets it on the function

    def _follow_quorum(self) -> None:
        """Take notice of who came to the last meeting."""
        before, now = (self.global_rank, self.world_size), (self.quorum.rank, self.quorum.size)
        if before != now:
            self.set_world_ranks()
            self._validation_is_stale = True  # its tasks are to be shared among those who are there
            rank_zero_info(f"In run {self._run} the number of workers goes from {before[1]} to {now[1]}.")

    # -- signals ---------------------------------------------------------------------------------------------------

    def check_workers(self) -> None:
        """Leave at once where a signal asks for it: the others go on.

        Raises:
            SIGTERMException: this process was asked to end.
            KeyboardInterrupt: Ctrl-C was pressed.
        """
        if self._asked_to_stop is not None:
            raise self._asked_to_stop

    def on_exception(self, exception: BaseException) -> None:
        """Let the others know that they need not wait."""
        super().on_exception(exception)
        self.quorum.leave()

    # -- a run -----------------------------------------------------------------------------------------------------

    @property
    def _alone(self) -> bool:
        return False

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Hand the training to those who have come, then make a run."""
        module = self._module()
        self._run, self._in_group = module.runs_done, True
        if self.quorum.guests:
            self.quorum.hand_over(lambda: _at_beginning_of_run(module.trainer))
            self._follow_quorum()
        if self._validation_is_stale:
            self._validation_is_stale = False
            module.trainer.fit_loop.epoch_loop.val_loop._combined_loader = None  # noqa: SLF001 - or it is kept
        report: RunReport = super().training_step(*args, **kwargs)
        report["merge"].pop("merge/seconds", None)  # of this worker alone, and all log the same
        return report

    def _exchange(self, offer: Offer) -> Merged:
        sent: list[Sent] = []

        def payload() -> Tensor:
            sent[:] = [self.exchange.pack(offer, self.quorum.rank, self.quorum.size)]
            return sent[0].payload

        summed = self.quorum.sum(payload, digest_of(offer.base))
        self._follow_quorum()
        sent[0].payload = summed
        return self._accept(sent[0])

    def _accept(self, sent: Sent) -> Merged:
        merged = super()._accept(sent)
        merged.report["merge"]["merge/workers"] = float(self.world_size)
        return merged

    # -- calls that all workers make together ----------------------------------------------------------------------

    def gather(self, own: Any) -> list[Any]:
        """What every worker gave, by worker, on every worker that was there."""
        if not self._in_group:
            return [own]
        everyone = self.quorum.gather(own)
        self._follow_quorum()
        return everyone

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:  # noqa: A002 - Lightning's name
        """All decide alike, by what they have gathered."""
        return decision

    def on_train_end(self) -> None:
        """Know that all have made the last merge."""
        super().on_train_end()
        self.gather(None)

    def on_test_end(self) -> None:
        """Know that all workers have what the test found."""
        super().on_test_end()
        self.gather(None)

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: _PATH, storage_options: Any | None = None) -> None:
        """As otherwise, with what was logged and may not be in the store: whoever goes on from there sends it."""
        loggers = self._module().trainer.loggers
        checkpoint[IN_MIND] = [list(getattr(getattr(logger, "relay", None), "logged", ())) for logger in loggers]
        super().save_checkpoint(checkpoint, filepath, storage_options)

    def _moments_to_keep(self, checkpoint: dict[str, Any]) -> dict[str, Any]:
        """Worker 0's, which the checkpoint has anyway, for all who go on from it."""
        return {}

    def _with_own_moments(self, checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
        return checkpoint


def among_those_who_come_and_go(strategy: DMAMLStrategy) -> ElasticStrategy:
    """Make a strategy one of a worker that comes and goes, and keep what else a class of a user's has made of it."""
    strategy.__class__ = type(type(strategy).__name__, (ElasticStrategy, type(strategy)), {})
    return cast("ElasticStrategy", strategy)


def _at_beginning_of_run(trainer: pl.Trainer) -> dict[str, Any]:
    """A checkpoint of a training whose next run has begun, as if it had not."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "handed.ckpt")
        trainer.save_checkpoint(file, weights_only=False)
        checkpoint: dict[str, Any] = torch.load(file, weights_only=False)
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    for count in (progress["total"], progress["current"]):
        count["ready"] = count["started"] = count["processed"] = count["completed"]
    return checkpoint
