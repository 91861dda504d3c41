"""Files of other people: what pandas writes is read back, and what does not fit is an error that names the option."""
import gzip
import zipfile
from datetime import date

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mlops_nb.errors import MlopsError
from mlops_nb.projects.data_files import Dialect, read_data


def frame(rows: int = 60) -> pd.DataFrame:
    "A table with the types that people have."
    rng = np.random.default_rng(7)
    return pd.DataFrame({
        "id": np.arange(rows) + 10**15, "zip": [f"{n:05d}" for n in range(rows)],
        "größe": rng.normal(size=rows).round(3),
        "count": pd.array([None if n % 7 == 0 else n for n in range(rows)], "Int64"), "open": rng.random(rows) < 0.5,
        "city": rng.choice(["Köln", "Paris, Texas", 'the "old" town', "line\nbreak"], rows),
        "day": pd.date_range("2024-01-01", periods=rows),
        "at": pd.date_range("2024-01-01 09:30", periods=rows, freq="h")})


def read(path, content: bytes, **options) -> pd.DataFrame:
    "The frame of a file with a content."
    path.write_bytes(content)
    return read_data(path, Dialect(**options)).frame


@pytest.mark.parametrize("delimiter, encoding, decimal, name", [
    (",", "utf-8", ".", "a.csv"), (",", "utf-8-sig", ".", "a.csv.gz"), (";", "utf-8", ",", "a.txt"),
    ("\t", "utf-16", ".", "a.tsv"), ("|", "cp1252", ".", "a.csv"), (";", "latin-1", ",", "a.csv.zip")])
def test_what_pandas_writes_is_read_back(tmp_path, delimiter, encoding, decimal, name):
    path, expected = tmp_path / name, frame()
    archive = {"method": "zip", "archive_name": "a.csv"} if name.endswith("zip") else "infer"
    expected.to_csv(path, sep=delimiter, encoding=encoding, decimal=decimal, index=False, compression=archive)
    is_default = delimiter == "," and encoding.startswith("utf-8")
    dialect = Dialect() if is_default else Dialect(delimiter, encoding, decimal=decimal)
    result = read_data(path, dialect).frame
    assert result["count"].dtype == pd.Int64Dtype()
    pd.testing.assert_frame_equal(result, expected, check_dtype=False)


@pytest.mark.parametrize("delimiter, encoding, decimal, options", [
    (";", "utf-8", ".", ["--delimiter ';'"]), (";", "utf-8", ",", ["--delimiter ';'", "--decimal ','"]),
    ("\t", "utf-8", ".", ["--delimiter tab"]), ("|", "utf-8", ".", ["--delimiter '|'"]),
    (",", "latin-1", ".", ["--encoding latin-1"]), (",", "utf-16", ".", ["--encoding utf-16"]),
    (";", "latin-1", ",", ["--encoding latin-1", "--delimiter ';'", "--decimal ','"])])
def test_another_dialect_is_an_error_whose_options_read_the_file(tmp_path, delimiter, encoding, decimal, options):
    path, expected = tmp_path / "a.csv", frame()
    expected.to_csv(path, sep=delimiter, encoding=encoding, decimal=decimal, index=False)
    with pytest.raises(MlopsError) as error: read_data(path)
    assert error.value.hint.split("; or")[0] == "add " + " ".join(options)
    values = dict(option.removeprefix("--").replace("'", "").split() for option in options)
    pd.testing.assert_frame_equal(read_data(path, Dialect(**values)).frame, expected, check_dtype=False)


