"""Two machines: network namespaces joined by a pair of virtual cables, each with its own torchrun."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.trainings import SETTINGS, environment, flags

ADDRESSES = ("10.213.77.1", "10.213.77.2")
CABLE = "dmaml-cable"


def ip(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=False)  # noqa: S607


@pytest.fixture
def machines() -> Iterator[list[str]]:
    """Names of two namespaces that reach each other, and nothing else."""
    names = [f"dmaml-{os.getpid()}-{number}" for number in range(2)]
    if shutil.which("ip") is None:
        pytest.skip("there is no `ip` here, with which to make network namespaces")
    if ip("netns", "add", names[0]).returncode:
        pytest.skip("network namespaces are not permitted here")
    try:
        steps = [
            ("netns", "add", names[1]),
            ("-n", names[0], "link", "add", CABLE, "type", "veth", "peer", "name", CABLE, "netns", names[1]),
        ]
        for name, address in zip(names, ADDRESSES, strict=True):
            steps += [
                ("-n", name, "address", "add", f"{address}/24", "dev", CABLE),
                ("-n", name, "link", "set", CABLE, "up"),
                ("-n", name, "link", "set", "lo", "up"),
            ]
        for step in steps:
            done = ip(*step)
            if done.returncode:
                pytest.skip(f"two machines cannot be joined here: {done.stderr.strip()}")
        yield names
    finally:
        for name in names:
            ip("netns", "delete", name)


def train(machines: list[str], folder: Path, config: str, **settings: Any) -> Iterator[subprocess.Popen[str]]:
    """One torchrun on each machine, told what a PyTorchJob with an elastic policy tells it."""
    shutil.copy(Path(__file__).with_name("probe.py"), folder)
    words = [*flags(SETTINGS | {"meta_test": "false", "data.val_tasks": 2} | settings)]
    for name, address in zip(machines, ADDRESSES, strict=True):
        first = address == ADDRESSES[0]
        told = {
            "PET_RDZV_BACKEND": "c10d",
            "PET_RDZV_ENDPOINT": f"{ADDRESSES[0]}:29400",
            "PET_RDZV_CONF": f"is_host={int(first)}",  # whose name the machines here do not resolve
            "PET_NNODES": "2",
            "PET_NPROC_PER_NODE": "1",
            "PET_LOCAL_ADDR": address,
            "GLOO_SOCKET_IFNAME": CABLE,
            "OMP_NUM_THREADS": "1",
        }
        launcher = ["ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run", "-m", "dmaml_pl"]
        yield subprocess.Popen(
            [*launcher, "fit", "--config", config, *words],
            cwd=folder,
            env=environment() | told,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


def end_all(processes: list[subprocess.Popen[str]]) -> None:
    """Leave nothing behind: a torchrun that is cut off from the other waits for it for minutes."""
    for process in processes:
        if process.poll() is None:
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
            process.kill()
        process.communicate()


@pytest.mark.slow
@pytest.mark.parametrize(("transfer_dtype", "bytes_each"), [("float32", 4), ("bfloat16", 2)])
def test_a_merge_sends_its_payload_once_each_way_and_nothing_crosses_during_a_run(
    machines: list[str], tmp_path: Path, sinusoid: str, transfer_dtype: str, bytes_each: int
) -> None:
    callbacks = [{"class_path": "probe.Traffic", "init_args": {"interface": CABLE}}]
    settings = {
        "trainer.callbacks": json.dumps(callbacks),
        "trainer.strategy.run_length": 20,
        "trainer.max_steps": 80,
        "trainer.val_check_interval": 4,
        "model.network.hidden": "[300,300]",
        "trainer.strategy.transfer_dtype": transfer_dtype,
    }
    weights = 300 + 300 + 300 * 300 + 300 + 300 + 1
    processes = list(train(machines, tmp_path, sinusoid, **settings))
    try:
        for process in processes:
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors
    finally:
        end_all(processes)
    lines = [
        [json.loads(line) for line in (tmp_path / f"traffic-{worker}.jsonl").read_text().splitlines()]
        for worker in (0, 1)
    ]
    for run in range(4):
        during = [[line for line in worker if line["run"] == run and "done" in line] for worker in lines]
        both_began = max(worker[0]["time"] for worker in during)
        one_ended = min(worker[-1]["time"] for worker in during)
        together = [line for line in during[0] if both_began < line["time"] <= one_ended]
        (merged,) = [line for line in lines[0] if line["run"] == run and "payload" in line]
        crossed = together[-1]["bytes"] - together[0]["bytes"]
        assert crossed < 0.02 * merged["payload"], "only torchrun's agents may greet each other"
        sent_and_received = merged["bytes"] - together[-1]["bytes"]
        assert weights * bytes_each <= merged["payload"] < 1.01 * weights * bytes_each
        assert 2 * merged["payload"] <= sent_and_received < 2.1 * merged["payload"]


@pytest.mark.slow
def test_a_machine_that_is_cut_off_ends_the_training_within_the_timeout(
    machines: list[str], tmp_path: Path, sinusoid: str
) -> None:
    cutter = {"worker": 1, "run": 2, "iteration": 4, "interface": CABLE}
    callbacks = [{"class_path": "probe.Cutter", "init_args": cutter}]
    settings = {"trainer.callbacks": json.dumps(callbacks), "trainer.strategy.timeout": 12}
    processes = list(train(machines, tmp_path, sinusoid, **settings))
    try:
        _, errors = processes[0].communicate(timeout=120)
        assert processes[0].returncode == 1
    finally:
        end_all(processes)
    (line,) = [line for line in errors.splitlines() if "dmaml: error" in line]
    assert "worker 0 lost contact with another worker in run 1" in line
    assert "trainer.strategy.timeout (12 s)" in line
