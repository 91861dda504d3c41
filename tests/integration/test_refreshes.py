"""Refreshes of a monitor in steps give the tables of one refresh over everything, and compute only what changed."""
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from monitored_rows import FEATURES, GRANULARITIES, MONITOR, logged, predictions
from sizes import by_size

from mlops_nb.data import tables
from mlops_nb.errors import MlopsError
from mlops_nb.monitoring import refreshes
from mlops_nb.monitoring.refreshes import read_metrics, refresh
from mlops_nb.monitoring.windows import Monitor

IS_FULL = by_size(True, False)  # compare after each step, or after two of them


def rows_of(spark, env, table: str, kind: str) -> list[str]:
    "The rows of a metric table without nulls and the versions of the refresh, in order."
    frame = tables.read(spark, env, f"{table}_{kind}").drop("logging_table_commit_version", "monitor_version")
    rows = frame.toArrow().to_pylist()
    return sorted(repr({name: value for name, value in row.items() if value is not None}) for row in rows)


def assert_as_at_once(home, frame: pd.DataFrame, baseline: pd.DataFrame, monitor: Monitor, digest: str = "b1"):
    "The tables of the refreshes so far are those of a first refresh over these rows."
    spark, env = home
    at_once = replace(env, lakehouse=f"{env.lakehouse}/at_once_{np.random.default_rng().integers(10**9)}")
    refresh(spark, at_once, "whole", logged(spark, frame, baseline, digest), monitor, GRANULARITIES, FEATURES)
    for kind in ("profile_metrics", "drift_metrics"):
        own, whole = rows_of(spark, env, "steps", kind), rows_of(spark, at_once, "whole", kind)
        assert len(own) == len(whole) and own == whole, kind


def changed(result) -> dict[str, int]:
    return {granularity: len(own.windows) for granularity, own in result.items()}


@pytest.mark.slow
def test_refreshes_in_steps_give_the_tables_of_one_refresh(home):
    (spark, env), frame, baseline = home, predictions(45), predictions(14, seed=9).assign(id=-1)
    def step(rows, monitor=MONITOR, base=baseline, digest="b1"):
        read = logged(spark, rows, base, digest)
        return changed(refresh(spark, env, "steps", read, monitor, GRANULARITIES, FEATURES))
    day = frame["at"].dt.date
    days = sorted(day.unique())
    rows = frame[day <= days[19]].copy()
    rows.loc[day == days[19], "late"] = pd.NA  # labels that come late
    assert step(rows) == {"1 day": 20, "1 week": 4, "1 month": 2}
    assert step(rows) == {"1 day": 0, "1 week": 0, "1 month": 0}
    rows = frame[day <= days[20]]  # a day, and the labels of the day before
    assert step(rows) == {"1 day": 2, "1 week": 1, "1 month": 1}
    if IS_FULL: assert_as_at_once(home, rows, baseline, MONITOR)
    rows = frame[day <= days[40]].copy()  # a backfill with another version, and a correction
    rows.loc[day > days[25], "version"] = 2
    rows.loc[day == days[3], "prediction"] += 0.01
    step(rows)
    if IS_FULL: assert_as_at_once(home, rows, baseline, MONITOR)
    rows = rows[~rows["at"].dt.date.isin([days[10], days[39]])]  # windows that become empty
    assert 2 <= step(rows)["1 day"] <= 8  # those that follow them, of rare groups too
    assert_as_at_once(home, rows, baseline, MONITOR)
    both = pd.concat([baseline, baseline.assign(version=2, delay=baseline.delay + 1)])
    assert step(rows, base=both, digest="b2") == {"1 day": 39, "1 week": 7, "1 month": 2}
    if IS_FULL: assert_as_at_once(home, rows, both, MONITOR, "b2")
    other = replace(MONITOR, slicing_exprs=("carrier",), custom_metrics=())
    step(rows, other, both, "b2")
    assert_as_at_once(home, rows, both, other, "b2")
    numbers = tables.read(spark, env, "steps_profile_metrics").select("monitor_version").distinct().collect()
    assert [row[0] for row in numbers] == [1]


class Killed(Exception): pass


