"""Initial weights from elsewhere, strictly: every tensor is accounted for or it is an error.

Shape legend: ``l`` length in tokens, ``d`` width.

Known formats, told apart by their keys:

====================  ==============================================================================
Meta-Transformer      encoder: ``0.norm1.weight`` ... (a Sequential of timm Blocks)
timm ViT              encoder: ``blocks.0.norm1.weight``; image: ``patch_embed.proj.weight`` ...
open_clip             encoder: ``visual.transformer.resblocks.0.ln_1.weight``; image:
                      ``visual.conv1.weight`` ...; text: ``transformer.resblocks.0.ln_1.weight`` ...
AST (of the hub)      audio: ``audio_spectrogram_transformer.embeddings.cls_token`` ...
a run's own model     ``server_model.encoder.0.norm1.weight``, ``tokenizers.by_modality.image.cls``
====================  ==============================================================================
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mpsl_dist.errors import WeightsError
from mpsl_dist.models.clip_text import ClipText
from mpsl_dist.models.tokenizers import PatchTokenizer

State = Mapping[str, Tensor]

#: A format's block keys -> (block, rest). The text tower's blocks of open_clip come last, so that
#: a whole CLIP is read at its image side.
_BLOCKS = (
    re.compile(r"^server_model\.encoder\.(\d+)\.(.+)$"),
    re.compile(r"^blocks\.(\d+)\.(.+)$"),
    re.compile(r"^visual\.transformer\.resblocks\.(\d+)\.(.+)$"),
    re.compile(r"^transformer\.resblocks\.(\d+)\.(.+)$"),
    re.compile(r"^(\d+)\.(.+)$"),
)

#: What open_clip calls a block's parts -> what timm calls them.
_CLIP_BLOCK = {
    "ln_1.": "norm1.",
    "ln_2.": "norm2.",
    "attn.in_proj_": "attn.qkv.",
    "attn.out_proj.": "attn.proj.",
    "mlp.c_fc.": "mlp.fc1.",
    "mlp.c_proj.": "mlp.fc2.",
}

_AST = "audio_spectrogram_transformer.embeddings."

#: A format's stem -> what its tensors are here. ``bias`` is the patch convolution's.
_STEMS: dict[str, dict[str, str]] = {
    "timm": {
        "patch_embed.proj.weight": "patchify.weight",
        "patch_embed.proj.bias": "bias",
        "cls_token": "cls",
        "pos_embed": "positions",
        "norm_pre.weight": "pre_norm.weight",
        "norm_pre.bias": "pre_norm.bias",
    },
    "open_clip": {
        "visual.conv1.weight": "patchify.weight",
        "visual.class_embedding": "cls",
        "visual.positional_embedding": "positions",
        "visual.ln_pre.weight": "pre_norm.weight",
        "visual.ln_pre.bias": "pre_norm.bias",
    },
    "ast": {
        f"{_AST}patch_embeddings.projection.weight": "patchify.weight",
        f"{_AST}patch_embeddings.projection.bias": "bias",
        f"{_AST}cls_token": "cls",
        f"{_AST}position_embeddings": "positions",
    },
}

#: Patches of AST's own positions: mel bins by frames, after a CLS and a distillation token.
_AST_GRID = (12, 101)


@dataclass(frozen=True)
class Account:
    """What became of every tensor of a part.

    Attributes
    ----------
    part : str
        ``encoder``, ``image``, ``audio`` or ``text``.
    source : str
        Where the tensors are from.
    loaded : tuple of str
        Keys of ours that were set.
    missing : tuple of str
        Keys of ours that the source does not have and that keep their initial values.
    left : tuple of str
        Keys of the source that this part does not use.
    changed : tuple of str
        What was fitted on the way, as "positions 14x14 -> 7x7".
    """

    part: str
    source: str
    loaded: tuple[str, ...]
    missing: tuple[str, ...] = ()
    left: tuple[str, ...] = ()
    changed: tuple[str, ...] = field(default=())

    def __str__(self) -> str:
        lines = [f"weights.{self.part} from {self.source}: {len(self.loaded)} tensors loaded"]
        for name in ("changed", "missing", "left"):
            values = getattr(self, name)
            if values:
                lines.append(f"  {name}: {', '.join(_brief(values))}")
        return "\n".join(lines)


def _brief(keys: Iterable[str], most: int = 12) -> list[str]:
    """Return keys with those of one prefix joined, ``head.*``, and a long list cut."""
    groups: dict[str, list[str]] = {}
    for key in keys:
        groups.setdefault(key.split(".")[0], []).append(key)
    short = [g[0] if len(g) == 1 else f"{name}.* ({len(g)})" for name, g in groups.items()]
    return short if len(short) <= most else [*short[:most], f"and {len(short) - most} more"]


def load_encoder(encoder: nn.Sequential, state: State, source: str) -> Account:
    """Load a stack of transformer blocks; all of them must be there, and no more.

    Parameters
    ----------
    encoder : nn.Sequential
        Of timm's Blocks, as of :func:`mpsl_dist.models.server_model.build_encoder`.
    state : mapping of str to Tensor
        In any format of the table above.
    source : str
        Where the state is from, for messages.

    Returns
    -------
    Account
        What was loaded and what was left.

    Raises
    ------
    WeightsError
        If a block or a tensor of it is missing, too many, or of another shape.
    """
    blocks, left = _blocks(state)
    if not blocks:
        raise WeightsError(f"{source}: no transformer blocks in it; it has {_some(state)}")
    _fill(dict(encoder.named_parameters()), blocks, source)
    return Account("encoder", source, tuple(blocks), left=tuple(left))


def _blocks(state: State) -> tuple[dict[str, tuple[str, Tensor]], list[str]]:
    """Return our key -> (their key, tensor), and the keys that belong to no block."""
    for pattern in _BLOCKS:
        matches = {key: pattern.match(key) for key in state}
        if any(matches.values()):
            found = {
                f"{match[1]}.{_as_timm(match[2])}": (key, state[key])
                for key, match in matches.items()
                if match
            }
            return found, [key for key, match in matches.items() if not match]
    return {}, list(state)


def _as_timm(key: str) -> str:
    for theirs, ours in _CLIP_BLOCK.items():
        if key.startswith(theirs):
            return ours + key[len(theirs) :]
    return key


@torch.no_grad()
def _fill(
    ours: Mapping[str, Tensor], theirs: Mapping[str, tuple[str, Tensor]], source: str
) -> None:
    """Copy theirs into ours, or raise a WeightsError unless keys and shapes are the same."""
    problems = [f"{source}: '{key}' is missing" for key in ours if key not in theirs]
    for key, (name, value) in theirs.items():
        if key not in ours:
            problems.append(f"{source}: '{name}' has no place in this model")
        elif value.shape != ours[key].shape:
            problems.append(
                f"{source}: '{name}' is {_shape(value)}, this model needs {_shape(ours[key])}"
            )
    if problems:
        more = [f"{source}: and {len(problems) - 8} more"] if len(problems) > 8 else []
        raise WeightsError("\n".join([*problems[:8], *more]))
    for key, (_, value) in theirs.items():
        ours[key].copy_(value)


def stem_of(state: State) -> dict[str, Tensor]:
    """Return the tensors that :func:`load_stem` can use, so that the rest can be let go."""
    own = "tokenizers."
    known = {key for names in _STEMS.values() for key in names}
    return {key: value for key, value in state.items() if key in known or key.startswith(own)}


def load_stem(
    tokenizer: PatchTokenizer, pre_norm: nn.Module, state: State, source: str, part: str
) -> Account:
    """Load an image or audio tokenizer: convolution, CLS, positions, and CLIP's pre-norm.

    A patch convolution's bias, which ours lacks, is added to the positions: the same function.
    Positions of another grid are resized bicubically, kernels of three channels summed for grey
    pictures. AST's kernel and positions, (mel, frames), are turned to ours, (frames, mel).

    Parameters
    ----------
    tokenizer : PatchTokenizer
    pre_norm : nn.Module
        The LayerNorm that the client's tokens share, or an Identity.
    state, source
        As of :func:`load_encoder`.
    part : "image" or "audio"

    Raises
    ------
    WeightsError
        If the state has no such stem, or its tensors do not fit.
    """
    names, tensors = _find_stem(state, part, source)
    changed: list[str] = []
    if names.get("patchify.weight", "").startswith(_AST):
        tensors = _turn_ast(tensors)
    tensors["cls"] = tensors["cls"].reshape(1, 1, -1)
    kernel = tensors["patchify.weight"]
    if kernel.shape[1] == 3 and tokenizer.patchify.in_channels == 1:
        tensors["patchify.weight"] = kernel.sum(1, keepdim=True)
        changed.append("kernel 3 channels -> 1")
    tensors["positions"] = _positions(tensors["positions"], tokenizer, part, source, changed)
    if "bias" in tensors:
        tensors["positions"][:, 1:] += tensors.pop("bias")
        changed.append("the convolution's bias added to the positions")
    targets = {f"pre_norm.{k}": p for k, p in pre_norm.named_parameters()}
    kept = {key: value for key, value in tensors.items() if key in targets}
    own = dict(tokenizer.named_parameters())
    theirs = {key: (names[key], value) for key, value in tensors.items() if key in own} | {
        key: (names[key], value) for key, value in kept.items()
    }
    _fill(own | {key: targets[key] for key in kept}, theirs, source)
    return Account(
        part,
        source,
        tuple(theirs),
        missing=tuple(key for key in targets if key not in kept) if part == "image" else (),
        left=tuple(names[k] for k in tensors if k not in theirs),
        changed=tuple(changed),
    )


def _find_stem(state: State, part: str, source: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Return our key -> their key, and our key -> tensor."""
    own = {
        f"tokenizers.by_modality.{part}.{key}": key
        for key in ("patchify.weight", "cls", "positions")
    } | {f"tokenizers.pre_norm.{key}": f"pre_norm.{key}" for key in ("weight", "bias")}
    formats = {"own": own} | {k: v for k, v in _STEMS.items() if (k == "ast") == (part == "audio")}
    for form, keys in formats.items():
        names = {ours: theirs for theirs, ours in keys.items() if theirs in state}
        if "patchify.weight" not in names:
            continue
        for ours in ("cls", "positions"):
            if ours not in names:
                theirs = next(t for t, o in keys.items() if o == ours)
                raise WeightsError(f"{source}: '{theirs}' is missing ({form} format)")
        return names, {ours: state[theirs].detach().clone() for ours, theirs in names.items()}
    raise WeightsError(f"{source}: no {part} stem in it; it has {_some(state)}")


