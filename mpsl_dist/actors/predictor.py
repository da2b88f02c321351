"""A trained model as others use it: raw files, pictures or tensors in, named classes out.

Shape legend: ``b`` batch, ``k`` classes, ``d`` width, ``n`` first things, ``m`` second things,
``h`` height, ``w`` width, ``s`` samples of a waveform, ``t`` frames, ``l`` text length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mpsl_dist.actors import deployable
from mpsl_dist.actors.assembly import tokenizer_facts
from mpsl_dist.actors.deployable import Deployable
from mpsl_dist.actors.model_folder import client_of, find, own_weights
from mpsl_dist.actors.raw import Gaps, Reader
from mpsl_dist.config import Experiment
from mpsl_dist.config.methods import facts_of
from mpsl_dist.data.decode.view import View
from mpsl_dist.errors import ConfigError, DataError, RunError
from mpsl_dist.models.average import load_trainable
from mpsl_dist.models.gapped import mask_of
from mpsl_dist.models.tokenizers import modality_of
from mpsl_dist.reading import read_json

#: Mistakes listed in one message.
_LISTED = 10


@dataclass(frozen=True)
class Prediction:
    """What a classifier says of one sample.

    Attributes
    ----------
    label : str
        The most likely class.
    probability : float
        Its probability.
    probabilities : dict of str to float
        Of every class, in label order; their sum is 1.
    """

    label: str
    probability: float
    probabilities: dict[str, float]


class Predictor(nn.Module):
    """A trained model with its preprocessing; knows no other process.

    Parameters
    ----------
    model : Deployable
    reader : Reader
        Makes inputs of what is given.
    classes : sequence of str
        Class names in label order; none for retrieval.
    batch_size : int
        Samples that are read and computed at once.
    trained : sequence of str
        All modalities that it was trained with, in the order of fusion; a client's own part may
        take fewer.
    """

    def __init__(
        self,
        model: Deployable,
        reader: Reader,
        classes: Sequence[str],
        batch_size: int,
        trained: Sequence[str],
    ) -> None:
        super().__init__()
        self.model = model
        self.reader = reader
        self.classes = tuple(classes)
        self.batch_size = batch_size
        self.trained = tuple(trained)

    @property
    def modalities(self) -> tuple[str, ...]:
        """What a sample is made of, in the order of fusion."""
        return tuple(self.reader.shapes)

    def forward(
        self, inputs: Mapping[str, Tensor], present: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Return logits (b, k), or embeddings (b, 2, d) in retrieval, on the model's device.

        Parameters
        ----------
        inputs : mapping of str to Tensor
            By modality, as :meth:`inputs` returns them or a dataset's ``Batch`` holds them.
        present : mapping of str to Tensor, optional
            Which samples have a modality, (b,) bool for each, as a ``Batch`` says it; by default
            all of them have those that there are inputs of.

        Raises
        ------
        DataError
            If a modality is absent that must be there.
        """
        own = {name: inputs[name] for name in self.modalities if name in inputs}
        there = self._there(own, present)
        return self.model(self.model.to_own(own), there)

    def _there(
        self, own: Mapping[str, Tensor], present: Mapping[str, Tensor] | None
    ) -> dict[str, Tensor] | None:
        """Return which samples have a modality; None where all of them have everything."""
        if present is None:
            self.reader.check(own)
            all_b = torch.ones(len(next(iter(own.values()))), dtype=torch.bool)
            present = dict.fromkeys(own, all_b)
        none_b = torch.zeros(len(next(iter(present.values()))), dtype=torch.bool)
        found = {name: present[name] if name in own else none_b for name in self.trained}
        for kind_m in mask_of(found).unique(dim=0):
            self.reader.check([name for name, has in zip(found, kind_m, strict=True) if has])
        return None if all(bool(there_b.all()) for there_b in found.values()) else found

    def inputs(self, **given: Any) -> dict[str, Tensor]:
        """Return what the model computes with, (b, *shape) by modality that is given, on CPU.

        Parameters
        ----------
        given
            As of :meth:`predict`.

        Raises
        ------
        DataError
            As :meth:`predict`, or if one sample lacks what another has.
        """
        samples, _ = self.reader.samples(given)
        read = _all_read(self.reader, samples)
        if any(sample.keys() != read[0].keys() for sample in read):
            raise DataError("samples lack different parts: ask for the inputs of each kind apart")
        return {name: x for name, x in self.reader.batch(read).items() if name in read[0]}

    def predict(self, **given: Any) -> Prediction | list[Prediction]:
        """Return the class of a sample, or of each of several.

        Parameters
        ----------
        image
            A file, a PIL picture, pixels (h, w), (h, w, 3) or (3, h, w) of whole numbers 0 to 255,
            or a prepared tensor of the model's own shape.
        audio
            A sound file, a waveform (s,) of 16,000 samples a second, the pair (waveform, samples a
            second), or a prepared spectrogram (t, bins).
        text
            A text, or its prepared tokens (l,).
        video
            A clip, which stands for the picture and the sound that are not given themselves.
        given
            Prepared tensors of a plugin's modalities.

        A list of any of these, or a tensor (b, *shape) of prepared ones, is several samples; then
        all that is given must be as many. Where a model takes samples that lack a part, what is
        not given, or None in a list, is absent.

        Returns
        -------
        Prediction or list of Prediction
            A list where several were given.

        Raises
        ------
        DataError
            Naming what the model needs and is not given, what it has no use for, and every file
            that cannot be read.
        ConfigError
            If it is a retrieval model.
        """
        self.require("classification", "similarity")
        samples, several = self.reader.samples(given)
        found: list[Prediction] = []
        for start in range(0, len(samples), self.batch_size):
            some = samples[start : start + self.batch_size]
            found += self.classified(_all_read(self.reader, some))
        return found if several else found[0]

    def classified(self, read: Sequence[Mapping[str, Tensor]]) -> list[Prediction]:
        """Return the classes of samples that the reader has read, as one batch."""
        names = self.modalities
        has = {name: torch.tensor([name in sample for sample in read]) for name in names}
        with torch.no_grad():
            logits_bk = self(self.reader.batch(read), has).cpu()
        found = []
        for best, row in zip(
            logits_bk.argmax(1).tolist(), logits_bk.double().softmax(1).tolist(), strict=True
        ):
            named = dict(zip(self.classes, row, strict=True))
            found.append(Prediction(self.classes[best], row[best], named))
        return found

    def fitting(self, read: Sequence[Mapping[str, Tensor]]) -> list[float]:
        """Return how well the two things of each pair that the reader has read fit each other."""
        with torch.no_grad():
            first_bd, second_bd = self(self.reader.batch(read)).cpu().unbind(1)
        return (first_bd * second_bd).sum(1).tolist()

    def similarity(self, **given: Any) -> Tensor:
        """Return how well things of two modalities fit each other, by a retrieval model.

        Parameters
        ----------
        given
            As of :meth:`predict`, both modalities; n of the first and m of the second.

        Returns
        -------
        Tensor
            (n, m), the dot products of the embeddings, by which the model ranks; they are no
            probabilities.

        Raises
        ------
        DataError
            As :meth:`predict`.
        ConfigError
            If it is a classifier.
        """
        self.require("retrieval", "predict")
        apart = self.reader.apart(given)
        first_nd, second_md = (
            self.embedded(name, things)[:, place]
            for place, (name, things) in enumerate(apart.items())
        )
        return first_nd @ second_md.T

    def embedded(self, modality: str, things: Sequence[Any]) -> Tensor:
        """Return embeddings (b, 2, d) of things of one modality; the other's are of nothing."""
        embeddings = []
        for start in range(0, len(things), self.batch_size):
            some = [{modality: thing} for thing in things[start : start + self.batch_size]]
            inputs = self.reader.batch(_all_read(self.reader, some))
            with torch.no_grad():
                embeddings.append(self(inputs).cpu())
        return torch.cat(embeddings)

    def require(self, task: str, other: str) -> None:
        """Refuse a model of another task; ``other`` is what to call then."""
        if self.model.task.name != task:
            raise ConfigError(f"this is a {self.model.task.name} model: use {other}")


