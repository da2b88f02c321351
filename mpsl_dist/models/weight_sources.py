"""Where initial weights come from: ``random``, a named collection, or a file.

==================  =============================================================================
``random``          none
``timm``            a pretrained ViT of timm: ``timm:MODEL``, or the size's default
``clip``            open_clip: ``clip:ARCHITECTURE/TAG``, or the size's default
``meta-transformer``  the released file in ``weights.root`` (B/16 and L/14; by hand, no download)
``ast``             the Audio Spectrogram Transformer of the hub: ``ast:REPOSITORY``
a pretrained part   inside an installed package, see :mod:`mpsl_dist.models.pretrained_weights`
a path              a file of any known format: .pth, .pt, .bin or .safetensors
==================  =============================================================================
"""

from __future__ import annotations

import pickle
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from mpsl_dist.errors import WeightsError
from mpsl_dist.models.weights import State, stem_of
from mpsl_dist.wheels import WHEELS

_TIMM = {
    "Ti": "vit_tiny_patch16_224.augreg_in21k",
    "S": "vit_small_patch16_224.augreg_in21k",
    "B": "vit_base_patch16_224.augreg_in21k",
    "L": "vit_large_patch14_clip_224.laion2b",
    "H": "vit_huge_patch14_clip_224.laion2b",
}
_CLIP = {
    "B": "ViT-B-16/laion2b_s34b_b88k",
    "L": "ViT-L-14/laion2b_s32b_b82k",
    "H": "ViT-H-14/laion2b_s32b_b79k",
}
_META_TRANSFORMER = {
    "B": "Meta-Transformer_base_patch16_encoder.pth",
    "L": "Meta-Transformer_large_patch14_encoder.pth",
}
_AST = "MIT/ast-finetuned-audioset-10-10-0.4593"


def is_file(source: str) -> bool:
    """Return whether a source is a file rather than ``random`` or a collection."""
    kind = source.partition(":")[0]
    return kind not in ("random", "timm", "clip", "meta-transformer", "ast", *WHEELS)


def fetch(part: str, source: str, size: str, root: str | None, tower: str) -> tuple[str, State]:
    """Get a state, downloading it where that is possible.

    Parameters
    ----------
    part : str
        ``encoder``, ``image``, ``audio`` or ``text``.
    source : str
        Anything but ``random``.
    size : str
        The encoder's size, for a collection's default.
    root : str or None
        Folder of the files that are fetched by hand.
    tower : str
        open_clip's name of the text tower.

    Returns
    -------
    name, state
        A name for messages, and the tensors.

    Raises
    ------
    WeightsError
        If there is no such file, it cannot be read, or the download fails.
    """
    if is_file(source):
        return source, read(Path(source), part)
    kind, _, which = source.partition(":")
    if kind == "meta-transformer":
        return _meta_transformer(part, which, size, root)
    defaults = {"timm": _TIMM, "clip": _CLIP, "ast": {"B": _AST}}[kind]
    which = which or (f"{tower}/openai" if part == "text" else defaults.get(size, ""))
    if not which:
        raise WeightsError(
            f"weights.{part}: {kind} has no default for model.encoder.size={size} "
            f"(it has {', '.join(defaults)}); name one, as {kind}:{next(iter(defaults.values()))}"
        )
    name = f"{kind}:{which}"
    if kind == "clip":
        _check_activation(part, which, tower)
    try:
        return name, {"timm": _timm, "clip": _clip, "ast": _ast}[kind](which)
    except Exception as error:
        reason = str(error).strip().splitlines()
        raise WeightsError(
            f"weights.{part}: {name} cannot be had: {reason[0] if reason else type(error).__name__}"
            ". Where there is no network, give a local file instead"
        ) from error


