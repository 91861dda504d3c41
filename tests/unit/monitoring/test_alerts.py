"""Alerts without an engine: conditions against pandas, notifications against a model, kills, failing receivers."""
import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import pandas as pd
import pytest
from alerting import RESOURCE, Hook, alert, resource, rows, write_alerts, write_destinations
from hypothesis import given, settings
from hypothesis import strategies as st

from mlops_nb.bundle.load import load_bundle
from mlops_nb.env import load_env
from mlops_nb.errors import MlopsError
from mlops_nb.job_homes import problems_of
from mlops_nb.local_stores import StoreError
from mlops_nb.monitoring import alert_delivery
from mlops_nb.monitoring.alert_conditions import Evaluated, aggregate, evaluate_rows, is_met
from mlops_nb.monitoring.alert_definitions import (
    AGGREGATIONS,
    AlertColumn,
    Subscription,
    alert_problems,
    read_alert,
    read_alerts,
)
from mlops_nb.monitoring.alert_delivery import deliver_due
from mlops_nb.monitoring.alert_messages import webhook_body
from mlops_nb.monitoring.alert_queries import query_tables, with_names
from mlops_nb.monitoring.alert_states import AlertMemory, next_memory
from mlops_nb.monitoring.alert_store import alert_history, alert_state, alert_store
from mlops_nb.monitoring.alerts import evaluate_alert
from mlops_nb.serving.places import make_places, write_running
from mlops_nb.webhook_signatures import verify_signature


@pytest.fixture
def place(tmp_path, monkeypatch):
    "The target dev with a state of its own."
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return replace(load_env("dev"), state=tmp_path / "state")


# Definitions

OF_DATABRICKS = "0481e838-0a59-4eff-9541-a4ca6f149574"  # an id as Databricks gives it


def evaluation(**changed) -> dict:
    "The evaluation of an alert with other fields."
    return RESOURCE["evaluation"] | changed


def test_an_alert_of_the_bundle_is_read(project):
    write_alerts(project, drift=resource(receivers=("hook", "hook")), other=RESOURCE | {"evaluation": {
        "source": {"name": "x", "aggregation": "AVG"}, "comparison_operator": "LESS_THAN",
        "threshold": {"column": {"name": "lowest", "aggregation": "MIN"}}}})
    write_destinations(project.root / ".mlops", hook={"url": "http://127.0.0.1"})
    bundle = load_bundle(project.root)
    drift, other = read_alert(bundle, "drift"), read_alert(bundle, "other")
    assert (drift.condition, drift.subscriptions) == ("psi GREATER_THAN 0.2", (Subscription("webhook", "hook"),))
    assert other.condition == "AVG(x) LESS_THAN MIN(lowest)" and other.empty_result_state == "UNKNOWN"
    assert (drift.cron, drift.time_zone, drift.pause_status) == ("0 0 7 * * ?", "America/New_York", "UNPAUSED")
    assert alert_problems(bundle) == []


def test_the_file_of_an_alert_is_read_beside_its_yaml(project):
    content = {"query_lines": ["SELECT 1", "AS psi"], **{key: RESOURCE[key] for key in ("evaluation", "schedule")}}
    project.path("resources/drift.dbalert.json").write_text(json.dumps(content))
    write_alerts(project, drift={"display_name": "Drift", "warehouse_id": "1", "file_path": "drift.dbalert.json"})
    assert read_alert(load_bundle(project.root), "drift").query_text == "SELECT 1\nAS psi"
    project.path("resources/drift.dbalert.json").write_text('{"query_lines": ["SELECT ${var.x}"]}')
    with pytest.raises(MlopsError, match="has a reference"): read_alert(load_bundle(project.root), "drift")
    project.path("resources/drift.dbalert.json").write_text(json.dumps(content | {"schedule": "daily"}))
    with pytest.raises(MlopsError, match="drift.dbalert.json: schedule: expected a map, got 'daily'"):
        read_alert(load_bundle(project.root), "drift")


