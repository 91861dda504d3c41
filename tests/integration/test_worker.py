"""A worker and a model host in processes of their own: routing, limits, updates under load, stalled clients."""
import json
import os
import re
import signal
import socket
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest
from small_workspace import HEADERS, SmallWorkspace

from mlops_nb.errors import MlopsError


@contextmanager
def small_workspace():
    "A workspace in a folder with a short name, since the path of a Unix socket has at most 107 bytes."
    with tempfile.TemporaryDirectory(prefix="w") as name:
        small = SmallWorkspace(Path(name))
        try: yield small
        finally: small.close()


@pytest.fixture(scope="module")
def workspace():
    "Shared by the tests that leave it as it was; each has an endpoint of its own."
    with small_workspace() as small:
        small.ask("accept")
        yield small


@pytest.fixture
def own_workspace():
    with small_workspace() as small: yield small


def predictions(response): return response.json()["predictions"]


def error_of(response): return response.status_code, response.json()["error_code"]


def test_requests_are_routed_answered_logged_and_finished_at_the_end(own_workspace):
    workspace = own_workspace
    fast, exact = workspace.entity("fast", value=1), workspace.entity("exact", value=2, fast=False)
    shadow = workspace.entity("shadow", value=3)
    spec = workspace.spec("late", 1, fast, exact, shadow, routes={"fast": 80, "exact": 20, "shadow": 0})
    assert workspace.serve(spec | {"shadow": ["shadow"]}) == {"fast": {"fast": True, "exact": False, "shadow": True}}
    waiting = ThreadPoolExecutor(1).submit(workspace.invoke, "late")  # in the backlog
    workspace.ask("accept")
    assert waiting.result().status_code == 200
    with httpx.Client(base_url=f"{workspace.url}/serving-endpoints/late", headers=HEADERS) as client:
        answers = [client.post("/invocations", json={"inputs": {"x": [1]}}) for _ in range(200)]
        names = [answer.headers["served-model-name"] for answer in answers]
        assert 130 < Counter(names)["fast"] < 190 and set(names) == {"fast", "exact"}
        direct = client.post("/served-models/exact/invocations", json={"inputs": {"x": [1]}, "client_request_id": "c1"})
        assert predictions(direct) == [2] and direct.headers["served-model-name"] == "exact"
        assert error_of(client.post("/invocations", content=b"{")) == (400, "BAD_REQUEST")
        workspace.ask("retag", name="late", sticky_key="client_request_id", shadow=[])
        for customer in range(10):
            body = {"inputs": {"x": [1]}, "client_request_id": str(customer)}
            assert len({client.post("/invocations", json=body).headers["served-model-name"] for _ in range(5)}) == 1
        workspace.ask("retag", name="late", sticky_key="", shadow=[])
        assert predictions(client.post("/served-models/shadow/invocations", json={"inputs": {"x": [1]}})) == [3]
    counts = workspace.ask("stats")["endpoints"]["late"]
    assert counts["fast"]["requests"]["200"] + counts["exact"]["requests"]["200"] == 1 + 200 + 1 + 50
    assert counts["shadow"]["requests"] == {"200": 201 + 1} and counts[""]["requests"] == {"400": 1}
    with ThreadPoolExecutor(2) as threads:
        slow = [threads.submit(workspace.invoke, "late", {"x": [0] * 100, "wait": [0.5]}, "fast"),
                threads.submit(workspace.invoke, "late", {"seconds": [0.5]}, "exact")]
        def in_flight(name): return workspace.ask("stats")["endpoints"]["late"][name]["in_flight"]
        while not in_flight("fast") == in_flight("exact") == 1: time.sleep(0.02)
        workspace.worker.send_signal(signal.SIGTERM)
        assert [answer.result().status_code for answer in slow] == [200, 200]
    assert workspace.worker.wait(timeout=10) == 0
    payloads = workspace.payloads()
    assert len({p.values["databricks_request_id"] for p in payloads}) == len(payloads) == 201 + 201 + 1 + 1 + 50 + 1 + 2
    [record] = [p for p in payloads if p.values["client_request_id"] == "c1"]
    assert record.table == "dev.flights.late_payload" and json.loads(record.response) == {"predictions": [2]}
    assert record.values["databricks_request_id"] == direct.headers["x-request-id"]
    expected = {"requester": "maria", "status_code": 200, "served_entity_id": "id-exact", "entity_version": "1"}
    assert expected.items() <= record.values.items()


