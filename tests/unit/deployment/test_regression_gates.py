"""Versions that predict numbers: their validation, and the comparison of two of them; rows with and without days."""
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, Schema
from sklearn import metrics as oracle

from mlops_nb.deployment import comparison, promotion, validation, validation_checks
from mlops_nb.deployment.comparison import Contender, compare
from mlops_nb.errors import MlopsError
from mlops_nb.models import registry
from mlops_nb.models.problem_types import BINARY, REGRESSION

pytestmark = [pytest.mark.filterwarnings("ignore:.*IProgress not found"),
              pytest.mark.filterwarnings("ignore:.*Any type hint is inferred")]
RNG = np.random.default_rng(5)
SIZE = RNG.gamma(4, 20, 3000)
PRICE = 10 * SIZE + RNG.normal(0, 30, 3000)
REGION = RNG.choice(["north", "south"], 3000, p=[0.8, 0.2])
DAYS, GROUPS = np.datetime64("2024-01-01") + np.arange(3000) // 150, np.arange(3000) % 200
TYPES = {"region": "string", "size": "double"}
TAGS = {"interval_low": "-49.5", "interval_high": "49.5"}  # nine of ten residuals
GOVERNANCE = {"required_sections": [], "required_tags": list(TAGS), "licence_of_data": "CC0", "forbidden_features": []}
RULES = {"predicts": {}, "signature": {}, "tags": {}, "description": {}, "card": {}, "size": {"max_bytes": 1000},
         "held_out": {"min_rows": 1000}, "logged": {"tolerance": 1e-6}, "improvement": {"min_relative_change": 0.5},
         "metrics": {"r2_score": {"threshold": 0.8, "min_absolute_change": 0.5, "greater_is_better": True},
                     "root_mean_squared_error": {"min_relative_change": 0.5, "greater_is_better": False},
                     "interval_coverage": {"threshold": 0.85, "greater_is_better": True}},
         "slices": {"min_rows": 300, "max_relative_change": 0.1}, "robust": {}}
RULE = dict(mode="compare", metric="root_mean_squared_error", greater_is_better=False, min_rows=100,
            min_relative_change=0.01, confidence=0.95, floor=40)


def fitted(rows): return 10 * pd.to_numeric(rows["size"]).replace([np.inf, -np.inf], np.nan).fillna(80).to_numpy(float)
def far_in_the_south(rows): return fitted(rows) + np.where(rows.region == "south", 700, 0)
def nearly_constant(rows): return np.where(rows.region == "south", PRICE.mean() + 0.1, PRICE.mean())
def fails_on_infinity(rows): return 10 * pd.to_numeric(rows["size"]).fillna(80).to_numpy(float)


def logged_metrics(model):
    "What a run of this model logs, computed by scikit-learn."
    values, baseline = model(pd.DataFrame({"region": REGION, "size": SIZE})), np.full(3000, PRICE.mean())
    metrics = {"interval_coverage": (abs(values - PRICE) <= 49.5).mean(), "interval_width": 99, "example_count": 3000,
               "baseline_example_count": 3000}
    for prefix, prediction in (("", values), ("baseline_", baseline)):
        for name in ("root_mean_squared_error", "mean_absolute_error", "r2_score"):
            metrics[prefix + name] = getattr(oracle, name)(PRICE, prediction)
    return metrics


def evidence(model=fitted, groups=DAYS, **changed):
    "The evidence of a version that predicts prices."
    rows = pd.DataFrame({"region": REGION, "size": SIZE})
    held_out = validation_checks.HeldOut(rows, PRICE, np.full(3000, PRICE.mean()), groups, REGRESSION, ("region",))
    inputs = Schema([ColSpec(kind, name) for name, kind in TYPES.items()])
    signature = ModelSignature(inputs, Schema([ColSpec("double", "prediction")]))
    good = dict(types=TYPES, model=model, signature=signature, spec=TYPES, example=rows.head(3), size=9, tags=TAGS,
                recorded=TAGS, description="Prices.", card="CC0", logged=logged_metrics(model), held_out=held_out,
                problem=REGRESSION, costs={}, governance=GOVERNANCE)
    return validation_checks.Evidence(**good | changed)


