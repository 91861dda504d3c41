"""Validation, deployment, comparison and approval of two small use cases: probabilities without a time, and numbers
with one. Each has a version that knows how its rows were made and one that does not, on a store of their own."""
import shutil
from datetime import date
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from small_use_cases import CUSTOMERS, DELIVERIES, FORMULAS, conf_files, home_of, write_tables

from mlops_nb import feature_client, tables
from mlops_nb.data.session import get_spark, stop
from mlops_nb.deployment import aliases
from mlops_nb.errors import MlopsError
from mlops_nb.models import registry
from mlops_nb.workflow import approving, comparing, deploying, rows, validating

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*IProgress not found"),
              pytest.mark.filterwarnings("ignore:.*type hint")]
POOR = {"cancelled": "np.full(len(model_input), 0.3)", "minutes": "34 + 2 * model_input['distance']"}
CODE = """
import numpy as np
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel
class Formula(PythonModel):
    def predict(self, context, model_input, params=None):
        model_input = model_input.assign(**model_input.select_dtypes("number").clip(0, 60).fillna(1.0))
        return np.asarray({formula}, "float64")
set_model(Formula())
"""
COSTS = {"missed": 5, "false_warning": 1}
GOVERNANCE = {"owner": "us", "contact": "us@example.com", "purpose": "Tests.", "not_for": "Other uses.",
              "licence_of_data": "CC0", "limits": ["made up"], "required_sections": ["Purpose"],
              "required_tags": ["as_of"], "forbidden_features": ["gender"]}
SPLITS = {"cancelled": {"held_out_share": "0.4"},
          "minutes": {"trained_through": "2021-03-21", "held_out_from": "2021-03-22", "held_out_to": "2021-04-10"}}
PARAMETERS = {"cancelled": {"held_out_share": 0.4}, "minutes": {"held_out_days": 20}}
POINTS = {"cancelled": {"threshold": "0.2", "baseline_threshold": "0.2", "baseline_value": "0.35"},
          "minutes": {"interval_low": "-9.0", "interval_high": "9.0"}}
COMMON = {"blocks": 2, "min_rows": 50, "min_slice_rows": 20, "rounds": 5, "custom_metrics": {}}
TRAIN = {"cancelled": COMMON | {"held_out_share": 0.4, "costs": COSTS, "parameters": {"objective": "binary"}},
         "minutes": COMMON | {"held_out_days": 20, "parameters": {"objective": "regression"}}}
LOSS, AS_OF = {"cancelled": "log_loss", "minutes": "root_mean_squared_error"}, "2021-04-11"


def rules(name, floor):
    "The content of conf/validation.yml."
    metric = {LOSS[name]: {"threshold": floor, "greater_is_better": False}}
    checks = {"predicts": {}, "signature": {}, "tags": {}, "held_out": {"min_rows": 100}, "metrics": metric,
              "slices": {"min_rows": 20, "max_relative_change": 0.5}, "robust": {}}
    deployment = {"mode": "compare", "metric": LOSS[name], "greater_is_better": False, "min_rows": 100,
                  "min_relative_change": 0.01, "confidence": 0.95, "floor": floor}
    return {"checks": checks, "deployment": deployment}


def register(use_case, spark, env, formula):
    "Register a formula as a version, with the tags and parameters that its training records."
    import mlflow
    code, name = Path(env.state, "formula.py"), env.model(use_case.model)
    code.write_text(CODE.format(formula=formula))
    training_set = rows.labelled_training_set(use_case, spark, env,
                                              rows.labelled(use_case, spark, env, date.fromisoformat(AS_OF)))
    example = rows.as_input(use_case, training_set.load_df()).limit(3).toPandas()
    types = [mlflow.types.ColSpec(kind, feature) for feature, kind in rows.input_types(use_case).items()]
    signature = mlflow.models.ModelSignature(mlflow.types.Schema(types),
                                             mlflow.types.Schema([mlflow.types.ColSpec("double", "prediction")]))
    tags = {"as_of": AS_OF, "owner": "us", "read_versions": "{}"} | SPLITS[use_case.model] | POINTS[use_case.model]
    with mlflow.start_run(experiment_id=registry.experiment_id(env, use_case.model), tags=tags) as run:
        mlflow.log_params(PARAMETERS[use_case.model])
        mlflow.log_metrics({"mean": 1.0, "baseline_mean": 2.0})
        info = feature_client(spark, env).log_model(
            model=str(code), artifact_path="formula", flavor=mlflow.pyfunc, training_set=training_set,
            pip_requirements=["mlflow"], signature=signature, input_example=example)
    version = registry.client(env).create_model_version(name, info.model_uri, run.info.run_id, tags)
    registry.client(env).update_model_version(name, version.version, "It forecasts.")


