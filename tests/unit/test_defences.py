"""What a client does to what it sends: each does what it promises, and the same every time."""

from __future__ import annotations

import math
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toys
from local_fleet import in_one_process, steps_of
from torch import Tensor
from torch.nn import functional

from mpsl_dist.actors import part_checks
from mpsl_dist.actors.assembly import build_server_model, build_tokenizers
from mpsl_dist.actors.checks import check_defences
from mpsl_dist.actors.defences import Guard, guarantees, guard_of, secret_of, sentences
from mpsl_dist.actors.holdings import load_data
from mpsl_dist.actors.smashing import inputs_of
from mpsl_dist.config import Defences, Experiment, to_dict
from mpsl_dist.data.decode.samples import FileDataset, Sample, View
from mpsl_dist.errors import ConfigError
from mpsl_dist.methods import loop, summary
from mpsl_dist.methods.mpsl import Mpsl
from mpsl_dist.methods.psl import Psl
from mpsl_dist.models import defences
from mpsl_dist.models.average import trainable_state
from mpsl_dist.models.tasks import Classification
from mpsl_dist.models.tokenizers import fuse
from mpsl_dist.records.run_directory import RunDirectory
from mpsl_dist.runtime.process import StopRequest

#: Section by case; draws come from the seed.
CASES: dict[str, dict[str, Any]] = {
    "labels": {"defences": {"label_epsilon": 1}},
    "tokens": {"defences": {"token_noise": 0.5}},
    "nopeek": {"defences": {"nopeek": 0.7}},
    "order": {"defences": {"shuffle_patches": True}},
    "gradients": {"defences": {"gradient_noise": 1}},
    "all": {
        "defences": {
            "label_epsilon": 2,
            "token_noise": 0.2,
            "nopeek": 0.5,
            "shuffle_patches": True,
            "gradient_noise": 0.5,
        },
        "data": {"name": "toy-image+audio"},
        "model": {"fusion": "late"},
    },
}
SECRET_TOKENIZERS = {
    "defences": {"secret_tokenizers": True},
    "model": {"train_tokenizers": False},
    "data": {"test_at": "clients"},
}


def experiment(**changes: Any) -> Experiment:
    chosen = {"secret": "seed"} | changes.pop("defences", {})
    training = to_dict(toys.experiment())["training"] | {"precision": "float64"}
    training |= changes.pop("training", {})
    return toys.experiment(defences=chosen, training=training, **changes)


def guard(**chosen: Any) -> Guard:
    return Guard(Defences(**chosen), b"a secret")


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def begun(chosen: Experiment, epoch: int = 0) -> Mpsl:
    method = in_one_process(chosen)
    method.begin_epoch(epoch)
    return method


# -- labels ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("epsilon", "classes"), [(0.5, 2), (1.0, 5), (3.0, 10)])
def test_a_label_is_kept_as_often_as_epsilon_says_and_else_any_other(
    epsilon: float, classes: int
) -> None:
    draws, times, label = rng(), 20_000, 1
    told = [defences.randomised_response(label, classes, epsilon, draws) for _ in range(times)]
    counts = np.bincount(told, minlength=classes)
    keep = math.exp(epsilon) / (math.exp(epsilon) + classes - 1)
    for number in range(classes):
        p = keep if number == label else (1 - keep) / (classes - 1)
        assert abs(counts[number] - times * p) < 5 * math.sqrt(times * p * (1 - p)), number


