"""How long an all-reduce takes on networks of one latency and rate or another, beside what the time model says.

    python benchmarks/merge_time.py --workers 2 4 --networks 5,100 30,10 --kilobytes 8 400

Each worker is in a network namespace of its own (as root, on Linux). What joins them is a switch in this script, which
hands every frame on after the latency, and each worker's frames one after another at its rate: no kernel module is
needed. Of many repeats the quickest counts, as what else this machine does delays the switch.
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import heapq
import multiprocessing
import os
import select
import struct
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from dmaml_pl.simulation.time_model import Network

TUNSETIFF, IFF_TAP, IFF_NO_PI, CLONE_NEWNET = 0x400454CA, 0x0002, 0x1000, 0x40000000
REPEATS = 30
FORK = multiprocessing.get_context("fork")


def ip(*words: str, check: bool = True) -> None:
    """Run `ip`."""
    subprocess.run(["ip", *words], check=check)  # noqa: S603, S607 - the system's own


@contextmanager
def joined(workers: int, network: Network) -> Iterator[list[str]]:
    """Names of so many namespaces, joined by a switch."""
    names, ports = [f"merge-{os.getpid()}-{worker}" for worker in range(workers)], []
    try:
        for worker, name in enumerate(names):
            ip("netns", "add", name)
            device = f"mt{os.getpid() % 10000}-{worker}"
            ports.append(os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK))
            fcntl.ioctl(ports[-1], TUNSETIFF, struct.pack("16sH", device.encode(), IFF_TAP | IFF_NO_PI))
            ip("link", "set", device, "netns", name)
            ip("-n", name, "link", "set", device, "name", "cable")
            ip("-n", name, "address", "add", f"10.213.78.{worker + 1}/24", "dev", "cable")
            ip("-n", name, "link", "set", "cable", "up")
            ip("-n", name, "link", "set", "lo", "up")
        switch = FORK.Process(target=hand_on, args=(ports, network), daemon=True)
        switch.start()
        yield names
        switch.terminate()
        switch.join()
    finally:
        for port in ports:
            os.close(port)
        for name in names:
            ip("netns", "delete", name, check=False)


def hand_on(ports: list[int], network: Network) -> None:
    """Be the switch."""
    under_way: list[tuple[float, int, int, bytes]] = []
    homes: dict[bytes, int] = {}
    sent_until, number = dict.fromkeys(ports, 0.0), 0
    while True:
        wait = max(under_way[0][0] - time.monotonic(), 0.0) if under_way else None
        for port in select.select(ports, [], [], wait)[0]:
            frame = os.read(port, 65536)
            homes[frame[6:12]] = port
            sent_until[port] = max(sent_until[port], time.monotonic()) + len(frame) / network.bandwidth
            to = homes.get(frame[:6])
            for other in [to] if to is not None else [each for each in ports if each != port]:
                number += 1
                heapq.heappush(under_way, (sent_until[port] + network.latency, number, other, frame))
        while under_way and under_way[0][0] <= time.monotonic():
            _, _, port, frame = heapq.heappop(under_way)
            os.write(port, frame)


def reduce(name: str, worker: int, workers: int, sizes: list[int], answers: Any) -> None:
    """Be a worker: all-reduce so many bytes, some times; worker 0 answers with the least seconds of each size."""
    with open(f"/run/netns/{name}") as handle:  # noqa: PTH123 - its descriptor is what is wanted
        ctypes.CDLL(None).setns(handle.fileno(), CLONE_NEWNET)
    os.environ["GLOO_SOCKET_IFNAME"] = "cable"
    dist.init_process_group("gloo", init_method="tcp://10.213.78.1:29577", rank=worker, world_size=workers)
    found = []
    for size in sizes:
        payload, taken = torch.zeros(size // 4), []
        for _ in range(REPEATS):
            dist.barrier()
            began = time.perf_counter()
            dist.all_reduce(payload)
            taken.append(time.perf_counter() - began)
        found.append(min(taken))
    if worker == 0:
        answers.put(found)
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--workers", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--networks", nargs="+", default=["5,100", "30,10"], help="MS,MBIT_PER_S")
    parser.add_argument("--kilobytes", type=int, nargs="+", default=[8, 400])
    given = parser.parse_args()
    torch.set_num_threads(1)
    sizes = [size * 1000 for size in given.kilobytes]
    print("| network | workers | kB | measured s | predicted s | ratio |\n|---|---:|---:|---:|---:|---:|")
    for network in map(Network.read, given.networks):
        for workers in given.workers:
            with joined(workers, network) as names:
                answers = FORK.Queue()
                processes = [
                    FORK.Process(target=reduce, args=(name, worker, workers, sizes, answers))
                    for worker, name in enumerate(names)
                ]
                for process in processes:
                    process.start()
                found = answers.get(timeout=300)
                for process in processes:
                    process.join()
            for size, seconds in zip(sizes, found, strict=True):
                said = network.all_reduce(workers, size)
                ratio = seconds / said
                print(
                    f"| {network.name} | {workers} | {size // 1000} | {seconds:.4f} | {said:.4f} | {ratio:.2f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