def failures(version, rules=RULES):
    return validation.failures(validation.run_checks(validation_checks.checks(rules, version)))


@pytest.mark.parametrize("groups", [DAYS, GROUPS], ids=["days", "groups"])
def test_a_good_version_passes(groups):
    assert failures(evidence(groups=groups)) == []


@pytest.mark.parametrize("check, reason, changed", [
    ("slices", "region south: root_mean_squared_error", dict(model=far_in_the_south)),
    ("robust", "on infinities: 50 of 50 predictions are not finite", dict(model=fails_on_infinity)),
    ("logged", "r2_score was logged as 0.100000", dict(logged=logged_metrics(fitted) | {"r2_score": 0.1})),
    ("logged", "interval_coverage was not logged", dict(logged={
        name: value for name, value in logged_metrics(fitted).items() if name != "interval_coverage"})),
    ("tags", "tag 'interval_high' is '90', but '49.5' was recorded", dict(tags=TAGS | {"interval_high": "90"})),
    ("tags", "interval_low", dict(tags={}, recorded=TAGS))])
def test_each_fault_is_refused_by_its_check(check, reason, changed):
    rules = RULES | {"metrics": {"mean_absolute_error": {"threshold": 500, "greater_is_better": False}}}
    lines = failures(evidence(**changed), {name: rules[name] for name in rules if name != "improvement"})
    assert {line.split(": ")[0] for line in lines} == {check} and reason in " ".join(lines), lines


def test_a_version_that_is_no_better_than_the_mean_is_refused():
    lines = failures(evidence(nearly_constant), {name: RULES[name] for name in ("metrics", "improvement", "predicts")})
    text = "\n".join(lines)
    assert "improvement: root_mean_squared_error against the baseline: unchanged" in text
    assert "r2_score" in text and "interval_coverage" in text and "predicts" not in text


def test_equal_labels_are_no_obstacle():
    "Only classes need both labels. R2 has no value then; the other metrics are judged."
    equal = replace(evidence().held_out, label=np.full(3000, 800.0))
    assert equal.problems == [] and replace(equal, problem=BINARY).problems == ["all held-out labels are equal"]
    table = evidence(held_out=equal).metrics
    assert np.isnan(table.model["r2_score"]) and table.model["root_mean_squared_error"] > 0


def test_messages_of_rows_without_days_speak_of_groups():
    few = replace(evidence(groups=GROUPS % 7))
    lines = validation_checks.check_improvement(few, min_relative_change=0.5)
    assert len(lines) == 1 and "at least 14 held-out groups are needed for a decision, got 7" in lines[0]
    assert replace(few.held_out, days=GROUPS * 0).problems == ["all held-out rows are from one group"]


@pytest.mark.parametrize("rules, message", [
    ({"calibration": {"max_error": 0.1}}, "the check needs probabilities; the problem type is regression"),
    ({"metrics": {"log_loss": {"threshold": 1, "greater_is_better": False}}}, "metrics.log_loss: no metric 'log_loss'"),
    ({"metrics": {"mean_absolute_error": {"threshold": 1, "greater_is_better": True}}}, "it must be false"),
    ({"metrics": {"r2_score": {"min_relative_change": 0.1, "greater_is_better": True}}}, "can be negative")])
def test_a_rule_that_does_not_fit_the_problem_is_named(rules, message):
    with pytest.raises(MlopsError, match=message): validation_checks.check_rules(rules, REGRESSION)


def test_the_metrics_with_a_rule_are_drawn():
    figure = validation_checks.plot_metrics(evidence(), RULES["metrics"])
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert [title.split()[0] for title in titles] == list(RULES["metrics"])
    assert "no baseline" in titles[2] and "baseline 0.000" in titles[0]


def contender(name, spread, seed=1):
    "A contender whose predictions err by a normal with this standard deviation."
    return Contender(name, PRICE + np.random.default_rng(seed).normal(0, spread, 3000), {})


def rmse(side): return oracle.root_mean_squared_error(PRICE, side.prediction)


