"""Deployments of made-up versions: killed at every step, two at once, approved, rolled back, and a registry that is down.

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
import filelock, mlflow.store.model_registry.sqlalchemy_store, mlflow.store.tracking.sqlalchemy_store, mlflow.data.meta_dataset, scipy.stats, sklearn.metrics
from matplotlib import pyplot  # all of it before the processes part
from made_up import NAME, deploy, home, three_versions
from mlops_nb.deployment import aliases as deployment, comparison, promotion
from mlops_nb.models import fingerprint, registry
folder, stride = Path(sys.argv[1]), int(sys.argv[2])
comparison.DRAWS = 20
for name in ("plot_losses", "plot_change"): setattr(promotion, name, lambda *given: pyplot.figure(figsize=(1, 1)))
def log_file(env): return Path(env.state) / "log.json"
def read_log(spark, env, name): return json.loads(log_file(env).read_text()) if log_file(env).exists() else []
def write_log(spark, env, row):
    rows = {r["move"]: r for r in read_log(None, env, NAME)} | {row["move"]: dict(row)}
    log_file(env).with_suffix(".part").write_text(json.dumps([rows[k] for k in sorted(rows)]))
    log_file(env).with_suffix(".part").replace(log_file(env))
deployment.read_log, deployment.write_log = read_log, write_log

def wanted(what, env):
    if what == "deploy": return deploy(env, None, 2)
    try: return deployment.rollback(None, env, NAME, "warns of everything", to=None)
    except Exception as error: return f"refused: {error}"

def die_before(step):
    import mlflow
    count = iter(range(1000))
    def dying(real):
        def call(*given, **named):
            if next(count) == step: os._exit(9)
            return real(*given, **named)
        return call
    for where, name in [(deployment, "write_log"), (deployment, "set_alias"), (deployment, "mark_rolled_back"), (promotion, "record"),
                        (mlflow, "log_dict"), (fingerprint, "find_run")]: setattr(where, name, dying(getattr(where, name)))
    return count

def aliases(env): return {a: deployment.points_to(env, NAME, a) for a in ("champion", "challenger", "previous_champion")}

def look(env):
    log = [[r[k] for k in ("move", "alias", "from_version", "to_version", "state")] for r in read_log(None, env, NAME)]
    runs = registry.client(env).search_runs([registry.experiment_id(env, "late_arrival")], "attributes.status = 'FINISHED'")
    said = registry.get_version(env, NAME, 2)
    decided = [said.tags.get(promotion.DECISION, "").split(":")[0], *[line.split(":")[0] for line in (said.description or "").splitlines() if line][:2]]
    return {"aliases": aliases(env), "log": log, "runs": sorted(r.info.run_name for r in runs), "decided": decided}

def apart(work):
    "The work in a process of its own; what it returns, None if it was killed."
    read, write = os.pipe()
    if not (pid := os.fork()):
        try: os.write(write, json.dumps(work()).encode())
        except BaseException: traceback.print_exc()
        finally: os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe: text = pipe.read()
    os.waitpid(pid, 0)
    return json.loads(text) if text else None

def prepare(what):
    env = home(folder / what)
    three_versions(env)
    deploy(env, None, 1)
    if what == "rollback": deploy(env, None, 2)
    return 1

def undisturbed(what):
    env, count = home(folder / f"{what}_whole"), die_before(-1)
    said = wanted(what, env)
    steps = next(count)
    return {"steps": steps, "said": said} | look(env)

def killed(what, env, step):
    die_before(step)
    wanted(what, env)
    return "was not killed"

found = {}
for what in ("deploy", "rollback"):
    (folder / what).mkdir()
    assert apart(lambda: prepare(what))
    shutil.copytree(folder / what, folder / f"{what}_whole")
    found[what] = {"whole": apart(lambda: undisturbed(what)), "kills": []}
    for step in range(0, found[what]["whole"]["steps"], stride):
        place = folder / f"{what}_{step}"
        shutil.copytree(folder / what, place)
        env = home(place)
        assert apart(lambda: killed(what, env, step)) is None
        found[what]["kills"].append(apart(lambda: {"between": aliases(env), "said": wanted(what, env)} | look(env)))
(folder / "found.json").write_text(json.dumps(found))
"""


