"""The table in which benchmarks print a measure, that of a peer, their ratio and a limit."""
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table


def comparison_table(more: str = "") -> Table:  # more: what the title says beside the machine
    "Return a table without rows, with the machine as its title."
    title = f"{os.cpu_count()} processors, Python {sys.version.split()[0]}{more}"
    table = Table(title=title, title_justify="left", box=None)
    for column in ("benchmark", "ours", "peer", "ratio", "limit"): table.add_column(column)
    return table


def print_comparison(rows: Callable[[Path], list[tuple]]) -> None:  # rows: measures in a folder
    "Measure and print one benchmark."
    table = comparison_table()
    with tempfile.TemporaryDirectory() as folder:
        for row in rows(Path(folder)): table.add_row(*row)
    Console(width=140).print(table)
