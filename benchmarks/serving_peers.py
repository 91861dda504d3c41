"""The servers that the endpoints are compared with: `mlflow models serve`, MLServer and BentoML, one worker each."""
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import urlopen

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests/integration"))
from load import Load, put_load  # noqa: E402

PEERS = HERE.parent / ".venv-peers/bin"  # made by `make install-peers`; their dependencies exclude some of ours


def answers(address: str) -> bool:
    "Whether a server answers at an address, with whatever status."
    try: return bool(urlopen(address, timeout=1))
    except HTTPError: return True
    except (URLError, OSError): return False


@contextmanager
def started(words: list, ready: str, log: Path, seconds: float = 90, **variables: str) -> Iterator[None]:
    "Run a server until the block ends; exit with its log if it does not answer."
    with log.open("wb") as output:
        server = subprocess.Popen(list(map(str, words)), stdout=output, stderr=output, start_new_session=True,
                                  cwd=log.parent, env=os.environ | variables)
    try:
        end = time.monotonic() + seconds
        while not answers(ready):
            if server.poll() is not None or time.monotonic() > end: sys.exit(f"{words[0]} failed:\n{log.read_text()}")
            time.sleep(0.2)
        yield
    finally:
        if server.poll() is None: os.killpg(server.pid, signal.SIGTERM)
        try: server.wait(10)
        except subprocess.TimeoutExpired: os.killpg(server.pid, signal.SIGKILL)


def mlflow_server(model: Path, body: bytes, folder: Path, seconds: int) -> Load:
    "`mlflow models serve` on the files of a model, called with a body of the scoring protocol."
    bin_folder = Path(sys.executable).parent
    words = [bin_folder / "mlflow", "models", "serve", "-m", model, "--env-manager", "local", "--port", "5711",
             "--workers", "1"]
    with started(words, "http://127.0.0.1:5711/ping", folder / "mlflow.log",
                 PATH=f"{bin_folder}{os.pathsep}{os.environ['PATH']}"):  # it calls uvicorn by name
        return put_load("http://127.0.0.1:5711/invocations", body, seconds=seconds)


def ml_server(booster: Path, row: list[float], folder: Path, seconds: int) -> Load:
    "MLServer with its runtime for LightGBM, in this process (no parallel workers)."
    settings = {"name": "late", "implementation": "mlserver_lightgbm.LightGBMModel",
                "parameters": {"uri": str(booster), "version": "1"}}
    (folder / "model-settings.json").write_text(json.dumps(settings))
    (folder / "settings.json").write_text(json.dumps({"http_port": 5712, "grpc_port": 5713, "metrics_port": 5714,
                                                      "host": "127.0.0.1", "parallel_workers": 0, "debug": False}))
    body = {"inputs": [{"name": "rows", "shape": [1, len(row)], "datatype": "FP64", "data": row}]}
    with started([PEERS / "mlserver", "start", folder], "http://127.0.0.1:5712/v2/models/late/ready",
                 folder / "mlserver.log"):
        return put_load("http://127.0.0.1:5712/v2/models/late/infer", json.dumps(body).encode(), seconds=seconds)


def bento_server(booster: Path, row: list[float], folder: Path, seconds: int) -> Load:
    "A service of BentoML that calls LightGBM."
    words = [PEERS / "bentoml", "serve", "serving_bento:Late", "--port", "5715", "--host", "127.0.0.1",
             "--working-dir", HERE]
    body = json.dumps({"rows": [row]}).encode()
    with started(words, "http://127.0.0.1:5715/readyz", folder / "bento.log", BENCHMARK_BOOSTER=str(booster),
                 BENTOML_DO_NOT_TRACK="True", BENTOML_HOME=str(folder / "bento"), PYTHONPATH=str(HERE)):
        return put_load("http://127.0.0.1:5715/predict", body, seconds=seconds)