def test_a_sample_has_one_answer_in_all_epochs_and_clients_differ(monkeypatch) -> None:
    told: list[Tensor] = []
    corrected = defences.corrected_loss

    def watching(logits_bk: Tensor, labels_b: Tensor, epsilon: float) -> Tensor:
        told.append(labels_b)
        return corrected(logits_bk, labels_b, epsilon)

    monkeypatch.setattr(defences, "corrected_loss", watching)
    chosen = experiment(defences={"label_epsilon": 0.5}, training={"epochs": 3})
    method = in_one_process(chosen)
    client = method.clients.references[0]
    seen: dict[int, list[tuple[int, int]]] = {}
    for epoch in range(3):
        method.begin_epoch(epoch)
        for step in np.flatnonzero(method.plan[:, 0]).tolist():
            true_b, positions = client.data.batch(step).labels, client.data.positions(step)
            client.loss(step, torch.zeros(len(true_b), 3))
            for position, pair in zip(
                positions, zip(true_b.tolist(), told[-1].tolist(), strict=True), strict=True
            ):
                seen.setdefault(position, []).append(pair)
    assert sorted(seen) == list(range(method.sizes[0]))
    assert all(len(pairs) == 3 and len(set(pairs)) == 1 for pairs in seen.values())
    assert any(true != answer for [(true, answer), *_] in seen.values())
    one, other = (Guard(Defences(label_epsilon=0.5), secret) for secret in (b"a", b"b"))
    logits_bk, labels_b = torch.zeros(60, 3), torch.zeros(60, dtype=torch.long)
    for each in (one, other):
        each.loss(Classification(), logits_bk, labels_b, range(60))
    assert not torch.equal(told[-1], told[-2])


