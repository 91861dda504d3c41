"""The results of the train job in detail: lineage, training set, card, metrics, reuse of a version; and on the real
flights of the first months of 2013 a better version, a worse one, and a full disk."""
import json
import os
import subprocess
import sys
from dataclasses import replace
from datetime import date
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from states import MODEL as NAME
from states import copy_state, env_of, table

from mlops_nb.data.session import get_spark, stop
from mlops_nb.deployment import aliases as deployment
from mlops_nb.deployment import validation
from mlops_nb.errors import MlopsError
from mlops_nb.models import registry

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*IProgress not found")]
MARCH, APRIL = date(2013, 3, 15), date(2013, 4, 1)  # as_of of version 1, and of the tables


def train_again(loop, as_of, rows=None, **conf):
    "Return the version as of a day, with settings that may differ from those in conf."
    from mlops_nb.flights.use_case import FLIGHTS
    from mlops_nb.workflow import training
    from mlops_nb.workflow.learning import read_train
    from mlops_nb.workflow.rows import pin_tables
    from mlops_nb.workflow.splits import split_of
    settings = read_train(FLIGHTS, loop.env.root) | conf
    env, split = pin_tables(FLIGHTS, loop.spark, loop.env), split_of(FLIGHTS, as_of, settings)
    data = training.read_training_data(FLIGHTS, loop.spark, env, split, settings)
    return training.find_or_train(data if rows is None else replace(data, rows=rows))


def validated(loop, version, **metrics):
    "The results of all checks, or of the metrics alone with other rules."
    from mlops_nb.deployment import validation_checks
    from mlops_nb.flights.use_case import FLIGHTS
    from mlops_nb.workflow import validating
    rules = {"metrics": metrics} if metrics else validating.read_checks(FLIGHTS, loop.env.root)
    current = registry.get_version(loop.env, version.name, version.version)
    checks = validation_checks.checks(rules, validating.gather_evidence(FLIGHTS, loop.spark, loop.env, current))
    return validation.validate_version(loop.env, version.name, version.version, checks)


def deployed(loop, version, **rule):
    from mlops_nb.flights.use_case import FLIGHTS
    from mlops_nb.workflow import deploying
    of_project, costs = deploying.deployment_settings(FLIGHTS, loop.env)
    current = registry.get_version(loop.env, NAME, version.version)
    return deploying.deploy_version(FLIGHTS, loop.spark, loop.env, current, of_project | rule, costs)[0]


def aliases(env):
    return {a: deployment.points_to(env, NAME, a) for a in ("champion", "challenger", "previous_champion")}


@pytest.fixture(scope="module")
def loop(own_trained):
    "The trained state, with a session on its tables, and its version 1."
    env = env_of(own_trained)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
        patch.setenv("GIT_PYTHON_REFRESH", "quiet")
        stop()
        version = registry.get_version(env, NAME, 1)
        yield SimpleNamespace(env=env, spark=get_spark(env), version=version, folder=own_trained)
        stop()


@pytest.fixture(scope="module")
def march(loop) -> pd.DataFrame:
    "The labelled flights from which version 1 was trained and evaluated."
    from mlops_nb.flights.use_case import FLIGHTS
    from mlops_nb.workflow.rows import labelled_rows
    return labelled_rows(FLIGHTS, loop.spark, loop.env, MARCH)


def test_a_version_records_its_dates_and_its_sources(loop):
    version = loop.version
    run = registry.client(loop.env).get_run(version.run_id)
    dates = {"as_of": "2013-03-15", "trained_through": "2013-02-14", "held_out_from": "2013-02-15",
             "held_out_to": "2013-03-14"}
    assert {name: version.tags[name] for name in dates} == dates
    assert 0 < float(version.tags["threshold"]) < 1
    assert version.tags["git_sha"] and version.tags["git_dirty"] in ("true", "false")
    sources = {d.dataset.name: json.loads(d.dataset.source) for d in run.inputs.dataset_inputs}
    for name, number in json.loads(version.tags["read_versions"]).items():
        assert sources[name] == {"delta_table_name": name, "delta_table_version": number}
    assert {"training", "evaluation", "dev.flights.bronze_flights", "dev.flights.airport_recent"} <= set(sources)
    files = [f.path for f in registry.client(loop.env).list_artifacts(version.run_id, "pictures")]
    assert files == [f"pictures/{name}.png" for name in ("calibration", "importance", "slices", "thresholds")]
    files = [f.path for f in registry.client(loop.env).list_artifacts(version.run_id, "explanation")]
    assert files == [f"explanation/{name}.png" for name in ("dependence", "single", "summary")]