def colours_of(source: str, size: str) -> tuple[float, ...] | None:
    """Return the mean of the colours (red, green, blue) that an image stem was trained with.

    Parameters
    ----------
    source, size : str
        As of :func:`fetch`.

    Returns
    -------
    tuple of float or None
        None where nobody knows: of random weights, and of a file's.
    """
    kind, _, which = source.partition(":")
    if kind == "efficientnet-lite0":
        return (0.5, 0.5, 0.5)
    if kind == "timm":
        import timm

        known = timm.get_pretrained_cfg(which or _TIMM.get(size, ""))
        return None if known is None else tuple(known.mean)
    if kind == "clip":
        import open_clip

        architecture, _, tag = (which or _CLIP.get(size, "")).partition("/")
        known = open_clip.get_pretrained_cfg(architecture, tag or "openai")
        return tuple(known.get("mean") or open_clip.OPENAI_DATASET_MEAN)
    return None


def _check_activation(part: str, which: str, tower: str) -> None:
    """Refuse weights that were trained with another activation than they would meet here."""
    architecture, _, tag = which.partition("/")
    quick = "quickgelu" in architecture or tag in ("", "openai")
    if part == "encoder" and quick:
        raise WeightsError(
            f"weights.encoder: clip:{which} was trained with QuickGELU, the encoder here has GELU; "
            f"take {', '.join(f'clip:{name}' for name in _CLIP.values())}"
        )
    if part == "text" and (architecture != tower or quick != ("quickgelu" in tower)):
        wanted = architecture.removesuffix("-quickgelu") + ("-quickgelu" if quick else "")
        raise WeightsError(
            f"weights.text: clip:{which} does not fit model.text_tower={tower}; take "
            f"model.text_tower={wanted} and weights.text=clip:{wanted}/{tag or 'openai'}"
        )


@lru_cache(maxsize=4)
def fetch_stem(part: str, source: str, size: str, root: str | None) -> tuple[str, State]:
    """Get the state of an image or audio tokenizer, once a process whatever the number of clients.

    Parameters, results and errors are those of :func:`fetch`.
    """
    name, state = fetch(part, source, size, root, "")
    stem = stem_of(state)
    # Nothing of a stem in it: the whole state, so that the error can say what it has.
    return name, {key: value.clone() for key, value in stem.items()} if stem else state


def read(path: Path, part: str) -> dict[str, Tensor]:
    """Read a file of tensors; never run code from it.

    Parameters
    ----------
    path : Path
        A .safetensors file, or one that ``torch.load`` reads.
    part : str
        The key under ``weights`` that named it, for the error.

    Raises
    ------
    WeightsError
        If it is not there, or holds anything but named tensors.
    """
    if not path.is_file():
        raise WeightsError(f"weights.{part}: no file {path}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError) as error:
        reason = str(error).strip().splitlines()
        raise WeightsError(
            f"weights.{part}: {path} is no file of plain tensors"
            f" ({reason[0] if reason else type(error).__name__})"
        ) from error
    except Exception as error:  # safetensors has an error type of its own
        raise WeightsError(f"weights.{part}: {path} cannot be read: {error}") from error
    for wrapper in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise WeightsError(f"weights.{part}: {path} holds no state_dict of tensors")
    return {str(key).removeprefix("module."): value for key, value in state.items()}


def _meta_transformer(part: str, which: str, size: str, root: str | None) -> tuple[str, State]:
    file = which or _META_TRANSFORMER.get(size)
    if file is None:
        raise WeightsError(
            f"weights.{part}: Meta-Transformer is released for model.encoder.size B and L, "
            f"not {size}"
        )
    path = Path(file) if which else Path(root or ".") / file
    if not path.is_file():
        raise WeightsError(
            f"weights.{part}: no file {path}; get {path.name} from "
            "github.com/invictus717/MetaTransformer and name its folder by weights.root"
        )
    return str(path), read(path, part)


def _timm(model: str) -> dict[str, Tensor]:
    import timm

    return timm.create_model(model, pretrained=True).state_dict()


def _clip(which: str) -> dict[str, Tensor]:
    import open_clip

    architecture, _, tag = which.partition("/")
    return open_clip.create_model(architecture, pretrained=tag or "openai").state_dict()


def _ast(repository: str) -> dict[str, Tensor]:
    from huggingface_hub import hf_hub_download

    return read(Path(hf_hub_download(repository, "model.safetensors")), "audio")
