"Reading declared csv files, and checking their rows: without Spark."
import zipfile

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlops_nb.data import csv_files
from mlops_nb.data.csv_files import CsvFile
from mlops_nb.errors import MlopsError

often = settings(max_examples=60, deadline=None)  # on a busy machine too

AIRPORTS = CsvFile("airports", "faa text, name text, lat float, lon float, alt int, tz float, dst text, tzone text?",
                   ("faa",))
PLANES = CsvFile("planes", "tailnum text, year int?, type text?, manufacturer text?, model text?, engines int?, "
                           "seats int?, speed int?, engine text?", ("tailnum",), dict(engines=(1, 12)))
AIRLINES = CsvFile("airlines", "carrier text, name text", ("carrier",))
ALL = (AIRPORTS, PLANES, AIRLINES)
AIRPORT = "EWR,Newark,40.7,-74.1,18,-5,A,America/New_York"
HEADER = "faa,name,lat,lon,alt,tz,dst,tzone"


def read(tmp_path, text: str, declared: CsvFile = AIRPORTS):
    path = tmp_path / declared.file
    path.write_text(text)
    return csv_files.read_source_file(path, declared)


def test_missing_values_stay_missing_and_whole_numbers_whole(tmp_path):
    header = ",".join(PLANES.types)
    text = f"{header}\nN1,NA,Fixed wing,BOEING,737,2,140,NA,Turbo-fan\nN2,1999.0,NA,,A320,2,,99,\n"
    frame = read(tmp_path, text, PLANES)
    assert frame.index.tolist() == [2, 3]
    assert frame.year.isna().tolist() == [True, False] and str(frame.year[3]) == "1999"
    assert frame.type.isna().tolist() == [False, True] and frame.manufacturer.isna().tolist() == [False, True]
    with pytest.raises(MlopsError, match="planes.csv: Float value 1999.5.* was truncated"):
        read(tmp_path, text.replace("1999.0", "1999.5"), PLANES)


def test_columns_are_found_by_name_and_further_ones_ignored(tmp_path):
    line = "1928,Newark,EWR,40.7,-74.1,18,-5,A,America/New_York"
    frame = read(tmp_path, f"since,name,faa,lat,lon,alt,tz,dst,tzone\n{line}\n")
    assert frame.loc[2, ["faa", "name", "alt"]].tolist() == ["EWR", "Newark", 18] and "since" not in frame


@pytest.mark.parametrize("text, message", [
    (f"{HEADER}\n{AIRPORT}", "airports.csv breaks off in line 2: 'EWR,Newark"),
    (f"{HEADER}\n{AIRPORT}\nJFK,Kenn", "airports.csv breaks off in line 3: 'JFK,Kenn'"),
    (f"{HEADER}\n{AIRPORT}\nJFK,Kennedy\n", "airports.csv: .*Expected 8 columns, got 2: JFK,Kennedy"),
    (f"{HEADER}\n{AIRPORT.replace('18', 'high')}\n", "airports.csv: .*invalid value 'high'"),
    (f"{HEADER}\n{AIRPORT.replace('18', '18.5')}\n", "airports.csv: .*invalid value '18.5'"),
    (f"{HEADER}\n{AIRPORT}\nNA,Nowhere,1,2,3,4,A,NA\n", "airports.csv has no faa in line 3"),
    (f"{HEADER.replace('lat', 'latitude')}\n{AIRPORT}\n", "no column 'lat' in airports.csv\n  .* dst, faa, latitude"),
    ("", "airports.csv breaks off in line 1: ''"),
    (f"{HEADER}\n", None)])
def test_damaged_files_are_refused_with_what_is_wrong(tmp_path, text, message):
    if message is None: assert read(tmp_path, text).empty
    else:
        with pytest.raises(MlopsError, match=message): read(tmp_path, text)


def test_a_zip_that_was_cut_is_refused_wherever_it_was(tmp_path):
    whole = tmp_path / "airlines.csv.zip"
    with zipfile.ZipFile(whole, "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("airlines.csv", "carrier,name\n9E,Endeavor\n")
    data = whole.read_bytes()
    assert len(csv_files.read_source_file(whole, AIRLINES)) == 1
    for size in range(0, len(data), 7):
        whole.write_bytes(data[:size])
        with pytest.raises(MlopsError, match="airlines.csv.zip cannot be unzipped"):
            csv_files.read_source_file(whole, AIRLINES)


def test_a_zip_with_a_flipped_bit_is_refused(tmp_path):
    path = tmp_path / "airlines.csv.zip"
    with zipfile.ZipFile(path, "w") as z: z.writestr("airlines.csv", "carrier,name\n9E,Endeavor\n")
    data = bytearray(path.read_bytes())
    data[data.index(b"Endeavor")] ^= 1
    path.write_bytes(data)
    with pytest.raises(MlopsError, match="cannot be unzipped: Bad CRC-32"): csv_files.read_source_file(path, AIRLINES)


def test_source_files_are_located_by_name(tmp_path):
    for one in ALL: (tmp_path / one.file).touch()
    assert {p.name for p in csv_files.source_files(str(tmp_path), ALL).values()} == {one.file for one in ALL}
    (tmp_path / "planes.csv.zip").touch()
    with pytest.raises(MlopsError, match="holds both planes.csv and planes.csv.zip"):
        csv_files.source_files(str(tmp_path), ALL)
    for path in tmp_path.glob("planes*"): path.unlink()
    (tmp_path / "plane.csv").touch()
    with pytest.raises(MlopsError, match="no file 'planes.csv' in .*\n  did you mean 'plane.csv'"):
        csv_files.source_files(str(tmp_path), ALL)
    with pytest.raises(MlopsError, match="neither a folder nor an installed package"):
        csv_files.source_files("no-such-thing", ALL)


def test_a_changed_file_of_the_package_is_refused(tmp_path, monkeypatch):
    from importlib.metadata import FileHash, PackagePath

    class Installed(PackagePath):
        hash = FileHash("sha256=5hhM4Q4mYTT9z6QB6PGpUAW81PGNFrYrdXMj4oM_6ak")  # of the text "uv"
        def locate(self): return tmp_path / self.name

    monkeypatch.setattr(csv_files, "files", lambda package: [Installed("data/airlines.csv")])
    (tmp_path / "airlines.csv").write_text("uv")
    csv_files.check_fingerprints("some-package")
    (tmp_path / "airlines.csv").write_text("uw")
    with pytest.raises(MlopsError, match="airlines.csv is not the file that some-package installed"):
        csv_files.check_fingerprints("some-package")


# ---- rows

PAIRS = CsvFile("f", "k text, j text", ("k", "j"))


@often
@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("xy")), max_size=6))
def test_duplicate_keys_are_refused(keys):
    frame = pd.DataFrame(keys, columns=["k", "j"])
    if len(set(keys)) == len(keys): csv_files.check_unique_rows(PAIRS, frame)
    else:
        with pytest.raises(MlopsError, match="rows share one key .k, j."):
            csv_files.check_unique_rows(PAIRS, frame)


def test_many_wrong_rows_are_counted_and_three_shown():
    frame = pd.DataFrame({"k": np.zeros(1000, int), "j": "x"})
    with pytest.raises(MlopsError) as caught: csv_files.check_unique_rows(PAIRS, frame)
    assert len(caught.value.message.splitlines()) == 5 and caught.value.message.endswith("and 997 more")
