"""The schema of a job, compared with the imported classes of databricks-sdk."""

import dataclasses
import enum
import typing

import pytest
from databricks.sdk.service import compute, jobs, sql
from hypothesis import given, settings
from hypothesis import strategies as st

from mlops_nb.bundle.load import load_bundle
from mlops_nb.bundle.schema import LARGEST, PATTERNS, RANGES, WARNING, nearest, schema_findings, shape
from mlops_nb.errors import MlopsError

MODULES = {"jobs": jobs, "compute": compute}


def classes_below(start: type) -> set[type]:
    """Every class of the SDK that a value of the first can hold."""
    classes, open_types = set(), [start]
    while open_types:
        kind = open_types.pop()
        open_types += typing.get_args(kind)
        if not isinstance(kind, type) or kind in classes or not kind.__module__.startswith("databricks."):
            continue
        classes.add(kind)
        if dataclasses.is_dataclass(kind):
            open_types += typing.get_type_hints(kind).values()
    return classes


def evaluated(annotation: str, module: str) -> object:
    """Returns the type of an annotation of a module."""
    return eval(annotation, {**vars(typing), **vars(MODULES[module])})


def test_the_classes_read_from_source_equal_the_imported_ones():
    below = classes_below(jobs.JobSettings)
    assert len(below) > 80
    for kind in below:
        module = kind.__module__.rsplit(".", 1)[1]
        read = shape(module, kind.__name__)
        if issubclass(kind, enum.Enum):
            assert read.values == tuple(member.value for member in kind) and not read.fields
        else:
            fields, hints = dataclasses.fields(kind), typing.get_type_hints(kind)
            assert read.required == tuple(field.name for field in fields if field.default is dataclasses.MISSING)
            assert {name: evaluated(text, module) for name, text in read.fields.items()} == hints and not read.values


def test_our_own_jobs_come_back_from_the_sdk_as_they_went_in():
    for target in ("dev", "prod"):
        for job in load_bundle(target=target).jobs.values():
            assert not list(schema_findings(job, "JobSettings"))
            filled = {
                name: value for name, value in job.items() if not name.endswith("_notifications")
            }  # as_dict drops []
            filled["tasks"] = [{name: task[name] for name in task if name != "libraries"} for task in job["tasks"]]
            assert jobs.JobSettings.from_dict(filled).as_dict() == filled


TASK = {"task_key": "a", "notebook_task": {"notebook_path": "a.ipynb", "base_parameters": {"x": "1"}}}
CLUSTER = {"job_cluster_key": "c", "new_cluster": {"spark_version": "17.3.x-scala2.13", "num_workers": 1}}


@pytest.mark.parametrize(
    ("job", "expected"),
    [
        ({"tasks": [TASK], "job_clusters": [CLUSTER]}, []),
        ({"nmae": "a"}, [(".nmae", "no field 'nmae' in JobSettings; it is ignored", "did you mean 'name'?")]),
        (
            {"tasks": [TASK | {"notebok_task": {}}]},
            [
                (
                    ".tasks[0].notebok_task",
                    "no field 'notebok_task' in Task; it is ignored",
                    "did you mean 'notebook_task'?",
                )
            ],
        ),
        (
            {"tasks": [{"task_key": "a", "notebook_task": {"notebook_paht": "x"}}]},
            [
                (".tasks[0].notebook_task", "missing field 'notebook_path'", "NotebookTask requires notebook_path"),
                (
                    ".tasks[0].notebook_task.notebook_paht",
                    "no field 'notebook_paht' in NotebookTask; it is ignored",
                    "did you mean 'notebook_path'?",
                ),
            ],
        ),
        (
            {"job_clusters": [CLUSTER | {"new_cluster": {"num_wrokers": 1}}]},
            [
                (
                    ".job_clusters[0].new_cluster.num_wrokers",
                    "no field 'num_wrokers' in ClusterSpec; it is ignored",
                    "did you mean 'num_workers'?",
                )
            ],
        ),
        (
            {"tasks": [TASK | {"libraries": [{"pypi": {"pakage": "x"}}]}]},
            [
                (".tasks[0].libraries[0].pypi", "missing field 'package'", "PythonPyPiLibrary requires package"),
                (
                    ".tasks[0].libraries[0].pypi.pakage",
                    "no field 'pakage' in PythonPyPiLibrary; it is ignored",
                    "did you mean 'package'?",
                ),
            ],
        ),
        (
            {"schedule": {"quartz_cron_expression": "x", "timezone_id": "UTC", "pause_status": "paused"}},
            [(".schedule.pause_status", "'paused' is not a valid PauseStatus", "there are: PAUSED, UNPAUSED")],
        ),
        (
            {"tasks": [TASK | {"run_if": "ALL_SUCESS"}]},
            [(".tasks[0].run_if", "'ALL_SUCESS' is not a valid RunIf", "did you mean 'ALL_SUCCESS'?")],
        ),
        (
            {"tasks": [{"task_key": "a", "for_each_task": {"inputs": "[1]", "task": TASK | {"max_retrys": 1}}}]},
            [
                (
                    ".tasks[0].for_each_task.task.max_retrys",
                    "no field 'max_retrys' in Task; it is ignored",
                    "did you mean 'max_retries'?",
                )
            ],
        ),
        (
            {"timeout_seconds": "60"},
            [(".timeout_seconds", "expected a whole number, got '60'", "remove the quotes")],
        ),
        ({"timeout_seconds": True}, [(".timeout_seconds", "expected a whole number, got true", "")]),
        ({"timeout_seconds": 1.5}, [(".timeout_seconds", "expected a whole number, got 1.5", "")]),
        (
            {"queue": {"enabled": "true"}},
            [(".queue.enabled", "expected true or false, got 'true'", "remove the quotes")],
        ),
        ({"queue": {"enabled": "yes"}}, [(".queue.enabled", "expected true or false, got 'yes'", "")]),
        ({"queue": True}, [(".queue", "expected a map, got true", "its fields are enabled")]),
        ({"tasks": {"a": {}}}, [(".tasks", 'expected a list, got {"a": {}}', "")]),
        ({"tags": ["a"]}, [(".tags", 'expected a map, got ["a"]', "")]),
        ({"tags": {"a": ["b"]}}, [(".tags.a", 'expected a string, got ["b"]', "")]),
        ({"name": 5, "tags": {"a": 1}, "description": None}, []),
        (
            {"parameters": [{"name": "a"}]},
            [(".parameters[0]", "missing field 'default'", "JobParameterDefinition requires name, default")],
        ),
    ],
)
def test_findings_suggest_the_most_similar_name(job, expected):
    findings = list(schema_findings(job, "JobSettings"))
    assert [(key, message) for key, message, *_ in findings] == [(key, message) for key, message, _ in expected]
    for (_, message, hint, *warning), (_, _, expected_hint) in zip(findings, expected, strict=True):
        assert hint.startswith(expected_hint) and bool(hint) == bool(expected_hint)
        assert warning == ([WARNING] if "ignored" in message else [])


