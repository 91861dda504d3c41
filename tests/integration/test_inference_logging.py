"""The inference log of batch inference: what is new is added, corrections are found, labels join when known."""
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import date, timedelta

import pandas as pd
import pytest
import small_use_cases as small

from mlops_nb.data import tables
from mlops_nb.data.session import get_spark, stop
from mlops_nb.workflow import inference_logging as logging
from mlops_nb.workflow.monitoring import watched
from mlops_nb.workflow.payloads import LogStep

DAY = date(2021, 4, 1)
USE_CASE = small.DELIVERIES


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    env = small.home_of(tmp_path_factory.mktemp("log"))
    spark = get_spark(env)
    small.write_tables(USE_CASE, spark, env)
    yield spark, env
    stop()


@pytest.fixture(params=[True, pytest.param(False, marks=pytest.mark.slow)], ids=["by day", "without partitions"])
def predicted(home, request, tmp_path):
    "Predictions of six days in a lakehouse of their own."
    spark, env = home
    own = replace(env, lakehouse=str(tmp_path / "lakehouse"))
    tables.merge(spark, own, "deliveries", tables.read(spark, env, "deliveries"), USE_CASE.key)
    if request.param: tables.create(spark, own, "predictions", predictions(spark, 0, 1).schema, cluster_by=["as_of"])
    score(spark, own, 0, 6)
    return spark, own


def predictions(spark, first: int, days: int, shift: float = 0.0):
    frame = small.deliveries().drop(columns=["minutes", "delivered_at"])
    start = DAY + timedelta(days=first)
    frame = frame[(frame.delivery_day >= start) & (frame.delivery_day < start + timedelta(days=days))]
    frame = frame.assign(prediction=20 + 3 * frame.distance + shift, model_name="dev.flights.minutes", model_version=1,
                         as_of=frame.delivery_day, read_versions="{}")
    return spark.createDataFrame(frame.astype({"asked_at": "datetime64[us, UTC]"}))


def score(spark, env, first: int, days: int, shift: float = 0.0):
    tables.merge(spark, env, "predictions", predictions(spark, first, days, shift), USE_CASE.key)


def ingest(spark, env, day: int) -> LogStep:
    return logging.ingest_log(LogStep(USE_CASE, spark, env, DAY + timedelta(days=day), env.table("no_payload")))


def log_of(spark, env) -> pd.DataFrame:
    return tables.read(spark, env, "inference_log").toPandas().sort_values("delivery_id", ignore_index=True)


def test_days_corrections_and_late_labels_give_the_log_of_one_run(predicted, tmp_path):
    spark, env = predicted
    steps = [ingest(spark, env, day) for day in (2, 2, 3)]
    assert [(step.batch, step.labels) for step in steps] == [(30, 0), (0, 0), (10, 10)]  # one of them is late
    score(spark, env, 1, 1, shift=5)  # a backfill
    assert logging.changed_days(spark, env, "predictions", 1, tables.version(spark, env, "predictions")) in (
        {DAY + timedelta(days=1)}, None)
    step = ingest(spark, env, 5)
    assert (step.batch, step.labels) == (30, 11)  # two days and the changed one
    log = log_of(spark, env)
    whole = replace(env, lakehouse=str(tmp_path / "whole"))
    for name in ("deliveries", "predictions"): tables.overwrite(spark, whole, name, tables.read(spark, env, name))
    ingest(spark, whole, 5)
    pd.testing.assert_frame_equal(log, log_of(spark, whole))
    source = small.deliveries().set_index("delivery_id").loc[log.delivery_id]
    known = (source.delivered_at < pd.Timestamp(DAY + timedelta(days=5), tz="UTC")).to_numpy()
    assert log.minutes.notna().tolist() == known.tolist() and not known.all()
    assert (log.minutes[known].to_numpy() == source.minutes.to_numpy()[known]).all()
    assert set(log.source) == {"batch"} and not log.duplicated(["source", "record_id", "row_number"]).any()


@pytest.mark.slow
def test_a_metric_uses_the_labels_of_its_day_whatever_the_log_holds(predicted):
    spark, env = predicted
    ingest(spark, env, 3)
    before = watched(USE_CASE, spark, env, DAY + timedelta(days=3)).toPandas()
    ingest(spark, env, 5)
    after = watched(USE_CASE, spark, env, DAY + timedelta(days=3)).toPandas()
    before, after = (frame.sort_values("delivery_id", ignore_index=True) for frame in (before, after))
    columns = ["delivery_id", "minutes", "row_hash"]
    pd.testing.assert_frame_equal(before[columns], after[columns])


class Killed(Exception): pass


@pytest.mark.slow
@pytest.mark.parametrize("writes", [0, 1, 2])
def test_an_ingest_that_is_killed_goes_on(predicted, monkeypatch, writes):
    spark, env = predicted
    original, done = tables.merge, []
    def merge_or_die(*arguments, **options):
        if len(done) == writes: raise Killed
        done.append(original(*arguments, **options))
        return done[-1]
    ingest(spark, env, 1)
    monkeypatch.setattr(tables, "merge", merge_or_die)
    with pytest.raises(Killed): ingest(spark, env, 3)
    monkeypatch.setattr(tables, "merge", original)
    ingest(spark, env, 3)
    log = log_of(spark, env)
    assert len(log) == 40 and log.minutes.isna().sum() == 11  # the day itself, and the last row of the day before


@pytest.mark.slow
def test_two_ingests_at_once_give_one_log(predicted):
    spark, env = predicted
    with ThreadPoolExecutor(2) as threads: list(threads.map(lambda day: ingest(spark, env, day), [3, 3]))
    assert len(log_of(spark, env)) == 40
