"""Variables of launchers that are broken are named, before PyTorch is loaded or an MLflow run is made."""

from __future__ import annotations

import pytest

from dmaml_pl.__main__ import main
from dmaml_pl.errors import ConfigError
from dmaml_pl.launching.restarts import was_refused
from dmaml_pl.launching.variables import check_variables

POD = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
AGENT = POD | {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "TORCHELASTIC_RUN_ID": "one"}
TASK = {
    "SLURM_JOB_NAME": "train",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "0",
    "SLURM_NNODES": "1",
}


@pytest.mark.parametrize(
    "variables", [{}, POD, AGENT, TASK, {"SLURM_JOB_NAME": "bash", "SLURM_NTASKS": "2"}, TASK | {"PMI_SIZE": "2"}]
)
def test_what_launchers_set_is_accepted(variables: dict[str, str]) -> None:
    check_variables(variables)


@pytest.mark.parametrize(
    ("whole", "change", "expected"),
    [
        (POD, {"RANK": "one"}, "RANK is 'one', but must be a whole number of at least 0."),
        (POD, {"RANK": "-1"}, "RANK is '-1', but must be a whole number of at least 0."),
        (POD, {"RANK": "2"}, "RANK is 2, but must be less than WORLD_SIZE, which is 2."),
        (POD, {"WORLD_SIZE": "0"}, "WORLD_SIZE is '0', but must be a whole number of at least 1."),
        (POD, {"WORLD_SIZE": None}, "RANK is set, but not WORLD_SIZE."),
        (POD, {"MASTER_ADDR": None, "MASTER_PORT": None}, "RANK is set, but not MASTER_ADDR and MASTER_PORT."),
        (POD, {"MASTER_PORT": "http"}, "MASTER_PORT is 'http', but must be a whole number of at least 1."),
        (POD, {"MASTER_PORT": "70000"}, "MASTER_PORT is 70000, but must be from 1 to 65535."),
        (AGENT, {"LOCAL_WORLD_SIZE": ""}, "LOCAL_WORLD_SIZE is '', but must be a whole number of at least 1."),
        (AGENT, {"LOCAL_RANK": "1"}, "LOCAL_RANK is 1, but must be less than LOCAL_WORLD_SIZE, which is 1."),
        (AGENT, {"LOCAL_RANK": None}, "TORCHELASTIC_RUN_ID is set, but not LOCAL_RANK."),
        (TASK, {"SLURM_PROCID": "2"}, "SLURM_PROCID is 2, but must be less than SLURM_NTASKS, which is 2."),
        (TASK, {"SLURM_NTASKS": "2(x2)"}, "SLURM_NTASKS is '2(x2)', but must be a whole number of at least 1."),
        (TASK, {"SLURM_LOCALID": None}, "SLURM_NTASKS is set, but not SLURM_LOCALID."),
        (TASK, {"SLURM_JOB_ID": "x"}, "SLURM_JOB_ID is 'x', but must be a whole number of at least 0."),
        ({}, {"LOCAL_RANK": "1"}, "LOCAL_RANK is set, but not WORLD_SIZE."),
        (
            POD,
            {"LOCAL_RANK": "0"},
            "RANK and LOCAL_RANK are set, but not as torchrun does: TORCHELASTIC_RUN_ID, too. ",
        ),
        ({}, {"GLOO_SOCKET_IFNAME": "nope0"}, "GLOO_SOCKET_IFNAME has 'nope0', but must be one of lo"),
        ({}, {"LOCAL_WORLD_SIZE": "2"}, "LOCAL_WORLD_SIZE is set, but not RANK and LOCAL_RANK and WORLD_SIZE."),
        ({}, {"WORLD_SIZE": "2"}, "WORLD_SIZE is set, but not RANK."),
        (
            {},
            {"OMPI_COMM_WORLD_SIZE": "2"},
            "OMPI_COMM_WORLD_SIZE is '2', but must be 1: of processes that mpirun has ",
        ),
        (TASK, {"SLURM_NNODES": "1.5"}, "SLURM_NNODES is '1.5', but must be a whole number of at least 1."),
    ],
)
def test_what_is_broken_is_named_with_what_it_may_be(
    whole: dict[str, str], change: dict[str, str | None], expected: str
) -> None:
    changed = {name: value for name, value in (whole | change).items() if value is not None}
    with pytest.raises(ConfigError) as refused:
        check_variables(changed)
    assert str(refused.value).startswith(expected)
    assert "unset it" in str(refused.value)


def test_an_agent_that_does_not_answer_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    agent = {"TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"}
    for name, value in agent.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"torchrun's agent does not answer at 127.0.0.1:9, .* \(Connection refused"):
        was_refused()


def test_the_command_says_it_in_one_line(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "abc")
    assert main(["fit"]) == 1
    out, err = capfd.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("dmaml: error: RANK is 'abc', but must be a whole number of at least 0.")
