"""Blocks, guard rails and decisions of online experiments, and whole experiments on real and made-up flights."""
import math
import sys
from dataclasses import replace
from datetime import date, timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from mlops_nb.deployment.online_experiment import (
    ABORT,
    EXTEND,
    PROMOTE,
    WAIT,
    Block,
    Control,
    block_from,
    check_experiment_settings,
    complete_blocks,
    decide_experiment,
    experiment_defaults,
    experiment_problems,
    first_violation,
    fit_control,
    over_days,
    split_differences,
)
from mlops_nb.errors import MlopsError
from mlops_nb.models.problem_types import BINARY, REGRESSION

sys.path.append(str(Path(__file__).parents[3] / "benchmarks"))
import online_experiments
from sizes import by_size

SETTINGS = experiment_defaults(BINARY)
FIRST = date(2013, 6, 2)


def block(improvement, percent=50, requests=2000, number=0):
    day = FIRST + timedelta(5 * number)
    return Block(day, day + timedelta(4), percent, improvement, math.sqrt(requests / 2), False, requests, requests,
                 0.2, 1.0)


def answers(days=12, requests=300, share=0.5, seed=1, noise=0.0):
    "Requests whose Champion adds noise to the true score."
    rng, size = np.random.default_rng(seed), days * requests
    score, is_challenger = rng.normal(-1.5, 1, size=size), rng.random(size) < share
    seen = score + np.where(is_challenger, 0, noise * rng.normal(size=size))
    return pd.DataFrame({
        "day": np.repeat(pd.date_range(FIRST, periods=days).date, requests), "request": np.arange(size).astype(str),
        "is_challenger": is_challenger, "prediction": 1 / (1 + np.exp(-seen)),
        "label": (rng.random(size) < 1 / (1 + np.exp(-score))).astype(float), "is_error": False, "milliseconds": 5.0})


def blocks_of(frame, as_of, settings=SETTINGS, problem=BINARY):
    return complete_blocks(frame, settings, problem, FIRST, as_of, 50, Control())


def test_a_block_counts_when_its_labels_are_known():
    frame = answers()
    assert blocks_of(frame, FIRST + timedelta(6)) == []
    one = blocks_of(frame, FIRST + timedelta(7))
    two = blocks_of(frame, FIRST + timedelta(12))
    assert [len(one), len(two)] == [1, 2] and two[0] == one[0]  # a later look changes no block
    assert two[1].first_day == FIRST + timedelta(5) and block_from(two[1].as_record()) == two[1]


def test_requests_of_other_days_without_label_or_with_an_error_do_not_count():
    frame = answers()
    expected = blocks_of(frame, FIRST + timedelta(7))
    later = frame.assign(label=np.where(pd.to_datetime(frame.day) > pd.Timestamp(FIRST + timedelta(4)), 1, frame.label))
    noise = frame.head(200).assign(request="x", prediction=0.99)
    bad = pd.concat([later, noise.assign(label=np.nan), noise.assign(is_error=True), noise.assign(prediction=np.nan)])
    assert blocks_of(bad, FIRST + timedelta(7)) == expected


def test_a_block_without_a_known_label_compares_nothing_and_the_experiment_waits():
    frame = answers().assign(label=np.nan, request=None)
    blocks = blocks_of(frame, FIRST + timedelta(7))
    assert [(block.champion_requests, math.isnan(block.improvement)) for block in blocks] == [(0, True)]
    decision = decide_experiment(blocks, 50, 7, "", SETTINGS)
    assert (decision.action, decision.percent) == (WAIT, 50) and "no block is complete" in decision.reason


def test_requests_without_a_row_are_no_pairs():
    assert not blocks_of(answers(share=0.5).assign(request=None), FIRST + timedelta(7))[0].is_paired


@examples(max_examples=30)
@given(st.floats(-0.5, 0.5), st.integers(0, 10_000))
def test_days_with_another_split_and_another_level_do_not_bias_the_improvement(difference, seed):
    rng = np.random.default_rng(seed)
    share, level = rng.uniform(0.1, 0.9, size=5), rng.uniform(size=5)
    day = rng.integers(5, size=400)
    is_challenger = (rng.random(400) < share[day]).astype(int)
    loss = level[day] - difference * is_challenger
    improvement, weight = over_days(*split_differences(day, is_challenger, loss))
    if weight: assert improvement == pytest.approx(difference, abs=1e-9)


