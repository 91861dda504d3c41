"""The settings of a target: Unity Catalog names, lists of catalogs, engine and locations by environment variables."""
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mlops_nb import identity
from mlops_nb.env import check_name, full_name, load_env, on_databricks
from mlops_nb.errors import MlopsError

VARIABLES = ("MLOPS_STATE", "MLOPS_LAKEHOUSE", "MLOPS_ENGINE", "MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI",
             "DATABRICKS_ENV_VERSION", "DATABRICKS_RUNTIME_VERSION")


@pytest.fixture
def root(tmp_path, monkeypatch):
    "A project of two targets, without environment variables that change its settings."
    for name in VARIABLES: monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(identity, "RUNTIME_FILE", tmp_path / "DBR_VERSION")
    write(tmp_path)
    return tmp_path


def write(root, **variables):
    "The project's databricks.yml; the keywords go into target dev."
    (root / "databricks.yml").write_text(yaml.safe_dump({
        "bundle": {"name": "small"},
        "variables": {"catalog": {"default": "${bundle.target}"}, "schema": {"default": "flights"},
                      "source_catalog": {"default": "${var.catalog}"},
                      "read": {"type": "complex", "default": ["${var.catalog}"]},
                      "write": {"type": "complex", "default": ["${var.catalog}"]}},
        "targets": {"dev": {"default": True, "variables": variables}, "prod": {}}}))


# ---- names

@given(st.text())
def test_a_name_passes_exactly_if_it_is_valid_in_unity_catalog(name):
    allowed = 1 <= len(name) <= 255 and not any(c in "./ \x7f" or ord(c) < 32 for c in name)
    if allowed: assert check_name(name) == name.lower()
    else:
        with pytest.raises(MlopsError): check_name(name)


@pytest.mark.parametrize("length, passes", [(1, True), (255, True), (256, False), (0, False)])
def test_the_length_of_a_name_has_its_limit_at_255(length, passes):
    if passes: assert check_name("x" * length)
    else:
        with pytest.raises(MlopsError): check_name("x" * length)


def test_bytes_that_are_not_utf_8_are_refused():
    with pytest.raises(MlopsError, match="not allowed"): check_name(os.fsdecode(b"plane\xff"))


@pytest.mark.parametrize("name", ["../x", "..", ".", "", "/x", "a/../../../x", "a\\x", "a\0", "x" * 256, "é" * 128])
def test_an_experiment_has_no_folder_outside_of_its_target(root, name):
    with pytest.raises(MlopsError, match="experiment '.*is not a valid name of a folder"):
        load_env(root=root).experiment(name)
    assert load_env(root=root).experiment("team/late") == "/dev/team/late"


@pytest.mark.parametrize("name", [None, 7, b"plane", ["plane"]])
def test_a_name_that_is_not_a_string_is_refused(name):
    with pytest.raises(MlopsError, match="must be a non-empty string"): check_name(name)


@given(st.lists(st.from_regex(r"[A-Z_]{1,5}", fullmatch=True), min_size=1, max_size=5))
def test_only_one_or_three_parts_make_a_full_name(parts):
    name = ".".join(parts)
    if len(parts) == 1: assert full_name(name, "dev", "flights") == f"dev.flights.{name.lower()}"
    elif len(parts) == 3: assert full_name(name, "dev", "flights") == name.lower()
    else:
        with pytest.raises(MlopsError, match=f"has {len(parts)} parts"): full_name(name, "dev", "flights")


@pytest.mark.parametrize("name", ["dev..plane", "dev.flights.", ".flights.plane", "dev.fli ghts.plane", "../../x", ""])
def test_no_part_of_a_full_name_escapes_the_rules(name):
    with pytest.raises(MlopsError): full_name(name, "dev", "flights")


# ---- a target

def test_the_default_target_has_its_own_names_and_places(root):
    env = load_env(root=root)
    assert (env.target, env.catalog, env.schema, env.source_catalog) == ("dev", "dev", "flights", "dev")
    assert (env.read, env.write) == (("dev",), ("dev",))
    assert (env.root, env.state, env.lakehouse) == (root, root / ".mlops", str(root / ".mlops/lakehouse"))
    assert env.tracking_uri == env.registry_uri == f"sqlite:///{root}/.mlops/mlflow.db"
    assert (env.home, env.engine) == ("local", "sail")
    assert not (root / ".mlops").exists(), "load_env writes nothing"


