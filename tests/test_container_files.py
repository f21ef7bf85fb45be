"""Dockerfile and compose.yaml, read without an engine; `make image-test` builds and runs them."""

from __future__ import annotations

import re
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml


@pytest.fixture(scope="module")
def dockerfile(repository: Path) -> str:
    return (repository / "Dockerfile").read_text().replace("\\\n", " ")


@pytest.fixture(scope="module")
def services(repository: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((repository / "compose.yaml").read_text())["services"]
    return found


def test_images_install_packages_by_the_same_uv_as_make_setup(repository: Path, dockerfile: str) -> None:
    (ours,) = re.findall(r"^UV_VERSION := (.+)$", (repository / "Makefile").read_text(), re.MULTILINE)
    assert re.findall(r"^ARG UV_VERSION=(.+)$", dockerfile, re.MULTILINE) == [ours]


def test_the_engine_is_sent_what_the_images_are_made_of_and_no_more(repository: Path, dockerfile: str) -> None:
    lines = (repository / ".dockerignore").read_text().splitlines()
    sent = {line.removeprefix("!") for line in lines if line.startswith("!")}
    copied = {
        word for words in re.findall(r"^COPY (?!--from)(.+) \S+$", dockerfile, re.MULTILINE) for word in words.split()
    }
    assert "*" in lines
    assert copied == sent
    assert all((repository / name).exists() for name in sent)


def test_every_setting_of_the_compose_file_is_in_the_example_and_no_other(repository: Path) -> None:
    used = set(re.findall(r"\$\{(\w+)", (repository / "compose.yaml").read_text()))
    told = set(re.findall(r"^#?([A-Z_]+)=", (repository / ".env.example").read_text(), re.MULTILINE))
    assert used - told == {"GIT_COMMIT", "OMP_NUM_THREADS"}, "which are the shell's"
    assert told <= used


def test_git_does_not_take_the_password_along(repository: Path) -> None:
    ignored = (repository / ".gitignore").read_text().splitlines()
    assert any(fnmatch(".env", line.strip("/")) for line in ignored)


def test_services_wait_until_that_which_they_need_is_healthy(services: dict[str, Any]) -> None:
    for service in services.values():
        for needed, how in service.get("depends_on", {}).items():
            assert how["condition"] == "service_healthy"
            assert services[needed]["healthcheck"]["test"][0] == "CMD"


def test_our_services_write_to_volumes_and_tmp_only(services: dict[str, Any]) -> None:
    for name, service in services.items():
        if name != "postgres":
            assert service["read_only"] is True
            assert service["tmpfs"] == ["/tmp"]  # noqa: S108
            assert service["cap_drop"] == ["ALL"]


def test_the_servers_port_is_open_to_this_machine_only(services: dict[str, Any]) -> None:
    assert services["mlflow"]["ports"] == ["${MLFLOW_ADDRESS:-127.0.0.1}:${MLFLOW_PORT:-5000}:5000"]
    assert "ports" not in services["postgres"]


def test_trainers_under_torchrun_or_torchft_and_the_gpu_are_profiles(services: dict[str, Any]) -> None:
    profiles = {name: service.get("profiles", []) for name, service in services.items()}
    assert profiles == {
        "postgres": [],
        "mlflow": [],
        "trainer": [],
        "worker-0": ["torchrun"],
        "worker-1": ["torchrun"],
        "lighthouse": ["elastic"],
        "elastic-0": ["elastic"],
        "elastic-1": ["elastic"],
        "gpu": ["gpu"],
    }
    (device,) = services["gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]
