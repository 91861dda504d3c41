"""Training, evaluation, tuning and reproduction of two small use cases: probabilities without a time and without a
heuristic, by LightGBM; and numbers with a time, a heuristic and intervals, by an estimator of scikit-learn."""
import json
import zlib
from dataclasses import replace
from datetime import date
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from sklearn.compose import make_column_transformer
from sklearn.impute import SimpleImputer
from sklearn.linear_model import Ridge
from sklearn.metrics import log_loss, mean_absolute_error, r2_score, roc_auc_score, root_mean_squared_error
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder
from small_use_cases import CUSTOMERS, DELIVERIES, conf_files, home_of, write_tables

from mlops_nb.data.session import get_spark, stop
from mlops_nb.errors import MlopsError
from mlops_nb.models import model_card, registry
from mlops_nb.models.learners import sklearn_learner
from mlops_nb.workflow import reproduction, training

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*IProgress not found"),
              pytest.mark.filterwarnings("ignore:.*type hint")]


def ridge(alpha):
    "A linear model of the deliveries."
    columns = make_column_transformer((OneHotEncoder(handle_unknown="ignore"), ["area"]),
                                      (SimpleImputer(), ["distance", "area_minutes"]))
    return make_pipeline(columns, Ridge(alpha=alpha))


AS_OF = "2021-04-11"
USE_CASES = (CUSTOMERS, replace(DELIVERIES, learner=sklearn_learner(ridge)))
COMMON = {"blocks": 2, "min_rows": 50, "min_slice_rows": 20}
TRAIN = {"cancelled": COMMON | {
            "held_out_share": 0.4, "costs": {"missed": 5, "false_warning": 1}, "rounds": 15,
            "parameters": {"objective": "binary", "num_leaves": 4, "seed": 1, "deterministic": True,
                           "force_row_wise": True, "verbose": -1},
            "custom_metrics": {"warned_share": "mlops_nb.workflow.evaluation:warned_share"},
            "search_space": {"num_leaves": {"low": 2, "high": 8}, "rounds": {"low": 5, "high": 15}}},
         "minutes": COMMON | {"held_out_days": 20, "quantiles": [0.05, 0.95], "parameters": {"alpha": 1.0},
                              "custom_metrics": {}}}
GOVERNANCE = {"owner": "us", "contact": "us@example.com", "purpose": "Tests.", "not_for": "Other uses.",
              "licence_of_data": "CC0", "limits": ["made up"],
              "required_sections": ["Data", "Metrics", "Slices", "Explanation"],
              "required_tags": ["as_of", "owner", "fingerprint"], "forbidden_features": ["gender"]}


@pytest.fixture(scope="module", params=USE_CASES, ids=lambda use_case: use_case.model)
def world(request, tmp_path_factory):
    "A use case with its tables, what its training read, and its version 1."
    use_case, folder = request.param, tmp_path_factory.mktemp("training")
    env = home_of(folder)
    features = {"area_daily": {"columns": {"area": {"type": "string"}}}}
    conf_files(folder, governance=GOVERNANCE, train=TRAIN[use_case.model], features=features)
    stop()
    spark = get_spark(env)
    write_tables(use_case, spark, env)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
        patch.setenv("GIT_PYTHON_REFRESH", "quiet")
        for module in (training, reproduction): patch.setattr(module, "load_env", lambda target: env)
        data = training.load(use_case, "dev", AS_OF)
        version = training.train(data)
        yield SimpleNamespace(use_case=use_case, env=env, spark=spark, data=data, version=version,
                              run=registry.client(env).get_run(version.run_id))
    stop()


def held_out_by_pandas(world) -> pd.DataFrame:
    "The held-out rows, selected by pandas."
    rows = world.data.rows
    if world.use_case.has_time: return rows[(rows.delivery_day > date(2021, 3, 21))
                                            & (rows.delivered_at < pd.Timestamp(AS_OF))]
    return rows[rows.customer_id.map(lambda key: zlib.crc32(str(key).encode()) % 200) < 80]


def test_the_logged_metrics_are_those_of_scikit_learn_on_the_held_out_rows(world):
    import mlflow
    frame, metrics = held_out_by_pandas(world), world.run.data.metrics
    model = mlflow.pyfunc.load_model(f"models:/{world.version.name}/1")
    prediction, label = model.predict(frame[list(world.use_case.features)]), frame[world.use_case.label].astype(float)
    others = world.data.rows.drop(frame.index)
    if world.use_case.has_time:
        baseline, tags = frame.area_minutes, world.version.tags
        others = others[others.delivered_at < pd.Timestamp("2021-03-22")]  # known when the held-out days began
        low, high = (prediction + float(tags[f"interval_{end}"]) for end in ("low", "high"))
        expected = {"root_mean_squared_error": root_mean_squared_error(label, prediction),
                    "mean_absolute_error": mean_absolute_error(label, prediction),
                    "r2_score": r2_score(label, prediction), "interval_coverage": label.between(low, high).mean(),
                    "baseline_root_mean_squared_error": root_mean_squared_error(label, baseline)}
        assert metrics["root_mean_squared_error"] < 7 and 0.7 < metrics["interval_coverage"] <= 1
    else:
        mean = others.cancelled.astype(float).mean()
        warned = prediction >= float(world.version.tags["threshold"])
        expected = {"log_loss": log_loss(label, prediction), "roc_auc": roc_auc_score(label, prediction),
                    "baseline_log_loss": log_loss(label, np.full(len(label), mean)), "warned_share": warned.mean(),
                    "recall_score": warned[label == 1].mean()}
        assert float(world.version.tags["baseline_value"]) == pytest.approx(mean)
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, abs=1e-9)
    assert metrics["example_count"] == len(frame) and world.run.data.params["training_rows"] == str(len(others))
    loss = world.use_case.problem.loss
    assert metrics[f"{loss}_low"] < metrics[loss] < metrics[f"{loss}_high"]


