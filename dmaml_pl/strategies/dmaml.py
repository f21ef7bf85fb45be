"""The DMAML strategy: workers make runs alone, and merge their meta-weights at the end of each.

Soulier, "Distributed Model-Agnostic Meta-Learning", master thesis, TH Koeln 2020. The scheme is that of local SGD
(Stich 2019, arXiv:1805.09767) with a meta-learner as the local optimizer.

What it promises beside what every strategy with workers does (`strategy.py`): no worker waits for another within a
run; at the run's end there is one all-reduce, after which all workers hold bit-identical weights and buffers; with one
worker and the plain mean nothing is done at all. With `overlap` the workers are alike whenever somebody looks: at a
validation, in a checkpoint, at the end of the training.

Legend: P floating-point values of the network, Z of the optimizers' moments.
"""

import copy
import io
import math
import time
from collections.abc import Mapping
from typing import Any, Literal

import torch
from pytorch_lightning.plugins.environments import LightningEnvironment
from pytorch_lightning.trainer.states import TrainerFn
from torch import Tensor

from dmaml_pl.checks import require_kind, require_one_of, require_positive
from dmaml_pl.errors import ConfigError, reason_of
from dmaml_pl.runs import RunReport
from dmaml_pl.strategies.exchange import Exchange, Merged, Sent
from dmaml_pl.strategies.flat import FlatState, pack, unpack
from dmaml_pl.strategies.merge import MeanMerge, MergeRule
from dmaml_pl.strategies.moments import moments_of
from dmaml_pl.strategies.replica import check_installed
from dmaml_pl.strategies.strategy import WorkerStrategy

Moments = Literal["keep", "average", "reset"]
TransferType = Literal["float32", "bfloat16"]

COMMAND_ONLY = (
    "trainer.strategy.elastic is true, for which a process of its own watches the workers: train by the command "
    "dmaml fit, or set it to false."
)


