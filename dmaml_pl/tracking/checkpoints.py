"""The checkpoints that go with an MLflow run."""

from __future__ import annotations

from pathlib import Path

from pytorch_lightning.callbacks import ModelCheckpoint


class CheckpointFiles:
    """Knows the best and the last checkpoint of a training, and which of them are uploaded already."""

    def __init__(self) -> None:
        self._callbacks: dict[str, ModelCheckpoint] = {}
        self._done: dict[str, tuple[Path, int]] = {}

    def watch(self, callback: ModelCheckpoint) -> None:
        """Ask this callback when it comes to uploading; Lightning hands over a weak proxy of it."""
        self._callbacks[callback.state_key] = callback

    def pending(self) -> dict[str, Path]:
        """Files to upload, by the name to give them: `best.ckpt` and `last.ckpt`, if they changed since `mark`."""
        files: dict[str, Path] = {}
        # The training's own decides; one without a monitor calls its latest file the best, and is asked last.
        for callback in sorted(
            self._alive(), key=lambda one: (not getattr(one, "decides", False), one.monitor is None)
        ):
            for name, path in (("best.ckpt", callback.best_model_path), ("last.ckpt", callback.last_model_path)):
                if path and Path(path).is_file():
                    files.setdefault(name, Path(path))
        return {name: path for name, path in files.items() if self._done.get(name) != _version(path)}

    def mark(self, name: str, path: Path) -> None:
        """Remember that this file was uploaded under this name."""
        self._done[name] = _version(path)

    def _alive(self) -> list[ModelCheckpoint]:
        alive = []
        for callback in self._callbacks.values():
            try:
                callback.monitor  # noqa: B018 (any access tells)
            except ReferenceError:  # the trainer that owned it is gone
                continue
            alive.append(callback)
        return alive


def _version(path: Path) -> tuple[Path, int]:
    return path, path.stat().st_mtime_ns
