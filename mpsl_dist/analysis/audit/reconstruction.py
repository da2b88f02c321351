"""Pictures, spectrograms and words from what was heard at one step of a run.

Shape legend: ``n`` samples, ``l`` tokens, ``d`` width, ``c`` channels, ``h`` height, ``w`` width of
a plane.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from mpsl_dist.analysis.audit import pictures, scores, words
from mpsl_dist.analysis.audit.attacks import Scene, by_modality
from mpsl_dist.analysis.audit.figures import Equations, Gallery
from mpsl_dist.analysis.audit.pictures import Patches
from mpsl_dist.analysis.audit.victim import Heard
from mpsl_dist.data import TensorDataset
from mpsl_dist.data.decode.text import VOCABULARY
from mpsl_dist.models.tokenizers import Tokenizers

#: Byte-pair tokens that say nothing: padding, start and end.
_NO_WORDS = (0, VOCABULARY - 2, VOCABULARY - 1)
#: Samples in a picture of the attacks.
_SHOWN = 8
#: Numbers in the tokens of the pairs that a regression learns from, about.
_LEARNED = 50_000_000


def attack_inputs(scene: Scene) -> None:
    """Attack every modality by what its tokenizer is: patches, or a table of words."""
    first = next(iter(scene.true.values()))
    for name, tokenizer in first.by_modality.items():
        if scene.halves.public.inputs[name].is_floating_point():
            _attack_planes(scene, name)
        elif hasattr(tokenizer, "table"):
            _attack_words(scene, name)


def _known(tokenizers: Tokenizers, name: str, shape: tuple[int, ...]) -> Patches | None:
    tokenizer: nn.Module = tokenizers.by_modality[name]
    return pictures.known_patches(tokenizer, tokenizers.pre_norm, shape)


# -- pictures and spectrograms -----------------------------------------------------------------


def _attack_planes(scene: Scene, name: str) -> None:
    public = scene.halves.public.inputs[name]
    shape = tuple(public.shape[1:])
    geometry = _known(next(iter(scene.true.values())), name, shape)
    heard = _heard_of(scene, name)
    if geometry is None or not heard:
        scene.audit.note(f"{name}: its tokenizer cuts no patches, or its tokens did not arrive")
        return
    # A modality's first token holds no patch.
    arrived = {one.client: _modality_tokens(scene, one, name)[:, 1:] for one in heard}
    _add_equations(scene, name, geometry)
    planes = _planes(public)
    prior, unit = planes.mean(0).double(), _unit(planes)
    truth = unit(torch.cat([_planes(one.inputs[name]) for one in heard]).double())
    mean = unit(prior[None])
    trials = {("ridge", "none"): _by_regression(scene, name, scene.true, arrived, geometry, prior)}
    for level, weights in scene.knowledge.items():
        known = {n: _known(weights[n], name, shape) for n in arrived}
        solved = [pictures.solve(x, known[n], prior) for n, x in arrived.items()]
        trials["exact", level] = solved
        trials["ridge", level] = _by_regression(scene, name, weights, arrived, geometry, prior)
    rows, best = {"original": truth}, {}
    for (attack, level), planes_by_client in trials.items():
        guess = unit(torch.cat(planes_by_client)).clamp(0, 1)
        value = _add_planes(scene, (attack, level, name), truth, guess, mean)
        if value > best.get(attack, float("-inf")):
            rows[attack], best[attack] = guess, value
    shown = {label: planes[:_SHOWN] for label, planes in rows.items()}
    scene.audit.galleries.append(Gallery(name, scene.step, shown))


def _heard_of(scene: Scene, name: str) -> list[Heard]:
    """Return what was heard of those clients whose tokens of a modality arrived."""
    found = [one for one in scene.heard if _modality_tokens(scene, one, name) is not None]
    if 0 < len(found) < len(scene.heard):
        scene.audit.note(f"{name}: attacked at {len(found)} of {len(scene.heard)} clients")
    return found


def _modality_tokens(scene: Scene, one: Heard, name: str) -> Tensor | None:
    """Return a modality's tokens (n, l, d); None where they did not arrive."""
    known = scene.true[one.client]
    lengths = dict(zip(known.by_modality, known.lengths, strict=True))
    return by_modality(one.tokens, lengths).get(name)


