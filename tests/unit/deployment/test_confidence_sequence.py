"""The betting test: it keeps its rate however often it is looked at, and finds a better model; so does its interval."""
import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from mlops_nb.deployment.confidence_sequence import (
    BETS,
    bet_gains,
    confidence_sequence,
    highest_wealth,
    log_wealth,
    wealth_of_both,
)

SERIES = st.lists(st.floats(-1, 1, allow_subnormal=False), min_size=1, max_size=30).map(np.array)
RICH = np.log(20)


def ever_rich(samples):
    return (log_wealth(samples).max(axis=1) >= RICH).mean()


@examples(max_examples=60)
@given(SERIES)
def test_the_bet_is_fair_given_the_blocks_before(series):
    # the last block with both signs, as likely for a symmetric distribution: no gain on average, whatever came before
    for sign in (1, -1):
        both = np.array([series, np.append(series[:-1], -series[-1])]) * sign
        factors = np.exp(bet_gains(both)[:, :, -1])
        assert np.allclose(factors.mean(axis=1), 1)


@examples(max_examples=60)
@given(SERIES, st.floats(0, 1))
def test_the_bet_loses_on_average_if_the_challenger_is_worse(series, shift):
    # symmetric around -shift: the last block is -shift plus or minus something
    last = np.array([-shift + series[-1], -shift - series[-1]])
    both = np.array([np.append(series[:-1], value) for value in last])
    assert (np.exp(bet_gains(both)[:, :, -1]).mean(axis=1) <= 1 + 1e-9).all()


@examples(max_examples=60)
@given(SERIES, st.floats(1e-6, 1e6))
def test_the_unit_of_the_loss_does_not_matter(series, unit):
    values = np.where(np.abs(series) < 1e-9, 0, series)
    assert np.allclose(log_wealth(values), log_wealth(values * unit))


@examples(max_examples=60)
@given(SERIES, st.integers(1, 30))
def test_a_look_changes_nothing(series, look):
    before = log_wealth(series[:look])
    assert np.allclose(before, log_wealth(series)[:len(before)])
    assert highest_wealth(series) >= highest_wealth(series[:look]) * (1 - 1e-9)


@examples(max_examples=60)
@given(SERIES, st.floats(0, 1), st.integers(0, 29))
def test_a_better_last_block_makes_the_player_richer(series, more, _):
    better = np.append(series[:-1], series[-1] + more)
    assert log_wealth(better)[-1] >= log_wealth(series)[-1] - 1e-9


@examples(max_examples=30)
@given(SERIES)
def test_the_interval_excludes_zero_only_with_evidence(series):
    low, high = confidence_sequence(series, 0.05)[-1]
    above, below = (log_wealth(sign * series)[-1] for sign in (1, -1))
    if low > 0: assert above >= RICH
    if high < 0: assert below >= RICH
    if not np.isnan(low): assert low < high


@pytest.mark.parametrize(("name", "draw"), {
    "normal": lambda rng, size: rng.normal(size=size), "heavy": lambda rng, size: rng.standard_t(1.5, size=size),
    "signs": lambda rng, size: rng.choice([-1.0, 1.0], size=size),
    "seasons": lambda rng, size: rng.normal(size=size) * np.linspace(5, 0.1, size[1])}.items())
def test_equal_models_are_rarely_called_better_however_often_one_looks(name, draw):
    rng = np.random.default_rng(1)
    assert ever_rich(draw(rng, (4000, 40))) <= 0.05
    assert ever_rich(draw(rng, (4000, 40)) - 0.1) <= 0.05


def test_a_better_model_is_seen_and_the_true_improvement_is_in_all_intervals():
    rng = np.random.default_rng(2)
    samples = rng.normal(1.0, 1.0, size=(60, 24))
    assert ever_rich(samples) > 0.6 and ever_rich(samples + 1) > 0.99
    covered = [((bounds[:, 0] <= 1) & (1 <= bounds[:, 1])).all()
               for bounds in (confidence_sequence(sample, 0.05) for sample in samples)]
    assert np.mean(covered) >= 0.9


def test_it_is_stronger_than_the_bet_of_a_supermartingale_with_a_quadratic_term():
    # exp(λx - λ²x²/2) of de la Peña is never above exp(λx) / cosh(λx)
    x = np.linspace(-3, 3, 61)[:, None]
    factors = np.exp(bet_gains(x))[:, :, 0]  # one block each: the scale is its own size
    sizes = np.sign(x[:, 0]) * np.array(BETS)[:, None]
    assert (factors >= np.exp(sizes - sizes**2 / 2) - 1e-12)[:, x[:, 0] != 0].all()


def test_models_that_always_agree_have_no_evidence():
    low, high = confidence_sequence(np.zeros(30), 0.05)[-1]
    assert wealth_of_both(np.zeros(30)) == (1, 1) and low <= 0 <= high


def test_weights_are_those_of_precision():
    rng = np.random.default_rng(3)
    noise = np.where(np.arange(24) < 12, 5.0, 0.5)
    samples = 0.6 + noise * rng.normal(size=(300, 24))
    weighted = log_wealth(samples, 1 / noise).max(axis=1) >= RICH
    assert weighted.mean() > 2 * ever_rich(samples)
