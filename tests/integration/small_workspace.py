"""A worker and a model host with small models, driven as control drives them; as a script, their processes.

A model is a folder with `model.json`: `value` is predicted; `fast`: the worker can predict it as well; with `fault`,
loading or the first prediction fails. A request says in `inputs` what happens: `{"seconds": [0.2]}` takes this
long in the model process, `{"wait": [0.2]}` in a thread of the worker, and `{"exit": [3]}` ends the model process."""
import hashlib
import json
import os
import queue
import socket
import socketserver
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import httpx

from mlops_nb.errors import MlopsError
from mlops_nb.serving.scoring_protocol import Answer
from mlops_nb.serving.spool import closed_segments, read_segment
from mlops_nb.workspace.client_connections import Patience
from mlops_nb.workspace.generations import FastPath
from mlops_nb.workspace.model_host import model_host_main
from mlops_nb.workspace.worker import worker_main
from mlops_nb.workspace.worker_channel import CONTROL_VARIABLE, worker_command

TOKEN = "secret"
HEADERS = {"authorization": f"Bearer {TOKEN}"}


def answer_with(value) -> Answer: return Answer(200, json.dumps({"predictions": [value]}).encode(), 0.5)


class FastSmallModel:
    "Answers what needs no time in the model process."

    def __init__(self, settings): self.settings, self.is_closed = settings, False

    def invoke(self, request):
        assert not self.is_closed, "a model was used after it was freed"
        inputs = request.get("inputs", {})
        if "wait" in inputs: time.sleep(inputs["wait"][0])
        return None if {"seconds", "exit"} & set(inputs) else answer_with(self.settings["value"])

    def close(self): self.is_closed = True


class ExactSmallModel:
    "Answers everything."

    def __init__(self, folder, target):
        self.settings = json.loads((folder / "model.json").read_text())
        if self.settings.get("fault") == "load": raise MlopsError(f"{folder.name} has no MLmodel", "log it again")
        if self.settings.get("fault") == "exit": os._exit(7)

    def warm(self):
        if self.settings.get("fault") == "warm": raise ValueError("the first row\ncannot be predicted")

    def invoke(self, body):
        inputs = json.loads(body).get("inputs", {})
        time.sleep(inputs.get("seconds", [0])[0])
        if "exit" in inputs: os._exit(inputs["exit"][0])
        if "descriptors" in inputs: return answer_with(sorted(os.listdir("/proc/self/fd")))
        return answer_with(self.settings["value"])


def load_fast(folder, target):
    settings = json.loads((folder / "model.json").read_text())
    return FastPath(FastSmallModel(settings)) if settings.get("fast", True) else None


class Pages(BaseHTTPRequestHandler):
    "Control's own REST API: it repeats what it received."
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"] or 0)) if "content-length" in self.headers else b""
        received = {"path": self.path, "method": self.command, "authorization": self.headers["authorization"],
                    "length": len(body)}
        answer = json.dumps(received).encode()
        self.send_response(201)
        self.send_header("content-length", str(len(answer)))
        self.send_header("x-page", "control")
        self.end_headers()
        self.wfile.write(answer)

    do_GET = do_PUT = do_DELETE = do_POST

    def address_string(self): return "worker"  # the address of a Unix socket is empty

    def log_message(self, *_): pass


class PagesServer(socketserver.ThreadingMixIn, socketserver.UnixStreamServer): daemon_threads = True


