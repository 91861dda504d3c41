"""Every function of `tables`, in cases in which engines could differ."""
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace as changed

from side_by_side import Scenario, refused, rows, schema
from special_numbers import columns, types

from mlops_nb.data import tables
from mlops_nb.data.lakehouse import location
from mlops_nb.data.pandas_frames import to_pandas
from mlops_nb.data.progress import Progress, earliest_change, read_progress, rows_version, write_progress

step = scenario = Scenario()


def state(spark, env, name):
    "Return rows, schema and version of a table, in a form that does not depend on the engine."
    df = tables.read(spark, env, name)
    return {"rows": rows(df), "schema": schema(df), "version": tables.version(spark, env, name)}


def kinds(spark, k=1, number="1.5D", named="map('b', 1, 'a', null)"):
    "A row of every type."
    return spark.sql(f"""
        SELECT {k} AS k, {number} AS number, double('NaN') AS nan, CAST(NULL AS DOUBLE) AS nothing, -0.0D AS zero,
        'it\\'s' || ' Größe "quoted" \\\\ ' AS text, true AS flag, DATE'2013-03-10' AS day, 5L AS big,
        float(0.1) AS small,
        TIMESTAMP'2013-03-10 07:00:00.123456' AS at, CAST('12.34' AS DECIMAL(10, 2)) AS price, X'00FF' AS bytes,
        array(1, null) AS listed, array(named_struct('x', 1, 'y', 'z')) AS pairs, {named} AS named""")


@step
def created(spark, env):
    columns = "k INT COMMENT 'the key', `order` DOUBLE, at TIMESTAMP"
    tables.create(spark, env, "created", columns, keys=["k"], comment="it's")
    tables.create(spark, env, "created", "k INT, note STRING", keys=["k"])
    tables.merge(spark, env, "created", spark.sql("SELECT 1 AS k, 'a' AS note"), ["k"])
    return state(spark, env, "created")


@step
def every_type(spark, env):
    written = [tables.merge(spark, env, "kinds", kinds(spark), ["k"]),
               tables.merge(spark, env, "kinds", kinds(spark, named="map('a', null, 'b', 1)"), ["k"]),  # the same
               tables.replace(spark, env, "kinds", kinds(spark), "k = 1"),  # the same
               tables.merge(spark, env, "kinds", kinds(spark, number="2.5D"), ["k"]),
               tables.replace(spark, env, "kinds", kinds(spark, k=2), "k = 2 OR at > TIMESTAMP'2014-01-01 00:00:00'")]
    return written, state(spark, env, "kinds")


@step
def special_numbers(spark, env):
    first, second = columns(1, 6, 6), columns(2, 6, 6)
    kinds = types(first)
    def numbers(table, key):
        fields = ", ".join(["k INT", *(f"{name} {kind}" for name, kind in kinds.items())])
        values = zip(*table.values(), strict=True)
        return spark.createDataFrame([(key + i, *row) for i, row in enumerate(values)], fields).coalesce(1)
    written = [tables.merge(spark, env, "numbers", numbers(first, 0), ["k"]),
               tables.merge(spark, env, "numbers", numbers(second, 3), ["k"], "s.k > 5 OR t.k > 5"),
               tables.replace(spark, env, "numbers", numbers(second, 6), "k >= 6"),
               tables.overwrite(spark, env, "other_numbers", numbers(first, 0).drop("c5")),
               tables.snapshot(spark, env, "numbers", "other_numbers")]  # overwrites with other columns
    names = ("numbers", "other_numbers")
    return {"written": written, "rows": {name: rows(tables.read(spark, env, name)) for name in names}}


@step
def merged(spark, env):
    def merge(values, **options):
        df = spark.sql(f"SELECT * FROM VALUES {values} AS v(k, v, w)")
        return tables.merge(spark, env, "merged", df, ["k"], **options)
    return [merge("(1, 'a', 0.5D), (2, 'b', null), (3, null, 0.7D), (4, 'untouched', 1D)"),
            merge("(2, 'B', null), (3, null, null), (5, 'e', 0.9D)"),
            merge("(2, 'B', null), (3, null, null), (5, 'e', 0.9D)"),
            merge("(1, 'refused', 0.1D), (3, 'taken', 0.3D), (6, 'f', null)", update_when="t.w IS NULL OR s.w > t.w"),
            merge("(1, 'closest', 0.30000000000000004D), (4, 'not', 0.3D)",
                  update_when="s.w > 0.3 AND t.w <> 1e-17"),  # compared as doubles
            state(spark, env, "merged")]


