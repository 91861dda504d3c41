"""The checks on evidence given as data: each fault is refused by its own check; configuration mistakes are named."""
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mlops_nb.deployment import validation, validation_checks
from mlops_nb.errors import MlopsError
from mlops_nb.models import metrics, problem_types
from mlops_nb.models.day_resampling import resample
from mlops_nb.models.problem_types import BINARY

pytestmark = [pytest.mark.filterwarnings("ignore:.*IProgress not found"),
              pytest.mark.filterwarnings("ignore:.*Any type hint is inferred")]
TYPES = {"origin": "string", "truth": "double", "wind": "double"}
COSTS = {"missed": 5, "false_warning": 1}
GOVERNANCE = {"required_sections": ["Purpose", "Licence of the data"], "licence_of_data": "CC0",
              "required_tags": ["threshold", "baseline_threshold"], "forbidden_features": ["gender"]}
CARD = "# Card\n\n## Purpose\n\nTests.\n\n## Licence of the data\n\nCC0\n"
TAGS = {"threshold": "0.2", "baseline_threshold": "0.9", "git_sha": "1a2b3c4d", "git_dirty": "false",
        "git_branch": "release/1.2"}
RULES = {"predicts": {}, "signature": {}, "tags": {}, "description": {}, "card": {}, "forbidden": {},
         "release": {"branches": "release/*"}, "size": {"max_bytes": 1000}, "held_out": {"min_rows": 1000},
         "metrics": {"roc_auc": {"threshold": 0.65, "greater_is_better": True}},
         "logged": {"tolerance": 1e-6}, "improvement": {"min_relative_change": 0.02},
         "calibration": {"max_error": 0.05}, "slices": {"min_rows": 300, "max_relative_change": 0.05},
         "latency": {"max_milliseconds": 100}, "robust": {}}


def signature(types, outputs=True):
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, Schema
    inputs = Schema([ColSpec(kind, name) for name, kind in types.items()])
    return ModelSignature(inputs, Schema([ColSpec("double", "p")]) if outputs else None)


def informative(rows): return pd.to_numeric(rows.truth).clip(0.02, 0.98).fillna(0.3).to_numpy("float64")


def held(rows=6000, days=20):
    random = np.random.default_rng(3)
    truth = random.beta(1, 2, rows)
    origin = random.choice(["JFK", "EWR", "LGA"], rows, p=[0.5, 0.4, 0.1])
    frame = pd.DataFrame({"origin": origin, "truth": truth, "wind": random.normal(size=rows)})
    label = (random.uniform(size=rows) < truth).astype(int)
    day = np.datetime64("2024-01-01") + np.arange(rows) * days // rows
    return validation_checks.HeldOut(frame, label, np.full(rows, label.mean()), day, BINARY, ("origin",))


def true_metrics(held_out, prediction):
    "The metrics that a run of this model logs."
    model = metrics.binary_metrics(held_out.label, prediction, 0.2, COSTS)
    baseline = metrics.binary_metrics(held_out.label, held_out.baseline, 0.9, COSTS)
    return model | {f"baseline_{name}": value for name, value in baseline.items()}


HELD = held()
TRUE_METRICS = true_metrics(HELD, informative(HELD.rows))


@pytest.fixture
def few_draws_and_calls(monkeypatch):
    "Fewer draws and calls, enough to detect an obvious fault."
    monkeypatch.setattr(validation_checks, "LATENCY_CALLS", 5)
    monkeypatch.setattr(problem_types, "resample", lambda *arguments: resample(*arguments[:2], times=100))


def evidence(model=informative, held_out=HELD, **changed):
    "The evidence of a good version with some changes; its logged metrics are true, or empty if it cannot predict."
    logged = TRUE_METRICS
    if model is not informative or held_out is not HELD:
        try: logged = true_metrics(held_out, model(held_out.rows.copy()))
        except Exception: logged = {}
    good = dict(types=TYPES, model=model, signature=signature(TYPES), spec=TYPES, size=900, tags=TAGS,
                example=HELD.rows[list(TYPES)].head(3), recorded=TAGS, description="It forecasts.", card=CARD,
                logged=logged, held_out=held_out, problem=BINARY, costs=COSTS, governance=GOVERNANCE)
    return validation_checks.Evidence(**good | changed)


