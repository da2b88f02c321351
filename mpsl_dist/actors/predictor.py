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
from mpsl_dist.actors.raw import Reader
from mpsl_dist.config import Experiment
from mpsl_dist.config.methods import facts_of
from mpsl_dist.data.decode.view import View
from mpsl_dist.errors import ConfigError, DataError, RunError
from mpsl_dist.models.average import load_trainable
from mpsl_dist.reading import read_json
from mpsl_dist.records import checkpoint, state
from mpsl_dist.records.run_directory import RunDirectory

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
    """

    def __init__(
        self, model: Deployable, reader: Reader, classes: Sequence[str], batch_size: int
    ) -> None:
        super().__init__()
        self.model = model
        self.reader = reader
        self.classes = tuple(classes)
        self.batch_size = batch_size

    @property
    def modalities(self) -> tuple[str, ...]:
        """What a sample is made of, in the order of fusion."""
        return tuple(self.reader.shapes)

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return logits (b, k), or embeddings (b, 2, d) in retrieval, on the model's device.

        Parameters
        ----------
        inputs : mapping of str to Tensor
            By modality, as :meth:`inputs` returns them or a dataset's ``Batch`` holds them.
        """
        return self.model(self.model.to_own(inputs))

    def inputs(self, **given: Any) -> dict[str, Tensor]:
        """Return what the model computes with, (b, *shape) by modality, on CPU.

        Parameters
        ----------
        given
            As of :meth:`predict`.

        Raises
        ------
        DataError
            As :meth:`predict`.
        """
        samples, _ = self.reader.samples(given)
        return self.reader.batch(_all_read(self.reader, samples))

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
        all that is given must be as many.

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
        with torch.no_grad():
            logits_bk = self(self.reader.batch(read)).cpu()
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
        run's last checkpoint in place of the average of all.

    Raises
    ------
    RunError
        If there is no model, or a file of it is missing or damaged, or it has no such client.
    ConfigError
        If an override would change the model.
    """
    folder = find(path)
    model, experiment, classes = deployable.load(folder, overrides)
    description = read_json(folder / "config.json")
    shapes = {name: tuple(shape) for name, shape in description["shapes"].items()}
    if client is not None:
        own = _own_weights(folder, experiment, client)
        load_trainable(model.tokenizers, own)
    integers = [name for name in shapes if tokenizer_facts(experiment, name).integers]
    reader = Reader(shapes, _view(folder, description), integers, str(folder / "config.json"))
    return Predictor(model, reader, classes, experiment.training.test_batch_size).eval()


def find(path: str | Path) -> Path:
    """Return the folder of a model: the path itself, or ``model/`` in it.

    Raises
    ------
    RunError
        If there is none.
    """
    path = Path(path)
    for folder in (path / "model", path):
        if (folder / "config.json").is_file():
            return folder
    if (path / "config.yaml").is_file():
        raise RunError(f"{path}: no model/ there; the run must be completed")
    what = "no model/ and no config.json there" if path.is_dir() else "no such folder"
    raise RunError(f"{path}: {what}; name a run directory, its model/ or an exported folder")


def run_of(folder: Path) -> Path | None:
    """Return the run directory that a model's folder lies in; None for one that stands alone."""
    run = folder.absolute().parent
    return run if folder.absolute().name == "model" and (run / "config.yaml").is_file() else None


def _view(folder: Path, description: Mapping[str, Any]) -> View | None:
    values = description.get("view")
    try:
        return None if values is None else View.of(values)
    except (AttributeError, ValueError) as error:
        raise RunError(f"{folder / 'config.json'}: {error}; a newer version wrote it?") from error


def _own_weights(folder: Path, experiment: Experiment, client: int) -> dict[str, Tensor]:
    """Return a client's trained parameters from the run's last checkpoint."""
    run, which = run_of(folder), f"client={client}"
    if not facts_of(experiment).split:
        raise ConfigError(f"{which}: with method={experiment.method} clients keep no own part")
    if not 0 <= client < experiment.clients:
        raise ConfigError(f"{which}: the run has the clients 0 to {experiment.clients - 1}")
    if run is None:
        raise RunError(f"{which}: {folder} is no run directory, where each client's own part lies")
    found = checkpoint.latest(run / "checkpoints")
    if found is None:
        raise RunError(f"{which}: {run / 'checkpoints'} holds no checkpoint")
    at, manifest = found
    told = RunDirectory(run).summary()
    if told.get("status") != "completed" or told.get("steps_completed") != manifest.step:
        raise RunError(f"{which}: {at} is not of the step that {folder} was written at; --resume")
    path = at / state.client_file(client)
    if manifest.files and path.name not in manifest.files:
        raise RunError(f"{which}: not in {at}: lost before the end of the run")
    if damage := state.damage(path, manifest.files.get(path.name)):
        raise RunError(f"{which}: {damage}")
    return state.load(path)["tokenizers"]
