"""ML-ECS' cost before a run, against what real models do and hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import toys
from test_mlecs import CO_PLMS, devices_of, experiment, in_one_process
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mpsl_dist.actors import cloud
from mpsl_dist.actors.edge_device import EdgeDevice
from mpsl_dist.actors.stream import Stream
from mpsl_dist.analysis import cost, mlecs_compute
from mpsl_dist.analysis.cost_inputs import Inputs
from mpsl_dist.analysis.flops import Flops, kept_bytes
from mpsl_dist.data import Batch
from mpsl_dist.methods.mlecs import Mlecs

INPUTS = Inputs({n: toys.SHAPES[n] for n in ("image", "audio")}, 3, toys.SAMPLES, 30)
ROWS = pytest.mark.parametrize(
    "language, rules",
    [
        ("tiny", {}),
        ("tiny", {"answer": "head"}),
        ("tiny", {"exchange": "all", "transfer": False}),
        ("tiny", CO_PLMS),
        ("none", {}),
    ],
    ids=["label", "head", "multi-fedavg", "co-plms", "no language model"],
)


def built(language: str, rules: dict[str, Any]) -> tuple[Mlecs, mlecs_compute.EdgeModels]:
    """A run in one process, and its models without numbers."""
    if language != "none":
        pytest.importorskip("peft", reason="mpsl_dist[lm] is not installed")
    chosen = experiment(language, mlecs={"dropout": 0.0, "lora_dropout": 0.0} | rules)
    return in_one_process(chosen), mlecs_compute.build(chosen, INPUTS)


def first_batch(device: EdgeDevice) -> Batch:
    return next(batch for *_, batch in Stream(device.data, 4).part(0, 1))


@ROWS
def test_a_devices_and_the_servers_operations_are_those_of_a_real_step(
    language: str, rules: dict[str, Any]
) -> None:
    method, models = built(language, rules)
    device = devices_of(method)[0]
    batch = first_batch(device)
    large, student = method.cloud.large, method.cloud.student
    read = large.read(large.encode(batch.inputs))
    steps = {
        "client": [lambda: device._tune(batch)],
        "server": [
            lambda: large.answers(
                large.prompt(large.read(large.encode(batch.inputs)).fused_bs), batch.labels
            ),
        ],
    }
    if models.experiment.mlecs.transfer:
        soft = read.fused_bs.detach()
        steps["server"].append(lambda: student.answers(student.prompt(soft), batch.labels))
    for owner, counted in mlecs_compute.operations(models).items():
        foreseen = sum(counted.values(), Flops())
        with sdpa_kernel([SDPBackend.MATH]):
            with FlopCounterMode(display=False) as forward:
                found = [step() for step in steps[owner]]
            with FlopCounterMode(display=False) as backward:
                for result in found:
                    result.sum().backward()
        assert forward.get_total_flops() == 4 * foreseen.forward > 0
        assert backward.get_total_flops() == 4 * (foreseen.training - foreseen.forward) > 0


@ROWS
def test_memory_is_what_real_models_hold_and_keep(
    language: str, rules: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    method, models = built(language, rules | {"contrast": False})
    losses: list[torch.Tensor] = []
    device = devices_of(method)[0]
    held = mlecs_compute.memory(models, 4)
    own = device.model
    assert held["client"]["parameters"] == sum(p.nbytes for p in own.parameters())
    assert held["client"]["gradients"] == sum(p.nbytes for p in device.parameters())
    trained = method.trainable_parameters()["server"]
    assert held["server"]["gradients"] == 8 * trained
    assert held["server"]["optimizer"] == 2 * 8 * trained
    whole = [p for m in (method.cloud.large, method.cloud.small) for p in m.parameters()]
    assert held["server"]["parameters"] == sum(p.nbytes for p in whole)
    batch, lengths = first_batch(device), [*range(1, 40)]
    private = kept_bytes(own, lambda: device._tune(batch), lengths)
    public = kept_bytes(own, lambda: device._connect(batch, None), lengths)
    # Attention on a CPU keeps a little that it does not on shapes, and the other way round.
    assert held["client"]["kept for backward"] == pytest.approx(max(private, public), rel=0.02)
    both = torch.nn.ModuleList([method.cloud.large, method.cloud.small])
    monkeypatch.setattr(cloud, "step_on", lambda loss, *_: losses.append(loss))
    kept = kept_bytes(both, lambda: method.cloud._step(0, batch), lengths)
    assert held["server"]["kept for backward"] == pytest.approx(kept, rel=0.02)


def test_the_servers_table_lies_at_both() -> None:
    method, models = built("none", {})
    table = method.cloud.fused_table().nbytes
    held = mlecs_compute.memory(models, 4)
    assert {owner: parts["fused table"] for owner, parts in held.items()} == {
        "client": table,
        "server": table,
    }


def test_rows_are_shown_where_models_can_be_built(monkeypatch: pytest.MonkeyPatch) -> None:
    def sections(language: str) -> set[str]:
        rows = cost.cost_of(experiment(language), INPUTS).rows
        return {row.section for row in rows if row.method == "mlecs"}

    always = {"parameters", "bytes_per_epoch"}
    assert sections("none") == always | {"flops", "memory"}
    monkeypatch.setattr(mlecs_compute, "find_spec", lambda name: None)
    assert sections("tiny") == always
    assert torch.get_default_device().type == "cpu"
