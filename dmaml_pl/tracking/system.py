"""CPU, memory, disk, network and GPU load beside a run's metrics."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any

PREFIX = "system/"
_STOP_TIMEOUT_S = 5.0


class SystemMetrics:
    """Samples with MLflow's monitor, but hands over what it finds: the monitor's own thread ends if the store is away.

    Args:
        run_id: of the MLflow run.
        tracking_uri: of its store; neither is asked for anything.
        log: takes the metrics of a sample and its number.
        first: number of the first sample; a resumed MLflow run goes on with its numbers.
        interval_s: seconds between two samples, unless MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL says otherwise. 10
            is MLflow's own default: a training of a minute gets six points.
    """

    def __init__(
        self,
        run_id: str,
        tracking_uri: str,
        log: Callable[[Mapping[str, float], int], object],
        first: int,
        interval_s: float = 10.0,
    ) -> None:
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor  # noqa: PLC0415 (slow import)

        logging.getLogger("mlflow.system_metrics").setLevel(logging.CRITICAL)  # it tells that there is no GPU
        self._monitor: Any = SystemMetricsMonitor(
            run_id, sampling_interval=interval_s, resume_logging=False, tracking_uri=tracking_uri
        )
        self._log = log
        self.next_sample = first
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="SystemMetricsMonitor", daemon=True)
        self._thread.start()

    def _sample(self) -> None:
        monitor = self._monitor
        prefix = PREFIX + (f"{monitor.node_id}/" if monitor.node_id else "")
        while True:
            for _ in range(monitor.samples_before_logging):
                monitor.collect_metrics()
                if self._stopping.wait(monitor.sampling_interval):
                    return
            metrics = monitor.aggregate_metrics()
            self._log({prefix + name: value for name, value in metrics.items()}, self.next_sample)
            self.next_sample += 1
            for part in monitor.monitors:
                part.clear_metrics()

    def stop(self) -> None:
        """End the sampling; a sample that takes longer than 5 s is not waited for."""
        self._stopping.set()
        self._thread.join(_STOP_TIMEOUT_S)
