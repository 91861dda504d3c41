"""Notebooks that fail, executed for real: each attempt ends with a message and leaves no process running."""
import sys

import nbformat
import psutil
import pytest
from waiting import wait_until

from mlops_nb.jobs.execute import OUTPUT_CAP
from mlops_nb.jobs.process import Supervised
from mlops_nb.jobs.warm import SupervisedFork, Warm

OWN, FORK = "a process of its own", "a fork of a warm process"
USUAL = FORK if sys.platform.startswith("linux") else OWN  # how a job starts its notebooks
WAYS = [pytest.param(way, marks=[] if way == USUAL else pytest.mark.slow) for way in (OWN, FORK)]
linux_only = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux lets a process adopt orphans")


@pytest.fixture(scope="module", params=WAYS)
def start(request):
    "The two ways to start a notebook."
    if request.param == OWN: yield lambda folder, spec: Supervised(folder, spec)
    elif not sys.platform.startswith("linux"): pytest.skip("only Linux has a reliable fork")
    else:
        with Warm(["numpy"], {}) as warm: yield lambda folder, spec: warm.start(folder, spec, {})


@pytest.fixture
def begin(project, start):
    "Start a notebook of these cells under supervision."
    def begin(*cells, timeout_seconds=None, parameters=None):
        project.notebook("n", *cells)
        spec = {"notebook": str(project.root / "nbs/n.ipynb"), "notebook_parameters": parameters or {},
                "timeout_seconds": timeout_seconds}
        return start(project.root / "attempt", spec)
    return begin


def processes_of(folder):
    "The processes of the attempt in this folder: by their environment, or by the log that they have open."
    def is_running(process):
        try:
            belongs = process.environ().get("MLOPS_TASK") == str(folder) or any(
                file.path == str(folder / "log.txt") for file in process.open_files())
            return belongs and process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error: return False
    return [process for process in psutil.process_iter() if is_running(process)]


RUNAWAY = "import subprocess; subprocess.Popen(['setsid', 'sh', '-c', 'sleep 600 & sleep 600']); print('started')"


def test_an_error_names_notebook_cell_and_the_executed_copy(begin, project):
    outcome = begin("x = 1", "def f(): raise KeyError('no such origin')", "f()").wait()
    assert outcome.result_state == "FAILED" and outcome.error_name == "KeyError" and outcome.cell == 3
    assert outcome.message.splitlines() == ["KeyError: 'no such origin'", "  in n.ipynb, cell [3] `f()`",
                                            f"  executed copy: {project.root / 'attempt/notebook.ipynb'}"]
    assert "no such origin" in (project.root / "attempt/notebook.ipynb").read_text()


def test_a_kernel_takes_no_tcp_port_that_another_kernel_may_want(begin):
    outcome = begin("import json, ipykernel; info = json.loads(ipykernel.get_connection_info())",
                    "assert info['transport'] == 'ipc' and info['ip'].startswith(('@mlops-', '/')), info").wait()
    assert outcome.result_state == "SUCCESS", outcome.message


def test_of_an_mlops_error_only_the_message_is_shown(begin):
    outcome = begin("from mlops_nb.errors import MlopsError",
                    "raise MlopsError('no data for 2014-05-01', 'the last day is 2013-12-31')").wait()
    assert outcome.message.startswith("no data for 2014-05-01\n  the last day is 2013-12-31\n  in n.ipynb")


@pytest.mark.slow
@linux_only
def test_a_notebook_that_hangs_is_killed_with_all_its_processes(begin, project):
    outcome = begin(RUNAWAY, "import time; time.sleep(600)", timeout_seconds=6).wait()
    assert outcome.result_state == "TIMEDOUT" and "timed out after 6 s" in outcome.message
    assert processes_of(project.root / "attempt") == []
    assert "started" in (project.root / "attempt/notebook.ipynb").read_text()  # the copy shows how far it came


