"""Reading YAML into trees with places, and merging them."""

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlops_nb.errors import MlopsError
from mlops_nb.yaml_files import (
    LARGEST_FILE,
    LARGEST_TREE,
    join_by,
    key_places,
    merge_trees,
    node_of,
    plain,
    read_yaml,
    refuse_large,
)

text = st.text(
    st.characters(
        codec="utf-8", exclude_categories=["Cc", "Cs"], exclude_characters="\x85\u2028\u2029\ufeff\ufffe\uffff"
    )
)
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | text
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(text, inner, max_size=4), max_leaves=20
)


@given(st.dictionaries(text, values))
def test_json_is_yaml(value):
    assert plain(read_yaml(json.dumps(value, indent=1, ensure_ascii=False), "a.json")) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("on", "on"),
        ("yes", "yes"),
        ("NO", "NO"),
        ("True", True),
        ("2013-04-01", "2013-04-01"),
        ("12:30", "12:30"),
        ("007", 7),
        ("0x10", 16),
        ("0o10", 8),
        ("1_000", "1_000"),
        ("1.", 1.0),
        (".5", 0.5),
        ("1e3", 1000.0),
        ("+1", 1),
        ("", None),
        ("~", None),
        ("'1'", "1"),
        ('"true"', "true"),
        ("!!str 1", "1"),
        ("'-'", "-"),
        ("1.2.3", "1.2.3"),
        (".", "."),
    ],
)
def test_plain_scalars_are_those_of_yaml_1_2(text, value):
    read_value = plain(read_yaml(f"a: {text}", "a.yml"))["a"]
    assert read_value == value and type(read_value) is type(value)


def test_anchors_and_merge_keys():
    node = read_yaml("base: &base {a: 1, b: {c: 2}}\njob:\n  b: 3\n  <<: *base\n", "a.yml")
    assert plain(node)["job"] == {"a": 1, "b": 3}
    assert node.get("job").get("b").place.line == 3


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("a: 1\nb: [1, 2\nc: 3", "a.yml:2: '[' is never closed\n  in `b: [1, 2`"),
        ("b: {x: [1, 2}", "a.yml:1: '[' is closed by '}'"),
        ("b: [1,\n  'a' 'b']\nc: 3", "a.yml:2: a comma is missing before ''b']'"),
        ("a: 1]\nb: ]", "a.yml:2: ']' has no opening bracket"),
        ("a: \"x\nb: 2\nc: 3", "a.yml:1: the quote \" is never closed"),
        ("a: 'x' y", "a.yml:1: text after the closing quote: y"),
        ("a:\n  b: 1\n\tc: 2", "a.yml:3: a tab in the indentation"),
        ("a:\n  b:1\n  c: 2", "a.yml:2: there is no space after the colon\n  in `b:1`"),
        ("a: 1\nword\nc: 2", "a.yml:2: there is no colon after the key"),
        ("a:\n  - b\n  c: 1", "a.yml:3: a key stands among the items of a list"),
        ("a:\n  b: 1\n  - c", "a.yml:3: a list item stands among the keys of a map"),
        ("a: `x`", "a.yml:1: a value cannot begin with '`' here"),
        ("a:1", "a.yml:1: expected a map, got a single value\n  write a space after the colon"),
        ("a: 1\n  b: 2", "a.yml:2: the line is indented deeper than line 1, which has a value already"),
        ("a: 1\nb:\n  c: 1\n  c: 2", "a.yml:4: duplicate key 'c'\n  first defined in line 3"),
        ("- a", "a.yml:1: expected a map, got a list"),
        ("a: *nobody", "a.yml:1: no anchor &nobody before the alias *nobody"),
        ("a: 1\n---\nb: 2", "a.yml:2: a second document begins here"),
        ("a: !date 1", "a.yml:1: cannot read '1' as !date"),
        ("a: &x [*x]", "a.yml:1: alias (*) to a value that contains the alias"),
        ("a: " + 2000 * "[" + 2000 * "]", "a.yml:1: values are nested too deeply"),
        ("? [a]\n: 1", "a.yml:1: a key must be a string"),
        ("a: \x01", "a.yml:1: character U+0001 is not allowed"),
    ],
)
def test_invalid_yaml_is_an_error_with_its_line(source, message):
    with pytest.raises(MlopsError) as error:
        read_yaml(source, "a.yml")
    assert message in str(error.value)