@step
def merged_with_other_columns(spark, env):
    def merge(sql): return tables.merge(spark, env, "evolved", spark.sql(sql), ["K"] if " K" in sql else ["k"])
    return [merge("SELECT 1L AS K, 'a' AS v, 0.5D AS w UNION ALL SELECT 2L, 'b', 0.6D"),
            merge("SELECT 2L AS k, true AS flag, array(1) AS listed"),  # new ones; `v` and `w` of row 2 stay
            merge("SELECT int(3) AS k, float(0.25) AS W, null AS v"),  # narrower ones, and one without a type
            state(spark, env, "evolved")]


@step
def merged_by_two_keys(spark, env):
    def merge(sql): return tables.merge(spark, env, "two_keys", spark.sql(sql), ["day", "origin"])
    return [merge("SELECT DATE'2013-01-01' AS day, origin FROM VALUES ('EWR'), ('JFK') AS v(origin)"),
            merge("SELECT DATE'2013-01-01' + id AS day, 'EWR' AS origin FROM (SELECT int(id) AS id FROM range(3))"),
            merge("SELECT DATE'2013-01-01' AS day, 'EWR' AS origin WHERE false"), state(spark, env, "two_keys")]


@step
def replaced(spark, env):
    def replace(values, where, columns="day, k, v"):
        df = spark.sql(f"SELECT {columns} FROM VALUES {values} AS v(day, k, v)")
        return tables.replace(spark, env, "replaced", df, where)
    first = ("(DATE'2013-01-01', 1, 'a'), (DATE'2013-01-01', 2, null), (DATE'2013-01-02', 3, 'c'), "
             "(DATE'2013-02-01', 4, 'd')")
    january = "day >= DATE'2013-01-01' AND day < DATE'2013-02-01'"
    return [replace(first, "true"),
            replace("(DATE'2013-01-02', 7, 'new'), (DATE'2013-01-02', 7, 'new')", january),  # equal rows stay two rows
            replace("(DATE'2013-01-02', 7, 'new')", january),  # one of them is a different table
            replace("(DATE'2013-02-01', 9, null)", "day = DATE'2013-02-01'", "day, k, CAST(v AS STRING) AS note"),
            tables.replace(spark, env, "replaced", spark.sql("SELECT 1 AS k WHERE false"), "k = 7"),
            state(spark, env, "replaced")]


@step
def overwritten(spark, env):
    def overwrite(sql): return tables.overwrite(spark, env, "overwritten", spark.sql(sql))
    return [overwrite("SELECT 1 AS k, 'a' AS v"), overwrite("SELECT 2 AS k, 'b' AS v"),
            overwrite("SELECT 'x' AS k, 2D AS other"), overwrite("SELECT 'x' AS k, 2D AS other"),
            state(spark, env, "overwritten")]


@step
def earlier_versions(spark, env):
    return {name: [rows(tables.read(spark, env, name, version=v)) for v in range(tables.version(spark, env, name) + 1)]
            for name in ("evolved", "overwritten")}


@step
def history_in_order(spark, env):
    history = tables.history(spark, env, "merged")
    times = [h["timestamp"] for h in history]
    return [h["version"] for h in history], times == sorted(times, reverse=True)


@step
def copied_from_prod(spark, env):
    prod = changed(env, target="prod", catalog="prod", read=("prod",), write=("prod",))
    tables.merge(spark, prod, "carrier", spark.sql("SELECT 'AA' AS carrier, 0.21D AS late"), ["carrier"])
    tables.merge(spark, prod, "carrier", spark.sql("SELECT 'UA' AS carrier, 0.25D AS late"), ["carrier"])
    return [tables.snapshot(spark, env, "prod.flights.carrier", "copy", version=1),
            rows(tables.read(spark, env, "copy")), tables.snapshot(spark, env, "prod.flights.carrier", "copy"),
            rows(tables.read(spark, env, "copy")), rows(tables.read(spark, env, "prod.flights.carrier"))]


@step
def collected_into_pandas(spark, env):
    frame = to_pandas(tables.read(spark, env, "merged").orderBy("k"))
    return frame.k.tolist(), frame.attrs  # Apache Spark adds the metrics of the query


