"""Counted bytes are the computed ones to the byte, and the kernel's own within 2 %."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import toys
import yaml
from conftest import Launch, launcher, torchrun_line

from mpsl_dist.actors.holdings import Holdings
from mpsl_dist.analysis import flops, gapped_traffic, traffic_model
from mpsl_dist.analysis.cost_inputs import inputs_of
from mpsl_dist.config import Experiment, to_dict
from mpsl_dist.data.partition import shares
from mpsl_dist.records.traffic import KINDS

HERE = Path(__file__).parent
#: Kinds that the backward brings, not a call.
BACKWARD = ("loss_gradients", "prediction_gradients", "cut_layer_gradients")


def _cases() -> dict[str, dict]:
    base = {"clients_per_worker": 2}
    at_clients = {"name": "toy-image+text", "test_at": "clients"}
    pairs = {"name": "toy-pairs"}
    double = to_dict(toys.experiment())["training"] | {"precision": "float64"}
    own = to_dict(toys.experiment())["training"] | {"evaluate_own": True}
    late = {"data": {"name": "toy-image+audio"}, "model": {"fusion": "late"}}
    coded = {"activations": "int8", "gradients": "int4"}
    frozen, masked = {"train_tokenizers": False}, {"masked": True}
    heads = {"head_at": "client"}
    # Twice as many activations as a MiB holds.
    wide = frozen | {"encoder": {"size": "custom", "width": 256, "depth": 1, "heads": 2}}
    by_client, by_sample = ({"rate": 0.5, "per": per} for per in ("client", "sample"))
    gaps = {"data": at_clients | {"missing": by_client | {"at_test": True}}}
    cases = {
        "mpsl gaps": gaps | {"tokenizer_sync": {"mode": "weights", "every": 3}, "training": own},
        "psl gaps late, coded": late
        | {"method": "psl", "wire": coded, "data": late["data"] | {"missing": by_sample}},
        "fedavg gaps": gaps | {"method": "fedavg", "federated": {"fraction": 0.75}},
        "fedclip gaps": gaps | {"method": "fedclip"},
        "mpsl": {"data": at_clients, "tokenizer_sync": {"mode": "gradients", "every": 3}},
        "mpsl late": late | {"tokenizer_sync": {"mode": "weights", "every": 2}, "training": own},
        "mpsl own at clients": {"data": at_clients, "training": own},
        "mpsl frozen tokenizers": {"model": {"train_tokenizers": False}, "training": double},
        "mpsl cached": {"model": frozen, "wire": {"cache": True}},
        "mpsl cached, some": {
            "model": wide,
            "wire": {"cache": True, "cache_limit": 1},
            "data": late["data"],
        },
        "mpsl cached, coded": {"model": frozen, "wire": {"cache": True, "activations": "int8"}},
        "psl cached": {"method": "psl", "model": frozen, "wire": {"cache": True}},
        "mpsl dry clients": {"client_share": "equal"},
        "mpsl retrieval": {"data": pairs},
        "mpsl retrieval global": {"data": pairs, "contrastive": "global"},
        "mpsl pictures": {"data": pairs | {"unit": "picture"}},
        "mpsl coded": {"data": at_clients, "training": own, "wire": coded},
        "mpsl coded late": late | {"wire": coded | {"gradients": "fp32"}},
        "mpsl coded frozen": {"model": {"train_tokenizers": False}, "wire": coded},
        "mpsl merged": {"model": {"merge_patches": 2, "image_patch": 2}},
        "mpsl heads": {
            "data": at_clients,
            "training": own,
            "model": heads,
            "tokenizer_sync": {"mode": "weights", "every": 3},
        },
        "mpsl heads cached, coded": {
            "model": frozen | heads,
            "wire": {"cache": True, "activations": "int8"},
            "tokenizer_sync": {"mode": "gradients", "every": 4},
        },
        "psl heads retrieval": {
            "method": "psl",
            "data": pairs,
            "model": heads | {"temperature": 0.2},
        },
        "psl coded": {"method": "psl", "training": double, "wire": coded},
        "psl": {"method": "psl", "tokenizer_sync": {"mode": "gradients", "every": 4}},
        "mpsl masked": {"data": at_clients, "tokenizer_sync": {"mode": "gradients", **masked}},
        "mpsl masked averages": late
        | {"data": {"name": "toy-image+audio", "test_at": "clients"}}
        | {"tokenizer_sync": {"mode": "weights", "every": 2, **masked}, "training": own},
        "fedavg": {"method": "fedavg", "data": at_clients, "federated": {"fraction": 0.75}},
        "fedclip": {"method": "fedclip"},
    }
    masks = {name: {"faults": {"min_clients": 3}} for name in cases if "masked" in name}
    return {name: base | case | masks.get(name, {}) for name, case in cases.items()}


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Experiment, dict]]:
    """Every case trained to its end, one after the other in one world of two workers."""
    folder = tmp_path_factory.mktemp("traffic")
    experiments = {
        name: toys.experiment(name=name.replace(" ", "-"), output=str(folder / "runs"), **case)
        for name, case in _cases().items()
    }
    task = folder / "task.json"
    task.write_text(json.dumps([to_dict(e) for e in experiments.values()]))
    with launcher(folder) as launch:
        line = torchrun_line(3, str(HERE / "traffic_ranks.py"), str(task))
        status, output = launch(line).finish(300)
    assert status == 0, output
    found = torch.load(task.with_suffix(".pt"))
    return {name: (experiments[name], found[i]) for i, name in enumerate(experiments)}


def computed(experiment: Experiment) -> dict[str, list[int]]:
    """What the whole run must send: training, a test after every epoch, the last average."""
    inputs = inputs_of(experiment)
    parts = flops.build(experiment, inputs)
    holdings = Holdings.load(experiment)
    held = [holdings.of(client) for client in range(experiment.clients)]
    sizes = [len(train) for train, _ in held]
    tests = np.array([len(test) for _, test in held])
    epochs = experiment.training.epochs
    plan = shares(sizes, experiment.training.batch_size, experiment.client_share)
    gaps = gapped_traffic.gaps_of(holdings)
    total = traffic_model.training(parts, plan, epochs, gaps)
    for kind, each in traffic_model.testing(parts, tests, gaps).items():
        total[kind] = each * epochs
    for kind, each in traffic_model.exporting(parts, len(sizes), gaps).items():
        total[kind] = total[kind] + each
    return {kind: by_client.tolist() for kind, by_client in total.items() if by_client.any()}


@pytest.mark.parametrize("case", _cases())
def test_counted_bytes_are_the_computed_ones(case: str, told: dict) -> None:
    experiment, found = told[case]
    assert found["bytes"] == computed(experiment)


def test_what_a_cache_saves_over_rpc(told: dict) -> None:
    """An epoch's activations in two epochs; where half of them fit, something between."""
    cached = ("mpsl cached", "mpsl cached, some", "psl cached")
    cases = ("mpsl late", "mpsl frozen tokenizers", *cached)
    sent = {case: sum(told[case][1]["bytes"]["activations"]) for case in cases}
    assert sent["mpsl cached"] == sent["psl cached"]
    # The other case is in float64.
    assert sent["mpsl cached"] * 2 * 2 == sent["mpsl frozen tokenizers"]
    per_epoch = sent["mpsl late"] // 2 * 256 // 16
    assert per_epoch < sent["mpsl cached, some"] < 2 * per_epoch


