"""The rules of retraining on random histories; the log in memory: killed at each write, repeated, stopped, resumed."""
import itertools
from dataclasses import replace
from datetime import date, timedelta
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_registry import Registry

from mlops_nb.bundle import graph
from mlops_nb.bundle.load import load_bundle
from mlops_nb.commands.grants import grants_of
from mlops_nb.deployment import aliases
from mlops_nb.deployment.promotion import DECISION
from mlops_nb.env import load_env
from mlops_nb.errors import MlopsError, ParameterError
from mlops_nb.flights.use_case import FLIGHTS
from mlops_nb.models import registry
from mlops_nb.monitoring import retraining as rules
from mlops_nb.monitoring import retraining_log
from mlops_nb.monitoring.retraining import Cause, Situation, decide_retraining, read_cause
from mlops_nb.workflow import retraining, training
from mlops_nb.workflow.other_target import OtherTarget

ROOT = Path(__file__).parents[3]
FIRST = date(2013, 4, 1)
LIMITS = st.fixed_dictionaries({
    "cooldown_days": st.integers(0, 40), "min_new_labelled_rows": st.integers(0, 60), "max_refused": st.integers(1, 3),
    "causes": st.sampled_from([["schedule", "alert"], ["schedule", "alert"], ["alert"], ["loss_ratio"], ["schedule"]])})
CAUSES = st.one_of(st.just(Cause()), st.builds(  # the schedule is the cause that is held back least
    Cause, st.sampled_from(["schedule", "loss_ratio", "psi"]), st.sampled_from(["", "a", "b"]),
    st.sampled_from(["TRIGGERED", "TRIGGERED", "OK", "ERROR"]), st.sampled_from([None, None, 1, 2])))
OUTCOMES = st.sampled_from(["refused", "refused", "promoted", "promoted", "failed", "running"])
STEPS = st.lists(st.tuples(st.integers(-30, 50), CAUSES, st.integers(30, 100), OUTCOMES, st.booleans()),
                 min_size=8, max_size=20)


def logged(history, as_of, cause, decision, **columns):
    row = {"number": len(history) + 1, "as_of": as_of, "cause": cause, "decision": decision, "rule": "",
           "reason": "why", "champion_version": None, "train_version": None, "outcome": None,
           "outcome_reason": "because"} | columns
    history.append(row)


def run_steps(steps, limits):
    "Decide on each cause in order, as the log does; a step can be followed by a resume. Returns the history."
    history, day, champion = [], FIRST, 1
    for days, cause, new_rows, outcome, resumes in steps:
        day += timedelta(days)
        if reason := rules.reason_to_stop(history, limits): logged(history, day, cause.text, "stop", reason=reason)
        decision = decide_retraining(Situation(day, cause, champion, new_rows), history, limits)
        number = len(history) + 2
        training = {"train_version": number, "outcome": outcome} if decision.decision == "train" else {}
        logged(history, day, cause.text, decision.decision, rule=decision.rule, champion_version=champion,
               new_rows=new_rows, state=cause.state, key=cause.key, **training)
        if training and outcome == "promoted": champion = number
        if resumes and rules.last_stop(history): logged(history, day, "resume", "resume")
    return history


