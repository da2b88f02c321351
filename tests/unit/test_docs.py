"""What README and docs name exists, and the commands that they show are ones that load."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from conftest import ROOT

from mpsl_dist import config
from mpsl_dist.__main__ import _parser

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "slurm" / "README.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text("utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_of_the_project_that_are_named_exist(page: Path) -> None:
    folders = "mpsl_dist|tests|configs|docs|launch|slurm"
    for name in re.findall(rf"`((?:{folders})/[\w./-]+)`", page.read_text("utf-8")):
        assert (ROOT / name).exists(), name


def shown_commands() -> list[str]:
    lines = [line for page in PAGES for line in page.read_text("utf-8").splitlines()]
    shown = [line.strip() for line in lines if line.startswith("    ")]
    return [
        line
        for line in shown
        if re.search(r"mpsl_dist (train|cost|partition|data|bench|audit) ", line)
    ]


def test_shown_reports_are_commands() -> None:
    text = (ROOT / "docs" / "report.md").read_text("utf-8")
    lines = re.findall(r"^    python -m mpsl_dist (.*)$", text, re.MULTILINE)
    told = [_parser().parse_args(shlex.split(line)) for line in lines]
    assert len(told) == 2 and all(options.command == "report" for options in told)


@pytest.mark.parametrize("line", shown_commands())
def test_shown_experiments_load(line: str) -> None:
    words = shlex.split(re.sub(r"\s#.*", "", line).rstrip("\\"))
    files = [word for word in words if word.endswith(".yaml")]
    overrides = [w for w in words if re.match(r"[a-z_.]+=", w) and "$" not in w]
    for name in files:
        if (ROOT / name).exists():
            config.load(ROOT / name, overrides)
        else:
            assert not name.startswith("configs/"), f"{name} is no file of the project"