def python(code: str, *words, **more) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-W", "ignore", "-c", code, *map(str, words)], capture_output=True, text=True,
                          **{"cwd": ROOT, "env": os.environ | {"PYTHONPATH": HERE}, **more})


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    "Each of two moves, undisturbed and killed before each of its steps, and then done again."
    folder = tmp_path_factory.mktemp("killed")
    done = python(KILLED, folder, by_size(1, 3))  # each step, or each third
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "found.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("what, before, after", [("deploy", 1, 2), ("rollback", 2, 1)])
def test_killed_before_any_step_and_run_again_it_ends_like_an_undisturbed_one(killed, what, before, after):
    whole, kills = killed[what]["whole"], killed[what]["kills"]
    assert whole["aliases"]["champion"] == after and whole["aliases"]["previous_champion"] == before
    assert whole["decided"] == ["promote", "## Deployment", "Promoted"]
    for kill in kills:
        assert kill["between"]["champion"] in (before, after)  # never none
        assert {k: kill[k] for k in ("aliases", "log", "runs", "decided")} == {k: whole[k] for k in ("aliases", "log", "runs", "decided")}
        assert "refused" not in kill["said"], kill["said"]
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
    both = [subprocess.Popen([sys.executable, "-W", "ignore", "-c", RACING, folder, str(n)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                             env=os.environ | {"PYTHONPATH": HERE}) for n in (2, 3)]
    said = [p.communicate(timeout=120) for p in both]
    assert [p.returncode for p in both] == [0, 0], said
    env = home(folder)
    stop()
    yield env, get_spark(env), [out for out, _ in said]
    stop()


@pytest.mark.slow
def test_of_two_deployments_at_once_none_is_lost_and_none_displaces_whom_it_did_not_meet(raced):
    env, spark, said = raced
    log = aliases.read_log(spark, env, NAME)
    assert [r["move"] for r in log] == list(range(1, len(log) + 1)) and {r["state"] for r in log} == {"done"}
    assert [r["to_version"] for r in log if r["alias"] == "challenger"] in ([1, 2, 3], [1, 3]) and {r["to_version"] for r in log} == {1, 2, 3}
    assert aliases.points_to(env, NAME, "challenger") == 3  # the newest, whoever came first
    moves = [r for r in log if r["alias"] == "champion"]
    assert [r["from_version"] for r in moves] == [None] + [r["to_version"] for r in moves[:-1]]  # nobody was overlooked
    assert aliases.points_to(env, NAME, "champion") == moves[-1]["to_version"] == 2, said  # the best of the three, whoever came first
    for r in moves:
        run = registry.client(env).get_run(r["run_id"])
        met = f"{NAME} v{r['from_version']}" if r["from_version"] else "none"
        assert (run.data.tags["challenger"], run.data.tags["champion"]) == (f"{NAME} v{r['to_version']}", met) and run.data.tags["decision"] == "promote"
        assert {f.path for f in registry.client(env).list_artifacts(r["run_id"])} == {"change.png", "loss_by_day.png", "rule.json"}
        assert run.data.metrics["change_low"] <= run.data.metrics["change"] <= run.data.metrics["change_high"] < 0 and run.data.metrics["challenger_log_loss"] > 0


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
def test_a_log_from_before_there_were_runs_goes_on(moved):
    env, spark = moved
    env = replace(env, schema="older")
    old = aliases.LOG_COLUMNS.removesuffix(", run_id STRING")
    values = [("dev.older.m", 1, "champion", None, 1, "first", "done", "ann", None)]
    aliases.tables.merge(spark, env, aliases.LOG, spark.createDataFrame(values, old), ["model_name", "move"])
    aliases.write_log(spark, env, dict(model_name="dev.older.m", move=2, alias="champion", from_version=1, to_version=2, reason="r", state="done", run_id="4f1c"))
    assert [(r["run_id"], r["moved_by"] == "ann") for r in aliases.read_log(spark, env, "dev.older.m")] == [(None, True), ("4f1c", False)]


def command(state: Path, *words, code=0, cwd=ROOT, **more) -> str:
    "What `mlops` prints, in an environment in which no other test has named a store."
    own = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")} | {"MLOPS_STATE": str(state), "COLUMNS": "200", "PYTHONPATH": str(ROOT)}
    done = python("from mlops_nb.cli import main; main()", *words, cwd=cwd, env=own | more)
    assert done.returncode == code, done.stdout + done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.mark.slow
def test_the_command_goes_back_in_seconds_and_the_history_tells_of_it(moved):
    env, _ = moved
    used = lambda: sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    began = used()
    said = command(env.state, "rollback", "late_arrival", "--reason", "warns of every [flight]")
    assert used() - began < 10, "seconds of a processor: on an idle machine the command takes no longer"
    assert f"{NAME} v1 is Champion again, v2 is out of production: warns of every [flight]" in said
    history = command(env.state, "models", "history", "late_arrival")
    assert "rollback: warns of every [flight]" in history and history.count("champion") >= 3 and "log_loss" in history


@pytest.mark.slow
@pytest.mark.parametrize("words", [["approve", "late_arrival", "1", "--as", "Ann"], ["rollback", "late_arrival", "--reason", "r"]])
def test_a_registry_that_is_down_is_said_in_a_sentence(tmp_path, words):
    said = command(tmp_path, *words, code=2, MLFLOW_TRACKING_URI="http://127.0.0.1:9", MLFLOW_HTTP_REQUEST_MAX_RETRIES="0")
    assert "error the registry at http://127.0.0.1:9 does not answer as it should" in said and "Traceback" not in said


@pytest.fixture
def project(tmp_path):
    "A project whose train job calls a deploy job that waits for a person."
    cell = lambda text, *tags: {"cell_type": "code", "metadata": {"tags": list(tags)}, "source": text, "outputs": [], "execution_count": None, "id": str(abs(hash(text)))[:8]}
    def notebook(name, text):
        cells = [cell('model_name: str = ""\nmodel_version: str = ""', "parameters"), cell(text)]
        (tmp_path / f"{name}.ipynb").write_text(json.dumps({"cells": cells, "metadata": {"kernelspec": {"name": "python3", "display_name": "p", "language": "python"}},
                                                            "nbformat": 4, "nbformat_minor": 5}))
    notebook("wait", "from mlops_nb import task\nfrom mlops_nb.deployment import approval\nfrom mlops_nb.models import registry\nfrom mlops_nb.env import load_env\nenv = load_env('dev')\n"
                     "task.exit(approval.require_approved(env, registry.get_version(env, model_name, model_version), 'Approval_Legal'))")
    notebook("go", "open('went.txt', 'a').write('x')")
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
                  run_job_task: {job_id: "${resources.jobs.deploy.id}", job_parameters: {model_name: dev.flights.late_arrival, model_version: "1"}}
        """))
    state = tmp_path / ".mlops"
    uri = f"sqlite:///{state}/mlflow.db"
    env = replace(load_env("dev", root=tmp_path), state=state, home="local", tracking_uri=uri, registry_uri=uri)
    registry.client(env).create_registered_model(NAME)
    registry.client(env).create_model_version(NAME, source=str(tmp_path), tags={"model_validation_status": "PASSED"})
    return tmp_path


@pytest.mark.slow
def test_an_approval_goes_on_with_the_run_that_waits_and_with_the_one_that_called_it(project):
    run = lambda *words, code=0: command(project / ".mlops", *words, code=code, cwd=project)
    assert "waits for approval: the tag Approval_Legal is not Approved" in run("run", "train", code=1).replace("\n", " ")
    said = run("approve", "late_arrival", "1", "--as", "Ann Smith")
    assert "v1 is approved by Ann Smith" in said and (project / "went.txt").read_text() == "x"
    states = sqlite3.connect(project / ".mlops/runs.db").execute("select result_state from runs").fetchall()
    assert states == [("SUCCESS",)] * 2  # deploy, and train which had called it
    assert "no run waits for it" in run("approve", "late_arrival", "1", "--as", "Ann Smith")
