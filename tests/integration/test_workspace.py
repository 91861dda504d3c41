"""`mlops up` with all its processes, on a trained state: served, updated, killed and started again."""
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pyarrow.dataset as ds
import pytest
import requests
from deltalake import DeltaTable
from states import MLOPS, MODEL, ROOT, client_of, environment
from waiting import wait_until

COLUMNS = ["carrier", "origin", "dest", "sched_dep_time", "flight_day", "scheduled_departure", "scheduled_arrival",
           "tailnum"]


class Workspace:
    "A local workspace of a state, in processes of its own."

    def __init__(self, state: Path):
        self.state, self.process, self.session = state, None, requests.Session()
        table = ds.dataset(DeltaTable(f"{state}/lakehouse/dev/flights/bronze_flights").file_uris())
        self.rows = json.loads(json.dumps(table.head(50, columns=COLUMNS).to_pylist(), default=str))

    def up(self) -> list[str]:  # what it prints
        "Start, and wait until it answers."
        self.process = subprocess.Popen([MLOPS, "up"], cwd=ROOT, env=environment(self.state), text=True,
                                        stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        lines = []
        for line in self.process.stdout:
            lines.append(line.rstrip())
            if "mlops down" in line: break
        else: raise AssertionError("\n".join([*lines, (self.state / "workspace/log.txt").read_text()]))
        self.host = json.loads((self.state / "workspace/workspace.json").read_text())["host"]
        self.token = (self.state / "workspace/token").read_text().strip()
        return lines

    def client(self, token: str = ""):
        from databricks.sdk import WorkspaceClient
        return WorkspaceClient(host=self.host, token=token or self.token, auth_type="pat")

    def ask(self, rows: list | None = None, name: str = "late", served: str = "") -> requests.Response:
        path = f"/serving-endpoints/{name}{f'/served-models/{served}' if served else ''}/invocations"
        return self.session.post(self.host + path, json={"dataframe_records": rows or self.rows[:1]}, timeout=60,
                                 headers={"Authorization": f"Bearer {self.token}"})

    def processes(self, *words: str) -> list[psutil.Process]:
        "The descendants whose command has a word."
        return [process for process in psutil.Process(self.process.pid).children(recursive=True)
                if any(word in " ".join(process.cmdline()) for word in words)]

    def end(self):
        if self.process and self.process.poll() is None: self.process.terminate()
        if self.process:
            self.process.wait(90)
            self.process.stdout.close()
        self.session.close()


@pytest.fixture(scope="module")
def workspace(own_trained):
    "A workspace that serves version 1 as the endpoint late."
    from databricks.sdk.service.serving import EndpointCoreConfigInput
    made = Workspace(own_trained)
    try:
        made.printed = made.up()
        made.client().serving_endpoints.create_and_wait("late", config=EndpointCoreConfigInput.from_dict(
            {"name": "late", **served("a")}))
        yield made
    finally: made.end()


def served(*names: str, version: str = "1") -> dict:
    "A configuration with equal shares."
    entities = [{"name": name, "entity_name": MODEL, "entity_version": version} for name in names]
    routes = [{"served_model_name": name, "traffic_percentage": 100 // len(names)} for name in names]
    return {"served_entities": entities, "traffic_config": {"routes": routes}}


def update(workspace: Workspace, *names: str, version: str = "1"):
    from databricks.sdk.service.serving import EndpointCoreConfigInput
    wanted = EndpointCoreConfigInput.from_dict({"name": "late", **served(*names, version=version)})
    return workspace.client().serving_endpoints.update_config_and_wait(
        "late", served_entities=wanted.served_entities, traffic_config=wanted.traffic_config)


def broken_version(state: Path) -> str:
    "Register a version whose files are damaged."
    client = client_of(state)
    source = Path(client.get_model_version_download_uri(MODEL, "1").removeprefix("file://"))
    damaged = state / "damaged"
    shutil.copytree(source, damaged)
    for file in damaged.rglob("*"):
        if file.is_file() and file.name != "MLmodel": file.write_bytes(b"damaged")
    return str(client.create_model_version(MODEL, damaged.as_uri()).version)


@pytest.mark.slow
def test_the_lines_that_it_prints_work_and_its_files_are_private(workspace):
    folder = workspace.state / "workspace"
    assert folder.stat().st_mode & 0o777 == 0o700 and (folder / "token").stat().st_mode & 0o777 == 0o600
    lines = [line.strip() for line in workspace.printed if line.startswith("  ")]
    assert [line.split()[0] for line in lines] == ["export", "curl", "python"]
    export, curl, python = lines
    for line in [*([curl] if shutil.which("curl") else []), python.replace("python ", f"{sys.executable} ", 1)]:
        command = f"{export}; {line}"
        assert "late" in subprocess.run(command, shell=True, check=True, capture_output=True, text=True).stdout
    assert workspace.token not in (folder / "log.txt").read_text() + "".join(workspace.printed)


@pytest.mark.slow
def test_databricks_sdk_queries_what_the_model_predicts(workspace):
    answer = workspace.client().serving_endpoints.query("late", dataframe_records=workspace.rows[:5])
    assert answer.served_model_name == "a" and len(answer.predictions) == 5
    assert all(0 < prediction < 1 for prediction in answer.predictions)
    assert workspace.ask([{"carrier": "UA"}]).status_code == 400


@pytest.mark.slow
def test_jobs_metrics_and_openapi_are_at_the_same_address(workspace):
    headers = {"Authorization": f"Bearer {workspace.token}"}
    def text(path): return requests.get(workspace.host + path, headers=headers, timeout=60).text
    assert "train" in {job.settings.name.rpartition(" ")[2] for job in workspace.client().jobs.list()}
    assert 'mlops_endpoint_state{endpoint="late",state="READY"} 1.0' in text("/metrics")
    paths = json.loads(text("/openapi.json"))["paths"]
    assert {"/api/2.2/jobs/run-now", "/serving-endpoints/{name}/invocations"} <= set(paths)


@pytest.mark.slow
def test_the_pages_of_mlflow_show_the_models_to_a_browser_that_signed_in(workspace):
    address = f"{workspace.host}/mlflow/"
    with requests.Session() as browser:
        page = browser.get(address, headers={"Accept": "text/html"}, timeout=90)
        assert page.url.startswith(f"{workspace.host}/login") and page.status_code == 200
        browser.post(page.url, data={"token": workspace.token}, timeout=90)
        page = browser.get(address, headers={"Accept": "text/html"}, timeout=90)
        assert page.url == address and "MLflow" in page.text


@pytest.mark.slow
def test_updates_switch_without_a_failed_request_and_a_failing_one_leaves_the_old(workspace):
    from databricks.sdk.errors.sdk import OperationFailed
    version, answers, is_over = broken_version(workspace.state), [], threading.Event()
    def ask():
        while not is_over.is_set(): answers.append(workspace.ask())
    asking = threading.Thread(target=ask)
    asking.start()
    try:
        update(workspace, "a", "b")
        update(workspace, "c")
        with pytest.raises(OperationFailed): update(workspace, "d", version=version)
    finally:
        is_over.set()
        asking.join()
    assert [answer.text for answer in answers if answer.status_code != 200] == []
    assert answers[-1].headers["served-model-name"] == "c"
    details = workspace.client().serving_endpoints.get("late")
    assert details.state.ready.value == "READY" and details.state.config_update.value == "UPDATE_FAILED"
    state = details.pending_config.served_entities[0].state
    assert state.deployment.value == "DEPLOYMENT_FAILED" and state.deployment_state_message
    update(workspace, "a")


@pytest.mark.slow
def test_a_second_workspace_of_the_state_is_refused_with_the_address(workspace):
    second = subprocess.run([MLOPS, "up"], cwd=ROOT, env=environment(workspace.state), capture_output=True, text=True)
    assert second.returncode == 2 and f"already runs at {workspace.host}" in second.stderr


@pytest.mark.slow
def test_a_named_token_works_at_once_and_not_after_its_removal(workspace):
    def mlops_up(*words):
        return subprocess.run([MLOPS, "up", *words], cwd=ROOT, env=environment(workspace.state), check=True,
                              capture_output=True, text=True).stdout.strip()
    def status(token):
        return requests.get(f"{workspace.host}/api/2.0/serving-endpoints", timeout=10,
                            headers={"Authorization": f"Bearer {token}"}).status_code
    token = mlops_up("token", "ann@example.com")
    wait_until(lambda: status(token) == 200, 60)
    assert workspace.client(token).current_user.me().user_name == "ann@example.com"
    mlops_up("token", "ann@example.com", "--remove")
    wait_until(lambda: status(token) == 401, 60)


def answers(workspace: Workspace) -> bool:
    try: return workspace.ask().status_code == 200
    except requests.ConnectionError: return False


@pytest.mark.slow
@pytest.mark.parametrize("word, is_answering", [("workspace.worker", False), ("workspace.model_host", True)])
def test_a_process_that_is_killed_is_started_again_with_its_endpoints(workspace, word, is_answering):
    "The worker is the only one; a killed host takes the model processes with it, and the fast path goes on."
    for process in workspace.processes(word): process.kill()
    if is_answering: assert workspace.ask().status_code == 200
    wait_until(lambda: answers(workspace), 60)
    def is_ready():
        entity = workspace.client().serving_endpoints.get("late").config.served_entities[0]
        return entity.state.deployment.value == "DEPLOYMENT_READY"
    wait_until(is_ready, 60)
    assert workspace.ask(served="a").json() == workspace.ask().json()


@pytest.mark.slow
def test_after_kill_9_it_serves_again_what_it_served_and_down_ends_all(workspace):
    """The address stays. An update that was cut off has failed. `mlops down` waits for the end of all processes."""
    address, processes = workspace.host, psutil.Process(workspace.process.pid).children(recursive=True)
    body = json.dumps(served("z")).encode()
    headers = {"Authorization": f"Bearer {workspace.token}"}
    answer = requests.put(f"{address}/api/2.0/serving-endpoints/late/config", data=body, headers=headers, timeout=30)
    assert answer.json()["state"]["config_update"] == "IN_PROGRESS"
    os.kill(workspace.process.pid, signal.SIGKILL)
    workspace.process.wait()
    workspace.process.stdout.close()
    assert not psutil.wait_procs(processes, timeout=20)[1], "the others end with control"
    workspace.up()
    assert workspace.host == address and workspace.ask().headers["served-model-name"] == "a"
    details = workspace.client().serving_endpoints.get("late")
    assert details.state.config_update.value == "UPDATE_FAILED" and details.state.ready.value == "READY"
    processes = psutil.Process(workspace.process.pid).children(recursive=True)
    down = subprocess.run([MLOPS, "down"], cwd=ROOT, env=environment(workspace.state), capture_output=True, text=True)
    assert down.returncode == 0 and f"at {address} has ended" in down.stdout
    assert workspace.process.wait(5) == 128 + signal.SIGTERM
    assert not psutil.wait_procs(processes, timeout=1)[1]
