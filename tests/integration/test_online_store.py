"""One contract for every online store, on real servers: values, versions, errors, readers, killed publishers."""
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from itertools import count
from pathlib import Path

import lightgbm
import mlflow
import numpy as np
import pyarrow as pa
import pytest
import stores
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from sizes import by_size

from mlops_nb.data import tables
from mlops_nb.errors import MlopsError
from mlops_nb.features import feature_model
from mlops_nb.features.client import FeatureEngineeringClient, save_model, signature_of
from mlops_nb.features.functions import register_function
from mlops_nb.features.spec import FeatureFunction, FeatureLookup
from mlops_nb.features.stores import store as online_store
from mlops_nb.features.stores.publishing import publish
from mlops_nb.features.stores.rows import PublishConflict, layout_of
from mlops_nb.features.stores.store import open_store, store
from mlops_nb.models.scoring import model_input
from mlops_nb.serving.request_features import request_features

pytestmark = pytest.mark.filterwarnings("ignore:Unverified HTTPS request")  # the emulator of Cosmos DB signs its own
SLOW_SERVERS = {"cosmos": by_size(4, 2), "dynamodb": by_size(12, 4)}  # fewer examples: milliseconds per row


def examples_for(online) -> int:
    "Return the number of hypothesis examples for a store: few for SQLite, which is part of `make test`."
    kind = online.name.split(":")[0]
    return SLOW_SERVERS.get(kind, 15 if kind == "sqlite" else by_size(60, 20))


def kind_param(kind):
    "Return a store's kind as a parameter; every kind but SQLite is slow."
    return pytest.param(kind, marks=[] if kind == "sqlite" else pytest.mark.slow)


@pytest.fixture(scope="module", params=map(kind_param, stores.KINDS))
def address(request):
    "The address of a running store of each kind."
    with pytest.MonkeyPatch.context() as patch:
        for name, value in stores.SECRETS.items(): patch.setenv(name, value)
        patch.setenv("SSL_CERT_FILE", os.devnull)  # else every request reads all authorities
        try:
            with stores.running(request.param) as uri: yield uri
        except stores.Missing as missing: pytest.skip(str(missing))


@pytest.fixture
def online(address):
    with open_store(address, timeout=10) as opened: yield opened


@pytest.fixture
def table(): return f"dev.flights.t{uuid.uuid4().hex[:12]}"


def flights(*rows, columns=("origin", "late")):
    "Return rows of a string and a number."
    return pa.table({columns[0]: pa.array([r[0] for r in rows], pa.string()),
                     columns[1]: pa.array([r[1] for r in rows], pa.int64())})


def values(online, table, keys): return [row and row["late"] for row in online.get(table, keys)]


# ---- versions

def test_a_later_version_replaces_rows_and_the_same_version_changes_nothing(online, table):
    layout = layout_of(table, flights().schema, "origin")
    assert online.state(table) is None and online.published_version(table) is None
    assert online.upsert(layout, flights(("JFK", 1), ("LGA", 1)), 1) == 2
    assert online.published_version(table) is None
    online.finish(table, 1)
    assert online.published_version(table) == 1
    assert online.upsert(layout, flights(("JFK", 9), ("LGA", 9)), 1) == 0
    assert online.upsert(layout, flights(("JFK", 2), ("EWR", 2)), 10) == 2
    with pytest.raises(PublishConflict, match="version 9 .* is older than version 10"):
        online.upsert(layout, flights(("JFK", 0), ("LGA", 0)), 9)
    assert values(online, table, ["LGA", "JFK", "none", "EWR", "JFK"]) == [1, 2, None, 2, 2]
    online.finish(table, 10)
    online.finish(table, 2)
    assert online.published_version(table) == 10


def test_a_writer_stops_when_a_later_version_begins(address, online, table):
    layout = layout_of(table, flights().schema, "origin")
    online.chunk = 1
    def batches():
        yield from flights(("JFK", 1), ("LGA", 1)).to_batches()
        with open_store(address) as other: other.upsert(layout, flights(("JFK", 2)), 2)
        yield from flights(("EWR", 1)).to_batches()
    with pytest.raises(PublishConflict): online.upsert(layout, batches(), 1)
    assert values(online, table, ["JFK", "LGA", "EWR"]) == [2, 1, None]


def test_begin_is_refused_if_the_state_has_changed(online, table):
    layout = layout_of(table, flights().schema, "origin")
    online.begin(layout, 3)
    with pytest.raises(PublishConflict, match="by another process"): online.begin(layout, 4, expected_begun=2)
    assert online.begin(layout, 4, expected_begun=3) == layout


def test_rows_are_deleted_by_key_and_version(online, table):
    layout = layout_of(table, flights().schema, "origin")
    online.upsert(layout, flights(*((str(i), i) for i in range(6))), 1)
    online.upsert(layout, flights(("4", 40), ("5", 50)), 2)
    assert online.delete(table, ["0", {"origin": "1"}, "none"]) == 2
    assert online.delete(table, ["2", "5"], version=1) == 1
    assert values(online, table, list("012345")) == [None, None, None, 3, 40, 50]
    assert online.prune(table, 2) == 1 and online.delete(table, []) == 0
    assert values(online, table, list("345")) == [None, 40, 50]
    online.drop(table)
    assert online.state(table) is None and table not in online.tables()
    online.drop(table)


