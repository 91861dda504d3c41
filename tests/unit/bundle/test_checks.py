"""What is wrong with a bundle, before it runs."""

import json
from pathlib import Path

import pytest

from mlops_nb.bundle.checks import Problem, check, check_job, check_jobs
from mlops_nb.bundle.load import job_id, load_bundle, target_names
from mlops_nb.bundle.parameters import Parameter, notebook_parameters, parameter_cell
from mlops_nb.errors import MlopsError

ROOT = Path(__file__).parents[3]
TRAIN = {"task_key": "train", "notebook_task": {"notebook_path": "train.ipynb"}}
SCORE = {"task_key": "score", "depends_on": [{"task_key": "train"}], "notebook_task": {"notebook_path": "score.ipynb"}}
IF = {"task_key": "if", "condition_task": {"left": "1", "op": "EQUAL_TO", "right": "1"}}
PARAMETERS = [{"name": "as_of", "default": "latest"}]
JOB = {"name": "job", "parameters": PARAMETERS, "tasks": [TRAIN, SCORE]}


def notebook(source: str, **more) -> str:
    cell = {"cell_type": "code", "metadata": {"tags": ["parameters"]}, "source": source.splitlines(keepends=True)}
    return json.dumps({"cells": [{"cell_type": "markdown", "metadata": {}, "source": "# A"}, cell | more]})


@pytest.fixture
def problems_of(tmp_path):
    """Checks a bundle with the job `job` and returns its problems: key path below the job, message, hint."""
    (tmp_path / "train.ipynb").write_text(notebook('as_of: str = "latest"  # the day\ndays: int = 28'))
    (tmp_path / "score.ipynb").write_text(notebook("rows = 10"))

    def find(job: dict | None = None, jobs: dict | None = None, **bundle) -> list[tuple[str, str, str]]:
        if jobs is None:
            jobs = {"job": JOB | (job or {})}
        tree = {"bundle": {"name": "example"}, "resources": {"jobs": jobs}} | bundle
        (tmp_path / "databricks.yml").write_text(json.dumps(tree, indent=1))
        return [(p.key.removeprefix("resources.jobs.job."), p.message, p.hint) for p in check(load_bundle(tmp_path))]

    find.root = tmp_path
    return find


def tasks(*changed: dict) -> dict:
    return {"tasks": list(changed)}


def one_task(task: dict = TRAIN, **more) -> dict:
    return tasks(task | more)


def test_a_job_that_is_right(problems_of):
    assert problems_of() == []
    assert (
        problems_of(
            {
                "permissions": [{"level": "CAN_VIEW", "group_name": "all"}],
                "max_concurrent_runs": 1,
                "tags": {"a": "b"},
                "schedule": {
                    "quartz_cron_expression": "0 0 6 ? * MON",
                    "timezone_id": "Europe/Berlin",
                    "pause_status": "PAUSED",
                },
                "environments": [{"environment_key": "e", "spec": {"environment_version": "4"}}],
                "parameters": [
                    *PARAMETERS,
                    {"name": "trigger_date", "default": "{{job.trigger.time.iso_date}}"},
                    {"name": "n", "default": "7"},
                ],
                "tasks": [
                    TRAIN | {"environment_key": "e", "max_retries": 2, "run_if": "ALL_DONE"},
                    IF | {"depends_on": [{"task_key": "train"}]},
                    SCORE | {"depends_on": [{"task_key": "if", "outcome": "true"}]},
                    {
                        "task_key": "each",
                        "depends_on": [{"task_key": "if", "outcome": "false"}],
                        "for_each_task": {
                            "inputs": "{{tasks.train.values.days}}",
                            "concurrency": 2,
                            "task": {
                                "task_key": "day",
                                "notebook_task": {
                                    "notebook_path": "train.ipynb",
                                    "base_parameters": {"days": "{{job.parameters.n}}", "as_of": "{{input.day}}"},
                                },
                            },
                        },
                    },
                ],
            }
        )
        == []
    )


