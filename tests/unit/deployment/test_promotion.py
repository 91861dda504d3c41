"""The decision, and moves of aliases with kills, races and wrong arguments. The log is a dict here, without Spark."""
import itertools
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_registry import Registry

from mlops_nb.deployment import aliases as aliases_module
from mlops_nb.deployment import comparison as comparison_module
from mlops_nb.deployment import promotion
from mlops_nb.deployment.comparison import Contender, compare
from mlops_nb.errors import MlopsError
from mlops_nb.models import registry
from mlops_nb.models.day_resampling import number_days, ratio_statistic, relative_change, resample
from mlops_nb.models.metrics import log_losses
from mlops_nb.models.problem_types import BINARY

pytestmark = [pytest.mark.filterwarnings("ignore:.*Any type hint is inferred"),  # MLflow's own, at import
              pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")]
COSTS = dict(missed=5, false_warning=1)
RULE = dict(mode="compare", metric="log_loss", greater_is_better=False, min_rows=100, min_relative_change=0.01,
            confidence=0.95, floor=0.9)
POINT = {"threshold": 0.5}
LABEL = np.tile([0, 0, 0, 1], 100)
DAYS = np.repeat(np.arange(20), 20)


def contender(name, p):
    "A contender that gives the true label the probability p."
    return Contender(name, np.where(LABEL == 1, p, 1 - p), POINT)


@settings(deadline=None, max_examples=30)
@given(st.floats(0.5, 0.99), st.floats(0.5, 0.99))
def test_the_decision_is_that_of_the_arithmetic(new, old):
    comparison = compare(LABEL, contender("v2", new), contender("v1", old), RULE, COSTS, DAYS, BINARY, age=30)
    assert comparison.decision == ("promote" if np.log(new) / np.log(old) <= 0.99 + 1e-12 else "keep")
    assert comparison.rows == 400 and list(comparison.metrics) == ["v2", "v1"]


def test_a_metric_for_which_greater_is_better():
    rule = RULE | {"metric": "roc_auc", "greater_is_better": True}
    good, bad = contender("v2", 0.9), Contender("v1", np.tile([0.2, 0.2, 0.8, 0.8], 100), POINT)
    assert compare(LABEL, good, bad, rule, COSTS, DAYS, BINARY, age=30).decision == "promote"
    assert compare(LABEL, bad, good, rule, COSTS, DAYS, BINARY, age=30).decision == "keep"


def errs_on(days, number):
    "A contender that misses or wrongly warns about this number of rows on each of these days, of 200 each."
    label, day, row = np.tile([1, 0], 1400), np.repeat(np.arange(14), 200), np.tile(np.arange(200), 14)
    right = np.where(label == 1, 0.9, 0.1)
    return label, day, np.where(np.isin(day, days) & (row < number), 1 - right, right)


@pytest.mark.parametrize("metric", ["business_cost", "brier_score"])
def test_draws_in_which_the_champion_makes_no_error_count(metric):
    "The Champion errs on one day only: in a third of the draws it is better, although it is worse on all rows."
    (label, day, steady), (_, _, once) = errs_on(range(14), 2), errs_on([3], 120)
    if metric != "business_cost": once = np.where(day == 3, once, label)
    rule = RULE | {"metric": metric}
    sides = Contender("v2", steady, POINT), Contender("v1", once, POINT)
    comparison = compare(label, *sides, rule, COSTS, day, BINARY, age=30)
    assert comparison.change < -0.2 and comparison.bounds[1] > 1 and comparison.decision == "keep"
    assert len(comparison.drawn) == 20_000 and "% worse to " in comparison.reason
    assert len(comparison_module.plot_change(comparison, metric, "v2 against v1", BINARY).axes[0].patches) > 40


def test_a_logged_comparison_with_infinite_values_is_read_as_it_was():
    metrics = {"challenger_log_loss": 0.1, "champion_log_loss": 0.0, "change": np.inf, "change_low": -0.4}
    tags = {"decision": "keep", "reason": "worse", "rows": "400", "change_high": "inf", "accepted_loss": "inf"}
    logged = {name: value for name, value in metrics.items() if np.isfinite(value)}
    run = SimpleNamespace(data=SimpleNamespace(metrics=logged, tags=tags | {"change": "inf"}))
    comparison = promotion.logged_comparison(run)
    assert (comparison.change, *comparison.bounds, comparison.accepted) == (np.inf, -0.4, np.inf, np.inf)


def test_a_precision_without_warnings_is_zero_in_the_draws_too():
    label, day, old = errs_on(range(14), 20)
    new = np.where((day == 3) & (label == 1), 0.9, 0.1)  # warns on one day
    rule = RULE | {"metric": "precision_score", "greater_is_better": True}
    sides = Contender("v2", new, POINT), Contender("v1", old, POINT)
    comparison = compare(label, *sides, rule, COSTS, day, BINARY, age=30)
    assert comparison.change > 0.05 and comparison.bounds[0] <= -1 and comparison.decision == "keep"


@pytest.mark.parametrize("new, old, decision", [(1.0, 1.0, "keep"), (0.9, 1.0, "keep"), (1.0, 0.9, "promote")])
def test_models_without_any_loss(new, old, decision):
    rule = RULE | {"metric": "brier_score"}
    comparison = compare(LABEL, contender("v2", new), contender("v1", old), rule, COSTS, DAYS, BINARY, age=30)
    assert comparison.decision == decision and "nan" not in comparison.reason
    comparison_module.plot_change(comparison, "brier_score", "v2 against v1", BINARY)


@pytest.mark.parametrize("wrong", [np.nan, np.inf, 2.0])
def test_a_prediction_that_is_no_probability_is_refused(wrong):
    prediction = np.where(np.arange(400) == 7, wrong, 0.5)
    with pytest.raises(MlopsError, match="between 0 and 1; 1 of 400 are not, such as"):
        compare(LABEL, Contender("v2", prediction, POINT), contender("v1", 0.6), RULE, COSTS, DAYS, BINARY, age=30)


@pytest.mark.parametrize("label", [np.array([]), np.zeros(500, int), LABEL[:99]])
def test_insufficient_rows_give_no_decision(label):
    prediction = np.full(len(label), 0.3)
    comparison = compare(label, Contender("v2", prediction, POINT), Contender("v1", prediction, POINT), RULE, COSTS,
                         np.arange(len(label)) // 20, BINARY, age=30)
    assert comparison.decision == "undecided" and comparison.metrics.empty
    assert f"{len(label)} rows to compare v2 and v1, " in comparison.reason and " needed" in comparison.reason


def noisy(seed, days=30, each=40):
    "Rows whose probability differs by day, a good prediction, and one that is worse on most days only."
    rng = np.random.default_rng(seed)
    day = np.repeat(np.arange(days), each)
    truth = np.clip(rng.beta(2, 5, len(day)) + rng.normal(0, 0.1, days)[day], 0.02, 0.98)
    label = (rng.random(len(day)) < truth).astype(int)
    other = np.clip(truth + rng.normal(0.02, 0.08, days)[day], 0.02, 0.98)
    return label, day, truth, other


def interval_by_loops(label, day, new, old, level, times=2000):
    "The same interval, computed with loops and another random generator."
    import random
    loss = lambda p: [-np.log(q if y else 1 - q) for y, q in zip(label, p, strict=True)]
    sums = {d: (0.0, 0.0) for d in set(day)}
    for d, a, b in zip(day, loss(new), loss(old), strict=True): sums[d] = (sums[d][0] + a, sums[d][1] + b)
    generator, names, changes = random.Random(5), sorted(sums), []
    for _ in range(times):
        picked = [sums[d] for d in generator.choices(names, k=len(names))]
        changes.append(sum(a for a, _ in picked) / sum(b for _, b in picked) - 1)
    return np.quantile(changes, [(1 - level) / 2, (1 + level) / 2])


@pytest.mark.parametrize("level", [0.8, 0.95])
def test_the_interval_resamples_days_for_both_sides_at_once(level):
    "It contains the interval of independent days, and is not much wider for such days."
    label, day, new, old = noisy(3)
    rule = RULE | {"confidence": level}
    sides = Contender("v2", new, POINT), Contender("v1", old, POINT)
    comparison = compare(label, *sides, rule, COSTS, day, BINARY, age=3)
    expected = interval_by_loops(label, day, new, old, level)
    width = expected[1] - expected[0]
    assert comparison.bounds[0] < expected[0] and comparison.bounds[1] > expected[1], "days may be correlated"
    assert comparison.bounds[1] - comparison.bounds[0] < 1.8 * width, (comparison.bounds, expected)


def test_better_by_chance_is_not_better():
    "One lucky day of twenty: the mean is better by far more than the minimum, but most days are slightly worse."
    even = np.where(LABEL == 1, 0.6, 0.4)
    lucky, slightly_worse = np.where(LABEL == 1, 0.99, 0.01), np.where(LABEL == 1, 0.595, 0.405)
    uneven = np.where(DAYS == 7, lucky, slightly_worse)
    sides = Contender("v2", uneven, POINT), Contender("v1", even, POINT)
    comparison = compare(LABEL, *sides, RULE, COSTS, DAYS, BINARY, age=30)
    assert comparison.change < -0.01 and comparison.bounds[1] > 0 and comparison.decision == "keep"


def test_against_an_old_champion_not_being_worse_may_suffice():
    same, rule = contender("v2", 0.7), RULE | {"champion_max_age_days": 90, "not_worse_than": 0.02}
    def against(age, p): return compare(LABEL, same, contender("v1", p), rule, COSTS, DAYS, BINARY, age=age)
    assert [against(age, 0.7).decision for age in (90, 91)] == ["keep", "promote"]
    assert against(91, 0.75).decision == "keep" and "91 days older" in against(91, 0.7).reason
    assert "rows, unchanged (" in against(91, 0.7).reason
    figure = comparison_module.plot_change(against(91, 0.69), "log_loss", "v2 against v1", BINARY)
    assert figure.axes[0].patches, "all draws are equal up to rounding, and are drawn as one bar"


OLD = {"champion_max_age_days": 20, "not_worse_than": 0.05}  # the versions are a month apart


def test_losses_accepted_against_old_champions_add_up(env, name, promote):
    "v2 is 4.0% worse than v1 and replaces it; v3 is 3.9% worse than v2, which alone would be accepted."
    promote.certainty.update({1: 0.7, 2: 0.69, 3: 0.68})
    promote(1)
    assert promote(2, **OLD)[1].accepted == pytest.approx(np.log(0.69) / np.log(0.7) - 1)
    assert float(registry.get_version(env, name, 2).tags["accepted_loss"]) == pytest.approx(0.0404, abs=1e-4)
    summary, comparison, _ = promote(3, **OLD)
    assert comparison.decision == "keep" and comparison.change < 0.05
    assert "promotions since the last proven improvement have accepted 4.0% of it" in summary
    assert state(env, name)[0]["champion"] == 2 and "accepted_loss" not in registry.get_version(env, name, 3).tags
    assert promote(3, **OLD)[0] == summary, "the logged comparison is used again"


def test_a_proven_improvement_ends_the_sum_of_accepted_losses(env, name, promote):
    promote.certainty.update({1: 0.7, 2: 0.69, 3: 0.72})
    promote(1), promote(2, **OLD)
    comparison = promote(3, **OLD)[1]
    assert (comparison.decision, comparison.accepted) == ("promote", 0)
    assert float(registry.get_version(env, name, 3).tags["accepted_loss"]) == 0


@pytest.mark.slow
def test_the_seed_does_not_decide():
    "Draws are added until the error of the bound is small beside its distance from the limit; else nothing is decided."
    label, day, new, old = noisy(3)
    days = number_days(day)
    losses = [ratio_statistic(log_losses(label, side), np.ones(len(label)), days) for side in (new, old)]
    statistic, rule = relative_change(*losses), comparison_module.check_deployment_rule(RULE, BINARY)
    exact = resample(statistic, days.count, 320_000, seed=5).high
    width = exact - resample(statistic, days.count).low
    for distance, multiple in ((0.5, 1), (0.05, 4), (0.0, 16)):
        limit = exact + distance * width
        result, is_settled = comparison_module.settled_change(statistic, days.count, 20_000, rule, limit)
        assert is_settled == (distance > 0) and len(result.drawn) <= 20_000 * multiple
        if is_settled:
            seeds = [resample(statistic, days.count, len(result.drawn), seed=seed).high for seed in range(8)]
            assert all(bound < limit for bound in seeds)


def test_a_bound_too_close_to_the_limit_keeps_the_champion(monkeypatch):
    label, day, new, old = noisy(3)
    monkeypatch.setattr(comparison_module, "settled_change", lambda statistic, days, draws, rule, limit: (
        replace(resample(statistic, days), high=-1e-9), False))
    result = compare(label, Contender("v2", new, POINT), Contender("v1", old, POINT), RULE, COSTS, day, BINARY, age=3)
    assert result.decision == "keep" and "too close to the limit to be decided by this number of draws" in result.reason


def test_the_first_champion_needs_more_than_a_bad_baseline():
    baseline = contender("the baseline", 0.51)
    def decision(p, floor):
        return compare(LABEL, contender("v1", p), baseline, RULE | {"floor": floor}, COSTS, DAYS, BINARY).decision
    assert (decision(0.6, 0.6), decision(0.6, 0.5), decision(0.52, 0.9)) == ("promote", "keep", "promote")
    assert decision(0.51, 0.9) == "keep"  # it must also be better than the baseline


def test_direct_promotes_what_is_worse_and_what_cannot_be_compared():
    direct = RULE | {"mode": "direct"}
    worse = compare(LABEL, contender("v2", 0.6), contender("v1", 0.9), direct, COSTS, DAYS, BINARY, age=1)
    same = [Contender(name, np.full(9, 0.3), POINT) for name in ("v2", "v1")]
    too_few = compare(LABEL[:9], *same, direct, COSTS, DAYS[:9], BINARY)
    assert (worse.decision, too_few.decision) == ("promote", "promote")
    assert "the rule is direct" in worse.reason and "worse" in worse.reason


@pytest.mark.parametrize("change, message", [
    ({"mode": "duel"}, "mode: 'duel' is not valid"), ({"confidence": 1}, "confidence: 1 is not valid"),
    ({"floor": None}, "floor: null is not valid"), ({"min_rows": "5000"}, "min_rows: '5000' .*\n.* remove the quotes"),
    ({"min_rows": True}, "min_rows: true is not valid"), ({"not_worse_than": 0.01}, "give both or neither"),
    ({"min_row": 3}, "no key 'min_row'"), ({"metric": "logloss"}, "no metric 'logloss'")])
def test_an_invalid_rule_is_refused(change, message):
    with pytest.raises(MlopsError, match=message):
        compare(LABEL, contender("v2", 0.7), contender("v1", 0.6), RULE | change, COSTS, DAYS, BINARY, age=1)


NAME = "dev.flights.late_arrival"


numbers = itertools.count()


@pytest.fixture
def name(env, monkeypatch):
    "A fresh model of three versions, and a log without Spark."
    log = {}
    def read_log(spark, env, name): return [dict(row) for key, row in sorted(log.items()) if key[0] == name]
    def write_log(spark, env, row): log[row["model_name"], row["move"]] = dict(row)
    monkeypatch.setattr(aliases_module, "read_log", read_log)
    monkeypatch.setattr(aliases_module, "write_log", write_log)
    return new_model(env)


def new_model(env):
    name = f"{NAME}_{next(numbers)}"
    registry.client(env).create_registered_model(name)
    for _ in range(3): registry.client(env).create_model_version(name, source=str(env.state))
    return name


def state(env, name):
    names = ("champion", "challenger", "previous_champion")
    aliases = {alias: aliases_module.points_to(env, name, alias) for alias in names}
    return aliases, aliases_module.read_log(None, env, name)


def deploy(env, name, version, reason="better"):
    "The alias moves of a deployment."
    aliases_module.move_alias(None, env, name, "challenger", version, "passed validation")
    champion = aliases_module.points_to(env, name, "champion")
    aliases_module.move_alias(None, env, name, "champion", version, reason, expected=champion)


def test_moves_keep_the_previous_champion_and_are_recorded_in_order(env, name):
    for version in (1, 2, 3, 2): deploy(env, name, version)
    aliases, log = state(env, name)
    assert aliases == {"champion": 2, "challenger": 2, "previous_champion": 3}
    champions = [(row["from_version"], row["to_version"]) for row in log if row["alias"] == "champion"]
    assert champions == [(None, 1), (1, 2), (2, 3), (3, 2)]
    assert [row["move"] for row in log] == list(range(1, 9)) and {row["state"] for row in log} == {"done"}


def test_the_same_deployment_again_changes_nothing(env, name):
    deploy(env, name, 1); deploy(env, name, 2)
    before = state(env, name)
    deploy(env, name, 2)
    assert state(env, name) == before
    assert aliases_module.move_alias(None, env, name, "champion", 2, "once more") is False


class Killed(BaseException):
    "Like SIGKILL for what is stored: no handler of the code catches it."


def dies_at(monkeypatch, writes, step, effect, act) -> bool:  # writes: pairs of an object and the name of its function
    "Act and die at this write, before or after its effect; False if there are fewer writes."
    calls = itertools.count()
    def dying(real):
        def call(*args, **kwargs):
            if next(calls) != step: return real(*args, **kwargs)
            if effect == "after": real(*args, **kwargs)
            raise Killed
        return call
    with monkeypatch.context() as patched:
        for owner, function in writes: patched.setattr(owner, function, dying(getattr(owner, function)))
        try: act()
        except Killed: return True
    return False


def killed(env, name, monkeypatch, step, effect) -> bool:
    "Deploy version 3 and die at this write."
    writes = [(aliases_module, function) for function in ("write_log", "set_alias")]
    return dies_at(monkeypatch, writes, step, effect, lambda: deploy(env, name, 3))


@pytest.mark.slow
@pytest.mark.parametrize("effect", ["before", "after"])
def test_a_kill_at_any_step_then_the_same_again_ends_like_an_undisturbed_run(env, name, monkeypatch, effect):
    for step in itertools.count():
        name = new_model(env)
        deploy(env, name, 1); deploy(env, name, 2)
        died = killed(env, name, monkeypatch, step, effect)
        assert aliases_module.points_to(env, name, "champion") in (2, 3)  # never none
        deploy(env, name, 3)
        assert_third_is_champion(env, name)
        if not died: break
    assert step > 0, "no step was disturbed"


def assert_third_is_champion(env, name):
    "The aliases and the log are those of an undisturbed run."
    aliases, log = state(env, name)
    assert aliases == {"champion": 3, "challenger": 3, "previous_champion": 2}
    assert [(r["move"], r["alias"], r["from_version"], r["to_version"], r["state"]) for r in log] == [
        (1, "challenger", None, 1, "done"), (2, "champion", None, 1, "done"), (3, "challenger", 1, 2, "done"),
        (4, "champion", 1, 2, "done"), (5, "challenger", 2, 3, "done"), (6, "champion", 2, 3, "done")]


def test_the_next_move_overwrites_the_row_of_a_move_that_did_not_happen(env, name, monkeypatch):
    deploy(env, name, 1)
    with monkeypatch.context() as patched:
        patched.setattr(aliases_module, "set_alias", lambda *_: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed): aliases_module.move_alias(None, env, name, "champion", 2, "wanted two")
    assert aliases_module.move_alias(None, env, name, "champion", 3, "wants three")
    log = state(env, name)[1]
    assert [(r["to_version"], r["reason"], r["state"]) for r in log if r["alias"] == "champion"] == [
        (1, "better", "done"), (3, "wants three", "done")]


def test_only_the_compared_champion_is_replaced(env, name):
    deploy(env, name, 1)
    deploy(env, name, 3)  # another deployment was faster
    with pytest.raises(MlopsError, match="champion of .* was version 1 when v2 was compared, and is 3 now"):
        aliases_module.move_alias(None, env, name, "champion", 2, "compared with v1", expected=1)
    with pytest.raises(MlopsError, match="was version None when v2 was compared, and is 3 now"):
        aliases_module.move_alias(None, env, name, "champion", 2, "there was none", expected=None)
    assert state(env, name)[0]["champion"] == 3


def test_an_unknown_model_version_or_alias_is_named(env, name):
    def move(model, version): aliases_module.move_alias(None, env, model, "champion", version, "")
    with pytest.raises(MlopsError, match=f"no alias 'champion' in model {name}\n  there are none"):
        aliases_module.champion(env, name)
    with pytest.raises(MlopsError, match="no model 'dev.flights.late_arival'"):
        aliases_module.champion(env, "dev.flights.late_arival")
    with pytest.raises(MlopsError, match="no version '9' in model .*\n  .*1, 2, 3"): move(name, 9)
    with pytest.raises(MlopsError, match="the model name is empty"): move("", 1)
    with pytest.raises(MlopsError, match="a model version must be a positive integer, not 'v1'"): move(name, "v1")
    assert state(env, name)[1] == []


def test_only_its_own_catalog(env, name):
    deploy(env, name, 1)
    prod = replace(env, target="prod", read=("prod",), write=("prod",))
    reader = replace(prod, read=("prod", "dev"))
    for alias in ("champion", "challenger"):
        with pytest.raises(MlopsError, match="target 'prod' may not write"):
            aliases_module.move_alias(None, reader, name, alias, 1, "")
    with pytest.raises(MlopsError, match="target 'prod' may not read"): aliases_module.champion(prod, name)
    assert int(aliases_module.champion(reader, name).version) == 1


def set_passed(env, name, *numbers):
    for number in numbers:
        registry.client(env).set_model_version_tag(name, str(number), "model_validation_status", "PASSED")


def test_a_rollback_restores_the_previous_champion_and_a_second_one_is_refused(env, name):
    deploy(env, name, 1); deploy(env, name, 2); set_passed(env, name, 1)
    result = aliases_module.rollback(None, env, name, "warns of everything")
    assert result == f"{name} v1 is Champion again, v2 is out of production: warns of everything"
    aliases, log = state(env, name)
    assert aliases == {"champion": 1, "challenger": 2, "previous_champion": 2}
    last = [log[-1][column] for column in ("from_version", "to_version", "reason", "state")]
    assert last == [2, 1, "rollback: warns of everything", "done"]
    set_passed(env, name, 2)
    message = "the previous Champion v2 .* was itself rolled back: warns of everything\n.*--to 2"
    with pytest.raises(MlopsError, match=message):
        aliases_module.rollback(None, env, name, "once more")
    aliases_module.rollback(None, env, name, "it was right", to=2)
    first, second = (registry.get_version(env, name, number) for number in (1, 2))
    assert state(env, name)[0]["champion"] == 2 and "rolled_back" not in second.tags
    assert "rolled_back" not in first.tags  # it only stood in for version 2
    assert first.description == "## Rollback\n\nTaken out of production: it was right"
    assert second.description == "## Rollback\n\nPut back in production instead of v1: it was right"
    result = aliases_module.rollback(None, env, name, "it was wrong after all")
    assert "v1 is Champion again" in result  # v1 has no tag, so a rollback to it is allowed
    assert registry.get_version(env, name, 2).tags["rolled_back"] == "it was wrong after all"


def test_a_refused_rollback_moves_nothing(env, name):
    def refuse(message, reason="r", to=None, model=None):
        with pytest.raises(MlopsError, match=message): aliases_module.rollback(None, env, model or name, reason, to)
    refuse("has no previous_champion to go back to\n.*--to VERSION")
    deploy(env, name, 1); deploy(env, name, 2)
    before = state(env, name)
    refuse("a rollback needs a reason", reason="  ")
    refuse("v1 has not passed validation")
    refuse("v3 has not passed validation", to=3)
    refuse("no version '9' in model", to=9)
    refuse("a model version must be a positive integer, not 'v1'", to="v1")
    refuse("no model 'dev.flights.late_arival'", model="dev.flights.late_arival")
    refuse("target 'dev' may not write prod.flights.late_arrival", model="prod.flights.late_arrival")
    set_passed(env, name, 2)
    refuse("v2 is Champion already", to=2)
    assert state(env, name) == before and "rolled_back" not in registry.get_version(env, name, 2).tags


def test_a_champion_that_was_deleted_can_be_replaced_and_is_not_forgotten(env, name):
    deploy(env, name, 1); deploy(env, name, 2); set_passed(env, name, 1)
    registry.client(env).delete_model_version(name, "2")
    aliases, log = state(env, name)
    assert aliases == {"champion": None, "challenger": None, "previous_champion": 1}
    assert aliases_module.lost_champion(log, None) == 2
    result = aliases_module.rollback(None, env, name, "v2 was deleted")
    assert result.endswith("v1 is Champion again, there was no Champion: v2 was deleted")
    assert state(env, name)[0]["champion"] == 1


@pytest.fixture
def in_memory(env, name, monkeypatch):
    memory = Registry()
    monkeypatch.setattr(registry, "client", lambda env: memory)


METHODS = ("set_registered_model_alias", "set_model_version_tag", "delete_model_version_tag", "update_model_version")


def rollback_or_undo(env, kind, name):
    if kind == "rollback": return aliases_module.rollback(None, env, name, "storms")
    return aliases_module.rollback(None, env, name, "the storms are over", to=2)


def second_champion(env, kind):
    "A model whose version 2 is Champion after version 1; for the kind undo it is rolled back."
    name = new_model(env)
    deploy(env, name, 1); deploy(env, name, 2); set_passed(env, name, 1, 2, 3)
    registry.client(env).update_model_version(name, "1", "It forecasts.")
    if kind == "undo": rollback_or_undo(env, "rollback", name)
    return name


def whole_state(env, name, states=("started", "done")):
    "Aliases, moves, and tags and descriptions of the versions."
    aliases, log = state(env, name)
    rows = [{key: value for key, value in row.items() if key != "model_name"} for row in log if row["state"] in states]
    versions = [registry.get_version(env, name, number) for number in (1, 2, 3)]
    return aliases, rows, [(version.tags, version.description) for version in versions]


def kill_at(env, kind, name, monkeypatch, step, effect="before") -> bool:
    "Roll back or undo, and die at this write."
    client = type(registry.client(env))
    writes = [(aliases_module, "write_log"), *((client, method) for method in METHODS)]
    return dies_at(monkeypatch, writes, step, effect, lambda: rollback_or_undo(env, kind, name))


def try_again(env, kind, name):
    try: rollback_or_undo(env, kind, name)
    except MlopsError as error: assert "itself rolled back: storms" in str(error) or "Champion already" in str(error)


@pytest.mark.parametrize("kind", ["rollback", "undo"])
def test_killed_at_any_write_and_repeated_a_rollback_ends_like_an_undisturbed_one(env, in_memory, monkeypatch, kind):
    undisturbed = second_champion(env, kind)
    rollback_or_undo(env, kind, undisturbed)
    expected = whole_state(env, undisturbed)
    reason = "storms" if kind == "rollback" else None
    assert [tags.get("rolled_back") for tags, _ in expected[2]] == [None, reason, None]
    assert expected[1][-1]["kind"] == {"rollback": aliases_module.ROLLBACK, "undo": aliases_module.UNDO}[kind]
    kills = 0
    for step, effect in itertools.product(range(7), ("before", "after")):
        name = second_champion(env, kind)
        kills += kill_at(env, kind, name, monkeypatch, step, effect)
        try_again(env, kind, name)
        assert whole_state(env, name) == expected, (step, effect)
    assert kills == 14 and not kill_at(env, kind, second_champion(env, kind), monkeypatch, step=7)


def other_rollback(env, name): aliases_module.rollback(None, env, name, "neither is good", to=3)


@pytest.mark.parametrize("other", [lambda env, name: deploy(env, name, 3), other_rollback, aliases_module.finished_log],
                         ids=["promotion", "another rollback", "history"])
@pytest.mark.parametrize("kind", ["rollback", "undo"])
def test_another_command_after_a_kill_sees_a_whole_move_or_none(env, in_memory, monkeypatch, kind, other):
    def run_other(name): other(None, env, name) if other is aliases_module.finished_log else other(env, name)
    without, whole = second_champion(env, kind), second_champion(env, kind)
    before = aliases_module.points_to(env, without, "champion")
    rollback_or_undo(env, kind, whole)
    run_other(without), run_other(whole)
    expected = {False: whole_state(env, without, ["done"]), True: whole_state(env, whole, ["done"])}
    for step in range(7):
        name = second_champion(env, kind)
        assert kill_at(env, kind, name, monkeypatch, step)
        has_moved = aliases_module.points_to(env, name, "champion") != before
        assert has_moved == (step >= 2)
        run_other(name)
        assert whole_state(env, name, ["done"]) == expected[has_moved], step


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 4])
def test_a_deployment_after_an_interrupted_rollback_sees_the_tag_that_was_not_yet_written(env, name, promote,
                                                                                       monkeypatch, step):
    promote(1), promote(2)
    assert kill_at(env, "rollback", name, monkeypatch, step)
    assert "rolled_back" not in registry.get_version(env, name, 2).tags
    if step == 1: return promote(2) and assert_no_rollback(env, name)
    with pytest.raises(MlopsError, match="v2 was rolled back: storms\n.*--to 2"): promote(2)
    assert state(env, name)[0]["champion"] == 1 and {row["state"] for row in state(env, name)[1]} == {"done"}