def run_checks(evidence, rules=RULES): return validation.run_checks(validation_checks.checks(rules, evidence))


def raises(rows): raise RuntimeError("no trees")
def fails_on_many_rows(rows):
    if len(rows) > 100: raise RuntimeError("too many")
    return informative(rows)
def strict(rows):
    if (rows.origin == "never seen before").any(): raise KeyError("never seen before")
    return informative(rows)
def slow(rows):
    from time import sleep
    if len(rows) == 1: sleep(0.15)
    return informative(rows)
def weak(rows): return np.where(pd.to_numeric(rows.wind) > 0.3, informative(rows), HELD.label.mean())
def unfair(rows): return np.where(rows.origin == "LGA", 0.6, informative(rows))
def pessimist(rows): return np.clip(informative(rows) + 0.09, 0.02, 0.98)


@pytest.mark.parametrize(("check", "reason", "changed"), [
    ("predicts", "raised RuntimeError: no trees", dict(model=raises)),
    ("predicts", "the model cannot be loaded: gone",
     dict(load_error="the model cannot be loaded: gone", signature=None, spec=None)),
    ("predicts", "3 of 3 predictions are not finite", dict(model=lambda rows: np.full(len(rows), np.nan))),
    ("predicts", "shape (3, 2), not (3,)", dict(model=lambda rows: np.full((len(rows), 2), 0.5))),
    ("predicts", "shape (2,), not (3,)", dict(model=lambda rows: informative(rows)[1:])),
    ("predicts", "on a row of nulls: 1 of 1", dict(model=lambda rows: pd.to_numeric(rows.truth).to_numpy("float64"))),
    ("predicts", "on the held-out rows: raised RuntimeError: too many", dict(model=fails_on_many_rows)),
    ("predicts", "on the held-out rows: 1 of 6000 predictions are not finite",
     dict(model=lambda rows: np.where(rows.truth == HELD.rows.truth[7], np.nan, informative(rows)),
          example=HELD.rows[list(TYPES)].tail(3))),
    ("predicts", "no input example is stored", dict(example=None)),
    ("signature", "the model has no signature", dict(signature=None)),
    ("signature", "the signature has no outputs", dict(signature=signature(TYPES, outputs=False))),
    ("signature", "features missing from the inputs: wind",
     dict(signature=signature({"origin": "string", "truth": "double"}))),
    ("signature", "truth (long, the feature is double)", dict(signature=signature(TYPES | {"truth": "long"}))),
    ("signature", "no readable feature spec", dict(spec=None)),
    ("signature", "wind (absent in the spec stored with the model, double among the inputs)",
     dict(spec={"origin": "string", "truth": "double"})),
    ("signature", "truth (string in the spec", dict(spec=TYPES | {"truth": "string"})),
    ("tags", "the version has no tag 'threshold'",
     dict(tags={name: TAGS[name] for name in TAGS if name != "threshold"})),
    ("tags", "tag 'threshold' is '0.01', but '0.2' was recorded", dict(tags=TAGS | {"threshold": "0.01"})),
    ("tags", "the version has no run, so its tags cannot be verified", dict(recorded={}, held_out=None)),
    ("description", "the version has no description", dict(description="\n## Validation\n\n| a | b |")),
    *[("release", reason, dict(tags=TAGS | {tag: value}, recorded=TAGS | {tag: value})) for tag, value, reason in (
        ("git_branch", "main", "commit 1a2b3c4 is of branch 'main', and a version of this target must be of release/*"),
        ("git_dirty", "true", "the code differs from commit 1a2b3c4: commit the changes, train again"),
        ("git_dirty", "unknown", "deploy it with make deploy"))],
    ("card", "there is no model card", dict(card=None)),
    ("card", "the card has no section 'Purpose'", dict(card="## Licence of the data\n\nCC0\n")),
    ("card", "the card does not name the licence of the data: CC0", dict(card=CARD.replace("CC0", "unknown"))),
    ("forbidden", "feature 'wind' is forbidden: its name contains 'win'",
     dict(governance=GOVERNANCE | {"forbidden_features": ["win"]})),
    ("size", "1,001 bytes, at most 1,000", dict(size=1001)),
    ("held_out", "900 held-out rows, at least 1,000", dict(held_out=held(900))),
    ("held_out", "all held-out rows are from one day", dict(held_out=held(days=1))),
    ("held_out", "all held-out labels are equal", dict(held_out=replace(HELD, label=np.zeros(6000, int)))),
    ("held_out", "1 held-out row has no baseline",
     dict(held_out=replace(HELD, baseline=np.r_[np.nan, HELD.baseline[1:]]))),
    ("metrics", "roc_auc is 0.", dict(model=weak)),
    ("logged", "log_loss was logged as 0.100000, computed is 0.", dict(logged=TRUE_METRICS | {"log_loss": 0.1})),
    ("logged", "log_loss was logged as nan", dict(logged=TRUE_METRICS | {"log_loss": np.nan})),
    ("logged", "baseline_brier_score was not logged",
     dict(logged={k: v for k, v in TRUE_METRICS.items() if k != "baseline_brier_score"})),
    ("improvement", "unchanged (95% interval 0.0% to 0.0%), at least 2.0% lower is required",
     dict(held_out=replace(HELD, baseline=informative(HELD.rows)))),
    ("calibration", "at most 0.05 is allowed", dict(model=pessimist)),
    ("slices", "origin LGA: log_loss", dict(model=unfair)),
    ("latency", "at most 100 ms is allowed", dict(model=slow)),
    ("robust", "on unseen categories: raised KeyError", dict(model=strict)),
    ("robust", "on infinities: 50 of 50 predictions are outside 0 to 1",
     dict(model=lambda rows: np.where(np.isinf(pd.to_numeric(rows.wind)), 2.0, informative(rows)))),
])
def test_each_fault_is_refused_by_its_check_alone(check, reason, changed, few_draws_and_calls):
    failures = validation.failures(run_checks(evidence(**changed)))
    assert {line.split(": ")[0] for line in failures} == {check}, failures
    assert reason in " ".join(failures)