@pytest.mark.parametrize(("changed", "expected"), [
    ({"evaluation": {"source": {"name": "x"}, "comparison_operator": "ABOVE"}},
     "'ABOVE' is not a valid ComparisonOperator"),
    ({"evaluation": {"source": {}, "comparison_operator": "EQUAL"}}, "missing field 'name'"),
    ({"evaluation": {"source": {"name": "x"}, "comparison_operator": "EQUAL"}}, "needs a threshold"),
    ({"evaluation": {"source": {"name": "x", "aggregation": "MODE"}, "comparison_operator": "IS_NULL"}},
     "'MODE' is not a valid Aggregation"),
    ({"evaluation": "x"}, "drift.evaluation: expected a map, got 'x'"),
    ({"schedule": "x"}, "drift.schedule: expected a map, got 'x'"),
    ({"evaluation": evaluation(notification="x")}, "evaluation.notification: expected a map, got 'x'"),
    ({"evaluation": evaluation(notification={"retrigger_seconds": "soon"})},
     "retrigger_seconds: expected a whole number, got 'soon'"),
    ({"evaluation": evaluation(notification={"retrigger_seconds": -1})}, "write a number of at least 0"),
    ({"evaluation": evaluation(notification={"subscriptions": "ann"})}, "subscriptions: expected a list, got 'ann'"),
    ({"evaluation": evaluation(notification={"subscriptions": ["ann"]})},
     "subscriptions[0]: expected a map, got 'ann'"),
    ({"evaluation": evaluation(threshold={"value": "x"})}, "threshold.value: expected a map, got 'x'"),
    ({"evaluation": evaluation(threshold={"value": {"double_value": True}})}, "expected a number, got true"),
    ({"evaluation": evaluation(threshold={"value": {"double_value": math.nan}})}, "write a number that is finite"),
    ({"query_text": "DELETE FROM dev.s.t"}, "the query is refused: it begins with DELETE"),
    ({"query_text": "SELECT avg(psi FROM a.b.c"}, "the query is refused: '(' is never closed\n  complete it"),
    ({"query_text": "SELECT CASE WHEN psi > 1 THEN 1 FROM a.b.c"}, "the query is refused: CASE has no END"),
    ({"query_text": "SELECT psi FROM a.b.c WHERE psi ="}, "the query is refused: something is missing after ="),
    ({"query_text": "SELECT psi FROM t"}, "t is not the full name of a table"),
    ({"custom_summary": "{{ALERT_STATE}}"}, "no variable 'ALERT_STATE'"),
    ({"schedule": {"timezone_id": "UTC"}}, "missing field 'quartz_cron_schedule'")])
def test_what_is_wrong_with_an_alert_has_its_file_and_line(project, changed, expected):
    write_alerts(project, drift=RESOURCE | changed)
    bundle = load_bundle(project.root)
    [problem] = alert_problems(bundle)
    assert expected in str(problem) and str(problem).startswith("resources/some.alert.yml:")
    if not {"evaluation", "schedule"} & set(changed): return
    assert [str(one) for one in problems_of(bundle)].count(str(problem)) == 1
    with pytest.raises(MlopsError, match=r"some.alert.yml:\d+: alert 'drift': (evaluation|schedule)"):
        read_alert(bundle, "drift")


def test_a_destination_that_this_machine_does_not_have_is_named(project):
    write_alerts(project, drift=resource(receivers=("team-chat",)),
                 other=resource(receivers=("team-caht", OF_DATABRICKS)))
    project.job("watch", [{"task_key": "alert", "alert_task": {
        "alert_id": "${resources.alerts.drift.id}", "subscribers": [{"destination_id": "team-chta"}]}}],
                webhook_notifications={"on_failure": [{"id": "team-hcat"}]})
    bundle = load_bundle(project.root)
    warnings = alert_problems(bundle)
    assert len(warnings) == 5 and all(one.is_warning and "there are none" in one.hint for one in warnings)
    write_destinations(project.root / ".mlops", **{"team-chat": {"url": "http://127.0.0.1"}, "b": {"url": "http://b"}})
    errors = [str(problem) for problem in alert_problems(bundle) if not problem.is_warning]
    for name in ("team-caht", "team-chta", "team-hcat"):
        [error] = [error for error in errors if f"no notification destination {name!r} on this machine" in error]
        assert "did you mean 'team-chat'? there are: b, team-chat; .mlops/destinations.json declares" in error
    [warning] = [problem for problem in alert_problems(bundle) if problem.is_warning]
    assert OF_DATABRICKS in warning.message and len(errors) == 3


