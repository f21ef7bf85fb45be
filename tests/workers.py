"""Real worker processes for tests, forked from this one so that they need not import PyTorch again."""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import select
import socket
import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch

from dmaml_pl import _learn2learn


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def ends(pid: int, within_s: float) -> bool:
    """Whether a process, which need be no child of this one, ends within some seconds."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    with os.fdopen(handle) as ended:
        return bool(select.select([ended], [], [], within_s)[0])


def in_workers(function: Callable[..., Any], workers: int, *args: Any, timeout: float = 150.0) -> list[Any]:
    """Call `function(*args)` in `workers` processes that see the environment torchrun gives; returns their results."""
    threads = torch.get_num_threads()
    assert threads == 1, f"a test before this one has left {threads} threads, which forked workers would wait for"
    context = multiprocessing.get_context("fork")
    port = free_port()
    pipes = [context.Pipe(duplex=False) for _ in range(workers)]
    processes = [
        context.Process(target=_work, args=(function, args, rank, workers, port, pipes[rank][1]))
        for rank in range(workers)
    ]
    for process in processes:
        process.start()
    results = []
    for rank, (receiver, sender) in enumerate(pipes):
        sender.close()
        if not receiver.poll(timeout):
            for process in processes:
                process.kill()
            raise TimeoutError(f"worker {rank} gave no result in {timeout} s")
        try:
            results.append(pickle.loads(receiver.recv_bytes()))  # noqa: S301 - from our own child
        except EOFError:
            results.append(None)
    for process in processes:
        process.join(timeout)
    if any(isinstance(result, _Failure) and _learn2learn.MISSING in result.text for result in results):
        pytest.skip(_learn2learn.MISSING)
    failures = [f"worker {rank}: {result.text}" for rank, result in enumerate(results) if isinstance(result, _Failure)]
    assert not failures, "\n".join(failures)
    return results


class _Failure:
    def __init__(self, text: str) -> None:
        self.text = text


def _work(function: Callable[..., Any], args: tuple[Any, ...], rank: int, workers: int, port: int, pipe: Any) -> None:
    gc.freeze()  # else collections go through all that the tests have loaded, and copy its pages
    os.environ.update(
        {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(workers),
            "LOCAL_WORLD_SIZE": str(workers),
            "GROUP_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "TORCHELASTIC_RUN_ID": "test",
        }
    )
    try:
        result = function(*args)
    except BaseException:
        result = _Failure(traceback.format_exc())
    pipe.send_bytes(pickle.dumps(result))  # multiprocessing's own way would leave tensors in the child
    pipe.close()
