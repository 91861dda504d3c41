"""The Files API of the local workspace, called by databricks-sdk, and by sockets where a client ends too early."""
import io
import os
import socket
import sqlite3
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import httpx
import pytest
from databricks.sdk import WorkspaceClient
from databricks.sdk.errors import DatabricksError
from registry_server import env_of, registry_server

FOLDER = "/Volumes/dev/flights/raw"
PREFIX = "/api/2.0/fs/files"


class Home:
    def __init__(self, env, host):
        self.env, self.host = env, host
        self.volumes = env.state / "workspace/volumes"
        self.uploads = env.state / "workspace/uploads"

    def files(self, user="ann"): return WorkspaceClient(host=self.host, token=user).files

    def call(self, method, path, user="ann", **options):
        headers = {"Authorization": f"Bearer {user}"} | options.pop("headers", {})
        return httpx.request(method, self.host + path, headers=headers, trust_env=False, timeout=60,
                             **options)

    def version(self, name):
        "Create a pending version."
        path = "/api/2.0/mlflow/unity-catalog/"
        self.call("POST", f"{path}registered-models/create", json={"name": name})
        answer = self.call("POST", f"{path}model-versions/create", json={"name": name, "source": "models:/m-1"})
        return f"/Models/{name.replace('.', '/')}/{answer.json()['model_version']['version']}"

    def finalize(self, name, version="1"):
        body = {"name": name, "version": version}
        return self.call("POST", "/api/2.0/mlflow/unity-catalog/model-versions/finalize", json=body)


@pytest.fixture(scope="module")
def home(tmp_path_factory, empty_store):
    env = env_of(tmp_path_factory.mktemp("files") / "state", empty_store)
    with registry_server(env) as host: yield Home(env, host)


def refused(code, text, call, *arguments, **options):
    with pytest.raises(DatabricksError, match=text) as caught: call(*arguments, **options)
    assert caught.value.error_code == code, caught.value


def test_the_files_of_a_registered_version_do_not_change_by_the_path_of_its_experiment(home):
    model = home.env.state / "artifacts/7/models" / f"m-{'a' * 32}"
    (model / "artifacts").mkdir(parents=True)
    (model / "artifacts/MLmodel").write_text("whole")
    home.version("dev.flights.from_experiment")
    with sqlite3.connect(home.env.state / "mlflow.db") as store:  # as a job at home registers it
        store.execute("update model_versions set storage_location = ? where name = 'dev.flights.from_experiment'",
                      (str(model / "artifacts"),))
    artifacts = "/WorkspaceInternal/Mlflow/Artifacts/7/LoggedModels"
    path = f"{artifacts}/{model.name}/artifacts/MLmodel"
    files = home.files()
    refused("PERMISSION_DENIED", "has been registered", files.upload, path, io.BytesIO(b"x"), overwrite=True)
    refused("PERMISSION_DENIED", "has been registered", files.delete, path)
    assert files.download(path).contents.read() == b"whole"
    files.upload(f"{artifacts}/m-{'b' * 32}/artifacts/MLmodel", io.BytesIO(b"x"))  # one that is not registered


def test_a_file_of_a_volume_comes_and_goes(home):
    files, path = home.files(), f"{FOLDER}/2013/a b%20ü.csv"
    files.upload(path, io.BytesIO(b"0123456789"))
    assert (home.volumes / "dev/flights/raw/2013/a b%20ü.csv").read_bytes() == b"0123456789"
    assert files.download(path).contents.read() == b"0123456789" and not list(home.uploads.iterdir())
    assert files.get_metadata(path).content_length == 10 and files.get_metadata(path).last_modified
    refused("ALREADY_EXISTS", "The file being created already exists", files.upload, path, io.BytesIO(b"x"))
    files.upload(path, io.BytesIO(b"other"), overwrite=True)
    assert files.download(path.replace("dev/flights", "Dev/Flights")).contents.read() == b"other"
    files.delete(path)
    refused("NOT_FOUND", "The file being accessed is not found", files.download, path)
    refused("NOT_FOUND", "The file being accessed is not found", files.delete, path)
    with pytest.raises(DatabricksError): files.get_metadata(path)


def test_directories(home):
    files, folder = home.files(), f"{FOLDER}/folder"
    files.create_directory(f"{folder}/inner")
    files.create_directory(f"{folder}/inner")
    for name in ("b", "a", "c"): files.upload(f"{folder}/{name}", io.BytesIO(b"12"))
    entries = list(files.list_directory_contents(folder, page_size=2))
    assert [(entry.name, entry.is_directory, entry.file_size) for entry in entries] == [
        ("a", False, 2), ("b", False, 2), ("c", False, 2), ("inner", True, None)]
    assert entries[0].path == f"{folder}/a" and abs(entries[0].last_modified / 1000 - time.time()) < 100
    files.get_directory_metadata(folder)
    refused("DIRECTORY_NOT_EMPTY", "not empty", files.delete_directory, folder)
    files.delete_directory(f"{folder}/inner")
    refused("NOT_FOUND", "directory being accessed", lambda: list(files.list_directory_contents(f"{folder}/inner")))
    refused("NOT_FOUND", "directory being accessed", files.delete_directory, f"{folder}/inner")
    refused("ALREADY_EXISTS", "is a file", files.create_directory, f"{folder}/a")
    refused("ALREADY_EXISTS", "is a file", files.upload, f"{folder}/a/b", io.BytesIO(b""))
    refused("INVALID_PARAMETER_VALUE", "is a directory", files.upload, folder, io.BytesIO(b""))
    refused("NOT_FOUND", "The file", files.download, folder)
    for query in ("page_token=%C3%28", "page_size=-1", "page_size=x", "page_token=abc"):
        assert home.call("GET", f"/api/2.0/fs/directories{folder}?{query}").status_code == 400, query


