"""Small projects for tests: a bundle and notebooks of their own in a temporary folder."""
import json
import os
import shutil
from pathlib import Path

import pytest
import yaml
from hypothesis import settings

from mlops_nb.env import make_store

settings.register_profile("tests", deadline=None, print_blob=True)  # a deadline would be a timed assertion
settings.load_profile("tests")


def pytest_runtest_makereport(item, call):
    "Under MLOPS_STRICT=1 a test that skips for something that can be installed is a failure."
    if call.excinfo and call.excinfo.errisinstance(pytest.skip.Exception) and os.environ.get("MLOPS_STRICT") == "1":
        reason = str(call.excinfo.value)
        call.excinfo = pytest.ExceptionInfo.from_exc_info(
            (AssertionError, AssertionError(f"skipped under MLOPS_STRICT=1: {reason}"), call.excinfo.tb))


@pytest.fixture(autouse=True)
def usual_umask():
    "The command `mlops` sets the umask of its process; in tests it shares the process with other tests."
    before = os.umask(0o022)
    yield
    os.umask(before)


class Project:
    "A bundle with one target `dev` (and `prod`), its jobs and its notebooks."

    def __init__(self, root: Path):
        self.root, self.jobs = root, {}
        self.path("databricks.yml").write_text(yaml.safe_dump({
            "bundle": {"name": "small"}, "include": ["resources/*.yml"],
            "variables": {"catalog": {"default": "${bundle.target}"}, "schema": {"default": "s"}},
            "targets": {"dev": {"default": True}, "prod": {}}}))
        self.job("empty", [])

    def path(self, name: str) -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def notebook(self, name: str, *cells: str, parameters: str = "") -> dict:
        "Write a notebook; returns the notebook_task that runs it."
        sources = [(parameters, ["parameters"])] if parameters else []
        sources += [(cell, []) for cell in cells]
        code = [{"cell_type": "code", "id": f"cell{i}", "metadata": {"tags": tags} if tags else {},
                 "execution_count": None, "outputs": [], "source": source} for i, (source, tags) in enumerate(sources)]
        # nbformat would do the same, and takes seconds to import
        content = {"cells": code, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
        self.path(f"nbs/{name}.ipynb").write_text(json.dumps(content))
        return {"notebook_path": f"../nbs/{name}.ipynb"}

    def job(self, key: str, tasks: list, **settings) -> None:
        "Add a job to the bundle."
        self.jobs[key] = {"name": key, "tasks": tasks} | settings
        jobs = {k: v for k, v in self.jobs.items() if v["tasks"]}
        self.path("resources/jobs.yml").write_text(yaml.safe_dump({"resources": {"jobs": jobs}} if jobs else {}))

    def home(self, target=None, **options):
        "What a runner in this process needs."
        from mlops_nb import env
        from mlops_nb.bundle.load import load_bundle
        from mlops_nb.jobs.home import Home
        return Home(env.load_env(target, root=self.root), load_bundle(self.root, target), **options)


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory) -> Path:
    "An MLflow store without content. MLflow takes seconds to make its tables, so all workers share one file."
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ: folder = folder.parent
    make_store(folder / "empty_store" / "mlflow.db")  # it takes a lock: the other workers wait for the first
    return folder / "empty_store" / "mlflow.db"


@pytest.fixture
def project(tmp_path, monkeypatch, empty_store):
    for name in ("MLOPS_STATE", "MLOPS_LAKEHOUSE", "MLOPS_TASK", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    small = Project(tmp_path)
    shutil.copy(empty_store, small.path(".mlops/mlflow.db"))
    return small
