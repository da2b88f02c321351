"""What a well-typed experiment may still ask for that cannot be done."""

from __future__ import annotations

import math
import re

from mpsl_dist import plugins
from mpsl_dist.config.defence_checks import defence_problems
from mpsl_dist.config.language_checks import language_problems
from mpsl_dist.config.methods import facts_of
from mpsl_dist.config.mlecs_checks import mlecs_problems
from mpsl_dist.config.parts import MODALITIES, PARTS, WEIGHT_FILES, WEIGHT_SOURCES
from mpsl_dist.config.schema import Experiment
from mpsl_dist.config.split_checks import split_problems
from mpsl_dist.errors import ConfigError
from mpsl_dist.typed import not_finite, values_of

#: Seconds of a year: a longer timeout overflows the clocks that it is given to.
_YEAR = 365 * 24 * 3600.0


def problems(experiment: Experiment) -> list[str]:
    """Return a line for everything in a well-typed experiment that cannot be done.

    Parameters
    ----------
    experiment : Experiment
        Values of the right types, in any range.

    Returns
    -------
    list of str
        Each names its key and what the key may be; empty if the experiment can be run.
    """
    found = not_finite(experiment) + _too_small(experiment) + _too_large(experiment)
    found += _out_of_range(experiment)
    found += _batch_problems(experiment)
    name = experiment.name
    if name in ("", ".", "..") or set(name) & set("/\\") or not name.isprintable():
        found.append(f"name: '{name}' must be one folder name")
    if len(name.encode("utf-8", "replace")) > _LONGEST_NAME:
        found.append(f"name: must be at most {_LONGEST_NAME} bytes long")
    if experiment.model.head.kind == "":
        found.append("model.head.kind: empty; name a head, or leave it null")
    if experiment.seed >= 2**62:
        found.append(f"seed: must be less than 2**62, found {experiment.seed}")
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", experiment.device):
        found.append(f"device: expected auto, cpu, cuda or cuda:N, found '{experiment.device}'")
    try:
        if facts_of(experiment).adapted:
            found += _adapter_problems(experiment)
        if facts_of(experiment).one_process and experiment.data.place == "own":
            found.append(
                f"data.place: own has no meaning for method={experiment.method}, which has all "
                "the data in one process; take data.place=simulated"
            )
        own_data = experiment.data.place == "own" and experiment.data.test_at == "server"
        if facts_of(experiment).alone and own_data:
            found.append(
                f"data.test_at: server, but with method={experiment.method} every client tests its "
                "own model, where the server's test set is not; take data.test_at=clients"
            )
        if experiment.data.unit == "picture" and experiment.data.place == "own":
            # Hosts may have pictures of different numbers of captions.
            found.append("data.unit: picture needs data.place=simulated; take pair")
        found += _modality_problems(experiment)
        found += split_problems(experiment) + defence_problems(experiment)
        found += language_problems(experiment) + mlecs_problems(experiment)
    except ConfigError as error:
        found += str(error).splitlines()
    classes = experiment.data.classes
    if classes is not None and (len(set(classes)) < max(2, len(classes)) or "" in classes):
        found.append("data.classes: name at least two, each once, or leave it null")
    chosen = experiment.data.modalities
    if chosen is not None and (not chosen or len(set(chosen)) < len(chosen)):
        found.append("data.modalities: name at least one, each once, or leave it null")
    found += _compute_problems(experiment)
    return found + _encoder_problems(experiment) + _weight_problems(experiment)


def _modality_problems(experiment: Experiment) -> list[str]:
    """Refuse modalities that nothing makes tokens of."""
    lists = {
        "data.modalities": (experiment.data.modalities, "null"),
        "adapters.include": (experiment.adapters.include, "'unified'"),
    }
    given = {key: value for key, (value, _) in lists.items() if isinstance(value, list)}
    if all(set(value) <= set(MODALITIES) for value in given.values()):
        return []
    known = plugins.names("tokenizers", MODALITIES, experiment.plugins)
    valid = " or ".join(map(repr, known))
    return [
        f"{key}: expected a list of {valid} or {lists[key][1]}, found {value!r}"
        for key, value in given.items()
        if not set(value) <= set(known)
    ]


