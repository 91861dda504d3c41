"""Sessions: one for a process and target, in UTC, on servers of our own or of others, and no long wait in silence."""
import os
import socket
import subprocess
import sys
import threading
import time
import types
from dataclasses import replace as changed
from pathlib import Path

import pytest

from mlops_nb.data import session as sessions
from mlops_nb.data import tables
from mlops_nb.env import load_env
from mlops_nb.errors import MlopsError

ROOT = Path(__file__).parents[2]
VARIABLES = ("SPARK_REMOTE", "MLOPS_ENGINE", "MLOPS_LAKEHOUSE", "MLOPS_STATE")


@pytest.fixture
def env(tmp_path, monkeypatch):
    for name in VARIABLES: monkeypatch.delenv(name, raising=False)
    yield changed(load_env("dev", root=ROOT), lakehouse=str(tmp_path / "lake"))
    sessions.stop()


SERVER = """
import sys
from pysail.spark import SparkConnectServer
server = SparkConnectServer("127.0.0.1", 0)
server.start(background=True)
print(server.listening_address[1], flush=True)
sys.stdin.read()
"""


@pytest.fixture
def server():
    "Starts a Sail server of its own process, with these variables; gives its address and the process."
    begun = []
    def server(**variables):
        process = subprocess.Popen([sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                   text=True, env={**os.environ, "RUST_LOG": "error", **variables})
        begun.append(process)
        return f"sc://127.0.0.1:{int(process.stdout.readline())}", process
    yield server
    for process in begun:
        process.kill()
        process.communicate()


def test_whoever_asks_gets_the_same_session(env):
    got = []
    threads = [threading.Thread(target=lambda: got.append(sessions.get_spark(env))) for _ in range(8)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert len(got) == 8 and len({id(s) for s in got}) == 1 and len(sessions.SESSIONS) == 1


def test_a_session_that_was_stopped_is_made_anew(env):
    first = sessions.get_spark(env)
    first.stop()
    assert sessions.get_spark(env) is not first and sessions.get_spark(env).sql("SELECT 1").toArrow().num_rows == 1
    sessions.stop()
    sessions.stop()
    assert not sessions.SESSIONS and sessions.get_spark(env).sql("SELECT 1").toArrow().num_rows == 1


def test_a_stopped_session_that_is_collected_leaves_the_others_alone(env, tmp_path):
    from pyspark.sql.connect.client.reattach import ExecutePlanResponseReattachableIterator as Answers
    old = sessions.get_spark(env)
    sessions.stop()
    new = sessions.get_spark(changed(env, lakehouse=str(tmp_path / "other")))
    assert new.range(3).count() == 3
    helpers = Answers._release_thread_pool_instance
    old.__del__()  # what the garbage collector does
    assert helpers is not None and Answers._release_thread_pool_instance is helpers and new.range(3).count() == 3
    sessions.stop()
    assert Answers._release_thread_pool_instance is None


def test_the_session_is_in_utc_and_knows_the_targets_catalogs(env):
    spark = sessions.get_spark(changed(env, catalog="dev", read=("dev", "prod"), write=("dev", "my-scratch")))
    zone, catalog = spark.sql("SELECT current_timezone(), current_catalog()").collect()[0]
    there = {row[0] for row in spark.sql("SHOW CATALOGS").collect()}
    assert (zone, catalog) == ("UTC", "dev") and {"dev", "prod", "my-scratch"} <= there and "staging" not in there


def test_settings_for_sail_do_not_leak_into_the_environment(env, monkeypatch):
    monkeypatch.setenv("SAIL_CATALOG__DEFAULT_CATALOG", '"mine"')
    before = dict(os.environ)
    sessions.get_spark(env)
    changes = {k for k in before.keys() | os.environ.keys() if before.get(k) != os.environ.get(k)}
    assert changes <= {"SPARK_CONNECT_MODE_ENABLED"}
    sessions.stop()
    assert dict(os.environ) == before


def test_the_batch_size_is_ours_unless_the_environment_gives_one(env, monkeypatch):
    def largest_batch():
        from collections.abc import Iterator

        import pyarrow
        def sizes(batches: Iterator[pyarrow.RecordBatch]):
            for b in batches: yield pyarrow.RecordBatch.from_pydict({"rows": [b.num_rows]})
        spark = sessions.get_spark(env)
        tables.merge(spark, env, "numbers", spark.range(200_000), ["id"])
        return max(row[0] for row in tables.read(spark, env, "numbers").mapInArrow(sizes, "rows INT").collect())
    monkeypatch.delenv("SAIL_EXECUTION__BATCH_SIZE", raising=False)
    assert largest_batch() > 8192
    sessions.stop()
    monkeypatch.setenv("SAIL_EXECUTION__BATCH_SIZE", "1000")
    assert largest_batch() <= 1000


def test_tables_that_are_there_are_attached_and_a_broken_one_does_not_hide_them(env):
    spark = sessions.get_spark(env)
    tables.merge(spark, env, "b", spark.sql("SELECT 1 AS k"), ["k"])
    sessions.stop()
    broken = Path(env.lakehouse, "dev/flights/a/_delta_log/00000000000000000000.json")
    broken.parent.mkdir(parents=True)
    broken.write_text("broken")
    with pytest.warns(UserWarning, match="table dev.flights.a cannot be attached"): spark = sessions.get_spark(env)
    assert spark.table("dev.flights.b").toArrow().num_rows == 1


# ---- servers of others

def test_a_sail_server_is_used_by_its_address(env, server, monkeypatch):
    address, _ = server(**sessions.sail_settings(env))
    monkeypatch.setenv("SPARK_REMOTE", address)
    spark = sessions.get_spark(env)
    assert spark is sessions.get_spark(env)
    tables.merge(spark, env, "t", spark.sql("SELECT 1 AS k"), ["k"])
    monkeypatch.delenv("SPARK_REMOTE")
    here = sessions.get_spark(env)
    assert here is not spark and here.table("dev.flights.t").toArrow().to_pylist() == [{"k": 1}]


@pytest.mark.slow
def test_a_sail_server_without_the_catalogs_is_refused_with_the_setting_that_makes_them(env, server, monkeypatch):
    address, _ = server(SAIL_CATALOG__LIST='[{name="dev", type="memory", initial_database=["default"]}]')
    monkeypatch.setenv("SPARK_REMOTE", address)
    message = r"has no catalog prod, staging\n  start it with SAIL_CATALOG__LIST='\[\{name=\"dev\""
    with pytest.raises(MlopsError, match=message): sessions.get_spark(env)
    from pyspark.sql.connect.session import SparkSession
    assert SparkSession.getActiveSession() is None  # or MLflow asks it, and waits for a server that is gone


@pytest.mark.slow
def test_an_address_where_nothing_answers_is_an_error_within_seconds(env, monkeypatch):
    with socket.socket() as free: free.bind(("127.0.0.1", 0)); port = free.getsockname()[1]
    monkeypatch.setenv("SPARK_REMOTE", f"sc://127.0.0.1:{port}")
    began = time.time()
    with pytest.raises(MlopsError, match=f"no Spark server answers at sc://127.0.0.1:{port}(.|\n)*unset SPARK_REMOTE"):
        sessions.get_spark(env)
    assert time.time() - began < 15


def test_a_port_that_listens_and_says_nothing_is_no_server(env):
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(MlopsError, match="no Spark server answers"):
        sessions.check_answers(f"sc://127.0.0.1:{silent.getsockname()[1]}", seconds=1)


@pytest.mark.parametrize("address", ["localhost:15002", "http://localhost:1", "sc://", "sc://host:port", "local[2]"])
def test_what_is_no_address_is_refused(env, monkeypatch, address):
    monkeypatch.setenv("SPARK_REMOTE", address)
    with pytest.raises(MlopsError, match=r"SPARK_REMOTE(.|\n)*(write sc://host:port|unset SPARK_REMOTE)"):
        sessions.get_spark(env)


@pytest.mark.slow
@pytest.mark.filterwarnings("default:.*RETRIES_EXCEEDED")
def test_a_server_that_dies_ends_the_wait_within_seconds(env, server, monkeypatch):
    address, process = server(**sessions.sail_settings(env))
    monkeypatch.setenv("SPARK_REMOTE", address)
    spark = sessions.get_spark(env)
    process.kill()
    began = time.time()
    with pytest.raises(Exception, match="(?i)unavailable|refused|connect|closed"): spark.sql("SELECT 1").collect()
    sessions.stop()
    assert time.time() - began < 20


# ---- engines that are not there

@pytest.mark.parametrize("engine, module, extra", [
    ("sail", "pysail.spark", "local"), ("spark", "pyspark.sql", "spark"),
    ("databricks", "databricks.connect", "databricks")])
def test_an_engine_that_is_missing_names_its_install_command(env, monkeypatch, engine, module, extra):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MlopsError, match=rf"engine '{engine}' needs(.|\n)*uv pip install -e '\.\[{extra}\]'"):
        sessions.get_spark(changed(env, engine=engine))


def test_the_client_alone_is_not_apache_spark(env):
    pytest.importorskip("pysail")  # this environment has the client, and only the client
    with pytest.raises(MlopsError, match=r"needs the whole of pyspark(.|\n)*uv pip install -e '\.\[spark\]'"):
        sessions.get_spark(changed(env, engine="spark"))


# ---- Databricks

class Session:
    "Stands for the session that a Databricks notebook finds."

    def __init__(self): self.settings, self.stopped = {}, False

    @property
    def conf(self): return self

    def set(self, key, value): self.settings[key] = value

    def stop(self): self.stopped = True


def test_a_databricks_notebook_keeps_its_own_session(env, monkeypatch):
    from pyspark.sql import SparkSession
    notebooks = Session()
    monkeypatch.setattr(SparkSession, "getActiveSession", lambda: notebooks)
    monkeypatch.setenv("SPARK_REMOTE", "unix:///databricks/sparkconnect/grpc.sock")  # as serverless sets it
    there = changed(env, engine="databricks", home="databricks")
    assert sessions.get_spark(there) is sessions.get_spark(there) is notebooks
    assert notebooks.settings == {"spark.sql.session.timeZone": "UTC"}
    sessions.stop()
    assert not notebooks.stopped, "it is the notebook's, not ours"


def test_from_outside_databricks_connect_makes_the_session(env, monkeypatch):
    made = Session()
    builder = types.SimpleNamespace(getOrCreate=lambda: made)
    module = types.SimpleNamespace(DatabricksSession=types.SimpleNamespace(builder=builder))
    monkeypatch.setitem(sys.modules, "databricks.connect", module)
    assert sessions.get_spark(changed(env, engine="databricks")) is made
