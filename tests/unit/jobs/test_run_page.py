"""The page of a run, from a real run store and real executed notebooks."""
from html.parser import HTMLParser

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from mlops_nb.errors import MlopsError
from mlops_nb.jobs import run_page
from mlops_nb.jobs.run_store import RunStore, insert, update_run


class Folded(HTMLParser):
    "Collect the text of a page: visible at once, or inside a closed <details>."

    def __init__(self):
        super().__init__()
        self.depth, self.visible, self.hidden = 0, [], []

    def handle_starttag(self, tag, attributes):
        if tag == "details" and "open" not in dict(attributes): self.depth += 1

    def handle_endtag(self, tag):
        if tag == "details": self.depth -= 1

    def handle_data(self, data): (self.hidden if self.depth else self.visible).append(data)


def texts(page: str) -> tuple[str, str]:  # what a reader sees at once, and what is folded
    parser = Folded()
    parser.feed(page)
    assert parser.depth == 0, "every <details> is closed"
    return "".join(parser.visible), "".join(parser.hidden)


def notebook(title: str, result: str, **options):
    shown = new_output("display_data", {"text/plain": result})
    warning = new_output("stream", name="stderr", text="a library's warning\n")
    return new_notebook(cells=[
        new_markdown_cell(f"# {title}"), new_code_cell(f"def {title}(): return 'secret of {title}'"),
        new_markdown_cell(f"## Run\n\nPurpose of {title}."), new_code_cell("target = 'dev'"),
        new_code_cell(f"{title}()", outputs=[warning, shown], **options)])


@pytest.fixture
def store(tmp_path):
    "A store with run 1 (train, then a failed deploy in a called run 2), and their notebooks."
    store = RunStore(tmp_path / "runs.db")
    with store.connect() as connection:
        insert(connection, "runs", run_row("train", "FAILED", parameters='{"as_of": "2013-04-01"}'))
        insert(connection, "runs", run_row("deploy", "FAILED", parent_run_id=1))
        insert(connection, "tasks", task_row(1, "train", "FAILED"))
        insert(connection, "tasks", task_row(1, "train", "SUCCESS", attempt_number=1, exit_value="loss <0.46>"))
        insert(connection, "tasks", task_row(1, "deploy", "FAILED", child_run_id=2, start_time=4000))
        insert(connection, "tasks", task_row(2, "validate", "FAILED", state_message="no such table"))
    notebooks = {"1/train/0": notebook("train", "an old attempt"), "1/train/1": notebook("train", "log loss 0.46"),
                 "2/validate/0": failed_notebook()}
    for path, content in notebooks.items():
        (tmp_path / path).mkdir(parents=True)
        nbformat.write(content, tmp_path / path / "notebook.ipynb")
    return store


def run_row(job: str, result: str, **values) -> dict:
    return {"job": job, "target": "dev", "parameters": "{}", "variables": "{}", "trigger_type": "ONE_TIME",
            "trigger_time": 0, "start_time": 1000, "end_time": 9000, "life_cycle_state": "TERMINATED",
            "result_state": result} | values


def task_row(run_id: int, task_key: str, result: str, **values) -> dict:
    return {"run_id": run_id, "task_key": task_key, "attempt_number": 0, "start_time": 1000, "end_time": 3500,
            "life_cycle_state": "TERMINATED", "result_state": result} | values


def failed_notebook():
    failed = notebook("validate", "never reached")
    error = new_output("error", ename="MlopsError", evalue="no such table", traceback=["no such table t"])
    failed.cells[1].outputs = [error]
    banner = new_markdown_cell("<span>An Exception was encountered at In [2].</span>")
    banner.metadata.tags = ["papermill-error-cell-tag"]
    failed.cells.insert(0, banner)
    failed.cells[-1].outputs = []
    return failed


def test_results_come_first_and_code_is_folded(store, tmp_path):
    visible, hidden = texts(run_page.run_page(store, tmp_path, 1))
    parts = ("Run 1: train, target dev", "log loss 0.46", "Definitions and examples")
    places = [visible.index(part) for part in parts]
    assert places == sorted(places)
    assert "as_of=2013-04-01" in visible and "loss <0.46>" in visible and "Purpose of train." in visible
    assert "an old attempt" not in visible + hidden, "only the latest attempt is shown"
    assert "secret of train" in hidden and "secret of train" not in visible
    assert "a library's warning" in hidden and "a library's warning" not in visible


