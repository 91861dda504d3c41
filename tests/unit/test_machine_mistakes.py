"""What is wrong with a server, a workspace, Java or a port is one sentence with its remedy, before any work starts."""
import re
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path
from threading import Thread

import pytest
from typer.testing import CliRunner

from mlops_nb import cli, doctor, mlflow_access
from mlops_nb.data import session
from mlops_nb.env import load_env
from mlops_nb.errors import MlopsError

pytestmark = pytest.mark.slow  # small servers, and the client's own attempts

ROOT = Path(__file__).parents[2]
VARIABLES = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_AUTH",
             "MLFLOW_TRACKING_AWS_SIGV4", "DATABRICKS_HOST", "DATABRICKS_TOKEN", "DATABRICKS_CONFIG_PROFILE",
             "DATABRICKS_CONFIG_FILE", "SPARK_REMOTE", "MLOPS_ONLINE_STORE", "JAVA_HOME")


@contextmanager
def answering(status: int, body: bytes = b"", headers: tuple = ()):
    "An HTTP server on this machine with one answer to everything; yields its port and the requests that it got."
    requests = []

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append((self.path, self.headers.get("Authorization", "")))
            self.send_response(status)
            for name, value in (*headers, ("Content-Length", str(len(body)))): self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)
        do_POST = do_GET

        def log_message(self, *_): pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try: yield server.server_port, requests
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def machine(no_settings, tmp_path, monkeypatch):
    "A machine without any login, in this project and with a state that does not exist."
    for name in VARIABLES: monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("MLOPS_STATE", str(tmp_path / "state"))
    monkeypatch.chdir(ROOT)
    return monkeypatch


def both(tmp_path, subject: str) -> str:
    "The refusal of `mlops run`, which leaves nothing; `mlops doctor` says the same in its line about the subject."
    with pytest.raises(MlopsError) as error:
        CliRunner().invoke(cli.app, ["run", "features"], catch_exceptions=False)
    assert not (tmp_path / "state").exists()
    results = [doctor.check_mlflow(load_env()), doctor.check_engine(load_env().engine)]
    [result] = [result for result in results if result.subject.startswith(subject)]
    assert (result.state, result.observation, result.hint) == ("wrong", error.value.message, error.value.hint)
    assert len(str(error.value).splitlines()) == 2 and error.value.hint
    return str(error.value)


REFUSED = [
    ({}, "needs a user and a password, and none is set\n  set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"),
    ({"MLFLOW_TRACKING_USERNAME": "ann"}, "needs a user and a password, and only the user is set"),
    ({"MLFLOW_TRACKING_USERNAME": "ann", "MLFLOW_TRACKING_PASSWORD": "secret-word"},
     "does not accept user 'ann' with this password"),
    ({"MLFLOW_TRACKING_TOKEN": "secret-word"},
     "it is expired, revoked or of another server\n  set MLFLOW_TRACKING_TOKEN")]


@pytest.mark.parametrize(("status", "login", "message"), [(401, *case) for case in REFUSED] + [(500, *REFUSED[3])])
def test_a_server_that_refuses_the_login(machine, tmp_path, status, login, message):
    with answering(status, b"You are not authenticated") as (port, requests):
        for name, value in login.items(): machine.setenv(name, value)
        machine.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
        text = both(tmp_path, "MLflow store")
    assert text.startswith(f"the MLflow server at http://127.0.0.1:{port} ") and message in text
    assert "secret-word" not in text and {path for path, _ in requests} == {"/version"}
    assert bool(requests[0][1]) == ("secret-word" in login.values())


@pytest.mark.parametrize(("server_version", "message"), [
    ("2.22.0", f"has version 2.22.0, older than the client's {version('mlflow')}"),
    ("1.30.0", "\n  on the server: pip install 'mlflow=="), ("4.0.0", "has version 4.0.0, newer than the client's")])
def test_a_server_of_another_mlflow(machine, tmp_path, server_version, message):
    with answering(200, server_version.encode()) as (port, _):
        machine.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
        assert message in both(tmp_path, "MLflow store")


def test_a_server_of_this_mlflow_and_one_that_hides_its_version(machine):
    machine.setenv("MLFLOW_TRACKING_USERNAME", "ann")
    machine.setenv("MLFLOW_TRACKING_PASSWORD", "word")
    for status, body, text in ((200, b"3.1.4", ", MLflow 3.1.4, as ann"), (404, b"nothing", "")):
        with answering(status, body) as (port, requests):
            machine.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}/")
            result = doctor.check_mlflow(load_env())
        assert result.state == "ok" and result.observation == f"a server: http://127.0.0.1:{port}/{text}"
        assert requests == [("/version", "Basic YW5uOndvcmQ=")]


def test_the_login_of_the_file_of_mlflow(machine, tmp_path):
    file = tmp_path / ".mlflow/credentials"
    file.parent.mkdir()
    file.write_text("[mlflow]\nmlflow_tracking_username = bob\nmlflow_tracking_password = 50%\n")
    assert mlflow_access.server_credentials() == ("bob", "50%", "")
    file.write_text("no section")
    with pytest.raises(MlopsError, match="credentials cannot be read"): mlflow_access.server_credentials()