SHAPE = [
    (
        one_task(notebok_task={}),
        [("tasks[0].notebok_task", "no field 'notebok_task' in Task; it is ignored", "did you mean 'notebook_task'?")],
    ),
    (one_task(run_if="NEVER"), [("tasks[0].run_if", "'NEVER' is not a valid RunIf", "there are: ALL_DONE")]),
    ({"timeout_seconds": "1h"}, [("timeout_seconds", "expected a whole number, got '1h'", "")]),
    ({"schedule": {"timezone_id": "UTC"}}, [("schedule", "missing field 'quartz_cron_expression'", "")]),
    ({"tasks": []}, [("resources.jobs.job", "the job has no tasks", "")]),
    ({"tasks": "train"}, [("tasks", "expected a list, got 'train'", "")]),
    (
        {"permissions": [{"level": "CAN_LOOK", "group_name": "a"}]},
        [("permissions[0]", "'CAN_LOOK' is not a valid permission level", "there are: CAN_MANAGE")],
    ),
    (
        {"permissions": [{"level": "CAN_VIEW"}]},
        [("permissions[0]", "a permission must have a level and one principal", "the principal is one of user_name")],
    ),
    (one_task({"task_key": "a"}), [("tasks[0]", "the task has no type", "add for example notebook_task")]),
    (
        one_task(condition_task=IF["condition_task"]),
        [("tasks[0]", "the task has several types: condition_task, notebook_task", "split it into one task")],
    ),
    (
        one_task(
            {
                "task_key": "a",
                "for_each_task": {
                    "inputs": "[1]",
                    "task": {"task_key": "b", "for_each_task": {"inputs": "[1]", "task": TRAIN}},
                },
            }
        ),
        [("tasks[0].for_each_task.task", "a for_each_task inside a for_each_task", "Databricks allows one level")],
    ),
]
EACH = {"task_key": "each", "for_each_task": {"inputs": "[1]", "task": TRAIN}}


def each(**changes) -> dict:
    """A job with a loop; the changes are those of its for_each_task."""
    return one_task(EACH | {"for_each_task": EACH["for_each_task"] | changes})


