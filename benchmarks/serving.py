"""Endpoints of `mlops up` compared with other servers of models: `python benchmarks/run.py serving`."""
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from serving_peers import PEERS, Load, bento_server, ml_server, mlflow_server, put_load

sys.path.insert(0, str(Path(__file__).parents[1] / "tests/integration"))
from load import require_wrk

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
AS_OF = "2013-04-01"
SECONDS = 8  # of load


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
                                  stdout=log, stderr=log, env=os.environ | {"MLOPS_STATE": str(state)})
    try:
        end = time.monotonic() + 60
        while not (folder / "workspace.json").exists():
            if server.poll() is not None or time.monotonic() > end: sys.exit((state / "up.log").read_text())
            time.sleep(0.1)
        token = (folder / "token").read_text().strip()
        yield WorkspaceClient(host="http://127.0.0.1:5710", token=token)
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(60)


def create_endpoint(client, name: str) -> float:  # seconds until it is ready
    "Create an endpoint for version 1, with an inference table."
    from databricks.sdk.service import serving
    entity = serving.ServedEntityInput(name="champion", entity_name="dev.flights.late_arrival", entity_version="1",
                                       workload_size="Small", scale_to_zero_enabled=False)
    table = serving.AiGatewayInferenceTableConfig(catalog_name="dev", schema_name="flights", table_name_prefix=name,
                                                  enabled=True)
    began = time.perf_counter()
    gateway = serving.AiGatewayConfig(inference_table_config=table)
    config = serving.EndpointCoreConfigInput(name=name, served_entities=[entity])
    client.serving_endpoints.create_and_wait(name=name, ai_gateway=gateway, config=config)
    return time.perf_counter() - began


def example(state: Path) -> tuple[dict, dict, Path]:  # the keys of a flight, its features, the files of the model
    "A row of the input example of version 1, with the keys of a flight."
    from mlflow.artifacts import download_artifacts

    from mlops_nb import load_env
    os.environ["MLOPS_STATE"] = str(state)
    load_env("dev").use_mlflow()
    model = Path(download_artifacts("models:/dev.flights.late_arrival/1"))
    rows = json.loads((model / "serving_input_example.json").read_text())["dataframe_split"]
    features = dict(zip(rows["columns"], rows["data"][0], strict=True))
    keys = {"year": 2013, "month": 4, "day": 1, "flight": 1, "sched_dep_time": 1200, "tailnum": "N14228",
            "carrier": features["carrier"], "origin": features["origin"], "dest": features["dest"],
            "sched_arr_time": 1500, "distance": 1000, "flight_day": "2013-04-01", "prediction_day": "2013-04-01",
            "scheduled_departure": "2013-04-01T16:00:00", "scheduled_arrival": "2013-04-01T19:00:00",
            "prediction_time": "2013-04-01T14:00:00"}
    return keys, features, model


def body_of(row: dict) -> bytes:
    "A request of one row."
    return json.dumps({"dataframe_split": {"columns": list(row), "data": [list(row.values())]}}).encode()


def text_of(load: Load) -> str:
    "The rate and the answer times of a server."
    failed = f", {load.failed} FAILED" if load.failed else ""
    return f"{load.rate:,.0f}/s, p50 {load.p50:.2g} ms, p99 {load.p99:.3g} ms{failed}"


def our_loads(state: Path, full: bytes, keys: bytes, workers: int) -> tuple[list[Load], float]:
    "The loads of an endpoint that gets all features, and one that looks them up; seconds until the endpoint is ready."
    with workspace(state, workers) as client:
        name = f"bench-{workers}-{int(time.time())}"
        ready = create_endpoint(client, name)
        headers = {"Authorization": f"Bearer {client.config.token}"}
        url = f"{client.config.host}/serving-endpoints/{name}/invocations"
        loads = [put_load(url, body, headers, SECONDS) for body in (full, keys)]
        client.serving_endpoints.delete(name)
    return loads, ready


def rows(folder: Path) -> list[tuple]:
    "Return the rows for the table of benchmarks/run.py."
    require_wrk()
    state = trained_state(folder)
    keys, features, model = example(state)
    full, lookup = body_of({**keys, **features}), body_of(keys)
    peer = mlflow_server(model, full, folder, SECONDS)
    (given, looked_up), ready = our_loads(state, full, lookup, 1)
    two, _ = our_loads(state, full, lookup, 2)
    against = f"mlflow models serve {text_of(peer)}"
    def ratio(load: Load, other: Load) -> str: return f"{load.rate / other.rate:.3g}"
    table = [("endpoint: signature, logging", text_of(given), against, ratio(given, peer), "30, p99 5 ms"),
             ("endpoint: lookup in 7 tables of SQLite", text_of(looked_up), against, ratio(looked_up, peer), "20"),
             ("endpoint: ready after create", f"{ready:.1f} s", "", "", "5 s"),
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
