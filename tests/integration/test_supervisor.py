"""Notebooks that misbehave, each executed for real: the attempt ends, says why, and leaves no process behind."""
import os
import sys
import time

import nbformat
import psutil
import pytest

from mlops_nb.jobs.execute import OUTPUT_CAP
from mlops_nb.jobs.process import Supervised, writes_to
from mlops_nb.jobs.warm import Copy, Warm

OWN, COPY = "a process of its own", "a copy of a warm process"
USUAL = COPY if sys.platform.startswith("linux") else OWN  # how a job starts its notebooks


@pytest.fixture(scope="module", params=[pytest.param(way, marks=[] if way == USUAL else pytest.mark.slow) for way in (OWN, COPY)])
def start(request):
    "The two ways to start a notebook."
    if request.param == OWN: yield lambda folder, told: Supervised(folder, told)
    elif not sys.platform.startswith("linux"): pytest.skip("only Linux has a fork that can be trusted")
    else:
        with Warm(["numpy"], {}) as warm: yield lambda folder, told: warm.start(folder, told, {})


@pytest.fixture
def begin(project, start):
    "Start a notebook of these cells under supervision."
    def begin(*cells, timeout_seconds=None, parameters=None):
        project.notebook("n", *cells)
        told = {"notebook": str(project.root / "nbs/n.ipynb"), "notebook_parameters": parameters or {},
                "timeout_seconds": timeout_seconds}
        return start(project.root / "attempt", told)
    return begin


def processes_of(folder):
    "Every process that carries the attempt in its environment, or writes to its log."
    def mine(p):
        try:
            ours = p.environ().get("MLOPS_TASK") == str(folder) or writes_to(p, folder / "log.txt")
            return ours and p.status() != psutil.STATUS_ZOMBIE
        except psutil.Error: return False
    return [p for p in psutil.process_iter() if mine(p)]


RUNAWAY = "import subprocess; subprocess.Popen(['setsid', 'sh', '-c', 'sleep 600 & sleep 600']); print('started')"


def test_an_error_names_notebook_cell_and_the_executed_copy(begin, project):
    outcome = begin("x = 1", "def f(): raise KeyError('no such origin')", "f()").wait()
    assert outcome.result_state == "FAILED" and outcome.error_name == "KeyError" and outcome.cell == 3
    assert outcome.message.splitlines() == ["KeyError: 'no such origin'", "  in n.ipynb, cell [3] `f()`",
                                            f"  executed copy: {project.root / 'attempt/notebook.ipynb'}"]
    assert "no such origin" in (project.root / "attempt/notebook.ipynb").read_text()


def test_a_kernel_takes_no_tcp_port_that_another_kernel_may_want(begin):
    outcome = begin("import json, ipykernel; told = json.loads(ipykernel.get_connection_info())",
                    "assert told['transport'] == 'ipc' and told['ip'].startswith(('@mlops-', '/')), told").wait()
    assert outcome.result_state == "SUCCESS", outcome.message


def test_a_users_mistake_is_told_in_its_own_words(begin):
    outcome = begin("from mlops_nb.errors import MlopsError", "raise MlopsError('no data for 2014-05-01', 'the last day is 2013-12-31')").wait()
    assert outcome.message.startswith("no data for 2014-05-01\n  the last day is 2013-12-31\n  in n.ipynb")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux lets a process adopt orphans")
def test_a_notebook_that_hangs_is_ended_with_all_it_started(begin, project):
    outcome = begin(RUNAWAY, "import time; time.sleep(600)", timeout_seconds=6).wait()
    assert outcome.result_state == "TIMEDOUT" and "timed out after 6 s" in outcome.message
    assert processes_of(project.root / "attempt") == []
    assert "started" in (project.root / "attempt/notebook.ipynb").read_text()  # how far it came is kept


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux lets a process adopt orphans")
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


def test_a_killed_kernel_is_a_failure_that_says_so(begin):
    outcome = begin("import os, signal", "os.kill(os.getpid(), signal.SIGKILL)").wait()
    assert outcome.result_state == "FAILED" and "the kernel of n.ipynb died" in outcome.message


def test_a_killed_supervisor_is_a_failure_and_its_kernel_ends(begin, project):
    running = begin("import time; open('here', 'w').close(); time.sleep(600)")
    wait_for(project.root / "nbs/here")
    all_of_it = processes_of(project.root / "attempt")
    supervisor, = [p for p in all_of_it if p.parent() not in all_of_it]
    supervisor.kill()
    outcome = running.wait()
    assert outcome.result_state == "FAILED" and "no word (killed, or out of memory)" in outcome.message
    assert len(all_of_it) > 1 and processes_of(project.root / "attempt") == []  # wait() has ended the kernel already


def test_stop_cancels(begin, project):
    running = begin(RUNAWAY, "import time; open('here', 'w').close(); time.sleep(600)")
    wait_for(project.root / "nbs/here")
    running.stop()
    assert running.wait().result_state == "CANCELED" and processes_of(project.root / "attempt") == []


def test_reports_follow_the_cells(begin):
    seen = []
    begin("1", "2").wait(lambda cell, of: seen.append((cell, of)))
    assert seen == [(1, 2), (2, 2)]


def test_parameters_arrive_typed_whatever_happens_to_the_environment(begin, monkeypatch):
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    outcome = begin("import os; assert days == 28 and 'PYTHONDONTWRITEBYTECODE' not in os.environ", parameters={"days": 28}).wait()
    assert outcome.result_state == "SUCCESS", outcome.message


def wait_for(path, seconds=30):
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.1)
    assert os.path.exists(path)


@pytest.mark.slow
def test_a_warm_process_copies_once_it_has_imported_and_no_two_copies_draw_the_same(project, tmp_path):
    project.notebook("n", "import sys, random, numpy", "print('warm' if 'fractions' in sys.modules else 'cold', random.random(), numpy.random.rand())")
    told = {"notebook": str(project.root / "nbs/n.ipynb"), "notebook_parameters": {}, "timeout_seconds": 60}
    def printed(folder) -> list[str]:
        cell = nbformat.read(folder / "notebook.ipynb", as_version=4).cells[1]
        return cell.outputs[0].text.split()
    with Warm(["fractions", "numpy"], {}) as warm:
        begun = [warm.start_soonest(tmp_path / "at once", told, {})]
        while not warm.has_imported(): time.sleep(0.1)
        begun += [warm.start_soonest(tmp_path / name, told, {}) for name in ("one", "two")]
        assert [run.wait().result_state for run in begun] == ["SUCCESS"] * 3
    assert [isinstance(run, Copy) for run in begun] == [False, True, True]
    first, *copies = [printed(tmp_path / name) for name in ("at once", "one", "two")]
    assert (first[0], *[c[0] for c in copies]) == ("cold", "warm", "warm")
    assert len({number for drawn in (first, *copies) for number in drawn[1:]}) == 6
