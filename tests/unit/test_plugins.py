"""A user's own parts: found by name, their options checked like ours, every refusal at once."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import extension
import pytest
import torch
import toys
from torch import Tensor

from mpsl_dist import config, plugins
from mpsl_dist.__main__ import main
from mpsl_dist.actors import deployable
from mpsl_dist.actors.holdings import Holdings
from mpsl_dist.actors.part_checks import refusals_with_data, refusals_without_data
from mpsl_dist.analysis import compare
from mpsl_dist.analysis.cost import cost_of
from mpsl_dist.config.methods import METHODS, options_of
from mpsl_dist.errors import ConfigError
from mpsl_dist.methods import processes
from mpsl_dist.models.heads import HEADS
from mpsl_dist.runtime import environment
from mpsl_dist.typed import build

Write = Callable[..., str]


@pytest.fixture(autouse=True)
def rank_0(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check as rank 0 does: without a launcher the command would start processes."""
    launched = environment.alone()
    monkeypatch.setattr(environment, "resolve", lambda _: launched)
    monkeypatch.setattr(processes, "place_in_world", lambda *_: launched)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on Python's path; what was imported from it is forgotten again."""
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.fixture
def waves(folder: Path) -> str:
    """The experiment of docs/extending.md, its package on the path but not installed."""
    path = extension.write(folder)
    path.write_text(path.read_text() + f"plugins: [my_mpsl]\ndevice: cpu\noutput: {folder}/runs\n")
    return str(path)


def declare(folder: Path, group: str, line: str) -> None:
    """Leave the metadata of an installed package behind."""
    info = folder / f"{group}_{line.split()[0]}-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {info.stem}\nVersion: 1\n")
    (info / "entry_points.txt").write_text(f"[mpsl_dist.{group}]\n{line}\n")


def errors_of(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    """Return the refusals of a command that must end with status 2, without a traceback."""
    assert main(list(words)) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return [line.removeprefix("error: ") for line in error.splitlines()]


# -- options -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.options.sampels=50", "did you mean 'data.options.samples'?"),
        ("data.options.noise=loud", "data.options.noise: expected a number, found 'loud'"),
        ("data.options.noise=nan", "data.options.noise: must be a finite number, found nan"),
        ("data.options.samples=3", "data.options: samples must be at least 40, found 3"),
        ("model.head.options.hiden=4", "did you mean 'model.head.options.hidden'?"),
        ("model.head.options.hidden=1.5", "model.head.options.hidden: expected a whole number"),
        ("model.head.options={}", "model.head.options.hidden: missing"),
        ("model.tokenizers.signal.pach=4", "did you mean 'model.tokenizers.signal.patch'?"),
        ("model.tokenizers.signal.patch=x", "signal.patch: expected a whole number, found 'x'"),
        ("model.tokenizers.signal.patch=7", "signal.patch: 7 does not divide 64 samples"),
        ("model.tokenizers.signal=4", "model.tokenizers.signal: expected keys and values, found 4"),
        ("model.tokenizers.image.patch=4", "model.tokenizers.image.patch: no such option here"),
        ("model.tokenizers.signl.patch=4", "tokenizers.signl: unknown tokenizer 'signl'; did you"),
        ("model.tokenizers.audio={}", "model.tokenizers.audio: waves has signal, image"),
        ("method_options.p=1", "method_options.p: unknown key; valid: q"),
        ("method_options.q=[1]", "method_options.q: expected a number, found [1]"),
        ("method_options.q=-1", "method_options: q must be at least 0, found -1"),
        (f"method_options.q=1{'0' * 400}", "method_options.q: '1000"),
        ("method=fare", "method: unknown method 'fare'; did you mean 'fair'?"),
        ("method=zzz", "method: unknown method 'zzz'; valid: centralized, fair, fedavg"),
        ("model.head.kind=mpl", "model.head.kind: unknown head 'mpl'; did you mean 'mlp'?"),
        ("data.name=wave", "data.name: unknown dataset 'wave'; did you mean 'waves'?"),
        ("data.modalities=[signal, smell]", "data.modalities: expected a list of 'image' or "),
        ("data.modalities=[signal]", "data.modalities: waves has no use for it"),
        ("plugins=[my_mpsl, gone]", "plugins: gone cannot be imported: ModuleNotFoundError: No "),
    ],
)
def test_a_mistake_in_a_users_own_part_is_named(
    waves: str, capsys: pytest.CaptureFixture[str], override: str, message: str
) -> None:
    lines = errors_of(capsys, "train", waves, override)
    assert any(message in line for line in lines), lines


