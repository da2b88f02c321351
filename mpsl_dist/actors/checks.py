"""Refusals: what a configuration asks of its data that cannot be done."""

from __future__ import annotations

import torch

from mpsl_dist.actors.agreement import Elsewhere
from mpsl_dist.actors.choices import head_of, task_of
from mpsl_dist.config import Experiment
from mpsl_dist.config.methods import facts_of
from mpsl_dist.data import Dataset, Splits, presence
from mpsl_dist.errors import ConfigError
from mpsl_dist.models.pretrained import LONGEST_SOUND, LONGEST_TEXT


def check_task(experiment: Experiment, splits: Splits) -> None:
    """Refuse options that do not fit the data's task.

    Raises
    ------
    ConfigError
        With every such option, one a line.
    """
    task, errors = task_of(splits), []
    kind, head = head_of(experiment, splits)
    if head.task != task.name:
        errors.append(
            f"model.head.kind: '{kind}' is for {head.task}, which {experiment.data.name} is not"
        )
    common = facts_of(experiment).common
    if common and not task.scored_apart and experiment.data.test_at == "clients":
        errors.append("data.test_at: retrieval ranks the whole test set, at the server")
    if experiment.contrastive == "global" and not task.contrasts:
        errors.append(f"contrastive: {experiment.data.name} is no retrieval dataset")
    elif experiment.contrastive == "global" and facts_of(experiment).backwards == "per client":
        method = experiment.method
        errors.append(
            f"contrastive: {method} serves every client by itself; take contrastive=client"
        )
    if errors:
        raise ConfigError("\n".join(errors))


def check_cache(experiment: Experiment, splits: Splits) -> None:
    """Refuse ``wire.cache`` for data that are drawn anew in every epoch.

    Raises
    ------
    ConfigError
        Naming what changes them.
    """
    elsewhere = isinstance(splits.train, Elsewhere)  # the hosts that have them say so themselves
    if not experiment.wire.cache or elsewhere or getattr(splits.train, "unchanging", False):
        return
    name = experiment.data.name
    if getattr(splits.train, "on_error", "raise") == "skip":
        raise ConfigError(
            f"wire.cache: in {name} other samples stand in for what cannot be read, in each "
            "mini-batch another one; set data.on_error=raise, or wire.cache=false"
        )
    raise ConfigError(
        f"wire.cache: the training samples of {name} change from epoch to epoch (random crops, "
        "frames of clips, windows of sound, or a plugin's dataset that does not say that it is "
        "'unchanging'); set wire.cache=false"
    )


def check_defences(experiment: Experiment, splits: Splits) -> None:
    """Refuse defences that mean nothing for the data, or promise more than they keep.

    Raises
    ------
    ConfigError
        With every such option, one a line.
    """
    chosen, name, errors = experiment.defences, experiment.data.name, []
    if chosen.label_epsilon is not None and len(splits.classes) < 2:
        errors.append(f"defences.label_epsilon: {name} has no labels, or one alone; take null")
    stands_in = getattr(splits.train, "on_error", "raise") == "skip"
    for key in ("label_epsilon", "token_noise"):
        if stands_in and getattr(chosen, key):
            errors.append(
                f"defences.{key}: with data.on_error=skip a sample may stand in for another, and "
                "be sent more often than its epsilon counts; take data.on_error=raise"
            )
    if chosen.shuffle_patches and not {"image", "audio"} & set(splits.shapes):
        errors.append(f"defences.shuffle_patches: {name} has no patches; take false")
    if errors:
        raise ConfigError("\n".join(errors))


