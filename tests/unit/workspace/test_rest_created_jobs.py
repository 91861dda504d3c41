"""Jobs that databricks-sdk creates beside those of the bundle, with notebooks in the files of the workspace."""
import json
from datetime import timedelta
from pathlib import Path

import pytest
import yaml
from databricks.sdk import WorkspaceClient
from databricks.sdk.errors import InvalidParameterValue, PermissionDenied, ResourceDoesNotExist
from databricks.sdk.service.jobs import (
    JobParameterDefinition,
    JobSettings,
    NotebookTask,
    RunJobTask,
    RunLifeCycleState,
    RunResultState,
    Task,
    TaskDependency,
)
from served_jobs import served_jobs, until_stopped
from waiting import wait_until

from mlops_nb import job_homes
from mlops_nb.bundle.load import job_id
from mlops_nb.errors import MlopsError
from mlops_nb.jobs import progress, run_store, runner
from mlops_nb.jobs.created_jobs import created_jobs
from mlops_nb.jobs.execute import Outcome
from mlops_nb.jobs.job_service import JobService
from mlops_nb.workspace.token_access import Permissions

pytestmark = pytest.mark.slow  # the runs of test_rest_jobs are the fast ones
SUCCESS, SECONDS = RunResultState.SUCCESS, timedelta(seconds=60)
FOLDER = "/Workspace/Users/ben/.bundle/small/dev/files"
CATALOGS = {"dev": ["dev"], "prod": ["prod"]}


@pytest.fixture
def deployed(project):
    "The deployed files of a bundle: a project of its own in the files of the workspace."
    folder = project.root / ".mlops/workspace/files" / FOLDER.removeprefix("/Workspace/")
    files = type(project)(folder)
    files.notebook("any", "1", parameters="as_of: str = 'latest'")
    return files


def notebook_task(key: str = "a", name: str = "nbs/any", after: str = "", **values: str) -> Task:
    "A task that runs a notebook of the deployed files."
    return Task(task_key=key, notebook_task=NotebookTask(f"{FOLDER}/{name}", base_parameters=values or None),
                depends_on=[TaskDependency(after)] if after else None)


def call_task(number: int, **parameters: str) -> Task:
    return Task(task_key="call", run_job_task=RunJobTask(job_id=number, job_parameters=parameters or None))


def of_target(target: str, **more: str) -> list[JobParameterDefinition]:
    "The job parameter with the values of a deployment."
    return [JobParameterDefinition("settings", json.dumps({"target": target} | more))]


AS_OF = JobParameterDefinition("as_of", "latest")


def ended(client, number):
    "The run once it has ended; the waiting of databricks-sdk looks once a second."
    wait_until(lambda: client.jobs.get_run(number).state.result_state)
    return client.jobs.get_run(number)


def test_a_created_job_is_kept_listed_run_changed_and_deleted(project, deployed, client, service, acts):
    number = client.jobs.create(name="[dev ben] fit", tasks=[notebook_task(as_of="2013-04-01")],
                                parameters=[*of_target("dev"), AS_OF], tags={"team": "x"}).job_id
    assert number > 2**32  # no number of a job of the bundle
    job = client.jobs.get(number)
    assert (job.creator_user_name, job.settings.name, job.settings.tags) == ("ben", "[dev ben] fit", {"team": "x"})
    assert job.settings.tasks[0].notebook_task.notebook_path == f"{FOLDER}/nbs/any"  # as given
    run = ended(client, client.jobs.run_now(number, job_parameters={"as_of": "2013-05-01"}).run_id)
    assert (run.job_id, run.run_name, run.state.result_state) == (number, "[dev ben] fit", SUCCESS)
    assert [listed.run_id for listed in client.jobs.list_runs(job_id=number)] == [run.run_id]
    assert {parameter.name: parameter.value for parameter in run.job_parameters}["as_of"] == "2013-05-01"

    again = JobService(project.root, service.state, service.make_home, "ana")  # as after a restart
    assert again.body(number)["settings"]["name"] == "[dev ben] fit" and again.close() == []
    client.jobs.update(number, new_settings=JobSettings(name="other", tasks=[notebook_task("b")]),
                       fields_to_remove=["tags"])
    settings = client.jobs.get(number).settings
    assert (settings.name, [task.task_key for task in settings.tasks], settings.tags) == ("other", ["a", "b"], None)
    client.jobs.reset(number, JobSettings(name="last", tasks=[notebook_task("c")]))
    assert [task.task_key for task in client.jobs.get(number).settings.tasks] == ["c"]
    assert [job.job_id for job in client.jobs.list(name="LAST")] == [number]

    client.jobs.delete(number)
    for call in (client.jobs.get, client.jobs.run_now, client.jobs.delete):
        with pytest.raises(ResourceDoesNotExist, match=f"Job {number} does not exist"): call(number)
    assert client.jobs.get_run(run.run_id).run_name == "last"  # its runs stay
    assert client.jobs.create(name="last", tasks=[notebook_task()]).job_id == number + 1


