"""Catalogs, schemas, tables and grants, as databricks-sdk reads them, over a lakehouse of real Delta tables."""
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
from databricks.sdk import WorkspaceClient
from databricks.sdk.errors import BadRequest, NotFound, NotImplemented, PermissionDenied
from databricks.sdk.service.catalog import ColumnTypeName, DataSourceFormat, PermissionsChange, Privilege, TableType
from served import served

from mlops_nb.env import load_env
from mlops_nb.serving.places import WorkspacePlaces
from mlops_nb.workspace.app import build_app
from mlops_nb.workspace.rest_catalog import catalog_router
from mlops_nb.workspace.token_access import Permissions
from mlops_nb.workspace.tokens import load_tokens, make_token, owner_token, users_by_digest

TEMPORARY = "staging_ci_20130401_120000_0a1b"


def write_table(lakehouse, name, columns):
    import pyarrow as pa
    from deltalake import write_deltalake
    write_deltalake(str(lakehouse.joinpath(*name.split("."))), pa.table(columns), description="for a test")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    "A workspace with its owner Ann; the token of Ben is of dev, that of Carl of staging."
    import pyarrow as pa
    folder = tmp_path_factory.mktemp("catalog")
    places, lakehouse = WorkspacePlaces(folder / "workspace"), folder / "lakehouse"
    places.folder.mkdir()
    write_table(lakehouse, "dev.flights.plane", {
        "tail": ["a"], "seats": pa.array([1], pa.int32()), "codes": pa.array([[1]], pa.list_(pa.int64()))})
    write_table(lakehouse, f"{TEMPORARY}.flights.plane", {"tail": ["a"]})
    (lakehouse / "dev" / "flights" / "unfinished").mkdir()
    (lakehouse / "dev" / "flights" / "damaged" / "_delta_log").mkdir(parents=True)
    (lakehouse / "dev" / "flights" / "damaged" / "_delta_log" / f"{0:020}.json").write_text("{")
    tokens = {"ann": owner_token(places, "ann"), "ben": make_token(places, "ben", "dev"),
              "carl": make_token(places, "carl", "staging")}
    env = replace(load_env("dev"), state=folder, lakehouse=str(lakehouse), engine="sail")
    permissions = Permissions(env.root, lambda: load_tokens(places))
    app = build_app(lambda: users_by_digest(load_tokens(places)), [catalog_router(env, permissions)])
    with served(app) as host:
        yield SimpleNamespace(**{user: WorkspaceClient(host=host, token=token) for user, token in tokens.items()})


@contextmanager
def refused(kind, code):
    with pytest.raises(kind) as error: yield
    assert error.value.error_code == code


def test_a_user_sees_the_catalogs_of_the_target(workspace):
    names = {user: [each.name for each in client.catalogs.list()] for user, client in vars(workspace).items()}
    assert names["ann"] == names["ben"] == ["dev", "prod", "staging", TEMPORARY]  # dev reads all of them
    assert "dev" not in names["carl"] and TEMPORARY in names["carl"]
    assert workspace.carl.catalogs.get("Staging").full_name == "staging"
    with pytest.raises(PermissionDenied, match="USE CATALOG on Catalog 'dev'"): workspace.carl.catalogs.get("dev")
    for name in ("test", "staging_ci_20130401_120000_0a1c"):
        with refused(NotFound, "CATALOG_DOES_NOT_EXIST"): workspace.ann.catalogs.get(name)


def test_schemas_are_those_of_the_targets_and_of_the_lakehouse(workspace):
    assert [each.full_name for each in workspace.ann.schemas.list("prod")] == ["prod.flights"]
    assert workspace.carl.schemas.get(f"{TEMPORARY}.flights").catalog_name == TEMPORARY
    with refused(NotFound, "SCHEMA_DOES_NOT_EXIST"): workspace.ann.schemas.get("dev.other")
    with refused(NotFound, "CATALOG_DOES_NOT_EXIST"): list(workspace.ann.schemas.list("../dev"))
    with pytest.raises(PermissionDenied): list(workspace.carl.schemas.list("dev"))


def test_a_table_has_the_columns_of_its_delta_log(workspace):
    table = workspace.ben.tables.get("DEV.flights.plane")
    assert (table.table_type, table.data_source_format, table.comment) == (
        TableType.MANAGED, DataSourceFormat.DELTA, "for a test")
    assert [(each.name, each.type_name, each.type_text, each.position) for each in table.columns] == [
        ("tail", ColumnTypeName.STRING, "string", 0), ("seats", ColumnTypeName.INT, "int", 1),
        ("codes", ColumnTypeName.ARRAY, "array<bigint>", 2)]
    assert table.created_at > 0 and table.storage_location.endswith("/dev/flights/plane")


def test_a_damaged_table_is_listed_without_columns_and_a_folder_without_a_log_is_no_table(workspace):
    tables = {each.name: each.columns for each in workspace.ben.tables.list("dev", "flights")}
    assert set(tables) == {"plane", "damaged"} and not tables["damaged"] and len(tables["plane"]) == 3
    assert workspace.ben.tables.exists("dev.flights.plane").table_exists
    assert not workspace.ben.tables.exists("dev.flights.unfinished").table_exists
    with refused(NotFound, "TABLE_DOES_NOT_EXIST"): workspace.ben.tables.get("dev.flights.unfinished")
    with refused(BadRequest, "INVALID_PARAMETER_VALUE"): workspace.ben.tables.get("plane")
    with pytest.raises(PermissionDenied): list(workspace.carl.tables.list("dev", "flights"))


def test_grants_are_those_of_the_lists(workspace):
    def of(kind, name, principal):
        (only,) = workspace.ann.grants.get(kind, name, principal=principal).privilege_assignments
        return {privilege.value for privilege in only.privileges}

    assert of("CATALOG", "dev", "ben") >= {"USE_CATALOG", "SELECT", "MODIFY"}
    assert "MODIFY" not in of("catalog", "prod", "ben") and "SELECT" in of("catalog", "prod", "ben")
    assert "SELECT" in of("SCHEMA", "prod.flights", "data_scientists")
    assert workspace.ann.grants.get("catalog", "dev", principal="carl").privilege_assignments == []
    (ben,) = workspace.ann.grants.get_effective("TABLE", "dev.flights.plane", principal="ben").privilege_assignments
    assert {(each.privilege, each.inherited_from_name) for each in ben.privileges} >= {(Privilege.SELECT, "dev")}
    with pytest.raises(PermissionDenied): workspace.carl.grants.get("schema", "dev.flights")


def test_what_the_project_files_say_is_not_changed_by_calls(workspace):
    change = [PermissionsChange(principal="ben", add=[Privilege.SELECT])]
    with pytest.raises(NotImplemented, match="mlops grants"):
        workspace.ann.grants.update("schema", "dev.flights", changes=change)
    with pytest.raises(NotImplemented, match=r"databricks.yml"): workspace.ann.catalogs.create("test")
    with pytest.raises(NotImplemented): workspace.ann.tables.delete("dev.flights.plane")
    with pytest.raises(NotImplemented): workspace.ann.grants.get("metastore", "any")