@pytest.mark.slow
def test_what_cannot_be_answered_has_a_status_and_a_reason(workspace):
    workspace.serve(workspace.spec("limits", 1, workspace.entity("a", value=1, concurrency=2), timeout_seconds=0.5))
    assert error_of(workspace.invoke("limits", headers={})) == (401, "UNAUTHENTICATED")
    assert error_of(workspace.invoke("limits", headers={"authorization": "Bearer other"})) == (401, "UNAUTHENTICATED")
    assert workspace.invoke("early").headers["x-page"] == "control"  # which knows why it is not here
    assert error_of(workspace.invoke("limits", served="b")) == (404, "RESOURCE_DOES_NOT_EXIST")
    path = f"{workspace.url}/serving-endpoints/limits/invocations"
    assert httpx.get(path, headers=HEADERS).headers["allow"] == "POST"
    assert error_of(workspace.invoke("limits", json=None, content=b" " * (16 * 2**20 + 1)))[0] == 413
    with ThreadPoolExecutor(3) as threads:
        answers = [*threads.map(lambda _: workspace.invoke("limits", {"seconds": [0.2]}), range(3))]
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert sorted(answer.status_code for answer in answers) == [200, 200, 429]
    assert "Too many concurrent requests" in refused.text and refused.headers["retry-after"]
    with ThreadPoolExecutor(4) as threads:  # a slow online store, in threads of the worker
        answers = threads.map(lambda _: workspace.invoke("limits", {"x": [0] * 100, "wait": [0.3]}), range(4))
        assert sorted(answer.status_code for answer in answers) == [200, 200, 429, 429]
    assert error_of(workspace.invoke("limits", {"seconds": [0.8]})) == (504, "DEADLINE_EXCEEDED")
    assert error_of(workspace.invoke("limits", {"x": [0] * 100, "wait": [0.8]})) == (504, "DEADLINE_EXCEEDED")
    assert workspace.invoke("limits").status_code == 200
    with connection_to(workspace) as connection:
        connection.sendall(b"GET /ping HTTP/1.1\r\nx-long: " + b"a" * 70_000)
        assert connection.recv(1000).startswith(b"HTTP/1.1 431")
    workspace.ask("remove", name="limits")
    assert workspace.invoke("limits").headers["x-page"] == "control"


@pytest.mark.slow
def test_other_requests_go_to_control(workspace):
    answer = httpx.put(f"{workspace.url}/api/2.0/x%2Fy?a=1&b=%20", headers=HEADERS, content=iter([b"1" * 70_000] * 40))
    assert (answer.status_code, answer.headers["x-page"]) == (201, "control")
    answer = httpx.put(f"{workspace.url}/api/2.0/x%2Fy?a=1&b=%20", headers=HEADERS, content=b"1" * 2_800_000)
    assert answer.json() == {"path": "/api/2.0/x%2Fy?a=1&b=%20", "method": "PUT", "length": 2_800_000,
                             "authorization": HEADERS["authorization"]}
    assert httpx.get(f"{workspace.url}/ping").status_code == httpx.get(f"{workspace.url}/health").status_code == 200
    time.sleep(2.1)  # until the idle connection is not used again
    os.rename(workspace.folder / "pages", workspace.folder / "away")
    assert error_of(httpx.get(f"{workspace.url}/api/2.0/serving-endpoints")) == (503, "TEMPORARILY_UNAVAILABLE")
    os.rename(workspace.folder / "away", workspace.folder / "pages")