@pytest.mark.parametrize("groups, unit", [(DAYS, "day"), (GROUPS, "group")])
def test_the_better_of_two_regressors_is_promoted(groups, unit):
    new, old = contender("v2", 20), contender("v1", 25, seed=2)
    won = compare(PRICE, new, old, RULE, {}, groups, REGRESSION, age=30)
    lost = compare(PRICE, old, new, RULE, {}, groups, REGRESSION, age=30)
    assert (won.decision, lost.decision) == ("promote", "keep")
    assert won.change == pytest.approx(rmse(new) / rmse(old) - 1) and won.bounds[0] < won.change < won.bounds[1] < 0
    assert won.metrics.loc["r2_score", "v2"] == pytest.approx(oracle.r2_score(PRICE, new.prediction))
    assert f"draws of {len(np.unique(groups))} {unit}s, blocks of" in won.reason and won.unit == unit
    figure = comparison.plot_losses(groups, PRICE, (new, old), "v2 against v1", REGRESSION)
    order = {"day": "day", "group": "groups of held-out rows, in the order of the loss of v1"}
    assert figure.axes[0].get_xlabel() == order[unit]
    comparison.plot_change(won, RULE["metric"], "v2 against v1", REGRESSION)


@pytest.mark.parametrize("new, old, decision", [
    (20, 25, "promote"), (25, 20, "keep"), (400, 800, "promote"), (800, 400, "keep")])  # the last two have R2 below 0
def test_a_metric_that_can_be_negative(new, old, decision):
    rule = RULE | {"metric": "r2_score", "greater_is_better": True, "min_relative_change": 0.0001, "floor": 0}
    sides = contender("v2", new), contender("v1", old, seed=2)
    result = compare(PRICE, *sides, rule, {}, DAYS, REGRESSION, age=30)
    first, second = (oracle.r2_score(PRICE, side.prediction) for side in sides)
    assert result.change == pytest.approx((first - second) / abs(second)) and result.decision == decision


def test_the_daily_loss_is_the_root_mean_squared_error_of_the_day():
    side = contender("v2", 20)
    losses = comparison.daily_loss(PRICE, side.prediction, DAYS, REGRESSION)
    of_days = [DAYS == day for day in losses.index]
    expected = [oracle.root_mean_squared_error(PRICE[rows], side.prediction[rows]) for rows in of_days]
    assert np.allclose(losses, expected)


def test_equal_labels_can_be_compared_and_few_groups_cannot():
    label = np.full(3000, 7.0)
    near, far = (Contender(name, label + np.random.default_rng(3).normal(0, spread, 3000), {})
                 for name, spread in (("v2", 1), ("v1", 2)))
    assert compare(label, near, far, RULE, {}, DAYS, REGRESSION, age=1).decision == "promote"
    few = compare(label, near, far, RULE, {}, GROUPS % 7, REGRESSION, age=1)
    assert few.decision == "undecided" and few.reason.endswith("at least 14 groups are needed, got 7")


@pytest.mark.parametrize("change, message", [
    ({"metric": "log_loss"}, "the rule of deployment: metric: no metric 'log_loss'"),
    ({"metric": "r2_score"}, "greater_is_better: false is not valid\n  it must be true for r2_score"),
    ({"metric": "interval_width"}, "no metric 'interval_width' in the metrics of v2")])
def test_a_deployment_rule_that_does_not_fit_is_named(change, message):
    with pytest.raises(MlopsError, match=message):
        compare(PRICE, contender("v2", 1), contender("v1", 2), RULE | change, {}, DAYS, REGRESSION, age=1)


def test_a_comparison_of_groups_is_logged_and_read_again(env):
    experiment, client = registry.experiment_id(env, "price"), registry.client(env)
    version, champion = (SimpleNamespace(name="dev.shop.price", version=number) for number in (2, 1))
    match = promotion.Match(PRICE, GROUPS, contender("v2", 20), contender("v1", 25, seed=2), REGRESSION)
    result = compare(PRICE, match.challenger, match.incumbent, RULE, {}, GROUPS, REGRESSION, age=30)
    run_id = promotion.log_comparison(experiment, "digest", version, champion, match, result, RULE)
    logged = promotion.logged_comparison(client.get_run(run_id))
    assert {file.path for file in client.list_artifacts(run_id)} == {"change.png", "loss_by_group.png", "rule.json"}
    assert (logged.decision, logged.change, logged.bounds) == ("promote", result.change, result.bounds)
