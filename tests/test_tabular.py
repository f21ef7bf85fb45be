"""Regressions of a user's own: read from CSV and Parquet, split by task, standardized, and every mistake named."""

from __future__ import annotations

import csv
import math
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
import torch

from data_modules import Tabular
from data_modules.samplers import SamplerName
from dmaml_pl import MLP
from dmaml_pl.errors import ConfigError, DataError
from dmaml_pl.evaluation.predictions import PredictionWriter
from dmaml_pl.tasks import check_tasks
from tests.recipes import small_maml, small_trainer

TASKS = 20


def rows() -> list[dict[str, Any]]:
    """20 lines of 6 to 9 points, in mixed order; the target tells the task, the input the row."""
    made = [
        {"line": f"t{task:02}", "note": "text", "x": 100 * task + point, "z": -point, "y": 1000 * task + point}
        for task in range(TASKS)
        for point in range(6 + task % 4)
    ]
    random.Random(0).shuffle(made)  # noqa: S311 - nothing secret
    return made


def write(path: Path, table: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        pa.parquet.write_table(pa.Table.from_pylist(table), path)
    else:
        with path.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, list(table[0]))
            writer.writeheader()
            writer.writerows(table)
    return path


def tabular(path: Path, **settings: Any) -> Tabular:
    defaults = {"task_column": "line", "inputs": ["x", "z"], "targets": ["y"], "shots": 2, "queries": 3}
    return Tabular(path=str(path), **{**defaults, "meta_batch": 4, **settings})


def ready(path: Path, **settings: Any) -> Tabular:
    data = tabular(path, **settings)
    data.prepare_data()
    data.setup("fit")
    return data


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write(tmp_path / "table.csv", rows())


