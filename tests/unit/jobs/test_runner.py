"""The rules of a job's graph, with notebooks replaced by functions; tests/integration runs real ones."""
import json
import os
import shutil
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlops_nb.errors import MlopsError
from mlops_nb.jobs import run_store, runner
from mlops_nb.jobs.execute import Outcome
from mlops_nb.local_stores import StoreError


@pytest.fixture
def acts(monkeypatch):
    "What each task does: task_key -> function of its step; other tasks succeed. `ran` lists the tasks in order."
    behaviour, ran = {}, []

    def run_notebook(step):
        ran.append(step.key)
        act = behaviour.get(step.task["task_key"], lambda step: Outcome("SUCCESS"))
        return act(step)

    monkeypatch.setitem(runner.TASK_RUNNERS, "notebook_task", run_notebook)
    behaviour["ran"] = ran
    return behaviour


def task(project, key, *after, **settings):
    return {"task_key": key, "notebook_task": project.notebook("any", "1"),
            "depends_on": [a if isinstance(a, dict) else {"task_key": a} for a in after]} | settings


def fails(step): return Outcome("FAILED", "no reason")


def sets_values(**values):
    def act(step):
        step.folder.mkdir(parents=True)
        (step.folder / "values.json").write_text(json.dumps(values))
        return Outcome("SUCCESS")
    return act


def run(project, key="job", given=None, **options):
    job_run = runner.begin_run(project.home(), key, given or {}, **options)
    return job_run, runner.finish_run(job_run)


def test_a_failure_stops_what_depends_on_it_and_nothing_else(project, acts):
    project.job("job", [task(project, "a"), task(project, "b", "a"), task(project, "c"),
                        task(project, "d", "b", "c", run_if="ALL_DONE")])
    acts["a"] = fails
    job_run, result = run(project)
    assert job_run.record.states == {"a": "FAILED", "b": "UPSTREAM_FAILED", "c": "SUCCESS", "d": "SUCCESS"}
    assert result == "SUCCESS_WITH_FAILURES"  # the only leaf succeeded
    assert job_run.record.row["result_state"] == result and "no reason" in job_run.record.row["state_message"]


def test_retries_count_attempts_and_the_last_one_decides(project, acts):
    project.job("job", [task(project, "a", max_retries=2)])
    acts["a"] = lambda step: Outcome("SUCCESS" if step.attempt == 2 else "FAILED", f"attempt {step.attempt}")
    job_run, result = run(project)
    assert result == "SUCCESS" and acts["ran"] == ["a", "a", "a"]
    attempts = run_store.list_tasks(job_run.home.store, job_run.run_id)
    assert [attempt["result_state"] for attempt in attempts] == ["FAILED", "FAILED", "SUCCESS"]


def test_a_timeout_is_retried_only_with_retry_on_timeout(project, acts):
    project.job("job", [task(project, "a", max_retries=1), task(project, "b", max_retries=1, retry_on_timeout=True)])
    acts["a"] = acts["b"] = lambda step: Outcome("TIMEDOUT")
    run(project)
    assert sorted(acts["ran"]) == ["a", "b", "b"]


def test_values_reach_conditions_and_the_chosen_branch_runs(project, acts):
    project.job("job", [
        task(project, "check"),
        {"task_key": "bad", "depends_on": [{"task_key": "check"}], "condition_task":
         {"left": "{{tasks.check.values.violations}}", "op": "GREATER_THAN", "right": "2"}},
        task(project, "alarm", {"task_key": "bad", "outcome": "true"}),
        task(project, "rest", {"task_key": "bad", "outcome": "false"})])
    acts["check"] = sets_values(violations=10)
    job_run, result = run(project)
    assert job_run.record.states == {"check": "SUCCESS", "bad": "SUCCESS", "alarm": "SUCCESS", "rest": "EXCLUDED"}
    assert result == "SUCCESS"


