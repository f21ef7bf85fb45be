"""Weights that are frozen, learned or adapt; running statistics; what of them is merged, kept and resumed."""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.vision_transformer import VisionTransformer

import dmaml_pl
from dmaml_pl import MAML, MLP, Backbone, Conv4, DMAMLStrategy, LoRA, MergedAverage, MetaLearning
from dmaml_pl.__main__ import main
from dmaml_pl.data import Split, TaskDataModule
from dmaml_pl.engines import EngineChoice, EngineName
from dmaml_pl.errors import ConfigError
from dmaml_pl.objectives import objective_of
from dmaml_pl.tasks import TaskBatch
from tests.adapting import SINES, train
from tests.recipes import Recorder, same, small_data, small_trainer, state_of
from tests.workers import in_workers

ENGINES: list[EngineName] = ["learn2learn", "per_task", "vectorized"]
WAYS, SIZE = 3, 16
FROZEN: dict[str, Any] = {"freeze": ["body.*"], "batch_norm": "frozen"}


class Patterns(TaskDataModule):
    """Classes of pictures that are a pattern each, with noise."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**({"shots": 2, "queries": 2, "meta_batch": 2, "val_tasks": 2, "test_tasks": 2} | settings))

    def sample_task(self, split: Split, seed: int) -> TaskBatch:
        generator = torch.Generator().manual_seed(seed)
        patterns = torch.rand(WAYS, 3, SIZE, SIZE, generator=generator)
        x, y = patterns.repeat(2, 1, 1, 1), torch.arange(WAYS).repeat(2)
        support, query = (x + 0.3 * torch.randn(x.shape, generator=generator) for _ in range(2))
        return TaskBatch.of(support, y, query, y)


class Convolutions(nn.Sequential):
    """A small body with running statistics that are not those of a fresh one."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 6, 3, stride=2, padding=1),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Conv2d(6, 8, 3, stride=2, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 10),
        )
        for _ in range(3):
            self(torch.randn(20, 3, SIZE, SIZE) * 2 + 1)


def vit() -> VisionTransformer:
    return VisionTransformer(image_size=SIZE, patch_size=8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32)


def backbone(body: type[nn.Module] | Any = Convolutions) -> Backbone:
    torch.manual_seed(0)
    return Backbone(body(), ways=WAYS)


def module_of(network: nn.Module, **settings: Any) -> MetaLearning:
    algorithm = MAML(inner_lr=0.5, inner_steps=3, first_order=settings.pop("first_order", False))
    given: dict[str, Any] = {
        "objective": "classification",
        "evaluation_steps": 3,
        "run_length": 2,
        "meta_optimizer": lambda params: torch.optim.Adam(params, lr=1e-2),
    }
    return MetaLearning(network, algorithm, **(given | settings))


def body_of(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if ".body." in name}


# -- frozen, learned, adapting ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "engine"),
    [
        *((Convolutions, engine) for engine in ("auto", *ENGINES)),
        # PyTorch's attention on CPUs cannot be run on all tasks at once.
        *((vit, engine) for engine in ("auto", "learn2learn", "per_task")),
    ],
)
def test_a_frozen_body_and_its_statistics_stay_and_its_head_is_learned(body: Any, engine: EngineName) -> None:
    network = backbone(body)
    module = module_of(network, engine=engine, **FROZEN)
    before = state_of(module)
    trainer = small_trainer(max_steps=4, limit_val_batches=1.0, val_check_interval=1)
    trainer.fit(module, Patterns())
    trainer.test(module, Patterns(), verbose=False)
    after = state_of(module)
    assert same(body_of(before), body_of(after))
    assert not torch.equal(before["learner.network.head.weight"], after["learner.network.head.weight"])
    (group,) = trainer.optimizers[0].param_groups
    assert [id(p) for p in group["params"]] == [id(p) for p in network.head.parameters()]
    assert all(p.grad is None for p in network.body.parameters())


