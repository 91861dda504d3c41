"""Creation of an MLflow store by several processes at once, or by a process that is killed."""
import subprocess
import sys
import time

import pytest

USE = """
import sys
from dataclasses import replace
from pathlib import Path
from mlops_nb.models import registry
from mlops_nb.env import load_env
state = Path(sys.argv[1])
store = f"sqlite:///{state / 'mlflow.db'}"
env = replace(load_env(), state=state, tracking_uri=store, registry_uri=store)
client = registry.client(env)
run = client.create_run(registry.experiment_id(env, "trial"))
print(client.get_experiment(run.info.experiment_id).artifact_location)
"""


def use(state):
    "Start a process that creates a run in the store."
    return subprocess.Popen([sys.executable, "-c", USE, state], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True)


@pytest.mark.slow
def test_four_processes_start_with_an_empty_store(tmp_path):
    state = tmp_path / "state"
    processes = [use(state) for _ in range(4)]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, outputs[0][1]
    artifacts = str(state / "artifacts/dev/trial")  # absolute, whatever the working directory is
    assert {stdout.strip() for stdout, _ in outputs} == {artifacts}


@pytest.mark.slow
def test_after_a_kill_during_the_creation_the_next_process_creates_the_store(tmp_path):
    state = tmp_path / "state"
    first = use(state)
    deadline = time.monotonic() + 60
    while not (state / "mlflow.db.part").exists():
        assert time.monotonic() < deadline and first.poll() is None
        time.sleep(0.01)
    first.kill()
    first.communicate()
    assert not (state / "mlflow.db").exists()
    second = use(state)
    _, errors = second.communicate(timeout=120)
    assert second.returncode == 0, errors