def copies(levels: int, uses: int) -> str:
    """YAML whose last value has `uses` ** `levels` copies of the first: each level consists of aliases to the last."""
    lines = [f"a{i}: &a{i} [{', '.join(uses * [f'*a{i - 1}'])}]\n" for i in range(1, levels + 1)]
    return "a0: &a0 [1]\n" + "".join(lines)


def test_aliases_count_as_often_as_they_are_used():
    start = time.process_time()
    with pytest.raises(MlopsError, match=r"^a\.yml:\d+: too many values.*\n.*at most 100,000 keys and values"):
        read_yaml(copies(9, 9), "a.yml")
    assert time.process_time() - start < 1
    assert str(plain(read_yaml(copies(3, 9), "a.yml"))["a3"]).count("1") == 9**3


@pytest.mark.parametrize("count", [LARGEST_TREE - 3, LARGEST_TREE - 2])
def test_the_largest_tree(count):
    text = "a: [" + "1, " * count + "]"  # and the map, its key and its list
    if count + 3 <= LARGEST_TREE:
        refuse_large(text, "a.yml")
    else:
        with pytest.raises(MlopsError, match="too many values"):
            refuse_large(text, "a.yml")


@pytest.mark.parametrize("text", ["a: " + "[" * 10_000, "{a: " * 10_000, "a: " + "x" * LARGEST_FILE])
def test_large_files_are_refused_before_a_tree_is_built(text):
    with pytest.raises(MlopsError, match=r"^a\.yml:1: values are nested too deeply|^a\.yml: the file has 10,000,003 "):
        read_yaml(text, "a.yml")


def test_an_empty_file_is_an_empty_map():
    assert plain(read_yaml("", "a.yml")) == plain(read_yaml("# nothing\n", "a.yml")) == {}


def test_places_name_the_line_of_every_value():
    places = key_places(read_yaml("a:\n  - b: 1\n  - c:\n      d: 2\ntargets:\n  dev: {}\n", "a.yml"))
    assert {key: place.line for key, place in places.items()} == {
        "": 1,
        "a": 1,
        "a[0]": 2,
        "a[0].b": 2,
        "a[1]": 3,
        "a[1].c": 3,
        "a[1].c.d": 4,
        "targets": 5,
        "targets.dev": 6,
    }
    assert [key for key, place in places.items() if place.target] == ["targets", "targets.dev"]


@given(st.dictionaries(st.sampled_from("abc"), values), st.dictionaries(st.sampled_from("abc"), values))
def test_merge_keeps_the_values_of_one_side(under, over):
    place = read_yaml("", "a.yml").place
    try:
        merged = plain(merge_trees(node_of(under, place), node_of(over, place)))
    except MlopsError:
        return
    assert merged.keys() == under.keys() | over.keys()
    for name in under.keys() ^ over.keys():
        assert merged[name] == (under | over)[name]
    for name in under.keys() & over.keys():
        if isinstance(under[name], list) and isinstance(over[name], list):
            assert merged[name] == under[name] + over[name]
        elif not isinstance(over[name], dict) and over[name] is not None:
            assert merged[name] == over[name]


def test_shapes_that_do_not_merge_are_named():
    under, over = read_yaml("jobs:\n  a: {b: 1}", "under.yml"), read_yaml("jobs:\n  a: 1", "over.yml")
    with pytest.raises(MlopsError, match="over.yml:2: jobs.a is a single value here and a map at under.yml:2"):
        merge_trees(under, over)


def test_only_items_of_a_target_are_merged_into_items_outside():
    tree = read_yaml(
        "items: [{k: a, n: 1}, {k: a, n: 2}, {n: 3}]\ntargets: {items: [{k: a, m: 4}, {k: b}, {k: b}, {n: 5}]}", "a.yml"
    )
    both = merge_trees(tree.get("items"), tree.get("targets").get("items"))
    assert plain(join_by(both, "k")) == [
        {"k": "a", "n": 1, "m": 4},
        {"k": "a", "n": 2},
        {"n": 3},
        {"k": "b"},
        {"k": "b"},
        {"n": 5},
    ]