def test_mistakes_of_all_parts_come_in_one_message(
    waves: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["data.options.nois=1", "model.head.options.hiden=4", "method_options.k=1"]
    words += ["model.tokenizers.signal.pach=4", "model.tokenizers.imag.patch=1"]
    lines = errors_of(capsys, "train", waves, *words)
    for key in (word.partition("=")[0] for word in words[:4]):
        assert sum(line.startswith(f"{key}: ") for line in lines) == 1, (key, lines)
    assert sum("unknown tokenizer 'imag'; did you mean 'image'?" in line for line in lines) == 1
    lines = errors_of(capsys, "train", waves, *words[1:3], "data.partition.minimum=9000")
    assert any("9000 samples" in line for line in lines), lines
    assert sum(line.startswith("model.head.options.hiden: ") for line in lines) == 1


def test_ours_take_no_options_of_a_plugins(capsys: pytest.CaptureFixture[str], folder) -> None:
    path = folder / "ours.yaml"
    path.write_text("method_options: {q: 1}\nmodel: {image_patch: 4, head: {options: {a: 1}}}\n")
    lines = errors_of(capsys, "train", str(path), "data.options.b=1")
    for key in ("method_options.q", "data.options.b"):
        assert f"{key}: no such option here" in lines
    assert "model.head.options.a: no such option here" in errors_of(capsys, "train", str(path))


def test_options_of_a_type_that_yaml_has_not_are_refused() -> None:
    @dataclass
    class Odd:
        where: bytes = b""

    with pytest.raises(ConfigError, match="method_options: .*Odd.* cannot hold options"):
        plugins.options(Odd, {"where": "x"}, "method_options")
    with pytest.raises(ConfigError, match="cannot hold options"):
        plugins.options(int, {"where": "x"}, "method_options")


def test_a_number_too_large_is_refused() -> None:
    errors: list[str] = []
    build(config.Optimizer, {"lr": 10**400}, "", errors)
    assert len(errors) == 1 and errors[0].startswith("lr: expected a number, found 1000")


def test_a_method_receives_its_options(waves: str) -> None:
    assert options_of(config.load(waves)).q == 0.5
    assert options_of(toys.experiment()) is None


# -- names -------------------------------------------------------------------------------------


def test_a_module_that_cannot_be_imported_is_named(folder: Path) -> None:
    (folder / "broken.py").write_text("import no_such_thing\n")
    (folder / "wrong.py").write_text("heads = ['mlp']\n")
    with pytest.raises(ConfigError) as caught:
        toys.experiment(plugins=["broken", "no_such_module"])
    lines = str(caught.value).splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("plugins: broken cannot be imported: ModuleNotFoundError: No module")
    assert lines[1].startswith("plugins: no_such_module cannot be imported: ")
    assert lines[1].endswith("; every host must have it, installed or on PYTHONPATH")
    assert "host" not in lines[0]
    with pytest.raises(ConfigError, match=r"plugins: wrong: heads must be a mapping, found \['mlp"):
        plugins.find("heads", "linear", HEADS, ["wrong"], "model.head.kind")


@pytest.mark.parametrize("name", ["mpsl", "other"])
def test_a_module_may_not_take_a_name_of_ours(folder: Path, name: str) -> None:
    (folder / "taker.py").write_text(
        "from mpsl_dist.config.methods import METHODS\n"
        "methods = {'mpsl': METHODS['psl'], 'other': METHODS['psl']}\n"
    )
    with pytest.raises(ConfigError, match="plugins: taker: methods has names in use: mpsl"):
        toys.experiment(plugins=["taker"], method=name)


def test_an_installed_package_may_not_take_a_name_of_ours_that_is_chosen(folder: Path) -> None:
    assert refusals_without_data(toys.experiment(plugins=["toys"])) == []
    declare(folder, "methods", "mpsl = somewhere:facts")
    declare(folder, "heads", "linear = somewhere:facts")
    (line,) = refusals_without_data(toys.experiment())
    assert line.startswith(
        "method: 'mpsl' is ours, and an entry point mpsl_dist.methods (somewhere"
    )
    chosen = toys.experiment(method="psl", model={"head": {"kind": "linear"}})
    assert [line.split(":")[0] for line in refusals_without_data(chosen)] == ["model.head.kind"]


def test_entry_points_are_found_and_their_faults_named(folder: Path) -> None:
    (folder / "own.py").write_text(
        "from mpsl_dist.models.heads import HeadFacts\n"
        "facts, number = HeadFacts('own:typo', 'classification'), 3\n"
        "gone = HeadFacts('no_such_module:build', 'classification')\n"
        "bare = HeadFacts('own', 'classification')\n"
    )
    for line in ("good = own:facts", "odd = own:number", "lost = own:nothing", "gone = own:gone"):
        declare(folder, "heads", line)
    declare(folder, "heads", "bare = own:bare")
    assert plugins.names("heads", HEADS, [])[:2] == ["linear", "embeddings"]
    assert {"good", "odd", "lost"} < set(plugins.names("heads", HEADS, []))
    for name, message in {
        "odd": "entry point mpsl_dist.heads: 'odd' must be a HeadFacts, found 3",
        "lost": "entry point mpsl_dist.heads: own:nothing: AttributeError",
        "god": "model.head.kind: unknown head 'god'; did you mean 'good'?",
    }.items():
        with pytest.raises(ConfigError, match=re.escape(message)):
            plugins.find("heads", name, HEADS, [], "model.head.kind")
    splits = toys.load(("image", "text"))
    for name, message in {
        "good": "plugins: own:typo cannot be had: AttributeError",
        "gone": "plugins: no_such_module:build cannot be had: ModuleNotFoundError",
        "bare": "plugins: 'own' is no place; write package.module:name",
    }.items():
        chosen = toys.experiment(model={"head": {"kind": name}, **SMALL})
        (line,) = refusals_with_data(chosen, splits)
        assert line.startswith(message)


SMALL = {"encoder": {"size": "custom", "width": 16, "depth": 2, "heads": 2}, "image_patch": 4}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("nn.Linear(64, width)", "model.tokenizers.signal: Linear needs a whole number 'length'"),
        ("with_length(nn.Linear(64, width), 3)", "gave tokens (2, 2, 32), not (2, 3, 32)"),
    ],
)
def test_a_tokenizer_that_breaks_its_promise_is_refused(
    waves: str, folder: Path, capsys: pytest.CaptureFixture[str], body: str, message: str
) -> None:
    path = folder / "my_mpsl" / "signals.py"
    path.write_text(
        path.read_text().replace("SignalTokenizer(channels, samples, options.patch, width)", body)
        + "\n\ndef with_length(module, length):\n    module.length = length\n    return module\n"
    )
    lines = errors_of(capsys, "train", waves)
    assert any(message in line for line in lines), lines


