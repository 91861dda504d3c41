"""`mlops up` with triggers: a schedule, files and a table start runs; after a kill the schedule goes on."""
import json
import os
import signal
import subprocess
import textwrap
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from states import MLOPS, environment

from mlops_nb.jobs.run_store import RunStore

DATABRICKS = """
bundle: {name: small}
variables:
  catalog: {default: "${bundle.target}"}
  schema: {default: sales}
  read: {type: complex, default: ["${bundle.target}"]}
  write: {type: complex, default: ["${bundle.target}"]}
targets:
  dev: {default: true}
resources:
  jobs:
"""
NOTEBOOK = "text: str = ''\n"


def cron(expression: str) -> dict: return {"quartz_cron_expression": expression, "timezone_id": "UTC"}


def job(key: str, text: str, **declared) -> str:
    task = {"task_key": "a", "notebook_task": {"notebook_path": "a.ipynb"}}
    settings = {"tasks": [task], "parameters": [{"name": "text", "default": text}]} | declared
    return f"    {key}: {json.dumps(settings)}\n"


def write_project(folder: Path, *jobs: str) -> None:
    cell = {"cell_type": "code", "id": "a", "metadata": {"tags": ["parameters"]}, "source": NOTEBOOK, "outputs": [],
            "execution_count": None}
    notebook = {"cells": [cell], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    (folder / "a.ipynb").write_text(json.dumps(notebook))
    (folder / "databricks.yml").write_text(textwrap.dedent(DATABRICKS) + "".join(jobs))
    (folder / ".git").exists() or subprocess.run(["git", "init", "-q", folder], check=True)


@contextmanager
def workspace(project: Path, state: Path):
    "Run `mlops up` with its scheduler; what it prints is in up.log."
    with (state.parent / "up.log").open("ab") as output:
        server = subprocess.Popen([MLOPS, "up"], cwd=project, stdout=output, stderr=output, stdin=subprocess.DEVNULL,
                                  env=environment(state) | {"MLOPS_SCHEDULER": "1"}, start_new_session=True)
    try:
        wait(lambda: (state / "workspace/workspace.json").exists() or server.poll() is not None, 60)
        assert server.poll() is None, (state.parent / "up.log").read_text()
        yield server
    finally:
        if server.poll() is None: server.terminate()
        server.wait(60)


def wait(holds, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.1)


def commit(state: Path, version: int) -> None:
    log = state / "lakehouse/dev/sales/orders/_delta_log"
    log.mkdir(parents=True, exist_ok=True)
    (log / f"{version:020d}.json").write_text('{"add": {"path": "x", "dataChange": true}}')


@pytest.mark.slow
def test_a_schedule_files_and_a_table_start_runs_and_a_killed_workspace_goes_on(tmp_path):
    project, state = tmp_path / "project", tmp_path / "state"
    for folder in (project, state): folder.mkdir()
    commit(state, 0)
    write_project(
        project, job("often", "{{job.trigger.type}}", schedule=cron("0/5 * * * * ?"), max_concurrent_runs=20),
        job("load", "{{job.trigger.file_arrival.location}}",
            trigger={"file_arrival": {"url": "/Volumes/dev/sales/in/"}}),
        job("report", "{{job.trigger.table_update.updated_tables}}",
            trigger={"table_update": {"table_names": ["dev.sales.orders"]}}),
        job("wrong", "", schedule=cron("0 0 25 * * ?")))
    store = RunStore(state / "runs.db")
    def runs(key): return store.rows("select * from runs where job = ? order by run_id", key)
    def texts(key): return [json.loads(run["parameters"])["text"] for run in runs(key)]
    with workspace(project, state) as server:
        wait(lambda: "scheduled, times in UTC" in (tmp_path / "up.log").read_text(), 20)
        printed = (tmp_path / "up.log").read_text()
        assert "job often (dev), cron 0/5 * * * * ? (UTC): next " in printed
        assert "job wrong (dev)" in printed and "is not a valid hour" in printed
        wait(lambda: len(runs("often")) >= 2, 60)
        volume = state / "workspace/volumes/dev/sales/in"
        volume.mkdir(parents=True)
        (volume / "april.csv").write_text("1")
        commit(state, 1)
        wait(lambda: runs("load") and runs("report"), 60)
        wait(lambda: [runs(key)[0]["result_state"] for key in ("load", "report")] == ["SUCCESS"] * 2, 90)
        os.kill(server.pid, signal.SIGKILL)
        server.wait(20)
    (state / "workspace/workspace.json").unlink()
    assert texts("load") == ["/Volumes/dev/sales/in/"] and texts("report") == ['["dev.sales.orders"]']
    before = len(runs("often"))
    time.sleep(11)  # two fire times are missed
    with workspace(project, state): wait(lambda: len(runs("often")) >= before + 3, 60)
    fired = [run["trigger_time"] for run in runs("often")]
    assert len(fired) == len(set(fired)) and all(time % 5000 == 0 for time in fired)
    assert max(later - earlier for earlier, later in zip(fired, fired[1:], strict=False)) >= 10_000  # no flood after it
    assert set(texts("often")) == {"PERIODIC"} and len(runs("load")) == len(runs("report")) == 1
    shown = subprocess.run([MLOPS, "jobs", "schedule"], cwd=project, env=environment(state), capture_output=True,
                           text=True, check=True).stdout
    assert f"run {runs('load')[0]['run_id']}" in shown and "no scheduler runs" in shown
