"""Finding one's way: shipped experiments by name, what keys mean, and the page of all keys."""

from __future__ import annotations

import configparser
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from mpsl_dist import __main__ as command_line
from mpsl_dist import config
from mpsl_dist.__main__ import main
from mpsl_dist.analysis import reference
from mpsl_dist.commands import ways
from mpsl_dist.config import shipped
from mpsl_dist.config.methods import METHODS
from mpsl_dist.errors import ConfigError
from mpsl_dist.reading import read_yaml
from mpsl_dist.typed import flatten

sys.path.append(str(ROOT / "launch"))
import sweep


def is_sweep(name: str) -> bool:
    return name.startswith("sweeps/")


def test_every_shipped_file_is_listed_with_what_it_says_of_itself(capsys) -> None:
    assert main(["configs"]) == 0
    listed = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    files = (ROOT / "configs").rglob("*.yaml")
    assert set(listed) == {str(file.relative_to(ROOT / "configs"))[:-5] for file in files}
    assert listed["paper/coco-qa"] == "COCO-QA: a picture and a question, one of 430 answers."


@pytest.mark.parametrize("name", [name for name in shipped.names() if not is_sweep(name)])
def test_every_shipped_experiment_loads_by_its_name(name: str) -> None:
    assert config.load(name) == config.load(ROOT / "configs" / f"{name}.yaml")


@pytest.mark.parametrize("name", [name for name in shipped.names() if is_sweep(name)])
def test_a_copy_of_a_sweep_finds_its_experiment_from_anywhere(name: str, tmp_path: Path) -> None:
    original, copy = shipped.find(name), shipped.copy(name, tmp_path / "my.yaml")
    mine, theirs = (flatten(read_yaml(path)) for path in (copy, original))
    named = [key for key in theirs if key.rpartition(".")[2] == "config"]
    assert named
    for key in named:
        assert shipped.find(mine.pop(key)).samefile(original.parent / theirs.pop(key))
    assert mine == theirs


def test_a_shipped_sweep_is_read_by_its_name() -> None:
    assert sweep.read(Path("sweeps/noniid"), []) == sweep.read(shipped.find("noniid"), [])