def test_the_model_has_the_spec_of_the_training_set_that_it_learnt_from(loop, march):
    "What load_df returns is the model's input, the label and the identifier; the rows are its rows, in another order."
    from mlops_nb.features.client import spec_of
    from mlops_nb.flights.use_case import FLIGHTS
    from mlops_nb.workflow import rows as rows_of
    flights = rows_of.labelled(FLIGHTS, loop.spark, loop.env, MARCH)
    training_set = rows_of.labelled_training_set(FLIGHTS, loop.spark, loop.env, flights)
    loaded = training_set.load_df()
    assert set(loaded.columns) == {*FLIGHTS.features, "late_arrival", rows_of.ROW_ID}
    assert spec_of(f"models:/{NAME}/1") == training_set.feature_spec
    assert set(training_set.feature_spec.inputs) == set(FLIGHTS.features)
    def key_of(frame):
        first, *others = (frame[column].astype(str) for column in FLIGHTS.key)
        return first.str.cat(others, sep="/")
    key = key_of(march)
    rows = loaded.toPandas().set_index(rows_of.ROW_ID).loc[key]
    assert len(rows) == len(march) and (rows.late_arrival.to_numpy() == march.late_arrival.to_numpy()).all()
    bronze = table(loop.folder, "bronze_flights")
    delays = bronze.set_index(key_of(bronze)).arr_delay.loc[key]
    assert (march.late_arrival.to_numpy(bool) == (delays >= 15).to_numpy(bool)).all(), "labels of the source"
    for name in FLIGHTS.features:
        ours, theirs = march[name], rows[name].reset_index(drop=True)
        if name not in FLIGHTS.categorical: theirs = theirs.astype("float64")
        pd.testing.assert_series_equal(ours, theirs, check_exact=True)


def test_a_version_has_a_card_and_a_description_with_its_owner(loop):
    import mlflow

    from mlops_nb.models import model_card
    governance, version = model_card.read_governance(loop.env.root), loop.version
    card = mlflow.artifacts.load_text(f"runs:/{version.run_id}/model_card.md")
    assert model_card.missing_sections(card, governance) == []
    assert model_card.missing_tags(version.tags, governance) == []
    for text in ("log loss", governance["owner"], "## Validation"): assert text in version.description
    logged = registry.client(loop.env).get_run(version.run_id).data.metrics
    loss, low, high = (logged[name] for name in ("log_loss", "log_loss_low", "log_loss_high"))
    assert f"| log_loss | {loss:.4f} ({low:.4f} to {high:.4f})" in model_card.sections_of(card)["Metrics"]
    assert low < loss < high and 0 < logged["warned_share"] < 1


def test_the_explanation_adds_up_to_the_prediction(loop, march):
    "Shapley values and the base add up to the log-odds of the registered model's prediction."
    import lightgbm
    import mlflow

    from mlops_nb.flights.use_case import FLIGHTS
    from mlops_nb.models import fitted_model
    from mlops_nb.workflow.evaluation import contributions
    from mlops_nb.workflow.learning import TrainedModel
    inside = mlflow.pyfunc.load_model(f"models:/{NAME}/1").get_raw_model().unwrap_python_model()
    sample = contributions(FLIGHTS, TrainedModel(inside.fitted, inside.encoding, {}, {}, None), march.tail(300))
    odds = sample.values.sum(1) + sample.base
    assert isinstance(inside.fitted, lightgbm.Booster) and len(sample.rows) == sample.total_rows == 300
    predictions = fitted_model.predictions(inside.fitted, inside.encoding, sample.shown)
    np.testing.assert_allclose(1 / (1 + np.exp(-odds)), predictions)


def test_the_metrics_equal_an_independent_computation(loop, march):
    "Held-out rows selected by pandas, metrics by their formulas."
    import mlflow

    from mlops_nb.flights.use_case import FLIGHTS
    held_out = march[(march.flight_day >= date(2013, 2, 15)) & (march.flight_day <= date(2013, 3, 14))]
    run = registry.client(loop.env).get_run(loop.version.run_id).data
    p = mlflow.pyfunc.load_model(f"models:/{NAME}/1").predict(held_out[list(FLIGHTS.features)])
    late, b, metrics = held_out.late_arrival, held_out.route_late_share, run.metrics
    assert metrics["example_count"] == len(held_out)
    assert metrics["log_loss"] == pytest.approx(-np.log(np.where(late, p, 1 - p)).mean(), abs=1e-9)
    assert metrics["baseline_log_loss"] == pytest.approx(-np.log(np.where(late, b, 1 - b)).mean(), abs=1e-9)
    assert metrics["calibration_error"] < 0.03 and metrics["business_cost"] < metrics["baseline_business_cost"]
    known = march.arrival_known_at < pd.Timestamp("2013-02-15 05:00")
    assert run.params["training_rows"] == str(((march.flight_day <= date(2013, 2, 14)) & known).sum())


