"""A proxy in front of the local workspace: it passes each call on unchanged, and records how it was answered."""
import http.client
import re
import threading
from collections import defaultdict
from contextlib import suppress
from http.server import BaseHTTPRequestHandler
from urllib.parse import urlsplit

from http_server import HttpServer

CONNECTION_HEADERS = {"connection", "keep-alive", "transfer-encoding", "content-length", "date", "server"}


PREFIXES = (("/api/2.0/mlflow/unity-catalog/", "registry"), ("/api/2.0/fs/files/", "files"),
            ("/api/2.0/fs/directories/", "directories"), ("/api/2.0/serving-endpoints/", "serving-endpoints"),
            ("/serving-endpoints/", "invocations"))


def name_of_call(method: str, path: str) -> str:
    "A call without the names of objects, such as `POST registry: model-versions/create`."
    for prefix, name in PREFIXES:
        if not path.startswith(prefix): continue
        if name == "registry": return f"{method} {name}: {path.removeprefix(prefix)}"
        rest = path.removeprefix(prefix).split("/", 1) if name == "serving-endpoints" else []
        return f"{method} {name}" + (f"/{{name}}{'/' + rest[1] if len(rest) > 1 else ''}" if rest else "")
    return f"{method} {re.sub(r'/(m-)?[0-9a-f]{32}', '/{id}', path.removeprefix('/api/2.0/'))}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_): ...

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip(): pass
        return b"".join(parts)

    def do(self):
        upstream = http.client.HTTPConnection(self.server.upstream.hostname, self.server.upstream.port, timeout=600)
        headers = {name: value for name, value in self.headers.items() if name.lower() not in CONNECTION_HEADERS}
        upstream.request(self.command, self.path, self.body() or None, headers)
        answer = upstream.getresponse()
        content = answer.read()
        self.server.record(self.command, urlsplit(self.path).path, answer.status, content)
        self.send_response_only(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in CONNECTION_HEADERS: self.send_header(name, value)
        is_head = self.command == "HEAD"
        self.send_header("Content-Length", answer.getheader("Content-Length", "0") if is_head else str(len(content)))
        self.end_headers()
        with suppress(BrokenPipeError): self.wfile.write(content)
        upstream.close()

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do


class Recorder(HttpServer):
    "`notebook` is the one that runs now, `answers` has the last answer to each of its calls."

    def __init__(self, upstream: str):
        super().__init__(Handler)
        self.upstream = urlsplit(upstream)
        self.notebook, self.answers, self.lock = "", {}, threading.Lock()

    def record(self, method: str, path: str, status: int, content: bytes) -> None:
        text = content[:500].decode(errors="replace") if status >= 400 else ""
        with self.lock: self.answers[self.notebook, name_of_call(method, path), status] = text

    def of_notebooks(self) -> dict[str, set[str]]:  # notebook -> its calls
        calls = defaultdict(set)
        for notebook, call, _ in self.answers: calls[notebook].add(call)
        return dict(calls)

    def not_answered(self) -> dict[str, str]:  # call -> the error
        return {call: text for (_, call, status), text in self.answers.items() if status in (404, 501) and (
            status == 501 or "ENDPOINT_NOT_FOUND" in text)}