JSON_HINT = 'write a JSON array such as ["EWR", "JFK"], or a reference to one'
LIMITS = [
    (each(concurrency=0), [("tasks[0].for_each_task.concurrency", "0 is not a valid concurrency", "write a number")]),
    (one_task(max_retries=-2), [("tasks[0].max_retries", "-2 is not a valid max_retries", "write a number of")]),
    (
        one_task(min_retry_interval_millis=-1),
        [("tasks[0].min_retry_interval_millis", "-1 is not a valid min_retry_interval_millis", "write a number of")],
    ),
    ({"timeout_seconds": -1}, [("timeout_seconds", "-1 is not a valid timeout_seconds", "write a number of")]),
    (
        {"max_concurrent_runs": 1001},
        [("max_concurrent_runs", "1001 is not a valid max_concurrent_runs", "write a number from 0 to 1000")],
    ),
    ({"max_concurrent_runs": 0}, [("max_concurrent_runs", "0 skips every run of the job", "write 1 or more")]),
    (one_task(task_key="../a"), [("tasks[0].task_key", "'../a' is not a valid task_key", "use 1 to 100 letters")]),
    (
        each(task=TRAIN | {"task_key": "a b"}),
        [("tasks[0].for_each_task.task.task_key", "'a b' is not a valid task_key", "use 1 to 100 letters")],
    ),
    (one_task(EACH, max_retries=3), [("tasks[0].max_retries", "a for_each_task cannot have max_retries", "set it")]),
    (
        one_task(EACH, retry_on_timeout=True),
        [("tasks[0].retry_on_timeout", "a for_each_task cannot have retry_on_timeout", "set it on the task inside")],
    ),
    (
        each(inputs="EWR, JFK"),
        [
            (
                "tasks[0].for_each_task.inputs",
                "inputs 'EWR, JFK' are not valid JSON: Expecting value: line 1 column 1 (char 0)",
                JSON_HINT,
            )
        ],
    ),
    (each(inputs='{"a": 1}'), [("tasks[0].for_each_task.inputs", 'inputs must be a list, got {"a": 1}', JSON_HINT)]),
    (each(inputs=5), [("tasks[0].for_each_task.inputs", "inputs must be a list, got 5", JSON_HINT)]),
    (each(inputs="[{{job.run_id}}]"), []),
    (each(task=TRAIN | {"max_retries": 3}), []),
]
KEYS = [
    (tasks(TRAIN, TRAIN, SCORE), [("tasks[1]", "duplicate task_key 'train'", "remove one")]),
    ({"parameters": PARAMETERS * 2}, [("parameters[1]", "duplicate name 'as_of'", "remove one")]),
    (
        {"environments": [{"environment_key": "e"}] * 2},
        [("environments[1]", "duplicate environment_key 'e'", "remove one")],
    ),
    (
        one_task(environment_key="gpu") | {"environments": [{"environment_key": "cpu"}]},
        [("tasks[0].environment_key", "no environment_key 'gpu' in environments of the job", "did you mean 'cpu'?")],
    ),
    (
        one_task(job_cluster_key="big"),
        [("tasks[0].job_cluster_key", "no job_cluster_key 'big' in job_clusters of the job", "there are none")],
    ),
]
ORDER = [
    (
        tasks(TRAIN, SCORE | {"depends_on": [{"task_key": "trian"}]}),
        [("tasks[1].depends_on[0].task_key", "no task 'trian'", "did you mean 'train'?")],
    ),
    (
        tasks(TRAIN | {"depends_on": [{"task_key": "score"}]}, SCORE),
        [("tasks", "circular dependencies: ", "remove one depends_on")],
    ),
    (one_task(depends_on=[{"task_key": "train"}]), [("tasks", "circular dependencies: train -> train", "remove one")]),
    (
        tasks(TRAIN, SCORE | {"depends_on": [{"task_key": "train", "outcome": "true"}]}),
        [("tasks[1].depends_on[0].outcome", "task 'train' has no outcome", "only a condition_task has")],
    ),
    (
        tasks(IF, TRAIN | {"depends_on": [{"task_key": "if", "outcome": "yes"}]}),
        [("tasks[1].depends_on[0].outcome", "'yes' is not a valid outcome", 'write "true"')],
    ),
]
NOTEBOOKS = [
    (
        one_task({"task_key": "a", "notebook_task": {"notebook_path": "trian.ipynb"}}),
        [("tasks[0].notebook_task.notebook_path", "no notebook 'trian.ipynb'", "did you mean 'train.ipynb'?")],
    ),
    (
        one_task({"task_key": "a", "notebook_task": {"notebook_path": "nbs/a.ipynb"}}),
        [("tasks[0].notebook_task.notebook_path", "no notebook 'nbs/a.ipynb'", "there are none")],
    ),
    (
        one_task({"task_key": "a", "notebook_task": {"notebook_path": "/Workspace/a"}}),
        [("tasks[0].notebook_task.notebook_path", "/Workspace/a is a workspace path", "")],
    ),
    (
        one_task({"task_key": "a", "notebook_task": {"notebook_path": "../a.ipynb"}}),
        [("tasks[0].notebook_task.notebook_path", "../a.ipynb is outside of the bundle", "move the notebook below")],
    ),
    *(
        (
            one_task({"task_key": "a", "notebook_task": {"notebook_path": path}}),
            [("tasks[0].notebook_task.notebook_path", "no notebook '", "")],
        )
        for path in ("x" * 400, "x" * 400 + "/a.ipynb", "a\0.ipynb")
    ),
    (
        one_task({"task_key": "a", "notebook_task": {"notebook_path": "broken.ipynb"}}),
        [("tasks[0].notebook_task.notebook_path", "cannot read broken.ipynb as a notebook", "a notebook is a JSON")],
    ),
    (
        one_task(
            {
                "task_key": "a",
                "for_each_task": {
                    "inputs": "[1]",
                    "task": {"task_key": "b", "notebook_task": {"notebook_path": "gone.ipynb"}},
                },
            }
        ),
        [("tasks[0].for_each_task.task.notebook_task.notebook_path", "no notebook 'gone.ipynb'", "")],
    ),
]
SCHEDULES = [
    (
        {"schedule": {"quartz_cron_expression": "30 5 * * *", "timezone_id": "UTC"}},
        [("schedule.quartz_cron_expression", "'30 5 * * *' has 5 fields", "write second")],
    ),
    (
        {"schedule": {"quartz_cron_expression": "0 30 5 * * *", "timezone_id": "UTC"}},
        [
            (
                "schedule.quartz_cron_expression",
                "'0 30 5 * * *': exactly one of day-of-month and day-of-week must be ?",
                "for example",
            )
        ],
    ),
    (
        {"schedule": {"quartz_cron_expression": "0 61 5 * * ?", "timezone_id": "UTC"}},
        [("schedule.quartz_cron_expression", "'0 61 5 * * ?': '61' is not a valid minute", "allowed are 0 to 59")],
    ),
    (
        {"schedule": {"quartz_cron_expression": "0 0 5 31 4 ?", "timezone_id": "UTC"}},
        [("schedule.quartz_cron_expression", "'0 0 5 31 4 ?' never fires", "")],
    ),
    (
        {"schedule": {"quartz_cron_expression": "0 0 5 * * ?", "timezone_id": "Europe/Berln"}},
        [("schedule.timezone_id", "no time zone 'Europe/Berln'", "did you mean 'Europe/Berlin'?")],
    ),
]


