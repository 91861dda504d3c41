"""How long things take, each beside a peer or a limit, in one run: `make bench`, or `python benchmarks/run.py demo`."""
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import automl
import nbformat
import online_store
import point_in_time
import psutil
import yaml
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
console = Console()


def timed(*command, folder, **variables) -> float:
    "Seconds a command takes; its output is shown if it fails."
    began = time.perf_counter()
    done = subprocess.run(list(map(str, command)), cwd=folder, capture_output=True, text=True, env=os.environ | variables)
    if done.returncode: sys.exit(f"{' '.join(map(str, command))} failed:\n{done.stdout}{done.stderr}")
    return time.perf_counter() - began


def in_turn(rounds: int, *measures) -> list[float]:
    "The median of each measure, taken in turn so that a slow minute of the machine meets all of them."
    for measure in measures: measure()  # the first round warms caches and is not counted
    taken = [[measure() for measure in measures] for _ in range(rounds)]
    return [statistics.median(column) for column in zip(*taken, strict=True)]


def chain_project(folder: Path, length: int) -> Path:
    "A bundle whose job runs empty notebooks one after the other."
    (folder / "resources").mkdir(parents=True)
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("import time; print(time.time())")])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, folder / "empty.ipynb")
    tasks = [{"task_key": f"t{i}", "notebook_task": {"notebook_path": "../empty.ipynb"},
              "depends_on": [{"task_key": f"t{i - 1}"}] if i else []} for i in range(length)]
    (folder / "resources/chain.yml").write_text(yaml.safe_dump({"resources": {"jobs": {"chain": {"name": "chain", "tasks": tasks}}}}))
    (folder / "databricks.yml").write_text(yaml.safe_dump({
        "bundle": {"name": "chain"}, "include": ["resources/*.yml"], "targets": {"dev": {"default": True}},
        "variables": {"catalog": {"default": "dev"}, "schema": {"default": "s"}}}))
    return folder


def runner_overhead(folder: Path) -> list[tuple]:
    "Four empty notebooks by the runner and by papermill's own command."
    project = chain_project(folder / "chain", 4)
    ours = lambda: timed(BIN / "mlops", "run", "chain", folder=project)
    bare = lambda: sum(timed(BIN / "papermill", "empty.ipynb", "out.ipynb", folder=project) for _ in range(4))
    mine, theirs = in_turn(3, ours, bare)
    return [("4 empty notebooks", f"{mine:.1f} s", f"four papermill commands {theirs:.1f} s", f"{mine / theirs:.2f}", "1.5")]


def first_cell(folder: Path) -> list[tuple]:
    "From the command to the first cell: in a project that has run, and in one where MLflow's store is still to be made."
    def once(project: Path) -> float:
        began = time.time()
        timed(BIN / "mlops", "run", "chain", folder=project)
        copy = max(project.glob(".mlops/runs/*/t0/0/notebook.ipynb"), key=lambda p: p.stat().st_mtime)
        return float(nbformat.read(copy, 4).cells[0].outputs[0].text) - began
    fresh, used = once(chain_project(folder / "fresh", 1)), chain_project(folder / "used", 1)
    again, = in_turn(3, lambda: once(used))
    helping, = in_turn(3, lambda: timed(BIN / "mlops", "--help", folder=folder))
    return [("first cell, a project that has run", f"{again:.1f} s", "", "", "6 s"),
            ("first cell, a new project", f"{fresh:.1f} s", "", "", "6 s"), ("mlops --help", f"{helping:.2f} s", "", "", "0.5 s")]


def peak_of(process: psutil.Process, most: list, over: threading.Event) -> None:
    "Keep in most[0] the largest memory that a process and all below it held at once (each shared page once)."
    while not over.wait(0.3):
        total = 0
        for one in [process, *process.children(recursive=True)]:
            try: total += getattr(one.memory_full_info(), "pss", one.memory_info().rss)
            except psutil.Error: continue
        most[0] = max(most[0], total)


def demo(folder: Path) -> list[tuple]:
    "The whole demo from an empty state, its seconds and its peak of memory."
    most, over, began = [0], threading.Event(), time.perf_counter()
    with open(folder / "demo.log", "w") as log:
        command = subprocess.Popen([BIN / "mlops", "run", "demo"], cwd=ROOT, stdout=log, stderr=log,
                                   env=os.environ | {"MLOPS_STATE": str(folder / "state")})
        watch = threading.Thread(target=peak_of, args=(psutil.Process(command.pid), most, over))
        watch.start()
        code = command.wait()
    over.set(); watch.join()
    if code: sys.exit((folder / "demo.log").read_text())
    took = time.perf_counter() - began
    return [("make demo, after installation", f"{took:.0f} s", "", "", "180 s"),
            ("its peak of memory", f"{most[0] / 2**30:.2f} GiB", "", "", "3 GiB")]


MEASURES = {"overhead": runner_overhead, "start": first_cell, "join": point_in_time.rows, "online": online_store.online_store, "automl": automl.rows, "demo": demo}


def main() -> None:
    asked = sys.argv[1:] or list(MEASURES)
    for name in asked:
        if name not in MEASURES: sys.exit(f"no measure {name!r}; there are: {', '.join(MEASURES)}")
    bytecode = "without bytecode" if sys.dont_write_bytecode else "bytecode kept"
    table = Table(title=f"{os.cpu_count()} processors, Python {sys.version.split()[0]}, {bytecode}", title_justify="left", box=None)
    for column in ("what", "ours", "peer", "ratio", "limit"): table.add_column(column)
    with tempfile.TemporaryDirectory() as folder, console.status("measuring") as status:
        for name in asked:
            status.update(f"measuring: {name}")
            for row in MEASURES[name](Path(folder)): table.add_row(*row)
    console.print(table)


if __name__ == "__main__": main()
