"""A state folder that is moved or copied works at its new place, and a copy has nothing to do with the original."""
import hashlib
import json
import shutil
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from mlops_nb import addresses
from mlops_nb.env import load_env
from mlops_nb.errors import MlopsError
from mlops_nb.jobs import progress, run_store
from mlops_nb.models import registry


def env_at(state: Path, tracking: Path | None = None):
    uri = f"sqlite:///{tracking or state / 'mlflow.db'}"
    return replace(load_env("dev"), state=state, home="local", tracking_uri=uri, registry_uri=uri)


def texts(file: Path) -> list[str]:
    "All texts in a SQLite file, of every table and column; an oracle without the platform."
    with closing(sqlite3.connect(file)) as store:
        store.text_factory = lambda value: value.decode("utf-8", "replace")
        tables = [name for name, in store.execute("select name from sqlite_master where type = 'table'")]
        return [value for table in tables for row in store.execute(f'select * from "{table}"')
                for value in row if isinstance(value, str)]


def names(file: Path, folder: Path) -> int:
    "How many texts contain the folder as a whole path, plain or as URI."
    return sum(f"{form}/" in f"{text}/" for text in texts(file) for form in {str(folder), quote(str(folder))})


def digest(folder: Path) -> dict[str, str]:
    "The content of every file, without the empty lock files."
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and file.suffix != ".lock"]
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.fixture
def light_state(tmp_path, empty_store) -> Path:
    "A state with 30 experiments and a failed run, written without MLflow."
    state = tmp_path / "first"
    state.mkdir()
    shutil.copy(empty_store, state / "mlflow.db")
    with closing(sqlite3.connect(state / "mlflow.db")) as store:
        store.execute("update experiments set artifact_location = ?", [(state / "artifacts/0").as_uri()])
        rows = [(f"dev/{i}", (state / f"artifacts/dev/{i}").as_uri(), "active") for i in range(30)]
        store.executemany("insert into experiments (name, artifact_location, lifecycle_stage) values (?, ?, ?)", rows)
        store.commit()
    runs = run_store.RunStore(state / "runs.db")
    run_id = run_store.record_run(runs, "train", "dev", {}, ["train"])
    message = f"ValueError: bad\n  executed copy: {state}/runs/1/fit/0/notebook.ipynb"
    run_store.save_task(runs, run_id, "fit", 0, result_state="FAILED", state_message=message)
    run_store.update_run(runs, run_id, life_cycle_state="TERMINATED", result_state="FAILED", state_message=message)
    return state


@pytest.fixture(scope="module")
def trained_state(tmp_path_factory, empty_store) -> tuple[Path, str]:
    "A state with an experiment, a run with an artifact, and a registered model; and the run's id."
    import mlflow
    state = tmp_path_factory.mktemp("trained") / "state"
    state.mkdir()
    shutil.copy(empty_store, state / "mlflow.db")
    env = env_at(state)
    experiment = registry.experiment_id(env, "late")
    with mlflow.start_run(experiment_id=experiment) as run:
        mlflow.log_text("of the run", "note.txt")
        mlflow.set_tag("automl_trial", str(state / "automl/late/trials/0000"))
        model = mlflow.pyfunc.log_model(name="model", python_model=double, pip_requirements=[],
                                        input_example=[1.0]).model_id
    registry.register_version(env, "dev.flights.late", model, {})
    return state, run.info.run_id


def double(model_input: list[float]) -> list[float]: return [2 * value for value in model_input]


def check_works(state: Path, run_id: str) -> None:
    "Load a version, read an artifact, log to the existing experiment, register a second version."
    import mlflow
    env = env_at(state)
    version = registry.get_version(env, "dev.flights.late", 1)
    assert list(mlflow.pyfunc.load_model(f"models:/{version.name}/{version.version}").predict([1.5])) == [3.0]
    assert mlflow.artifacts.load_text(f"runs:/{run_id}/note.txt") == "of the run"
    with mlflow.start_run(experiment_id=registry.experiment_id(env, "late")) as run:
        mlflow.log_text("later", "later.txt")
        model = mlflow.pyfunc.log_model(name="model", python_model=double, pip_requirements=[], input_example=[1.0])
    assert list(state.glob(f"artifacts/**/{run.info.run_id}/artifacts/later.txt"))
    registry.register_version(env, "dev.flights.late", model.model_id, {})
    assert list(mlflow.pyfunc.load_model("models:/dev.flights.late/2").predict([2.0])) == [4.0]
    experiment = registry.client(env).get_experiment(registry.experiment_id(env, "another"))
    assert Path(unquote(urlsplit(experiment.artifact_location).path)).is_relative_to(state)


