"""`mlops up` for tests: a workspace on a state, and endpoints of the model of the shared state."""
import json
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from states import MLOPS, MODEL, ROOT, environment


@contextmanager
def workspace(state: Path, *options: str, **variables: str) -> Iterator:  # databricks.sdk.WorkspaceClient
    "Run `mlops up` on a free port until the block ends, with variables of the environment; its output is in up.log."
    from databricks.sdk import WorkspaceClient
    folder, log = state / "workspace", state / "up.log"
    with log.open("wb") as output:
        server = subprocess.Popen([MLOPS, "up", *options], cwd=ROOT, stdout=output, stderr=output,
                                  stdin=subprocess.DEVNULL, env=environment(state) | variables)
    try:
        end = time.monotonic() + 60
        while not (folder / "workspace.json").exists():
            assert server.poll() is None and time.monotonic() < end, log.read_text()
            time.sleep(0.1)
        host = json.loads((folder / "workspace.json").read_text())["host"]
        yield WorkspaceClient(host=host, token=(folder / "token").read_text().strip())
    finally:
        server.terminate()
        server.wait(60)


def endpoint_config(version: int | str = 1, name: str = "champion", **options):
    "The configuration of an endpoint that serves a version of the model of the shared state."
    from databricks.sdk.service.serving import EndpointCoreConfigInput, ServedEntityInput
    entity = ServedEntityInput(name=name, entity_name=MODEL, entity_version=str(version), workload_size="Small",
                               scale_to_zero_enabled=False, **options)
    return EndpointCoreConfigInput(name="", served_entities=[entity])  # its name is that of the endpoint


def inference_table(prefix: str):
    "The setting of an endpoint that logs its requests to dev.flights.<prefix>_payload."
    from databricks.sdk.service.serving import AiGatewayConfig, AiGatewayInferenceTableConfig
    table = AiGatewayInferenceTableConfig(catalog_name="dev", schema_name="flights", table_name_prefix=prefix,
                                          enabled=True)
    return AiGatewayConfig(inference_table_config=table)


def address_of(client, endpoint: str) -> str:
    "Where an endpoint takes requests."
    return f"{client.config.host}/serving-endpoints/{endpoint}/invocations"


def flight_row(**values) -> dict:
    "The fields of a request for a flight; its features are looked up."
    return {"year": 2013, "month": 4, "day": 1, "flight": 1545, "sched_dep_time": 1200, "tailnum": "N14228",
            "carrier": "UA", "origin": "EWR", "dest": "IAH", "sched_arr_time": 1500, "distance": 1400,
            "flight_day": "2013-04-01", "prediction_day": "2013-04-01", "scheduled_departure": "2013-04-01T16:00:00",
            "scheduled_arrival": "2013-04-01T20:00:00", "prediction_time": "2013-04-01T14:00:00", **values}
