"""What a job may hold: against databricks-sdk, imported."""

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
    found, ahead = set(), [start]
    while ahead:
        kind = ahead.pop()
        ahead += typing.get_args(kind)
        if not isinstance(kind, type) or kind in found or not kind.__module__.startswith("databricks."):
            continue
        found.add(kind)
        if dataclasses.is_dataclass(kind):
            ahead += typing.get_type_hints(kind).values()
    return found


def evaluated(annotation: str, module: str) -> object:
    """The annotation as Python understands it in its module."""
    return eval(annotation, {**vars(typing), **vars(MODULES[module])})


def test_what_is_read_is_what_an_import_says():
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
    ("job", "found"),
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
                (".tasks[0].notebook_task", "notebook_path is missing", "NotebookTask needs notebook_path"),
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
                (".tasks[0].libraries[0].pypi", "package is missing", "PythonPyPiLibrary needs package"),
                (
                    ".tasks[0].libraries[0].pypi.pakage",
                    "no field 'pakage' in PythonPyPiLibrary",
                    "did you mean 'package'?",
                ),
            ],
        ),
        (
            {"schedule": {"quartz_cron_expression": "x", "timezone_id": "UTC", "pause_status": "paused"}},
            [(".schedule.pause_status", "'paused' is no PauseStatus", "there are: PAUSED, UNPAUSED")],
        ),
        (
            {"tasks": [TASK | {"run_if": "ALL_SUCESS"}]},
            [(".tasks[0].run_if", "'ALL_SUCESS' is no RunIf", "did you mean 'ALL_SUCCESS'?")],
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
            [(".timeout_seconds", "'60' stands where a whole number belongs", "take the quotes away")],
        ),
        ({"timeout_seconds": True}, [(".timeout_seconds", "True stands where a whole number belongs", "")]),
        ({"timeout_seconds": 1.5}, [(".timeout_seconds", "1.5 stands where a whole number belongs", "")]),
        (
            {"queue": {"enabled": "yes"}},
            [(".queue.enabled", "'yes' stands where true or false belongs", "take the quotes away")],
        ),
        ({"queue": True}, [(".queue", "True stands where a map belongs", "with enabled")]),
        ({"tasks": {"a": {}}}, [(".tasks", "{'a': {}} stands where a list belongs", "")]),
        ({"tags": ["a"]}, [(".tags", "['a'] stands where a map belongs", "")]),
        ({"tags": {"a": ["b"]}}, [(".tags.a", "['b'] stands where text belongs", "")]),
        ({"name": 5, "tags": {"a": 1}, "description": None}, []),
        (
            {"parameters": [{"name": "a"}]},
            [(".parameters[0]", "default is missing", "JobParameterDefinition needs name, default")],
        ),
    ],
)
def test_misfits_are_named_with_the_nearest(job, found):
    said = list(schema_findings(job, "JobSettings"))
    assert [(key, message) for key, message, _ in said] == [(key, message) for key, message, _ in found]
    for (_, _, hint), (_, _, expected) in zip(said, found, strict=True):
        assert hint.startswith(expected)


def test_few_names_are_listed_many_are_not():
    assert nearest("PAUSD", ["PAUSED", "UNPAUSED"]) == "did you mean 'PAUSED'? there are: PAUSED, UNPAUSED"
    assert nearest("nmae", shape("jobs", "JobSettings").fields) == "did you mean 'name'?"


def test_what_the_sdk_does_not_have_is_an_error():
    with pytest.raises(MlopsError, match="databricks-sdk has no jobs.Jbo"):
        shape("jobs", "Jbo")
    with pytest.raises(MlopsError, match="databricks-sdk has no service 'jbos'"):
        shape("jbos", "Job")
