"""What the wire's codecs lose, what they keep, and how many bytes they take."""

from __future__ import annotations

import pytest
import torch
import toys
from local_fleet import in_one_process, steps_of
from torch import Tensor

from mpsl_dist.actors.assembly import build_tokenizers
from mpsl_dist.actors.choices import wire_of
from mpsl_dist.actors.deployable import Deployable
from mpsl_dist.config import Experiment
from mpsl_dist.errors import ConfigError, DivergedError, NonFiniteError
from mpsl_dist.models import codecs
from mpsl_dist.models.codecs import CODECS, Wire, carriers, decode
from mpsl_dist.models.tokenizers import PatchTokenizer
from mpsl_dist.records.traffic import nbytes

WIDTH = 18  # no multiple of a word, nor of the numbers in a byte of int2
#: Codec -> the largest error, as a part of the token's largest number.
BOUNDS = {"fp32": 0, "bf16": 2**-8, "fp8": 2**-4, "int8": 1 / 255, "int4": 1 / 15, "int2": 1 / 3}
#: bfloat16 scales are rounded upwards.
SCALE = 1 + 2**-7


def tokens(*shape: int, seed: int = 0) -> Tensor:
    """Tokens of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.logspace(-9, 9, shape[0]).view(-1, *[1] * (len(shape) - 1))
    return torch.randn(*shape, generator=generator) * sizes


def there_and_back(name: str, x_nd: Tensor, noise: torch.Generator | None = None) -> Tensor:
    return CODECS[name].unpack(CODECS[name].pack(x_nd, noise), x_nd.shape[-1], x_nd.dtype)


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_arrives_is_what_was_sent_but_for_the_codecs_error(
    name: str, dtype: torch.dtype
) -> None:
    x_nd = tokens(40, WIDTH).to(dtype)
    found_nd = there_and_back(name, x_nd)
    assert found_nd.dtype == dtype
    largest_n = x_nd.abs().amax(-1, keepdim=True)
    assert bool(((found_nd - x_nd).abs() <= BOUNDS[name] * SCALE * largest_n).all())


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("width", [64, WIDTH, 7])
def test_a_token_takes_the_bytes_that_are_told(name: str, width: int) -> None:
    coded_nw = CODECS[name].pack(tokens(5, width))
    assert coded_nw.dtype == torch.uint8
    assert coded_nw.shape == (5, CODECS[name].token_bytes(width, 4))


def test_bytes_of_a_token_of_width_64() -> None:
    told = {name: codec.token_bytes(64, 4) for name, codec in CODECS.items()}
    assert told == {"fp32": 256, "bf16": 128, "fp8": 66, "int8": 66, "int4": 34, "int2": 18}


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_not_finite_is_still_found_and_in_its_token_alone(
    name: str, wrong: float
) -> None:
    x_nd = tokens(3, WIDTH)
    x_nd[1, 4] = wrong
    assert there_and_back(name, x_nd).isfinite().all(1).tolist() == [True, False, True]
    (found_bld,) = Wire(CODECS[name]).through([x_nd.unsqueeze(0)])
    assert found_bld.isfinite().all(2).tolist() == [[True, False, True]]


@pytest.mark.parametrize("name", CODECS)
def test_a_token_of_zeros_stays_one(name: str) -> None:
    assert there_and_back(name, torch.zeros(2, WIDTH)).count_nonzero() == 0


@pytest.mark.parametrize("name", ["int8", "int4", "int2"])
def test_random_rounding_keeps_the_mean_and_rounding_to_the_nearest_does_not(name: str) -> None:
    (x_d,) = tokens(1, WIDTH)
    x_nd = x_d.expand(20_000, -1)
    noise = torch.Generator().manual_seed(1)
    step = 2 * BOUNDS[name] * SCALE * x_d.abs().max()
    away = (there_and_back(name, x_nd, noise).mean(0) - x_d).abs() / step
    # Six deviations of a mean of 20,000 that are each at most half a step off.
    assert away.max() < 6 * 0.5 / 20_000**0.5
    assert (there_and_back(name, x_nd).mean(0) - x_d).abs().max() / step > 0.05


@pytest.mark.parametrize("activations", CODECS)
@pytest.mark.parametrize("gradients", CODECS)
@pytest.mark.parametrize("stochastic", [False, True])
def test_a_gradient_arrives_as_it_is_coded_whatever_the_activations_lost(
    activations: str, gradients: str, stochastic: bool
) -> None:
    wire = Wire(CODECS[activations], CODECS[gradients], stochastic)
    x_bld = tokens(3, 4, WIDTH).requires_grad_()
    upstream_bld = tokens(3, 4, WIDTH, seed=1).flip(0)
    sent = wire.encode([x_bld * 1], key=(5,))
    (found_bld,) = decode(sent)
    lossy_nd = there_and_back(activations, x_bld.detach().view(-1, WIDTH))
    torch.testing.assert_close(found_bld.view(-1, WIDTH), lossy_nd, rtol=0, atol=0)
    (gradient_bld,) = torch.autograd.grad(found_bld, x_bld, upstream_bld)
    noise = None
    if stochastic and not wire.plain:
        noise = torch.Generator().manual_seed(sent[0].seed)
    expected_nd = there_and_back(gradients, upstream_bld.view(-1, WIDTH), noise)
    torch.testing.assert_close(gradient_bld.view(-1, WIDTH), expected_nd, rtol=0, atol=0)


def test_without_codecs_the_very_tensors_travel() -> None:
    x_bld = tokens(3, 4, WIDTH)
    assert Wire().encode([x_bld])[0] is x_bld
    assert decode([x_bld])[0] is x_bld
    assert Wire().through([x_bld])[0] is x_bld


def test_packed_tokens_are_their_bytes_and_one_more_for_the_gradient() -> None:
    wire = Wire(CODECS["int8"], CODECS["int4"])
    x_bld = tokens(3, 4, 64).requires_grad_()
    trained, frozen = wire.encode([x_bld * 1, x_bld.detach()])
    assert (nbytes(trained), nbytes(frozen)) == (3 * 4 * 66 + 1, 3 * 4 * 66)
    assert [nbytes(x) for x in carriers([trained, frozen])] == [1]
    arrived = []
    carriers([trained])[0].register_hook(lambda g: arrived.append(nbytes(g)))
    decode([trained])[0].sum().backward()
    assert arrived == [3 * 4 * 34]


def test_random_rounding_follows_from_the_step_and_nothing_else() -> None:
    wire = Wire(CODECS["int8"], CODECS["int4"])

    def gradient(key: tuple[int, ...], place: int) -> Tensor:
        x_bld = tokens(3, 4, WIDTH).requires_grad_()
        found_bld = decode(wire.encode([x_bld * 1, x_bld * 1], key))[place]
        return torch.autograd.grad(found_bld, x_bld, tokens(3, 4, WIDTH, seed=1))[0]

    first = gradient((1, 2, 3, 4), 0)
    assert torch.equal(first, gradient((1, 2, 3, 4), 0))
    others = [gradient((1, 2, 3, 5), 0), gradient((1, 3, 3, 4), 0), gradient((1, 2, 3, 4), 1)]
    assert not any(torch.equal(first, other) for other in others)


# -- in training ---------------------------------------------------------------------------------


def experiment(**changes: object) -> Experiment:
    late = {"data": {"name": "toy-image+audio"}, "model": {"fusion": "late"}}
    return toys.experiment(**late | changes)


def test_coded_gradients_are_the_clients_affair_alone() -> None:
    """The server's own step stays as it is, to the last bit; every client's differs."""
    plain = in_one_process(experiment())
    coded = in_one_process(experiment(wire={"gradients": "int4"}))
    assert steps_of(coded, 1) == steps_of(plain, 1)
    for key, value in plain.server.model.state_dict().items():
        assert torch.equal(coded.server.model.state_dict()[key], value), key
    for number, client in plain.clients.references.items():
        other = coded.clients.references[number].tokenizer_weights()
        ours = client.tokenizer_weights()
        assert any(not torch.equal(other[key], ours[key]) for key in ours)


def test_coded_training_repeats_itself_and_stays_near_the_plain_one() -> None:
    wire = {"activations": "int8", "gradients": "int8"}
    plain, coded, again = (
        steps_of(in_one_process(experiment(wire=chosen)), 5) for chosen in ({}, wire, wire)
    )
    assert coded == again != plain
    assert coded == pytest.approx(plain, rel=0.02)


def test_tests_at_the_server_lose_what_tests_at_the_clients_lose() -> None:
    """Every client holds what the codec leaves of its tokens; so does the model to deploy."""
    chosen = experiment(wire={"activations": "int2"})
    method = in_one_process(chosen)
    steps_of(method, 2)
    batch = method.splits.test.fetch(range(8))
    model = method.deployable()
    assert torch.equal(model(batch.inputs), _through(model, CODECS["int2"], batch.inputs))
    plain = Deployable(method.tokenizers, method.server.model, method.task)
    assert not torch.equal(model(batch.inputs), plain(batch.inputs))


def _through(model: Deployable, codec: codecs.Codec, inputs: dict[str, Tensor]) -> Tensor:
    smashed = []
    for x_bld in model.tokenizers(inputs):
        x_nd = x_bld.flatten(0, 1)
        smashed.append(codec.unpack(codec.pack(x_nd), x_nd.shape[1], x_nd.dtype).view_as(x_bld))
    return model.server_model(smashed)


CODED = {"activations": "int8", "gradients": "int4"}


def test_an_activation_that_is_not_finite_names_its_client_through_a_codec() -> None:
    method = in_one_process(experiment(wire=CODED))
    tokenizers = method.clients.references[2].tokenizers.local_value()
    with torch.no_grad():
        tokenizers.pre_norm.weight[3] = float("nan")
    with pytest.raises(NonFiniteError, match="client 2"):
        steps_of(method, 1)


def test_a_gradient_that_is_not_finite_stops_training_through_a_codec() -> None:
    method = in_one_process(experiment(wire=CODED))
    encoder = method.server.model.encoder
    encoder.register_forward_pre_hook(
        lambda _, inputs: inputs[0].register_hook(lambda g: g * float("nan")) and None
    )
    with pytest.raises(DivergedError, match="gradient of its tokenizers"):
        steps_of(method, 1)


def test_methods_without_a_cut_code_nothing() -> None:
    assert not wire_of(experiment(wire=CODED)).plain
    assert wire_of(experiment(wire=CODED, method="centralized")).plain


def test_an_unknown_codec_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match=r"wire.gradients: unknown codec 'int9'; did you mean"):
        wire_of(experiment(wire={"gradients": "int9"}))


# -- merged patches ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grid", "merge", "length"), [((4, 4), 2, 5), ((3, 5), 2, 7), ((4, 6), 3, 5)]
)
def test_neighbouring_patches_become_their_mean_and_the_first_token_stays(
    grid: tuple[int, int], merge: int, length: int
) -> None:
    height, width = grid[0] * 4, grid[1] * 4
    torch.manual_seed(0)
    every = PatchTokenizer(3, height, width, 4, 4, 8)
    merged = PatchTokenizer(3, height, width, 4, 4, 8, merge)
    merged.load_state_dict(every.state_dict())
    plane_bchw = torch.randn(2, 3, height, width)
    found_bld, all_bld = merged(plane_bchw), every(plane_bchw)
    expected = [all_bld[:, 0]]
    for top in range(0, grid[0], merge):
        for left in range(0, grid[1], merge):
            rows = range(top, min(top + merge, grid[0]))
            columns = range(left, min(left + merge, grid[1]))
            places = [1 + row * grid[1] + column for row in rows for column in columns]
            expected.append(all_bld[:, places].mean(1))
    expected_bld = torch.stack(expected, dim=1)
    assert merged.length == length == found_bld.shape[1]
    torch.testing.assert_close(found_bld, expected_bld)
    pull_bld = torch.randn_like(found_bld)
    ours = torch.autograd.grad(found_bld, list(merged.parameters()), pull_bld)
    theirs = torch.autograd.grad(expected_bld, list(every.parameters()), pull_bld)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


def test_the_servers_lengths_follow_merged_patches() -> None:
    chosen = experiment(model={"merge_patches": 2, "image_patch": 2, "fusion": "early"})
    method = in_one_process(chosen)
    assert method.server.model.lengths == [5, 3]
    assert steps_of(method, 1)[0] > 0
    assert build_tokenizers(chosen, method.splits).lengths == [5, 3]
