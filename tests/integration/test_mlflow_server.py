"""The page docs/mlflow-server.md: its commands start a real server on a real PostgreSQL, with two users."""
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
from small_use_cases import CUSTOMERS, conf_files, home_of, write_tables
from stores import PASSWORD, Missing, free_port, postgres_tool, postgresql
from test_training import GOVERNANCE, TRAIN

from mlops_nb import doctor
from mlops_nb.data.session import get_spark, stop
from mlops_nb.env import load_env
from mlops_nb.errors import MlopsError
from mlops_nb.models import registry
from mlops_nb.workflow import training

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*IProgress not found"),
              pytest.mark.filterwarnings("ignore:.*type hint")]
PAGE = Path(__file__).parents[2] / "docs/mlflow-server.md"
WORDS = {"ann": "first-password-of-ann", "bob": "first-password-of-bob", "admin": "ReplaceThisFirstPassword"}


def code(heading: str, language: str = "bash") -> str:
    "The code of a section of the page."
    section = re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", PAGE.read_text(), re.DOTALL | re.MULTILINE)[1]
    return "\n".join(re.findall(rf"^```{language}\n(.*?)^```", section, re.DOTALL | re.MULTILINE))


def login(user: str) -> dict[str, str]:
    return {"MLFLOW_TRACKING_USERNAME": user, "MLFLOW_TRACKING_PASSWORD": WORDS[user]}


@contextmanager
def started(command: str, folder: Path, variables: dict, port: int):
    "Run the server's command of the page until the end."
    log = folder / "server.log"
    with log.open("w") as out:
        process = subprocess.Popen(["bash", "-euc", command], cwd=folder, env=variables, stdout=out, stderr=out,
                                   stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while True:
            try: urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
            except OSError:
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.1)
            else: break
        yield
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try: process.wait(20)
        except subprocess.TimeoutExpired: os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    "The server of the page, its address, its folder, and the variables of its commands."
    for module, name in (("psycopg", "psycopg"), ("flask_wtf", "Flask-WTF")):
        if not find_spec(module): pytest.skip(f"the Python package {name} is not installed: make install-stores")
    try: programs = Path(postgres_tool("initdb")).parent
    except Missing as error: pytest.skip(str(error))
    folder, port = tmp_path_factory.mktemp("server"), free_port()
    with tempfile.TemporaryDirectory(prefix="mlops-postgresql-") as data, postgresql(Path(data)) as address:
        database_port = re.search(r":(\d+)/", address)[1]
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "MLOPS_"))}
        tools = f"{Path(sys.executable).parent}:{programs}:{os.environ['PATH']}"
        variables = clean | {"PGHOST": "127.0.0.1", "PGPORT": database_port, "PGUSER": "ann", "PGPASSWORD": PASSWORD,
                             "PATH": tools}
        command = code("Create the databases") + code("Configure and start it")
        places = {"localhost:5432": f"127.0.0.1:{database_port}", "--port 5000": f"--port {port}",
                  "exec mlflow": f"exec {sys.executable} -m mlflow", "--workers 2": "--workers 1"}
        for place, own in places.items(): command = command.replace(place, own)
        with started(command, folder, variables, port):
            users = variables | login("admin") | {"MLFLOW_TRACKING_URI": f"http://127.0.0.1:{port}"}
            users |= {f"PASSWORD_OF_{user.upper()}": word for user, word in WORDS.items()}
            subprocess.run([sys.executable, "-W", "ignore", "-c", code("Users and permissions", "python")], env=users,
                           check=True)
            yield SimpleNamespace(uri=f"http://127.0.0.1:{port}", folder=folder, variables=users)


@pytest.fixture(scope="module")
def world(server, tmp_path_factory):
    "A use case whose MLflow is the server, and a version that the user ann has trained."
    folder = tmp_path_factory.mktemp("world")
    env = replace(home_of(folder), tracking_uri=server.uri, registry_uri=server.uri)
    conf_files(folder, governance=GOVERNANCE, train=TRAIN["cancelled"], features={})
    with pytest.MonkeyPatch.context() as patch:
        for name, value in login("ann").items(): patch.setenv(name, value)
        patch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
        patch.setenv("GIT_PYTHON_REFRESH", "quiet")
        patch.setattr(training, "load_env", lambda target: env)
        stop()
        write_tables(CUSTOMERS, get_spark(env), env)
        data = training.load(CUSTOMERS, "dev", "2021-04-11")
        version = training.train(data)
        yield SimpleNamespace(env=env, folder=folder, data=data, version=version)
    stop()


def content(env) -> tuple:
    "What the administrator sees: runs, versions and aliases."
    with pytest.MonkeyPatch.context() as patch:
        for name, value in login("admin").items(): patch.setenv(name, value)
        client = registry.client(env)
        experiments = [experiment.experiment_id for experiment in client.search_experiments()]
        runs = sorted(run.info.run_id for run in client.search_runs(experiments))
        models = {model.name: dict(model.aliases) for model in client.search_registered_models()}
        return runs, sorted(experiments), models, len(client.search_model_versions())