def test_a_threshold_may_be_negative(project):
    write_alerts(project, drift=RESOURCE | {"evaluation": evaluation(threshold={"value": {"double_value": -0.5}})})
    assert problems_of(load_bundle(project.root)) == []


def test_the_alerts_of_this_project_are_valid_in_each_target():
    for target in ("dev", "staging", "prod"):
        bundle = load_bundle(target=target)
        assert alert_problems(bundle) == [] and len(read_alerts(bundle)) == 3
        for key in ("model_no_better", "prediction_drift"):
            read = query_tables(read_alert(bundle, key).query_text)  # the metrics, and the log for its newest day
            assert len(read) == 2 and {table.parts[:2] for table in read} == {(target, "flights")}


# Queries

@pytest.mark.parametrize("query", [
    "INSERT INTO a.b.c VALUES (1)", "WITH x AS (SELECT 1) DELETE FROM a.b.c", "SELECT 1; SELECT 2", "TABLE a.b.c",
    "SELECT * FROM a.b.c UNION ALL TABLE d", "FROM a.b.c SELECT *", "SELECT * FROM json.`/etc/passwd`",
    "SELECT * FROM a.b.c, `/etc/passwd`", "SELECT * FROM (a.b.c JOIN d)", "SELECT * FROM read_files('/etc')",
    "SELECT (SELECT max(x) FROM t)", "SELECT '", "-- SELECT 1", "SELECT 1 FROM a.b.c WHERE x IN (SELECT y FROM b.c)",
    "SELECT * FROM a.b.c --\r, d", "CREATE TABLE a.b.c AS SELECT 1", "EXPLAIN SELECT 1", "SET x = 1"])
def test_a_query_that_writes_or_reads_anything_but_named_tables_is_refused(query):
    with pytest.raises(MlopsError): query_tables(query)


@pytest.mark.parametrize(("query", "expected"), [
    ("SELECT count(*) FROM a.b.c", ["a.b.c"]), ("SELECT 'from x.y.z' FROM A.`b`.c t", ["A.b.c"]),
    ("SELECT a.b.c.d, trim(both FROM x) FROM a.b.c, a.b.d ORDER BY x, y", ["a.b.c", "a.b.d"]),
    ("(SELECT 1 FROM a.b.c) UNION (SELECT 2 FROM a.b.d);", ["a.b.c", "a.b.d"]),
    ("SELECT * FROM a.b.c t LEFT JOIN a.b.d u USING (x, y) WHERE t.x IN (SELECT x FROM a.b.e)",
     ["a.b.c", "a.b.d", "a.b.e"]),
    ("WITH recent AS (SELECT * FROM a.b.c) SELECT r.x FROM recent r CROSS JOIN range(3)", ["a.b.c"]),
    ("SELECT max(struct(x, y)) FROM a.b.c, LATERAL (SELECT 1) GROUP BY ROLLUP (x, y)", ["a.b.c"]),
    ("SELECT psi -- it's (the) newest\nFROM a.b.c WHERE x = \"it's (\" AND y = 'CASE ('", ["a.b.c"]),
    ("SELECT 1 AS `delete`, replace(x, 'a', 'b') FROM (VALUES (1), (2)) v(x)", [])])
def test_the_tables_of_a_query_are_found(query, expected):
    assert [".".join(token.parts) for token in query_tables(query)] == expected
    names = {name.lower(): f"n{i}" for i, name in enumerate(expected)}
    replaced = with_names(query, names)
    assert all(replaced.count(name) == 1 for name in names.values())