def check_unimodal(experiment: Experiment, splits: Splits) -> None:
    """Refuse clients that are not whole users, and data that M²FedSA's users cannot share.

    Raises
    ------
    ConfigError
        With every such option, one a line.
    """
    if not facts_of(experiment).unimodal:
        return
    names, name, errors = list(splits.shapes), experiment.data.name, []
    each = f"a user has one client for each of {', '.join(names)}"
    for key in ("clients", "clients_per_worker"):
        value = getattr(experiment, key)
        if value % len(names):
            wanted = max(1, value // len(names)) * len(names)
            errors.append(f"{key}: {each}; {value} is no multiple of {len(names)}, take {wanted}")
    if splits.retrieval:
        errors.append(f"data.name: {name} is a retrieval dataset, and a client has a classifier")
    if experiment.model.encoder.kind == "lm" or experiment.model.connector.tokens:
        errors.append(
            f"model: {experiment.method} cuts an encoder of each modality, and has no connector; "
            "take model.encoder.kind=vit and model.connector.tokens=0"
        )
    if experiment.data.missing.rate or presence(splits.train) or presence(splits.test):
        errors.append(
            f"data.name: samples of {name} lack parts, and {each}, with the same samples; take "
            "data.missing.rate=0, or another method"
        )
    if errors:
        raise ConfigError("\n".join(errors))


def check_missing(experiment: Experiment, splits: Splits) -> None:
    """Refuse what cannot be done with samples that lack parts, see ``docs/missing.md``.

    Raises
    ------
    ConfigError
        With every such option, one a line.
    """
    missing, errors = experiment.data.missing, []
    if missing.rate and experiment.data.place == "own":
        errors.append(
            "data.missing.rate: drawn where data are simulated; data.place is own, take 0"
        )
    at_clients = missing.per == "client" and experiment.data.test_at == "clients"
    if missing.rate and at_clients and not missing.at_test:
        errors.append(
            "data.missing.at_test: a client lacks at test what it lacks in training; take true, or "
            "data.missing.per=sample"
        )
    own = presence(splits.train) or presence(splits.test)
    if own and not missing.rate and experiment.method == "mlecs":
        errors.append(_whole(experiment.data.name))
    if (missing.rate or own) and not missing.zeros and "data.missing" in facts_of(experiment).reads:
        errors += _not_with_gaps(experiment, splits)
    if errors:
        raise ConfigError("\n".join(errors))


def check_whole(name: str, splits: Splits) -> None:
    """Refuse samples of a dataset that lack parts of their own, for ML-ECS.

    Raises
    ------
    ConfigError
        If there are any; before gaps are drawn.
    """
    if presence(splits.train) or presence(splits.test):
        raise ConfigError(_whole(name))


def _whole(name: str) -> str:
    return (
        f"data.name: samples of {name} lack parts, and mlecs' devices lack whole modalities; take "
        "another method"
    )


def _not_with_gaps(experiment: Experiment, splits: Splits) -> list[str]:
    defences, model = experiment.defences, experiment.model
    own = experiment.training.evaluate_own and experiment.data.test_at == "server"
    asked = {
        "tokenizer_sync.masked: a sum over those who have a modality may be over very few": (
            experiment.tokenizer_sync.masked
        ),
        "wire.cache: the server keeps whole samples": experiment.wire.cache,
        "model.encoder.kind: lm attends to all that is before": model.encoder.kind == "lm",
        "model.connector.tokens: a connector fuses whole samples": bool(model.connector.tokens),
        "server.shard: shards compute the same passes, and not all clients' samples need all": (
            experiment.server.shard
        ),
        "defences.token_noise: its epsilon is that of whole samples": defences.token_noise,
        "defences.shuffle_patches: its orders are those of whole samples": defences.shuffle_patches,
        "defences.nopeek: its penalty is that of whole samples": defences.nopeek,
        "training.evaluate_own: at the server a client's own tokenizers would meet parts that it "
        "has none for; take data.test_at=clients": own,
        f"data.name: {experiment.data.name} is a retrieval dataset, whose pairs need both parts": (
            splits.retrieval and facts_of(experiment).common
        ),
        "model.head.kind: it takes modalities apart, and each must be there": (
            not splits.retrieval and head_of(experiment, splits)[1].apart
        ),
    }
    empty = [name for name in ("train", "test") if _has_nothing(getattr(splits, name))]
    known = " or ".join(splits.shapes)
    asked |= {f"data.modalities: there are {name} samples without {known}": True for name in empty}
    end = "; samples lack parts here: turn it off, or set data.missing.zeros=true"
    return [f"{said}{end}" for said, chosen in asked.items() if chosen]


def _has_nothing(split: Dataset) -> bool:
    """Return whether any sample has no modality at all."""
    present = presence(split)
    return present is not None and not bool(torch.stack([*present.values()]).any(0).all())


def check_connector(experiment: Experiment, splits: Splits) -> None:
    """Refuse a connector, by a ConfigError, where modalities must stay apart."""
    if experiment.model.connector.tokens and splits.retrieval:
        raise ConfigError(
            "model.connector.tokens: a connector fuses what retrieval compares; take 0"
        )


def check_patches(experiment: Experiment, splits: Splits) -> None:
    """Refuse patches that do not fit the data's images or spectrograms.

    Raises
    ------
    ConfigError
        With every such option, one a line.
    """
    name, model = experiment.data.name, experiment.model
    errors = []
    if "image" in splits.shapes and model.image == "patches":
        _, height, width = splits.shapes["image"]
        if height % model.image_patch or width % model.image_patch:
            errors.append(
                f"model.image_patch: {model.image_patch} does not divide the {height}x{width} "
                f"pictures of {name}"
            )
    if (
        "audio" in splits.shapes
        and model.audio == "patches"
        and min(splits.shapes["audio"]) < model.audio_patch
    ):
        frames, bins = splits.shapes["audio"]
        errors.append(
            f"model.audio_patch: {model.audio_patch} does not fit the {frames}x{bins} "
            f"spectrograms of {name}"
        )
    errors += _part_errors(experiment, splits)
    if errors:
        raise ConfigError("\n".join(errors))


def _part_errors(experiment: Experiment, splits: Splits) -> list[str]:
    """Return where the data is longer than a pretrained part has positions for, or other."""
    model, shapes, errors = experiment.model, splits.shapes, []
    if model.text == "minilm" and shapes.get("text", (0,))[0] > LONGEST_TEXT:
        errors.append(f"data.text_length: minilm reads at most {LONGEST_TEXT} tokens")
    frames = shapes.get("audio", (2,))[0]
    if model.audio == "whisper-tiny" and not 2 <= frames <= LONGEST_SOUND:
        errors.append(
            f"data.audio_frames: whisper-tiny hears 2 to {LONGEST_SOUND:,} frames, found {frames:,}"
        )
    channels = shapes.get("image", (3,))[0]
    if model.image == "efficientnet-lite0" and channels not in (1, 3):
        errors.append(
            f"model.image: efficientnet-lite0 sees one or three channels, those of "
            f"{experiment.data.name} have {channels}"
        )
    return errors
