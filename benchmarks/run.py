"""All benchmarks, each compared with a peer or a limit: `make bench`, or `python benchmarks/run.py demo`."""
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import automl
import day
import fast_model
import monitoring
import nbformat
import online_experiments
import online_store
import point_in_time
import psutil
import serving
import yaml
from comparison_table import comparison_table
from rich.console import Console

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
console = Console()


def timed(*command, folder, **variables) -> float:
    "Return the seconds that a command takes; exit with its output if it fails."
    began = time.perf_counter()
    words = list(map(str, command))
    process = subprocess.run(words, cwd=folder, capture_output=True, text=True, env=os.environ | variables)
    if process.returncode: sys.exit(f"{' '.join(words)} failed:\n{process.stdout}{process.stderr}")
    return time.perf_counter() - began


def in_turn(rounds: int, *measures) -> list[float]:
    "Return the median of each measure; they run in turn, so that a slow period of the machine affects all of them."
    for measure in measures: measure()  # the first round fills caches and is not counted
    durations = [[measure() for measure in measures] for _ in range(rounds)]
    return [statistics.median(column) for column in zip(*durations, strict=True)]


def chain_project(folder: Path, length: int) -> Path:
    "Create a bundle with a job that runs empty notebooks one after the other."
    (folder / "resources").mkdir(parents=True)
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("import time; print(time.time())")])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, folder / "empty.ipynb")
    tasks = [{"task_key": f"t{i}", "notebook_task": {"notebook_path": "../empty.ipynb"},
              "depends_on": [{"task_key": f"t{i - 1}"}] if i else []} for i in range(length)]
    resources = {"resources": {"jobs": {"chain": {"name": "chain", "tasks": tasks}}}}
    (folder / "resources/chain.yml").write_text(yaml.safe_dump(resources))
    (folder / "databricks.yml").write_text(yaml.safe_dump({
        "bundle": {"name": "chain"}, "include": ["resources/*.yml"], "targets": {"dev": {"default": True}},
        "variables": {"catalog": {"default": "dev"}, "schema": {"default": "s"}}}))
    return folder


def runner_overhead(folder: Path) -> list[tuple]:
    "Compare four empty notebooks in the runner with papermill's own command."
    project = chain_project(folder / "chain", 4)
    def runner(): return timed(BIN / "mlops", "run", "chain", folder=project)
    def papermill(): return sum(timed(BIN / "papermill", "empty.ipynb", "out.ipynb", folder=project) for _ in range(4))
    ours, peer = in_turn(3, runner, papermill)
    return [("4 empty notebooks", f"{ours:.1f} s", f"four papermill commands {peer:.1f} s",
             f"{ours / peer:.2f}", "1.5")]


def first_cell(folder: Path) -> list[tuple]:
    "Measure the time from the command to the first cell, in a project that has run and in one without an MLflow store."
    def once(project: Path) -> float:
        began = time.time()
        timed(BIN / "mlops", "run", "chain", folder=project)
        copy = max(project.glob(".mlops/runs/*/t0/0/notebook.ipynb"), key=lambda p: p.stat().st_mtime)
        return float(nbformat.read(copy, 4).cells[0].outputs[0].text) - began
    new_seconds, project = once(chain_project(folder / "new", 1)), chain_project(folder / "used", 1)
    used_seconds, = in_turn(3, lambda: once(project))
    help_seconds, = in_turn(3, lambda: timed(BIN / "mlops", "--help", folder=folder))
    return [("first cell, a project that has run", f"{used_seconds:.1f} s", "", "", "6 s"),
            ("first cell, a new project", f"{new_seconds:.1f} s", "", "", "6 s"),
            ("mlops --help", f"{help_seconds:.2f} s", "", "", "0.5 s")]


def watch_peak(process: psutil.Process, peak: list, ended: threading.Event) -> None:
    "Keep in peak[0] the largest memory of a process and its descendants, in bytes; shared pages are counted once."
    while not ended.wait(0.3):
        total = 0
        for member in [process, *process.children(recursive=True)]:
            try: total += getattr(member.memory_full_info(), "pss", member.memory_info().rss)
            except psutil.Error: continue
        peak[0] = max(peak[0], total)


def demo(folder: Path) -> list[tuple]:
    "Measure the demo from an empty state: seconds and peak memory."
    peak, ended, began = [0], threading.Event(), time.perf_counter()
    with open(folder / "demo.log", "w") as log:
        command = subprocess.Popen([BIN / "mlops", "run", "demo"], cwd=ROOT, stdout=log, stderr=log,
                                   env=os.environ | {"MLOPS_STATE": str(folder / "state")})
        watcher = threading.Thread(target=watch_peak, args=(psutil.Process(command.pid), peak, ended))
        watcher.start()
        code = command.wait()
    ended.set()
    watcher.join()
    if code: sys.exit((folder / "demo.log").read_text())
    seconds = time.perf_counter() - began
    return [("make demo, after installation", f"{seconds:.0f} s", "", "", "180 s"),
            ("its peak memory", f"{peak[0] / 2**30:.2f} GiB", "", "", "3 GiB")]


MEASURES = {"overhead": runner_overhead, "start": first_cell, "join": point_in_time.rows,
            "online": online_store.online_store, "serving": serving.rows, "answer": fast_model.rows,
            "automl": automl.rows, "experiments": online_experiments.rows, "demo": demo,
            "monitoring": monitoring.comparisons, "day": day.rows}


def main() -> None:
    names = sys.argv[1:] or list(MEASURES)
    for name in names:
        if name not in MEASURES: sys.exit(f"no benchmark {name!r}; there are: {', '.join(MEASURES)}")
    bytecode = "without bytecode" if sys.dont_write_bytecode else "with bytecode"
    table = comparison_table(f", {bytecode}")
    with tempfile.TemporaryDirectory() as folder, console.status("measuring") as status:
        for name in names:
            status.update(f"measuring: {name}")
            for row in MEASURES[name](Path(folder)): table.add_row(*row)
    console.print(table)


if __name__ == "__main__": main()
