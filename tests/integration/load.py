"""Load on a server by wrk, and the answer times that it reports."""
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

REPORT = """
done = function(summary, latency, requests)
  local failed = summary.errors.status + summary.errors.connect + summary.errors.read + summary.errors.write
    + summary.errors.timeout
  io.write(string.format('{"requests": %d, "microseconds": %d, "p50": %d, "p99": %d, "failed": %d}\\n',
    summary.requests, summary.duration, latency:percentile(50), latency:percentile(99), failed))
end
"""


@dataclass(frozen=True)
class Load:
    "What a server did under load."
    rate: float  # answers per second
    p50: float  # milliseconds
    p99: float  # milliseconds
    failed: int  # answers of another status than 2xx, and errors of the connection
    wrk_cores: float  # processors that wrk itself used


def require_wrk() -> None:
    "Exit with the command that installs wrk if it is missing."
    if not shutil.which("wrk"): sys.exit("this benchmark needs wrk: apt-get install wrk")


def script_of(body: bytes, headers: dict[str, str], delay: int,  # milliseconds between two requests of a connection
              folder: Path) -> Path:
    "Write the script with which wrk posts a body."
    lines = ['wrk.method = "POST"', f"wrk.body = {json.dumps(body.decode())}"]
    lines += [f"wrk.headers[{json.dumps(name)}] = {json.dumps(value)}" for name, value in headers.items()]
    script = folder / "post.lua"
    if delay: lines.append(f"function delay() return {delay} end")
    script.write_text("\n".join(lines) + REPORT)
    return script


def put_load(url: str, body: bytes, headers: dict[str, str] | None = None, seconds: int = 8,
             connections: int = 16,
             rate: float = 0) -> Load:  # requests per second, at most; 0: as many as the server answers
    "Post a body on all connections at the same time."
    delay = int(1000 * connections / rate) if rate else 0
    headers = {"Content-Type": "application/json", **(headers or {})}
    with tempfile.TemporaryDirectory() as folder:
        script = script_of(body, headers, delay, Path(folder))
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        words = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "30s", "-s", str(script), url]
        printed = subprocess.run(words, check=True, capture_output=True, text=True, env=os.environ).stdout
        now = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = json.loads(re.search(r"^\{.*\}$", printed, re.M).group())
    duration = result["microseconds"] / 1e6
    busy = now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime
    return Load(result["requests"] / duration, result["p50"] / 1000, result["p99"] / 1000, result["failed"],
                busy / duration)


@contextmanager
def repeated_load(url: str, body: bytes, **options) -> Iterator[list[Load]]:  # of `put_load`
    "Put load on a server until the block ends, in pieces that follow one another; the list has what it did in each."
    ended, loads = threading.Event(), []

    def keep_loading():
        while not ended.is_set(): loads.append(put_load(url, body, **options))

    thread = threading.Thread(target=keep_loading)
    thread.start()
    try: yield loads
    finally:
        ended.set()
        thread.join()
