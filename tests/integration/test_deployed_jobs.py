"""Bundles deployed into a real `mlops up` by the unchanged databricks-sdk: their jobs run from the deployed files."""
import json
import shutil
from datetime import timedelta

import generated
import pytest
from databricks.sdk.errors import OperationFailed
from deployment import deploy
from local_workspace import workspace
from states import ROOT

from mlops_nb.bundle.load import load_bundle

pytestmark = pytest.mark.slow
MINUTES = timedelta(minutes=3)


@pytest.fixture(scope="module")
def state(tmp_path_factory):
    return tmp_path_factory.mktemp("deployed") / "state"


@pytest.fixture(scope="module")
def client(state):
    state.mkdir()
    with workspace(state) as client: yield client


def run(client, number: int, **options):
    "Run a job to its end; the run, or the error of its first failed task."
    try: return client.jobs.run_now_and_wait(number, timeout=MINUTES, **options)
    except OperationFailed:
        newest = client.jobs.get_run(next(client.jobs.list_runs(job_id=number)).run_id)
        outputs = [client.jobs.get_run_output(task.run_id) for task in newest.tasks]
        raise AssertionError([output.error_trace or output.error for output in outputs]) from None


def change_notebook(file, old: str, new: str) -> None:
    text = file.read_text()
    assert text.count(old) == 1
    file.write_text(text.replace(old, new))


def test_all_jobs_of_this_bundle_are_created_and_a_deployed_notebook_runs(client, state):
    ids = deploy(client, ROOT)
    bundle = load_bundle(ROOT, "dev", user=client.current_user.me().user_name, deployed=True)
    assert set(ids) == set(bundle.jobs)
    created = {job.job_id: job for job in client.jobs.list(expand_tasks=True) if job.job_id in ids.values()}
    assert {key: created[number].settings.name for key, number in ids.items()} == {
        key: job["name"] for key, job in bundle.jobs.items()}
    train = {task.task_key: task for task in created[ids["train"]].settings.tasks}
    assert train["deploy"].run_job_task.job_id == ids["deploy"]

    folder = state / "workspace/files" / bundle.data["workspace"]["file_path"].removeprefix("/Workspace/")
    assert not any((folder / name).exists() for name in (".git", "tests", "template", ".mlops"))
    change_notebook(folder / "nbs/flights/12_setup.ipynb", "task.exit(feature_jobs.registration_text(functions))",
                    "import mlops_nb\\ntask.exit(mlops_nb.__file__)")  # which the checkout does not have
    done = run(client, ids["features"], only=["setup"])
    output = client.jobs.get_run_output(done.tasks[0].run_id).notebook_output.result
    assert output == str(folder / "mlops_nb/__init__.py")
    schema = json.loads(bundle.variables["settings"])["schema"]
    assert schema.startswith("dev_") and (state / "lakehouse/dev" / schema).exists()


def test_the_jobs_of_a_project_run_from_its_deployed_copy_after_it_is_removed(client, state, tmp_path, monkeypatch):
    project = generated.write(tmp_path / "parcels", generated.made_up("regression", False), monkeypatch)
    generated.commit(project)
    ids = deploy(client, project)
    shutil.rmtree(project)
    run(client, ids["features"], only=["ingest", "features"])
    task, = run(client, ids["train"], only=["train"]).tasks  # the whole loop takes a minute
    assert "parcels.days v1" in client.jobs.get_run_output(task.run_id).notebook_output.result