@pytest.mark.slow
def test_a_model_that_cannot_be_loaded_is_refused_with_its_reason(workspace):
    with pytest.raises(MlopsError, match="has no MLmodel"): workspace.entity("a", value=1, fault="load")
    with pytest.raises(MlopsError, match="ValueError: the first row$"): workspace.entity("a", value=1, fault="warm")
    with pytest.raises(MlopsError, match="ended with exit code 7"): workspace.entity("a", value=1, fault="exit")
    good = workspace.entity("a", value=1)
    workspace.serve(workspace.spec("load", 1, good))
    with pytest.raises(MlopsError, match="does not accept connections"):
        workspace.ask("prepare", endpoint=workspace.spec("load", 2, good | {"socket": "nowhere"}))
    with pytest.raises(MlopsError, match="no prepared generation 2"):
        workspace.ask("switch", name="load", generation=2)
    assert predictions(workspace.invoke("load")) == [1]


@pytest.mark.slow
def test_a_model_process_that_is_killed_is_reported(workspace):
    entity = workspace.entity("a", value=1, fast=False)
    workspace.serve(workspace.spec("killed", 1, entity))
    answer = workspace.invoke("killed", {"exit": [3]})
    assert error_of(answer) == (503, "TEMPORARILY_UNAVAILABLE") and "the process has ended" in answer.text
    events = [workspace.events.get(timeout=5) for _ in range(2)]
    assert {"event": "ended", "socket": entity["socket"], "code": 3} in events
    assert {"event": "model_failed", "socket": entity["socket"], "reason": "the process has ended"} in events
    assert workspace.invoke("killed").status_code == 503
    again = workspace.entity("a", value=2, fast=False)
    workspace.serve(workspace.spec("killed", 2, again))
    assert predictions(workspace.invoke("killed")) == [2]


@pytest.mark.slow
def test_no_process_outlives_control_and_no_model_has_the_listening_socket(own_workspace):
    workspace = own_workspace
    workspace.entity("a", value=1)
    [model] = psutil.Process(workspace.host.pid).children()
    listening = os.readlink(f"/proc/{workspace.worker.pid}/fd/{workspace.listener.fileno()}")
    links = [os.readlink(path) for path in Path(f"/proc/{model.pid}/fd").iterdir()]
    assert listening.startswith("socket:") and listening not in links and len(links) <= 6
    workspace.host.kill()
    assert not psutil.wait_procs([model], timeout=5)[1]
    workspace.channel.shutdown(socket.SHUT_RDWR)
    assert workspace.worker.wait(timeout=10) == 0
    host = workspace.start_host()
    host.stdin.close()
    with host.stdout: assert host.wait(timeout=10) == 0


def connection_to(workspace) -> socket.socket:
    return socket.create_connection(workspace.listener.getsockname(), timeout=10)


def test_a_wish_for_another_protocol_is_ignored_and_the_body_is_a_body(workspace):
    "Java's HttpClient and `curl --http2` send it with each first request. The body may come in a packet of its own."
    workspace.serve(workspace.spec("upgrade", 1, workspace.entity("a", value=5)))
    body = b'{"inputs": {"x": [1]}}'
    head = (b"POST /serving-endpoints/upgrade/invocations HTTP/1.1\r\nhost: x\r\nauthorization: Bearer secret\r\n"
            b"connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAE\r\ncontent-length: %d\r\n\r\n")
    with connection_to(workspace) as connection:
        answers = connection.makefile("rb")
        def answer() -> tuple[int, bytes]:
            status, length = int(answers.readline().split()[1]), 0
            while line := answers.readline().strip():
                if line.lower().startswith(b"content-length:"): length = int(line.split(b":")[1])
            return status, answers.read(length)
        for parts in ([head % len(body) + body], [head % len(body), body], [(head % len(body) + body) * 2]):
            for part in parts:
                connection.sendall(part)
                time.sleep(0.05)
            for _ in range(2 if len(parts[0]) > 2 * len(head) else 1):
                status, text = answer()
                assert status == 200 and b"predictions" in text, text
        hidden = b"GET /version HTTP/1.1\r\nhost: x\r\n\r\n"  # as a body it is no JSON, and no request
        connection.sendall(head % len(hidden))
        connection.sendall(hidden + b"GET /ping HTTP/1.1\r\nhost: x\r\n\r\n")
        assert [answer()[0], answer()] == [400, (200, b"\n")]