def test_targets_and_names_do_not_collide(online):
    mark = uuid.uuid4().hex[:8]
    names = [f"{catalog}.flights.x{mark}" for catalog in ("dev", "staging", "prod")] + [f"dev.flights.x{mark}-a_1"]
    for i, name in enumerate(names): online.upsert(layout_of(name, flights().schema, "origin"), flights(("JFK", i)), 1)
    assert set(names) <= set(online.tables())
    online.drop(names[0])
    assert [values(online, name, ["JFK"]) for name in names[1:]] == [[1], [2], [3]]
    assert not {names[0]} & set(online.tables())


KEY = st.sampled_from("abcd")
UPSERT = st.tuples(st.just("upsert"), st.integers(-1, 2), st.dictionaries(KEY, st.integers(0, 9), max_size=4))
DELETE = st.tuples(st.sampled_from(["delete", "prune"]), st.none() | st.integers(-1, 1),
                   st.lists(KEY, unique=True, max_size=3))


def model_step(model, begun, step):  # rows by key as (version, value), and the latest version begun
    "Apply a step to a dict; return how many rows changed and the begun version, or None and it for a version too old."
    action, offset, rows = step
    if action == "upsert":
        if (version := begun + offset) < begun: return None, begun
        new = {k: (version, v) for k, v in rows.items() if model.get(k, (-99,))[0] < version}
        model.update(new)
        return len(new), version
    limit = 10**6 if offset is None else begun + offset
    if action == "delete": deleted = [k for k, row in model.items() if k in rows and row[0] <= limit]
    else: deleted = [k for k, row in model.items() if row[0] < begun]
    for k in deleted: del model[k]
    return len(deleted), begun


