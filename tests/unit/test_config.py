"""Bad input: exit status 2, one message with every problem, nothing overwritten."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mpsl_dist import config
from mpsl_dist.__main__ import main
from mpsl_dist.config import ConfigError
from mpsl_dist.errors import RunError
from mpsl_dist.records.run_directory import RunDirectory
from mpsl_dist.typed import flatten


@pytest.fixture
def quickstart(tmp_path: Path) -> str:
    path = tmp_path / "quickstart.yaml"
    path.write_text("clients: 4\nclients_per_worker: 2\nmodel: {image_patch: 4}\n")
    return str(path)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.batchsize=3", "training.batchsize: unknown key; did you mean 'training.batch_"),
        ("cliens=3", "cliens: unknown key; did you mean 'clients'?"),
        ("zzz=1", "zzz: unknown key; valid: name, method"),
        ("training.epochs=many", "training.epochs: expected a whole number, found 'many'"),
        ("training.epochs=true", "training.epochs: expected a whole number, found True"),
        ("training.epochs=1.5", "training.epochs: expected a whole number, found 1.5"),
        ("training.client.lr=fast", "training.client.lr: expected a number, found 'fast'"),
        ("model.fusion=middle", "model.fusion: expected 'early' or 'late', found 'middle'"),
        ("model.encoder=3", "model.encoder: expected keys and values, found 3"),
        ("model.encoder.trainable_blocks=x", "expected a whole number or 'all', found 'x'"),
        ("training.batch_size=3", "training.batch_size: 3 is smaller than the 4 clients"),
        ("clients=0", "clients: must be at least 1, found 0"),
        ("clients_per_worker=0", "clients_per_worker: must be at least 1, found 0"),
        ("data.partition.alpha=0", "data.partition.alpha: must be greater than 0"),
        ("data.modalities=[smell]", "expected a list of 'image' or 'audio' or 'text' or null"),
        ("data.modalities=[]", "data.modalities: name at least one, each once, or leave it null"),
        ("data.modalities=[text, text]", "data.modalities: name at least one, each once"),
        ("data.partition.kind=skewed", "expected 'dirichlet' or 'dirichlet-balanced' or"),
        ("name=a/b", "name: 'a/b' must be one folder name"),
        ("epochs", "'epochs': an override is key.path=value"),
        ("model.encoder.width=3", "model.encoder.width: only with model.encoder.size=custom"),
        ("model.encoder.size=custom", "needs model.encoder.width, model.encoder.depth"),
    ],
)
def test_a_bad_value_is_named_with_what_is_right(quickstart: str, override: str, message: str):
    with pytest.raises(ConfigError, match=re.escape(message)):
        config.load(quickstart, [override])


def test_all_problems_are_listed_at_once(quickstart: str, capsys) -> None:
    words = ["trainin.epochs=3", "training.epochs=x", "training.batch_size=2", "clients=x"]
    assert main(["train", quickstart, *words]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4 and all(line.startswith("error: ") for line in lines), lines


def test_launch_data_and_run_directory_problems_come_together(
    quickstart: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    alone = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
    for name, value in {**alone, "MASTER_ADDR": "localhost", "MASTER_PORT": 29400}.items():
        monkeypatch.setenv(name, str(value))
    words = ["clients=9000", "training.batch_size=9000", "model.image_patch=3"]
    run = tmp_path / "runs" / "run"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("name: run\n")
    (run / "metrics.jsonl").write_text("precious")
    assert main(["train", quickstart, f"output={tmp_path / 'runs'}", *words]) == 2
    error = capsys.readouterr().err
    assert "torchrun --standalone --nproc-per-node 4501 -m mpsl_dist train" in error
    assert "clients: 9000 clients with at least 1 samples each" in error
    assert "model.image_patch: 3 does not divide the 8x8 pictures" in error
    assert "exists; continue it with --resume, replace it with --overwrite" in error
    assert (run / "metrics.jsonl").read_text() == "precious"


def test_processes_that_no_machine_holds_are_refused_before_any_is_started(
    quickstart: str, tmp_path: Path, capsys
) -> None:
    words = ["clients=1000000", "training.batch_size=1000000", f"output={tmp_path}"]
    assert main(["train", quickstart, *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "error: 500001 processes do not fit the " in captured.err
    assert "clients_per_worker" in captured.err and "1000000 clients with" in captured.err


@pytest.mark.parametrize(
    ("text", "message"),
    [(": :", "not valid YAML"), ("- 3", "expected keys and values, found list")],
)
def test_a_file_that_is_no_experiment_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=f"{re.escape(str(path))}: {message}"):
        config.load(path)
    with pytest.raises(ConfigError, match="absent.yaml: No such file"):
        config.load(tmp_path / "absent.yaml")


def test_the_command_line_wins_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    path = tmp_path / "e.yaml"
    path.write_text("training: {epochs: 3, client: {lr: 1e-3}}\n")
    experiment = config.load(path, ["training.epochs=5", "training.server.lr=2e-3"])
    assert experiment.training.epochs == 5
    assert experiment.training.client.lr == 1e-3 and experiment.training.server.lr == 2e-3
    assert experiment.training.client.name == "adamw"
    assert config.from_dict(config.to_dict(experiment)) == experiment


@pytest.mark.parametrize("number", [".nan", ".inf", "-.inf", "nan", "-1e999"])
def test_every_number_must_be_finite(quickstart: str, number: str) -> None:
    flat = flatten(config.to_dict(config.load(quickstart)))
    keys = [key for key, value in flat.items() if isinstance(value, float)]
    assert len(keys) >= 13
    keys.append("model.temperature")  # null by default
    with pytest.raises(ConfigError) as caught:
        config.load(quickstart, [f"{key}={number}" for key in keys])
    lines = str(caught.value).splitlines()
    assert len(lines) == len(keys)
    for key in keys:
        assert any(f": {key}: must be a finite number, found" in line for line in lines), key


def test_numbers_out_of_range_are_listed_at_once(quickstart: str) -> None:
    below_zero = [
        f"training.{owner}.{name}"
        for owner in ("server", "client")
        for name in ("lr", "weight_decay", "momentum", "gamma")
    ]
    below_zero += ["data.partition.alpha", "model.temperature", "federated.fraction"]
    timeouts = ["federated.round_timeout", "runtime.rpc_timeout", "runtime.start_timeout"]
    for number, keys in (("-0.5", below_zero + timeouts), ("1e12", timeouts)):
        with pytest.raises(ConfigError) as caught:
            config.load(quickstart, [f"{key}={number}" for key in keys])
        lines = str(caught.value).splitlines()
        assert len(lines) == len(keys), lines
        assert all(any(f": {key}: must be " in line for line in lines) for key in keys), lines


@pytest.mark.parametrize(
    "override",
    [
        "training.server.momentum=1",
        "training.client.gamma=0",
        "seed=99999999999999999999",
        "weights.encoder=random:x",
        "weights.encoder=random:x.pth",
        "weights.encoder=ast:x.pth",
        "weights.encoder=timm:",
        "weights.audio=clip",
        'name="a\\0b"',
    ],
)
def test_values_that_would_fail_later_are_refused(quickstart: str, override: str) -> None:
    key = override.partition("=")[0]
    with pytest.raises(ConfigError, match=f": {re.escape(key)}: "):
        config.load(quickstart, [override])


@pytest.mark.parametrize(
    "source", ["random", "timm", "timm:vit_x", "meta-transformer:a.pth", "a.pth", "/b:c/d.bin"]
)
def test_sources_of_weights(quickstart: str, source: str) -> None:
    assert config.load(quickstart, [f"weights.encoder={source}"]).weights.encoder == source


def test_equal_shares_ask_for_a_multiple_of_the_clients(quickstart: str) -> None:
    with pytest.raises(ConfigError, match="take 8 or 12, or client_share=proportional"):
        config.load(quickstart, ["client_share=equal", "training.batch_size=10"])


def test_shipped_configs_load() -> None:
    for path in Path(__file__).parents[2].glob("configs/*.yaml"):
        config.load(path)


def test_a_run_directory_is_only_replaced_on_demand(tmp_path: Path) -> None:
    run, values = RunDirectory(tmp_path / "run"), {"seed": 1, "device": "cpu"}
    with pytest.raises(RunError, match="holds no run to resume"):
        run.check(values, resume=True, overwrite=False)
    run.open(values, resume=False, overwrite=False)
    (run.path / "metrics.jsonl").write_text("precious")
    with pytest.raises(RunError, match="--resume"):
        run.open(values, resume=False, overwrite=False)
    with pytest.raises(RunError, match="seed: the run has 1, now 2"):
        run.open({**values, "seed": 2}, resume=True, overwrite=False)
    run.open({**values, "device": "cuda"}, resume=True, overwrite=False)
    assert (run.path / "metrics.jsonl").read_text() == "precious"
    run.open(values, resume=False, overwrite=True)
    assert not (run.path / "metrics.jsonl").exists()


def test_overwrite_spares_a_folder_that_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(RunError, match="is no run directory"):
        RunDirectory(tmp_path).open({}, resume=False, overwrite=True)
    assert (tmp_path / "thesis.tex").exists()


def test_resume_and_overwrite_exclude_each_other(quickstart: str, capsys) -> None:
    assert main(["train", quickstart, "--resume", "--overwrite"]) == 2
    assert "exclude each other" in capsys.readouterr().err
