"""Tables of runs on terminals of any width: no line of a table is longer than the width, and no text is lost."""
import io
import json

import pytest
from rich.console import Console

from mlops_nb.jobs import advice, progress, run_store

PATH = "/home/somebody/projects/a-project/.mlops/runs/12/train/0/notebook.ipynb"
LONG = "log loss 0.4645 against 0.5447 of the baseline on 25,213 rows, which is 14.7% better, and 0.5% better is asked"
ERROR = f"no table 'x' in dev.flights\n  there is only y\n  executed copy: {PATH}"


@pytest.fixture
def store(tmp_path):
    "One run: a task with a long message, one whose message has a path, one that failed."
    store = run_store.RunStore(tmp_path / "runs.db")
    job, parameters = "a_job_with_a_name_that_is_rather_long", {"as_of": "2013-04-01"}
    run_id = run_store.record_run(store, job, "dev", parameters, ["deploy", "publish", "train_with_a_long_name"])
    tasks = [("deploy", "SUCCESS", {"exit_value": LONG}),
             ("publish", "SUCCESS", {"exit_value": f"written to {PATH}"}),
             ("train_with_a_long_name", "FAILED", {"state_message": ERROR})]
    for key, result, message in tasks:
        run_store.save_task(store, run_id, key, 0, life_cycle_state="TERMINATED", result_state=result,
                            start_time=1_000, end_time=5_200, **message)
    run_store.update_run(store, run_id, life_cycle_state="TERMINATED", result_state="SUCCESS_WITH_FAILURES",
                         state_message=f"task 'train': {ERROR}")
    return store


def printed_lines(table, width: int) -> list[str]:
    text = io.StringIO()
    Console(file=text, width=width).print(table, highlight=False, soft_wrap=True)
    return text.getvalue().splitlines()


@pytest.mark.parametrize("width", [60, 80, 200])
def test_a_run_is_readable(store, width):
    lines = printed_lines(progress.run_table(store, 1), width)
    table = lines[1:next(i for i, line in enumerate(lines) if line.startswith("job"))]
    assert all(len(line) <= width for line in table) and not any("…" in line for line in lines)
    start = table[0].index("message")
    cells = " ".join(line[start:].strip() for line in table[1:])
    assert LONG in cells and cells.count("see below") == 2
    assert f"written to {PATH}" in lines and "\n".join(lines).count(ERROR) == 1


@pytest.mark.parametrize("width", [80, 200])
def test_runs_are_readable_with_the_reason_of_a_failure(store, width):
    lines = printed_lines(progress.runs_table(run_store.list_runs(store, None, 9)), width)
    assert all(len(line) <= width for line in lines) and not any("…" in line for line in lines)
    assert lines[1].split()[-1] == "SUCCESS_WITH_FAILURES"
    assert lines[-1] == "run 1: task 'train': no table 'x' in dev.flights"


def test_a_narrow_terminal_folds_the_name_of_the_job(store):
    lines = printed_lines(progress.runs_table(run_store.list_runs(store, None, 9)), 70)
    assert len(lines[1]) <= 70 and "SUCCESS_WITH_FAILURES" in lines[1] and "dev" in lines[1]


def test_every_task_names_its_executed_notebook_also_in_a_called_job(store, tmp_path):
    child = run_store.record_run(store, "b", "dev", {}, ["fit"], parent_run_id=1)
    run_store.save_task(store, 1, "deploy", 0, child_run_id=child)
    run_store.save_task(store, child, "fit", 0, life_cycle_state="TERMINATED", result_state="SUCCESS", start_time=2_000)
    files = [tmp_path / "runs" / name / "notebook.ipynb" for name in ("1/publish/0", f"{child}/fit/0")]
    for file in files:
        file.parent.mkdir(parents=True)
        file.touch()
    lines = printed_lines(progress.where_to_look(store, run_store.get_run(store, 1)), 60)
    assert [line.split() for line in lines if str(tmp_path) in line] == [
        ["deploy", "›", "fit", str(files[1])], ["publish", str(files[0])]]


def test_a_waiting_run_shows_its_command_and_advises_no_repair_of_a_cause(store):
    message = "task 'approval_check': m v2 waits for approval\n  look at it: x\n  approve it: mlops approve m 2"
    run_store.update_run(store, 1, result_state="WAITING", state_message=message)
    lines = printed_lines(progress.runs_table(run_store.list_runs(store, None, 9)), 80)
    assert lines[-2:] == ["run 1: task 'approval_check': m v2 waits for approval", "  approve it: mlops approve m 2"]
    assert advice.next_steps(store, run_store.get_run(store, 1)) == ["approved elsewhere?      mlops repair 1"]


def test_a_repair_is_advised_only_where_repeating_can_help(store, tmp_path):
    def steps(error="", message="", **columns):
        run_store.update_run(store, 1, result_state="FAILED", **columns)
        run_store.save_task(store, 1, "train_with_a_long_name", 0, state_message=message)
        folder = run_store.folder_of_attempt(tmp_path / "runs/1", "train_with_a_long_name", 0)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "outcome.json").write_text(json.dumps({"error_name": error}))
        return "\n".join(advice.next_steps(store, run_store.get_run(store, 1)))

    assert "mlops repair 1" in steps("KeyError") and "mlops repair 1" in steps("MlopsError", "mlops run train")
    assert steps("ParameterError").endswith("mlops run a_job_with_a_name_that_is_rather_long -t dev -p name=value")
    missing = steps("MissingError", "no table 'a.b.c'\n  create the tables: mlops run features -t dev")
    assert "run first                mlops run features -t dev" in missing and "repair" not in missing
    assert steps("KeyError", tasks="[]") == ""
