"""Where the processes of a training listen: to this machine only, as long as all workers are on it."""

from __future__ import annotations

import socket
from datetime import timedelta
from typing import Any

import psutil
import pytest
import pytorch_lightning as pl

from dmaml_pl import DMAMLStrategy, TaskParallelStrategy
from dmaml_pl.errors import ConfigError
from dmaml_pl.strategies.loopback import own_store
from tests.recipes import small_data, small_maml, small_trainer
from tests.workers import in_workers


class Listens(pl.Callback):
    """Keeps the addresses that this process listens at, once the workers have merged."""

    def __init__(self) -> None:
        self.addresses: set[str] = set()

    def on_train_batch_end(self, *args: Any) -> None:
        for connection in psutil.Process().net_connections("inet"):
            if connection.status == psutil.CONN_LISTEN:
                self.addresses.add(connection.laddr.ip)


def _listen(strategy: Any) -> set[str]:
    listens = Listens()
    small_trainer(devices=2, strategy=strategy(), callbacks=[listens]).fit(small_maml(), small_data())
    return listens.addresses


@pytest.mark.parametrize("strategy", [DMAMLStrategy, TaskParallelStrategy])
def test_workers_of_one_machine_listen_to_that_machine_only(strategy: Any) -> None:
    first, second = in_workers(_listen, 2, strategy)
    assert first == {"127.0.0.1"}, "worker 0 keeps the key-value store, and exchanges with the other"
    assert second == {"127.0.0.1"}


def test_a_port_in_use_is_named_with_what_sets_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"MASTER_PORT is {port}, which cannot be used here .*: set it"):
            own_store("127.0.0.1", port, 0, timedelta(seconds=1))
