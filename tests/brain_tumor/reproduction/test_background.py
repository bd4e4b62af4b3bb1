"""Trainings in the background stand still while something else is timed, and go on afterwards."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
STATES = Path("/proc/self/stat")
pytestmark = pytest.mark.skipif(not STATES.exists(), reason="the states of processes are in /proc")

# Writes its own and a child's number and waits: the child is what a training's process is.
PARENT = """
import os, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
print(os.getpid(), child.pid, flush=True)
child.wait()
"""


def start(action, *command, home):
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "examples.brain_tumor.reproduction.background",
            action,
            "--",
            *command,
        ],
        cwd=ROOT,
        env={**os.environ, "HOME": str(home)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        # A shell's background jobs ignore interrupts, and would hand that on.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def state(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return "gone"


def sleeps(pid):
    """How often a process has slept till now: `run` does after each look at the lock."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("\nvoluntary_ctxt_switches:")[2].split()[0])


def wait_until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def training(tmp_path):
    process = start("run", sys.executable, "-c", PARENT, home=tmp_path)
    pids = [int(pid) for pid in process.stdout.readline().split()]
    yield process, pids
    for pid in pids:
        if state(pid) != "gone":
            os.kill(pid, signal.SIGKILL)
    process.communicate()


def test_all_its_processes_stand_still_while_any_other_pauses(training, tmp_path):
    process, pids = training
    assert all(os.getpriority(os.PRIO_PROCESS, pid) == 19 for pid in pids)
    wait = [sys.executable, "-c", "input()"]
    first, second = (start("pause", *wait, home=tmp_path) for _ in range(2))
    wait_until(lambda: [state(pid) for pid in pids] == ["T", "T"])
    first.communicate("\n")
    looks = sleeps(process.pid)
    wait_until(lambda: sleeps(process.pid) >= looks + 5)  # the second still holds the lock
    assert [state(pid) for pid in pids] == ["T", "T"]
    second.kill()  # its lock goes with it
    second.communicate()
    wait_until(lambda: "T" not in [state(pid) for pid in pids])


def test_a_pause_has_its_commands_exit_code(tmp_path):
    process = start("pause", sys.executable, "-c", "raise SystemExit(3)", home=tmp_path)
    process.communicate()
    assert process.returncode == 3


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_an_ended_run_takes_its_command_along(training, how):
    process, pids = training
    process.send_signal(how)
    wait_until(lambda: all(state(pid) in ("gone", "Z") for pid in pids))


def test_usage(tmp_path):
    process = start("stop", "x", home=tmp_path)
    process.communicate()
    assert process.returncode == 2


@pytest.mark.skipif(not Path("/proc/self/autogroup").exists(), reason="sessions are no groups here")
def test_a_training_is_at_the_lowest_priority_among_sessions_too(training):
    _, pids = training
    for pid in pids:
        wait_until(lambda pid=pid: "nice 19" in Path(f"/proc/{pid}/autogroup").read_text())
