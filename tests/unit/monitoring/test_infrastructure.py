"""Windows, durations, ages and limits of the infrastructure, against pandas."""
from datetime import UTC, datetime, timedelta

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlops_nb.errors import MlopsError
from mlops_nb.jobs import run_store
from mlops_nb.monitoring.infrastructure import (
    InfrastructureSettings,
    age_metrics,
    as_infrastructure,
    duration_metrics,
    endpoint_metrics,
    first_to_measure,
    floor_time,
    infrastructure_problems,
    spool_metrics,
    window_starts,
    with_limits_of,
)
from mlops_nb.monitoring.retraining import STOP_TEXT
from mlops_nb.workflow import infrastructure_step
from mlops_nb.workflow.infrastructure_step import InfrastructureStep, plot_infrastructure, stored_runs

UNTIL = datetime(2026, 11, 28, 12, 20, tzinfo=UTC)
HOUR = timedelta(hours=1)


@settings(max_examples=60, deadline=None)
@given(st.datetimes(datetime(2000, 1, 1), datetime(2040, 1, 1)), st.sampled_from(
    [("5 minutes", "5min"), ("30 minutes", "30min"), ("1 hour", "h"), ("1 day", "D"), ("1 weeks", "W-SUN")]))
def test_a_window_begins_where_pandas_begins_it(moment, pair):
    granularity, frequency = pair
    start = floor_time(moment.replace(tzinfo=UTC), granularity)
    if granularity == "1 weeks": expected = pd.Timestamp(moment).to_period(frequency).start_time
    else: expected = pd.Timestamp(moment).floor(frequency)
    assert start.replace(tzinfo=None) == expected.to_pydatetime()


def test_only_windows_that_have_ended_are_measured_and_the_last_days_again():
    starts = window_starts(UNTIL - 3 * HOUR, UNTIL, "1 hour")
    assert starts[0].hour == 9 and starts[-1].hour == 11
    assert window_starts(UNTIL, UNTIL, "1 day") == []
    two_days = InfrastructureSettings(late_days=2)
    assert first_to_measure(starts[-1], two_days, "1 day") == datetime(2026, 11, 26, tzinfo=UTC)
    assert first_to_measure(None, two_days, "1 day") is None


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["train", "score"]), st.integers(0, 5 * 3600), st.floats(0, 1e4),
                          st.sampled_from(["SUCCESS", "FAILED", "TIMEDOUT", "CANCELED"])), max_size=30))
def test_durations_and_failures_are_those_of_pandas(lines):
    begin = int((UNTIL - 5 * HOUR).timestamp())
    values = [(name, (begin + second) * 1000, seconds, result, 1.0) for name, second, seconds, result in lines]
    runs = pd.DataFrame(values, columns=["name", "end", "seconds", "result", "queue_s"])
    rows = duration_metrics(runs, "job", "1 hour", None, UNTIL)
    measured = {(row.window_start, row.name_, row.metric): row.value for row in
             rows.rename(columns={"name": "name_"}).itertuples()}
    kept = runs[runs.result != "CANCELED"]
    kept = kept[kept.end < floor_time(UNTIL, "1 hour").timestamp() * 1000]
    hours, expected = pd.to_datetime(kept.end, unit="ms", utc=True).dt.floor("h"), {}
    for (hour, name), group in kept.groupby([hours, "name"]):
        values = {"duration_p50_s": np.quantile(group.seconds, 0.5), "duration_max_s": max(group.seconds),
                  "failure_rate": np.mean(group.result != "SUCCESS"), "queue_max_s": 1.0}
        expected |= {(hour, name, metric): value for metric, value in values.items()}
    assert measured.keys() == expected.keys()
    assert all(np.isclose(measured[key], expected[key], rtol=1e-12) for key in measured)