def test_any_steps_leave_the_rows_of_a_plain_model(online):
    @settings(max_examples=max(2, examples_for(online) // 2), deadline=None, database=None)
    @given(st.lists(UPSERT | DELETE, min_size=1, max_size=8))
    def check(steps):
        layout = layout_of(f"dev.flights.t{uuid.uuid4().hex[:12]}", flights().schema, "origin")
        model, begun = {}, 10
        online.begin(layout, begun)
        for action, offset, rows in steps:
            limit = None if offset is None else begun + offset
            changed, begun = model_step(model, begun, (action, offset, rows))
            if changed is None:
                with pytest.raises(PublishConflict): online.upsert(layout, flights(*rows.items()), limit)
            elif action == "upsert": assert online.upsert(layout, flights(*rows.items()), limit) == changed
            elif action == "delete": assert online.delete(layout.table, rows, limit) == changed
            else: assert online.prune(layout.table, begun) == changed
            assert values(online, layout.table, "abcd") == [model.get(k, (0, None))[1] for k in "abcd"]
        online.drop(layout.table)
    check()


# ---- values

def timestamps(): return st.datetimes(datetime(1, 1, 2), datetime(9999, 12, 30), timezones=st.just(UTC))


TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20)
ROW = st.fixed_dictionaries({
    "name": TEXT, "number": st.integers(-2**63, 2**63 - 1), "open": st.booleans(), "at": timestamps(),
    "day": st.dates(), "text": st.none() | TEXT, "whole": st.none() | st.integers(-2**63, 2**63 - 1),
    "share": st.none() | st.floats(), "yes": st.none() | st.booleans(),
    "moment": st.none() | timestamps(), "date": st.none() | st.dates()})
SCHEMA = pa.schema({
    "name": pa.string(), "number": pa.int64(), "open": pa.bool_(), "at": pa.timestamp("us", "UTC"),
    "day": pa.date32(), "text": pa.string(), "whole": pa.int64(), "share": pa.float64(), "yes": pa.bool_(),
    "moment": pa.timestamp("us", "UTC"), "date": pa.date32()})
KEYS = ["name", "number", "open", "at", "day"]


def same_value(left, right):
    "Whether two values and their types are equal; NaN equals NaN."
    if left != left: return right != right
    return left == right and type(left) is type(right)


def same(left, right): return left.keys() == right.keys() and all(same_value(left[k], right[k]) for k in left)


def test_every_value_is_returned_unchanged(online, table):
    layout, versions = layout_of(table, SCHEMA, KEYS), count()
    @settings(max_examples=examples_for(online), deadline=None, database=None)
    @given(st.lists(ROW, min_size=1, max_size=5, unique_by=lambda row: tuple(row[k] for k in KEYS)))
    def check(rows):
        assert online.upsert(layout, pa.Table.from_pylist(rows, SCHEMA), next(versions)) == len(rows)
        got = online.get(table, [tuple(row[k] for k in KEYS) for row in rows])
        assert all(map(same, got, rows)), (got, rows)
        assert all(row["at"].utcoffset() == timedelta(0) for row in got)
    check()


def test_extreme_values(online, table):
    rows = [dict(key="'\"; --\\{}[]%?/#é😀", x=float("nan"), n=2**63 - 1), dict(key="", x=float("-inf"), n=-2**63),
            dict(key="null", x=5e-324, n=None), dict(key="x" * 3000, x=0.5, n=0), dict(key=" ", x=None, n=1)]
    if "postgresql" in online.name: rows[3]["key"] = "x" * 2000  # a longer key does not fit into its index
    schema = pa.schema({"key": pa.string(), "x": pa.float64(), "n": pa.int64()})
    layout = layout_of(table, schema, "key")
    online.upsert(layout, pa.Table.from_pylist(rows, schema), 1)
    got = online.get(table, [row["key"] for row in rows])
    assert repr(got) == repr(rows)
    look_up = online.reader(table, ["n", "x"])
    assert [repr(look_up(row["key"])) for row in rows] == [repr({"n": row["n"], "x": row["x"]}) for row in rows]
    assert look_up("none") is None


def test_rows_expire(online, table):
    layout = layout_of(table, flights().schema, "origin", ttl=1000)
    online.upsert(layout, flights(("JFK", 1)), 1)
    look_up = online.reader(table, ["late"])
    assert values(online, table, ["JFK"]) == [1] and look_up("JFK") == {"late": 1}
    now = time.time()
    online.clock = lambda: now + 1001
    assert values(online, table, ["JFK"]) == [None] and online.reader(table, ["late"])("JFK") is None


def test_stores_delete_expired_rows(online, table):
    layout = layout_of(table, flights().schema, "origin", ttl=0.2)
    online.upsert(layout, flights(("JFK", 1)), 1)
    until = time.monotonic() + 10
    while values(online, table, ["JFK"]) != [None]: assert time.monotonic() < until, "the row never expired"
    if "redis" in online.name:  # the server counts whole milliseconds, so it deletes the row shortly after it expired
        while online.stored_ids(table): assert time.monotonic() < until, "the server did not delete the row"
    if "dynamodb" in online.name:
        description = online.client.describe_time_to_live(TableName=table)["TimeToLiveDescription"]
        assert description["AttributeName"] == "expires__"
    if "sqlite" in online.name or "postgresql" in online.name:
        online.finish(table, 1)
        assert online.prune(table, 99) == 0


def test_columns_that_are_added_later(online, table):
    layout = layout_of(table, flights().schema, "origin")
    online.upsert(layout, flights(("JFK", 1), ("LGA", 1)), 1)
    assert values(online, table, ["JFK"]) == [1]  # the layout is cached now
    wider = flights(("JFK", 2)).append_column("wind", pa.array([7.5]))
    online.upsert(layout_of(table, wider.schema, "origin"), wider, 2)
    assert online.get(table, ["JFK", "LGA"], ["late", "wind"]) == [{"late": 2, "wind": 7.5}, {"late": 1, "wind": None}]
    assert online.upsert(layout, flights(("EWR", 3)), 3) == 1
    assert online.get(table, ["EWR"]) == [{"origin": "EWR", "late": 3, "wind": None}]
    changed = flights(("JFK", 2), columns=("late", "origin"))
    with pytest.raises(MlopsError, match="is published with the keys origin, not late\n.*drop"):
        online.upsert(layout_of(table, changed.schema, "late"), changed, 4)
    assert online.state(table).begun == 3


@settings(max_examples=4, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(names=st.lists(st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1, max_size=10).filter(
    lambda name: not name.endswith("__")), min_size=3, max_size=3, unique_by=str.lower))
@example(names=["50% of %s", 'a.b"c`d', "$x?:1"])
@example(names=["select", "Été é", "rowid"])
def test_columns_of_any_name(online, names):
    table, (key, second_key, value) = f"dev.flights.t{uuid.uuid4().hex[:12]}", names
    rows = pa.table([["JFK", "LGA"], [1, 2], [0.5, None]], names=names)
    layout = layout_of(table, rows.schema, [key, second_key])
    assert online.upsert(layout, rows.slice(0, 1), 1) == 1 and online.upsert(layout, rows, 2) == 2
    assert online.get(table, [("JFK", 1), ("LGA", 2), ("LGA", 1)], [value]) == [{value: 0.5}, {value: None}, None]
    assert online.reader(table, [value, key])("JFK", 1) == {value: 0.5, key: "JFK"}
    wider = rows.append_column(f"{value} %", pa.array([True, False]))
    online.upsert(layout_of(table, wider.schema, [key, second_key]), wider, 3)
    assert online.get(table, [("LGA", 2)])[0][f"{value} %"] is False
    assert online.delete(table, [("JFK", 1)], 3) == 1 and online.get(table, [("JFK", 1)]) == [None]
    online.drop(table)


# ---- errors

def test_invalid_arguments_write_nothing_and_the_errors_list_what_exists(online, table):
    layout = layout_of(table, flights().schema, "origin")
    online.upsert(layout, flights(("JFK", 1)), 1)
    for rows, message in ((flights(("LGA", 1), (None, 2)), "1 of the rows for .* have no 'origin'"),
                          (flights(("LGA", 1), ("LGA", 2)), "hold the key 'LGA' more than once"),
                          (pa.table({"origin": ["LGA"], "late": ["x"]}), "column 'late' of .* is int, got string"),
                          (pa.table({"origin": ["LGA"], "lat": [1]}), "no column 'lat' in .*\n.*did you mean 'late'"),
                          (pa.table({"late": [1]}), "no column 'origin' in the rows")):
        with pytest.raises(MlopsError, match=message): online.upsert(layout, rows, 2)
    assert values(online, table, ["JFK", "LGA"]) == [1, None]
    for keys, message in (([1], "key 'origin' of .* is string, got 1 .int"), ([None], "key 'origin' .* is null"),
                          ([("JFK", "LGA")], "has 1 parts, got 2"), ([{"dest": "x"}], "no key 'origin'")):
        with pytest.raises(MlopsError, match=message): online.get(table, keys)
        with pytest.raises(MlopsError, match=message): online.delete(table, keys)
    with pytest.raises(MlopsError, match=f"no table '{table}x' in .*\n.*{table}"): online.get(f"{table}x", ["JFK"])
    with pytest.raises(MlopsError, match="no column 'lat' in .*\n.*did you mean 'late'"):
        online.get(table, ["JFK"], ["lat"])
    with pytest.raises(MlopsError, match="'plane' is not a full table name"): online.get("plane", ["JFK"])


REMOTE = {"postgresql": "postgresql://ann@127.0.0.1:{port}/x?password=secrets/online/server",
          "redis": "redis://127.0.0.1:{port}/0?password=secrets/online/server",
          "dynamodb": "dynamodb://eu-west-1?endpoint_url=http://127.0.0.1:{port}&access_key=secrets/online/server"
                      "&secret_key=secrets/online/server",
          "cosmos": "cosmos://127.0.0.1:{port}/x?key=secrets/online/cosmos&verify=false"}


@pytest.fixture(params=[pytest.param(kind, marks=pytest.mark.slow) for kind in REMOTE])
def remote(request, monkeypatch):
    "The address of a store, with a placeholder for a port on which no store listens."
    pytest.importorskip(stores.CLIENTS[request.param], reason="a client is not installed: make install-stores")
    for name, value in stores.SECRETS.items(): monkeypatch.setenv(name, value)
    return REMOTE[request.param]


FAILED = "looking for dev.flights.plane failed at .*\n.*is it up"


def failed_request(uri):
    "Return the error of a request that gets no answer, and the seconds that it took."
    began = time.monotonic()
    with open_store(uri, timeout=0.7) as online, pytest.raises(MlopsError) as caught: online.state("dev.flights.plane")
    return caught.value, time.monotonic() - began


def shows_a_secret(error):
    shown = f"{error!s}{error!r}{error.__cause__}"
    return stores.PASSWORD in shown or stores.COSMOS_KEY in shown or "secrets/" in str(error)


def test_a_server_that_is_down(remote):
    error, seconds = failed_request(remote.format(port=stores.free_port()))
    assert re.match(FAILED, str(error)) and not shows_a_secret(error) and seconds < 4


def test_a_server_that_does_not_answer(remote):
    with socket.create_server(("127.0.0.1", 0), backlog=16) as silent:
        error, seconds = failed_request(remote.format(port=silent.getsockname()[1]))
    assert re.match(FAILED, str(error)) and not shows_a_secret(error) and seconds < 6


def test_a_server_that_stops_responding(address, table):
    "The server stops between two requests on an open connection."
    if address.startswith("sqlite"): return
    layout = layout_of(table, flights().schema, "origin")
    with open_store(address, timeout=0.5) as online:
        online.upsert(layout, flights(("JFK", 1)), 1)
        assert values(online, table, ["JFK"]) == [1]
        if address.startswith("postgresql"):
            with online.connection() as c: process = c.info.backend_pid
        else: process = stores.SERVERS[-1].pid
        began = time.monotonic()
        os.kill(process, signal.SIGSTOP)
        try:
            with pytest.raises(MlopsError, match="reading 1 keys of .* failed at .*\n.*is it up"):
                online.get(table, ["JFK"])
            assert time.monotonic() - began < 6
            if not address.startswith("postgresql"):
                with pytest.raises(MlopsError, match="creating .* failed at"):
                    online.upsert(layout, flights(("JFK", 2)), 2)
        finally: os.kill(process, signal.SIGCONT)
        with open_store(address, timeout=10) as again: assert values(again, table, ["JFK"]) == [1]


def test_a_string_that_one_store_refuses(online, table):
    layout = layout_of(table, flights().schema, "origin")
    rows = flights(("JFK", 1), ("a\0b", 2))
    if "postgresql" in online.name:
        with pytest.raises(MlopsError, match="writing 2 rows of .* NUL"): online.upsert(layout, rows, 1)
        assert values(online, table, ["JFK"]) == [None]
    else:
        online.upsert(layout, rows, 1)
        assert values(online, table, ["a\0b", "a"]) == [2, None]


def test_a_sqlite_file_that_is_locked_or_not_a_database(tmp_path, table):
    uri = f"sqlite:///{tmp_path}/online.db"
    with open_store(uri, timeout=0.1) as reader, open_store(uri) as writer:
        layout = layout_of(table, flights().schema, "origin")
        writer.upsert(layout, flights(("JFK", 1)), 1)
        with writer.transaction():
            assert values(reader, table, ["JFK"]) == [1]  # readers do not wait
            with pytest.raises(MlopsError, match="creating .* failed at sqlite:.*locked"):
                reader.begin(layout, 2)
    (tmp_path / "text.db").write_text("no database " * 1000)
    with pytest.raises(MlopsError, match="file is not a database"): open_store(f"sqlite:///{tmp_path}/text.db").state(table)


def test_statements_have_a_timeout(address, table):
    if "postgresql" not in address: return  # only there can a writer block a reader
    with open_store(address) as holder, open_store(address, timeout=0.5) as online:
        layout = layout_of(table, flights().schema, "origin")
        holder.upsert(layout, flights(("JFK", 1)), 1)
        with holder.transaction() as c:
            c.execute(f'LOCK TABLE "{table}"')
            with pytest.raises(MlopsError, match="reading 1 keys .* statement timeout"): online.get(table, ["JFK"])
        assert values(online, table, ["JFK"]) == [1]


def test_passwords_stay_out_of_addresses():
    "An address is checked before the client of its store is imported, so no client is needed."
    # pragma: allowlist nextline secret
    with pytest.raises(MlopsError, match="holds a password") as caught: open_store("redis://:hunter2@host/0")
    assert "hunter2" not in repr(caught.value)
    with pytest.raises(MlopsError, match="option 'password' .* must name a secret") as caught:
        open_store("redis://h/0?password=hunter2")
    assert "hunter2" not in repr(caught.value)


def test_an_unknown_option_and_a_missing_secret(remote, monkeypatch):
    with pytest.raises(MlopsError, match="no option 'pasword'"):
        open_store(f"{remote.format(port=1)}&pasword=secrets/a/b")
    for name in stores.SECRETS: monkeypatch.delenv(name)
    with pytest.raises(MlopsError, match="set the environment variable MLOPS_SECRET_ONLINE_"):
        with open_store(remote.format(port=1)) as online: online.tables()


def test_the_store_of_a_target(env, tmp_path, monkeypatch):
    monkeypatch.delenv("MLOPS_ONLINE_STORE", raising=False)
    own = replace(env, state=tmp_path, root=tmp_path)
    assert store(own).file == tmp_path / "online.db"
    assert store(replace(own, variables={"online_store": "sqlite:///a/b.db"})).file == tmp_path / "a/b.db"
    odd = replace(env, state=tmp_path / "a b#c?d%41", root=tmp_path / "e?%42", variables={"online_store": "sqlite:///f.db"})
    assert store(odd).file == odd.root / "f.db" and store(replace(odd, variables={})).file == odd.state / "online.db"
    monkeypatch.setenv("MLOPS_ONLINE_STORE", f"sqlite:///{tmp_path}/c.db?timeout=7")
    assert (store(own).file, store(own).timeout) == (tmp_path / "c.db", 7)


# ---- concurrent readers and writers

def test_readers_never_see_a_part_of_a_row(address, online, table):
    columns = [f"c{i}" for i in range(8)]
    def rows(version): return pa.table({"k": [f"key {i}" for i in range(20)]} | {c: [version] * 20 for c in columns})
    layout = layout_of(table, rows(0).schema, "k")
    online.upsert(layout, rows(0), 0)
    seen, problems, is_over = set(), [], threading.Event()
    def read():
        try:
            with open_store(address, timeout=10) as other:
                look_up, keys = other.reader(table, columns), [f"key {i}" for i in range(20)]
                while not is_over.is_set():
                    for row in [*other.get(table, keys, columns), look_up("key 7")]:
                        seen.add(row["c0"])
                        if len(set(row.values())) > 1: problems.append(row)
        except Exception as error: problems.append(error)
    threads = [threading.Thread(target=read) for _ in range(2)]
    for t in threads: t.start()
    until = time.monotonic() + 0.4
    versions = count(1)
    while time.monotonic() < until or len(seen) < 3 and time.monotonic() < until + 10:
        version = next(versions)
        online.upsert(layout, rows(version), version)
    is_over.set()
    for t in threads: t.join()
    assert not problems and len(seen) >= 3, (problems[:3], seen)


# ---- publishing a Delta table

def frame(spark, rows):
    df = spark.createDataFrame(rows, "k STRING, hour INT, a DOUBLE, b STRING")
    return df.selectExpr("k", "timestamp_seconds(hour * 3600) AS at", "a", "b")


def expected(spark, env, table):
    "Return the latest row of each key in the Delta table."
    rows = tables.read(spark, env, table).toArrow().to_pylist()
    return {row["k"]: row for row in sorted(rows, key=lambda row: row["at"])}


def delta_content(spark, env, table, deleted_keys=()):
    "Return the Delta table's rows by key, None for deleted keys, and its version as published and as begun."
    rows, version = expected(spark, env, table), tables.version(spark, env, table)
    return {k: rows.get(k) for k in {*rows, *deleted_keys}}, version, version


def online_content(online, table, keys):
    "Return the same of a store."
    rows, state = dict(zip(keys, online.get(table, keys), strict=True)), online.state(table)
    return rows, online.published_version(table), state.begun


def test_publishing_follows_changes_of_the_table(online, spark, env, table):
    name, generator = table.split(".")[2], random.Random(4)
    keys = [f"k{i}" for i in range(12)]
    def random_row(key):
        a, b = [None, 1.5, float("inf")], [None, "x", "y"]
        return key, generator.randrange(4), generator.choice(a), generator.choice(b)
    def change():
        rows = [random_row(key) for key in generator.sample(keys, 4)]
        tables.merge(spark, env, name, frame(spark, rows), ["k", "at"])
    change()
    assert publish(spark, env, online, name, "k", time_column="at") == (4, 0)
    content = delta_content(spark, env, table, keys)
    assert online_content(online, table, content[0]) == content
    for _ in range(2):
        change()
        tables.replace(spark, env, name, frame(spark, []), f"k = '{generator.choice(keys)}'")
        before = {k: row for k, row in zip(keys, online.get(table, keys), strict=True) if row}
        after = expected(spark, env, table)
        counts = publish(spark, env, online, name, "k", time_column="at")
        assert counts == (sum(before.get(k) != row for k, row in after.items()), len(before.keys() - after.keys()))
        content = delta_content(spark, env, table, keys)
        assert online_content(online, table, content[0]) == content
        assert publish(spark, env, online, name, "k", time_column="at") == (0, 0)


def test_the_next_publish_completes_one_that_was_killed(address, online, spark, env, table):
    name = table.split(".")[2]
    def write(*rows): return tables.overwrite(spark, env, name, frame(spark, [(f"k{k:02}", 1, a, "") for k, a in rows]))
    write(*((k, 0.0) for k in range(30)))
    assert publish(spark, env, online, name, "k") == (30, 0)
    write(*((k, 1.0) for k in range(10, 40)))  # deleted keys, changed values, new keys
    version = tables.version(spark, env, table)
    rows = tables.read(spark, env, table).toArrow().sort_by([("k", "descending")])
    layout = online.state(table).layout
    code = f"""
import sys, time, warnings
warnings.simplefilter("ignore")
import pyarrow as pa
from mlops_nb.features.stores.rows import Layout
from mlops_nb.features.stores.store import open_store
online, layout = open_store({address!r}, timeout=10), Layout.from_text({layout.as_text()!r})
def batches():
    for i, batch in enumerate(pa.ipc.open_stream(sys.stdin.buffer).read_all().to_batches(max_chunksize=5)):
        if i == 4: print("four of six", flush=True); time.sleep(60)
        yield batch
online.begin(layout, {version})
online.upsert(layout, batches(), {version})
online.finish(layout.table, {version})
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with pa.ipc.new_stream(process.stdin, rows.schema) as out: out.write_table(rows)
    process.stdin.close()
    assert process.stdout.readline() == b"four of six\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    state = online.state(table)
    assert state.begun == version != state.published
    assert [bool(r) and r["a"] for r in online.get(table, ["k39", "k20", "k10", "k00"])] == [1.0, 1.0, 0.0, 0.0]
    write(*((k, 0.0) for k in range(5, 35)))  # some as in the published version, so not among its changes
    publish(spark, env, online, name, "k")
    content = delta_content(spark, env, table, [f"k{k:02}" for k in range(40)])
    assert online_content(online, table, content[0]) == content


def test_a_publisher_that_was_killed_while_another_computed_changes(address, online, spark, env, table):
    "Its rows are not among the changes that the other publisher computed."
    name = table.split(".")[2]
    def write(*rows): return tables.overwrite(spark, env, name, frame(spark, [(k, 1, a, "") for k, a in rows]))
    write(("a", 1.0))
    publish(spark, env, online, name, "k")
    layout, first = online.state(table).layout, tables.version(spark, env, table)
    write(("a", 1.0), ("ghost", 2.0))
    ghost = tables.read(spark, env, table).where("k = 'ghost'").toArrow()
    write(("a", 3.0))
    begin = online.begin
    def late_begin(*arguments):
        online.begin = begin
        with open_store(address, timeout=10) as other: assert other.upsert(layout, ghost, first + 1) == 1
        return begin(*arguments)
    online.begin = late_begin
    publish(spark, env, online, name, "k")
    content = delta_content(spark, env, table, ["ghost"])
    assert online_content(online, table, content[0]) == content


def test_two_publishers_at_once(address, spark, env, table):
    name = table.split(".")[2]
    def write(i):
        rows = [(f"k{(k + i) % 12}", 1, float(i), "") for k in range(8)]
        tables.overwrite(spark, env, name, frame(spark, rows))
    write(0)
    problems, is_over = [], threading.Event()
    def run():
        try:
            with open_store(address, timeout=10) as other:
                while not is_over.is_set(): publish(spark, env, other, name, "k")
                publish(spark, env, other, name, "k")
        except Exception as error: problems.append(error)
    threads = [threading.Thread(target=run) for _ in range(2)]
    for t in threads: t.start()
    for i in range(1, 4): write(i)
    is_over.set()
    for t in threads: t.join()
    assert not problems, problems
    content = delta_content(spark, env, table, [f"k{i}" for i in range(12)])
    with open_store(address) as online: assert online_content(online, table, content[0]) == content


# ---- requests to a model

def doubled(a: float) -> float:
    "Twice the level."
    return 2 * a


def saved_model(folder: Path, spec) -> Path:
    "A model with its spec in a folder, as the feature client logs it."
    inputs = np.array([[0.5, 1.0], [9.0, 18.0], [np.nan, np.nan]] * 4)
    parameters = {"min_data_in_leaf": 1, "min_data_in_bin": 1, "verbose": -1}
    booster = lightgbm.train(parameters, lightgbm.Dataset(inputs, inputs[:, 0] == 0.5), 3)
    stored, options = folder / "data" / "feature_store", dict(signature=signature_of(spec), pip_requirements=[])
    save_model(stored, mlflow.lightgbm, booster, spec, **options)
    mlflow.pyfunc.save_model(folder / "model", loader_module="feature_model", data_path=str(stored),
                             code_paths=[feature_model.__file__], **options)
    return folder / "model"


@pytest.mark.filterwarnings("ignore:.*An input example was not")
def test_a_prediction_for_keys_alone(address, spark, env, table, tmp_path, monkeypatch):
    "The same as in a batch, from every store, also by several threads at once."
    monkeypatch.delenv("MLOPS_ONLINE_STORE", raising=False)
    own, name = replace(env, variables={"online_store": f"{address}{'&' if '?' in address else '?'}timeout=10"}), table
    client = FeatureEngineeringClient(spark, own)
    rows = frame(spark, [("k1", 1, 9.0, "x"), ("k1", 2, 0.5, "x"), ("k2", 1, None, "y")])
    client.create_table(name=name, primary_keys=["k", "at"], timeseries_column="at", df=rows)
    register_function(spark, own, doubled)
    places = frame(spark, [(f"k{i % 4}", 3, None, None) for i in range(1, 9)]).selectExpr("k AS place", "at")
    lookup = FeatureLookup(name, "place", ["a"], timestamp_lookup_key="at")
    spec = client.create_training_set(df=places, feature_lookups=[lookup, FeatureFunction("doubled", {"a": "a"})],
                                      label=None, exclude_columns=["place", "at"]).feature_spec
    folder = saved_model(tmp_path, spec)
    with pytest.raises(MlopsError, match=f"table {name}, .* does not exist .*\n.*mlops run features"):
        request_features(own, folder)
    with client.get_online_store() as store: client.publish_table(online_store=store, source_table_name=name)
    features, model = request_features(own, folder), mlflow.pyfunc.load_model(str(folder))
    assert features.is_local == address.startswith("sqlite")
    scored = client.score_batch(model_uri=str(folder), df=places).toPandas()
    requests = [{"place": place} for place in scored.place]
    completed = features.complete(requests)
    assert [row["a"] for row in completed] == [{"k1": 0.5}.get(place) for place in scored.place]
    predictions = model.predict(model_input(model, pa.Table.from_pylist(completed), features.outputs))
    assert predictions.tolist() == scored.prediction.tolist() and len(set(predictions)) == 2
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda request: features.complete([request])[0], requests * 5)) == completed * 5
    features.close()


@pytest.fixture
def file(tmp_path):
    with open_store(f"sqlite:///{tmp_path}/online.db") as opened: yield opened


def test_a_publish_in_a_process_that_is_killed(file, spark, env, table, tmp_path):
    "A process with its own engine, as a job runs it, is killed after the first batch."
    name = table.split(".")[2]
    tables.overwrite(spark, env, name, frame(spark, [(f"k{i}", 1, 1.0, "") for i in range(500)]))
    code = f"""
import time
from pathlib import Path
from dataclasses import replace
from mlops_nb.features.stores import publishing, store as online_store
from mlops_nb.env import load_env
from mlops_nb.data.session import get_spark
env = replace(load_env("dev"), lakehouse={env.lakehouse!r})
online = online_store.open_store("sqlite:///{tmp_path}/online.db")
online.chunk, write_rows = 100, online.write_rows
def slow_write_rows(*arguments):
    print(write_rows(*arguments), flush=True)
    time.sleep(0.5)
online.write_rows = slow_write_rows
publishing.publish(get_spark(env), env, online, {name!r}, "k")
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2],
                               env={k: v for k, v in os.environ.items() if not k.startswith("MLOPS")})
    assert process.stdout.readline() == b"100\n"
    process.kill()
    process.wait()
    process.stdout.close()
    assert file.published_version(table) is None and file.state(table).begun == tables.version(spark, env, table)
    assert publish(spark, env, file, name, "k")[0] in (300, 400)
    content = delta_content(spark, env, table)
    assert online_content(file, table, content[0]) == content


