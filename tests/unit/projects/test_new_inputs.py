"""Tables of strangers: each gives a project whose declarations can be run, or one message with what to do."""
import os
import pty
import select
import signal
import sys
import time
from datetime import date

import numpy as np
import pandas as pd
import pytest

from mlops_nb.documentation.links import SECTION, section_of
from mlops_nb.errors import MlopsError
from mlops_nb.projects.data_files import Dialect, read_data
from mlops_nb.projects.new_project import Options, check_is_new, plan_project
from mlops_nb.projects.project_values import cell_code, settings
from mlops_nb.projects.rendering import render_project, template_folder


def shop(rows: int = 400) -> pd.DataFrame:
    "Made-up rows with a key, a number, a category and a boolean label that follows the number."
    rng = np.random.default_rng(4)
    size = rng.normal(size=rows)
    return pd.DataFrame({"id": range(rows), "size": size, "color": rng.choice(list("abc"), rows),
                         "sold": size + rng.normal(size=rows) > 0})


def planned(folder, frame: pd.DataFrame, name: str = "shop", file: str = "rows.parquet", **options):
    "The project of a frame that was written to a file."
    path = folder / file
    frame.to_parquet(path, index=False) if file.endswith("parquet") else frame.to_csv(path, index=False)
    given = {"label": "sold", "key": ("id",)} | options
    return plan_project(folder / name, Options(str(path), **given), read_data(path, Dialect()), date(2025, 1, 2), "1.0")


def declared(project) -> dict:
    "The names that the generated declarations define when they are executed."
    code, names = cell_code(project), {}
    for tag in ("imports", "source", "use-case"): exec(code[tag], names)
    return names