def test_the_control_is_of_the_block_before_and_makes_the_difference_more_precise():
    rng = np.random.default_rng(1)
    label = (rng.random(2000) < 0.2).astype(float)
    loss = (label - 0.25) ** 2 + 0.01 * rng.normal(size=2000)
    control, day = fit_control(label, loss), np.zeros(2000, int)
    plain, adjusted = [], []
    for _ in range(300):
        arm = (rng.random(2000) < 0.1).astype(int)
        plain.append(split_differences(day, arm, loss)[0][0])
        adjusted.append(split_differences(day, arm, control.adjusted(label, loss))[0][0])
    assert np.std(adjusted) < 0.3 * np.std(plain) and abs(np.mean(adjusted)) < 3 * np.std(adjusted) / math.sqrt(300)
    first, second = blocks_of(answers(), FIRST + timedelta(12))
    assert second.improvement != complete_blocks(answers(), SETTINGS, BINARY, second.first_day, FIRST + timedelta(12),
                                                 50, Control())[0].improvement
    assert first.control.slope > 0


def test_pairs_of_shadow_answers_are_compared():
    frame = answers(noise=2, share=0.05)
    champion = frame[~frame.is_challenger]
    shadow = champion.assign(is_challenger=True, prediction=champion.label)
    paired, = blocks_of(pd.concat([frame, shadow]), FIRST + timedelta(7))
    first = champion[pd.to_datetime(champion.day) < pd.Timestamp(FIRST + timedelta(5))]
    sizes = first.groupby("day").size()
    errors = ((first.prediction - first.label) ** 2).groupby(first.day).mean()
    assert paired.is_paired and paired.improvement == pytest.approx(np.average(errors, weights=sizes))
    assert paired.weight > 3 * blocks_of(frame, FIRST + timedelta(7))[0].weight


def test_regression_and_the_largest_loss():
    frame = answers().assign(prediction=lambda rows: np.where(rows.is_challenger, 10.0, 12.0), label=10.0)
    defaults = experiment_defaults(REGRESSION)
    assert blocks_of(frame, FIRST + timedelta(7), defaults, REGRESSION)[0].improvement == pytest.approx(4)
    clipped = defaults | {"max_loss": 3.0}
    assert blocks_of(frame, FIRST + timedelta(7), clipped, REGRESSION)[0].improvement == pytest.approx(3)


def test_a_block_without_requests_of_one_model_is_no_evidence():
    silent = answers(share=0)
    empty, = blocks_of(silent, FIRST + timedelta(7))
    assert math.isnan(empty.improvement) and math.isnan(block_from(empty.as_record()).improvement)
    decision = decide_experiment([empty], 5, 7, "", SETTINGS)
    assert decision.action == WAIT and "0 of 1 block at 5%" in decision.reason
    winning = [block(0.01, number=i) for i in range(9)]
    assert decide_experiment([*winning, empty], 50, 50, "", SETTINGS).action == PROMOTE


def test_guard_rails_stop_at_once_unless_the_champion_is_as_bad():
    frame = answers(days=2)
    slow = frame.assign(milliseconds=np.where(frame.is_challenger, 3000.0, 5.0))
    failing = frame.assign(is_error=frame.is_challenger & (np.arange(len(frame)) % 10 == 0))
    assert first_violation(frame, SETTINGS) == ""
    assert "3,000 ms" in first_violation(slow, SETTINGS) and "failed" in first_violation(failing, SETTINGS)
    assert first_violation(frame.assign(milliseconds=3000.0), SETTINGS) == ""
    number = frame.groupby("is_challenger").cumcount()
    few = frame.assign(is_error=np.where(frame.is_challenger, number % 20 == 0, number % 25 == 0))  # 5% and 4%
    assert first_violation(few, SETTINGS | {"max_error_share": 0.03}) == ""  # chance, not the version
    assert "failed" in first_violation(few, SETTINGS | {"max_error_share": 0.001})
    one_bad_day = pd.concat([failing[failing.day == FIRST], frame[frame.day != FIRST]])
    assert first_violation(one_bad_day, SETTINGS).startswith("2013-06-02")
    assert first_violation(failing.groupby("is_challenger").head(90), SETTINGS) == ""  # fewer than guard_requests
    winning = [block(0.01, number=i) for i in range(9)]
    decision = decide_experiment(winning, 50, 50, first_violation(slow, SETTINGS), SETTINGS)
    assert (decision.action, decision.percent) == (ABORT, 0) and decision.reason.startswith("guard rail: 2013-06-02")