@pytest.mark.parametrize("content, options, message", [
    (b"", {}, "is empty"),
    (b"\n \n", {}, "is empty"),
    (b"id,price\n", {}, "2 column names in line 1 and no rows"),
    (b"id,price\n1,2\n\n3,4,5\n", {}, "line 4: 3 fields, and line 1 has 2 column names: 3,4,5"),
    (b"id,price\n1\n", {}, "line 2: 1 fields"),
    (b"id,price\n1,2,\n3,4,\n", {}, "remove the ',' at the end"),
    (b'id,note\n1,"a\nb"\n2,"open\n3,c\n', {}, "line 4: unexpected end of data"),
    (b'id,note\n1,"a"b\n', {}, "line 2: ',' expected after"),
    (b"id,price,ID\n1,2,3\n", {}, "columns 1 and 3 have the same name: 'id' and 'ID'"),
    (b"id,price,price\n1,2,3\n", {}, "columns 2 and 3 have the same name: 'price'"),
    (b"5.1,3.5,setosa\n4.9,3.0,setosa\n", {}, "'5.1' is not a column name; the file has no header"),
    (b"2024-01-01,a\n2024-01-02,b\n", {}, "the file has no header"),
    (b",,\n1,2,3\n", {}, "line 1: there are no column names"),
    (b"id,price\n1,\"3,5\"\n2,\"4,25\"\n", {}, "add --decimal ','"),
    (b"id,price\n1,\"3,500\"\n2,\"1,250,000\"\n", {}, "as a separator of thousands, such as 3,500"),
    (b"'id','price'\n'1','2'\n", {}, "add --quote \"'\""),
    (b"id;a,b;c\n1;2,3;4\n5;6,7;8\n", {}, "or --delimiter ',' for 2 columns"),
    ("id,ä\n1,ö\n".encode(), {"encoding": "latin-1"}, "add --encoding utf-8"),
    ("id,ä\n1,2\n".encode(), {"encoding": "utf-16"}, "add --encoding utf-8"),
    (b"id,\x96\n1,\xf6\n", {}, "line 1 reads 'id,\u2013' in cp1252"),
    (b"id,price\n1,\"1.234,50\"\n2,\"7,5\"\n", {}, "add --decimal ','"),
    (b"sep=;\nid;price\n1;2\n", {"delimiter": ";"}, "'sep=;' is an instruction for Excel"),
    (b"\x00\x01\x02\xff\xfe" * 50, {}, "is binary, not a CSV file"),
    (b"PK\x03\x04rest", {}, "a zip file or a spreadsheet, not a CSV file")])
def test_what_does_not_fit_is_an_error_with_its_line_or_option(tmp_path, content, options, message):
    with pytest.raises(MlopsError) as error: read(tmp_path / "a.csv", content, **options)
    assert message in str(error.value) and error.value.hint


def test_types_follow_all_values_of_a_column(tmp_path):
    content = (b"id,code,big,mixed,flag,bad_day,at,word,number,blank\n"
               b"1,007,12345678901234567890,1,TRUE,2024-02-30,2024-01-01T10:00:00+02:00,NA,-1.5e3,\n"
               b"2,12,1,x,false,2024-01-01,2024-01-01 10:00:00.123456789Z,None,NA,\n"
               b"3,,2,,,,,x,+7,\n")
    path = tmp_path / "a.csv"
    path.write_bytes(content)
    table = read_data(path).table
    types = {field.name: str(field.type) for field in table.schema}
    assert types == {"id": "int64", "code": "string", "big": "string", "mixed": "string", "flag": "bool",
                     "bad_day": "string", "at": "timestamp[us, tz=UTC]", "word": "string", "number": "double",
                     "blank": "string"}
    assert table["word"].to_pylist() == ["NA", "None", "x"] and table["number"].to_pylist() == [-1500, None, 7]
    assert [str(value) for value in read_data(path).frame["at"]] == [
        "2024-01-01 08:00:00", "2024-01-01 10:00:00.123456", "NaT"]


def test_stated_decimal_point_keeps_such_columns_as_text(tmp_path):
    result = read(tmp_path / "a.csv", b'id,pair\n1,"3,5"\n2,"4,25"\n', decimal=".")
    assert result["pair"].tolist() == ["3,5", "4,25"]


