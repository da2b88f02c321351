"""LoRA (Hu et al., 2022) by peft: small trained factors beside frozen linear layers, W + s B A.

Shape legend: ``r`` rank, ``o`` outputs and ``i`` inputs of a layer; A is (r, i), B is (o, r).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from mpsl_dist.errors import ConfigError

#: What attention projects, of transformers' Llama.
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_A, _B = ".lora_A.", ".lora_B."


def add_lora(
    module: nn.Module,
    rank: int,
    alpha: float,
    targets: Sequence[str] = ATTENTION,
    dropout: float = 0.0,
    key: str = "model.encoder.lora",
) -> None:
    """Freeze a module and put trained factors beside its linear layers of these names, in place.

    B begins as zeros: the module's outputs stay what they were, to the last bit.

    Parameters
    ----------
    rank : int
        r.
    alpha : float
        The product is scaled by s = alpha / r.
    targets : sequence of str
        Last names of linear layers, as ``q_proj``.
    dropout : float
        Of what goes into A.
    key : str
        Of the configuration, that asks for it.

    Raises
    ------
    ConfigError
        If peft is not installed, or no layer has such a name.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ConfigError(
            f"{key}: needs the package peft, which is not installed here; "
            "pip install 'mpsl_dist[lm]' (docs/lm.md)"
        ) from error
    names = {name.rpartition(".")[2] for name, m in module.named_modules() if _linear(m)}
    if unknown := [name for name in targets if name not in names]:
        raise ConfigError(
            f"model.encoder.lora.targets: no linear layer {', '.join(unknown)}; the layers are "
            f"{', '.join(sorted(names))}"
        )
    rules = LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, bias="none", target_modules=list(targets)
    )
    inject_adapter_in_model(rules, module)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(_A in name or _B in name)


def lora_state(module: nn.Module) -> dict[str, Tensor]:
    """Return copies of all factors on CPU, by parameter name."""
    return {name: p.detach().cpu().clone() for name, p in _factors(module).items()}


@torch.no_grad()
def load_lora(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Set all factors.

    Raises
    ------
    ValueError
        If ``state`` names other factors than the module has.
    """
    own = _factors(module)
    if own.keys() != state.keys():
        raise ValueError(f"LoRA factors differ: {sorted(own.keys() ^ state.keys())}")
    for name, parameter in own.items():
        parameter.copy_(state[name])


def merge_lora(module: nn.Module) -> None:
    """Add the products to the weights beside them, and leave plain linear layers, in place."""
    from peft.tuners.lora import LoraLayer

    for parent in list(module.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, LoraLayer):
                layer.merge()
                setattr(parent, name, layer.get_base_layer())


def product_gap(states: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> float:
    """Return how far the mean of the factors is from the mean of their products.

    |Σ wBA - (Σ wB)(Σ wA)| / |Σ wBA|, over all layers together (Frobenius); 0 where the averages of
    A and B apart lose nothing: of one state, of equal A's or of equal B's.

    Parameters
    ----------
    states : sequence of mapping
        As of :func:`lora_state`, all of the same layers and rank.
    weights : sequence of float
        One a state; they need not sum to one.
    """
    shares = [weight / sum(weights) for weight in weights]
    gap = whole = 0.0
    for a in (name for name in states[0] if _A in name):
        b = a.replace(_A, _B)
        pairs = [(state[b].double(), state[a].double()) for state in states]
        mean_oi = sum(w * (b_or @ a_ri) for w, (b_or, a_ri) in zip(shares, pairs, strict=True))
        mean_b = sum(w * b_or for w, (b_or, _) in zip(shares, pairs, strict=True))
        mean_a = sum(w * a_ri for w, (_, a_ri) in zip(shares, pairs, strict=True))
        gap += float((mean_oi - mean_b @ mean_a).square().sum())
        whole += float(mean_oi.square().sum())
    return (gap / whole) ** 0.5 if whole else 0.0


def _factors(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in module.named_parameters() if _A in name or _B in name}


def _linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)


def to_rank(state: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """Return the first ``rank`` rows of every A and columns of every B; other tensors as they are.

    Parameters
    ----------
    rank : int
        At most that of the state.
    """
    cut = {name: x[:rank] if _A in name else x for name, x in state.items()}
    return {name: x[:, :rank].clone() if _B in name else x.clone() for name, x in cut.items()}


def average_by_rank(
    states: Sequence[Mapping[str, Tensor]], weights: Sequence[float]
) -> dict[str, Tensor]:
    """Return the mean of factors of unlike ranks, row by row of A and column by column of B.

    A row is averaged over those alone who have it, so that nobody dilutes it by zeros (FediLoRA,
    arXiv 2509.06984). Of equal ranks it is the plain mean.

    Parameters
    ----------
    states : sequence of mapping
        As of :func:`lora_state`; tensors that are no factor are averaged whole.
    weights : sequence of float
        One a state; they need not sum to one.
    """
    found = {}
    for name, like in states[0].items():
        side = 0 if _A in name else 1
        parts = [(state[name].double(), w) for state, w in zip(states, weights, strict=True)]
        shape = list(like.shape)
        if _A in name or _B in name:
            shape[side] = max(x.shape[side] for x, _ in parts)
        total = torch.zeros(shape, dtype=torch.float64)
        held = torch.zeros_like(total)
        for x, weight in parts:
            rows = tuple(slice(0, length) for length in x.shape)
            total[rows] += weight * x
            held[rows] += weight
        found[name] = (total / held).to(like.dtype)
    return found


def over(before: Mapping[str, Tensor], now: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state with what is in ``now``; of a factor of lower rank what it lacks stays."""
    found = {name: x.clone() for name, x in before.items()}
    for name, x in now.items():
        found[name][tuple(slice(0, length) for length in x.shape)] = x
    return found


def edited(
    state: Mapping[str, Tensor], before: Mapping[str, Tensor], layers: int
) -> dict[str, Tensor]:
    """Return factors of which those A's that turned furthest are as they were before.

    FediLoRA's layer editing: a client of few modalities moves some layers away from all others.

    Parameters
    ----------
    before : mapping
        What training began with.
    layers : int
        How many.
    """
    flat = torch.nn.functional.cosine_similarity
    alike = {
        a: float(flat(state[a].flatten(), before[a].flatten(), dim=0)) for a in state if _A in a
    }
    furthest = sorted(alike, key=alike.__getitem__)[:layers]
    return {name: (before if name in furthest else state)[name] for name in state}


def middle_distance(module: nn.Module, state: Mapping[str, Tensor], prefix: str) -> Tensor:
    """Return the squared distance of the middle layers' factors from those of a state, a scalar.

    FedMLLM (arXiv 2411.14717) holds layers s to n - 1 - s, with s = 4 of n = 28; here s = n // 7.

    Parameters
    ----------
    state : mapping
        Factors by name, ``prefix`` before every name.
    """
    factors = _factors(module)
    layers = {name: int(name.split(".layers.")[1].split(".")[0]) for name in factors}
    count = max(layers.values()) + 1
    edge = count // 7
    held = [name for name, layer in layers.items() if edge <= layer < count - edge]
    parts = [
        (factors[name] - state[prefix + name].to(factors[name])).square().sum() for name in held
    ]
    return torch.stack(parts).sum()
