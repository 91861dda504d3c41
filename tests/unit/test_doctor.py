"""The doctor's checks of the online store."""
import socket
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
from typer.testing import CliRunner

from mlops_nb import cli, doctor
from mlops_nb.env import load_env
from mlops_nb.features.stores.rows import layout_of
from mlops_nb.features.stores.store import STORE_KINDS, store

ROOT = Path(__file__).parents[2]


@pytest.fixture
def env(tmp_path, monkeypatch):
    for name in ("MLOPS_ONLINE_STORE", "MLOPS_ENGINE", "MLOPS_STATE"): monkeypatch.delenv(name, raising=False)
    return replace(load_env("dev", root=ROOT), engine="sail", state=tmp_path / "state")


def test_the_default_is_sqlite_and_the_check_creates_no_file(env):
    result = doctor.check_online_store(env)
    assert result.state == "ok" and str(env.state / "online.db") in result.observation
    assert "the default" in result.observation and "created by the first publish" in result.observation
    assert not env.state.exists()


def test_a_store_that_answers(env):
    with store(env) as opened:
        opened.begin(layout_of("dev.s.t", pa.schema([("k", pa.int64())]), ("k",)), 1)
    result = doctor.check_online_store(env)
    assert result.state == "ok" and "answers: 1 tables" in result.observation


def test_a_file_that_is_not_a_store(env):
    env.state.mkdir()
    (env.state / "online.db").write_text("not a database, and longer than the header of one" * 30)
    result = doctor.check_online_store(env)
    assert result.state == "wrong" and "file is not a database" in result.observation


@pytest.mark.parametrize("scheme, module, extra", [("redis", "redis", "redis"), ("postgresql", "psycopg", "postgres"),
                                                   ("dynamodb", "boto3", "aws"), ("cosmos", "azure.cosmos", "azure")])
def test_a_driver_that_is_not_installed(env, monkeypatch, scheme, module, extra):
    monkeypatch.setenv("MLOPS_ONLINE_STORE", f"{scheme}://host/name")
    monkeypatch.setitem(sys.modules, module, None)
    result = doctor.check_online_store(env)
    assert result.state == "wrong" and f"{module!r}" in result.observation
    assert "set by MLOPS_ONLINE_STORE" in result.observation
    assert result.hint == f"uv pip install -e '.[{extra}]'"
    package = doctor.OPTIONAL_PACKAGES[STORE_KINDS[scheme].extra][0]
    assert package.replace("-", ".").split(".")[0] == module.split(".")[0]


@pytest.mark.parametrize("uri, message", [
    ("redsi://host", "no kind of online store 'redsi'"), ("host", "cannot be read"),
    ("redis://:hidden@host", "holds a password")])
def test_an_invalid_address(env, monkeypatch, uri, message):
    monkeypatch.setenv("MLOPS_ONLINE_STORE", uri)
    result = doctor.check_online_store(env)
    assert result.state == "wrong" and message in result.observation and "hidden" not in f"{result}"


@pytest.mark.timeout(30)  # half of what the address itself allows
def test_a_server_that_is_down_or_never_answers(env, monkeypatch):
    pytest.importorskip("redis", reason="uv pip install -e '.[redis]'")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("MLOPS_ONLINE_STORE", f"redis://127.0.0.1:{silent.getsockname()[1]}/0?timeout=60")
        result = doctor.check_online_store(env, 0.5)
        assert result.state == "wrong" and "does not answer within 0.5 s" in result.observation
    result = doctor.check_online_store(env)
    assert result.state == "wrong" and "refused" in result.observation


def test_on_databricks_the_store_is_databricks_own(env):
    assert doctor.check_online_store(replace(env, engine="databricks")).state == "missing"
    named = replace(env, engine="databricks", variables=env.variables | {"online_store": "shop"})
    assert doctor.check_online_store(named).observation == "Databricks' own: shop"


def test_the_command_prints_paths_and_commands_whole(env, monkeypatch, tmp_path):
    state = tmp_path / ("a-long-name-" * 8)
    monkeypatch.setenv("MLOPS_STATE", str(state))
    monkeypatch.chdir(ROOT)
    output = CliRunner().invoke(cli.app, ["doctor"], env={"COLUMNS": "80"}).output
    assert f"sqlite://{state}/online.db".replace("sqlite:///", "sqlite:////") in output
    assert any(line.strip().startswith("uv pip install -e '.[spark]'") for line in output.splitlines())
