"""A trained network is exported with a model card, pushed to a hub and pulled from it, and adapts as before."""

from __future__ import annotations

import base64
import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from dmaml_pl import load
from dmaml_pl.__main__ import main

pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed: pip install 'dmaml_pl[hub]'")
safetensors = pytest.importorskip("safetensors", reason="safetensors is not installed: pip install 'dmaml_pl[hub]'")


@pytest.fixture
def exported(sines: Path, tmp_path: Path) -> Path:
    assert main(["export", str(sines), str(tmp_path / "sines"), "--license", "mit"]) == 0
    return tmp_path / "sines"


class Hub(BaseHTTPRequestHandler):
    """As much of the Hugging Face Hub as an upload and a download ask for."""

    files: dict[str, bytes]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        answer: dict[str, Any] = {"errors": [], "warnings": [], "url": f"http://{self.headers['Host']}/me/sines"}
        if self.path.endswith("/preupload/main"):
            wanted = json.loads(body)["files"]
            answer = {
                "files": [{"path": each["path"], "uploadMode": "regular", "shouldIgnore": False} for each in wanted]
            }
        if self.path.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            answer = {"commitUrl": f"{answer['url']}/commit/1", "commitOid": "1" * 40, "hookOutput": ""}
        self._answer(json.dumps(answer).encode())

    def do_GET(self) -> None:
        if "/resolve/" in self.path:
            name = self.path.partition("/resolve/")[2].partition("/")[2]
            self._answer(self.files[name], etag=name)
        elif not self.files:
            self.send_error(404)
        elif "/tree/" in self.path:
            entries = [
                {"type": "file", "path": name, "size": len(content), "oid": "1" * 40}
                for name, content in self.files.items()
            ]
            self._answer(json.dumps(entries).encode())
        else:
            siblings = [{"rfilename": name} for name in self.files]
            self._answer(json.dumps({"id": "me/sines", "sha": "1" * 40, "siblings": siblings}).encode())

    def do_HEAD(self) -> None:
        self.do_GET()

    def _answer(self, content: bytes, etag: str = "") -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("X-Repo-Commit", "1" * 40)
        self.send_header("ETag", f'"{etag}"')
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *words: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[dict[str, bytes]]:
    """Files of the repository of a hub on this machine."""
    import huggingface_hub.constants

    Hub.files = {}
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
        monkeypatch.setattr(
            huggingface_hub.constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            address + "/{repo_id}/resolve/{revision}/{filename}",
        )
        monkeypatch.setenv("HF_TOKEN", "hf_none")
        try:
            yield Hub.files
        finally:
            server.shutdown()


def test_an_exported_network_adapts_to_the_bit_as_its_checkpoint(sines: Path, exported: Path) -> None:
    x = torch.linspace(-2, 2, 8)
    for path in (exported, exported / "model.safetensors"):
        predictions = [load(each).adapt(x, x.sin()).predict(x) for each in (sines, path)]
        assert torch.equal(*predictions)


def test_it_holds_nothing_that_only_the_training_needs_and_no_folders_of_this_machine(exported: Path) -> None:
    with safetensors.safe_open(exported / "model.safetensors", framework="pt") as opened:
        assert all(name.startswith("learner.") for name in opened.keys())  # noqa: SIM118 - no mapping
        about = json.loads(opened.metadata()["dmaml_pl"])
    assert set(about) == {"config", "shapes", "scaling"}
    assert '"/' not in json.dumps(about)


def test_the_model_card_tells_the_data_the_settings_the_result_and_the_license(exported: Path) -> None:
    _, front, text = (exported / "README.md").read_text().split("---\n", 2)
    about = yaml.safe_load(front)
    assert about["license"] == "mit"
    assert "maml" in about["tags"]
    assert text.count("`MLP`, meta-trained by `MAML` on `Sinusoid`") == 1


