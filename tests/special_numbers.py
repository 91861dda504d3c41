"""Random columns of special numbers, and what Spark says of them: an oracle in NumPy, for Sail and for Apache Spark.

In Spark, NaN equals NaN and is larger than any other number, 0.0 equals -0.0, and a comparison with null is null."""
import random
from math import inf, isnan, nan

import numpy as np

SPECIAL = (nan, None, inf, -inf, 0.0, -0.0, 5.0, -2.5, 0.18127401054230322)
LIMITS = {"7": 7.0, "-3": -3.0, "0": 0.0, "'inf'": inf, "'NaN'": nan}  # of the conditions, in SQL and in Python


def columns(seed: int, count: int, size: int) -> dict[str, list]:
    "Return columns of few different values: constants, a constant with NaN, with null, and mixtures."
    source = random.Random(seed)
    values = {f"c{i}": source.sample(SPECIAL, source.choice((1, 2, 2, 2, 3))) for i in range(count)}
    values |= {"c0": (5.0, nan), "c1": (nan, None), "c2": (inf, nan)}  # in every example
    return {name: [source.choice(few) for _ in range(size)] for name, few in values.items()}


def types(names) -> dict[str, str]:
    "Return a SQL type for each column: every third is a float."
    return {name: "FLOAT" if i % 3 == 2 else "DOUBLE" for i, name in enumerate(names)}


def stored(table: dict[str, list], kinds: dict[str, str]) -> dict[str, list]:
    "Return the values as their types store them; a float has fewer digits."
    return {name: [value if value is None or kinds[name] == "DOUBLE" else float(np.float32(value)) for value in values]
            for name, values in table.items()}


def order(value: float) -> tuple:
    "Return a key that sorts as Spark does."
    return (1, 0.0) if isnan(value) else (0, value)


def text(value) -> str:
    "Return a number as text; equal for equal numbers, because minimum and maximum may be either zero."
    return "null" if value is None else repr(float(value) + 0.0)


def facts(values: list) -> dict:
    "Return the number of rows for each condition, and the aggregates, of one column."
    known = [value for value in values if value is not None]
    result = {"rows": len(values), "count": len(known), "NaN": sum(map(isnan, known)), "itself": len(known)}
    for limit, number in LIMITS.items():
        result[f"> {limit}"] = sum(order(value) > order(number) for value in known)
        result[f"= {limit}"] = sum(order(value) == order(number) for value in known)
    result["min"] = text(min(known, key=order, default=None))
    result["max"] = text(max(known, key=order, default=None))
    return result | {"pairs": sum(order(one) == order(other) for one in known for other in known)}


def facts_sql(table: str, name: str, kind: str) -> str:
    "Return the query of the same facts: each condition is a WHERE of its own, in which an engine may skip rows."
    conditions = {"NaN": f"isnan({name})", "itself": f"{name} = {name}"}
    for limit in LIMITS:
        number = f"CAST({limit} AS {kind})"
        conditions |= {f"> {limit}": f"{name} > {number}", f"= {limit}": f"{name} = {number}"}
    parts = [f"(SELECT count(*) FROM {table} WHERE {condition}) AS `{label}`"
             for label, condition in conditions.items()]
    parts += [f"(SELECT count(*) FROM {table}) AS rows", f"(SELECT count({name}) FROM {table}) AS count",
              f"(SELECT min({name}) FROM {table}) AS min", f"(SELECT max({name}) FROM {table}) AS max",
              f"(SELECT count(*) FROM {table} a JOIN {table} b ON a.{name} = b.{name}) AS pairs"]
    return f"SELECT {', '.join(parts)}"


def read_facts(spark, table: str, kinds: dict[str, str]) -> dict[str, dict]:
    "Return the facts of each column, by one query per column."
    result = {}
    for name, kind in kinds.items():
        row = spark.sql(facts_sql(table, name, kind)).collect()[0].asDict()
        result[name] = row | {"min": text(row["min"]), "max": text(row["max"])}
    return result