def test_predictions_are_published_by_all_their_keys(file, spark, env, table):
    name = table.split(".")[2]
    schema = "flight_day DATE, carrier STRING, flight INT, prediction DOUBLE, warning BOOLEAN"
    prediction_time = "timestamp_seconds(unix_date(flight_day) * 86400) AS prediction_time"
    def write(*rows):
        df = spark.createDataFrame([(date(2013, 7, d), "UA", f, p, p > 0.5) for d, f, p in rows], schema)
        tables.overwrite(spark, env, name, df.selectExpr("*", prediction_time))
    keys = ["flight_day", "carrier", "flight"]
    write((1, 15, 0.25), (1, 16, 0.75), (2, 15, 0.5))
    assert publish(spark, env, file, name, keys) == (3, 0)
    write((1, 15, 0.25), (2, 15, 0.875))
    assert publish(spark, env, file, name, keys) == (1, 1)
    lookups = [(date(2013, 7, d), "UA", f) for d, f in ((1, 15), (1, 16), (2, 15))]
    first, deleted, last = file.get(table, lookups, ["prediction", "warning", "prediction_time"])
    assert (first["prediction"], deleted, last["prediction"], last["warning"]) == (0.25, None, 0.875, True)
    assert last["prediction_time"] == datetime(2013, 7, 2, tzinfo=UTC)
    assert type(file.get(table, lookups[:1])[0]["flight_day"]) is date