@pytest.mark.slow
def test_a_moved_and_a_copied_state_work_without_the_original(trained_state, tmp_path, capsys):
    original, run_id = trained_state
    before, copy, moved = digest(original), tmp_path / "état déplacé #1/100%", tmp_path / "moved"
    shutil.copytree(original, copy)
    check_works(copy, run_id)  # the original exists
    assert digest(original) == before and names(copy / "mlflow.db", original) == 0
    errors = capsys.readouterr().err
    assert errors.count(f"from {original} to {copy}: ") == 1 == errors.count("addresses in its"), errors
    shutil.move(copy, moved)
    hidden = original.rename(original.with_name("hidden"))
    try: check_works(moved, run_id)
    finally: hidden.rename(original)
    assert digest(original) == before


def test_messages_of_runs_show_the_present_path(light_state, tmp_path):
    moved = Path(shutil.move(light_state, tmp_path / "état 2"))
    addresses.use_here(moved)
    store = run_store.RunStore(moved / "runs.db")
    messages = [run_store.get_run(store, 1)["state_message"], progress.task_message(run_store.list_tasks(store, 1)[0])]
    assert messages == [f"ValueError: bad\n  executed copy: {moved}/runs/1/fit/0/notebook.ipynb"] * 2


def test_two_names_of_one_folder_change_nothing(light_state, tmp_path, capsys):
    link, before = tmp_path / "link", digest(light_state)
    link.symlink_to(light_state)
    for name in (link, light_state, link / ".." / light_state.name, link): addresses.use_here(name)
    assert digest(light_state) == before and capsys.readouterr().err == ""
    assert addresses.artifact_folder(link) == light_state / "artifacts", "new addresses have the same name as the old"
    moved = Path(shutil.move(light_state, tmp_path / "moved"))  # the link leads nowhere
    addresses.use_here(moved)
    assert names(moved / "mlflow.db", light_state) == 0


def test_the_store_of_someone_else_is_not_changed(light_state, tmp_path):
    other = shutil.copytree(light_state, tmp_path / "other")
    before = digest(other)
    env_at(tmp_path / "own", tracking=other / "mlflow.db").use_mlflow()
    assert digest(other) == before


def test_a_state_that_cannot_be_written_is_refused(light_state, tmp_path):
    moved = Path(shutil.move(light_state, tmp_path / "moved"))
    (moved / "mlflow.db.lock").unlink(missing_ok=True)
    (moved / "mlflow.db.lock").mkdir()  # root can write in every folder
    before = digest(moved)
    with pytest.raises(MlopsError, match=f"is {moved}, but .* artifacts are in {light_state}, .*\n.*make the folder"):
        registry.client(env_at(moved))
    assert digest(moved) == before


USE = "import sys; from pathlib import Path; from mlops_nb import addresses; addresses.use_here(Path(sys.argv[1]))"


def test_processes_that_open_a_moved_state_together_change_it_once(light_state, tmp_path):
    moved = Path(shutil.move(light_state, tmp_path / "moved"))
    processes = [subprocess.Popen([sys.executable, "-c", USE, moved], stderr=subprocess.PIPE, text=True)
                 for _ in range(4)]
    errors = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * 4 and "".join(errors).count("\n") == 1, errors
    assert names(moved / "mlflow.db", light_state) == 0 and names(moved / "mlflow.db", moved) == 31


def is_ordinary(part: str) -> bool:
    "Whether a part of a path ends with neither a space nor a quote, after which a text can have another path."
    return part not in (".", "..") and part[-1] not in " '"


PARTS = st.text(st.sampled_from("ab é%.-#'"), min_size=1, max_size=3).filter(is_ordinary)
FOLDERS = st.lists(PARTS, min_size=1, max_size=3).map(lambda parts: Path("/", *parts))


