"Blocks of days: the draws, the block length and the correction, against closed forms, loops and simulations."
import random

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sizes import by_size
from sklearn.metrics import roc_auc_score

from mlops_nb.errors import MlopsError
from mlops_nb.models import day_resampling as resampling
from mlops_nb.models.metrics import rank_auc


def correlated(count, rho, rng, scale=1.0):
    "An AR(1) series from its stationary distribution."
    series = [rng.normal() / np.sqrt(1 - rho**2)]
    for _ in range(count - 1): series.append(rho * series[-1] + rng.normal())
    return scale * np.array(series)


def mean_of(series): return resampling.ratio_statistic(series, np.ones(len(series)), resampling.number_days(
    np.arange(len(series))))


def draws_by_loops(count, length, times, size, generator):
    "Politis and Romano's draws, written as a loop."
    for _ in range(times):
        day, drawn = generator.randrange(count), []
        while len(drawn) < size:
            drawn.append(day)
            day = generator.randrange(count) if generator.random() < 1 / length else (day + 1) % count
        yield drawn


def test_days_are_numbered_in_order_of_time():
    days = resampling.number_days(np.array(["2013-02-01", "2013-01-31", "2013-02-03", "2013-02-02", "2013-02-10"]))
    assert (days.count, days.number.tolist()) == (5, [1, 0, 3, 2, 4])
    four = np.arange("2013-02-01", "2013-02-05", dtype="M8[D]")
    with pytest.raises(MlopsError, match="rows of at least 5 days, not 4"): resampling.number_days(four)
    with pytest.raises(MlopsError, match="rows of at least 5 groups, not 4"): resampling.number_days(np.arange(4))


@pytest.mark.parametrize("length, size", [(1, 28), (4.5, 28), (3, 60)])
def test_draws_are_those_of_the_stationary_bootstrap(length, size):
    series = correlated(28, 0.6, np.random.default_rng(1))
    weights = resampling.draw_days(28, length, 8000, np.random.default_rng(2), size)
    assert weights.shape == (8000, 28) and (weights.sum(axis=1) == size).all()
    means = weights @ series / size
    loops = [series[drawn].mean() for drawn in draws_by_loops(28, length, 8000, size, random.Random(3))]
    assert means.mean() == pytest.approx(series.mean(), abs=0.03)
    assert np.quantile(means, [0.025, 0.5, 0.975]) == pytest.approx(np.quantile(loops, [0.025, 0.5, 0.975]), abs=0.06)
    if size == 28:
        variance = resampling.bootstrap_variance(resampling.autocovariances(series), length)
        assert 28 * means.var() == pytest.approx(variance, rel=0.06)


def test_autocovariances_and_influences_have_their_closed_forms():
    rng = np.random.default_rng(4)
    series, count = rng.normal(size=40), 40
    centred = series - series.mean()
    lags = [(centred[:40 - lag] * centred[lag:]).sum() / 40 for lag in range(40)]
    assert resampling.autocovariances(series) == pytest.approx(lags)
    assert resampling.day_influence(mean_of(series), count) == pytest.approx(series - series.mean())
    new, old = rng.random(40) + 1, rng.random(40) + 1
    change = resampling.relative_change(mean_of(new), mean_of(old))
    ratio = new.sum() / old.sum()
    linear = (new - ratio * old) / old.mean()
    assert np.corrcoef(resampling.day_influence(change, 40), linear)[0, 1] > 0.999


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_a_metric_of_rows_is_that_of_the_repeated_rows(data):
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    number = np.concatenate([np.arange(6), rng.integers(0, 6, 40)])
    days, label, p = resampling.Days(6, number), rng.integers(0, 2, 46), rng.random(46).round(1)
    weights = np.array(data.draw(st.lists(st.integers(0, 3), min_size=6, max_size=6)))[None]
    rows = np.array([i for i, day in enumerate(number) for _ in range(weights[0, day])], int)
    area = resampling.row_statistic(lambda rows: rank_auc(label[rows] == 1, p[rows]), days)(weights)[0]
    if len(np.unique(label[rows])) == 2: assert area == pytest.approx(roc_auc_score(label[rows], p[rows]))
    else: assert np.isnan(area)
    mean = resampling.ratio_statistic(p, np.ones(46), days)(weights)[0]
    assert mean == pytest.approx(p[rows].mean()) if len(rows) else np.isnan(mean)


