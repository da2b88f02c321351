"""What defences cannot be asked for together, or of a method that does not have them."""

from __future__ import annotations

from mpsl_dist.config.methods import facts_of
from mpsl_dist.config.parts import PARTS
from mpsl_dist.config.schema import Defences, Experiment
from mpsl_dist.typed import flatten


def defence_problems(experiment: Experiment) -> list[str]:
    """Return a line for every defence that could not keep what it promises.

    A method that has none refuses them: nobody must believe in one that is not there.
    """
    chosen, method = experiment.defences, experiment.method
    if "defences" not in facts_of(experiment).reads:
        return [
            f"defences.{key}: method={method} has no cut to defend, and no such key; take method="
            "mpsl or psl"
            for key, default in flatten(Defences()).items()
            if getattr(chosen, key) != default
        ]
    found = _secret_tokenizer_problems(experiment) if chosen.secret_tokenizers else []
    own = experiment.data.place == "own"
    if chosen.secret == "":
        found.append("defences.secret: empty; take null, or a file of the owner's")
    if own and chosen.secret == "seed":
        found.append(
            "defences.secret: seed is for simulations, the server knows it; take null, or a file "
            "of the owner's"
        )
    if own and chosen.label_epsilon is not None and experiment.data.classes is None:
        found.append(
            "defences.label_epsilon: hosts would tell which classes they have; declare data.classes"
        )
    if (chosen.label_epsilon or 0) > 100:
        found.append("defences.label_epsilon: must be at most 100; null keeps every label")
    if chosen.nopeek and not experiment.model.train_tokenizers:
        found.append(
            "defences.nopeek: frozen tokenizers learn nothing from it; set "
            "model.train_tokenizers=true, or defences.nopeek=0"
        )
    if experiment.contrastive == "global":
        found += [
            f"defences.{key}: with contrastive=global predictions do not travel; take "
            f"contrastive=client, or defences.{key}=0"
            for key in ("nopeek", "gradient_noise")
            if getattr(chosen, key)
        ]
    return found + _pretrained_problems(experiment)


def _secret_tokenizer_problems(experiment: Experiment) -> list[str]:
    """Refuse what needs tokenizers that the server, or another client, knows."""
    model, key = experiment.model, "defences.secret_tokenizers"
    found = []
    if model.train_tokenizers:
        found.append(f"{key}: training would show them; set model.train_tokenizers=false")
    if model.train_token_table:
        found.append(f"{key}: training would show them; set model.train_token_table=false")
    if model.text == "clip":
        found.append(f"{key}: CLIP's text tower is public; set model.text=table")
    if model.head_at == "client":
        found.append(
            f"{key}: tests average the clients' heads, and heads of different tokenizers have no "
            "average; set model.head_at=server"
        )
    if experiment.tokenizer_sync.mode != "none":
        found.append(f"{key}: a sync would share them; set tokenizer_sync.mode=none")
    if experiment.data.test_at != "clients":
        found.append(
            f"{key}: the server has no tokenizers to test with, and their average means nothing; "
            "set data.test_at=clients, where every client tests with its own"
        )
    return found


def _pretrained_problems(experiment: Experiment) -> list[str]:
    """Refuse published weights where they would be replaced, or lack their positions."""
    chosen = experiment.defences
    reasons = {
        "secret_tokenizers": "published weights are no secret",
        "shuffle_patches": "published weights come with positions",
    }
    found = [
        f"defences.{key}: {why}; set weights.{part}=random"
        for key, why in reasons.items()
        for part in ("image", "audio")
        if getattr(chosen, key) and getattr(experiment.weights, part) != "random"
    ]
    reasons["shuffle_patches"] = "a pretrained encoder's tokens know their places"
    return found + [
        f"defences.{key}: {why}; model.{part}={encoder} cannot be taken with it"
        for key, why in reasons.items()
        for part, encoder in PARTS.items()
        if getattr(chosen, key) and getattr(experiment.model, part) == encoder
    ]
