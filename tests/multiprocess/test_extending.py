"""The package of docs/extending.md, installed or not, trains and is tested like ours."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import extension
import pytest
from conftest import ROOT, Launch

from mpsl_dist.records.run_directory import RunDirectory


def run(folder: Path, path: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a command of ours in one process."""
    return subprocess.run(
        [sys.executable, "-m", "mpsl_dist", *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def install(package: Path, target: Path) -> Path:
    """Install code and metadata by the package's own pyproject.toml, without index or wheel."""
    line = [sys.executable, "-c", "import setuptools; setuptools.setup()"]
    for command in ("install_lib", "install_egg_info"):
        line += [command, "--install-dir", str(target)]
    done = subprocess.run(line, cwd=package, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return target


@pytest.mark.parametrize("how", ["entry points", "plugins"])
def test_the_page_trains(how: str, tmp_path: Path, torchrun: Launch) -> None:
    extension.write(tmp_path / "package")
    experiment = (tmp_path / "package" / "waves.yaml").rename(tmp_path / "waves.yaml")
    installed = how == "entry points"
    code = install(tmp_path / "package", tmp_path / "site") if installed else tmp_path / "package"
    path = f"{code}{os.pathsep}{ROOT}"
    words = [str(experiment), *([] if installed else ["plugins=[my_mpsl]"]), "device=cpu"]
    words += ["runtime.server_threads=1", "runtime.worker_threads=1"]
    world = torchrun(3, "-m", "mpsl_dist", "train", *words, PYTHONPATH=path)
    status, output = world.finish(300)
    assert status == 0, output
    summary = RunDirectory(tmp_path / "runs" / "waves").summary()
    assert summary["status"] == "completed" and summary["method"] == "fair"
    # Conv1d (32, 2, 16), CLS, 5 positions; PatchTokenizer 4 of 8x8; the LayerNorm.
    signal, image = 32 * 2 * 16 + 32 + 32 + 5 * 32, 32 * 16 + 32 + 5 * 32
    assert summary["trainable_parameters"]["client"] == signal + image + 2 * 32
    assert summary["test"]["accuracy"] > 0.25  # four classes
    tested = run(tmp_path, path, "evaluate", "runs/waves")
    assert f"accuracy {summary['test']['accuracy']:.4f}" in tested.stdout, tested.stderr