# Conditions

NUMBERS = st.lists(st.one_of(st.none(), st.integers(-1000, 1000), st.floats(-1e6, 1e6)), max_size=20)


@given(NUMBERS)
@settings(max_examples=30)
def test_aggregations_agree_with_pandas(values):
    series = pd.Series(values, dtype="float64").dropna()
    oracle = {"SUM": series.sum(min_count=1), "COUNT": series.count(), "COUNT_DISTINCT": series.nunique(),
              "AVG": series.mean(), "MEDIAN": series.median(), "MIN": series.min(), "MAX": series.max(),
              "STDDEV": series.std()}
    assert set(oracle) == set(AGGREGATIONS)
    for name, expected in oracle.items():
        value = aggregate(values, name)
        if math.isnan(expected): assert value is None, name  # pandas has NaN for null
        else: assert value == pytest.approx(expected, rel=1e-6, abs=1e-6), name


@given(st.floats(), st.floats())
def test_nan_is_the_largest_number_and_equal_to_itself(left, right):
    def rank(number): return (math.isnan(number), 0 if math.isnan(number) else number)
    assert is_met(left, "LESS_THAN", right) == (rank(left) < rank(right))
    assert is_met(left, "GREATER_THAN_OR_EQUAL", right) == (rank(left) >= rank(right))
    assert is_met(left, "EQUAL", right) == (rank(left) == rank(right)) != is_met(left, "NOT_EQUAL", right)


def test_values_of_other_types():
    assert is_met(Decimal("0.25"), "GREATER_THAN", 0.2)
    assert is_met(True, "EQUAL", True) and is_met("b", "GREATER_THAN", "a")
    assert is_met(pd.Timestamp("2013-07-01", tz="UTC"), "LESS_THAN", "2013-07-01T01:00:00+00:00")
    for value, threshold in (("1", 1.0), (True, 1.0), ([1], 1.0), (1.0, "1")):
        with pytest.raises(MlopsError, match="cannot be compared"): is_met(value, "EQUAL", threshold)
        assert evaluate_rows(replace(alert(), operator="EQUAL", threshold=threshold), ["psi"],
                             [{"psi": value}]).state == "ERROR"


@pytest.mark.parametrize("state", ["OK", "TRIGGERED", "UNKNOWN", "ERROR"])
def test_an_empty_result_has_the_state_that_the_alert_says(state):
    result = evaluate_rows(alert(empty_result_state=state), ["psi"], [])
    assert result.state == state and bool(result.error) == (state == "ERROR")


def test_a_threshold_can_be_a_column():
    compared = replace(alert(), threshold=AlertColumn("highest", "MAX"), source=AlertColumn("psi", "AVG"))
    result = evaluate_rows(compared, ["psi", "highest"], [{"psi": 1, "highest": 2}, {"psi": 4, "highest": 1}])
    assert (result.state, result.value, result.threshold) == ("TRIGGERED", 2.5, 2)


# Notifications

class Pager:
    "The rules of notifications as a person would apply them: a second, independent statement of them."

    def __init__(self, seconds, on_ok): self.seconds, self.on_ok, self.since, self.last = seconds, on_ok, None, None

    def notifies(self, state, now):
        previous, self.last = self.last, state
        if state == "ERROR": return previous != "ERROR"
        if state == "UNKNOWN": return False
        if state == "OK":
            was_triggered, self.since = self.since is not None, None
            return was_triggered and self.on_ok
        if self.since is None:
            self.since = now
            return True
        self.since = min(self.since, now)  # the future has no notifications
        if not self.seconds or now - self.since < 1000 * self.seconds: return False
        self.since = now
        return True


STEPS = st.lists(st.tuples(st.sampled_from(["OK", "TRIGGERED", "TRIGGERED", "UNKNOWN", "ERROR"]),
                           st.integers(-200_000, 200_000)), max_size=30)


