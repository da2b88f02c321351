"""Naive PSL, FedAvg and FedCLIP over real RPC workers."""

from __future__ import annotations

import json
import os
import signal
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import toys
import yaml
from conftest import ROOT, Launch, World, launcher, torchrun_line, until
from local_fleet import LocalRounds

from mpsl_dist.actors import deployable
from mpsl_dist.actors.holdings import Holdings
from mpsl_dist.actors.host import Host
from mpsl_dist.config import to_dict
from mpsl_dist.methods import centralized, mlecs, standalone
from mpsl_dist.methods.fedavg import FedAvg, build_clients
from mpsl_dist.methods.hosting import BuildClients, Setup
from mpsl_dist.methods.link import Transport
from mpsl_dist.models.average import trainable_state
from mpsl_dist.runtime.local import LocalFleet

HERE = Path(__file__).parent
STEPS = 5
#: Of ML-ECS: who has which modality, and no language model.
EDGES: dict[str, Any] = {
    "data": {"name": "toy-image+audio", "public_fraction": 0.3, "missing": {"rate": 0.5}},
    "mlecs": {"language": "none", "answer": "head", "private_steps": 2, "public_steps": 2},
}
#: Of float64, relative to the largest entry of each tensor.
TOLERANCE = 1e-10
SYNCS = {
    "none": {"mode": "none"},
    "gradients": {"mode": "gradients", "every": 2},
    "weights": {"mode": "weights", "every": 2},
}


def _training(**changes) -> dict:
    return to_dict(toys.experiment())["training"] | {"precision": "float64"} | changes


def _cases() -> dict[str, dict]:
    found = {}
    for method in ("mpsl", "psl"):
        for sync, settings in SYNCS.items():
            found[f"{method} {sync}"] = {"method": method, "tokenizer_sync": settings}
        late = {"data": {"name": "toy-image+audio"}, "model": {"fusion": "late"}}
        found[f"{method} late"] = {"method": method} | late
        found[f"{method} dry"] = {"method": method, "client_share": "equal"}
    found["fedavg alone"] = {"method": "fedavg", "clients": 1}
    found["fedavg"] = {"method": "fedavg", "federated": {"fraction": 0.75}}
    found["fedclip"] = {"method": "fedclip"}
    gaps = {"missing": {"rate": 0.5, "seed": 3}}
    found["standalone"] = {"method": "standalone", "data": {"name": "toy-image+audio"} | gaps}
    sgd = {"name": "sgd", "lr": 0.1}  # AdamW would hide a gradient of the wrong scale
    for method in ("mpsl", "psl"):
        training = _training(server=sgd, client=sgd)
        found[f"{method} sgd"] = {"method": method, "training": training}
    gaps = {"name": "toy-image+audio", "missing": {"rate": 0.5, "seed": 3}}
    for method in ("mpsl", "psl", "fedavg", "fedclip"):
        found[f"{method} gaps"] = {"method": method, "data": gaps}
    found["mlecs"] = {"method": "mlecs"} | EDGES
    if None not in map(find_spec, ("transformers", "peft")):
        small = {"language": "tiny", "width": 16, "edge_blocks": 1, "server_blocks": 1}
        rules = found["mlecs"]["mlecs"] | small | {"answer": "label"}
        found["mlecs label"] = found["mlecs"] | {"mlecs": rules}
    base = {"clients_per_worker": 2, "training": _training(epochs=STEPS)}
    return {name: base | case for name, case in found.items()}


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """What came of every case, all trained in one world of two workers."""
    folder = tmp_path_factory.mktemp("baselines")
    listed = [
        to_dict(toys.experiment(**case)) | {"output": str(folder)} for case in _cases().values()
    ]
    task = folder / "task.json"
    task.write_text(json.dumps({"steps": STEPS, "experiments": listed}))
    with launcher(folder) as launch:
        status, output = launch(
            torchrun_line(3, str(HERE / "baseline_ranks.py"), str(task))
        ).finish(240)
    assert status == 0, output
    return dict(zip(_cases(), torch.load(task.with_suffix(".pt")), strict=True))


