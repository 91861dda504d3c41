"""What the train job leaves, looked at closely: where a version comes from, what it says, what is found again; and on the real flights
of the first months of 2013 a better version, a worse one, and a disk that is full."""
import json
import os
import subprocess
import sys
from datetime import date
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from states import MODEL as NAME
from states import copy_state, env_of

from mlops_nb.conf import read_conf
from mlops_nb.data.session import get_spark, stop
from mlops_nb.deployment import aliases as deployment
from mlops_nb.deployment import validation
from mlops_nb.errors import MlopsError
from mlops_nb.models import registry

pytestmark = pytest.mark.filterwarnings("ignore:.*IProgress not found")
MARCH, APRIL = date(2013, 3, 15), date(2013, 4, 1)  # where version 1 stands, and how far the tables go


def train_again(loop, as_of, rows=None, **conf):
    "The version as of a day, by settings that may differ from those in conf."
    from mlops_nb.features.client import feature_client
    from mlops_nb.flights import days, feature_engineering, learning, train
    settings = read_conf(loop.env.root, "train.yml", train.TRAIN_KEYS) | conf
    env = train.pin_tables(loop.spark, loop.env)
    if rows is None: rows = learning.labelled_rows(loop.spark, env, as_of)
    inputs = feature_engineering.training_set(loop.spark, env, feature_engineering.labels(loop.spark, env, days.midnight(as_of)), "late_arrival", only_features=True)
    return train.find_or_train(env, rows, learning.Periods(as_of, settings["held_out_days"]), settings, feature_client(loop.spark, env), inputs)


def validated(loop, version, **metrics):
    "The reasons of each check: of all, or of the metrics alone by other rules."
    from mlops_nb.deployment import validation_checks
    from mlops_nb.flights import validate
    conf = read_conf(loop.env.root, "validation.yml", validate.RULE_SECTIONS)["checks"]
    evidence = validate.gather(loop.spark, loop.env, registry.get_version(loop.env, version.name, version.version))
    checks = validation_checks.checks({"metrics": metrics} if metrics else conf, evidence)
    return validation.validate_version(loop.env, version.name, version.version, checks)


def deployed(loop, version, **rule):
    from mlops_nb.flights import deploy, train, validate
    conf = read_conf(loop.env.root, "validation.yml", validate.RULE_SECTIONS)["deployment"] | rule
    costs = read_conf(loop.env.root, "train.yml", train.TRAIN_KEYS)["costs"]
    return deploy.deploy_version(loop.spark, loop.env, registry.get_version(loop.env, NAME, version.version), conf, costs)[0]


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
        yield SimpleNamespace(env=env, spark=get_spark(env), version=registry.get_version(env, NAME, 1), folder=own_trained)
        stop()


@pytest.fixture(scope="module")
def march(loop) -> pd.DataFrame:
    "The labelled flights that version 1 has learnt from, and those that it was judged by."
    from mlops_nb.flights import learning
    return learning.labelled_rows(loop.spark, loop.env, MARCH)


def test_a_version_says_where_it_stands_and_what_it_was_made_of(loop):
    version = loop.version
    run = registry.client(loop.env).get_run(version.run_id)
    assert {k: version.tags[k] for k in ("as_of", "trained_through", "held_out_from", "held_out_to")} == {
        "as_of": "2013-03-15", "trained_through": "2013-02-14", "held_out_from": "2013-02-15", "held_out_to": "2013-03-14"}
    assert 0 < float(version.tags["threshold"]) < 1 and version.tags["git_sha"] and version.tags["git_dirty"] in ("true", "false")
    sources = {d.dataset.name: json.loads(d.dataset.source) for d in run.inputs.dataset_inputs}
    for table, number in json.loads(version.tags["read_versions"]).items():
        assert sources[table] == {"delta_table_name": table, "delta_table_version": number}
    assert {"training", "evaluation", "dev.flights.bronze_flights", "dev.flights.airport_recent"} <= set(sources)
    files = [f.path for f in registry.client(loop.env).list_artifacts(version.run_id, "pictures")]
    assert files == [f"pictures/{name}.png" for name in ("calibration", "importance", "slices", "thresholds")]
    files = [f.path for f in registry.client(loop.env).list_artifacts(version.run_id, "explanation")]
    assert files == [f"explanation/{name}.png" for name in ("dependence", "single", "summary")]


def test_a_version_has_a_card_and_a_page_that_says_who_answers_for_it(loop):
    import mlflow

    from mlops_nb.models import model_card
    demanded, version = model_card.read_governance(loop.env.root), loop.version
    card = mlflow.artifacts.load_text(f"runs:/{version.run_id}/model_card.md")
    assert model_card.missing_sections(card, demanded) == [] and model_card.missing_tags(version.tags, demanded) == []
    assert "log loss" in version.description and demanded["owner"] in version.description and "## Validation" in version.description
    said, logged = model_card.sections_of(card)["Metrics"], registry.client(loop.env).get_run(version.run_id).data.metrics
    assert f"| log_loss | {logged['log_loss']:.4f} ({logged['log_loss_low']:.4f} to {logged['log_loss_high']:.4f})" in said
    assert logged["log_loss_low"] < logged["log_loss"] < logged["log_loss_high"] and 0 < logged["warned_share"] < 1


