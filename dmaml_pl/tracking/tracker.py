"""The Lightning logger that writes a training into an MLflow run.

Unlike Lightning's own MLFlowLogger it touches no store before it is opened, and never off rank zero; cuts no
parameter; tells a failure from an interruption; continues a run in its place; and lets no failure of the store stop a
training that has begun: what the store does not take is kept on this machine's disk, and sent when it does.
"""

import logging
import sys
import uuid
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.util import register_after_fork
from pathlib import Path
from typing import Any

from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.utilities.rank_zero import rank_zero_only
from torch import Tensor, nn

from dmaml_pl.checks import at_home
from dmaml_pl.errors import TrackingError, redact
from dmaml_pl.tracking import operations
from dmaml_pl.tracking.description import NOTE
from dmaml_pl.tracking.ending import Ending, EndStatus
from dmaml_pl.tracking.mlflow_run import MLflowRun
from dmaml_pl.tracking.outbox import Operation, Outbox, find_outboxes
from dmaml_pl.tracking.params import flatten
from dmaml_pl.tracking.patience import brief_requests
from dmaml_pl.tracking.sender import Sender
from dmaml_pl.tracking.store import SETTING, Store, reason, told_in_one_line
from dmaml_pl.tracking.system import SystemMetrics

_log = logging.getLogger(__name__)
AT_MOST_S = 10.0
"""Seconds that a single file or tag, logged while the store answers, may hold up a training."""
_of_worker_zero: list[Any] = []
"""In a forked worker: what it has inherited, and must neither use nor close."""