def test_few_names_are_listed_many_are_not():
    assert nearest("PAUSD", ["PAUSED", "UNPAUSED"]) == "did you mean 'PAUSED'? there are: PAUSED, UNPAUSED"
    assert nearest("nmae", shape("jobs", "JobSettings").fields) == "did you mean 'name'?"


def test_what_the_sdk_does_not_have_is_an_error():
    with pytest.raises(MlopsError, match="databricks-sdk has no class jobs.Jbo"):
        shape("jobs", "Jbo")
    with pytest.raises(MlopsError, match="databricks-sdk has no service 'jbos'"):
        shape("jbos", "Job")


def number_fields() -> list[tuple[str, str, str]]:
    """Module, class and field of each number that a job can contain, as the imported classes of the SDK say."""
    fields = []
    for kind in classes_below(jobs.JobSettings):
        if not dataclasses.is_dataclass(kind): continue
        for name, hint in typing.get_type_hints(kind).items():
            if {int, float} & {hint, *typing.get_args(hint)}:
                fields.append((kind.__module__.rsplit(".", 1)[1], kind.__name__, name))
    return sorted(fields)


def messages(module: str, kind: str, field: str, value: object) -> list[str]:
    return [message for key, message, *_ in schema_findings({field: value}, kind, module) if key == f".{field}"]


@pytest.mark.parametrize(("module", "kind", "field"), number_fields())
def test_every_number_has_a_range(module, kind, field):
    lowest, highest = RANGES.get((kind, field), (0, LARGEST))
    for value in (lowest, highest):
        assert messages(module, kind, field, value) == []
    for value in (lowest - 1, highest + 1, -(10**30), 10**30):
        assert messages(module, kind, field, value) == [f"{value!r} is not a valid {field}"]


def test_the_ranges_and_patterns_name_fields_of_the_sdk():
    """The numbers are those of the SDK's descriptions and of the public reference of the Jobs API."""
    known = {(kind, field) for _, kind, field in number_fields()}
    assert "double_value" in typing.get_type_hints(sql.AlertV2OperandValue)
    assert RANGES.keys() <= known | {("AlertV2OperandValue", "double_value")}
    for kind, field in PATTERNS:
        assert field in typing.get_type_hints(getattr(jobs, kind))
    assert RANGES["ForEachTask", "concurrency"] == (1, 100) and RANGES["Task", "max_retries"][0] == -1
    assert RANGES["JobSettings", "max_concurrent_runs"] == (0, 1000) and ("Task", "timeout_seconds") not in RANGES
    assert RANGES["FileArrivalTriggerConfiguration", "wait_after_last_change_seconds"][0] == 60


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_number_is_finite(value):
    assert messages("compute", "AzureAttributes", "spot_bid_max_price", value)


@given(st.text(max_size=12) | st.from_regex(r"[A-Za-z0-9_-]{1,3}", fullmatch=True))
@settings(max_examples=100, deadline=None)
def test_a_task_key_has_only_the_characters_that_databricks_allows(text):
    allowed = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-")
    assert (messages("jobs", "Task", "task_key", text) == []) == (bool(text) and set(text) <= allowed)


@pytest.mark.parametrize("key", ["../a", "a/b", "..", "", "a b", "a.b", "é", "a\n", "x" * 101])
def test_keys_that_are_refused(key):
    nested = {"task_key": "l", "for_each_task": {"inputs": "[1]", "task": {"task_key": key}}}
    assert [path for path, *_ in schema_findings({"tasks": [TASK | {"task_key": key}, nested]}, "JobSettings")] == [
        ".tasks[0].task_key", ".tasks[1].for_each_task.task.task_key"]
    assert messages("jobs", "Task", "task_key", "x" * 100) == []