def test_a_user_trains_registers_and_loads_a_version_and_its_files_are_on_the_server(world, server):
    import mlflow
    run = registry.client(world.env).get_run(world.version.run_id)
    assert run.info.artifact_uri.startswith("mlflow-artifacts:") and run.data.metrics["log_loss"] > 0
    frame = world.data.rows[list(CUSTOMERS.features)].head()
    assert len(mlflow.pyfunc.load_model(f"models:/{world.version.name}/1").predict(frame)) == 5
    assert any((server.folder / "artifacts").rglob("MLmodel")) and not any(world.folder.rglob("MLmodel"))
    assert training.train(world.data).version == world.version.version  # the same rows and settings


def test_the_doctor_and_a_job_of_a_teammate(server, project):
    notebook = project.notebook("log", "import mlflow\nfrom mlops_nb.env import load_env\nfrom mlops_nb.models import "
                                "registry\nenv = load_env('dev')", "with mlflow.start_run(experiment_id="
                                "registry.experiment_id(env, 'small')): mlflow.log_metric('loss', 0.5)")
    project.job("log", [{"task_key": "log", "notebook_task": notebook}])
    variables = server.variables | {"COLUMNS": "300", "MLOPS_STATE": str(project.root / "state")}
    commands = code("Each teammate").replace("https://mlflow.example.com", server.uri)
    commands = commands.replace("mlops doctor", "mlops doctor; mlops run log")
    program = 'mlops() { "$PYTHON" -c "from mlops_nb.cli import main; main()" "$@"; }\n'
    result = subprocess.run(["bash", "-c", program + commands], cwd=project.root, text=True, capture_output=True,
                            env=variables | {"PYTHON": sys.executable})
    assert re.search(rf"ok +MLflow store +a server: {server.uri}, MLflow [\d.]+, as ann", result.stdout)
    assert result.returncode == 0 and re.search(r"log +SUCCESS", result.stdout), result.stdout + result.stderr


@pytest.mark.parametrize(("variables", "message"), [
    ({}, "needs a user and a password, and none is set"),
    (login("bob") | {"MLFLOW_TRACKING_PASSWORD": "word-that-is-wrong"},
     "does not accept user 'bob' with this password"),
    ({"MLFLOW_TRACKING_TOKEN": "eyJhbGciOiJIUzI1NiJ9.expired"}, "does not accept the token in MLFLOW_TRACKING_TOKEN")])
def test_a_login_that_is_refused_leaves_nothing(world, server, project, monkeypatch, variables, message):
    from typer.testing import CliRunner

    from mlops_nb import cli
    project.job("log", [{"task_key": "log", "notebook_task": project.notebook("log", "1")}])
    before = content(world.env)
    for name in (*login("ann"), "MLFLOW_TRACKING_TOKEN"): monkeypatch.delenv(name, raising=False)
    for name, value in variables.items(): monkeypatch.setenv(name, value)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    monkeypatch.setenv("MLOPS_STATE", str(project.root / "state"))
    monkeypatch.chdir(project.root)
    with pytest.raises(MlopsError, match=message):
        print(CliRunner().invoke(cli.app, ["run", "log"], catch_exceptions=False).output)
    with pytest.raises(MlopsError, match=message): training.train(world.data)
    assert not (project.root / "state").exists() and content(world.env) == before
    assert message in doctor.check_mlflow(load_env()).observation


def test_a_user_who_may_only_read_changes_nothing(world, monkeypatch):
    from mlops_nb.deployment import aliases
    before = content(world.env)
    for name, value in login("bob").items(): monkeypatch.setenv(name, value)
    assert registry.get_version(world.env, world.version.name, 1).version == world.version.version
    monkeypatch.setattr(training, "training_fingerprint", lambda data: "another")  # otherwise nothing is to be trained
    with pytest.raises(MlopsError, match=r"user 'bob' lacks a permission at MLflow .* \(runs/create\)"):
        training.train(world.data)
    with pytest.raises(MlopsError, match=r"user 'bob' lacks a permission at MLflow .* \(registered-models/alias\)"):
        aliases.set_alias(world.env, world.version.name, "champion", 1)
    assert content(world.env) == before


def test_the_backup_holds_what_the_server_has(world, server):
    subprocess.run(["bash", "-euc", code("Backup")], cwd=server.folder, env=server.variables, check=True)
    listed = subprocess.run(["tar", "-tzf", "artifacts.tgz"], cwd=server.folder, capture_output=True, text=True)
    assert "/MLmodel\n" in listed.stdout
    subprocess.run(["createdb", "restored"], env=server.variables, check=True)
    subprocess.run(["pg_restore", "--no-owner", "--dbname", "restored", "mlflow.dump"], cwd=server.folder,
                   env=server.variables, check=True)
    rows = subprocess.run(["psql", "-At", "restored", "-c", "select count(*) from model_versions"], text=True,
                          env=server.variables, check=True, capture_output=True).stdout
    assert int(rows) == content(world.env)[3]
