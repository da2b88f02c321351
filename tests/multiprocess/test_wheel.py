"""A wheel in an environment that has nothing else of the project: the quickstart, start to end."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from conftest import ROOT, Launch
from PIL import Image

from mpsl_dist.config import shipped

pytestmark = pytest.mark.campaign
#: Nothing of the checkout may be found.
APART = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}


def call(folder: Path, *words: str | Path) -> str:
    line = list(map(str, words))
    done = subprocess.run(line, cwd=folder, env=APART, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's wheel, built by what is installed where that can build one."""
    source = tmp_path_factory.mktemp("source")
    for name in ("mpsl_dist", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    line = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", "dist", "."]
    release = tuple(map(int, importlib.metadata.version("setuptools").split(".")[:2]))
    if release >= (70, 1) or (release >= (68, 0) and importlib.util.find_spec("wheel")):
        call(source, *line, "--no-build-isolation")
    else:
        done = subprocess.run(line, cwd=source, env=APART, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no setuptools here or to be had that builds wheels: {done.stderr[-300:]}")
    (built,) = (source / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def empty(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment with the wheel; torch and the like are the tests' own."""
    folder = tmp_path_factory.mktemp("environment")
    call(folder, sys.executable, "-m", "venv", folder)
    paths = {"base": str(folder), "platbase": str(folder)}
    own = Path(sysconfig.get_path("purelib", vars=paths))
    # A folder that a .pth file adds has no .pth files: an editable project in it is not seen.
    (own / "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    pip = [folder / "bin" / "pip", "install", "--no-deps", "--no-index", wheel]
    call(folder, *pip)
    return folder / "bin"


def test_the_shipped_experiments_are_in_the_wheel(empty: Path, tmp_path: Path) -> None:
    listed = call(tmp_path, empty / "mpsl-dist", "configs")
    assert [line.split()[0] for line in listed.splitlines()] == shipped.names()
    where = "import mpsl_dist.config.shipped as s; print(s.folder())"
    assert empty.parent in Path(call(tmp_path, empty / "python", "-c", where).strip()).parents
    call(tmp_path, empty / "mpsl-dist", "configs", "copy", "sweeps/wire", "my.yaml")
    assert "config: quickstart" in (tmp_path / "my.yaml").read_text()


@pytest.mark.parametrize("forked", [True, False], ids=["forked", "started again"])
def test_the_quickstart_runs_from_a_wheel(
    empty: Path, launch: Launch, tmp_path: Path, forked: bool
) -> None:
    late = Path(sysconfig.get_path("purelib", vars={"base": str(empty.parent)})) / "torch.pth"
    if not forked:
        late.write_text("import torch\n")  # at Python's start: then ranks are no forks
    words = ["train", "quickstart", "training.epochs=1", "tracking.tensorboard=true"]
    try:
        status, output = launch([str(empty / "mpsl-dist"), *words], PYTHONPATH="").finish(400)
    finally:
        late.unlink(missing_ok=True)
    run = tmp_path / "runs" / "quickstart"
    assert status == 0, output
    summary = json.loads((run / "summary.json").read_text())
    assert summary["status"] == "completed" and list((run / "tensorboard").iterdir())
    shown = call(tmp_path, empty / "mpsl-dist", "watch", run)
    assert "status     completed" in shown
    assert f"accuracy   {summary['test']['accuracy']:.4f} after epoch 1" in shown
    tested = call(tmp_path, empty / "mpsl-dist", "evaluate", run)
    assert f"accuracy {summary['test']['accuracy']:.4f}" in tested
    if forked:  # what comes after a run is the same however its ranks began
        Image.new("L", (8, 8), 128).save(tmp_path / "digit.png")
        asked = ["--image", "digit.png", "--text", "is it even?"]
        told = call(tmp_path, empty / "mpsl-dist", "predict", run, *asked)
        known = json.loads((run / "model" / "config.json").read_text())["classes"]
        assert any(re.search(rf"\b{re.escape(name)}\b", told) for name in known), told
        call(tmp_path, empty / "mpsl-dist", "report", run, "--out", "page")
        accuracy = f"{100 * summary['test']['accuracy']:.1f} % test accuracy"
        assert accuracy in (tmp_path / "page" / "report.md").read_text()
