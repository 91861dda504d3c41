"""The lineage of a model that was logged with plain MLflow."""
from pathlib import Path

import mlflow
import pytest
from sklearn.linear_model import LinearRegression
from typer.testing import CliRunner

from mlops_nb import cli
from mlops_nb.deployment import lineage
from mlops_nb.env import load_env
from mlops_nb.errors import MlopsError
from mlops_nb.models import registry

ROOT = Path(__file__).parents[2]
MODEL = LinearRegression().fit([[1.0], [2.0]], [1.0, 2.0])


@pytest.fixture(scope="module")
def env(tmp_path_factory):
    "A registry with a model of two versions: one of a run without tags, one of a folder without a run."
    with pytest.MonkeyPatch.context() as patch:
        for name in ("MLFLOW_TRACKING_URI", "MLOPS_LAKEHOUSE", "MLOPS_ENGINE"): patch.delenv(name, raising=False)
        patch.setenv("MLOPS_STATE", str(tmp_path_factory.mktemp("state")))
        patch.setenv("COLUMNS", "80")
        patch.chdir(ROOT)
        env = load_env("dev")
        env.use_mlflow()
        with mlflow.start_run(experiment_id=registry.experiment_id(env, "x")):
            mlflow.log_metric("rmse", 0.5)
            mlflow.sklearn.log_model(MODEL, name="model", registered_model_name="dev.flights.plain",
                                     pip_requirements=["scikit-learn==1.2.3"])
        folder = env.state / ("a-long-folder-" * 6) / "model"
        mlflow.sklearn.save_model(MODEL, folder, pip_requirements=["scikit-learn"])
        (folder / "requirements.txt").unlink()
        registry.client(env).create_model_version("dev.flights.plain", str(folder))
        yield env


def models_command(*arguments: str) -> str:  # what it prints
    result = CliRunner().invoke(cli.app, ["models", *arguments])
    assert result.exit_code == 0, result.exception
    return result.output


def test_values_that_plain_mlflow_does_not_record_are_shown_as_not_recorded(env):
    text = models_command("show", "plain/1")
    assert "None" not in text and "data\n│   └── not recorded" in text
    assert "rmse: 0.5" in text and "scikit-learn==1.2.3" in text
    sections = lineage.lineage(env, registry.resolve_version(env, "plain/1"))
    assert sections["code"]["executed notebook"] == "not recorded" and sections["model"]["id"].startswith("m-")


def test_a_version_without_a_run(env):
    text = models_command("show", "plain/2")
    assert "None" not in text
    for heading in ("data", "code", "parameters", "metrics"): assert f"{heading}\n│   └── not recorded" in text
    source = registry.get_version(env, "dev.flights.plain", 2).source
    assert source in text and len(source) > 80, "the tree breaks a long path, so the command also prints it in one line"


@pytest.mark.parametrize("number", [1, 2])
def test_a_version_without_a_record_cannot_be_trained_again(env, number):
    version = registry.get_version(env, "dev.flights.plain", number)
    with pytest.raises(MlopsError, match=f"plain v{number} has no record of the tables it read"):
        lineage.training_record(env, version)


def test_missing_settings(env):
    client = registry.client(env)
    client.set_model_version_tag("dev.flights.plain", "1", "read_versions", "{}")
    version = registry.get_version(env, "dev.flights.plain", 1)
    with pytest.raises(MlopsError, match="the settings of dev.flights.plain v1 are missing"):
        lineage.training_record(env, version)
    client.delete_model_version_tag("dev.flights.plain", "1", "read_versions")
