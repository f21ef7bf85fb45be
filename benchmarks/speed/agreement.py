"""Whether all peers compute the same meta-gradient, which is asked before anything is timed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from benchmarks.speed.peers import REFERENCE, Peer, UnavailableError
from benchmarks.speed.problems import Problem

TOLERANCE = 1e-9
"""Largest relative error of a tensor, in float64."""

NEGLIGIBLE = 1e-3
"""A tensor's norm counts as this part of the largest at least: before a batch norm a bias has no gradient."""

FEW_TASKS = 3
"""So many tasks tell right from wrong as well as many."""


def disagreement(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """The largest error of a tensor relative to its norm; infinite where other tensors have gradients."""
    if found.keys() != expected.keys():
        return float("inf")
    largest = max(float(gradient.norm()) for gradient in expected.values())
    errors = (
        float((found[name] - gradient).norm()) / max(float(gradient.norm()), NEGLIGIBLE * largest)
        for name, gradient in expected.items()
    )
    return max(errors)


def check(problem: Problem, peers: Sequence[Peer]) -> dict[str, float | str]:
    """Compare everyone's meta-gradient with learn2learn's, in float64, on a few of the problem's tasks.

    Returns:
        Each peer's disagreement, or why it has none.
    """
    small = problem.smaller(FEW_TASKS, torch.float64)
    expected = dict(_gradients(REFERENCE, small))
    verdicts: dict[str, float | str] = {}
    for peer in peers:
        try:
            verdicts[peer.name] = disagreement(_gradients(peer, small), expected)
        except UnavailableError as reason:
            verdicts[peer.name] = str(reason)
    return verdicts


def _gradients(peer: Peer, problem: Problem) -> Mapping[str, Tensor]:
    measured = peer.make(problem)
    return measured.gradients(measured.compute())