def assert_no_rollback(env, name):
    assert state(env, name)[0]["champion"] == 2 and "rolled_back" not in registry.get_version(env, name, 2).tags


@pytest.mark.slow
def test_an_interrupted_promotion_leaves_no_decision_or_is_finished(env, name, promote, monkeypatch):
    "Killed before the alias, version 2 has no tag of the promotion; killed after it, the next command writes them."
    promote(1)
    def dies(*_, **__): raise Killed
    def decision_tags(): return [registry.get_version(env, name, 2).tags.get(tag)
                                 for tag in (promotion.DECISION, promotion.ACCEPTED_LOSS)]
    real = aliases_module.set_alias
    def dies_at_champion(env, name, alias, version): dies() if alias == "champion" else real(env, name, alias, version)
    for function, death in (("set_alias", dies_at_champion), ("finish_move", dies)):
        with monkeypatch.context() as patched, pytest.raises(Killed):
            if function == "finish_move": promote_challenger(env, name, 2)
            patched.setattr(aliases_module, function, death)
            promote(2)
        assert decision_tags() == [None, None]
    aliases_module.rollback(None, env, name, "storms")
    assert decision_tags()[0].startswith("promote: log_loss") and decision_tags()[1] == "0.000000"
    assert registry.get_version(env, name, 2).description.startswith("## Deployment\n\nPromoted: log_loss")
    assert [row["kind"] for row in state(env, name)[1][-2:]] == ["promotion", "rollback"]


