"""`dmaml push ...` and `dmaml pull ...`: exported networks on the Hugging Face Hub, or whatever speaks like it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dmaml_pl.adapting.exported import WEIGHTS, require_own
from dmaml_pl.console.options import Options
from dmaml_pl.errors import ConfigError, TrackingError

FURTHER = "HF_TOKEN is the token that it asks for, HF_ENDPOINT the address of another server."


def push(words: list[str]) -> int:
    """Upload what `dmaml export` has written; returns the exit code.

    Raises:
        ConfigError: the folder was not exported, or huggingface_hub is not installed.
        TrackingError: the server does not take it.
    """
    parser = Options("dmaml push", description="Upload an exported network to the Hugging Face Hub.", epilog=FURTHER)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="what dmaml export has written")
    parser.add_argument("repository", metavar="OWNER/NAME", help="where to; made if it is missing")
    parser.add_argument("--private", action="store_true", help="make the repository for its owner alone")
    given = parser.parse_args(words)
    _check_name(given.repository)
    if not (given.folder / WEIGHTS).is_file():
        raise ConfigError(f"{given.folder} has no {WEIGHTS}: give the folder that dmaml export has written.")
    hub = _hub()
    with _told(given.repository, hub):
        api = hub.HfApi(library_name="dmaml_pl")
        api.create_repo(given.repository, private=given.private, exist_ok=True)
        made = api.upload_folder(
            repo_id=given.repository, folder_path=given.folder, commit_message="Upload by dmaml push"
        )
    print(f"Uploaded {given.folder}: {made.commit_url}")
    return 0


def pull(words: list[str]) -> int:
    """Download an exported network; returns the exit code.

    Raises:
        ConfigError: the folder holds something else, or huggingface_hub is not installed.
        TrackingError: there is no such repository, or the server does not answer.
    """
    parser = Options(
        "dmaml pull", description="Download an exported network from the Hugging Face Hub.", epilog=FURTHER
    )
    parser.add_argument("repository", metavar="OWNER/NAME", help="as dmaml push was given it")
    parser.add_argument("folder", type=Path, nargs="?", metavar="FOLDER", help="where to (default: NAME)")
    parser.add_argument("--revision", help="a branch, tag or commit (default: the newest)")
    given = parser.parse_args(words)
    _check_name(given.repository)
    folder: Path = given.folder or Path(given.repository.rpartition("/")[2])
    require_own(folder)
    hub = _hub()
    with _told(given.repository, hub):
        # Asked first: with a folder that is there and a server that is not, snapshot_download returns the folder.
        found = hub.HfApi(library_name="dmaml_pl").model_info(given.repository, revision=given.revision)
    if not any(file.rfilename == WEIGHTS for file in found.siblings or ()):
        raise ConfigError(f"{given.repository} has no {WEIGHTS}: it was not uploaded by dmaml push.")
    with _told(given.repository, hub):
        hub.snapshot_download(given.repository, revision=found.sha, local_dir=folder, library_name="dmaml_pl")
    print(f"Downloaded to {folder}: dmaml adapt --ckpt {folder} --support ... takes it as it is.")
    return 0


def _check_name(repository: str) -> None:
    if repository.count("/") != 1 or not all(repository.split("/")):
        raise ConfigError(f"OWNER/NAME is {repository}, but must be two names with one / between them.")


def _hub() -> Any:
    try:
        import huggingface_hub  # noqa: PLC0415 - an extra
        from huggingface_hub.utils.tqdm import disable_progress_bars  # noqa: PLC0415 - the same
    except ImportError as error:
        raise ConfigError("This needs huggingface_hub, which is not installed: pip install 'dmaml_pl[hub]'.") from error
    disable_progress_bars()
    return huggingface_hub


@contextmanager
def _told(repository: str, hub: Any) -> Iterator[None]:
    """What the server refuses, in one line."""
    try:
        yield
    except Exception as error:
        reason = str(getattr(error, "server_message", None) or error).strip() or type(error).__name__
        raise TrackingError(
            f"{hub.constants.ENDPOINT}/{repository} cannot be used ({reason.splitlines()[0].rstrip('.')}): see to the "
            "name, the network, and the token in HF_TOKEN."
        ) from error
