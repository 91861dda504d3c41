"""Learning from rows with and without time, against pandas, scikit-learn and LightGBM used directly."""
from dataclasses import replace
from datetime import date, timedelta
from math import ceil

import lightgbm
import numpy as np
import pandas as pd
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.metrics import log_loss, root_mean_squared_error
from sklearn.model_selection import PredefinedSplit, cross_val_predict

from mlops_nb.errors import MlopsError
from mlops_nb.models.learners import function_learner, sklearn_learner
from mlops_nb.models.problem_types import BINARY, REGRESSION
from mlops_nb.workflow import learning, splits
from mlops_nb.workflow.rows import GROUPS, ROW_GROUP
from mlops_nb.workflow.splits import Split
from mlops_nb.workflow.use_case import UseCase

rng = np.random.default_rng(8)
COUNT = 3000
DAY = np.sort([date(2024, 1, 1) + timedelta(days=int(day)) for day in rng.integers(0, 50, COUNT)])
PARCELS = pd.DataFrame({
    "weight": np.where(rng.random(COUNT) < 0.05, np.nan, rng.normal(size=COUNT)), "sent_on": DAY, ROW_GROUP: DAY,
    "city": rng.choice(["Oslo", "Bergen", None], COUNT), "usual": rng.beta(2, 6, COUNT)})
PARCELS["late"] = rng.random(COUNT) < 1 / (1 + np.exp(1 - PARCELS.weight.fillna(0) - (PARCELS.city == "Oslo")))
PARCELS["hours"] = 5 + 2 * PARCELS.weight.fillna(0) + rng.exponential(2, COUNT)
PARCELS.loc[:200, "usual"] = np.nan  # no label is known on the first days
LATE = UseCase(model="late", problem=BINARY, key=("parcel",), label="late", rows=None, labels=None, source=("parcels",),
               features=("weight", "city", "usual"), categorical=("city",), lookups=None, baseline="usual",
               day="sent_on", prediction_time="sent_at", label_known_at="delivered_at")
HOURS = replace(LATE, model="hours", problem=REGRESSION, label="hours", features=("weight",), categorical=(),
                baseline=None, learner=sklearn_learner(LinearRegression))
COSTS = {"missed": 5, "false_warning": 1}
TREES = {"held_out_days": 7, "blocks": 3, "min_rows": 100, "costs": COSTS, "rounds": 15, "min_slice_rows": 20,
         "custom_metrics": {}, "parameters": {"objective": "binary", "num_leaves": 8, "extra_trees": True, "seed": 1,
                                              "deterministic": True, "force_row_wise": True, "verbose": -1}}
NUMBERS = {"blocks": 4, "parameters": {}, "quantiles": [0.1, 0.95], "costs": {}}
FILLED = PARCELS.fillna({"weight": 0.0})


def cheapest(label, prediction):
    "The lowest threshold with the lowest cost, by trying all."
    cost = {t: (5 * (label & (prediction < t)) + (~label & (prediction >= t))).sum() for t in np.unique(prediction)}
    return min(cost, key=lambda threshold: (cost[threshold], threshold))


def fit_directly(rows, levels):
    "A booster, and the numbers that it takes."
    city = pd.Categorical(rows.city, categories=levels).codes
    numbers = np.column_stack([rows.weight, city, rows.usual]).astype(float)
    numbers[numbers[:, 1] < 0, 1] = np.nan
    data = lightgbm.Dataset(numbers, rows.late.astype(float).to_numpy(), categorical_feature=[1])
    return lightgbm.train(TREES["parameters"] | {"num_threads": 1}, data, 15), numbers