def test_a_target_that_is_no_path_is_refused(workspace):
    with connection_to(workspace) as connection:
        connection.sendall(b"OPTIONS * HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        answer = b"".join(iter(lambda: connection.recv(4096), b""))
    assert answer.startswith(b"HTTP/1.1 400") and b"BAD_REQUEST" in answer


@pytest.mark.slow
def test_clients_that_do_not_get_on_lose_their_connections(workspace):
    workspace.serve(workspace.spec("stalled", 1, workspace.entity("a", value=1)))
    header = b"POST /serving-endpoints/stalled/invocations HTTP/1.1\r\nhost: x\r\nauthorization: Bearer secret\r\n"
    beginnings = [b"", b"POST / HT", header, header + b"content-length: 100\r\n\r\n{",
                  header + b"transfer-encoding: chunked\r\n\r\n1\r\n{\r\n"]
    stalled = [connection_to(workspace) for _ in beginnings]
    for connection, beginning in zip(stalled, beginnings, strict=True): connection.sendall(beginning)
    many = [connection_to(workspace) for _ in range(70)]  # at most 64 are accepted
    refused = b"".join(connection.recv(1000) for connection in many[-6:])
    assert refused.count(b"503 Service Unavailable") == 6
    for connection in many: connection.close()
    for connection in stalled:
        try: assert connection.recv(1000) == b""
        except ConnectionResetError: pass
        connection.close()
    assert workspace.ask("stats")["connections"] == 0 and workspace.invoke("stalled").status_code == 200


def test_large_bodies_and_many_slow_ones_in_chunks_leave_room_for_others(own_workspace):
    workspace = own_workspace
    workspace.ask("accept")
    workspace.serve(workspace.spec("late", 1, workspace.entity("a", value=1)))
    header = (b"POST /serving-endpoints/late/invocations HTTP/1.1\r\nhost: x\r\nauthorization: Bearer secret\r\n"
              b"transfer-encoding: chunked\r\n\r\n1\r\n{\r\n")
    slow = [connection_to(workspace) for _ in range(20)]
    for connection in slow: connection.sendall(header)
    padded = b'{"inputs": {"x": [1]}}' + b" " * 600_000
    assert predictions(workspace.invoke("late", json=None, content=padded)) == [1]
    assert predictions(workspace.invoke("late", json=None, content=iter([padded[:100], padded[100:]]))) == [1]
    assert error_of(workspace.invoke("late", json=None, content=padded[1:])) == (400, "BAD_REQUEST")
    for connection in slow: connection.close()


def answers_of(connection, *parts: bytes) -> list:
    "Send bytes in parts; the answers until the server closes the connection, or none comes for a while."
    received = b""
    for part in parts:
        connection.sendall(part)
        time.sleep(0.05)
    connection.settimeout(1)
    try:
        while data := connection.recv(65536): received += data
    except TimeoutError: pass
    return [int(value) for value in re.findall(rb'HTTP/1.1 200 OK[^{]*{"predictions": \[(\d+)\]}', received)]


@pytest.mark.slow
def test_requests_of_every_shape_get_one_answer_each(workspace):
    "Whether the connection answers at once, in the event loop through ASGI, or by the model process."
    entities = [workspace.entity("a", value=1), workspace.entity("b", value=2, fast=False)]
    workspace.serve(workspace.spec("shapes", 1, *entities))
    def request(served, *headers, body=b'{"inputs": {"x": [1]}}', version="1.1"):
        lines = [f"POST /serving-endpoints/shapes/served-models/{served}/invocations HTTP/{version}", "host: x",
                 "authorization: Bearer secret", *(headers or [f"content-length: {len(body)}"]), "", ""]
        return "\r\n".join(lines).encode() + body
    chunked = request("a", "transfer-encoding: chunked", body=b'16\r\n{"inputs": {"x": [1]}}\r\n0\r\n\r\n')
    whole, length = request("a"), "content-length: 22"
    exact, closing = request("b"), request("a", length, "connection: close")
    padded = b'{"inputs": {"x": [1]}}' + b" " * 98_000  # more than a header may have
    long = request("a", f"content-length: {len(padded)}", body=padded)
    pieces = tuple(long[start:start + 12_000] for start in range(0, len(long), 12_000))
    shapes = {(whole,): [1], pieces: [1], (whole[:60], whole[60:-5], whole[-5:]): [1], (chunked,): [1],
              (chunked[:-9], chunked[-9:]): [1], (whole, exact, whole): [1, 2, 1],
              (exact + whole + exact + whole + chunked,): [2, 1, 2, 1, 1], (closing + whole,): [1],
              (request("a", version="1.0"),): [1], (request("a", length, "expect: 100-continue"),): [1],
              (request("a", length, "content-encoding: gzip"), whole): [1],
              (whole.replace(b"secret", b"wrong") + whole,): [1], (whole.replace(b"1]", b"x]") + whole,): [1]}
    with ThreadPoolExecutor(len(shapes)) as threads:
        def answers(parts):
            with connection_to(workspace) as connection: return answers_of(connection, *parts)
        assert dict(zip(shapes, threads.map(answers, shapes), strict=True)) == shapes


@pytest.mark.slow
@pytest.mark.parametrize("is_chunked", [False, True])
def test_a_body_of_100_mb_is_refused_in_bounded_memory(workspace, is_chunked):
    workspace.serve(workspace.spec("large", 1, workspace.entity("a", value=1)))
    before = workspace.ask("stats")["rss"]
    body = iter([b"[" * 2**20] * 100) if is_chunked else b"[" * (100 * 2**20)
    try: assert workspace.invoke("large", json=None, content=body).status_code == 413
    except httpx.WriteError: assert is_chunked  # it took longer than the patience with a body
    assert workspace.ask("stats")["rss"] - before < 64 * 2**20 and workspace.invoke("large").status_code == 200


@pytest.mark.slow
def test_updates_under_load_fail_no_request(workspace):
    def entity(value): return workspace.entity("a", value=value, fast=value % 2 == 0, concurrency=16)
    def answer_text(value): return json.dumps({"predictions": [value]})
    workspace.serve(workspace.spec("updates", 0, entity(0)))
    answers, is_ending = [], threading.Event()
    def call():
        with httpx.Client(headers=HEADERS, base_url=workspace.url) as client:
            while not is_ending.is_set():
                inputs = {"seconds": [0.005]} if len(answers) % 5 == 0 else {"x": [1]}
                response = client.post("/serving-endpoints/updates/invocations", json={"inputs": inputs})
                answers.append((response.status_code, response.text))
    with ThreadPoolExecutor(4) as threads:
        clients = [threads.submit(call) for _ in range(4)]
        sockets = []
        while not answers: time.sleep(0.01)
        for generation in range(1, 7):
            new = entity(generation)
            workspace.serve(workspace.spec("updates", generation, new))
            if sockets: workspace.to_host(json.dumps({"command": "end", "socket": sockets[-1]}).encode() + b"\n")
            sockets.append(new["socket"])
            while answer_text(generation) not in {text for _, text in answers[-20:]}: time.sleep(0.01)
        is_ending.set()
        for client in clients: client.result()
    assert {status for status, _ in answers} == {200} and len(answers) > 50
    assert {text for _, text in answers} == {answer_text(value) for value in range(7)}
    codes = {}
    while len(codes) < len(sockets) - 1:
        event = workspace.events.get(timeout=5)
        if event["socket"] in sockets: codes[event["socket"]] = event.get("code")
    assert codes == dict.fromkeys(sockets[:-1], 0), "each process of an old generation ends, without an error"