@pytest.mark.parametrize("case", _cases())
def test_no_tensor_crosses_uncounted(case: str, told: dict) -> None:
    """Neither in a call's arguments nor in an answer, from the first call of the set-up on."""
    _, found = told[case]
    called = {"up": 0, "down": 0}
    for kind, by_client in found["bytes"].items():
        if kind not in BACKWARD:
            called[KINDS[kind][0]] += sum(by_client)
    assert found["called"] == called
    assert found["setup"] == {"up": 0, "down": 0}


@pytest.mark.parametrize("case", _cases())
def test_records_have_every_byte_by_client_and_kind(case: str, told: dict) -> None:
    experiment, found = told[case]
    summary = json.loads((experiment.run_directory / "summary.json").read_text())
    said = summary["communication"]
    assert said["bytes_by_kind_and_client"] == found["bytes"]
    lines = (experiment.run_directory / "metrics.jsonl").read_text().splitlines()
    by_phase = {phase: dict.fromkeys(("up", "down"), 0) for phase in ("training", "evaluation")}
    for line in map(json.loads, lines):
        phase = "training" if line["split"] == "train" else "evaluation"
        by_kind = dict.fromkeys(("up", "down"), 0)
        for kind, count in line["bytes"].pop("by_kind").items():
            by_kind[KINDS[kind][0]] += count
        assert by_kind == line["bytes"]
        for way in by_kind:
            by_phase[phase][way] += by_kind[way]
    assert said["bytes_by_phase"]["training"] == by_phase["training"]
    assert said["bytes_by_phase"]["setup"] == {"up": 0, "down": 0}


# -- the kernel's own counters ---------------------------------------------------------------------

ADDRESSES = ("10.213.91.1", "10.213.91.2")
PORT = 29431
#: The largest frame of the cable.
FRAME = 1514


@pytest.fixture
def cable() -> Iterator[tuple[str, str]]:
    """Two network namespaces and a virtual cable between them; gives their names."""
    names = tuple(f"mpsl-t{os.getpid()}-{side}" for side in "ab")
    reason = _make_cable(names)
    try:
        if reason:
            pytest.skip(reason)
        yield names
    finally:
        if shutil.which("ip"):
            for name in names:
                subprocess.run(["ip", "netns", "del", name], capture_output=True)


