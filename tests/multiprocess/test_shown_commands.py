"""Every command that README and docs show is run: in the page's order, in a folder of its own.

What looks at a run or plans one is run by every test run. ``--campaign`` runs all: training, with
few samples, one epoch and at most twenty clients, has its clients in this very process, as
``launch/in_one_process.py`` has them; sweeps are trained with the first value of each key of their
grids. What cannot be run here stands in :data:`APART`, with what is run in its place.
"""

from __future__ import annotations

import functools
import glob
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import federation
import pytest
import sklearn.datasets
from conftest import ROOT
from PIL import Image
from shown import PAGES, block, shell_lines, shorten

sys.path.append(str(ROOT / "launch"))
import in_one_process
import submit

from mpsl_dist import __main__ as command_line
from mpsl_dist import config
from mpsl_dist.data.sets import mnist_fsdd

CLUSTER = "tests/slurm/"
CLIENTS = "python tests/measure_clients.py --clients 10 --workers 2 --spare 1"
CLIENTS += " training.batch_size=1000"
#: What is not run as it is shown -> why, and the command, or the test, that is run in its place.
APART: dict[str, tuple[str, str]] = {
    r"launch/quickstart\.sh": (
        "installs into the checkout; then it trains",
        "mpsl-dist train configs/quickstart.yaml",
    ),
    r"tests/run\.sh.*": ("installs, and runs these tests", "tests/run.sh"),
    r"pip install.*": ("installs", "tests/multiprocess/test_wheel.py"),
    r"\.venv/bin/ruff.*": ("changes the checkout; CI begins with both", ".ci/run"),
    r"mkdocs build": ("of the checkout", "tests/unit/test_docs.py"),
    r"shtab .*": ("writes to the user's home", "tests/unit/test_ways.py"),
    r"tensorboard .*": ("serves until it is stopped", "tests/unit/test_watching.py"),
    r"sbatch .*": ("needs Slurm", CLUSTER + "test_jobs.py"),
    r"torchrun --nnodes 2 .*": ("needs two hosts", CLUSTER + "test_two_hosts.py"),
    r"export WORLD_SIZE=3 .*": ("needs three hosts", CLUSTER + "test_federation_of_hosts.py"),
    r"RANK=\d .* CONFIG runtime\.interface=wg0": ("needs a tunnel", CLUSTER + "test_tunnel.py"),
    r"RANK=\d .* birds\.yaml.*": ("needs three hosts", CLUSTER + "test_federation_of_hosts.py"),
    r".* train configs/scale/vit-b\.yaml server\.replicas=2": (
        "needs weights, data and two GPUs",
        "mpsl-dist cost configs/scale/vit-b.yaml server.replicas=2",
    ),
    r".* train configs/scale/vit-h\.yaml server\.replicas=2 server\.shard=true": (
        "needs weights, data and two GPUs",
        "mpsl-dist cost configs/scale/vit-h.yaml server.replicas=2 server.shard=true",
    ),
    r"PYTHON=\S+ launch/gpu_bench\.sh": (
        "needs a GPU",
        "PYTHONPATH=launch python -m mpsl_dist cost configs/scale/vit-b.yaml plugins=[synthetic]"
        " data.name=synthetic-image+text data.root=null data.pixels=null"
        " weights.encoder=random weights.image=random weights.text=random",
    ),
    r"python -m pytest --campaign tests/multiprocess/test_hour\.py.*": (
        "takes an hour, a test of its own",
        "tests/multiprocess/test_hour.py",
    ),
    r"python tests/measure_clients\.py.*--clients 200,1000": (
        "needs the memory of 1,200 clients",
        f"{CLIENTS} model.encoder.width=256",
    ),
    r"python tests/measure_clients\.py": (
        "needs the memory of 1,000 clients",
        CLIENTS,
    ),
}
#: Pages and lines, once each, in order.
LINES = [(page, line) for page in PAGES for line in dict.fromkeys(shell_lines(page))]
#: What makes training one of seconds; worlds of processes have all samples, in steps of more.
SMALL = (
    "training.epochs=1",
    "training.batch_size=200",
    "checkpoint.every_epochs=0",
    "device=cpu",
    "runtime={server_threads: 1, worker_threads: 1}",
)
WORLD = (*SMALL, "training.batch_size=1000")
MANY = ("clients=20", "clients_per_worker=10")
OURS = re.compile(r"(?:(?:\.venv/bin/)?python -m mpsl_dist|mpsl-dist) ((\w+).*)")
#: ``cost`` of a ViT or of CLIP's text tower takes seconds.
QUICK = r"(cost|partition|data) (configs/(quickstart|m2fedsa|mlecs|mnist-fsdd)|my)\.yaml"
QUICK = rf"{QUICK}|(?!train|bench|audit|cost|partition|data)\w+"