@pytest.fixture(scope="module", params=[CUSTOMERS, DELIVERIES], ids=lambda use_case: use_case.model)
def world(request, tmp_path_factory, empty_store):
    "A use case with its tables, and the versions 1 (a poor one) and 2 (a good one)."
    use_case, folder = request.param, tmp_path_factory.mktemp("gates")
    shutil.copy(empty_store, folder / "mlflow.db")
    env, name = home_of(folder), use_case.model
    floor = {"cancelled": 0.69, "minutes": 20.0}[name]
    conf_files(folder, validation=rules(name, floor), governance=GOVERNANCE, train=TRAIN[name],
               features={"area_daily": {"columns": {"area": {"type": "string"}}}})
    stop()
    spark = get_spark(env)
    write_tables(use_case, spark, env)
    registry.client(env).create_registered_model(env.model(name))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
        patch.setenv("GIT_PYTHON_REFRESH", "quiet")
        for module in (validating, deploying, comparing, approving):
            patch.setattr(module, "load_env", lambda target: env)
        for formula in (POOR[name], FORMULAS[name]): register(use_case, spark, env, formula)
        yield SimpleNamespace(use_case=use_case, env=env, spark=spark, name=env.model(name))
    stop()


def held_out_by_pandas(world) -> pd.DataFrame:
    "The rows that neither version has learnt from, selected by pandas from the source."
    source = tables.read(world.spark, world.env, world.use_case.source[0])
    if world.use_case.has_time:
        frame = source.toPandas()
        return frame[(frame.delivery_day > date(2021, 3, 21)) & (frame.delivered_at < pd.Timestamp(AS_OF))]
    frame = source.toPandas().dropna(subset="cancelled")
    import zlib
    group = frame.customer_id.map(lambda key: zlib.crc32(str(key).encode()) % rows.GROUPS)
    calls = tables.read(world.spark, world.env, "customer_calls").toPandas()
    return frame[group < 0.4 * rows.GROUPS].drop(columns="calls").merge(calls, on="customer_id")


def predicted(formula, frame) -> np.ndarray:
    return np.asarray(eval(formula, {"np": np, "model_input": frame}), float)


def loss(world, frame, prediction) -> float:
    label = frame[world.use_case.label].to_numpy(float)
    if world.use_case.has_time: return np.sqrt(((label - prediction) ** 2).mean())
    return -(label * np.log(prediction) + (1 - label) * np.log(1 - prediction)).mean()


def test_a_version_is_validated_on_the_rows_that_it_has_not_learnt_from(world, capsys):
    frame, name = held_out_by_pandas(world), world.use_case.model
    for number, formula in ((1, POOR[name]), (2, FORMULAS[name])):
        candidate = validating.gather(world.use_case, "dev", world.name, str(number))
        assert registry.get_version(world.env, world.name, number).tags["model_validation_status"] == "PENDING"
        section = validating.validate_candidate(candidate).data
        assert len(candidate.evidence.held_out.rows) == len(frame) > 100
        metrics = candidate.evidence.metrics.model
        assert metrics[LOSS[name]] == pytest.approx(loss(world, frame, predicted(formula, frame)))
        assert section.count("| passed |") == 7, section
        validating.plot_rules(candidate)
        assert validating.slices_table(candidate) is not None
        validating.finish_validation(candidate)
        assert capsys.readouterr().out == f"{world.name} v{number} passed 7 checks\n"
        assert registry.get_version(world.env, world.name, number).tags["model_validation_status"] == "PASSED"


