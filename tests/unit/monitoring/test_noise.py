"""Limits from the noise of the baseline: the rate of false alarms on simulated days, and independent computations."""
import numpy as np
import pandas as pd
import pytest

from mlops_nb.errors import MlopsError
from mlops_nb.models.day_resampling import block_length, day_influence, draw_days, widening
from mlops_nb.monitoring import noise
from mlops_nb.monitoring.drift import population_stability_index
from mlops_nb.monitoring.thresholds import Threshold
from mlops_nb.monitoring.windows import CustomMetric, Monitor

DOUBLE = '{"name": "output", "type": "double", "nullable": true, "metadata": {}}'
BASELINE, WINDOW = 28, 30  # days


def correlated(rng, count, autocorrelation):
    "Days that depend on the day before, with variance 1 (AR(1))."
    values = rng.normal(size=count)
    for i in range(1, count):
        values[i] = autocorrelation * values[i - 1] + np.sqrt(1 - autocorrelation**2) * values[i]
    return values


def losses(rng, count, autocorrelation, own=0.02):
    "The sums of a model's and a heuristic's loss on each day: difficult days are difficult for both; `own` are not."
    difficulty, other = (correlated(rng, count, autocorrelation) for _ in range(2))
    rows = rng.integers(850, 950, count)
    return np.column_stack([rows * (0.43 + 0.086 * difficulty + own * other), rows * (0.5 + 0.1 * difficulty)])


def loss_ratio(sums): return sums[:, 0] / sums[:, 1]


def alarms(autocorrelation, rate, worse=1.0, two_sided=False, times=100, **more):
    "The share of windows beyond their limits, for a model whose loss is multiplied by `worse`."
    rng, count = np.random.default_rng(3), 0
    share = noise.noise_share(Threshold("m", false_alarm_rate=rate, side="both" if two_sided else "above"))
    for _ in range(times):
        days = losses(rng, BASELINE + 50 + WINDOW, autocorrelation, **more)
        base, window = days[:BASELINE], days[-WINDOW:] * [worse, 1]
        limits = noise.difference_noise(noise.sums_statistic(base, loss_ratio), BASELINE, WINDOW, share, times=500)
        change = loss_ratio(window.sum(0, keepdims=True))[0] - loss_ratio(base.sum(0, keepdims=True))[0]
        count += change > limits.high or (two_sided and change < limits.low)
    return count / times


@pytest.mark.parametrize("autocorrelation", [0, 0.4])
def test_windows_without_a_change_violate_a_limit_at_about_the_stated_rate(autocorrelation):
    assert 0.01 <= alarms(autocorrelation, 0.05) <= 0.1  # the standard error of 100 windows is 2.2 %
    assert 0.01 <= alarms(autocorrelation, 0.05, two_sided=True) <= 0.1


def test_a_model_that_became_worse_is_seen():
    assert alarms(0, 0.01, worse=1.1, times=40, own=0.01) > 0.95
    assert alarms(0.4, 0.01, worse=1.1, times=40, own=0.01) > 0.8


@pytest.mark.parametrize("autocorrelation", [0, 0.4])
def test_distributions_without_a_change_violate_a_limit_at_about_the_stated_rate(autocorrelation):
    rng, count, values = np.random.default_rng(4), 0, np.linspace(-1, 1, 20)
    for _ in range(60):
        weights = np.exp(0.4 * correlated(rng, BASELINE + 50 + WINDOW, autocorrelation)[:, None] * values)
        days = np.array([rng.multinomial(900, day / day.sum()) for day in weights])
        base, window = days[:BASELINE], days[-WINDOW:].sum(0)
        limits = noise.drift_noise("population_stability_index", base, values, WINDOW, 0.9, times=100)
        count += population_stability_index(window, base.sum(0)) > limits.high
    assert count / 60 <= 0.1  # the stated rate is 5 %


