"""The decoder, read top to bottom: Llama 2 and 3, Mistral, Qwen 2, StarCoder 2 and what has their shape.

Parameters have the logical names of `Architecture.parameter_shapes`. Inside, rows are laid end to end: tensors are
[tokens, ...], and attention is told where documents begin.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modelyard.config.architecture import Architecture
from modelyard.dtypes import wide
from modelyard.errors import UserError
from modelyard.model import attention
from modelyard.model.activations import ACTIVATIONS
from modelyard.model.attention import Backend, Segments, flatten_boundaries, one_document
from modelyard.model.cache import KeyValueCache, LayerCache
from modelyard.model.dropout import token_words
from modelyard.model.elementwise import rms_norm, rms_norm_of_sum, rotate_both, swiglu
from modelyard.model.recompute import cheap, made_by
from modelyard.model.rotary import rotary_table

if TYPE_CHECKING:
    from modelyard.loss.vocabulary import Vocabulary


class Context(NamedTuple):
    """What every block of one forward shares."""

    attend: attention.Attention
    rotary: tuple[Tensor, Tensor] | None
    """cos and sin, each [tokens, 1, head_size / 2]."""
    numbers: Tensor | None = None
    """Which tokens these are, int64 [tokens] (`modelyard.model.dropout`); None where nothing is left out."""


def local(parameter: Tensor) -> Tensor:
    """A parameter as computations take it: where a layout has split it (a DTensor), this process's part."""
    # Asked of the type: of the tensor itself a compiler does not see it.
    is_split = hasattr(type(parameter), "to_local")
    return parameter.to_local() if is_split else parameter  # type: ignore[attr-defined]


