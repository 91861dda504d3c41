"""Folders, files and notebooks of the local workspace by databricks-sdk, and paths that try to leave the tree."""
import base64
import json
import socket
from types import SimpleNamespace
from urllib.parse import quote

import httpx
import pytest
from databricks.sdk import WorkspaceClient
from databricks.sdk.errors import (
    BadRequest,
    DatabricksError,
    InvalidParameterValue,
    NotImplemented,
    PermissionDenied,
    ResourceAlreadyExists,
    ResourceDoesNotExist,
)
from databricks.sdk.service.workspace import ExportFormat, ImportFormat, Language, ObjectType
from hypothesis import given
from hypothesis import strategies as st
from served import served
from waiting import wait_until

from mlops_nb.errors import MlopsError
from mlops_nb.serving.endpoint_config import RestError
from mlops_nb.serving.places import WorkspacePlaces
from mlops_nb.workspace.app import build_app
from mlops_nb.workspace.rest_workspace import fields_of_form, jupyter_to_source, source_to_jupyter, workspace_router
from mlops_nb.workspace.tokens import load_tokens, make_token, owner_token, users_by_digest
from mlops_nb.workspace.workspace_files import tree_path, workspace_files

AUTO = ImportFormat.AUTO
NOTEBOOK = json.dumps({"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}).encode()


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    "A workspace with its owner Ann, and Ben."
    places = WorkspacePlaces(tmp_path_factory.mktemp("workspace"))
    ann, ben = owner_token(places, "ann"), make_token(places, "ben")
    app = build_app(lambda: users_by_digest(load_tokens(places)), [workspace_router(places)])
    with served(app) as host:
        web = httpx.Client(base_url=host, headers={"Authorization": f"Bearer {ben}"}, trust_env=False, timeout=60)
        yield SimpleNamespace(ann=WorkspaceClient(host=host, token=ann).workspace, files=places.files, web=web,
                              ben=WorkspaceClient(host=host, token=ben).workspace)
        web.close()


@pytest.fixture
def ben(workspace): return workspace.ben


def code_of(error): return error.value.error_code


def test_everybody_has_a_folder_and_writes_there_and_in_the_shared_one_alone(workspace):
    assert [each.path for each in workspace.ann.list("/")] == ["/Shared", "/Users"]
    assert [each.path for each in workspace.ben.list("/Workspace/Users")] == ["/Users/ann", "/Users/ben"]
    workspace.ben.mkdirs("/Shared/team")
    workspace.ann.mkdirs("/Users/ben/from_ann")
    for path in ("/Users/ann/x", "/Users/bens", "/Users/carl", "/", "/Sharedx"):
        with pytest.raises(PermissionDenied, match="'ben' cannot write"): workspace.ben.mkdirs(path)
    with pytest.raises(PermissionDenied): workspace.ben.delete("/Users/ann", recursive=True)
    assert workspace.ben.get_status("/Users/ben/from_ann").object_type == ObjectType.DIRECTORY


def test_a_notebook_has_no_extension_and_a_file_keeps_it(ben):
    ben.mkdirs("/Users/ben/project/nbs")
    ben.upload("/Users/ben/project/nbs/train.ipynb", NOTEBOOK, format=AUTO)
    ben.upload("/Users/ben/project/nbs/clean.py", b"# Databricks notebook source\nx = 1\n", format=AUTO)
    ben.upload("/Users/ben/project/library.py", b"x = 1\n", format=AUTO)
    train = ben.get_status("/Workspace/Users/ben/project/nbs/train")
    assert (train.object_type, train.language, train.path) == (
        ObjectType.NOTEBOOK, Language.PYTHON, "/Users/ben/project/nbs/train")
    assert ben.get_status("/Users/ben/project/library.py").size == 6
    assert [each.path.rpartition("/")[2] for each in ben.list("/Users/ben/project", recursive=True)] == [
        "library.py", "clean", "train"]
    with pytest.raises(ResourceDoesNotExist): ben.get_status("/Users/ben/project/nbs/train.ipynb")
    assert ben.download("/Users/ben/project/nbs/train", format=ExportFormat.JUPYTER).read() == NOTEBOOK
    assert ben.download("/Users/ben/project/library.py").read() == b"x = 1\n"


def test_a_number_stays_the_same_when_the_content_changes(ben):
    ben.upload("/Shared/number.bin", b"\x00\xff\r\n", format=AUTO)
    before = ben.get_status("/Shared/number.bin")
    ben.upload("/Shared/number.bin", b"\x00\xff\r\n\n", format=AUTO, overwrite=True)
    after = ben.get_status("/Shared/number.bin")
    assert before.object_id == after.object_id and (before.size, after.size) == (4, 5)
    assert ben.download("/Shared/number.bin").read() == b"\x00\xff\r\n\n"


def test_what_exists_is_replaced_only_on_request_and_by_its_own_kind(ben, workspace):
    content = base64.b64encode(b"a = 1").decode()
    create = {"content": content, "format": ImportFormat.SOURCE, "language": Language.PYTHON}
    ben.import_("/Shared/fit", **create)
    with pytest.raises(ResourceAlreadyExists, match=r"Path \(/Shared/fit\) already exists"):
        ben.import_("/Shared/fit", **create)
    ben.import_("/Shared/fit", content=base64.b64encode(NOTEBOOK).decode(), format=ImportFormat.JUPYTER, overwrite=True)
    assert [file.name for file in (workspace.files / "Shared").glob("fit*")] == ["fit.ipynb"]
    with pytest.raises(DatabricksError, match="type mismatch"):
        ben.upload("/Shared/fit", b"x", format=AUTO, overwrite=True)
    with pytest.raises(ResourceAlreadyExists): ben.mkdirs("/Shared/fit/below")
    assert list(ben.list("/Shared/fit"))[0].path == "/Shared/fit"


def test_a_folder_is_deleted_when_it_is_empty_or_with_all_that_is_in_it(ben, workspace):
    ben.mkdirs("/Shared/old/below")
    with pytest.raises(BadRequest) as error: ben.delete("/Shared/old")
    assert code_of(error) == "DIRECTORY_NOT_EMPTY"
    ben.delete("/Shared/old", recursive=True)
    with pytest.raises(ResourceDoesNotExist): ben.get_status("/Shared/old")
    for path in ("/Shared", "/Users/ben"):
        with pytest.raises(BadRequest) as error: ben.delete(path, recursive=True)
        assert code_of(error) == "DIRECTORY_PROTECTED"
    assert list((workspace.files.parent / "files.parts").iterdir()) == []


def test_contents_that_do_not_fit_are_refused(ben):
    with pytest.raises(DatabricksError, match="no Jupyter notebook"): ben.upload("/Shared/a.ipynb", b"{", format=AUTO)
    with pytest.raises(InvalidParameterValue, match="needs a language"): ben.import_("/Shared/a", content="")
    with pytest.raises(InvalidParameterValue, match="base64"): ben.import_("/Shared/a", content="?", format=AUTO)
    for kind in (ImportFormat.DBC, ImportFormat.HTML):
        with pytest.raises(NotImplemented, match="does not have format"): ben.import_("/Shared/a", format=kind)
    with pytest.raises(ResourceDoesNotExist, match="parent folder"): ben.upload("/Shared/no/a", b"", format=AUTO)
    for size in (10 * 2**20 + 1, 15 * 2**20):
        with pytest.raises(BadRequest) as error: ben.upload("/Shared/large", bytes(size), format=AUTO)
        assert code_of(error) == "MAX_NOTEBOOK_SIZE_EXCEEDED"
    with pytest.raises(ResourceDoesNotExist): ben.get_status("/Shared/large")


def test_the_upload_of_the_databricks_cli(ben, workspace):
    def upload(path, content, overwrite=False):
        url = f"/api/2.0/workspace-files/import-file/{quote(path.lstrip('/'), safe='')}"
        return workspace.web.post(f"{url}?overwrite={str(overwrite).lower()}", content=content)

    assert upload("/Shared/cli/a.whl", b"PK").status_code == 404  # the client then makes the folder
    ben.mkdirs("/Shared/cli")
    large = bytes(11 * 2**20)
    assert upload("/Workspace/Shared/cli/a ä.whl", large).status_code == 200
    assert ben.get_status("/Shared/cli/a ä.whl").size == len(large)
    assert upload("/Shared/cli/a ä.whl", b"").status_code == 409
    assert upload("/Shared/cli/a ä.whl", b"", overwrite=True).status_code == 200
    assert upload("/Shared/cli/nb.ipynb", NOTEBOOK).status_code == 200
    assert ben.get_status("/Shared/cli/nb").object_type == ObjectType.NOTEBOOK
    assert upload("/Shared/cli/bad.ipynb", b"no").json()["error_code"] == "INVALID_PARAMETER_VALUE"
    for path in ("/Shared/../../tokens.json", "/Shared/cli/..", "/Users/ann/x", "/Shared/\0", "/Shared/a\\b"):
        assert upload(path, b"", overwrite=True).status_code in (400, 403), path


def test_an_upload_that_is_cut_off_leaves_nothing(ben, workspace):
    url, head = workspace.web.base_url, workspace.web.headers["authorization"]
    for path in ("workspace-files/import-file/%2FShared%2Fcut", "workspace/import"):
        with socket.create_connection((url.host, url.port)) as connection:
            connection.sendall(f"POST /api/2.0/{path} HTTP/1.1\r\nHost: x\r\nAuthorization: {head}\r\n"
                               "Content-Length: 100\r\n\r\nhalf".encode())
    parts = workspace.files.parent / "files.parts"
    wait_until(lambda: not list(parts.iterdir()))
    with pytest.raises(ResourceDoesNotExist): ben.get_status("/Shared/cut")


def test_a_link_on_disk_leads_nowhere(ben, workspace):
    (workspace.files / "Shared" / "out").symlink_to(workspace.files.parent)
    for path in ("/Shared/out", "/Shared/out/tokens.json"):
        with pytest.raises(PermissionDenied, match="leads out"): ben.get_status(path)
    with pytest.raises(PermissionDenied): ben.upload("/Shared/out/token", b"", format=AUTO, overwrite=True)
    assert "/Shared/out" not in [each.path for each in ben.list("/Shared")]


PARTS = st.sampled_from(["..", ".", "", "a", "Workspace", "a b", "ä", "a\0", "a\\b", "%2e%2e", "x" * 300]) | st.text(
    max_size=4)


@given(st.lists(PARTS, max_size=5).map("/".join) | st.text(max_size=20))
def test_no_path_leaves_the_tree(path):
    try: checked = tree_path(path)
    except RestError: return
    assert checked == tree_path(checked) or checked.startswith("/Workspace")
    assert checked.startswith("/") and not {"..", "."} & set(checked.split("/")) and "\\" not in checked


@given(st.binary(max_size=50))
def test_a_form_gives_back_any_content(content):
    form = b'--_b_\r\nContent-Disposition: form-data; name="content"; filename="content"\r\n\r\n%b\r\n--_b_--\r\n'
    assert fields_of_form(form % content, 'multipart/form-data; boundary="_b_"') == {"content": content}


CELLS = st.tuples(st.sampled_from(["code", "markdown"]), st.text(st.sampled_from("ab #%\n"), max_size=8).map(str.strip))


@given(st.lists(CELLS, min_size=1, max_size=4))
def test_a_notebook_keeps_its_cells_as_source_code(cells):
    notebook = {"cells": [{"cell_type": kind, "source": text} for kind, text in cells]}
    source = jupyter_to_source(json.dumps(notebook).encode())
    again = json.loads(source_to_jupyter(source, ".py"))["cells"]
    assert [(cell["cell_type"], cell["source"].strip()) for cell in again] == [(kind, text) for kind, text in cells]


def test_a_disk_that_refuses_is_named_and_what_a_killed_workspace_left_is_removed(tmp_path):
    places = WorkspacePlaces(tmp_path)
    left = tmp_path / "files.parts" / "half"
    left.parent.mkdir()
    left.write_text("x")
    workspace_router(places)
    assert not left.exists()
    left.parent.write_text("a file in the place of the folder")
    with pytest.raises(MlopsError, match="the workspace file"), workspace_files(places).new_part(): pass