def _too_small(experiment: Experiment) -> list[str]:
    training, model, data = experiment.training, experiment.model, experiment.data
    federated, runtime = experiment.federated, experiment.runtime
    blocks, part_blocks = model.encoder.trainable_blocks, model.trainable_part_blocks
    at_least = {
        1: {
            "clients": experiment.clients,
            "clients_per_worker": experiment.clients_per_worker,
            "tokenizer_sync.every": experiment.tokenizer_sync.every,
            "training.epochs": training.epochs,
            "training.batch_size": training.batch_size,
            "training.test_batch_size": training.test_batch_size,
            "training.server.every_epochs": training.server.every_epochs,
            "training.client.every_epochs": training.client.every_epochs,
            "federated.local_epochs": federated.local_epochs,
            "federated.batch_size": federated.batch_size,
            "model.image_patch": model.image_patch,
            "model.audio_patch": model.audio_patch,
            "model.audio_stride": model.audio_stride,
            "model.merge_patches": model.merge_patches,
            "model.connector.features": model.connector.features,
            "model.connector.fused": model.connector.fused,
            "data.partition.minimum": data.partition.minimum,
            "data.image_size": data.image_size,
            "data.audio_frames": data.audio_frames,
            "checkpoint.keep": experiment.checkpoint.keep,
            "faults.min_clients": experiment.faults.min_clients,
            "server.replicas": experiment.server.replicas,
            "faults.save_clients_every": experiment.faults.save_clients_every,
            "runtime.server_threads": runtime.server_threads,
            "runtime.worker_threads": runtime.worker_threads,
            "wire.cache_limit": experiment.wire.cache_limit,
        },
        0: {
            "seed": experiment.seed,
            "data.loaders": data.loaders,
            "data.missing.seed": data.missing.seed,
            "model.encoder.trainable_blocks": None if blocks == "all" else blocks,
            "model.connector.tokens": model.connector.tokens,
            "model.encoder.lora.rank": model.encoder.lora.rank,
            "model.trainable_part_blocks": None if part_blocks == "all" else part_blocks,
            "training.server.warmup_steps": training.server.warmup_steps,
            "training.client.warmup_steps": training.client.warmup_steps,
            "checkpoint.every_epochs": experiment.checkpoint.every_epochs,
            "checkpoint.every_steps": experiment.checkpoint.every_steps,
            "faults.restarts": experiment.faults.restarts,
        },
        # Start and end of a text, and something between.
        3: {"data.text_length": data.text_length},
    }
    return [
        f"{path}: must be at least {minimum}, found {value}"
        for minimum, values in at_least.items()
        for path, value in values.items()
        if value is not None and value < minimum
    ]


#: Keys of whole numbers and the most that they can be; any other can be _MOST.
_AT_MOST = {
    "data.audio_frames": 1_000_000,
    "data.image_size": 16_384,
    "data.loaders": 1024,
    "data.text_length": 100_000,
    "model.audio_patch": 16_384,
    "model.audio_stride": 16_384,
    "model.connector.features": 65_536,
    "model.connector.fused": 65_536,
    "model.connector.tokens": 65_536,
    "model.encoder.depth": 4096,
    "model.encoder.heads": 65_536,
    "model.encoder.width": 65_536,
    "model.image_patch": 16_384,
    "runtime.server_threads": 4096,
    "runtime.worker_threads": 4096,
}
_MOST = 10**9
#: Bytes of a run's name: file systems take 255, and names of files are made of it.
_LONGEST_NAME = 200


def _too_large(experiment: Experiment) -> list[str]:
    """Refuse numbers that no memory or clock could follow; of ``seed``, its own check tells."""
    return [
        f"{path}: must be at most {_AT_MOST.get(path, _MOST)}, found {value}"
        for path, value in values_of(experiment)
        if type(value) is int and value > _AT_MOST.get(path, _MOST) and path != "seed"
    ]


def _out_of_range(experiment: Experiment) -> list[str]:
    training, federated, runtime = experiment.training, experiment.federated, experiment.runtime
    above_zero = {
        "data.partition.alpha": experiment.data.partition.alpha,
        "model.temperature": experiment.model.temperature,
        "model.encoder.lora.alpha": experiment.model.encoder.lora.alpha,
        "federated.fraction": federated.fraction,
        "federated.round_timeout": federated.round_timeout,
        "runtime.rpc_timeout": runtime.rpc_timeout,
        "runtime.start_timeout": runtime.start_timeout,
        "faults.exit_timeout": experiment.faults.exit_timeout,
        "faults.client_timeout": experiment.faults.client_timeout,
        "defences.label_epsilon": experiment.defences.label_epsilon,
    }
    share = {"data.max_missing": experiment.data.max_missing}
    rate = {"data.missing.rate": experiment.data.missing.rate}
    at_most_one = {"federated.fraction": federated.fraction, **share}
    from_zero, below_one = share | rate, dict(rate)
    from_zero |= {
        f"defences.{name}": getattr(experiment.defences, name)
        for name in ("token_noise", "nopeek", "gradient_noise")
    }
    for owner in ("server", "client"):
        optimizer, path = getattr(training, owner), f"training.{owner}"
        above_zero |= {f"{path}.lr": optimizer.lr, f"{path}.gamma": optimizer.gamma}
        from_zero |= {f"{path}.weight_decay": optimizer.weight_decay}
        from_zero |= {f"{path}.momentum": optimizer.momentum}
        below_one |= {f"{path}.momentum": optimizer.momentum}
    timeouts = {path: value for path, value in above_zero.items() if path.endswith("_timeout")}
    rules = (
        ("greater than 0", lambda x: x > 0, above_zero),
        ("at least 0", lambda x: x >= 0, from_zero),
        ("less than 1", lambda x: x < 1, below_one),
        ("at most 1", lambda x: x <= 1, at_most_one),
        (f"at most a year, {_YEAR:.0f} seconds", lambda x: x <= _YEAR, timeouts),
    )
    return [
        f"{path}: must be {wanted}, found {number}"
        for wanted, holds, numbers in rules
        for path, number in numbers.items()
        if number is not None and math.isfinite(number) and not holds(number)
    ]