def _make_cable(names: tuple[str, str]) -> str | None:
    """Return what is lacking, if anything."""
    if os.geteuid() or not shutil.which("ip"):
        return "network namespaces need root and the ip command"
    lines = [f"netns add {name}" for name in names]
    lines.append(f"link add veth0 netns {names[0]} type veth peer name veth0 netns {names[1]}")
    for name, address in zip(names, ADDRESSES, strict=True):
        lines.append(f"-n {name} address add {address}/24 dev veth0")
        lines += [f"-n {name} link set {device} up" for device in ("lo", "veth0")]
    for line in lines:
        done = subprocess.run(["ip", *line.split()], capture_output=True, text=True)
        if done.returncode:
            return f"no network namespaces here: {done.stderr.strip()}"
    return None


def _sent_again(name: str) -> int:
    """At most so many bytes this side sent again, as TCP does when a busy host answers late."""
    line = ["ip", "netns", "exec", name, "cat", "/proc/net/snmp"]
    shown = subprocess.run(line, check=True, capture_output=True, text=True).stdout
    names, values = (row.split() for row in shown.splitlines() if row.startswith("Tcp:"))
    return int(values[names.index("RetransSegs")]) * FRAME


def _kernel_bytes(name: str) -> dict[str, int]:
    """What the cable carried, seen from the server: up came in, down went out."""
    line = ["ip", "-n", name, "-json", "-statistics", "link", "show", "veth0"]
    shown = subprocess.run(line, check=True, capture_output=True, text=True).stdout
    stats = json.loads(shown)[0]["stats64"]
    return {"up": stats["rx"]["bytes"], "down": stats["tx"]["bytes"]}


#: Large enough that the protocol's own bytes are few; small enough to compute.
ON_THE_CABLE = {
    "mpsl": {
        "data": {"name": "digits-qa", "text_length": 12},
        "model": {"encoder": {"size": "custom", "width": 128, "depth": 1, "heads": 2}},
        "tokenizer_sync": {"mode": "gradients", "every": 5},
        "training": {"epochs": 1, "batch_size": 256},
    },
    "mpsl-int8": {
        "data": {"name": "digits-qa", "text_length": 12},
        "model": {"encoder": {"size": "custom", "width": 256, "depth": 1, "heads": 2}},
        "training": {"epochs": 1, "batch_size": 256},
        "wire": {"activations": "int8", "gradients": "int8"},
    },
    "fedavg": {
        "data": {"name": "toy-image+audio", "partition": {"alpha": 0.5, "minimum": 3}},
        "model": {"encoder": {"size": "custom", "width": 256, "depth": 4, "heads": 2}},
        "training": {"epochs": 1, "batch_size": 32},
    },
}


_LONG = {name for name, case in ON_THE_CABLE.items() if "wire" in case}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.campaign] * (n in _LONG)) for n in ON_THE_CABLE],
)
def test_the_kernel_counts_the_same(
    name: str, cable: tuple[str, str], launch: Launch, tmp_path: Path
) -> None:
    """The server at one end, at the other a worker for each client.

    Clients of one worker would share a single copy of what all are sent.
    """
    method = name.partition("-")[0]
    settings = {"method": method, "name": name, "clients": 2, "plugins": ["toys"]}
    settings |= {"device": "cpu", "runtime": {"channels": "tcp"}} | ON_THE_CABLE[name]
    settings["model"] = settings["model"] | {"image_patch": 2 if method == "mpsl" else 4}
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(settings))
    worlds = []
    for rank, side in enumerate(cable):
        inside = ["ip", "netns", "exec", side, sys.executable, "-m", "torch.distributed.run"]
        meet = ["--nnodes", "2", "--node-rank", str(rank)]
        meet += ["--nproc-per-node", str(1 + rank)]
        server = ["--master-addr", ADDRESSES[0], "--master-port", str(PORT)]
        task = [str(HERE / "toy_command.py"), "train", str(config)]
        # Both ends have this machine's host name, by which gloo would look for them.
        line = [*inside, *meet, *server, *task]
        worlds.append(launch(line, GLOO_SOCKET_IFNAME="veth0", TP_SOCKET_IFNAME="veth0"))
    for world in worlds:
        status, output = world.finish(200)
        assert status == 0, output
    summary = json.loads((tmp_path / "runs" / name / "summary.json").read_text())
    counted = {"up": 0, "down": 0}
    for phase in summary["communication"]["bytes_by_phase"].values():
        for way in counted:
            counted[way] += phase[way]
    kernel = _kernel_bytes(cable[0])
    again = {"up": _sent_again(cable[1]), "down": _sent_again(cable[0])}
    print(name, "counted", counted, "kernel", kernel, "of these again, at most", again)
    for way in counted:
        assert counted[way] > 10 * 2**20
        assert kernel[way] > counted[way], (counted, kernel)
        assert (kernel[way] - again[way]) / counted[way] < 1.02, (counted, kernel, again)