@pytest.mark.parametrize("engine", ENGINES)
def test_running_statistics_are_used_in_training_in_evaluation_and_by_copies(engine: EngineName) -> None:
    reference = backbone().eval().double()
    module = module_of(backbone().double(), engine=engine, **FROZEN)
    task = (
        Patterns()
        .sample_task("train", 0)
        .map(lambda tensor: tensor.unsqueeze(0))
        .map(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)
    )
    expected = torch.nn.functional.cross_entropy(_adapted_by_hand(reference, task), task.query_y[0])
    for learner in (module.learner, copy.deepcopy(module.learner).train()):
        choice = EngineChoice(engine, objective_of("classification"))
        outcome = choice.for_training(learner.train(), task).meta_gradient(learner, task)
        torch.testing.assert_close(outcome.loss, expected.detach(), rtol=1e-9, atol=1e-12)
        curve = choice.for_evaluation(learner.eval(), task).adaptation_curve(learner, task, 3)
        torch.testing.assert_close(curve.loss[0, 3], expected.detach(), rtol=1e-9, atol=1e-12)


def _adapted_by_hand(network: Backbone, task: TaskBatch) -> Tensor:
    """Query logits after three steps of the head on features by the running statistics."""
    support, query = network.embed(task.support_x[0]).detach(), network.embed(task.query_x[0]).detach()
    weight: Tensor = network.head.weight
    bias: Tensor = network.head.bias
    for _ in range(3):
        loss = torch.nn.functional.cross_entropy(support @ weight.T + bias, task.support_y[0])
        by_weight, by_bias = torch.autograd.grad(loss, [weight, bias])
        weight, bias = ((w - 0.5 * g).detach().requires_grad_() for w, g in ((weight, by_weight), (bias, by_bias)))
    return query @ weight.T + bias


def test_by_default_batch_norms_use_the_statistics_of_the_task() -> None:
    module = module_of(backbone())
    assert all(layer.running_mean is None for layer in module.modules() if isinstance(layer, nn.BatchNorm2d))


def test_a_frozen_stem_a_learned_neck_and_an_adapting_head() -> None:
    network = nn.Sequential()
    torch.manual_seed(0)
    network.stem, network.neck, network.head = (
        nn.Linear(1, 8),
        nn.Sequential(nn.Tanh(), nn.Linear(8, 8)),
        nn.Linear(8, 1),
    )

    module = MetaLearning(network, MAML(inner_lr=0.1, adapts=["head.*"]), freeze=["stem.*"], run_length=5)
    before = state_of(module)
    small_trainer().fit(module, small_data())
    moved = {name for name, value in state_of(module).items() if not torch.equal(value, before[name])}
    assert {name.split(".")[2] for name in moved} == {"neck", "head"}
    assert module.learner.states() == {"frozen": 16, "learned": 72, "adapting": 9}


def test_a_training_says_in_one_line_how_many_parameters_are_what(caplog: pytest.LogCaptureFixture) -> None:
    module = module_of(backbone(), **FROZEN)
    with caplog.at_level(logging.INFO):
        small_trainer(max_steps=1).fit(module, Patterns())
    lines = [record.message for record in caplog.records if record.message.startswith("Parameters")]
    assert lines == ["Parameters: 636 frozen, 0 learned, 27 adapting"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"freeze": ["bodi.*"]},
            r"model.freeze has the pattern 'bodi.\*', which matches no weight of the network: it has such as body",
        ),
        ({"freeze": ["*"]}, r"model.freeze is \['\*'\], which leaves nothing to learn"),
        ({"batch_norm": "running"}, "model.batch_norm is running, but must be task or frozen"),
    ],
)
def test_a_setting_that_cannot_work_is_named_in_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        module_of(backbone(), **settings)


def test_a_batch_norm_without_statistics_cannot_be_frozen() -> None:
    with pytest.raises(
        ConfigError, match=r"batch_norm is frozen, but features.1 of model.network, Conv4, keeps no run"
    ):
        module_of(Conv4(), batch_norm="frozen")


def test_images_of_another_size_than_the_body_takes_are_told_of_in_one_line() -> None:
    body = VisionTransformer(image_size=32, patch_size=8, num_layers=1, num_heads=2, hidden_dim=16, mlp_dim=32)
    with pytest.raises(
        ConfigError, match=r"cannot take samples of shape \(3, 16, 16\) \(Wrong image height! Expected 32"
    ):
        small_trainer().fit(module_of(Backbone(body, ways=WAYS)), Patterns())


# -- merges -------------------------------------------------------------------------------------------------------


