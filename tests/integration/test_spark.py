"""Sessions: one per process and target, in UTC, on own or external servers, with short timeouts."""
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
    "Start a Sail server in another process, with these variables; return its address and the process."
    processes = []
    def server(**variables):
        process = subprocess.Popen([sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                   text=True, env={**os.environ, "RUST_LOG": "error", **variables})
        processes.append(process)
        return f"sc://127.0.0.1:{int(process.stdout.readline())}", process
    yield server
    for process in processes:
        process.kill()
        process.communicate()


def test_all_threads_get_the_same_session(env):
    results = []
    threads = [threading.Thread(target=lambda: results.append(sessions.get_spark(env))) for _ in range(8)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert len(results) == 8 and len({id(s) for s in results}) == 1 and len(sessions.SESSIONS) == 1


def test_a_stopped_session_is_replaced_by_a_new_one(env):
    first = sessions.get_spark(env)
    first.stop()
    assert sessions.get_spark(env) is not first and sessions.get_spark(env).sql("SELECT 1").toArrow().num_rows == 1
    sessions.stop()
    sessions.stop()
    assert not sessions.SESSIONS and sessions.get_spark(env).sql("SELECT 1").toArrow().num_rows == 1


def test_garbage_collection_of_a_stopped_session_does_not_affect_others(env, tmp_path):
    from pyspark.sql.connect.client.reattach import ExecutePlanResponseReattachableIterator as Responses
    old = sessions.get_spark(env)
    sessions.stop()
    new = sessions.get_spark(changed(env, lakehouse=str(tmp_path / "other")))
    assert new.range(3).count() == 3
    thread_pool = Responses._release_thread_pool_instance
    old.__del__()  # as the garbage collector calls it
    assert thread_pool is not None and Responses._release_thread_pool_instance is thread_pool
    assert new.range(3).count() == 3
    sessions.stop()
    assert Responses._release_thread_pool_instance is None


def test_the_session_is_in_utc_and_has_the_targets_catalogs(env):
    spark = sessions.get_spark(changed(env, catalog="dev", read=("dev", "prod"), write=("dev", "my-scratch")))
    zone, catalog = spark.sql("SELECT current_timezone(), current_catalog()").collect()[0]
    catalogs = {row[0] for row in spark.sql("SHOW CATALOGS").collect()}
    assert (zone, catalog) == ("UTC", "dev") and {"dev", "prod", "my-scratch"} <= catalogs and "staging" not in catalogs


def test_settings_for_sail_do_not_leak_into_the_environment(env, monkeypatch):
    monkeypatch.setenv("SAIL_CATALOG__DEFAULT_CATALOG", '"mine"')
    before = dict(os.environ)
    sessions.get_spark(env)
    changes = {k for k in before.keys() | os.environ.keys() if before.get(k) != os.environ.get(k)}
    assert changes <= {"SPARK_CONNECT_MODE_ENABLED"}
    sessions.stop()
    assert dict(os.environ) == before


def test_the_environment_can_override_the_batch_size(env, monkeypatch):
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


def test_existing_tables_are_attached_although_one_is_broken(env):
    spark = sessions.get_spark(env)
    tables.merge(spark, env, "b", spark.sql("SELECT 1 AS k"), ["k"])
    sessions.stop()
    broken = Path(env.lakehouse, "dev/flights/a/_delta_log/00000000000000000000.json")
    broken.parent.mkdir(parents=True)
    broken.write_text("broken")
    with pytest.warns(UserWarning, match="table dev.flights.a cannot be attached"): spark = sessions.get_spark(env)
    assert spark.table("dev.flights.b").toArrow().num_rows == 1


# ---- external servers

def test_an_external_sail_server_is_used(env, server, monkeypatch):
    address, _ = server(**sessions.sail_settings(env))
    monkeypatch.setenv("SPARK_REMOTE", address)
    spark = sessions.get_spark(env)
    assert spark is sessions.get_spark(env)
    tables.merge(spark, env, "t", spark.sql("SELECT 1 AS k"), ["k"])
    monkeypatch.delenv("SPARK_REMOTE")
    local = sessions.get_spark(env)
    assert local is not spark and local.table("dev.flights.t").toArrow().to_pylist() == [{"k": 1}]


@pytest.mark.slow
def test_a_sail_server_without_the_catalogs_is_an_error_with_the_setting(env, server, monkeypatch):
    address, _ = server(SAIL_CATALOG__LIST='[{name="dev", type="memory", initial_database=["default"]}]')
    monkeypatch.setenv("SPARK_REMOTE", address)
    message = r"has no catalog prod, staging\n  start it with SAIL_CATALOG__LIST='\[\{name=\"dev\""
    with pytest.raises(MlopsError, match=message): sessions.get_spark(env)
    from pyspark.sql.connect.session import SparkSession
    assert SparkSession.getActiveSession() is None  # otherwise MLflow uses it and waits for the server


def test_a_sail_server_that_loses_nan_is_an_error_with_the_settings(env, server, monkeypatch):
    settings = sessions.sail_settings(env)
    for missing in sessions.NAN_SETTINGS:
        others = {name: value for name, value in settings.items() if name != missing}
        address, process = server(**others)
        monkeypatch.setenv("SPARK_REMOTE", address)
        message = f"loses NaN(.|\n)*start it with .*{missing}=false"
        with pytest.raises(MlopsError, match=message): sessions.get_spark(env)
        process.kill()
    assert not list(Path(env.lakehouse, "_staged").iterdir())


@pytest.mark.slow
def test_an_address_without_a_server_is_an_error_within_seconds(env, monkeypatch):
    with socket.socket() as free_socket:
        free_socket.bind(("127.0.0.1", 0))
        port = free_socket.getsockname()[1]
    monkeypatch.setenv("SPARK_REMOTE", f"sc://127.0.0.1:{port}")
    began = time.time()
    with pytest.raises(MlopsError, match=f"no Spark server answers at sc://127.0.0.1:{port}(.|\n)*unset SPARK_REMOTE"):
        sessions.get_spark(env)
    assert time.time() - began < 15


def test_a_port_that_listens_without_answering_is_no_server(env):
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(MlopsError, match="no Spark server answers"):
        sessions.check_answers(f"sc://127.0.0.1:{silent.getsockname()[1]}", seconds=1)


@pytest.mark.parametrize("address", ["localhost:15002", "http://localhost:1", "sc://", "sc://host:port", "local[2]"])
def test_invalid_addresses_are_refused(env, monkeypatch, address):
    monkeypatch.setenv("SPARK_REMOTE", address)
    with pytest.raises(MlopsError, match=r"SPARK_REMOTE(.|\n)*(write sc://host:port|unset SPARK_REMOTE)"):
        sessions.get_spark(env)


@pytest.mark.slow
@pytest.mark.filterwarnings("default:.*RETRIES_EXCEEDED")
def test_calls_fail_within_seconds_when_the_server_dies(env, server, monkeypatch):
    address, process = server(**sessions.sail_settings(env))
    monkeypatch.setenv("SPARK_REMOTE", address)
    spark = sessions.get_spark(env)
    process.kill()
    began = time.time()
    with pytest.raises(Exception, match="(?i)unavailable|refused|connect|closed"): spark.sql("SELECT 1").collect()
    sessions.stop()
    assert time.time() - began < 20


# ---- missing engines

@pytest.mark.parametrize("engine, module, extra", [
    ("sail", "pysail.spark", "local"), ("spark", "pyspark.sql", "spark"),
    ("databricks", "databricks.connect", "databricks")])
def test_a_missing_engine_is_an_error_with_the_install_command(env, monkeypatch, engine, module, extra):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MlopsError, match=rf"engine '{engine}' needs(.|\n)*uv pip install -e '\.\[{extra}\]'"):
        sessions.get_spark(changed(env, engine=engine))


def test_the_client_alone_is_not_apache_spark(env):
    pytest.importorskip("pysail")  # this environment has only the client
    with pytest.raises(MlopsError, match=r"needs the full pyspark package(.|\n)*uv pip install -e '\.\[spark\]'"):
        sessions.get_spark(changed(env, engine="spark"))


# ---- Databricks

class Session:
    "A stand-in for the session of a Databricks notebook."

    def __init__(self): self.settings, self.stopped = {}, False

    @property
    def conf(self): return self

    def set(self, key, value): self.settings[key] = value

    def stop(self): self.stopped = True


def test_a_databricks_notebook_keeps_its_own_session(env, monkeypatch):
    from pyspark.sql import SparkSession
    notebook_session = Session()
    monkeypatch.setattr(SparkSession, "getActiveSession", lambda: notebook_session)
    monkeypatch.setenv("SPARK_REMOTE", "unix:///databricks/sparkconnect/grpc.sock")  # as serverless sets it
    on_databricks = changed(env, engine="databricks", home="databricks")
    assert sessions.get_spark(on_databricks) is sessions.get_spark(on_databricks) is notebook_session
    assert notebook_session.settings == {"spark.sql.session.timeZone": "UTC"}
    sessions.stop()
    assert not notebook_session.stopped, "the notebook owns its session"


def test_outside_of_databricks_databricks_connect_creates_the_session(env, monkeypatch):
    session = Session()
    builder = types.SimpleNamespace(getOrCreate=lambda: session)
    module = types.SimpleNamespace(DatabricksSession=types.SimpleNamespace(builder=builder))
    monkeypatch.setitem(sys.modules, "databricks.connect", module)
    assert sessions.get_spark(changed(env, engine="databricks")) is session