def _turn_ast(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    turned = dict(tensors)
    turned["patchify.weight"] = tensors["patchify.weight"].transpose(2, 3)
    positions_1ld = tensors["positions"]
    mels, frames = _AST_GRID
    if positions_1ld.shape[1] == 2 + mels * frames:  # CLS and distillation token in front
        grid = positions_1ld[:, 2:].unflatten(1, (mels, frames)).transpose(1, 2).flatten(1, 2)
        turned["positions"] = torch.cat([positions_1ld[:, :1], grid], dim=1)
    return turned


def _positions(
    positions: Tensor, tokenizer: PatchTokenizer, part: str, source: str, changed: list[str]
) -> Tensor:
    """Return positions (1, l, d) for the tokenizer's own grid."""
    from timm.layers import resample_abs_pos_embed

    positions_1ld = positions.reshape(1, *positions.shape[-2:]).float()
    patches = positions_1ld.shape[1] - 1
    side = int(patches**0.5)
    old = (side, side) if part == "image" else _AST_GRID[::-1]
    rows, columns = tokenizer.grid
    if patches == rows * columns and (part == "audio" or rows == side):
        return positions_1ld
    if patches != old[0] * old[1]:
        raise WeightsError(f"{source}: {patches} positions besides the CLS's make no {part} grid")
    new = tokenizer.grid
    changed.append(f"positions {old[0]}x{old[1]} -> {new[0]}x{new[1]}")
    return resample_abs_pos_embed(positions_1ld, list(new), list(old), num_prefix_tokens=1)


def load_text(text: ClipText, state: State, source: str) -> Account:
    """Load the frozen CLIP text tower from open_clip's state or from a run's own model.

    Raises
    ------
    WeightsError
        If a tensor is missing or does not fit.
    """
    ours = dict(text.tower.named_parameters())
    for prefix in ("tokenizers.by_modality.text.tower.", "text.", ""):
        theirs = {
            key[len(prefix) :]: (key, value)
            for key, value in state.items()
            if key.startswith(prefix) and key[len(prefix) :].split(".")[0] in _TEXT
        }
        if theirs:
            _fill(ours, theirs, source)
            taken = {name for name, _ in theirs.values()}
            left = tuple(key for key in state if key not in taken)
            return Account("text", source, tuple(theirs), left=left)
    raise WeightsError(f"{source}: no CLIP text tower in it; it has {_some(state)}")


_TEXT = ("token_embedding", "positional_embedding", "transformer", "ln_final", "text_projection")


def _some(state: State) -> str:
    return ", ".join(_brief(state, most=6)) or "no tensors"


def _shape(value: Tensor) -> str:
    return "x".join(map(str, value.shape)) or "a scalar"
