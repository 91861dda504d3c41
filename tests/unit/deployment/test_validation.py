"""One version with a fault per check, refused by exactly that check; and the verdict on the version."""
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlops_nb.deployment import validation
from mlops_nb.errors import MlopsError
from mlops_nb.models import registry
from mlops_nb.models.problem_types import BINARY

pytestmark = [pytest.mark.filterwarnings("ignore:.*Any type hint is inferred"),  # MLflow's own, at import
              pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")]
NAME = "dev.flights.late_arrival"
EXAMPLE = pd.DataFrame({"origin": ["JFK", "EWR"], "distance": [100.0, 200.0]})


def model(predict): return SimpleNamespace(predict=predict)


def signature(inputs, outputs=True):
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, Schema
    return ModelSignature(Schema([ColSpec(kind, name) for name, kind in inputs.items()]),
                          Schema([ColSpec("double", "prediction")]) if outputs else None)


FEATURES = {"origin": "string", "distance": "double"}
RULES = {"log_loss": {"threshold": 0.6, "min_relative_change": 0.03, "greater_is_better": False},
         "roc_auc": {"threshold": 0.7, "greater_is_better": True}}
GOOD = dict(signature=FEATURES, outputs=True, predict=lambda rows: np.full(len(rows), 0.3), example=EXAMPLE,
            metrics={"log_loss": 0.45, "roc_auc": 0.74}, baseline={"log_loss": 0.5, "roc_auc": 0.6})


def results_of(**changed):
    version = GOOD | changed
    return validation.run_checks({
        "schema": lambda: validation.signature_reasons(signature(version["signature"], version["outputs"]), FEATURES),
        "example": lambda: validation.check_example(model(version["predict"]), version["example"], BINARY),
        "metrics": lambda: validation.threshold_reasons(version["metrics"], version["baseline"], RULES)})


@pytest.mark.parametrize(("check", "reason", "changed"), [
    ("schema", "inputs that are not features: tailnum", {"signature": FEATURES | {"tailnum": "string"}}),
    ("example", "2 of 2 predictions are outside 0 to 1", {"predict": lambda rows: np.full(len(rows), 7.0)}),
    ("example", "shape (1,), not (2,)", {"predict": lambda rows: np.full(1, 0.5)}),
    ("example", "predictions are int64, not float64", {"predict": lambda rows: np.ones(len(rows), int)}),
    ("metrics", "log_loss is 0.61, at most 0.6 is allowed",  # the rule of roc_auc needs no baseline
     {"metrics": {"log_loss": 0.61, "roc_auc": 0.74}, "baseline": {"log_loss": 0.9}}),
    ("metrics", "log_loss is 0.49, that of the baseline", {"metrics": {"log_loss": 0.49, "roc_auc": 0.74}}),
    ("metrics", "roc_auc of this version is not finite", {"metrics": {"log_loss": 0.45, "roc_auc": float("nan")}}),
    ("metrics", "log_loss of the baseline is not finite", {"baseline": {}}),
])
def test_each_fault_is_refused_by_its_check_alone(check, reason, changed):
    results = results_of(**changed)
    assert [title for title, reasons in results.items() if reasons] == [check]
    assert reason in " ".join(results[check])


def test_a_good_version_has_no_failures():
    assert validation.failures(results_of()) == []


@settings(deadline=None)
@given(st.floats(0.01, 2), st.floats(0.01, 2), st.floats(0.001, 0.5))
def test_the_relative_change_is_that_of_the_arithmetic(new, old, least):
    rules = {"log_loss": {"min_relative_change": least, "greater_is_better": False}}
    passed = validation.threshold_reasons({"log_loss": new}, {"log_loss": old}, rules) == []
    assert passed == ((old - new) / old >= least)


@pytest.mark.parametrize(("rules", "message"), [
    ({"log_loss": {"threshold": 1}}, "a metric's rule is wrong"),
    ({"log_loss": {"threshold": "low", "greater_is_better": False}}, "a metric's rule is wrong"),
])
def test_a_mistake_in_the_configuration_is_an_error_not_a_verdict(rules, message):
    with pytest.raises(MlopsError, match=message):
        validation.run_checks({"metrics": lambda: validation.threshold_reasons({"log_loss": 1.0}, {}, rules)})


@pytest.fixture(scope="module")
def env(env):
    "With one version of a model."
    registry.client(env).create_registered_model(NAME)
    registry.client(env).create_model_version(NAME, source=str(env.state))
    return env


def test_the_verdict_goes_from_pending_to_passed_or_failed_with_its_reasons(env):
    def status(): return registry.get_version(env, NAME, 1).tags.get(validation.STATUS)
    statuses = []
    def check_schema():
        statuses.append(status())
        return []
    validation.validate_version(env, NAME, "1", {"schema": check_schema, "example": lambda: ["shape (2,) | 3\nrows"]})
    description = registry.get_version(env, NAME, 1).description
    assert (statuses, status()) == (["PENDING"], "FAILED")
    assert "| schema | passed |" in description and "| example | shape (2,) / 3 rows |" in description

    results = validation.validate_version(env, NAME, 1, {"schema": lambda: []})
    assert status() == "PASSED" and results == {"schema": []}
    assert "shape" not in registry.get_version(env, NAME, 1).description


def test_a_job_that_fails_during_validation_leaves_no_earlier_pass(env):
    def wrong_configuration(): raise MlopsError("conf")
    validation.validate_version(env, NAME, 1, {"schema": lambda: []})
    with pytest.raises(MlopsError): validation.validate_version(env, NAME, 1, {"schema": wrong_configuration})
    assert registry.get_version(env, NAME, 1).tags[validation.STATUS] == "PENDING"


def test_an_unknown_version_is_named_and_another_targets_version_is_not_validated(env):
    with pytest.raises(MlopsError, match="no version '7' in model dev.flights.late_arrival\n  there is only 1"):
        validation.validate_version(env, NAME, 7, {})
    with pytest.raises(MlopsError, match="target 'prod' may not write dev.flights.late_arrival"):
        validation.validate_version(replace(env, target="prod", write=("prod",), read=("prod", "dev")), NAME, 1, {})


def test_the_error_lists_every_reason():
    message = "v3 failed its validation, for 2 reasons:\n  - a: one\n  - a: two\n  .*no alias was moved"
    with pytest.raises(MlopsError, match=message):
        validation.require_passed("m", 3, {"a": ["one", "two"], "b": []})


def test_inputs_whose_type_has_no_name_are_compared_and_named():
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, Schema
    from mlflow.types.schema import AnyType, Array, DataType
    inputs = Schema([ColSpec(Array(DataType.double), "vector"), ColSpec(AnyType(), "any"), ColSpec("double", "x")])
    array_signature = ModelSignature(inputs, Schema([ColSpec("double")]))
    assert validation.signature_reasons(array_signature, {"vector": "Array(double)", "any": "Any", "x": "double"}) == []
    reasons = validation.signature_reasons(array_signature, {"vector": "double", "any": "long", "x": "double"})
    assert reasons == ["inputs with a wrong type: vector (Array(double), the feature is double), "
                       "any (Any, the feature is long)"]
