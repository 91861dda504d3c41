"""The table of infrastructure metrics: against pandas, written once, changed by late requests, without its sources."""
import shutil
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import numpy as np
import pandas as pd
import pytest

from mlops_nb.data import tables
from mlops_nb.data.lakehouse import location
from mlops_nb.jobs import run_store
from mlops_nb.monitoring.infrastructure import as_infrastructure
from mlops_nb.serving.payload_table import PAYLOAD_SCHEMA
from mlops_nb.workflow import infrastructure_step
from mlops_nb.workflow.infrastructure_step import InfrastructureStep, write_infrastructure

UNTIL = (datetime.now(UTC) + timedelta(hours=5)).replace(minute=20, second=0, microsecond=0)  # after all commits
LAST_HOUR = pd.Timestamp(UNTIL).floor("h") - pd.Timedelta(hours=1)
WATCHED = [{"table": "watched", "time_column": "seen"}, {"table": "missing"},
           {"table": "late_payload", "time_column": "typo"}]
SETTINGS = as_infrastructure({"granularities": ["1 hour"], "tables": WATCHED, "thresholds": [
    {"source": "endpoint", "metric": "latency_p95_ms", "at_most": 20, "min_count": 5},
    {"source": "job", "metric": "duration_max_s", "at_most": 60}]})


def add_requests(spark, env, hours: np.ndarray, rng, prefix: str) -> pd.DataFrame:
    "Write requests so many hours before UNTIL, and return what was written."
    count = len(hours)
    moments = [UNTIL - timedelta(hours=float(hour)) for hour in hours]
    frame = pd.DataFrame({"time": moments, "ms": rng.gamma(2, 5, count).astype(int), "status": rng.choice(
        [200, 200, 200, 200, 404, 503], count), "fraction": rng.choice([1.0, 0.5], count)})
    rows = [(f"{prefix}{i}", row.time.date(), None, row.time.to_pydatetime(), int(row.status), row.fraction,
             int(row.ms), "{}", "{}", [], "e", "ada") for i, row in enumerate(frame.itertuples())]
    tables.merge(spark, env, "late_payload", spark.createDataFrame(rows, PAYLOAD_SCHEMA), ["databricks_request_id"])
    return frame


def add_run(store, key: str, minutes_ago: float, seconds: float, result: str) -> None:
    number = run_store.record_run(store, key, "dev", {}, ["a"])
    end = int((UNTIL - timedelta(minutes=minutes_ago)).timestamp() * 1000)
    start = end - int(seconds * 1000)
    run_store.save_task(store, number, "a", 0, start_time=start + 1000, end_time=end, result_state=result)
    run_store.update_run(store, number, life_cycle_state="TERMINATED", result_state=result, start_time=start,
                         end_time=end)


def read_rows(step, kind: str) -> pd.DataFrame:
    rows = tables.read(step.spark, step.env, "infrastructure_metrics").where(f"source_kind = '{kind}'")
    frame = rows.orderBy("window_start", "metric").toPandas()
    return frame.assign(window_start=pd.to_datetime(frame.window_start, utc=True), requests=frame["count"])


def expected_of(frame: pd.DataFrame) -> dict:
    "The metrics of each hour with a request, by pandas."
    values = {}
    for hour, rows in frame.groupby(pd.to_datetime(frame.time, utc=True).dt.floor("h")):
        if hour >= pd.Timestamp(UNTIL).floor("h"): continue
        weight, answered = 1 / rows.fraction, rows.ms[rows.status == 200]
        measured = {"requests_per_second": weight.sum() / 3600,
                    "error_rate": weight[rows.status == 503].sum() / weight.sum(),
                    "client_error_rate": weight[rows.status == 404].sum() / weight.sum()}
        if len(answered): measured |= {f"latency_p{share}_ms": np.percentile(answered, share) for share in (50, 95, 99)}
        values |= {(hour, metric): value for metric, value in measured.items()}
    return values


def check_requests(step, frame: pd.DataFrame) -> pd.DataFrame:  # the rows of the endpoint
    "Compare the rows of the windows with requests."
    rows, expected = read_rows(step, "endpoint"), expected_of(frame)
    measured = {(row.window_start, row.metric): row.value for row in rows.itertuples() if row.requests > 0}
    assert measured.keys() == expected.keys()
    assert all(np.isclose(measured[key], value, rtol=1e-9, atol=1e-12) for key, value in expected.items())
    return rows


