"""What makes a big encoder fit changes its memory and its speed, and nothing else."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import toys
from local_fleet import in_one_process, steps_of
from torch import Tensor
from torch.nn import functional

from mpsl_dist.actors import server as server_module
from mpsl_dist.analysis import flops
from mpsl_dist.analysis.cost_inputs import inputs_of
from mpsl_dist.config import Experiment, to_dict
from mpsl_dist.errors import ConfigError
from mpsl_dist.methods.mpsl import Mpsl
from mpsl_dist.methods.psl import Psl
from mpsl_dist.models.server_model import Encoder, build_encoder

DEPTH, HALF = 4, 2


def experiment(training: dict | None = None, **changes: Any) -> Experiment:
    values = to_dict(toys.experiment())["training"] | {"precision": "float64"} | (training or {})
    encoder = {"size": "custom", "width": 16, "depth": DEPTH, "heads": 2}
    model = {"encoder": encoder | changes.pop("encoder", {})} | changes.pop("model", {})
    return toys.experiment(training=values, model=model, **changes)


def frozen(**wire: Any) -> Experiment:
    """Half of the encoder and all tokenizers frozen."""
    return experiment(
        encoder={"trainable_blocks": DEPTH - HALF}, model={"train_tokenizers": False}, wire=wire
    )


def train(chosen: Experiment, steps: int = 10, kind: type[Mpsl] = Mpsl) -> tuple[Mpsl, list]:
    method = in_one_process(chosen, kind)
    return method, steps_of(method, steps)


def differences(ours: Mpsl, theirs: Mpsl) -> float:
    other = theirs.server.model.state_dict()
    return max(float((x - other[k]).abs().max()) for k, x in ours.server.model.state_dict().items())


# -- checkpointed blocks ---------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_blocks_computed_again_change_no_bit(precision: str) -> None:
    plain, expected = train(experiment({"precision": precision}))
    again, losses = train(experiment({"precision": precision, "checkpoint_blocks": True}))
    assert losses == expected
    assert differences(again, plain) == 0


def passes(encoder: Encoder) -> list[int]:
    """Count every block's forward passes from now on."""
    counts = [0] * len(encoder)

    def note(index: int) -> None:
        counts[index] += 1

    for index, block in enumerate(encoder):
        block.norm1.register_forward_hook(lambda *_, i=index: note(i))
    return counts


def test_only_blocks_that_would_keep_something_are_computed_again() -> None:
    chosen = experiment(
        {"checkpoint_blocks": True},
        encoder={"trainable_blocks": 1},
        model={"train_tokenizers": False},
    )
    method = in_one_process(chosen)
    counts = passes(method.server.model.encoder)
    steps_of(method, 3)
    assert counts == [3, 3, 3, 6]


# -- what autograd keeps ---------------------------------------------------------------------------

TOKENS = (3, 7, 16)


def kept(trainable: int | str, tokens_trained: bool, checkpointed: bool = False) -> int:
    encoder = build_encoder(16, DEPTH, 2, trainable)
    encoder.checkpoint_blocks = checkpointed
    tokens_bld = torch.randn(TOKENS, requires_grad=tokens_trained)
    return flops.kept_bytes(encoder, lambda: encoder(tokens_bld))


def test_a_frozen_prefix_keeps_nothing_where_tokens_need_no_gradient() -> None:
    whole = kept("all", tokens_trained=False)
    assert kept(HALF, tokens_trained=False) == whole * HALF // DEPTH
    assert kept(0, tokens_trained=False) == 0
    assert kept(0, tokens_trained=False, checkpointed=True) == 0


def test_frozen_blocks_keep_no_input_of_their_weights() -> None:
    """Their gradient passes through to the tokenizers; none is formed for them."""
    each = torch.empty(TOKENS).nbytes
    # Of the inputs of its four layers two norms' outputs, and GELU's of fourfold width; attention
    # keeps the other one anyway.
    spared = kept("all", tokens_trained=True) - kept(HALF, tokens_trained=True)
    assert spared == HALF * (1 + 1 + 4) * each
    encoder = build_encoder(16, DEPTH, 2, HALF)
    encoder(torch.randn(TOKENS, requires_grad=True)).sum().backward()
    formed = [all(p.grad is not None for p in block.parameters()) for block in encoder]
    assert formed == [False, False, True, True]
    assert all(p.grad is None for p in encoder[0].parameters())


def test_checkpointed_blocks_keep_their_inputs_alone() -> None:
    each = torch.empty(TOKENS).nbytes
    assert kept("all", tokens_trained=True, checkpointed=True) == DEPTH * each


def test_cost_follows_with_one_block_on_top() -> None:
    def said(**training: Any) -> int:
        chosen = experiment(training)
        return flops.kept_by_server(flops.build(chosen, inputs_of(chosen)), batch=20)

    plain, again = said(), said(checkpoint_blocks=True)
    parts = flops.build(experiment(), inputs_of(experiment()))
    tokens = sum(parts.tokenizers.lengths) * 16 * 8 * 20
    # What stays besides the blocks is pooling and head, which keep little.
    assert DEPTH * tokens < again < DEPTH * tokens + plain / DEPTH + tokens
    assert again < plain / 2