@pytest.mark.slow
def test_the_explanation_adds_up_to_the_prediction(loop, march):
    "Shapley values, the base and nothing else: on the log-odds of what the registered model says."
    import lightgbm
    import mlflow

    from mlops_nb.flights import feature_engineering, learning, model, train
    inside = mlflow.pyfunc.load_model(f"models:/{NAME}/1").get_raw_model().unwrap_python_model()
    learnt = learning.Learnt(inside.booster, inside.encoding, 0.2, 0.2)
    rows = march.tail(300)
    found = train.contributions(learnt, rows)
    odds = found.values.sum(1) + found.base
    assert isinstance(inside.booster, lightgbm.Booster) and len(found.rows) == found.of == 300
    np.testing.assert_allclose(1 / (1 + np.exp(-odds)), model.probabilities(inside.booster, inside.encoding, found.shown[feature_engineering.FEATURES]))


def test_the_held_out_flights_are_judged_by_an_independent_reading(loop, march):
    "Rows by pandas from the source's own columns, metrics by their formulas."
    import mlflow

    from mlops_nb.flights import feature_engineering
    held = march[(march.flight_day >= date(2013, 2, 15)) & (march.flight_day <= date(2013, 3, 14))]
    run = registry.client(loop.env).get_run(loop.version.run_id).data
    p = mlflow.pyfunc.load_model(f"models:/{NAME}/1").predict(held[feature_engineering.FEATURES])
    assert run.metrics["example_count"] == len(held)
    assert run.metrics["log_loss"] == pytest.approx(-np.log(np.where(held.late_arrival, p, 1 - p)).mean(), abs=1e-9)
    b = held.route_late_share
    assert run.metrics["baseline_log_loss"] == pytest.approx(-np.log(np.where(held.late_arrival, b, 1 - b)).mean(), abs=1e-9)
    assert run.metrics["calibration_error"] < 0.03 and run.metrics["business_cost"] < run.metrics["baseline_business_cost"]
    learnt = march[(march.flight_day <= date(2013, 2, 14)) & (march.arrival_known_at < pd.Timestamp("2013-02-15 05:00"))]
    assert run.params["training_rows"] == str(len(learnt))


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


@pytest.mark.slow
def test_the_model_is_served_without_this_project_and_without_pickle(loop, tmp_path):
    environment = {**os.environ, "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false", "PYTHONPATH": ""}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", ALONE, loop.env.tracking_uri], capture_output=True, text=True, cwd=tmp_path,
                          env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    usual, odd, kind = json.loads(done.stdout.splitlines()[-1])
    assert len(usual) == len(odd) == 5 and kind == "float64" and all(0 < p < 1 for p in usual + odd)
    stored = registry.client(loop.env).get_model_version_download_uri(NAME, "1")
    import mlflow
    names = [f.name for f in Path(mlflow.artifacts.download_artifacts(stored)).rglob("*")]
    assert "booster.txt" in names and not [n for n in names if n.endswith((".pkl", ".pickle", ".joblib"))]


@pytest.mark.slow
def test_the_result_does_not_depend_on_the_number_of_threads(loop, march, monkeypatch):
    from mlops_nb.flights import learning, model, train
    conf = read_conf(loop.env.root, "train.yml", train.TRAIN_KEYS) | {"rounds": 20}
    rows = learning.split(march, learning.Periods(MARCH, 28))[0]
    encoding = {"features": train.FEATURES, "categories": model.learn_categories(rows, train.FEATURES)}
    def trees(threads):
        monkeypatch.setattr(os, "cpu_count", lambda: threads)
        return learning.fit_booster(rows, encoding, conf).model_to_string().split("parameters:")[0]
    assert trees(1) == trees(2)


def test_again_finds_the_version_that_the_job_has_made(loop, march):
    before = registry.version_numbers(loop.env, NAME)
    assert int(train_again(loop, MARCH, march).version) == 1 and registry.version_numbers(loop.env, NAME) == before


@pytest.mark.slow
def test_too_early_a_day_is_an_error_and_leaves_no_run(loop):
    with pytest.raises(MlopsError, match="0 labelled flights to learn from; at least 5,000"): train_again(loop, date(2013, 1, 20))
    mlflow = registry.client(loop.env)
    assert not mlflow.search_runs([registry.experiment_id(loop.env, "late_arrival")], "tags.as_of = '2013-01-20'")


@pytest.mark.slow
def test_odd_rows_are_learnt_from_and_predicted(loop):
    "Infinities, columns that are all null or constant: a finite probability for each row."
    from mlops_nb.flights import learning, model, train
    rows = learning.labelled_rows(loop.spark, loop.env, date(2013, 1, 20)).copy()
    rows.loc[rows.index[::50], "temperature"] = np.inf
    rows.loc[rows.index[1::50], "wind_gust"] = -np.inf
    rows = rows.assign(pressure=np.nan, visibility=10.0, plane_maker=None)
    learnt = learning.learn(rows, read_conf(loop.env.root, "train.yml", train.TRAIN_KEYS) | {"rounds": 10})
    found = model.probabilities(learnt.booster, learnt.encoding, rows)
    assert np.isfinite(found).all() and found.std() > 0.01
    with pytest.raises(MlopsError, match="both must occur; there are: 1"): learning.learn(rows.assign(late_arrival=True), {"blocks": 2, "rounds": 2, "parameters": {}, "costs": {}})


