"""Unity Catalog as Apache Spark does not have it: three-level names, primary keys, functions, information_schema.

Apache Spark has one catalog of Delta tables, `spark_catalog`. Here `dev.flights.plane` becomes
`spark_catalog.dev__flights.plane` in every statement and call of a session. What Unity Catalog refuses is refused: a
catalog that does not exist, a schema that does not exist or belongs to somebody else, a time in a primary key without
TIMESERIES. What it keeps beside the tables (constraints and functions) is kept in one file."""
import json
import re
from pathlib import Path

CATALOGS = ("dev", "staging", "prod")
USER = "someone@example.com"
PART = r"`?([\w-]+)`?"
TEXT = r"'(?:[^'\\]|\\.)*'"
NAME = re.compile(rf"({TEXT})|(?<![\w.`{{])`?\b({'|'.join(CATALOGS)}|missing)\b`?\.{PART}(?:\.{PART})?")
VIEWS = ("tables", "table_constraints", "key_column_usage", "routines")


class Refused(Exception):
    "An error of Unity Catalog, with its error class."


class UnityCatalog:
    "The catalog of a workspace, and the patches that make a Spark Connect session use it."

    def __init__(self, file: Path, existing=CATALOGS, foreign_schemas=()):
        self.file, self.existing, self.foreign = file, existing, foreign_schemas
        if not file.exists(): self.save({"keys": {}, "functions": {}})

    def content(self) -> dict: return json.loads(self.file.read_text())

    def save(self, content: dict) -> None: self.file.write_text(json.dumps(content))

    def local_name(self, name: str) -> str:
        "The name of a table or schema in Apache Spark."
        parts = re.findall(PART, name)
        if len(parts) < 2 or parts[0] not in (*CATALOGS, "missing"): return name
        return self.replaced(".".join(f"`{part}`" for part in parts))

    def replaced(self, statement: str) -> str:
        "A statement with the names that Apache Spark has."
        def replace(match):
            if match[1]: return match[0]
            catalog, schema, table = match[2], match[3], match[4]
            if catalog not in self.existing:
                raise Refused(f"[NO_SUCH_CATALOG_EXCEPTION] Catalog '{catalog}' was not found. SQLSTATE: 42704")
            if schema == "information_schema": return f"information_schema_{table}"
            return f"`spark_catalog`.`{catalog}__{schema}`" + (f".`{table}`" if table else "")
        return NAME.sub(replace, statement)

    def check_owner(self, catalog: str, schema: str, privilege: str) -> None:
        "Refuse to create something in a schema of somebody else."
        if f"{catalog}.{schema}" in self.foreign:
            raise Refused("[INSUFFICIENT_PERMISSIONS] Insufficient privileges: User does not have "
                          f"{privilege} on Schema '{catalog}.{schema}'. SQLSTATE: 42501")

    def create_table(self, spark, statement: str) -> str:
        "Record the primary key of a CREATE TABLE, and return the statement without it."
        catalog, schema, table = re.search(rf"IF NOT EXISTS {PART}\.{PART}\.{PART}", statement).groups()
        self.check_owner(catalog, schema, "CREATE TABLE")
        key = re.search(r", PRIMARY KEY \(([^)]*)\)", statement)
        if not key: return statement
        columns = [tuple(re.fullmatch(r"`(.*)`( TIMESERIES)?", part).groups()) for part in key[1].split(", ")]
        types = dict(re.findall(r"`([^`]+)` (\w+)", statement[:key.start()]))
        for name, is_time in columns:
            if is_time and types[name] not in ("timestamp", "date"):
                raise Refused(f"[INVALID_TIMESERIES] column {name} is {types[name]}")
            if f"`{name}` {types[name]} NOT NULL" not in statement:
                raise Refused(f"[PRIMARY_KEY_NULLABLE] column {name} of the primary key is nullable")
        content = self.content()
        content["keys"].setdefault(f"{catalog}.{schema}.{table}", [[name, bool(time)] for name, time in columns])
        self.save(content)
        return statement.replace(key[0], "")

    def create_function(self, spark, statement: str) -> None:
        "Record a Python function; its body must compile, and its schema exist."
        head, body = statement.split("$$")[:2]
        catalog, schema, name = re.search(rf"FUNCTION {PART}\.{PART}\.{PART}\(", head).groups()
        self.check_owner(catalog, schema, "CREATE FUNCTION")
        if not spark.catalog.databaseExists(f"`{catalog}`.`{schema}`"):
            raise Refused(f"[SCHEMA_NOT_FOUND] The schema `{catalog}`.`{schema}` cannot be found. SQLSTATE: 42704")
        listed = re.search(r"FUNCTION [^(]*\((.*?)\) RETURNS (\w+) LANGUAGE PYTHON", head, re.DOTALL)
        parameters = [tuple(part.replace("`", "").split()) for part in listed[1].split(", ") if part]
        lines = "\n".join("    " + line for line in body.splitlines())
        compile(f"def {name}({', '.join(p for p, _ in parameters)}):\n{lines}", name, "exec")
        comment = re.search(rf"COMMENT ({TEXT})", head)
        content = self.content()
        content["functions"][f"{catalog}.{schema}.{name.lower()}"] = {
            "body": body, "parameters": parameters, "returns": listed[2],
            "comment": comment[1][1:-1].replace("\\'", "'") if comment else ""}
        self.save(content)

    def information(self, spark, view: str) -> None:
        "Make a view of information_schema as a temporary view of the session."
        content, rows = self.content(), []
        if view == "routines":
            schema = "routine_schema STRING, routine_name STRING, routine_definition STRING, comment STRING"
            for full, function in content["functions"].items():
                rows.append((*full.split(".")[1:], function["body"], function["comment"]))
        elif view == "tables":
            schema = "table_schema STRING, table_name STRING"
            for row in spark.sql("SHOW SCHEMAS").collect():
                if "__" not in row[0]: continue
                tables = spark.sql(f"SHOW TABLES IN spark_catalog.`{row[0]}`").collect()
                rows += [(row[0].partition("__")[2], table.tableName) for table in tables if not table.isTemporary]
        elif view == "table_constraints":
            schema = ("constraint_schema STRING, constraint_name STRING, constraint_type STRING, table_schema STRING, "
                      "table_name STRING")
            for full in content["keys"]:
                _, at, table = full.split(".")
                rows.append((at, f"{table}_pk", "PRIMARY KEY", at, table))
        else:
            schema = ("constraint_schema STRING, constraint_name STRING, table_name STRING, column_name STRING, "
                      "ordinal_position INT")
            for full, keys in content["keys"].items():
                _, at, table = full.split(".")
                rows += [(at, f"{table}_pk", table, name, i) for i, (name, _) in enumerate(keys, 1)]
        spark.createDataFrame(rows, schema).createOrReplaceTempView(f"information_schema_{view}")

    def sql(self, spark, statement: str):  # -> the statement that Apache Spark can run, or None if nothing is left
        "Do what Unity Catalog does with a statement."
        start = statement.lstrip().upper()
        if start.startswith("CREATE OR REPLACE FUNCTION"): return self.create_function(spark, statement)
        if start.startswith("CREATE TABLE"): statement = self.create_table(spark, statement)
        if start.startswith("CREATE SCHEMA"):
            self.check_owner(*re.search(rf"{PART}\.{PART}\s*$", statement).groups(), "CREATE SCHEMA")
        for view in VIEWS:
            if re.search(rf"information_schema\W*{view}\b", statement): self.information(spark, view)
        return self.replaced(re.sub(r"(?i)\bcurrent_user\(\)", f"'{USER}'", statement))  # the user of the workspace

    def patch(self) -> None:
        "Make every Spark Connect session of this process use the catalog."
        from pyspark.sql.connect.catalog import Catalog
        from pyspark.sql.connect.readwriter import DataFrameReader, DataFrameWriter
        from pyspark.sql.connect.session import SparkSession
        unity = self

        def patched(owner, method):
            original = getattr(owner, method)
            def call(self, name, *args, **kwargs): return original(self, unity.local_name(name), *args, **kwargs)
            setattr(owner, method, call)

        for owner, methods in ((SparkSession, ("table",)), (DataFrameReader, ("table",)),
                               (DataFrameWriter, ("saveAsTable", "insertInto")),
                               (Catalog, ("tableExists", "databaseExists", "listTables"))):
            for method in methods: patched(owner, method)
        original = SparkSession.sql
        def sql(session, sqlQuery, args=None, **kwargs):
            statement = unity.sql(session, sqlQuery)
            if statement is None: return session.range(0)
            return original(session, statement, args, **kwargs)
        SparkSession.sql = sql
