"""How much the slow tests do: all of it, or a part that fits into a build of each change."""
import os
from collections.abc import Iterable
from typing import Any

import pytest

SIZE = os.environ.get("MLOPS_TEST_SIZE", "full")
if SIZE not in ("full", "reduced"): raise ValueError(f"MLOPS_TEST_SIZE is {SIZE!r}: write full or reduced")


def by_size(full: Any, reduced: Any) -> Any:
    "The first, or under MLOPS_TEST_SIZE=reduced the second: how many repetitions, which cases."
    return reduced if SIZE == "reduced" else full


def thinned(cases: Iterable[tuple], every: int = 3) -> list:
    "Like cases, for parametrize: one of three runs in `make test`, all of them with the slow tests of full size."
    marks = [pytest.mark.slow, pytest.mark.full]
    return [pytest.param(*case, marks=marks if number % every else []) for number, case in enumerate(cases)]