def test_learning_gives_the_same_bits_as_the_libraries_used_directly():
    trained = learning.learn(LATE, PARCELS, TREES)
    levels, unseen = ["Bergen", "Oslo"], np.empty(COUNT)
    whole, numbers = fit_directly(PARCELS, levels)
    days = sorted(set(DAY))
    for part in (days[:17], days[17:34], days[34:]):
        here = np.isin(DAY, part)
        scores = fit_directly(PARCELS[~here], levels)[0].predict(numbers[here], raw_score=True)
        unseen[here] = 1 / (1 + np.exp(-scores))
    def trees_of(booster): return booster.model_to_string().partition("\nparameters:")[0]
    assert trees_of(trained.fitted) == trees_of(whole)  # the number of threads does not change the trees
    log_odds = np.log(unseen / (1 - unseen))
    slope, intercept = trained.encoding["calibration"].values()
    platt = LogisticRegression(C=1e6).fit(log_odds[:, None], PARCELS.late)
    assert (slope, intercept) == (platt.coef_[0, 0], platt.intercept_[0]) and slope > 1.1  # calibration helps here
    calibrated = 1 / (1 + np.exp(-(slope * log_odds + intercept)))
    assert trained.operating_point == {"threshold": cheapest(PARCELS.late.to_numpy(), calibrated)}
    known = PARCELS.usual.notna()
    assert trained.baseline_point == {"threshold": cheapest(PARCELS.late[known].to_numpy(), PARCELS.usual[known])}
    assert trained.baseline_value is None
    expected = 1 / (1 + np.exp(-(slope * whole.predict(numbers, raw_score=True) + intercept)))
    assert np.array_equal(learning.predict(LATE, trained, PARCELS), expected)
    loss = learning.objective(LATE, PARCELS, TREES)({}, lambda value: None)
    assert loss == pytest.approx(log_loss(PARCELS.late, unseen))


@pytest.mark.parametrize("share", [0.05, 0.15, 0.3])
def test_a_constant_baseline_warns_always_or_never_whichever_is_cheaper(share):
    label = np.arange(1000) < 1000 * share
    threshold = learning.baseline_threshold(replace(LATE, baseline=None), PARCELS, label, COSTS)
    cost_of_always, cost_of_never = (~label).sum(), 5 * label.sum()
    assert (share >= threshold) == (cost_of_always < cost_of_never)


def test_a_regression_has_the_residual_quantiles_of_cross_validation():
    trained = learning.learn(HOURS, FILLED, NUMBERS)
    days = np.array_split(sorted(set(DAY)), 4)
    block = sum(i * np.isin(DAY, part) for i, part in enumerate(days))
    unseen = cross_val_predict(LinearRegression(), FILLED[["weight"]], FILLED.hours, cv=PredefinedSplit(block))
    residuals = sorted(FILLED.hours - unseen)
    below, above = int((COUNT + 1) * 0.1), ceil((COUNT + 1) * 0.95)
    assert trained.operating_point == pytest.approx(
        {"interval_low": residuals[below - 1], "interval_high": residuals[above - 1]})
    assert trained.baseline_point == {} and trained.baseline_value == pytest.approx(FILLED.hours.mean())
    expected = LinearRegression().fit(FILLED[["weight"]], FILLED.hours).predict(FILLED[["weight"]])
    assert np.allclose(learning.predict(HOURS, trained, FILLED), expected)
    assert "calibration" not in trained.encoding
    assert learning.learn(HOURS, FILLED, NUMBERS | {"quantiles": None}).operating_point == {}
    loss = learning.objective(HOURS, FILLED, NUMBERS)({}, lambda value: None)
    assert loss == pytest.approx(root_mean_squared_error(FILLED.hours, unseen))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(-50, 50), min_size=20, max_size=80), st.floats(0.06, 0.4), st.floats(0.6, 0.94))
def test_each_end_of_an_interval_leaves_out_no_more_than_its_quantile_allows(residuals, low, high):
    offsets = learning.interval_offsets(np.array(residuals, float), low, high)
    count = len(residuals) + 1  # with a new row, which takes each place with equal probability
    assert sum(value < offsets["interval_low"] for value in residuals) <= low * count - 1 + 1e-9
    assert sum(value <= offsets["interval_high"] for value in residuals) >= high * count - 1e-9


def test_predictions_that_are_no_numbers_name_the_learner():
    holes = function_learner(lambda frame, label, parameters: 0, lambda state, frame: frame.weight * np.nan)
    holes = replace(holes, check=lambda problem, conf: None)
    with pytest.raises(MlopsError, match="the learner 'functions' is wrong: 3000 of 3000 predictions are not finite"):
        learning.learn(replace(HOURS, learner=holes), FILLED, NUMBERS)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, GROUPS - 1), st.integers(1, GROUPS - 1))