def is_quick(line: str) -> bool:
    """Whether a line takes a second and no more than one trained run."""
    ours = OURS.fullmatch(line)
    return bool(ours and re.match(QUICK, ours[1]) and "standalone" not in line)


def instead(line: str) -> str | None:
    """What is run for a line: itself, the command that stands for it, or None."""
    for pattern, (_, other) in APART.items():
        if re.fullmatch(pattern, line):
            return None if (ROOT / other).exists() else other
    return line


class Shell:
    """Runs lines in a folder that looks like a checkout's root."""

    def __init__(self, folder: Path, data: Path | None, trained: Path) -> None:
        self.folder, self.data, self.variables = folder, data, dict[str, str]()
        for name in ("launch", "tests", "slurm"):
            (folder / name).symlink_to(ROOT / name)
        (folder / ".venv").symlink_to(sys.prefix)
        (folder / "docs").mkdir()
        (folder / "runs").mkdir()
        shutil.copytree(ROOT / "configs", folder / "configs")
        for path in (folder / "configs" / "sweeps").rglob("*.yaml"):
            shorten(path)
        shutil.copytree(trained, folder / "runs" / "quickstart")
        Image.new("L", (8, 8), 128).save(folder / "digit.png")
        (folder / "questions.csv").write_text("image,text\ndigit.png,is it odd?\n")
        federation.write_experiment(folder)
        _, sites = federation.make_sites(folder / "sites")
        for rank, site in enumerate(sites, 1):
            shutil.copytree(site.parent, folder, dirs_exist_ok=True)
            (folder / site.name).rename(folder / f"data-{rank}.csv")
        tracker = block(
            ROOT / "docs" / "watching.md", "# my_tracker.py, installed or on PYTHONPATH"
        )
        (folder / "my_tracker.py").write_text(tracker.partition("\n\n")[0])

    def run(self, line: str) -> None:
        """Run a line; skip where its data are not at hand, fail where it fails."""
        line = line.replace("$PWD", str(self.folder))
        # What is tested is this checkout, not what may be installed.
        line = re.sub(r"^PYTHONPATH=", "PYTHONPATH=$PYTHONPATH:", line)
        if re.search(r"data\.root=(DATA|FOLDER|/data|\$DATA)\b|\.py (DATA|FOLDER)", line):
            if self.data is None:
                pytest.skip("no real data (MPSL_TEST_DATA)")
            line = re.sub(r"(?<=data\.root=)(DATA|FOLDER|/data|\$DATA)\b", str(self.data), line)
            line = re.sub(r"(?<=\.py )(DATA|FOLDER)", str(self.data), line)
        line = re.sub(r"\bCONFIG\b", "configs/quickstart.yaml", line)
        if "my.yaml" in line and "configs copy" not in line and not Path("my.yaml").exists():
            shutil.copy("configs/quickstart.yaml", "my.yaml")
        if exported := re.fullmatch(r"export (.*)", line):
            self.variables |= dict(word.split("=", 1) for word in exported[1].split())
        elif (ours := OURS.fullmatch(line)) and ours[2] != "bench":
            self._ours(line, shlex.split(ours[1]))
        elif jobs := re.fullmatch(r"python launch/(submit|in_one_process)\.py (.*)", line):
            self._jobs(line, jobs[1], shlex.split(jobs[2]))
        else:
            self._program(line)

    def _ours(self, line: str, words: list[str]) -> None:
        words = [found for word in words for found in self._matching(word)]
        if words[0] == "train":
            options = command_line._parser().parse_args(words)
            experiment = config.load(options.config, options.overrides)
            if experiment.data.place == "own":
                return self._program(shlex.join([*line.split(), *federation.SMALL]))
            return train(options.config, options.overrides)
        if words[0] == "audit":
            words += ["--samples", "10", "--overwrite"]
        status = command_line.main(words)
        assert status == 0 or (status == 1 and "--fail-over" in words), line

    def _jobs(self, line: str, script: str, words: list[str]) -> None:
        options = submit._parser().parse_intermixed_args(words)
        if "configs/sweeps" not in line or not (options.local or script == "in_one_process"):
            done = options.local or options.dry_run
            return self._program(line if done else f"{line} --dry-run")
        options.words = [found for word in options.words for found in glob.glob(word) or [word]]
        for run in submit._count_costs(submit._read(options)[0], options):
            if not run.completed:
                train(str(run.config), run.overrides)

    def _matching(self, word: str) -> list[str]:
        """What a pattern of runs matches; runs that no line trained are copies of the trained."""
        if "*" not in word:
            return [word]
        if not glob.glob(word):
            shutil.copytree("runs/quickstart", word.replace("*", "1"))
        return sorted(glob.glob(word))

    def _program(self, line: str) -> None:
        if " bench " in line:
            line = f"{line} --steps 2 {shlex.join([*SMALL, 'clients=4', 'clients_per_worker=4'])}"
        elif "birds" not in line and re.search("mpsl_dist train|submit.py configs/quick", line):
            line = f"{line} {shlex.join(WORLD)} --overwrite"
        variables = dict(os.environ) | {
            "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}",
            "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
            "OMP_NUM_THREADS": "1",
        }
        done = subprocess.run(
            ["bash", "-c", line],
            env=variables | self.variables,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=500,
        )
        assert done.returncode == 0, f"{line}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


