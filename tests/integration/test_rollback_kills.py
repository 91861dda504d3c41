"""Rollbacks and undone rollbacks, each killed with SIGKILL at every write, and run again.

The registry is MLflow's SQLite store and the log a real Delta table. Each kill has a model of its own, in one store."""
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from sizes import by_size

ROOT, HERE = Path(__file__).parents[2], str(Path(__file__).parent)

# Seven writes; after a write is the same as before the next one, except for threads that still work
STEPS = by_size([*((step, "before") for step in range(7)), (0, "after"), (1, "after"), (6, "after")],
                [(1, "before"), (2, "before"), (4, "before"), (6, "after")])

SERVER = """
import sys
from pathlib import Path
from made_up import home
from mlops_nb.data.session import start_sail
server = start_sail(home(Path(sys.argv[1])))
print("sc://%s:%s" % server.listening_address, flush=True)
sys.stdin.read()  # until the test closes it
server.stop()
"""

KILLS = """
import itertools, json, os, signal, sys, traceback
from pathlib import Path
# all imports before the first fork; the engine is a process of its own, so this process has no threads
import filelock, mlflow, mlflow.store.model_registry.sqlalchemy_store, mlflow.store.tracking.sqlalchemy_store
import pyspark.sql.connect.session
from made_up import home
from mlops_nb.data.session import get_spark
from mlops_nb.deployment import aliases
from mlops_nb.models import registry
env = home(Path(sys.argv[1]))
ALIASES = ("champion", "previous_champion", "challenger")
METHODS = ("set_registered_model_alias", "set_model_version_tag", "delete_model_version_tag", "update_model_version")

def prepare(names):
    "Models of three versions, the second Champion, with their moves in the log; those of kind undo are rolled back."
    spark, rows = get_spark(env), []
    for name in names:
        client = registry.client(env)
        client.create_registered_model(name)
        for _ in range(3):
            client.create_model_version(name, source=str(env.state), tags={"model_validation_status": "PASSED"},
                                        description="It forecasts.")
        moves = [(None, 1, "better", "promotion"), (1, 2, "better", "promotion")]
        if "undo" in name: moves.append((2, 1, "rollback: storms", "rollback"))
        for move, (old, new, reason, kind) in enumerate(moves, 1):
            rows.append((name, move, "champion", old, new, reason, "done", "ann", None, None, kind, None))
        for alias, version in zip(ALIASES, (new, old, 2)): client.set_registered_model_alias(name, alias, str(version))
        row = dict(model_name=name, from_version=old, to_version=new, reason=reason, kind=kind)
        if kind == "rollback": aliases.mark_rolled_back(env, row)
    log = spark.createDataFrame(rows, aliases.LOG_COLUMNS)
    aliases.tables.merge(spark, env, aliases.LOG, log, ["model_name", "move"])
    return True

def command(name):
    if "undo" in name: return aliases.rollback(get_spark(env), env, name, "the storms are over", to=2)
    return aliases.rollback(get_spark(env), env, name, "storms")

def count_writes(step=None, effect="before"):
    "Count the writes; kill this process before or after one of them."
    count = itertools.count()
    def counted(real):
        def call(*args, **kwargs):
            is_last = next(count) == step
            if is_last and effect == "before": os.kill(os.getpid(), signal.SIGKILL)
            result = real(*args, **kwargs)
            if is_last: os.kill(os.getpid(), signal.SIGKILL)
            return result
        return call
    aliases.write_log = counted(aliases.write_log)
    for method in METHODS: setattr(mlflow.MlflowClient, method, counted(getattr(mlflow.MlflowClient, method)))
    return count

def state(name):
    versions = [registry.get_version(env, name, number) for number in (1, 2, 3)]
    columns = ("move", "alias", "from_version", "to_version", "reason", "state", "kind", "decision")
    log = [[row[column] for column in columns] for row in aliases.read_log(get_spark(env), env, name)]
    return {"aliases": {alias: aliases.points_to(env, name, alias) for alias in ALIASES}, "log": log,
            "versions": [[version.tags, version.description] for version in versions]}

def undisturbed(name):
    count = count_writes()
    command(name)
    return {"writes": next(count), **state(name)}

def repeat(names):
    "The states after the same command again; it is refused where only the last write had been done."
    states = []
    for name in names:
        try: summary = command(name)
        except Exception as error: summary = f"refused: {error}"
        states.append({"summary": summary, **state(name)})
    return states

def in_process(work, *arguments):
    "The result of work in a forked process, and the process's exit status."
    read, write = os.pipe()
    if not (pid := os.fork()):
        try: os.write(write, json.dumps(work(*arguments)).encode())
        except BaseException: traceback.print_exc()
        finally: os._exit(1)
    os.close(write)
    with os.fdopen(read) as pipe: text = pipe.read()
    status = os.waitpid(pid, 0)[1]
    return json.loads(text) if text else None, status

def killed(name, step, effect):
    count_writes(step, effect)
    command(name)
    return "was not killed"

KINDS = ("rollback", "undo")
steps = json.loads(sys.argv[2])
names = {kind: [f"dev.flights.{kind}_{step}_{effect}" for step, effect in steps] for kind in KINDS}
whole_names = {kind: f"dev.flights.{kind}_whole" for kind in KINDS}
assert in_process(prepare, [*itertools.chain(*names.values()), *whole_names.values()])[0]
results = {}
for kind in KINDS:
    whole = in_process(undisturbed, whole_names[kind])[0]
    statuses = [in_process(killed, name, *step)[1] for name, step in zip(names[kind], steps)]
    results[kind] = {"whole": whole, "statuses": statuses, "repeated": in_process(repeat, names[kind])[0]}
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def kills(tmp_path_factory):
    "The undisturbed state, the exit statuses of the killed processes, and the states after the same command again."
    folder = tmp_path_factory.mktemp("rollbacks")
    environment = os.environ | {"PYTHONPATH": HERE}
    start = [sys.executable, "-W", "ignore", "-c"]
    server = subprocess.Popen([*start, SERVER, folder], cwd=ROOT, env=environment, stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE, text=True)
    try:
        address = server.stdout.readline().strip()
        process = subprocess.run([*start, KILLS, folder, json.dumps(STEPS)], cwd=ROOT, capture_output=True, text=True,
                                 env=environment | {"SPARK_REMOTE": address}, timeout=300)
    finally: server.communicate()
    assert process.returncode == 0, process.stderr[-3000:]
    return json.loads(process.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("kind, champion, tags", [("rollback", 1, [None, "storms"]), ("undo", 2, [None, None])])
def test_killed_at_any_write_and_run_again_it_ends_like_an_undisturbed_one(kills, kind, champion, tags):
    whole, statuses, repeated = (kills[kind][key] for key in ("whole", "statuses", "repeated"))
    assert whole["writes"] == 7 and whole["aliases"]["champion"] == champion
    assert [version[0].get("rolled_back") for version in whole["versions"][:2]] == tags
    assert [os.WTERMSIG(status) for status in statuses] == [signal.SIGKILL] * len(STEPS)
    for result in repeated:
        for key in ("aliases", "versions", "log"): assert result[key] == whole[key], result["summary"]
    for (step, moment), result in zip(STEPS, repeated, strict=True):
        had_moved = (step, moment) == (1, "after") or 1 < step < 7 and moment == "before"  # write 1 is the move
        assert ("an interrupted rollback is finished" in result["summary"]) == had_moved
        assert ("refused" in result["summary"]) == ((step, moment) == (6, "after"))  # after the last write
