"""Two small use cases, scored and monitored: binary without a time, regression with a time; compared with pandas."""
import json
from dataclasses import replace
from datetime import date, timedelta
from functools import partial

import numpy as np
import pandas as pd
import pytest
import small_use_cases as small
from sklearn.metrics import log_loss

from mlops_nb.commands import automl as automl_command
from mlops_nb.data import tables
from mlops_nb.data.session import get_spark, stop
from mlops_nb.errors import MlopsError
from mlops_nb.workflow import automl_search, automl_settings, batch_scoring, inference_logging, learning, monitoring
from mlops_nb.workflow.payloads import LogStep
from mlops_nb.workflow.rows import ROW_GROUP, check_slice_sql, group_sql, labelled_rows, pin_tables

# MLflow warns of its own type hints, and of models without examples
pytestmark = [pytest.mark.filterwarnings("ignore:.*Any type hint is inferred"),
              pytest.mark.filterwarnings("ignore:.*An input example was not"),
              pytest.mark.filterwarnings("ignore:.*Add type hints to the")]

AS_OF = date(2021, 4, 1)  # of both versions
TAGS = {
    "cancelled": {"as_of": str(AS_OF), "held_out_share": "0.25", "threshold": "0.4", "baseline_value": "0.3"},
    "minutes": {"as_of": str(AS_OF), "held_out_from": "2021-03-22", "held_out_to": "2021-03-31",
                "trained_through": "2021-03-21", "interval_low": "-9.5", "interval_high": "10.25"}}
DOUBLE = '{"name": "output", "type": "double", "nullable": true, "metadata": {}}'


def aggregate(name: str, sql: str, kind: str = "AGGREGATE") -> dict:
    return {"name": name, "type": f"CUSTOM_METRIC_TYPE_{kind}", "input_columns": [":table"], "definition": sql,
            "output_data_type": DOUBLE}


RATIO = aggregate("loss_ratio", "model_loss / nullif(heuristic_loss, 0)", "DERIVED")
BINARY_LOSS = "sum(CASE WHEN {{label_col}} THEN -ln(%s) WHEN NOT {{label_col}} THEN -ln(1 - %s) END)"
SQUARES = "sum(({{label_col}} - %s) * ({{label_col}} - %s))"
MONITORING = {  # by the name of the model: columns, custom metrics, thresholds
    "cancelled": ({"problem_type": "PROBLEM_TYPE_CLASSIFICATION", "timestamp_col": "as_of", "label_col": "cancelled",
                   "prediction_col": "warning", "prediction_proba_col": "prediction"}, BINARY_LOSS,
                  [{"metric": "loss_ratio", "false_alarm_rate": 0.01},
                   {"metric": "log_loss", "at_most": 1.1, "times_baseline": True, "min_rows": 20}]),
    "minutes": ({"problem_type": "PROBLEM_TYPE_REGRESSION", "timestamp_col": "asked_at", "label_col": "minutes",
                 "prediction_col": "prediction"}, SQUARES,
                [{"metric": "loss_ratio", "false_alarm_rate": 0.01, "min_rows": 5},
                 {"metric": "root_mean_squared_error", "at_most": 4.0, "min_rows": 5}])}


def monitoring_conf(use_case) -> dict:
    columns, loss, thresholds = MONITORING[use_case.model]
    metrics = [aggregate("model_loss", loss.replace("%s", "prediction")),
               aggregate("heuristic_loss", loss.replace("%s", "heuristic")), RATIO]
    return {"monitor": {"inference_log": {**columns, "model_id_col": "model_version"},
                        "slicing_exprs": list(use_case.slices), "custom_metrics": metrics},
            "sliced_columns": [], "thresholds": thresholds}


# A fixture gets the use cases of a test's own mark, or both
OF_CUSTOMERS, OF_DELIVERIES = (
    pytest.mark.parametrize("home", [use_case], ids=[use_case.model], indirect=True, scope="module")
    for use_case in (small.CUSTOMERS, small.DELIVERIES))