@settings(max_examples=200, deadline=None)
@given(STEPS, LIMITS)
def test_what_holds_in_every_history(steps, limits):
    history = run_steps(steps, limits)
    trained = [row for row in history if row["decision"] == "train"]
    for first, second in itertools.combinations(trained, 2):
        assert abs((second["as_of"] - first["as_of"]).days) >= limits["cooldown_days"], "two within the cooldown"
        if first["key"] != "schedule":
            assert (first["cause"], first["champion_version"]) != (second["cause"], second["champion_version"])
        assert first["outcome"] != "running", "a version without a decision is decided on first"
    for row in trained:
        assert row["new_rows"] >= limits["min_new_labelled_rows"] and row["state"] == "TRIGGERED"
        is_listed = {row["key"], "alert" if row["key"] != "schedule" else ""} & set(limits["causes"])
        assert is_listed
    refused = 0
    for row in history:
        if row["decision"] == "resume": refused = 0
        if row["decision"] == "stop": assert refused >= limits["max_refused"], "stopped without a reason"
        if row["rule"] == "cooldown":
            earlier = [other for other in trained if other["number"] < row["number"]]
            assert any(abs((row["as_of"] - other["as_of"]).days) < limits["cooldown_days"] for other in earlier)
        if row["decision"] != "train": continue
        assert refused < limits["max_refused"], "trained after the stop"
        refused = {"refused": refused + 1, "promoted": 0}.get(row["outcome"], refused)
    stops = [row["decision"] for row in history if row["decision"] in ("stop", "resume")]
    assert stops == ["stop", "resume"] * (len(stops) // 2) + ["stop"] * (len(stops) % 2), "told once for each stop"


@settings(max_examples=150, deadline=None)
@given(STEPS, LIMITS, CAUSES, st.integers(-40, 80), st.integers(0, 100), st.data())
def test_looser_settings_and_more_rows_never_hold_back_more(steps, limits, cause, days, new_rows, data):
    history = run_steps(steps, limits)
    now = Situation(FIRST + timedelta(days), cause, 1, new_rows)
    looser = {"cooldown_days": data.draw(st.integers(0, limits["cooldown_days"])),
              "min_new_labelled_rows": data.draw(st.integers(0, limits["min_new_labelled_rows"])),
              "max_refused": limits["max_refused"] + data.draw(st.integers(0, 2)),
              "causes": [*limits["causes"], "more"]}
    more = replace(now, new_rows=new_rows + data.draw(st.integers(0, 50)))
    if decide_retraining(now, history, limits).decision == "train":
        assert decide_retraining(more, history, looser).decision == "train"
    else: assert decide_retraining(now, history, limits).reason


@given(CAUSES)
def test_a_cause_is_read_from_the_text_that_it_has(cause):
    again = read_cause(cause.text)
    assert (again.key, again.window, again.text) == (cause.key, cause.window, cause.text)


@given(st.text(max_size=30))
def test_any_text_is_a_cause_or_refused_in_words(text):
    try: cause = read_cause(text)
    except ParameterError as error: assert error.message.startswith("cause is ") and error.hint
    else: assert cause.key and "\n" not in cause.key


@pytest.mark.parametrize("text", ['["alert"]', "{}", '{"alert": ["a"]}', '{"alert": "a", "window": {"b": 1}}', "a/b\nc",
                                  '{"alert": "a", "model_version": "01"}', '{"alert": "a", "model_version": 0}',
                                  "a/" + 300 * "w"])
def test_causes_that_are_none(text):
    with pytest.raises(ParameterError): read_cause(text)


NAME = "dev.flights.late_arrival"
SETTINGS = {"cooldown_days": 7, "min_new_labelled_rows": 10, "max_refused": 2, "causes": ["schedule", "alert"]}
ALERT = Cause("loss_ratio", "2013-06")


class Killed(BaseException): "The process ends here."


class World:
    "A registry and the log, which survive a kill."

    def __init__(self, env, monkeypatch):
        self.env, self.registry, self.log = env, Registry(), {}
        self.kill_at, self.writes, self.trained, self.result = None, itertools.count(), [], "keep: not better"
        monkeypatch.setattr(registry, "client", lambda env: self.registry)
        monkeypatch.setattr(registry, "has_registry", lambda env: True)
        monkeypatch.setattr(registry, "version_numbers",
                            lambda env, name: sorted(map(int, self.registry.versions.get(name, {}))))
        monkeypatch.setattr(aliases, "read_log", lambda spark, env, name: [])
        monkeypatch.setattr(retraining_log, "read_retrainings", lambda spark, env, name: self.rows)
        monkeypatch.setattr(retraining_log, "write_retraining", self.write)
        self.registry.create_registered_model(NAME)

    @property
    def rows(self): return sorted((dict(row) for row in self.log.values()), key=lambda row: row["number"])

    def write(self, spark, env, row):
        self.die("before")
        self.log[row["decision_id"]] = dict(row)
        self.die("after")

    def die(self, when):
        if when == "before": self.count = next(self.writes)
        if self.kill_at == (self.count, when): raise Killed

    def train(self, day):
        "As the job `train`: the same version for the same day, with a decision."
        known = [version for version in self.registry.versions[NAME].values() if version.tags["as_of"] == str(day)]
        if not known:
            self.die("before")
            self.registry.create_model_version(NAME, source="")
            known = [self.registry.versions[NAME][str(len(self.registry.versions[NAME]))]]
            known[0].tags |= {"as_of": str(day), "model_validation_status": "PASSED"}
            known[0].run_id = "run"
            self.trained.append(day)
            self.die("after")
        known[0].tags[DECISION] = self.result

    def job(self, day, cause, new_rows=100):
        row = retraining_log.decide_once(None, self.env, NAME, day, cause, SETTINGS, lambda champion: new_rows)
        is_due = rules.is_due(row)
        if is_due: self.train(day)
        return retraining_log.record_outcome(None, self.env, NAME, retraining_log.decision_key(day, cause),
                                             "success" if is_due else "excluded", SETTINGS)


@pytest.fixture
def world(tmp_path, monkeypatch):
    return World(replace(load_env("dev"), state=tmp_path, home="local"), monkeypatch)


PLAN = [(FIRST, Cause()), (FIRST + timedelta(3), ALERT), (FIRST + timedelta(8), ALERT),
        (FIRST + timedelta(30), Cause())]


def final(world):
    "The log and the versions, without who wrote a row and when."
    left_out = ("decided_at", "decided_by")
    return [{name: value for name, value in row.items() if name not in left_out} for row in world.rows], world.trained


@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_at_each_step_and_run_again_it_ends_as_undisturbed(tmp_path, monkeypatch, when):
    undisturbed = World(replace(load_env("dev"), state=tmp_path, home="local"), monkeypatch)
    for day, cause in PLAN: undisturbed.job(day, cause)
    expected, kills = final(undisturbed), next(undisturbed.writes)
    assert expected[1] == [FIRST, FIRST + timedelta(8)] and kills > 6
    assert [row["decision"] for row in expected[0]] == ["train", "hold", "train", "stop", "hold"]
    for number in range(kills):
        world = World(undisturbed.env, monkeypatch)
        world.kill_at = (number, when)
        for day, cause in PLAN:
            try: world.job(day, cause)
            except Killed: world.job(day, cause)  # the run again, or its repair
        assert final(world) == expected, number


def test_a_person_is_told_once_for_each_stop_and_after_a_resume_it_trains(world):
    failures = [(day, bool(world.job(day, cause)[1])) for day, cause in PLAN]
    assert failures == [(PLAN[0][0], False), (PLAN[1][0], False), (PLAN[2][0], True), (PLAN[3][0], False)]
    with pytest.raises(MlopsError, match="needs the name of a person"):
        retraining_log.resume_retraining(None, world.env, NAME, " ", "why")
    with pytest.raises(MlopsError, match="needs a reason"):
        retraining_log.resume_retraining(None, world.env, NAME, "Ann", "")
    retraining_log.resume_retraining(None, world.env, NAME, "Ann", "new features")
    world.result = "promote: better"
    assert world.job(*PLAN[3])[0]["decision"] == "train" and len(world.trained) == 3
    assert world.rows[-2]["decision"] == "resume" and world.rows[-2]["decided_by"] == "Ann"
    assert world.job(*PLAN[1])[0]["rule"] == "cooldown", "another hold is final"


def test_a_version_that_another_training_of_that_day_registered_before_is_not_taken_for_its_own(world):
    world.train(FIRST)
    row = retraining_log.decide_once(None, world.env, NAME, FIRST, Cause(), SETTINGS, lambda champion: 100)
    assert (row["newest_version"], row["train_version"]) == (1, None) and rules.is_due(row)
    again, _ = world.job(FIRST, Cause())  # the training returns the version that exists
    assert (again["train_version"], again["outcome"], world.trained) == (1, "refused", [FIRST])


def test_an_alert_that_is_triggered_later_on_the_same_day_trains(world):
    ok, of_v7 = replace(ALERT, state="OK"), replace(ALERT, model_version=7)
    assert [world.job(FIRST, cause)[0]["decision"] for cause in (ok, of_v7, ALERT)] == ["hold", "hold", "train"]
    assert world.job(FIRST, ok)[0]["reason"] == "the alert loss_ratio is OK, not TRIGGERED"
    assert world.job(FIRST, of_v7)[0]["reason"] == "the alert is about v7; there is no Champion now"


def test_the_outcome_changes_when_the_registry_says_so(world):
    day = FIRST
    world.job(day, Cause())
    assert world.rows[0]["outcome"] == "refused"
    world.registry.stored(NAME, "1").tags["rolled_back"] = "by hand"
    world.job(day + timedelta(1), ALERT)
    assert world.rows[0]["outcome_reason"] == "rolled back: by hand"


def test_versions_refused_for_their_branch_alone_never_stop_and_are_trained_again(world):
    refusal = {"model_validation_status": "FAILED", "check_release": "commit 1234567 is of branch 'main'"}
    for days in (0, 8, 16):
        day = FIRST + timedelta(days)
        retraining_log.decide_once(None, world.env, NAME, day, Cause(), SETTINGS, lambda champion: 100)
        world.train(day)
        tags = world.registry.versions[NAME][str(len(world.trained))].tags
        tags.pop(DECISION)
        tags |= refusal
        row, stop = retraining_log.record_outcome(None, world.env, NAME, retraining_log.decision_key(day, Cause()),
                                                  "success_with_failures", SETTINGS)
        assert (row["outcome"], stop, rules.is_due(row)) == ("failed", None, True)
    world.registry.create_model_version(NAME, source="")  # of the same decision, trained by a release
    world.registry.versions[NAME]["4"].run_id = "run"
    world.registry.versions[NAME]["4"].tags |= {"as_of": str(FIRST), "model_validation_status": "PASSED"}
    row = retraining_log.decide_once(None, world.env, NAME, FIRST, Cause(), SETTINGS, lambda champion: 100)
    assert (row["train_version"], row["outcome"]) == (4, "running")


@pytest.mark.parametrize(("branch", "dirty", "reason"), [
    ("main", "false", "commit abcdef1 is of branch 'main', and a version of this target must be of release/*"),
    ("release/1", "true", "the code differs from commit abcdef1"), ("release/1", "false", "")])
def test_code_of_another_branch_is_refused_before_anything_is_decided(monkeypatch, branch, dirty, reason):
    tags = {"git_sha": "abcdef123", "git_branch": branch, "git_dirty": dirty}
    monkeypatch.setattr(retraining, "code_version", lambda env: tags)
    monkeypatch.setattr(retraining, "get_spark", lambda env: "a session")
    monkeypatch.setattr(retraining_log, "decide_once", lambda *_: {"decision": "hold", "reason": "cooldown"})
    env = load_env("prod")
    step = retraining.RetrainingStep(FLIGHTS, env, FIRST, Cause(), SETTINGS)
    assert training.is_of_release(env, tags) is not bool(reason)
    if not reason: retraining.decide_step(step)
    else:
        with pytest.raises(MlopsError, match="nothing was decided: ") as error: retraining.decide_step(step)
        assert reason in error.value.message and not step.row


def test_without_a_decision_there_is_nothing_to_record(world):
    with pytest.raises(MlopsError, match="no decision '2013-04-01 schedule'"):
        retraining_log.record_outcome(None, world.env, NAME, "2013-04-01 schedule", "upstream_failed", SETTINGS)


def ends(job, decide_state, is_due="false", train=None, record="SUCCESS"):
    "The states of the tasks of a job, and its result, from what the notebooks and the training return."
    states, outcomes = {}, {"is_due": is_due}
    given = {"decide": decide_state, "is_due": "SUCCESS", "train": train, "record": record}
    for task in job["tasks"]:
        decision = graph.decide(task, states, outcomes)
        states[task["task_key"]] = given[task["task_key"]] if decision == "run" else str(decision)
    return states, str(graph.job_result(job["tasks"], states))


@pytest.mark.parametrize("folder", ["resources", "template/resources"])
def test_the_last_task_runs_in_every_case_and_decides_the_result(folder):
    "It fails for a failed training and for a stop; a refused version is a result."
    job = yaml.safe_load((ROOT / folder / "retrain.job.yml").read_text())["resources"]["jobs"]["retrain"]
    held, result = ends(job, "SUCCESS")
    assert (held["train"], held["record"], result) == ("EXCLUDED", "SUCCESS", "SUCCESS")
    assert ends(job, "SUCCESS", record="FAILED")[1] == "FAILED"  # a stop began
    assert ends(job, "SUCCESS", "true", "SUCCESS")[1] == "SUCCESS"
    failed, result = ends(job, "SUCCESS", "true", "FAILED", record="FAILED")
    assert (failed["record"], result) == ("FAILED", "FAILED")
    assert ends(job, "SUCCESS", "true", "FAILED")[1] == "SUCCESS_WITH_FAILURES"  # refused by its validation
    waiting, result = ends(job, "SUCCESS", "true", "WAITING")
    assert (waiting["record"], result) == ("WAITING", "WAITING")
    assert graph.needs_repair(job["tasks"], waiting) == {"train", "record"}  # after the approval
    undecided, result = ends(job, "FAILED", record="FAILED")
    assert (undecided["train"], result) == ("UPSTREAM_FAILED", "FAILED")


def test_the_schedule_starts_the_controller_and_not_the_training():
    jobs = load_bundle(ROOT, "prod").jobs
    assert "schedule" not in jobs["train"] and jobs["retrain"]["schedule"]["pause_status"] == "UNPAUSED"
    assert jobs["retrain"]["max_concurrent_runs"] == 1 and jobs["retrain"]["queue"]["enabled"]


def test_data_scientists_read_what_prod_writes_and_write_nothing_there():
    loaded, env = load_bundle(ROOT, "prod"), load_env("prod")
    granted = {grant.privilege for grant in grants_of(loaded)
               if (grant.principal, grant.name) == ("data_scientists", "prod.flights")}
    assert granted == {"USE_SCHEMA", "SELECT", "EXECUTE"}
    seen = OtherTarget(FLIGHTS, None, load_env("dev"), env)
    assert {f"prod.flights.{name}" for name in ("predictions", "inference_log", "late_arrival_payload")} <= {*seen.jobs}
    assert all(seen.env.can_read(name) and not seen.env.can_write(name) for name in seen.jobs)
