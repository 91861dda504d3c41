"""Ctrl-C, as a terminal sends it to all processes of its group: exit code 130 and no traceback, at any moment."""
import os
import signal
import subprocess
import sys
import time

import pytest

MAIN = "from mlops_nb.cli import main; main()"


@pytest.mark.parametrize("words, seconds", [
    (["validate"], 0.12), (["validate"], 0.3), (["runs"], 0.3), (["run", "demo"], 0.3),
    (["models", "show", "a@b"], 0.9)])
def test_an_interrupted_command_ends_with_130_and_no_traceback(words, seconds, tmp_path):
    process = subprocess.Popen([sys.executable, "-c", MAIN, *words], start_new_session=True, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               env=os.environ | {"MLOPS_STATE": str(tmp_path / "state")})
    time.sleep(seconds)
    has_ended = process.poll() is not None
    if not has_ended: os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert "Traceback" not in output
    if not has_ended: assert process.returncode in (130, -signal.SIGINT), output  # a shell shows both as 130