def test_a_published_version_that_was_vacuumed(file, spark, env, table):
    name = table.split(".")[2]
    def write(*rows): tables.overwrite(spark, env, name, frame(spark, [(k, 1, a, "") for k, a in rows]))
    write(("a", 1.0), ("b", 1.0), ("c", 1.0))
    publish(spark, env, file, name, "k")
    write(("b", 1.0), ("c", 2.0))
    removed = tables.delta_log(env, table).vacuum(retention_hours=0, dry_run=False, enforce_retention_duration=False)
    assert removed
    assert publish(spark, env, file, name, "k") == (2, 1)
    content = delta_content(spark, env, table, ["a"])
    assert online_content(file, table, content[0]) == content


def test_a_table_that_was_recreated(file, spark, env, table):
    import shutil
    name = table.split(".")[2]
    for value in (1.0, 2.0):
        tables.overwrite(spark, env, name, frame(spark, [("a", 1, value, "")]))
        publish(spark, env, file, name, "k")
    shutil.rmtree(Path(env.lakehouse, *table.split(".")))
    tables.overwrite(spark, env, name, frame(spark, [("b", 1, 3.0, "")]))
    with pytest.raises(MlopsError, match="was recreated after it was published.*\n.*drop"):
        publish(spark, env, file, name, "k")
    file.drop(table)
    publish(spark, env, file, name, "k")
    content = delta_content(spark, env, table, ["a"])
    assert online_content(file, table, content[0]) == content