def test_for_each_runs_every_element_and_names_those_that_failed(project, acts):
    inner = {"task_key": "airport", "notebook_task": project.notebook("any", "1")}
    for_each = {"inputs": '["EWR", "JFK", "LGA"]', "concurrency": 2, "task": inner}
    project.job("job", [{"task_key": "each", "for_each_task": for_each}])
    acts["airport"] = lambda step: Outcome("FAILED", "no runway") if step.input == "JFK" else Outcome("SUCCESS")
    job_run, result = run(project)
    assert sorted(acts["ran"]) == ["each[0]", "each[1]", "each[2]"] and result == "FAILED"
    assert "1 of 3 elements failed\n  each[1] (JFK): no runway" in job_run.record.row["state_message"]


def test_a_called_job_gets_its_parameters_and_its_failure_is_the_callers(project, acts):
    project.job("child", [task(project, "inside")], parameters=[{"name": "version", "default": "0"}])
    call = {"job_id": "${resources.jobs.child.id}", "job_parameters": {"version": "{{tasks.make.values.version}}"}}
    project.job("job", [task(project, "make"),
                        {"task_key": "call", "depends_on": [{"task_key": "make"}], "run_job_task": call}])
    acts["make"], child_runs = sets_values(version=7), []
    acts["inside"] = lambda step: child_runs.append(step.run) or Outcome("FAILED", "no such version")
    job_run, result = run(project)
    [child_run] = child_runs
    assert child_run.parameters == {"version": "7"} and child_run.calling_tasks == ("call",) and result == "FAILED"
    child = run_store.list_runs(job_run.home.store, "child")[0]
    assert child["parent_run_id"] == job_run.run_id and child["trigger_type"] == "RUN_JOB_TASK"
    assert "no such version" in job_run.record.row["state_message"]


def test_a_reference_to_a_missing_value_fails_its_task(project, acts):
    condition = {"left": "{{tasks.a.values.sum}}", "op": "EQUAL_TO", "right": "1"}
    project.job("job", [task(project, "a"),
                        {"task_key": "b", "depends_on": [{"task_key": "a"}], "condition_task": condition}])
    acts["a"] = sets_values(total=1)
    job_run, result = run(project)
    message = job_run.record.row["state_message"]
    assert result == "FAILED" and "sum" in message and "total" in message


def test_only_runs_the_selected_tasks(project, acts):
    project.job("job", [task(project, "a"), task(project, "b", "a"), task(project, "c", "b")])
    run(project, only=["b+"])
    assert acts["ran"] == ["b", "c"]
    with pytest.raises(MlopsError, match="no task 'bb'"): run(project, only=["bb"])


def test_repair_runs_failed_tasks_and_those_after_them_with_the_earlier_values(project, acts):
    project.job("job", [task(project, "a"), task(project, "b", "a"), task(project, "c", "b")])
    acts["a"], acts["b"] = sets_values(x=1), fails
    job_run, result = run(project)
    assert result == "FAILED"
    acts["b"] = lambda step: Outcome("SUCCESS" if step.run.record.values("a") == {"x": 1} else "FAILED")
    repaired = runner.reopen(project.home(), job_run.run_id)
    assert runner.finish_run(repaired) == "SUCCESS" and acts["ran"] == ["a", "b", "b", "c"]
    row = run_store.get_run(repaired.home.store, job_run.run_id)
    assert (row["result_state"], row["repair_count"]) == ("SUCCESS", 1)
    with pytest.raises(MlopsError, match="succeeded: nothing to repair"): runner.reopen(project.home(), job_run.run_id)


def test_repair_continues_the_called_job(project, acts):
    project.job("child", [task(project, "first"), task(project, "second", "first")])
    project.job("job", [{"task_key": "call", "run_job_task": {"job_id": "${resources.jobs.child.id}"}}])
    acts["second"] = fails
    job_run, _ = run(project)
    del acts["second"]
    assert runner.finish_run(runner.reopen(project.home(), job_run.run_id)) == "SUCCESS"
    assert acts["ran"] == ["first", "second", "second"]
    assert len(run_store.list_runs(job_run.home.store, "child")) == 1