class MLflowTracker(Logger):
    """Track a training in MLflow: parameters, metrics, checkpoints, environment, system load and outcome.

    Args:
        experiment_name: MLflow experiment that the MLflow run belongs to; made if it is missing.
        run_name: name of the MLflow run in the UI; by default the experiment and the time.
        tracking_uri: MLflow store: `http://host:port` of a server, or `sqlite:///file`. By default the environment
            variable MLFLOW_TRACKING_URI, or else `{save_dir}/mlflow.db`, as that needs no server.
        save_dir: folder for what is kept on this machine: the store, `artifacts/` and `checkpoints/`.
        run_id: id of an MLflow run to continue instead of starting a new one.
        tags: further tags, to search by.
        system_metrics: whether to sample the load of CPU, memory, disk, network and GPU every 10 seconds.

    Examples:
        >>> tracker = MLflowTracker("sines", tags={"data": "mine"})
    """

    def __init__(
        self,
        experiment_name: str = "dmaml",
        *,
        run_name: str | None = None,
        tracking_uri: str | None = None,
        save_dir: str = "mlruns",
        run_id: str | None = None,
        tags: dict[str, str] | None = None,
        system_metrics: bool = True,
    ) -> None:
        super().__init__()
        if ".." in Path(experiment_name).parts or experiment_name.startswith("/") or "\0" in experiment_name:
            raise TrackingError(
                f"{SETTING}.experiment_name is {experiment_name!r}, but must be a name: checkpoints are kept in a "
                "folder that is called so."
            )
        self._experiment_name = experiment_name
        self._run_name = run_name
        self._tracking_uri = tracking_uri
        self._save_dir = str(at_home(save_dir))
        self._run_id = run_id
        self._tags = dict(tags or {})
        self._system_metrics = system_metrics
        self._run: MLflowRun | None = None
        self._sender: Sender | None = None
        self._ending: Ending | None = None
        self._monitor: SystemMetrics | None = None
        self._configured = self._made = False
        register_after_fork(self, MLflowTracker._leave_to_worker_zero)

    # What and where

    @property
    def name(self) -> str:
        """The experiment's name."""
        return self._experiment_name

    @property
    def version(self) -> str | None:
        """Id of the MLflow run; None before it is opened, and off rank zero."""
        return None if self._run is None else self._run.run_id

    @property
    def save_dir(self) -> str:
        """Folder below which Lightning's ModelCheckpoint makes `name/version/checkpoints`."""
        return str(Path(self._save_dir) / "checkpoints")

    @property
    def experiment(self) -> Any:  # an MlflowClient; its type would make jsonargparse import mlflow in every worker
        """MLflow's client, None off rank zero. Lightning asks for it before it sets up, which opens the MLflow run."""
        self.open()
        return None if self._run is None else self._run.client

    @property
    def visits(self) -> bool:
        """Whether the training of the MLflow run is only evaluated."""
        return self._ending is not None and self._ending.visits

    @property
    def is_running(self) -> bool:
        """Whether the MLflow run has been opened, and its end was not told yet."""
        return self._ending is not None and self._ending.outcome == EndStatus.RUNNING

    @property
    def run_url(self) -> str | None:
        """Path of the MLflow run below the address of the UI; None before it is opened, and off rank zero."""
        return None if self._run is None else f"#/experiments/{self._run.experiment_id}/runs/{self._run.run_id}"

    def ui_command(self) -> str:
        """The command that opens the UI on this MLflow run, or its address on a server that has a UI already."""
        return self._store.ui_command(self._save_dir, self.run_url)

    @property
    def _store(self) -> Store:
        return Store.find(self._tracking_uri, self._save_dir)

    # Beginning

    def _leave_to_worker_zero(self) -> None:
        _of_worker_zero.append((self._run, self._sender, self._ending, self._monitor))
        self._run = self._sender = self._ending = self._monitor = None

    @rank_zero_only
    def open(self, run_id: str | None = None, *, visits: bool = False) -> None:
        """Make or continue the MLflow run, and log this process's environment; does nothing if it is open.

        Args:
            run_id: id of the MLflow run to continue, as when a training is resumed from its checkpoint; by default that
                of the settings.
            visits: whether the training of that MLflow run is only evaluated: its metrics and files come to it, while
                its status, times, parameters, environment and command stay those of the training.

        Raises:
            TrackingError: the store cannot be reached or written, or there is no such MLflow run.
        """
        if self._run is not None:
            return
        store, run_id = self._store, self._run_id or run_id
        find_outboxes(Path(self._save_dir))  # else what waits would do so in memory, without a word
        self._made = run_id is None
        if run_id is None:
            run = self._run = MLflowRun.create(store, self._experiment_name, self._run_name)
        else:
            run = self._run = MLflowRun.resume(store, run_id, visits=visits)
        about = {"run_id": run.run_id, "run_name": run.name, "tracking_uri": redact(store.uri)}
        sender = self._sender = Sender(run, Outbox.claim(Path(self._save_dir), run.run_id, about))
        if sender.outbox.waits:  # what a process left that was killed, or whose store was away until its end
            if not visits:
                sender.put({"do": "restart"})
            sender.wait(AT_MOST_S)
        with self._required("the environment"):
            if not visits:
                run.set_tags(self._tags)
                run.log_environment()
            figures = run.client.get_run(run.run_id).data.metrics
        self._ending = Ending(sender, figures, self._tags.get(NOTE, run.note), self._save_dir)
        self._ending.visits = self._configured = visits
        if self._system_metrics and not visits:
            self._attempt("system metrics", self._start_monitor)

    def _start_monitor(self) -> None:
        self._monitor = SystemMetrics(self.version or "", self._store.uri, self._log_now)
        self._monitor.start()

    def log_graph(self, model: nn.Module, input_array: Tensor | None = None) -> None:
        """Lightning calls this once in every trainer function: one after the first makes the MLflow run go on."""
        ending = self._ending
        if ending is not None and ending.outcome != EndStatus.RUNNING:
            ending.go_on()
            self._send_at_once()
            if self._monitor is not None:
                self._monitor.start()

    @rank_zero_only
    def log_config(self, config: Mapping[str, Any], yaml_text: str) -> None:
        """Log the resolved configuration, as parameters and as the file `config.yaml`.

        In a resumed MLflow run the first values of the parameters stay; changed ones are listed in the tag
        `dmaml.changed_params`, and the new file is `config.resumed-<n>.yaml`.

        Args:
            config: nested configuration.
            yaml_text: the same as a person reads and reuses it.

        Raises:
            TrackingError: the store did not take it; nothing has been trained yet, so it is the time to say so.
        """
        self.open()
        run: Any = self._run  # which is open now
        with self._required("the configuration"):
            run.log_config(flatten(config), redact(yaml_text))
        self._configured = True

    # Lightning's interface

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Log hyperparameters as parameters; those that are there already keep their first value.

        After `log_config` there is nothing to add: the module's hyperparameters are part of the configuration.
        """
        if not self._configured:
            self._put({"do": "log_params", "params": flatten(params)})

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Take metrics of a step (0 if none is given): they are written down, and sent in the background.

        Sending takes half a percent of the time at most, so metrics arrive one by one where a run takes seconds, and in
        bundles where it takes milliseconds. `flush` sends them in any case.
        """
        self._log_now(metrics, step or 0)

    def _log_now(self, metrics: Mapping[str, float], step: int) -> None:
        if self._sender is not None:
            self._sender.put(operations.metrics(metrics, step))
        if self._ending is not None:
            self._ending.figures.update(metrics)

    def flush(self) -> bool:
        """Send now all that waits, and return whether that is done; where the store is away, it goes on waiting."""
        return self._sender is not None and self._sender.wait(patience_s=0)

    def keep(self) -> None:
        """Bring all that was logged to the disk, where a power failure does not reach it; or send it, if that fails.

        A training that is resumed sends what the one before it has left there.
        """
        if self._sender is not None and not self._sender.outbox.keep():
            self.flush()

    def after_save_checkpoint(self, checkpoint_callback: ModelCheckpoint) -> None:
        """Remember who saves checkpoints; the best and the last are uploaded at the end."""
        if self._ending is not None:
            self._ending.watch(checkpoint_callback)

    def finalize(self, status: str) -> None:
        """Send what waits, upload the checkpoints and set the MLflow run's status; never raises.

        Args:
            status: Lightning's word: "success" becomes FINISHED. "failed" becomes KILLED after Ctrl-C or SIGTERM, and
                FAILED, with the tag `dmaml.error`, after any other exception. Others ("finished", before SLURM
                requeues) mean a stop from outside, KILLED. Once FAILED or KILLED, the status stays until the next
                trainer function starts.
        """
        if self._ending is not None:
            if self._monitor is not None:
                self._monitor.stop()
            self._ending.write(status, None if status == "success" else sys.exc_info()[1])

    def was_stopped(self) -> None:
        """Correct what was taken for a failure: the training had been asked to stop, and the others were faster."""
        if self._ending is not None:
            self._ending.correct()

    # Further things to keep

    def log_artifact(self, path: str | Path, folder: str = "") -> None:
        """Keep a file or folder with the MLflow run, in a folder of its artifacts."""
        if self._sender is not None:
            self._sender.put_file(Path(path), folder)
            self._send_at_once()

    def log_text(self, text: str, artifact_file: str) -> None:
        """Keep a text with the MLflow run, as the file `artifact_file` of its artifacts."""
        self._put({"do": "log_text", "text": text, "artifact_file": artifact_file})

    def log_model(self, name: str, save: Callable[[Path, Any], object]) -> str | None:
        """Log a model with the MLflow run, and register it.

        Args:
            name: of the registered model.
            save: writes the model to a folder that is not there yet, with a record of it (MLflow's `Model`).

        Returns:
            The new version; None if there is no MLflow run, off rank zero, or if the store is away: then the model is
            kept with all else that waits.
        """
        run, sender, key = self._run, self._sender, uuid.uuid4().hex
        if run is None or sender is None:
            return None
        from mlflow.models import Model  # noqa: PLC0415 (slow import)

        def put() -> None:
            with brief_requests():  # MLflow tells of each step by which it writes a model
                staged = sender.outbox.make("model", lambda folder: save(folder, Model(run_id=run.run_id)))
            sender.put({"do": "log_model", "staged": staged, "name": name, "key": key})

        self._attempt(f"the model {name}", put)
        sender.wait(patience_s=0)
        return run.model_versions.get(key)

    def log_data(self, name: str, source: str, digest: str, profile: Mapping[str, Any]) -> None:
        """Log what was trained on, as MLflow's data set; the training goes on where the store does not take it.

        Args:
            name: of the data set.
            source: where it is.
            digest: differs where its tasks do.
            profile: its settings, plain values.
        """
        run = self._run
        if run is not None:
            self._attempt("the data set", lambda: run.log_data(name, source, digest, profile))

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags of the MLflow run."""
        self._put({"do": "set_tags", "tags": dict(tags)})

    def _put(self, wanted: Operation) -> None:
        """Log something at once, where the store answers; else it waits, and nobody waits for it."""
        if self._sender is not None:
            self._sender.put(wanted)
            self._send_at_once()

    def _send_at_once(self) -> None:
        sender, ending = self._sender, self._ending
        sent = sender is not None and sender.wait(0, AT_MOST_S)
        if sender is not None and ending is not None and sent and ending.outcome != EndStatus.RUNNING:
            sender.stop()  # the training is over, and nothing may be left behind

    # Failures

    def _attempt(self, what: str, action: Callable[[], object]) -> None:
        """Do what the training can do without, and tell a failure in one line."""
        try:
            action()
        except Exception as error:  # whatever it is, hours of training are worth more
            _log.warning("MLflow did not take %s: %s The training goes on.", what, reason(error))

    @contextmanager
    def _required(self, what: str) -> Iterator[None]:
        """Turn the failure of something that must work before a training begins into a `TrackingError`."""
        store, run, sender = self._store, self._run, self._sender
        assert run is not None and sender is not None  # noqa: S101, PT018 (`open` has made both, or raised)
        try:
            problem = f"The tracking store {store.uri} did not take {what}"
            with told_in_one_line(problem, f"Free or mend it, or set {store.setting} to another one."):
                yield
        except TrackingError:
            self._attempt("the status FAILED", lambda: run.end(EndStatus.FAILED))
            if self._made:  # and nothing has been trained in it
                self._attempt("the end", lambda: run.client.delete_run(run.run_id))
            if self._monitor is not None:
                self._monitor.stop()
            sender.stop()
            self._run = self._sender = self._ending = self._monitor = None
            raise