def promote_challenger(env, name, version):
    aliases_module.move_alias(None, env, name, "challenger", version, "passed validation")


def test_the_same_reason_for_another_version_is_another_rollback(env, in_memory, monkeypatch):
    name = second_champion(env, "rollback")
    assert kill_at(env, "rollback", name, monkeypatch, step=2)
    result = aliases_module.rollback(None, env, name, "storms", to=3)
    assert result == f"{name} v3 is Champion now, v1 is out of production: storms"
    tags = [tags.get("rolled_back") for tags, _ in whole_state(env, name)[2]]
    assert tags == ["storms", "storms", None] and state(env, name)[0]["previous_champion"] == 1


def test_an_interrupted_rollback_whose_old_champion_was_deleted_is_finished(env, in_memory, monkeypatch):
    name = second_champion(env, "rollback")
    assert kill_at(env, "rollback", name, monkeypatch, step=2)
    registry.client(env).delete_model_version(name, "2")
    assert "an interrupted rollback is finished" in rollback_or_undo(env, "rollback", name)
    assert state(env, name)[0]["champion"] == 1 and {row["state"] for row in state(env, name)[1]} == {"done"}


def test_a_version_promoted_since_the_rollback_is_rolled_back_itself(env, in_memory):
    name = second_champion(env, "undo")
    deploy(env, name, 3)
    aliases_module.rollback(None, env, name, "worse in July", to=2)
    tags = [tags.get("rolled_back") for tags, _ in whole_state(env, name)[2]]
    assert tags == [None, None, "worse in July"], "it was compared and did not only stand in: no job promotes it again"


