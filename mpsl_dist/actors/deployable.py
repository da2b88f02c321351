"""One deployable model, [F_C; F_S] of section 3.3: loads and predicts without any RPC."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mpsl_dist.actors.assembly import build_server_model, build_tokenizers
from mpsl_dist.actors.choices import device_of, pixels_of, task_of, wire_of, writes_captions
from mpsl_dist.actors.halves import build_lower, build_upper
from mpsl_dist.actors.local_data import TestData
from mpsl_dist.actors.unified import build_large
from mpsl_dist.config import Experiment, from_dict, to_dict
from mpsl_dist.config.loading import override
from mpsl_dist.config.methods import facts_of
from mpsl_dist.data import Batch, Splits, catalog, presence
from mpsl_dist.errors import ConfigError, DiskError, RunError, UserError
from mpsl_dist.models.codecs import Wire
from mpsl_dist.models.gapped import mask_of
from mpsl_dist.models.halves import Heads
from mpsl_dist.models.server_model import ServerModel
from mpsl_dist.models.tasks import Task
from mpsl_dist.models.tokenizers import Tokenizers, fuse
from mpsl_dist.reading import read_json

#: What can be done about a file of the model that cannot be read.
_WRITE_AGAIN = "the run writes model/ again with --resume"


class Deployable(nn.Module):
    """Tokenizers, encoder and head in one module.

    Parameters
    ----------
    tokenizers : Tokenizers
    server_model : ServerModel
    task : Task
    wire : Wire
        As in training: tokens lose what they lost there, though nothing travels here.
    """

    def __init__(
        self,
        tokenizers: Tokenizers,
        server_model: ServerModel,
        task: Task,
        wire: Wire = Wire(),  # noqa: B008 (frozen)
    ) -> None:
        super().__init__()
        self.tokenizers = tokenizers
        self.server_model = server_model
        self.task = task
        self.wire = wire

    @property
    def modalities(self) -> tuple[str, ...]:
        """Those that it has tokenizers of, in the order of fusion."""
        return tuple(self.tokenizers.by_modality)

    def forward(
        self, inputs: Mapping[str, Tensor], present: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Return logits (b, classes), or embeddings (b, 2, d), for inputs as in a ``Batch``, and
        which of them are ``present``.
        """
        if present is not None:
            tokens = self.wire.through(self.tokenizers(inputs, present))
            return self.tokenizers.head(self.server_model(tokens, 0, mask_of(present)))
        tokens, lengths = self.tokenizers(inputs), self.server_model.lengths
        # A client's own part, loaded: nothing is there of the others.
        if len(tokens) < len(lengths):
            there_bm = (torch.tensor(lengths) > 0).expand(len(tokens[0]), -1)
            own = self.server_model(self.wire.through(tokens), 0, there_bm)
            return self.tokenizers.head(own)
        smashed = fuse(tokens, self.server_model.fusion)
        return self.tokenizers.head(self.server_model(self.wire.through(smashed)))

    def only(self, modalities: Collection[str]) -> Deployable:
        """Return the same with these modalities' tokenizers alone; every part is shared."""
        own = self.tokenizers.only(modalities)
        return Deployable(own, self.server_model, self.task, self.wire)

    def to_own(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return inputs on the model's device, and in its precision."""
        like = next(self.parameters())
        return {
            name: x.to(like.device, like.dtype if x.is_floating_point() else None)
            for name, x in inputs.items()
        }

    def test(self, held: TestData, batch_size: int) -> dict[str, float]:
        """Return the task's metrics over all that can be read: ``accuracy``, or recalls."""
        batches = filter(len, held.batches(batch_size))
        return self.task.metrics((self._predict(batch), batch.labels) for batch in batches)

    def right(self, held: TestData, batch_size: int) -> tuple[int, int]:
        """Return how many of these samples are predicted right, and of how many."""
        scores = [(self.score(batch), len(batch)) for batch in held.batches(batch_size)]
        return sum(right for right, _ in scores), sum(samples for _, samples in scores)

    def score(self, batch: Batch) -> int:
        """Return how many samples of a batch, which may be empty, are predicted right."""
        return self.task.score(self._predict(batch), batch.labels) if len(batch) else 0

    def _predict(self, batch: Batch) -> Tensor:
        with torch.no_grad():
            return self(self.to_own(batch.inputs), batch.present).cpu()

    def stored(self) -> dict[str, Tensor]:
        """Return all state on CPU, no two names of one tensor: a language model's tied tables."""
        found: dict[str, Tensor] = {}
        seen: set[int] = set()
        for key, value in self.state_dict().items():
            own = value.detach().cpu().contiguous()
            found[key] = own.clone() if own.data_ptr() in seen else own
            seen.add(own.data_ptr())
        return found

    def save(self, folder: Path, experiment: Experiment, splits: Splits) -> None:
        """Write ``model.safetensors`` and ``config.json``.

        Raises
        ------
        DiskError
            If they cannot be written; no part is left.
        """
        partial = folder / "model.safetensors.partial"
        # A model that is loaded knows no more where its weights came from.
        told = replace(experiment.data, pixels=pixels_of(experiment))
        # What others have on their hosts may lack parts, and nobody here knows.
        gaps = None if told.place == "own" else presence(splits.train) is not None
        description = {
            "experiment": to_dict(replace(experiment, data=told)),
            "shapes": {name: list(shape) for name, shape in splits.shapes.items()},
            "classes": list(splits.classes),
            "gaps": gaps,
            "view": asdict(splits.view) if splits.view else None,
        }
        try:
            folder.mkdir(parents=True, exist_ok=True)
            save_file(self.stored(), partial)
            partial.replace(folder / "model.safetensors")
            (folder / "config.json").write_text(json.dumps(description, indent=2) + "\n", "utf-8")
        except (OSError, SafetensorError) as error:
            with contextlib.suppress(OSError):
                partial.unlink()
            met = error if isinstance(error, OSError) else OSError(str(error))
            raise DiskError.of(folder, met) from error


class UnimodalDeployable(Deployable):
    """M²FedSA's: an encoder and a classifier for each modality, and the fusion.

    ``tokenizers`` are the clients' halves, ``server_model`` is the server's
    :class:`~mpsl_dist.models.halves.UpperModel`.
    """

    def forward(
        self, inputs: Mapping[str, Tensor], present: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Return logits (b, classes): of all modalities the fusion's, of one its own.

        A sample of which one modality is ``present`` is answered by that one's classifier.
        """
        if present is None:
            found = self.predictions(inputs)
            return found["fused"] if "fused" in found else next(iter(found.values()))
        present_bm = mask_of(present)
        logits: dict[int, Tensor] = {}
        for kind_m in present_bm.unique(dim=0):
            rows = (present_bm == kind_m).all(1).nonzero().flatten()
            there = [name for name, is_there in zip(present, kind_m, strict=True) if is_there]
            own = {name: inputs[name][rows.to(inputs[name].device)] for name in there}
            logits |= zip(rows.tolist(), self(own), strict=True)
        return torch.stack([logits[row] for row in range(len(present_bm))])

    def only(self, modalities: Collection[str]) -> Deployable:
        """Return the same for these modalities alone; every part is shared."""
        own = self.tokenizers.only(modalities)
        heads = self.tokenizers.head.by_modality
        own.head = Heads({name: heads[name] for name in own.by_modality})
        return UnimodalDeployable(own, self.server_model, self.task, self.wire)

    def predictions(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the logits (b, classes) of each modality that there are inputs of, and of all of
        them, if all are there, ``fused``.
        """
        halves, heads = self.server_model.encoders, self.tokenizers.head.by_modality
        lower = self.tokenizers.by_modality
        features = {m: halves[m](lower[m](x)) for m, x in inputs.items() if m in lower}
        found = {m: heads[m](feature_bd) for m, feature_bd in features.items()}
        if len(features) == len(halves):
            found["fused"] = self.server_model.fusion([features[m] for m in halves])[0]
        return found

    def test(self, held: TestData, batch_size: int) -> dict[str, float]:
        """Return each modality's accuracy by itself, their mean ``accuracy``, and the fusion's."""
        right: dict[str, int] = {}
        samples = 0
        for batch in filter(len, held.batches(batch_size)):
            with torch.no_grad():
                found = self.predictions(self.to_own(batch.inputs))
            for name, logits_bk in found.items():
                right[name] = right.get(name, 0) + self.task.score(logits_bk, batch.labels)
            samples += len(batch)
        each = {f"accuracy_{name}": number / samples for name, number in right.items()}
        alone = [each[f"accuracy_{name}"] for name in self.modalities]
        return {"accuracy": sum(alone) / len(alone)} | each


class UnifiedDeployable(Deployable):
    """ML-ECS': the server's large model, which reads all modalities.

    ``tokenizers`` are its encoders and connector, ``server_model`` is what
    :mod:`mpsl_dist.models.answers` makes of soft tokens.
    """

    def forward(
        self, inputs: Mapping[str, Tensor], present: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Return the classes' logits (b, classes)."""
        return self.server_model.scores(*self.tokenizers(inputs))


def build(
    experiment: Experiment, splits: Splits, modalities: Collection[str] | None = None
) -> Deployable:
    """Build the whole model here, with the initial weights that its owners would begin with.

    Parameters
    ----------
    modalities : collection of str, optional
        Those that tokenizers are wanted of, by default all of the data's.

    Raises
    ------
    UserError
        As the builders of :mod:`mpsl_dist.actors.assembly`.
    """
    if facts_of(experiment).unimodal:
        halves = build_lower(experiment, splits, modalities), build_upper(experiment, splits)
        return UnimodalDeployable(*halves, task_of(splits)).to(device_of(experiment))
    if "mlecs" in facts_of(experiment).reads:
        large = build_large(experiment, splits)
        return UnifiedDeployable(large.tokenizers, large.answers, task_of(splits))
    tokenizers = build_tokenizers(experiment, splits, modalities=modalities)
    lengths = tokenizers.lengths
    if len(tokenizers.by_modality) < len(splits.shapes):
        # Nothing is asked of the length of a modality that no sample has here.
        built = dict(zip(tokenizers.by_modality, lengths, strict=True))
        lengths = [built.get(name, 0) for name in splits.shapes]
    model = build_server_model(experiment, splits, lengths)
    whole = Deployable(tokenizers, model, task_of(splits), wire_of(experiment))
    return whole.to(device_of(experiment))


def load(
    folder: str | Path, overrides: Sequence[str] = ()
) -> tuple[Deployable, Experiment, tuple[str, ...]]:
    """Load what :meth:`Deployable.save` wrote.

    Parameters
    ----------
    folder : str or Path
        A run's ``model/``.
    overrides : sequence of str
        ``key.path=value``, for keys that a trained model may be used with.

    Returns
    -------
    model, experiment, classes
        The model in evaluation mode, on the experiment's device.

    Raises
    ------
    RunError
        If a file of the folder is missing or damaged, or the model writes captions.
    ConfigError
        If an override would change the model, or its device is not here.
    """
    folder = Path(folder)
    experiment, shapes, classes, held = _read_description(folder / "config.json", overrides)
    if writes_captions(experiment):
        raise RunError(
            f"{folder}: this model writes captions (mlecs.answer: caption), which are no classes "
            "and no embeddings; its run's captions.jsonl has those of the test"
        )
    splits = Splits(_NOTHING, _NOTHING, shapes, classes)
    gpu = experiment.device.partition(":")[2] or "0"
    if experiment.device.startswith("cuda") and int(gpu) >= torch.cuda.device_count():
        raise ConfigError(f"device={experiment.device}: no such GPU here; take device=cpu")
    model = build(experiment, splits, held)
    weights = folder / "model.safetensors"
    try:
        model.load_state_dict(load_file(weights))
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise RunError(f"{weights}: not this model's weights: {reason}; {_WRITE_AGAIN}") from error
    return model.eval(), experiment, splits.classes


def _read_description(
    path: Path, overrides: Sequence[str]
) -> tuple[Experiment, dict[str, tuple[int, ...]], tuple[str, ...], list[str] | None]:
    description = read_json(path, advice=_WRITE_AGAIN)
    try:
        trained = dict(description["experiment"])
        shapes = {name: tuple(shape) for name, shape in description["shapes"].items()}
        classes = tuple(description["classes"])
        held = [name for name in shapes if name in description.get("modalities", shapes)]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RunError(f"{path}: describes no model; {_WRITE_AGAIN}") from error
    changed = override(trained, overrides)
    try:
        # Every weight is in the folder: where the first ones came from matters no more.
        experiment = from_dict(changed | {"weights": {}})
    except ConfigError as error:
        lines = str(error).splitlines()
        raise ConfigError("\n".join(f"{path}: {line}" for line in lines)) from error
    return _as_trained(experiment, shapes), shapes, classes, None if [*shapes] == held else held


def _as_trained(experiment: Experiment, shapes: Mapping[str, tuple[int, ...]]) -> Experiment:
    """Return the experiment with what its data decided then; other data may decide otherwise."""
    decided: dict[str, Any] = {"modalities": list(shapes)}
    if "audio" in shapes:
        decided["audio_frames"] = shapes["audio"][0]
    try:
        reads = catalog.find(experiment.data.name, experiment.plugins).reads
    except UserError:
        return experiment  # a model predicts without its dataset, too
    left_open = {
        key: value
        for key, value in decided.items()
        if key in reads and getattr(experiment.data, key) is None
    }
    return replace(experiment, data=replace(experiment.data, **left_open))


class _Nothing:
    """The absent splits of a model that is only used."""

    labels = torch.empty(0, dtype=torch.long)

    def fetch(self, indices: Any, seed: int | None = None) -> Any:
        raise AssertionError("a deployed model has no data")


_NOTHING = _Nothing()
