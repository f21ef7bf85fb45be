"""`dmaml sync`: sends what trainings could not send to MLflow while it was away."""

import sys
from pathlib import Path

from dmaml_pl.console.options import Options
from dmaml_pl.errors import BLANK, ConfigError, DmamlError, TrackingError
from dmaml_pl.tracking.mlflow_run import MLflowRun
from dmaml_pl.tracking.operations import describe
from dmaml_pl.tracking.outbox import Outbox, find_outboxes
from dmaml_pl.tracking.patience import brief_requests
from dmaml_pl.tracking.sender import deliver_all
from dmaml_pl.tracking.store import Store, reason


def main(words: list[str]) -> int:
    """Send all that waits, as the words after `dmaml sync` say; returns the exit code, 1 where something waits."""
    parser = Options(
        "dmaml sync",
        description="Send to MLflow what trainings have kept in SAVE_DIR/outbox while it was away.",
        allow_abbrev=False,
    )
    parser.add_argument("--save_dir", default="mlruns", help="folder of the trainings' tracking (default: mlruns)")
    parser.add_argument("--tracking_uri", help="the server's address, if it has another one now")
    given = parser.parse_args(words)
    folders = find_outboxes(Path(given.save_dir))
    left = [folder for folder in folders if not _sync(folder, given.tracking_uri)]
    if not Path(given.save_dir).is_dir():
        raise ConfigError(
            f"--save_dir is {given.save_dir}, but there is no such folder: it is where trainings keep theirs, mlruns "
            "by default."
        )
    if not folders:
        print(f"Nothing waits in {given.save_dir}: all was sent.")
    return 1 if left else 0


def settle(save_dir: Path) -> None:
    """Send what killed trainings have left for a store on this machine, so that none of them seems to be running."""
    for folder in find_outboxes(save_dir):
        _sync(folder, None, only_here=True)


@brief_requests()
def _sync(folder: Path, tracking_uri: str | None, *, only_here: bool = False) -> bool:
    """Send one outbox, and say so; returns whether nothing is left.

    Args:
        folder: of the outbox.
        tracking_uri: of the store; by default the training's own.
        only_here: leave out trainings under way, and stores that are not files.
    """
    written = max(file.stat().st_mtime_ns for file in folder.glob("outbox.db*"))
    outbox, name, wanted = Outbox(folder), folder.name[:8], "what waits in it"
    try:
        if not outbox.adopt():
            if only_here:
                return False
            print(f"{name}: the training is under way, and sends it itself.")
            return False
        about = outbox.about
        if not about:  # a process was killed as it began
            return True
        if only_here and not about["tracking_uri"].startswith("sqlite:"):
            return False
        name, wanted = f"{about['run_name']} ({name})", describe(outbox.everything())
        if tracking_uri is None and BLANK in about["tracking_uri"]:
            raise TrackingError(  # noqa: TRY301 (told below, like all that keeps it from being sent)
                "The server's address had a password, which is not kept: give --tracking_uri "
                f"({about['tracking_uri']})."
            )
        client = Store.find(tracking_uri or _address(about["tracking_uri"], folder), str(folder.parents[1])).connect()
        deliver_all(MLflowRun(client, client.get_run(about["run_id"]), resumed=0), outbox)
        if client.get_run(about["run_id"]).info.status == "RUNNING":  # by no process, as the outbox was free
            client.set_terminated(about["run_id"], "KILLED", written // 10**6)
            wanted += "; its process was killed, so its status is KILLED now"
        print(f"{name}: sent {wanted}.")
    except Exception as error:
        waiting = describe(outbox.everything()) if outbox.waits else wanted
        why = str(error) if isinstance(error, DmamlError) else reason(error)
        print(f"{name}: not sent, and still in {folder}: {waiting}. {why}", file=sys.stderr)
        return False
    finally:
        refused = outbox.refused
        outbox.close()
    if refused:
        print(f"{name}: MLflow refused {refused} of it for good, see {folder}/refused.jsonl.", file=sys.stderr)
    return not refused


def _address(known: str, folder: Path) -> str:
    """The store that a training has written to; beside its outbox, where both were moved."""
    beside = folder.absolute().parents[1] / "mlflow.db"
    was_here = known.startswith("sqlite:///") and not Path(known.removeprefix("sqlite:///")).is_file()
    return f"sqlite:///{beside.as_posix()}" if was_here and beside.is_file() else known
