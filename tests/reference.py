"""A plain single-process MPSL: one autograd graph, plain optimizers. What the runtime must equal.

It shares the models, the partition and the mini-batches with the project, and none of the actors,
the RPC or the distributed autograd.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from mpsl_dist.actors import assembly, choices
from mpsl_dist.actors.holdings import load_data
from mpsl_dist.config import Experiment
from mpsl_dist.data.partition import deal_pictures, epoch_order, partition, shares

#: Whether something is so of a client at a step.
Rule = Callable[[int, int], bool]


def _never(client: int, step: int) -> bool:
    return False


def train(
    experiment: Experiment,
    steps: int,
    absent: Rule = _never,
    before: Callable[[int, list, list], None] = lambda step, clients, optimizers: None,
    stuck: Rule = _never,
    missing: Rule = _never,
) -> dict[str, Any]:
    """Train some steps; give losses, cut-layer gradients and all parameters.

    A client that is ``absent`` takes no part in a step; one that is ``stuck`` took part, and makes
    no use of its own gradients; what is ``missing`` is not heard when tokenizers meet after it.
    ``before(step, clients, optimizers)`` may change the clients' tokenizers and optimizers before a
    step.

    On one thread, as the toys' server and clients: sums then run in the same order.
    """
    torch.set_num_threads(1)
    splits, seed = load_data(experiment), experiment.seed
    rule, settings = experiment.data.partition, experiment.training
    if splits.retrieval:
        parts = deal_pictures(splits.train.labels, experiment.clients, seed)
    else:
        parts = partition(
            splits.train.labels, experiment.clients, rule.kind, rule.alpha, rule.minimum, seed
        )
    plan = shares([len(p) for p in parts], settings.batch_size, experiment.client_share)
    device = choices.device_of(experiment)
    clients = [assembly.build_tokenizers(experiment, splits).to(device) for _ in parts]
    server = assembly.build_server_model(experiment, splits, clients[0].lengths)
    optimizers = [_adamw(c, settings.client) for c in clients]
    server_optimizer = _adamw(server, settings.server)
    dtype = next(server.parameters()).dtype
    sync, kept = experiment.tokenizer_sync, {}
    told: dict[str, Any] = {"losses": [], "cut_gradients": []}
    for step in range(steps):
        epoch, epoch_step = divmod(step, len(plan))
        before(step, clients, optimizers)
        batches = {}
        for n, part in enumerate(parts):
            start, count = plan[:epoch_step, n].sum(), plan[epoch_step, n]
            if count and not absent(n, step):
                order = part[epoch_order(len(part), seed, n, epoch)]
                batches[n] = splits.train.fetch(order[start : start + count].tolist())
        cut = {}
        for n, batch in batches.items():
            inputs = {
                k: x.to(device, dtype if x.is_floating_point() else None)
                for k, x in batch.inputs.items()
            }
            tokens = clients[n](inputs)
            early = experiment.model.fusion == "early" and not splits.retrieval
            cut[n] = [torch.cat(tokens, dim=1)] if early else tokens
            for tensor in cut[n]:
                if tensor.requires_grad:
                    tensor.retain_grad()
        returned = server([torch.cat(tensors) for tensors in zip(*cut.values(), strict=True)])
        labels = [batch.labels.to(device) for batch in batches.values()]
        if experiment.contrastive == "global":
            loss = _info_nce(returned, torch.cat(labels))
        else:
            compare = _info_nce if splits.retrieval else functional.cross_entropy
            own = returned.split([len(b) for b in labels])
            if experiment.model.head_at == "client":
                own = [clients[n].head(x_bd) for n, x_bd in zip(batches, own, strict=True)]
            total = sum(len(b) for b in labels)
            loss = sum(len(b) / total * compare(x, b) for x, b in zip(own, labels, strict=True))
        loss.backward()
        told["losses"].append(loss.item())
        told["cut_gradients"].append(
            {
                (n, i): t.grad.cpu()
                for n, tensors in cut.items()
                for i, t in enumerate(tensors)
                if t.grad is not None
            }
        )
        server_optimizer.step()
        moved = [n for n in batches if not stuck(n, step)]
        if sync.mode == "gradients":
            for n in moved:
                vector = parameters_to_vector([p.grad for p in trained(clients[n])])
                kept[n] = kept.get(n, 0) + vector
        else:
            for n in moved:
                optimizers[n].step()
        if sync.mode != "none" and ((step + 1) % sync.every == 0 or step + 1 == steps):
            heard = [n for n in range(len(clients)) if not missing(n, step)]
            _meet(sync.mode, clients, optimizers, heard, kept, [len(p) for p in parts])
        for module in (server, *clients):
            module.zero_grad()
    told["sizes"] = [len(part) for part in parts]
    told["server"] = {k: v.cpu() for k, v in server.state_dict().items()}
    told["clients"] = {
        n: {k: p.detach().cpu() for k, p in c.named_parameters() if p.requires_grad}
        for n, c in enumerate(clients)
    }
    return told


def trained(module: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


def _meet(
    mode: str,
    clients: list[torch.nn.Module],
    optimizers: list[torch.optim.Optimizer],
    heard: list[int],
    kept: dict[int, torch.Tensor],
    sizes: list[int],
) -> None:
    """Bring the clients' tokenizers together, as ``tokenizer_sync`` has it."""
    if mode == "weights":
        total = sum(sizes[n] for n in heard)
        mean = sum(parameters_to_vector(trained(clients[n])) * (sizes[n] / total) for n in heard)
        for client in clients:
            vector_to_parameters(mean.detach().clone(), trained(client))
        return
    vector = sum(kept[n] for n in heard if n in kept)
    kept.clear()
    for client, optimizer in zip(clients, optimizers, strict=True):
        parameters = trained(client)
        parts = vector.split([p.numel() for p in parameters])
        for p, part in zip(parameters, parts, strict=True):
            p.grad = part.view_as(p).clone()
        optimizer.step()


def _info_nce(embeddings: torch.Tensor, pictures: torch.Tensor) -> torch.Tensor:
    """The paper's bidirectional contrastive loss, pair by pair, other captions left out."""
    captions = embeddings.shape[1] - 1
    if captions > 1:  # the first of every picture, the second, ...
        return sum(_info_nce(embeddings[:, [0, k + 1]], pictures) for k in range(captions))
    image, text = embeddings.unbind(1)
    terms = []
    for i in range(len(pictures)):
        rivals = (pictures != pictures[i]) | (torch.arange(len(pictures)) == i).to(pictures.device)
        own = image[i] @ text[i]
        terms.append(torch.logsumexp((text[rivals] @ image[i]), 0) - own)
        terms.append(torch.logsumexp((image[rivals] @ text[i]), 0) - own)
    return torch.stack(terms).mean()


def _adamw(module: torch.nn.Module, settings: Any) -> torch.optim.Optimizer:
    rates = {"lr": settings.lr, "weight_decay": settings.weight_decay}
    return torch.optim.AdamW(trained(module), **rates, fused=True)