def base(**parameters):
    return one_task({"task_key": "a", "notebook_task": {"notebook_path": "train.ipynb", "base_parameters": parameters}})


INPUTS = [
    (
        base(as_off="x"),
        [
            (
                "tasks[0].notebook_task.base_parameters.as_off",
                "train.ipynb declares no parameter 'as_off'",
                "did you mean 'as_of'?",
            )
        ],
    ),
    (
        base(days="many"),
        [
            (
                "tasks[0].notebook_task.base_parameters.days",
                "parameter 'days' must be int, got 'many'",
                "write a whole number",
            )
        ],
    ),
    (
        {"parameters": [*PARAMETERS, {"name": "asof", "default": ""}]},
        [("parameters[1]", "no notebook of the job declares parameter 'asof'", "did you mean 'as_of'?")],
    ),
    (
        {"parameters": [*PARAMETERS, {"name": "rows", "default": "ten"}]},
        [("parameters[1].default", "parameter 'rows' must be int, got 'ten'", "write a whole")],
    ),
    (
        one_task() | {"parameters": [{"name": "rows", "default": "1"}]},
        [("parameters[0]", "no notebook of the job declares parameter 'rows'", "there are: as_of, days")],
    ),
    (
        base(days="{{job.parameters.dyas}}") | {"parameters": [{"name": "n", "default": "1"}]},
        [
            (
                "tasks[0].notebook_task.base_parameters.days",
                "{{job.parameters.dyas}}: no 'dyas' in job.parameters",
                "there is only n",
            ),
            ("parameters[0]", "no notebook of the job declares parameter 'n'", ""),
        ],
    ),
    (
        base(as_of="{{tasks.tran.values.x}}"),
        [("tasks[0].notebook_task.base_parameters.as_of", "{{tasks.tran.values.x}}: no task 'tran'", "")],
    ),
    (
        tasks(TRAIN, base(as_of="{{tasks.train.values.x}}")["tasks"][0]),
        [
            (
                "tasks[1].notebook_task.base_parameters.as_of",
                "{{tasks.train.values.x}}: task 'train' does not run before this task",
                "add it to depends_on",
            )
        ],
    ),
    (
        base(as_of="{{tasks.a.values.x}}"),
        [
            (
                "tasks[0].notebook_task.base_parameters.as_of",
                "{{tasks.a.values.x}}: task 'a' does not run before",
                "",
            )
        ],
    ),
    (
        tasks(
            TRAIN,
            SCORE
            | {
                "notebook_task": {
                    "notebook_path": "train.ipynb",
                    "base_parameters": {"as_of": "{{tasks.train.value.x}}"},
                }
            },
        ),
        [
            (
                "tasks[1].notebook_task.base_parameters.as_of",
                "{{tasks.train.value.x}}: no 'value' in tasks.train",
                "did you mean 'values'?",
            )
        ],
    ),
    (
        base(as_of="{{job.naem}}"),
        [("tasks[0].notebook_task.base_parameters.as_of", "{{job.naem}}: no 'naem' in job", "did you mean 'name'?")],
    ),
    (
        base(as_of="{{job.start_time.isodate}}"),
        [
            (
                "tasks[0].notebook_task.base_parameters.as_of",
                "{{job.start_time.isodate}}: no 'isodate' in job.start_time",
                "did you mean 'iso_date'?",
            )
        ],
    ),
    (
        base(as_of="{{input}}"),
        [("tasks[0].notebook_task.base_parameters.as_of", "{{input}} is not inside a for_each_task", "")],
    ),
    (
        {"parameters": [{"name": "as_of", "default": "{{tasks.train.values.x}}"}]},
        [("parameters[0].default", "{{tasks.train.values.x}}: task 'train' does not run before this task", "")],
    ),
    (base(as_of="{{ not a reference }} {{strange.thing}}"), []),
]


