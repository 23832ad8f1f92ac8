"""README says what the code does: every flag with its default and meaning, and no file that is not there."""

import re
from dataclasses import MISSING, fields

import pytest
from conftest import ROOT

from data.common.flags import COMMANDS, spelled

README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_is_in_the_table_of_its_command(command):
    table = README.split(f"**`python -m {command}`**")[1].split("\n\n")[1]
    cells = [[cell.strip() for cell in line.split("|")] for line in table.splitlines()[2:]]
    wanted, words = {}, {MISSING: "required", False: "off", None: "", (): ""}
    for f in fields(COMMANDS[command]):
        word = next((word for default, word in words.items() if f.default is default), f"`{f.default}`")
        wanted[f"`{spelled(f)}`"] = [word, f.metadata["meaning"]]
    assert {row[1]: row[2:4] for row in cells} == wanted


def test_links_and_targets_exist():
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert link.startswith("https://") or (ROOT / link).exists(), link
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"`make ([a-z-]+)", README)):
        assert re.search(rf"^{target}:", makefile, re.M), target


def test_the_table_of_faults_names_tests_that_are_there():
    """A test that is renamed or gone would leave a promise that nobody keeps."""
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    names = set(re.findall(r"def test_(\w+)", tests))
    table = (ROOT / "tests" / "FAULTS.md").read_text()
    rows = [line.split("|") for line in table.splitlines() if re.match(r"\| \d", line)]
    assert [int(row[1]) for row in rows] == sorted({int(row[1]) for row in rows})
    for row in rows:
        if row[3].strip().startswith("not tried"):
            continue
        words = [word for word in re.findall(r"[a-z0-9]+(?:_[a-z0-9]+)+", row[4]) if not word.startswith("test_")]
        assert words or "test_" in row[4], row
        for word in words:
            assert any(word in name for name in names), word