TABLES = {
    "spaces, umlauts, SQL words": (shop().rename(columns={"size": "Größe  in cm", "color": "group by"}).assign(
        **{f"a column with a long name {n}": n * np.arange(400.0) % 7 for n in range(2, 9)}, order=1.5 * np.arange(400)
        % 11, **{"it's": np.arange(400.0) % 13}), {}),
    "nanoseconds and categories": (shop().assign(
        asked=pd.date_range("2024-01-01", periods=400, freq="5h"),
        color=lambda frame: frame.color.astype("category")), {"time": "asked"}),
    "names that stores and pandas reserve": (shop().rename(columns={"size": "size__", "color": "self"}).assign(
        group__=np.arange(400.0) % 7), {}),
    "0 and 1": (shop().assign(sold=lambda frame: frame.sold.astype(int)), {}),
    "text label": (shop().assign(sold=lambda frame: np.where(frame.sold, "yes", "no")), {}),
    "nullable label": (shop().assign(sold=lambda frame: frame.sold.astype("boolean").mask(frame.id % 9 == 0)), {}),
    "two key columns": (shop().assign(shop=lambda frame: frame.id // 10, item=lambda frame: frame.id % 10)
                        .drop(columns="id"), {"key": ("shop, item",)}),
    "text key": (shop().assign(id=lambda frame: [f"c-{number}" for number in frame.id]), {}),
    "names of the project's columns": (shop().assign(day=1.0 * np.arange(400) % 5, prediction=np.arange(400.0) % 3,
                                                     rows=np.arange(400.0) % 17), {}),
    "200 rows": (shop(200), {}),
    "long names": (shop().rename(columns={"id": "number_of_the_order_in_the_shop",
                                           "sold": "was_sold_in_the_first_month"})
                   .assign(day_on_which_the_offer_was_made=pd.date_range("2024-01-01", periods=400, freq="5h")),
                   {"key": ("number_of_the_order_in_the_shop",), "label": "was_sold_in_the_first_month",
                    "time": "day_on_which_the_offer_was_made"}),
    "number as label": (shop(), {"label": "size"}),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_gives_declarations_and_files(tmp_path, name):
    frame, options = TABLES[name]
    project = planned(tmp_path, frame, **options)
    names = declared(project)
    source, use_case = names["SOURCE"], names["USE_CASE"]
    assert {source.names.get(column, column) for column in source.columns} <= set(frame.columns)
    assert use_case.problem.name == ("regression" if options.get("label") == "size" else "binary")
    assert use_case.has_time == ("time" in options)
    files = render_project(template_folder(), settings(project))
    modules = [text for path, text in files.items() if str(path).endswith("use_case.py")]
    assert len(modules) == 1 and compile(modules[0], "use_case.py", "exec")
    assert max(map(len, modules[0].splitlines())) <= 120, "the project's own check refuses longer lines"


def test_a_project_builds_its_pages_by_the_settings_of_the_platform(tmp_path):
    "docs/conf.py is executed as Sphinx does it; docs/index.md shows the README, below its heading."
    rendered = render_project(template_folder(), settings(planned(tmp_path, shop())))
    files = {path.as_posix(): text for path, text in rendered.items()}
    names = {"__file__": str(tmp_path / "shop/docs/conf.py")}
    exec(files["docs/conf.py"], names)
    assert names["project"] == "shop" and names["html_theme"] == "furo" and callable(names["setup"])
    (tmp_path / "README.md").write_text(files["README.md"])
    path, anchor = SECTION.search(files["docs/index.md"]).groups()
    assert path == "../README.md" and "## What to edit next" in section_of(tmp_path / "README.md", anchor)
    assert "docs/pages/" in files[".gitignore"].splitlines() and "\ndocs: $(VENV)/.docs" in files["Makefile"]


def test_columns_with_spaces_keep_their_names(tmp_path):
    names = declared(planned(tmp_path, TABLES["spaces, umlauts, SQL words"][0]))
    assert names["SOURCE"].names["groesse_in_cm"] == "Größe  in cm"


@pytest.mark.parametrize(("change", "options", "message"), [
    ({"id": lambda frame: frame.id // 2}, {}, "--key id is not unique"),
    ({"id": lambda frame: frame.id.astype("Int64").mask(frame.id == 3)}, {}, "--key id is empty in 1 of 400 rows"),
    ({"sold": lambda frame: frame.id % 3}, {"problem": "binary"}, "has 3 values"),
    ({"size": 1.0, "color": "a"}, {}, "no column becomes a feature"),
    ({"asked": "01.02.2024 10:00"}, {"time": "asked"}, "holds no times"),
    ({}, {"label": "sould"}, "did you mean 'sold'"),
    ({}, {"key": ("id,x",)}, "no column 'x'"),
    ({}, {"problem": "multi"}, "no problem type 'multi'"),
])
def test_a_table_that_does_not_fit_is_refused(tmp_path, change, options, message):
    with pytest.raises(MlopsError) as error: planned(tmp_path, shop().assign(**change), **options)
    assert message in str(error.value)
    assert not (tmp_path / "shop").exists()


def test_ten_rows_are_refused(tmp_path):
    with pytest.raises(MlopsError, match="10 rows have a label"): planned(tmp_path, shop(10))


def test_a_folder_with_files_is_refused(tmp_path):
    with pytest.raises(MlopsError, match="is not empty"):
        (tmp_path / "note.txt").write_text("keep")
        check_is_new(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    for other in (tmp_path / "link", tmp_path / "note.txt"):
        with pytest.raises(MlopsError, match="is a (link|file)"): check_is_new(other)
    for name in ("2nd", "class", "json", "pandas", "nbs", "data"):
        with pytest.raises(MlopsError): planned(tmp_path, shop(), name=name)


def on_terminal(folder, arguments: list[str], answers: list[bytes]) -> tuple[str, int]:
    "The output and the exit code of a command that a person runs; an answer follows each prompt."
    process, terminal = pty.fork()
    if not process:
        os.chdir(folder)
        os.execv(sys.executable, [sys.executable, "-c", "from mlops_nb.cli import main; main()", *arguments])
    text, begin, waiting = "", time.monotonic(), list(answers)
    while time.monotonic() - begin < 90:
        if not select.select([terminal], [], [], 1)[0]: continue
        try: piece = os.read(terminal, 4096)
        except OSError: break  # the command has ended
        text += piece.decode(errors="replace")
        if waiting and text.count("a number or a name") > len(answers) - len(waiting):
            time.sleep(0.3)
            os.write(terminal, waiting.pop(0))
    else: os.kill(process, signal.SIGKILL)
    return text, os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


@pytest.mark.slow
def test_a_person_is_asked_and_control_c_leaves_nothing(tmp_path):
    shop().to_csv(tmp_path / "rows.csv", index=False)
    text, code = on_terminal(tmp_path, ["new", "store", "--data", "rows.csv"], [b"sold\n", b"\x03"])
    assert "Which column is predicted?" in text and "Which column identifies a row?" in text
    assert code != 0 and "Traceback" not in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.csv"]


@pytest.mark.slow  # builds the wheel of the platform
def test_answers_make_the_project(tmp_path):
    shop().to_csv(tmp_path / "rows.csv", index=False)
    text, code = on_terminal(tmp_path, ["new", "store", "--data", "rows.csv"], [b"sold\n", b"1\n"])
    assert code == 0, text
    assert "key=('id',)" in (tmp_path / "store/store/use_case.py").read_text()