def test_a_version_has_the_tags_card_and_pictures_of_its_problem(world):
    import mlflow
    own = {"cancelled": {"held_out_share", "threshold", "baseline_threshold", "baseline_value"},
           "minutes": {"trained_through", "held_out_from", "held_out_to", "interval_low", "interval_high"}}
    common = {"as_of", "git_sha", "git_dirty", "git_branch", "fingerprint", "read_versions", "owner"}
    model = world.use_case.model
    assert set(world.version.tags) == common | own[model]
    assert set(json.loads(world.version.tags["read_versions"])) == {
        world.env.source_table(name) for name in world.use_case.tables}
    card = mlflow.artifacts.load_text(f"runs:/{world.version.run_id}/model_card.md")
    assert model_card.missing_sections(card, GOVERNANCE) == []
    assert model_card.missing_tags(world.version.tags, GOVERNANCE) == []
    text = {"cancelled": "that a hash of their key holds out (40% of all)", "minutes": "(mean minutes: "}[model]
    assert text in model_card.sections_of(card)["Data"]
    unit = {"cancelled": "in log-odds", "minutes": "in the unit of minutes"}[model]
    assert f"(mean size {unit})" in model_card.sections_of(card)["Explanation"]
    files = {Path(file.path).stem for file in mlflow.artifacts.list_artifacts(run_id=world.version.run_id,
                                                                              artifact_path="pictures")}
    assert files == {"cancelled": {"calibration", "thresholds", "slices", "importance"},
                     "minutes": {"predictions", "residuals", "slices"}}[model]
    sentence = {"cancelled": "log loss 0.", "minutes": "RMSE "}[model]
    described = registry.get_version(world.env, world.version.name, 1).description
    assert described.startswith(f"**{world.version.name} v1**: {sentence}")


def test_the_steps_of_a_notebook_find_the_version_again(world, capsys):
    again = training.load(world.use_case, "dev", AS_OF)
    version = training.train(again)
    assert int(version.version) == 1 and registry.version_numbers(world.env, version.name) == [1]
    result = training.evaluate(again, version)
    assert list(result.table.columns) == ["model", "baseline"]
    assert {"cancelled": "of the rows get a warning", "minutes": "of the labels are inside"}[
        world.use_case.model] in result.sentence
    training.hand_over(again, version)
    assert capsys.readouterr().out.endswith("; the version existed, nothing was trained\n")
    assert list(again.summary.index) == ["training", "held out"]
    assert ("from" in again.summary) == world.use_case.has_time


def test_a_version_that_does_not_hold_the_evaluated_model_is_an_error(world):
    client = registry.client(world.env)
    run = client.create_run(world.run.info.experiment_id)
    client.log_metric(run.info.run_id, world.use_case.problem.loss, 0.123)
    other = SimpleNamespace(name=world.version.name, version="1", run_id=run.info.run_id, tags=world.version.tags)
    with pytest.raises(MlopsError, match="the logged one 0.123"): training.evaluate(world.data, other)


def test_a_version_is_reproduced_to_the_last_digit(world, capsys):
    result = reproduction.reproduce(world.use_case, "dev", world.version.name, "1")
    assert (result.metrics.difference.abs() <= 1e-9).all() and len(result.metrics) >= 6
    reproduction.require_same_metrics(result)
    assert "v1 reproduced: " in capsys.readouterr().out


@pytest.mark.parametrize("world", USE_CASES[:1], ids=lambda use_case: use_case.model, indirect=True, scope="module")
def test_tuning_returns_the_parameters_of_the_best_trial(world):
    data = world.data
    conf = training.tune_parameters(data.use_case, data.env, data.rows, data.split, data.conf,
                                    {"source": "search", "trials": 2, "rows": 100})
    client = registry.client(world.env)
    runs = client.search_runs([world.run.info.experiment_id], order_by=["attributes.start_time DESC"])
    search = next(run for run in runs if run.data.tags.get("tuning") == "search")
    trials = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == search.info.run_id]
    best = min(trials, key=lambda run: run.data.metrics["log_loss"])
    assert len(trials) == 2 and search.data.metrics["log_loss"] == best.data.metrics["log_loss"]
    assert {"num_leaves": str(conf["parameters"]["num_leaves"]), "rounds": str(conf["rounds"])} == best.data.params
