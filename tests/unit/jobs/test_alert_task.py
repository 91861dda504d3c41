"""Alert tasks: the state is the output of the task; only an alert that cannot be evaluated fails it."""
import json
import sys
import threading
import time

import pytest
from alerting import resource, write_alerts

from mlops_nb.bundle import checks
from mlops_nb.bundle.load import load_bundle
from mlops_nb.errors import MlopsError
from mlops_nb.jobs import beginning, run_store, runner

ALERT_TASK = {"task_key": "alert", "alert_task": {"alert_id": "${resources.alerts.drift.id}", "warehouse_id": "1"}}


def condition(reference="{{tasks.alert.output.alert_state}}"):
    return {"task_key": "is_triggered", "depends_on": [{"task_key": "alert"}],
            "condition_task": {"left": reference, "op": "EQUAL_TO", "right": "TRIGGERED"}}


@pytest.fixture
def job(project, monkeypatch):
    "A job that evaluates an alert; `job(code)` runs it with Python code in place of the evaluation."
    write_alerts(project, drift=resource())
    commands = []

    def run(code, *tasks, **settings):
        def command(*words):
            commands.append(words)
            return [sys.executable, "-c", code]
        monkeypatch.setattr(runner, "evaluation_command", command)
        project.job("job", [ALERT_TASK | settings, *tasks])
        run.last = job_run = beginning.begin_run(project.home(), "job", {})
        return job_run, runner.finish_run(job_run)
    run.commands = commands
    return run


def printing(state, **more):
    answer = {"alert": "drift", "state": state, "error": "", "text": "psi is 0.3"} | more
    return f"import sys; print('noise', file=sys.stderr); print({json.dumps([answer])!r})"


@pytest.mark.parametrize(("state", "outcome"), [("TRIGGERED", "true"), ("OK", "false"), ("UNKNOWN", "false")])
def test_the_state_of_the_alert_decides_a_condition(job, state, outcome):
    run, result = job(printing(state), condition())
    assert result == "SUCCESS" and run.record.outcomes == {"is_triggered": outcome}
    [(key, target, moment, subscribers)] = job.commands
    assert (key, target, subscribers) == ("drift", "dev", None)
    task = run_store.latest_attempts(run.record.store, run.run_id)["alert"]
    assert task["state_message"] == f"alert 'drift' is {state}: psi is 0.3"
    assert moment == runner.utc_datetime(run.record.row["trigger_time"]).isoformat()


def test_an_alert_that_cannot_be_evaluated_fails_its_task(job):
    run, result = job(printing("ERROR", error="no column psi") + "; sys.exit(1)", condition())
    assert result == "FAILED" and run.record.states == {"alert": "FAILED", "is_triggered": "UPSTREAM_FAILED"}
    assert "no column psi" in run.record.row["state_message"]


def test_an_evaluation_that_dies_fails_its_task_with_its_last_words(job):
    run, result = job("import sys; sys.exit('no engine')")
    assert result == "FAILED" and "alert 'drift' was not evaluated\n  no engine" in run.record.row["state_message"]


def test_an_evaluation_that_takes_too_long_is_ended(job):
    run, _ = job("import time; time.sleep(60)", timeout_seconds=1)
    assert run.record.states == {"alert": "TIMEDOUT"}


def test_a_run_that_is_stopped_ends_the_evaluation(job):
    def stop():
        while not hasattr(job, "last"): time.sleep(0.01)
        time.sleep(0.3)
        job.last.stop_signal.stop("CANCELED")
    threading.Thread(target=stop).start()
    run, result = job("import time; time.sleep(60)")
    assert result == "CANCELED" and run.record.states == {"alert": "CANCELED"}


@pytest.mark.parametrize(("task", "message"), [
    ({"alert_id": "123"}, "no alert of this bundle has the id '123'"),
    ({"workspace_path": "/Workspace/x"}, "an alert in a workspace folder cannot be evaluated on this machine"),
    ({"alert_id": "${resources.alerts.drift.id}", "parameters": {"x": "1"}}, "parameters of alerts are not supported")])
def test_an_alert_of_another_place_is_refused_before_anything_runs(project, task, message):
    write_alerts(project, drift=resource())
    project.job("job", [{"task_key": "alert", "alert_task": task}])
    with pytest.raises(MlopsError, match=message): beginning.begin_run(project.home(), "job", {})


def test_a_reference_to_an_output_that_does_not_exist_fails_the_task(job):
    _, result = job(printing("OK"), condition("{{tasks.alert.output.rows}}"))
    assert result == "FAILED" and "no 'rows' in tasks.alert.output" in job.last.record.row["state_message"]


def test_the_bundle_check_accepts_an_alert_task(project):
    write_alerts(project, drift=resource())
    project.job("job", [ALERT_TASK, condition()])
    assert checks.check(load_bundle(project.root)) == []