def test_a_download_can_begin_in_the_middle(home):
    home.files().upload(f"{FOLDER}/part", io.BytesIO(b"0123456789"), overwrite=True)
    def get(**headers): return home.call("GET", f"{PREFIX}{FOLDER}/part", headers=headers)
    answer = get(Range="bytes=2-4")
    assert (answer.status_code, answer.content, answer.headers["content-range"]) == (206, b"234", "bytes 2-4/10")
    assert get(Range="bytes=8-").content == get(Range="bytes=-2").content == b"89"
    assert get(Range="bytes=10-").status_code == 416 and get(Range="lines=1-2").content == b"0123456789"
    changed = get().headers["last-modified"]
    assert get(**{"If-Unmodified-Since": changed, "Range": "bytes=1-1"}).content == b"1"
    assert get(**{"If-Unmodified-Since": "Mon, 01 Jan 2001 00:00:00 GMT"}).status_code == 412


def test_files_of_a_version_are_written_while_it_is_pending_and_read_when_it_is_ready(home):
    folder, files = home.version("dev.flights.v"), home.files()
    assert "stays PENDING" in home.finalize("dev.flights.v").text
    files.upload(f"{folder}/MLmodel", io.BytesIO(b"flavors"))
    files.upload(f"{folder}/data/model", io.BytesIO(b"x"))
    refused("INVALID_STATE", "PENDING_REGISTRATION, not READY", files.download, f"{folder}/MLmodel")
    refused("INVALID_STATE", "PENDING_REGISTRATION, not READY", lambda: list(files.list_directory_contents(folder)))
    assert home.finalize("dev.flights.v").json()["model_version"]["status"] == "READY"
    for call in (lambda: files.upload(f"{folder}/MLmodel", io.BytesIO(b"other"), overwrite=True),
                 lambda: files.delete(f"{folder}/MLmodel"), lambda: files.create_directory(f"{folder}/new"),
                 lambda: files.delete_directory(f"{folder}/data")):
        refused("PERMISSION_DENIED", "is READY: its files do not change", call)
    assert files.download(f"{folder}/MLmodel").contents.read() == b"flavors"
    assert [entry.name for entry in files.list_directory_contents(folder)] == ["MLmodel", "data"]
    refused("RESOURCE_DOES_NOT_EXIST", "Model version '2'", files.download, folder[:-1] + "2/MLmodel")


def test_who_may_read_and_write(home):
    ci, folder = home.files("ci"), home.version("dev.flights.rights")
    refused("PERMISSION_DENIED", "USE CATALOG on Catalog 'dev'", ci.download, f"{folder}/MLmodel")
    refused("PERMISSION_DENIED", "MODIFY on Catalog 'dev'", ci.upload, f"{folder}/MLmodel", io.BytesIO(b"x"))
    refused("PERMISSION_DENIED", "MODIFY", home.files().upload, "/Volumes/prod/flights/raw/a", io.BytesIO(b"x"))
    refused("CATALOG_DOES_NOT_EXIST", "'missing'", home.files().upload, "/Volumes/missing/a/b/c", io.BytesIO(b"x"))
    home.files("owner").upload("/Volumes/prod/flights/raw/a", io.BytesIO(b"prod"))
    assert home.files().download("/Volumes/prod/flights/raw/a").contents.read() == b"prod"  # dev reads prod
    staging = "/api/2.0/mlflow/unity-catalog/registered-models/create"
    assert home.call("POST", staging, "owner", json={"name": "staging.flights.v"}).status_code == 200
    refused("PERMISSION_DENIED", "MODIFY", home.files().upload, "/Models/staging/flights/v/1/a", io.BytesIO(b"x"))


@pytest.mark.parametrize("path", [
    "/Volumes/dev/flights/raw/../../../secret", "/Volumes/dev/flights/raw/%2e%2e/%2e%2e/secret",
    f"{FOLDER}/..%2f..%2f..%2fsecret", "/Volumes/dev/flights/%2e%2e/x/y", f"{FOLDER}/a%00b", f"{FOLDER}//x",
    f"{FOLDER}/{'a' * 256}", f"{FOLDER}/{'a/' * 1000}b",
    "/Models/dev/flights/late/..%2f1/x", "/Models/dev/flights/late/0/x", "/etc/passwd", "/%2fetc/passwd",
    "/Volumes/dev/fl%2fights/raw/.%2e/x", "/Volumes/dev/flights/link/passwd", "/Volumes"])