def test_steps_follow_each_other_and_none_promotes_without_evidence():
    percents, percent, blocks = [], 5, []
    for number in range(3):
        blocks.append(block(0.01, percent, number=number))
        decision = decide_experiment(blocks, percent, 5 * number, "", SETTINGS)
        percent = decision.percent
        percents.append((decision.action, percent))
    assert percents == [(EXTEND, 25), (EXTEND, 50), (WAIT, 50)]
    assert decide_experiment([block(-0.01, 5)], 5, 7, "", SETTINGS).action == WAIT  # it may be worse: no more requests
    assert decide_experiment([block(0.01, 5, requests=99)], 5, 7, "", SETTINGS).action == WAIT
    assert decide_experiment([block(0.01, 5)], 5, 7, "", SETTINGS | {"min_blocks": 2}).action == WAIT
    assert decide_experiment([block(0.01, number=i) for i in range(8)], 50, 60, "", SETTINGS).action == PROMOTE
    worse = decide_experiment([block(-0.01, number=i) for i in range(8)], 50, 60, "", SETTINGS)
    assert worse.action == ABORT and "worse" in worse.reason
    assert decide_experiment([], 5, SETTINGS["max_days"], "", SETTINGS).action == ABORT


@examples(max_examples=50)
@given(st.lists(st.floats(-0.1, 0.1), max_size=25), st.integers(0, 25))
def test_who_looks_less_often_promotes_no_less(improvements, look):
    blocks = [block(value, number=i) for i, value in enumerate(improvements)]
    early = decide_experiment(blocks[:look], 50, 60, "", SETTINGS)
    late = decide_experiment(blocks, 50, 60, "", SETTINGS)
    if early.action == PROMOTE and late.action != ABORT: assert late.action == PROMOTE


@pytest.mark.parametrize(("change", "key"), [
    ({"steps": [5, 50]}, "steps"), ({"steps": [50, 5, 100]}, "steps"), ({"steps": [100]}, "steps"),
    ({"alpha": 0.5}, "alpha"), ({"alpha": 0}, "alpha"), ({"loss": "brier"}, "loss"),
    ({"loss": "log_loss"}, "max_loss"), ({"block_days": 0}, "block_days"), ({"guards": 1}, "guards"),
    ({"max_error_share": 2}, "max_error_share")])
def test_wrong_settings_are_named(change, key):
    problems = list(experiment_problems(SETTINGS | change, BINARY, "experiment"))
    assert [problem[0] for problem in problems] == [f"experiment.{key}"]
    with pytest.raises(MlopsError, match=key): check_experiment_settings(SETTINGS | change, BINARY)
    assert check_experiment_settings(SETTINGS | {"loss": "log_loss", "max_loss": 5}, BINARY)["max_loss"] == 5


@pytest.fixture(scope="module")
def real_flights():
    return online_experiments.flights()


@pytest.mark.slow
def test_experiments_on_real_flights_find_the_better_model(real_flights):
    full, few = (online_experiments.predictions(real_flights, columns, trees=25)
                 for columns in (online_experiments.FULL, online_experiments.FEW))
    better, worse = (online_experiments.replay(real_flights, *pair) for pair in ((few, full), (full, few)))
    equal = online_experiments.replay(real_flights, full, full)
    wins, losses, draws = (online_experiments.repeated(requests, False, 40) for requests in (better, worse, equal))
    assert wins.promoted >= 0.9 and wins.days < 80
    assert losses.promoted == 0 and losses.stopped >= 0.9
    assert not online_experiments.too_many(draws, 40)
    shadowed = online_experiments.repeated(better, True, 10)
    assert shadowed.promoted == 1


def test_equal_models_on_correlated_days_are_not_promoted():
    outcome = online_experiments.made_up(0.4, 40)
    assert not online_experiments.too_many(outcome, 40) and outcome.peer > 3 * SETTINGS["alpha"]


@pytest.mark.slow
def test_the_benchmark_keeps_its_rates(capsys):
    online_experiments.main(by_size(500, 100))  # SystemExit if too many equal Challengers are promoted
    assert "equal, made up" in capsys.readouterr().out


def test_a_benchmark_that_promotes_too_often_fails():
    outcome = online_experiments.made_up(0.0, 2)
    assert online_experiments.too_many(replace(outcome, promoted=0.2), 40)
