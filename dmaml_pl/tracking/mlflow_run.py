"""One MLflow run that is being written: made or continued, filled, ended. Rank zero only; every failure is raised."""

from __future__ import annotations

import contextlib
import json
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dmaml_pl.errors import TrackingError
from dmaml_pl.provenance.environment import environment, environment_tags
from dmaml_pl.tracking.params import clean_name
from dmaml_pl.tracking.patience import UPLOAD_TIMEOUT_S, brief_requests
from dmaml_pl.tracking.store import SETTING, Store, told_in_one_line
from dmaml_pl.tracking.views import add_views

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel, Run

CHANGED_PARAMS = "dmaml.changed_params"
ERROR = "dmaml.error"
RESUMED = "dmaml.resumed"
CONTEXT = "mlflow.data.context"
COMMAND, COMMIT = "dmaml.first_command", "dmaml.first_git_commit"
"""What started the training; `dmaml.command` and `dmaml.git_commit` tell what resumed it last."""

_MODEL_KEY = "dmaml.model_key"


class MLflowRun:
    """A client on one MLflow run, which so many processes have `resumed`; 0 for the process that made it.

    Attributes:
        model_versions: those of models that were registered here, by their key.
        changed: settings that a resumed training has in place of its first ones, which MLflow keeps as the parameters.
    """

    def __init__(self, client: MlflowClient, run: Run, resumed: int) -> None:
        self.client = client
        self.run_id: str = run.info.run_id
        self.experiment_id: str = run.info.experiment_id
        self.name: str = run.info.run_name
        self.note: str | None = run.data.tags.get("mlflow.note.content")
        self.status: str = run.info.status
        self.resumed = resumed
        self.started_by = {name: run.data.tags[name] for name in (COMMAND, COMMIT) if name in run.data.tags}
        self.model_versions: dict[str, str] = {}
        self.changed: dict[str, str] = json.loads(run.data.tags.get(CHANGED_PARAMS, "{}"))

    @classmethod
    def create(cls, store: Store, experiment_name: str, run_name: str | None) -> MLflowRun:
        """Make an MLflow run, and its experiment and store where they are missing.

        Raises:
            TrackingError: names the setting to change.
        """
        problem = f"No MLflow run can be made in experiment {experiment_name!r} of {store.uri}"
        remedy = f"Set {SETTING}.experiment_name to another name, or {store.setting} to another store."
        client = store.connect()
        # The name sorts by time; MLflow's own comes from Python's global generator, and repeats with the seed.
        name = run_name or f"{experiment_name} {datetime.now().astimezone():%Y-%m-%d %H:%M:%S}"
        with told_in_one_line(problem, remedy):
            run = client.create_run(_experiment_id(client, store, experiment_name), run_name=name)
        return cls(client, run, resumed=0)

    @classmethod
    def resume(cls, store: Store, run_id: str, *, visits: bool = False) -> MLflowRun:
        """Continue an MLflow run: it is RUNNING again; or visit it, which leaves its status and its tags alone.

        Raises:
            TrackingError: there is none with this id, or it was deleted.
        """
        problem = f"There is no MLflow run {run_id!r} to continue in {store.uri}"
        remedy = f"Set {SETTING}.run_id to an id that the UI shows, or {store.setting} to the store of that training."
        client = store.connect()
        with told_in_one_line(problem, remedy):
            run = client.get_run(run_id)
            if run.info.lifecycle_stage == "deleted":
                raise TrackingError(
                    f"MLflow run {run_id} was deleted. Bring it back with `mlflow runs restore --run-id {run_id}`, or "
                    f"unset {SETTING}.run_id to start a new one."
                )
            tracked = cls(client, run, int(run.data.tags.get(RESUMED, "0")) + (not visits))
            if not visits:
                tracked.restart()
                client.set_tag(run_id, RESUMED, str(tracked.resumed))
        return tracked

    def log_metrics(self, rows: Sequence[Sequence[Any]]) -> None:
        """Log values of metrics, each as name, value, milliseconds since 1970 and step; 1000 go in one request."""
        from mlflow.entities import Metric  # noqa: PLC0415 (slow import)

        with brief_requests():
            self.client.log_batch(self.run_id, metrics=[Metric(*row) for row in rows], synchronous=True)

    def log_params(self, params: Mapping[str, str]) -> bool:
        """Log parameters, and return whether any was new or had another value before.

        MLflow keeps the first value of each for ever; the tag `dmaml.changed_params` has new ones.
        """
        from mlflow.entities import Param  # noqa: PLC0415 (slow import)

        with brief_requests():
            data = self.client.get_run(self.run_id).data
            new = [Param(key, value) for key, value in params.items() if key not in data.params]
            self.client.log_batch(self.run_id, params=new, synchronous=True)
            changed = {key: value for key, value in params.items() if data.params.get(key, value) != value}
            self.changed = {key: value for key, value in self.changed.items() if key not in params} | changed
            if self.changed:
                self.set_tags({CHANGED_PARAMS: json.dumps({key: value[:200] for key, value in self.changed.items()})})
            elif CHANGED_PARAMS in data.tags:
                self.client.delete_tag(self.run_id, CHANGED_PARAMS)
            return bool(new or changed)

    def log_config(self, params: Mapping[str, str], yaml_text: str) -> None:
        """Log the configuration as parameters and as `config.yaml`; a changed one as `config.resumed-<n>.yaml`."""
        differs = self.log_params(params)
        with brief_requests():
            known = any(file.path == "config.yaml" for file in self.client.list_artifacts(self.run_id))
        if not known:
            self.log_text(yaml_text, "config.yaml")
        elif differs:
            self.log_text(yaml_text, f"config.resumed-{max(self.resumed, 1)}.yaml")

    def log_environment(self) -> None:
        """Log versions, machine, command and commit of this process: a file for each process, tags for the latest."""
        facts = environment()
        name = f"environment.resumed-{self.resumed}.json" if self.resumed else "environment.json"
        self.started_by = {COMMAND: facts["command"], COMMIT: facts["git_commit"]} | self.started_by
        self.set_tags(environment_tags(facts) | self.started_by)
        self.log_text(json.dumps(facts, indent=2) + "\n", name)

    def log_data(self, name: str, source: str, digest: str, profile: Mapping[str, Any]) -> None:
        """Log what was trained on, as MLflow's data set."""
        from mlflow.entities import Dataset, DatasetInput, InputTag  # noqa: PLC0415 (slow import)

        made = Dataset(name, digest, "local", json.dumps({"uri": source}), profile=json.dumps(profile))
        with brief_requests():
            self.client.log_inputs(self.run_id, datasets=[DatasetInput(made, [InputTag(CONTEXT, "training")])])

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags; MLflow cuts a text longer than 8000 characters."""
        from mlflow.entities import RunTag  # noqa: PLC0415 (slow import)

        entries = [RunTag(clean_name(key), str(value)) for key, value in tags.items()]
        with brief_requests():
            self.client.log_batch(self.run_id, tags=entries, synchronous=True)

    def log_text(self, text: str, artifact_file: str) -> None:
        """Log a text as the file `artifact_file`."""
        with brief_requests(UPLOAD_TIMEOUT_S):
            self.client.log_text(self.run_id, text, artifact_file)
            folder, _, name = artifact_file.rpartition("/")
            self._check_arrived(folder, {name: len(text.encode())})

    def log_file(self, path: Path, folder: str = "", name: str | None = None) -> None:
        """Log a file or folder, under another name if one is given."""
        with brief_requests(UPLOAD_TIMEOUT_S), tempfile.TemporaryDirectory() as links:
            if name is not None:  # MLflow takes the name from the path, so it gets a link of that name
                link = Path(links) / name
                link.symlink_to(path.absolute())
                path = link
            self.client.log_artifact(self.run_id, str(path), folder or None)
            self._check_all_arrived(path, folder)

    def _check_all_arrived(self, path: Path, folder: str) -> None:
        here = [path] if path.is_file() else list(path.iterdir())
        inside = folder if path.is_file() else f"{folder}/{path.name}".lstrip("/")
        self._check_arrived(inside, {each.name: each.stat().st_size for each in here if each.is_file()})
        for each in here:
            if each.is_dir():
                self._check_all_arrived(each, inside)

    def _check_arrived(self, folder: str, sizes: Mapping[str, int]) -> None:
        """Check that the store has files of a folder: what stands before a server may say yes to any upload.

        Raises:
            TrackingError: it does not tell of them, or of another size.
        """
        listed = self.client.list_artifacts(self.run_id, folder or None) if sizes else []
        found = {each.path.rpartition("/")[2]: each.file_size for each in listed}
        for name, size in sizes.items():
            if name not in found or found[name] not in (None, size):
                raise TrackingError(
                    f"The store has taken the file {name}, but does not have it: is it an MLflow server that answers?"
                )

    def log_model(self, path: Path, name: str, key: str) -> None:
        """Log the model that MLflow saved at `path`, and register it as a new version of the registered model `name`.

        The `key` names this model for ever: what was done of it before is not done again.
        """
        with brief_requests(UPLOAD_TIMEOUT_S):
            client = self.client
            logged = self._model_of(key) or self._upload_model(path, name, key)
            with _may_exist():
                client.create_registered_model(name)
            versions = client.search_model_versions(f"name = '{name}'")
            version = next((version for version in versions if version.tags.get(_MODEL_KEY) == key), None)
            if version is None:
                version = client.create_model_version(
                    name,
                    logged.artifact_location,  # "models:/..." would be looked for in MLflow's global store
                    run_id=self.run_id,
                    tags={_MODEL_KEY: key},
                    model_id=logged.model_id,
                    await_creation_for=0,
                )
            link = json.dumps([{"name": name, "version": str(version.version)}])
            client.set_logged_model_tags(logged.model_id, {"mlflow.modelVersions": link})  # by which the UI leads there
            self.model_versions[key] = str(version.version)

    def _model_of(self, key: str) -> LoggedModel | None:
        """The model that was logged whole by this key; what is left of attempts that failed is removed."""
        found = self.client.search_logged_models([self.experiment_id], f"tags.`{_MODEL_KEY}` = '{key}'")
        for model in found:
            if model.status != "READY":
                self.client.delete_logged_model(model.model_id)
        return next((model for model in found if model.status == "READY"), None)

    def _upload_model(self, folder: Path, name: str, key: str) -> LoggedModel:
        from mlflow.entities import LoggedModelOutput  # noqa: PLC0415 (slow import)
        from mlflow.models import Model  # noqa: PLC0415 (slow import)

        client = self.client
        logged = client.create_logged_model(
            self.experiment_id, name=name, source_run_id=self.run_id, tags={_MODEL_KEY: key}
        )
        try:
            record = Model.load(str(folder))
            record.artifact_path, record.run_id = logged.artifact_location, self.run_id
            record.model_uuid = record.model_id = logged.model_id
            record.save(str(folder / "MLmodel"))
            client.log_model_artifacts(logged.model_id, str(folder))
            client.log_outputs(self.run_id, [LoggedModelOutput(logged.model_id, step=0)])
        except BaseException:
            client.finalize_logged_model(logged.model_id, "FAILED")
            raise
        client.finalize_logged_model(logged.model_id, "READY")
        return logged

    def restart(self) -> None:
        """Set the status to RUNNING again, and take away the error of a failure before."""
        with brief_requests():
            self.client.update_run(self.run_id, status="RUNNING")
            if ERROR in self.client.get_run(self.run_id).data.tags:
                self.client.delete_tag(self.run_id, ERROR)

    def end(self, status: str, time_ms: int | None = None) -> None:
        """Set the status, FINISHED, FAILED or KILLED, and the end, in ms since 1970; by default the time of now."""
        with brief_requests():
            self.client.set_terminated(self.run_id, status, end_time=time_ms)


@contextlib.contextmanager
def _may_exist() -> Iterator[None]:
    """Make something unless it is there; another process may have been faster."""
    from mlflow.exceptions import MlflowException  # noqa: PLC0415 (slow import)

    try:
        yield
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _experiment_id(client: MlflowClient, store: Store, name: str) -> str:
    """Find or make an experiment."""
    from mlflow.exceptions import MlflowException  # noqa: PLC0415 (slow import)

    folder = re.sub(r"[^\w.-]", "_", name).strip(".") or "_"
    location = None if store.artifacts is None else str(store.artifacts / folder)
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        with _may_exist():
            client.create_experiment(name, artifact_location=location)
        experiment = client.get_experiment_by_name(name)
        assert experiment is not None  # noqa: S101 (the store has just said that it exists)
    if experiment.lifecycle_stage == "deleted":
        raise TrackingError(
            f"Experiment {name!r} was deleted. Bring it back with `mlflow experiments restore --experiment-id "
            f"{experiment.experiment_id}`, or set {SETTING}.experiment_name to another name."
        )
    known = experiment.artifact_location
    if store.artifacts is not None and known.startswith("/") and known != location and not Path(known).exists():
        raise TrackingError(
            f"Experiment {name!r} keeps its files in {known}, which is not on this machine: the store was moved, or "
            f"made in a container. Set {SETTING}.experiment_name to another name, or {store.setting} to another store."
        )
    with contextlib.suppress(MlflowException):  # who may add trainings may not be allowed to change the experiment
        add_views(client, experiment)
    return str(experiment.experiment_id)
