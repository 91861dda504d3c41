"""The endpoint of a model follows its aliases, with a real registry and a workspace of the few REST paths."""
from dataclasses import replace

import pytest
from fake_workspace import FakeWorkspace
from filelock import FileLock, Timeout

from mlops_nb.errors import MlopsError
from mlops_nb.models import registry
from mlops_nb.serving import endpoints
from mlops_nb.serving.endpoints import EndpointError, NoWorkspaceError
from mlops_nb.workflow import deploying, endpoint
from mlops_nb.workflow.endpoint import check_updated, follow_champion

MODEL, NAME = "dev.flights.late_arrival", "dev-flights-late_arrival"


@pytest.fixture
def model(env, monkeypatch):
    "A model of three versions; the first is the Champion."
    for name in ("MLOPS_WORKSPACE", "MLOPS_WORKSPACE_TOKEN"): monkeypatch.delenv(name, raising=False)
    client = registry.client(env)
    client.create_registered_model(MODEL)
    for _ in range(3): client.create_model_version(MODEL, source=str(env.state))
    client.set_registered_model_alias(MODEL, "champion", "1")
    yield client
    client.delete_registered_model(MODEL)


@pytest.fixture
def fake(env, tmp_path):
    with FakeWorkspace() as workspace:
        workspace.announce(env.state)
        yield workspace.endpoints
    (env.state / "workspace/workspace.json").unlink()


def tag(client, version): return client.get_model_version(MODEL, str(version)).tags.get("endpoint_update")


def test_the_endpoint_follows_champion_and_challenger(env, model, fake):
    update = follow_champion(env, MODEL)
    assert (update.outcome, update.text) == (
        "created", f"endpoint {NAME} was created and serves champion v1 (100 %)")
    assert {t["key"]: t["value"] for t in fake.endpoints[NAME]["tags"]} == {"target": "dev", "model": MODEL}
    model.set_registered_model_alias(MODEL, "challenger", "2")
    assert check_updated(follow_champion(env, MODEL)) == (
        f"endpoint {NAME} was updated and serves champion v1 (100 %), challenger v2 (0 %)")
    model.set_registered_model_alias(MODEL, "champion", "2")
    assert follow_champion(env, MODEL).config.versions == {"champion": 2} == fake.served(NAME)
    assert follow_champion(env, MODEL).outcome == "unchanged"
    assert tag(model, 1) == tag(model, 2) == f"{NAME}: updated"


def test_a_version_that_was_rolled_back_is_not_loaded(env, model, fake):
    model.set_registered_model_alias(MODEL, "challenger", "2")
    model.set_model_version_tag(MODEL, "2", "rolled_back", "warns of everything")
    assert follow_champion(env, MODEL).config.versions == {"champion": 1}


def test_without_a_workspace_the_reason_stands_in_result_and_tag_and_a_later_update_mends_it(env, model):
    update = follow_champion(env, MODEL)
    assert update.outcome == "unreachable"
    assert check_updated(update) == f"endpoint {NAME} was not updated: no local workspace runs"
    assert update.hint == "start it: mlops up; then: mlops models serve late_arrival -t dev"
    assert tag(model, 1) == f"endpoint {NAME} was not updated: no local workspace runs"
    with FakeWorkspace() as workspace:
        workspace.announce(env.state)
        assert follow_champion(env, MODEL).outcome == "created"
        assert tag(model, 1) == f"{NAME}: updated" and workspace.endpoints.served(NAME) == {"champion": 1}


def test_a_failed_update_is_an_error_that_keeps_the_alias_and_a_repetition_mends_it(env, model, fake):
    follow_champion(env, MODEL)
    model.set_registered_model_alias(MODEL, "champion", "2")
    fake.broken[2] = "the model needs lightgbm 5"
    update = follow_champion(env, MODEL)
    with pytest.raises(EndpointError, match=r"the update of endpoint .* failed: champion: the model needs lightgbm 5; "
                                            r"it still serves champion v1 \(100 %\)"):
        check_updated(update)
    assert tag(model, 2).startswith(f"the update of endpoint {NAME} failed: ") and fake.served(NAME) == {"champion": 1}
    assert registry.find_alias(env, MODEL, "champion").version in (2, "2")
    fake.broken.clear()
    assert follow_champion(env, MODEL).outcome == "updated" and tag(model, 2) == f"{NAME}: updated"


