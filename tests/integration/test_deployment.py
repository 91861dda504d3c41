"""Deployments of made-up versions: killed at every step, two at once, approved, rolled back, without a registry.

Real versions, promoted, refused and rolled back by jobs, are in test_demo.py."""
import json
import os
import resource
import sqlite3
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
from made_up import NAME, deploy, home, three_versions
from sizes import by_size

from mlops_nb.data.session import get_spark, stop
from mlops_nb.deployment import aliases
from mlops_nb.env import load_env
from mlops_nb.models import registry

pytestmark = pytest.mark.filterwarnings("ignore:.*IProgress not found")
ROOT, HERE = Path(__file__).parents[2], str(Path(__file__).parent)

KILLED = """
import json, os, shutil, sys, traceback
from pathlib import Path
# all imports before the fork
import filelock, mlflow.store.model_registry.sqlalchemy_store, mlflow.store.tracking.sqlalchemy_store
import mlflow.data.meta_dataset, scipy.stats, sklearn.metrics
from matplotlib import pyplot
from made_up import NAME, deploy, home, three_versions
from mlops_nb.deployment import aliases, comparison, promotion
from mlops_nb.models import fingerprint, registry
folder, stride = Path(sys.argv[1]), int(sys.argv[2])
comparison.DRAWS = 20
def empty_figure(*_): return pyplot.figure(figsize=(1, 1))
promotion.plot_losses = promotion.plot_change = empty_figure
def log_file(env): return Path(env.state) / "log.json"
def read_log(spark, env, name): return json.loads(log_file(env).read_text()) if log_file(env).exists() else []
def write_log(spark, env, row):
    rows = {r["move"]: r for r in read_log(None, env, NAME)} | {row["move"]: dict(row)}
    log_file(env).with_suffix(".part").write_text(json.dumps([rows[k] for k in sorted(rows)]))
    log_file(env).with_suffix(".part").replace(log_file(env))
aliases.read_log, aliases.write_log = read_log, write_log

def move(kind, env):
    if kind == "deploy": return deploy(env, None, 2)
    try: return aliases.rollback(None, env, NAME, "warns of everything", to=None)
    except Exception as error: return f"refused: {error}"

def die_before(step):
    import mlflow
    count = iter(range(1000))
    def dying(real):
        def call(*args, **kwargs):
            if next(count) == step: os._exit(9)
            return real(*args, **kwargs)
        return call
    steps = [(aliases, "write_log"), (aliases, "set_alias"), (aliases, "mark_rolled_back"),
             (aliases, "write_marks"), (mlflow, "log_dict"), (fingerprint, "find_run")]
    for module, name in steps: setattr(module, name, dying(getattr(module, name)))
    return count

def current_aliases(env):
    return {alias: aliases.points_to(env, NAME, alias) for alias in ("champion", "challenger", "previous_champion")}

def result(env):
    log = [[r[k] for k in ("move", "alias", "from_version", "to_version", "state")] for r in read_log(None, env, NAME)]
    experiment = registry.experiment_id(env, "late_arrival")
    runs = registry.client(env).search_runs([experiment], "attributes.status = 'FINISHED'")
    version = registry.get_version(env, NAME, 2)
    lines = [line.split(":")[0] for line in (version.description or "").splitlines() if line]
    decision = [version.tags.get(promotion.DECISION, "").split(":")[0], *lines[:2]]
    names = sorted(run.info.run_name for run in runs)
    return {"aliases": current_aliases(env), "log": log, "runs": names, "decision": decision}

def in_process(work):
    "Run the work in a process of its own; its return value, None if it was killed."
    read, write = os.pipe()
    if not (pid := os.fork()):
        try: os.write(write, json.dumps(work()).encode())
        except BaseException: traceback.print_exc()
        finally: os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe: text = pipe.read()
    os.waitpid(pid, 0)
    return json.loads(text) if text else None

def prepare(kind):
    env = home(folder / kind)
    three_versions(env)
    deploy(env, None, 1)
    if kind == "rollback": deploy(env, None, 2)
    return 1

def undisturbed(kind):
    env, count = home(folder / f"{kind}_whole"), die_before(-1)
    summary = move(kind, env)
    steps = next(count)
    return {"steps": steps, "summary": summary} | result(env)

def killed(kind, env, step):
    die_before(step)
    move(kind, env)
    return "was not killed"

def repeated(kind, env): return {"between": current_aliases(env), "summary": move(kind, env)} | result(env)

results = {}
for kind in ("deploy", "rollback"):
    (folder / kind).mkdir()
    assert in_process(lambda: prepare(kind))
    shutil.copytree(folder / kind, folder / f"{kind}_whole")
    results[kind] = {"whole": in_process(lambda: undisturbed(kind)), "kills": []}
    for step in range(0, results[kind]["whole"]["steps"], stride):
        copy = folder / f"{kind}_{step}"
        shutil.copytree(folder / kind, copy)
        env = home(copy)
        assert in_process(lambda: killed(kind, env, step)) is None
        results[kind]["kills"].append(in_process(lambda: repeated(kind, env)))
(folder / "results.json").write_text(json.dumps(results))
"""


