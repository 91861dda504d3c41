"""Ctrl-C, as a terminal sends it to all processes of its group: exit code 130 and no traceback, at any moment."""
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from urllib.request import urlopen

import psutil
import pytest

from mlops_nb.env import load_env, make_store

MAIN = "from mlops_nb.cli import main; main()"


@pytest.mark.parametrize("words, seconds", [
    (["validate"], 0.12), (["validate"], 0.3), (["runs"], 0.3), (["run", "demo"], 0.3),
    (["models", "show", "a@b"], 0.9)])
def test_an_interrupted_command_ends_with_130_and_no_traceback(words, seconds, tmp_path):
    process = subprocess.Popen([sys.executable, "-c", MAIN, *words], start_new_session=True, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               env=os.environ | {"MLOPS_STATE": str(tmp_path / "state")})
    time.sleep(seconds)
    has_ended, sent = process.poll() is not None, time.monotonic()
    if not has_ended: os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert "Traceback" not in output
    has_ended |= process.returncode == 0 and time.monotonic() - sent < 0.2  # its work was done when the signal came
    if not has_ended: assert process.returncode in (130, -signal.SIGINT), output  # a shell shows both as 130


@pytest.mark.slow
def test_the_pages_of_the_state_in_use_are_served_until_the_command_is_ended(tmp_path):
    env = replace(load_env("dev"), state=tmp_path, tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    make_store(tmp_path / "mlflow.db")
    files = sorted(env.state.iterdir())
    with subprocess.Popen([sys.executable, "-c", MAIN, "ui"], text=True, stdout=subprocess.PIPE,
                          env=os.environ | {"MLOPS_STATE": str(tmp_path)}) as process:
        address = process.stdout.readline().split()[-1]
        with urlopen(address.replace("#/models", "version"), timeout=10) as answer: assert answer.status == 200
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 128 + signal.SIGTERM
    assert children and not psutil.wait_procs(children, timeout=5)[1] and sorted(env.state.iterdir()) == files
