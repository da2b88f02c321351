"""What a client does to whatever it sends, so that an honest but curious server learns less.

Every draw is a function of the client's own secret and of what it is for: a step that is begun
again, a run that is resumed and a client that comes back send the same numbers, and no second look
at a sample. The seed of the experiment cannot be that secret: the server has it, and would take the
noise out again. See ``docs/defences.md``.

Shape legend: ``b`` batch, ``l`` length in tokens, ``d`` width.
"""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mpsl_dist.actors.assembly import build_on_meta
from mpsl_dist.actors.choices import width_of
from mpsl_dist.config import Defences, Experiment, to_dict
from mpsl_dist.config.loading import HOST_KEYS
from mpsl_dist.data import Splits
from mpsl_dist.errors import ConfigError, DiskError
from mpsl_dist.models import defences
from mpsl_dist.models.tasks import Task
from mpsl_dist.models.tokenizers import PatchTokenizer, Tokenizers, copy_of
from mpsl_dist.records.run_directory import FREE_KEYS
from mpsl_dist.typed import flatten

#: What tells a row that is sent from every other that a client sends.
Mark = tuple[int | str, ...]
#: Bytes of a secret that is drawn here, and the fewest of a file's.
_BYTES = 32
#: The δ that ε is said for.
DELTA = 1e-5


@dataclass(frozen=True)
class Guard:
    """One client's defences; by default none, and nothing is changed.

    Attributes
    ----------
    chosen : Defences
    secret : bytes
        What every draw comes from, see :func:`secret_of`.
    once : bool
        Whether a training sample crosses once (``wire.cache``): its noise and order are then drawn
        once, so that one that is asked for again gives no second look.
    run : str
        Tells runs under one secret apart: of the same noise on other tokens the difference would
        have none. A label's answer alone is the same in all of them.
    """

    chosen: Defences = field(default_factory=Defences)
    secret: bytes = b""
    once: bool = False
    run: str = ""

    def own_tokenizers(self, first: Tokenizers) -> Tokenizers:
        """Return this client's copy of the tokenizers that all begin with, or a draw of its own."""
        if not self.chosen.secret_tokenizers:
            return copy_of(first)
        own = copy.deepcopy(first)
        defences.redraw(own, self._draws("tokenizers", self.run))
        return own

    def tokens(
        self, tokenizers: Tokenizers, tokens: Sequence[Tensor], marks: Sequence[Mark]
    ) -> list[Tensor]:
        """Return a mini-batch's tokens (b, l, d), one tensor a modality, as they may be seen.

        Parameters
        ----------
        tokenizers : Tokenizers
            What made them; patches alone are shuffled, a text is nothing without its order.
        marks : sequence of tuple
            One for each of the b samples, of which there may be none.
        """
        found = list(tokens)
        if not marks:  # of a test batch nothing may be readable
            return found
        if self.chosen.shuffle_patches:
            for place, tokenizer in enumerate(tokenizers.by_modality.values()):
                if isinstance(tokenizer, PatchTokenizer):
                    orders = [self._draws("order", self.run, place, *mark) for mark in marks]
                    found[place] = defences.shuffled(found[place], orders)
        if self.chosen.token_noise:
            for place, tokens_bld in enumerate(found):
                draws = [self._draws("noise", self.run, place, *mark) for mark in marks]
                noise_bld = self.chosen.token_noise * defences.normal(draws, tokens_bld)
                found[place] = defences.shortened(tokens_bld) + noise_bld
        return found

    def training_marks(self, positions: Sequence[int], epoch: int) -> list[Mark]:
        """Return the marks of training samples, by their places among the client's own."""
        when = () if self.once else (epoch,)
        return [("train", position, *when) for position in positions]

    def received(self, predictions: Tensor, key: Sequence[int]) -> Tensor:
        """Return the same predictions, whose gradient gets its noise on its way back."""
        ratio = self.chosen.gradient_noise
        if not (ratio and predictions.requires_grad):
            return predictions
        own = predictions.view_as(predictions)
        own.register_hook(
            lambda gradient: defences.noisy_gradient(
                gradient, ratio, self._draws("gradient", self.run, *key)
            )
        )
        return own

    def loss(
        self, task: Task, predictions: Tensor, labels_b: Tensor, positions: Sequence[int]
    ) -> Tensor:
        """Return the task's loss, a scalar; with ``label_epsilon`` on labels that may be false.

        A label is drawn once, not anew in every epoch: epochs do not add up.
        """
        epsilon = self.chosen.label_epsilon
        if epsilon is None:
            return task.loss(predictions, labels_b)
        classes = predictions.shape[1]
        told = [
            defences.randomised_response(label, classes, epsilon, self._draws("label", position))
            for label, position in zip(labels_b.tolist(), positions, strict=True)
        ]
        return defences.corrected_loss(predictions, torch.tensor(told), epsilon)

    def penalty(
        self, tokenizers: Tokenizers, inputs: Mapping[str, Tensor], tokens: Sequence[Tensor]
    ) -> Tensor:
        """Return NoPeek's penalty (Vepakomma et al. 2020), a scalar of value 0 that has a gradient.

        α times the mean over the modalities of the distance correlation between inputs and tokens.
        Its value is taken out again: the loss that is said stays the task's.
        """
        pairs = zip(tokenizers.by_modality, tokens, strict=True)
        each = [
            defences.distance_correlation(
                defences.distances(inputs[name]), defences.distances(tokens_bld)
            )
            for name, tokens_bld in pairs
        ]
        mean = torch.stack(each).mean()
        return self.chosen.nopeek * (mean - mean.detach())

    def _draws(self, *words: int | str) -> np.random.Generator:
        digest = hashlib.blake2b(repr(words).encode(), key=self.secret, digest_size=_BYTES)
        return np.random.default_rng(int.from_bytes(digest.digest(), "big"))


