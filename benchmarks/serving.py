"""Endpoints of `mlops up` compared with other servers of models: `python benchmarks/run.py serving`."""
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import psutil
from serving_peers import PEERS, Load, bento_server, ml_server, mlflow_server, put_load

sys.path.insert(0, str(Path(__file__).parents[1] / "tests/integration"))
from load import require_wrk

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
AS_OF = "2013-04-01"
SECONDS = 8  # of load
MODEL, PLAIN = "dev.flights.late_arrival", "dev.flights.late_arrival_plain"


def mlops(state: Path, *words: str) -> str:
    "Run a command in a state; exit with its output if it fails."
    process = subprocess.run([BIN / "mlops", *words], cwd=ROOT, capture_output=True, text=True,
                             env=os.environ | {"MLOPS_STATE": str(state)})
    if process.returncode: sys.exit(f"mlops {' '.join(words)} failed:\n{process.stdout}{process.stderr}")
    return process.stdout


def trained_state(folder: Path) -> Path:
    "A state with published features and a Champion: that of $MLOPS_BENCH_STATE, or a new one."
    if given := os.environ.get("MLOPS_BENCH_STATE"): return Path(given)
    mlops(folder / "state", "run", "features", "-p", f"as_of={AS_OF}")
    mlops(folder / "state", "run", "train", "-p", f"as_of={AS_OF}")
    return folder / "state"


@contextmanager
def workspace(state: Path, workers: int = 1) -> Iterator:  # databricks.sdk.WorkspaceClient
    "Run `mlops up` until the block ends."
    from databricks.sdk import WorkspaceClient
    folder = state / "workspace"
    with (state / "up.log").open("wb") as log:
        server = subprocess.Popen([BIN / "mlops", "up", "--port", "5710", "--workers", str(workers)], cwd=ROOT,
                                  stdout=log, stderr=log,
                                  env=os.environ | {"MLOPS_STATE": str(state), "MLOPS_SCHEDULER": "0"})
    try:
        end = time.monotonic() + 60
        while not (folder / "workspace.json").exists():
            if server.poll() is not None or time.monotonic() > end: sys.exit((state / "up.log").read_text())
            time.sleep(0.1)
        token = (folder / "token").read_text().strip()
        yield WorkspaceClient(host="http://127.0.0.1:5710", token=token)
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(240)  # it writes the payloads


def create_endpoint(client, name: str, model: str, version: str) -> float:  # seconds until it is ready
    "Create an endpoint for a version, with an inference table."
    from databricks.sdk.service import serving
    entity = serving.ServedEntityInput(name="champion", entity_name=model, entity_version=version,
                                       workload_size="Small", scale_to_zero_enabled=False)
    table = serving.AiGatewayInferenceTableConfig(catalog_name="dev", schema_name="flights", table_name_prefix=name,
                                                  enabled=True)
    began = time.perf_counter()
    gateway = serving.AiGatewayConfig(inference_table_config=table)
    config = serving.EndpointCoreConfigInput(name=name, served_entities=[entity])
    client.serving_endpoints.create_and_wait(name=name, ai_gateway=gateway, config=config)
    return time.perf_counter() - began


def example(state: Path) -> tuple[dict, dict, Path]:  # the keys of a flight, its features, the files of the model
    "A row of the input example of version 1, the keys of a flight, and the model that takes features."
    from mlflow.artifacts import download_artifacts

    from mlops_nb import load_env
    os.environ["MLOPS_STATE"] = str(state)
    load_env("dev").use_mlflow()
    model = Path(download_artifacts("models:/dev.flights.late_arrival/1"))
    rows = json.loads((model / "serving_input_example.json").read_text())["dataframe_split"]
    features = {name: None if value != value else value  # JSON has no NaN
                for name, value in zip(rows["columns"], rows["data"][0], strict=True)}
    keys = {"year": 2013, "month": 4, "day": 1, "flight": 1, "sched_dep_time": 1200, "tailnum": "N14228",
            "carrier": features["carrier"], "origin": features["origin"], "dest": features["dest"],
            "sched_arr_time": 1500, "distance": 1000, "flight_day": "2013-04-01", "prediction_day": "2013-04-01",
            "scheduled_departure": "2013-04-01T16:00:00", "scheduled_arrival": "2013-04-01T19:00:00",
            "prediction_time": "2013-04-01T14:00:00"}
    return keys, features, model / "data/feature_store/raw_model"


def register_plain(model: Path) -> str:  # the version
    "Register the model that takes features, so that an endpoint serves it without a lookup."
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException
    client = MlflowClient()
    try: client.create_registered_model(PLAIN)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS": raise
    return str(client.create_model_version(PLAIN, str(model)).version)


def body_of(row: dict) -> bytes:
    "A request of one row."
    return json.dumps({"dataframe_split": {"columns": list(row), "data": [list(row.values())]}}).encode()


def text_of(load: Load) -> str:
    "The rate and the answer times of a server."
    failed = f", {load.failed} FAILED" if load.failed else ""
    return f"{load.rate:,.0f}/s, p50 {load.p50:.2g} ms, p99 {load.p99:.3g} ms{failed}"


