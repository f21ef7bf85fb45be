"""Whether every engine gives on the device what one task after another gives on the CPU, in float64.

In float32 an error is allowed of ten times that of the same computation on the CPU, as a ReLU that flips moves anyone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from itertools import product

import torch
from torch import Tensor

from benchmarks.gpu_check.sections import Row, Setting, Tell, attempt
from benchmarks.speed.agreement import FEW_TASKS, TOLERANCE, disagreement
from benchmarks.speed.peers import UnavailableError, our_engine
from benchmarks.speed.problems import Problem, conv, omniglot, sinusoid
from dmaml_pl import Conv4
from dmaml_pl.engines import EngineChoice, EngineName
from dmaml_pl.errors import ConfigError

ENGINES: tuple[tuple[EngineName, bool], ...] = (
    ("learn2learn", False),
    ("per_task", False),
    ("vectorized", False),
    ("vectorized", True),
    ("auto", False),
)
"""With whether it is compiled; `native` is for CPUs alone."""

FLOAT32_TOLERANCE, FLOAT32_TIMES = 1e-4, 10.0

Gradients = Mapping[str, Tensor]


def equality(setting: Setting, tell: Tell) -> None:
    """Engines on networks, in both precisions; then every algorithm of the package."""
    torch.backends.cudnn.allow_tf32 = False  # products are exact by default, convolutions are not
    for problem in _problems(setting):
        reference = _gradients(replace(problem, dtype=torch.float64), "per_task")
        own = disagreement(_gradients(replace(problem, dtype=torch.float32), "per_task"), reference)
        for dtype, most in ((torch.float64, TOLERANCE), (torch.float32, max(FLOAT32_TOLERANCE, FLOAT32_TIMES * own))):
            there = replace(problem, dtype=dtype, device=setting.device)
            for name, compiled in ENGINES:
                row = {"what": problem.name, "engine": f"{name}{' + compile' * compiled}", "dtype": str(dtype)[6:]}
                attempt(tell, row, partial(_compare, there, name, compiled, reference, most))
    others: tuple[EngineName, ...] = ("per_task", "vectorized")
    for algorithm, engine in product(_algorithms(small=setting.small), others):
        row = {"what": algorithm, "engine": engine, "dtype": "float64"}
        attempt(tell, row, partial(_compare_algorithm, algorithm, engine, setting.device))


def _problems(setting: Setting) -> list[Problem]:
    points = sinusoid(2, tasks=FEW_TASKS)
    if setting.small:
        return [points]
    paper = omniglot(ways=5, tasks=FEW_TASKS, steps=1)
    group = replace(conv(1, tasks=FEW_TASKS), name="conv4-group", network=lambda: Conv4(normalization="group"))
    return [points, paper, conv(1, tasks=FEW_TASKS), group]


def _gradients(problem: Problem, engine: EngineName, *, compiled: bool = False) -> Gradients:
    measured = our_engine(problem, name=engine, compiled=compiled)
    return _on_cpu(measured.gradients(measured.compute()))


def _on_cpu(gradients: Gradients) -> Gradients:
    return {name: gradient.cpu().double() for name, gradient in gradients.items()}


def _compare(problem: Problem, engine: EngineName, compiled: bool, reference: Gradients, most: float) -> Row:
    try:
        return _verdict(disagreement(_gradients(problem, engine, compiled=compiled), reference), most)
    except (ConfigError, UnavailableError) as reason:
        return {"refused": str(reason)}


def _verdict(error: float, most: float) -> Row:
    row: Row = {"error": f"{error:.0e}"}
    return row if error <= most else row | {"failed": f"the meta-gradient is wrong: allowed is {most:.0e}"}


def _algorithms(*, small: bool) -> list[str]:
    from tests.test_all_algorithms import CASES  # noqa: PLC0415 - pytest is not everywhere

    return ["MetaSGD"] if small else sorted(CASES)


def _compare_algorithm(name: str, engine: EngineName, device: str) -> Row:
    from tests.test_all_algorithms import CASES  # noqa: PLC0415 - as above

    case = CASES[name]
    batch = case.data().sample(worker=0, run=0, iteration=0)

    def gradients(engine: EngineName, device: str) -> Gradients:
        module = case.module().double().to(device)
        tasks = batch.map(lambda tensor: tensor.to(device, torch.float64 if tensor.is_floating_point() else None))
        module.algorithm.begin(0)
        EngineChoice(engine, module.objective).for_training(module.learner, tasks).meta_gradient(module.learner, tasks)
        return _on_cpu({name: p.grad for name, p in module.learner.named_parameters() if p.grad is not None})

    return _verdict(disagreement(gradients(engine, device), gradients("per_task", "cpu")), TOLERANCE)
