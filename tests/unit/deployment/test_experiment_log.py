"""Whole experiments with a registry, logs and an endpoint in memory: killed at each write, repeated, disturbed."""
import itertools
import json
from datetime import date, timedelta
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from memory_registry import Registry

from mlops_nb.deployment import aliases, experiment_log
from mlops_nb.deployment.aliases import ROLLED_BACK
from mlops_nb.deployment.experiment_log import EXPERIMENT_TAG, SplitEndpoint, blocks_in, run_experiment, split_from
from mlops_nb.deployment.online_experiment import check_experiment_settings, experiment_defaults
from mlops_nb.deployment.promotion import ACCEPTED_LOSS
from mlops_nb.errors import MlopsError, ParameterError
from mlops_nb.models import registry
from mlops_nb.models.problem_types import BINARY

NAME, FIRST = "dev.flights.late_arrival", date(2013, 7, 1)
SETTINGS = check_experiment_settings(experiment_defaults(BINARY) | {  # little is needed: a promotion after two blocks
    "steps": [10, 50, 100], "alpha": 0.45, "block_days": 1, "label_days": 0, "min_requests": 1, "max_days": 12}, BINARY)
WRITES = ("set_registered_model_alias", "set_model_version_tag", "update_model_version")


class Killed(BaseException): "The process ends here."


class World:
    "A registry, both logs and an endpoint, which survive a kill."

    def __init__(self, env, monkeypatch):
        self.env, self.patch, self.registry = env, monkeypatch, Registry()
        self.moves, self.decisions = {}, {}
        self.versions, self.traffic = {"champion": 1, "challenger": 2}, {"champion": 100, "challenger": 0}
        self.kill_at, self.writes, self.reads = None, itertools.count(), []
        self.settings, self.answers = SETTINGS, answers(better=True)
        monkeypatch.setattr(registry, "client", lambda env: self.registry)
        def reader(log): return lambda spark, env, name: [dict(log[key]) for key in sorted(log)]
        monkeypatch.setattr(aliases, "read_log", reader(self.moves))
        monkeypatch.setattr(experiment_log, "read_experiments", reader(self.decisions))
        self.dying(aliases, "write_log", lambda spark, env, row: self.moves.update({row["move"]: dict(row)}))
        self.dying(experiment_log, "write_decision", self.write_decision)
        for name in WRITES: self.dying(self.registry, name, getattr(self.registry, name))
        for name in ("set_traffic", "follow"): self.dying(self, name, getattr(self, name))
        self.registry.create_registered_model(NAME)
        for number in (1, 2, 3):
            self.registry.create_model_version(NAME, source="")
            self.registry.stored(NAME, str(number)).tags |= {"model_validation_status": "PASSED", "as_of": str(FIRST)}
        self.registry.aliases[NAME] = {"champion": "1", "challenger": "2"}

    def dying(self, owner, name, real):
        def call(*arguments, **options):
            number = next(self.writes)
            if self.kill_at == (number, "before"): raise Killed
            real(*arguments, **options)
            if self.kill_at == (number, "after"): raise Killed
        self.patch.setattr(owner, name, call)

    def write_decision(self, spark, env, row):
        self.decisions[row["as_of"]] = {"decided_by": "ann", "decided_at": None, **row}

    def set_traffic(self, traffic): self.traffic = {name: traffic.get(name, 0) for name in self.versions}

    def follow(self):
        "The endpoint serves what the aliases name, all requests by the Champion."
        champion, challenger = (int(self.registry.aliases[NAME][name]) for name in ("champion", "challenger"))
        self.versions = {"champion": champion} | ({"challenger": challenger} if challenger != champion else {})
        self.traffic = {name: 100 if name == "champion" else 0 for name in self.versions}

    def read_answers(self, first, as_of, champion, challenger):
        self.reads.append((first, as_of))
        days = pd.to_datetime(self.answers.day)
        return self.answers[(days >= pd.Timestamp(first)) & (days < pd.Timestamp(as_of))]

    def run(self, day, again=False):
        endpoint = SplitEndpoint("late", lambda: SimpleNamespace(versions=self.versions, traffic=self.traffic),
                                 lambda traffic: self.set_traffic(traffic), lambda: self.follow())
        return run_experiment(None, self.env, NAME, endpoint, self.settings, BINARY, FIRST + timedelta(day),
                              self.read_answers, again)

    def champion(self): return aliases.points_to(self.env, NAME, "champion")

    def state(self):
        rows = [{key: row[key] for key in ("as_of", "decision", "reason", "percent", "split_before", "split_after",
                                           "blocks", "state")} for row in self.decisions.values()]
        versions = {key: (value.tags, value.description) for key, value in self.registry.versions[NAME].items()}
        moves = [{key: row[key] for key in ("alias", "from_version", "to_version", "reason", "state")}
                 for row in self.moves.values()]
        return rows, moves, self.versions, self.traffic, self.registry.aliases[NAME], versions


