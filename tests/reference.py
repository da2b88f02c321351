"""A plain single-process MPSL: one autograd graph, plain optimizers. What the runtime must equal.

It shares the models, the partition and the mini-batches with the project, and none of the actors,
the RPC or the distributed autograd.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional
from torch.nn.utils import parameters_to_vector

from mpsl_dist.actors import assembly, choices
from mpsl_dist.actors.holdings import load_data
from mpsl_dist.config import Experiment
from mpsl_dist.data.gaps import leave_out
from mpsl_dist.data.partition import deal_pictures, epoch_order, partition, shares
from mpsl_dist.models.adapters import Adapters

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
    (splits, parts), seed = _dealt(experiment), experiment.seed
    settings = experiment.training
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
            if batch.present is not None:
                tokens = clients[n](inputs)
                there = [x_b for x_b in batch.present.values() if x_b.any()]
                names = [m for m, x_b in batch.present.items() if x_b.any()]
                order = list(splits.shapes)
                cut[n] = [tokens[order.index(m)][x_b] for m, x_b in zip(names, there, strict=True)]
            else:
                tokens = clients[n](inputs)
                early = experiment.model.fusion == "early" and not splits.retrieval
                cut[n] = [torch.cat(tokens, dim=1)] if early else tokens
            for tensor in cut[n]:
                if tensor.requires_grad:
                    tensor.retain_grad()
        masks = {n: batch.present for n, batch in batches.items()}
        if any(masks.values()):
            returned = torch.cat([one_by_one(server, cut[n], masks[n]) for n in batches])
        else:
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
                own = trained(clients[n])
                grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in own]
                vector = parameters_to_vector(grads)
                kept[n] = kept.get(n, 0) + vector
        else:
            for n in moved:
                optimizers[n].step()
        if sync.mode != "none" and ((step + 1) % sync.every == 0 or step + 1 == steps):
            heard = [n for n in range(len(clients)) if not missing(n, step)]
            sizes = [len(p) for p in parts]
            _meet(sync.mode, clients, optimizers, heard, kept, sizes, _holders(splits, parts))
        for module in (server, *clients):
            module.zero_grad()
    told["sizes"] = [len(part) for part in parts]
    told["server"] = {k: v.cpu() for k, v in server.state_dict().items()}
    has = _holders(splits, parts)
    told["clients"] = {
        n: {k: p.detach().cpu() for k, p in c.named_parameters() if p.requires_grad and n in has(k)}
        for n, c in enumerate(clients)
    }
    return told


def _dealt(experiment: Experiment) -> tuple[Any, list[Any]]:
    """The data, without what is missing, and who has which samples."""
    splits, seed, rule = load_data(experiment), experiment.seed, experiment.data.partition
    if splits.retrieval:
        parts = deal_pictures(splits.train.labels, experiment.clients, seed)
    else:
        parts = partition(
            splits.train.labels, experiment.clients, rule.kind, rule.alpha, rule.minimum, seed
        )
    gaps = experiment.data.missing
    if gaps.rate:
        drawn, nobody = seed if gaps.seed is None else gaps.seed, [p[:0] for p in parts]
        splits = leave_out(splits, gaps.rate, gaps.per, drawn, gaps.at_test, parts, nobody)
    return splits, parts


def train_rounds(experiment: Experiment, rounds: int) -> dict[str, Any]:
    """Train some rounds of FedAvg, or FedCLIP; give losses and all parameters.

    All clients take part in one local epoch a round, each with a model and optimizers of its own.
    """
    torch.set_num_threads(1)
    splits, parts = _dealt(experiment)
    settings, sizes = experiment.training, [len(p) for p in parts]
    plan, has = shares(sizes, settings.batch_size, experiment.client_share), _holders(splits, parts)

    def build() -> torch.nn.ModuleDict:
        tokenizers = assembly.build_tokenizers(experiment, splits)
        server = assembly.build_server_model(experiment, splits, tokenizers.lengths)
        return torch.nn.ModuleDict({"tokenizers": tokenizers, "server_model": server})

    model, own = build(), [build() for _ in parts]
    optimizers = [
        [_adamw(m["tokenizers"], settings.client), _adamw(m["server_model"], settings.server)]
        for m in own
    ]
    told: dict[str, Any] = {"losses": []}
    for round_ in range(rounds):
        total = 0.0
        for n, part in enumerate(parts):
            own[n].load_state_dict(model.state_dict())
            order, start = part[epoch_order(len(part), experiment.seed, n, round_)], 0
            for count in filter(None, plan[:, n]):
                batch = splits.train.fetch(order[start : start + count].tolist())
                start += count
                masks = batch.present or {m: torch.ones(count) > 0 for m in splits.shapes}
                tokens = own[n]["tokenizers"](batch.inputs | _doubled(batch.inputs))
                cut = [x[b] for x, b in zip(tokens, masks.values(), strict=True) if b.any()]
                found = one_by_one(own[n]["server_model"], cut, masks)
                loss = functional.cross_entropy(found, batch.labels)
                own[n].zero_grad()
                loss.backward()
                for optimizer in optimizers[n]:
                    optimizer.step()
                total += count * loss.item()
        told["losses"].append(total / sum(sizes))
        for name, p in model.named_parameters():
            who = has(name.partition(".")[2]) if p.requires_grad else []
            if who:
                weight = sum(sizes[n] for n in who)
                mean = sum(sizes[n] / weight * own[n].get_parameter(name).data for n in who)
                p.data.copy_(mean)
    return told | {"model": {k: p.data for k, p in model.named_parameters() if p.requires_grad}}


def _doubled(inputs: Any) -> dict[str, torch.Tensor]:
    return {name: x.double() for name, x in inputs.items() if x.is_floating_point()}


def _holders(splits: Any, parts: list[Any]) -> Callable[[str], list[int]]:
    """Which clients train a parameter of a tokenizer or of the server's part, by its name."""
    present = splits.train.present if hasattr(splits.train, "present") else None

    def has(name: str) -> list[int]:
        words = name.removeprefix("adapters.by_name").removeprefix("by_modality").split(".")
        modality = words[1] if words[0] == "" and words[1] != "unified" else None
        if present is None or modality is None:
            return list(range(len(parts)))
        return [n for n, part in enumerate(parts) if bool(present[modality][part].any())]

    return has


