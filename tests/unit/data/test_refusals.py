"""What an engine or a catalog refuses becomes a sentence with the command that mends it."""
import pytest

from mlops_nb.data.lakehouse import table_error

REFUSALS = [
    ("[NO_SUCH_CATALOG_EXCEPTION] Catalog 'dev' was not found. SQLSTATE: 42704",
     "the catalog dev does not exist", "CREATE CATALOG dev"),
    ("[SCHEMA_NOT_FOUND] The schema `dev`.`flights` cannot be found. SQLSTATE: 42704",
     "the schema dev.flights does not exist", "CREATE SCHEMA dev.flights"),
    ("[INSUFFICIENT_PERMISSIONS] Insufficient privileges:\nUser does not have CREATE TABLE on Schema 'dev.flights'.",
     "permission denied (User does not have CREATE TABLE on Schema 'dev.flights')", "ON SCHEMA dev.flights TO"),
    ("PERMISSION_DENIED: User does not have CREATE SCHEMA on Catalog 'dev'.",
     "permission denied (User does not have CREATE SCHEMA on Catalog 'dev')", "CREATE SCHEMA ON CATALOG dev TO"),
    ("PERMISSION_DENIED: not the owner", "permission denied", "SHOW GRANTS ON SCHEMA dev.flights"),
    ("[DATA_SOURCE_NOT_FOUND] Failed to find the data source: delta. Make sure the provider name is correct",
     "this Spark has no Delta Lake", "--packages io.delta:delta-spark")]


@pytest.mark.parametrize(("text", "cause", "command"), REFUSALS)
def test_a_refusal_is_a_sentence(text, cause, command):
    error = table_error(Exception(text), "dev.flights.plane", "created", "function")
    assert error.message == f"function dev.flights.plane cannot be created: {cause}" and command in error.hint
