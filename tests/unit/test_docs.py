"""What README and docs name exists, and the commands that they show are ones that load."""

from __future__ import annotations

import argparse
import configparser
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from shown import COMMANDS, PAGES, SCRIPTS, shown

from mpsl_dist import __main__ as command_line
from mpsl_dist import config
from mpsl_dist.analysis import reference
from mpsl_dist.config import shipped

sys.path.append(str(ROOT / "launch"))
import submit


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text("utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_of_the_project_that_are_named_exist(page: Path) -> None:
    folders = "mpsl_dist|tests|configs|docs|launch|slurm"
    for name in re.findall(rf"`((?:{folders})/[\w./-]+)`", page.read_text("utf-8")):
        assert (ROOT / name).exists(), name


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], argparse.Namespace]:
    """Words of the command line, as the command would get them."""
    seen: list[argparse.Namespace] = []
    monkeypatch.setattr(command_line, "_perform", lambda options: seen.append(options) or 0)

    def parse(words: str) -> argparse.Namespace:
        assert command_line.main(shlex.split(words)) == 0
        return seen.pop()

    return parse


@pytest.mark.parametrize("words", shown(COMMANDS))
def test_shown_commands_can_be_given_and_shown_experiments_load(words: str, parsed) -> None:
    options = parsed(words)
    given = [getattr(options, "config", ""), *getattr(options, "targets", ())]
    given += getattr(options, "overrides", ())
    overrides = [word for word in given if "=" in word and "$" not in word]
    for name in (word for word in given if "=" not in word):
        if (ROOT / name).is_file():
            config.load(ROOT / name, overrides)
        elif name in shipped.names():
            config.load(name, overrides)
        elif name:
            own = name == "CONFIG" or name.endswith(".yaml") or name.startswith("runs/")
            assert own and not name.startswith("configs/"), f"{name} is no file of the project"
    if options.command == "explain" and options.key:
        reference.explain(options.key)
    if options.command == "configs" and options.action:
        shipped.find(options.name)


@pytest.mark.parametrize("words", shown(r"^(?:python -m )?mpsl_dist (\w.*)", inline=True))
def test_commands_within_lines_exist(words: str, parsed) -> None:
    words = re.sub(r"\[.*?\]|…", "", words)
    if " " in words:
        parsed(words)
    else:
        with pytest.raises(SystemExit) as help_shown:
            parsed(f"{words} --help")
        assert help_shown.value.code == 0


@pytest.mark.parametrize("words", shown(r"python launch/submit\.py (.*)"))
def test_shown_jobs_can_be_asked_for(words: str) -> None:
    options, rest = submit._parser().parse_known_args(shlex.split(words))
    files = [word for word in options.words if "=" not in word]
    assert files and all(list(ROOT.glob(name)) for name in files)
    asked = [*(word for word in options.words if "=" in word), *rest]
    assert all(re.match(r"[a-z_.]+=", word) for word in asked)


@pytest.mark.parametrize("line", shown(SCRIPTS))
def test_shown_scripts_exist_and_know_the_options_that_they_are_given(line: str) -> None:
    name, *words = line.removeprefix("python ").split()
    if name == "-m":
        name = words.pop(0).replace(".", "/") + ".py"
    assert (ROOT / name).is_file()
    if name == "tests/run.sh":  # what follows is pytest's
        words = [word for word in words if not word.startswith("--")]
        assert all((ROOT / word).exists() for word in words)
    source = (ROOT / name).read_text("utf-8")
    if name == "launch/submit.py":
        return
    assert [w for w in words if w.startswith("--") and w.partition("=")[0] not in source] == []


def test_shown_extras_can_be_installed() -> None:
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    text = "\n".join(page.read_text("utf-8") for page in PAGES)
    named = {
        name for extras in re.findall(r"mpsl_dist\[([\w,]+)\]", text) for name in extras.split(",")
    }
    assert named and named <= set(settings["options.extras_require"])


def test_every_page_is_on_the_site_and_in_the_readme() -> None:
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))
    groups = [
        entry if isinstance(entry, str) else next(iter(entry.values())) for entry in site["nav"]
    ]
    listed = [page for group in groups for page in ([group] if isinstance(group, str) else group)]
    there = {page.name for page in (ROOT / "docs").glob("*.md")}
    assert sorted(listed) == sorted(there)
    readme = (ROOT / "README.md").read_text("utf-8")
    assert {name for name in there if f"docs/{name}" not in readme} == {"index.md"}


def test_pages_of_the_site_link_to_pages_of_the_site() -> None:
    """A link out of docs/ leads nowhere on the site."""
    for page in (ROOT / "docs").glob("*.md"):
        assert "](../" not in page.read_text("utf-8"), page.name


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("material")
    line = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(tmp_path)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "configuration" / "index.html").is_file()
