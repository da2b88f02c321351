"""What split learning's own options cannot be asked for together, or of another method."""

from __future__ import annotations

from mpsl_dist.config.methods import facts_of, goes_on
from mpsl_dist.config.schema import Experiment

#: Clients of a masked sum, at least: of a sum of two, either knows what the other added.
FEWEST_IN_SUM = 3


def split_problems(experiment: Experiment) -> list[str]:
    """Return a line for every option of replicas, head, masks and cache that cannot be had."""
    found = _replica_problems(experiment) + _head_problems(experiment) + _cache_problems(experiment)
    return found + (_mask_problems(experiment) if experiment.tokenizer_sync.masked else [])


def _replica_problems(experiment: Experiment) -> list[str]:
    replicas, method = experiment.server.replicas, experiment.method
    if replicas > 1 and "server.replicas" not in facts_of(experiment).reads:
        return [f"server.replicas: {replicas}, but method={method} has one server; take 1"]
    if replicas > experiment.clients >= 1:
        return [
            f"server.replicas: {replicas} for {experiment.clients} clients; each takes whole "
            f"clients, so at most {experiment.clients}"
        ]
    return _shard_problems(experiment) if experiment.server.shard else []


def _shard_problems(experiment: Experiment) -> list[str]:
    training, found = experiment.training, []
    if experiment.server.replicas == 1:
        found.append("server.shard: needs server.replicas of at least 2, or server.shard=false")
    if training.compile:
        found.append("server.shard: not with training.compile; set one of them to false")
    if training.autocast is not None:
        # Its copies of the weights would stay until the end of a forward, of all blocks.
        found.append("server.shard: not with training.autocast; set training.autocast=null")
    return found


def _head_problems(experiment: Experiment) -> list[str]:
    if experiment.model.head_at == "server":
        return []
    found, method = [], experiment.method
    if "model.head_at" not in facts_of(experiment).reads:
        found.append(
            f"model.head_at: client, but method={method} has the head where the encoder is; "
            "take model.head_at=server, or method=mpsl"
        )
    if experiment.contrastive == "global":
        found.append(
            "contrastive: with global the server contrasts all predictions, and with "
            "model.head_at=client it has none; take contrastive=client, or model.head_at=server"
        )
    return found


def _mask_problems(experiment: Experiment) -> list[str]:
    """Refuse masked sums where there is nothing to mask, or what is asked for undoes them."""
    key, found = "tokenizer_sync.masked", []
    if "tokenizer_sync" not in facts_of(experiment).reads:
        found.append(
            f"{key}: under method={experiment.method} nothing is masked; take mpsl or psl, or "
            "masked=false"
        )
    if not experiment.model.train_tokenizers and experiment.model.head_at == "server":
        found.append(
            f"{key}: frozen tokenizers are as everybody began with them; set "
            "model.train_tokenizers=true, or masked=false"
        )
    if experiment.clients < FEWEST_IN_SUM:
        found.append(
            f"{key}: {experiment.clients} clients; a sum of fewer than {FEWEST_IN_SUM} tells "
            f"what each has added; take clients={FEWEST_IN_SUM} or more, or masked=false"
        )
    if goes_on(experiment) and experiment.faults.min_clients < FEWEST_IN_SUM:
        found.append(
            f"{key}: a sum needs {FEWEST_IN_SUM} clients, and the run would go on with "
            f"{experiment.faults.min_clients}; set faults.min_clients={FEWEST_IN_SUM} or more, "
            "or faults.on_loss=stop"
        )
    if experiment.training.evaluate_own and experiment.data.test_at == "server":
        found.append(
            f"{key}: to test every client's own tokenizers the server would need them one by one; "
            "take data.test_at=clients, or training.evaluate_own=false"
        )
    return found


def _cache_problems(experiment: Experiment) -> list[str]:
    wire, found = experiment.wire, []
    if wire.cache and experiment.model.train_tokenizers:
        found.append(
            "wire.cache: a tokenizer that is trained changes its activations at every step; set "
            "model.train_tokenizers=false, or wire.cache=false"
        )
    if wire.cache_limit is not None and not wire.cache:
        found.append("wire.cache_limit: only with wire.cache=true")
    if wire.cache_prefix and not wire.cache:
        found.append("wire.cache_prefix: only with wire.cache=true")
    if wire.cache_prefix and experiment.server.replicas > 1:
        found.append(
            "wire.cache_prefix: one replica alone has the cache; set server.replicas=1, or "
            "wire.cache_prefix=false"
        )
    if wire.cache_prefix and experiment.model.encoder.trainable_blocks == "all":
        found.append(
            "wire.cache_prefix: no block of the encoder is frozen; set "
            "model.encoder.trainable_blocks, or wire.cache_prefix=false"
        )
    return found