def _all_read(reader: Reader, samples: Sequence[Mapping[str, Any]]) -> list[dict[str, Tensor]]:
    """Read samples; refuse all that cannot be read at once."""
    read, wrong = [], []
    for sample in samples:
        try:
            read.append(reader.read(sample))
        except DataError as error:
            wrong += str(error).splitlines()
    if wrong:
        more = [f"… and {len(wrong) - _LISTED} more"] if len(wrong) > _LISTED else []
        raise DataError("\n".join([*wrong[:_LISTED], *more]))
    return read


def load(path: str | Path, *overrides: str, client: int | None = None) -> Predictor:
    """Load a trained model with its preprocessing.

    Parameters
    ----------
    path : str or Path
        A run directory, its ``model/``, or a folder that ``mpsl_dist export`` wrote.
    overrides : str
        ``key.path=value`` of what may differ from training: ``device=cpu``,
        ``training.test_batch_size=64``.
    client : int, optional
        The client, from 0, whose own tokenizers (and head, where it has one) are taken from the
        run's last checkpoint in place of the average of all, or whose own whole model. It takes
        the modalities that the client has.

    Raises
    ------
    RunError
        If there is no model, or a file of it is missing or damaged, or it has no such client.
    ConfigError
        If an override would change the model.
    """
    folder = find(path, client)
    model, experiment, classes = deployable.load(folder, overrides)
    description = read_json(folder / "config.json")
    if client is not None and client != client_of(folder):
        model = _with_own(model, own_weights(folder, experiment, client), client)
    shapes = {name: tuple(description["shapes"][name]) for name in model.modalities}
    integers = [name for name in shapes if tokenizer_facts(experiment, name).integers]
    reader = Reader(
        shapes,
        _view(folder, description),
        integers,
        source=str(folder / "config.json"),
        gaps=_gaps(model, experiment, description),
        called="the model" if client is None else f"client {client}'s model",
    )
    size = experiment.training.test_batch_size
    return Predictor(model, reader, classes, size, [*description["shapes"]]).eval()


