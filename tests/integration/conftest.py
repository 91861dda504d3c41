"""A session on Sail for the tests of one file, in a lakehouse of its own."""
from dataclasses import replace
from pathlib import Path

import pytest

from mlops_nb.data import session as sessions
from mlops_nb.env import load_env

LONGEST = ("test_whole", "test_demo", "test_model_loop", "test_deployment")  # begun first, so that no worker is left with one at the end


def pytest_collection_modifyitems(items):
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(LONGEST)))


@pytest.fixture(scope="module")
def env(tmp_path_factory):
    "Target dev on Sail, in a lakehouse of its own."
    with pytest.MonkeyPatch.context() as patch:
        for variable in ("SPARK_REMOTE", "MLOPS_ENGINE", "MLOPS_LAKEHOUSE", "MLOPS_STATE"):
            patch.delenv(variable, raising=False)
        yield replace(load_env("dev", root=Path(__file__).parents[2]), lakehouse=str(tmp_path_factory.mktemp("lake")))
    sessions.stop()


@pytest.fixture(scope="module")
def spark(env): return sessions.get_spark(env)
