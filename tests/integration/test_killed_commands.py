"""Runs killed by SIGKILL at their writes to the run store: nothing stays RUNNING or in the temporary folder."""
import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from sizes import by_size

from mlops_nb.jobs import run_store

HELPER = Path(__file__).parent / "killed_commands.py"
CONDITION = {"condition_task": {"op": "EQUAL_TO", "left": "1", "right": "1"}}


def make_jobs(project):
    "A job with a condition, a loop, a called job and a notebook that prints."
    loop = {"inputs": "[1, 2]", "task": {"task_key": "inner", **CONDITION}}
    project.job("called", [{"task_key": "one", **CONDITION}])
    project.job("job", [
        {"task_key": "first", **CONDITION},
        {"task_key": "loop", "for_each_task": loop, "depends_on": [{"task_key": "first"}]},
        {"task_key": "call", "run_job_task": {"job_id": "${resources.jobs.called.id}"},
         "depends_on": [{"task_key": "loop"}]},
        {"task_key": "last", "notebook_task": project.notebook("last", "print(1)"),
         "depends_on": [{"task_key": "call"}]}])


def execute(project, temporary, kills, repair_every):
    "Run the helper and return its observations, one for each kill."
    temporary.mkdir()
    environment = os.environ | {"TMPDIR": str(temporary), "COLUMNS": "200"}
    process = subprocess.run([sys.executable, HELPER, json.dumps(kills), str(repair_every)], cwd=project.root,
                             env=environment, capture_output=True, text=True, timeout=170)
    assert process.returncode == 0, process.stdout + process.stderr
    return [json.loads(line) for line in process.stdout.splitlines() if line.startswith("{")]


def check(project, temporary, observations, kills):
    assert [observation["signal"] for observation in observations] == [9] * len(kills)
    store = run_store.RunStore(Path(project.root, ".mlops/runs.db"))
    runs = run_store.list_runs(store, limit=1000)
    assert not [run for run in runs if run["life_cycle_state"] in run_store.ACTIVE]
    for run in runs:
        for task in run_store.list_tasks(store, run["run_id"]):
            assert task["life_cycle_state"] in ("TERMINATED", "INTERNAL_ERROR") and task["result_state"], task
    repaired = [observation for observation in observations if observation["repaired"] is not None]
    assert repaired and {observation["repaired"] for observation in repaired} == {0}
    for observation in repaired:
        run_id = observation["run_id"]
        assert run_store.get_run(store, run_id)["result_state"] == "SUCCESS"
        rows = store.rows("select * from tasks where run_id = ?", run_id)
        assert {row["life_cycle_state"] for row in rows} == {"TERMINATED"}
        assert all(row["end_time"] for row in rows)
    assert list(temporary.iterdir()) == []
    database = Path(project.root, ".mlops/runs.db")
    assert not Path(f"{database}-wal").exists()  # a copy of the file alone is whole
    assert sqlite3.connect(database).execute("pragma integrity_check").fetchone() == ("ok",)
    wide = [path for path in Path(project.root, ".mlops/runs").rglob("*") if path.stat().st_mode & 0o077]
    assert wide == [] and database.stat().st_mode & 0o077 == 0


@pytest.mark.slow
def test_runs_killed_at_any_write_can_be_repaired(project, tmp_path):
    make_jobs(project)
    kills = list(range(2, 26, by_size(1, 4)))  # the first connection records the run
    check(project, tmp_path / "t", execute(project, tmp_path / "t", kills, by_size(8, 3)), kills)