@pytest.mark.parametrize(("host", "message"), [
    ("myworkspace.cloud.databricks.com", "\n  export DATABRICKS_HOST=https://myworkspace.cloud.databricks.com"),
    ("http://myworkspace.cloud.databricks.com/", "\n  export DATABRICKS_HOST=https://myworkspace.cloud.databricks.com"),
    ("", "no workspace is set\n  databricks auth login --host https://"),
    ("localhost:18410", "begins with http://\n  export DATABRICKS_HOST=http://localhost:18410"),
    ("https://127.0.0.1:1", "no workspace answers at https://127.0.0.1:1: ")])
def test_an_address_of_a_workspace(machine, tmp_path, host, message):
    machine.setenv("DATABRICKS_TOKEN", "secret-word")
    machine.setenv("MLFLOW_TRACKING_URI", "databricks")
    if host: machine.setenv("DATABRICKS_HOST", host)
    text = both(tmp_path, "MLflow store")
    assert message in text and "secret-word" not in text


def test_a_profile_without_https_and_one_that_does_not_exist(machine, tmp_path):
    (tmp_path / ".databrickscfg").write_text("[shop]\nhost = shop.cloud.databricks.com\ntoken = secret-word\n")
    machine.setenv("MLFLOW_TRACKING_URI", "databricks://shop")
    text = both(tmp_path, "MLflow store")
    assert text.startswith("host of profile shop in ") and "\n  write host = https://shop.cloud" in text
    machine.setenv("MLFLOW_TRACKING_URI", "databricks://shp")
    assert "no profile 'shp'" in both(tmp_path, "MLflow store")


@pytest.mark.parametrize(("engine", "status", "body"), [
    ("sail", 401, b'{"error_code":401,"message":"Credential was not sent or is of an unsupported type."}'),
    ("databricks", 403, b'{"error_code":"403","message":"Invalid access token."}')])
def test_a_token_that_is_expired(machine, tmp_path, engine, status, body):
    with answering(status, body) as (port, requests):
        machine.setenv("DATABRICKS_HOST", f"http://127.0.0.1:{port}")
        machine.setenv("DATABRICKS_TOKEN", "secret-word")
        machine.setenv("MLFLOW_TRACKING_URI", "databricks")
        if engine == "databricks": machine.setattr(session, "require_engine", lambda engine: None)
        machine.setenv("MLOPS_ENGINE", engine)
        text = both(tmp_path, "MLflow store")
    assert "does not accept the token in DATABRICKS_TOKEN: it is expired, revoked or of another workspace" in text
    assert """\n  export DATABRICKS_TOKEN="$(cat """ in text and text.endswith("the file that mlops up names")
    assert set(requests) == {("/api/2.0/preview/scim/v2/Me", "Bearer secret-word")} and "secret-word" not in text


def test_a_workspace_that_accepts_the_token(machine):
    with answering(200, b'{"userName": "ann@example.com"}') as (port, _):
        machine.setenv("DATABRICKS_HOST", f"http://127.0.0.1:{port}")
        machine.setenv("DATABRICKS_TOKEN", "word")
        machine.setenv("MLFLOW_TRACKING_URI", "databricks")
        assert doctor.check_mlflow(load_env()).observation == "the workspace, as ann@example.com"


def java(folder: Path, text: str) -> None:
    "A program java that says its version."
    program = folder / "bin/java"
    program.parent.mkdir(parents=True)
    program.write_text(f"#!/bin/sh\necho '{text}' >&2\n")
    program.chmod(0o755)


@pytest.mark.parametrize(("text", "message"), [
    ('java version "1.8.0_392"', "(JAVA_HOME) is Java 8"), ('openjdk version "11.0.21" 2023-10-17', "is Java 11"),
    ("cannot start", "(JAVA_HOME) does not run"), (None, "there is no program java")])
def test_a_java_that_spark_cannot_use(machine, tmp_path, text, message):
    if text:
        java(tmp_path / "jdk", text)
        machine.setenv("JAVA_HOME", str(tmp_path / "jdk"))
    else: machine.setenv("PATH", str(tmp_path))
    machine.setattr(session, "find_spec", lambda module: True)  # the environment of engine spark
    machine.setenv("MLOPS_ENGINE", "spark")
    machine.setattr(doctor, "installed", lambda package: "4.1.4")
    refusal = both(tmp_path, "engine")
    assert refusal.startswith("engine 'spark' needs Java 17 or later, and ") and message in refusal
    assert "apt-get install openjdk-17-jre-headless" in refusal


def test_a_java_that_spark_can_use(machine, tmp_path):
    java(tmp_path / "jdk", 'openjdk version "21" 2023-09-19')
    machine.setenv("JAVA_HOME", str(tmp_path / "jdk"))
    assert session.check_java() == 21