def test_tables_models_and_experiments_are_named_by_target(root):
    env = load_env("prod", root=root)
    assert env.table("plane") == "prod.flights.plane" and env.model("late_arrival") == "prod.flights.late_arrival"
    assert env.table("dev.Other.Plane") == "dev.other.plane"
    assert env.experiment("late_arrival") == "/prod/late_arrival"


def test_sources_may_come_from_another_catalog(root):
    write(root, source_catalog="prod", read=["dev", "prod"])
    env = load_env(root=root)
    assert env.source_table("bronze_flights") == "prod.flights.bronze_flights"
    assert env.table("bronze_flights") == "dev.flights.bronze_flights"


def test_what_may_be_read_and_written_follows_the_lists(root):
    write(root, read=["prod"], write=["dev", "scratch"])
    env = load_env(root=root)
    catalogs = ("dev", "prod", "scratch", "other")
    access = {c: (env.can_read(f"{c}.flights.t"), env.can_write(f"{c}.flights.t")) for c in catalogs}
    assert access == {"dev": (True, True), "prod": (True, False), "scratch": (True, True), "other": (False, False)}
    assert env.check_write("t") == "dev.flights.t" and env.check_read("PROD.flights.T") == "prod.flights.t"


def test_a_refusal_names_target_table_and_what_is_allowed(root):
    write(root, read=["dev", "prod"])
    with pytest.raises(MlopsError, match=r"'dev' may not write prod.flights.t\n  it may write the catalogs: dev \("):
        load_env(root=root).check_write("prod.flights.t")
    with pytest.raises(MlopsError, match=r"'dev' may not read other.flights.t\n  it may read the catalogs: dev, prod"):
        load_env(root=root).check_read("other.flights.t")


@pytest.mark.parametrize("variables, message", [
    ({"write": ["prod"]}, "may not write its own catalog 'dev'"),
    ({"write": []}, "may not write its own catalog 'dev'"),
    ({"source_catalog": "prod"}, "may not read its source catalog 'prod'"),
    ({"catalog": "my catalog"}, "'my catalog' contains ' '"),
    ({"read": ["dev", "a/b"]}, "'a/b' contains '/'")])
def test_lists_that_contradict_each_other_are_refused_at_once(root, variables, message):
    write(root, **variables)
    with pytest.raises(MlopsError, match=message): load_env(root=root)


def test_the_error_of_an_unknown_target_lists_the_targets(root):
    with pytest.raises(MlopsError, match="'prdo'(.|\n)*prod"): load_env("prdo", root=root)


def test_variables_passed_to_load_env_override_the_bundle(root):
    assert load_env(root=root, variables={"schema": "other"}).table("plane") == "dev.other.plane"


# ---- places and engine

def test_the_environment_moves_state_and_lakehouse(root, monkeypatch):
    monkeypatch.setenv("MLOPS_STATE", "elsewhere")
    assert load_env(root=root).lakehouse == str(root / "elsewhere/lakehouse"), "relative to the project"
    monkeypatch.setenv("MLOPS_LAKEHOUSE", "s3://bucket/lake/")
    env = load_env(root=root)
    assert (env.state, env.lakehouse) == (root / "elsewhere", "s3://bucket/lake")
    assert env.tracking_uri == f"sqlite:///{root}/elsewhere/mlflow.db"


def test_places_do_not_follow_the_working_directory(root, tmp_path_factory, monkeypatch):
    before = load_env(root=root)
    monkeypatch.chdir(tmp_path_factory.mktemp("somewhere"))
    assert load_env(root=root) == before


@pytest.mark.parametrize("tracking, registry", [("http://mlflow", "http://mlflow"), ("databricks", "databricks-uc")])
def test_the_registry_goes_with_the_tracking_server(root, monkeypatch, tracking, registry):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking)
    env = load_env(root=root)
    assert (env.tracking_uri, env.registry_uri) == (tracking, registry)


