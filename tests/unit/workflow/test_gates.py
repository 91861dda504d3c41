"""Validation, deployment and comparison of any use case: which rows count, and what the tags of a version must be."""
from dataclasses import replace
from datetime import date
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlops_nb.deployment import validation_checks
from mlops_nb.deployment.comparison import Contender
from mlops_nb.env import load_env
from mlops_nb.errors import MlopsError
from mlops_nb.flights.use_case import FLIGHTS
from mlops_nb.models.problem_types import BINARY, REGRESSION
from mlops_nb.workflow import comparing, deploying, validating
from mlops_nb.workflow.rows import ROW_GROUP
from mlops_nb.workflow.splits import Split
from mlops_nb.workflow.use_case import UseCase

pytestmark = pytest.mark.filterwarnings("ignore:.*Any type hint is inferred")


def no_rows(*_): raise NotImplementedError


DELIVERIES = UseCase(model="minutes", problem=REGRESSION, key=("delivery_id",), label="minutes", rows=no_rows,
                     labels=no_rows, source=("deliveries",), features=("distance", "area_minutes"), lookups=no_rows,
                     baseline="area_minutes", day="delivery_day", prediction_time="asked_at",
                     label_known_at="delivered_at")
CUSTOMERS = UseCase(model="cancelled", problem=BINARY, key=("customer_id",), label="cancelled", rows=no_rows,
                    labels=no_rows, source=("customers",), features=("months", "calls"), lookups=no_rows)
DATES = ("as_of", "trained_through", "held_out_from", "held_out_to")


def test_this_project_enables_every_check_and_each_has_a_docstring():
    checks = validating.read_checks(FLIGHTS, load_env("dev").root)
    of_targets = {"release"}  # the variable release_branches of a target adds it
    assert list(checks) == [name for name in validation_checks.CHECKS if name not in of_targets]
    assert all(check.__doc__ for check in validation_checks.CHECKS.values())


def test_date_tags_count_only_with_their_recorded_values():
    tags = {"as_of": "2013-04-01", "read_versions": "{}", "owner": "us"}
    recorded = validating.recorded_of(DELIVERIES, tags, {"held_out_days": "28"})
    assert recorded == {"as_of": "2013-04-01", "read_versions": "{}", "owner": "us", "trained_through": "2013-03-03",
                        "held_out_from": "2013-03-04", "held_out_to": "2013-03-31"}
    assert validating.recorded_split(DELIVERIES, recorded, recorded) == Split(date(2013, 4, 1), 28, None)
    for tag in (*DATES, "read_versions"): check_one_tag(DELIVERIES, recorded, tag, "2013-03-20")


def check_one_tag(use_case, recorded, tag, other):
    "Without the tag, or with another value, the held-out rows are not defined."
    without = {name: value for name, value in recorded.items() if name != tag}
    assert validating.recorded_split(use_case, without, recorded) is None
    assert validating.recorded_split(use_case, recorded | {tag: other}, recorded) is None


def test_without_a_time_the_share_and_the_constant_baseline_define_the_held_out_rows():
    tags = {"as_of": "2013-04-01", "read_versions": "{}", "baseline_value": "0.25"}
    recorded = validating.recorded_of(CUSTOMERS, tags, {"held_out_share": "0.2"})
    assert recorded == {"as_of": "2013-04-01", "read_versions": "{}", "baseline_value": "0.25", "held_out_share": "0.2"}
    assert validating.recorded_split(CUSTOMERS, recorded, recorded) == Split(date(2013, 4, 1), None, 0.2)
    for tag in ("as_of", "held_out_share", "baseline_value", "read_versions"):
        check_one_tag(CUSTOMERS, recorded, tag, "0.1")


TEXTS = st.one_of(st.text(max_size=12), st.dates().map(str), st.sampled_from(["{}", "[1]"]))


@settings(max_examples=60)
@given(st.dictionaries(st.sampled_from(["as_of", "trained_through", "held_out_from", "read_versions", "owner"]), TEXTS),
       st.one_of(st.text(max_size=5), st.integers(-400, 10**12).map(str)))
def test_tags_and_parameters_of_any_text_define_a_split_or_none(tags, days):
    recorded = validating.recorded_of(DELIVERIES, tags, {"held_out_days": days})
    split = validating.recorded_split(DELIVERIES, tags | recorded, recorded)
    if split is None: return
    assert split.held_out_days == int(days) >= 1 and tags["read_versions"] == "{}"
    assert str(split.as_of) == recorded["as_of"]


@settings(max_examples=60)
@given(st.dictionaries(st.sampled_from(["as_of", "baseline_value", "read_versions"]), TEXTS),
       st.one_of(st.text(max_size=5), st.floats().map(str)))
def test_without_a_time_too(tags, share):
    tags = {"as_of": "2021-01-01", "baseline_value": "0.5", "read_versions": "{}"} | tags
    recorded = validating.recorded_of(CUSTOMERS, tags, {"held_out_share": share})
    split = validating.recorded_split(CUSTOMERS, tags | recorded, recorded)
    if split is not None: assert 0 < split.held_out_share == float(share) < 1


def version(number, **tags): return SimpleNamespace(name="dev.shop.m", version=number, tags=tags)