def test_the_corrected_loss_is_its_closed_form() -> None:
    logits_bk = torch.randn(7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    labels_b, epsilon = torch.arange(7) % 4, 1.3
    keep = math.exp(epsilon) / (math.exp(epsilon) + 3)
    confusion_kk = torch.full((4, 4), (1 - keep) / 3, dtype=torch.float64)
    confusion_kk.fill_diagonal_(keep)
    noisy_bk = logits_bk.softmax(1) @ confusion_kk
    expected = -noisy_bk[torch.arange(7), labels_b].log().mean()
    found = defences.corrected_loss(logits_bk, labels_b, epsilon)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    plain = functional.cross_entropy(logits_bk, labels_b)
    almost = defences.corrected_loss(logits_bk, labels_b, 60.0)
    torch.testing.assert_close(almost, plain, rtol=1e-12, atol=0)


def test_the_corrected_loss_is_least_at_the_true_probabilities() -> None:
    """In expectation over randomised response; the plain one is least elsewhere."""
    true_k = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
    epsilon = 1.0
    keep = defences.keep_probability(epsilon, 3)
    told_k = keep * true_k + (1 - keep) / 2 * (1 - true_k)

    def slope(loss: Any) -> float:
        logits_k = true_k.log().requires_grad_()
        each = [loss(logits_k[None], torch.tensor([label])) for label in range(3)]
        (gradient_k,) = torch.autograd.grad((torch.stack(each) * told_k).sum(), logits_k)
        return gradient_k.abs().max().item()

    assert slope(lambda *pair: defences.corrected_loss(*pair, epsilon)) < 1e-12
    assert slope(functional.cross_entropy) > 0.1


def test_a_certain_and_wrong_prediction_has_a_finite_loss_and_gradient() -> None:
    logits_bk = torch.tensor([[1000.0, 0.0, 0.0]], requires_grad=True)
    loss = defences.corrected_loss(logits_bk, torch.tensor([1]), 3.0)
    loss.backward()
    assert math.isfinite(loss.item()) and bool(logits_bk.grad.isfinite().all())


# -- noise on tokens -----------------------------------------------------------------------------


def explained(noise: float) -> float:
    """The part of unseen inputs' variance that a ridge regression reads from noisy tokens."""
    generator = torch.Generator().manual_seed(5)
    inputs_bp = torch.randn(600, 6, generator=generator, dtype=torch.float64)
    mix_pd = torch.randn(6, 12, generator=generator, dtype=torch.float64)
    tokens_bld = functional.layer_norm(inputs_bp @ mix_pd, [12])[:, None]
    chosen = experiment()
    tokenizers = build_tokenizers(chosen, load_data(chosen))
    marks = [("train", n, 0) for n in range(600)]
    (sent_bld,) = guard(token_noise=noise).tokens(tokenizers, [tokens_bld], marks)
    x_bd = sent_bld[:, 0]
    seen, unseen = slice(0, 400), slice(400, 600)
    gram_dd = x_bd[seen].T @ x_bd[seen] + 1e-6 * torch.eye(12, dtype=torch.float64)
    weights = torch.linalg.solve(gram_dd, x_bd[seen].T @ inputs_bp[seen])
    rest = (inputs_bp[unseen] - x_bd[unseen] @ weights).square().sum()
    return 1 - (rest / inputs_bp[unseen].square().sum()).item()


def test_without_noise_inputs_are_read_and_with_much_nothing_is() -> None:
    assert explained(0.0) > 0.8
    assert explained(0.0) > explained(1.0) + 0.1
    assert explained(1e6) < 0.05


def test_no_defence_returns_the_very_same_tensors() -> None:
    chosen = experiment()
    tokenizers = build_tokenizers(chosen, load_data(chosen))
    tokens, predictions = [torch.randn(2, 5, 16), torch.randn(2, 6, 16)], torch.randn(2, 3)
    predictions.requires_grad_()
    found = Guard().tokens(tokenizers, tokens, [(), ()])
    assert all(a is b for a, b in zip(found, tokens, strict=True))
    assert Guard().received(predictions, (0,)) is predictions
    labels_b = torch.tensor([0, 2])
    plain = functional.cross_entropy(predictions, labels_b)
    assert torch.equal(Guard().loss(Classification(), predictions, labels_b, [0, 1]), plain)


def test_noise_has_its_deviation_and_no_token_is_longer_than_the_bound() -> None:
    chosen = experiment()
    tokenizers = build_tokenizers(chosen, load_data(chosen))
    tokens_bld = torch.zeros(400, 5, 16, dtype=torch.float64)
    marks = [("train", n, 0) for n in range(400)]
    (noise_bld,) = guard(token_noise=3).tokens(tokenizers, [tokens_bld], marks)
    assert noise_bld.std().item() == pytest.approx(3, rel=0.02)
    assert noise_bld[0].ne(noise_bld[1]).all()
    long_bld = torch.randn(4, 5, 16, dtype=torch.float64) * 10
    assert defences.shortened(long_bld).norm(dim=-1).max().item() <= 4 * (1 + 1e-12)
    normed_bld = functional.layer_norm(long_bld, [16])
    assert torch.equal(defences.shortened(normed_bld), normed_bld)


@pytest.mark.parametrize(("sigma", "times"), [(40.0, 1), (200.0, 1), (200.0, 12)])
def test_epsilon_is_the_exact_one_of_the_gaussian_mechanism(sigma: float, times: int) -> None:
    """Balle & Wang (2018), theorem 8, at the sensitivity 2 sqrt(l d)."""
    pytest.importorskip("dp_accounting")
    tokens, width, delta = 9, 16, 1e-5
    apart = 2 * math.sqrt(tokens * width)
    epsilon = defences.token_epsilon(sigma, tokens, width, delta, times)
    scaled = sigma / apart / math.sqrt(times)

    def phi(x: float) -> float:
        return 0.5 * math.erfc(-x / math.sqrt(2))

    half, shift = 1 / (2 * scaled), epsilon * scaled
    assert phi(half - shift) - math.exp(epsilon) * phi(-half - shift) == pytest.approx(
        delta, rel=1e-5
    )


def test_what_noise_is_worth_is_said_and_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("dp_accounting")
    chosen = experiment(defences={"token_noise": 1, "label_epsilon": 2, "secret": None})
    splits = load_data(chosen)
    lengths = build_tokenizers(chosen, splits).lengths
    found = guarantees(chosen, splits)
    expected = defences.token_epsilon(1, sum(lengths), 16, 1e-5)
    assert found["token_epsilon_per_epoch"] == expected < found["token_epsilon"]
    assert found["label_epsilon"] == 2
    said = "\n".join(sentences(chosen, splits))
    assert f"({expected:.4g}, 1e-05)" in said and "as good as no guarantee at all" in said
    method = begun(chosen)
    kept = summary.summarize(chosen, splits, method, summary.Position(), "stopped")
    assert kept["privacy"] == found
    simulated = replace(chosen, defences=replace(chosen.defences, secret="seed"))
    assert "the server knows every draw" in sentences(simulated, splits)[0]
    # What is sent once is counted once.
    once = replace(chosen, wire=replace(chosen.wire, cache=True))
    found = guarantees(once, splits)
    assert found["token_epsilon_per_epoch"] == found["token_epsilon"] == expected

    def absent(*_: Any) -> None:
        raise ImportError

    monkeypatch.setattr(defences, "token_epsilon", absent)
    assert guarantees(chosen, splits)["token_epsilon"] is None
    assert "the extra 'privacy'" in sentences(chosen, splits)[-1]


def test_a_run_without_defences_says_nothing() -> None:
    chosen = toys.experiment()
    assert (
        guarantees(chosen, load_data(chosen)) == {} and sentences(chosen, load_data(chosen)) == []
    )


# -- NoPeek --------------------------------------------------------------------------------------


def direct(x_bp: np.ndarray, z_bd: np.ndarray) -> float:
    """Distance correlation by its definition, sum by sum."""
    b = len(x_bp)

    def centred(rows: np.ndarray) -> np.ndarray:
        d = [[math.dist(rows[i], rows[j]) for j in range(b)] for i in range(b)]
        rest = [sum(row) / b for row in d]
        every = sum(rest) / b
        return np.array([[d[i][j] - rest[i] - rest[j] + every for j in range(b)] for i in range(b)])

    x_bb, z_bb = centred(x_bp), centred(z_bd)

    def covariance(one: np.ndarray, other: np.ndarray) -> float:
        return sum(one[i][j] * other[i][j] for i in range(b) for j in range(b)) / b**2

    return math.sqrt(
        covariance(x_bb, z_bb) / math.sqrt(covariance(x_bb, x_bb) * covariance(z_bb, z_bb))
    )


def test_distance_correlation_is_its_definition() -> None:
    x_bp, z_bd = rng(1).standard_normal((9, 4)), rng(2).standard_normal((9, 3))
    z_bd += x_bp[:, :3]
    found = defences.distance_correlation(
        defences.distances(torch.from_numpy(x_bp)), defences.distances(torch.from_numpy(z_bd))
    )
    assert found.item() == pytest.approx(direct(x_bp, z_bd), rel=1e-12)
    same = defences.distances(torch.from_numpy(x_bp))
    assert defences.distance_correlation(same, same * 3).item() == pytest.approx(1)


def test_distances_of_texts_are_those_of_their_one_hot_rows() -> None:
    tokens_bl = torch.tensor([[1, 2, 3], [1, 2, 4], [5, 6, 7]])
    one_hot = functional.one_hot(tokens_bl, 8).flatten(1).double()
    expected = torch.cdist(one_hot, one_hot) / math.sqrt(2)
    torch.testing.assert_close(defences.distances(tokens_bl), expected)


def test_its_gradient_is_right_and_finite_where_samples_are_the_same() -> None:
    generator = torch.Generator().manual_seed(3)
    x_bp = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    z_bd = torch.randn(5, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    x_bb = defences.distances(x_bp)
    assert torch.autograd.gradcheck(
        lambda z: defences.distance_correlation(x_bb, defences.distances(z)), [z_bd]
    )
    for b in (1, 4):
        same = torch.ones(b, 2, dtype=torch.float64, requires_grad=True)
        found = defences.distance_correlation(torch.rand(b, b), defences.distances(same))
        found.backward()
        assert found.item() == 0 and torch.equal(same.grad, torch.zeros_like(same))


def test_nopeek_changes_gradients_by_its_own_and_the_loss_not_at_all() -> None:
    taken = {}
    for alpha in (0.0, 0.7):
        method = begun(experiment(defences={"nopeek": alpha}))
        with method.clients.step(0, 0, method.clients.present) as step:
            loss = method._backward(step)
            gradients = step.gradients()
        client = method.clients.references[0]
        own = [gradients.get(p) for p in client.parameters()]
        taken[alpha] = loss.item(), own, client, int(method.plan[0, 0])
    assert taken[0.0][0] == taken[0.7][0]
    client, samples = taken[0.7][2], taken[0.7][3]
    tokenizers, batch = client.tokenizers.local_value(), client.data.batch(0)
    inputs = inputs_of(batch, tokenizers, client.device)
    correlations = [
        defences.distance_correlation(defences.distances(inputs[name]), defences.distances(z))
        for name, z in zip(inputs, tokenizers(inputs), strict=True)
    ]
    penalty = 0.7 * samples / method.plan[0].sum() * sum(correlations) / len(correlations)
    expected = torch.autograd.grad(penalty, client.parameters(), allow_unused=True)
    for plain, ours, own in zip(taken[0.0][1], taken[0.7][1], expected, strict=True):
        if own is not None:
            torch.testing.assert_close(ours - plain, own, rtol=1e-8, atol=1e-14)
    assert max(own.abs().max() for own in expected if own is not None) > 1e-6


# -- order ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("fusion", ["early", "late"])
def test_the_order_of_patches_leaves_predictions_as_they_are(pooling: str, fusion: str) -> None:
    chosen = experiment(
        defences={"shuffle_patches": True}, model={"fusion": fusion, "pooling": pooling}
    )
    splits = load_data(chosen)
    tokenizers = build_tokenizers(chosen, splits)
    assert not [name for name in tokenizers.state_dict() if "image.positions" in name]
    server = build_server_model(chosen, splits, tokenizers.lengths)
    inputs = dict(splits.train.fetch(range(6)).inputs)
    tokens = tokenizers({name: x.double() if name != "text" else x for name, x in inputs.items()})
    each = guard(shuffle_patches=True)
    sent = [
        each.tokens(tokenizers, tokens, each.training_marks(range(6), epoch)) for epoch in (0, 0, 1)
    ]
    (image, text), (again, _), (later, _) = sent
    assert torch.equal(image, again) and not torch.equal(image, later)
    assert torch.equal(text, tokens[1]) and torch.equal(image[:, 0], tokens[0][:, 0])
    assert not torch.equal(image, tokens[0])
    torch.testing.assert_close(image.sort(1).values, tokens[0].sort(1).values, rtol=0, atol=0)
    expected, found = (server(fuse(x, fusion)) for x in (tokens, [image, text]))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_a_test_batch_of_which_nothing_can_be_read_is_no_trouble() -> None:
    tokenizers = build_tokenizers(experiment(), load_data(experiment()))
    nothing = [torch.zeros(0, 5, 16), torch.zeros(0, 6, 16)]
    sent = guard(shuffle_patches=True, token_noise=1).tokens(tokenizers, nothing, [])
    assert [x.shape for x in sent] == [x.shape for x in nothing]


# -- gradients -----------------------------------------------------------------------------------


def test_a_gradients_noise_is_as_long_as_was_asked_for() -> None:
    gradient_bk = torch.randn(500, 8, dtype=torch.float64) * torch.tensor([[1e-3]])
    for ratio in (0.5, 4.0):
        noise_bk = defences.noisy_gradient(gradient_bk, ratio, rng()) - gradient_bk
        found = noise_bk.square().sum() / gradient_bk.square().sum()
        assert found.item() == pytest.approx(ratio**2, rel=0.1)
        # Of every row alike, whatever its own length.
        uneven_bk = gradient_bk.clone()
        uneven_bk[:250] = 0
        noise_bk = defences.noisy_gradient(uneven_bk, ratio, rng()) - uneven_bk
        first, second = noise_bk[:250].square().sum(), noise_bk[250:].square().sum()
        assert (first / second).item() == pytest.approx(1, rel=0.2)


def test_the_server_gets_the_noisy_gradient_and_no_other() -> None:
    labels_b, logits_bk = torch.tensor([0, 1, 2, 0]), torch.randn(4, 3, dtype=torch.float64)
    gradients = []
    for each in (Guard(), guard(gradient_noise=1)):
        leaf = logits_bk.clone().requires_grad_()
        received = each.received(leaf, (1, 2))
        each.loss(Classification(), received, labels_b, range(4)).backward()
        gradients.append(leaf.grad)
    plain, noisy = gradients
    expected = defences.noisy_gradient(
        plain, 1, guard(gradient_noise=1)._draws("gradient", "", 1, 2)
    )
    assert torch.equal(noisy, expected) and not torch.equal(noisy, plain)


# -- tokenizers of one's own ---------------------------------------------------------------------


def test_secret_tokenizers_differ_between_clients_and_from_the_servers_copy() -> None:
    method = in_one_process(experiment(**SECRET_TOKENIZERS))
    states = [c.tokenizers.local_value().state_dict() for c in method.clients.references.values()]
    states.append(method.tokenizers.state_dict())
    drawn = [name for name, x in states[0].items() if x.dim() > 1]
    assert any("table" in name for name in drawn) and any("patchify" in name for name in drawn)
    for name in drawn:
        deviation = states[-1][name].std().item()
        for i, one in enumerate(states):
            assert one[name].std().item() == pytest.approx(deviation, rel=0.5), name
            assert not any(torch.equal(one[name], other[name]) for other in states[i + 1 :]), name


def test_secret_tokenizers_are_tested_by_their_owners_alone_and_no_model_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = SECRET_TOKENIZERS | {"training": {"evaluate_own": True, "epochs": 1}}
    chosen = experiment(output=str(tmp_path), **changes)
    method = in_one_process(chosen)
    directory = RunDirectory(chosen.run_directory)
    directory.open(to_dict(chosen), False, False)
    summary = loop.train(chosen, method.splits, method, directory, StopRequest())
    assert summary["test"]["accuracy_own_min"] <= summary["test"]["accuracy"]
    assert not (directory.path / "model").exists()
    assert "no model/" in capsys.readouterr().out
    assert trainable_state(method.tokenizers) == {}


# -- secrets -------------------------------------------------------------------------------------


def test_a_secret_is_drawn_once_kept_from_others_and_each_clients_own(tmp_path: Path) -> None:
    chosen = experiment(output=str(tmp_path), defences={"token_noise": 1, "secret": None})
    secrets = [secret_of(chosen, n) for n in (0, 1)]
    assert secrets[0] != secrets[1] and [secret_of(chosen, n) for n in (0, 1)] == secrets
    file = tmp_path / "toy" / "secrets" / "client-0000.key"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    other = replace(chosen, name="other")
    assert secret_of(other, 0) not in secrets
    file.write_bytes(b"short")
    with pytest.raises(ConfigError, match=r"client-0000\.key has 5 bytes"):
        secret_of(chosen, 0)


def test_a_file_of_the_owners_is_a_secret_and_the_seed_is_none(tmp_path: Path) -> None:
    path = tmp_path / "mine"
    path.write_bytes(bytes(range(32)))
    chosen = experiment(defences={"token_noise": 1, "secret": str(path)})
    first = secret_of(chosen, 0)
    assert first != secret_of(chosen, 1) and len(first) == 32
    assert secret_of(replace(chosen, seed=7), 0) == first
    simulated = experiment(defences={"token_noise": 1})
    assert secret_of(simulated, 0) != secret_of(replace(simulated, seed=7), 0)
    gone = experiment(defences={"token_noise": 1, "secret": str(tmp_path / "gone")})
    (line,) = part_checks.refusals_without_data(gone)
    assert line.startswith("defences.secret: ") and "No such file" in line


def test_two_runs_under_one_secret_have_their_own_noise_and_the_same_answers(
    tmp_path: Path,
) -> None:
    """Of the same noise on the tokens of other tokenizers the difference would be in the clear."""
    path = tmp_path / "mine"
    path.write_bytes(bytes(32))
    chosen = experiment(defences={"token_noise": 1, "label_epsilon": 1, "secret": str(path)})
    slower = replace(chosen, training=replace(chosen.training, batch_size=10))
    longer = replace(chosen, training=replace(chosen.training, epochs=9), device="cuda")
    first, other, resumed = (guard_of(each, 0) for each in (chosen, slower, longer))
    assert first == resumed and first != other
    tokenizers = build_tokenizers(chosen, load_data(chosen))
    tokens, marks = [torch.zeros(1, 5, 16)], first.training_marks([0], 0)
    noises = [each.tokens(tokenizers, tokens, marks)[0] for each in (first, resumed, other)]
    assert torch.equal(noises[0], noises[1]) and not torch.equal(noises[0], noises[2])
    logits_bk, labels_b = torch.randn(50, 3), torch.zeros(50, dtype=torch.long)
    losses = [g.loss(Classification(), logits_bk, labels_b, range(50)) for g in (first, other)]
    assert torch.equal(*losses)


def test_a_key_that_was_added_since_a_run_began_leaves_its_draws_as_they_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chosen = experiment(**SECRET_TOKENIZERS)
    now = guard_of(chosen, 0)

    def older(one: Experiment) -> dict[str, Any]:
        return {key: value for key, value in to_dict(one).items() if key != "adapters"}

    monkeypatch.setattr("mpsl_dist.actors.defences.to_dict", older)
    assert guard_of(chosen, 0) == now


def test_without_a_draw_no_secret_is_written(tmp_path: Path) -> None:
    in_one_process(toys.experiment(output=str(tmp_path), defences={"nopeek": 1}))
    assert list(tmp_path.iterdir()) == []


# -- the same numbers again ----------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_a_step_that_is_begun_again_sends_the_same(case: str) -> None:
    method = begun(experiment(**CASES[case]))
    client = method.clients.references[1]
    sent = [client.tokenize(0), client.tokenize(0)]
    assert all(torch.equal(a, b) for a, b in zip(*sent, strict=True))
    gradients = []
    for _ in range(2):
        predictions = torch.ones(len(sent[0][0]), 3, dtype=torch.float64, requires_grad=True)
        client.loss(0, predictions).backward()
        gradients.append(predictions.grad)
    assert torch.equal(*gradients)


def test_a_resumed_run_goes_on_to_the_last_bit(tmp_path: Path) -> None:
    chosen = experiment(**CASES["all"])
    method = in_one_process(chosen)
    steps = len(method.plan)
    method.begin_epoch(0)
    for step in range(steps - 1):
        method.step(step, step)
    files = method.save(str(tmp_path))
    losses = []
    for each in (method, in_one_process(chosen)):
        if each is not method:
            each.restore(str(tmp_path), files)
            each.begin_epoch(0, steps - 1)
        found = [each.step(steps - 1, steps - 1)]
        each.begin_epoch(1)
        losses.append([*found, each.step(0, steps), each.step(1, steps + 1)])
    assert losses[0] == losses[1]


@pytest.mark.parametrize("case", ["all", "gradients"])
def test_naive_psl_has_the_same_defences(case: str) -> None:
    chosen = experiment(**CASES[case])
    ours, theirs = in_one_process(chosen), in_one_process(chosen, Psl)
    assert steps_of(ours, 3) == pytest.approx(steps_of(theirs, 3), rel=1e-10)


@pytest.mark.parametrize("case", CASES)
def test_every_defence_changes_training(case: str) -> None:
    losses = steps_of(in_one_process(experiment(**CASES[case])), 2)
    plain = CASES[case] | {"defences": {}}
    assert losses != steps_of(in_one_process(experiment(**plain)), 2)


def test_with_the_cache_a_sample_that_is_sent_again_has_the_same_noise_and_order() -> None:
    """Else a second look would take noise away."""
    chosen = experiment(
        defences={"token_noise": 1, "shuffle_patches": True},
        model={"train_tokenizers": False},
        wire={"cache": True},
    )
    method, limited = in_one_process(chosen), in_one_process(chosen)
    limited.clients.cache.kept.limit = 20_000
    steps = 2 * len(method.plan)
    assert steps_of(method, steps) == steps_of(limited, steps)
    sent, more = (m.traffic.totals()["activations"] for m in (method, limited))
    assert sent < more
    anew = in_one_process(replace(chosen, wire=replace(chosen.wire, cache=False)))
    assert steps_of(anew, steps) != steps_of(method, steps)


def test_tests_have_noise_at_the_clients_and_none_at_the_server() -> None:
    """Across the cut the test samples are somebody's; a public benchmark is nobody's."""
    clean = experiment(data={"test_at": "clients"}, training={"evaluate_own": True})
    noisy = replace(clean, defences=replace(clean.defences, token_noise=1e3))
    method, plain = (begun(chosen) for chosen in (noisy, clean))
    for each in (method, plain):
        each.clients.begin_test(None, {n: [3] for n in range(4)})
    sent, again, own = (
        method.clients.references[0].tokenize_test(0, own=own)[0] for own in (False, False, True)
    )
    assert torch.equal(sent, again) and not torch.equal(sent, own)
    assert (sent - plain.clients.references[0].tokenize_test(0)[0]).std() > 500
    method.begin_epoch(1)
    method.clients.begin_test(None, {n: [3] for n in range(4)})
    assert not torch.equal(sent, method.clients.references[0].tokenize_test(0)[0])
    at_server = replace(noisy, data=replace(noisy.data, test_at="server"))
    bare = replace(clean, data=replace(clean.data, test_at="server"))
    found = [in_one_process(each).evaluate()["accuracy"] for each in (at_server, bare)]
    assert found[0] == found[1]


# -- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "fedavg", "defences": {"token_noise": 1}}, "token_noise: method=fedavg"),
        ({"method": "centralized", "defences": {"label_epsilon": 1}}, "label_epsilon: method=cen"),
        ({"defences": {"label_epsilon": 0}}, "label_epsilon: must be greater than 0"),
        ({"defences": {"label_epsilon": 101}}, "label_epsilon: must be at most 100"),
        ({"defences": {"token_noise": -1}}, "token_noise: must be at least 0"),
        ({"defences": {"nopeek": -1}}, "nopeek: must be at least 0"),
        ({"defences": {"gradient_noise": -1}}, "gradient_noise: must be at least 0"),
        (
            {"defences": {"nopeek": 1}, "model": {"train_tokenizers": False}},
            "nopeek: frozen tokenizers learn nothing",
        ),
        ({"defences": {"nopeek": 1}, "contrastive": "global"}, "nopeek: with contrastive=global"),
        (
            {"defences": {"gradient_noise": 1}, "contrastive": "global"},
            "gradient_noise: with contrastive=global",
        ),
        (
            {"defences": {"shuffle_patches": True}, "weights": {"image": "timm"}},
            "shuffle_patches: published weights come with positions; set weights.image=random",
        ),
        (
            {"defences": {"label_epsilon": 1}, "data": {"place": "own"}},
            "label_epsilon: hosts would tell which classes they have",
        ),
        (
            {"defences": {"token_noise": 1, "secret": "seed"}, "data": {"place": "own"}},
            "secret: seed is for simulations",
        ),
        ({"defences": {"token_noise": 1, "secret": ""}}, "secret: empty; take null"),
    ],
)
def test_what_a_defence_cannot_keep_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        toys.experiment(**changes)
    assert any(line.startswith(f"defences.{message}") for line in str(error.value).splitlines())