def test_a_report_beside_the_checkpoint_is_in_the_card(sines: Path, tmp_path: Path) -> None:
    kept = tmp_path / "training" / "checkpoints"
    kept.mkdir(parents=True)
    (kept / "best.ckpt").write_bytes(sines.read_bytes())
    (kept.parent / "report.md").write_text(f"# Meta-test on Sinusoid\n\n| steps | mse |\n\nOf {kept}/best.ckpt\n")
    steps = [{"step": step, "trained": 1 / (1 + step)} for step in range(3)]
    found = {"metric": "mse", "inner_steps": 1, "tasks": 600, "steps": steps}
    (kept.parent / "report.json").write_text(json.dumps(found))
    assert main(["export", str(kept / "best.ckpt"), "told"]) == 0
    _, front, text = Path("told/README.md").read_text().split("---\n", 2)
    (result,) = yaml.safe_load(front)["model-index"][0]["results"][0]["metrics"]
    assert result == {"type": "mse", "value": 0.5, "name": "after 1 step, mean of 600 tasks"}
    assert "## Meta-test on Sinusoid\n\n| steps | mse |" in text
    assert "No license is stated" in text
    assert "Of best.ckpt\n" in text, "folders of this machine are cut off"


def test_what_was_pushed_is_pulled_as_it_was(
    exported: Path, hub: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["push", str(exported), "me/sines"]) == 0
    assert set(hub) == {"README.md", "model.safetensors"}
    assert main(["pull", "me/sines", "again"]) == 0
    assert capsys.readouterr().err == ""
    for name in hub:
        assert Path("again", name).read_bytes() == (exported / name).read_bytes()
    assert main(["pull", "me/sines", "again"]) == 0, "a second time brings what is new"


@pytest.mark.usefixtures("hub")
def test_a_folder_that_is_there_is_not_taken_for_what_a_silent_server_has(
    exported: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import huggingface_hub.constants

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}")
    assert main(["pull", "me/sines", str(exported)]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "/me/sines cannot be used (" in error


def test_a_repository_of_something_else_is_told_before_anything_is_fetched(
    hub: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    hub["pytorch_model.bin"] = b"large"
    assert main(["pull", "me/sines", "again"]) == 1
    assert "me/sines has no model.safetensors: it was not uploaded by dmaml push." in capsys.readouterr().err
    assert not Path("again").exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["export", "nope.ckpt", "x"], "nope.ckpt is not there: give the checkpoint of a training"),
        (
            ["export", "{sines}", "full"],
            "full is there, and holds something else than an exported network: give another",
        ),
        (
            ["export", "{sines}", "x", "--license", "a\nb: c"],
            "--license is 'a\\nb: c', but must be a name such as mit or ",
        ),
        (["export", "{sines}", "/proc/nope"], "/proc/nope cannot be written (No such file or directory): give anoth"),
        (["push", "full", "me/sines"], "full has no model.safetensors: give the folder that dmaml export has written"),
        (["push", "full", "sines"], "OWNER/NAME is sines, but must be two names with one / between them."),
        (
            ["pull", "me/sines", "full"],
            "full is there, and holds something else than an exported network: give another FOLDER.",
        ),
        (["pull", "me/sines"], "http://127.0.0.1:"),
    ],
)
@pytest.mark.usefixtures("hub")
def test_mistakes_are_one_line(words: list[str], told: str, sines: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("full").mkdir()
    Path("full/notes.txt").touch()
    assert main([word.format(sines=sines) for word in words]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"dmaml: error: {told}")
    assert error.count("\n") == 1


def test_damaged_safetensors_are_told(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = exported / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    Path("s.csv").write_text("x,y\n1,2\n")
    assert main(["adapt", "--ckpt", str(exported), "--support", "s.csv", "--query", "s.csv"]) == 1
    assert (
        "model.safetensors is truncated, damaged, or holds no safetensors: export it again." in capsys.readouterr().err
    )