def test_a_good_version_passes_every_check():
    results = run_checks(evidence())
    assert set(results) == set(validation_checks.CHECKS) and not any(results.values()), results


def test_a_bad_slice_is_refused_although_the_model_is_better_overall():
    results = run_checks(evidence(model=unfair))
    assert results["improvement"] == [] == results["metrics"] and len(results["slices"]) == 1
    small = run_checks(evidence(model=unfair, held_out=held(2000)))  # 200 flights from LaGuardia: below min_rows
    assert small["slices"] == []


def test_a_model_that_is_better_only_by_chance_is_refused():
    "All of the improvement is on one of twenty days."
    lucky = HELD.days == HELD.days[0] + 4
    baseline = np.where(lucky, 0.5 + 0.49 * (1 - 2 * HELD.label), informative(HELD.rows))
    reasons = run_checks(evidence(held_out=replace(HELD, baseline=baseline)))["improvement"]
    assert len(reasons) == 1 and "the whole interval must be below 0%" in reasons[0]


def test_a_check_that_was_not_evaluated_never_passes_a_version():
    results = run_checks(evidence(model=raises), {"slices": {"min_rows": 300, "max_relative_change": 1}})
    assert validation.failures(results) == ["slices: not evaluated: the model's predictions cannot be used"]
    results = run_checks(evidence(), {"slices": {"min_rows": 9999, "max_relative_change": 1}})
    assert validation.failures(results) == ["slices: not evaluated: no slice has 9,999 rows"]