def _gaps(model: Deployable, experiment: Experiment, description: Mapping[str, Any]) -> Gaps:
    """Return what a sample may lack, going by what the model met in training."""
    facts, chosen = facts_of(experiment), experiment.model
    missing = experiment.data.missing
    if facts.unimodal:
        return "others"
    if not facts.common or "data.missing" not in facts.reads or missing.zeros:
        return "none"
    whole = chosen.encoder.kind == "lm" or chosen.connector.tokens or model.server_model.apart
    if whole or model.task.name != "classification":
        return "none"
    if missing.rate:  # of a client alone, that draws per client, all samples are alike
        return "none" if facts.alone and missing.per == "client" else "some"
    met = description.get("gaps")
    if met is None:  # an older version wrote it, or the data lie elsewhere: only a manifest has any
        met = experiment.data.name == "manifest"
    return "some" if met else "none"


def _view(folder: Path, description: Mapping[str, Any]) -> View | None:
    values = description.get("view")
    try:
        return None if values is None else View.of(values)
    except (AttributeError, ValueError) as error:
        raise RunError(f"{folder / 'config.json'}: {error}; a newer version wrote it?") from error


def _with_own(model: Deployable, own: Mapping[str, Tensor], client: int) -> Deployable:
    """Return a model of a client's trained parameters, and of the modalities that it has alone."""
    trained = {name for name, p in model.tokenizers.named_parameters() if p.requires_grad}
    lacks = {*map(modality_of, trained)} - {*map(modality_of, own)}
    if lacks:
        model = model.only([name for name in model.modalities if name not in lacks])
    try:
        load_trainable(model.tokenizers, own)
    except ValueError as error:
        raise RunError(
            f"client={client}: its last checkpoint is of another model: {error}"
        ) from error
    return model
