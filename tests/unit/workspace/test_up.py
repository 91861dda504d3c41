"""What `mlops up` prints and chooses, without its processes: the port, endpoints that lag behind their alias."""
import socket
from dataclasses import replace
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from mlops_nb import cli
from mlops_nb.commands import up
from mlops_nb.env import load_env
from mlops_nb.errors import MlopsError
from mlops_nb.models import registry
from mlops_nb.serving.endpoint_config import new_endpoint
from mlops_nb.serving.places import last_port, make_places, only_one, write_running
from mlops_nb.workspace import supervisor, tokens
from mlops_nb.workspace.endpoint_store import EndpointStore

MODEL, NAME = "dev.flights.late_arrival", "dev-flights-late_arrival"


@pytest.fixture
def env(tmp_path): return replace(load_env("dev"), state=tmp_path, home="local")


@pytest.fixture
def taken():
    "A port at which another program listens."
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        yield other.getsockname()[1]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_the_next_start_has_the_port_of_the_last_one_after_a_clean_end(env):
    places, port = make_places(env), free_port()
    with only_one(places): write_running(places, f"http://127.0.0.1:{port}")
    assert not places.running.exists() and up.start_port(places, "127.0.0.1", None) == port


def test_another_port_is_announced_and_a_taken_one_that_was_given_is_refused(env, taken, monkeypatch, capsys):
    places = make_places(env)
    monkeypatch.setattr(up, "WORKSPACE_PORT", taken)
    port = up.start_port(places, "127.0.0.1", None)
    assert port != taken and up.is_free(port)
    assert capsys.readouterr().err == f"port {taken} is in use; this workspace is at {port}\n"
    with pytest.raises(MlopsError, match=f"port {taken} is in use"): up.start_port(places, "127.0.0.1", taken)
    assert up.start_port(places, "192.0.2.1", taken) == taken  # only listening at this address can tell


@pytest.mark.parametrize("text", ["", "x", "0", "99999", "٣"])
def test_a_port_that_cannot_be_read_is_none(env, text):
    places = make_places(env)
    places.port.write_text(text)
    assert last_port(places) is None


def test_other_machines_get_an_address_if_they_can_reach_the_workspace(monkeypatch, capsys):
    assert up.network_address("127.0.0.1", 80) == up.network_address("192.0.2.1", 80) == ""
    address = up.network_address("0.0.0.0", 80)
    assert address.endswith(":80") and "0.0.0.0" not in address
    def no_route(*_): raise OSError("Network is unreachable")
    monkeypatch.setattr(socket, "socket", no_route)
    assert up.network_address("::", 80) == f"http://{socket.gethostname()}:80"


def test_after_the_start_each_endpoint_that_lags_behind_its_alias_is_named(env, monkeypatch, capsys):
    store = EndpointStore(make_places(env).database)
    for name in (NAME, "updating"):
        entity = {"name": "champion", "entity_name": MODEL, "entity_version": "2", "workload_size": "Small",
                  "scale_to_zero_enabled": False}
        new = new_endpoint({"name": name, "config": {"served_entities": [entity]}})
        record = store.create(new, "ann", {"champion": "dev"})
        if name == NAME: store.activate(record)
    monkeypatch.setattr(supervisor, "import_mlflow", lambda: None)
    monkeypatch.setattr(registry, "find_alias", lambda env, name, alias: SimpleNamespace(version="1"))
    up.start_showing_lags(env, make_places(env), store.endpoints()).join()
    assert capsys.readouterr().out == (
        f"endpoint {NAME} serves v2 as champion; the alias champion is v1; to update the endpoint: "
        "mlops models serve late_arrival -t dev\n")


def test_the_lines_to_try_are_the_environment_of_the_clients(capsys):
    up.show_ready("http://127.0.0.1:80", "/my state/token", [])
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    first = lines.index("to try it:") + 1
    assert lines[first] == """export DATABRICKS_HOST=http://127.0.0.1:80 DATABRICKS_TOKEN="$(cat '/my state/token')\""""
    assert "$DATABRICKS_HOST/api/2.0/serving-endpoints" in lines[first + 1] and "WorkspaceClient()" in lines[first + 2]


def test_tokens_are_listed_with_target_and_end_and_none_is_made_that_is_not_valid(env, monkeypatch):
    places = make_places(env)
    monkeypatch.setenv("MLOPS_STATE", str(env.state))
    def run(*words): return CliRunner().invoke(cli.app, ["up", *words], env={"COLUMNS": "150"})
    assert "there are no tokens" in run("tokens").output
    for days in ("0", "-1", "nan"):
        refused = run("token", "bob", "--days", days)
        assert refused.exit_code == 1 and "is not valid" in str(refused.exception), refused.output
    tokens.owner_token(places, "ann")
    tokens.make_token(places, "old", "dev", days=-1)
    assert run("token", "ci", "-t", "staging", "--days", "2").exit_code == 0
    _, ann, ci, old = run("tokens").output.splitlines()
    assert ann.split()[:2] == ["ann", "all"] and ann.split()[-1] == "never"
    assert ci.split()[:2] == ["ci", "staging"] and "expired" not in ci and "expired" in old