class RMSNorm(nn.Module):
    def __init__(self, size: int, epsilon: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        return cheap(self.normalize, x)

    def normalize(self, x: Tensor) -> Tensor:
        # The cast does nothing but after a residual stream that is wider than the weights.
        return rms_norm(x, local(self.weight), self.epsilon).to(self.weight.dtype)

    def of_sum(self, x: Tensor, added: Tensor) -> tuple[Tensor, Tensor]:
        """x + added, and its norm."""
        if type(self).normalize is not RMSNorm.normalize:  # a layout does more in it
            total = x + added
            return total, self(total)
        total, normal = rms_norm_of_sum(x, added, local(self.weight), self.epsilon)
        return total, made_by(self.normalize, total, output=normal.to(self.weight.dtype))


class LayerNorm(nn.Module):
    """Mean and variance of the last dimension taken out, then a weight and a bias (arXiv 1607.06450)."""

    def __init__(self, size: int, epsilon: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        return cheap(self.normalize, x)

    def normalize(self, x: Tensor) -> Tensor:
        weight, bias = local(self.weight).to(x.dtype), local(self.bias).to(x.dtype)
        return F.layer_norm(x, weight.shape, weight, bias, self.epsilon).to(self.weight.dtype)

    def of_sum(self, x: Tensor, added: Tensor) -> tuple[Tensor, Tensor]:
        """x + added, and its norm."""
        total = x + added
        return total, self(total)


def normalization(architecture: Architecture) -> RMSNorm | LayerNorm:
    """A norm of the hidden states."""
    kind = LayerNorm if architecture.norm_type == "layer_norm" else RMSNorm
    return kind(architecture.hidden_size, architecture.norm_epsilon)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions, inside documents."""

    def __init__(self, architecture: Architecture, layer: int = 0):
        super().__init__()
        hidden, self.head_size = architecture.hidden_size, architecture.head_size
        query = architecture.num_attention_heads * self.head_size
        key_value = architecture.head_groups * self.head_size
        self.window = architecture.window_of(layer)
        # `attend` divides the scores by the root of the head's width; any other power is brought in by the queries.
        self.query_scale = self.head_size ** (0.5 - architecture.softmax_scale_power)
        self.q_proj = nn.Linear(hidden, query, bias=architecture.qkv_bias)
        self.k_proj = nn.Linear(hidden, key_value, bias=architecture.qkv_bias)
        self.v_proj = nn.Linear(hidden, key_value, bias=architecture.qkv_bias)
        self.o_proj = nn.Linear(query, hidden, bias=architecture.output_bias)

    def project(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        """x [tokens, hidden] -> rotated queries [tokens, heads, head_size], keys and values [tokens, groups, head_size]."""
        # The number of heads is taken from the width: a tensor-parallel rank holds some of them.
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.head_size))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if rotary is not None:
            q, k = rotate_both(q, k, *rotary)
        if self.query_scale != 1:
            q = q * self.query_scale
        return q, k, v


class MLP(nn.Module):
    """The gated feed-forward: down(silu(gate(x)) * up(x))."""

    def __init__(self, architecture: Architecture):
        super().__init__()
        hidden, inner, bias = architecture.hidden_size, architecture.ffn_hidden_size, architecture.mlp_bias
        self.gate_proj = nn.Linear(hidden, inner, bias=bias)
        self.up_proj = nn.Linear(hidden, inner, bias=bias)
        self.down_proj = nn.Linear(inner, hidden, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(cheap(swiglu, self.gate_proj(x), self.up_proj(x)))


class OtherMLP(nn.Module):
    """A feed-forward of any activation: down(act(up(x))), or gated: down(act(gate(x)) * up(x))."""

    def __init__(self, architecture: Architecture):
        super().__init__()
        hidden, inner, bias = architecture.hidden_size, architecture.ffn_hidden_size, architecture.mlp_bias
        self.activation = ACTIVATIONS[architecture.activation]
        self.gate_proj = nn.Linear(hidden, inner, bias=bias) if architecture.gated else None
        self.up_proj = nn.Linear(hidden, inner, bias=bias)
        self.down_proj = nn.Linear(inner, hidden, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate_proj is None:
            inner = cheap(self.activation, self.up_proj(x), keeps_more=True)
        else:
            inner = cheap(self.gate, self.gate_proj(x), self.up_proj(x), keeps_more=True)
        return self.down_proj(inner)

    def gate(self, gate: Tensor, up: Tensor) -> Tensor:
        return self.activation(gate) * up


def feed_forward(architecture: Architecture) -> nn.Module:
    is_swiglu = architecture.gated and architecture.activation == "silu"
    return MLP(architecture) if is_swiglu else OtherMLP(architecture)


class TakesWords(Protocol):
    """A matrix that leaves some of its inputs out."""

    words: Tensor | None
    """Of `token_words`: which they are in the forward that runs; None: none."""


class Block(nn.Module):
    with_dropout: Sequence[TakesWords] = ()

    def __init__(self, architecture: Architecture, layer: int = 0):
        super().__init__()
        self.layer = layer
        self.input_layernorm = normalization(architecture)
        self.self_attn = Attention(architecture, layer)
        self.post_attention_layernorm = normalization(architecture)
        self.mlp = feed_forward(architecture)

    def forward(self, x: Tensor, context: Context, cache: LayerCache | None = None) -> Tensor:
        """x [tokens, hidden] -> [tokens, hidden].

        Attention is all that depends on where documents lie; what comes before and after it has fixed shapes, and can
        be compiled (`compile_blocks`).
        """
        if self.with_dropout:
            words = None if context.numbers is None else token_words(context.numbers, self.layer)
            for matrix in self.with_dropout:
                matrix.words = words
        q, k, v = self.before_attention(x, context.rotary)
        if cache is not None:
            k, v = cache.append(k, v)
        return self.after_attention(x, context.attend(q, k, v, window=self.self_attn.window))

    def before_attention(
        self, x: Tensor, rotary: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x [tokens, hidden] -> q, k and v as `attend` takes them."""
        return self.self_attn.project(self.input_layernorm(x), rotary)

    def after_attention(self, x: Tensor, attended: Tensor) -> Tensor:
        """The residual stream x [tokens, hidden] and the attention's [tokens, heads, head_size] -> [tokens, hidden]."""
        x, normal = self.post_attention_layernorm.of_sum(x, self.self_attn.o_proj(attended.flatten(1)))
        return x + self.mlp(normal)


class Decoder(nn.Module):
    """Token ids to hidden states after the final norm; `logits` takes those to the vocabulary.

    Given some of the `layers`, it is that part of the decoder, its blocks named by their numbers in the whole: the part
    with the first block (0) takes token ids, the part with the last one ends in the norm and head, and hidden states
    [tokens, hidden] go from part to part.

    Build it under `torch.device("meta")` and fill it with `initialize` or `load_weights`. `backend` chooses the
    attention (see `attend`). `rotary_dtype` is None (fp32, or fp64 in an fp64 model) except where the roundings of
    another implementation are wanted: transformers rotates in the weights' dtype.
    """

    def __init__(self, architecture: Architecture, *, backend: Backend = "auto", layers: range | None = None):
        super().__init__()
        layers = range(architecture.num_layers) if layers is None else layers
        if architecture.activation not in ACTIVATIONS:
            raise UserError(
                f"activation '{architecture.activation}' is not supported (there are: {', '.join(ACTIVATIONS)})"
            )
        self.architecture = architecture
        self.backend: Backend = backend
        self.rotary_dtype: torch.dtype | None = None
        self.boundaries: Callable[[Tensor, int, torch.device], attention.Attention] = self.whole_rows
        """(cu_seqlens, sequence_length, device) -> the attention of a forward. A layout that splits rows has its own."""
        self.vocabulary: Vocabulary | None = None
        """Which words' rows of the head are here, where a layout splits it; None: all."""
        self.is_first, self.is_last = layers.start == 0, layers.stop == architecture.num_layers
        if self.is_first or (self.is_last and architecture.tie_word_embeddings):
            self.embed_tokens = nn.Embedding(architecture.vocab_size, architecture.hidden_size)
        if self.is_first and architecture.position_embeddings is not None:
            self.embed_positions = nn.Embedding(architecture.position_embeddings, architecture.hidden_size)
        self.layers = nn.ModuleDict({str(layer): Block(architecture, layer) for layer in layers})
        if self.is_last:
            self.norm = normalization(architecture)
            if not architecture.tie_word_embeddings:
                self.lm_head = nn.Linear(architecture.hidden_size, architecture.vocab_size, bias=False)

    @property
    def output_weight(self) -> Tensor:
        """The head's matrix [vocabulary, hidden], or the rows of it that `vocabulary` says: the embedding itself where they
        are tied."""
        return local(
            self.embed_tokens.weight if self.architecture.tie_word_embeddings else self.lm_head.weight
        )

    def forward(
        self,
        inputs: Tensor,
        positions: Tensor,
        cu_seqlens: Tensor,
        cache: KeyValueCache | None = None,
        numbers: Tensor | None = None,
    ) -> Tensor:
        """Token ids and positions int64 [rows, sequence] -> hidden states [rows, sequence, hidden].

        A part that is not the first takes hidden states [tokens, hidden] for the ids; one that is not the last gives them.
        cu_seqlens int32 [rows, max_documents + 1], on the host: where each row's documents begin (see
        `flatten_boundaries`). With a `cache` the row continues the tokens that the cache holds. `numbers` int64 [rows,
        sequence] tell tokens apart to a dropout (`token_numbers`); without there is none.
        """
        x = self.embed(inputs, positions) if self.is_first else inputs
        if cache is None:
            attend = self.boundaries(cu_seqlens, positions.shape[1], x.device)
        else:
            queries = flatten_boundaries(cu_seqlens, positions.shape[1], x.device)
            keys = one_document(cache.length + positions.numel(), x.device)
            attend = Segments(queries, keys, self.backend)
        table = rotary_table(
            self.architecture.rotary,
            self.architecture.head_size,
            positions.flatten(),
            dtype=self.rotary_dtype or wide(x.dtype),
        )
        context = Context(attend, table, None if numbers is None else numbers.flatten())
        for number, layer in self.layers.items():
            x = layer(x, context, cache.layers[int(number)] if cache is not None else None)
        return self.norm(x).view(*positions.shape, -1) if self.is_last else x

    def embed(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        """int64 [rows, sequence] -> the first block's input [tokens, hidden]."""
        x = self.embed_tokens(input_ids.flatten())
        if self.architecture.position_embeddings is not None:
            x = x + self.embed_positions(positions.flatten())
        return x.to(wide(x.dtype)) if self.architecture.full_precision_residual else x

    def whole_rows(self, cu_seqlens: Tensor, sequence_length: int, device: torch.device) -> Segments:
        """Attention inside the documents of rows that are all here."""
        documents = flatten_boundaries(cu_seqlens, sequence_length, device)
        return Segments(documents, documents, self.backend)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., hidden] -> [..., vocabulary], scaled as the architecture says. Without a gradient where words are split."""
        logits = F.linear(hidden, self.output_weight)
        if self.vocabulary is not None:
            logits = self.vocabulary.gather(logits)
        return logits if self.architecture.logits_scale == 1 else logits * self.architecture.logits_scale