@given(STEPS, st.sampled_from([0, 60, 100]), st.booleans())
def test_notifications_follow_the_rules_whatever_the_clock_does(steps, seconds, on_ok):
    pager, memory, now = Pager(seconds, on_ok), AlertMemory(), 10_000_000
    for state, passed in steps:
        now += passed
        memory, notifies = next_memory(memory, state, now, seconds, on_ok)
        assert notifies == pager.notifies(state, now)


@given(st.lists(st.integers(-10**12, 10**12), min_size=1, max_size=10), st.integers(1, 1000))
def test_after_any_jumps_of_the_clock_there_is_neither_flood_nor_silence(jumps, seconds):
    memory, now = AlertMemory(), 10**13
    for jump in jumps:
        now += jump
        memory, _ = next_memory(memory, "TRIGGERED", now, seconds)
    sent = 0
    for minute in range(1, 61):  # now the clock is right, for 60 intervals
        memory, notifies = next_memory(memory, "TRIGGERED", now + 1000 * seconds * minute, seconds)
        sent += notifies
    assert sent == 60


# Messages

def test_the_body_of_a_webhook():
    shown = replace(alert(receivers=("hook",)), summary="{{ALERT_NAME}}: {{ALERT_STATUS}}",
                    description="{{ALERT_COLUMN}} {{ALERT_CONDITION}} {{ALERT_THRESHOLD}}: {{QUERY_RESULT_VALUE}}")
    result = Evaluated("TRIGGERED", 0.3, 0.2, columns=("psi", "window_end"),
                       rows=({"psi": 0.3, "window_end": pd.Timestamp("2013-07-01", tz="UTC")},))
    assert webhook_body(shown, result, 1372680000000, "http://host") == {
        "event": "alert_state_change", "url_base": "http://host", "alert": {
            "title": "Drift: TRIGGERED", "description": "psi GREATER_THAN 0.2: 0.3", "alert": {
                "id": "7", "name": "Drift", "owner": {"name": "ann@example.org", "email": "ann@example.org"},
                "query_text": "SELECT 0.3 AS psi", "warehouse_id": "1",
                "custom_summary": "{{ALERT_NAME}}: {{ALERT_STATUS}}",
                "custom_description": shown.description,
                "evaluations": [{
                    "id": "7", "source": {"name": "psi", "display": "psi", "aggregation": "AGGREGATION_UNSPECIFIED"},
                    "comparison_operator": "GREATER_THAN", "threshold": {"value": {"double_value": 0.2}},
                    "empty_result_state": "OK",
                    "notification": {"seconds_to_retrigger": 0, "notify_on_ok": False,
                                     "subscriptions": [{"destination_id": "hook"}]},
                    "state": "TRIGGERED", "last_evaluated_at": "2013-07-01T12:00:00.000Z",
                    "first_row": {"psi": 0.3, "window_end": "2013-07-01T00:00:00+00:00"}}]}}}


def test_a_message_names_the_address_of_the_workspace_and_no_folder(place):
    shown = replace(alert(), description="see {{ALERT_URL}}")
    with Hook() as hook:
        write_destinations(place.state, hook={"url": hook.address})
        evaluate_alert(place, shown, rows(0.3))
        write_running(make_places(place), "http://127.0.0.1:8123")
        evaluate_alert(place, replace(shown, key="another"), rows(0.3))
        (place.state / "workspace/workspace.json").unlink()
        evaluate_alert(place, replace(shown, key="third"), rows(0.3))
        deliver_due(place.state)
    unknown, running, ended = hook.bodies
    assert "url_base" not in unknown and unknown["alert"]["description"] == "see "
    assert running["url_base"] == ended["url_base"] == "http://127.0.0.1:8123"
    assert running["alert"]["description"] == "see http://127.0.0.1:8123/api/2.0/alerts/7"
    assert not any(str(place.root).encode() in content for _, content in hook.received)