def test_a_rollback_to_a_version_that_was_rolled_back_undoes_it_without_a_champion_too(env, in_memory):
    name = second_champion(env, "undo")
    registry.client(env).delete_model_version(name, "1")
    result = aliases_module.rollback(None, env, name, "v1 was deleted", to=2)
    assert result.endswith("v2 is Champion again, there was no Champion: v1 was deleted")
    version = registry.get_version(env, name, 2)
    assert "rolled_back" not in version.tags
    assert version.description == "## Rollback\n\nPut back in production: v1 was deleted"


def moves_with_kinds(targets):
    "Moves of champion to these versions, with the kinds of a simulation that keeps the versions that are out."
    rows, current, is_out = [], None, set()
    for target, is_promotion in targets:
        if target == current: continue
        kind = "promotion" if is_promotion else "undo of a rollback" if target in is_out else "rollback"
        if is_promotion: is_out.clear()
        elif kind == "rollback" and current: is_out.add(current)
        is_out.discard(target)
        reason = "better" if is_promotion else "rollback: storms"
        rows.append(dict(alias="champion", from_version=current, to_version=target, reason=reason, state="done",
                         kind=kind))
        current = target
    return rows


@settings(max_examples=200)
@given(st.lists(st.tuples(st.integers(1, 4), st.booleans()), max_size=12))
def test_the_kind_of_rows_of_earlier_releases_follows_from_the_moves_before(targets):
    rows = moves_with_kinds(targets)
    without_kind = [{key: value for key, value in row.items() if key != "kind"} for row in rows]
    assert aliases_module.with_kinds(without_kind) == rows
    assert aliases_module.with_kinds([row | {"kind": None} for row in rows]) == rows


