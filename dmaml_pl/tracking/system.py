"""CPU, memory, disk, network and GPU load beside a run's metrics."""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

_THREAD = "SystemMetricsMonitor"  # the name that MLflow gives it
_STOP_TIMEOUT_S = 5.0


class SystemMetrics:
    """MLflow's own monitor, kept quiet and kept from holding up the end of a training.

    Args:
        run_id: MLflow run to log to.
        tracking_uri: its store.
        interval_s: seconds between two samples, unless MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL says otherwise. 5
            gives a training of a minute ten points; a sample costs about 20 ms of one core.
    """

    def __init__(self, run_id: str, tracking_uri: str, interval_s: float = 5.0) -> None:
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor  # noqa: PLC0415 (slow import)

        # It tells when it starts and stops, that there is no GPU, and of every store that does not answer.
        logging.getLogger("mlflow.system_metrics").setLevel(logging.CRITICAL)
        logging.getLogger("urllib3.connectionpool").addFilter(_not_from_the_monitor)
        self._monitor: SystemMetricsMonitor = SystemMetricsMonitor(
            run_id, sampling_interval=interval_s, resume_logging=True, tracking_uri=tracking_uri
        )
        self._monitor.start()

    def stop(self) -> None:
        """End the sampling; after 5 s without it, as when the server has gone, its daemon thread is left behind."""
        stopping = threading.Thread(target=self._monitor.finish, daemon=True)
        stopping.start()
        stopping.join(_STOP_TIMEOUT_S)


def _not_from_the_monitor(record: logging.LogRecord) -> bool:
    return record.threadName != _THREAD
