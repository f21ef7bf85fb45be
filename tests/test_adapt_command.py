"""`dmaml adapt`, on real pictures and CSV files."""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

import dmaml_pl
from data_modules import Glyphs, Omniglot
from data_modules.reading.pictures import InkReader
from dmaml_pl.__main__ import main
from tests.adapting import NAMES, draw, draw_folders
from tests.test_omniglot import make_folders
from tests.trainings import dmaml

Refusal = Callable[..., str]


@pytest.fixture
def support() -> Path:
    return draw_folders(Path("support"), {"a.png": 0, "b.jpg": 8})


def rows(file: str) -> list[dict[str, str]]:
    with Path(file).open() as stream:
        return list(csv.DictReader(stream))


def line(file: str, header: str, *lines: str) -> Path:
    Path(file).write_text("\n".join([header, *lines]) + "\n")
    return Path(file)


# -- pictures ------------------------------------------------------------------------------------------------------


def test_the_command_predicts_with_probabilities_from_folders_of_pictures(letters: Path, tmp_path: Path) -> None:
    draw_folders(tmp_path / "support", {"a.png": 0, "b.jpg": 8})
    draw_folders(tmp_path / "query", {"c.webp": 2})
    done = dmaml(tmp_path, "adapt", "--ckpt", str(letters), "--support", "support", "--query", "query")
    assert (done.returncode, done.stderr) == (0, "")
    assert "5 samples, after 1 adaptation step on 10 support samples" in done.stdout
    assert "\nPredictions: predictions.csv\n" in done.stdout
    found = rows(str(tmp_path / "predictions.csv"))
    assert [row["file"] for row in found] == [f"{name}/c.webp" for name in sorted(NAMES)]
    for row in found:
        probabilities = {name: float(row[f"p({name})"]) for name in NAMES}
        assert sum(probabilities.values()) == pytest.approx(1)
        assert row["prediction"] == max(probabilities, key=lambda name: probabilities[name])
        assert float(row["probability"]) == max(probabilities.values())
        assert row["file"] in done.stdout
    right = sum(row["prediction"] == row["class"] for row in found)
    assert f"Accuracy: {right / 5:.4f} ({right} of 5 right)" in done.stdout


def test_the_command_gives_what_python_gives(letters: Path, support: Path) -> None:
    words = ["--ckpt", letters, "--support", support, "--query", support, "--steps", "3", "--output", "found.json"]
    assert main(["adapt", *map(str, words)]) == 0
    found = json.loads(Path("found.json").read_text())
    files = sorted(support.glob("*/*"))
    x = torch.stack([InkReader(28).read_sample(file) for file in files])
    adapted = dmaml_pl.load(letters).adapt(x, [file.parent.name for file in files], steps=3)
    expected = adapted.predict(x)
    assert (found["steps"], found["support_samples"], found["classes"]) == (3, 10, list(adapted.classes))
    values = [[row[f"p({name})"] for name in adapted.classes] for row in found["predictions"]]
    assert values == [pytest.approx(row) for row in expected.tolist()]
    assert found["accuracy"] == found["right"] / 10


def test_what_was_saved_answers_as_it_did_without_the_support(
    letters: Path, support: Path, capfd: pytest.CaptureFixture[str], refusal: Refusal
) -> None:
    shutil.copytree(support / "en", "unsorted")
    given = ["adapt", "--query", "unsorted"]
    assert main([*given, "--ckpt", str(letters), "--support", "support", "--save", "adapted.pt"]) == 0
    assert main([*given, "--ckpt", "adapted.pt", "--output", "again.csv"]) == 0
    assert rows("again.csv") == rows("predictions.csv")
    assert set(rows("again.csv")[0]) == {"file", "prediction", "probability", *(f"p({name})" for name in NAMES)}
    assert "Adapted network: adapted.pt" in capfd.readouterr().out
    Path("predictions.csv").unlink()
    for extra in (("--support", "support"), ("--steps", "2"), ("--save", "more.pt")):
        message = refusal("--ckpt", "adapted.pt", "--query", "unsorted", *extra)
        assert message == f"--ckpt adapted.pt is adapted already: leave out {extra[0]}, or give a training's."


def test_a_single_picture_can_be_asked_about(letters: Path, support: Path) -> None:
    draw("Ա", 4, Path("one.gif"))
    assert main(["adapt", "--ckpt", str(letters), "--support", str(support), "--query", "one.gif"]) == 0
    (found,) = rows("predictions.csv")
    assert found["file"] == "one.gif"


def cut_off(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:300])


def instead_of_the_support(*, folder: bool) -> None:
    shutil.rmtree("support")
    if folder:
        Path("support").mkdir()
    else:
        Path("support").touch()