def tasks_of(data: Tabular, split: Any) -> set[int]:
    batch = data.sample_tasks(split, range(300))
    return {int(value) for value in (batch.query_y[:, 0, 0] // 1000).tolist()}


@pytest.mark.parametrize("sampler", ["batched", "learn2learn"])
def test_a_task_is_rows_of_one_task_none_of_them_twice(sampler: SamplerName, path: Path) -> None:
    data = ready(path, standardize=False, sampler=sampler)
    batch = data.sample_tasks("train", range(200))

    check_tasks(batch)
    assert batch.support_x.shape == (200, 2, 2)
    assert batch.query_y.shape == (200, 3, 1)
    x, y = torch.cat([batch.support_x, batch.query_x], 1), torch.cat([batch.support_y, batch.query_y], 1)[..., 0]
    assert torch.equal(x[..., 0] // 100, y // 1000), "inputs stay with their targets"
    assert torch.equal(x[..., 1], -(y % 1000))
    assert all(len(set(row.tolist())) == 5 for row in y)
    assert all(len(set((row // 1000).tolist())) == 1 for row in y)
    assert (y % 1000).max() == 8, "longer tasks give all their rows"


def test_a_task_follows_from_its_seed_alone(path: Path) -> None:
    one, other = ready(path), ready(path, seed=3)

    assert torch.equal(one.sample_tasks("val", [5, 6]).query_x[1], other.sample_task("val", 6).query_x)
    assert torch.equal(
        one.sample(worker=1, run=0, iteration=3).query_x, one.sample(worker=1, run=0, iteration=3).query_x
    )


def test_csv_and_parquet_give_the_same_tasks_whatever_the_order_of_the_rows(path: Path, tmp_path: Path) -> None:
    expected = ready(path)
    parquet = ready(write(tmp_path / "table.parquet", rows()))
    shuffled = ready(write(tmp_path / "other.csv", rows()[::-1]))

    assert torch.equal(expected.sample_tasks("train", [1, 2]).query_y, parquet.sample_tasks("train", [1, 2]).query_y)
    assert tasks_of(tabular_plain(shuffled), "test") == tasks_of(tabular_plain(expected), "test")


def tabular_plain(data: Tabular) -> Tabular:
    return ready(Path(data.path), standardize=False)


def test_tasks_are_dealt_to_splits_that_share_none(path: Path) -> None:
    data = ready(path, standardize=False)
    split = {name: tasks_of(data, name) for name in ("train", "val", "test")}

    assert {name: len(tasks) for name, tasks in split.items()} == {"train": 13, "val": 3, "test": 4}
    assert len(set.union(*split.values())) == TASKS
    assert tasks_of(ready(path, standardize=False, split_seed=1), "test") != split["test"]


def test_a_column_says_which_task_is_for_what(tmp_path: Path) -> None:
    parts = ["train"] * 10 + ["val"] * 4 + ["test"] * 6
    table = [row | {"part": parts[int(row["line"][1:])]} for row in rows()]
    data = ready(write(tmp_path / "table.csv", table), split_column="part", standardize=False)

    assert tasks_of(data, "val") == {10, 11, 12, 13}


def test_columns_are_standardized_over_the_rows_for_meta_training_alone(path: Path) -> None:
    raw, data = ready(path, standardize=False), ready(path)
    trained = tasks_of(raw, "train")
    y = torch.tensor([float(row["y"]) for row in rows() if int(row["line"][1:]) in trained], dtype=torch.float64)
    assert data.scaling is not None
    assert data.scaling.y_mean == pytest.approx([float(y.mean())])
    assert data.scaling.y_scale == pytest.approx([float(y.std(correction=0))])

    for split in ("train", "test"):
        ours, theirs = data.sample_tasks(split, [1, 2]), raw.sample_tasks(split, [1, 2])
        assert torch.allclose(data.scaling.values(ours.query_y), theirs.query_y, rtol=1e-5)
        assert torch.allclose(data.scaling.inputs(theirs.support_x), ours.support_x, atol=1e-5)


def test_a_constant_column_is_only_shifted(tmp_path: Path) -> None:
    data = ready(write(tmp_path / "t.csv", [row | {"z": 7} for row in rows()]))

    assert data.scaling is not None
    assert data.scaling.x_scale[1] == 1
    assert (data.sample_task("train", 0).support_x[:, 1] == 0).all()


def test_tasks_are_told_apart_by_what_is_written_and_not_by_the_number_that_it_reads_as(tmp_path: Path) -> None:
    versions = ["01", "1", "1.0", "1.10", "1.1", "1e2", "100", "12345678901234567890", "12345678901234567891", "NA"]
    lines = [f"{name},{x},0,{x}" for name in versions for x in range(5)]
    (tmp_path / "t.csv").write_text("\n".join(["line,x,z,y", *lines]))
    data = ready(tmp_path / "t.csv")

    assert sum(len(sampler.starts) for sampler in data._samplers.values()) == len(versions)


@pytest.mark.parametrize(
    ("marks", "encoding", "settings"),
    [
        (";,", "utf-8-sig", {}),
        ("\t.", "utf-16", {}),
        ("|.", "utf-8", {}),
        (";.", "utf-8", {}),
        ("\t,", "cp1252", {"decimal": ",", "encoding": "cp1252"}),
        ("/.", "latin-1", {"delimiter": "/", "encoding": "latin-1"}),
    ],
)
def test_tables_are_read_however_spreadsheets_write_them(
    marks: str, encoding: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    delimiter, decimal = marks[0], marks[1]
    table = [row | {"line": f"Prüfung {row['line']}", "x": row["x"] + 0.5} for row in rows()]
    written = [[str(cell).replace(".", decimal) for cell in row.values()] for row in table]
    text = "\r\n".join(delimiter.join(cells) for cells in [list(table[0]), *written])
    (tmp_path / "t.csv").write_bytes(text.encode(encoding))
    expected = ready(write(tmp_path / "plain.csv", table)).sample_task("train", 0)

    assert torch.equal(ready(tmp_path / "t.csv", **settings).sample_task("train", 0).support_x, expected.support_x)


@pytest.mark.parametrize(
    ("content", "settings", "message"),
    [
        ("line,x,z,y\nü,1,2,3".encode("latin-1"), {}, r"not all text in UTF8: .* set data\.encoding, such as cp1252"),
        ("line,x,z,ü\na,1,2,3".encode("latin-1"), {}, r"not all text in UTF8: .* set data\.encoding"),
        (
            b'line,x,z,y\na,"1,5",2,3',
            {},
            r"column x .* is '1,5', .*: where that is the decimal mark, set data\.decimal",
        ),
        (b"line;x;z;y\na;1.234;2,5;3", {}, r"column x \(data\.inputs\) is '1\.234', and not a finite number"),
        (b"line,x,z,y\na,1,2,cat\na,1,2,dog", {}, r"where it names classes, take data_modules\.TabularClasses"),
        (b"line,x,z,y", {"delimiter": "ab"}, r"data\.delimiter is 'ab', but must be one character"),
        (
            b"line,x,z,y",
            {"encoding": "klingon"},
            r"data\.encoding is 'klingon', which is no encoding that Python knows",
        ),
        (b"line,x,z,y", {"decimal": ";"}, r"data\.decimal is ;, but must be \. or ,"),
    ],
)
def test_a_table_that_is_written_otherwise_names_the_setting(
    content: bytes, settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    (tmp_path / "t.csv").write_bytes(content)

    with pytest.raises((DataError, ConfigError), match=message):
        ready(tmp_path / "t.csv", **settings)


@pytest.mark.parametrize(
    ("cells", "settings", "said"),
    [
        ({"z": 7}, {}, r"Column z (data.inputs) of {path} is 7 in all rows for meta-training: it carries nothing."),
        ({}, {}, ""),
        ({}, {"standardize": False}, "Column x (data.inputs) of {path} reaches 19"),
    ],
)
def test_columns_that_carry_nothing_or_are_huge_are_said(
    cells: dict[str, Any], settings: dict[str, Any], said: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "t.csv", [row | cells for row in rows()])
    with caplog.at_level("INFO"):
        ready(path, **settings)

    assert said.format(path=path) in caplog.text
    assert said or not caplog.text


def test_one_value_beyond_all_others_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = [f"t{task},{x},{1e9 if task == x == 0 else x},{x}" for task in range(40) for x in range(500)]
    (tmp_path / "t.csv").write_text("\n".join(["line,x,z,y", *lines]))
    with caplog.at_level("INFO"):
        ready(tmp_path / "t.csv")

    assert "Column z (data.inputs)" in caplog.text
    assert "standard deviations from its mean" in caplog.text


def test_tasks_may_be_numbers(tmp_path: Path) -> None:
    table = [row | {"line": int(row["line"][1:])} for row in rows()]
    csv_file, parquet = write(tmp_path / "t.csv", table), write(tmp_path / "t.parquet", table)

    assert torch.equal(ready(csv_file).sample_task("val", 0).query_x, ready(parquet).sample_task("val", 0).query_x)


def test_predictions_are_in_the_units_of_the_file_beside_their_inputs(path: Path, tmp_path: Path) -> None:
    writer = PredictionWriter(str(tmp_path / "said.csv"))
    small_trainer(callbacks=[writer]).predict(small_maml(MLP(2, [4], 1)), ready(path), return_predictions=False)
    with (tmp_path / "said.csv").open(newline="") as stream:
        said = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(stream)]

    assert list(said[0]) == ["task", "query", "x", "z", "target", "prediction"]
    known = {(row["x"], row["z"], row["y"]) for row in rows()}
    assert {(round(row["x"]), round(row["z"]), round(row["target"])) for row in said} <= known


# ---- mistakes


def changed(row: int, **cells: Any) -> list[dict[str, Any]]:
    table = rows()
    table[row - 1] |= cells
    return table


@pytest.mark.parametrize(
    ("table", "settings", "message"),
    [
        (changed(5, x="1_0"), {}, r"t\.csv, row 5: column x \(data\.inputs\) is '1_0', and not a finite number"),
        (changed(5, x="many"), {}, r"t\.csv, row 5: column x \(data\.inputs\) is 'many', and not a finite number"),
        (changed(5, y=""), {}, r"t\.csv, row 5: column y \(data\.targets\) is empty"),
        (
            changed(6, x=1e300),
            {},
            r"t\.csv, row 6: column x \(data\.inputs\) is 1e\+300, more than networks compute with",
        ),
        (changed(7, y=math.inf), {}, r"t\.csv, row 7: column y \(data\.targets\) is inf"),
        (changed(3, line=""), {}, r"t\.csv, row 3: column line \(data\.task_column\) is empty"),
        (
            rows(),
            {"inputs": ["x", "note"]},
            r"row 1: column note .* is 'text'.* \(\d+ such rows\): leave the column out\.",
        ),
        (rows(), {"inputs": ["w"]}, r"data\.inputs names w, but .*t\.csv has the columns line, note, x, z, y\."),
        (rows(), {"task_column": "w"}, r"data\.task_column names w, but"),
        (
            changed(4, note="train"),
            {"split_column": "note"},
            r"row 1: column note is 'text', but must be train, val or",
        ),
        (rows()[:1], {}, r"Column line of .* has 1 tasks, which are too few to be dealt"),
        ([row | {"p": "train"} for row in rows()], {"split_column": "p"}, r"column p has no val"),
        (
            [row | {"p": "train" if number else "test"} for number, row in enumerate(rows())],
            {"split_column": "p"},
            r"t\.csv, row \d+: column p puts task t\d\d into train, but an earlier row into test",
        ),
    ],
)
def test_a_mistake_in_the_file_names_the_column_and_the_row(
    table: list[dict[str, Any]], settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=message):
        ready(write(tmp_path / "t.csv", table), **settings)


@pytest.mark.parametrize("name", ["t.csv", "t.parquet"])
@pytest.mark.parametrize("content", [None, b"", b"PAR1 but no more", b"line,x,z,y\n"])
def test_a_file_that_is_missing_empty_or_damaged_is_named(name: str, content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)

    with pytest.raises(DataError, match=name.replace(".", r"\.")):
        ready(tmp_path / name)


def test_a_name_that_two_columns_have_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("line,x,x,z,y\na,1,2,3,4\n")

    with pytest.raises(DataError, match=r"two columns x"):
        ready(tmp_path / "t.csv")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"queries": 6},
            r"data\.shots \+ data\.queries is 2 \+ 6, but task t\d\d in .* has 6 rows, and 9 further tasks",
        ),
        ({"inputs": []}, r"data\.inputs is empty"),
        ({"targets": ["y", "x"]}, r"^data\.targets names x, which data\.inputs has, too: a network that is shown what"),
        ({"inputs": ["x", "z", "x"]}, r"^data\.inputs names x twice: leave it out once\."),
        ({"val_share": 0.6, "test_share": 0.4}, r"data\.val_share \+ data\.test_share is 0\.6 \+ 0\.4"),
    ],
)
def test_settings_that_the_file_cannot_serve_name_the_setting(
    settings: dict[str, Any], message: str, path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        ready(path, **settings)


def test_plots_show_the_tasks_of_the_meta_test_in_the_order_of_their_input(path: Path) -> None:
    data = ready(path, inputs=["x"])
    plotted = data.tasks_to_plot(2)
    assert plotted is not None
    check_tasks(plotted.tasks)
    for index in range(2):
        task, shown = data.evaluation_task("test", index), plotted.tasks.task(index)
        order = task.query_x.squeeze(-1).argsort()
        assert torch.equal(shown.support_x, task.support_x)
        assert torch.equal(shown.query_x, task.query_x[order])
        assert torch.equal(shown.query_y, task.query_y[order])
    assert (plotted.x_label, plotted.y_label) == ("x (standardized)", "y (standardized)")
    assert not plotted.queries_are_curves
    plain = ready(path, inputs=["x"], standardize=False).tasks_to_plot(2)
    assert plain is not None
    assert (plain.x_label, plain.y_label) == ("x", "y")


def test_of_several_inputs_or_targets_there_is_no_plot(path: Path) -> None:
    assert ready(path).tasks_to_plot(2) is None
    assert ready(path, inputs=["x"], targets=["y", "z"]).tasks_to_plot(2) is None