def test_the_user_who_finishes_an_interrupted_move_does_not_become_its_author(env, name, monkeypatch):
    rows = []
    monkeypatch.undo()
    monkeypatch.setattr(aliases_module.tables, "merge", lambda spark, env, table, frame, keys: rows.append(frame))
    def one_row(values, columns):
        return dict(zip([column.split()[0] for column in columns.split(", ")], values[0], strict=True))
    spark = SimpleNamespace(createDataFrame=one_row)
    aliases_module.write_log(spark, env, {"model_name": name, "move": 1, "moved_by": "ann", "run_id": "4f1c"})
    aliases_module.write_log(spark, env, {"model_name": name, "move": 1})
    assert rows[0]["moved_by"] == "ann" and rows[0]["run_id"] == "4f1c"
    assert rows[1]["moved_by"] and rows[1]["run_id"] is None


@pytest.fixture
def promote(env, name, monkeypatch):
    "A function that deploys one of three versions with status PASSED; the second is the best, the third second best."
    from matplotlib import pyplot
    for number, as_of in enumerate(("2013-04-01", "2013-05-01", "2013-06-01"), 1):
        set_passed(env, name, number)
        registry.client(env).set_model_version_tag(name, str(number), "as_of", as_of)
    def empty_figure(*_): return pyplot.figure(figsize=(1, 1))
    for plot in ("plot_losses", "plot_change"): monkeypatch.setattr(promotion, plot, empty_figure)
    certainty = {None: 0.5, 1: 0.6, 2: 0.8, 3: 0.7}
    def make_match(version, champion):
        new, old = int(version.version), int(champion.version) if champion else None
        return promotion.Match(LABEL, DAYS.astype("M8[D]"), contender(f"v{new}", certainty[new]),
                               contender(f"v{old}" if old else "the baseline", certainty[old]), BINARY)
    def deploy_version(number, **rule):
        version = SimpleNamespace(name=name, version=number, tags={})  # as read before its validation
        return promotion.deploy(None, env, version, RULE | rule, COSTS, make_match)
    deploy_version.certainty = certainty
    return deploy_version