def test_the_better_version_becomes_champion_and_the_comparison_is_that_of_pandas(world, capsys):
    frame, name = held_out_by_pandas(world), world.use_case.model
    client = registry.client(world.env)
    for number in ("1", "2"): client.set_model_version_tag(world.name, number, "model_validation_status", "PASSED")
    for number, opponent in ((1, "the baseline"), (2, "v1")):
        deployment = deploying.validated_version(world.use_case, "dev", world.name, str(number))
        text = deploying.decide_deployment(deployment).data
        metrics = deploying.both_metrics(deployment)
        assert list(metrics) == [f"v{number}", opponent]
    assert text.startswith(f"**{world.name} v2 is Champion: {LOSS[name]}") and f"on {len(frame):,} rows" in text
    expected = [loss(world, frame, predicted(formula, frame)) for formula in (FORMULAS[name], POOR[name])]
    assert metrics.loc[LOSS[name]].tolist() == pytest.approx(expected, abs=1e-4)
    for picture in (deploying.loss_picture, deploying.change_picture): assert picture(deployment).data[:4] == b"\x89PNG"
    assert "passed validation" in deploying.moves_table(deployment).to_html()
    deploying.finish_deployment(deployment)
    assert aliases.points_to(world.env, world.name, "champion") == 2
    assert f"{world.name} v2 is Champion" in capsys.readouterr().out


def test_two_versions_are_compared_without_a_move(world, capsys):
    frame, name = held_out_by_pandas(world), world.use_case.model
    before = registry.client(world.env).get_registered_model(world.name).aliases
    pair = comparing.compare_pair(world.use_case, "dev", f"{name}/1", f"{name}/2", "")
    expected = [loss(world, frame, predicted(formula, frame)) for formula in (POOR[name], FORMULAS[name])]
    assert comparing.pair_metrics(pair).loc[LOSS[name]].tolist() == pytest.approx(expected, abs=1e-4)
    comparing.plot_pair(pair)
    comparing.finish_comparison(pair)
    output = capsys.readouterr().out
    assert f"{LOSS[name]} " in output and output.rstrip().endswith(str(comparing.pair_picture(pair)))
    assert comparing.pair_picture(pair).stat().st_size > 10_000
    assert registry.client(world.env).get_registered_model(world.name).aliases == before
    with pytest.raises(MlopsError, match="both references name"):
        comparing.compare_pair(world.use_case, "dev", f"{name}/1", f"{name}/1", "")


def test_changed_tags_that_define_other_rows_are_refused(world):
    number, client = "1", registry.client(world.env)
    tag, value = ("trained_through", "2021-02-01") if world.use_case.has_time else ("held_out_share", "0.9")
    original = registry.get_version(world.env, world.name, number).tags[tag]
    client.set_model_version_tag(world.name, number, tag, value)
    try:
        candidate = validating.gather(world.use_case, "dev", world.name, number)
        validating.validate_candidate(candidate)
        assert candidate.results["tags"][0].startswith(f"tag '{tag}' is '{value}', but ")
        assert candidate.results["held_out"] == ["not evaluated: the tags do not define the held-out rows"]
        assert validating.plot_rules(candidate) is None and validating.slices_table(candidate) is None
        with pytest.raises(MlopsError, match="v1 failed its validation"): validating.finish_validation(candidate)
    finally: client.set_model_version_tag(world.name, number, tag, original)


def test_an_approval_shows_the_metrics_beside_the_baseline(world, capsys):
    request = approving.request_approval("dev", world.name, "2", True, "approval_check")
    assert approving.metrics_table(request).loc["mean"].tolist() == [1.0, 2.0]
    assert approving.version_description(request).data.startswith("It forecasts.")
    with pytest.raises(MlopsError, match="waits for approval"): approving.finish_approval(request)
    approving.finish_approval(approving.request_approval("dev", world.name, "2", False, "approval_check"))
    assert capsys.readouterr().out == "target 'dev' requires no approval\n"
