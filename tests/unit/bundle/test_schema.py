"""The schema of a job, compared with the imported classes of databricks-sdk."""

import dataclasses
import enum
import typing

import pytest
from databricks.sdk.service import compute, jobs

from mlops_nb.bundle.load import load_bundle
from mlops_nb.bundle.schema import nearest, schema_findings, shape
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
            assert jobs.JobSettings.from_dict(filled).as_dict() == filled


TASK = {"task_key": "a", "notebook_task": {"notebook_path": "a.ipynb", "base_parameters": {"x": "1"}}}
CLUSTER = {"job_cluster_key": "c", "new_cluster": {"spark_version": "17.3.x-scala2.13", "num_workers": 1}}


@pytest.mark.parametrize(
    ("job", "expected"),
    [
        ({"tasks": [TASK], "job_clusters": [CLUSTER]}, []),
        ({"nmae": "a"}, [(".nmae", "no field 'nmae' in JobSettings", "did you mean 'name'?")]),
        (
            {"tasks": [TASK | {"notebok_task": {}}]},
            [(".tasks[0].notebok_task", "no field 'notebok_task' in Task", "did you mean 'notebook_task'?")],
        ),
        (
            {"tasks": [{"task_key": "a", "notebook_task": {"notebook_paht": "x"}}]},
            [
                (".tasks[0].notebook_task", "missing field 'notebook_path'", "NotebookTask requires notebook_path"),
                (
                    ".tasks[0].notebook_task.notebook_paht",
                    "no field 'notebook_paht' in NotebookTask",
                    "did you mean 'notebook_path'?",
                ),
            ],
        ),
        (
            {"job_clusters": [CLUSTER | {"new_cluster": {"num_wrokers": 1}}]},
            [
                (
                    ".job_clusters[0].new_cluster.num_wrokers",
                    "no field 'num_wrokers' in ClusterSpec",
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
                    "no field 'pakage' in PythonPyPiLibrary",
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
                    "no field 'max_retrys' in Task",
                    "did you mean 'max_retries'?",
                )
            ],
        ),
        (
            {"timeout_seconds": "60"},
            [(".timeout_seconds", "expected a whole number, got '60'", "remove the quotes")],
        ),
        ({"timeout_seconds": True}, [(".timeout_seconds", "expected a whole number, got True", "")]),
        ({"timeout_seconds": 1.5}, [(".timeout_seconds", "expected a whole number, got 1.5", "")]),
        (
            {"queue": {"enabled": "true"}},
            [(".queue.enabled", "expected true or false, got 'true'", "remove the quotes")],
        ),
        ({"queue": {"enabled": "yes"}}, [(".queue.enabled", "expected true or false, got 'yes'", "")]),
        ({"queue": True}, [(".queue", "expected a map, got True", "its fields are enabled")]),
        ({"tasks": {"a": {}}}, [(".tasks", "expected a list, got {'a': {}}", "")]),
        ({"tags": ["a"]}, [(".tags", "expected a map, got ['a']", "")]),
        ({"tags": {"a": ["b"]}}, [(".tags.a", "expected a string, got ['b']", "")]),
        ({"name": 5, "tags": {"a": 1}, "description": None}, []),
        (
            {"parameters": [{"name": "a"}]},
            [(".parameters[0]", "missing field 'default'", "JobParameterDefinition requires name, default")],
        ),
    ],
)
def test_findings_suggest_the_most_similar_name(job, expected):
    findings = list(schema_findings(job, "JobSettings"))
    assert [(key, message) for key, message, _ in findings] == [(key, message) for key, message, _ in expected]
    for (_, _, hint), (_, _, expected_hint) in zip(findings, expected, strict=True):
        assert hint.startswith(expected_hint) and bool(hint) == bool(expected_hint)


def test_few_names_are_listed_many_are_not():
    assert nearest("PAUSD", ["PAUSED", "UNPAUSED"]) == "did you mean 'PAUSED'? there are: PAUSED, UNPAUSED"
    assert nearest("nmae", shape("jobs", "JobSettings").fields) == "did you mean 'name'?"


def test_what_the_sdk_does_not_have_is_an_error():
    with pytest.raises(MlopsError, match="databricks-sdk has no class jobs.Jbo"):
        shape("jobs", "Jbo")
    with pytest.raises(MlopsError, match="databricks-sdk has no service 'jbos'"):
        shape("jbos", "Job")
