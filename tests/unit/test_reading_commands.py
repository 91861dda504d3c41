"""Commands that only read, and commands that are refused, create nothing; mistakes in numbers are sentences."""
import os
from pathlib import Path

import pytest
from sizes import thinned
from typer.testing import CliRunner

from mlops_nb.commands.app import app
from mlops_nb.errors import MlopsError

pytestmark = pytest.mark.usefixtures("no_settings")
ROOT = Path(__file__).parents[2]
READING = [
    "runs", "runs show 1", "runs open 1", "runs cancel 1", "repair 1", "jobs", "jobs show train", "validate", "doctor",
    "models show a@champion", "models history a", "models compare a/1 b/2", "models copy dev.flights.a/1 -t prod",
    "models reproduce a/1",
    "models link a", "models serve a", "models serve a --remove", "grants -t prod",
    "rollback a --reason x", "approve a 1 --as Ann", "clean --keep 3d", "clean --keep 3d --yes",
    "ui", "down", "endpoints", "query a -d []", "run nojob", "run features -p nope=1", "run features --only nope"]


@pytest.mark.parametrize(("words",), thinned((words,) for words in READING))
def test_nothing_is_created(words, tmp_path, monkeypatch):
    monkeypatch.setenv("MLOPS_STATE", str(tmp_path / "state"))
    monkeypatch.chdir(ROOT)
    before = set(os.listdir(ROOT))
    result = CliRunner().invoke(app, words.split())
    assert result.exception is None or isinstance(result.exception, MlopsError | SystemExit), result.exception
    assert list(tmp_path.iterdir()) == [] and set(os.listdir(ROOT)) == before


@pytest.mark.parametrize("words", ["runs show abc", "runs open 1.5", "runs cancel x", "repair abc"])
def test_a_run_that_is_no_number_is_a_sentence(words):
    error = CliRunner().invoke(app, words.split()).exception
    assert isinstance(error, MlopsError) and "is not the number of a run" in error.message
