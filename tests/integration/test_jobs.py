"""Jobs run by the command `mlops`, with real notebooks: input, output, failures and repairs."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest
from waiting import wait_until

from mlops_nb.commands import runs as runs_commands
from mlops_nb.errors import MlopsError
from mlops_nb.jobs import beginning, run_store, runner

MLOPS = Path(sys.executable).parent / "mlops"
IMPORT_TASK = "from mlops_nb import task"


@pytest.fixture
def mlops(project):
    "Run the command in the project's folder."
    def mlops(*arguments, code=0):
        result = subprocess.run([MLOPS, *map(str, arguments)], cwd=project.root, capture_output=True, text=True,
                                timeout=120, env=os.environ | {"COLUMNS": "200"})
        assert result.returncode == code, result.stdout + result.stderr
        assert "Traceback" not in result.stderr
        return result.stdout + result.stderr
    return mlops


@pytest.fixture
def begin(project):
    "Start the command and leave it running; it is killed at the end of the test."
    started = []
    def begin(*arguments):
        process = subprocess.Popen([MLOPS, *arguments], cwd=project.root, stdout=subprocess.PIPE,
                                   stderr=subprocess.STDOUT, text=True)
        started.append(process)
        return process
    yield begin
    for process in started:
        if process.poll() is None: process.kill()
        process.communicate()


def notebook_task(key, notebook, *after, **settings):
    return {"task_key": key, "notebook_task": notebook, "depends_on": [{"task_key": a} for a in after]} | settings


def without_spacing(text):
    "The text with single spaces."
    return " ".join(text.split())


def processes_of(project):
    "The processes that work for a run of the project."
    root = str(project.root)
    def belongs_to_project(process):
        try:
            is_running = process.status() != psutil.STATUS_ZOMBIE
            return is_running and process.environ().get("MLOPS_TASK", "").startswith(root)
        except psutil.Error: return False
    return [process for process in psutil.process_iter() if belongs_to_project(process)]


def test_parameters_values_and_results_go_where_they_should(project, mlops):
    make = project.notebook("make", IMPORT_TASK, "days, note = task.parameters(days=days, note=note)",
                            "assert days == 3 and note == 'job'", "task.set_value('rows', days * 10)",
                            "task.exit(f'{days} days')", parameters="days: int = 1\nnote: str = ''")
    use = project.notebook("use", IMPORT_TASK, "assert (rows, task.get_value('make', 'rows'), tune) == (30, 30, False)",
                           parameters="rows: int = 0\ntune: bool = True")
    make["base_parameters"] = {"note": "task", "days": "3"}
    use["base_parameters"] = {"rows": "{{tasks.make.values.rows}}", "tune": "False"}
    project.job("job", [notebook_task("make", make), notebook_task("use", use, "make")],
                parameters=[{"name": "note", "default": "job"}])
    output = mlops("run", "job")
    assert "make SUCCESS" in without_spacing(output) and "3 days" in output
    copy = nbformat.read(project.root / ".mlops/runs/1/use/0/notebook.ipynb", 4)
    assert "rows = 30" in "".join(c.source for c in copy.cells)
    assert "SUCCESS" in mlops("runs") and "3 days" in mlops("runs", "show", "1")


@pytest.mark.parametrize("arguments, message", [
    (["run", "jbo"], "error no job 'jbo'"), (["run", "job", "-t", "devv"], "error no target 'devv'"),
    (["run", "job", "--param", "asof=1"], "did you mean 'as_of'"),
    (["run", "job", "--param", "as_of"], "not of the form name=value"),
    (["run", "job", "--only", "onee"], "error no task 'onee'"),
    (["run", "job", "--var", "catalogue=x"], "did you mean 'catalog'"),
    (["repair", "7"], "error no run '7'"), (["runs", "show", "7"], "error no run '7'"),
    (["jobs", "show", "jbo"], "error no job 'jbo'")])
def test_a_wrong_name_is_an_error_with_the_existing_names(project, mlops, arguments, message):
    project.job("job", [notebook_task("one", project.notebook("one", "1", parameters="as_of: str = 'latest'"))],
                parameters=[{"name": "as_of", "default": "latest"}])
    assert message in mlops(*arguments, code=2)
    assert not (project.root / ".mlops/runs").exists()


def test_a_parameter_of_the_wrong_type_is_refused_before_anything_runs(project, mlops):
    project.job("job", [notebook_task("one", project.notebook("one", "1", parameters="days: int = 1"))],
                parameters=[{"name": "days", "default": "1"}])
    assert "parameter 'days' must be int, got 'many'" in mlops("run", "job", "--param", "days=many", code=2)
    assert "no runs yet" in mlops("runs")


def test_a_failed_run_shows_the_cell_and_the_command_to_continue(project, mlops):
    project.notebook("two", "import pathlib", "assert pathlib.Path('fixed').exists(), 'not yet'")
    project.job("job", [notebook_task("one", project.notebook("one", "1")),
                        notebook_task("two", {"notebook_path": "../nbs/two.ipynb"}, "one")])
    output = mlops("run", "job", code=1)
    assert "AssertionError: not yet" in output and "two.ipynb, cell [2]" in output and "mlops repair 1" in output
    (project.root / "nbs/fixed").touch()
    assert "SUCCESS" in mlops("repair", "1")
    assert not (project.root / ".mlops/runs/1/one/1").exists()  # a task that has succeeded does not run again
    assert "succeeded: nothing to repair" in mlops("repair", "1", code=2)


HANGS_ONCE = """import pathlib, time
marker = pathlib.Path('begun')
seconds = 0 if marker.exists() else 600
marker.touch()
time.sleep(seconds)"""


@pytest.fixture
def hanging(project):
    project.job("job", [notebook_task("one", project.notebook("one", "1")),
                        notebook_task("two", project.notebook("two", HANGS_ONCE), "one")])
    return project.root / "nbs/begun"


@pytest.mark.slow
def test_the_run_of_a_killed_runner_is_shown_as_failed_and_can_be_repaired(project, mlops, begin, hanging):
    runner = begin("run", "job")
    wait_until(hanging.exists)
    runner.send_signal(signal.SIGKILL)
    wait_until(lambda: not processes_of(project), seconds=10)  # its notebooks end with it
    assert "INTERNAL_ERROR" in mlops("runs") and "`mlops repair 1` continues the run" in mlops("runs")
    assert "two SUCCESS" in without_spacing(mlops("repair", "1"))
    assert not (project.root / ".mlops/runs/1/one/1").exists()


@pytest.mark.slow
def test_a_run_of_a_removed_target_is_shown_and_can_be_cancelled(project, mlops):
    condition = {"left": "1", "op": "EQUAL_TO", "right": "1"}
    project.job("job", [{"task_key": "one", "condition_task": condition}])
    mlops("run", "job", "-t", "prod")
    bundle = project.root / "databricks.yml"
    bundle.write_text(bundle.read_text().replace("prod: {}", "other: {}"))
    assert "one SUCCESS" in without_spacing(mlops("runs", "show", "1"))
    store = run_store.RunStore(project.root / ".mlops/runs.db")
    run_store.update_run(store, 1, life_cycle_state="RUNNING", result_state=None, owner="of a later version")
    assert "cannot read ('of a later version')" in without_spacing(mlops("runs"))
    assert "mlops runs cancel 1 --force" in mlops("runs", "cancel", "1", code=2)
    assert "run 1 is recorded as CANCELED" in mlops("runs", "cancel", "1", "--force")


def test_a_run_without_a_temporary_folder_says_so_and_is_recorded_as_failed(project, monkeypatch):
    project.job("job", [notebook_task("one", project.notebook("one", "1"))])
    def full(**_): raise OSError(28, "No space left on device")
    monkeypatch.setattr("tempfile.mkdtemp", full)
    home = project.home()
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # the handlers of this process stay
    with pytest.raises(MlopsError, match="run 1 of job 'job' could not begin: .*No space left"):
        runs_commands.run_to_end(beginning.begin_run(home, "job", {}))
    row = run_store.get_run(home.store, 1)
    assert (row["life_cycle_state"], row["result_state"]) == ("INTERNAL_ERROR", "FAILED")
    assert row["end_time"] and "No space left" in row["state_message"]


@pytest.mark.slow
def test_ctrl_c_cancels_cleanly(project, mlops, begin, hanging):
    runner = begin("run", "job")
    wait_until(hanging.exists)
    began = time.monotonic()
    runner.send_signal(signal.SIGINT)
    output, _ = runner.communicate(timeout=30)
    assert runner.returncode == 130 and "CANCELED" in output and time.monotonic() - began < 15
    assert processes_of(project) == []
    assert "CANCELED" in mlops("runs")
    assert "SUCCESS" in mlops("repair", "1")


@pytest.mark.slow
def test_two_runs_of_one_job_take_turns(project, begin):
    source = """import time
