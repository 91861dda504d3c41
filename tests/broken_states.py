"""States of a project that jobs cannot use: read-only, full, of another user, damaged."""
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import pytest

from mlops_nb import addresses
from mlops_nb.jobs import run_store

NOBODY = 65534
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can change the owner of a file or mount a disk")


def make_state(folder: Path, empty_store: Path) -> Path:
    "A state with one failed run, and MLflow's store without models."
    folder.mkdir(exist_ok=True)
    store = run_store.RunStore(folder / "runs.db")
    run_id = run_store.record_run(store, "train", "dev", {}, ["train"])
    run_store.update_run(store, run_id, life_cycle_state="TERMINATED", result_state="FAILED", end_time=run_store.now())
    shutil.copy(empty_store, folder / "mlflow.db")
    addresses.move_state(folder)
    return folder


@contextmanager
def small_disk(folder: Path, size: str):
    "A disk in memory at a folder; the test is skipped where it cannot be mounted."
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    try: mounted = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError: pytest.skip("this machine has no command mount")
    if mounted.returncode: pytest.skip(f"no disk can be mounted here: {mounted.stderr.strip()}")
    try: yield folder
    finally: subprocess.run(["umount", "--lazy", str(folder)], check=True)  # MLflow keeps its file open


def make_read_only(disk: Path) -> None:
    "Mount a disk again, for reading only."
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)


def fill(disk: Path) -> None:
    "Write to a disk until it is full."
    with open(disk / "fill", "wb", buffering=0) as file:
        try:
            while True: file.write(bytes(4096))
        except OSError: pass


@contextmanager
def state_on_disk(folder: Path, size: str, empty_store: Path, damage: Callable[[Path], None]):
    "A state on a small disk that is then damaged, such as by `make_read_only` or `fill`."
    with small_disk(folder, size) as disk:
        make_state(disk, empty_store)
        damage(disk)
        yield disk


def listing(folder: Path) -> dict:
    "Every file and folder below a folder, with its size and the time of its last change."
    paths = [folder, *folder.rglob("*")] if folder.exists() else []
    return {str(path): (path.lstat().st_size, path.lstat().st_mtime_ns) for path in paths}


def as_nobody(function: Callable) -> object:  # what `function` returns, as JSON can hold it
    "Call a function in a fork of this process that runs as the user nobody."
    receiving, sending = os.pipe()
    if not (pid := os.fork()):
        try:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
            os.write(sending, json.dumps(function()).encode())
        except BaseException as error: os.write(sending, json.dumps(repr(error)).encode())
        finally: os._exit(0)
    os.close(sending)
    with os.fdopen(receiving) as answer: text = answer.read()
    os.waitpid(pid, 0)
    return json.loads(text)