def _train(strategy: str) -> Any:
    torch.set_num_threads(1)
    recorder, rank = Recorder(), int(os.environ["RANK"])
    network = backbone()
    with torch.no_grad():
        for tensor in (*network.parameters(), *network.buffers()):
            tensor.add_(rank)  # each worker begins with other weights
    module = module_of(network, engine="vectorized", **FROZEN)
    own = state_of(module)
    trainer = small_trainer(devices=3, strategy=strategy, max_steps=6, callbacks=[recorder])
    trainer.fit(module, Patterns())
    return own, recorder.states, [report["merge"]["merge/bytes"] for report in recorder.reports]


@pytest.mark.parametrize("strategy", ["dmaml", "task_parallel"])
def test_a_frozen_body_is_worker_0s_from_the_start_is_not_sent_at_merges_and_keeps_its_bits(strategy: str) -> None:
    (start, first, sent), (_, second, _), (_, third, _) = in_workers(_train, 3, strategy)
    assert len(first) == 3
    for states in zip(first, second, third, strict=True):
        assert same(states[0], states[1])
        assert same(states[0], states[2])
        assert same(body_of(states[0]), body_of(start))
    assert not same(first[0], first[1])
    values, head = sum(p.numel() for p in body_of(start).values()), WAYS * 8 + WAYS
    assert max(sent) < 4 * values  # though a head with its moments is in it, statistics, and a table of metrics
    assert min(sent) > (4 * head if strategy == "dmaml" else 0)


def test_an_average_of_merged_weights_leaves_what_is_frozen_to_the_bit() -> None:
    module = module_of(backbone(), **FROZEN)
    before = state_of(module)
    small_trainer(max_steps=12, strategy=DMAMLStrategy(), callbacks=[MergedAverage(0.7)]).fit(module, Patterns())
    after = state_of(module)
    assert same(body_of(before), body_of(after))
    assert not same(before, after)


# -- checkpoints --------------------------------------------------------------------------------------------------


def test_a_resumed_training_ends_with_the_same_bits(tmp_path: Path) -> None:
    states = []
    for stop_at, resume in ((4, False), (8, True), (8, False)):
        module = module_of(backbone(), **FROZEN)
        if resume:
            with torch.no_grad():
                for tensor in (*module.parameters(), *module.buffers()):
                    tensor.zero_()  # all comes from the checkpoint
        trainer = small_trainer(max_steps=stop_at, strategy=DMAMLStrategy())
        trainer.fit(module, Patterns(), ckpt_path=tmp_path / "kept.ckpt" if resume else None)
        if stop_at == 4:
            trainer.save_checkpoint(tmp_path / "kept.ckpt")
        states.append(state_of(module))
    assert not same(states[0], states[1])
    assert same(states[1], states[2])


def test_a_checkpoint_alone_adapts_also_when_the_file_of_weights_is_gone(tmp_path: Path) -> None:
    torch.manual_seed(7)
    pretrained = MLP(hidden=[8, 8])
    torch.save(pretrained.state_dict(), tmp_path / "weights.pth")
    config = copy.deepcopy(SINES)
    body = {"class_path": "dmaml_pl.networks.MLP", "init_args": {"hidden": [8, 8]}}
    settings = {"body": body, "ways": 1, "weights": str(tmp_path / "weights.pth")}
    config["model"]["init_args"] |= {
        "network": {"class_path": "dmaml_pl.networks.Backbone", "init_args": settings},
        "freeze": ["body.*"],
    }
    checkpoint = train(tmp_path, config)
    (tmp_path / "weights.pth").unlink()
    kept = torch.load(checkpoint, weights_only=True)["state_dict"]
    for name in ("layers.0.weight", "layers.2.bias"):
        assert torch.equal(kept[f"learner.network.body.{name}"], pretrained.state_dict()[name])
    x = torch.linspace(-1, 1, 5).unsqueeze(1)
    loaded = dmaml_pl.load(checkpoint).network.get_parameter("body.layers.0.weight")
    assert torch.equal(loaded, pretrained.get_parameter("layers.0.weight"))
    for name in ("support", "query"):
        (tmp_path / f"{name}.csv").write_text("x,y\n" + "".join(f"{v},{2 * v}\n" for v in x.flatten().tolist()))
    files = [str(tmp_path / f"{name}.csv") for name in ("support", "query")]
    with contextlib.chdir(tmp_path):
        assert main(["adapt", "--ckpt", str(checkpoint), "--support", files[0], "--query", files[1]]) == 0
    assert (tmp_path / "predictions.csv").is_file()


# -- LoRA ---------------------------------------------------------------------------------------------------------