REFUSED = [
    ({"tasks": []}, "no tasks"), ({"tasks": [notebook_task(name="nbs/an")]}, "does not exist.*did you mean 'any'"),
    ({"tasks": [Task("a", notebook_task=NotebookTask("nbs/any"))]}, "not an absolute path of the workspace"),
    ({"tasks": [Task("a", notebook_task=NotebookTask(f"{FOLDER}/../../../../../../../../nbs/any"))]}, "does not exist"),
    ({"tasks": [Task("a", notebook_task=NotebookTask("/Users/ben/alone"))]}, "no databricks.yml"),
    ({"tasks": [notebook_task(name="nbs/source")]}, r"source notebook \(\.py\).*(?s:.)*JUPYTER.*databricks\.yml"),
    ({"tasks": [notebook_task(asof="1")]}, r"tasks\[0\].notebook_task.base_parameters.asof: .*as_of"),
    ({"tasks": [notebook_task("a", after="b")]}, r"tasks\[0\].depends_on\[0\].task_key: no task 'b'"),
    ({"tasks": [notebook_task("a"), notebook_task("a")]}, "duplicate task_key 'a'"),
    ({"tasks": [call_task(7)]}, "no job with the id 7"), ({"tasks": [call_task(10**10 + 7)]}, "does not exist"),
    ({"parameters": of_target("test")}, "no target 'test'"), ({"parameters": of_target("dev", size="1")}, "size"),
    ({"parameters": [JobParameterDefinition("settings", "{target")]}, "not JSON")]


@pytest.mark.parametrize("change, message", REFUSED)
def test_what_cannot_run_here_is_refused_with_the_findings(project, deployed, client, service, change, message):
    project.notebook("any", "1")
    (deployed.root.parents[3] / "alone.ipynb").write_text((deployed.root / "nbs/any.ipynb").read_text())
    (deployed.root / "nbs/source.py").write_text("# Databricks notebook source\nx = 1\n")
    number = client.jobs.create(name="fit", tasks=[notebook_task()]).job_id
    wrong = {"name": "wrong", "tasks": [notebook_task()]} | change
    with pytest.raises(InvalidParameterValue, match=message): client.jobs.create(**wrong)
    with pytest.raises(InvalidParameterValue, match=message): client.jobs.reset(number, JobSettings(**wrong))
    assert [job.name for job in created_jobs(service.store)] == ["fit"]


def test_fields_that_only_a_request_can_have_are_refused(deployed, client, service):
    task = notebook_task().as_dict()
    for body, message in (({"tasks": [task | {"sql_task": {"warehouse_id": "1"}}]}, "several types"),
                          ({"tasks": [{"task_key": "a", "spark_python_task": {"python_file": "/a.py"}}]}, "cannot run"),
                          ({"tasks": "all"}, "no tasks"),
                          ({"tasks": [task], "git_source": {"git_url": "x"}}, "git_source")):
        with pytest.raises(InvalidParameterValue, match=message):
            client.api_client.do("POST", "/api/2.2/jobs/create", body={"name": "x"} | body)
    assert created_jobs(service.store) == []


def test_created_jobs_run_created_jobs_and_those_of_the_bundle(project, deployed, client, service, acts):
    project.job("fit", [{"task_key": "fit", "notebook_task": project.notebook("fit", "1")}])
    inner = client.jobs.create(name="inner", tasks=[notebook_task("inner")],
                               parameters=[*of_target("dev"), AS_OF]).job_id
    outer = client.jobs.create(name="outer", parameters=of_target("dev"), tasks=[
        call_task(inner, as_of="2013-05-01"),
        Task("bundle", run_job_task=RunJobTask(job_id=job_id("fit", "dev")))]).job_id
    acts["inner"] = lambda step: Outcome("FAILED", "no rows")
    run = ended(client, client.jobs.run_now(outer).run_id)
    children = {task.task_key: client.jobs.get_run_output(task.run_id).run_job_output.run_id for task in run.tasks}
    inner_run, bundle_run = client.jobs.get_run(children["call"]), client.jobs.get_run(children["bundle"])
    assert (inner_run.job_id, inner_run.state.result_state) == (inner, RunResultState.FAILED)
    assert (bundle_run.job_id, bundle_run.state.result_state) == (job_id("fit", "dev"), SUCCESS)
    acts.clear()
    client.jobs.repair_run(run.run_id, rerun_all_failed_tasks=True)
    assert ended(client, run.run_id).state.result_state is SUCCESS
    assert client.jobs.get_run(children["call"]).state.result_state is SUCCESS  # continued, not begun again

    with pytest.raises(InvalidParameterValue, match="circular"):
        client.jobs.reset(inner, JobSettings(name="inner", tasks=[call_task(outer)]))
    with pytest.raises(InvalidParameterValue, match="is of target 'dev'"):
        client.jobs.create(name="other", parameters=of_target("prod"), tasks=[notebook_task(), call_task(inner)])
    with pytest.raises(InvalidParameterValue, match="no job with the id"):
        client.jobs.create(name="other", tasks=[notebook_task(), call_task(job_id("fit", "prod"))])


