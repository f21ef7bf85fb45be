"""One server forks workers, studies' trainings and tests: what it promises whoever has processes forked."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path

import pytest

from dmaml_pl.launching import server
from dmaml_pl.launching.server import Server, own, started
from dmaml_pl.studies import local
from tests.workers import ends


@pytest.fixture
def light() -> Server:
    """A server that has imported nothing."""
    return started(os.getpid)


def _write(path: str) -> int:
    Path(path).write_text(f"{os.environ['WORD']} {Path.cwd()}")
    return 7


def test_a_forked_process_has_the_folder_of_the_one_that_asked_the_environment_it_was_given_and_its_own_exit_code(
    light: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path / "folder")
    process = light.fork({"WORD": "given"}, partial(_write, "written"))
    assert process.wait(60) == process.poll() == process.returncode == 7
    assert Path("written").read_text() == f"given {tmp_path / 'folder'}"


def test_several_run_at_once_and_each_tells_when_and_how_it_has_ended(light: Server) -> None:
    first, second = (light.fork(dict(os.environ), signal.pause) for _ in range(2))
    assert first.pid != second.pid
    assert (first.poll(), second.poll()) == (None, None)
    second.send_signal(signal.SIGTERM)
    assert wait([first.sentinel, second.sentinel], 60) == [second.sentinel]
    assert second.poll() == -signal.SIGTERM
    assert first.poll() is None
    first.kill()
    assert first.wait(60) == -signal.SIGKILL
    first.kill()  # nobody any more


def test_ctrl_c_and_sigterm_to_a_whole_group_leave_the_server_to_the_end_of_the_process_that_asks(
    light: Server,
) -> None:
    assert light.fork(dict(os.environ), os.getpgrp).wait(60) is not None  # it is past its start
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(light._pid, number)
    assert light.fork(dict(os.environ), partial(int, 0)).wait(60) == 0


def test_a_forked_process_knows_its_rank_although_lightning_was_imported_before(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path; from pytorch_lightning.utilities import rank_zero_only;"
        f"Path({str(tmp_path / 'rank')!r}).write_text(str(rank_zero_only.rank))"
    )
    assert local.server().fork({**os.environ, "RANK": "3"}, partial(exec, code)).wait(200) == 0
    assert (tmp_path / "rank").read_text() == "3"


def test_a_signal_reaches_a_process_from_its_first_moment(light: Server) -> None:
    for _ in range(20):
        process = light.fork(dict(os.environ), signal.pause)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == -signal.SIGTERM


def test_a_signal_handler_can_signal_a_process_that_the_main_thread_waits_for(light: Server) -> None:
    process = light.fork(dict(os.environ), signal.pause)
    before = signal.signal(signal.SIGALRM, lambda *_: process.send_signal(signal.SIGTERM))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        assert process.wait(60) == -signal.SIGTERM
    finally:
        signal.signal(signal.SIGALRM, before)


# -- where a process goes on as several ----------------------------------------------------------------------------


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a program that has the server at hand, and needs no PyTorch."""
    return subprocess.run(
        [
            sys.executable,
            "-c",
            f"import functools, os, signal, sys, threading, types\nfrom dmaml_pl.launching import server\n{code}",
        ],
        env={name: value for name, value in os.environ.items() if name not in LAUNCHED} | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


LAUNCHED = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "WORLD_SIZE")

WORKERS = """
told = 'worker'
server.stand_by()
if rank := os.environ.get('LOCAL_RANK'):
    os.write(1, f'{told} {rank}\\n'.encode())
    sys.exit(int(rank))
workers = [server.own().fork({**os.environ, 'LOCAL_RANK': str(rank)}) for rank in (1, 2)]
print([worker.wait() for worker in workers])
"""


def test_workers_go_on_where_the_first_stands_by_with_what_it_has_done_and_their_output_and_exit_codes_come_back() -> (
    None
):
    done = python(WORKERS)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["[1, 2]", "worker 1", "worker 2"]
    assert done.stderr == ""


@pytest.mark.parametrize("name", LAUNCHED)
def test_a_process_that_somebody_started_as_a_worker_has_no_server(name: str) -> None:
    assert python("server.stand_by(); print(server.own())", **{name: "0"}).stdout == "None\n"


def test_a_process_with_threads_has_no_server_as_they_would_be_missing_there() -> None:
    thread = "threading.Thread(target=threading.Event().wait, daemon=True).start();"
    assert python(f"{thread} server.stand_by(); print(server.own())").stdout == "None\n"


