"""The registry and the Files API of a local workspace on a state of its own, and a model to be registered."""
import shutil
import warnings
from contextlib import contextmanager
from dataclasses import replace
from hashlib import sha256

import numpy as np
from served import served

from mlops_nb.bundle.load import find_root
from mlops_nb.env import load_env
from mlops_nb.workspace.app import build_app
from mlops_nb.workspace.rest_files import files_router
from mlops_nb.workspace.rest_registry import registry_router
from mlops_nb.workspace.token_access import Permissions

TARGETS = {"owner": "", "ann": "dev", "ci": "staging"}  # of the tokens; a token's text is its user's name


def env_of(state, store=None):
    "The target dev with a state of its own, which begins with this MLflow store."
    if store:
        state.mkdir()
        shutil.copy(store, state / "mlflow.db")
    uri = f"sqlite:///{state / 'mlflow.db'}"
    return replace(load_env("dev", root=find_root()), state=state, tracking_uri=uri, registry_uri=uri)


@contextmanager
def registry_server(env):
    "The address of the workspace."
    permissions = Permissions(env.root, lambda: {user: {"target": target} for user, target in TARGETS.items()})
    users = {sha256(user.encode()).hexdigest(): user for user in TARGETS}
    with served(build_app(lambda: users, [registry_router(env, permissions), files_router(env, permissions)])) as host:
        yield host


CODE = """
class Double:
    def predict(self, model_input, params=None): return 2 * model_input


def _load_pyfunc(path): return Double()
"""


def log_model(env, folder):
    "Log a model with a signature, whose code is in this folder, and return its address and its run."
    import mlflow
    from mlflow.models import infer_signature
    env.use_mlflow()
    rows, code = np.array([[0.0], [1.0]]), folder / "double_of_rows.py"
    code.write_text(CODE)
    experiment = mlflow.create_experiment("/dev/registry", artifact_location=str(env.state / "artifacts/dev/r"))
    with mlflow.start_run(experiment_id=experiment) as run, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MLflow's advice: an input example
        info = mlflow.pyfunc.log_model(name="double", loader_module=code.stem, code_paths=[str(code)],
                                       signature=infer_signature(rows, rows), pip_requirements=["numpy"])
    return info.model_uri, run.info.run_id
