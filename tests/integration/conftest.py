"""A session on Sail for the tests of one file, in a lakehouse of its own."""
from dataclasses import replace
from pathlib import Path

import pytest

from mlops_nb import spark as sessions
from mlops_nb.env import load_env


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
