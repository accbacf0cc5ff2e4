"""Tests that README says what is there: files, their lines, names, links.

Run: python -m pytest tests/test_readme.py
"""

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


LINES = re.findall(r"^\| `([\w/.]+)` \|.*?\| (\d+) \|", README, re.M)


assert len(LINES) > 15, "the table is not where it was"


@pytest.mark.parametrize("path, lines", LINES)
def test_lines_of_each_file(path, lines):
    files = [ROOT / path] if path.endswith(".py") else (ROOT / path).glob("*.py")
    there = sum(file.read_text().count("\n") for file in files)
    assert abs(int(lines) / there - 1) < 0.03, f"{path} has {there} lines"


def test_every_file_of_the_project_is_in_the_table():
    files = [*ROOT.glob("[0-9]*.py"), *(ROOT / "data").glob("[a-z]*.py")]
    assert len(files) > 15
    missing = [f for f in files if f"| `{f.relative_to(ROOT)}` |" not in README]
    assert not missing


def test_names_stand_where_the_index_says():
    rows = re.search(r"\| where is \|.*?\n\n", README, re.S)[0].splitlines()[2:]
    found = 0
    for row in filter(None, rows):
        for path, names in re.findall(r"`([\w/]+)\.py`: ((?:`\w+`(?:, )?)+)", row):
            module = importlib.import_module(path.replace("/", "."))
            for name in re.findall(r"\w+", names):
                assert hasattr(module, name), f"{path}.py has no {name}"
                found += 1
    assert found > 40


def test_links_lead_to_files():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert len(links) > 5
    for link in links:
        if link.startswith("#"):
            assert f"\n## {link[1:].capitalize()}\n" in README
        else:
            assert (ROOT / link).exists(), link
