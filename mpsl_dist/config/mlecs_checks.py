"""What cannot be asked of ML-ECS, or of other methods that is its own."""

from __future__ import annotations

from math import isfinite

from mpsl_dist.config.methods import facts_of
from mpsl_dist.config.mlecs import Mlecs
from mpsl_dist.config.schema import Experiment

_FROM_ONE = (
    *("edge_blocks", "server_blocks", "rank", "features", "shared", "fused", "tokens", "pool"),
    *("private_steps", "proxy_blocks", "caption_length"),
)
_FROM_ZERO = ("public_steps", "server_steps", "edit", "proximal")


def mlecs_problems(experiment: Experiment) -> list[str]:
    """Return a line for every option of ``mlecs`` that cannot be had."""
    found = _ranges(experiment)
    if "mlecs" in facts_of(experiment).reads:
        found += _public_problems(experiment) + _exchange_problems(experiment)
        if experiment.training.autocast and experiment.mlecs.language == "none":
            found.append("training.autocast: mlecs.language=none has no blocks; leave it out")
    return found


def _ranges(experiment: Experiment) -> list[str]:
    rules = experiment.mlecs
    least = dict.fromkeys(_FROM_ONE, 1) | dict.fromkeys(_FROM_ZERO, 0)
    found = [
        f"mlecs.{name}: must be at least {minimum}, found {getattr(rules, name)}"
        for name, minimum in least.items()
        if isfinite(getattr(rules, name)) and getattr(rules, name) < minimum
    ]
    found += [
        f"mlecs.{name}: must be greater than 0, found {getattr(rules, name)}"
        for name in ("alpha", "temperature")
        if isfinite(getattr(rules, name)) and getattr(rules, name) <= 0
    ]
    found += [
        f"mlecs.{name}: must be at least 0 and less than 1, found {getattr(rules, name)}"
        for name in ("dropout", "lora_dropout")
        if isfinite(getattr(rules, name)) and not 0 <= getattr(rules, name) < 1
    ]
    # Rotary positions turn pairs of a head's numbers.
    for name, step in {"features": 4, "width": 8 if rules.language == "tiny" else 4}.items():
        if getattr(rules, name) < step or getattr(rules, name) % step:
            found.append(
                f"mlecs.{name}: must be a multiple of {step}, of 4 heads of attention; found "
                f"{getattr(rules, name)}"
            )
    found += [
        f"mlecs.{name}: SmolLM2 has 30 blocks; take at most 30"
        for name in ("edge_blocks", "server_blocks")
        if rules.language == "smollm2" and getattr(rules, name) > 30
    ]
    if rules.language == "none" and rules.answer != "head":
        found.append(
            f"mlecs.answer: without a language model nobody writes a {rules.answer}; take head"
        )
    if not (rules.instruction and rules.instruction.isascii() and rules.instruction.isprintable()):
        found.append("mlecs.instruction: a line of ASCII letters, and not empty")
    return found


def _public_problems(experiment: Experiment) -> list[str]:
    rules, fraction, found = experiment.mlecs, experiment.data.public_fraction, []
    if rules.answer == "caption" and experiment.data.unit != "picture":
        found.append("data.unit: pair, but a caption is written of a picture; take picture")
    if not 0 <= fraction < 1:
        found.append(f"data.public_fraction: must be at least 0 and less than 1, found {fraction}")
    if experiment.data.place == "own":
        found.append("data.place: own, but mlecs draws its public samples; take simulated")
    if experiment.data.missing.per == "sample" and experiment.data.missing.rate:
        found.append("data.missing.per: mlecs' devices lack whole modalities; take client")
    if experiment.data.missing.zeros:
        found.append("data.missing.zeros: mlecs' devices have no part for what they lack; false")
    needed = {
        "public_steps": rules.public_steps,
        "server_steps": rules.server_steps,
        "contrast": rules.contrast,
        "transfer": rules.transfer,
    }
    if not fraction:
        found += [
            f"mlecs.{name}: needs public samples (data.public_fraction), or turn it off"
            for name, chosen in needed.items()
            if chosen
        ]
    elif not rules.server_steps and rules.transfer:
        found.append("mlecs.transfer: needs mlecs.server_steps, or turn it off")
    if experiment.data.test_at == "server":
        if not rules.server_steps:
            found.append(
                "data.test_at: server, whose model has no steps (mlecs.server_steps); take clients"
            )
        if experiment.data.missing.at_test:
            found.append(
                "data.missing.at_test: the server's model has every modality; take false, or "
                "data.test_at=clients"
            )
    return found


def _exchange_problems(experiment: Experiment) -> list[str]:
    rules, found = experiment.mlecs, []
    if rules.exchange != "lora":
        also = {
            "transfer": rules.transfer and rules.exchange != "proxy",
            "ranks": rules.ranks,
            "edit": rules.edit,
            "proximal": rules.proximal,
        }
        found += [
            f"mlecs.{name}: with mlecs.exchange=lora alone; turn it off"
            for name, chosen in also.items()
            if chosen
        ]
    if rules.exchange == "proxy":
        found += _proxy_problems(rules)
    if rules.language == "none" and (rules.ranks or rules.edit or rules.proximal):
        found.append("mlecs.language: none has no factors for ranks, edit or proximal; take tiny")
    if rules.ranks and (
        len(rules.ranks) != experiment.clients
        or min(rules.ranks) < 1
        or max(rules.ranks) != rules.rank
    ):
        found.append(
            f"mlecs.ranks: one for each of the {experiment.clients} clients, at least 1, the "
            f"largest mlecs.rank={rules.rank}"
        )
    return found


def _proxy_problems(rules: Mlecs) -> list[str]:
    found = []
    if rules.language == "none":
        found.append("mlecs.exchange: proxy is of the blocks of a language model; take tiny")
    if rules.proxy_blocks > rules.edge_blocks:
        found.append(
            f"mlecs.proxy_blocks: at most mlecs.edge_blocks={rules.edge_blocks}, of which they are "
            f"the first, found {rules.proxy_blocks}"
        )
    if not rules.public_steps:
        found.append("mlecs.public_steps: a proxy learns of public samples alone; at least 1")
    return found
