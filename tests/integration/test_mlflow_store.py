"""An MLflow store that does not exist yet, met by several processes at once, or killed while it is made."""
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
env = replace(load_env(), state=state, tracking_uri=f"sqlite:///{state / 'mlflow.db'}", registry_uri=f"sqlite:///{state / 'mlflow.db'}")
client = registry.client(env)
run = client.create_run(registry.experiment_id(env, "trial"))
print(client.get_experiment(run.info.experiment_id).artifact_location)
"""


def use(state): return subprocess.Popen([sys.executable, "-c", USE, state], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_four_processes_meet_an_empty_store(tmp_path):
    state = tmp_path / "state"
    done = [(p.communicate(timeout=120), p.returncode) for p in [use(state) for _ in range(4)]]
    assert [code for _, code in done] == [0] * 4, done[0][0][1]
    assert {out.strip() for (out, _), _ in done} == {(state / "artifacts/dev/trial").as_uri()}  # wherever the process stands


@pytest.mark.slow
def test_killed_while_the_store_is_made_the_next_one_makes_it(tmp_path):
    state = tmp_path / "state"
    first = use(state)
    deadline = time.monotonic() + 60
    while not (state / "mlflow.db.part").exists():
        assert time.monotonic() < deadline and first.poll() is None
        time.sleep(0.01)
    first.kill(); first.communicate()
    assert not (state / "mlflow.db").exists()
    second = use(state)
    _, errors = second.communicate(timeout=120)
    assert second.returncode == 0, errors