@settings(max_examples=50)
@given(FOLDERS, FOLDERS, FOLDERS, st.booleans())
@example(Path("/a"), Path("/a/b"), Path("/a/b/b"), True)  # the new folder is below the old one
@example(Path("/a"), Path("/b"), Path("/aa"), False)
@example(Path("/home/o'neill/state"), Path("/b"), Path("/a"), True)
@example(Path("/a'a"), Path("/a"), Path("/a"), True)  # the new folder, a quote, and the rest of the old name
def test_an_address_below_the_old_folder_names_the_new_one(old, new, address, is_below):
    assume(old != new)
    if is_below: address = old / address.relative_to("/")
    expected = address
    if address.is_relative_to(old) and not address.is_relative_to(new): expected = new / address.relative_to(old)
    moved = addresses.mover(old, new)
    assert moved(str(address)) == str(expected)
    assert moved(address.as_uri()) == expected.as_uri()
    assert moved(f"mlflow at {address.as_uri()}") == f"mlflow at {expected.as_uri()}"


KILL = """
import json, os, signal, sqlite3, sys, time
from pathlib import Path
from mlops_nb import addresses

class Killing(sqlite3.Connection):
    "Counts the statements that write, and kills its process after the step-th, or before it if the step is negative."
    count, step = 0, 0
    def execute(self, statement, *values):
        if not statement.startswith(("begin", "update", "commit")): return super().execute(statement, *values)
        Killing.count += 1
        if Killing.count == -Killing.step: os.kill(os.getpid(), signal.SIGKILL)
        result = super().execute(statement, *values)
        if Killing.count == Killing.step: os.kill(os.getpid(), signal.SIGKILL)
        return result

def connect(file): return sqlite3.connect(file, timeout=30, isolation_level=None, factory=Killing)

def move(state, step, seconds):
    process = os.fork()
    if not process:
        Killing.step, addresses.connect_existing = step, connect if step else addresses.connect_existing
        addresses.use_here(Path(state))
        os._exit(0)
    if seconds:
        time.sleep(seconds)
        os.kill(process, signal.SIGKILL)
    return os.waitpid(process, 0)[1]

if len(sys.argv) > 2:
    addresses.connect_existing = connect
    addresses.use_here(Path(sys.argv[2]))
    print(Killing.count)
else: print(json.dumps([move(*kill) for kill in json.loads(sys.argv[1])]))
"""


def moved_copies(state: Path, folder: Path, count: int) -> list[Path]:
    "Copies of a state that nothing has opened at their new places."
    return [shutil.copytree(state, folder / f"copy {number}") for number in range(count)]


def check_kills(kills: list[tuple[Path, int, float]], original: Path) -> list[int]:
    "Kill one process for each copy; each has the old or the new addresses then, and works later. Return the signals."
    arguments = json.dumps([(str(state), step, seconds) for state, step, seconds in kills])
    process = subprocess.run([sys.executable, "-c", KILL, arguments], capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr
    for state, *step in kills:
        count = names(state / "mlflow.db", original), names(state / "mlflow.db", state)
        assert count in ((31, 0), (0, 31)), step
        addresses.use_here(state)
        for file, known in ((state / "mlflow.db", 31), (state / "runs.db", 2)):
            assert (names(file, original), names(file, state)) == (0, known), (step, file)
            with closing(sqlite3.connect(file)) as store:
                assert store.execute("pragma integrity_check").fetchone() == ("ok",)
    return json.loads(process.stdout.splitlines()[-1])


def test_a_killed_change_leaves_the_old_or_the_new_addresses(light_state, tmp_path):
    kills = [(copy, step, 0) for copy, step in zip(moved_copies(light_state, tmp_path, 2), (40, 300), strict=True)]
    assert check_kills(kills, light_state) == [signal.SIGKILL] * 2


@pytest.mark.slow
def test_no_step_of_a_change_can_be_killed_with_a_mixed_result(light_state, tmp_path):
    first, *copies = moved_copies(light_state, tmp_path, 41)
    counted = subprocess.run([sys.executable, "-c", KILL, "[]", first], capture_output=True, text=True, timeout=60)
    last = int(counted.stdout)
    steps = [1, 2, last - 1, last, *range(3, last, last // 12)]  # begin and commit of both files, and between
    steps = [step * sign for step in steps for sign in (1, -1)][:30]
    kills = [(copy, step, 0) for copy, step in zip(copies, steps, strict=False)]
    assert check_kills(kills, light_state) == [signal.SIGKILL] * len(steps) and len(steps) >= 20
    rest = copies[len(steps):]  # at a time instead of a step: also within a commit
    kills = [(copy, 0, 0.01 + 0.006 * number) for number, copy in enumerate(rest)]
    assert signal.SIGKILL in check_kills(kills, light_state)
