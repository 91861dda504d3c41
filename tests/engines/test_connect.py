"""The functions of `tables` with Databricks Connect as the client, on a Sail server."""
import json
import sys
from dataclasses import replace as changed
from pathlib import Path

import pytest

from mlops_nb.data.session import environment, start_sail
from mlops_nb.env import load_env

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def address():
    "A Sail server with the catalogs of target dev."
    with environment({"MLOPS_ENGINE": "sail"}): server = start_sail(changed(load_env("dev", root=ROOT)))
    yield "sc://{}:{}".format(*server.listening_address)
    server.stop()


if sys.version_info < (3, 13):  # its pinned dependencies need an earlier Python
    def test_databricks_connect_does_the_same_on_a_sail_server(connect_ready, address, run_on, tmp_path):
        run_on("sail", "tables_scenario.py", tmp_path / "a", tmp_path / "sail.json")
        run_on("sail", "tables_scenario.py", tmp_path / "b", tmp_path / "connect.json",
               python="connect", SPARK_REMOTE=address)
        sail, connect = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("sail", "connect"))
        assert connect == sail and not [step for step in sail.values() if "failed" in step]