def test_a_head_that_breaks_its_promise_is_refused(
    waves: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder / "my_mpsl" / "mlp.py"
    path.write_text(path.read_text().replace("options.hidden, classes", "options.hidden, 3"))
    lines = errors_of(capsys, "train", waves)
    assert any("'mlp' made (2, 3) of two samples, not (2, 4)" in line for line in lines), lines


# -- every command -----------------------------------------------------------------------------


def test_cost_has_a_users_parts_in_the_rows_of_our_methods(waves: str) -> None:
    cost = cost_of(config.load(waves))
    shown = {name for name, facts in METHODS.items() if facts.common and not facts.unimodal}
    assert {row.method for row in cost.rows} == shown
    # Conv1d of 4 patches, 2 channels of 16 samples, width 32.
    forward = cost.value("flops", "mpsl", "client", "tokenize signal", "forward")
    assert forward == 2 * 4 * 2 * 16 * 32
    paper = cost.value("flops", "mpsl", "client", "tokenize signal", "paper")
    assert paper == (4 * 2 * 16 * 32 + 5 * 5 * 32) / 2
    head = cost.value("parameters", "mpsl", "server", "head", "all")
    assert head == 32 * 24 + 24 + 24 * 4 + 4


def test_cost_counts_a_users_head_for_retrieval(folder: Path) -> None:
    (folder / "project.py").write_text(
        "from torch import nn\n"
        "from mpsl_dist.models.heads import HeadFacts\n"
        "def build(width, classes, options):\n"
        "    return nn.Linear(width, 8)\n"
        "heads = {'projected': HeadFacts(build, 'retrieval', apart=True)}\n"
    )
    model = {**SMALL, "head": {"kind": "projected"}}
    chosen = toys.experiment(plugins=["toys", "project"], data={"name": "toy-pairs"}, model=model)
    assert refusals_with_data(chosen, toys.load_pairs()) == []
    cost = cost_of(chosen)
    assert cost.value("flops", "mpsl", "server", "head", "forward") == 2 * 2 * 16 * 8
    sent = cost.value("bytes_per_sample", "mpsl", "client", "predictions", "down")
    assert sent == 2 * 8 * 4


def test_partition_and_data_check_know_a_users_dataset(
    waves: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["partition", waves, "--out", str(folder / "picture.png")]) == 0
    assert "slow dark" in capsys.readouterr().out
    assert main(["data", "check", waves]) == 0
    assert "waves is built in" in capsys.readouterr().out
    assert main(["data", "download", waves]) == 0


def test_evaluate_builds_a_users_parts(
    waves: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    experiment = config.load(waves)
    splits = Holdings.load(experiment).splits
    deployable.build(experiment, splits).save(folder / "runs/waves/model", experiment, splits)
    assert main(["evaluate", str(folder / "runs/waves")]) == 0
    assert "the test set of waves" in capsys.readouterr().out
    (folder / "my_mpsl").rename(folder / "moved")
    for name in [name for name in sys.modules if name.startswith("my_mpsl")]:
        del sys.modules[name]
    (line,) = errors_of(capsys, "evaluate", str(folder / "runs/waves"))
    assert "plugins: my_mpsl cannot be imported" in line


def test_keys_that_the_head_does_not_read_are_known() -> None:
    from mpsl_dist.actors.choices import unread_by_head

    splits = toys.load(("image", "text"))
    assert unread_by_head(toys.experiment(), splits) == []
    chosen = toys.experiment(model={**SMALL, "normalize": True, "temperature": 0.1})
    assert unread_by_head(chosen, splits) == ["model.normalize", "model.temperature"]
    assert unread_by_head(chosen, toys.load_pairs()) == []


def test_modalities_of_a_plugin_may_be_named(waves: str) -> None:
    words = ["method=fedclip", "adapters.include=[signal]", "method_options={}"]
    assert config.load(waves, words).adapters.include == ["signal"]
    with pytest.raises(ConfigError, match=r"adapters.include: expected a list of .*'signal'"):
        config.load(waves, ["adapters.include=[signl]"])
    assert processes.checked_data(config.load(waves, words)).sizes


def test_the_pages_method_weighs_larger_losses_more(waves: str) -> None:
    from my_mpsl.fair import FairLosses

    class Step:
        number = 0

        def loss(self, predictions: dict[int, Tensor]) -> dict[int, Tensor]:
            return {0: torch.tensor(2.0), 1: torch.tensor(4.0)}

    predictions = {0: torch.zeros(3, 4), 1: torch.zeros(1, 4)}
    assert FairLosses(0)(Step(), predictions) == (3 * 2 + 1 * 4) / 4
    assert FairLosses(1)(Step(), predictions) == (3 * 2**2 + 1 * 4**2) / 4 / 2


def test_a_worker_whose_host_lacks_a_plugin_says_so(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "e.yaml").write_text("plugins: [not_here]\n")
    waited: list[float] = []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(time, "sleep", waited.append)
    (line,) = errors_of(capsys, "train", str(folder / "e.yaml"))
    assert "plugins: not_here cannot be imported" in line and waited == [60]


def retyped(value: Any) -> Any:
    return config.from_dict(config.to_dict(value))


def test_an_experiment_with_plugins_survives_its_own_record(waves: str) -> None:
    experiment = config.load(waves)
    assert retyped(experiment) == experiment


def test_sweeps_know_plugins(waves: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(config.__file__).parents[2] / "launch"))
    import sweep

    path = folder / "sweep.yaml"
    path.write_text("config: waves.yaml\ngrid: {method_options.q: [0, 2], seed: [1]}\n")
    runs, _ = sweep.read(path, [])
    assert [run.experiment.method_options for run in runs] == [{"q": 0}, {"q": 2}]
    assert [run.processes for run in runs] == [3, 3]
    for run in runs:
        assert config.load(waves, run.settings) == run.experiment


def test_submit_finds_plugins_beside_the_experiment(waves: str, folder: Path) -> None:
    pytest.importorskip("submitit")
    submit = Path(config.__file__).parents[2] / "launch" / "submit.py"
    line = [sys.executable, str(submit), "waves.yaml", "--dry-run"]
    done = subprocess.run(line, cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "--ntasks-per-node=3" in done.stdout, done.stderr


def test_compare_leaves_out_what_it_cannot_know_of_a_users_method(waves: str) -> None:
    assert compare.client_gflop(config.to_dict(config.load(waves))) is None
    ours = config.to_dict(config.load(waves, ["method=mpsl", "method_options={}"]))
    assert compare.client_gflop(ours) > 0