def test_unchanged_rows_with_a_time_to_live_do_not_expire_while_they_are_published(file, spark, env, table):
    name, now = table.split(".")[2], time.time()
    file.clock = lambda: now
    def write(*rows): tables.overwrite(spark, env, name, frame(spark, [(k, 1, a, "") for k, a in rows]))
    write(("a", 1.0), ("b", 1.0))
    assert publish(spark, env, file, name, "k", ttl=100) == (2, 0)
    write(("a", 1.0), ("c", 1.0))
    now += 60
    assert publish(spark, env, file, name, "k", ttl=100) == (2, 1)
    now += 60
    assert [bool(row) for row in file.get(table, ["a", "b", "c"])] == [True, False, True]


def test_a_new_column_is_published_in_every_row(file, spark, env, table):
    name = table.split(".")[2]
    tables.overwrite(spark, env, name, spark.createDataFrame([("a", 1), ("b", 1)], "k STRING, n INT"))
    publish(spark, env, file, name, "k")
    tables.merge(spark, env, name, spark.createDataFrame([("a", 1, True)], "k STRING, n INT, new BOOLEAN"), ["k"])
    publish(spark, env, file, name, "k")
    assert file.get(table, ["a", "b"]) == [{"k": "a", "n": 1, "new": True}, {"k": "b", "n": 1, "new": None}]


