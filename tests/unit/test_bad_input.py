"""Hundreds of bad configurations: one message each, exit status 2, nothing left behind."""

from __future__ import annotations

from pathlib import Path

import pytest
from bad_configurations import Bad, generate

from mpsl_dist import plugins
from mpsl_dist.__main__ import main
from mpsl_dist.config import ConfigError, load
from mpsl_dist.methods import processes
from mpsl_dist.reading import parse_yaml


class Accepted(BaseException):
    """The run would have begun."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    def begin(*_: object) -> None:
        raise Accepted

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(processes, "open_run", begin)
    return tmp_path


def refused(folder: Path, bad: Bad, capsys: pytest.CaptureFixture[str]) -> str | None:
    """Run a configuration; return what is wrong with how it was refused."""
    (folder / "config.yaml").write_bytes(bad.content)
    try:
        status = main(["train", "config.yaml", *bad.words])
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    said = capsys.readouterr().err
    left = sorted(path.name for path in folder.iterdir())
    if status != 2 or left != ["config.yaml"]:
        return f"status {status}, left {left}"
    if not said or "Traceback" in said or bad.named not in said:
        return f"said {said[:300]!r}, not {bad.named!r}"
    if not all(line.startswith("error: ") for line in said.splitlines()) or len(said) > 20_000:
        return f"{len(said)} characters: {said[:300]!r}"
    return None


def check(folder: Path, count: int, seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = [
        f"{bad.content[:200]!r} {bad.words}: {problem}"
        for bad in generate(count, seed)
        if (problem := refused(folder, bad, capsys))
    ]
    assert not wrong, f"{len(wrong)} of {count}:\n" + "\n".join(wrong)


def test_bad_configurations_are_refused(folder: Path, capsys) -> None:
    check(folder, 120, 0, capsys)


@pytest.mark.campaign
@pytest.mark.parametrize("seed", range(1, 6))
def test_many_more_bad_configurations_are_refused(folder: Path, seed: int, capsys) -> None:
    check(folder, 300, seed, capsys)


def test_what_yaml_allows_is_still_read(tmp_path: Path) -> None:
    path = tmp_path / "e.yaml"
    path.write_bytes(
        b"\xef\xbb\xbfclients: 4\n"
        b"training:\n"
        b"  server: &own {lr: 1e-3, momentum: 0.5}\n"
        b"  client: {<<: *own, momentum: 0.25}\n"
    )
    training = load(path).training
    assert (training.server.lr, training.client.lr) == (1e-3, 1e-3)
    assert (training.server.momentum, training.client.momentum) == (0.5, 0.25)


def test_an_override_changes_one_of_two_that_share_an_anchor(tmp_path: Path) -> None:
    path = tmp_path / "e.yaml"
    path.write_text("training: {server: &own {lr: 1e-3}, client: *own}")
    training = load(path, ["training.server.lr=2e-3"]).training
    assert (training.server.lr, training.client.lr) == (2e-3, 1e-3)


@pytest.mark.parametrize(
    "text, reason",
    [
        ("a: 1\nb: 2\na: 3", r"'a' stands twice \(line 3, column 1\)"),
        ("a: {b: {c: !!binary aGk=}}", r"a\.b\.c: a bytes is no value here"),
        ("&a [1, *a]", "an alias of what it is part of"),
        ("a: 0x" + "f" * 300, "a: a whole number of more than 1024 bits"),
    ],
)
def test_yaml_that_would_mislead_is_named(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_yaml(text)


def test_a_plugin_that_is_no_plugin_is_named() -> None:
    with pytest.raises(ConfigError, match=r"plugins: sklearn: datasets must be a mapping"):
        plugins.find("datasets", "mine", {}, ["sklearn"], "data.name")