def test_a_second_run_waits_for_the_first_or_is_skipped(project, acts):
    running, free = threading.Event(), threading.Event()
    acts["a"] = lambda step: running.set() or free.wait(20) and Outcome("SUCCESS")
    project.job("job", [task(project, "a")])
    project.job("impatient", [task(project, "a")], queue={"enabled": False})
    for key, expected in (("job", "SUCCESS"), ("impatient", "MAXIMUM_CONCURRENT_RUNS_REACHED")):
        running.clear(), free.clear()
        first, second = (runner.begin_run(project.home(), key, {}) for _ in range(2))
        results = {}
        def finish(name, job_run, results): results[name] = runner.finish_run(job_run)
        threads = [threading.Thread(target=finish, args=("first", first, results)),
                   threading.Thread(target=finish, args=("second", second, results))]
        threads[0].start(); assert running.wait(10)
        threads[1].start(); time.sleep(0.3)
        assert acts["ran"].count("a") == (1 if key == "job" else 3)  # the second has not begun
        free.set()
        for thread in threads: thread.join(20)
        assert results == {"first": "SUCCESS", "second": expected}


def test_a_job_is_stopped_at_its_timeout(project, acts):
    project.job("job", [task(project, "a"), task(project, "b", "a")], timeout_seconds=1)
    def wait_for_stop(step):
        while not step.run.stop_signal.reason: time.sleep(0.05)
        return Outcome("CANCELED")
    acts["a"] = wait_for_stop
    job_run, result = run(project)
    assert result == "TIMEDOUT" and job_run.record.states == {"a": "CANCELED", "b": "CANCELED"}


def test_an_unsupported_task_type_is_refused_before_anything_starts(project, acts):
    project.job("child", [{"task_key": "query", "sql_task": {"warehouse_id": "w", "query": {"query_id": "q"}}}])
    project.job("job", [task(project, "a"),
                        {"task_key": "call", "run_job_task": {"job_id": "${resources.jobs.child.id}"}}])
    message = "task 'query' of job 'child' is a sql_task, which cannot run on this machine"
    with pytest.raises(MlopsError, match=message): run(project)
    assert run_store.list_runs(project.home().store) == [] and acts["ran"] == []


def test_a_misspelt_parameter_leaves_no_run(project, acts):
    project.job("job", [task(project, "a")], parameters=[{"name": "as_of", "default": "latest"}])
    with pytest.raises(MlopsError, match="no parameter 'asof' in job 'job'\n  did you mean 'as_of'"):
        run(project, given={"asof": "1"})
    assert run_store.list_runs(project.home().store) == []


@pytest.fixture
def receiver():
    "A webhook that keeps the bodies of the requests."
    bodies = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200); self.end_headers()

        def log_message(self, *_): pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.bodies = bodies
    yield server
    server.shutdown(); server.server_close()


def test_notifications_are_sent_and_a_dead_receiver_fails_nothing(project, acts, receiver, monkeypatch):
    monkeypatch.delenv("MLOPS_SMTP", raising=False)
    state = project.root / ".mlops"
    state.mkdir(exist_ok=True)
    (state / "destinations.json").write_text(json.dumps({
        "chat": {"url": f"http://127.0.0.1:{receiver.server_port}/hook"}, "dead": {"url": "http://127.0.0.1:9/"}}))
    project.job("job", [task(project, "a"), task(project, "b", webhook_notifications={"on_failure": [{"id": "chat"}]})],
                webhook_notifications={"on_start": [{"id": "chat"}, {"id": "dead"}], "on_failure": [{"id": "chat"}]},
                email_notifications={"on_failure": ["team@example.org"]})
    acts["b"] = fails
    job_run, result = run(project)
    assert result == "FAILED" and job_run.record.states["a"] == "SUCCESS"
    events = [(body["event_type"], body.get("task", {}).get("task_key")) for body in receiver.bodies]
    assert sorted(events, key=str) == [("jobs.on_failure", "b"), ("jobs.on_failure", None), ("jobs.on_start", None)]
    deliveries = {(delivery["destination"], delivery["event"]): delivery["ok"]
                  for delivery in job_run.home.store.rows("select * from deliveries")}
    assert deliveries["dead", "on_start"] == 0 and deliveries["chat", "on_failure"] == 1
    assert ("team@example.org", "on_failure") in deliveries