@pytest.fixture(scope="module", ids=lambda use_case: use_case.model,
                params=[small.CUSTOMERS, pytest.param(small.DELIVERIES, marks=pytest.mark.slow)])
def home(request, tmp_path_factory):
    "A use case with its tables and a Champion that is a formula; three days, or a snapshot, scored."
    use_case, folder = request.param, tmp_path_factory.mktemp("small")
    env = small.home_of(folder)
    spark = get_spark(env)
    small.write_tables(use_case, spark, env)
    small.conf_files(folder, monitoring=monitoring_conf(use_case), features={
        table.name: {"columns": {}} for table in use_case.feature_tables},
        train=small.TRAIN[use_case.model])
    version = small.formula_version(use_case, spark, env, TAGS[use_case.model])
    changed = batch_scoring.write_predictions(use_case, spark, env, version, AS_OF, 3)
    assert changed == (30 if use_case.has_time else 400)
    inference_logging.ingest_log(LogStep(use_case, spark, env, AS_OF + timedelta(days=3), env.table("no_payload")))
    yield use_case, spark, env, version
    stop()


def rows_of(use_case, spark, env, name=batch_scoring.PREDICTIONS) -> pd.DataFrame:
    return tables.read(spark, env, name).toPandas().sort_values(list(use_case.key), ignore_index=True)


def expected_rows(use_case) -> pd.DataFrame:
    "The source with the formula's predictions."
    frame = small.FRAMES[use_case.source[0]]()
    model_input = frame
    return frame.assign(expected=eval(small.FORMULAS[use_case.model], {"np": np, "model_input": model_input}))


def test_a_version_that_is_older_than_a_feature_still_scores(home):
    "The new feature is null in its predictions."
    use_case, spark, env, version = home
    newer = replace(use_case, features=(*use_case.features, "newest"))
    rows = use_case.rows(spark, env, AS_OF, 3)
    scored = batch_scoring.predict_rows(newer, spark, pin_tables(use_case, spark, env), rows, version, AS_OF)
    assert "newest" in scored.columns and scored.where("newest IS NOT NULL").count() == 0
    frame = scored.toPandas().sort_values(list(use_case.key), ignore_index=True)
    expected = rows_of(use_case, spark, env)
    np.testing.assert_array_equal(frame.prediction, expected.prediction)


@OF_CUSTOMERS
def test_a_slice_with_a_misspelt_column_names_the_slice_and_the_column(home):
    use_case, spark, env, _ = home
    misspelt = replace(use_case, slices={"long": "mnoths > 12"})
    with pytest.raises(MlopsError, match="slice 'long' .*mnoths > 12\n  did you mean 'months'"):
        check_slice_sql(misspelt, use_case.rows(spark, env, AS_OF, 1).selectExpr("*", "1 AS months"))


def test_predictions_have_the_declared_columns_and_the_values_of_the_model(home):
    use_case, spark, env, version = home
    rows, source = rows_of(use_case, spark, env), expected_rows(use_case)
    if use_case.has_time:
        source = source[source.delivery_day.between(AS_OF, AS_OF + timedelta(days=2))].reset_index(drop=True)
        assert list(rows) == ["delivery_id", "delivery_day", "area", "distance", "area_minutes", "reach", "asked_at",
                              "prediction", "heuristic", "prediction_low", "prediction_high", "model_name",
                              "model_version", "as_of", "read_versions"]
        assert (rows.as_of == rows.delivery_day).all()
        np.testing.assert_allclose(rows.prediction_high - rows.prediction_low, 19.75)
        np.testing.assert_array_equal(rows.heuristic, rows.area_minutes)
    else:
        assert list(rows) == ["customer_id", "plan", "months", "calls", "term", "prediction", "heuristic", "warning",
                              "model_name", "model_version", "as_of", "read_versions"]
        assert (rows.as_of == AS_OF).all() and (rows.heuristic == 0.3).all()
        assert (rows.warning == (rows.prediction >= 0.4)).all() and 0.05 < rows.warning.mean() < 0.95
    np.testing.assert_allclose(rows.prediction, source.expected, rtol=1e-12)
    assert set(json.loads(rows.read_versions[0])) == {env.table(name) for name in use_case.tables}


