"""What a module checks before the work: network, algorithm, objective, data and Trainer, by trying one task.

Legend: T tasks.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.func import functional_call

from dmaml_pl.engines.loop import adapts_head_alone
from dmaml_pl.engines.per_task import adapted_weights
from dmaml_pl.engines.threads import limited_threads
from dmaml_pl.errors import ConfigError, DmamlError, out_of_memory, reason_of
from dmaml_pl.modules.run import RunModule
from dmaml_pl.modules.trainer_options import check_options
from dmaml_pl.runs import strategy_of_runs
from dmaml_pl.tasks import ActingSource, TaskBatch, check_tasks


@contextmanager
def _told(what: str, advice: str, setting: str = "model.network") -> Iterator[None]:
    """Turn whatever a user's own network (or what else) raises into one line: what it cannot, and the advice."""
    try:
        yield
    except DmamlError:
        raise
    except Exception as error:
        if out_of_memory(error):
            raise
        raise ConfigError(f"{setting} cannot {what} ({reason_of(error)}): {advice}.") from error


def _depends(loss: Tensor, output: Tensor) -> bool:
    if not loss.requires_grad:
        return False
    gradient = torch.autograd.grad(loss, output, allow_unused=True)[0]
    return gradient is not None and bool(gradient.any())


class CheckedModule(RunModule):
    """The part of `MetaLearning` that refuses what cannot work.

    Attributes:
        shapes: axes of one "sample" and of one "output" of the network, as the data gave them.
    """

    shapes: dict[str, list[int]]

    def check_trainer(self, trainer: pl.Trainer, data: Any) -> None:
        """Check the Trainer's options; where samples are made by acting, full precision, and merges without losses.

        Raises:
            ConfigError: names the Trainer's setting.
        """
        check_options(trainer)
        if not isinstance(data, ActingSource):
            return
        if trainer.precision != "32-true":
            raise ConfigError(
                f"trainer.precision is {trainer.precision}, but must be 32-true for environments: ratios of "
                "probabilities lose their meaning in another."
            )
        strategy = strategy_of_runs(trainer)
        if strategy is not None and strategy.validation_tasks:
            raise ConfigError(
                "trainer.strategy.merge weighs the workers by one over a loss, and returns may be of either sign: "
                "choose another, such as dmaml_pl.MeanMerge."
            )

    def check_workers_can_merge(self, trainer: pl.Trainer) -> None:
        """Check that several workers have a strategy that knows about runs; Lightning's DDP would let them drift apart.

        Raises:
            ConfigError: names `trainer.strategy`.
        """
        if trainer.num_devices * trainer.num_nodes > 1 and strategy_of_runs(trainer) is None:
            raise ConfigError(
                f"trainer.strategy is {type(trainer.strategy).__name__}, which does not know about runs: with more "
                "than one worker it must be dmaml."
            )

    def check_data(self, data: Any, split: str) -> None:
        """Check a task of the split that is evaluated next; before a validation also one of training if it differs.

        Raises:
            ConfigError: as `check_task`.
        """
        meta_batch = getattr(data, "meta_batch", 1)
        if isinstance(data, ActingSource):
            self._check_acting(data, meta_batch)
            return
        if split == "val" and getattr(data, "test_ways", None) is not None:
            self.check_task(data.evaluation_task("train", 0), meta_batch)
        self.check_task(data.evaluation_task(split, 0), meta_batch)

    def _check_acting(self, data: ActingSource, meta_batch: int) -> None:
        """Check a policy in one task of environments, and what cannot be had where samples are made by acting."""
        if self.engine.for_acting(self.learner).name == "learn2learn":
            raise ConfigError(
                "model.engine is learn2learn, which has no networks that act in environments: set it to auto."
            )
        try:
            with limited_threads(1):
                query = data.trial(self.act_of(self.learner, steps=0)).query.map(lambda tensor: tensor[0])
                self.objective.check(self.learner.network(query.x), query.y)
                batch = data.trial(self.act_of(self.learner))
        except (RuntimeError, ValueError) as error:
            if isinstance(error, DmamlError) or out_of_memory(error):
                raise
            raise ConfigError(
                f"model.network cannot act in the environments of the data ({reason_of(error)}): set the sizes of its "
                "observations and actions to theirs."
            ) from error
        self.check_task(batch.task(0), meta_batch)

    def check_task(self, task: TaskBatch, meta_batch: int = 1) -> None:
        """Check that the network can take a task (no T axis) and that the objective can evaluate what it gives.

        Args:
            task: one.
            meta_batch: T in training, by which the engine is chosen.

        Raises:
            ConfigError: names the settings that do not fit together.
        """
        batch = task.map(lambda tensor: tensor.unsqueeze(0))
        check_tasks(batch)
        asked, shown = tuple(task.query.x.shape[1:]), tuple(task.support_x.shape[1:])
        if asked != shown:
            raise ConfigError(f"data gives query samples of shape {asked}, but support samples of shape {shown}.")
        given = batch.map(Tensor.clone).to(self.device)
        with _told("be copied and kept", "copy.deepcopy, to, train and state_dict must be able to"):
            copy.deepcopy(self.learner).to(self.device).train().state_dict()
        shape = tuple(task.support_x.shape[1:])
        advice = "set its input size to that of the data, and its type to float32"
        with _told(f"take samples of shape {shape}", advice), torch.no_grad():
            prediction = self._first_output(given)
        if not torch.equal(given.support_x.nan_to_num(), batch.support_x.to(self.device).nan_to_num()):
            raise ConfigError(
                f"model.network is {type(self.learner.network).__name__}, which changes the samples that it is given: "
                "give it an operation that is not in place, such as x = x + 1 instead of x += 1."
            )
        if self.algorithm.any_ways or adapts_head_alone(self.learner):
            self._check_split(task.support_x.to(self.device))
        targets = task.support[0].y
        if isinstance(targets, dict):
            self.objective.check(prediction, targets)
            self.shapes = {"sample": [task.support_x.shape[-1]], "output": [targets["action"].shape[-1]]}
        else:
            self.objective.check(prediction, targets.to(self.device))
            self._check_losses(prediction, targets.to(self.device))
            self.shapes = {"sample": list(task.support_x.shape[1:]), "output": list(prediction.shape[1:])}
            if not bool(torch.isfinite(prediction).all()):
                raise ConfigError(
                    f"model.network is {type(self.learner.network).__name__}, which gives values that are not finite "
                    "numbers before any training: see to its initial weights, and to the samples of the data."
                )
        many = batch.map(lambda tensor: tensor.expand(meta_batch, *tensor.shape[1:]))
        with _told(
            "be trained on a task of the data by model.algorithm and model.objective",
            "PyTorch must be able to differentiate the loss of its output",
        ):
            self.engine.for_training(self.learner, many.to(self.device))

    def _check_losses(self, prediction: Tensor, targets: Tensor) -> None:
        output, kind = prediction.detach().requires_grad_(prediction.is_floating_point()), type(self.objective).__name__
        for name in ("support_loss", "query_loss", "measure"):
            with torch.enable_grad():
                loss = getattr(self.objective, name)(output, targets)
            if not isinstance(loss, Tensor) or loss.ndim:
                given = f"a tensor (shape: {tuple(loss.shape)})" if isinstance(loss, Tensor) else f"{loss!r}"
                raise ConfigError(
                    f"model.objective is {kind}, whose {name} gives {given}, but must give one number for all samples "
                    "of a task, as a tensor without axes."
                )
            if name != "measure" and not bool(torch.isfinite(loss)) and bool(torch.isfinite(output).all()):
                raise ConfigError(f"model.objective is {kind}, whose {name} gives {loss:g} for finite numbers.")
            if name != "measure" and output.requires_grad and not _depends(loss, output):
                raise ConfigError(
                    f"model.objective is {kind}, whose {name} does not depend on the network's output, so that nothing "
                    "can be learned of it: compute it by PyTorch, without item, float or detach."
                )

    def _first_output(self, batch: TaskBatch) -> Any:
        """What the algorithm's network says of the support set of one task before the first step."""
        if isinstance(batch.support[0].y, dict):
            return self.learner.network(batch.support_x[0])
        x, y = batch.support_x[0], batch.support_y[0]
        with _told("begin an adaptation", "its methods start and adapt must give weights by name", "model.algorithm"):
            weights = adapted_weights(self.learner, self.objective, x, y, steps=0)
        output: Tensor = functional_call(self.learner.network, weights, (x,), tie_weights=False)
        return output

    def _check_split(self, x: Tensor) -> None:
        """Check that a network which says that it is an embedding and a head is no more than that."""
        network: Any = self.learner.network
        outputs = []
        for forward in (network, lambda x: network.head(network.embed(x))):
            with torch.no_grad(), torch.random.fork_rng():
                torch.manual_seed(0)  # both draw the same
                outputs.append(forward(x))
        if not torch.allclose(outputs[0], outputs[1], rtol=1e-3, atol=1e-3):
            raise ConfigError(
                f"model.network is {type(network).__name__}, whose output is not head(embed(x)), though it has a "
                "method embed, and a module head that alone adapts: give one of them another name."
            )
