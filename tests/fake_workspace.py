"""A workspace of the few REST paths of serving endpoints, for tests with the real databricks-sdk.

`Endpoints` answers a request with a status, a body and headers; `FakeWorkspace` is its server, on a free port.
A version in `broken` cannot be loaded: an update with it fails, and the configuration before it goes on answering."""
import json
from contextlib import suppress
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from urllib.parse import parse_qsl

from http_server import HttpServer

from mlops_nb.serving.places import WorkspacePlaces, write_running

OPEN = ("/health", "/.well-known/databricks-config")  # without a token
TOKEN = "dapi-of-the-owner"  # pragma: allowlist secret


def error(status: int, code: str, message: str): return status, {"error_code": code, "message": message}, {}


class Endpoints:
    "The endpoints of a workspace, and what was called."

    def __init__(self, predict=None):
        self.endpoints, self.calls, self.broken, self.refusals = {}, [], {}, 0
        self.predict = predict or (lambda entity, rows: [float(entity["entity_version"])] * len(rows))

    def answer(self, method: str, path: str, body: dict):  # status, body, headers
        if path in OPEN: return 200, {}, {}
        self.calls.append((method, path))
        parts = path.strip("/").split("/")
        if parts[0] == "serving-endpoints": return self.invoke(parts[1], parts[2:-1], body)
        if parts[:3] != ["api", "2.0", "serving-endpoints"]: return error(404, "ENDPOINT_NOT_FOUND", "no such path")
        if len(parts) == 3: return self.create(body) if method == "POST" else self.all()
        if parts[3] not in self.endpoints: return error(404, "RESOURCE_DOES_NOT_EXIST", f"no endpoint {parts[3]}")
        change = {"DELETE": self.delete, "GET": self.get}.get(method) or getattr(self, parts[4].replace("-", "_"))
        return change(self.endpoints[parts[3]], body)

    def all(self, *_): return 200, {"endpoints": list(self.endpoints.values())}, {}
    def get(self, endpoint, _): return 200, endpoint, {}

    def delete(self, endpoint, _):
        del self.endpoints[endpoint["name"]]
        return 200, {}, {}

    def create(self, body):
        if body["name"] in self.endpoints: return error(409, "RESOURCE_ALREADY_EXISTS", f"{body['name']} exists")
        endpoint = {"name": body["name"], "tags": body.get("tags", []), "ai_gateway": body.get("ai_gateway"),
                    "state": {"ready": "NOT_READY", "config_update": "NOT_UPDATING"}}
        self.endpoints[body["name"]] = endpoint
        return self.config(endpoint, body["config"])

    def config(self, endpoint, body):
        if self.refusals:
            self.refusals -= 1
            return error(409, "RESOURCE_CONFLICT", "an update of the endpoint runs")
        wanted = {name: body[name] for name in ("served_entities", "traffic_config")}
        for entity in wanted["served_entities"]:
            if reason := self.broken.get(int(entity["entity_version"])):
                entity["state"] = {"deployment": "DEPLOYMENT_FAILED", "deployment_state_message": reason}
                endpoint |= {"pending_config": wanted, "state": endpoint["state"] | {"config_update": "UPDATE_FAILED"}}
                return 200, endpoint, {}
        endpoint |= {"config": wanted, "state": {"ready": "READY", "config_update": "NOT_UPDATING"}}
        endpoint.pop("pending_config", None)
        return 200, endpoint, {}

    def tags(self, endpoint, body):
        tags = {tag["key"]: tag for tag in endpoint["tags"]} | {tag["key"]: tag for tag in body.get("add_tags", [])}
        endpoint["tags"] = [tag for key, tag in tags.items() if key not in body.get("delete_tags", [])]
        return 200, {"tags": endpoint["tags"]}, {}

    def ai_gateway(self, endpoint, body):
        endpoint["ai_gateway"] = body
        return 200, body, {}

    def invoke(self, name: str, served: list[str], body: dict):  # served: empty, or served-models and a name
        endpoint = self.endpoints.get(name)
        if not endpoint: return error(404, "RESOURCE_DOES_NOT_EXIST", f"no endpoint {name}")
        traffic = {r["served_model_name"]: r["traffic_percentage"]
                   for r in endpoint["config"]["traffic_config"]["routes"]}
        chosen = served[1] if served else max(traffic, key=traffic.get)
        entity = next(e for e in endpoint["config"]["served_entities"] if e["name"] == chosen)
        return 200, {"predictions": self.predict(entity, body["dataframe_records"])}, {"served-model-name": chosen}

    def served(self, name: str) -> dict[str, int]:
        "The versions of an endpoint by the names of its served entities."
        return {entity["name"]: int(entity["entity_version"])
                for entity in self.endpoints[name]["config"]["served_entities"]}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are two packets: the second would wait for 40 ms

    def log_message(self, *_): ...

    def do(self):
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"{}")
        if self.headers.get("Authorization") != f"Bearer {TOKEN}" and self.path not in OPEN:
            status, content, headers = error(401, "UNAUTHENTICATED", "the token is not valid")
        else:
            path, _, query = self.path.partition("?")
            body = dict(parse_qsl(query)) | body  # those of a GET are in its query
            status, content, headers = self.server.endpoints.answer(self.command, path, body)
        data = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        with suppress(BrokenPipeError): self.wfile.write(data)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do


class FakeWorkspace(HttpServer):
    "A state for which it is announced takes it for its own local workspace."

    def __init__(self, endpoints: Endpoints | None = None):
        super().__init__(Handler)
        self.endpoints = endpoints or Endpoints()

    def announce(self, state: Path) -> None:
        "Write the files by which `mlops up` makes itself known."
        places = WorkspacePlaces(Path(state) / "workspace")
        places.folder.mkdir(parents=True, exist_ok=True)
        places.token.write_text(f"{TOKEN}\n")
        write_running(places, self.address)