class SmallWorkspace:
    "A model host and a worker; `control` is this object."

    def __init__(self, folder: Path, start_host: bool = True):
        self.folder, self.replies, self.events, self.count = folder, {}, queue.Queue(), 0
        self.lock = threading.Lock()
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.pages = PagesServer(f"{folder}/pages", Pages)
        threading.Thread(target=self.pages.serve_forever, daemon=True).start()
        self.host = self.start_host() if start_host else None
        self.start_worker()
        self.ask("tokens", digests={hashlib.sha256(TOKEN.encode()).hexdigest(): "maria"})

    def start_host(self) -> subprocess.Popen:
        host = subprocess.Popen([sys.executable, __file__, "host"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        threading.Thread(target=self.read, args=(host.stdout,), daemon=True).start()
        return host

    def start_worker(self) -> None:
        server = socket.socket(socket.AF_UNIX)
        server.bind(f"{self.folder}/control")
        server.listen()
        descriptor = self.listener.fileno()
        command = worker_command(descriptor, 0, f"{self.folder}/pages", f"{self.folder}/spool")
        self.worker = subprocess.Popen([sys.executable, __file__, "worker", *command[3:]], pass_fds=[descriptor],
                                       env={**os.environ, CONTROL_VARIABLE: f"{self.folder}/control"})
        self.channel, _ = server.accept()
        server.close()
        threading.Thread(target=self.read, args=(self.channel.makefile("rb"),), daemon=True).start()
        assert self.events.get(timeout=20) == {"worker": 0, "pid": self.worker.pid}

    def read(self, lines) -> None:
        for line in lines:
            message = json.loads(line)
            if "id" in message: self.replies[message["id"]].put(message)
            else: self.events.put(message)

    def begin(self, write, command: str, **values) -> queue.Queue:
        with self.lock:
            self.count += 1
            reply = self.replies[self.count] = queue.Queue()
            write(json.dumps({"id": self.count, "command": command, **values}).encode() + b"\n")
        return reply

    def ask(self, command: str, seconds: float = 20, **values):
        "Send a command to the worker; its result, or MlopsError with its error."
        return self.result(self.begin(self.channel.sendall, command, **values), seconds)

    def result(self, reply: queue.Queue, seconds: float = 20):
        message = reply.get(timeout=seconds)
        if "error" in message: raise MlopsError(message["error"])
        return message["result"]

    def to_host(self, line: bytes) -> None:
        self.host.stdin.write(line)
        self.host.stdin.flush()

    def start_model(self, name: str, **settings) -> str:
        "Start a model process; returns its socket."
        folder = self.folder / f"{name}-{self.count}"
        folder.mkdir()
        (folder / "model.json").write_text(json.dumps(settings))
        self.result(self.begin(self.to_host, "start", folder=str(folder), target="dev", socket=f"{folder}.s",
                               name=name, log=str(folder / "log.txt")))
        return f"{folder}.s"

    def entity(self, name: str, concurrency: int = 4, **settings) -> dict:
        "A served entity with a process of its own."
        path = self.start_model(name, **settings)
        return {"name": name, "id": f"id-{name}", "model": "dev.flights.late", "version": "1", "target": "dev",
                "folder": path.removesuffix(".s"), "socket": path, "concurrency": concurrency}

    def spec(self, name: str, generation: int, *entities: dict, **other) -> dict:
        return {"name": name, "generation": generation, "entities": list(entities),
                "routes": {entity["name"]: 100 // len(entities) for entity in entities}, "sticky_key": "", "shadow": [],
                "inference_table": {"table": f"dev.flights.{name}_payload", "sampling_fraction": 1.0},
                "timeout_seconds": 30} | other

    def serve(self, spec: dict) -> dict:
        "Let the worker serve a configuration of an endpoint."
        prepared = self.ask("prepare", endpoint=spec)
        self.ask("switch", name=spec["name"], generation=spec["generation"])
        return prepared

    def invoke(self, name: str, inputs=None, served: str = "", **options) -> httpx.Response:
        "Call an endpoint."
        path = f"served-models/{served}/invocations" if served else "invocations"
        options = {"headers": HEADERS, "timeout": 30, "json": {"inputs": inputs or {"x": [1]}}} | options
        return httpx.post(f"{self.url}/serving-endpoints/{name}/{path}", **options)

    def payloads(self) -> list:
        "The records of the spool; the worker must have ended."
        return [record for path in closed_segments(self.folder / "spool") for record in read_segment(path)]

    def close(self) -> None:
        self.pages.shutdown()
        self.pages.server_close()
        for process in (self.worker, self.host):
            if process and process.poll() is None: process.kill()
        self.worker.wait()
        if self.host:
            self.host.wait()
            for stream in (self.host.stdin, self.host.stdout): stream.close()
        for end in (self.channel, self.listener): end.close()


if __name__ == "__main__":
    part = sys.argv.pop(1)
    if part == "host": model_host_main(ExactSmallModel, libraries=())
    else: worker_main(load_fast, patience=Patience(header=1, body=1.5, reading=2, idle=30, connections=64))