@OF_DELIVERIES
def test_the_baseline_of_a_regression_is_what_was_known_at_the_time(home):
    use_case, spark, env, _ = home
    source, rows = small.deliveries(), rows_of(use_case, spark, env)
    for row in rows.itertuples():
        midnight = pd.Timestamp(row.delivery_day, tz="UTC")
        known = source[(source.area == row.area) & (source.delivered_at < midnight)]
        assert row.heuristic == pytest.approx(known.minutes.mean())


def test_scoring_again_changes_nothing_and_a_later_snapshot_is_kept_beside_the_first(home):
    use_case, spark, env, version = home
    assert batch_scoring.write_predictions(use_case, spark, env, version, AS_OF, 3) == 0
    if use_case.has_time: return
    later = AS_OF + timedelta(days=7)
    assert batch_scoring.write_predictions(use_case, spark, env, version, later, 1) == 400
    counts = rows_of(use_case, spark, env).as_of.value_counts()
    assert counts.to_dict() == {AS_OF: 400, later: 400}
    tables.replace(spark, env, batch_scoring.PREDICTIONS,
                   tables.read(spark, env, batch_scoring.PREDICTIONS).where("false"), f"as_of = DATE'{later}'")


def held_out(use_case, spark, env) -> set:
    "The keys of the rows without time that the version held out: 50 of 200 groups."
    rows = use_case.rows(spark, env, AS_OF, 1).selectExpr("customer_id", f"{group_sql(use_case)} AS number").toPandas()
    return set(rows.customer_id[rows.number < 50])


def test_a_baseline_is_the_held_out_rows_and_is_scored_once(home):
    use_case, spark, env, version = home
    number = int(version.version)
    assert monitoring.write_baselines(use_case, spark, env, version.name, [number]) == [number]
    assert monitoring.write_baselines(use_case, spark, env, version.name, [number]) == []
    rows = rows_of(use_case, spark, env, monitoring.BASELINE_TABLE)
    if use_case.has_time:
        assert (rows.delivery_day.min(), rows.delivery_day.max()) == (date(2021, 3, 22), date(2021, 3, 31))
        assert len(rows) == 100 and rows.minutes.isna().sum() == 1  # that of the last evening
    else:
        assert set(rows.customer_id) == held_out(use_case, spark, env) and 60 < len(rows) < 140
        assert (rows.cancelled.isna() == (rows.customer_id % 10 == 9)).all()


@pytest.fixture(scope="module")
def run(home):
    "The monitor as of the end of the scored days: day by day, or for a snapshot its month."
    use_case, _, env, _ = home
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(monitoring, "load_env", lambda target: env)
        day, granularity = ("2021-04-04", "1 day") if use_case.has_time else (str(AS_OF), "1 month")
        run = monitoring.load_monitoring(use_case, "dev", day, granularity)
    monitoring.measure_windows(run)
    return run


@OF_DELIVERIES
def test_a_monitor_measures_the_labels_that_were_known(home, run):
    use_case, spark, env, _ = home
    windows, source = run.measured.part("INPUT", "1"), expected_rows(use_case)
    heuristic = rows_of(use_case, spark, env).set_index("delivery_id").heuristic
    assert len(windows) == 3
    for (start, window), labels in zip(windows.iterrows(), (10, 10, 9), strict=True):
        is_known = source.delivered_at < pd.Timestamp("2021-04-04", tz="UTC")
        rows = source[is_known & (source.delivery_day == start.date())]
        squares = (rows.minutes - rows.expected) ** 2
        assert (window["count"], window.labelled, window.evaluated) == (10, labels, labels)
        assert window.root_mean_squared_error == pytest.approx(np.sqrt(squares.mean()))
        assert window.model_loss == pytest.approx(squares.sum())
        expected = (rows.minutes - heuristic[rows.delivery_id].to_numpy()) ** 2
        assert window.heuristic_loss == pytest.approx(expected.sum())
        assert window.loss_ratio == pytest.approx(squares.sum() / expected.sum()) and window.loss_ratio < 0.4


