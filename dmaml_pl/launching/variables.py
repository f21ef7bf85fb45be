"""The variables by which launchers tell a process which worker it is, read before anything leans on them."""

import os
import socket
from collections.abc import Mapping

from dmaml_pl.errors import ConfigError

COUNTS = ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "SLURM_NTASKS", "SLURM_NNODES")
NUMBERS = (
    "RANK",
    "LOCAL_RANK",
    "GROUP_RANK",
    "NODE_RANK",
    "SLURM_PROCID",
    "SLURM_LOCALID",
    "SLURM_NODEID",
    "SLURM_JOB_ID",
)
MOST_WORKERS = 100_000
"""Workers; more are none that somebody has started."""

PORT = "MASTER_PORT"
INTERFACES = "GLOO_SOCKET_IFNAME"
BELOW = (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS"))
"""Which number must be less than which count."""

TOGETHER = {
    "TORCHELASTIC_RUN_ID": ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", PORT),
    "RANK": ("WORLD_SIZE", "MASTER_ADDR", PORT),
    "LOCAL_RANK": ("WORLD_SIZE",),
    "LOCAL_WORLD_SIZE": ("RANK", "LOCAL_RANK", "WORLD_SIZE"),
    "SLURM_NTASKS": ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID"),
}
"""What launchers set together: torchrun, Kubernetes' PyTorchJob, srun."""

MPI = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
"""How many processes mpirun and its like have started, which do not tell them where to meet."""

SHELLS = ("bash", "interactive")
"""Names of SLURM's jobs in which a person types, so that nothing has been started by srun yet."""

MEMORY = "DMAML_MEMORY"
"""The file of the store that `supervisor.py` keeps for workers that come and go."""

WAY_OUT = "It is for whoever starts the workers (torchrun, srun, Kubernetes): unset it to let dmaml start them."


def check_variables(environment: Mapping[str, str] = os.environ) -> None:
    """Check that the variables of launchers are numbers, in their range, and all there.

    Raises:
        ConfigError: names the variable, and what it may be.
    """
    least = dict.fromkeys(COUNTS, 1) | dict.fromkeys(NUMBERS, 0) | {PORT: 1}
    values = {name: _number(name, environment[name], least[name]) for name in least if name in environment}
    for name in COUNTS:
        if values.get(name, 1) > MOST_WORKERS:
            raise ConfigError(f"{name} is {values[name]}, but must be at most {MOST_WORKERS:,}. {WAY_OUT}")
    if values.get(PORT, 1) > 65535:
        raise ConfigError(f"{PORT} is {values[PORT]}, but must be from 1 to 65535. {WAY_OUT}")
    for number, count in BELOW:
        if number in values and count in values and values[number] >= values[count]:
            raise ConfigError(
                f"{number} is {values[number]}, but must be less than {count}, which is {values[count]}. {WAY_OUT}"
            )
    there = [name for _, name in socket.if_nameindex()]
    for name in filter(None, environment.get(INTERFACES, "").split(",")):
        if name not in there:
            raise ConfigError(f"{INTERFACES} has {name!r}, but must be one of {', '.join(there)}, or unset it.")
    _check_together(environment, values)


def _check_together(environment: Mapping[str, str], values: Mapping[str, int]) -> None:
    """Check that what one launcher sets is there as a whole, and that it is one that tells its workers enough."""
    if {"RANK", "LOCAL_RANK"} <= environment.keys() and "TORCHELASTIC_RUN_ID" not in environment:
        raise ConfigError(f"RANK and LOCAL_RANK are set, but not as torchrun does: TORCHELASTIC_RUN_ID, too. {WAY_OUT}")
    if values.get("WORLD_SIZE", 1) > 1 and not {"RANK", "LOCAL_RANK"} & environment.keys():
        raise ConfigError(f"WORLD_SIZE is set, but not RANK. {WAY_OUT}")
    for name in MPI:
        if environment.get(name, "1") != "1" and not {"TORCHELASTIC_RUN_ID", "SLURM_PROCID"} & environment.keys():
            raise ConfigError(
                f"{name} is {environment[name]!r}, but must be 1: of processes that mpirun has started each would "
                "train alone. Start dmaml once, with trainer.devices, or by torchrun or srun; or unset it."
            )
    for mark, others in TOGETHER.items():
        missing = [name for name in others if name not in environment]
        typed = mark == "SLURM_NTASKS" and environment.get("SLURM_JOB_NAME") in SHELLS
        # Workers that come and go have no fixed number, and a training in this process leaves the first rank behind.
        alone = mark == "LOCAL_RANK" and (MEMORY in environment or values.get(mark) == 0)
        if mark in environment and missing and not typed and not alone:
            raise ConfigError(f"{mark} is set, but not {' and '.join(missing)}. {WAY_OUT}")


def _number(name: str, text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise ConfigError(f"{name} is {text!r}, but must be a whole number of at least {least}. {WAY_OUT}")
    return value