@pytest.fixture
def step(home, tmp_path):
    spark, env = home
    return InfrastructureStep(spark, replace(env, state=tmp_path), SETTINGS, UNTIL)


def again(step, **changes) -> InfrastructureStep:
    return replace(step, notes=[], written=0, **changes)


def test_the_windows_are_those_of_pandas_written_once_and_changed_by_late_requests(step):
    spark, env, rng = step.spark, step.env, np.random.default_rng(5)
    first = add_requests(spark, env, rng.uniform(0, 30, 150), rng, "a")
    times = [(UNTIL - timedelta(hours=hours),) for hours in (40, 3, 0.1)]
    tables.merge(spark, env, "watched", spark.createDataFrame(times, "seen TIMESTAMP"), ["seen"])
    store = run_store.RunStore(env.state / "runs.db")
    for details in (("train", 90, 70, "SUCCESS"), ("train", 95, 10, "FAILED"), ("score", 200, 5, "SUCCESS"),
                    ("score", 5, 5, "SUCCESS")):  # the last one is in the hour that has not ended
        add_run(store, *details)
    text = write_infrastructure(step).data
    assert "there is no table dev.flights.missing yet" in text and "column 'typo' of dev.flights.late_payload" in text
    rows = check_requests(step, first)
    assert set(rows.name) == {"late"} and rows.window_start.max() == LAST_HOUR
    judged = rows[rows.metric == "latency_p95_ms"]
    assert judged.violated.dropna().astype(bool).tolist() == (judged.value > 20)[judged.requests >= 5].tolist()
    jobs = read_rows(step, "job").set_index(["name", "metric"])
    assert jobs.value["train", "duration_max_s"] == 70 and jobs.violated["train", "duration_max_s"]
    assert jobs.value["train", "failure_rate"] == 0.5 and jobs.value["train", "queue_max_s"] == 1
    assert ("score", "failure_rate") in jobs.index and len(jobs) == 8
    assert set(read_rows(step, "task").name) == {"train/a", "score/a"}
    table = read_rows(step, "table")
    assert table[table.metric == "row_age_hours"].value.tolist() == [pytest.approx(3 - 20 / 60)]

    repeated = again(step)
    write_infrastructure(repeated)
    assert repeated.written == 0
    late = add_requests(spark, env, np.array([2.5, 2.6, 20.0]), rng, "b")
    later = again(step)
    write_infrastructure(later)
    both = check_requests(later, pd.concat([first, late])).merge(rows, "left", ["window_start", "metric"])
    hours = set(both.window_start[both.value_x != both.value_y])
    assert hours == set(pd.to_datetime(late.time, utc=True).dt.floor("h")) and later.written > 0
    assert len(infrastructure_step.violations_of(later)) > 0


def test_system_tables_that_cannot_be_read_are_a_note(step):
    class Session:
        def sql(self, query): raise RuntimeError("[INSUFFICIENT_PERMISSIONS] no USE SCHEMA on system.lakeflow\nmore")
    of_workspace = again(step, spark=Session(), env=replace(step.env, home="databricks"))
    assert list(infrastructure_step.job_rows(of_workspace, "1 hour", {})) == []
    note, = of_workspace.notes
    assert "job_run_timeline cannot be read: [INSUFFICIENT_PERMISSIONS]" in note and "grants USE SCHEMA" in note


@pytest.mark.slow
def test_runs_one_after_the_other_leave_what_one_run_leaves(step):
    spark, env, rng = step.spark, step.env, np.random.default_rng(6)
    add_requests(spark, env, rng.uniform(0, 60, 80), rng, "c")
    store = run_store.RunStore(env.state / "runs.db")
    for minutes in (10, 70, 200, 1000, 3000): add_run(store, "train", minutes, minutes / 10, "SUCCESS")
    shutil.rmtree(location(env, step.table), ignore_errors=True)  # of the other test
    by_steps = {}
    for hours in (50, 26, 3, 3, 1, 0): write_infrastructure(again(step, until=UNTIL - timedelta(hours=hours)))
    for kind in ("endpoint", "job", "task"): by_steps[kind] = read_rows(step, kind)
    shutil.rmtree(location(env, step.table))
    write_infrastructure(again(step))
    for kind, frame in by_steps.items():
        assert len(frame) > 4
        order = ["window_start", "name", "metric"]
        pd.testing.assert_frame_equal(frame.sort_values(order, ignore_index=True),
                                      read_rows(step, kind).sort_values(order, ignore_index=True))
