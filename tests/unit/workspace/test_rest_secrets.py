"""Secrets of the local workspace, as databricks-sdk reads them."""
from dataclasses import replace
from types import SimpleNamespace

import pytest
from databricks.sdk import WorkspaceClient
from databricks.sdk.errors import InvalidParameterValue, NotImplemented, PermissionDenied, ResourceDoesNotExist
from served import served

from mlops_nb.env import load_env
from mlops_nb.serving.places import make_places
from mlops_nb.workspace.app import build_app
from mlops_nb.workspace.rest_secrets import secrets_router
from mlops_nb.workspace.tokens import load_tokens, make_token, owner_token, users_by_digest


@pytest.fixture
def workspace(project, monkeypatch):
    "A workspace whose job names two secrets, of which one is set, beside one that no job names."
    task = project.notebook("any", "1", parameters="write: str = ''\nread: str = ''") | {
        "base_parameters": {"write": "{{secrets/store/write-password}}", "read": "{{secrets/store/read}}"}}
    project.job("publish", [{"task_key": "a", "notebook_task": task}])
    monkeypatch.setenv("MLOPS_SECRET_STORE_WRITE_PASSWORD", "wört")
    monkeypatch.setenv("MLOPS_SECRET_OTHER_KEY", "b")
    env = replace(load_env("dev", root=project.root), state=project.root / ".mlops")
    places = make_places(env)
    tokens = {"ann": owner_token(places, "ann"), "ben": make_token(places, "ben")}
    with served(build_app(lambda: users_by_digest(load_tokens(places)), [secrets_router(env)])) as host:
        yield SimpleNamespace(**{user: WorkspaceClient(host=host, token=token) for user, token in tokens.items()})


def test_the_owner_reads_a_secret_by_the_unchanged_utilities_of_a_notebook(workspace):
    assert workspace.ann.dbutils.secrets.get("store", "write-password") == "wört"
    assert workspace.ann.dbutils.secrets.get("other", "key") == "b"
    with pytest.raises(ResourceDoesNotExist, match="set the environment variable MLOPS_SECRET_STORE_READ"):
        workspace.ann.secrets.get_secret("store", "read")
    for scope, key in (("a/b", "c"), ("", "x"), ("a", "b=c\n")):
        with pytest.raises(InvalidParameterValue): workspace.ann.secrets.get_secret(scope, key)


def test_another_user_gets_no_value(workspace):
    for key in ("write-password", "none"):
        with pytest.raises(PermissionDenied, match="owner of the workspace alone"):
            workspace.ben.secrets.get_secret("store", key)


def test_the_lists_have_what_a_job_names_and_the_environment_has(workspace):
    assert [scope.name for scope in workspace.ben.secrets.list_scopes()] == ["store"]
    assert [each.key for each in workspace.ben.secrets.list_secrets("store")] == ["write-password"]
    with pytest.raises(ResourceDoesNotExist, match="Scope other does not exist"):
        list(workspace.ben.secrets.list_secrets("other"))


def test_writing_says_where_secrets_are(workspace):
    with pytest.raises(NotImplemented, match="set or unset MLOPS_SECRET_STORE_READ, then start mlops up again"):
        workspace.ann.secrets.put_secret("store", "read", string_value="x")
    with pytest.raises(NotImplemented, match="environment variables"): workspace.ann.secrets.create_scope("new")
    with pytest.raises(NotImplemented): workspace.ann.secrets.delete_scope("store")
