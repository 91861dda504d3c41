"""Alerts in the local workspace: read by databricks-sdk, and received as webhooks that start a job."""
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import requests
from alerting import Hook, alert, resource, rows, write_alerts, write_destinations
from databricks.sdk import WorkspaceClient
from databricks.sdk.errors import InvalidParameterValue, NotImplemented, ResourceDoesNotExist
from databricks.sdk.service.sql import AlertEvaluationState
from served import served

from mlops_nb.bundle.load import load_bundle
from mlops_nb.env import load_env
from mlops_nb.jobs.delivery import deliver
from mlops_nb.jobs.notices import Notice
from mlops_nb.monitoring.alert_definitions import read_alert
from mlops_nb.monitoring.alert_delivery import deliver_due
from mlops_nb.monitoring.alerts import evaluate_alert
from mlops_nb.serving.places import make_places
from mlops_nb.webhook_signatures import signed_headers
from mlops_nb.workspace.alert_receiver import receiver_router
from mlops_nb.workspace.app import build_app
from mlops_nb.workspace.rest_alerts import alerts_router
from mlops_nb.workspace.tokens import load_tokens, owner_token, users_by_digest


@pytest.fixture
def workspace(project, service, acts, monkeypatch):
    "A workspace with one alert and the jobs `retrain`, which declares a cause, and `plain`."
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    write_alerts(project, drift=resource())
    for key, names in (("retrain", ("as_of", "cause")), ("plain", ("as_of",))):
        notebook = project.notebook(key, "1", parameters="\n".join(f"{name}: str = ''" for name in names))
        project.job(key, [{"task_key": "a", "notebook_task": notebook}],
                    parameters=[{"name": name, "default": ""} for name in names])
    env = replace(load_env("dev", root=project.root), state=project.root / ".mlops")
    places = make_places(env)
    token = owner_token(places, "ann")
    app = build_app(lambda: users_by_digest(load_tokens(places)), [alerts_router(env), receiver_router(service)])
    with served(app) as host:
        yield SimpleNamespace(env=env, host=host, token=token, service=service,
                              client=WorkspaceClient(host=host, token=token))


def post(workspace, body, job="dev/retrain", token=None, **headers):
    "Send a webhook: status code and answer."
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = requests.post(f"{workspace.host}/webhooks/alerts/{job}", data=content, timeout=30, headers={
        "Authorization": f"Bearer {token or workspace.token}", **headers})
    return response.status_code, response.json()


def body_of(workspace, *values) -> dict:
    "The body of the last of some evaluations."
    with Hook() as hook:
        write_destinations(workspace.env.state, hook={"url": hook.address})
        drift = read_alert(load_bundle(workspace.env.root), "drift")
        query, on_ok = rows(*values), replace(drift, notify_on_ok=True)
        for _ in values: evaluate_alert(workspace.env, on_ok, query)
        deliver_due(workspace.env.state)
        return hook.bodies[-1]


def test_databricks_sdk_reads_alerts_and_their_states(workspace):
    drift = read_alert(load_bundle(workspace.env.root), "drift")
    [dev, prod] = workspace.client.alerts_v2.list_alerts()
    assert (dev.id, dev.display_name, dev.evaluation.state) == (drift.id, "Drift", AlertEvaluationState.UNKNOWN)
    assert prod.id != dev.id and dev.schedule.quartz_cron_schedule == "0 0 7 * * ?"
    evaluate_alert(workspace.env, drift, rows(0.3), time=1372680000000)
    read = workspace.client.alerts_v2.get_alert(drift.id)
    assert read.evaluation.state == AlertEvaluationState.TRIGGERED
    assert read.evaluation.last_evaluated_at == "2013-07-01T12:00:00.000Z"
    assert read.evaluation.threshold.value.double_value == 0.2 and read.query_text == "SELECT 0.3 AS psi"
    assert [one.id for one in workspace.client.alerts_v2.list_alerts(page_size=1)] == [dev.id, prod.id]


def test_alerts_are_changed_in_the_bundle(workspace):
    with pytest.raises(ResourceDoesNotExist, match="Alert 9 does not exist"): workspace.client.alerts_v2.get_alert("9")
    for call in (lambda: workspace.client.api_client.do("POST", "/api/2.0/alerts", body={}),
                 lambda: workspace.client.alerts_v2.trash_alert("9")):
        with pytest.raises(NotImplemented, match="declared in the bundle"): call()