def _planes(inputs: Tensor) -> Tensor:
    return inputs.unsqueeze(1) if inputs.dim() == 3 else inputs


def _unit(planes_nchw: Tensor) -> Callable[[Tensor], Tensor]:
    """Return what scales planes so that the public ones fill 0 to 1, channel by channel."""
    low = planes_nchw.amin((0, 2, 3)).double()[:, None, None]
    high = planes_nchw.amax((0, 2, 3)).double()[:, None, None]
    return lambda planes: (planes - low) / (high - low).clamp(min=1e-12)


def _add_equations(scene: Scene, name: str, known: Patches) -> None:
    found = pictures.exactness(known)
    width, pixels = known.weight_dp.shape
    scene.audit.equations.append(
        Equations(
            *(scene.step, name, pixels, width, known.stride, known.normed),
            *(found.deficit, found.condition),
        )
    )


def _add_planes(
    scene: Scene, attack: tuple[str, str, str], truth: Tensor, guess: Tensor, mean: Tensor
) -> float:
    """Keep both figures of a reconstruction, and return its PSNR."""
    truth, guess, mean = truth.flatten(1), guess.flatten(1), mean.flatten(1)
    floor = scores.psnr(truth, mean.expand_as(truth)).value
    found = scores.psnr(truth, guess)
    scene.add(attack, "psnr", found, floor, len(truth), scores.CEILING_DB)
    scene.add(attack, "r2", scores.r2(truth, guess, mean[0]), 0.0, len(truth))
    return found.value


def _by_regression(
    scene: Scene,
    name: str,
    weights: Mapping[int, Tokenizers],
    arrived: Mapping[int, Tensor],
    geometry: Patches,
    prior: Tensor,
) -> list[Tensor]:
    """Return planes (n, c, h, w) by client, from what pairs by these tokenizers teach."""
    learned: dict[int, pictures.Ridge] = {}
    found = []
    for n, tokens_nld in arrived.items():
        if id(weights[n]) not in learned:
            count = max(50, _LEARNED // tokens_nld[0].numel())
            sent, inputs = scene.sent_by(n, weights[n], _first(scene, count))
            lengths = dict(zip(weights[n].by_modality, weights[n].lengths, strict=True))
            pairs_nld = by_modality(sent, lengths)[name][:, 1:]
            patches = pictures.cut(_planes(inputs[name]), geometry)
            learned[id(weights[n])] = pictures.learn(pairs_nld, patches)
        guess = learned[id(weights[n])].guess(tokens_nld)
        found.append(pictures.join(guess, geometry, prior))
    return found


def _first(scene: Scene, count: int) -> TensorDataset:
    public = scene.halves.public
    if count >= len(public.labels):
        return public
    some = public.fetch(range(count))
    return TensorDataset(dict(some.inputs), some.labels)


# -- words -------------------------------------------------------------------------------------


def _attack_words(scene: Scene, name: str) -> None:
    public_ml, heard = scene.halves.public.inputs[name], _heard_of(scene, name)
    if not heard:
        scene.audit.note(f"{name}: its tokens did not arrive")
        return
    truth_nl = torch.cat([one.inputs[name] for one in heard])
    arrived = torch.cat([_modality_tokens(scene, one, name) for one in heard])
    said_nl = ~torch.isin(truth_nl, torch.tensor(_NO_WORDS))
    count = int(said_nl.sum())
    usual_l = torch.stack([_most_frequent(column) for column in public_ml.T])
    floor = float((usual_l == truth_nl)[said_nl].double().mean())
    for level, weights in scene.knowledge.items():
        guess_nl = torch.empty_like(truth_nl)
        by_client = [weights[one.client] for one in heard for _ in one.labels_n]
        for known in {id(x): x for x in by_client}.values():
            rows = torch.tensor([x is known for x in by_client])
            tokens_nld, tokenizer = arrived[rows], known.by_modality[name]
            guess_nl[rows] = words.nearest_words(tokens_nld, tokenizer, known.pre_norm)
        right = scores.share((guess_nl == truth_nl)[said_nl])
        scene.add(("nearest row of the table", level, name), "words", right, floor, count)


def _most_frequent(words_m: Tensor) -> Tensor:
    worded = words_m[~torch.isin(words_m, torch.tensor(_NO_WORDS))]
    return worded.mode().values if len(worded) else words_m.mode().values