def one_by_one(server: Any, cut: list[torch.Tensor], present: Any) -> torch.Tensor:
    """Predictions of a client's samples, each by itself from what it has: no mask anywhere."""
    early = server.fusion == "early"
    if present is None:
        apart = cut[0].split(server.lengths, dim=1) if early else cut
        masks = [torch.ones(len(cut[0]), dtype=torch.bool)] * len(apart)
        rows = dict(enumerate(apart))
    else:
        masks = list(present.values())
        rows = dict(zip([m for m, x_b in enumerate(masks) if x_b.any()], cut, strict=True))
    found = []
    for b in range(len(masks[0])):
        own = [rows[m][masks[m][:b].sum()] for m in range(len(masks)) if masks[m][b]]
        lengths = [len(x) for x in own]
        passes = [torch.cat(own)] if early else own
        encoded = [server.post_norm(server.encoder(x_ld[None]))[0] for x_ld in passes]
        tokens = torch.cat(encoded)
        if server.pooling == "mean":
            feature = tokens.mean(0)
        else:
            firsts = [x_ld[:1] for x_ld in tokens.split(lengths)]
            if isinstance(server.adapters, Adapters):
                names = [server.adapters.applied[m] for m in range(len(masks)) if masks[m][b]]
                adapters = server.adapters.by_name
                firsts = [
                    adapters[name](x_1d) if name in adapters else x_1d
                    for name, x_1d in zip(names, firsts, strict=True)
                ]
            feature = torch.cat(firsts).mean(0)
        found.append(server.head(feature[None])[0])
    return torch.stack(found)


def trained(module: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


def _meet(
    mode: str,
    clients: list[torch.nn.Module],
    optimizers: list[torch.optim.Optimizer],
    heard: list[int],
    kept: dict[int, torch.Tensor],
    sizes: list[int],
    has: Callable[[str], list[int]],
) -> None:
    """Bring the clients' tokenizers together, as ``tokenizer_sync`` has it."""
    if mode == "weights":
        named = [dict(client.named_parameters()) for client in clients]
        for name in [name for name, p in named[0].items() if p.requires_grad]:
            own = [n for n in heard if n in has(name)]
            total = sum(sizes[n] for n in own)
            mean = sum(named[n][name].detach() * (sizes[n] / total) for n in own)
            for n in has(name):
                named[n][name].data.copy_(mean)
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
