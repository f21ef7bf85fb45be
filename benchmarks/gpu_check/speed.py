"""Meta-gradients beside learn2learn's and `torch.func`'s, what share of the device they use, and what limits them.

All is in float32 with PyTorch's defaults, by which convolutions on GPUs may be in TF32, learn2learn's as ours.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu_check.device import in_precision
from benchmarks.gpu_check.sections import Row, Setting, Tell, attempt
from benchmarks.speed import machine, rl
from benchmarks.speed.agreement import FEW_TASKS, disagreement
from benchmarks.speed.peers import PEERS, REFERENCE, Measured, Peer, UnavailableError, our_engine
from benchmarks.speed.problems import Problem, conv, mini_imagenet, omniglot, sinusoid
from benchmarks.speed.rl_reference import Reference, Settings
from benchmarks.speed.timing import Ratio, in_turn
from data_modules import Navigation2D
from dmaml_pl import Conv4

EAGER = ("learn2learn", "torch.func + vmap", "dmaml_pl, vectorized")
COMPILED = ("learn2learn", "JAX, jit + vmap", "dmaml_pl, auto + compile")
BF16 = "dmaml_pl, auto + compile, bf16"

ROUNDS, SLOT_SECONDS, BUDGET_SECONDS = 9, 0.05, 12.0
WRONG = 0.1
"""Whose meta-gradient is so far from learn2learn's in the same precision is not timed; equality is its own section."""

PROFILED = 5


def eager(setting: Setting, tell: Tell) -> None:
    """Without compilers, which may take all the time there is."""
    rates = _rates(setting, tell)
    for problem in _problems(setting):
        _in_turn(problem, [peer for peer in PEERS if peer.name in EAGER], rates, setting, tell)


def compiled(setting: Setting, tell: Tell) -> None:
    """Those that are compiled, beside learn2learn again; a row as soon as one is there."""
    rates = _rates(setting, lambda row: None)
    bf16 = Peer(BF16, lambda problem: in_precision(_ours(problem), torch.bfloat16, problem.device), ours=True)
    for problem in _problems(setting):
        _in_turn(problem, [*(peer for peer in PEERS if peer.name in COMPILED), bf16], rates, setting, tell)


def _ours(problem: Problem) -> Measured:
    return our_engine(problem, name="auto", compiled=True)


def _problems(setting: Setting) -> list[Problem]:
    if setting.small:
        return [replace(sinusoid(1, tasks=FEW_TASKS), device=setting.device)]
    paper = omniglot(ways=5, tasks=32, steps=1)
    network = partial(Conv4, pooling="stride", normalization="batch_shift", initialization="maml")  # as configs/paper
    problems = [sinusoid(1), replace(paper, network=network), conv(1), mini_imagenet(), sinusoid(5), conv(5)]
    return [replace(problem, device=setting.device) for problem in problems]


def _rates(setting: Setting, tell: Tell) -> dict[str, float]:
    """Operations a second of products of large matrices, by precision."""
    rates: dict[str, float] = {}
    kinds = {"float32": (torch.float32, False), "TF32": (torch.float32, True), "bf16": (torch.bfloat16, False)}
    for name, (dtype, tf32) in kinds.items():
        if setting.device == "cpu" and name != "float32":
            continue
        torch.backends.cuda.matmul.allow_tf32 = tf32
        compute, operations = machine.peak(setting.device, dtype)
        compute()
        times = in_turn({name: compute}, rounds=3, slot=0.0 if setting.small else 0.1, budget=2.0)
        rates[name] = operations / min(times[name].seconds)
        tell({"what": f"products of large matrices, {name}", "TFLOP/s": f"{rates[name] / 1e12:.3g}"})
    torch.backends.cuda.matmul.allow_tf32 = False
    return rates


def _in_turn(problem: Problem, peers: Sequence[Peer], rates: dict[str, float], setting: Setting, tell: Tell) -> None:
    """Times of peers on a problem, the reference first; then where the time of the last goes."""
    calls: dict[str, Callable[[], object]] = {}
    expected: dict[str, torch.Tensor] = {}
    work = 0.0
    for peer in peers:

        def prepare(peer: Peer = peer) -> Row:
            nonlocal work
            began = time.perf_counter()
            try:
                measured = peer.make(problem)
                found = dict(measured.gradients(measured.compute()))
            except UnavailableError as reason:
                return {"refused": str(reason)}
            row: Row = {"first call, s": f"{time.perf_counter() - began:.1f}"}
            if peer is REFERENCE:
                expected.update(found)
                work = machine.operations(measured.compute)
            error = disagreement(found, expected)
            if peer.name != BF16 and not error <= WRONG:
                return row | {"error": f"{error:.0e}", "failed": "the meta-gradient is wrong, so it is not timed"}
            calls[peer.name] = measured.compute
            times = in_turn(
                {name: calls[name] for name in dict.fromkeys((REFERENCE.name, peer.name))},
                rounds=2 if setting.small else ROUNDS,
                slot=0.0 if setting.small else SLOT_SECONDS,
                budget=min(BUDGET_SECONDS, setting.left / 4),
            )
            own, ratio = times[peer.name], Ratio.between(times[REFERENCE.name], times[peer.name])
            row |= {"ms": f"{1000 * own.median:.3g}", "times as fast": f"{ratio.median:.2f}", "error": f"{error:.0e}"}
            row["range"] = f"{ratio.lowest:.2f} to {ratio.highest:.2f}"
            row |= {f"% of {name}": f"{100 * work / own.median / rate:.2g}" for name, rate in rates.items()}
            return row | (limits(measured.compute, own.median, setting) if peer.ours or peer is REFERENCE else {})

        attempt(tell, {"what": problem.name, "peer": peer.name}, prepare)


