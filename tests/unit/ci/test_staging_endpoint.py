"""The workspace of an integration run: started for its jobs, given their catalog, ended and emptied in every case."""
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import psutil
import pytest

from mlops_nb.ci import integration, staging_endpoint
from mlops_nb.ci.staging_endpoint import running_workspace
from mlops_nb.data.session import environment
from mlops_nb.env import load_env
from mlops_nb.errors import MlopsError
from mlops_nb.jobs.execute import end_with_parent
from mlops_nb.serving import endpoints
from mlops_nb.serving.endpoint_settings import EndpointSettings
from mlops_nb.serving.endpoints import MODEL_TAG, NoWorkspaceError, ServingConfig

ROOT, TESTS = Path(__file__).parents[3], Path(__file__).parents[2]
CATALOG = "staging_ci_20130401_120000_abcd"
UP = f"""
import json, os, signal, sys
from pathlib import Path
sys.path[:0] = ["{ROOT}", "{TESTS}"]
from fake_workspace import FakeWorkspace
signal.signal(signal.SIGTERM, lambda *_: sys.exit())
facts = {{"pid": os.getpid(), "words": sys.argv[1:],
         "workers": os.environ.get("BUNDLE_VAR_workers"), "catalog": os.environ.get("BUNDLE_VAR_catalog")}}
if "broken" in os.environ: sys.exit("port 8080 is taken")
with FakeWorkspace() as workspace:
    Path(os.environ["MLOPS_STATE"], "facts.json").write_text(json.dumps(facts))
    workspace.announce(os.environ["MLOPS_STATE"])
    signal.pause()
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    "The state of a temporary catalog, with a workspace of a few lines instead of `mlops up`."
    for name in ("MLOPS_WORKSPACE", "MLOPS_WORKSPACE_TOKEN"): monkeypatch.delenv(name, raising=False)
    (tmp_path / "up.py").write_text(UP)
    monkeypatch.setattr(staging_endpoint, "UP", (sys.executable, str(tmp_path / "up.py")))
    monkeypatch.setenv("MLOPS_STATE", str(tmp_path / "state"))
    store = f"sqlite:///{tmp_path}/state/mlflow.db"
    env = load_env("staging", {"catalog": CATALOG}, ROOT)
    return replace(env, home="local", tracking_uri=store, registry_uri=store)


def facts_of(place) -> dict: return json.loads((place.state / "facts.json").read_text())


def has_ended(pid: int) -> bool:
    "Whether a process ends within some seconds; one that its parent has not waited for has ended too."
    for _ in range(100):
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE: return True
        except psutil.NoSuchProcess: return True
        time.sleep(0.1)
    return False


def test_the_workspace_has_the_variables_of_the_run_and_ends_with_it(place):
    with pytest.raises(RuntimeError), running_workspace(place, {"catalog": CATALOG, "workers": "us"}):
        facts = facts_of(place)
        assert (facts["words"], facts["workers"], facts["catalog"]) == (["-t", "staging"], "us", None)
        assert list(endpoints.workspace_client(place).serving_endpoints.list()) == []
        raise RuntimeError
    assert has_ended(facts["pid"])
    with pytest.raises(NoWorkspaceError): endpoints.workspace_client(place)


def test_a_workspace_that_does_not_start_says_why(place):
    with environment({"broken": "yes"}), pytest.raises(
            MlopsError, match="did not start: it ended with exit code 1\n  port 8080 is taken"):
        with running_workspace(place, {"catalog": CATALOG}): pass


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_workspace_ends_if_the_run_is_ended_or_killed(place, number):
    if number == signal.SIGKILL and not sys.platform.startswith("linux"): pytest.skip("PR_SET_PDEATHSIG is of Linux")
    code = f"""
        import time
        from mlops_nb.ci import staging_endpoint
        from mlops_nb.env import load_env
        staging_endpoint.UP = {staging_endpoint.UP!r}
        with staging_endpoint.running_workspace(load_env("staging", {{"catalog": "{CATALOG}"}}), {{"catalog": "x"}}):
            print("runs", flush=True)
            time.sleep(60)
    """
    run = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, cwd=ROOT, text=True,
                           env=os.environ | {"PYTHONPATH": str(ROOT)})
    with run:
        assert run.stdout.readline() == "runs\n"
        run.send_signal(number)
        run.wait(30)
    assert has_ended(facts_of(place)["pid"])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="PR_SET_PDEATHSIG is of Linux")
def test_a_process_whose_parent_had_ended_before_it_could_ask_does_not_begin():
    codes = [subprocess.run(["true"], preexec_fn=partial(end_with_parent, parent, signal.SIGTERM)).returncode
             for parent in (os.getpid(), 2**22)]  # the other one is no process
    assert codes == [0, 1]


@pytest.mark.slow
@pytest.mark.parametrize("code", [0, 1])
def test_the_endpoint_is_checked_after_a_success_and_removed_in_both_cases(place, monkeypatch, code):
    ran, name = [], f"{CATALOG}-flights-late_arrival"

    def run_mlops(words, folder, settings):
        "Instead of jobs: the first creates the endpoint, and ends with the code."
        ran.append(words[:4])
        if words[1] == "integration":
            config = ServingConfig(name, f"{CATALOG}.flights.late_arrival", {"champion": 1}, {"champion": 100})
            tags = {MODEL_TAG: config.model}
            assert endpoints.put_endpoint(place, config, EndpointSettings(), tags) == "created"
            return code
        assert f"--var=catalog={CATALOG}" in words and "--param=load_seconds=2" in words
        assert endpoints.serving_config(place, name).versions == {"champion": 1}
        return 3
    for module in (integration, staging_endpoint): monkeypatch.setattr(module, "run_mlops", run_mlops)
    removed, remove = [], endpoints.remove_endpoints_of_catalog
    monkeypatch.setattr(staging_endpoint, "remove_endpoints_of_catalog", lambda env: removed.extend(remove(env)))
    variables = {"catalog": CATALOG}
    assert integration.run_pipelines(place, "integration", variables, {"last_day": "x"}, 2.0) == (1 if code else 3)
    assert removed == [name] and has_ended(facts_of(place)["pid"])
    jobs = [["run", "integration", "-t", "staging"], ["run", "endpoint_check", "-t", "staging"]]
    assert ran == jobs[:1] if code else ran == jobs


def test_a_target_without_an_endpoint_needs_no_workspace(place, monkeypatch):
    monkeypatch.setattr(integration, "run_mlops", lambda words, *_: 7)
    without = replace(place, variables=place.variables | {"endpoint": {"enabled": False}})
    assert integration.run_pipelines(without, "integration", {}, {}, 5) == 7
    assert not (place.state / "facts.json").exists()
