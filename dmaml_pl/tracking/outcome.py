"""How a training ended, in MLflow's words."""

from __future__ import annotations

from enum import StrEnum

from pytorch_lightning.utilities.exceptions import SIGTERMException


class Outcome(StrEnum):
    """Status of an MLflow run; the values are MLflow's."""

    RUNNING = "RUNNING"
    FINISHED = "FINISHED"
    FAILED = "FAILED"
    KILLED = "KILLED"

    @classmethod
    def of(cls, status: str, error: BaseException | None) -> Outcome:
        """Translate what Lightning tells a logger.

        Args:
            status: "success"; "failed" for any exception, Ctrl-C and SIGTERM too; "finished" before SLURM requeues.
            error: the exception that is being handled, which tells these apart.
        """
        if status == "success":
            return cls.FINISHED
        if status == "failed" and not isinstance(error, KeyboardInterrupt | SIGTERMException):
            return cls.FAILED
        return cls.KILLED
