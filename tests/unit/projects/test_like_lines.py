"""No two use cases share six like lines: what they have in common is in the platform. Like lines are the same lines, or
lines of the same shape with other names, strings and numbers."""
import io
import json
import keyword
import re
import tokenize
from itertools import groupby
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
LINES = 6
FLIGHTS = sorted((ROOT / "mlops_nb/flights").glob("[a-z]*.py"))
OF_FLIGHTS = sorted((ROOT / "nbs/flights").glob("*.ipynb"))
OF_TEMPLATE = sorted((ROOT / "template/nbs").glob("*.ipynb"))


def cells_of(path: Path) -> list[str]:
    "The code cells of a notebook."
    cells = json.loads(path.read_text())["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def shape(line: str) -> str:
    "A line with N for names and numbers and S for strings; a line that does not tokenize alone is kept as it is."
    try: tokens = list(tokenize.generate_tokens(io.StringIO(line.strip() + "\n").readline))
    except (tokenize.TokenError, IndentationError, SyntaxError): return line.strip()
    words = []
    for token in tokens:
        if token.type == tokenize.NAME: words.append(token.string if keyword.iskeyword(token.string) else "N")
        elif token.type == tokenize.NUMBER: words.append("N")
        elif token.type == tokenize.STRING: words.append("S")
        elif token.type == tokenize.OP: words.append(token.string)
    return " ".join(words)


def code_lines(source: str) -> list[str]:
    "The lines of code: no blank lines, comments, directives, imports and lone punctuation."
    lines = [line.strip() for line in source.splitlines()]
    return [line for line in lines if re.search(r"\w", line) and not re.match(r"#|import |from \S+ import ", line)]


def runs(lines: list[str]) -> set[tuple[str, ...]]:
    return {tuple(lines[start:start + LINES]) for start in range(len(lines) - LINES + 1)}


def like_runs(first: list[str], second: list[str]) -> set[tuple[str, ...]]:
    "Runs of six lines in code of both, of the same shape; not those of one shape alone, such as lists of strings."
    shapes = [set().union(*(runs([shape(line) for line in code_lines(source)]) for source in sources))
              for sources in (first, second)]
    return {run for run in shapes[0] & shapes[1] if len(list(groupby(run))) > 1}


def test_six_lines_with_other_names_are_like():
    first = "a = load(1)\nb = a.rows\nfor row in b:\n    show(row)\nreturn a, b\nc = 'x'"
    second = first.replace("a", "data").replace("b", "table").replace("'x'", "'y'")
    assert len(like_runs([first], [second])) == 1
    assert like_runs([first], [second.replace("for row in", "while")]) == set()
    assert like_runs([first.removesuffix("\nc = 'x'")], [second]) == set()


def test_flights_exports_at_most_900_lines():
    assert len(FLIGHTS) >= 5
    assert sum(len(path.read_text().splitlines()) for path in FLIGHTS) <= 900


@pytest.mark.parametrize("path", OF_FLIGHTS, ids=lambda path: path.name)
def test_a_notebook_of_flights_and_one_of_the_template_share_no_six_lines(path):
    "A cell is compared with each cell; between cells stands the text that explains them."
    assert len(OF_TEMPLATE) >= 14
    for other in OF_TEMPLATE: assert like_runs(cells_of(path), cells_of(other)) == set(), other.name


def test_the_modules_of_flights_and_of_a_project_share_no_six_lines():
    "A project exports its declarations: the cells of the template's notebooks that are exported."
    exported = [cell for path in OF_TEMPLATE for cell in cells_of(path) if cell.startswith("#| export")]
    assert exported and like_runs([path.read_text() for path in FLIGHTS], exported) == set()
