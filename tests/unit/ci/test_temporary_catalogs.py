"""Temporary catalogs: their names, who may read them, and where their processes work."""
import os
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlops_nb.ci import temporary_places
from mlops_nb.data import lakehouse
from mlops_nb.env import load_env
from mlops_nb.errors import MlopsError
from mlops_nb.temporary_catalogs import expired_catalogs, made_at, permanent_catalog, temporary_catalog

ROOT = Path(__file__).parents[3]
NOON = datetime(2026, 11, 27, 12, tzinfo=UTC)
TIMES = st.datetimes(datetime(2000, 1, 1), datetime(2100, 1, 1), timezones=st.just(UTC)).map(
    lambda time: time.replace(microsecond=0))


@given(st.from_regex(r"[a-z][a-z0-9_]{0,30}", fullmatch=True), TIMES)
def test_a_name_holds_its_catalog_and_its_time(catalog, time):
    name = temporary_catalog(catalog, time)
    assert (permanent_catalog(name), made_at(name)) == (catalog, time)
    assert expired_catalogs([name], time + timedelta(seconds=61), timedelta(minutes=1)) == [name]
    assert expired_catalogs([name], time + timedelta(seconds=59), timedelta(minutes=1)) == []


@pytest.mark.parametrize("name", ["staging", "prod_ci", "prod_ci_20261127", "prod_ci_20261332_120000_00ff",
                                  "prod_ci_20261127_120000_00FF", "x.prod_ci_20261127_120000"])
def test_other_names_are_no_temporary_catalogs(name):
    assert made_at(name) is None and permanent_catalog(name) == name


def test_who_may_read_a_catalog_may_read_the_temporary_ones_that_stand_for_it(no_settings, tmp_path):
    name = temporary_catalog("staging", NOON)
    dev, prod = (replace(load_env(target, root=ROOT), lakehouse=str(tmp_path)) for target in ("dev", "prod"))
    (tmp_path / name).mkdir()
    assert dev.can_read(f"{name}.flights.plane") and not dev.can_write(f"{name}.flights.plane")
    assert name in lakehouse.catalogs(dev) and name not in lakehouse.catalogs(prod)
    with pytest.raises(MlopsError, match=f"may not read {name}.flights.plane"): prod.check_read(f"{name}.flights.plane")
    source = load_env("dev", {"source_catalog": name}, ROOT)
    assert source.source_table("plane") == f"{name}.flights.plane" and name in source.read
    with pytest.raises(MlopsError, match="may not read its source catalog"):
        load_env("prod", {"source_catalog": name}, ROOT)


def test_processes_of_a_place_write_nothing_outside_of_it(no_settings, monkeypatch):
    monkeypatch.setenv("MLOPS_ONLINE_STORE", "redis://host:6379/0")
    env = load_env("staging", root=ROOT)
    place = temporary_places.temporary_env(env, temporary_catalog("staging", NOON))
    settings = temporary_places.place_settings(env, place.catalog)
    assert settings["MLOPS_ONLINE_STORE"] == "" and Path(settings["MLOPS_STATE"]) == place.state
    assert place.write == (place.catalog,) and Path(place.lakehouse).is_relative_to(place.state)
    assert str(place.state) in place.tracking_uri and os.environ["MLOPS_ONLINE_STORE"] == "redis://host:6379/0"
    with pytest.raises(MlopsError, match="staging is not temporary"): temporary_places.drop_place(env)


def test_old_results_are_removed_with_old_catalogs(no_settings, tmp_path):
    env = replace(load_env("staging", root=ROOT), state=tmp_path)
    old, new = (tmp_path / "ci/results" / name for name in ("a_2013-03-15", "b_2013-03-15"))
    for folder in (old, new): folder.mkdir(parents=True)
    os.utime(old, (0, (NOON - timedelta(days=31)).timestamp()))
    os.utime(new, (0, (NOON - timedelta(days=29)).timestamp()))
    temporary_places.sweep(env, NOON, timedelta(days=1))
    assert not old.exists() and new.exists()