def test_a_message_is_json_whatever_the_query_returns():
    values = {"nan": math.nan, "inf": -math.inf, "decimal": Decimal("1.5"), "bytes": b"x", "null": None,
              "day": pd.Timestamp("2013-07-01"), "list": [math.nan, {"x": Decimal(1)}], "{{ALERT_NAME}}": "{{X}}"}
    result = Evaluated("OK", math.nan, None, columns=tuple(values), rows=(values,) * 200)
    body = webhook_body(replace(alert(), description="{{QUERY_RESULT_TABLE}}"), result, 0, "")
    assert json.loads(json.dumps(body, allow_nan=False)) == body and body["alert"]["description"].count("\n") == 100


# Delivery

def evaluate(place, *values, times=None, **options):
    "Evaluate one alert, once for each value; whether each notified."
    query = rows(*values)
    return [evaluate_alert(place, alert(**options), query, times[i] if times else None).notified
            for i, _ in enumerate(values)]


def test_a_change_is_sent_once_and_signed(place, monkeypatch):
    monkeypatch.setenv("MLOPS_SECRET_ALERTS_HOOK", "s3cret")
    with Hook() as hook:
        write_destinations(place.state, hook={"url": hook.address, "token": "t", "secret": "secrets/alerts/hook"})
        assert evaluate(place, 0.1, 0.3, 0.4, 0.1, 0.5, notification={"notify_on_ok": True}) == [
            False, True, False, True, True]
        assert [one.status for one in deliver_due(place.state)] == ["SENT"] * 3 and deliver_due(place.state) == []
    states = [body["alert"]["alert"]["evaluations"][0]["state"] for body in hook.bodies]
    assert states == ["TRIGGERED", "OK", "TRIGGERED"]
    for headers, content in hook.received:
        assert verify_signature("s3cret", headers, content) == headers["webhook-id"]
        assert headers["authorization"] == "Bearer t"
    assert len(set(hook.ids)) == 3


def test_a_receiver_that_answers_500_gets_the_same_message_later(place):
    with Hook(500, 503) as hook:
        write_destinations(place.state, hook={"url": hook.address})
        evaluate(place, 0.3)
        now = 2 * 10**12
        [sent] = deliver_due(place.state, now)
        assert (sent.status, sent.detail) == ("PENDING", "answered 500 Internal Server Error")
        assert len(hook.ids) == 1  # an attempt is one request
        assert deliver_due(place.state, now + 14_999) == []
        assert [one.status for one in deliver_due(place.state, now + 15_000)] == ["PENDING"]
        assert [one.status for one in deliver_due(place.state, now + 45_000)] == ["SENT"]
    assert len(hook.ids) == 3 and len(set(hook.ids)) == 1
    [message] = alert_history(alert_store(place.state))[0]["deliveries"]
    assert (message["status"], message["attempts"], message["detail"]) == ("SENT", 3, "200 OK")


def test_an_ok_never_comes_before_the_triggered_that_it_ends(place, monkeypatch):
    "Neither while an attempt is waited for, nor after the clock jumped back."
    clock, options = 2 * 10**12, {"notification": {"notify_on_ok": True}}
    with Hook(500) as hook:
        write_destinations(place.state, hook={"url": hook.address}, other={"url": hook.address})
        evaluate(place, 0.3, **options)
        deliver_due(place.state, clock)
        monkeypatch.setattr("mlops_nb.jobs.run_store.now", lambda: 10**12)
        evaluate(place, 0.1, **options)
        evaluate_alert(place, replace(alert(), key="another"), rows(0.3))
        assert [one.alert for one in deliver_due(place.state, clock + 14_000)] == ["dev/another"]
        assert [one.status for one in deliver_due(place.state, clock + 15_000)] == ["SENT", "SENT"]
    states = [body["alert"]["alert"]["evaluations"][0]["state"] for body in hook.bodies]
    assert states[-3:] == ["TRIGGERED", "TRIGGERED", "OK"]