def python(code: str, *arguments, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)]
    defaults = {"cwd": ROOT, "env": os.environ | {"PYTHONPATH": HERE}}
    return subprocess.run(command, capture_output=True, text=True, **defaults | options)


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    "A deployment and a rollback: undisturbed, and killed before each of their steps and run again."
    folder = tmp_path_factory.mktemp("killed")
    process = python(KILLED, folder, by_size(1, 3))  # each step, or each third
    assert process.returncode == 0, process.stderr[-3000:]
    return json.loads((folder / "results.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("kind, before, after", [("deploy", 1, 2), ("rollback", 2, 1)])
def test_killed_before_any_step_and_run_again_it_ends_like_an_undisturbed_one(killed, kind, before, after):
    whole, kills = killed[kind]["whole"], killed[kind]["kills"]
    assert whole["aliases"]["champion"] == after and whole["aliases"]["previous_champion"] == before
    assert whole["decision"] == ["promote", "## Deployment", "Promoted"]
    for kill in kills:
        assert kill["between"]["champion"] in (before, after)  # never none
        for key in ("aliases", "log", "runs", "decision"): assert kill[key] == whole[key]
        assert "refused" not in kill["summary"], kill["summary"]
    assert {kill["between"]["champion"] for kill in kills} == {before, after}  # killed on both sides of the switch


RACING = """
import sys, time
from pathlib import Path
from made_up import deploy, home, meet, three_versions
from mlops_nb.data.session import get_spark
folder, number = Path(sys.argv[1]), int(sys.argv[2])
env = home(folder)
spark = get_spark(env)
if number == 2:
    three_versions(env)
    deploy(env, spark, 1)
(folder / f"ready_{number}").touch()
while len(list(folder.glob("ready_*"))) < 2: time.sleep(0.01)
def slow(*versions):
    time.sleep(0.5)
    return meet(*versions)
print(deploy(env, spark, number, slow))
"""


@pytest.fixture(scope="module")
def raced(tmp_path_factory):
    "Version 1 is Champion; 2 and 3 are then deployed by two processes at once, on a real table of moves."
    folder = tmp_path_factory.mktemp("raced")
    options = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen([sys.executable, "-W", "ignore", "-c", RACING, folder, str(number)],
                                  env=os.environ | {"PYTHONPATH": HERE}, **options) for number in (2, 3)]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    env = home(folder)
    stop()
    yield env, get_spark(env), [stdout for stdout, _ in outputs]
    stop()


@pytest.mark.slow
def test_two_deployments_at_once_are_both_recorded_and_replace_only_the_compared_champion(raced):
    env, spark, summaries = raced
    log = aliases.read_log(spark, env, NAME)
    assert [r["move"] for r in log] == list(range(1, len(log) + 1)) and {r["state"] for r in log} == {"done"}
    assert [r["to_version"] for r in log if r["alias"] == "challenger"] in ([1, 2, 3], [1, 3])
    assert {r["to_version"] for r in log} == {1, 2, 3}
    assert aliases.points_to(env, NAME, "challenger") == 3  # the newest version, in either order
    moves = [r for r in log if r["alias"] == "champion"]
    assert [r["from_version"] for r in moves] == [None] + [r["to_version"] for r in moves[:-1]]  # no move is missing
    # the best of the three versions, in either order
    assert aliases.points_to(env, NAME, "champion") == moves[-1]["to_version"] == 2, summaries
    for row in moves: check_run_of_move(env, row)


def check_run_of_move(env, row):
    "The run of a move has its versions, decision, pictures and metrics."
    mlflow = registry.client(env)
    run = mlflow.get_run(row["run_id"])
    tags, metrics = run.data.tags, run.data.metrics
    previous = f"{NAME} v{row['from_version']}" if row["from_version"] else "none"
    assert (tags["challenger"], tags["champion"]) == (f"{NAME} v{row['to_version']}", previous)
    assert tags["decision"] == "promote" and metrics["challenger_log_loss"] > 0
    artifacts = {file.path for file in mlflow.list_artifacts(row["run_id"])}
    assert artifacts == {"change.png", "loss_by_day.png", "rule.json"}
    assert metrics["change_low"] - 1e-9 <= metrics["change"] <= metrics["change_high"] + 1e-9 < 0  # all days are equal


@pytest.fixture(scope="module")
def moved(tmp_path_factory):
    "Version 1 was Champion, version 2 is."
    folder = tmp_path_factory.mktemp("moved")
    env = home(folder)
    stop()
    spark = get_spark(env)
    three_versions(env)
    for number in (1, 2): deploy(env, spark, number)
    yield env, spark
    stop()


@pytest.mark.slow
def test_a_log_without_the_columns_of_later_releases_can_be_continued(moved):
    env, spark = moved
    env = replace(env, schema="older")
    old = aliases.LOG_COLUMNS.removesuffix(", run_id STRING, kind STRING, decision STRING")
    values = [("dev.older.m", 1, "champion", None, 1, "first", "done", "ann", None)]
    aliases.tables.merge(spark, env, aliases.LOG, spark.createDataFrame(values, old), ["model_name", "move"])
    row = dict(model_name="dev.older.m", move=2, alias="champion", from_version=1, to_version=2, reason="r",
               state="done")
    older_rows = aliases.with_kinds(aliases.read_log(spark, env, "dev.older.m"))
    assert [older_row["kind"] for older_row in older_rows] == ["promotion"]
    aliases.write_log(spark, env, row | {"run_id": "4f1c", "kind": aliases.ROLLBACK})
    first, second = aliases.read_log(spark, env, "dev.older.m")
    assert first["run_id"] is None and first["moved_by"] == "ann"
    assert second["run_id"] == "4f1c" and second["moved_by"] != "ann"
    assert (first["kind"], second["kind"], second["decision"]) == (None, aliases.ROLLBACK, None)


def command(state: Path, *arguments, code=0, cwd=ROOT, **variables) -> str:
    "The output of `mlops`, without MLflow variables of other tests."
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    environment |= {"MLOPS_STATE": str(state), "COLUMNS": "200", "PYTHONPATH": str(ROOT)}
    process = python("from mlops_nb.cli import main; main()", *arguments, cwd=cwd, env=environment | variables)
    assert process.returncode == code, process.stdout + process.stderr[-3000:]
    return process.stdout + process.stderr


@pytest.mark.slow
def test_a_rollback_takes_seconds_and_appears_in_the_history(moved):
    env, _ = moved
    def processor_seconds(): return sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    start = processor_seconds()
    output = command(env.state, "rollback", "late_arrival", "--reason", "warns of every [flight]")
    assert processor_seconds() - start < 10
    assert f"{NAME} v1 is Champion again, v2 is out of production: warns of every [flight]" in output
    history = command(env.state, "models", "history", "late_arrival")
    assert "rollback: warns of every [flight]" in history and history.count("champion") >= 3 and "log_loss" in history


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["approve", "late_arrival", "1", "--as", "Ann"],
                                       ["rollback", "late_arrival", "--reason", "r"]])