@pytest.mark.parametrize(("job", "expected"), [*SHAPE, *LIMITS, *KEYS, *ORDER, *NOTEBOOKS, *SCHEDULES, *INPUTS])
def test_each_mistake_is_found_and_nothing_else(problems_of, job, expected):
    (problems_of.root / "broken.ipynb").write_text(notebook("as_of: str = 'x'")[:-30])
    if "parameters" not in job:
        job = {"parameters": []} | job
    problems = problems_of(job)
    assert [key for key, _, _ in problems] == [key for key, _, _ in expected], problems
    for (_, message, hint), (_, expected_message, expected_hint) in zip(problems, expected, strict=True):
        assert message.startswith(expected_message) and hint.startswith(expected_hint)


def test_all_mistakes_are_reported_together(problems_of):
    problems = problems_of(
        tasks(TRAIN | {"run_if": "x"}, SCORE | {"depends_on": [{"task_key": "y"}]})
        | {"naem": "z", "max_concurrent_runs": "1"}
    )
    assert {key for key, _, _ in problems} == {
        "tasks[0].run_if",
        "tasks[1].depends_on[0].task_key",
        "naem",
        "max_concurrent_runs",
    }


def test_parameters_that_others_may_read_are_no_mistake(problems_of):
    sql = {"task_key": "sql", "sql_task": {"warehouse_id": "1", "query": {"query_id": "1"}}}
    (problems_of.root / "script.py").write_text("# Databricks notebook source")
    script = {"task_key": "script", "notebook_task": {"notebook_path": "script.py"}}
    git = {"git_source": {"git_url": "https://example.org", "git_provider": "gitHub"}}
    extra = {"parameters": [{"name": "other", "default": "x"}]}
    assert problems_of(extra) != []
    for more in (tasks(TRAIN, sql), tasks(TRAIN, script), git):
        assert problems_of(extra | more) == []


def run(job: str, **parameters) -> dict:
    return {
        "task_key": f"run_{job}",
        "run_job_task": {"job_id": f"${{resources.jobs.{job}.id}}", "job_parameters": parameters},
    }


def test_jobs_that_run_jobs(problems_of):
    leaf = {"parameters": PARAMETERS, "tasks": [TRAIN]}

    def chain(*names: str) -> dict:
        parents = {name: tasks(run(child)) for name, child in zip(names, names[1:], strict=False)}
        return parents | {names[-1]: leaf}

    assert problems_of(jobs=chain("a", "b", "c", "d")) == []
    assert [message for _, message, _ in problems_of(jobs=chain("a", "b", "c", "d", "e"))] == [
        "4 levels of run_job_tasks: a -> b -> c -> d -> e"
    ]
    circle = problems_of(jobs={"a": tasks(run("b")), "b": tasks(run("c")), "c": tasks(run("b"))})
    assert [(key, message) for key, message, _ in circle] == [
        ("resources.jobs.b.tasks", "circular run_job_tasks: b -> c -> b")
    ]
    assert [message for _, message, _ in problems_of(jobs={"a": tasks(run("a"))})] == ["circular run_job_tasks: a -> a"]
    inner = {"task_key": "each", "for_each_task": {"inputs": "[1]", "task": run("a")}}
    assert [message for _, message, _ in problems_of(jobs={"a": tasks(inner)})] == ["circular run_job_tasks: a -> a"]


def test_what_a_job_hands_to_a_job(problems_of):
    leaf = {"parameters": PARAMETERS, "tasks": [TRAIN]}
    assert problems_of(jobs={"a": tasks(run("leaf", as_of="{{job.run_id}}")), "leaf": leaf}) == []
    assert problems_of(jobs={"a": tasks(run("leaf", asof="x")), "leaf": leaf}) == [
        (
            "resources.jobs.a.tasks[0].run_job_task.job_parameters.asof",
            "job 'leaf' declares no parameter 'asof'",
            "did you mean 'as_of'? there is only as_of",
        )
    ]
    assert problems_of(jobs={"a": tasks({"task_key": "x", "run_job_task": {"job_id": 7}}), "leaf": leaf}) == [
        (
            "resources.jobs.a.tasks[0].run_job_task.job_id",
            "no job of this bundle has the id 7",
            "write one of ${resources.jobs.a.id}, ${resources.jobs.leaf.id}",
        )
    ]
    parent = tasks({"task_key": "x", "run_job_task": {"job_id": job_id("leaf", "default")}})
    assert problems_of(jobs={"a": parent, "leaf": leaf}) == []