def test_hours_without_requests_have_no_latency_and_a_throughput_of_zero():
    starts = window_starts(UNTIL - 3 * HOUR, UNTIL, "1 hour")
    measured = pd.DataFrame({"window_start": [starts[0].replace(tzinfo=None)], "count": [3], "requests": [30.0],
                             "errors": [3.0], "client_errors": [0.0], "latency_p50_ms": [1.0], "latency_p95_ms": [2.0],
                             "latency_p99_ms": [2.5]})
    rows = endpoint_metrics("late", measured, starts, "1 hour")
    first = rows[rows.window_start == starts[0]].set_index("metric").value
    assert first.to_dict() == {"requests_per_second": 30 / 3600, "error_rate": 0.1, "client_error_rate": 0,
                               "latency_p50_ms": 1, "latency_p95_ms": 2, "latency_p99_ms": 2.5}
    others = rows[rows.window_start != starts[0]]
    assert others.metric.tolist() == ["requests_per_second"] * 2 and set(others.value) == {0.0}


def test_the_age_of_a_table_is_that_at_the_end_of_the_window():
    starts = window_starts(UNTIL - 4 * HOUR, UNTIL, "1 hour")  # from 8:00 to 12:00
    commits = [datetime(2026, 11, 28, 9, 30, tzinfo=UTC), datetime(2026, 11, 28, 11, 45, tzinfo=UTC)]
    rows = age_metrics("dev.a.b", commits, datetime(2026, 11, 28, 6, tzinfo=UTC), starts, "1 hour")
    ages = rows[rows.metric == "commit_age_hours"].set_index("window_start").value
    assert ages.tolist() == [0.5, 1.5, 0.25] and ages.index[0].hour == 9  # it did not exist before
    assert rows[rows.metric == "row_age_hours"].value.tolist() == [6.0]
    spool = spool_metrics([(100, UNTIL.timestamp() - 60), (50, UNTIL.timestamp())], starts[-1], UNTIL)
    assert spool.set_index("metric").value.to_dict() == {"spool_bytes": 150, "spool_segments": 2, "spool_age_s": 60}
    assert spool_metrics([], starts[-1], UNTIL).value.tolist() == [0, 0, 0]


def test_the_first_threshold_that_fits_judges_windows_with_enough_rows():
    limits = as_infrastructure({"thresholds": [
        {"source": "job", "metric": "duration_max_s", "name": "tr*", "at_most": 20, "min_count": 2},
        {"source": "job", "metric": "duration_max_s", "at_most": 5, "at_least": 1}]})
    rows = pd.DataFrame({"window_start": pd.to_datetime([UNTIL] * 5), "source_kind": "job", "metric": "duration_max_s",
                         "name": ["train", "train", "score", "score", "score"], "count": [1, 2, 1, 1, 1],
                         "value": [30.0, 30.0, 5.0, 5.1, 0.5]})
    rows["window_start"] += pd.to_timedelta(range(5), unit="h")
    judged = with_limits_of(rows, limits, "1 hour")
    assert judged.violated.tolist() == [None, True, False, True, True]
    assert judged.threshold_high.tolist() == [20, 20, 5, 5, 5] and judged.threshold_low.tolist()[2:] == [1, 1, 1]
    without = with_limits_of(rows, InfrastructureSettings(), "1 hour")
    assert without.violated.tolist() == [None] * 5


@pytest.mark.parametrize("conf, key", [
    ({"granularities": ["1 month"]}, "granularities"), ({"granularities": []}, "granularities"),
    ({"late_days": -1}, "late_days"), ({"tables": [{"name": "a"}]}, "tables[0].name"), ({"tables": {}}, "tables"),
    ({"thresholds": [{"source": "jobs", "metric": "x", "at_most": 1}]}, "thresholds[0].source"),
    ({"thresholds": [{"source": "job", "metric": "latency_p95_ms", "at_most": 1}]}, "thresholds[0].metric"),
    ({"thresholds": [{"source": "job", "metric": "failure_rate"}]}, "thresholds[0]"),
    ({"thresholds": [{"source": "job", "metric": "failure_rate", "at_most": "0"}]}, "thresholds[0].at_most"),
    ({"late_days": 10**14}, "late_days"), ({"granularities": ["99999999 weeks"]}, "granularities"),
    ({"granularities": ["1 day", "1 day"]}, "granularities"), ({"granularities": [["1 day"]]}, "granularities"),
    ({"thresholds": [{"source": ["job"], "metric": "x", "at_most": 1}]}, "thresholds[0].source"),
    ({"thresholds": [{"source": "job", "metric": "failure_rate", "at_most": -1}]}, "thresholds[0].at_most"),
    ({"thresholds": [{"source": "job", "metric": "failure_rate", "at_most": 1.5}]}, "thresholds[0].at_most"),
    ({"thresholds": [{"source": "job", "metric": "queue_max_s", "at_most": 1, "at_least": 2}]},
     "thresholds[0].at_least"),
    ({"thresholds": [{"source": "job", "metric": "failure_rate", "at_most": 0, "min_count": 10**14}]},
     "thresholds[0].min_count"),
    ({"thresholds": [5]}, "thresholds[0]"), ({"limits": []}, "limits")])
