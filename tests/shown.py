"""What README and docs show: pages, blocks of code, and the lines of them that a shell takes."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from pathlib import Path

import yaml
from conftest import ROOT

PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "slurm/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
#: The words of a command of ours, behind however it is called.
COMMANDS = r"(?:-m mpsl_dist|(?:^|/)mpsl-dist) (\w.*)"
SCRIPTS = r"(?:^|[ /])((?:python -m mpsl_dist\.|(?:python )?(?:tests|launch)/)\S.*)"
_PROGRAMS = "python|mpsl-dist|pip|torchrun|sbatch|shtab|tensorboard|mkdocs|export"
_SHELL = rf"(?:[A-Z_]+=\S+ )*(?:(?:{_PROGRAMS}) |(?:launch|tests|\.venv/bin)/\w|\(umask)"


def shown_lines(page: Path) -> list[str]:
    """Every line of a page's blocks of code, continued ones joined, without comments."""
    text = page.read_text("utf-8").replace("\\\n", " ")
    fenced = "".join(re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S)).splitlines()
    shown = [line.strip() for line in text.splitlines() if line.startswith("    ")]
    return [re.sub(r"(^|\s)#.*", "", line).strip() for line in [*shown, *fenced]]


def shown(pattern: str, inline: bool = False) -> list[str]:
    """What matches in blocks of code, and perhaps in the code within lines, once each."""
    lines = [line for page in PAGES for line in shown_lines(page)]
    if inline:
        codes = [re.findall(r"`([^`\n]+)`", page.read_text("utf-8")) for page in PAGES]
        lines += [code for found in codes for code in found]
    return list(dict.fromkeys(found[1] for line in lines if (found := re.search(pattern, line))))


def shell_lines(page: Path) -> list[str]:
    """The lines that are for a shell, in the page's order, their blanks single."""
    return [" ".join(line.split()) for line in shown_lines(page) if re.match(_SHELL, line)]


def block(page: Path, first: str) -> str:
    """The indented block of code that begins with a line."""
    text = page.read_text("utf-8")
    (found,) = re.findall(rf"^ +{re.escape(first)}\n(?:(?: +.*)?\n)+", text, re.M)
    return textwrap.dedent(found)


def shorten(path: Path, keys: Sequence[str] = ()) -> None:
    """Leave the first value of some keys of a sweep's grids, by default of all."""
    values = yaml.safe_load(path.read_text("utf-8"))
    for part in (values, *values.get("profiles", {}).values()):
        part["grid"] = {
            key: options[:1] if key in keys or not keys else options
            for key, options in part["grid"].items()
        }
    path.write_text(yaml.safe_dump(values, sort_keys=False), "utf-8")