def test_a_triggered_alert_starts_the_job_once_for_each_delivery(workspace):
    body = body_of(workspace, 0.3)
    code, answer = post(workspace, body, **{"webhook-id": "1"})
    assert code == 200 and answer["cause"] == {"alert": "drift", "window": "", "state": "TRIGGERED"}
    assert post(workspace, body, **{"webhook-id": "1"})[1]["run_id"] == answer["run_id"]
    assert post(workspace, body, **{"webhook-id": "2"})[1]["run_id"] == answer["run_id"] + 1
    unnamed = [post(workspace, body)[1]["run_id"] for _ in range(2)]  # such as Databricks' own: by its content
    assert len(set(unnamed)) == 1
    run = workspace.service.row(answer["run_id"])
    assert (run["job"], run["target"]) == ("retrain", "dev")
    assert json.loads(json.loads(run["parameters"])["cause"]) == answer["cause"]


def test_the_window_of_the_result_is_part_of_the_cause(workspace):
    body = body_of(workspace, 0.3)
    body["alert"]["alert"]["evaluations"][0]["first_row"] = {"psi": 0.3, "window_start": "2013-07-01T04:00:00"}
    assert post(workspace, body)[1]["cause"]["window"] == "2013-07-01T04:00:00"
    code, answer = post(workspace, body, job="dev/plain")  # it declares no cause
    assert code == 200 and "cause" not in json.loads(workspace.service.row(answer["run_id"])["parameters"])


def test_other_states_start_nothing(workspace):
    assert post(workspace, body_of(workspace, 0.3, 0.1)) == (
        200, {"state": "OK", "message": "only TRIGGERED starts a run"})
    assert workspace.service.store.rows("select * from runs") == []


def test_what_is_no_webhook_of_an_alert_is_refused(workspace):
    body = body_of(workspace, 0.3)
    assert post(workspace, body, token="wrong")[0] == 401
    assert post(workspace, body, job="dev/none")[0] == 404 and post(workspace, body, job="none/retrain")[0] == 404
    for wrong in (b"", b"x", b"[1]", {}, {"event": "alert_state_change", "alert": 1},
                  {"event": "alert_state_change", "alert": {"title": "", "alert": {"id": "1"}}}):
        assert post(workspace, wrong)[0] == 400
    assert workspace.service.store.rows("select * from runs") == []


def test_a_signed_address_takes_signed_requests_only(workspace, monkeypatch):
    body = body_of(workspace, 0.3)
    monkeypatch.setenv("MLOPS_SECRET_ALERTS_HOOK", "s3cret")
    url = f"{workspace.host}/webhooks/alerts/dev/retrain"
    write_destinations(workspace.env.state, retrain={"url": url, "token": workspace.token,
                                                     "secret": "secrets/alerts/hook"})
    assert post(workspace, body)[0] == 403
    content = json.dumps(body).encode()
    for secret, seconds, expected in (("other", None, 403), ("s3cret", 1, 403), ("s3cret", None, 200)):
        assert post(workspace, content, **signed_headers(secret, "1", content, seconds))[0] == expected
    sent = deliver(Notice("alert_state_change", "webhook", "retrain"), body,
                   json.loads((workspace.env.state / "destinations.json").read_text()), workspace.env.state, 5, "2")
    assert sent.ok and len(workspace.service.store.rows("select * from runs")) == 2


def test_an_alert_that_is_evaluated_here_starts_the_job_of_its_receiver(workspace):
    write_destinations(workspace.env.state, hook={"url": f"{workspace.host}/webhooks/alerts/dev/retrain",
                                                  "token": workspace.token})
    drift = alert()
    for value in (0.1, 0.3, 0.4): evaluate_alert(workspace.env, drift, rows(value))
    assert [one.status for one in deliver_due(workspace.env.state)] == ["SENT"]
    assert [row["job"] for row in workspace.service.store.rows("select * from runs")] == ["retrain"]


def test_a_created_job_evaluates_an_alert_of_the_project(project, service, client, acts, monkeypatch):
    import sys

    from databricks.sdk.service.jobs import AlertTask, Task

    from mlops_nb.jobs import runner
    write_alerts(project, drift=resource())
    answer = [{"alert": "drift", "state": "OK", "error": "", "text": "psi is 0.1"}]
    code = f"import os; assert os.getcwd() == {str(project.root)!r}; print({json.dumps(answer)!r})"
    monkeypatch.setattr(runner, "evaluation_command", lambda *words: [sys.executable, "-c", code])
    drift = read_alert(load_bundle(project.root), "drift")
    job = client.jobs.create(name="watch", tasks=[Task("alert", alert_task=AlertTask(alert_id=drift.id))])
    run = client.jobs.run_now_and_wait(job.job_id)
    assert run.state.result_state.value == "SUCCESS"
    with pytest.raises(InvalidParameterValue, match="no alert of this bundle has the id '9'"):
        client.jobs.create(name="other", tasks=[Task("alert", alert_task=AlertTask(alert_id="9"))])