def test_runs_of_created_jobs_are_cancelled_and_those_of_a_deleted_job_end(deployed, client, service, acts):
    number = client.jobs.create(name="fit", tasks=[notebook_task()]).job_id
    acts["a"] = until_stopped

    def running() -> int:
        run = client.jobs.run_now(number).run_id
        wait_until(lambda: client.jobs.get_run(run).state.life_cycle_state is RunLifeCycleState.RUNNING)
        return run

    first = running()
    client.jobs.cancel_run(first)
    assert ended(client, first).state.result_state is RunResultState.CANCELED
    second = running()
    client.jobs.delete(number)
    assert ended(client, second).state.result_state is RunResultState.CANCELED
    with pytest.raises(ResourceDoesNotExist): client.jobs.repair_run(second, rerun_all_failed_tasks=True)
    client.jobs.delete_run(second)
    assert [run.run_id for run in client.jobs.list_runs()] == [first]


def test_the_command_line_shows_repairs_and_runs_a_created_job(project, deployed, client, service, acts):
    number = client.jobs.create(name="fit", tasks=[notebook_task()], parameters=of_target("prod")).job_id
    acts["a"] = lambda step: Outcome("FAILED", "no rows")
    run = ended(client, client.jobs.run_now(number).run_id)
    row = run_store.get_run(service.store, run.run_id)
    assert (row["target"], run_store.job_title(service.store, row)) == ("prod", f"fit ({number})")
    assert f"job fit ({number}), target prod" in str(progress.run_table(service.store, run.run_id).renderables[0])
    home = job_homes.job_home(row["target"], {}, row["job"], root=project.root)  # as `mlops repair` does
    assert (home.env.root, home.env.catalog, home.env.state) == (deployed.root, "prod", service.state)
    acts.clear()
    assert runner.finish_run(runner.reopen(home, run.run_id)) == "SUCCESS"


@pytest.fixture
def people(project, service):
    "Clients of the owner, and of people whose tokens are of a target; ben and ann are of dev."
    variables = {name: {"type": "complex", "default": ["${bundle.target}"]} for name in ("read", "write")}
    file = project.root / "databricks.yml"
    content = yaml.safe_load(file.read_text())
    file.write_text(yaml.safe_dump(content | {"variables": content["variables"] | variables}))
    tokens = {"ana": {}, "ben": {"target": "dev"}, "ann": {"target": "dev"}, "eve": {"target": "prod"}}
    permissions = Permissions(project.root, lambda: tokens)
    with served_jobs(service, permissions) as host:
        yield {name: WorkspaceClient(host=host, token=name) for name in tokens}


def test_a_token_uses_the_jobs_of_its_target_and_changes_its_own(project, deployed, people, acts, service):
    project.job("fit", [{"task_key": "fit", "notebook_task": project.notebook("fit", "1")}])
    owner, ben, ann, eve = (people[name] for name in ("ana", "ben", "ann", "eve"))
    number = ben.jobs.create(name="fit", tasks=[notebook_task()], parameters=of_target("dev")).job_id
    for other in (ann, eve):
        assert other.jobs.get(number).creator_user_name == "ben"  # all may see it
        for call in (other.jobs.run_now, other.jobs.delete):
            with pytest.raises(PermissionDenied): call(number)
        with pytest.raises(PermissionDenied): other.jobs.reset(number, JobSettings(tasks=[notebook_task()]))
        with pytest.raises(PermissionDenied): other.jobs.create(tasks=[call_task(number)])
    with pytest.raises(PermissionDenied, match="token is of target 'dev'"):
        ben.jobs.create(name="fit", tasks=[notebook_task()], parameters=of_target("prod"))
    with pytest.raises(PermissionDenied, match="writes: dev"):  # another catalog than that of the target
        ben.jobs.create(name="fit", tasks=[notebook_task()], parameters=of_target("dev", catalog="prod"))
    for given, error in ((("prod", {}), InvalidParameterValue), (("dev", {"catalog": "prod"}), PermissionDenied)):
        settings = of_target(given[0], **given[1])[0].default
        with pytest.raises(error): ben.jobs.run_now(number, job_parameters={"settings": settings})
    run = ben.jobs.run_now(number).run_id
    assert ended(ben, run).state.result_state is SUCCESS
    for call in (ann.jobs.delete_run, eve.jobs.cancel_run):
        with pytest.raises(PermissionDenied): call(run)
    with pytest.raises(PermissionDenied): ann.jobs.repair_run(run, rerun_all_failed_tasks=True)
    assert ended(owner, owner.jobs.run_now(number).run_id).state.result_state is SUCCESS

    with pytest.raises(PermissionDenied): eve.jobs.run_now(job_id("fit", "dev"))
    assert ended(ann, ann.jobs.run_now(job_id("fit", "dev")).run_id).state.result_state is SUCCESS
    for values, text in ((of_target("prod"), "settings is of target 'prod'"),
                         (of_target("dev", catalog="prod"), "may not write its own catalog 'prod'")):
        given = {"settings": values[0].default}  # of a deployment, which the notebooks would follow
        with pytest.raises(InvalidParameterValue, match=text):
            ann.jobs.run_now(job_id("fit", "dev"), job_parameters=given)
    with pytest.raises(PermissionDenied): ann.jobs.cancel_all_runs(job_id=job_id("fit", "prod"))
    owner.jobs.delete(number)
    assert created_jobs(service.store) == []