@pytest.mark.parametrize(
    ("bundle", "key", "message", "hint"),
    [
        (
            {"resources": {"jbos": {}}},
            "resources.jbos",
            "no kind of resource 'jbos'; it is ignored",
            "did you mean 'jobs'?",
        ),
        (
            {"resources": {"schemas": {"a.b": {"catalog_name": "c", "name": "s"}}}},
            "resources.schemas.a.b",
            "no reference can contain the key 'a.b', such as ${resources.schemas.a.b.id}",
            "use a letter first",
        ),
        ({"variables": {"a.b": {"default": 1}}}, "variables.a.b", "no reference can contain the name 'a.b'", "use a"),
        ({"resources": {"schemas": {"s": None}}}, "resources.schemas.s", "expected a map, got null", "add its fields"),
        (
            {"targets": {"dev": {"mode": "produktion"}}},
            "bundle.mode",
            "no mode 'produktion'",
            "did you mean 'production'?",
        ),
        (
            {"targets": {"dev": {"mode": "production"}}},
            "bundle.mode",
            "target 'dev' has mode production, but no workspace.root_path",
            "",
        ),
        (
            {"python": {"resources": ["a:b"]}},
            "python",
            "resources in Python are not supported",
            "define them in YAML",
        ),
    ],
)
def test_mistakes_of_the_whole_bundle(problems_of, bundle, key, message, hint):
    ((found_key, found_message, found_hint),) = problems_of(**({"resources": {}} | bundle))
    assert (found_key, found_message) == (key, message) and found_hint.startswith(hint)


def test_production_with_a_place_is_no_mistake(problems_of):
    target = {"mode": "production", "workspace": {"root_path": "/Workspace/Users/ci/x"}}
    assert problems_of(targets={"prod": target}) == []


@pytest.mark.parametrize(
    ("job", "key"),
    [
        (one_task(max_retrys=1), "tasks[0].max_retrys"),
        ({"max_concurrent_runs": 0}, "max_concurrent_runs"),
        (one_task(notebook_task=TRAIN["notebook_task"] | {"sourc": "GIT"}), "tasks[0].notebook_task.sourc"),
    ],
)
def test_what_databricks_accepts_is_a_warning_with_its_line(problems_of, job, key):
    problems_of({"parameters": []} | job)
    (problem,) = check(load_bundle(problems_of.root))
    line = (problems_of.root / problem.file).read_text().splitlines()[problem.line - 1]
    assert problem.is_warning and problem.key.endswith(key) and f'"{key.rsplit(".", 1)[-1]}"' in line
    assert str(problem).startswith(f"databricks.yml:{problem.line}: warning: resources.jobs.job.{key}: ")


def test_a_job_key_with_a_dot_is_a_warning_of_its_line(problems_of):
    """Databricks documents no rule for the keys of resources; a reference separates its names by dots."""
    problems_of(jobs={"daily.train": {"name": "j", "tasks": [TRAIN]}, "plain": {"name": "k", "tasks": [TRAIN]}})
    (problem,) = check(load_bundle(problems_of.root))
    assert problem.is_warning and problem.key == "resources.jobs.daily.train" and problem.line > 1
    assert "${resources.jobs.daily.train.id}" in problem.message


@pytest.mark.parametrize(
    "content",
    [
        "[]", "{}", '{"cells": {}}', '{"cells": [1]}', '{"cells": [{}]}', '{"cells": [{"cell_type": "code"}]}',
        '{"cells": [{"cell_type": "code", "source": [1]}]}',
        '{"cells": [{"cell_type": "code", "source": "", "metadata": 1}]}',
        '{"cells": [{"cell_type": "code", "source": "", "metadata": {"tags": "x"}}]}', "[" * 100_000,
        notebook("a = {[]: 1}"), notebook("a = '\0'"), notebook("a = " + "(" * 300), notebook("a = 1 +"),
    ],
)
def test_a_notebook_of_any_content_gives_no_traceback(problems_of, content):
    (problems_of.root / "broken.ipynb").write_text(content)
    job = one_task({"task_key": "a", "notebook_task": {"notebook_path": "broken.ipynb"}}) | {"parameters": []}
    ((key, message, _),) = problems_of(job)
    assert key == "tasks[0].notebook_task.notebook_path" and "broken.ipynb" in message