@pytest.mark.parametrize("nested", [False, True])
def test_a_task_key_that_is_a_path_is_refused_before_anything_is_written(project, acts, nested):
    invalid = task(project, "../../../outside/a")
    job = [{"task_key": "each", "for_each_task": {"inputs": "[1]", "task": invalid}}] if nested else [invalid]
    project.job("job", job)
    with pytest.raises(MlopsError, match="'../../../outside/a' of job 'job' is not a valid task_key"): run(project)
    assert acts["ran"] == [] and run_store.list_runs(project.home().store) == []


@settings(max_examples=100)
@given(st.lists(st.sampled_from(["..", ".", "a", "", "/", "b[3]"]), max_size=6).map("/".join) | st.text(max_size=8),
       st.integers(0, 3))
def test_no_key_leads_out_of_the_folder_of_its_run(tmp_path_factory, key, attempt):
    "The oracle is the path that the system itself would open."
    run_folder = tmp_path_factory.getbasetemp() / "link to state" / "runs" / "1"
    if not run_folder.exists():
        (tmp_path_factory.getbasetemp() / "state").mkdir(exist_ok=True)
        run_folder.parents[1].symlink_to(tmp_path_factory.getbasetemp() / "state")
        run_folder.mkdir(parents=True)
    try: folder = run_store.folder_of_attempt(run_folder, key, attempt)
    except (MlopsError, ValueError): return  # ValueError of the system for a null character
    assert Path(os.path.realpath(folder)).parents[1] == run_folder.resolve()


def test_valid_keys_have_a_folder(tmp_path):
    for key in ("train", "a-b_1", "each[12]", "x" * 100):
        assert run_store.folder_of_attempt(tmp_path, key, 2) == tmp_path / key / "2"


def test_retries_belong_to_the_inner_task_of_a_loop(project, acts):
    inner = task(project, "airport", max_retries=2)
    project.job("job", [{"task_key": "each", "for_each_task": {"inputs": '["EWR", "JFK"]', "task": inner}}])
    acts["airport"] = lambda step: Outcome("FAILED" if step.input == "JFK" and step.attempt < 2 else "SUCCESS")
    job_run, result = run(project)
    assert result == "SUCCESS" and acts["ran"] == ["each[0]", "each[1]", "each[1]", "each[1]"]
    attempts = [(row["task_key"], row["attempt_number"], row["result_state"])
                for row in run_store.list_tasks(job_run.home.store, job_run.run_id)]
    assert sorted(attempts) == [("each", 0, "SUCCESS"), ("each[0]", 0, "SUCCESS"), ("each[1]", 0, "FAILED"),
                                ("each[1]", 1, "FAILED"), ("each[1]", 2, "SUCCESS")]


def test_a_repair_of_a_loop_counts_its_attempts_on(project, acts):
    inner = task(project, "airport", max_retries=1)
    project.job("job", [{"task_key": "each", "for_each_task": {"inputs": '["JFK"]', "task": inner}}])
    acts["airport"] = fails
    job_run, _ = run(project)
    acts["airport"] = lambda step: Outcome("SUCCESS")
    assert runner.finish_run(runner.reopen(project.home(), job_run.run_id)) == "SUCCESS"
    rows = run_store.list_tasks(job_run.home.store, job_run.run_id)
    inner_attempts = {row["attempt_number"]: row["result_state"] for row in rows if row["task_key"] == "each[0]"}
    assert inner_attempts == {0: "FAILED", 1: "FAILED", 2: "SUCCESS"}


