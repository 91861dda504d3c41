"""Edits of YAML files: only the named values change; comments and the order of the keys stay."""
import stat

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from mlops_nb.errors import MlopsError
from mlops_nb.yaml_edits import edit_text, with_note, write_values

NAMES = ("rounds", "seed", "rate", "leaves", "name")
numbers = st.one_of(st.integers(-9999, 9999), st.floats(-1e6, 1e6), st.booleans())
words = st.text("abc #:'\"-é{}[],&*!%@|>", max_size=8)
values = st.one_of(numbers, words)
comments = st.text("abc :#'\"é{}", max_size=12).map(lambda text: f"# {text}")


def lines_of(entries: dict, notes: list[str], indent: str, is_flow: bool) -> list[str]:
    "The lines of a map with a comment after each value and before each key."
    if is_flow: return ["{" + ", ".join(f"{name}: {dumped(value)}" for name, value in entries.items()) + "}"]
    return [line for (name, value), note in zip(entries.items(), notes * 9, strict=False)
            for line in (f"{indent}{note}", f"{indent}{name}:  {dumped(value)}   {note}")]


def dumped(value) -> str:
    return yaml.safe_dump(value, width=999, default_style='"' if isinstance(value, str) else None).splitlines()[0]


@settings(max_examples=60, deadline=None)
@given(top=st.dictionaries(st.sampled_from(NAMES), values, min_size=1),
       inner=st.dictionaries(st.sampled_from(NAMES), values, min_size=1), notes=st.lists(comments, min_size=1),
       is_flow=st.booleans(), data=st.data())
def test_only_the_named_values_change(top, inner, notes, is_flow, data):
    inner_lines = lines_of(inner, notes, "  ", is_flow)
    inner_text = f"parameters: {inner_lines[0]}  {notes[0]}" if is_flow else "\n".join(["parameters:", *inner_lines])
    text = "\n".join([*lines_of(top, notes, "", False), inner_text, "last: [1, {a: b}]  # end", ""])
    new = data.draw(st.dictionaries(st.sampled_from(NAMES), values, min_size=1))
    new_top = data.draw(st.dictionaries(st.sampled_from(sorted(top)), values))
    edited = edit_text(text, {**new_top, **{f"parameters.{name}": value for name, value in new.items()}}, "x.yml")
    expected = {**top, **new_top, "parameters": {**inner, **new}, "last": [1, {"a": "b"}]}
    assert repr(yaml.safe_load(edited)["last"]) == repr(expected["last"])
    assert plain_of(edited) == repr(sorted_of(expected))
    added = len(set(new) - set(inner))
    old_lines, new_lines = text.splitlines(), edited.splitlines()
    assert len(new_lines) == len(old_lines) + (0 if is_flow else added)
    alone, old_alone = ([line for line in lines if line.strip()[0] == "#"] for lines in (new_lines, old_lines))
    assert alone == old_alone
    changed = {*new_top, *new, "parameters"} if is_flow else {*new_top, *new}
    trailing = [line.rpartition("   ")[2] for line in old_lines if "   # " in line]
    assert [line.rpartition("   ")[2] for line in new_lines if "   # " in line] == trailing
    untouched = [line for line in old_lines if line.split(":")[0].strip() not in changed]
    assert [line for line in new_lines if line.split(":")[0].strip() not in changed] == untouched


def sorted_of(content: dict) -> dict:
    return {key: sorted_of(value) if isinstance(value, dict) else value for key, value in sorted(content.items())}


def plain_of(text: str) -> str:
    from mlops_nb.yaml_files import plain, read_yaml
    return repr(sorted_of(plain(read_yaml(text, "x.yml"))))


@pytest.mark.parametrize("text, path, words", [
    ("a: &x 1\nb: *x\n", "a", "would change other values"), ("a: &x 1\nb: *x\n", "b", "would change other values"),
    ("a: &x {c: 1}\nb:\n  <<: *x\n  d: 1\n", "b.c", None), ("a: {c: 1}\nb: 1\n", "b.c", "has no map b"),
    ("a: |\n  text\n", "a", "not a single value"), ("a:\nb: 1\n", "a", "not a single value"),
    ("a: [1]\n", "a", "x.yml:1: the value of a"), ("a: 1\na: 2\n", "a", "duplicate key")])
def test_what_cannot_be_edited_alone_is_refused(text, path, words):
    if words is None:  # the key of a merge is added to the map, and overrides it there
        assert edit_text(text, {path: 7}, "x.yml") == "a: &x {c: 1}\nb:\n  c: 7\n  <<: *x\n  d: 1\n"
        return
    with pytest.raises(MlopsError, match=words): edit_text(text, {path: 7}, "x.yml")


def test_infinity_has_no_text():
    with pytest.raises(MlopsError, match="cannot write inf"): edit_text("a: 1", {"a": float("inf")}, "x.yml")


def test_a_note_replaces_the_last_one_and_stands_before_its_key():
    text = "# head\r\nb: 1\r\na: 2 # two\r\n"
    once = with_note(text, "a", "# note:", ["first", "second"])
    assert once == "# head\r\nb: 1\r\n# note: first\r\n# note: second\r\na: 2 # two\r\n"
    assert with_note(once, "b", "# note:", ["third"]) == "# head\r\n# note: third\r\nb: 1\r\na: 2 # two\r\n"


def test_a_file_is_written_whole_and_keeps_its_mode_and_line_ends(tmp_path):
    file, link = tmp_path / "train.yml", tmp_path / "link.yml"
    file.write_bytes(b"a: 1\r\nb: 2  # two\r\n")
    file.chmod(0o644)
    link.symlink_to(file)
    write_values(link, {"b": 3}, "a", "# note:", ["one"])
    assert file.read_bytes() == b"# note: one\r\na: 1\r\nb: 3  # two\r\n" and link.is_symlink()
    assert stat.S_IMODE(file.stat().st_mode) == 0o644 and len(list(tmp_path.iterdir())) == 2
    with pytest.raises(MlopsError): write_values(file, {"c.d": 3}, "a", "# note:", ["two"])
    assert file.read_bytes().startswith(b"# note: one\r\n")


def test_a_text_that_looks_like_the_note_is_not_removed(tmp_path):
    file = tmp_path / "x.yml"
    file.write_text('a: 1\nb: "x\n# note: y\n  z"\n')
    with pytest.raises(MlopsError, match="values that begin with"): write_values(file, {"a": 2}, "a", "# note:", ["z"])
    assert file.read_text().startswith("a: 1")