@linux_only
def test_a_notebook_that_succeeds_leaves_nothing_running_either(begin, project):
    assert begin(RUNAWAY).wait().result_state == "SUCCESS"
    assert processes_of(project.root / "attempt") == []


def test_leaving_half_way_is_a_failure(begin):
    outcome = begin("import sys", "sys.exit(0)", "print('never')").wait()
    assert outcome.result_state == "FAILED" and "1 code cells never ran, from `print('never')` on" in outcome.message


def test_fifty_megabytes_of_output_are_cut(begin, project):
    outcome = begin("for i in range(500): print('x' * 100_000)", "print('the end')").wait()
    copy = project.root / "attempt/notebook.ipynb"
    assert outcome.result_state == "SUCCESS" and copy.stat().st_size < OUTPUT_CAP + 100_000
    assert "output cut here" in copy.read_text()


def test_a_killed_kernel_is_a_failure(begin):
    outcome = begin("import os, signal", "os.kill(os.getpid(), signal.SIGKILL)").wait()
    assert outcome.result_state == "FAILED" and "the kernel of n.ipynb died" in outcome.message


def test_a_killed_supervisor_is_a_failure_and_its_kernel_ends(begin, project):
    running = begin("import time; open('here', 'w').close(); time.sleep(600)")
    wait_until((project.root / "nbs/here").exists)
    processes = processes_of(project.root / "attempt")
    supervisor, = [process for process in processes if process.parent() not in processes]
    supervisor.kill()
    outcome = running.wait()
    assert outcome.result_state == "FAILED" and "wrote no outcome (killed, or out of memory)" in outcome.message
    assert len(processes) > 1 and processes_of(project.root / "attempt") == []  # `wait` has killed the kernel


def test_stop_cancels(begin, project):
    running = begin(RUNAWAY, "import time; open('here', 'w').close(); time.sleep(600)")
    wait_until((project.root / "nbs/here").exists)
    running.stop()
    assert running.wait().result_state == "CANCELED" and processes_of(project.root / "attempt") == []


def test_reports_follow_the_cells(begin):
    reports = []
    begin("1", "2").wait(lambda cell, total: reports.append((cell, total)))
    assert reports == [(1, 2), (2, 2)]


def test_parameters_arrive_typed_whatever_happens_to_the_environment(begin, monkeypatch):
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    outcome = begin("import os; assert days == 28 and 'PYTHONDONTWRITEBYTECODE' not in os.environ",
                    parameters={"days": 28}).wait()
    assert outcome.result_state == "SUCCESS", outcome.message


@pytest.mark.slow
def test_a_warm_process_imports_before_and_between_forks_and_no_two_forks_draw_the_same(project, tmp_path):
    project.notebook("n", "import os, sys, random, numpy",
                     "state = [name in sys.modules for name in ('fractions', 'wave')]",
                     "print(*state, os.environ['COLOUR'], random.random(), numpy.random.rand())")
    spec = {"notebook": str(project.root / "nbs/n.ipynb"), "notebook_parameters": {}, "timeout_seconds": 60}
    def printed(folder) -> list[str]:
        cell = nbformat.read(folder / "notebook.ipynb", as_version=4).cells[-1]
        return cell.outputs[0].text.split()
    with Warm(["fractions", "numpy"], {}, later=["no_such_module", "wave"]) as warm:
        start = warm.starter({"COLOUR": "red"})
        running = [start(tmp_path / "fork0", spec, {})]  # requested while the first modules are imported
        assert running[0].wait().result_state == "SUCCESS"
        running += [start(tmp_path / name, spec, {}) for name in ("fork1", "fork2")]
        assert [notebook.wait().result_state for notebook in running[1:]] == ["SUCCESS"] * 2
    assert all(isinstance(notebook, SupervisedFork) for notebook in running)
    outputs = [printed(tmp_path / name) for name in ("fork0", "fork1", "fork2")]
    assert [output[:3] for output in outputs] == [["True", "False", "red"], *[["True", "True", "red"]] * 2]
    assert len({number for output in outputs for number in output[3:]}) == 6
