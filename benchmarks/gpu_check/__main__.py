"""`make gpu-check`: equality, what only a GPU has, speed, and a training, in one call of under eight minutes.

python -m benchmarks.gpu_check --device cpu --small
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.gpu_check import device, equality, sections, speed, training
from benchmarks.gpu_check.sections import Row, Section, Setting, Tell
from benchmarks.speed import machine
from benchmarks.speed.__main__ import markdown
from dmaml_pl import _learn2learn
from dmaml_pl.cli.quiet import quieten

SECTIONS: dict[str, tuple[Section, float]] = {
    "equality": (equality.equality, 80.0),
    "device": (device.device, 70.0),
    "eager": (speed.eager, 75.0),
    "navigation": (speed.navigation, 25.0),
    "compiled": (speed.compiled, 120.0),
    "training": (training.training, 90.0),
}
"""What is done, in this order, and how the time is shared out; what one leaves over is for those to come."""

NO_GPU = (
    "make gpu-check: there is no GPU here. Small, on the CPU, to see that it runs: "
    ".venv/bin/python -m benchmarks.gpu_check --device cpu --small"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; print tables as they come, and write `gpu_check.md`, `gpu_check.json` and `gpu_check.log`.

    Returns:
        How many rows have failed, at most 100; 2 where there is no such device.
    """
    began = time.monotonic()
    parser = argparse.ArgumentParser("make gpu-check", description="All that only a GPU can answer, in one call.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--small", action="store_true", help="small sizes, whose figures say nothing")
    parser.add_argument("--seconds", type=float, default=450.0, help="for all of it (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), metavar="SECTION")
    parser.add_argument("--omniglot", type=Path, metavar="FOLDER", help="train on it: data.root, with its two archives")
    parser.add_argument(
        "--output", type=Path, default=Path(os.environ.get("OUT", "benchmarks/results")), help="default: $OUT"
    )
    given = parser.parse_args(arguments)
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # else JAX takes three quarters of the GPU's memory
    given.output.mkdir(parents=True, exist_ok=True)
    log = given.output / "gpu_check.log"
    log.unlink(missing_ok=True)
    quieten()
    if _learn2learn.installed():
        _learn2learn.load()  # once for all sections, in seconds
    (seen,) = sections.run(_look, Setting(given.device, given.small, began + given.seconds), log)
    if "failed" in seen:
        print(NO_GPU if seen["failed"] == NO_GPU else f"make gpu-check: the GPU cannot be used: {seen['failed']}")
        return 2
    kind = seen["what"]
    print(kind, flush=True)
    rows: list[Row] = []
    lines: list[str] = []
    failed = 0
    for number, name in enumerate(given.only):
        section, _ = SECTIONS[name]
        shares = [SECTIONS[later][1] for later in given.only[number:]]
        left = began + given.seconds - time.monotonic()
        setting = Setting(given.device, given.small, time.monotonic() + left * shares[0] / sum(shares), given.omniglot)
        print(f"\n## {name}, after {time.monotonic() - began:.0f} s, for at most {setting.left:.0f} s\n", flush=True)
        found: list[Row] = []
        for row in sections.run(section, setting, log):
            found.append(row)
            print(
                " | ".join(f"{key}: {value}" if key != "what" else str(value) for key, value in row.items()), flush=True
            )
            rows.append({"section": name} | row)
            _write(given.output, kind, [*lines, *_table(name, found)], rows)
        failed += sum("failed" in row for row in found)
        lines += _table(name, found)
    print("\n".join(["", *lines, "", f"{len(rows)} rows, {failed} of them failed, {time.monotonic() - began:.0f} s"]))
    print(f"Written to {given.output}")
    return min(failed, 100)


def _look(setting: Setting, tell: Tell) -> None:
    """What is measured on; asked in a process of its own, as one that has touched a GPU cannot be forked."""
    found = setting.device == "cpu" or torch.cuda.is_available()
    tell({"what": machine.description(setting.device)} if found else {"what": "", "failed": NO_GPU})


def _table(name: str, rows: Sequence[Row]) -> list[str]:
    return ["", f"## {name}", "", *markdown(rows)]


def _write(folder: Path, kind: str, lines: Sequence[str], rows: Sequence[Row]) -> None:
    (folder / "gpu_check.md").write_text("\n".join([kind, *lines, ""]))
    (folder / "gpu_check.json").write_text(json.dumps({"machine": kind, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