def test_two_versions_are_compared_on_the_same_rows_whichever_is_the_champion(monkeypatch):
    "An older version is compared with the Champion on the rows after the Champion's training data."
    april = version(1, as_of="2013-04-01", trained_through="2013-03-03")
    july = version(2, as_of="2013-07-01", trained_through="2013-06-02")
    monkeypatch.setattr(deploying, "labelled_rows", lambda use_case, spark, env, as_of, after: (after, as_of))
    def rows(*versions): return deploying.comparable_rows(DELIVERIES, None, None, *versions)
    june = (date(2013, 6, 2), date(2013, 7, 1))
    assert rows(july, april) == rows(april, july) == june
    assert rows(april, None) == (date(2013, 3, 3), date(2013, 4, 1))
    assert comparing.comparison_day(april, july) == comparing.comparison_day(july, april) == june[1]


def test_without_a_time_they_are_compared_on_the_rows_that_both_hold_out(monkeypatch):
    "A row is held out if its group is below the share of 200 groups: the rows of the smaller share are in both."
    customers = pd.DataFrame({"customer_id": np.arange(2000), ROW_GROUP: np.arange(2000) % 200})
    monkeypatch.setattr(deploying, "labelled_rows", lambda use_case, spark, env, as_of: customers)
    wide = version(1, as_of="2013-04-01", held_out_share="0.25")
    narrow = version(2, as_of="2013-07-01", held_out_share="0.1")
    def groups(*versions): return set(deploying.comparable_rows(CUSTOMERS, None, None, *versions)[ROW_GROUP])
    assert groups(wide, narrow) == groups(narrow, wide) == set(range(20))
    assert groups(wide, None) == set(range(50))
    with pytest.raises(MlopsError, match="version 3 .* has no tag 'held_out_share' that is a number"):
        groups(version(3, as_of="2013-07-01"), narrow)


@pytest.mark.parametrize(("use_case", "message"), [
    (DELIVERIES, "2 rows from after 2013-03-03 until 2013-07-01: too few days to compare"),
    (CUSTOMERS, "2 rows that are held out from both versions: too few to compare")])
def test_too_few_rows_to_compare_are_named(use_case, message):
    rows, april = pd.DataFrame({ROW_GROUP: [1, 2]}), version(1, trained_through="2013-03-03")
    with pytest.raises(MlopsError, match=message):
        comparing.require_groups(use_case, rows, date(2013, 7, 1), (april, april))


class Model:
    "A loaded model that returns what it is given."
    def __init__(self, output): self.output = output
    def predict(self, rows): return self.output


@pytest.mark.parametrize(("use_case", "output", "message"), [
    (CUSTOMERS, np.array([0.2, 1.5]), "1 of 2 predictions are outside 0 to 1"),
    (DELIVERIES, np.array([20.0, np.inf]), "1 of 2 predictions are not finite"),
    (DELIVERIES, np.array([20, 30]), "predictions are int64, not float64")])
def test_a_contender_needs_one_valid_prediction_for_each_row(use_case, output, message):
    rows = pd.DataFrame(0.0, index=[0, 1], columns=list(use_case.features))
    with pytest.raises(MlopsError, match=f"v1 cannot be compared: {message}"):
        deploying.checked_predictions(use_case, Model(output), rows, "v1")
    valid = np.array([0.2, 0.9])
    assert deploying.checked_predictions(use_case, Model(valid), rows, "v1") is valid


def test_the_baseline_is_the_declared_feature_or_the_recorded_constant():
    rows = pd.DataFrame({"area_minutes": [20.0, 31.0], "calls": [1.0, 2.0]})
    tags = {"threshold": "0.4", "baseline_threshold": "0.3", "baseline_value": "0.25"}
    heuristic = deploying.baseline_contender(DELIVERIES, version(1), rows)
    assert (heuristic.prediction.tolist(), dict(heuristic.point)) == ([20.0, 31.0], {})
    constant = deploying.baseline_contender(CUSTOMERS, version(1, **tags), rows)
    assert (constant.prediction.tolist(), constant.point) == ([0.25, 0.25], {"threshold": 0.3})
    with pytest.raises(MlopsError, match="baseline_value"):
        deploying.baseline_contender(CUSTOMERS, version(1, **{**tags, "baseline_value": "a quarter"}), rows)
    missing = version(4, **(tags | {"baseline_threshold": "high"}))
    with pytest.raises(MlopsError, match="version 4 of model dev.shop.m has no tag 'baseline_threshold'"):
        deploying.baseline_contender(CUSTOMERS, missing, rows)


def test_a_regression_is_compared_by_its_own_metrics():
    random, days = np.random.default_rng(2), np.repeat(np.arange(20), 30)
    label = random.gamma(3, 10, 600)
    near, far = (label + random.normal(0, noise, 600) for noise in (2, 6))
    match = deploying.Match(label, days, Contender("v2", near, {}), Contender("v1", far, {}), REGRESSION)
    rule = dict(mode="compare", metric="root_mean_squared_error", greater_is_better=False, min_rows=100,
                min_relative_change=0.01, confidence=0.95, floor=9)
    result = comparing.compare_predictions(match, rule, {})
    expected = np.sqrt(((near - label) ** 2).mean() / ((far - label) ** 2).mean()) - 1
    assert result.change == pytest.approx(expected) and result.bounds[0] < expected < result.bounds[1] < 0
    swapped = comparing.compare_predictions(replace(match, challenger=match.incumbent, incumbent=match.challenger),
                                            rule, {})
    assert swapped.change == pytest.approx(1 / (1 + expected) - 1) and swapped.decision == "keep"
