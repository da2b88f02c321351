"""The package that ``docs/extending.md`` shows, written to disk as a user would."""

from __future__ import annotations

import re
from pathlib import Path

from conftest import ROOT


def write(folder: Path) -> Path:
    """Write every block of the page under the name in its first line; return the experiment."""
    page = (ROOT / "docs" / "extending.md").read_text("utf-8")
    for name, text in re.findall(r"```\w+\n# (\S+)\n(.*?)```", page, flags=re.DOTALL):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")
    return folder / "waves.yaml"