@contextmanager
def spark_server(spark_version: str):
    "A Spark Connect server that can only say its version."
    grpc = pytest.importorskip("grpc", reason="uv pip install -e '.[local]'")
    from pyspark.sql.connect.proto import base_pb2, base_pb2_grpc

    class Answers(base_pb2_grpc.SparkConnectServiceServicer):
        def AnalyzePlan(self, request, context):
            answer = base_pb2.AnalyzePlanResponse(session_id=request.session_id, server_side_session_id="one")
            answer.spark_version.version = spark_version
            return answer

        def Config(self, request, context):
            return base_pb2.ConfigResponse(session_id=request.session_id, server_side_session_id="one")

        def ReleaseSession(self, request, context):
            return base_pb2.ReleaseSessionResponse(session_id=request.session_id, server_side_session_id="one")

    with ThreadPoolExecutor(4) as threads:
        server = grpc.server(threads)
        base_pb2_grpc.add_SparkConnectServiceServicer_to_server(Answers(), server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try: yield f"sc://127.0.0.1:{port}"
        finally: server.stop(None).wait()


@pytest.mark.parametrize("spark_version", ["3.5.5", "5.0.0"])
def test_a_spark_server_of_another_version(machine, tmp_path, spark_version):
    with spark_server(spark_version) as address:
        machine.setenv("SPARK_REMOTE", address)
        text = both(tmp_path, "engine")
    assert f"the Spark server at {address} has version {spark_version}, and the client pyspark has 4." in text
    assert "\n  start a server of Spark 4, or unset SPARK_REMOTE" in text


@pytest.mark.parametrize(("address", "message"), [
    ("sc://127.0.0.1:1", "no Spark server answers at sc://127.0.0.1:1 ($SPARK_REMOTE)\n  start it, or unset"),
    ("127.0.0.1:15002", "is not a valid address of a Spark server"),
    ("http://127.0.0.1", "is not a valid address of a Spark server")])
def test_an_address_of_a_spark_server(machine, tmp_path, address, message):
    machine.setenv("SPARK_REMOTE", address)
    machine.setattr(session, "check_answers", partial(session.check_answers, seconds=0.5))
    assert message in both(tmp_path, "engine")


def test_a_port_that_is_in_use(machine, project):
    machine.chdir(project.root)  # its state is in its folder
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(MlopsError) as error:
            CliRunner().invoke(cli.app, ["ui", "--port", str(port)], catch_exceptions=False)
    assert error.value.message == f"port {port} is in use, or this user may not listen on it"
    assert re.fullmatch(r"mlops ui --port \d+", error.value.hint)


@pytest.mark.parametrize(("variable", "value", "module", "message"), [
    ("MLOPS_ONLINE_STORE", "redis://host/0", "redis", "uv pip install -e '.[redis]'"),
    ("MLOPS_ONLINE_STORE", "postgresql://host/db", "psycopg", "uv pip install -e '.[postgres]'"),
    ("MLOPS_ONLINE_STORE", "dynamodb://eu-west-1", "boto3", "uv pip install -e '.[aws]'"),
    ("MLOPS_ONLINE_STORE", "cosmos://host/db?key=secrets/a/b", "azure.cosmos", "uv pip install -e '.[azure]'"),
    ("MLOPS_ENGINE", "sail", "deltalake", "uv pip install -e '.[local]'"),
    ("MLOPS_ENGINE", "sail", "pysail", "uv pip install -e '.[local]'"),
    ("MLFLOW_TRACKING_URI", "postgresql+psycopg://host/db", "psycopg", "uv pip install 'psycopg[binary]'")])
def test_an_extra_that_is_missing(machine, tmp_path, variable, value, module, message):
    machine.setenv(variable, value)
    machine.setenv("MLOPS_SECRET_A_B", "a2V5")
    machine.setitem(sys.modules, module, None)
    machine.setattr(session, "find_spec", lambda name: None if name == module else True)
    with pytest.raises(MlopsError) as error:
        CliRunner().invoke(cli.app, ["run", "features"], catch_exceptions=False)
    assert repr(module) in error.value.message and message in error.value.hint
    assert not (tmp_path / "state").exists()


def test_a_permission_that_is_missing(machine):
    text = ("API request to endpoint /api/2.0/mlflow/registered-models/alias failed with error code 403 != 200. "
            "Response body: 'Permission denied'")
    machine.setenv("MLFLOW_TRACKING_USERNAME", "bob")
    refusal = mlflow_access.refusal_of(Exception(text), "http://me:word@host")
    assert refusal.message == "user 'bob' lacks a permission at MLflow http://host (registered-models/alias)"
    assert mlflow_access.refusal_of(Exception("failed with error code 404"), "http://host") is None


def test_inside_a_workspace_nothing_is_asked(machine):
    machine.setenv("DATABRICKS_RUNTIME_VERSION", "18.0")
    assert mlflow_access.check_mlflow_answers("databricks") == "the workspace"