class DMAMLStrategy(WorkerStrategy):
    """Lets W workers train alone for a run of H meta-iterations, then merges their meta-weights, and so on.

    Args:
        run_seconds: seconds after which every worker ends its run, instead of a length: for workers of unequal speed.
            A worker then counts in the merge by its meta-iterations; Lightning's `global_step` counts their mean. Such
            a training cannot be repeated to the bit.
        merge: how the workers' weights become one; the plain mean of the thesis by default.
        moments: what becomes of the workers' own optimizer moments at a merge: "keep" (each its own), "average" (sent
            along with the weights; ahead on images), or "reset" (start anew, which costs much where runs are short). A
            single worker's are left alone.
        transfer_dtype: "float32" sends the weights as they are; "bfloat16" sends each worker's displacement
            from the run's start, in half the bytes.
        overlap: send while the next run is made, and add what the merge has changed when that ends (delayed averaging:
            Zhou et al. 2020, arXiv:2006.00441). Before a validation or a checkpoint the merge is waited for, so it
            pays only where these do not follow every run.
        elastic: whether workers may be lost, restarted and added while the training runs, on any number of machines,
            none of them special. Needs the extra `dmaml_pl[elastic]`.
        settings: those of `WorkerStrategy`. `timeout` must exceed the time by which the slowest worker's run is longer
            than the fastest's, and the start-up of all workers.

    Raises:
        ConfigError: a setting out of its range, or settings that do not go together.

    Examples:
        >>> strategy = DMAMLStrategy(run_length=100, merge=MeanMerge(), moments="keep")
        >>> strategy.run_length
        100
    """

    strategy_name = "dmaml"
    remedy = (
        WorkerStrategy.remedy
        + " With --trainer.strategy.elastic true (pip install 'dmaml_pl[elastic]') the others go on without it."
    )

    def __init__(
        self,
        *,
        run_seconds: float | None = None,
        merge: MergeRule | None = None,
        moments: Moments = "average",
        transfer_dtype: TransferType = "float32",
        overlap: bool = False,
        elastic: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        if run_seconds is not None:
            require_positive(**{"trainer.strategy.run_seconds": run_seconds})
            if self.run_length is not None:
                raise ConfigError(
                    f"trainer.strategy.run_length is {self.run_length} and trainer.strategy.run_seconds is "
                    f"{run_seconds}: a run ends after a number of meta-iterations or after a time, so set one of them "
                    "to null."
                )
        require_one_of("trainer.strategy.moments", moments, ("keep", "average", "reset"))
        require_one_of("trainer.strategy.transfer_dtype", transfer_dtype, ("float32", "bfloat16"))
        if overlap and moments != "keep":
            raise ConfigError(
                f"trainer.strategy.overlap is true and trainer.strategy.moments is {moments}, which would undo the "
                "steps made meanwhile: set moments to keep, or overlap to false."
            )
        if elastic and overlap:
            raise ConfigError(
                "trainer.strategy.elastic is true and trainer.strategy.overlap is true, which do not go together: set "
                "one of them to false."
            )
        if elastic and self._process_group_backend is not None:
            raise ConfigError(
                f"trainer.strategy.process_group_backend is {self._process_group_backend}, but must be null where "
                "trainer.strategy.elastic is true: workers that come and go meet by gloo."
            )
        if elastic:
            check_installed()
        self.elastic = elastic
        self.merge_rule = MeanMerge() if merge is None else merge
        require_kind("trainer.strategy.merge", self.merge_rule, MergeRule, "MeanMerge()")
        self.validation_tasks = self.merge_rule.validation_tasks
        self.moments = moments
        self.run_seconds = run_seconds
        self.exchange = Exchange(
            exclude=self.on_non_finite == "exclude", even=run_seconds is None, bfloat16=transfer_dtype == "bfloat16"
        )
        self.overlap = overlap
        self._under_way: Sent | None = None

    def check(self, trainer: Any, module: Any, data: Any) -> None:
        """Refuse workers that come and go where something else than dmaml has started them.

        Raises:
            ConfigError: names the setting.
        """
        if self.elastic and not isinstance(self.cluster_environment, LightningEnvironment):
            raise ConfigError(
                "trainer.strategy.elastic is true, for which dmaml itself starts the workers of each machine: start "
                "`dmaml fit` there without torchrun, srun or the like, or set it to false."
            )
        super().check(trainer, module, data)
        self._try_rule(FlatState(module, parameters=True).parameter_size)

    def _try_rule(self, size: int) -> None:
        """Have a copy of the merge rule weigh a run, merge, and be kept, as it will when the first run is over."""
        start = torch.zeros(size)
        report: RunReport = {"tasks": 1, "iterations": 1, "share": 1.0, "seconds": 1.0, "validation_loss": 1.0}
        try:
            rule = copy.deepcopy(self.merge_rule)
            weight, merged = rule.weight(report), rule.merge(start, start + 1e-3)
            torch.save(rule.state_dict(), io.BytesIO())
            range(rule.validation_tasks)
            fits = merged.shape == start.shape and bool(torch.isfinite(merged).all())
            why = (
                ""
                if fits and 0 <= weight < math.inf
                else f"it gives {merged[:3].tolist()} and so on, and a run counts {weight}"
            )
        except Exception as error:  # of a user's own rule, too
            why = reason_of(error)
        if why:
            raise ConfigError(
                f"trainer.strategy.merge is {type(self.merge_rule).__name__}, which cannot merge ({why}): it must give "
                "finite numbers in the shape of the weights, and a run a weight of 0 or more."
            )

    def setup_environment(self) -> None:
        """Lightning's.

        Raises:
            ConfigError: workers are to come and go, and nobody watches them.
        """
        fits = self._module().trainer.state.fn == TrainerFn.FITTING
        if fits and self.elastic and not self.workers_may_change:
            raise ConfigError(COMMAND_ONLY)
        super().setup_environment()

    def _acts_alone(self) -> bool:
        return self.merge_rule.acts_alone

    def _merged_state(self) -> FlatState:
        return FlatState(self._module())

    def _end_of_run(self, state: FlatState, start: Tensor, report: RunReport) -> RunReport:
        if self._alone:
            state.unpack_floats(self._apply_rule(start, state.pack_floats(), state.parameter_size))
            return report
        if self.overlap:
            return self._end_of_overlapped_run(state, start, report)
        average = self.moments == "average"
        moments = [moment for optimizer in self.optimizers for moment in moments_of(optimizer)] if average else []
        offer = self._offer(state, start, report, self._weight(report), pack(moments, state.like))
        merged = self._exchange(offer)
        mean, mean_moments = merged.mean.tensor_split([start.numel()])
        self._adopt(state, start, merged._replace(mean=mean))
        unpack(mean_moments, moments)
        if self.moments == "reset" or (self.moments == "keep" and self._was_excluded(merged)):
            self._forget_moments()
        return merged.report

    def _weight(self, report: RunReport) -> float:
        return 1.0 if report.get("failure") else self.merge_rule.weight(report)

    def _adopt(self, state: FlatState, start: Tensor, merged: Merged) -> None:
        """Make the merged weights this worker's own."""
        state.unpack_floats(self._apply_rule(start, merged.mean, state.parameter_size))
        state.unpack_integers(merged.integers)
        merged.report["merge"] |= spread(merged.metrics, merged.mean - start)

    def _apply_rule(self, start: Tensor, mean: Tensor, size: int) -> Tensor:
        """The rule decides about the parameters, the first `size` values; buffers are averaged whatever the rule."""
        return torch.cat([self.merge_rule.merge(start[:size], mean[:size]), mean[size:]])

    def _was_excluded(self, merged: Merged) -> bool:
        return any(failure.worker == self.global_rank for failure in merged.failures)

    def _forget_moments(self) -> None:
        """As at the start of a training; learning rates and other settings stay."""
        for optimizer in self.optimizers:
            optimizer.state.clear()

    # -- a merge that overlaps with the next run ----------------------------------------------------------------------

    def _end_of_overlapped_run(self, state: FlatState, start: Tensor, report: RunReport) -> RunReport:
        """Take in the last merge, and send this run's end; the report that is returned is that of the last run."""
        report["end"] = self._module().trainer.global_step
        finished: RunReport = {"loss": report["loss"]}
        if self._under_way is not None:
            finished, start = self._take_in(state, self._under_way)
        offer = self._offer(state, start, report, self._weight(report))
        self._under_way = self.together(lambda: self._send(offer))
        return finished

    def _take_in(self, state: FlatState, sent: Sent) -> tuple[RunReport, Tensor]:
        """Add what the merge under way has changed; returns its run's report, and the merged weights (P,)."""
        self._under_way = None
        began = time.perf_counter()
        progress = state.pack_floats() - sent.offer.values
        merged = self._accept(self.together(lambda: self.exchange.wait(sent)))
        self._adopt(state, sent.offer.base, merged)
        together = state.pack_floats()
        if self._was_excluded(merged):
            self._forget_moments()
        else:
            # Where no step was made since, the sum is exactly what all workers hold.
            state.unpack_floats(together + progress)
        merged.report["merge"]["merge/seconds"] = time.perf_counter() - began
        return merged.report, together

    @property
    def merge_under_way(self) -> bool:
        """Whether a merge is not yet taken in, so that the workers differ."""
        return self._under_way is not None

    def wait_for_merge(self) -> None:
        """Finish the merge under way, if there is one: afterwards all workers hold the same weights."""
        if self._under_way is not None:
            report, _ = self._take_in(self._merged_state(), self._under_way)
            self._module().log_merged_run(report)

    def on_validation_start(self) -> None:
        """Validate merged weights."""
        self.wait_for_merge()
        super().on_validation_start()

    def on_train_end(self) -> None:
        """End with merged weights."""
        self.wait_for_merge()
        super().on_train_end()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The merged weights, for a checkpoint."""
        self.wait_for_merge()
        return super().lightning_module_state_dict()

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def state_to_keep(self) -> dict[str, Any]:
        """The memory of the merge rule."""
        return {"merge": self.merge_rule.state_dict()}

    def _load_kept_state(self, kept: Mapping[str, Any]) -> None:
        self.merge_rule.load_state_dict(kept.get("merge", {}))


def spread(metrics: Mapping[str, Tensor], displacement: Tensor) -> dict[str, float]:
    """How far apart the workers have gone in a run, from their displacements d_i and the mean of these.

    `merge/drift` is the root mean square distance of their weights from the mean, from mean |d_i|^2 - |mean d_i|^2,
    which needs no second all-reduce. `merge/agreement` is |mean d_i|^2 / mean |d_i|^2: 1 over the number of workers
    where their ways have nothing in common, so that the mean takes away noise, and 1 where all go the same way.
    """
    weight, squared = metrics["weight"], metrics["squared_displacement"].double()
    own = ((weight / weight.sum()).double() * squared).sum()
    common = displacement.double().square().sum()
    agreement = common / own if own > 0 else torch.ones_like(common)
    return {"merge/drift": float((own - common).clamp(min=0).sqrt()), "merge/agreement": float(agreement)}
