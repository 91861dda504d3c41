"""Fixtures of the unit tests: a target with a registry of its own."""
import shutil
from dataclasses import replace

import pytest

from mlops_nb.env import load_env


@pytest.fixture(scope="module")
def env(tmp_path_factory, empty_store):
    "The target dev of this project; each test file has its own registry, which is empty at first."
    folder = tmp_path_factory.mktemp("registry")
    shutil.copy(empty_store, folder / "mlflow.db")
    uri = f"sqlite:///{folder}/mlflow.db"
    return replace(load_env("dev"), state=folder, home="local", tracking_uri=uri, registry_uri=uri)


@pytest.fixture
def no_settings(monkeypatch):
    "No address or folder that another test of this process has left in the environment."
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI", "MLOPS_STATE", "MLOPS_LAKEHOUSE", "MLOPS_ENGINE"):
        monkeypatch.delenv(name, raising=False)
