"""Jobs run by the command `mlops`, with real notebooks: what a person types, sees and does when it breaks."""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest

MLOPS = Path(sys.executable).parent / "mlops"
FINE = "from mlops_nb import task"


@pytest.fixture
def mlops(project):
    "Run the command in the project's folder."
    def mlops(*words, code=0):
        done = subprocess.run([MLOPS, *map(str, words)], cwd=project.root, capture_output=True, text=True, timeout=120,
                              env=os.environ | {"COLUMNS": "200"})
        assert done.returncode == code, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done.stdout + done.stderr
    return mlops


@pytest.fixture
def begin(project):
    "Start the command and leave it running; whatever is left of it is ended with the test."
    started = []
    def begin(*words):
        started.append(subprocess.Popen([MLOPS, *words], cwd=project.root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
        return started[-1]
    yield begin
    for process in started:
        if process.poll() is None: process.kill()
        process.communicate()


def notebook_task(key, notebook, *after, **settings):
    return {"task_key": key, "notebook_task": notebook, "depends_on": [{"task_key": a} for a in after]} | settings


def words(text):
    "The text with its columns closed up."
    return " ".join(text.split())


def of_this_project(project):
    "Processes that work for a run of the project."
    state = str(project.root)
    def mine(p):
        try: return p.environ().get("MLOPS_TASK", "").startswith(state) and p.status() != psutil.STATUS_ZOMBIE
        except psutil.Error: return False
    return [p for p in psutil.process_iter() if mine(p)]


def eventually(what, seconds=30):
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.1)


def test_parameters_values_and_results_go_where_they_should(project, mlops):
    make = project.notebook("make", FINE, "days, note = task.parameters(days=days, note=note)",
                            "assert days == 3 and note == 'job'", "task.set_value('rows', days * 10)", "task.exit(f'{days} days')",
                            parameters="days: int = 1\nnote: str = ''")
    use = project.notebook("use", FINE, "assert (rows, task.get_value('make', 'rows'), tune) == (30, 30, False)",
                           parameters="rows: int = 0\ntune: bool = True")
    project.job("job", [notebook_task("make", make | {"base_parameters": {"note": "task", "days": "3"}}),
                        notebook_task("use", use | {"base_parameters": {"rows": "{{tasks.make.values.rows}}", "tune": "False"}}, "make")],
                parameters=[{"name": "note", "default": "job"}])
    shown = mlops("run", "job")
    assert "make SUCCESS" in words(shown) and "3 days" in shown
    copy = nbformat.read(project.root / ".mlops/runs/1/use/0/notebook.ipynb", 4)
    assert "rows = 30" in "".join(c.source for c in copy.cells)
    assert "SUCCESS" in mlops("runs") and "3 days" in mlops("runs", "show", "1")


@pytest.mark.parametrize("words, answer", [
    (["run", "jbo"], "error no job 'jbo'"), (["run", "job", "-t", "devv"], "error no target 'devv'"),
    (["run", "job", "--param", "asof=1"], "did you mean 'as_of'"), (["run", "job", "--param", "as_of"], "not of the form name=value"),
    (["run", "job", "--only", "onee"], "error no task 'onee'"), (["run", "job", "--var", "catalogue=x"], "did you mean 'catalog'"),
    (["repair", "7"], "error no run '7'"), (["runs", "show", "7"], "error no run '7'"), (["jobs", "show", "jbo"], "error no job 'jbo'")])
def test_a_slip_is_answered_with_what_exists(project, mlops, words, answer):
    project.job("job", [notebook_task("one", project.notebook("one", "1", parameters="as_of: str = 'latest'"))],
                parameters=[{"name": "as_of", "default": "latest"}])
    assert answer in mlops(*words, code=2)
    assert not (project.root / ".mlops/runs").exists()


def test_a_parameter_of_the_wrong_type_is_refused_before_anything_runs(project, mlops):
    project.job("job", [notebook_task("one", project.notebook("one", "1", parameters="days: int = 1"))],
                parameters=[{"name": "days", "default": "1"}])
    assert "parameter 'days' must be int, got 'many'" in mlops("run", "job", "--param", "days=many", code=2)
    assert "no runs yet" in mlops("runs")


def test_a_failed_run_says_where_and_how_to_go_on(project, mlops):
    project.notebook("two", "import pathlib", "assert pathlib.Path('mended').exists(), 'not yet'")
    project.job("job", [notebook_task("one", project.notebook("one", "1")),
                        notebook_task("two", {"notebook_path": "../nbs/two.ipynb"}, "one")])
    shown = mlops("run", "job", code=1)
    assert "AssertionError: not yet" in shown and "two.ipynb, cell [2]" in shown and "mlops repair 1" in shown
    (project.root / "nbs/mended").touch()
    assert "SUCCESS" in mlops("repair", "1")
    assert not (project.root / ".mlops/runs/1/one/1").exists()  # what had succeeded did not run again
    assert "succeeded: nothing to repair" in mlops("repair", "1", code=2)


HANGS_ONCE = "import pathlib, time, os; old = pathlib.Path('begun').exists(); open('begun', 'w').close(); time.sleep(0 if old else 600)"


@pytest.fixture
def hanging(project):
    project.job("job", [notebook_task("one", project.notebook("one", "1")), notebook_task("two", project.notebook("two", HANGS_ONCE), "one")])
    return project.root / "nbs/begun"


def test_a_killed_runner_leaves_a_run_that_says_so_and_can_be_repaired(project, mlops, begin, hanging):
    runner = begin("run", "job")
    eventually(hanging.exists)
    runner.send_signal(signal.SIGKILL)
    eventually(lambda: not of_this_project(project), seconds=10)  # its notebooks end with it
    assert "INTERNAL_ERROR" in mlops("runs") and "`mlops repair 1` finishes it" in mlops("runs")
    shown = mlops("repair", "1")
    assert "two SUCCESS" in words(shown)
    assert not (project.root / ".mlops/runs/1/one/1").exists()


@pytest.mark.slow
def test_ctrl_c_cancels_cleanly(project, mlops, begin, hanging):
    runner = begin("run", "job")
    eventually(hanging.exists)
    began = time.monotonic()
    runner.send_signal(signal.SIGINT)
    shown, _ = runner.communicate(timeout=30)
    assert runner.returncode == 1 and "CANCELED" in shown and time.monotonic() - began < 15
    assert of_this_project(project) == []
    assert "CANCELED" in mlops("runs")
    assert "SUCCESS" in mlops("repair", "1")


@pytest.mark.slow
def test_two_runs_of_one_job_take_turns(project, begin):
    note = "import time; open('times', 'a').write(f'in {time.time()}\\n'); time.sleep(1); open('times', 'a').write(f'out {time.time()}\\n')"
    project.job("job", [notebook_task("one", project.notebook("one", note))])
    both = [begin("run", "job") for _ in range(2)]
    for process in both: assert process.wait(120) == 0, process.stdout.read()
    times = sorted((float(line.split()[1]), line.split()[0]) for line in (project.root / "nbs/times").read_text().splitlines())
    assert [what for _, what in times] == ["in", "out", "in", "out"]


def test_help_is_for_strangers_and_quick_to_import(mlops):
    shown = mlops("--help")
    assert all(word in shown for word in ("run", "runs", "repair", "jobs", "validate", "doctor"))
    heavy = "import sys; import mlops_nb.cli; print([m for m in ('mlflow', 'pandas', 'papermill', 'pyspark', 'databricks') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True).stdout.strip() == "[]"