def assert_states_close(ours: dict, theirs: dict, tolerance: float) -> None:
    """Every tensor within ``tolerance`` of its largest entry."""
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        error = (ours[key] - value).abs().max().item() / max(value.abs().max().item(), 1e-30)
        assert error <= tolerance, f"{key}: off by {error:.2e} of its largest entry"


@pytest.mark.parametrize("case", [*SYNCS, "late", "dry", "sgd", "gaps"])
def test_naive_psl_trains_as_mpsl_does(case: str, told: dict) -> None:
    psl, mpsl = told[f"psl {case}"], told[f"mpsl {case}"]
    assert psl["losses"] == pytest.approx(mpsl["losses"], rel=TOLERANCE)
    assert_states_close(psl["server"], mpsl["server"], TOLERANCE)
    for client, state in mpsl["clients"].items():
        assert_states_close(psl["clients"][client], state, TOLERANCE)
    assert psl["bytes"] == mpsl["bytes"]


def test_naive_psl_runs_one_server_backward_per_client(told: dict) -> None:
    mpsl, psl = told["mpsl none"], told["psl none"]
    shares = [mpsl["plan"][step % len(mpsl["plan"])] for step in range(STEPS)]
    assert len(mpsl["backwards"]) == STEPS
    assert len(psl["backwards"]) == sum(size > 0 for step in shares for size in step) > 3 * STEPS


@pytest.mark.parametrize("case", ["mlecs", "mlecs label"])
def test_ml_ecs_over_rpc_equals_one_process(told: dict, case: str) -> None:
    if case not in told:
        pytest.skip("mpsl_dist[lm] is not installed")
    chosen = toys.experiment(**_cases()[case])
    torch.set_num_threads(1)
    holdings = Holdings.load(chosen)

    def transport(build: Any) -> LocalFleet:
        return LocalFleet(Host(build(chosen, range(chosen.clients), holdings)))

    alone = mlecs.build(Setup(chosen, holdings, 1, transport=transport))
    losses = [alone.step(0, step) for step in range(STEPS)]
    assert told[case]["losses"] == pytest.approx(losses, rel=TOLERANCE)
    assert_states_close(told[case]["server"], alone.cloud.shared, TOLERANCE)
    assert told[case]["bytes"] == alone.traffic.by_kind()


def test_fedavg_of_one_client_over_rpc_equals_centralized_step_for_step(told: dict) -> None:
    case = _cases()["fedavg alone"] | {"method": "centralized"}
    chosen = toys.experiment(**case)
    torch.set_num_threads(1)
    central = centralized.build(Setup(chosen, Holdings.load(chosen), 1))
    for epoch in range(STEPS):
        central.begin_epoch(epoch)
        for epoch_step in range(len(central.plan)):
            central.step(epoch_step, epoch * len(central.plan) + epoch_step)
    ours, theirs = told["fedavg alone"]["server"], trainable_state(central.learner.model)
    assert_states_close(ours, theirs, 1e-13)


@pytest.mark.parametrize("case", ["fedavg", "fedclip", "fedavg gaps", "fedclip gaps"])
def test_federated_training_over_rpc_equals_the_same_in_one_process(case: str, told: dict) -> None:
    chosen = toys.experiment(**_cases()[case])
    torch.set_num_threads(1)
    holdings = Holdings.load(chosen)
    splits, link = holdings.splits, LocalRounds(build_clients(chosen, list(range(4)), holdings))
    method = FedAvg(chosen, splits, deployable.build(chosen, splits), link)
    losses = [method.step(0, round_) for round_ in range(STEPS)]
    assert told[case]["losses"] == pytest.approx(losses, rel=1e-13)
    assert_states_close(told[case]["server"], trainable_state(method.model), 1e-13)
    assert told[case]["bytes"] == method.traffic.by_kind()