def our_loads(state: Path, requests: list[tuple], workers: int) -> tuple[list[Load], float]:
    "The load of an endpoint for each (model, version, body), one after the other; the longest time until one is ready."
    loads, ready = [], 0.0
    with workspace(state, workers) as client:
        headers = {"Authorization": f"Bearer {client.config.token}"}
        for model, version, body in requests:
            name = f"bench-{workers}-{int(time.time())}"
            ready = max(ready, create_endpoint(client, name, model, version))
            url = f"{client.config.host}/serving-endpoints/{name}/invocations"
            loads.append(put_load(url, body, headers, SECONDS))
            client.serving_endpoints.delete(name)
    return loads, ready


def load_with_updates(state: Path, body: bytes) -> tuple[Load, Load, int]:
    """An endpoint with lookup at half of its saturated rate: without updates, and while one follows another; their
    number."""
    from databricks.sdk.service.serving import ServedEntityInput
    updates = 0
    with workspace(state) as client, ThreadPoolExecutor(1) as threads:
        name = f"bench-updates-{int(time.time())}"
        create_endpoint(client, name, MODEL, "1")
        url = f"{client.config.host}/serving-endpoints/{name}/invocations"
        headers = {"Authorization": f"Bearer {client.config.token}"}
        half = {"headers": headers, "rate": put_load(url, body, headers, SECONDS).rate / 2}
        steady = put_load(url, body, seconds=SECONDS, **half)
        load = threads.submit(put_load, url, body, seconds=4 * SECONDS, **half)
        while not load.done():
            entity = ServedEntityInput(name=f"champion-{updates % 2}", entity_name=MODEL, entity_version="1",
                                       workload_size="Small", scale_to_zero_enabled=False)
            client.serving_endpoints.update_config_and_wait(name, served_entities=[entity])
            updates += 1
        client.serving_endpoints.delete(name)
    return steady, load.result(), updates


def update_row(state: Path, body: bytes) -> tuple:
    steady, updated, updates = load_with_updates(state, body)
    return (f"endpoint: {updates} updates in a row", text_of(updated), f"none: {text_of(steady)}", "", "p99 20 ms")


def memory(process: psutil.Process) -> int:  # bytes
    "The memory of a process and its descendants without the payload writer; what they share is counted once."
    family = [process, *process.children(recursive=True)]
    return sum(one.memory_full_info().pss for one in family if "payload_writer" not in " ".join(one.cmdline()))


def memory_per_version(state: Path, version: str) -> float:  # MiB
    "What each of four more served entities adds to the memory of the workspace."
    from databricks.sdk.service.serving import Route, ServedEntityInput, TrafficConfig
    with workspace(state) as client:
        server = psutil.Process(json.loads((state / "workspace/workspace.json").read_text())["pid"])
        name = f"bench-memory-{int(time.time())}"
        create_endpoint(client, name, PLAIN, version)
        before = memory(server)
        entities = [ServedEntityInput(name=f"v{number}", entity_name=PLAIN, entity_version=version,
                                      workload_size="Small", scale_to_zero_enabled=False) for number in range(5)]
        routes = [Route(served_model_name=one.name, traffic_percentage=20) for one in entities]
        client.serving_endpoints.update_config_and_wait(name, served_entities=entities,
                                                        traffic_config=TrafficConfig(routes=routes))
        time.sleep(2)  # until the old entity has ended
        used = (memory(server) - before) / 4 / 2**20
        client.serving_endpoints.delete(name)
    return used


def rows(folder: Path) -> list[tuple]:
    "Return the rows for the table of benchmarks/run.py."
    require_wrk()
    state = trained_state(folder)
    keys, features, model = example(state)
    given_request = (PLAIN, register_plain(model), body_of(features))
    peer = mlflow_server(model, given_request[2], folder, SECONDS)
    (given, looked_up), ready = our_loads(state, [given_request, (MODEL, "1", body_of(keys))], 1)
    two, _ = our_loads(state, [given_request], 2)
    used = memory_per_version(state, given_request[1])
    against = f"mlflow models serve {text_of(peer)}"
    def ratio(load: Load, other: Load) -> str: return f"{load.rate / other.rate:.3g}"
    table = [("endpoint: signature, logging", text_of(given), against, ratio(given, peer), "30, p99 5 ms"),
             ("endpoint: lookup in 7 tables of SQLite", text_of(looked_up), against, ratio(looked_up, peer), "20"),
             ("endpoint: ready after create", f"{ready:.1f} s", "", "", "5 s"),
             update_row(state, body_of(keys)),
             ("endpoint: memory of one more version", f"{used:.0f} MiB", "", "", ""),
             ("two workers instead of one", text_of(two[0]), f"one {given.rate:,.0f}/s", ratio(two[0], given), ""),
             ("processors that wrk used", f"{given.wrk_cores:.2f} of {os.cpu_count()}", "", "", "")]
    if not PEERS.exists(): return [*table, ("MLServer, BentoML", "not measured", "make install-peers", "", "")]
    booster = next(model.rglob("booster.txt"))
    row = [0.0 if isinstance(value, str) or value is None else float(value) for value in features.values()]
    for name, load in (("MLServer", ml_server(booster, row, folder, SECONDS)),
                       ("BentoML", bento_server(booster, row, folder, SECONDS))):
        table.append((f"endpoint: signature, logging, beside {name}", text_of(given), f"{name} {text_of(load)}",
                      ratio(given, load), ""))
    return table
