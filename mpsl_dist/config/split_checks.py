"""What split learning's own options cannot be asked for together, or of another method."""

from __future__ import annotations

import math

from mpsl_dist.config.methods import facts_of, goes_on, unread
from mpsl_dist.config.schema import Experiment

#: Clients of a masked sum, at least: of a sum of two, either knows what the other added.
FEWEST_IN_SUM = 3


def split_problems(experiment: Experiment) -> list[str]:
    """Return a line for every option of replicas, head, masks and cache that cannot be had."""
    ranges = _m2fedsa_ranges(experiment)
    if facts_of(experiment).unimodal:
        return ranges + _unimodal_problems(experiment)
    found = (
        ranges
        + _replica_problems(experiment)
        + _head_problems(experiment)
        + _cache_problems(experiment)
    )
    return found + (_mask_problems(experiment) if experiment.tokenizer_sync.masked else [])


def _unimodal_problems(experiment: Experiment) -> list[str]:
    """Refuse what M²FedSA never reads."""
    training, method = experiment.training, experiment.method
    found = [f"{key}: method={method} never reads it; leave it out" for key in unread(experiment)]
    for key in ("autocast", "checkpoint_blocks"):
        if getattr(training, key):
            found.append(f"training.{key}: method={method} cuts the encoder up; leave it out")
    if experiment.data.place == "own":
        found.append(
            f"data.place: own, but method={method} deals the same samples to all clients of a "
            "user; take simulated"
        )
    return found


def _m2fedsa_ranges(experiment: Experiment) -> list[str]:
    """Refuse values of M²FedSA's options that mean nothing, whoever reads them."""
    chosen, found = experiment.m2fedsa, []
    lambdas = chosen.lambdas
    if len(lambdas) != 3 or min(lambdas, default=0) < 0 or not all(map(math.isfinite, lambdas)):
        found.append(
            "m2fedsa.lambdas: expected three weights of at least 0, of the labels, the decisions "
            f"and the features; found {lambdas}"
        )
    at_least = {
        "m2fedsa.cut_block": (chosen.cut_block, 0),
        "m2fedsa.switch.round": (chosen.switch.round, 0),
        "m2fedsa.least_losses": (chosen.least_losses, 0),
    }
    at_least |= {
        "m2fedsa.adapter_rank": (chosen.adapter_rank, 1),
        "m2fedsa.switch.window": (chosen.switch.window, 1),
    }
    found += [
        f"{key}: must be at least {least}, found {value}"
        for key, (value, least) in at_least.items()
        if -math.inf < value < least
    ]
    if math.isfinite(chosen.switch.cv) and chosen.switch.cv <= 0:
        found.append(f"m2fedsa.switch.cv: must be greater than 0, found {chosen.switch.cv}")
    return found


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