def test_the_model_predicts_the_held_out_rows_once_for_all_metrics():
    calls = []
    def counted(rows):
        calls.append(len(rows))
        return informative(rows)
    version = evidence(model=counted, logged=TRUE_METRICS)
    calls.clear()
    assert not any(run_checks(version).values()) and calls.count(len(HELD.rows)) == 1


def test_a_model_that_changes_its_input_does_not_change_the_evidence():
    def changes_input(rows):
        prediction = informative(rows)
        rows["truth"] = 0.0
        return prediction
    version = evidence(model=changes_input, logged=TRUE_METRICS)
    assert not any(run_checks(version).values()) and (HELD.rows.truth > 0).all()


@settings(deadline=None, max_examples=10)
@given(st.floats(-0.02, 0.02))
def test_logged_metrics_may_differ_by_at_most_the_tolerance(change):
    assume(abs(abs(change) - 0.01) > 1e-9)
    version = evidence(logged=TRUE_METRICS | {"roc_auc": TRUE_METRICS["roc_auc"] + change})
    assert (validation_checks.check_logged(version, tolerance=0.01) == []) == (abs(change) <= 0.01)


@pytest.mark.parametrize(("rules", "message"), [
    ({"latencie": {}}, "conf/validation.yml: checks.latencie: no check 'latencie'\n  did you mean 'latency'"),
    ({"slices": {"min_row": 3, "max_relative_change": 1}},
     "checks.slices.min_row: no key 'min_row'\n  did you mean 'min_rows'"),
    ({"slices": {"min_rows": 3}}, "checks.slices.max_relative_change: the key is missing"),
    ({"robust": {"rows": 3}}, "checks.robust.rows: no key 'rows'"),
    ({"metrics": {"logloss": {"threshold": 1, "greater_is_better": False}}},
     "checks.metrics.logloss: no metric 'logloss'\n  did you mean 'log_loss'"),
    ({"metrics": {"log_loss": {"treshold": 1, "greater_is_better": False}}}, "did you mean 'threshold'"),
    ({"metrics": {"log_loss": {"threshold": float("nan"), "greater_is_better": False}}},
     "checks.metrics.log_loss.threshold: NaN is not valid"),
    ({"metrics": {"roc_auc": {"threshold": 0.7, "greater_is_better": False}}},
     "greater_is_better: false is not valid\n  it must be true"),
    ({"metrics": {"log_loss": 0.7}}, "checks.metrics.log_loss: 0.7 is not valid"),
    ({"size": {"max_bytes": True}}, "checks.size.max_bytes: true is not valid"),
    ({"size": {"max_bytes": -1}}, "from 1 on"),
    ({"size": 9}, "checks.size: 9 is not valid"),
    ({}, "no check is enabled"), (None, "no check is enabled"), (["predicts"], "no check is enabled"),
])
def test_a_mistake_in_the_configuration_is_named(rules, message):
    with pytest.raises(MlopsError, match=message): validation_checks.check_rules(rules, BINARY)


def test_a_model_that_ends_the_process_or_returns_a_ragged_list_has_no_predictions():
    def exits(rows): raise SystemExit(0)
    def exits_on_many(rows): return informative(rows) if len(rows) < 10 else exits(rows)
    def ragged_for_many(rows): return informative(rows) if len(rows) < 10 else [[0.5], [0.5, 0.5]]
    for model, reason in ((exits, "raised SystemExit: 0"), (exits_on_many, "on the held-out rows: raised SystemExit"),
                          (ragged_for_many, "on the held-out rows: raised ValueError")):
        model_evidence = replace(evidence(), model=model)
        results = validation.run_checks(validation_checks.checks(RULES, model_evidence))
        assert results["predicts"][0].startswith(reason)
        assert results["metrics"] == ["not evaluated: the model's predictions cannot be used"]
        with pytest.raises(validation.NotEvaluated): validation_checks.plot_metrics(model_evidence, RULES["metrics"])