@pytest.mark.parametrize("mode", ["compare", "direct"])
def test_an_older_version_takes_no_alias_from_a_newer_one(env, name, promote, mode):
    "Version 2 replaced version 1; a training as of the earlier day returns version 1, and deploys it again."
    promote(1), promote(2)
    before = state(env, name)
    assert before[0] == {"champion": 2, "challenger": 2, "previous_champion": 1}
    summary, comparison, run_id = promote(1, mode=mode)
    assert state(env, name) == before and comparison.decision == "keep" and run_id
    assert summary.startswith(f"{name} v1 is not clearly better, v2 stays Champion: log_loss")
    assert summary.endswith("; v2, which is newer, stays Challenger")
    assert "Refused: log_loss" in registry.get_version(env, name, 1).description


def test_a_version_approved_after_a_newer_one_must_be_better_than_it(env, name, promote):
    promote(1), promote(3)
    summary = promote(2, mode="direct")[0]  # an older version is compared in spite of the mode; it is better
    assert state(env, name)[0] == {"champion": 2, "challenger": 3, "previous_champion": 3}
    assert f"{name} v2 is Champion: log_loss" in summary and "direct" not in summary
    assert summary.endswith("; v3, which is newer, stays Challenger")


def test_a_newer_version_is_promoted_directly_where_the_rule_says_so(env, name, promote):
    promote(1), promote(2)
    assert "validated, and the rule is direct" in promote(3, mode="direct")[0]
    assert state(env, name)[0]["champion"] == 3


