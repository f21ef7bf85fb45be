"""Who has started the workers: torchrun, SLURM, Kubernetes, or nobody yet.

A launcher has decided how many workers there are and on how many machines before this process began, so its numbers
count, not those of the configuration: the same config runs everywhere.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from typing import Any

import torch
from lightning_fabric.plugins.environments import ClusterEnvironment, KubeflowEnvironment, SLURMEnvironment
from lightning_fabric.plugins.environments.slurm import _is_srun_used

from dmaml_pl.errors import ConfigError


@dataclass(frozen=True)
class Launch:
    """What a launcher has started.

    Attributes:
        machines: how many machines take part.
        workers: how many workers there are on each.
        environment: Lightning's view of the launcher; None where Lightning finds it by itself.
    """

    machines: int
    workers: int
    environment: ClusterEnvironment | None = None

    @classmethod
    def detect(cls) -> Launch | None:
        """What has started this process as a worker; None if nothing has.

        Raises:
            ConfigError: the launcher was told too little.
        """
        if torch.distributed.is_available() and torch.distributed.is_torchelastic_launched():
            workers = int(os.environ["LOCAL_WORLD_SIZE"])
            return cls(int(os.environ["WORLD_SIZE"]) // workers, workers)
        if "LOCAL_RANK" in os.environ:  # by our own launcher
            return None
        if _is_srun_used():
            tasks, machines = int(os.environ["SLURM_NTASKS"]), int(os.environ.get("SLURM_NNODES", "1"))
            if tasks > 1 and "SLURM_NTASKS_PER_NODE" not in os.environ:
                raise ConfigError(
                    f"SLURM has started {tasks} tasks without saying how many on each machine: give sbatch "
                    "--ntasks-per-node (workers of a machine), not --ntasks."
                )
            # Lightning's own requeueing would keep a checkpoint in the middle of a run, from within the signal handler.
            return cls(machines, tasks // machines, SLURMEnvironment(auto_requeue=False))
        if {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():  # a PyTorchJob without torchrun
            return cls(int(os.environ["WORLD_SIZE"]), 1, KubeflowEnvironment())
        return None

    def apply(self, trainer: Any) -> None:
        """Let the launcher's numbers stand in the configuration of the Trainer."""
        devices = trainer.get("devices")
        if str(devices).isdecimal() and int(devices) > 1 == self.workers * self.machines:
            print(
                f"trainer.devices is {devices}, but there is 1 worker: this command is the 1 task of a SLURM job or "
                f"the like, and that counts. For {devices} start it by srun --ntasks-per-node {devices}; or unset "
                "SLURM_NTASKS, and dmaml starts them.",
                file=sys.stderr,
                flush=True,
            )
        chosen = devices if isinstance(devices, list) else str(devices).strip(",").split(",")
        if not (isinstance(devices, list) or "," in str(devices)) or len(chosen) != self.workers:
            trainer["devices"] = self.workers
        trainer["num_nodes"] = self.machines
