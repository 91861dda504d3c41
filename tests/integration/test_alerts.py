"""An alert on tables of the lakehouse: its query on Sail, the job that evaluates it, and the message that it sends."""
import json
from dataclasses import replace

import pytest
from alerting import Hook, resource, write_alerts, write_destinations

from mlops_nb.data import tables
from mlops_nb.errors import MlopsError
from mlops_nb.monitoring.alerts import evaluate_due, query_result

PROFILE = "{catalog}.s.scores_profile_metrics"
QUERY = f"""-- the newest window
WITH newest AS (SELECT * FROM {PROFILE} WHERE slice_key IS NULL ORDER BY window.end DESC LIMIT 1)
SELECT newest.loss_ratio AS psi, newest.window.end AS window_end FROM newest"""


@pytest.fixture(scope="module")
def lake(home):
    "The session, and the target dev with metric tables of two windows; prod has a table that dev may not read."
    spark, env = home
    env = replace(env, schema="s", read=("dev", "prod"), write=("dev", "prod"))
    frame = spark.sql("""SELECT named_struct('start', timestamp '2013-06-01', 'end', timestamp '2013-07-01') AS window,
        CAST(NULL AS STRING) AS slice_key, 0.9D AS loss_ratio
        UNION ALL SELECT named_struct('start', timestamp '2013-07-01', 'end', timestamp '2013-08-01'), NULL, 1.2D""")
    for catalog in ("dev", "prod"): tables.overwrite(spark, env, PROFILE.format(catalog=catalog), frame)
    return spark, replace(env, read=("dev",), write=("dev",))


def test_a_query_reads_its_tables_by_the_rules_of_the_target(lake):
    spark, env = lake
    columns, [row] = query_result(spark, env, QUERY.format(catalog="dev"))
    assert columns == ["psi", "window_end"] and row["psi"] == 1.2 and row["window_end"].isoformat()[:10] == "2013-08-01"
    for query, message in ((QUERY.format(catalog="prod"), "may not read prod.s.scores_profile_metrics"),
                           ("SELECT 1 AS psi FROM dev.s.other", "no table 'dev.s.other'"),
                           ("SELECT * FROM range(200000)", "more than 100,000 rows"),
                           ("SELECT 1 AS psi, 2 AS psi", "two columns of the result have one name")):
        with pytest.raises(MlopsError, match=message): query_result(spark, env, query)


def test_an_error_of_the_engine_is_the_state_error(lake, project, tmp_path):
    from mlops_nb.bundle.load import load_bundle
    from mlops_nb.monitoring.alert_definitions import read_alerts
    spark, env = lake
    write_alerts(project, a=resource() | {"query_text": f"SELECT nothing AS psi FROM {PROFILE.format(catalog='dev')}"},
                 b=resource() | {"query_text": "SELECT avg(psi AS x) AS psi"},
                 c=resource() | {"query_text": "SELECT 1 AS x"},
                 d=resource())
    alerts = read_alerts(load_bundle(project.root))
    outcomes = evaluate_due(replace(env, state=tmp_path / "state"), lambda: spark, alerts)
    assert [one.result.state for one in outcomes] == ["ERROR", "ERROR", "ERROR", "TRIGGERED"]
    errors = [one.result.error for one in outcomes]
    assert errors[0].startswith("no column nothing\n  correct query_text")
    assert errors[1].startswith("the query fails: ") and "expected" not in errors[1] and len(errors[1]) < 300
    assert "no column 'psi' in the result of the query" in errors[2]


def test_a_job_evaluates_an_alert_and_decides_by_its_state(lake, project, monkeypatch):
    from mlops_nb.jobs import beginning, runner
    _, env = lake
    monkeypatch.setenv("MLOPS_LAKEHOUSE", env.lakehouse)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    write_alerts(project, drift=resource(threshold={"value": {"double_value": 1.0}}) | {
        "query_text": QUERY.format(catalog="${var.catalog}"),
        "custom_summary": "{{ALERT_NAME}}: {{QUERY_RESULT_VALUE}}"})
    project.job("watch", [
        {"task_key": "alert", "alert_task": {"alert_id": "${resources.alerts.drift.id}", "subscribers": [
            {"destination_id": "team"}]}},
        {"task_key": "is_triggered", "depends_on": [{"task_key": "alert"}], "condition_task": {
            "left": "{{tasks.alert.output.alert_state}}", "op": "EQUAL_TO", "right": "TRIGGERED"}}])
    with Hook() as hook:
        write_destinations(project.root / ".mlops", hook={"url": hook.address}, team={"url": hook.address})
        run = beginning.begin_run(project.home(), "watch", {})
        assert runner.finish_run(run) == "SUCCESS", run.record.row
    assert run.record.outcomes == {"is_triggered": "true"}
    assert len(hook.bodies) == 2 and len(set(hook.ids)) == 2  # the alert's receiver, and the task's
    for body in hook.bodies:
        assert body["alert"]["title"] == "Drift: 1.2"
        assert body["alert"]["alert"]["evaluations"][0]["first_row"]["window_end"].startswith("2013-08-01")


