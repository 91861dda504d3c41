"""A replay ends with the same tables, killed or not, day by day or in steps; also on flights, with the command."""
import pickle
import signal
import subprocess
import sys
import time
from datetime import date, timedelta
from pathlib import Path

import generated
import numpy as np
import pandas as pd
import pytest
import small_use_cases as small
from deltalake import DeltaTable
from killed_replay import comparable
from sizes import by_size
from states import MLOPS, ROOT, environment

pytestmark = pytest.mark.slow
KILLS = by_size([3, 22, 35, 49, 27, 12, 40], [3, 49, 40])  # writes of each process; a day has about 15 before and after


def replayed(folder: Path, days_together: int, *kills: int) -> tuple[dict[str, pd.DataFrame], str]:
    "The tables after a replay in processes that are killed after so many writes, and what it printed."
    folder.mkdir()
    command = [sys.executable, Path(__file__).parent / "killed_replay.py", folder, *map(str, (days_together, *kills))]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    return pickle.loads((folder / "tables.pickle").read_bytes()), result.stdout


def assert_same(actual: dict[str, pd.DataFrame], expected: dict[str, pd.DataFrame]) -> None:
    assert actual.keys() == expected.keys()
    for name in expected: pd.testing.assert_frame_equal(actual[name], expected[name], obj=name, rtol=1e-9)


def test_a_killed_replay_ends_with_the_tables_of_one_that_was_not(tmp_path):
    expected, printed = replayed(tmp_path / "once", 7)
    day_by_day, _ = replayed(tmp_path / "day_by_day", 1, *KILLS)
    assert_same(day_by_day, expected)
    log = expected["dev.flights.replay_log"].set_index("day")
    assert list(log.champion_version) == ["1"] * 2 + ["2"] * 9
    retrainings = expected["dev.flights.retraining_log"].sort_values("number")
    assert list(retrainings.decision) == ["train", "train", "hold", "train", "hold"]
    assert list(retrainings.outcome[retrainings.decision == "train"]) == ["promoted", "promoted", "refused"]
    assert "3 trainings: 2 promoted, 1 refused, 2 causes held back (2 by cooldown)" in printed

    rows = expected["rows of the report"]  # against the formulas: v2 predicts one minute more than v1
    frame = small.deliveries()
    scored = frame[(frame.delivery_day >= date(2021, 3, 20)) & (frame.delivery_day <= date(2021, 3, 30))]
    known = scored[scored.delivered_at < pd.Timestamp("2021-03-31", tz="UTC")]
    assert len(rows) == len(known) < len(scored)
    assert np.allclose(np.sort(rows.frozen), np.sort(20 + 3 * known.distance))
    assert np.allclose(rows.loop - rows.frozen, rows.version - 1)
    loop = np.sqrt(np.mean((rows.label - rows.loop) ** 2))
    assert f"root mean squared error {loop:.4f}" in printed


FIRST = date(2013, 4, 1)
DAYS, EVERY = by_size((40, 10), (8, 4))


def flight_tables(state: Path) -> dict[str, pd.DataFrame]:
    "The tables of prod, by name."
    folders = [log.parent for log in (state / "lakehouse/prod/flights").glob("*/_delta_log")]
    frames = {folder.name: DeltaTable(folder).to_pyarrow_table().to_pandas() for folder in folders}
    log = frames["deployment_log"]
    log["decision"] = log.decision.str.replace(r"run `\w{32}`", "run", regex=True)  # of MLflow, in the model card
    return {name: comparable(frame) for name, frame in frames.items()}


def replayed_days(state: Path) -> int:
    try: return DeltaTable(state / "lakehouse/prod/flights/replay_log").to_pyarrow_table().num_rows
    except Exception: return 0  # not written yet


def replay_flights(state: Path, step: int, kill_at: int | None) -> None:
    "Replay days with the command; it is killed a moment after so many of them."
    command = [MLOPS, "demo", "--year", "--to", str(FIRST + timedelta(days=DAYS - 1)), "--step", str(step)]
    process = subprocess.Popen(command, cwd=ROOT, env=environment(state), stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True)
    while kill_at and process.poll() is None and replayed_days(state) < kill_at: time.sleep(0.2)
    if kill_at:
        time.sleep(1)  # into the next day
        process.send_signal(signal.SIGKILL)
    output = process.communicate(timeout=3000)[0]
    assert process.returncode == (-signal.SIGKILL if kill_at else 0), output


@pytest.mark.full
def test_a_killed_replay_of_flights_ends_with_the_tables_of_one_that_was_not(tmp_path):
    replay_flights(tmp_path / "once", 7, None)
    for kill_at in range(EVERY, DAYS, EVERY): replay_flights(tmp_path / "killed", 1, kill_at)
    replay_flights(tmp_path / "killed", 1, None)
    assert_same(flight_tables(tmp_path / "killed"), flight_tables(tmp_path / "once"))


@pytest.mark.full
def test_a_new_project_replays_days_without_rows_and_reports_on_them(tmp_path, monkeypatch):
    frame = generated.made_up("regression", True)
    frame = frame[~frame.ordered_at.between("2021-06-20", "2021-06-30")]
    project = generated.write(tmp_path / "orders", frame, monkeypatch)
    generated.commit(project)
    printed = generated.run_in(project, "mlops", "demo", "--year", "--from", "2021-06-16", "--to", "2021-07-01")
    assert "v1 as of 2021-06-16 was promoted" in printed and "held back: cooldown" in printed
    assert "No Challenger has replaced v1, so the loop is the frozen model: 2021-06-16 to 2021-07-01" in printed
    log = DeltaTable(project / ".mlops/lakehouse/prod/orders/replay_log").to_pyarrow_table().to_pandas()
    assert list(log.set_index("day").sort_index()["rows"]) == [6] * 4 + [0] * 10 + [6] * 2

    def report(*words, code=0):
        return generated.run_in(project, "mlops", "run", "year", "-t", "prod", *words, code=code)
    assert "2021-06-16 to 2021-07-01, 36 labelled rows" in report("-p", "as_of=latest")
    assert "Nothing to compare: 0 rows of 2021-06-21 to 2021-06-27 were scored" in report(
        "-p", "first_day=2021-06-21", "-p", "as_of=2021-06-28")
    assert "the replayed days are 2021-06-16 to 2021-07-01" in report("-p", "as_of=2021-06-16", code=1)