def test_each_mistake_in_the_file_has_its_key(conf, key):
    assert key in [place for place, *_ in infrastructure_problems(conf)]


def test_a_retraining_in_which_a_stop_begins_is_no_failure(tmp_path):
    store = run_store.RunStore(tmp_path / "runs.db")
    for message in (f"the retraining of m {STOP_TEXT}: 3 refused", "the disk is full"):
        number = run_store.record_run(store, "retrain", "prod", {}, ["record"])
        run_store.save_task(store, number, "record", 0, start_time=1, end_time=2, result_state="FAILED",
                            state_message=message)
        run_store.update_run(store, number, life_cycle_state="TERMINATED", result_state="FAILED", start_time=1,
                             end_time=2, state_message=f"task 'record': {message}")
    runs, tasks = stored_runs(store, "prod")
    assert runs.result.tolist() == tasks.result.tolist() == ["SUCCESS", "FAILED"]


def drawn(monkeypatch, rows: list[tuple]):  # kind, name, metric, value, limit
    "The picture of the windows of two hours."
    values = [(*row, start, start + HOUR, "1 hour") for row in rows for start in (UNTIL - 2 * HOUR, UNTIL - HOUR)]
    frame = pd.DataFrame(values, columns=["source_kind", "name", "metric", "value", "threshold_high", "window_start",
                                          "window_end", "granularity"])
    monkeypatch.setattr(infrastructure_step, "recent_metrics", lambda step, hours: frame)
    return plot_infrastructure(InfrastructureStep(None, None, InfrastructureSettings(), UNTIL))


def test_only_what_was_measured_has_a_panel_and_the_axis_follows_the_windows(monkeypatch):
    from matplotlib import pyplot
    from matplotlib.dates import num2date
    runs = [("job", "train", "duration_max_s", 50.0, 3600.0), ("job", "train", "failure_rate", 0.0, 0.0),
            ("job", "score", "failure_rate", 0.5, 0.0), ("table", "d.s.t", "commit_age_hours", 20.0, 26.0)]
    figure = drawn(monkeypatch, runs)
    assert [axes.get_ylabel() for axes in figure.axes] == ["longest run (s)", "failed runs", "age of a table (hours)"]
    assert figure.axes[0].get_ylim()[1] < 100 and figure.axes[2].get_ylim()[1] > 26  # a limit far away flattens nothing
    assert [text.get_text() for text in figure.axes[1].get_legend().get_texts()] == ["score"]
    first, last = map(num2date, figure.axes[0].get_xlim())
    assert first == UNTIL - 2 * HOUR and last - UNTIL < timedelta(minutes=10)
    quiet = drawn(monkeypatch, [("endpoint", "e", "latency_p95_ms", 5.0, None), runs[1]])
    assert len(quiet.axes) == 2 and [text.get_text() for text in quiet.axes[1].texts] == ["no run failed"]
    assert "has ended yet" in drawn(monkeypatch, []).get_suptitle()
    pyplot.close("all")


def test_a_window_of_a_month_is_refused():
    with pytest.raises(MlopsError, match="no fixed length"): floor_time(UNTIL, "1 month")