def test_lora_starts_as_the_network_and_adds_the_products_of_its_adapters() -> None:
    for network in (backbone(), backbone(vit), Conv4(ways=WAYS, channels=3, image_size=16, filters=4), MLP(3, [4], 2)):
        network.eval()
        x = torch.rand(4, 3) if isinstance(network, MLP) else torch.rand(4, 3, SIZE, SIZE)
        before = network(x)
        weights = {name: p.detach().clone() for name, p in network.named_parameters()}
        lora = LoRA(network, rank=2, scale=0.5)
        assert torch.equal(lora(x), before)
        adapted = {name: p for name, p in lora.named_parameters() if "lora" in name}
        assert adapted
        assert all("lora_a" in name or not p.any() for name, p in adapted.items())
        kept = {
            re.sub(r"^body\.|\.base(?=\.)", "", name): p for name, p in lora.named_parameters() if "lora" not in name
        }
        assert same({name: p.detach() for name, p in kept.items()}, weights)
        with torch.no_grad():
            for name, p in adapted.items():
                if "lora_b" in name:
                    p.normal_()
        plain = copy.deepcopy(lora)
        with torch.no_grad():
            layer: Any
            for layer in plain.modules():
                if hasattr(layer, "lora_a"):
                    product = torch.einsum("or,ri...->oi...", layer.lora_b.flatten(1), layer.lora_a)
                    layer.base.weight += 0.5 * product
                    layer.lora_b.zero_()
        assert not torch.allclose(lora(x), before)
        torch.testing.assert_close(lora(x), plain(x))


@pytest.mark.parametrize("engine", ENGINES)
def test_lora_adapts_and_all_else_of_the_body_stays(engine: EngineName) -> None:
    module = module_of(LoRA(backbone(), rank=2), engine=engine, freeze=["body.*", "!*lora*"], batch_norm="frozen")
    assert {name.rpartition(".")[2] for name in module.algorithm.adapts} == {"lora_a", "lora_b", "weight", "bias"}
    assert all("lora" in name or name.startswith("head.") for name in module.algorithm.adapts)
    before = state_of(module)
    small_trainer(max_steps=4).fit(module, Patterns())
    moved = {name for name, value in state_of(module).items() if not torch.equal(value, before[name])}
    assert moved == {f"learner.network.{name}" for name in module.algorithm.adapts}


def test_lora_of_a_transformer_adapts_its_linear_layers_and_leaves_its_attention() -> None:
    network = LoRA(backbone(vit), rank=2)
    names = {
        name.split(".", 4)[4].rpartition(".")[0]
        for name, _ in network.named_parameters()
        if "lora" in name and "layers" in name
    }
    assert names == {"encoder_layer_0.mlp.0", "encoder_layer_0.mlp.3", "encoder_layer_1.mlp.0", "encoder_layer_1.mlp.3"}
    module = module_of(network, freeze=["body.*", "!*lora*"], first_order=True)
    small_trainer(max_steps=2).fit(module, Patterns())


def test_layers_are_chosen_by_patterns() -> None:
    network = LoRA(backbone(vit), layers=["*.mlp.*", "!*_0.*"])
    names = {name for name, _ in network.named_parameters() if "lora_a" in name}
    prefix = "body.body.encoder.layers.encoder_layer_1.mlp"
    assert names == {f"{prefix}.0.lora_a", f"{prefix}.3.lora_a"}


class Reads(nn.Module):
    """Uses the weight of a layer without running it."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(1, 3)
        self.last = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(nn.functional.linear(x, self.qkv.weight))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("network", "settings", "message"),
    [
        (MLP(), {"rank": 0}, "model.network.rank is 0, but must be greater than 0"),
        (MLP(), {"layers": ["blocks.*"]}, r"model.network.layers has the pattern 'blocks.\*', which matches no"),
        (nn.Linear(1, 1), {}, "Linear, which has no layer but its head that LoRA knows"),
    ],
)
def test_what_lora_cannot_do_is_told_in_one_line(network: nn.Module, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LoRA(network, **settings)


def test_a_layer_whose_adapters_would_have_no_effect_is_named() -> None:
    with pytest.raises(ConfigError, match=r"takes in qkv, whose weights the network reads .*\['!\*qkv'\]"):
        small_trainer().fit(MetaLearning(LoRA(Reads())), small_data())