def test_a_failed_cell_of_a_called_run_is_visible(store, tmp_path):
    visible, _ = texts(run_page.run_page(store, tmp_path, 1))
    assert "deploy › validate: FAILED" in visible and "no such table t" in visible and "never reached" not in visible
    assert "An Exception was encountered" not in visible, "papermill's banner gives way to the task's message"


def test_the_message_of_a_task_is_shown_once_in_its_section(store, tmp_path):
    path = tmp_path / "1/train/1/notebook.ipynb"
    content = nbformat.read(path, 4)
    content.cells[-1].outputs.append(new_output("stream", name="stdout", text="loss <0.46>\n"))
    nbformat.write(content, path)
    visible, _ = texts(run_page.run_page(store, tmp_path, 1))
    assert visible.count("loss <0.46>") == 2, "in the table of the tasks, and on top of the section"


def test_a_long_parameter_and_a_long_job_key_are_cut(store, tmp_path):
    update_run(store, 1, job="j" * 300, parameters='{"days": "%s"}' % ("<" * 100_000))
    page = run_page.run_page(store, tmp_path, 1)
    assert "days=" + 200 * "&lt;" + "… (100,000 characters)" in page and 201 * "&lt;" not in page
    assert page.count("Run 1: " + 200 * "j" + "… (300 characters), target dev") == 2


def test_the_page_needs_no_other_file(store, tmp_path):
    page = run_page.run_page(store, tmp_path, 1)
    assert "<script" not in page and "http://" not in page and "https://" not in page


def test_the_page_is_replaced_in_one_step(store, tmp_path):
    first = run_page.write_run_page(store, tmp_path, 1)
    with open(first) as old:
        nbformat.write(notebook("train", "log loss 0.40"), tmp_path / "1/train/1/notebook.ipynb")
        assert run_page.write_run_page(store, tmp_path, 1) == first == tmp_path / "1/page.html"
        assert "log loss 0.46" in old.read(), "a reader keeps the whole old page"
    assert "log loss 0.40" in first.read_text() and "log loss 0.46" not in first.read_text()
    assert [path.name for path in first.parent.iterdir() if path.is_file()] == ["page.html"]


def test_a_run_without_notebooks_is_an_error(store, tmp_path):
    (tmp_path / "1/train/1/notebook.ipynb").unlink(), (tmp_path / "2/validate/0/notebook.ipynb").unlink()
    with pytest.raises(MlopsError, match="run 1 has no executed notebook"): run_page.write_run_page(store, tmp_path, 1)
    with pytest.raises(MlopsError, match="no run '7'"): run_page.run_page(store, tmp_path, 7)


def test_a_notebook_that_was_cut_off_hides_no_other_result(store, tmp_path):
    path = tmp_path / "1/train/1/notebook.ipynb"
    path.write_text('{"cells": [')
    visible, _ = texts(run_page.run_page(store, tmp_path, 1))
    assert f"The executed notebook {path} cannot be read" in visible and "no such table t" in visible


def test_the_tasks_of_a_killed_run_have_its_state(store, tmp_path):
    with store.connect() as connection:
        connection.execute("update runs set life_cycle_state = 'RUNNING', result_state = null, owner = null "
                           "where run_id = 1")
        connection.execute("update tasks set life_cycle_state = 'RUNNING', result_state = null where run_id = 1")
    visible, _ = texts(run_page.run_page(store, tmp_path, 1))
    assert "RUNNING" not in visible and "train: INTERNAL_ERROR" in visible


def test_no_browser_without_a_display(monkeypatch, tmp_path):
    for name in ("DISPLAY", "WAYLAND_DISPLAY"): monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("sys.platform", "linux")
    assert run_page.open_in_browser(tmp_path / "page.html") is False


def test_the_command_prints_the_path(project, monkeypatch, tmp_path):
    from typer.testing import CliRunner

    from mlops_nb import cli
    monkeypatch.chdir(project.root)
    for name in ("DISPLAY", "WAYLAND_DISPLAY"): monkeypatch.delenv(name, raising=False)
    store = project.home().store
    with store.connect() as connection:
        insert(connection, "runs", run_row("a", "SUCCESS"))
        insert(connection, "tasks", task_row(1, "t", "SUCCESS"))
    folder = project.path(".mlops/runs/1/t/0/notebook.ipynb")
    nbformat.write(notebook("train", "log loss 0.46"), folder)
    result = CliRunner().invoke(cli.app, ["runs", "open", "1"], catch_exceptions=False)
    page = project.root / ".mlops/runs/1/page.html"
    assert result.output.strip() == str(page) and "log loss 0.46" in page.read_text()