def test_no_path_leaves_its_folder(home, path):
    link = home.volumes / "dev/flights/link"
    if not link.exists():
        link.mkdir(parents=True)
        (link / "passwd").symlink_to("/etc/passwd")
    before = {file for file in home.env.state.rglob("*") if file.is_file()}
    for method in ("GET", "PUT", "DELETE"):
        status = raw_request(home, method, path, b"x" if method == "PUT" else b"")
        assert status in (400, 403, 404), (method, path, status)
    assert {file for file in home.env.state.rglob("*") if file.is_file()} == before
    assert os.path.exists("/etc/passwd")


def connect(home):
    parts = urlsplit(home.host)
    return socket.create_connection((parts.hostname, parts.port), timeout=10)


def status_of(client):
    with client.makefile("rb") as answer: return int(answer.readline().split()[1])


def raw_request(home, method, path, body=b""):
    "The status of a request whose path no client has made tidy."
    with connect(home) as client:
        client.sendall(f"{method} {PREFIX}{path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer ann\r\n"
                       f"Connection: close\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        return status_of(client)


@pytest.mark.parametrize("length", ["Content-Length: 1000000", "Transfer-Encoding: chunked"])
def test_an_upload_that_is_cut_off_leaves_nothing(home, length):
    path = f"{FOLDER}/cut"
    home.files().upload(path, io.BytesIO(b"before"), overwrite=True)
    with connect(home) as client:
        client.sendall(f"PUT {PREFIX}{path}?overwrite=true HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer ann\r\n"
                       f"{length}\r\n\r\n".encode())
        client.sendall(b"3e8\r\n" + b"x" * 1000 + b"\r\n")
        while not list(home.uploads.iterdir()): time.sleep(0.01)  # it has begun
    end = time.monotonic() + 10
    while list(home.uploads.iterdir()) and time.monotonic() < end: time.sleep(0.01)
    assert not list(home.uploads.iterdir())
    assert home.files().download(path).contents.read() == b"before"


def test_what_a_killed_workspace_left_of_uploads_is_removed_at_the_next_start(home, tmp_path):
    left = tmp_path / "state/workspace/uploads/part"
    left.parent.mkdir(parents=True)
    left.touch()
    with registry_server(env_of(tmp_path / "state")): assert not left.exists()


def test_an_upload_that_ends_after_the_version_is_ready_changes_nothing(home):
    folder = home.version("dev.flights.late_upload")
    home.files().upload(f"{folder}/MLmodel", io.BytesIO(b"flavors"))
    with connect(home) as client:
        client.sendall(f"PUT {PREFIX}{folder}/MLmodel?overwrite=true HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer ann"
                       "\r\nContent-Length: 5\r\n\r\not".encode())
        while not list(home.uploads.iterdir()): time.sleep(0.01)
        assert home.finalize("dev.flights.late_upload").status_code == 200
        client.sendall(b"her")
        assert status_of(client) == 403
    assert home.files().download(f"{folder}/MLmodel").contents.read() == b"flavors"


def test_of_two_uploads_at_once_one_whole_file_wins(home):
    contents = [bytes([65 + number]) * 3_000_000 for number in range(4)]
    def upload(content): home.files().upload(f"{FOLDER}/both", io.BytesIO(content), overwrite=True)
    with ThreadPoolExecutor(4) as pool: list(pool.map(upload, contents))
    assert home.files().download(f"{FOLDER}/both").contents.read() in contents


class Large(io.RawIOBase):
    "A file of many bytes that no memory holds."

    def __init__(self, size): self.size, self.at = size, 0
    def readable(self): return True
    def seekable(self): return True
    def tell(self): return self.at
    def seek(self, place, whence=0):
        self.at = place + (0, self.at, self.size)[whence]
        return self.at

    def read(self, count=-1):
        count = min(self.size - self.at, count if count >= 0 else self.size)
        self.at += count
        return b"\x07" * count


def test_a_large_file_is_sent_in_one_request_and_fills_no_memory(home):
    size = 120 * 2**20
    tracemalloc.start()
    try:
        home.files().upload(f"{FOLDER}/large", Large(size), overwrite=True)
        assert tracemalloc.get_traced_memory()[1] < 40 * 2**20  # of client and server; the client reads one part ahead
    finally: tracemalloc.stop()
    assert (home.volumes / "dev/flights/raw/large").stat().st_size == size
    with home.files().download(f"{FOLDER}/large").contents as stream:
        assert sum(len(chunk) for chunk in iter(lambda: stream.read(2**20), b"")) == size
    home.files().delete(f"{FOLDER}/large")


def test_calls_that_a_local_workspace_does_not_have(home):
    for method, path in (("POST", "/api/2.0/fs/create-download-url"), ("POST", f"{PREFIX}{FOLDER}/a?action=complete"),
                         ("POST", "/api/2.0/fs/create-upload-part-urls")):
        answer = home.call(method, path)
        assert (answer.status_code, answer.json()["error_code"]) == (501, "NOT_IMPLEMENTED")