def train(file: str, words: Sequence[str]) -> None:
    """Train an experiment in this process, made small."""
    experiment = config.load(file, words)
    many = MANY if experiment.clients > 20 else ()
    in_one_process.train(config.load(file, [*words, *SMALL, *many]))


@pytest.fixture(scope="module", autouse=True)
def few_samples() -> Iterator[None]:
    """A part of the pictures, utterances and captions, in this process."""
    load, whole = sklearn.datasets.load_digits, mnist_fsdd.load.__kwdefaults__

    @functools.cache
    def part() -> Any:
        bunch = load()
        bunch.data, bunch.images, bunch.target = (
            values[:300] for values in (bunch.data, bunch.images, bunch.target)
        )
        return bunch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sklearn.datasets, "load_digits", part)
        patch.setitem(whole, "train_samples", 400)
        patch.setitem(whole, "test_samples", 100)
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path | None:
    """Real data where they are at hand."""
    found = Path(os.environ.get("MPSL_TEST_DATA", ROOT.parent / "shared" / "data"))
    return found if found.is_dir() else None


@pytest.fixture(scope="module")
def trained(few_samples: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quickstart, trained."""
    output = tmp_path_factory.mktemp("trained")
    words = [f"output={output}", "tokenizer_sync.mode=none"]  # so that clients differ
    train(str(ROOT / "configs" / "quickstart.yaml"), words)
    return output / "quickstart"


@pytest.fixture
def shell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: Path | None, trained: Path
) -> Shell:
    monkeypatch.chdir(tmp_path)
    return Shell(tmp_path, data, trained)


@pytest.mark.parametrize("pattern", APART)
def test_what_is_run_apart_is_still_shown_and_has_something_in_its_place(pattern: str) -> None:
    assert any(re.fullmatch(pattern, line) for _, line in LINES)
    _, other = APART[pattern]
    assert (ROOT / other).exists() or OURS.search(other) or other.startswith("python tests/")


@pytest.mark.parametrize("line", dict.fromkeys(line for _, line in LINES if is_quick(line)))
def test_what_plans_runs_or_looks_at_them(line: str, shell: Shell) -> None:
    shell.run(line)


@pytest.mark.campaign
@pytest.mark.parametrize(
    "page", dict.fromkeys(page for page, _ in LINES), ids=lambda page: page.name
)
def test_the_lines_of_a_page_one_after_another(page: Path, shell: Shell) -> None:
    failed, absent = [], []
    for line in [line for of, line in LINES if of == page]:
        if (line := instead(line)) is None:
            continue
        try:
            shell.run(line)
        except pytest.skip.Exception:
            absent.append(line)
        except Exception as error:
            failed.append(f"{line}: {type(error).__name__}: {error}")
    assert not failed, "\n".join(failed)
    if absent:
        pytest.skip(f"no real data (MPSL_TEST_DATA) for {', '.join(absent)}; all else ran")
