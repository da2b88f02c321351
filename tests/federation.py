"""Two owners of pictures and texts, and the experiment and lines of ``docs/federation.md``."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

from conftest import ROOT
from media_files import write_csv, write_picture

PAGE = (ROOT / "docs" / "federation.md").read_text("utf-8")
#: In the order of their ranks.
SITES = ("north", "south")
#: What makes the page's experiment one of seconds on one core.
SMALL = (
    "model={encoder: {size: custom, width: 16, depth: 1, heads: 2}, image_patch: 8}",
    "training={epochs: 2, batch_size: 6, server: {lr: 1e-2}, client: {lr: 1e-2}}",
    "runtime={rpc_timeout: 60, start_timeout: 60, server_threads: 1, worker_threads: 1}",
    "runtime.channels=tcp",  # hosts that are namespaces share a memory
    "data.image_size=16",
    "device=cpu",
)


def write_experiment(folder: Path) -> Path:
    """Write the page's experiment to a folder."""
    (block,) = re.findall(r"^ +name: birds\n(?: +.*\n)+", PAGE, re.M)
    path = folder / "birds.yaml"
    path.write_text(textwrap.dedent(block))
    return path


def line_of(rank: int, root: Path | None) -> tuple[dict[str, str], list[str]]:
    """The page's line for a rank: environment, and words for Python.

    ``root`` stands for the manifest that the line names.
    """
    (exports,) = re.findall(r"^ +export (WORLD_SIZE=.*)$", PAGE, re.M)
    variables = dict(word.split("=") for word in exports.split())
    lines = re.findall(r"^ +RANK=(\d) python (-m mpsl_dist train [^#\n]*)", PAGE, re.M)
    ((_, command),) = [line for line in lines if line[0] == str(rank)]
    words = command.replace("/data/birds.csv", str(root)).split()
    return variables | {"RANK": str(rank)}, words


def make_sites(root: Path, label: str = "wren") -> tuple[Path, list[Path]]:
    """The same rows twice: one manifest with all and their owners; one manifest for every owner.

    Three classes, of which no owner has all; 18 rows for training and 6 for testing.

    Parameters
    ----------
    label : str
        How the last owner writes "wren".
    """
    header = ["image", "text", "label", "split", "client"]
    rows: dict[str, list[list[object]]] = {name: [] for name in SITES}
    for n in range(24):
        owner = SITES[n % 3 == 0]
        name = ("owl", label)[n % 2] if owner == "south" else ("robin", "owl")[n % 2]
        split = "test" if n % 7 in (3, 5) else "train"
        rows[owner].append([f"{owner}-{n}.png", f"picture {n}, {name}", name, split, owner])
    found = []
    for place in ("all", *SITES):
        own = [row for name in SITES for row in rows[name] if place in ("all", name)]
        for row in own:
            write_picture(root / place / str(row[0]), 60 + len(str(row[1])), (24, 24))
        found.append(write_csv(root / place / "birds.csv", header, own))
    return found[0], found[1:]
