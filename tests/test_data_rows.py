"""Tests of data/rows.py: tables of known answers, with jsonschema as an oracle where it is there.

Run: python -m pytest tests/test_data_rows.py
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from data import rows

try:
    import jsonschema  # an oracle, where it is installed; the table says what it wants by itself
except ImportError:
    jsonschema = None

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    "value, schema, says",
    [
        (3, {}, None),
        (3, {"type": "integer"}, None),
        (3.0, {"type": "integer"}, None),
        (3.5, {"type": "integer"}, "wanted integer"),
        (True, {"type": "integer"}, "wanted integer"),
        (True, {"type": "number"}, "wanted number"),
        (1, {"type": "boolean"}, "wanted boolean"),
        (None, {"type": ["string", "null"]}, None),
        (2, {"type": ["string", "null"]}, "wanted string or null"),
        ("a", {"enum": ["a", "b"]}, None),
        ("c", {"enum": ["a", "b"]}, "wanted one of"),
        (1, {"enum": [True]}, "wanted one of"),
        (1.0, {"enum": [1]}, None),
        ([1, {"a": 2}], {"enum": [[1, {"a": 2}]]}, None),
        (5, {"minimum": 5, "maximum": 5}, None),
        (4.9, {"minimum": 5}, "at least 5"),
        (5.1, {"maximum": 5}, "at most 5"),
        ("4", {"minimum": 5}, None),
        ({}, {"required": ["a"]}, r"\$.a is missing"),
        ([], {"required": ["a"]}, None),
        ({"a": 1}, {"properties": {"a": {"type": "string"}}}, r"\$.a is 1, wanted string"),
        ({"b": 1}, {"properties": {"a": {"type": "string"}}}, None),
        ({"b": 1}, {"additionalProperties": False}, r"\$.b is not asked for"),
        ({"b": 1}, {"properties": {"b": {}}, "additionalProperties": False}, None),
        ({"b": 1}, {"additionalProperties": {"type": "string"}}, r"\$.b is 1"),
        ([1, "x"], {"items": {"type": "integer"}}, r"\$\[1\] is .x., wanted integer"),
        ([], {"items": {"type": "integer"}}, None),
        ({"a": [{"b": None}]}, {"properties": {"a": {"items": {"required": ["c"]}}}},
         r"\$.a\[0\].c is missing"),
    ],
)  # fmt: skip
def test_schema_fault(value, schema, says):
    rows.check_schema(schema)
    fault = rows.schema_fault(value, schema)
    assert fault is None if says is None else re.search(says, fault), fault
    if jsonschema:
        assert jsonschema.Draft202012Validator(schema).is_valid(value) == (fault is None)


@pytest.mark.parametrize(
    "schema", [3, {"pattern": "a"}, {"type": "text"}, {"properties": {"a": {"oneOf": []}}},
               {"items": {"type": ["string", "text"]}}, {"additionalProperties": {"x": 1}},
               {"required": "name"}, {"enum": "ab"}, {"items": 3}, {"minimum": "0"}],
)  # fmt: skip
def test_schema_that_would_not_be_looked_at_is_refused(schema):
    with pytest.raises(ValueError, match="schema"):
        rows.check_schema(schema)


# from a row to a prompt, and from a reply to an answer


def test_fill_replaces_columns_and_leaves_other_braces():
    row = {"first name": "Ann", "n": 3, "empty": ""}
    text = '{first name} has {n}{empty}: {"kind": 1} {} {{"a": {n}}}'
    assert rows.fill(text, row) == 'Ann has 3: {"kind": 1} {} {{"a": 3}}'
    assert rows.fill("{a}", {"a": "{b}", "b": 1}) == "{b}"  # a value is not a template
    with pytest.raises(ValueError, match="{nane} in the template is no column; wanted one of name"):
        rows.fill("{nane}", {"name": "x"})
    with pytest.raises(ValueError, match="row 2: {b}"):
        rows.fill_all("{b}", [{"b": 1}, {"a": 1}])


class Cut(str):
    cut = True


class Refused(str):
    refused = "content_filter"


@pytest.mark.parametrize(
    "reply, answer, says",
    [
        ("1", 1, None),
        (' {"a": [1.5]}\n', {"a": [1.5]}, None),
        ("```json\n[1]\n```", [1], None),
        ("Here it is:\n```json\n[1,\n2]\n```\nI hope that helps.", [1, 2], None),
        ("```\n[1]\n```\nor\n```\n[2]\n```", [1], None),
        ('{"a": "```"}', {"a": "```"}, None),
        ("It is 1.", None, "no JSON"),
        ("", None, "no JSON"),
        ("NaN", None, "NaN is no finite number"),
        ('{"a": -Infinity}', None, "no finite number"),
        ("1e999", None, "1e999 is no finite number"),
        ("[" * 10**5, None, "no JSON"),
        (Cut("1"), None, "cut off"),
        (Refused(""), None, "refused: content_filter"),
    ],
    ids=lambda x: str(x)[:20],
)
def test_read_answer(reply, answer, says):
    got, fault = rows.read_answer(reply, {})
    assert fault is None if says is None else says in fault, fault
    assert got == answer


def test_map_rows_asks_nothing_before_all_is_right():
    def model(prompts, **sampling):
        raise AssertionError("asked")

    for template, schema in (("{b}", {}), ("{a}", {"pattern": "x"})):
        with pytest.raises(ValueError):
            rows.map_rows(model, [{"a": 1}], template, schema)


# files


@pytest.mark.parametrize(
    "name, data, says",
    [
        ("a.jsonl", b'{"a": 1}\n\n{"b": 2}\n', [{"a": 1}, {"b": 2}]),
        ("a.jsonl", b'\xef\xbb\xbf{"a": "\xe2\x80\xa8"}', [{"a": "\u2028"}]),
        ("a.csv", b'n,m\r\n"x, ""y""\nz",1\r\n', [{"n": 'x, "y"\nz', "m": "1"}]),
        ("a.csv", b"n,m\n1\n1,2,3\n", [{"n": "1", "m": ""}, {"n": "1", "m": "2", "more": ["3"]}]),
        ("a.jsonl", b'{"a": 1}\n[1]\n', "a.jsonl, line 2: no JSON object"),
        ("a.jsonl", b"{\xff", "a.jsonl: not UTF-8, at byte 1"),
        ("a.csv", b"n\n\xff", "a.csv: not UTF-8, at byte 2"),
        ("a.csv", b"n\n" + b"x" * 140_000, "a.csv, after line 1: no CSV: field larger"),
    ],
)  # fmt: skip
def test_read_rows(tmp_path, name, data, says):
    (tmp_path / name).write_bytes(data)
    if isinstance(says, list):
        assert rows.read_rows(tmp_path / name) == says
        rows.write_rows(tmp_path / "new" / "b.jsonl", says)
        assert rows.read_rows(tmp_path / "new" / "b.jsonl") == says
    else:
        with pytest.raises(ValueError, match=re.escape(says)):
            rows.read_rows(tmp_path / name)


def test_read_json_names_the_file(tmp_path):
    (tmp_path / "s").write_text("{")
    with pytest.raises(ValueError, match="s: no JSON"):
        rows.read_json(tmp_path / "s")


# rows to train on


GOOD = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


@pytest.mark.parametrize(
    "record, reason",
    [
        (GOOD, None),
        ([], "not an object"),
        ({}, "no list"),
        ({"messages": []}, "no list"),
        ({"messages": [{"role": "user"}]}, "without role or content"),
        ({"messages": [{"role": "user", "content": "a", "colour": 1}]}, "unknown key colour"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "unknown role"),
        ({"messages": [{"role": "user", "content": 3}]}, "no text"),
        ({"messages": [{"role": "user", "content": ""}]}, "no text"),
        ({"messages": [{"role": "user", "content": "a"}]}, "no message of the assistant"),
        ({"messages": ["a"]}, "without role or content"),
    ],
)
def test_chat_checks(record, reason):
    fault = rows.chat_fault(record)
    assert fault is None if reason is None else reason in fault


def test_file_works_alone(tmp_path):
    shutil.copy(ROOT / "data" / "rows.py", tmp_path)
    done = subprocess.run([sys.executable, "rows.py"], cwd=tmp_path, capture_output=True, text=True,
                          timeout=60)  # fmt: skip
    assert done.returncode == 0, done.stderr
    shown = rows.__doc__[rows.__doc__.index("    apple ") :]
    assert done.stdout.splitlines() == [line.strip() for line in shown.splitlines()]


@pytest.mark.parametrize("schema", [{"type": {"a": 1}}, {"required": [["a"]]}, {"type": []}])
def test_odd_schemas_are_refused_before_anything_is_asked(schema):
    with pytest.raises(ValueError, match="schema"):
        rows.check_schema(schema)


def test_fill_takes_columns_with_any_signs():
    assert rows.fill("{Price (EUR)} {a}", {"Price (EUR)": 3, "a": "x"}) == "3 x"


def test_map_rows_refuses_a_model_that_drops_replies():
    with pytest.raises(ValueError, match="1 replies to 2 prompts"):
        rows.map_rows(lambda prompts, **_: ["1"], [{"a": 1}, {"a": 2}], "{a}", {})


def test_write_rows_keeps_a_lone_surrogate(tmp_path):
    rows.write_rows(tmp_path / "x.jsonl", [{"a": "\ud83d"}])
    assert rows.read_rows(tmp_path / "x.jsonl") == [{"a": "\ud83d"}]