def note(event):
    with open('times', 'a') as file: file.write(f'{time.time()} {event}\\n')
note('in')
time.sleep(1)
note('out')"""
    project.job("job", [notebook_task("one", project.notebook("one", source))])
    processes = [begin("run", "job") for _ in range(2)]
    for process in processes: assert process.wait(120) == 0, process.stdout.read()
    lines = [line.split() for line in (project.root / "nbs/times").read_text().splitlines()]
    lines.sort(key=lambda line: float(line[0]))
    assert [event for _, event in lines] == ["in", "out", "in", "out"]


def tagged_notebook(project, name, *cells):
    "Write a notebook of cells that are given as (kind, source, tags)."
    content = []
    for number, (kind, source, *tags) in enumerate(cells):
        outputs = {"execution_count": None, "outputs": []} if kind == "code" else {}
        content.append({"cell_type": kind, "id": f"c{number}", "metadata": {"tags": tags}, "source": source} | outputs)
    notebook = {"cells": content, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    project.path(f"nbs/{name}.ipynb").write_text(json.dumps(notebook))
    return {"notebook_path": f"../nbs/{name}.ipynb"}


def test_cells_that_nbclient_skips_or_lets_fail_do_not_fail_a_task(project, mlops):
    """The last executed cell is the one that papermill injects; the cells after it are all skipped."""
    make = tagged_notebook(project, "make", ("code", "x = 1"), ("code", "1 / 0", "skip-execution"), ("raw", "1 / 0"),
                           ("code", "  "), ("code", "# a comment"), ("code", "undefined", "raises-exception"),
                           ("code", "print('last cell ran', x)"), ("code", "days: int = 1", "parameters"),
                           ("code", "1 / 0", "skip-execution"), ("markdown", "the end"))
    make["base_parameters"] = {"days": "3"}
    project.job("daily.train", [notebook_task("make", make, max_retrys=1)])
    for output in (mlops("validate"), mlops("run", "daily.train")):
        assert "warning: resources.jobs.daily.train.tasks[0].max_retrys: no field 'max_retrys' in Task" in output
        assert "did you mean 'max_retries'?" in output and "warning: resources.jobs.daily.train: no reference" in output
    assert "make SUCCESS" in without_spacing(output)
    cells = nbformat.read(project.root / ".mlops/runs/1/make/0/notebook.ipynb", 4).cells
    counts = {cell.source: cell.execution_count for cell in cells if cell.get("execution_count")}
    assert list(counts.values()) == [1, 2, 3, 4, 5, 6] and "days = 3" in list(counts)[-1]
    assert "last cell ran 1" in str(cells) and "NameError" in str(cells) and "ZeroDivisionError" not in str(cells)


def test_validate_prints_errors_and_warnings_and_a_run_with_errors_starts_nothing(project, mlops):
    project.job("job", [notebook_task("../../../outside/a", project.notebook("one", "1"), max_retrys=1)])
    for arguments, code in ((["validate"], 1), (["run", "job"], 2)):
        output = mlops(*arguments, code=code)
        assert "task_key: '../../../outside/a' is not a valid task_key" in output and "warning: " in output
    assert not (project.root / ".mlops/runs").exists() and not (project.root / "outside").exists()


def test_help_lists_the_commands_and_the_command_line_imports_nothing_heavy(mlops):
    output = mlops("--help")
    assert all(command in output for command in ("run", "runs", "repair", "jobs", "validate", "doctor"))
    code = ("import sys; import mlops_nb.commands.app; "
            "heavy = {'mlflow', 'pandas', 'papermill', 'pyspark', 'databricks'}; "
            "print(sorted(heavy & set(sys.modules)))")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


SECRETS = {"MLOPS_SECRET_MAIL_TOKEN": "value-of-the-token-71", "MLOPS_SECRET_ONLINE_POSTGRES": "value-of-postgres-72",
           "MLOPS_SECRET_OTHER_KEY": "value-of-the-other-73"}
# pragma: allowlist nextline secret
CREDENTIALS = SECRETS | {"MLOPS_SMTP": "smtp://me:value-of-smtp-74@host", "AWS_SECRET_ACCESS_KEY": "of-storage"}
SHOWS_ENVIRONMENT = """import json, os
from pathlib import Path
names = [name for name in os.environ if name.startswith('MLOPS_SECRET_')] + ['MLOPS_SMTP', 'AWS_SECRET_ACCESS_KEY']
proc = [Path(f'/proc/{pid}/environ') for pid in ('self', os.getppid())]
initial = ''.join(file.read_text() for file in proc) if proc[0].exists() else ''
seen = {'values': {name: os.environ.get(name) for name in names}, 'initial': initial}
Path(f'seen_{task.context()["job"]}.json').write_text(json.dumps(seen))"""


@pytest.fixture(params=[pytest.param("own process", marks=pytest.mark.slow), "fork"])
def secret_run(request, project, monkeypatch):
    "Run a job with a runner that has all credentials; returns what the notebook of each job saw, and the run."
    for name, value in CREDENTIALS.items(): monkeypatch.setenv(name, value)
    monkeypatch.setenv("MLOPS_ONLINE_STORE", "postgresql://me@host/db?password=secrets/online/postgres")
    if request.param == "fork" and not sys.platform.startswith("linux"): pytest.skip("only Linux has a reliable fork")

    def run(job):
        from mlops_nb.jobs import beginning, warm
        home = project.home()
        with warm.Warm([], home.notebook_environment) as warm_process:
            if request.param == "fork": home.start = warm_process.start
            pid = warm_process.process.pid if warm_process.process else None
            job_run = beginning.begin_run(home, job, {})
            runner.finish_run(job_run)
            if pid: assert "value-of" not in Path(f"/proc/{pid}/environ").read_text()
        files = project.root.glob("nbs/seen_*.json")
        return {file.stem.removeprefix("seen_"): json.loads(file.read_text()) for file in files}, job_run
    return run


def secrets_of(seen): return {name for name in seen["values"] if name.startswith("MLOPS_SECRET_")}


def test_a_notebook_gets_only_the_secrets_that_its_job_names_and_no_file_of_the_run_has_a_value(project, secret_run):
    parameters = "token: str = ''\nonline_store: str = ''"
    show = project.notebook("show", IMPORT_TASK, SHOWS_ENVIRONMENT, parameters=parameters)
    use = project.notebook("use", IMPORT_TASK, "assert task.secret(token) == task.secret('secrets/mail/token')",
                           "assert len(task.secret(token)) == 21", parameters="token: str = ''")
    refused = project.notebook("refused", IMPORT_TASK, "task.secret('secrets/mail/token')")
    own = [{"name": "token", "default": "{{secrets/mail/token}}"}]
    project.job("named", [notebook_task("show", show), notebook_task("use", use, "show")], parameters=own)
    project.job("store", [notebook_task("show", show)], parameters=[{"name": "online_store", "default": ""}])
    project.job("unnamed", [notebook_task("show", show), notebook_task("refused", refused, "show")])
    calls = [{"task_key": key, "run_job_task": {"job_id": f"${{resources.jobs.{key}.id}}"}}
             for key in ("named", "store", "unnamed")]
    project.job("all", calls)
    seen, job_run = secret_run("all")
    assert {job: secrets_of(values) for job, values in seen.items()} == {
        "named": {"MLOPS_SECRET_MAIL_TOKEN"}, "store": {"MLOPS_SECRET_ONLINE_POSTGRES"}, "unnamed": set()}
    assert seen["named"]["values"]["MLOPS_SECRET_MAIL_TOKEN"] == SECRETS["MLOPS_SECRET_MAIL_TOKEN"]
    for values in seen.values():
        assert values["values"]["MLOPS_SMTP"] is None and values["values"]["AWS_SECRET_ACCESS_KEY"] == "of-storage"
        assert "value-of-the-other" not in values["initial"] and "value-of-smtp" not in values["initial"]
    assert "value-of" not in seen["unnamed"]["initial"]
    message = job_run.record.row["state_message"]
    assert "job 'unnamed' does not name this secret: secrets/mail/token" in message and "task 'named'" not in message
    for file in (project.root / ".mlops").rglob("*"):
        if file.is_file(): assert b"value-of" not in file.read_bytes(), file


@pytest.mark.slow
@pytest.mark.parametrize("lost", [pytest.param(".mlops", marks=pytest.mark.full), ".mlops/runs"])
def test_a_state_that_is_removed_while_a_notebook_runs(project, begin, lost):
    slow = project.notebook("slow", "open('here', 'w').close()\nimport time\ntime.sleep(2 if RUNS else 600)",
                            parameters=f"RUNS = {lost.endswith('runs')}")
    project.job("job", [notebook_task("slow", slow), notebook_task("later", project.notebook("any", "1"), "slow")])
    process, deadline = begin("run", "job"), time.monotonic() + 60
    while not (project.root / "nbs/here").exists(): assert time.monotonic() < deadline and process.poll() is None
    shutil.rmtree(project.root / lost)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == (1 if lost == ".mlops/runs" else 2) and "Traceback" not in output, output
    whole = [f"the state folder {project.root / lost}", f"the run store {project.root / lost}/runs.db"]  # removed first
    named = {".mlops": whole, ".mlops/runs": [f"its folder {project.root / lost}"]}[lost]
    assert any(text in output for text in named) and "was removed while it" in output, output
    assert (project.root / ".mlops/runs.db").exists() == (lost == ".mlops/runs")
    while remaining := processes_of(project): assert time.monotonic() < deadline + 60, remaining
