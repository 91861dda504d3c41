"""The decision, and the aliases under kills, races and wrong wishes. The log is kept in a dict here; Spark's is tested elsewhere."""
import itertools
from dataclasses import replace
from datetime import date
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlops_nb.deployment import aliases as deployment
from mlops_nb.deployment import comparison, promotion
from mlops_nb.deployment.comparison import Contender, compare
from mlops_nb.errors import MlopsError
from mlops_nb.flights import compare as compare_notebook
from mlops_nb.flights import deploy as deploy_notebook
from mlops_nb.models import registry

pytestmark = [pytest.mark.filterwarnings("ignore:.*Any type hint is inferred"),  # MLflow's own, at import
              pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")]
COSTS = dict(missed=5, false_warning=1)
RULE = dict(mode="compare", metric="log_loss", greater_is_better=False, min_rows=100, min_relative_change=0.01, confidence=0.95, floor=0.9)
LABEL = np.tile([0, 0, 0, 1], 100)
DAYS = np.repeat(np.arange(20), 20)


def sure(name, p): return Contender(name, np.where(LABEL == 1, p, 1 - p), 0.5)


@pytest.fixture
def few_draws(monkeypatch): monkeypatch.setattr(comparison, "DRAWS", 20)


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.floats(0.5, 0.99), st.floats(0.5, 0.99))
def test_the_decision_is_that_of_the_arithmetic(few_draws, new, old):
    found = compare(LABEL, sure("v2", new), sure("v1", old), RULE, COSTS, DAYS, age=30)
    assert found.decision == ("promote" if np.log(new) / np.log(old) <= 0.99 + 1e-12 else "keep")
    assert found.rows == 400 and list(found.metrics) == ["v2", "v1"]


def test_a_metric_of_which_more_is_better(few_draws):
    rule = RULE | {"metric": "roc_auc", "greater_is_better": True}
    good, bad = sure("v2", 0.9), Contender("v1", np.tile([0.2, 0.2, 0.8, 0.8], 100), 0.5)
    assert compare(LABEL, good, bad, rule, COSTS, DAYS, age=30).decision == "promote"
    assert compare(LABEL, bad, good, rule, COSTS, DAYS, age=30).decision == "keep"