def test_a_sweep_may_name_a_shipped_experiment(tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text("{config: quickstart, grid: {seed: [1, 2]}}")
    runs, _ = sweep.read(tmp_path / "my.yaml", [])
    assert [run.experiment.seed for run in runs] == [1, 2]
    assert runs[0].experiment.training == config.load("quickstart").training


def test_a_shipped_experiment_is_shown_and_copied_but_never_over_a_file(tmp_path, capsys) -> None:
    mine = tmp_path / "my.yaml"
    assert main(["configs", "copy", "coco-qa", str(mine)]) == 0
    assert config.load(mine) == config.load("paper/coco-qa")
    capsys.readouterr()
    assert main(["configs", "show", "coco-qa"]) == 0
    assert capsys.readouterr().out == mine.read_text()
    mine.write_text("precious")
    assert main(["configs", "copy", "quickstart", str(mine)]) == 2
    assert "File exists; choose another name" in capsys.readouterr().err
    assert mine.read_text() == "precious"


def test_a_file_of_ones_own_comes_before_a_shipped_name(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("vit-s").mkdir()  # a folder is no experiment
    Path("quickstart").write_text("{name: mine}")
    assert config.load("quickstart").name == "mine"
    assert config.load("vit-s").name == "scale-vit-s"
    with pytest.raises(ConfigError, match=r"flickr8k\.yaml: No such file"):
        config.load("flickr8k.yaml")  # who writes an ending means a file


def test_a_name_that_nothing_has_or_several_have_is_refused(tmp_path, monkeypatch) -> None:
    with pytest.raises(ConfigError, match="no shipped experiment .* did you mean 'quickstart'"):
        config.load("quikstart")
    with pytest.raises(ConfigError, match="mpsl_dist configs lists all"):
        config.load("zzz")
    for name in ("a/same.yaml", "b/same.yaml"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    monkeypatch.setattr(shipped, "folder", lambda: tmp_path)
    with pytest.raises(ConfigError, match="several are called so: a/same, b/same"):
        shipped.find("same")


def test_the_wheel_has_every_package_and_the_configs() -> None:
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    listed = set(settings["options"]["packages"].split())
    there = {p.parent.relative_to(ROOT) for p in (ROOT / "mpsl_dist").rglob("__init__.py")}
    dotted = {".".join(folder.parts) for folder in there} | {"mpsl_dist.configs"}
    assert dotted <= listed and {name for name in listed if name.startswith("mpsl")} == dotted


def test_every_key_has_a_comment_a_type_and_readers() -> None:
    keys = {key.path: key for section in reference.read() for key in section.keys}
    # An empty mapping has no keys of its own.
    mappings = {"method_options", "data.options", "model.head.options", "model.tokenizers"}
    assert set(keys) == flatten(config.Experiment()).keys() | mappings
    assert [key.path for key in keys.values() if not (key.meaning and key.type)] == []
    assert [key.path for key in keys.values() if not key.readers] == []


def test_a_key_is_explained(capsys) -> None:
    assert main(["explain", "data.partition.alpha"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "data.partition.alpha",
        "  Concentration of the Dirichlet draw per class; smaller is more skewed.",
        "  takes a number; by default 0.1",
        "  read by every method",
    ]
    told = reference.explain("wire.activations")
    assert "one of fp32, bf16, fp8" in told and "read by mpsl, psl" in told
    assert "'gradients'" in reference.explain("tokenizer_sync.mode")
    assert f"one of {', '.join(METHODS)}" in reference.explain("method")
    assert "one of random, ast, whisper-tiny" in reference.explain("weights.audio")


def test_a_section_lists_its_keys_and_no_key_lists_the_sections(capsys) -> None:
    assert "training.client.momentum" in reference.explain("training.client")
    assert "training.server" not in reference.explain("training.client")
    assert main(["explain"]) == 0
    told = capsys.readouterr().out
    for said in ("data.partition ", "training.server, training.client ", "Where initial weights"):
        assert said in told


@pytest.mark.parametrize(
    "word, meant",
    [
        ("alpha", "data.partition.alpha"),
        ("data.partition.alhpa", "data.partition.alpha"),
        ("training.batchsize", "training.batch_size"),
        ("partitions", "data.partition"),
        ("xyzzy", "without a key all are listed"),
    ],
)
def test_a_misspelt_key_is_answered_by_what_was_meant(word: str, meant: str, capsys) -> None:
    assert main(["explain", word]) == 2
    assert meant in capsys.readouterr().err


def test_the_page_of_all_keys_is_current(tmp_path: Path) -> None:
    """After a change of the schema: mpsl_dist explain --out docs/configuration.md."""
    assert main(["explain", "--out", str(tmp_path / "page.md")]) == 0
    page = (ROOT / "docs" / "configuration.md").read_text("utf-8")
    assert (tmp_path / "page.md").read_text("utf-8") == page


@pytest.mark.parametrize(
    "line",
    [["/bin/python", "-m", "mpsl_dist"], ["/bin/python", "/bin/mpsl-dist"]],
    ids=["module", "console script"],
)
def test_ranks_are_started_again_as_the_command_was(monkeypatch, line: list[str]) -> None:
    seen = []
    monkeypatch.setattr(ways, "_explain", lambda options: seen.append(options) or 0)
    monkeypatch.setattr(sys, "argv", [line[-1], "explain"])
    monkeypatch.setattr(sys, "orig_argv", [*line, "explain"])
    assert command_line.main() == 0
    assert seen[0].again == [*line[1:], "explain"] and seen[0].words == ["explain"]


def test_the_command_line_can_be_completed() -> None:
    shtab = pytest.importorskip("shtab")
    script = shtab.complete(command_line._parser(), shell="bash")
    assert "--resume" in script and "explain" in script