def draw_all(*files: str) -> None:
    for file in files:
        draw("Ջ", 0, Path(file))


def empty(folder: str) -> None:
    shutil.rmtree(folder)
    Path(folder).mkdir(parents=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: shutil.rmtree("support/en"), r"has 4 classes \(ayb, ben, don, gan\), .* trained to tell 5 apart"),
        (lambda: draw_all("support/jhe/a.png"), r"has 6 classes \(ayb, .*, jhe\), .* tell 5 apart"),
        (lambda: empty("support/en"), "the folder of class en has no pictures"),
        (lambda: cut_off(Path("support/en/b.jpg")), r"support/en/b\.jpg is not a picture that can be read"),
        (lambda: draw_all("support/loose.png"), r"--support support has class folders, but loose\.png lies outside"),
        (lambda: draw_all("query/jhe/a.png"), "--query query has the folder jhe, which is no class"),
        (lambda: empty("query"), "--query query has no pictures in it"),
        (lambda: draw_all("query/en/a.png"), r"--query query has class folders, but a\.png lies outside"),
        (lambda: instead_of_the_support(folder=True), "--support support has no pictures in it"),
        (lambda: instead_of_the_support(folder=False), "--support is support, which is not a folder of classes"),
    ],
)
def test_pictures_that_cannot_do_are_named(
    letters: Path, support: Path, refusal: Refusal, change: Callable[[], object], message: str
) -> None:
    draw("Ա", 4, Path("query/a.png"))
    change()
    said = refusal("--ckpt", letters, "--support", support, "--query", "query")
    assert re.search(message, said), said


def test_hidden_files_and_files_that_are_no_pictures_are_passed_over(letters: Path, support: Path) -> None:
    for name in ("notes.txt", ".DS_Store", ".hidden.png", "en/Thumbs.db"):
        (support / name).touch()
    assert main(["adapt", "--ckpt", str(letters), "--support", "support", "--query", "support"]) == 0
    assert len(rows("predictions.csv")) == 10


def test_what_is_written_replaces_none_of_what_is_read(letters: Path, support: Path, refusal: Refusal) -> None:
    shutil.copy(letters, "mine.ckpt")
    given = ("--ckpt", "mine.ckpt", "--support", support, "--query", support)
    assert refusal(*given, "--save", "./mine.ckpt") == "--save is mine.ckpt, as --ckpt is: give it a file of its own."
    assert refusal(*given, "--save", "a.csv", "--output", "a.csv").startswith("--output is a.csv, as --save is: ")
    assert Path("mine.ckpt").read_bytes() == letters.read_bytes()


def test_more_steps_than_anybody_waits_for_are_refused(letters: Path, support: Path, refusal: Refusal) -> None:
    said = refusal("--ckpt", letters, "--support", support, "--query", support, "--steps", "1000000000")
    assert said.startswith("--steps is 1000000000, but must be a whole number from 1 to 10000.")


# -- how a picture becomes a sample --------------------------------------------------------------------------------


def test_a_picture_of_omniglot_becomes_the_sample_that_training_sees(tmp_path: Path) -> None:
    make_folders(tmp_path / "omniglot")
    data = Omniglot(root=str(tmp_path / "omniglot"), cache_dir=str(tmp_path), train_classes=1, val_classes=1)
    seen = torch.cat(list(data.load_splits().values())).flatten(0, 1).float() / 255
    for file in sorted((tmp_path / "omniglot").rglob("*.png"))[:5]:
        sample = data.read_sample(file)
        assert sample.shape == (1, 28, 28)
        assert any(torch.equal(sample, each) for each in seen)


def test_ink_is_bright_whatever_it_was_drawn_in_and_on() -> None:
    grey = Image.new("L", (56, 56), 0)
    grey.paste(255, (20, 10, 30, 40))
    expected = torch.zeros(28, 28)
    expected[5:20, 10:15] = 1
    clear = Image.new("RGBA", (56, 56), (0, 0, 0, 0))
    clear.paste((0, 0, 0, 255), (20, 10, 30, 40))
    pictures = {
        "light.png": grey,
        "dark.png": grey.point([255 - value for value in range(256)]),
        "clear.png": clear,
        "deep.png": Image.fromarray(
            (torch.tensor(list(grey.tobytes())).reshape(56, 56) * 257).numpy().astype("uint16")
        ),
        "bits.png": grey.convert("1"),
        "palette.gif": grey.convert("P"),
    }
    for name, picture in pictures.items():
        picture.save(name)
        assert torch.equal(InkReader(28).read_sample(Path(name))[0], expected), name