def test_the_commands(lake, project, monkeypatch, capsys):
    import sys

    from mlops_nb.commands.app import run_app
    _, env = lake
    monkeypatch.setenv("MLOPS_LAKEHOUSE", env.lakehouse)
    monkeypatch.chdir(project.root)
    monkeypatch.setattr("mlops_nb.data.session.get_spark", lambda place: lake[0])
    write_alerts(project, drift=resource() | {"query_text": QUERY.format(catalog="dev")},
                 wrong=resource(receivers=()) | {"query_text": "SELECT 1 AS x"})

    def mlops(*words) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["mlops", *words])
        code = run_app()
        return code, " ".join("".join(capsys.readouterr()).split())

    code, printed = mlops("alerts", "evaluate", "--at", "2013-08-01T12:00:00Z")
    assert code == 1 and "drift TRIGGERED psi is 1.2 (GREATER_THAN 0.2); notified" in printed
    assert "wrong ERROR no column 'psi' in the result of the query" in printed and "not sent dev/drift: hook" in printed
    assert mlops("alerts", "evaluate", "--alert", "drift")[0] == 0
    code, printed = mlops("alerts", "evaluate", "--alert", "drift", "--json")
    assert json.loads(printed)[0] == {
        "alert": "drift", "state": "TRIGGERED", "value": 1.2, "threshold": 0.2, "error": "", "notified": False,
        "text": "psi is 1.2 (GREATER_THAN 0.2)"}
    assert "TRIGGERED" in mlops("alerts", "list")[1]
    assert "2013-08-01 12:00 dev/drift TRIGGERED 1.2 hook: PENDING after 1 attempt(s)" in mlops("alerts", "history")[1]
    for words in (("--alert", "none"), ("--at", "soon"), ("--subscriber", "x")):
        assert mlops("alerts", "evaluate", *words)[0] == 2


@pytest.mark.slow
def test_an_alert_starts_a_job_of_the_local_workspace(project, monkeypatch):
    "`mlops up` is its own receiver: it takes a message that could not be delivered before, and starts the job once."
    import subprocess
    import time

    from states import MLOPS, environment

    from mlops_nb.env import load_env
    from mlops_nb.jobs.run_store import RunStore
    state = project.root / ".mlops"
    write_alerts(project, drift=resource())
    project.job("retrain", [{"task_key": "a", "condition_task": {
        "left": "{{job.parameters.cause}}", "op": "NOT_EQUAL", "right": ""}}],
                parameters=[{"name": "cause", "default": ""}])

    def mlops(*words, **variables) -> str:
        return subprocess.run([MLOPS, *words], cwd=project.root, env=environment(state) | variables, check=True,
                              capture_output=True, text=True, timeout=120).stdout
    secrets = {"MLOPS_SECRET_ALERTS_TOKEN": mlops("up", "token", "alerts").strip(), "no_proxy": "127.0.0.1",
               "MLOPS_SECRET_ALERTS_KEY": "a key"}
    assert load_env("dev", root=project.root).state == state
    mlops("alerts", "evaluate", **secrets)  # no destination yet
    with (state / "up.log").open("wb") as output:
        server = subprocess.Popen([MLOPS, "up"], cwd=project.root, stdout=output, stderr=output,
                                  stdin=subprocess.DEVNULL, env=environment(state) | secrets)
    try:
        end = time.monotonic() + 90
        while not (state / "workspace/workspace.json").exists(): time.sleep(0.1)
        host = json.loads((state / "workspace/workspace.json").read_text())["host"]
        write_destinations(state, hook={"url": f"{host}/webhooks/alerts/dev/retrain", "token": "secrets/alerts/token",
                                        "secret": "secrets/alerts/key"})
        store = RunStore(state / "runs.db")
        while not (runs := store.rows("select * from runs where result_state is not null")):
            assert time.monotonic() < end and server.poll() is None, (state / "up.log").read_text()
            time.sleep(0.2)
    finally:
        server.terminate()
        server.wait(60)
    assert [(run["job"], run["result_state"]) for run in runs] == [("retrain", "SUCCESS")]
    assert json.loads(json.loads(runs[0]["parameters"])["cause"])["alert"] == "drift"