@step
def mistakes(spark, env):
    def merge(sql, keys=("k",), name="merged"): return lambda: tables.merge(spark, env, name, spark.sql(sql), keys)
    def replace(sql, where): return lambda: tables.replace(spark, env, "replaced", spark.sql(sql), where)
    before = [tables.version(spark, env, name) for name in ("merged", "replaced")]
    messages = [refused(call) for call in (
        merge("SELECT id % 2 AS k, 'x' AS v FROM range(5)"), merge("SELECT null AS k, 'x' AS v"),
        merge("SELECT 1 AS k", keys=["kk"]), merge("SELECT 1 AS k, 7 AS v"), merge("SELECT 1 AS k, null AS untyped"),
        merge("SELECT 1 AS k", name="prod.flights.carrier"), merge("SELECT 1 AS k, 'a' AS v, 'b' AS V"),
        merge("SELECT 1 AS k, array(map('a', 1)) AS deep", name="deep"),
        merge("SELECT 1 AS k, 2 AS `a b`", name="deep"),
        replace("SELECT DATE'2013-01-01' AS day, 1 AS k UNION ALL SELECT null, 2", "day = DATE'2013-01-01'"),
        lambda: tables.read(spark, env, "mergde"), lambda: tables.read(spark, env, "merged", version=99),
        lambda: tables.read(spark, changed(env, read=("dev",)), "prod.flights.carrier"))]
    new = spark.sql("SELECT 1 AS k, 'y' AS v")
    condition_messages = [refused(call).split(":")[0] for call in (  # the rest differs by engine
        replace("SELECT 1 AS k", "kk = 1"), lambda: tables.merge(spark, env, "merged", new, ["k"], "t.kk = 1"))]
    after = [tables.version(spark, env, name) for name in ("merged", "replaced")]
    exist = [tables.exists(spark, env, name) for name in ("deep", "merged", "prod.flights.carrier")]
    return messages, condition_messages, before == after, exist


def maintain(spark, env, name):
    "Join and remove files, as Databricks does by itself, or people do."
    if env.engine == "sail":
        from deltalake import DeltaTable
        table = DeltaTable(location(env, env.table(name)))
        table.optimize.compact()
        table.vacuum(dry_run=False)
        return
    for statement in ("OPTIMIZE {}", "VACUUM {}"): spark.sql(statement.format(tables.find(spark, env, name))).collect()


@step
def progress_of_a_table(spark, env):
    def write(values):
        new = spark.sql(f"SELECT int(k) AS k, CAST(at AS TIMESTAMP) AS at, double(v) AS v, double(w) AS w "
                        f"FROM VALUES {values} AS v(k, at, v, w)")
        tables.merge(spark, env, "progressed", new, ["k"])
        return tables.version(spark, env, "progressed")
    write("(1, '2013-01-01 05:10:00', '0.5', 'NaN'), (2, '2013-01-01 07:50:00', null, '1.5')")
    version = write("(3, '2013-01-01 09:59:59', '0.5', null)")  # a second file
    known = Progress(inputs={"an hourly 'table'": 7, "source": 'C:\\ and "quotes"'}, definition="0a")
    write_progress(spark, env, "progressed", known)
    maintain(spark, env, "progressed")
    kept = read_progress(spark, env, "progressed") == known, rows_version(spark, env, "progressed") == version
    changes = []
    for values in ("(2, '2013-01-01 07:50:00', '1.5', null)",  # the value of one column is that of another one
                   "(1, '2013-01-01 05:10:00', '0.5', null)",  # NaN and null
                   "(4, '2013-01-01 09:00:00', '1', '2'), (3, '2013-01-01 10:00:00', '0.5', null)",  # another time
                   "(5, null, '1', null)"):
        before, after = tables.version(spark, env, "progressed"), write(values)
        changes.append([earliest_change(spark, env, "progressed", "at", before, after, f"SELECT {listed} FROM t")
                        for listed in ("k, v, w", "k, v")])
    return kept, read_progress(spark, env, "progressed") is None, changes


@step
def two_writers_at_once(spark, env):
    tables.create(spark, env, "contended", "k BIGINT, v BIGINT, writer INT", keys=["k"])
    def write(writer):
        for i in range(2):
            df = spark.range(i * 5, i * 5 + 10).selectExpr("id AS k", f"{writer * 10 + i}L AS v", f"{writer} AS writer")
            tables.merge(spark, env, "contended", df, ["k"], update_when="s.v > t.v")
    with ThreadPoolExecutor(2) as both: list(both.map(write, (1, 2)))
    return rows(tables.read(spark, env, "contended"))  # writer 2's values are larger, so they are kept in any order


@step
def all_names(spark, env): return [tables.table_names(spark, env, catalog) for catalog in (None, "prod", "staging")]


if __name__ == "__main__": scenario.main()