def answers(better, days=14, requests=60, **columns):
    "Answers of which the Challenger's are right, or wrong."
    number = days * requests
    is_challenger = np.tile([True, False], number // 2)
    label = np.tile([1.0, 0.0, 0.0, 1.0], number // 4)
    wrong = np.where(is_challenger == better, 0.1, 0.4) + 0.001 * np.arange(number) % 0.01
    return pd.DataFrame({
        "day": np.repeat(pd.date_range(FIRST, periods=days).date, requests), "request": np.arange(number).astype(str),
        "is_challenger": is_challenger, "prediction": np.where(label == 1, 1 - wrong, wrong),
        "label": label, "is_error": False, "milliseconds": 5.0} | columns)


@pytest.fixture
def world(env, monkeypatch): return World(env, monkeypatch)


def decisions(world): return [row["decision"] for row in world.decisions.values()]


def test_a_better_challenger_goes_through_the_steps_and_becomes_champion(world):
    texts = [world.run(day)[0] for day in range(6)]
    assert decisions(world)[:2] == ["start", "wait"] and decisions(world)[-1] == "promote"
    assert "extend" in decisions(world)
    assert world.champion() == 2 and world.versions == {"champion": 2} and world.traffic == {"champion": 100}
    assert world.registry.aliases[NAME]["previous_champion"] == "1"
    tags = registry.get_version(world.env, NAME, 2).tags
    assert tags[EXPERIMENT_TAG].startswith("promote: ") and tags[ACCEPTED_LOSS] == "0.000000"
    assert "## Online experiment\n\nPromoted" in registry.get_version(world.env, NAME, 2).description
    assert world.moves[1]["reason"].startswith("online experiment: ") and "is won" in texts[len(world.decisions) - 1]
    assert texts[-1].endswith("there is no Challenger")
    assert {row["state"] for row in world.decisions.values()} == {"done"}


def test_a_worse_challenger_is_stopped_and_its_experiment_is_not_repeated_by_itself(world):
    world.answers = answers(better=False)
    texts = [world.run(day)[0] for day in range(6)]
    assert decisions(world)[-1] == "abort" and "extend" not in decisions(world)
    assert world.champion() == 1 and world.traffic == {"champion": 100, "challenger": 0} and not world.moves
    assert registry.get_version(world.env, NAME, 2).tags[EXPERIMENT_TAG].startswith("abort: the loss")
    count = len(world.decisions)
    assert "was stopped" in texts[-1] and "again=true" in texts[-1]
    world.run(7, again=True)
    assert len(world.decisions) == count + 1 and list(world.decisions.values())[-1]["experiment"] == 2
    assert world.traffic["challenger"] == 10


def test_an_equal_challenger_is_stopped_after_max_days(world):
    world.answers = answers(better=True, days=20).assign(prediction=0.5)
    texts = [world.run(day)[0] for day in range(14)]
    assert "no decision after 12 days" in texts[12] and world.champion() == 1
    assert world.traffic == {"champion": 100, "challenger": 0}


def test_a_guard_rail_stops_before_any_label_is_known(world):
    failing = answers(better=True, label=np.nan)
    world.answers = failing.assign(is_error=failing.is_challenger & (failing.request.astype(int) % 4 == 0))
    world.settings = SETTINGS | {"guard_requests": 20}
    world.run(0)
    assert world.traffic["challenger"] == 10
    text, _ = world.run(1)
    assert "guard rail: 2013-07-01" in text and world.traffic["challenger"] == 0


def all_days(world, killed_day=None):
    for day in range(6):
        try: world.run(day)
        except Killed:
            assert world.kill_at
            world.kill_at = None
            if killed_day is not None: killed_day.append(day)
            world.run(day)
    return world.state()


@pytest.mark.slow
@pytest.mark.parametrize("better", [True, False])
def test_killed_at_each_write_and_run_again_the_result_is_the_same(env, monkeypatch, better):
    def fresh(kill_at=None):
        world = World(env, monkeypatch)
        world.answers, world.kill_at = answers(better), kill_at
        return world
    world = fresh()
    expected, count = all_days(world), next(world.writes)
    assert count >= 12
    for number, effect in itertools.product(range(count), ("before", "after")):
        killed = []
        assert all_days(fresh((number, effect)), killed) == expected, (number, effect)
        assert killed


@pytest.mark.slow
@pytest.mark.parametrize("effect", ["before", "after"])
def test_a_kill_is_continued_on_the_next_day_as_well(env, monkeypatch, effect):
    for number in range(1000):
        world = World(env, monkeypatch)
        world.kill_at, was_killed = (number, effect), False
        for day in range(7):
            try: world.run(day)
            except Killed: world.kill_at, was_killed = None, True
        assert world.champion() == 2 and world.versions == {"champion": 2} and world.traffic == {"champion": 100}
        assert {row["state"] for row in [*world.decisions.values(), *world.moves.values()]} == {"done"}
        if not was_killed: break
    assert number > 12


def test_the_same_day_again_changes_nothing_and_an_earlier_day_is_refused(world):
    for day in (0, 1, 3): world.run(day)
    before, writes = world.state(), next(world.writes)
    text, _ = world.run(3)
    assert "as of 2013-07-04" in text and world.state() == before and next(world.writes) == writes + 1
    with pytest.raises(ParameterError, match="later than 2013-07-03"): world.run(2)


def test_a_day_reads_the_requests_of_its_block_and_not_the_whole_experiment(world):
    world.answers = answers(better=True).assign(prediction=0.5)
    for day in range(9): world.run(day)
    assert max((as_of - first).days for first, as_of in world.reads) <= 2
    blocks = blocks_in(list(world.decisions.values()))
    days = [block.first_day for block in blocks]
    assert len(set(days)) == len(days) >= 5
    changes = [day for day, row in world.decisions.items() if row["decision"] in ("start", "extend")]
    assert not set(changes) & set(days)  # the split changed on these days


def test_missed_days_give_the_same_blocks(env, monkeypatch):
    results = []
    for days in (range(8), (0, 7)):
        world = World(env, monkeypatch)
        world.answers = answers(better=True).assign(prediction=0.5)
        world.settings = SETTINGS | {"min_requests": 10_000}
        for day in days: world.run(day)
        results.append(blocks_in(list(world.decisions.values())))
    assert results[0] == results[1] and len(results[0]) == 6


def test_a_changed_champion_ends_the_experiment(world):
    world.run(0)
    world.versions = {"champion": 3, "challenger": 2}
    aliases.move_alias(None, world.env, NAME, "champion", 3, "by hand")
    text, _ = world.run(1)
    assert "the Champion is v3 now, not v1" in text and world.traffic == {"champion": 100, "challenger": 0}
    assert world.champion() == 3


def test_a_promotion_that_meets_another_champion_is_given_up(env, monkeypatch):
    world = World(env, monkeypatch)
    for day in range(2): world.run(day)
    write = experiment_log.write_decision
    def interrupted(spark, env, row):
        write(spark, env, row)
        if row["decision"] == "promote": raise Killed
    with monkeypatch.context() as patch:
        patch.setattr(experiment_log, "write_decision", interrupted)
        with pytest.raises(Killed):
            for day in range(2, 6): world.run(day)
    aliases.move_alias(None, world.env, NAME, "champion", 3, "by hand")
    world.versions = {"champion": 3, "challenger": 2}
    world.run(7)
    row = [row for row in world.decisions.values() if row["decision"] in ("promote", "abort")][0]
    assert row["decision"] == "abort" and row["reason"] == "not promoted: the Champion is v3 now, not v1"
    assert world.champion() == 3 and split_from(row["split_after"]) == {2: 0, 3: 100}
    assert decisions(world)[-1] == "start"  # the next experiment, against the new Champion


def test_a_challenger_that_is_no_longer_served_ends_the_experiment(world):
    world.run(0)
    world.versions, world.traffic = {"champion": 1, "challenger": 3}, {"champion": 90, "challenger": 10}
    text, _ = world.run(1)
    assert "no longer serves v2" in text and world.traffic == {"champion": 100, "challenger": 0}


def test_a_champion_that_is_no_longer_served_ends_the_experiment(world):
    world.run(0)
    world.versions, world.traffic = {"other": 3, "challenger": 2}, {"other": 90, "challenger": 10}
    text, _ = world.run(1)
    assert "no longer serves v1" in text and world.versions == {"champion": 1, "challenger": 2}
    assert world.traffic == {"champion": 100, "challenger": 0}
    assert world.run(2)[0].endswith("(the parameter again=true repeats it)")


def interrupted_after(world, decision):
    "Run days until a decision is recorded, and not carried out; return the day after."
    write = experiment_log.write_decision
    def ending(spark, env, row):
        write(spark, env, row)
        if row["decision"] == decision: raise Killed
    with world.patch.context() as patch:
        patch.setattr(experiment_log, "write_decision", ending)
        for day in range(6):
            try: world.run(day)
            except Killed: return day + 1


@pytest.mark.parametrize("decision", ["start", "extend"])
def test_a_recorded_split_that_cannot_be_set_any_more_ends_the_experiment(world, decision):
    day = interrupted_after(world, decision)
    world.versions, world.traffic = {"champion": 1}, {"champion": 100}
    world.run(day, again=False)
    row = list(world.decisions.values())[-1]
    assert (row["decision"], row["state"]) == ("abort", "done") and "no longer serves v2" in row["reason"]
    assert world.champion() == 1 and world.traffic["champion"] == 100


def test_a_promotion_stands_when_the_endpoint_has_lost_the_version_meanwhile(world):
    day = interrupted_after(world, "promote")
    world.versions, world.traffic = {"champion": 1}, {"champion": 100}
    world.run(day)
    row = list(world.decisions.values())[-1]
    assert (row["decision"], row["state"]) == ("promote", "done") and world.champion() == 2
    assert world.versions == {"champion": 2} and world.traffic == {"champion": 100}


@pytest.mark.parametrize("better", [True, False])
def test_a_newer_challenger_waits_until_the_experiment_ends(world, better):
    world.answers = answers(better)
    world.run(0)
    world.registry.aliases[NAME]["challenger"] = "3"
    world.run(1)
    assert world.versions == {"champion": 1, "challenger": 2} and decisions(world) == ["start", "wait"]
    for day in range(2, 6):
        if decisions(world)[-1] not in ("promote", "abort"): world.run(day)
    assert world.versions == {"champion": 2 if better else 1, "challenger": 3}
    assert world.traffic == {"champion": 100, "challenger": 0}


def test_an_endpoint_that_cannot_follow_is_an_error_and_the_next_run_repeats_it(world, monkeypatch):
    def fails(): raise MlopsError("champion: the model needs lightgbm 5")
    with monkeypatch.context() as patch:
        patch.setattr(world, "follow", fails)
        with pytest.raises(MlopsError, match="lightgbm 5"):
            for day in range(6): world.run(day)
    row = list(world.decisions.values())[-1]
    assert (row["decision"], row["state"], world.champion()) == ("promote", "started", 2)
    assert world.traffic == {"champion": 0, "challenger": 100}  # the new Champion answers all requests already
    text, _ = world.run(7)
    assert world.versions == {"champion": 2} and world.traffic == {"champion": 100}
    assert list(world.decisions.values())[-1]["state"] == "done" and "there is no Challenger" in text


def test_a_version_rolled_back_while_its_promotion_was_interrupted_is_not_promoted_again(world, monkeypatch):
    def killed(): raise Killed
    with monkeypatch.context() as patch:
        patch.setattr(world, "follow", killed)
        with pytest.raises(Killed):
            for day in range(6): world.run(day)
    assert world.champion() == 2
    aliases.rollback(None, world.env, NAME, "warns of everything")
    world.versions, world.traffic = {"champion": 1}, {"champion": 100}
    text, _ = world.run(7)
    row = list(world.decisions.values())[-1]
    assert (row["decision"], row["reason"]) == ("abort", "not promoted: v2 was rolled back: warns of everything")
    assert world.champion() == 1 and "v2 was rolled back" in text


def test_what_must_be_right_before_the_start(world):
    world.versions = {"champion": 1}
    with pytest.raises(MlopsError, match="does not serve v2; it serves v1"): world.run(0)
    assert not world.decisions
    world.versions = {"champion": 1, "challenger": 2}
    with pytest.raises(ParameterError, match="was trained as of 2013-07-01"): world.run(-1)
    stored = world.registry.stored(NAME, "2")
    stored.tags["model_validation_status"] = "FAILED"
    with pytest.raises(MlopsError, match="has not passed validation"): world.run(0)
    stored.tags[ROLLED_BACK] = "storms"
    assert "v2 was rolled back: storms" in world.run(0)[0]
    world.registry.aliases[NAME] = {"challenger": "2"}
    assert "there is no Champion" in world.run(0)[0]
    assert not world.decisions and world.traffic == {"champion": 100, "challenger": 0}


def test_the_settings_are_those_of_the_start(world):
    world.run(0)
    world.settings = SETTINGS | {"max_days": 1}
    world.run(1); world.run(2)
    assert "abort" not in decisions(world) and json.loads(world.decisions[FIRST]["settings"]) == SETTINGS