def test_the_decision_is_one_section_of_the_versions_description(env, name, promote):
    mlflow = registry.client(env)
    def page(number): return registry.get_version(env, name, number).description
    promote(1), promote(2)
    mlflow.update_model_version(name, "3", "It forecasts.\n\n## Validation\n\n| a | b |")
    for _ in range(2): promote(3)  # the second result is read from the run of the first
    text, experiment = page(3), registry.experiment_id(env, name.split(".")[-1])
    runs = mlflow.search_runs([experiment], "tags.decision = 'keep'")
    assert len(runs) == 1 and text.endswith(f"The comparison is run `{runs[0].info.run_id}`.")
    assert text.startswith("It forecasts.\n\n## Validation\n\n| a | b |\n\n## Deployment\n\n"
                           "Refused: log_loss 0.3567 against 0.2231 of v2 on 400 rows, 59.8% worse")
    assert text.count("## Deployment") == 1
    assert "| metric | v3 | v2 |" in text and "| log_loss | 0.3567 | 0.2231 |" in text
    assert "Promoted: log_loss 0.2231 against 0.5108 of v1" in page(2)
    summary = promote(3, min_rows=401)[0]
    assert summary.startswith(f"Too few rows to compare {name} v3: no decision, v2 stays Champion: 400 rows")
    assert page(3).endswith("## Deployment\n\nNo decision: 400 rows to compare v3 and v2, at least 401 rows are needed")
    assert registry.get_version(env, name, 3).tags["deployment_decision"].startswith("undecided: 400 rows")


def test_after_the_champion_was_deleted_the_next_version_is_compared_with_the_baseline(env, name, promote):
    promote(1), promote(2)
    registry.client(env).delete_model_version(name, "2")
    summary, comparison, _ = promote(3)
    assert comparison.decision == "promote" and "against 0.6931 of the baseline" in summary
    assert "(the last Champion, v2, no longer exists: its version or its alias was deleted)" in summary
    assert state(env, name)[0] == {"champion": 3, "challenger": 3, "previous_champion": 1}


@pytest.mark.parametrize("step", ["find_alias", "experiment_id"])
def test_a_registry_failure_is_reported_and_a_second_run_finishes(env, name, promote, monkeypatch, step):
    import requests
    promote(1)
    def down(*_): raise requests.exceptions.ConnectionError("refused")
    with monkeypatch.context() as patched:
        patched.setattr(registry, step, down)
        message = "the registry at .* failed: no server answers there\n.*repeat the command when the registry is avail"
        with pytest.raises(MlopsError, match=message): promote(2)
    assert aliases_module.points_to(env, name, "champion") == 1
    promote(2)
    assert state(env, name)[0] == {"champion": 2, "challenger": 2, "previous_champion": 1}