@pytest.mark.slow
def test_a_receiver_that_is_down_is_given_up_after_a_day_and_keeps_no_one_waiting(place):
    with Hook() as hook:
        write_destinations(place.state, hook={"url": hook.address}, down={"url": "http://127.0.0.1:9/secret-path"})
        evaluate(place, 0.3, receivers=("down", "hook", "unknown"))
        now, statuses, hours = 2 * 10**12, [], 0
        while "FAILED" not in statuses:
            sent = deliver_due(place.state, now)
            statuses += [one.status for one in sent if one.to == "down"]
            assert not any("secret-path" in one.detail for one in sent)
            now, hours = now + 3_600_000, hours + 1
        assert len(hook.received) == 1
    assert 20 <= hours <= 31 and statuses.count("PENDING") == 29 and deliver_due(place.state, now) == []
    messages = {one["destination"]: one for one in alert_history(alert_store(place.state))[0]["deliveries"]}
    assert "no notification destination 'unknown'" in messages["unknown"]["detail"]


def test_a_slow_receiver_is_not_waited_for(place):
    with Hook(seconds=0.6) as hook:
        write_destinations(place.state, hook={"url": hook.address})
        evaluate(place, 0.3)
        [sent] = deliver_due(place.state, seconds=0.1)
        assert (sent.status, sent.detail) == ("PENDING", "no answer in time")
        hook.seconds = 0
        assert [one.status for one in deliver_due(place.state, 2 * 10**12)] == ["SENT"]
    assert len(set(hook.ids)) == 1  # the receiver can see that it has the message already


def test_a_message_is_due_although_the_clock_jumped_back(place):
    with Hook(500) as hook:
        write_destinations(place.state, hook={"url": hook.address})
        evaluate(place, 0.3)
        assert [one.status for one in deliver_due(place.state, 4 * 10**12)] == ["PENDING"]
        assert [one.status for one in deliver_due(place.state, 2 * 10**12)] == ["SENT"]


def test_the_command_deliver_sends_now_what_waits(project, monkeypatch, capsys):
    from mlops_nb.commands.app import run_app
    monkeypatch.chdir(project.root)
    monkeypatch.setenv("no_proxy", "127.0.0.1")

    def deliver_now() -> str:
        monkeypatch.setattr(sys, "argv", ["mlops", "alerts", "deliver"])
        assert run_app() == 0
        return " ".join("".join(capsys.readouterr()).split())
    assert deliver_now() == "no message waits"
    place = load_env("dev", root=project.root)
    with Hook(500, 500) as hook:
        write_destinations(place.state, hook={"url": hook.address})
        evaluate(place, 0.3, 0.1, notification={"notify_on_ok": True})
        deliver_due(place.state, 4 * 10**12)  # 2096-10-02 07:06:40
        monkeypatch.setattr("mlops_nb.jobs.run_store.now", lambda: 4 * 10**12)
        printed = deliver_now()
        assert "not sent dev/drift: hook: answered 500 Internal Server Error; it is tried again" in printed
        assert "2 messages wait; the next attempt is from 2096-10-02 07:07:10 UTC on" in printed
        assert "sent dev/drift: hook: 200 OK" in deliver_now() and deliver_now() == "no message waits"
    assert len(hook.ids) == 4


def test_a_mistake_in_the_destinations_keeps_the_messages(place, monkeypatch):
    with Hook() as hook:
        evaluate(place, 0.3)
        (place.state / "destinations.json").write_text("{")
        with pytest.raises(MlopsError, match="destinations.json cannot be read"): deliver_due(place.state)
        write_destinations(place.state, hook={"url": hook.address})
        with monkeypatch.context() as patch, pytest.raises(OSError, match="disk"):
            def full(*_): raise OSError("the disk is full")
            patch.setattr(alert_delivery, "record_attempt", full)
            deliver_due(place.state)
        assert [one.status for one in deliver_due(place.state)] == ["SENT"]
    assert len(hook.ids) == 2 and len(set(hook.ids)) == 1


def test_an_email_has_title_and_description(place, monkeypatch):
    monkeypatch.delenv("MLOPS_SMTP", raising=False)
    mailed = replace(alert(), subscriptions=(Subscription("email", "ann@example.org"),), description="psi is high")
    evaluate_alert(place, mailed, rows(0.3))
    [sent] = deliver_due(place.state)
    [file] = (place.state / "outbox").glob("*-alert-7-*.eml")
    assert sent.status == "SENT" and 'Subject: Alert "Drift" changed status to TRIGGERED' in file.read_text()
    assert "psi is high" in file.read_text()


