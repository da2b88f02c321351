"""A report as a page, as markdown and as pictures, in a folder of its own."""

from __future__ import annotations

import datetime
import html
import itertools
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mpsl_dist.analysis.report import owners, paper, sections
from mpsl_dist.analysis.report.content import (
    Cell,
    Fold,
    Picture,
    Points,
    Section,
    Words,
    number,
)
from mpsl_dist.analysis.report.gather import Gathered, gather
from mpsl_dist.errors import ConfigError, RunError

#: What a report's folder holds, and nothing else of it is ever replaced.
PAGE, MARKDOWN, PICTURES = "report.html", "report.md", "pictures"


def write(folders: Sequence[str | Path], out: Path, overwrite: bool = False) -> list[Path]:
    """Write a report of runs, and return the paths of page and markdown.

    Parameters
    ----------
    folders : sequence of str or Path
        Run directories; those that are not whole are named in the report and left out.
    out : Path
        A folder that is not there yet, or an earlier report's.
    overwrite : bool
        Whether an earlier report there may be replaced.

    Raises
    ------
    ConfigError
        If ``out`` stands in the way, or no run can be reported.
    RunError
        If the report cannot be written; an earlier one is then as it was.
    """
    check_out(out, overwrite)
    found = gather(folders)
    made = contents(found)
    title = _title(found)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as beside:
            _fill(Path(beside), title, made)
            _move(Path(beside), out)
    except OSError as error:
        reason = error.strerror or error
        raise RunError(f"--out: {out} cannot be written: {reason}; choose another") from error
    return [out / PAGE, out / MARKDOWN]


def check_out(out: Path, overwrite: bool) -> None:
    """Refuse a folder that holds anything but an earlier report that may be replaced.

    Raises
    ------
    ConfigError
        With what to do.
    """
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise ConfigError(f"--out: {out} is no folder; choose another")
    there = sorted(path.name for path in out.iterdir()) if out.exists() else []
    if not there:
        return
    if PAGE not in there or set(there) - {PAGE, MARKDOWN, PICTURES}:
        raise ConfigError(f"--out: {out} holds other things than a report; choose another")
    if not overwrite:
        raise ConfigError(
            f"--out: {out} holds a report; choose another, or replace it with --overwrite"
        )


def contents(found: Gathered) -> list[Section]:
    """Return the sections of a report, those with nothing to say left out."""
    made = [sections.summary(found), *paper.sections_of(found)]
    if found.runs:
        made += [sections.results(found), sections.curves(found), owners.partition(found)]
        made += [owners.traffic(found), owners.clients(found), sections.all_runs(found)]
    if found.left_out:
        made.append(sections.left_out(found))
    return made


def _title(found: Gathered) -> str:
    if len(found.runs) == 1:
        return f"Report of {found.runs[0].path.name}"
    return f"Report of {number(len(found.runs) + len(found.costs), 'run')}"


def _fill(folder: Path, title: str, made: Sequence[Section]) -> None:
    when = datetime.datetime.now(datetime.timezone.utc)
    subtitle = f"Made by mpsl_dist report, {when:%Y-%m-%d %H:%M} UTC"
    (folder / PAGE).write_text(page(title, subtitle, made), encoding="utf-8")
    (folder / MARKDOWN).write_text(markdown(title, subtitle, made), encoding="utf-8")
    (folder / PICTURES).mkdir()
    for part in itertools.chain.from_iterable(section.parts for section in made):
        if isinstance(part, Picture):
            (folder / PICTURES / f"{part.name}.svg").write_text(part.svg, encoding="utf-8")


def _move(beside: Path, out: Path) -> None:
    """Put a whole report where an earlier one, or none, was."""
    out.mkdir(exist_ok=True)
    for name in (PICTURES, MARKDOWN, PAGE):
        if (out / name).is_dir():
            shutil.rmtree(out / name)
        (beside / name).replace(out / name)


def page(title: str, subtitle: str, made: Sequence[Section]) -> str:
    """Return the HTML page: whole in itself, everything that users wrote escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("mpsl_dist.analysis.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
    )
    template = environment.get_template("page.html.j2")
    return template.render(title=title, subtitle=subtitle, sections=made)


def markdown(title: str, subtitle: str, made: Sequence[Section]) -> str:
    """Return the same for a repository: pictures are files beside it."""
    blocks = [f"# {_plain(title)}", _plain(subtitle)]
    for section in made:
        blocks.append(f"## {_plain(section.title)}")
        for part in section.parts:
            blocks += _blocks(part)
    return "\n\n".join(blocks) + "\n"


def _blocks(part: Any) -> Iterator[str]:
    if isinstance(part, Words):
        yield f"**{_plain(part.text)}**" if part.marked else _plain(part.text)
    elif isinstance(part, Points):
        yield "\n".join(f"- {_plain(item)}" for item in part.items)
    elif isinstance(part, Picture):
        yield f"![{_plain(part.alt)}]({PICTURES}/{part.name}.svg)"
        yield _plain(part.caption)
    elif isinstance(part, Fold):
        folded = "\n".join(
            f"<p>{html.escape(name)}</p>\n<pre>{html.escape(text)}</pre>"
            for name, text in part.parts
        )
        # A blank line would end the HTML block, and what users wrote would be markdown again.
        folded = re.sub(r"\n\s*\n", "\n&#8203;\n", folded)
        yield f"<details><summary>{html.escape(part.title)}</summary>\n{folded}\n</details>"
    else:
        yield f"*{_plain(part.caption)}*"
        lines = [[_plain(name) for name in part.head], ["---"] * len(part.head)]
        lines += [[_cell(cell) for cell in row] for row in part.rows]
        yield "\n".join(f"| {' | '.join(line)} |" for line in lines)
        if part.remark:
            yield _plain(part.remark)


def _cell(cell: Cell) -> str:
    text = f"**{_plain(cell.text)}**" if cell.best else _plain(cell.text)
    return f"{text} ({_plain(cell.below)})" if cell.below else text


def _plain(text: str) -> str:
    """Return text of one line in which nothing is markdown or HTML but its `code`."""
    pieces = " ".join(text.split()).split("`")
    for i in range(0, len(pieces), 2):
        pieces[i] = re.sub(r"([\\*_\[\]|#])", r"\\\1", html.escape(pieces[i], quote=False))
    for i in range(1, len(pieces), 2):
        pieces[i] = pieces[i].replace("|", r"\|").replace("<", "‹")
    return "`".join(pieces) if len(pieces) % 2 else "`".join(pieces).replace("`", "'")
