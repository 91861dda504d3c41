"""What can be seen to be wrong about a run is said before it starts, and leaves nothing behind."""
from pathlib import Path

import pytest
from sizes import thinned
from typer.testing import CliRunner

from mlops_nb import cli
from mlops_nb.errors import MlopsError

pytestmark = pytest.mark.usefixtures("no_settings")
ROOT = Path(__file__).parents[2]


@pytest.fixture
def refusal(tmp_path, monkeypatch):
    "A function that starts a command in this project, and returns the error with which it is refused."
    def run(*arguments: str) -> str:
        with pytest.raises(MlopsError) as error: CliRunner().invoke(cli.app, arguments, catch_exceptions=False)
        assert not (tmp_path / "state").exists()
        return str(error.value)
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("MLOPS_STATE", str(tmp_path / "state"))
    return run


@pytest.mark.parametrize(("arguments", "message"), thinned([
    ("train -p as_of=2013-4-1", "parameter 'as_of' is '2013-4-1'"),
    ("train -p as_of=yesterday", "it must be a date such as 20"),
    ("train -p as_of=2031-01-01", "a day without data\n  write a day from 2013-01-02 to 2014-01-01"),
    ("demo -p year_end=2013-02-01", "parameter 'year_end' is 2013-02-01, before first_day (2013-04-01)"),
    ("demo -p retrain_day=2013-03-01", "parameter 'retrain_day' is 2013-03-01, before first_day"),
    ("demo -p replay_days=0", "a number of days from 1 to 366"),
    ("batch_inference -p replay_days=0", "a number of days from 1 to 366"),
    ("monitor -p granularity=month", "no granularity 'month'"),
    ("retrain -p cause=nosuch/2013-12", "no alert 'nosuch' in the bundle or in conf/retraining.yml\n  there are: "),
    ("features -p source=nowhere", "source 'nowhere' is neither a folder nor an installed package"),
    ("features -p source=docs", "no file 'flights.csv' in "),
    ("compare -p first=a@b@c -p second=1", "no model 'dev.flights.a"),
    ("train --var settings={", "variables.settings: parameter 'settings' is not JSON"),
    ("features -p online_store=ftp://x", "no kind of online store 'ftp'"),
    ("deploy -p model_name=dev.flights.late_arrival -p model_version=1", "no model 'dev.flights.late_arrival'"),
    ("reproduce -p model_name=x -p model_version=1", "no model 'x' in the registry")]))
def test_a_value_that_a_task_would_refuse(refusal, arguments, message):
    assert message in refusal("run", *arguments.split())


@pytest.mark.parametrize(("name", "value", "message"), [
    ("MLOPS_ENGINE", "spark", "engine 'spark' needs the full pyspark package"),
    ("MLOPS_ONLINE_STORE", "cache", "MLOPS_ONLINE_STORE: the address of the online store cannot be read"),
    ("MLOPS_LAKEHOUSE", "s3://", "names no bucket"),
    ("MLFLOW_TRACKING_URI", "http://[bad", "MLFLOW_TRACKING_URI is no address: "),
    ("MLFLOW_REGISTRY_URI", "mysql://me:word@db/x", "or change MLFLOW_REGISTRY_URI"),
    ("MLFLOW_TRACKING_URI", "mysql://me:word@db/x", "mysql://db/x needs the Python module 'MySQLdb'"),
    ("MLFLOW_TRACKING_URI", "postgres://db/x", "did you mean 'postgresql'?"),
    ("MLFLOW_TRACKING_URI", "postgresql://me@host:abc/db", "MLflow's store postgresql://host:abc/db cannot be used: "),
    ("MLFLOW_TRACKING_URI", "http://localhost:1", "no MLflow server answers at http://localhost:1")])
def test_a_place_that_cannot_be_used(refusal, monkeypatch, name, value, message):
    monkeypatch.setenv(name, value)
    assert message in refusal("run", "features")


@pytest.mark.parametrize(("arguments", "message"), [
    ("approve late_arrival x", "'x' is not the number of a version"),
    ("approve prod.flights.late_arrival 1 --as Me", "choose the target that writes it: -t prod"),
    ("repair 1", "there are no runs yet: mlops run features, or make demo"),
    ("runs show 1", "there are no runs yet: mlops run features, or make demo")])
def test_a_command_on_an_empty_state_names_the_next_one(refusal, arguments, message):
    assert message in refusal(*arguments.split())
