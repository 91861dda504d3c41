"""An endpoint that gets what nobody should send, and one that is updated again and again while it answers."""
import json
import shutil
import socket
import time
from contextlib import ExitStack, closing
from http.client import HTTPConnection
from statistics import mean
from urllib.parse import urlsplit

import httpx
import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from load import put_load, repeated_load
from local_workspace import address_of, endpoint_config, flight_row, inference_table, workspace
from sizes import by_size

pytestmark = pytest.mark.slow
GOOD = json.dumps({"dataframe_records": [flight_row()]}).encode()
UPDATES = by_size(100, 5)
REQUESTS = by_size(3000, 150)  # that follow the OpenAPI description, or violate it


@pytest.fixture(scope="module")
def client(own_trained):
    if not shutil.which("wrk"): pytest.skip("the load needs wrk: apt-get install wrk")
    with workspace(own_trained) as client:
        client.serving_endpoints.create_and_wait("late", config=endpoint_config(), ai_gateway=inference_table("late"))
        yield client


@pytest.fixture(scope="module")
def http(client):
    headers = {"Authorization": f"Bearer {client.config.token}", "Content-Type": "application/json"}
    with httpx.Client(base_url=client.config.host, headers=headers, timeout=60) as session: yield session


def check_answer(response: httpx.Response) -> None:
    "An answer is predictions, or an error of the request with its reason."
    assert response.status_code < 500, response.text
    answer = response.json()
    if response.status_code == 200: assert isinstance(answer["predictions"], list)
    else: assert answer["error_code"] and answer["message"] and "Traceback" not in answer["message"]


def test_requests_made_from_the_description_of_the_interface(client, http):
    "Schemathesis makes bodies that the description allows, and bodies that it does not."
    schemathesis = pytest.importorskip("schemathesis", reason="make install-stores")
    schema = schemathesis.openapi.from_dict(http.get("/openapi.json").json())
    operation = schema["/serving-endpoints/{name}/invocations"]["POST"]
    modes = [schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE]
    address, statuses = "/serving-endpoints/late/invocations", set()
    for mode in modes:
        @settings(max_examples=REQUESTS, deadline=None, suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy(generation_mode=mode))
        def send(case):
            body = case.body if isinstance(case.body, bytes) else json.dumps(case.body, default=str)
            response = http.post(address, content=body)
            statuses.add(response.status_code)
            check_answer(response)
        send()
    assert 400 in statuses and http.post(address, content=GOOD).status_code == 200


def rows_body(text: str) -> bytes:
    "A request with one row, of which a value is this text."
    row = json.dumps(flight_row(origin_due_3h="HERE"))
    return b'{"dataframe_records": [' + row.replace('"HERE"', text).encode() + b"]}"


MALFORMED = {
    "nothing": b"", "no JSON": b"{", "not UTF-8": b'{"inputs": "\xff"}', "a number": b"1", "null": b"null",
    "no rows": b"{}", "two forms": b'{"inputs": [], "instances": []}', "empty rows": b'{"dataframe_records": []}',
    "deep nesting": b'{"inputs": ' + b"[" * 200_000 + b"]" * 200_000 + b"}",
    "a long number": rows_body("1" * 10_000), "a number beyond doubles": rows_body("1e999"), "NaN": rows_body("NaN"),
    "text for a number": rows_body('"many"'), "an object for a number": rows_body('{"a": 1}'),
    "an array for a number": rows_body("[1, 2]"), "half of a pair": rows_body('"\\ud800"'),
    "rows of other lengths": b'{"dataframe_split": {"columns": ["a", "b"], "data": [[1]]}}',
    "a path as a column": b'{"dataframe_records": [{"../../etc/passwd": 1, "__class__": 2}]}'}


@pytest.mark.parametrize("body", MALFORMED.values(), ids=MALFORMED)
def test_malformed_requests_get_a_reason(http, body):
    check_answer(http.post("/serving-endpoints/late/invocations", content=body))


def test_large_bodies_and_half_open_connections_leave_memory_bounded(client, http, own_trained):
    host, _, port = client.config.host.removeprefix("http://").partition(":")
    control = psutil.Process(json.loads((own_trained / "workspace/workspace.json").read_text())["pid"])
    workers = [process for process in control.children() if "mlops_nb.workspace.worker" in process.cmdline()]
    before = sum(process.memory_info().rss for process in workers)
    with ExitStack() as stack:
        for _ in range(200):
            connection = stack.enter_context(socket.create_connection((host, int(port))))
            connection.sendall(b"POST /serving-endpoints/late/invocations HTTP/1.1\r\nHost: a\r\n")
        for _ in range(3):
            try: assert http.post("/serving-endpoints/late/invocations", content=b" " * 100_000_000).status_code == 413
            except httpx.TransportError: pass  # refused before the body was sent
        grown = sum(process.memory_info().rss for process in workers) - before
        assert http.post("/serving-endpoints/late/invocations", content=GOOD).status_code == 200
    assert workers and grown < 100 * 2**20


def test_clients_that_connect_anew_for_each_request_exhaust_nothing(client):
    "More connections than a worker keeps open at the same time, one after the other."
    headers = {"Authorization": f"Bearer {client.config.token}", "Connection": "close"}
    address = urlsplit(address_of(client, "late"))
    for _ in range(2_100):
        with closing(HTTPConnection(address.netloc, timeout=60)) as connection:
            connection.request("POST", address.path, GOOD, headers)
            assert connection.getresponse().status == 200


def test_updates_in_a_row_at_half_the_saturated_rate_fail_no_request(client):
    """The two configurations serve the same version under two names, so each update loads the model again.

    An endpoint that waited for a load would answer as late as an update takes; `benchmarks/serving.py` measures the
    answer times on a machine that does nothing else."""
    url, headers = address_of(client, "late"), {"Authorization": f"Bearer {client.config.token}"}
    saturated = put_load(url, GOOD, headers, seconds=3)
    half = {"headers": headers, "seconds": 3, "connections": 32, "rate": saturated.rate / 2}
    steady, began = put_load(url, GOOD, **half), time.monotonic()
    with repeated_load(url, GOOD, **half) as loads:
        for number in range(UPDATES):
            config = endpoint_config(name=f"champion-{number % 2}")
            client.serving_endpoints.update_config_and_wait("late", served_entities=config.served_entities)
        seconds = (time.monotonic() - began) / UPDATES
    worst, failed = max(one.p99 for one in loads), sum(one.failed for one in loads)
    print(f"{UPDATES} updates of {seconds:.1f} s; saturated {saturated.rate:,.0f}/s; at half of it p99 "
          f"{steady.p99:.1f} ms without and {worst:.1f} ms with updates; failed: {failed}")
    assert mean(one.rate for one in loads) > saturated.rate / 5  # of the half that was aimed at
    assert saturated.failed == steady.failed == failed == 0
    assert worst < 1000 * seconds / 2