def test_a_picture_that_is_not_square_keeps_its_shape() -> None:
    Image.new("L", (10, 40), 255).save("ground.png")
    wide = Image.new("L", (80, 40), 255)
    wide.paste(0, (30, 10, 50, 30))
    wide.save("wide.png")
    sample = Glyphs().read_sample(Path("wide.png"))[0]
    height, width = ((sample > 0.5).any(dim=axis).sum() for axis in (1, 0))
    assert abs(int(height) - int(width)) <= 1
    assert not bool(Glyphs().read_sample(Path("ground.png")).any())
    assert torch.equal(Glyphs().read_sample("wide.png")[0], sample)  # a path as text


# -- numbers -------------------------------------------------------------------------------------------------------


def test_a_regression_predicts_from_csv_files_and_tells_the_error(
    sines: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    line("support.csv", "t,height", "-1,0.5", "0,1", "1,0.5")
    line("query.csv", "t,height", "0.5,0.8", "2,0")
    assert main(["adapt", "--ckpt", str(sines), "--support", "support.csv", "--query", "query.csv"]) == 0
    adapted = dmaml_pl.load(sines).adapt([-1.0, 0.0, 1.0], [0.5, 1.0, 0.5])
    expected = adapted.predict([0.5, 2.0]).flatten()
    found = rows("predictions.csv")
    assert list(found[0]) == ["t", "height", "predicted height"]
    assert [float(row["predicted height"]) for row in found] == pytest.approx(expected.tolist())
    error = torch.nn.functional.mse_loss(expected, torch.tensor([0.8, 0.0]))
    assert f"Mean squared error: {error:.4f} over 2 samples" in capfd.readouterr().out

    line("query.csv", "t", "0.5", "2")
    assert main(["adapt", "--ckpt", str(sines), "--support", "support.csv", "--query", "query.csv"]) == 0
    assert list(rows("predictions.csv")[0]) == ["t", "predicted height"]
    assert "error" not in capfd.readouterr().out


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            ("t,height", "1,x"),
            "s.csv, row 1: column height (--support) is 'x', and not a finite number: mend or leave out the row.",
        ),
        (
            ("t,height", "1,2", "", "3"),
            "s.csv cannot be read as CSV (CSV parse error: Row #3: Expected 2 columns, got 1: 3).",
        ),
        (("t,height", "1,nan"), "s.csv, row 1: column height (--support) is empty: mend or leave out the row."),
        (("1,2", "3,4"), "--support s.csv begins with numbers: its first line must name the columns."),
        (("t,height",), "s.csv has no rows."),
        (("t", "1"), "--support s.csv has 1 columns, but the network was trained for 2 (1 of input, 1 of target)."),
        (("x,y", "1,2"), "--query q.csv has the columns t, but --support x, y."),
    ],
)
def test_numbers_that_cannot_do_are_named(sines: Path, refusal: Refusal, lines: tuple[str, ...], message: str) -> None:
    line("s.csv", *lines)
    line("q.csv", "t", "1")
    assert refusal("--ckpt", sines, "--support", "s.csv", "--query", "q.csv") == message


# -- the command line ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "Not set: --ckpt, --query. dmaml adapt --help lists all."),
        (("--ckpt", "a.ckpt", "--query", "q", "--step", "3"), "unrecognized arguments: --step 3."),
        (
            ("--ckpt", "a.ckpt", "--query", "q", "--steps", "0"),
            "--steps is 0, but must be a whole number from 1 to 10000.",
        ),
        (("--ckpt", "a.ckpt", "--query", "q"), "--ckpt is a.ckpt, but there is no such file"),
        (("--ckpt", "here", "--query", "q"), "--query is q, but there is no such file or folder."),
        (
            ("--ckpt", "here", "--query", "here", "--support", "s"),
            "--support is s, but there is no such file or folder.",
        ),
        (
            ("--ckpt", "here", "--query", "here", "--output", "a.txt"),
            "--output is a.txt, but its name must end in .csv",
        ),
        (
            ("--ckpt", "here", "--query", "here", "--save", "/proc/no/a.pt"),
            "--save is /proc/no/a.pt, which cannot be written (",
        ),
        (("--ckpt", "here", "--query", "here"), "here is truncated, damaged, or no checkpoint at all"),
    ],
)
def test_a_mistake_in_the_command_is_told(refusal: Refusal, words: tuple[str, ...], message: str) -> None:
    Path("here").touch()
    assert refusal(*words).startswith(message)


def test_the_support_is_asked_for(sines: Path, refusal: Refusal) -> None:
    line("q.csv", "t", "1")
    assert refusal("--ckpt", sines, "--query", "q.csv").startswith("Not set: --support, the samples to adapt")


def test_help_needs_no_pytorch(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit('PyTorch was loaded')\n")
    done = dmaml(tmp_path, "adapt", "--help", launcher=())
    assert (done.returncode, done.stderr) == (0, "")
    assert "--support DIR" in done.stdout