def limits(compute: Callable[[], object], seconds: float, setting: Setting) -> Row:
    """What limits a computation: the share of time in which the device works, its calls, and the largest of them.

    Args:
        compute: what is looked at.
        seconds: that it takes while nobody looks; the profiler makes it longer, but not the kernels.
        setting: of the section.
    """
    on_gpu = setting.device == "cuda"
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=kinds, acc_events=True) as seen:
        for _ in range(PROFILED):
            compute()
    spans: list[tuple[float, float, str]] = []
    if on_gpu:
        kernels = [e for e in seen.events() or () if e.device_type == DeviceType.CUDA]
        spans = [(e.time_range.start, e.time_range.end, e.name) for e in kernels if not e.is_user_annotation]
    else:
        spans = [(0.0, e.self_cpu_time_total, e.key) for e in seen.key_averages()]
    by_name: dict[str, float] = {}
    for start, end, name in spans:
        by_name[name] = by_name.get(name, 0.0) + end - start
    total = max(sum(by_name.values()), 1e-9)
    largest = sorted(by_name.items(), key=lambda item: -item[1])[:3]
    row: Row = {"largest": "; ".join(f"{100 * spent / total:.0f} % {name[:50]}" for name, spent in largest)}
    if on_gpu:
        busy = min(1.0, total / PROFILED / (1e6 * seconds))
        row |= {"busy %": f"{100 * busy:.0f}", "kernels": len(spans) // PROFILED}
        row["limit"] = "launches: the GPU waits" if busy < 0.5 else "kernels"
    return row


def navigation(setting: Setting, tell: Tell) -> None:
    """Meta-iterations on 2D navigation, on the device and on the CPU, beside learn2learn's, which is on the CPU."""
    tasks, rollouts, horizon = (2, 2, 5) if setting.small else (rl.TASKS, rl.ROLLOUTS, rl.HORIZON)
    hidden = (8,) if setting.small else rl.HIDDEN
    rounds = 1 if setting.small else 5
    spent: dict[str, float] = {}

    def theirs() -> Row:
        try:
            reference = Reference(Settings(rollouts, horizon, 2 if setting.small else rl.PROCESSES, hidden))
        except UnavailableError as reason:
            return {"refused": str(reason)}
        reference.step(reference.sample(1))
        began = time.perf_counter()
        for _ in range(rounds):
            reference.step(reference.sample(1))
        spent["learn2learn"] = tasks * (time.perf_counter() - began) / rounds
        reference.close()
        return {"ms": f"{1000 * spent['learn2learn']:.3g}"}

    def ours(device: str) -> Row:
        data = Navigation2D(rollouts=rollouts, horizon=horizon, meta_batch=tasks, seed=0)
        own = rl.Ours(data, (2, 2), hidden=hidden)
        own.module.to(device)
        own.step(own.sample(0).to(torch.device(device)))
        sampling, whole = 0.0, time.perf_counter()
        for number in range(1, rounds + 1):
            began = time.perf_counter()
            batch = own.sample(number).to(torch.device(device))
            setting.wait()
            sampling += time.perf_counter() - began
            own.step(batch)
            setting.wait()
        seconds = (time.perf_counter() - whole) / rounds
        row: Row = {"ms": f"{1000 * seconds:.3g}", "of them sampling": f"{1000 * sampling / rounds:.3g}"}
        return row | ({"times as fast": f"{spent['learn2learn'] / seconds:.1f}"} if spent else {})

    what = f"2D navigation, {tasks} tasks"
    attempt(tell, {"what": what, "peer": f"learn2learn on the CPU, 1 task, times {tasks}"}, theirs)
    for device in dict.fromkeys(("cpu", setting.device)):
        attempt(tell, {"what": what, "peer": f"dmaml_pl on {device}"}, partial(ours, device))