# ---- more versions

@pytest.fixture(scope="module")
def versions(trained, tmp_path_factory, loop):
    "Another copy, with version 2 as of April, and 3, which learnt for three rounds only."
    own = SimpleNamespace(env=env_of(copy_state(trained, tmp_path_factory.mktemp("versions") / "state")))
    own.spark = get_spark(own.env)
    own.versions = [registry.get_version(own.env, NAME, 1), train_again(own, APRIL), train_again(own, APRIL, rounds=3)]
    assert validated(own, own.versions[1], roc_auc={"threshold": 0.5, "greater_is_better": True})
    return own


@pytest.mark.slow
def test_one_that_is_hardly_better_waits_a_worse_one_is_refused_and_an_older_one_takes_no_alias(versions):
    env, spark, (old, better, worse) = versions.env, versions.spark, versions.versions
    reason = deployed(versions, better)
    assert f"{NAME} v2 is not better, v1 stays Champion: log_loss" in reason and "on 25,213 rows" in reason
    assert aliases(env) == {"champion": 1, "challenger": 2, "previous_champion": None}
    less = {"min_relative_change": 0.001, "confidence": 0.5}  # a rule that asks for less
    reason = deployed(versions, better, **less)
    assert f"{NAME} v2 is Champion: log_loss" in reason and "better" in reason
    assert aliases(env) == {"champion": 2, "challenger": 2, "previous_champion": 1}
    assert deployed(versions, better) == f"{NAME} v2 is Champion already, nothing changes"
    log = deployment.read_log(spark, env, NAME)
    assert [(r["move"], r["alias"], r["from_version"], r["to_version"], r["state"]) for r in log] == [
        (1, "challenger", None, 1, "done"), (2, "champion", None, 1, "done"), (3, "challenger", 1, 2, "done"), (4, "champion", 1, 2, "done")]
    assert registry.get_version(env, NAME, 2).tags["deployment_decision"] == f"promote: {log[-1]['reason']}"
    validated(versions, worse, roc_auc={"threshold": 0.5, "greater_is_better": True})  # whatever another test has judged
    reason = deployed(versions, worse)
    assert "v3 is not better, v2 stays Champion: log_loss" in reason and "worse" in reason
    assert aliases(env) == {"champion": 2, "challenger": 3, "previous_champion": 1}
    assert registry.get_version(env, NAME, 3).tags["deployment_decision"].startswith("keep: log_loss")
    # version 1 is met again on the four weeks before April, on which it lost before
    reason = deployed(versions, old)
    assert f"{NAME} v1 is not better, v2 stays Champion: log_loss" in reason and "on 25,213 rows" in reason
    assert reason.endswith("; v3, which is newer, stays Challenger")
    reason = deployed(versions, old, min_rows=30_000)
    assert f"Too few rows to compare {NAME} v1: no decision, v2 stays Champion" in reason and "30,000 rows are needed" in reason
    assert aliases(env) == {"champion": 2, "challenger": 3, "previous_champion": 1}


@pytest.mark.slow
def test_a_version_that_learnt_too_little_fails_the_checks_of_the_configuration(versions):
    results = validated(versions, versions.versions[2])
    assert "log_loss" in " ".join(validation.failures(results)), results
    assert registry.get_version(versions.env, NAME, 3).tags["model_validation_status"] == "FAILED"
    with pytest.raises(MlopsError, match="v3 has not passed validation: model_validation_status is FAILED"):
        deployed(versions, registry.get_version(versions.env, NAME, 3))


@pytest.fixture
def full_disk(trained, tmp_path, loop):
    "A copy without Champion, with a file system of 200 kB in the place where the runs' files go."
    own = SimpleNamespace(env=env_of(copy_state(trained, tmp_path / "state")))
    own.spark = get_spark(own.env)
    registry.client(own.env).delete_registered_model_alias(NAME, "champion")  # whose files would be hidden
    place = own.env.state / "artifacts/dev/late_arrival"
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(place)], capture_output=True, text=True)
    if mounted.returncode: pytest.xfail(f"nobody may mount a file system here: {mounted.stderr.strip()}")
    yield own
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.slow
def test_a_full_disk_leaves_a_failed_run_and_no_version(full_disk):
    own, mlflow = full_disk, registry.client(full_disk.env)
    before = registry.version_numbers(own.env, NAME)
    with pytest.raises(Exception, match="No space left on device"): train_again(own, APRIL, rounds=4)
    newest = mlflow.search_runs([registry.experiment_id(own.env, "late_arrival")], order_by=["attributes.start_time DESC"], max_results=1)[0]
    assert newest.data.params["rounds"] == "4" and newest.info.status == "FAILED" and registry.version_numbers(own.env, NAME) == before
