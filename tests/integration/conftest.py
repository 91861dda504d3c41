"""A Sail session for each test file, with its own lakehouse, and one trained state that test files share."""
from dataclasses import replace
from pathlib import Path

import pytest
from states import copy_state, trained

from mlops_nb.data import session as sessions
from mlops_nb.env import load_env

# A worker takes whole files in this order. The first file makes the trained state. Meanwhile the other worker takes
# files that do not need it, and those that need it afterwards. Files that are not listed are short and come last.
ORDER = ("test_whole", "test_demo", "test_jobs", "test_automl", "test_deployment", "test_tables", "test_supervisor",
         "test_feature_client", "test_online_store", "test_mlflow_store", "test_spark", "test_point_in_time",
         "test_features", "test_model_loop", "test_inference", "test_ingest", "test_validation")


def pytest_collection_modifyitems(items):
    order = {name: number for number, name in enumerate(ORDER)}
    items.sort(key=lambda item: order.get(item.path.stem, len(ORDER)))


@pytest.fixture(scope="module")
def own_trained(trained, tmp_path_factory) -> Path:
    "A copy of the trained state that the tests of one file may change."
    return copy_state(trained, tmp_path_factory.mktemp("own") / "state")


@pytest.fixture(scope="module")
def env(tmp_path_factory):
    "Target dev on Sail, with its own lakehouse."
    with pytest.MonkeyPatch.context() as patch:
        for variable in ("SPARK_REMOTE", "MLOPS_ENGINE", "MLOPS_LAKEHOUSE", "MLOPS_STATE"):
            patch.delenv(variable, raising=False)
        yield replace(load_env("dev", root=Path(__file__).parents[2]), lakehouse=str(tmp_path_factory.mktemp("lake")))
    sessions.stop()


@pytest.fixture(scope="module")
def spark(env): return sessions.get_spark(env)


@pytest.fixture(scope="module")
def home(spark, env): return spark, env