def test_files_that_were_changed_after_the_creation_of_a_job_give_it_no_more_rights(project, deployed, people, service):
    number = people["ben"].jobs.create(name="fit", tasks=[notebook_task()], parameters=of_target("dev")).job_id
    file = deployed.root / "databricks.yml"
    content = yaml.safe_load(file.read_text())
    lists = {name: {"type": "complex", "default": ["dev", "prod"]} for name in ("read", "write")}
    file.write_text(yaml.safe_dump(content | {"variables": content["variables"] | lists}))
    with pytest.raises(PermissionDenied, match="writes: dev"): people["ben"].jobs.run_now(number)


@pytest.mark.slow
def test_the_deployed_copy_runs_without_the_checkout(project, deployed, client, service):
    package = deployed.root / "small_code"
    package.mkdir()
    (package / "__init__.py").write_text("CHANGE = 'of the deployed copy'\n")
    (deployed.root / "databricks.yml").write_text(yaml.safe_dump({
        "bundle": {"name": "small"}, "variables": {"catalog": {"default": "dev"}, "schema": {"default": "s"}},
        "targets": {"dev": {}}}))
    deployed.notebook("say", "import json, os, small_code\nfrom mlops_nb import load_env, task",
                      "env = load_env(target)\nplace = [str(env.root), env.schema, str(env.state), small_code.CHANGE]",
                      "task.exit(json.dumps([*place, os.getcwd()]))", parameters="target: str = 'dev'")
    project.job("fit", [{"task_key": "fit", "notebook_task": project.notebook("fit", "1")}])
    tasks = [notebook_task("first", "nbs/say"), notebook_task("a", after="first")]
    number = client.jobs.create(name="say", tasks=tasks, parameters=of_target("dev", schema="dev_ben_s")).job_id
    for name in ("databricks.yml", "resources", "nbs"): (project.root / name).rename(project.root / f"{name}.away")
    run = client.jobs.run_now_and_wait(number, timeout=SECONDS)
    assert run.state.result_state is SUCCESS
    printed = json.loads(client.jobs.get_run_output(run.tasks[0].run_id).notebook_output.result)
    assert printed == [str(deployed.root), "dev_ben_s", str(service.state), "of the deployed copy",
                       str(deployed.root / "nbs")]
    assert {job.job_id for job in client.jobs.list()} == {number}
    deployed.notebook("any", "raise ValueError('changed')")  # each run reads the files as they are
    run = client.jobs.run_now_and_wait(number, timeout=SECONDS)
    assert "changed" in client.jobs.get_run_output(run.tasks[1].run_id).error
    deployed.notebook("any", "from mlops_nb.errors import MissingError",
                      "raise MissingError('no table', 'create it: mlops run features -t dev')")
    run = client.jobs.run_now_and_wait(number, timeout=SECONDS)  # the checkout's job writes another schema
    assert "the job features of this deployment" in client.jobs.get_run_output(run.tasks[1].run_id).error_trace
    Path(deployed.root / "nbs/any.ipynb").unlink()
    with pytest.raises(InvalidParameterValue, match="does not exist in the workspace"): client.jobs.run_now(number)
    client.jobs.delete(number)


def test_a_job_that_moved_to_another_target_does_not_run(deployed, client, service, acts):
    number = client.jobs.create(name="fit", tasks=[notebook_task()]).job_id
    text = (deployed.root / "databricks.yml").read_text()
    (deployed.root / "databricks.yml").write_text(text.replace("dev:", "test:"))
    with pytest.raises(InvalidParameterValue, match="was created for target 'dev'"): client.jobs.run_now(number)
    with pytest.raises(MlopsError): service.home("dev", {}, str(number))