@pytest.mark.slow
@pytest.mark.parametrize("writes", [1, 2, 3, 4, 5])
def test_a_refresh_that_is_killed_after_any_write_goes_on(home, monkeypatch, writes):
    spark, env = home
    env = replace(env, lakehouse=f"{env.lakehouse}/killed{writes}")
    frame, baseline, done = predictions(6), predictions(5, seed=9), []
    monkeypatch.setattr(refreshes, "WINDOWS_AT_ONCE", 3)
    original = tables.replace
    def replace_or_die(*arguments):
        if len(done) == writes: raise Killed
        done.append(original(*arguments))
        return done[-1]
    def run(): return refresh(spark, env, "killed", logged(spark, frame, baseline), MONITOR, ["1 day"], FEATURES)
    monkeypatch.setattr(tables, "replace", replace_or_die)
    with pytest.raises(Killed): run()
    monkeypatch.setattr(tables, "replace", original)
    run()
    whole = replace(env, lakehouse=f"{env.lakehouse}_whole")
    refresh(spark, whole, "killed", logged(spark, frame, baseline), MONITOR, ["1 day"], FEATURES)
    for kind in ("profile_metrics", "drift_metrics"):
        assert rows_of(spark, env, "killed", kind) == rows_of(spark, whole, "killed", kind)


# rows that a monitor would rather not see

def test_windows_without_labels_of_one_class_of_nulls_and_with_new_values(home):
    "Four days: no labels; one class; nulls and infinite values; a category that the baseline does not have."
    spark, env = home
    frame, baseline = predictions(4), predictions(5, seed=9).assign(delay=1.0)
    day = (frame["at"] - frame["at"].min()).dt.days
    frame["late"] = frame.late.where(day != 0).where(day != 1, False)
    frame["delay"] = frame.delay.mask(day == 2).where((day != 2) | (frame.index % 7 != 0), np.inf)
    frame["carrier"] = frame.carrier.where(day != 3, "new")
    refresh(spark, env, "bad", logged(spark, frame, baseline), MONITOR, ["1 day"], FEATURES)
    measured = read_metrics(spark, env, "bad", MONITOR, "1 day")
    whole = measured.part("INPUT")
    assert whole.percent_label_missing.tolist() == [100, 0, 0, 0]
    assert whole.accuracy_score.isna().tolist() == whole.log_loss.isna().tolist() == [True, False, False, False]
    assert whole.roc_auc_score.isna().tolist() == [True, True, False, False]
    profile = measured.profile[(measured.profile.model_id == "*") & measured.profile.slice_key.isna()]
    delays = profile[(profile.column_name == "delay") & (profile.log_type == "INPUT")]
    delay = delays.sort_values("window_start").iloc[2]
    assert delay["max"] == delay.avg == np.inf and 0 < delay.percent_null < 100 and np.isnan(delay.stddev)
    drift = measured.drift[(measured.drift.model_id == "*") & (measured.drift.column_name == "carrier")]
    assert drift.sort_values("window_start").tv_distance.iloc[-1] == pytest.approx(1)


@pytest.mark.slow
@pytest.mark.parametrize("renamed, message", [
    ("prediction", "no column 'prediction' in the rows to be monitored"), ("carrier", "slicing_exprs: 'carrier'"),
    ("delay", "no column 'delay' in the rows to be monitored\n  did you mean 'delays'")])
def test_a_renamed_column_is_named_and_nothing_is_written(home, renamed, message):
    spark, env = home
    rows = logged(spark, predictions(2), predictions(2, seed=9))
    of_rows = replace(rows, rows=rows.rows.withColumnRenamed(renamed, f"{renamed}s"))
    of_baseline = replace(rows, baseline=rows.baseline.withColumnRenamed(renamed, f"{renamed}s"))
    for wrong in (of_rows, of_baseline):
        with pytest.raises(MlopsError, match=message if wrong is of_rows else "no column|carrier"):
            refresh(spark, env, "renamed", wrong, replace(MONITOR, custom_metrics=()), ["1 day"], FEATURES)
    assert not tables.exists(spark, env, env.table("renamed_profile_metrics"))


def test_no_rows_and_no_times_are_errors(home):
    spark, env = home
    rows = logged(spark, predictions(1), predictions(2, seed=9))
    others = [name for name in rows.rows.columns if name != "at"]
    for wrong, message in ((rows.rows.where("false"), "there are no rows to be monitored"),
                           (rows.rows.selectExpr("CAST(NULL AS TIMESTAMP) AS at", *others),
                            "none of the 30 rows")):
        with pytest.raises(MlopsError, match=message):
            refresh(spark, env, "none", replace(rows, rows=wrong), MONITOR, ["1 day"], FEATURES)