# -- attention and autocast ------------------------------------------------------------------------


def test_attention_is_the_fused_one(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Tensor] = []
    fused = functional.scaled_dot_product_attention

    def noting(q: Tensor, *others: Any, **named: Any) -> Tensor:
        calls.append(q)
        return fused(q, *others, **named)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", noting)
    build_encoder(16, DEPTH, 2)(torch.randn(TOKENS))
    assert len(calls) == DEPTH


def test_autocast_computes_products_in_bfloat16_and_returns_what_it_got() -> None:
    encoder = build_encoder(16, DEPTH, 2)
    tokens_bld = torch.randn(TOKENS)
    exact, seen = encoder(tokens_bld), []
    encoder[0].attn.qkv.register_forward_hook(lambda _, __, output: seen.append(output.dtype))
    encoder.autocast = "bf16"
    rough = encoder(tokens_bld)
    assert (seen, rough.dtype) == ([torch.bfloat16], torch.float32)
    error = (rough - exact).abs().max() / exact.abs().max()
    assert 0 < error < 2e-2


@pytest.mark.parametrize("checkpointed", [False, True])
def test_autocast_trains_alike_and_recomputes_in_the_same_type(checkpointed: bool) -> None:
    rough = {"precision": "float32", "autocast": "bf16"}
    _, expected = train(experiment({"precision": "float32"}))
    _, losses = train(experiment(rough | {"checkpoint_blocks": checkpointed}))
    assert losses == pytest.approx(expected, rel=2e-2)
    assert losses != expected
    if checkpointed:
        assert losses == train(experiment(rough))[1]


# -- the frozen prefix, kept -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Mpsl, Psl])
def test_what_the_frozen_blocks_made_is_kept_and_training_stays(kind: type[Mpsl]) -> None:
    steps = 3 * 5
    plain, expected = train(frozen(), steps, kind)
    method = in_one_process(frozen(cache=True, cache_prefix=True), kind)
    counts = passes(method.server.model.encoder)
    losses = steps_of(method, steps)
    assert losses == pytest.approx(expected, rel=1e-9)
    assert differences(method, plain) < 1e-9
    # The first epoch's mini-batches are the same ones.
    if kind is Mpsl:
        assert losses[:5] == expected[:5]
        assert counts == [5] * HALF + [steps] * (DEPTH - HALF)
    assert counts[0] * 3 == counts[-1]


@pytest.mark.parametrize("place", ["server", "clients"])
def test_tests_still_go_through_every_block(place: str) -> None:
    data = {"name": "toy-image+text", "partition": {"minimum": 3}, "test_at": place}
    shared = {
        "encoder": {"trainable_blocks": 1},
        "model": {"train_tokenizers": False},
        "data": data,
    }
    plain, _ = train(experiment(**shared))
    cached, _ = train(experiment(**shared, wire={"cache": True, "cache_prefix": True}))
    assert cached.evaluate() == plain.evaluate()
    batch = plain.splits.test.fetch(range(30))
    ours, theirs = (m.deployable() for m in (cached, plain))
    found, expected = (model(model.to_own(batch.inputs)) for model in (ours, theirs))
    assert torch.allclose(found, expected, rtol=0, atol=1e-9)


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"training": {"autocast": "bf16", "precision": "float64"}}, "training.autocast"),
        ({"wire": {"cache_prefix": True}}, "wire.cache_prefix: only with"),
        (
            {"training": {"compile": True, "checkpoint_blocks": True}},
            "training.compile: a compiled",
        ),
        (
            {"wire": {"cache": True, "cache_prefix": True}, "model": {"train_tokenizers": False}},
            "wire.cache_prefix: no block of the encoder is frozen",
        ),
    ],
)
def test_what_cannot_be_is_refused_by_its_key(changes: dict, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        toys.experiment(**changes)


def test_without_a_compiler_the_key_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\nand more")

    method = in_one_process(experiment())
    monkeypatch.setattr(server_module.torch, "compile", lambda function: fail)
    with pytest.raises(ConfigError, match=r"training.compile: .*No working C\+\+ compiler found\)"):
        method.server.compile()


def test_compiled_blocks_keep_their_names_and_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled by a backend that needs no compiler; checkpoints must not notice."""
    chosen = experiment()
    plain, expected = train(chosen, 5)
    method = in_one_process(chosen)
    monkeypatch.setattr(server_module.torch, "compile", partial(torch.compile, backend="eager"))
    method.server.compile()
    assert steps_of(method, 5) == pytest.approx(expected, rel=1e-12)
    assert differences(method, plain) < 1e-12
    assert list(method.server.model.state_dict()) == list(plain.server.model.state_dict())