def test_a_job_without_slots_skips_its_runs(project, acts):
    project.job("job", [task(project, "a")], max_concurrent_runs=0)
    job_run, result = run(project)
    row = job_run.record.row
    assert result == row["result_state"] == "MAXIMUM_CONCURRENT_RUNS_REACHED" and acts["ran"] == []
    assert row["life_cycle_state"] == "SKIPPED" and row["state_message"] == "max_concurrent_runs of the job is 0"


def test_empty_and_unknown_fields_change_nothing(project, acts):
    project.job("job", [task(project, "a", max_retries=None, condition_task=None, retry_task=1, max_retrys=3)],
                max_concurrent_runs=None, queue=None, parameters=None)
    acts["a"] = fails
    _, result = run(project)
    assert result == "FAILED" and acts["ran"] == ["a"]


def test_an_unexpected_error_of_the_runner_ends_the_run(project, acts, monkeypatch):
    project.job("job", [task(project, "a"), task(project, "b", "a")])
    def broken(run, task): raise RuntimeError("disk full")
    monkeypatch.setattr(runner, "run_task", broken)
    job_run, result = run(project)
    assert result == "FAILED" and job_run.record.states == {"a": "FAILED", "b": "UPSTREAM_FAILED"}


def test_a_stop_ends_the_wait_before_a_retry(project, acts):
    project.job("job", [task(project, "a", max_retries=3, min_retry_interval_millis=600_000)])
    def fails_and_stops(step):
        threading.Timer(0.3, step.run.stop_signal.stop, ["CANCELED"]).start()
        return Outcome("FAILED")
    acts["a"] = fails_and_stops
    start = time.monotonic()
    _, result = run(project)
    assert result == "CANCELED" and time.monotonic() - start < 60


@pytest.mark.parametrize("lost, message", [(".mlops", "the state folder {} was removed"),
                                           (".mlops/runs.db", "the run store {} was removed")])
@pytest.mark.parametrize("in_called_job", [False, True])
def test_a_state_that_is_removed_ends_the_run_with_a_sentence(project, acts, lost, message, in_called_job):
    path = project.root / lost

    def removes(step):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        return Outcome("SUCCESS")

    acts["a"] = removes
    project.job("job", [task(project, "a"), task(project, "b", "a")])
    calls = {"task_key": "calls", "run_job_task": {"job_id": "${resources.jobs.job.id}"}}
    project.job("outer", [calls])
    with pytest.raises(StoreError) as caught: run(project, "outer" if in_called_job else "job")
    begin = f"run 1 of job {'outer' if in_called_job else 'job'!r} ended: "
    assert caught.value.message == begin + message.format(path) + " while it was in use"
    assert acts["ran"] == ["a"] and not (project.root / ".mlops/runs.db").exists()


def test_a_run_without_its_store_stops_what_runs_beside(project, acts):
    def waits(step):
        while not step.run.stop_signal.reason: time.sleep(0.01)
        return Outcome(step.run.stop_signal.reason)

    def replaces(step):
        (project.root / ".mlops/runs.db").unlink()
        run_store.record_run(run_store.RunStore(project.root / ".mlops/runs.db"), "of another process", "dev", {})
        return Outcome("SUCCESS")

    acts["long"], acts["short"] = waits, replaces
    project.job("job", [task(project, "long"), task(project, "short")])
    with pytest.raises(StoreError, match="runs.db was replaced by another file"): run(project)
    rows = run_store.RunStore(project.root / ".mlops/runs.db").rows("select job, life_cycle_state from runs")
    assert rows == [{"job": "of another process", "life_cycle_state": "QUEUED"}]
