"""A run killed while it is recorded: the store holds no run or a complete one, and a repair runs all its tasks."""
import json
import subprocess
import sys
from pathlib import Path

import pytest

WRITES = 14  # of the table of runs: 3 to record a run, 2 to take its slot, 2 to close it; a parent and its child
FIRST = pytest.param(1, 3, id="recording")  # of the parent
ALL = pytest.param(1, WRITES, id="all", marks=pytest.mark.slow)


def condition(key, *after):
    return {"task_key": key, "condition_task": {"left": "1", "op": "EQUAL_TO", "right": "1"},
            "depends_on": [{"task_key": key_before} for key_before in after]}


def killed_runs(project, first, last):
    "What the store holds after each kill."
    call = {"job_id": "${resources.jobs.child.id}", "job_parameters": {"caller": "{{job.parameters.stamp}}"}}
    project.job("child", [condition("one"), condition("two", "one")], parameters=[{"name": "caller", "default": ""}])
    project.job("parent", [{"task_key": "call", "run_job_task": call}, condition("last", "call")],
                parameters=[{"name": "stamp", "default": ""}])
    command = [sys.executable, Path(__file__).parent / "killed_runs.py", project.root, str(first), str(last)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0 and result.stderr == "", result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.mark.parametrize("first, last", [FIRST, ALL])
def test_a_killed_run_is_recorded_completely_or_not_at_all(project, first, last):
    complete = {"parent": ('["call", "last"]', {"stamp": "1"}, None), "child": ('["one", "two"]', {"caller": "1"}, 1)}
    results = {"parent": {"call": "SUCCESS", "last": "SUCCESS"}, "child": {"one": "SUCCESS", "two": "SUCCESS"}}
    kills = killed_runs(project, first, last)
    assert [kill["write"] for kill in kills] == [[n, m] for n in range(first, last + 1) for m in ("before", "after")]
    for kill in kills:
        assert kill["is_killed"], kill["write"]
        jobs = [row["job"] for row in kill["killed"]]
        assert jobs in ([], ["parent"], ["parent", "child"]), kill
        for row in kill["killed"]:
            assert (row["tasks"], json.loads(row["parameters"]), row["parent_run_id"]) == complete[row["job"]], kill
        repaired = {row["job"]: row for row in kill["repaired"]}
        assert len(kill["repaired"]) == (2 if jobs else 0), kill  # the child is continued, not started again
        for job, row in repaired.items():
            assert (row["result_state"], row["results"]) == ("SUCCESS", results[job]), kill
    assert [bool(kill["killed"]) for kill in kills[:6]] == [False] * 5 + [True]  # only the commit records the run