@pytest.mark.parametrize("label", [np.array([]), np.zeros(500, int), LABEL[:99]])
def test_too_little_to_compare_on_decides_nothing(label):
    of = lambda name: Contender(name, np.full(len(label), 0.3), 0.5)
    found = compare(label, of("v2"), of("v1"), RULE, COSTS, np.arange(len(label)) // 20, age=30)
    assert found.decision == "undecided" and f"{len(label)} rows" in found.reason and found.metrics.empty


def noisy(seed, days=30, each=40):
    "Rows whose truth differs by day, a good forecast, and one that is worse on most days only."
    rng = np.random.default_rng(seed)
    day = np.repeat(np.arange(days), each)
    truth = np.clip(rng.beta(2, 5, len(day)) + rng.normal(0, 0.1, days)[day], 0.02, 0.98)
    label = (rng.random(len(day)) < truth).astype(int)
    other = np.clip(truth + rng.normal(0.02, 0.08, days)[day], 0.02, 0.98)
    return label, day, truth, other


def drawn_by_loops(label, day, new, old, level, times=2000):
    "The same interval, in the plainest way, by draws of another generator."
    import random
    loss = lambda p: [-np.log(q if y else 1 - q) for y, q in zip(label, p, strict=True)]
    sums = {d: (0.0, 0.0) for d in set(day)}
    for d, a, b in zip(day, loss(new), loss(old), strict=True): sums[d] = (sums[d][0] + a, sums[d][1] + b)
    generator, names, found = random.Random(5), sorted(sums), []
    for _ in range(times):
        picked = [sums[d] for d in generator.choices(names, k=len(names))]
        found.append(sum(a for a, _ in picked) / sum(b for _, b in picked) - 1)
    return np.quantile(found, [(1 - level) / 2, (1 + level) / 2])


@pytest.mark.parametrize("level", [0.8, 0.95])
def test_the_interval_is_that_of_days_drawn_in_pairs(level):
    label, day, new, old = noisy(3)
    found = compare(label, Contender("v2", new, 0.5), Contender("v1", old, 0.5), RULE | {"confidence": level}, COSTS, day, age=3)
    expected = drawn_by_loops(label, day, new, old, level)
    width = expected[1] - expected[0]
    assert np.abs(np.array(found.bounds) - expected).max() < 0.15 * width, (found.bounds, expected)


def test_better_by_chance_is_not_better():
    "One lucky day of twenty: the mean is better by far more than is asked, the days do not agree."
    even, odd = np.where(LABEL == 1, 0.6, 0.4), np.where(LABEL == 1, 0.6, 0.4)
    odd = np.where(DAYS == 7, np.where(LABEL == 1, 0.99, 0.01), np.clip(odd - np.where(LABEL == 1, 0.005, -0.005), 0, 1))
    found = compare(LABEL, Contender("v2", odd, 0.5), Contender("v1", even, 0.5), RULE, COSTS, DAYS, age=30)
    assert found.change < -0.01 and found.bounds[1] > 0 and found.decision == "keep"


def test_against_an_old_champion_not_being_worse_may_suffice():
    same, rule = sure("v2", 0.7), RULE | {"champion_max_age_days": 90, "not_worse_than": 0.02}
    of = lambda age, p: compare(LABEL, same, sure("v1", p), rule, COSTS, DAYS, age=age)
    assert [of(age, 0.7).decision for age in (90, 91)] == ["keep", "promote"]
    assert of(91, 0.75).decision == "keep" and "91 days older" in of(91, 0.7).reason


def test_the_first_champion_needs_more_than_a_bad_baseline():
    of = lambda p, floor: compare(LABEL, sure("v1", p), sure("the baseline", 0.51), RULE | {"floor": floor}, COSTS, DAYS).decision
    assert (of(0.6, 0.6), of(0.6, 0.5), of(0.52, 0.9)) == ("promote", "keep", "promote")
    assert of(0.51, 0.9) == "keep"  # it must beat the baseline all the same


def test_direct_promotes_what_is_worse_and_what_cannot_be_compared():
    direct = RULE | {"mode": "direct"}
    worse = compare(LABEL, sure("v2", 0.6), sure("v1", 0.9), direct, COSTS, DAYS, age=1)
    few = compare(LABEL[:9], Contender("v2", np.full(9, 0.3), 0.5), Contender("v1", np.full(9, 0.3), 0.5), direct, COSTS, DAYS[:9])
    assert (worse.decision, few.decision) == ("promote", "promote") and "the rule is direct" in worse.reason and "worse" in worse.reason


@pytest.mark.parametrize("change, said", [
    ({"mode": "duel"}, "no mode 'duel'"), ({"confidence": 1}, "confidence of the rule of deployment is 1"), ({"floor": None}, "floor of the rule of deployment is None"),
    ({"min_rows": "5000"}, "min_rows of .* is '5000'"), ({"min_rows": True}, "min_rows of .* is True"), ({"not_worse_than": 0.01}, "need each other"),
    ({"min_row": 3}, "no key 'min_row'"), ({"metric": "logloss"}, "no metric 'logloss'")])
def test_a_rule_that_makes_no_sense_is_refused(change, said):
    with pytest.raises(MlopsError, match=said): compare(LABEL, sure("v2", 0.7), sure("v1", 0.6), RULE | change, COSTS, DAYS, age=1)


NAME = "dev.flights.late_arrival"


numbers = itertools.count()


@pytest.fixture
def name(env, monkeypatch):
    "A fresh model of three versions, and a log without Spark."
    log = {}
    monkeypatch.setattr(deployment, "read_log", lambda spark, env, name: [dict(row) for key, row in sorted(log.items()) if key[0] == name])
    monkeypatch.setattr(deployment, "write_log", lambda spark, env, row: log.update({(row["model_name"], row["move"]): dict(row)}))
    return new_model(env)


def new_model(env):
    name = f"{NAME}_{next(numbers)}"
    registry.client(env).create_registered_model(name)
    for _ in range(3): registry.client(env).create_model_version(name, source=str(env.state))
    return name


def state(env, name):
    aliases = {alias: deployment.points_to(env, name, alias) for alias in ("champion", "challenger", "previous_champion")}
    return aliases, deployment.read_log(None, env, name)


def deploy(env, name, version, reason="better"):
    "What a deployment does, aliases only."
    deployment.move_alias(None, env, name, "challenger", version, "passed validation")
    deployment.move_alias(None, env, name, "champion", version, reason, expected=deployment.points_to(env, name, "champion"))


def test_moves_keep_the_previous_champion_and_are_recorded_in_order(env, name):
    for version in (1, 2, 3, 2): deploy(env, name, version)
    aliases, log = state(env, name)
    assert aliases == {"champion": 2, "challenger": 2, "previous_champion": 3}
    champions = [(row["from_version"], row["to_version"]) for row in log if row["alias"] == "champion"]
    assert champions == [(None, 1), (1, 2), (2, 3), (3, 2)]
    assert [row["move"] for row in log] == list(range(1, 9)) and {row["state"] for row in log} == {"done"}


def test_again_changes_nothing(env, name):
    deploy(env, name, 1); deploy(env, name, 2)
    before = state(env, name)
    deploy(env, name, 2)
    assert state(env, name) == before
    assert deployment.move_alias(None, env, name, "champion", 2, "once more") is False


class Killed(BaseException):
    "As sudden as SIGKILL for what is stored: no handler of ours catches it."


def killed(env, name, monkeypatch, step, effect) -> bool:
    "Deploy version 3 and die at this write, before or after its effect; False if the deployment had ended by then."
    with monkeypatch.context() as patched:
        calls = itertools.count()
        def dying(real):
            def call(*given, **named):
                if next(calls) != step: return real(*given, **named)
                if effect == "after": real(*given, **named)
                raise Killed
            return call
        for function in ("write_log", "set_alias"): patched.setattr(deployment, function, dying(getattr(deployment, function)))
        try: deploy(env, name, 3)
        except Killed: return True
    return False


@pytest.mark.slow
@pytest.mark.parametrize("effect", ["before", "after"])
def test_a_kill_at_any_step_then_the_same_again_ends_like_an_undisturbed_run(env, name, monkeypatch, effect):
    for step in itertools.count():
        name = new_model(env)
        deploy(env, name, 1); deploy(env, name, 2)
        died = killed(env, name, monkeypatch, step, effect)
        assert deployment.points_to(env, name, "champion") in (2, 3)  # never none
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


def test_a_move_that_never_happened_gives_its_place_in_the_log_to_the_next(env, name, monkeypatch):
    deploy(env, name, 1)
    with monkeypatch.context() as patched:
        patched.setattr(deployment, "set_alias", lambda *_: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed): deployment.move_alias(None, env, name, "champion", 2, "wanted two")
    assert deployment.move_alias(None, env, name, "champion", 3, "wants three")
    log = state(env, name)[1]
    assert [(r["to_version"], r["reason"], r["state"]) for r in log if r["alias"] == "champion"] == [
        (1, "better", "done"), (3, "wants three", "done")]


def test_a_champion_that_was_not_compared_with_is_not_displaced(env, name):
    deploy(env, name, 1)
    deploy(env, name, 3)  # another deployment was faster
    with pytest.raises(MlopsError, match="champion of .* was version 1 when v2 was compared, and is 3 now"):
        deployment.move_alias(None, env, name, "champion", 2, "compared with v1", expected=1)
    with pytest.raises(MlopsError, match="was version None when v2 was compared, and is 3 now"):
        deployment.move_alias(None, env, name, "champion", 2, "there was none", expected=None)
    assert state(env, name)[0]["champion"] == 3


def test_what_does_not_exist_is_named(env, name):
    with pytest.raises(MlopsError, match=f"no alias 'champion' in model {name}\n  there are none"): deployment.champion(env, name)
    with pytest.raises(MlopsError, match="no version '9' in model .*\n  .*1, 2, 3"): deployment.move_alias(None, env, name, "champion", 9, "")
    with pytest.raises(MlopsError, match="no model 'dev.flights.late_arival'"): deployment.champion(env, "dev.flights.late_arival")
    with pytest.raises(MlopsError, match="no model is named"): deployment.move_alias(None, env, "", "champion", 1, "")
    with pytest.raises(MlopsError, match="whole number from 1 on, not 'v1'"): deployment.move_alias(None, env, name, "champion", "v1", "")
    assert state(env, name)[1] == []


def test_only_its_own_catalog(env, name):
    deploy(env, name, 1)
    prod = replace(env, target="prod", read=("prod",), write=("prod",))
    reader = replace(prod, read=("prod", "dev"))
    for alias in ("champion", "challenger"):
        with pytest.raises(MlopsError, match="target 'prod' may not write"): deployment.move_alias(None, reader, name, alias, 1, "")
    with pytest.raises(MlopsError, match="target 'prod' may not read"): deployment.champion(prod, name)
    assert int(deployment.champion(reader, name).version) == 1


def passed(env, name, *numbers):
    for number in numbers: registry.client(env).set_model_version_tag(name, str(number), "model_validation_status", "PASSED")


def test_back_to_the_previous_champion_and_not_forward_again_by_accident(env, name):
    deploy(env, name, 1); deploy(env, name, 2); passed(env, name, 1)
    said = deployment.rollback(None, env, name, "warns of everything")
    assert said == f"{name} v1 is Champion again, v2 is out of production: warns of everything"
    aliases, log = state(env, name)
    assert aliases == {"champion": 1, "challenger": 2, "previous_champion": 2}
    assert (log[-1]["from_version"], log[-1]["to_version"], log[-1]["reason"], log[-1]["state"]) == (2, 1, "rollback: warns of everything", "done")
    passed(env, name, 2)
    with pytest.raises(MlopsError, match="the previous Champion v2 .* was itself rolled back: warns of everything\n.*--to 2"):
        deployment.rollback(None, env, name, "once more")
    deployment.rollback(None, env, name, "it was right", to=2)
    first, second = (registry.get_version(env, name, number) for number in (1, 2))
    assert state(env, name)[0]["champion"] == 2 and "rolled_back" not in second.tags
    assert "rolled_back" not in first.tags  # it only stood in, and nothing was wrong with it
    assert first.description == "## Rollback\n\nTaken out of production: it was right"
    assert second.description == "## Rollback\n\nPut back in production in the place of v1: it was right"
    assert "v1 is Champion again" in deployment.rollback(None, env, name, "it was wrong after all")  # so the way back is open
    assert registry.get_version(env, name, 2).tags["rolled_back"] == "it was wrong after all"


def test_a_rollback_that_makes_no_sense_moves_nothing(env, name):
    def refuse(said, reason="r", to=None, model=None):
        with pytest.raises(MlopsError, match=said): deployment.rollback(None, env, model or name, reason, to)
    refuse("has no previous_champion to go back to\n.*--to VERSION")
    deploy(env, name, 1); deploy(env, name, 2)
    before = state(env, name)
    refuse("a rollback needs a reason", reason="  ")
    refuse("v1 has not passed validation")
    refuse("v3 has not passed validation", to=3)
    refuse("no version '9' in model", to=9)
    refuse("whole number from 1 on, not 'v1'", to="v1")
    refuse("no model 'dev.flights.late_arival'", model="dev.flights.late_arival")
    refuse("target 'dev' may not write prod.flights.late_arrival", model="prod.flights.late_arrival")
    passed(env, name, 2)
    refuse("v2 is Champion already", to=2)
    assert state(env, name) == before and "rolled_back" not in registry.get_version(env, name, 2).tags


def test_a_champion_that_was_deleted_can_be_replaced_and_is_not_forgotten(env, name):
    deploy(env, name, 1); deploy(env, name, 2); passed(env, name, 1)
    registry.client(env).delete_model_version(name, "2")
    aliases, log = state(env, name)
    assert aliases == {"champion": None, "challenger": None, "previous_champion": 1} and deployment.lost_champion(log, None) == 2
    assert deployment.rollback(None, env, name, "v2 was deleted").endswith("there was none: v2 was deleted")
    assert state(env, name)[0]["champion"] == 1


def test_who_decided_stays_who_decided(env, name, monkeypatch):
    "Whoever finishes an interrupted move does not become its author."
    rows = []
    monkeypatch.undo()
    monkeypatch.setattr(deployment.tables, "merge", lambda spark, env, table, frame, keys: rows.append(frame))
    fake = type("Spark", (), {"createDataFrame": staticmethod(lambda values, columns: dict(zip([c.split()[0] for c in columns.split(", ")], values[0], strict=True)))})
    deployment.write_log(fake, env, {"model_name": name, "move": 1, "moved_by": "ann", "run_id": "4f1c"})
    deployment.write_log(fake, env, {"model_name": name, "move": 1})
    assert rows[0]["moved_by"] == "ann" and rows[0]["run_id"] == "4f1c" and rows[1]["moved_by"] and rows[1]["run_id"] is None


def test_two_versions_meet_on_the_same_flights_whichever_is_the_champion(monkeypatch):
    "An older version, or one trained as of an earlier day, meets the Champion on the flights that the Champion was judged on."
    of = lambda number, as_of, through: SimpleNamespace(name=NAME, version=number, tags={"as_of": as_of, "trained_through": through})
    april, july = of(1, "2013-04-01", "2013-03-03"), of(2, "2013-07-01", "2013-06-02")
    monkeypatch.setattr(deploy_notebook, "labelled_rows", lambda spark, env, as_of, after: (after, as_of))
    june = (date(2013, 6, 2), date(2013, 7, 1))
    assert deploy_notebook.comparable_rows(None, None, july, april) == june == deploy_notebook.comparable_rows(None, None, april, july)
    assert deploy_notebook.comparable_rows(None, None, april, None) == (date(2013, 3, 3), date(2013, 4, 1))
    assert compare_notebook.day_of(april, july) == compare_notebook.day_of(july, april) == june[1]


@pytest.fixture
def promote(env, name, few_draws, monkeypatch):
    "Deploys one of three made-up versions that passed: the second is the best, then comes the third."
    from matplotlib import pyplot
    for number, as_of in enumerate(("2013-04-01", "2013-05-01", "2013-06-01"), 1):
        passed(env, name, number)
        registry.client(env).set_model_version_tag(name, str(number), "as_of", as_of)
    for picture in ("plot_losses", "plot_change"): monkeypatch.setattr(promotion, picture, lambda *given: pyplot.figure(figsize=(1, 1)))
    certainty = {None: 0.5, 1: 0.6, 2: 0.8, 3: 0.7}
    def meet(version, champion):
        number = int(champion.version) if champion else None
        return promotion.Match(LABEL, DAYS.astype("M8[D]"), sure(f"v{version.version}", certainty[int(version.version)]),
                               sure(f"v{number}" if number else "the baseline", certainty[number]))
    return lambda number, **rule: promotion.deploy(None, env, registry.get_version(env, name, number), RULE | rule, COSTS, meet)


@pytest.mark.parametrize("mode", ["compare", "direct"])
def test_a_version_that_is_found_again_takes_no_alias_from_a_newer_one(env, name, promote, mode):
    "Version 1 was Champion until 2 was better; a training as of the earlier day finds 1 again, and deploys it."
    promote(1), promote(2)
    before = state(env, name)
    assert before[0] == {"champion": 2, "challenger": 2, "previous_champion": 1}
    said, comparison, run_id = promote(1, mode=mode)
    assert state(env, name) == before and comparison.decision == "keep" and run_id
    assert said.startswith(f"{name} v1 is not better, v2 stays Champion: log_loss") and said.endswith("; v2, which is newer, stays Challenger")
    assert "Refused: log_loss" in registry.get_version(env, name, 1).description


def test_a_version_that_waited_while_a_newer_one_became_champion_has_to_be_better_and_the_newer_stays_challenger(env, name, promote):
    promote(1), promote(3)
    said = promote(2, mode="direct")[0]  # approved late: what is older is not promoted without being better, which it is
    assert state(env, name)[0] == {"champion": 2, "challenger": 3, "previous_champion": 3}
    assert f"{name} v2 is Champion: log_loss" in said and "direct" not in said and said.endswith("; v3, which is newer, stays Challenger")


def test_a_newer_version_is_promoted_directly_where_the_rule_says_so(env, name, promote):
    promote(1), promote(2)
    assert "validated, and the rule is direct" in promote(3, mode="direct")[0] and state(env, name)[0]["champion"] == 3


def test_what_was_decided_stands_on_the_versions_page_once_beside_all_else(env, name, promote):
    mlflow, page = registry.client(env), lambda number: registry.get_version(env, name, number).description
    promote(1), promote(2)
    mlflow.update_model_version(name, "3", "It forecasts.\n\n## Validation\n\n| a | b |")
    for _ in range(2): promote(3)  # the second answer is read from the run of the first
    said, run = page(3), mlflow.search_runs([registry.experiment_id(env, name.split(".")[-1])], "tags.decision = 'keep'")
    assert len(run) == 1 and said.endswith(f"The comparison is run `{run[0].info.run_id}`.")
    assert said.startswith("It forecasts.\n\n## Validation\n\n| a | b |\n\n## Deployment\n\nRefused: log_loss 0.3567 against 0.2231 of v2 on 400 rows, 59.8% worse")
    assert said.count("## Deployment") == 1 and "| metric | v3 | v2 |" in said and "| log_loss | 0.3567 | 0.2231 |" in said
    assert "Promoted: log_loss 0.2231 against 0.5108 of v1" in page(2)
    promote(3, min_rows=401)
    assert page(3).endswith("## Deployment\n\nNot decided: 400 rows to compare v3 and v2 on, 401 are needed")
    assert registry.get_version(env, name, 3).tags["deployment_decision"].startswith("undecided: 400 rows")


def test_after_a_champion_was_deleted_the_next_meets_the_baseline_and_says_who_is_missing(env, name, promote):
    promote(1), promote(2)
    registry.client(env).delete_model_version(name, "2")
    said, comparison, _ = promote(3)
    assert comparison.decision == "promote" and "against 0.6931 of the baseline" in said
    assert "(the Champion v2 of the log is gone: its version or its alias was deleted)" in said
    assert state(env, name)[0] == {"champion": 3, "challenger": 3, "previous_champion": 1}


@pytest.mark.parametrize("step", ["find_alias", "experiment_id"])
def test_a_registry_that_goes_down_is_said_in_a_sentence_and_the_same_again_finishes(env, name, promote, monkeypatch, step):
    import requests
    promote(1)
    def down(*_): raise requests.exceptions.ConnectionError("refused")
    with monkeypatch.context() as patched:
        patched.setattr(registry, step, down)
        with pytest.raises(MlopsError, match="the registry at .* does not answer as it should: ConnectionError\n.*run the same again"): promote(2)
    assert deployment.points_to(env, name, "champion") == 1
    promote(2)
    assert state(env, name)[0] == {"champion": 2, "challenger": 2, "previous_champion": 1}