@pytest.mark.parametrize(("error", "outcome"), [
    (NoWorkspaceError("the local workspace has ended", "start it: mlops up"), "unreachable"),
    (EndpointError(f"endpoint {NAME} serves nothing"), "failed"), (MlopsError(f"no endpoint {NAME!r}"), "failed")])
def test_what_happens_to_the_endpoint_after_the_update_is_a_result_too(env, model, fake, monkeypatch, error, outcome):
    def missing(env, endpoint): raise error
    monkeypatch.setattr(endpoints, "serving_config", missing)
    update = follow_champion(env, MODEL)
    assert update.outcome == outcome and error.message in update.text and tag(model, 1) == update.text


def test_a_model_that_looks_up_features_names_the_job_that_publishes_them(env, model, fake, monkeypatch):
    from mlops_nb.features.spec import FEATURE_STORE, Column, FeatureSpec
    column = Column(name="seats", source=FEATURE_STORE, data_type="int", table_name="dev.flights.plane",
                    feature_name="seats", lookup_key=("tailnum",))
    monkeypatch.setattr(endpoint, "spec_of", lambda uri: FeatureSpec((column,)))
    fake.broken[1] = "dev.flights.plane is not published"
    with pytest.raises(EndpointError, match="looks up dev.flights.plane in the online store, .* publish of the job "
                                            "features writes them: mlops run features -t dev"):
        check_updated(follow_champion(env, MODEL))


def test_a_target_without_an_endpoint_and_a_model_without_a_champion_change_nothing(env, model, fake):
    without = replace(env, variables=env.variables | {"endpoint": {"enabled": False}})
    assert check_updated(follow_champion(without, MODEL)) == ""
    model.delete_registered_model_alias(MODEL, "champion")
    assert follow_champion(env, MODEL).text == f"endpoint {NAME} waits for the first Champion of {MODEL}"
    assert fake.calls == []


def test_of_two_updates_at_once_the_later_one_sees_the_newest_champion(env, model, fake, monkeypatch):
    "The alias is read, and the endpoint is updated, while no other process can do the same."
    held = []

    def watched(call):
        def watch(*arguments):
            try: FileLock(registry.lock_file(env.state, f"{MODEL}.endpoint")).acquire(timeout=0).lock.release()
            except Timeout: held.append(call.__name__)
            return call(*arguments)
        return watch
    monkeypatch.setattr(registry, "find_alias", watched(registry.find_alias))
    monkeypatch.setattr(endpoints, "put_endpoint", watched(endpoints.put_endpoint))
    follow_champion(env, MODEL)
    assert held == ["find_alias", "find_alias", "put_endpoint"]


def test_the_job_ends_with_both_results_or_fails_after_them(env, model, fake, monkeypatch):
    ended = []
    monkeypatch.setattr(deploying.task, "exit", ended.append)
    deployment = deploying.Deployment(None, env, registry.get_version(env, MODEL, 1), "v1 is Champion: better")
    endpoint.update_endpoint(deployment)
    deploying.finish_deployment(deployment)
    assert ended == [f"v1 is Champion: better; endpoint {NAME} was created and serves champion v1 (100 %)"]
    model.set_registered_model_alias(MODEL, "champion", "2")
    fake.broken[2] = "the model needs lightgbm 5"
    deployment = deploying.Deployment(None, env, registry.get_version(env, MODEL, 2), "v2 is Champion: better")
    shown = endpoint.update_endpoint(deployment)
    assert "the model needs lightgbm 5" in shown.data
    with pytest.raises(MlopsError, match="^v2 is Champion: better; the update of endpoint .* failed: champion: the "):
        deploying.finish_deployment(deployment)
    assert len(ended) == 1