ALONE = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "mlops_nb": raise ImportError("mlops_nb is not installed where the model is served")
sys.meta_path.insert(0, Blocked())
import mlflow, pandas
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model("models:/dev.flights.late_arrival/1")
example = model.input_example
odd = example.astype(object).assign(origin="XXX", dest=None, plane_maker="Wright Brothers", temperature=float("nan"))
odd = odd.astype({c: "float64" for c, k in example.dtypes.items() if k == "float64"})
import json
print(json.dumps([model.predict(example).tolist(), model.predict(odd).tolist(), str(model.predict(odd).dtype)]))
"""


def test_the_model_is_served_without_this_project_and_without_pickle(loop, tmp_path):
    environment = {**os.environ, "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false", "PYTHONPATH": ""}
    process = subprocess.run([sys.executable, "-W", "ignore", "-c", ALONE, loop.env.tracking_uri],
                             capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert process.returncode == 0, process.stderr[-2000:]
    usual, odd, kind = json.loads(process.stdout.splitlines()[-1])
    assert len(usual) == len(odd) == 5 and kind == "float64" and all(0 < p < 1 for p in usual + odd)
    stored = registry.client(loop.env).get_model_version_download_uri(NAME, "1")
    import mlflow
    names = [f.name for f in Path(mlflow.artifacts.download_artifacts(stored)).rglob("*")]
    assert "booster.txt" in names and not [n for n in names if n.endswith((".pkl", ".pickle", ".joblib"))]


def test_the_result_does_not_depend_on_the_number_of_threads(loop, march, monkeypatch):
    from mlops_nb.flights.use_case import FLIGHTS
    from mlops_nb.workflow import learning
    from mlops_nb.workflow.splits import Split, split_rows
    conf = learning.read_train(FLIGHTS, loop.env.root) | {"rounds": 20}
    rows = split_rows(FLIGHTS, march, Split(MARCH, 28))[0]
    encoding, label = learning.uncalibrated_encoding(FLIGHTS, rows), learning.labels_of(FLIGHTS, rows)
    def trees(threads: int) -> str:
        monkeypatch.setattr(os, "cpu_count", lambda: threads)
        return FLIGHTS.learner.fit(rows, label, encoding, conf).model_to_string().split("parameters:")[0]
    assert trees(1) == trees(2)


def test_training_again_returns_the_version_of_the_job(loop, march):
    before = registry.version_numbers(loop.env, NAME)
    assert int(train_again(loop, MARCH, march).version) == 1 and registry.version_numbers(loop.env, NAME) == before


def test_too_early_a_day_is_an_error_and_leaves_no_run(loop):
    with pytest.raises(MlopsError, match="0 labelled rows to learn from; at least 5,000"):
        train_again(loop, date(2013, 1, 20))
    client, experiment = registry.client(loop.env), registry.experiment_id(loop.env, "late_arrival")
    assert not client.search_runs([experiment], "tags.as_of = '2013-01-20'")


def test_odd_rows_are_trained_on_and_predicted(loop):
    "Infinities and columns that are all null or constant give a finite probability for each row."
    from mlops_nb.flights.use_case import FLIGHTS
    from mlops_nb.workflow.learning import learn, predict, read_train
    from mlops_nb.workflow.rows import labelled_rows
    rows = labelled_rows(FLIGHTS, loop.spark, loop.env, date(2013, 1, 20)).copy()
    rows.loc[rows.index[::50], "temperature"] = np.inf
    rows.loc[rows.index[1::50], "wind_gust"] = -np.inf
    rows = rows.assign(pressure=np.nan, visibility=10.0, plane_maker=None)
    conf = read_train(FLIGHTS, loop.env.root) | {"rounds": 10}
    prediction = predict(FLIGHTS, learn(FLIGHTS, rows, conf), rows)
    assert np.isfinite(prediction).all() and prediction.std() > 0.01
    with pytest.raises(MlopsError, match="both must occur; there are: 1"):
        learn(FLIGHTS, rows.assign(late_arrival=True), conf)


# ---- more versions

@pytest.fixture(scope="module")
def versions(trained, tmp_path_factory, loop):
    "Another copy, with version 2 as of April, and version 3 with three rounds only."
    own = SimpleNamespace(env=env_of(copy_state(trained, tmp_path_factory.mktemp("versions") / "state")))
    own.spark = get_spark(own.env)
    first = registry.get_version(own.env, NAME, 1)
    own.versions = [first, train_again(own, APRIL), train_again(own, APRIL, rounds=3)]
    assert validated(own, own.versions[1], roc_auc={"threshold": 0.5, "greater_is_better": True})
    return own


@pytest.mark.full  # `make integration` compares two versions in every build, test_deployment has the moves of aliases
def test_a_version_must_be_clearly_better_and_newer_to_become_champion(versions):
    env, spark, (old, better, worse) = versions.env, versions.spark, versions.versions
    reason = deployed(versions, better)
    assert f"{NAME} v2 is not clearly better, v1 stays Champion: log_loss" in reason and "on 25,213 rows" in reason
    assert aliases(env) == {"champion": 1, "challenger": 2, "previous_champion": None}
    weaker_rule = {"min_relative_change": 0.001, "confidence": 0.5}
    reason = deployed(versions, better, **weaker_rule)
    assert f"{NAME} v2 is Champion: log_loss" in reason and "better" in reason
    assert aliases(env) == {"champion": 2, "challenger": 2, "previous_champion": 1}
    assert deployed(versions, better) == f"{NAME} v2 is Champion already, nothing changes"
    log = deployment.read_log(spark, env, NAME)
    assert [(r["move"], r["alias"], r["from_version"], r["to_version"], r["state"]) for r in log] == [
        (1, "challenger", None, 1, "done"), (2, "champion", None, 1, "done"),
        (3, "challenger", 1, 2, "done"), (4, "champion", 1, 2, "done")]
    assert registry.get_version(env, NAME, 2).tags["deployment_decision"] == f"promote: {log[-1]['reason']}"
    validated(versions, worse, roc_auc={"threshold": 0.5, "greater_is_better": True})  # another test may have failed it
    reason = deployed(versions, worse)
    assert "v3 is not clearly better, v2 stays Champion: log_loss" in reason and "worse" in reason
    assert aliases(env) == {"champion": 2, "challenger": 3, "previous_champion": 1}
    assert registry.get_version(env, NAME, 3).tags["deployment_decision"].startswith("keep: log_loss")
    # version 1 is compared again on the four weeks before April, on which it was worse
    reason = deployed(versions, old)
    assert f"{NAME} v1 is not clearly better, v2 stays Champion: log_loss" in reason and "on 25,213 rows" in reason
    assert reason.endswith("; v3, which is newer, stays Challenger")
    reason = deployed(versions, old, min_rows=30_000)
    assert f"Too few rows to compare {NAME} v1: no decision, v2 stays Champion" in reason
    assert "30,000 rows are needed" in reason
    assert aliases(env) == {"champion": 2, "challenger": 3, "previous_champion": 1}


@pytest.mark.full  # test_whole refuses a version that fails its validation
def test_a_version_with_too_few_rounds_fails_the_checks_of_the_configuration(versions):
    results = validated(versions, versions.versions[2])
    assert "log_loss" in " ".join(validation.failures(results)), results
    assert registry.get_version(versions.env, NAME, 3).tags["model_validation_status"] == "FAILED"
    with pytest.raises(MlopsError, match="v3 has not passed validation: model_validation_status is FAILED"):
        deployed(versions, registry.get_version(versions.env, NAME, 3))


@pytest.fixture
def full_disk(trained, tmp_path, loop):
    "A copy without Champion, with a file system of 200 kB for the files of the runs."
    own = SimpleNamespace(env=env_of(copy_state(trained, tmp_path / "state")))
    own.spark = get_spark(own.env)
    registry.client(own.env).delete_registered_model_alias(NAME, "champion")  # the mount hides its files
    place = own.env.state / "artifacts/dev/late_arrival"
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(place)],
                           capture_output=True, text=True)
    if mount.returncode: pytest.xfail(f"mounting a file system is not permitted here: {mount.stderr.strip()}")
    yield own
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_leaves_a_failed_run_and_no_version(full_disk):
    env, client = full_disk.env, registry.client(full_disk.env)
    before = registry.version_numbers(env, NAME)
    with pytest.raises(Exception, match="No space left on device"): train_again(full_disk, APRIL, rounds=4)
    experiment = registry.experiment_id(env, "late_arrival")
    newest = client.search_runs([experiment], order_by=["attributes.start_time DESC"], max_results=1)[0]
    assert newest.data.params["rounds"] == "4" and newest.info.status == "FAILED"
    assert registry.version_numbers(env, NAME) == before