def test_a_problem_names_the_line(problems_of):
    problems_of(one_task(run_if="x"))
    (problem,) = check(load_bundle(problems_of.root))
    line = (problems_of.root / problem.file).read_text().splitlines()[problem.line - 1]
    assert '"run_if": "x"' in line
    assert str(problem).startswith(
        f"databricks.yml:{problem.line}: resources.jobs.job.tasks[0].run_if: 'x' is not a valid RunIf\n  there are"
    )
    assert str(Problem("a.yml", "x", "wrong")) == "a.yml: x: wrong"


def test_one_job_and_all_jobs(problems_of):
    problems_of(jobs={"a": one_task(run_if="x") | {"parameters": []}, "b": one_task(run_if="y") | {"parameters": []}})
    loaded = load_bundle(problems_of.root)
    assert [p.message for p in check_job(loaded, "b")] == ["'y' is not a valid RunIf"]
    assert len(check_jobs(loaded)) == 2
    with pytest.raises(MlopsError, match="no job 'c'"):
        check_job(loaded, "c")


def test_a_duplicate_that_the_target_brings_is_joined_and_one_in_a_file_is_not(problems_of):
    override = tasks({"task_key": "train", "max_retries": 2})
    assert problems_of(targets={"dev": {"resources": {"jobs": {"job": override}}}}) == []
    problems = problems_of(
        tasks(TRAIN, SCORE, SCORE),
        targets={"dev": {"resources": {"jobs": {"job": tasks({"task_key": "score", "max_retries": 2})}}}},
    )
    assert [message for _, message, _ in problems] == ["duplicate task_key 'score'"]


# parameters of a notebook


def test_the_parameters_of_a_notebook(tmp_path):
    path = tmp_path / "a.ipynb"
    path.write_text(
        notebook(
            '#| comment\ntarget: str = "dev"  # which target, "dev" # or prod\nlimit: int | None = None\n'
            'share: float = -0.5\ntune = False\nwords = "# no comment"\nimport os\nprint(target)\nlate: int'
        )
    )
    assert notebook_parameters(path) == {
        "target": Parameter("target", "str", "dev", 'which target, "dev" # or prod'),
        "limit": Parameter("limit", "int | None"),
        "share": Parameter("share", "float", -0.5),
        "tune": Parameter("tune", "", False),
        "words": Parameter("words", "", "# no comment"),
        "late": Parameter("late", "int"),
    }
    types = {name: parameter.type for name, parameter in notebook_parameters(path).items()}
    assert types == {"target": str, "limit": int | None, "share": float, "tune": bool, "words": str, "late": int}


def test_only_a_code_cell_with_the_tag_counts(tmp_path):
    path = tmp_path / "a.ipynb"
    for more in ({"metadata": {}}, {"metadata": {"tags": ["other"]}}, {"cell_type": "markdown"}):
        path.write_text(notebook("x = 1", **more))
        assert parameter_cell(path) == "" and notebook_parameters(path) == {}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "a.ipynb as a notebook: Expecting value"),
        ("{}", "a.ipynb as a notebook: 'cells'"),
        ("[1]", "a.ipynb as a notebook: list indices must be integers"),
        ('{"cells": ', "a.ipynb as a notebook: Expecting value: line 1 column 11 (char 10)\n"
                       "  a notebook is a JSON file with cells"),
        (notebook("x = )"), "the cell tagged parameters is not valid Python"),
        (notebook("x = date.today()"), "the default of parameter 'x' is not a literal: date.today()"),
        (json.dumps({"cells": json.loads(notebook("x = 1"))["cells"] * 2}), "has 2 cells tagged parameters"),
    ],
)
def test_a_notebook_that_cannot_be_read(tmp_path, content, message):
    (tmp_path / "a.ipynb").write_text(content)
    with pytest.raises(MlopsError) as error:
        notebook_parameters(tmp_path / "a.ipynb")
    assert message in str(error.value) and "a.ipynb" in str(error.value)
    with pytest.raises(MlopsError, match="cannot read .*gone.ipynb as a notebook"):
        notebook_parameters(tmp_path / "gone.ipynb")


# this project's own


@pytest.mark.parametrize("target", target_names(ROOT))
def test_our_own_bundle_has_no_problem(target):
    assert [str(problem) for problem in check(load_bundle(ROOT, target))] == []