def test_secret_tokenizers_name_everything_that_would_show_them() -> None:
    with pytest.raises(ConfigError) as error:
        toys.experiment(
            defences={"secret_tokenizers": True},
            model={"text": "clip", "head_at": "client"},
            tokenizer_sync={"mode": "gradients"},
            weights={"image": "timm"},
        )
    said = str(error.value)
    for key in (
        "model.train_tokenizers=false",
        "model.text=table",
        "model.head_at=server",
        "tokenizer_sync.mode=none",
        "data.test_at=clients",
        "weights.image=random",
    ):
        assert f"set {key}" in said


def test_what_the_data_make_of_a_defence_is_refused() -> None:
    labels = experiment(defences={"label_epsilon": 1, "token_noise": 1})
    pairs = experiment(data={"name": "toy-pairs"}, defences={"label_epsilon": 1})
    with pytest.raises(ConfigError, match="label_epsilon: toy-pairs has no labels"):
        check_defences(pairs, load_data(pairs))
    splits = toys.load(("image", "text"))
    train = FileDataset([Sample()], torch.tensor([0]), View(("image",)), on_error="skip")
    with pytest.raises(ConfigError) as error:
        check_defences(labels, replace(splits, train=train))
    lines = str(error.value).splitlines()
    keys = [line.partition(":")[0] for line in lines]
    assert keys == ["defences.label_epsilon", "defences.token_noise"]
    order = experiment(defences={"shuffle_patches": True})
    with pytest.raises(ConfigError, match="toy-image.text has no patches"):
        check_defences(order, replace(splits, shapes={"text": (6,)}))
    check_defences(labels, splits)
