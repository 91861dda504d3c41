"""Names that Spark, Delta and Python take: valid, unique, the same each time."""
import keyword
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlops_nb.errors import MlopsError
from mlops_nb.projects.column_names import LONGEST_COLUMN_NAME, SQL_WORDS, column_names, column_of, renamed

PARTS = st.sampled_from(["a", "A", "b", "_", " ", ".", "2", "ä", "ß", "²", "É", "价", "order", "class", "%", "None"])
NAMES = st.lists(st.one_of(st.lists(PARTS, max_size=6).map("".join), st.text(max_size=12)), unique=True, max_size=8)


@settings(max_examples=60, deadline=None)
@given(NAMES)
def test_names_are_valid_unique_and_stable(names):
    result = column_names(names, reserved=["day"])
    values = list(result.values())
    assert list(result) == names and len({value.lower() for value in values}) == len(names)
    for value in values:
        assert re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", value) and len(value) <= LONGEST_COLUMN_NAME
        assert not keyword.iskeyword(value) and value.lower() not in SQL_WORDS | {"day"}
    assert column_names(names, reserved=["day"]) == result
    assert renamed(column_names(values, reserved=["day"])) == {}  # valid names stay


@pytest.mark.parametrize("name, expected", [
    ("Größe (m²)", "groesse_m2"), ("Total Charges", "total_charges"), ("MonthlyCharges", "MonthlyCharges"),
    ("price.eur", "price_eur"), ("2nd price", "n_2nd_price"), ("order", "order_"), ("Group", "group_"),
    ("Class", "class_"),
    ("Taux d’intérêt (%)", "taux_dinteret_percent"), ("価格", "column_1"), ("  padded  ", "padded"),
    ("_metadata", "metadata"),
    ("x" * 300, "x" * LONGEST_COLUMN_NAME)])
def test_one_name(name, expected): assert column_names([name]) == {name: expected}


def test_a_valid_name_has_precedence_and_clashes_are_numbered():
    names = column_names(["a b", "a.b", "a_b", "Size", "SIZE", "x" * 300, "x" * 301])
    assert list(names.values()) == ["a_b_2", "a_b_3", "a_b", "Size", "size_2", "x" * 100, "x" * 95 + "_2"]


def test_an_option_takes_both_names():
    names = column_names(["Größe (m²)", "late"])
    assert column_of("Größe (m²)", names, "--label") == column_of("groesse_m2", names, "--label") == "groesse_m2"
    with pytest.raises(MlopsError, match=r"no column 'lates' in the data \(--label\)\n  did you mean 'late'"):
        column_of("lates", names, "--label")
