"""Rows of ML-ECS' table by hand: FedMLLM's pull, and Co-PLMs' proxies."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_mlecs import (
    CO_PLMS,
    LACKING,
    PRIVATE,
    assert_same,
    devices_of,
    experiment,
    in_one_process,
    rounds,
)

from mpsl_dist.actors.edge_device import EdgeDevice
from mpsl_dist.models.answers import answer_loss
from mpsl_dist.models.average import load_trainable, trainable_state
from mpsl_dist.models.tokenizers import modality_of
from mpsl_dist.models.unified import shared_state

SGD: dict[str, Any] = {"name": "sgd", "lr": 0.1, "momentum": 0.0, "weight_decay": 0.0}


def test_fedmllm_pulls_middle_layers_back_by_the_share_of_what_a_device_lacks() -> None:
    pytest.importorskip("peft", reason="mpsl_dist[lm] is not installed")
    rules = PRIVATE | {"edge_blocks": 7, "proximal": 0.3, "dropout": 0, "lora_dropout": 0}
    method = in_one_process(
        experiment("tiny", 0, mlecs=rules, training={"client": SGD}, data=LACKING)
    )
    sent, lacking = method.cloud.shared, set()

    def after(device: EdgeDevice, steps: int, pull: float) -> dict[str, torch.Tensor]:
        device.rules = replace(device.rules, private_steps=steps, proximal=pull)
        load_trainable(device.model, begun)
        device.train_round(0, None, sent)
        return shared_state(device.model, "lora")

    for device in devices_of(method).values():
        begun = trainable_state(device.model)
        lacks = 1 - len(device.model.modalities) / 2
        lacking.add(lacks)
        # The first step begins where the server's factors are, and is not pulled.
        once, plain, pulled = (after(device, *how) for how in ((1, 0.3), (2, 0.0), (2, 0.3)))
        for key, value in once.items():
            middle = 1 <= int(key.split(".layers.")[1].split(".")[0]) <= 5  # of 0 to 6; 7 // 7 = 1
            back = SGD["lr"] * 0.3 * lacks * middle * (value - sent[key])
            torch.testing.assert_close(plain[key] - pulled[key], back, rtol=0, atol=1e-15)
        assert any("lora_B" in key and (x != sent[key]).any() for key, x in once.items())
    assert lacking == {0.0, 0.5}


def test_of_a_device_with_a_proxy_leave_encoders_and_the_proxys_factors_alone() -> None:
    pytest.importorskip("peft", reason="mpsl_dist[lm] is not installed")
    method = in_one_process(experiment("tiny", mlecs=CO_PLMS, data=LACKING))
    for device in devices_of(method).values():
        update = device.train_round(0, None, method.cloud.shared)
        parts = {re.sub(r"\.(self_attn|[0-9]).*", "", key) for key in update.weights}
        encoders = {key for key in parts if key.startswith("tokenizers.")}
        assert parts - encoders == {"proxy.answers.language.model.layers"}
        assert {key.split(".")[1] for key in encoders} == {"by_modality", "encoders", "pre_norm"}
        assert {key.split(".layers.")[1][0] for key in update.weights if ".layers." in key} == {"0"}
        held = {modality_of(key) for key in update.weights} - {None}
        assert held == set(device.model.modalities)


def test_a_devices_round_with_a_proxy_by_hand() -> None:
    pytest.importorskip("peft", reason="mpsl_dist[lm] is not installed")
    plain = {"public_steps": 1, "private_steps": 1, "dropout": 0, "lora_dropout": 0, "pool": 1000}
    chosen = experiment("tiny", mlecs=CO_PLMS | plain, training={"client": SGD})
    method = in_one_process(chosen)
    device = devices_of(method)[0]
    model = copy.deepcopy(device.model)
    update = device.train_round(0, None, method.cloud.shared)

    def scores(batch: Any, features: Any) -> tuple[torch.Tensor, torch.Tensor]:
        fused = model.read(features).fused_bs
        own = model.answers(model.prompt(fused), batch.labels)
        return own, model.proxy.answers(model.proxy.prompt(fused), batch.labels)

    def loss(own: torch.Tensor, batch: Any, teacher: torch.Tensor | None = None) -> torch.Tensor:
        found = answer_loss(model.answers, own, batch.labels)
        if teacher is not None:
            p, q = teacher.detach().softmax(-1), own.softmax(-1)
            found = found + (p * (p / q).log()).sum() / len(own)
        return found

    def down(values: torch.Tensor, proxys: bool) -> list[tuple[torch.Tensor, torch.Tensor]]:
        trained = [p for n, p in model.named_parameters() if n.startswith("proxy.") == proxys]
        trained = [p for p in trained if p.requires_grad]
        found = torch.autograd.grad(values, trained, allow_unused=True, retain_graph=True)
        pairs = zip(trained, found, strict=True)
        return [(p, p.detach() - SGD["lr"] * g) for p, g in pairs if g is not None]

    @torch.no_grad()
    def step(moved: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        for parameter, value in moved:
            parameter.copy_(value)

    ((_, _, batch),) = device.public.part(0, 1)
    with torch.no_grad():
        features = model.encode(batch.inputs)
    own, theirs = scores(batch, features)
    of_own, of_proxy = loss(own, batch, theirs), loss(theirs, batch, own)
    step(down(of_own, proxys=False) + down(of_proxy, proxys=True))
    ((_, _, batch),) = device.own.part(0, 1)
    tuned = loss(scores(batch, model.encode(batch.inputs))[0], batch)
    step(down(tuned, proxys=False))
    assert_same([trainable_state(device.model)], [trainable_state(model)], 1e-13)
    assert update.loss == pytest.approx((of_own + of_proxy + tuned).item() / 2)


def test_the_server_averages_encoders_by_modality_and_learns_with_the_proxy_alone() -> None:
    pytest.importorskip("peft", reason="mpsl_dist[lm] is not installed")
    method = in_one_process(experiment("tiny", mlecs=CO_PLMS, data=LACKING))
    begun = [trainable_state(model) for model in (method.cloud.large, method.cloud.small)]
    rounds(method, 1)
    devices = devices_of(method).values()
    assert len({device.model.modalities for device in devices}) > 1
    sent = [(shared_state(d.model, "proxy"), len(d.data)) for d in devices]
    apart = set()
    for key, value in method.cloud.shared.items():
        held = [(state[key], size) for state, size in sent if key in state]
        by_hand = sum(x * size for x, size in held) / sum(size for _, size in held)
        if (by_hand - value).abs().max() > 1e-13:
            apart.add(key.split(".")[0])
    assert apart == {"proxy"}  # which has learned from the large model
    large, small = (trainable_state(model) for model in (method.cloud.large, method.cloud.small))
    assert any(not torch.equal(large[key], begun[0][key]) for key in large if "answers" in key)
    assert all(torch.equal(x, begun[1][key]) for key, x in small.items() if key[:8] == "answers.")
