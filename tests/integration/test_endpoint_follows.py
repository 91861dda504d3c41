"""A rollback moves the endpoint and the next batch, on the trained state; an endpoint that lags does not stop batch."""
import pandas as pd
import pytest
from fake_workspace import FakeWorkspace
from states import MODEL, ROOT, env_of, scored_by
from typer.testing import CliRunner

from mlops_nb.commands.app import app
from mlops_nb.data.session import get_spark, stop
from mlops_nb.deployment import aliases
from mlops_nb.errors import MlopsError
from mlops_nb.features.client import spec_of
from mlops_nb.features.online import PARSERS, OnlineFeatures
from mlops_nb.features.stores.store import store as online_store
from mlops_nb.flights.use_case import FLIGHTS
from mlops_nb.models import registry, scoring
from mlops_nb.serving import endpoints
from mlops_nb.workflow import endpoint_check
from mlops_nb.workflow.endpoint import follow_champion

pytestmark = pytest.mark.slow
NAME = "dev-flights-late_arrival"


@pytest.fixture(scope="module")
def home(own_trained):
    "The trained version 1, then the same model as version 2 in production; a workspace that serves it."
    env = env_of(own_trained)
    client = registry.client(env)
    stop()
    first = client.get_model_version(MODEL, "1")
    second = client.create_model_version(MODEL, source=first.source, run_id=first.run_id, tags=first.tags)
    with pytest.MonkeyPatch.context() as patch, FakeWorkspace() as workspace:
        patch.setenv("MLOPS_STATE", str(own_trained))
        patch.chdir(ROOT)
        workspace.announce(own_trained)
        aliases.move_alias(get_spark(env), env, MODEL, "champion", second.version, "a test")
        yield env, workspace.endpoints
    stop()


def test_a_rollback_moves_the_endpoint_and_the_next_batch(home):
    env, fake = home
    follow_champion(env, MODEL)
    assert fake.served(NAME)["champion"] == 2 and endpoints.ask_endpoint(env, NAME, [{}]).values == [2.0]
    result = CliRunner().invoke(app, ["rollback", "late_arrival", "--reason", "warns of everything"])
    assert result.exit_code == 0, result.output
    assert f"{MODEL} v1 is Champion again, v2 is out of production: warns of everything" in result.output
    assert f"endpoint {NAME} was updated and serves champion v1 (100 %)" in result.output
    assert fake.served(NAME) == {"champion": 1} and endpoints.ask_endpoint(env, NAME, [{}]).values == [1.0]
    assert scored_by(env) == {1}


def test_a_rollback_to_a_version_that_cannot_be_served_says_so_and_batch_goes_on(home):
    env, fake = home
    fake.broken[2] = "the model needs lightgbm 5"
    words = ["rollback", "late_arrival", "--reason", "v1 is worse", "--to", "2"]
    error = CliRunner().invoke(app, words).exception
    assert "failed: champion: the model needs lightgbm 5; it still serves champion v1 (100 %)" in str(error)
    assert aliases.points_to(env, MODEL, "champion") == 2 and fake.served(NAME) == {"champion": 1}
    assert scored_by(env) == {2}
    fake.broken.clear()
    result = CliRunner().invoke(app, ["models", "serve", "late_arrival"])
    assert f"endpoint {NAME} was updated and serves champion v2 (100 %)" in result.output, result.output
    assert registry.get_version(env, MODEL, 2).tags["endpoint_update"] == f"{NAME}: updated"
    removed = CliRunner().invoke(app, ["models", "serve", "late_arrival", "--remove"])
    assert f"endpoint {NAME} is removed" in removed.output and fake.endpoints == {}


class Answers:
    "Predictions of an endpoint: features from the online store, then MLflow's model."

    def __init__(self, env, uri: str):
        self.env, self.spec, self.model, self.shift = env, spec_of(uri), scoring.load_pyfunc(uri), 0.0
        self.types = {column.name: column.data_type for column in self.spec.columns}

    def typed(self, row: dict) -> dict:
        "JSON has texts for times and days."
        return {name: value if value is None else PARSERS.get(self.types.get(name), lambda text: text)(value)
                for name, value in row.items() if name in self.types or not isinstance(value, dict)}

    def __call__(self, entity, rows: list[dict]) -> list[float]:
        with online_store(self.env) as store:
            complete = OnlineFeatures(self.env, self.spec, store)
            inputs = pd.DataFrame([complete(self.typed(row)) for row in rows])
        whole = inputs.select_dtypes("integer").columns  # a signature has doubles
        inputs[whole] = inputs[whole].astype(float)
        return [float(value) + self.shift for value in self.model.predict(inputs)]


@pytest.fixture(scope="module")
def answering(home):
    "A workspace whose endpoint predicts as it should."
    env, fake = home
    registry.client(env).set_registered_model_alias(MODEL, "champion", "1")
    fake.predict = Answers(env, f"models:/{MODEL}/1")
    follow_champion(env, MODEL)
    return fake


def test_the_check_compares_with_batch_inference_and_measures_a_load(answering, monkeypatch):
    check = endpoint_check.load_endpoint_check(FLIGHTS, "dev")
    table = endpoint_check.compare_with_batch(check)
    assert check.problems == [] and len(check.requests) == 100
    assert (table.endpoint - table.batch).abs().max() <= 1e-9 and table.keys_alone.between(0, 1).all()
    assert check.results[0].startswith("100 rows with all features as in batch")
    figure = endpoint_check.load_test(check, 0.5)
    assert "requests/s by 4 connections" in check.results[-1] and "0 failures" in check.results[-1]
    assert figure.get_suptitle().startswith("p99 is ") and check.problems == []


def test_the_check_fails_for_other_predictions_and_for_failures_under_load(answering):
    check = endpoint_check.load_endpoint_check(FLIGHTS, "dev")
    answering.predict.shift = 1e-6
    endpoint_check.compare_with_batch(check)
    assert check.problems == ["with all features, predictions differ from batch inference by up to 1e-06"]
    name = next(iter(answering.endpoints))
    details = answering.endpoints.pop(name)
    endpoint_check.load_test(check, 0.2)
    answering.endpoints[name] = details
    with pytest.raises(MlopsError, match=r"v1: with all features.*; \d+ requests failed under load\n.*\d+ x 404"):
        endpoint_check.finish_endpoint_check(check)