@pytest.mark.parametrize("rho", [0.3, 0.6])
def test_the_block_length_of_a_long_series_is_the_best_one_for_its_autocorrelation(rho):
    "For AR(1) the rule's optimum is (2 rho / (1 - rho^2))^(2/3) n^(1/3)."
    rng = np.random.default_rng(5)
    lengths = [resampling.block_length(correlated(3000, rho, rng)) for _ in range(12)]
    assert np.median(lengths) == pytest.approx((2 * rho / (1 - rho**2)) ** (2 / 3) * 3000 ** (1 / 3), rel=0.2)


def test_block_lengths_stay_in_their_range():
    rng = np.random.default_rng(6)
    assert resampling.block_length(np.zeros(30)) == 1
    for count in (5, 14, 28, 100):
        for rho in (-0.5, 0, 0.95):
            assert 1 <= resampling.block_length(correlated(count, rho, rng)) <= np.ceil(min(3 * count**0.5, count / 3))


def test_equal_statistics_have_an_interval_without_width():
    series = 2 + np.random.default_rng(7).random(28)
    result = resampling.resample(resampling.relative_change(mean_of(series), mean_of(series)), 28)
    assert (result.value, result.low, result.high, result.error) == (0, 0, 0, 0)


def test_the_same_seed_gives_the_same_interval_and_another_one_differs_by_the_error():
    statistic = mean_of(correlated(28, 0.4, np.random.default_rng(8)))
    first, again = (resampling.resample(statistic, 28) for _ in range(2))
    assert (first.low, first.high) == (again.low, again.high)
    lows = [resampling.resample(statistic, 28, seed=seed).low for seed in range(12)]
    assert np.std(lows) < 2 * first.error and first.error < 0.02 * (first.high - first.low)


def one_sided_errors(days, rho, samples, seed):
    "The share of samples whose interval is entirely below the true mean, 0."
    rng, errors = np.random.default_rng(seed), 0
    for _ in range(samples):
        errors += resampling.resample(mean_of(correlated(days, rho, rng)), days, times=1000).high < 0
    return errors / samples


@pytest.mark.slow
@pytest.mark.parametrize("days, rho", [(14, 0.5), (28, 0.4)])
def test_intervals_exclude_the_true_value_no_more_often_than_their_level_says(days, rho):
    "One side of a 95% interval: 2.5%. The peer, an interval of independent days, has 12% to 15% here."
    samples = by_size(2000, 500)
    assert one_sided_errors(days, rho, samples, seed=9) < 0.025 + 2.5 * np.sqrt(0.025 * 0.975 / samples)


def test_a_statistic_without_a_value_can_be_any_number():
    days = resampling.number_days(np.arange(20))
    undefined = resampling.ratio_statistic(np.zeros(20), np.zeros(20), days)  # such as a recall without positives
    result = resampling.resample(undefined, 20)
    assert np.isnan(result.value) and (result.low, result.high) == (-np.inf, np.inf)


@settings(max_examples=20)
@given(st.lists(st.sampled_from([-2.0, 0.0, 1.0, 5.0, np.inf, -np.inf, np.nan]), min_size=5, max_size=60))
def test_a_bound_is_the_order_statistic_of_all_draws(drawn):
    drawn = np.array(drawn)
    low, high, error = resampling.interval_of(drawn, 0.9)
    as_low, as_high = (sorted(worst if np.isnan(value) else value for value in drawn) for worst in (-np.inf, np.inf))
    assert (low, high) == (as_low[round(0.05 * (len(drawn) - 1))], as_high[round(0.95 * (len(drawn) - 1))])
    assert error >= 0 and low <= high


def test_a_row_without_a_day_is_refused():
    days = pd.Series(pd.date_range("2013-01-01", periods=9)).where(lambda day: day.dt.day != 4)
    with pytest.raises(MlopsError, match="1 of 9 rows have no day"): resampling.number_days(days.to_numpy())