def test_columns_without_a_name_are_called_by_position(tmp_path):
    frame(3).to_csv(tmp_path / "a.csv")
    data = read_data(tmp_path / "a.csv")
    assert data.frame["column_1"].tolist() == [0, 1, 2] and "column_1" in data.notes[0]


def test_parquet_of_pandas_has_the_types_of_tables(tmp_path):
    written = frame().set_index("id")
    written["city"] = written["city"].astype("category")
    written["size"] = pd.Categorical(written["count"])
    written["zoned"] = written["at"].dt.tz_localize("Europe/Berlin")
    written["flag"] = pd.array([True, None] * 30, "boolean")
    written["text_day"] = written["day"].dt.strftime("%Y-%m-%d")
    written["small"] = np.arange(60, dtype="uint8")
    written["day_only"] = written["day"].dt.date
    written.to_parquet(tmp_path / "a.parquet")
    data = read_data(tmp_path / "a.parquet")
    types = {field.name: str(field.type) for field in data.table.schema}
    assert types == {
        "zip": "string", "größe": "double", "count": "int64", "open": "bool", "city": "string", "id": "int64",
        "day": "timestamp[us, tz=UTC]", "at": "timestamp[us, tz=UTC]", "zoned": "timestamp[us, tz=UTC]",
        "size": "int64",
        "flag": "bool", "text_day": "date32[day]", "small": "int64", "day_only": "date32[day]"}
    assert data.frame["zoned"].tolist() == (frame()["at"] - pd.Timedelta(hours=1)).tolist()
    assert data.frame["city"].tolist() == frame()["city"].tolist()


def test_parquet_columns_that_a_table_cannot_hold_are_left_out_and_named(tmp_path):
    table = pa.table({"id": pa.array([1, 2], pa.uint64()), "name": pa.array(["a", None], pa.large_string()),
                      "pair": [[1], [2]], "raw": [b"a", b"b"], "price": pa.array([1, 2], pa.decimal128(9, 2)),
                      "__index_level_0__": [4, 5], "empty": pa.nulls(2), "ns": pa.array([1, 2], pa.timestamp("ns"))})
    pq.write_table(table, tmp_path / "a.parquet")
    data = read_data(tmp_path / "a.parquet")
    assert [str(kind) for kind in data.table.schema.types] == ["int64", "string", "double", "string",
                                                               "timestamp[us, tz=UTC]"]
    assert sorted(note.split()[0] for note in data.notes) == ["__index_level_0__", "pair", "raw"]


def test_paths_that_are_no_data_file(tmp_path):
    (tmp_path / "offers.csv").write_text("id\n1\n")
    (tmp_path / "a.xlsx").write_bytes(b"PK")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and no more")
    (tmp_path / "cut.csv.gz").write_bytes(gzip.compress(b"id,x\n" * 1000)[:-9])
    with zipfile.ZipFile(tmp_path / "two.zip", "w") as archive:
        for name in ("a.csv", "b.csv"): archive.writestr(name, "id\n1\n")
    cases = {"offer.csv": "did you mean 'offers.csv'", "": "is a directory", "a.xlsx": "export a spreadsheet as CSV",
             "broken.parquet": "is not a parquet file", "cut.csv.gz": "check that the file is complete",
             "two.zip": "has 2 files that can be read: a.csv, b.csv", "none/a.csv": "no file"}
    for name, message in cases.items():
        with pytest.raises(MlopsError) as error: read_data(tmp_path / name)
        assert message in str(error.value)


def test_last_day_of_the_calendar_is_a_time(tmp_path):
    data = read(tmp_path / "a.csv", b"id,until\n1,9999-12-31\n2,2024-01-01\n")
    assert data["until"].dt.year.tolist() == [9999, 2024]
    read(tmp_path / "b.csv", b"id,until\n1,9999-12-31 00:00:00\n2,2024-01-01 00:00:00\n")
    assert date(9999, 12, 31) == data["until"].iloc[0].date()
