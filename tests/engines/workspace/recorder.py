"""A proxy in front of the local workspace: it passes each call on unchanged, and records how it was answered."""
import http.client
import threading
from collections import Counter
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

CONNECTION_HEADERS = {"connection", "keep-alive", "transfer-encoding", "content-length", "date", "server"}


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


class Recorder(ThreadingHTTPServer):
    "Started by `with`; `calls` counts the answers by method, path and status."
    daemon_threads = True

    def __init__(self, upstream: str):
        super().__init__(("127.0.0.1", 0), Handler)
        self.upstream, self.address = urlsplit(upstream), f"http://127.0.0.1:{self.server_port}"
        self.calls, self.errors, self.lock = Counter(), {}, threading.Lock()

    def record(self, method: str, path: str, status: int, content: bytes) -> None:
        with self.lock:
            self.calls[method, path, status] += 1
            if status >= 400: self.errors[method, path, status] = content[:500].decode(errors="replace")

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()