def test_a_process_that_uses_a_gpu_has_no_server_as_a_fork_of_it_could_not() -> None:
    torch = "sys.modules['torch'] = types.SimpleNamespace(cuda=types.SimpleNamespace(is_initialized=lambda: True));"
    assert python(f"{torch} server.stand_by(); print(server.own())").stdout == "None\n"


def test_only_the_front_door_has_one() -> None:
    assert own() is None


def test_a_training_of_one_worker_keeps_none(light: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    # Not above: the light server imports this file.
    from pytorch_lightning.plugins.environments import LightningEnvironment

    from dmaml_pl.launching.workers import WorkerLauncher

    monkeypatch.setattr(os, "environ", dict(os.environ))
    needless = Server(light._control, light.fork({**os.environ}, signal.pause).pid)
    monkeypatch.setattr(server, "_own", [needless])
    assert WorkerLauncher(LightningEnvironment(), 1, 1).launch(lambda: "trained") == "trained"
    assert ends(needless._pid, within_s=60)


STANDING_BY = """
server.stand_by()
if 'LOCAL_RANK' in os.environ:
    os.close(1), os.close(2)  # whose end is the end of the program that is waited for
    signal.pause()
process = server.own().fork({**os.environ, 'LOCAL_RANK': '1'})
os.write(1, str(process.pid).encode())
"""
STARTED = """
process = server.started(os.getpid).fork(dict(os.environ), signal.pause)
os.write(1, str(process.pid).encode())
"""
KILLED = "os.kill(os.getpid(), signal.SIGKILL)"


@pytest.mark.parametrize("code", [STANDING_BY, STARTED])
def test_what_was_forked_ends_with_a_process_that_is_killed(code: str) -> None:
    done = python(code + KILLED)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert ends(int(done.stdout), within_s=60)


ENDS_WELL = """
import os, signal

def end(*_):
    open('ended well', 'w').close()
    os._exit(0)

signal.signal(signal.SIGTERM, end)
open('ready', 'w').close()
signal.pause()
"""


def test_what_was_forked_may_end_in_good_order_when_the_process_that_asked_is_killed() -> None:
    os.mkfifo("ready")
    done = python(f"""
process = server.started(os.getpid).fork(dict(os.environ), functools.partial(exec, {ENDS_WELL!r}, {{}}))
os.write(1, str(process.pid).encode())
open('ready').close()
{KILLED}""")
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert ends(int(done.stdout), within_s=60)
    assert Path("ended well").exists()


def test_workers_end_by_themselves_when_the_first_has_ended_in_good_order() -> None:
    done = python(STANDING_BY)
    assert done.returncode == 0, done.stderr
    worker = int(done.stdout)
    assert not ends(worker, within_s=0)
    os.kill(worker, signal.SIGKILL)


def test_an_error_of_the_call_is_told_as_python_tells_it() -> None:
    done = python("print(server.started(os.getpid).fork(dict(os.environ), functools.partial(int, 'none')).wait())")
    assert done.stdout == "1\n"
    assert done.stderr.endswith("ValueError: invalid literal for int() with base 10: 'none'\n")


# -- the end of a process ------------------------------------------------------------------------------------------

LEFT = """
import atexit
from dmaml_pl.launching.leaving import leave

def late():
    threading.main_thread().join(0.01)
    print('the thread has ended')

def call():
    global kept
    kept = open('kept', 'w')
    kept.write('what was left open')
    atexit.register(print, 'registered')
    threading.Thread(target=late).start()
    return {}

leave(call)
"""


@pytest.mark.parametrize(
    ("returned", "code", "said"),
    [("None", 0, ""), ("3", 3, ""), ("sys.exit(4)", 4, ""), ("sys.exit('no')", 1, "no\n")],
)
def test_a_process_that_leaves_gives_its_exit_code_and_waits_calls_and_writes_all_that_python_would(
    returned: str, code: int, said: str
) -> None:
    done = python(LEFT.format(returned))
    assert (done.returncode, done.stderr) == (code, said)
    assert done.stdout == "the thread has ended\nregistered\n"
    assert Path("kept").read_text() == "what was left open"


def test_a_process_that_leaves_with_an_error_tells_it_as_python_does() -> None:
    done = python(LEFT.format("int('none')"))
    assert done.returncode == 1
    assert done.stderr.endswith("ValueError: invalid literal for int() with base 10: 'none'\n")