def test_clients_alone_on_workers_train_as_in_one_process_and_send_no_tensor(told: dict) -> None:
    chosen = toys.experiment(**_cases()["standalone"])
    torch.set_num_threads(1)
    holdings = Holdings.load(chosen)

    def local(build: BuildClients) -> Transport:
        return LocalRounds(build(chosen, list(range(4)), holdings)).fleet

    method = standalone.build(Setup(chosen, holdings, 1, transport=local))
    losses = [method.step(0, round_) for round_ in range(STEPS)]
    assert told["standalone"]["losses"] == pytest.approx(losses, rel=1e-13)
    assert told["standalone"]["test"] == method.evaluate()
    assert told["standalone"]["bytes"] == {}


def _start(launch: Launch, folder: Path, method: str, *words: str, **changes) -> World:
    values = to_dict(toys.experiment(method=method, clients_per_worker=2, **changes))
    values |= {"output": str(folder / "runs")}
    path = folder / f"{values['name']}.yaml"
    path.write_text(yaml.safe_dump(values))
    line = torchrun_line(3, str(HERE / "toy_command.py"), "train", str(path), *words)
    return launch(line, PYTHONPATH=str(ROOT))


def _lines(folder: Path, name: str) -> int:
    path = folder / "runs" / name / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


@pytest.mark.campaign
@pytest.mark.parametrize("method", ["psl", "fedavg", "mlecs"])
def test_a_stopped_and_resumed_run_equals_an_uninterrupted_one(
    method: str, launch: Launch, tmp_path: Path
) -> None:
    start = partial(_start, launch, tmp_path, method, **(EDGES if method == "mlecs" else {}))
    training = _training(epochs=40, batch_size=45)
    whole = start(name="whole", training=training)
    parts = start(name="parts", training=training)
    until(lambda: _lines(tmp_path, "parts") >= 4, 90, "some steps")
    os.kill(parts.rank(0), signal.SIGTERM)
    status, output = parts.finish()
    assert status != 0 and "--resume continues" in output, output
    summary = tmp_path / "runs" / "parts" / "summary.json"
    assert json.loads(summary.read_text())["status"] == "stopped"
    status, output = start("--resume", name="parts", training=training).finish()
    assert status == 0, output
    status, output = whole.finish()
    assert status == 0, output
    models = [tmp_path / "runs" / name / "model/model.safetensors" for name in ("whole", "parts")]
    assert models[0].read_bytes() == models[1].read_bytes()


@pytest.mark.parametrize("method", ["psl", pytest.param("fedavg", marks=pytest.mark.campaign)])
def test_a_killed_worker_ends_the_run_and_leaves_no_process(
    method: str, launch: Launch, tmp_path: Path
) -> None:
    world = _start(launch, tmp_path, method, name="killed", training=_training(epochs=500))
    until(lambda: _lines(tmp_path, "killed") >= 2, 90, "some steps")
    os.kill(world.rank(2), signal.SIGKILL)
    status, _ = world.finish(60)
    assert status != 0


@pytest.mark.campaign
def test_ml_ecs_goes_on_without_devices_whose_worker_is_killed(
    launch: Launch, tmp_path: Path
) -> None:
    faults = {"rejoin": "never", "client_timeout": 8.0, "exit_timeout": 15.0}
    settings = EDGES | {"training": _training(epochs=60), "faults": faults}
    world = _start(launch, tmp_path, "mlecs", name="killed", **settings)
    until(lambda: _lines(tmp_path, "killed") >= 3, 90, "some rounds")
    os.kill(world.rank(2, hosts=True), signal.SIGKILL)
    status, output = world.finish(120)
    assert status == 0, output
    summary = json.loads((tmp_path / "runs/killed/summary.json").read_text())
    assert (summary["clients_lost"], summary["epochs_completed"]) == (2, 60), output
    assert "server_accuracy" in summary["test"]


@pytest.mark.parametrize("method", ["psl", pytest.param("fedclip", marks=pytest.mark.campaign)])
def test_a_diverging_run_ends_with_advice(method: str, launch: Launch, tmp_path: Path) -> None:
    wild = {"name": "sgd", "lr": 1e200}
    training = _training(server=wild, client=wild)
    world = _start(launch, tmp_path, method, name="wild", training=training)
    status, output = world.finish(90)
    assert status != 0 and "Lower training.server.lr" in output, output
    assert "client" in json.loads((tmp_path / "runs/wild/summary.json").read_text())["reason"]