def _batch_problems(experiment: Experiment) -> list[str]:
    clients, batch = experiment.clients, experiment.training.batch_size
    if experiment.client_share == "equal" and experiment.method == "centralized":
        return []  # batches of one pool
    if batch < clients:
        return [
            f"training.batch_size: {batch} is smaller than the {clients} clients; "
            f"give every client at least one sample: training.batch_size={clients}"
        ]
    if experiment.client_share == "equal" and clients >= 1 and batch % clients:
        return [
            f"training.batch_size: {batch} is no multiple of the {clients} clients, as "
            f"client_share=equal needs; take {batch // clients * clients} or "
            f"{-(-batch // clients) * clients}, or client_share=proportional"
        ]
    return []


def _compute_problems(experiment: Experiment) -> list[str]:
    training, found = experiment.training, []
    if training.autocast is not None and training.precision != "float32":
        found.append(
            f"training.autocast: {training.autocast} leaves {training.precision} as it is; take "
            "training.precision=float32, or training.autocast=null"
        )
    if training.compile and training.checkpoint_blocks:
        # A block that is compiled anew between its two passes keeps other tensors in the second.
        found.append(
            "training.compile: a compiled block cannot be computed again reliably; set "
            "training.checkpoint_blocks=false, or training.compile=false"
        )
    return found


def _encoder_problems(experiment: Experiment) -> list[str]:
    encoder = experiment.model.encoder
    shape = {name: getattr(encoder, name) for name in ("width", "depth", "heads")}
    if encoder.size == "smollm2":
        shape.pop("depth")
    if encoder.size != "custom":
        given = [f"model.encoder.{name}" for name, value in shape.items() if value is not None]
        return [f"{', '.join(given)}: only with model.encoder.size=custom"] if given else []
    missing = [f"model.encoder.{name}" for name, value in shape.items() if value is None]
    if missing:
        return [f"model.encoder.size=custom needs {', '.join(missing)}"]
    if min(shape.values()) < 1:
        return ["model.encoder: width, depth and heads must be at least 1"]
    if encoder.width % encoder.heads:
        return [f"model.encoder.width: {encoder.width} is no multiple of {encoder.heads} heads"]
    return []


def _weight_problems(experiment: Experiment) -> list[str]:
    found = []
    for part, named in WEIGHT_SOURCES.items():
        source = getattr(experiment.weights, part)
        if not (_names_collection(source, named) or _names_file(source)):
            found.append(
                f"weights.{part}: '{source}' is no source; one of {', '.join(named)}, "
                f"or a file ({', '.join(WEIGHT_FILES)})"
            )
    found += _part_problems(experiment)
    model, clip = experiment.model, experiment.model.text == "clip"
    if experiment.weights.text != "random" and model.text == "table":
        found.append("weights.text: only with model.text=clip or minilm")
    if model.text_tower is not None and not clip:
        found.append("model.text_tower: only with model.text=clip")
    if model.train_token_table and model.text != "table":
        found.append(f"model.train_token_table: there is no table with model.text={model.text}")
    if clip and (experiment.data.text_length or 0) > 77:
        found.append(
            f"data.text_length: CLIP reads at most 77 tokens, found {experiment.data.text_length}"
        )
    return found


def _part_problems(experiment: Experiment) -> list[str]:
    """Refuse a pretrained part without its weights' place, and weights without their part."""
    found, model, weights = [], experiment.model, experiment.weights
    chosen = [part for modality, part in PARTS.items() if getattr(model, modality) == part]
    for modality, part in PARTS.items():
        source = getattr(weights, modality)
        if part in chosen and source not in ("random", part):
            found.append(
                f"weights.{modality}: '{source}' is none of {part}'s; one of random, {part}"
            )
        elif part not in chosen and source.partition(":")[0] == part:
            found.append(f"weights.{modality}: {part} only with model.{modality}={part}")
    if model.trainable_part_blocks != 0 and not (chosen and model.train_tokenizers):
        parts = ", ".join(f"model.{modality}={part}" for modality, part in PARTS.items())
        found.append(
            f"model.trainable_part_blocks: only with one of {parts}, and with "
            "model.train_tokenizers=true"
        )
    return found


def _names_collection(source: str, named: tuple[str, ...]) -> bool:
    """Return whether a part has this source: ``clip``, ``clip:ONE``, or ``random`` alone."""
    kind, colon, which = source.partition(":")
    return kind in named and (not colon or (bool(which) and kind != "random"))


def _names_file(source: str) -> bool:
    collections = {name for names in WEIGHT_SOURCES.values() for name in names}
    return source.endswith(WEIGHT_FILES) and source.partition(":")[0] not in collections


def _adapter_problems(experiment: Experiment) -> list[str]:
    found = []
    if experiment.model.pooling != "cls":
        found.append("model.pooling: the adapters of fedclip act on first tokens; take cls")
    if not experiment.adapters.include:
        found.append("adapters.include: empty; name a modality, or take unified")
    return found