def test_the_noise_is_that_of_drawn_rows():
    "Periods of single rows, concatenated day by day, and the metric of a period computed from its rows."
    rng = np.random.default_rng(5)
    frame = pd.DataFrame({"day": np.repeat(np.arange(20), 30), "model": rng.gamma(2, size=600),
                          "heuristic": rng.gamma(3, size=600)})
    sums = frame.groupby("day")[["model", "heuristic"]].sum().to_numpy()
    statistic = noise.sums_statistic(sums, loss_ratio)
    result = noise.difference_noise(statistic, 20, 9, 0.9, times=60, seed=8)
    influence, draws = day_influence(statistic, 20), np.random.default_rng(8)
    length = block_length(influence)
    def ratio_of_rows(drawn):
        rows = pd.concat([frame[frame.day == day] for day in np.repeat(np.arange(20), drawn)])
        return rows.model.sum() / rows.heuristic.sum()
    windows, bases = draw_days(20, length, 60, draws, 9), draw_days(20, length, 60, draws)
    changes = [ratio_of_rows(now) - ratio_of_rows(then) for now, then in zip(windows, bases, strict=True)]
    expected = widening(influence, length, 0.9) * np.quantile(changes, [0.05, 0.95], method="nearest")
    assert [result.low, result.high] == pytest.approx(expected.tolist())


def test_the_same_days_have_the_same_limits_and_another_seed_changes_them_by_the_monte_carlo_error():
    statistic = noise.sums_statistic(losses(np.random.default_rng(1), 28, 0.4), loss_ratio)
    first, again, other = (noise.difference_noise(statistic, 28, 30, 0.98, seed=seed) for seed in (1, 1, 2))
    assert first == again and 0 < abs(first.high - other.high) < 4 * first.error
    assert first.error < 0.03 * first.high


@pytest.mark.parametrize("count, granularity, expected", [
    (0, "1 month", "there is no baseline"), (13, "1 month", "the baseline has 13 days, and the noise needs 14"),
    (28, "1 hour", "windows of 1 hour are shorter than a day"), (14, "1 day", "")])
def test_a_limit_that_cannot_be_computed_has_a_reason(count, granularity, expected):
    assert (noise.short_window_reason(granularity) or noise.no_limit_reason(count)) == expected


def test_an_aggregate_that_is_no_sum_is_an_error():
    sums = pd.DataFrame({"total": [1.0, 2.0], "mean": [0.4, 0.6]})
    noise.check_sums(sums[["total"]], pd.Series({"total": 3.0}))
    with pytest.raises(MlopsError, match="aggregate mean is no sum over rows: the days of the baseline add up to 1, "
                                         "and the whole baseline has 0.5"):
        noise.check_sums(sums, pd.Series({"total": 3.0, "mean": 0.5}))


def test_a_noise_needs_a_metric_of_aggregates():
    def derived(name, definition):
        return CustomMetric(name, "CUSTOM_METRIC_TYPE_DERIVED", (":table",), definition, DOUBLE)
    total = CustomMetric("total", "CUSTOM_METRIC_TYPE_AGGREGATE", (":table",), "count(*)", DOUBLE)
    monitor = Monitor("at", "version", "warning", "late", "prediction", custom_metrics=(
        total, derived("half", "total / 2"), derived("relative", "log_loss / total")))
    assert noise.derived_metric(monitor, "half").definition == "total / 2"
    with pytest.raises(MlopsError, match="metric 'relative' uses log_loss, so that its noise is unknown"):
        noise.derived_metric(monitor, "relative")
    with pytest.raises(MlopsError, match="no metric with a noise 'log_loss'"):
        noise.derived_metric(monitor, "log_loss")


def test_values_share_buckets_of_about_equal_counts():
    values, counts = pd.Series(np.random.default_rng(1).normal(size=5000)), pd.Series(np.ones(5000))
    shared = noise.shared_values(values, counts)
    sizes = counts.groupby(shared).sum()
    assert len(sizes) == 1000 and sizes.max() <= 6 and (shared >= values).all()
    assert shared.sort_values().tolist() == shared[values.argsort()].tolist()  # in the same order
    assert noise.shared_values(values[:900], counts[:900]).tolist() == values[:900].tolist()


def test_days_without_a_label_take_no_part_in_a_metric_of_labels():
    "A ratio of sums has no value on them; a difference of sums has one, which is 0."
    sums = pd.DataFrame({"model": [0.0, 3.0, 0.0], "heuristic": [0.0, 4.0, 2.0]}, index=["1st", "2nd", "3rd"])
    def ratio(values):
        with np.errstate(invalid="ignore"): return values[:, 0] / values[:, 1]
    assert noise.has_value(sums, ratio).tolist() == [False, True, True]
    assert noise.has_value(sums, lambda values: values[:, 0] - values[:, 1]).tolist() == [True, True, True]
