"""What several unit tests share: an MLflow store that is made once and copied."""
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from mlops_nb.env import load_env, make_store


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory) -> Path:
    "An MLflow store without content. MLflow takes seconds to make its tables, so all workers share one file."
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ: folder = folder.parent
    make_store(folder / "empty_store" / "mlflow.db")  # it takes a lock: the other workers wait for the first
    return folder / "empty_store" / "mlflow.db"


@pytest.fixture(scope="module")
def env(tmp_path_factory, empty_store):
    "The target dev of this project; each file of tests has a registry of its own, empty at first."
    folder = tmp_path_factory.mktemp("registry")
    shutil.copy(empty_store, folder / "mlflow.db")
    uri = f"sqlite:///{folder}/mlflow.db"
    return replace(load_env("dev"), state=folder, home="local", tracking_uri=uri, registry_uri=uri)