def test_without_time_a_smaller_share_is_part_of_a_larger_one(first, second):
    use_case = replace(LATE, day=None, prediction_time=None, label_known_at=None)
    rows = pd.DataFrame({ROW_GROUP: range(GROUPS)})
    small, large = (splits.split_rows(use_case, rows, Split(date(2024, 4, 1), None, count / GROUPS))
                    for count in sorted([first, second]))
    assert set(small[1].index) <= set(large[1].index) and len(small[1]) == min(first, second)
    for training, held_out in (small, large): assert sorted([*training.index, *held_out.index]) == rows.index.tolist()


def test_with_a_time_the_split_follows_the_days_and_the_knowledge_of_labels():
    waiting = pd.to_timedelta(rng.uniform(0, 72, COUNT), "h")
    rows = PARCELS.assign(delivered_at=pd.to_datetime(PARCELS.sent_on) + waiting)
    split = splits.split_of(LATE, date(2024, 2, 15), TREES)
    training, held_out = splits.split_rows(LATE, rows, split)
    begin, end = pd.Timestamp("2024-02-08"), pd.Timestamp("2024-02-15")  # midnights in UTC
    sent = pd.to_datetime(rows.sent_on)
    assert training.index.tolist() == rows.index[(sent < begin) & (rows.delivered_at < begin)].tolist()
    assert held_out.index.tolist() == rows.index[(sent >= begin) & (sent < end) & (rows.delivered_at < end)].tolist()
    assert split.tags == {"as_of": "2024-02-15", "trained_through": "2024-02-07", "held_out_from": "2024-02-08",
                          "held_out_to": "2024-02-14"}


def read(folder, use_case, conf):
    (folder / "conf").mkdir()
    (folder / "conf/train.yml").write_text(yaml.safe_dump(conf))
    return learning.read_train(use_case, folder)


def test_settings_that_are_right_are_read(tmp_path):
    conf = read(tmp_path, LATE, TREES)
    assert conf == TREES | {"search_space": {}, "options": []}
    assert set(conf) == set(learning.train_keys(LATE))


@pytest.mark.parametrize(("changes", "message"), [
    ({"held_out_days": 0}, "held_out_days: 0 is not valid"), ({"blocks": 1}, "blocks: 1 is not valid"),
    ({"min_rows": "many"}, "min_rows: 'many' is not valid"),
    ({"costs": {"missed": 5}}, "costs.false_warning: the key is missing"),
    ({"costs": {"missed": 0, "false_warning": 1}}, "costs.missed: 0 is not valid"),
    ({"quantiles": [0.1, 0.9]}, "no key 'quantiles'"),
    ({"held_out_share": 0.2}, "held_out_share: the rows of late belong to days"),
    ({"parameters": None}, "parameters: null is not valid"),
    ({"parameters": {"objective": "binary", "learning_rate": -1}}, "parameters.learning_rate: .*must be > 0"),
    ({"search_space": {"num_leafs": {"low": 1, "high": 2}}}, "no parameter 'num_leafs'"),
    ({"search_space": {"num_leaves": {"low": 0, "high": 2}}}, "search_space.num_leaves.low: .*must be > 1"),
    ({"rounds": 0}, "rounds: 0 is not valid"), ({"options": [{"rate": 1}]}, "no parameter 'rate'"),
    ({"options": [{"num_leaves": "few"}]}, r"options\[0\]: LightGBM refuses num_leaves"),
    ({"custom_metrics": []}, "custom_metrics: .* is not valid"),
    ({"custom_metrics": {"share": "mlops_nb.conf:no_such"}}, "custom_metrics.share: .*no_such")])
def test_wrong_settings_are_named(changes, message, tmp_path):
    with pytest.raises(MlopsError, match=f"(?s){message}"): read(tmp_path, LATE, TREES | changes)


def test_without_a_time_a_share_is_needed(tmp_path):
    use_case = replace(LATE, day=None, prediction_time=None, label_known_at=None)
    conf = {name: value for name, value in TREES.items() if name != "held_out_days"}
    assert read(tmp_path, use_case, conf | {"held_out_share": 0.2})["held_out_share"] == 0.2
    for number, share in enumerate((0, 1, 0.001, True)):
        (tmp_path / str(number)).mkdir()
        with pytest.raises(MlopsError, match="held_out_share: .* is not valid"):
            read(tmp_path / str(number), use_case, conf | {"held_out_share": share})
    (tmp_path / "none").mkdir()
    with pytest.raises(MlopsError, match="held_out_share: the key is missing"):
        read(tmp_path / "none", use_case, conf)