@OF_CUSTOMERS
def test_a_monitor_leaves_out_labels_of_rows_that_the_version_learned_from(home, run):
    use_case, spark, env, _ = home
    window, source = run.measured.part("INPUT", "1").iloc[0], expected_rows(use_case)
    rows = source[source.customer_id.isin(held_out(use_case, spark, env)) & source.cancelled.notna()]
    assert (window["count"], window.labelled) == (400, len(rows))
    label = rows.cancelled.astype(int)
    assert window.log_loss == pytest.approx(log_loss(label, rows.expected))
    assert window.heuristic_loss == pytest.approx(log_loss(label, np.full(len(rows), 0.3)) * len(rows))


def test_a_feature_that_no_version_has_taken_is_not_monitored_and_said(home, run, capsys):
    use_case, spark, env, _ = home
    newer = replace(use_case, features=(*use_case.features, "newest"))
    measured, _ = monitoring.monitor_predictions(newer, spark, env, AS_OF + timedelta(days=3), run.granularity,
                                                 run.monitor, run.thresholds)
    assert "no version that takes them has scored rows: newest\n" in capsys.readouterr().out
    assert set(measured.profile.column_name) == set(run.measured.profile.column_name)


def test_a_rate_without_enough_days_is_not_compared_and_a_fixed_limit_is(home, run):
    use_case, *_ = home
    summary, *reasons = run.texts
    assert len(reasons) == 1 and "not compared with the limit of loss ratio: the baseline has" in reasons[0]
    assert run.noise[run.thresholds[0]].high.isna().all()
    if use_case.has_time:
        errors = run.measured.part("INPUT").root_mean_squared_error
        assert len(errors) == 3 and len(run.flagged) == (errors > 4).sum() > 0
    else: assert run.flagged == [] and summary.startswith("none of 1 window with 400 predictions")


@OF_DELIVERIES
def test_labels_that_become_known_later_join_later(home):
    use_case, spark, env, _ = home
    days = [date(2021, 4, 2), date(2021, 4, 3)]
    rows = [monitoring.watched(use_case, spark, env, day).toPandas() for day in days]
    assert [len(frame) for frame in rows] == [10, 20] and [frame.minutes.isna().sum() for frame in rows] == [1, 1]
    assert rows[1].minutes[rows[1].delivery_day == AS_OF].notna().all()
    with pytest.raises(MlopsError, match="no predictions of days before 2021-04-01"):
        monitoring.watched(use_case, spark, env, AS_OF)


@pytest.fixture
def task_folder(monkeypatch, tmp_path):
    "The folder of a task that runs."
    monkeypatch.setenv("MLOPS_TASK", str(tmp_path))
    (tmp_path / "task.json").write_text(json.dumps({"parameters": {}}))
    return tmp_path


@pytest.mark.slow
def test_the_cells_of_the_scoring_job(home, monkeypatch, task_folder):
    use_case, spark, env, version = home
    monkeypatch.setattr(batch_scoring, "load_env", lambda target: env)
    scoring = batch_scoring.load_scoring(use_case, "dev", str(AS_OF), 3)
    text, figure, rows = batch_scoring.score_rows(scoring).data, batch_scoring.plot_scores(scoring), rows_of(*home[:3])
    if use_case.has_time:
        assert f"scored 30 rows. Their mean prediction {rows.prediction.mean():.4g} (interval" in text
        assert figure.axes[0].get_ylabel() == "mean prediction" and len(figure.axes[0].collections) == 1  # a band
    else:
        assert f"scored 400 rows. {rows.warning.mean():.0%} of them have a warning: a missed case costs 1.5" in text
        assert figure.axes[0].get_ylabel() == "rows with a warning"
    values = rows.warning if "warning" in rows else rows.prediction
    means = values.groupby(rows[next(iter(use_case.slices))]).mean().sort_values()
    assert [label.get_text() for label in figure.axes[1].get_yticklabels()] == list(means.index)
    figure.canvas.draw()  # a warning, such as one about a single day, is an error
    with pytest.raises(MlopsError, match="no slice 'planet'"): batch_scoring.plot_scores(scoring, by="planet")
    batch_scoring.finish_scoring(scoring)
    assert "0 rows changed" in (task_folder / "exit.txt").read_text()