def test_an_alert_whose_query_is_wrong_says_so_once(place):
    def fails(query): raise RuntimeError("syntax error at 'SELCT'\n 0: a stack of Rust")
    outcomes = [evaluate_alert(place, alert(), query) for query in (fails, fails, rows(0.1), fails)]
    assert [(one.result.state, one.notified) for one in outcomes] == [
        ("ERROR", True), ("ERROR", False), ("OK", False), ("ERROR", True)]
    first, hint = alert_state(alert_store(place.state), "dev/drift")["error"].splitlines()
    assert first == "the query fails: syntax error at 'SELCT'" and "correct query_text" in hint
    assert evaluate_alert(place, alert(), rows(None)).result.state == "UNKNOWN"


def test_a_damaged_store_is_named(place):
    evaluate(place, 0.1)
    for file in (place.state / "alerts").glob("alerts.db*"): file.write_bytes(b"x" * 5000)
    with pytest.raises(StoreError, match="the alert store .*alerts.db cannot be read: the file is damaged"):
        evaluate(place, 0.3)


# Processes

PROCESS = """
import os, signal, sys, time
from dataclasses import replace
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from alerting import alert, rows
from mlops_nb.env import load_env
from mlops_nb.monitoring import alert_delivery, alerts, alert_store
step, state, gate = sys.argv[2], Path(sys.argv[3]), Path(sys.argv[3], "go")
def kill(*_, **__): os.kill(os.getpid(), signal.SIGKILL)
if step == "query": query = kill
else: query = rows(0.3)
if step == "record": alerts.record_evaluation = kill
if step == "take": alert_delivery.take_deliveries = kill
if step == "send": alert_delivery.send_in_order = kill
if step == "note": alert_delivery.record_attempt = kill
env = replace(load_env("dev"), state=state)
if step == "together":
    print("ready", flush=True)
    while not gate.exists(): time.sleep(0.001)
    slow = rows(0.3)
    query = lambda text: (time.sleep(0.2), slow(text))[1]
alerts.evaluate_alert(env, alert(), query)
alert_delivery.deliver_due(state)
"""


def process(place, step, **options):
    command = [sys.executable, "-c", PROCESS, str(Path(__file__).parents[2]), step, str(place.state)]
    return subprocess.Popen(command, cwd=place.root, text=True, env=os.environ | {"no_proxy": "127.0.0.1"}, **options)


@pytest.mark.parametrize(("step", "requests"), [("record", 1), ("send", 1), ("note", 2)])
def test_a_kill_at_any_step_loses_no_message(place, step, requests):
    with Hook() as hook:
        write_destinations(place.state, hook={"url": hook.address})
        assert process(place, step).wait(60) == -signal.SIGKILL
        evaluate(place, 0.3)  # as the next run of the schedule
        deliver_due(place.state)
        assert deliver_due(place.state, 2 * 10**12) == []
    assert len(hook.ids) == requests and len(set(hook.ids)) == 1


@pytest.mark.slow
@pytest.mark.parametrize(("step", "requests"), [("query", 1), ("take", 1)])
def test_a_kill_at_other_steps_loses_no_message(place, step, requests):
    test_a_kill_at_any_step_loses_no_message(place, step, requests)


def test_two_evaluators_at_once_notify_once(place):
    with Hook() as hook:
        write_destinations(place.state, hook={"url": hook.address})
        running = [process(place, "together", stdout=subprocess.PIPE) for _ in range(2)]
        assert [one.stdout.readline() for one in running] == ["ready\n"] * 2
        (place.state / "go").touch()
        assert [one.wait(60) for one in running] == [0, 0]
        for one in running: one.stdout.close()
    assert len(hook.ids) == 1
    assert sorted(row["notified"] for row in alert_history(alert_store(place.state))) == [0, 1]
