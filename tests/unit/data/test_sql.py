"""Decimal literals in the SQL of users: which parts of an expression are literals, and when they become doubles."""
from hypothesis import given, settings
from hypothesis import strategies as st

from mlops_nb.data.sql import names_in, with_double_literals

TYPES = {"X": "double", "k": "int", "price": "decimal(5,2)", "pair": "struct<a:double>", "day": "date"}
DECIMALS = ["0.5", ".5", "1.", "-.0", "12345678901234567890"]
OTHERS = ["9223372036854775807", "1e-17", "1.5E+3", "0.5D", "2.5f", "0.5BD", "a1", "t.x", "a[0].b", "<=", "(", ")",
          "'0.5'", '"0.5"', r"'it\'s 0.5'", r"r'\'", "'it''s 0.5'", "`0.5`", "`a``0.5`", "/* 0.5 'it */",
          "-- 0.5 'it\n", "INTERVAL 1.5 SECONDS", "interval '1.5' second", "2.5 seconds"]


@settings(max_examples=200, deadline=None, database=None)
@given(st.lists(st.sampled_from([*DECIMALS, *OTHERS])), st.sampled_from(["x", "`X`", "pair.a", "CAST(k AS DOUBLE)"]))
def test_only_decimal_literals_become_doubles(parts, double):
    sql, expected = " ".join([double, *parts]), [f"{part}D" if part in DECIMALS else part for part in parts]
    assert with_double_literals(sql, TYPES) == " ".join([double, *expected])
    for kept in (f"k {' '.join(parts)}".replace("t.x", "t.k"), f"price + {sql}", f"CAST(k AS DECIMAL(2, 1)) + {sql}"):
        assert with_double_literals(kept, TYPES) == kept, "no double, or a decimal beside it"


def test_a_name_in_a_text_or_a_comment_is_not_mentioned():
    sql = "k > 0.5 AND day <> 'x' -- x\n AND `a b` = \"x\" /* price */"
    assert names_in(sql) == {"k", "and", "day", "a b"} and with_double_literals(sql, TYPES) == sql
