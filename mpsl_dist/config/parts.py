"""What the model is made of, and where its weights come from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Lora:
    """Trained factors beside the frozen layers of a language model."""

    #: 0 has none, and the model itself is trained.
    rank: int = 0
    #: The factors' product is scaled by alpha / rank.
    alpha: float = 16.0
    #: Linear layers that have them.
    targets: list[str] = field(default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj"])


@dataclass(frozen=True)
class Encoder:
    """The server's encoder W_b."""

    #: A ViT of the paper, the language model ``smollm2`` (``depth``: its first blocks; null is all
    #: 30), or ``custom`` with the width, depth and heads below.
    size: Literal["Ti", "S", "B", "L", "H", "custom", "smollm2"] = "Ti"
    #: Of ``custom``: numbers of a token.
    width: int | None = None
    #: Of ``custom``: blocks.
    depth: int | None = None
    #: Of ``custom``: attention heads of a block, a divisor of the width.
    heads: int | None = None
    #: The last k blocks are trained; ``all`` trains every block.
    trainable_blocks: int | Literal["all"] = "all"
    #: A ``vit``, or a causal language model (``lm``) in its place, see ``docs/lm.md``.
    kind: Literal["vit", "lm"] = "vit"
    lora: Lora = field(default_factory=Lora)


@dataclass(frozen=True)
class Connector:
    """What makes soft tokens for a language model of all modalities together, at the client."""

    #: Soft tokens of a sample; 0 has no connector: the tokenizers' tokens themselves leave.
    tokens: int = 0
    #: Width of tokenizers and small encoders behind a connector.
    features: int = 64
    #: Width of the fused representation.
    fused: int = 256


@dataclass(frozen=True)
class Head:
    """The task head W_t."""

    #: Null takes the task's own: ``linear`` for classes, ``embeddings`` for retrieval.
    kind: str | None = None
    #: Options of a plugin's head.
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Model:
    """Tokenizers (W_h, at the clients), encoder (W_b, at the server) and head (W_t)."""

    encoder: Encoder = field(default_factory=Encoder)
    head: Head = field(default_factory=Head)
    connector: Connector = field(default_factory=Connector)
    #: Who owns the head: the server, as in the paper, or every ``client`` its own, trained, synced
    #: and averaged with its tokenizers, the server's model ending at the pooled features. That
    #: hides logits, not labels: the features' gradients are W_tᵀ(p - e_y), which lie in k
    #: directions, and clustering them reads the labels.
    head_at: Literal["server", "client"] = "server"
    #: Modality -> options of a plugin's tokenizer for it.
    tokenizers: dict[str, Any] = field(default_factory=dict)
    #: ``early`` concatenates the modalities' tokens before the encoder, ``late`` after it (Eq. 1).
    fusion: Literal["early", "late"] = "early"
    #: ``cls`` averages every modality's first token, ``mean`` all tokens (GAP of Eq. 3); ``last``
    #: is the last token, which of a language model alone has seen all others.
    pooling: Literal["cls", "mean", "last"] = "cls"
    #: Side of a square image patch, in pixels.
    image_patch: int = 16
    #: Side of an audio patch, in frames and mel bins (AST: 16).
    audio_patch: int = 16
    #: From one audio patch to the next, in frames and mel bins (AST: 10).
    audio_stride: int = 10
    #: Side of the square of neighbouring patches that leave the tokenizer as one token, their mean;
    #: 1 keeps every patch.
    merge_patches: int = 1
    #: Trained LayerNorm over the tokens, at the client.
    pre_norm: bool = True
    #: Trained LayerNorm after the encoder, at the server.
    post_norm: bool = False
    #: ``table`` embeds every token of a text; ``clip`` makes a whole text one token, by CLIP's
    #: frozen text tower (texts of at most 77 tokens); ``minilm`` is a pretrained text encoder.
    text: Literal["table", "clip", "minilm"] = "table"
    #: ``patches`` of a picture, or a pretrained encoder in their place.
    image: Literal["patches", "efficientnet-lite0"] = "patches"
    #: ``patches`` of a spectrogram, or a pretrained encoder in their place.
    audio: Literal["patches", "whisper-tiny"] = "patches"
    #: How many last blocks of ``minilm``, ``efficientnet-lite0`` and ``whisper-tiny`` are trained
    #: at the clients: 6, 7 and 4 are all of the blocks, ``all`` is the embedding too.
    trainable_part_blocks: int | Literal["all"] = 0
    #: open_clip's name of that tower; null takes OpenAI's B/16, from width 1,024 on L/14.
    text_tower: str | None = None
    #: Train the 49,408-row text token table too (heavy on a client and on the wire).
    train_token_table: bool = False
    #: ``false`` freezes every tokenizer: clients only send.
    train_tokenizers: bool = True
    #: Retrieval: embeddings of unit length, which the released code has not.
    normalize: bool = False
    #: Retrieval: first value of a trained temperature; null, as in the released code, has none.
    temperature: float | None = None


#: Our own modalities; plugins' tokenizers add further ones.
MODALITIES = ("image", "audio", "text")


@dataclass(frozen=True)
class Weights:
    """Where initial weights come from, part by part; a source may name one of its own,
    ``timm:vit_base_patch16_224.mae``, and any part may be a file. See ``docs/weights.md``.
    """

    #: ``random``, ``timm``, ``meta-transformer``, ``clip`` or a file; of
    #: ``model.encoder.size=smollm2`` ``random`` or ``smollm2``.
    encoder: str = "random"
    #: The image tokenizer: ``random``, ``timm``, ``clip`` (with its pre-norm) or a file; of
    #: ``model.image=efficientnet-lite0`` the part of that name.
    image: str = "random"
    #: The audio tokenizer: ``random``, ``ast`` or a file; of ``model.audio=whisper-tiny`` the part
    #: of that name.
    audio: str = "random"
    #: The frozen text tower of ``model.text=clip``: ``random``, ``clip`` or a file; of
    #: ``model.text=minilm`` the part of that name.
    text: str = "random"
    #: Folder of Meta-Transformer's files, which no program can download.
    root: str | None = None


#: Part -> its named sources.
WEIGHT_SOURCES: dict[str, tuple[str, ...]] = {
    "encoder": ("random", "timm", "meta-transformer", "clip", "smollm2"),
    "image": ("random", "timm", "clip", "efficientnet-lite0"),
    "audio": ("random", "ast", "whisper-tiny"),
    "text": ("random", "clip", "minilm"),
}
#: Modality -> its pretrained encoder: under ``model`` its architecture, under ``weights`` its
#: weights, from an installed package.
PARTS = {"text": "minilm", "image": "efficientnet-lite0", "audio": "whisper-tiny"}
#: What a file of weights ends in.
WEIGHT_FILES = (".pth", ".pt", ".bin", ".safetensors")