@pytest.mark.slow
def test_the_cells_of_the_monitoring_job(home, run, task_folder):
    use_case, *_ = home
    figures = monitoring.plot_quality(run), monitoring.plot_moved(run)
    assert all(figure.axes for figure in figures) and monitoring.limits_table(run).data.metric.nunique() == 2
    worst = monitoring.worst_slices(run, min_rows=3)
    assert worst[use_case.problem.loss].is_monotonic_decreasing and len(worst) >= 2
    monitoring.finish_monitoring(run)
    assert json.loads((task_folder / "values.json").read_text())["flagged"] == run.flagged
    assert (task_folder / "exit.txt").read_text() == "; ".join(run.texts)


def test_the_heuristic_of_a_search_is_judged_on_its_test_rows(home):
    use_case, spark, env, _ = home
    rows = labelled_rows(use_case, spark, env, AS_OF)
    recent = automl_search.recent_rows(use_case, rows, 200)
    assert 100 < len(recent) <= 200
    if use_case.has_time:
        assert recent.delivery_day.nunique() == 20 and recent.delivery_day.max() == date(2021, 3, 31)
        is_test = recent.delivery_day.to_numpy() >= date(2021, 3, 28)
        expected = np.sqrt(((recent.minutes - recent.area_minutes)[is_test] ** 2).mean())
    else:
        assert not set(recent) & {"customer_id", ROW_GROUP}
        is_test = np.arange(len(recent)) % 5 == 0
        label = recent.cancelled.astype(int)
        expected = log_loss(label[is_test], np.full(is_test.sum(), label[~is_test].mean()), labels=[0, 1])
    assert automl_search.heuristic_loss(use_case, recent, is_test) == pytest.approx(expected)


@pytest.mark.slow
@pytest.mark.full
def test_a_search_sees_training_rows_only_and_its_settings_train(home, monkeypatch, task_folder):
    use_case, _, env, _ = home
    monkeypatch.setattr(automl_search, "load_env", lambda target: env)
    for name in ("classify", "regress"):  # one family, and no exploration: the test takes seconds
        search_one = partial(getattr(automl_search.automl, name), families=["lightgbm"], explore=False)
        monkeypatch.setattr(automl_search.automl, name, search_one)
    file = env.root / automl_command.TRAIN_FILE
    before = file.read_text()

    def proposal() -> automl_settings.SettingsProposal:
        "Run the cells of the job."
        search = automl_search.load_search(use_case, "dev", str(AS_OF), 1000)
        automl_search.run_trials_of(search, max_trials=1, timeout_minutes=5)
        automl_settings.propose_settings(search)
        automl_search.finish_search(search)
        seen = pd.read_parquet(search.summary.folder / "dataset.parquet")
        assert len(seen) == len(search.training) and len(search.held_out) >= 20
        if use_case.has_time:
            assert seen.delivery_day.max() == pd.Timestamp("2021-03-21")
            assert search.held_out.delivery_day.min() == date(2021, 3, 22)
        else: assert not search.training.customer_id.isin(search.held_out.customer_id).any()
        label = search.training[use_case.label].astype(float)
        assert seen[use_case.label].astype(float).tolist() == label.tolist()
        value = json.loads((task_folder / "values.json").read_text())[automl_settings.SETTINGS_VALUE]
        return automl_settings.SettingsProposal(**value)

    try:
        first = proposal()
        assert first.proposed["rounds"] == 100 and first.present["rounds"] == 20  # the first trial has the defaults
        automl_command.write_settings(env.root, first)
        written = file.read_text()
        assert first.run_id in written and str(AS_OF) in written
        conf = learning.read_train(use_case, env.root)
        assert automl_settings.present_settings(conf, list(first.proposed)) == first.proposed
        second = proposal()
        assert second.is_present and second.run_id == first.run_id and file.read_text() == written
        assert second.present_losses == second.proposed_losses == pytest.approx(first.proposed_losses)
    finally: file.write_text(before)