def test_the_time_column_cannot_change(file, spark, env, table):
    tables.overwrite(spark, env, table.split(".")[2], frame(spark, [("a", 1, 1.0, "")]))
    publish(spark, env, file, table.split(".")[2], "k")
    with pytest.raises(MlopsError, match="is published with time_column None, not at\n.*drop"):
        publish(spark, env, file, table.split(".")[2], "k", "at")


def test_a_dropped_column_leaves_no_values(file, spark, env, table):
    name = table.split(".")[2]
    tables.overwrite(spark, env, name, spark.createDataFrame([("a", 1, 1), ("b", 1, 1)], "k STRING, n INT, old INT"))
    publish(spark, env, file, name, "k")
    tables.overwrite(spark, env, name, spark.createDataFrame([("a", 1), ("b", 2)], "k STRING, n INT"))
    assert publish(spark, env, file, name, "k") == (2, 0) and publish(spark, env, file, name, "k") == (0, 0)
    assert file.get(table, ["a", "b"]) == [{"k": "a", "n": 1, "old": None}, {"k": "b", "n": 2, "old": None}]


@pytest.mark.parametrize("rows, keys, time_column, message", [
    ([("a", 1, 1.0, ""), ("a", 2, 1.0, "")], "k", None, "has 2 rows for k=a\n.*time_column"),
    ([("a", 1, 1.0, "x"), ("a", 1, 1.0, "y")], "k", "at", "has 2 rows for k=a at its latest at"),
    ([("a", 1, 1.0, ""), (None, 2, 1.0, "")], "k", None, "1 of the rows of .* have no 'k'"),
    ([("a", None, 1.0, "")], "k", "at", "1 of the rows of .* have no 'at'"),
    ([("a", 1, 1.0, "")], "kk", None, "no column 'kk'"),
    ([("a", 1, 1.0, "")], "k", "hour", "no column 'hour'"),
    ([("a", 1, 1.0, "")], "a", None, "key 'a' of .* is a double")])
def test_tables_that_cannot_be_published(file, spark, env, table, rows, keys, time_column, message):
    tables.overwrite(spark, env, table.split(".")[2], frame(spark, rows))
    with pytest.raises(MlopsError, match=message): publish(spark, env, file, table.split(".")[2], keys, time_column)
    assert file.tables() == []


def test_another_targets_table_is_not_published(file, spark, env):
    with pytest.raises(MlopsError, match="may not write prod.flights.plane"):
        publish(spark, env, file, "prod.flights.plane", "k")
    with pytest.raises(MlopsError, match="no table 'dev.flights.none'"): publish(spark, env, file, "none", "k")


def test_a_missing_client_names_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "redis", None)
    with pytest.raises(MlopsError, match=re.escape("uv pip install -e '.[redis]'")): open_store("redis://h/0")
    assert set(online_store.STORE_KINDS) == set(stores.KINDS)
