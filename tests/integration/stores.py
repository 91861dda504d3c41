"""Servers for the tests of the online stores: each on a free port, in its own folder, stopped at the end."""
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

PASSWORD = "pass-that-nobody-may-read"
# the public key of every Cosmos DB emulator
COSMOS_KEY = "C2y6yDjf5/R+ob0N8A7Cgv30VRDJIWEHLM+4QDU5DE2nQ9nDuVTqobD4b8mGGyPMbIZnqyMsEcaGQy67XIw/Jw=="
SECRETS = {"MLOPS_SECRET_ONLINE_SERVER": PASSWORD, "MLOPS_SECRET_ONLINE_COSMOS": COSMOS_KEY}
CLIENTS = {"sqlite": "sqlite3", "postgresql": "psycopg", "redis": "redis", "dynamodb": "moto", "cosmos": "azure.cosmos"}
KINDS = tuple(CLIENTS)
SERVERS: list[subprocess.Popen] = []  # the servers that run as child processes, in the order of their start


class Missing(Exception):
    "A client or server is not installed; the message has the command that installs it."


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def wait_for(port: int, process: subprocess.Popen | None, log: Path, seconds: float = 30) -> None:
    "Wait until a server accepts connections."
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try: return socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError: time.sleep(0.05)
        if process and process.poll() is not None: break
    raise RuntimeError(f"the server did not start:\n{log.read_text()}")


@contextmanager
def served(command: list, port: int, folder: Path) -> Iterator[None]:
    "Run a server as a child process."
    log = folder / "server.log"
    with open(log, "w") as out:
        process = subprocess.Popen(list(map(str, command)), cwd=folder, stdout=out, stderr=out,
                                   stdin=subprocess.DEVNULL)
    try:
        wait_for(port, process, log)
        SERVERS.append(process)
        yield
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


@contextmanager
def sqlite(folder: Path) -> Iterator[str]:
    yield f"sqlite:///{folder}/online.db"


def postgres_tool(name: str) -> str:
    "Return the path of a program of the server, which Debian does not put on the PATH."
    on_path = shutil.which(name)
    if on_path: return on_path
    programs = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    if not programs: raise Missing("postgresql is not installed: apt-get install postgresql")
    return str(programs[0])


@contextmanager
def postgresql(folder: Path) -> Iterator[str]:
    initdb, control, port = postgres_tool("initdb"), postgres_tool("pg_ctl"), free_port()
    tools = ["runuser", "-u", "postgres", "--"] if os.getuid() == 0 else []  # the server refuses to run as root
    secret, data, log = folder / "password", folder / "data", folder / "log"
    secret.write_text(PASSWORD)
    if tools:
        for path in (folder, secret): shutil.chown(path, "postgres")
    def run(*command): subprocess.run([*tools, *map(str, command)], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    run(initdb, "-D", data, "-U", "ann", "-A", "scram-sha-256", "--pwfile", secret, "--no-sync", "-E", "UTF8",
        "--locale=C")
    options = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c fsync=off -c timezone=America/New_York"
    run(control, "-D", data, "-l", log, "-o", options, "-w", "start")
    try: yield f"postgresql://ann@127.0.0.1:{port}/postgres?password=secrets/online/server"
    finally: run(control, "-D", data, "-m", "immediate", "stop")


@contextmanager
def redis(folder: Path) -> Iterator[str]:
    server = shutil.which("redis-server")
    if not server: raise Missing("redis-server is not installed: apt-get install redis-server")
    port = free_port()
    with served([server, "--port", port, "--bind", "127.0.0.1", "--save", "", "--requirepass", PASSWORD], port, folder):
        yield f"redis://127.0.0.1:{port}/0?password=secrets/online/server"


@contextmanager
def dynamodb(folder: Path) -> Iterator[str]:
    port = free_port()
    with served([sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", port], port, folder):
        yield (f"dynamodb://eu-west-1?endpoint_url=http://127.0.0.1:{port}"
               "&access_key=secrets/online/server&secret_key=secrets/online/server")


@contextmanager
def cosmos(folder: Path) -> Iterator[str]:
    server = shutil.which("cosmosdb-server")
    if not server: raise Missing("cosmosdb-server is not installed: npm install --global @vercel/cosmosdb-server")
    port = free_port()
    with served([server, "-p", port], port, folder):
        yield f"cosmos://127.0.0.1:{port}/features?key=secrets/online/cosmos&verify=false"


@contextmanager
def running(kind: str) -> Iterator[str]:  # the store's address
    "Run a store of a kind; Missing if its client or server is not installed."
    if not find_spec(CLIENTS[kind].split(".")[0]) or not find_spec(CLIENTS[kind]):
        raise Missing(f"the Python module {CLIENTS[kind]} is not installed: make install-stores")
    with tempfile.TemporaryDirectory(prefix=f"mlops-{kind}-") as folder:
        with globals()[kind](Path(folder)) as uri: yield uri