@pytest.mark.parametrize("variable", ["DATABRICKS_ENV_VERSION", "DATABRICKS_RUNTIME_VERSION"])
def test_on_databricks_everything_is_databricks(root, monkeypatch, variable):
    monkeypatch.setenv(variable, "17.3")
    env = load_env(root=root)
    assert (env.home, env.engine) == ("databricks", "databricks")
    assert (env.tracking_uri, env.registry_uri) == ("databricks", "databricks-uc")
    assert env.experiment("late_arrival") == "/Shared/mlops_nb/dev/late_arrival"


def test_a_cluster_made_from_an_image_is_known_by_its_file(root):
    assert not on_databricks()
    identity.RUNTIME_FILE.touch()
    assert on_databricks() and load_env(root=root).home == "databricks"


def test_the_engine_can_be_chosen_and_a_misspelt_one_is_refused(root, monkeypatch):
    monkeypatch.setenv("MLOPS_ENGINE", "spark")
    assert load_env(root=root).engine == "spark" and load_env(root=root).home == "local"
    monkeypatch.setenv("MLOPS_ENGINE", "databricks")
    assert load_env(root=root).home == "local", "Databricks Connect runs at home"
    monkeypatch.setenv("MLOPS_ENGINE", "sprak")
    with pytest.raises(MlopsError, match="did you mean 'spark'"): load_env(root=root)


def test_pointing_mlflow_at_one_project_does_not_bind_the_next(root, monkeypatch, empty_store):
    import mlflow
    (root / ".mlops").mkdir()
    shutil.copy(empty_store, root / ".mlops/mlflow.db")
    before = mlflow.get_tracking_uri(), mlflow.get_registry_uri()
    try:
        env = load_env(root=root)
        env.use_mlflow()
        assert (mlflow.get_tracking_uri(), mlflow.get_registry_uri()) == (env.tracking_uri, env.registry_uri)
        assert load_env(root=root, target="prod").tracking_uri == env.tracking_uri
        monkeypatch.setenv("MLOPS_STATE", "other")
        assert load_env(root=root).tracking_uri == f"sqlite:///{root}/other/mlflow.db"
    finally:
        mlflow.set_tracking_uri(before[0]); mlflow.set_registry_uri(before[1])
        os.environ.pop("MLFLOW_TRACKING_URI", None)


REGISTER = """
import sys, mlflow
from dataclasses import replace
from pathlib import Path
from mlops_nb.env import load_env
folder = Path(sys.argv[1])
uri = f"sqlite:///{folder / 'mlflow.db'}"
replace(load_env("dev"), state=folder, tracking_uri=uri, registry_uri=uri).use_mlflow()
mlflow.set_experiment("test")
(folder / "model").mkdir()
(folder / "model/MLmodel").write_text("flavors: {}\\n")
mlflow.MlflowClient().create_registered_model("model")
mlflow.MlflowClient().create_model_version("model", str(folder / "model"))
mlflow.register_model(str(folder / "model"), "model")
import logging
logging.getLogger("mlflow.models").warning("a warning")
"""


@pytest.mark.slow
@pytest.mark.parametrize("level, shows_messages", [
    (None, False), *(pytest.param(*values, marks=pytest.mark.full) for values in (("ERROR", False), ("INFO", True)))])
def test_mlflow_prints_its_messages_only_if_the_user_sets_the_level(tmp_path, empty_store, level, shows_messages):
    "MLflow is imported before `use_mlflow`, and creates its store (without a level) and two versions of a model."
    if level: shutil.copy(empty_store, tmp_path / "mlflow.db")
    variables = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    if level: variables["MLFLOW_LOGGING_LEVEL"] = level
    process = subprocess.run([sys.executable, "-c", REGISTER, tmp_path], capture_output=True, text=True, env=variables,
                             cwd=Path(__file__).parents[2])
    assert process.returncode == 0, process.stderr
    assert ("Created version '2'" in process.stderr) == shows_messages
    lines = process.stderr.splitlines()
    if not shows_messages: assert len(lines) == (level is None) and all("a warning" in line for line in lines), lines


def test_env_imports_nothing_heavy():
    heavy = "{'mlflow', 'pyspark', 'pandas', 'numpy', 'pyarrow', 'lightgbm', 'pysail', 'deltalake'} & set(sys.modules)"
    code = f"import sys, mlops_nb.env, mlops_nb.data.session, mlops_nb.data.tables; print(sorted({heavy}))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert run.stdout.strip() == "[]", run.stderr