def test_an_unreachable_registry_is_reported_without_a_traceback(tmp_path, arguments):
    output = command(tmp_path, *arguments, code=2, MLFLOW_TRACKING_URI="http://127.0.0.1:9",
                     MLFLOW_HTTP_REQUEST_MAX_RETRIES="0")
    assert "error no MLflow server answers at http://127.0.0.1:9: " in output and "Traceback" not in output


WAIT = """
from mlops_nb import task
from mlops_nb.deployment import approval
from mlops_nb.models import registry
from mlops_nb.env import load_env
env = load_env('dev')
version = registry.get_version(env, model_name, model_version)
task.exit(approval.require_approved(env, version, 'Approval_Legal'))
"""


def write_notebook(file, text):
    "A notebook with the parameters of a deploy job and one more cell."
    def cell(source, *tags):
        return {"cell_type": "code", "metadata": {"tags": list(tags)}, "source": source, "outputs": [],
                "execution_count": None, "id": str(abs(hash(source)))[:8]}
    cells = [cell('model_name: str = ""\nmodel_version: str = ""', "parameters"), cell(text)]
    kernel = {"name": "python3", "display_name": "p", "language": "python"}
    metadata = {"kernelspec": kernel}
    file.write_text(json.dumps({"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}))


@pytest.fixture
def project(tmp_path):
    "A project whose train job calls a deploy job that waits for an approval."
    write_notebook(tmp_path / "wait.ipynb", WAIT)
    write_notebook(tmp_path / "go.ipynb", "open('went.txt', 'a').write('x')")
    (tmp_path / "databricks.yml").write_text(textwrap.dedent("""
        bundle: {name: waiting}
        variables: {catalog: {default: dev}, schema: {default: flights}}
        targets: {dev: {default: true}}
        resources:
          jobs:
            deploy:
              name: deploy
              parameters: [{name: model_name, default: ""}, {name: model_version, default: ""}]
              tasks:
                - {task_key: Approval_Legal, max_retries: 0, notebook_task: {notebook_path: wait.ipynb}}
                - {task_key: go, depends_on: [{task_key: Approval_Legal}], notebook_task: {notebook_path: go.ipynb}}
            train:
              name: train
              tasks:
                - task_key: deploy
                  run_job_task:
                    job_id: "${resources.jobs.deploy.id}"
                    job_parameters: {model_name: dev.flights.late_arrival, model_version: "1"}
        """))
    state = tmp_path / ".mlops"
    uri = f"sqlite:///{state}/mlflow.db"
    env = replace(load_env("dev", root=tmp_path), state=state, home="local", tracking_uri=uri, registry_uri=uri)
    registry.client(env).create_registered_model(NAME)
    registry.client(env).create_model_version(NAME, source=str(tmp_path), tags={"model_validation_status": "PASSED"})
    return tmp_path


@pytest.mark.slow
def test_an_approval_continues_the_waiting_run_and_the_run_that_called_it(project):
    def mlops(*arguments, code=0): return command(project / ".mlops", *arguments, code=code, cwd=project)
    output = mlops("run", "train", code=3).replace("\n", " ")  # 3: nothing failed, but a person must act
    assert "waits for approval: the tag Approval_Legal is not Approved" in output and "FAILED" not in output
    assert "approve it: mlops approve dev.flights.late_arrival 1 --as \"Your Name\" -t dev" in output
    assert mlops("runs").count("WAITING") == 2
    output = mlops("approve", "late_arrival", "1", "--as", "Ann Smith")
    assert "v1 is approved by Ann Smith" in output and (project / "went.txt").read_text() == "x"
    states = sqlite3.connect(project / ".mlops/runs.db").execute("select result_state from runs").fetchall()
    assert states == [("SUCCESS",)] * 2  # deploy, and train, which called it
    assert "no run waits for this approval" in mlops("approve", "late_arrival", "1", "--as", "Ann Smith")
