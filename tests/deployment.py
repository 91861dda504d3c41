"""A deployment of a bundle into a local workspace, for tests: its files, and its jobs by the unchanged databricks-sdk.

Into a real workspace the Databricks CLI deploys: `databricks bundle deploy`."""
import copy
import fnmatch
import subprocess
from pathlib import Path

from mlops_nb.bundle.inputs import all_tasks, part
from mlops_nb.bundle.load import Bundle, job_id, load_bundle
from mlops_nb.jobs.api_bodies import job_settings


def deployed_files(root: Path, excluded: list[str]) -> list[str]:
    "What a deployment copies: the files that git does not ignore, without those of `sync.exclude`."
    words = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(words, cwd=root, capture_output=True, text=True, check=True).stdout.splitlines()
    return [name for name in listed if (root / name).is_file() and not any(
        fnmatch.fnmatch(name, pattern) or name.startswith(pattern.rstrip("*/") + "/") for pattern in excluded)]


def upload_files(client, bundle: Bundle) -> str:  # client: databricks.sdk.WorkspaceClient; returns the folder
    "Upload the files of a bundle as a deployment does: a notebook loses its extension."
    from databricks.sdk.service.workspace import ImportFormat
    folder = bundle.data["workspace"]["file_path"]
    names = deployed_files(bundle.root, (bundle.data.get("sync") or {}).get("exclude", []))
    folders = {f"{folder}/{Path(name).parent}".removesuffix("/.") for name in names}
    for parent in sorted(folders): client.workspace.mkdirs(parent)
    for name in names:
        client.workspace.upload(f"{folder}/{name}", (bundle.root / name).read_bytes(), format=ImportFormat.AUTO,
                                overwrite=True)
    return folder


def deployed_settings_of(bundle: Bundle, key: str, folder: str, ids: dict[str, int]) -> dict:  # ids: of created jobs
    "The JobSettings of a job: notebooks by their paths in the workspace, other jobs by their ids."
    job, keys = copy.deepcopy(job_settings(bundle, key)), {job_id(name, bundle.target): name for name in bundle.jobs}
    for _, task in all_tasks(job, ""):
        if notebook := part(task, "notebook_task"):
            notebook["notebook_path"] = f"{folder}/{notebook['notebook_path'].removesuffix('.ipynb')}"
        if called := part(task, "run_job_task"): called["job_id"] = ids[keys[int(called["job_id"])]]
    return job


def in_order_of_calls(bundle: Bundle) -> list[str]:
    "The keys of the jobs, those that others run first."
    keys, order = {job_id(name, bundle.target): name for name in bundle.jobs}, {}

    def add(name: str) -> None:
        for _, task in all_tasks(bundle.jobs[name], ""):
            if called := part(task, "run_job_task"): add(keys[int(called["job_id"])])
        order[name] = None

    for name in bundle.jobs: add(name)
    return list(order)


def deploy(client, root: Path, target: str = "dev", **variables: str) -> dict[str, int]:
    "Deploy a bundle to the workspace of a client; the ids of its jobs by key."
    from databricks.sdk.service.jobs import JobSettings
    user = client.current_user.me().user_name
    bundle, ids = load_bundle(root, target, variables, user, deployed=True), {}
    folder = upload_files(client, bundle)
    for key in in_order_of_calls(bundle):
        settings = JobSettings.from_dict(deployed_settings_of(bundle, key, folder, ids))
        ids[key] = client.jobs.create(**settings.as_shallow_dict()).job_id
    return ids
