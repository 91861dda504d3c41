"""Commands whose output cannot be written: the reader is gone, the disk is full, the terminal is closed."""
import fcntl
import json
import os
import pty
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from waiting import wait_until

from mlops_nb.jobs import run_store
from mlops_nb.jobs.process import Supervised

MLOPS = Path(sys.executable).parent / "mlops"
WAITS = """import pathlib, time
while not pathlib.Path('go').exists(): time.sleep(0.05)"""


def condition(key, *after, right="1"):
    return {"task_key": key, "condition_task": {"left": "1", "op": "EQUAL_TO", "right": right},
            "depends_on": [{"task_key": key_before} for key_before in after]}


@pytest.fixture
def start(project):
    "Start the command in the project's folder; it is killed at the end of the test."
    processes = []

    def start(*arguments, **streams):
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | streams
        processes.append(subprocess.Popen([MLOPS, *arguments], cwd=project.root, text=True, **streams))
        return processes[-1]

    yield start
    for process in processes:
        if process.poll() is None: process.kill()
        for stream in filter(None, (process.stdout, process.stderr)): stream.close()
        process.wait()


@pytest.fixture
def waiting(project):
    "A job whose notebook waits for the file that is returned."
    project.job("job", [condition("first"), {"task_key": "second", "depends_on": [{"task_key": "first"}],
                                             "notebook_task": project.notebook("waits", WAITS)},
                        condition("third", "second")])
    return project.root / "nbs/go"


def recorded(project):
    "The result of the only run, and the results of its tasks."
    store = run_store.RunStore(project.root / ".mlops/runs.db")
    [row] = run_store.list_runs(store)
    return row["result_state"], {key: task["result_state"]
                                 for key, task in run_store.latest_attempts(store, row["run_id"]).items()}


def second_runs(project):
    return (project.root / ".mlops/runs/1/second/0").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [None, signal.SIGTERM])
def test_a_run_whose_reader_is_gone_ends_and_can_be_cancelled(project, start, waiting, number):
    process = start("run", "job")
    assert "run 1 of job job" in process.stdout.readline()
    process.stdout.close()
    wait_until(lambda: second_runs(project))
    if number: process.send_signal(number)
    else: waiting.touch()
    assert process.stderr.read() == "" and process.wait(30) == (1 if number else 0)
    result = "CANCELED" if number else "SUCCESS"
    assert recorded(project) == (result, {"first": "SUCCESS", "second": result, "third": result})


@pytest.mark.slow
def test_a_run_on_a_terminal_that_goes_away_ends(project, start, waiting):
    controller, terminal = pty.openpty()
    process = start("run", "job", stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True,
                    preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0))
    os.close(terminal)
    wait_until(lambda: second_runs(project))
    os.close(controller)  # the system sends SIGHUP, and each write is an error (EIO)
    time.sleep(0.3)  # for the thread of rich that draws the bars ten times a second
    waiting.touch()
    assert process.wait(30) == 0
    assert recorded(project) == ("SUCCESS", {"first": "SUCCESS", "second": "SUCCESS", "third": "SUCCESS"})


@pytest.mark.parametrize("right, code", [("1", 2), pytest.param("x", 1, marks=pytest.mark.slow)])
def test_a_run_on_a_full_disk_says_so_once(project, start, right, code):
    after = {"task_key": "second", "depends_on": [{"task_key": "first"}],
             "condition_task": {"left": "1", "op": "LESS_THAN", "right": f"{right}0"}}
    project.job("job", [condition("first"), after])
    with open("/dev/full", "w") as full: process = start("run", "job", stdout=full)
    _, errors = process.communicate(timeout=60)
    assert errors == "error the output cannot be written: [Errno 28] No space left on device\n"
    assert process.returncode == code  # 1: the run failed
    result = "SUCCESS" if code == 2 else "FAILED"
    assert recorded(project) == (result, {"first": "SUCCESS", "second": result})


def test_a_run_without_standard_streams_ends(project):
    project.job("job", [condition("first")])
    command = subprocess.run(["sh", "-c", f"exec {MLOPS} run job <&- >&- 2>&-"], cwd=project.root, timeout=60)
    assert command.returncode == 0 and recorded(project) == ("SUCCESS", {"first": "SUCCESS"})


def closed_pipe():
    "The writing end of a pipe without a reader."
    read_end, write_end = os.pipe()
    os.close(read_end)
    return write_end


@pytest.mark.parametrize("arguments", [["runs"]] + [pytest.param(arguments, marks=pytest.mark.slow) for arguments in (
    ["--help"], ["jobs"], ["jobs", "show", "job"], ["validate"])], ids=" ".join)
def test_no_command_depends_on_its_reader(project, start, arguments):
    project.job("job", [condition("first")])
    pipe, full = closed_pipe(), os.open("/dev/full", os.O_WRONLY)
    unread, unwritten = start(*arguments, stdout=pipe), start(*arguments, stdout=full)
    for descriptor in (pipe, full): os.close(descriptor)
    assert unread.communicate(timeout=60)[1] == "" and unread.returncode == 0
    message = "error the output cannot be written: [Errno 28] No space left on device\n"
    assert unwritten.communicate(timeout=60)[1] == message and unwritten.returncode == 2


def test_a_closed_standard_error_changes_no_exit_code(start):
    pipe = closed_pipe()
    process = start("run", "jbo", stderr=pipe)
    os.close(pipe)
    assert process.communicate(timeout=60)[0] == "" and process.returncode == 2


@pytest.mark.parametrize("name, result", [pytest.param("prints", "SUCCESS", marks=pytest.mark.slow),
                                          ("missing", "FAILED")])
def test_a_full_log_and_a_runner_that_does_not_read_keep_no_outcome_back(project, name, result):
    project.notebook("prints", "print('a line')")
    folder = project.path("attempt/log.txt").parent
    (folder / "log.txt").symlink_to("/dev/full")
    attempt = Supervised(folder, {"notebook": str(project.root / f"nbs/{name}.ipynb"), "notebook_parameters": {}})
    attempt.process.stdout.close()
    wait_until((folder / "outcome.json").exists, 60)
    outcome = json.loads((folder / "outcome.json").read_text())
    attempt.stop()
    assert outcome["result_state"] == result and attempt.process.wait(20) == 0
    if name == "missing": assert outcome["error_name"] == "FileNotFoundError"


def test_an_attempt_whose_outcome_cannot_be_written_ends(project):
    "Its folder is full or read-only; the threads that wait for the end of the attempt must not keep it alive."
    code = ("import sys, pathlib; from mlops_nb.jobs import execute\n"
            "def full(*_): raise OSError(28, 'No space left on device')\n"
            "execute.write_atomically = full\n"
            "attempt = execute.Attempt(pathlib.Path('.')); attempt.watch(0.2); execute.threading.Event().wait()")
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        try: assert process.wait(30) == 1
        finally: process.kill()