def guard_of(experiment: Experiment, client: int) -> Guard:
    """Return a client's defences; runs where the client lives, and may write its secret there."""
    chosen = experiment.defences
    if not chosen.draws:
        return Guard(chosen)
    secret = secret_of(experiment, client)
    return Guard(chosen, secret, experiment.wire.cache, _name_of_run(experiment))


def _name_of_run(experiment: Experiment) -> str:
    """Return a digest of all that makes a run another one, and that no resumed run may change.

    Defaults are left out: a run that is older than a key is still the same run.
    """
    free = (*FREE_KEYS, *HOST_KEYS, "training.epochs")
    defaults = flatten(to_dict(Experiment()))
    own = [
        (key, value)
        for key, value in flatten(to_dict(experiment)).items()
        if value != defaults.get(key) and not any(f"{key}.".startswith(f"{k}.") for k in free)
    ]
    return hashlib.blake2b(repr(sorted(own)).encode(), digest_size=8).hexdigest()


def secret_of(experiment: Experiment, client: int) -> bytes:
    """Return what a client's draws come from (``defences.secret``).

    Returns
    -------
    bytes
        32, different for every client.

    Raises
    ------
    ConfigError
        If the file cannot be read, or is too short.
    DiskError
        If a secret cannot be kept.
    """
    chosen = experiment.defences.secret
    if chosen is None:
        shared = _kept(secret_file(experiment.run_directory, client))
    elif chosen == "seed":
        shared = f"no secret {experiment.seed}".encode()
    else:
        shared = read_secret(chosen)
    return hashlib.blake2b(shared + b"/%d" % client, digest_size=_BYTES).digest()


def secrets_of(run_directory: Path) -> Path:
    """Return the folder of a run that clients keep the secrets in that they drew."""
    return run_directory / "secrets"


def secret_file(run_directory: Path, client: int) -> Path:
    """Return the file of the secret that a client drew for itself."""
    return secrets_of(run_directory) / f"client-{client:04d}.key"


def read_secret(path: str) -> bytes:
    """Return what an owner's file holds; raises a ConfigError as :func:`secret_of`."""
    try:
        found = Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"defences.secret: {path}: {error.strerror or error}") from error
    if len(found) < _BYTES:
        raise ConfigError(
            f"defences.secret: {path} has {len(found)} bytes, at least {_BYTES} are needed: "
            f"head -c {_BYTES} /dev/urandom > {path}"
        )
    return found


def _kept(path: Path) -> bytes:
    """Return a secret of the client's own, drawn at the first time."""
    if path.exists():
        return read_secret(str(path))
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.unlink(missing_ok=True)
        with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(drawn := os.urandom(_BYTES))
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise DiskError.of(path, error) from error
    return drawn


# -- what is said of them --------------------------------------------------------------------------


def guarantees(experiment: Experiment, splits: Splits) -> dict[str, float | None]:
    """Return the differential privacy that the defences are worth, as ``summary.json`` has it.

    Returns
    -------
    dict of str to float
        ``label_epsilon`` of a label, in the whole run; ``token_epsilon_per_epoch`` and
        ``token_epsilon`` of a sample's tokens in an epoch and in the whole run, at
        ``token_delta``, None without the package ``dp-accounting``. Empty where nothing has any.
    """
    chosen, found = experiment.defences, {}
    if chosen.label_epsilon is not None:
        found["label_epsilon"] = chosen.label_epsilon
    if chosen.token_noise:
        size = _tokens_of_a_sample(experiment, splits), width_of(experiment)
        times = 1 if experiment.wire.cache else experiment.training.epochs
        found["token_delta"] = DELTA
        for name, sent in (("token_epsilon_per_epoch", 1), ("token_epsilon", times)):
            try:
                epsilon = defences.token_epsilon(chosen.token_noise, *size, DELTA, sent)
            except ImportError:
                epsilon = None
            found[name] = epsilon
    return found


def _tokens_of_a_sample(experiment: Experiment, splits: Splits) -> int:
    own = build_on_meta(experiment, splits)[0]
    lengths = dict(zip(own.by_modality, own.lengths, strict=True))
    captions = getattr(splits.train, "captions", 1)
    return sum(lengths.values()) + (captions - 1) * lengths.get("text", 0)


def sentences(experiment: Experiment, splits: Splits) -> list[str]:
    """Return what a user is told of the defences before a run."""
    found, chosen, lines = guarantees(experiment, splits), experiment.defences, []
    if chosen.draws and chosen.secret == "seed":
        lines.append("defences.secret=seed: the server knows every draw; a simulation, no defence")
    if "label_epsilon" in found:
        lines.append(
            f"defences.label_epsilon: every training label is {found['label_epsilon']:g}-"
            "differentially private in the whole run; inputs are not"
        )
    if "token_epsilon" in found and found["token_epsilon"] is None:
        lines.append("defences.token_noise: its epsilon needs dp-accounting, the extra 'privacy'")
    elif "token_epsilon" in found:
        epoch, run = found["token_epsilon_per_epoch"], found["token_epsilon"]
        lines.append(
            f"defences.token_noise={chosen.token_noise:g}: a sample's tokens are "
            f"({epoch:.4g}, {DELTA:g})-differentially private in an epoch, ({run:.4g}, {DELTA:g}) "
            "in the run" + (": as good as no guarantee at all" if run > 10 else "")
        )
    return lines
