"""CPU, memory, disk, network and GPU load beside a run's metrics."""

import logging
import threading
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

from dmaml_pl.tracking.patience import brief_requests


class SystemMetrics:
    """Samples with MLflow's monitor, but hands over what it finds: the monitor's own thread ends if the store is away.

    There is a sample every 10 s, unless MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL says otherwise; `log` takes its metrics
    and its number. In an MLflow run that has samples already their numbers go on.
    """

    def __init__(self, run_id: str, tracking_uri: str, log: Callable[[Mapping[str, float], int], object]) -> None:
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor  # noqa: PLC0415 (slow import)

        logging.getLogger("mlflow.system_metrics").setLevel(logging.CRITICAL)  # it tells that there is no GPU
        with brief_requests():
            self._monitor: Any = SystemMetricsMonitor(run_id, resume_logging=True, tracking_uri=tracking_uri)
        self._monitor.mlflow_logger = SimpleNamespace(record_metrics=log)  # type: ignore[assignment]  # all it is asked for

    def start(self) -> None:
        """Begin to sample."""
        self._stopping = threading.Event()
        self._thread = threading.Thread(
            target=self._sample, args=(self._stopping,), name="SystemMetricsMonitor", daemon=True
        )
        self._thread.start()

    def _sample(self, stopping: threading.Event) -> None:
        while not stopping.is_set():
            for _ in range(self._monitor.samples_before_logging):
                self._monitor.collect_metrics()
                if stopping.wait(self._monitor.sampling_interval):  # a short training has one sample, too
                    break
            self._monitor.publish_metrics(self._monitor.aggregate_metrics())

    def stop(self) -> None:
        """End the sampling; a sample that takes longer than 5 s is not waited for."""
        self._stopping.set()
        self._thread.join(5.0)
