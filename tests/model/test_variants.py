"""Decoders that are not Llama's: against transformers' models with their configs adapted, else the formula as written."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
)

from modelyard.config.architecture import Activation, Architecture, Rotary
from modelyard.data.batch import Batch
from modelyard.errors import UserError
from modelyard.generate.sample import SamplingOptions, generate
from modelyard.model.cache import KeyValueCache
from modelyard.model.decoder import Decoder, OtherMLP
from modelyard.model.init import InitStd, initialize
from modelyard.train.optimizer import Optimizer
from modelyard.train.step import LossOptions, train_step
from modelyard.train.weights import Weights
from tests.model.families import whole_rows

SHAPE = Architecture(61, 32, 2, 4, 2, 8, 40)
STARCODER = replace(SHAPE, gated=False, activation="gelu", norm_type="layer_norm", qkv_bias=True, output_bias=True,
                    mlp_bias=True, tie_word_embeddings=True)  # fmt: skip
VARIANTS = {
    "starcoder2": STARCODER,
    "gpt2": replace(STARCODER, rotary=Rotary("none"), position_embeddings=32),
    "rotary and learned positions": replace(SHAPE, position_embeddings=32),
    "geglu": replace(SHAPE, activation="gelu_exact"),
    "windows from layer 1": replace(SHAPE, window_size=5, full_attention_layers=1),
    "yarn": replace(SHAPE, rotary=Rotary("yarn", scale_factor=4.0, original_context_length=16)),
    "mup": replace(SHAPE, softmax_scale_power=1.0),
    "biases of one kind": replace(SHAPE, output_bias=True, mlp_bias=True),
    "wide residual": replace(SHAPE, full_precision_residual=True),
}


def random_model(architecture: Architecture, dtype: torch.dtype = torch.float64) -> Decoder:
    """Initial weights, with norms and biases that are not ones and zeros."""
    model = Decoder(architecture)
    initialize(model, 0, InitStd.for_architecture(architecture))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.to(dtype)


def random_ids(rows: int, length: int, vocabulary: int = 61) -> Tensor:
    return torch.randint(vocabulary, (rows, length), generator=torch.Generator().manual_seed(1))


# --- against transformers ---------------------------------------------------------------------------------------


def compare(
    reference: nn.Module, architecture: Architecture, named: Callable[[Decoder], dict[str, Tensor]]
) -> None:
    """Logits and every gradient in fp32. `named` takes a decoder, or its gradients, to tensors by the reference's names."""
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            mean = 1.0 if name.endswith(("norm.weight", "ln_1.weight", "ln_2.weight", "ln_f.weight")) else 0.0
            parameter.normal_(mean, 0.2, generator=torch.Generator().manual_seed(len(name)))
    model = Decoder(architecture)
    theirs = dict(reference.named_parameters())
    assert sum(p.numel() for p in theirs.values()) == architecture.parameter_count()
    # `named` is linear in the weights: its transpose, by autograd, is the way back.
    views = named(model)
    assert views.keys() == theirs.keys()
    sum((view * theirs[name].detach()).sum() for name, view in views.items()).backward()  # type: ignore[union-attr]
    with torch.no_grad():
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.copy_(parameter.grad)
            parameter.grad = None
    ids, labels = random_ids(2, 30), random_ids(2, 31)[:, 1:]
    expected = reference(ids).logits
    logits = model.logits(model(ids, *whole_rows(2, 30)))
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    for output in (logits, expected):
        F.cross_entropy(output.flatten(0, 1), labels.flatten()).backward()
    gradients = Decoder(architecture)
    with torch.no_grad():
        for ours, parameter in zip(gradients.parameters(), model.parameters(), strict=True):
            assert parameter.grad is not None
            ours.copy_(parameter.grad)
    for name, gradient in named(gradients).items():
        torch.testing.assert_close(gradient, theirs[name].grad, atol=1e-4, rtol=1e-4, msg=name)


def test_gpt_neox_without_its_parallel_residual() -> None:
    """LayerNorm, biases everywhere, exact GELU, rotary, untied; query, key and value are interleaved by head."""
    reference = GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40,
            hidden_act="gelu", use_parallel_residual=False, max_position_embeddings=64, attn_implementation="sdpa",
            rope_parameters={"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 1.0},
        )
    ).eval()  # fmt: skip

    def named(model: Decoder) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {
            "gpt_neox.embed_in.weight": model.embed_tokens.weight,
            "lm_head.weight": model.lm_head.weight,
        }
        for kind in ("weight", "bias"):
            tensors[f"gpt_neox.final_layer_norm.{kind}"] = getattr(model.norm, kind)
            for i, block in enumerate(model.layers.values()):
                attention, prefix = block.self_attn, f"gpt_neox.layers.{i}"
                parts = [getattr(p, kind) for p in (attention.q_proj, attention.k_proj, attention.v_proj)]
                by_head = torch.stack([part.unflatten(0, (4, 8)) for part in parts], 1)
                tensors |= {
                    f"{prefix}.attention.query_key_value.{kind}": by_head.flatten(0, 2),
                    f"{prefix}.attention.dense.{kind}": getattr(attention.o_proj, kind),
                    f"{prefix}.input_layernorm.{kind}": getattr(block.input_layernorm, kind),
                    f"{prefix}.post_attention_layernorm.{kind}": getattr(
                        block.post_attention_layernorm, kind
                    ),
                    f"{prefix}.mlp.dense_h_to_4h.{kind}": getattr(block.mlp.up_proj, kind),
                    f"{prefix}.mlp.dense_4h_to_h.{kind}": getattr(block.mlp.down_proj, kind),
                }
        return tensors

    architecture = replace(STARCODER, head_groups=4, activation="gelu_exact", tie_word_embeddings=False)
    compare(reference, replace(architecture, rotary=Rotary(theta=500.0)), named)


@pytest.mark.parametrize(("word", "activation"), [("gelu_new", "gelu"), ("relu", "relu")])
def test_gpt2(word: str, activation: Activation) -> None:
    """Learned positions instead of rotary; matrices are stored transposed, query, key and value as one."""
    reference = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_inner=40, n_positions=48, activation_function=word,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )
    ).eval()  # fmt: skip

    def named(model: Decoder) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {
            "transformer.wte.weight": model.embed_tokens.weight,
            "transformer.wpe.weight": model.embed_positions.weight,
        }
        for kind in ("weight", "bias"):
            tensors[f"transformer.ln_f.{kind}"] = getattr(model.norm, kind)
            for i, block in enumerate(model.layers.values()):
                attention, prefix = block.self_attn, f"transformer.h.{i}"
                parts = [getattr(p, kind) for p in (attention.q_proj, attention.k_proj, attention.v_proj)]
                matrices = {
                    f"{prefix}.attn.c_attn.{kind}": torch.cat(parts),
                    f"{prefix}.attn.c_proj.{kind}": getattr(attention.o_proj, kind),
                    f"{prefix}.mlp.c_fc.{kind}": getattr(block.mlp.up_proj, kind),
                    f"{prefix}.mlp.c_proj.{kind}": getattr(block.mlp.down_proj, kind),
                }
                tensors |= {name: matrix.t() for name, matrix in matrices.items()}
                tensors[f"{prefix}.ln_1.{kind}"] = getattr(block.input_layernorm, kind)
                tensors[f"{prefix}.ln_2.{kind}"] = getattr(block.post_attention_layernorm, kind)
        return tensors

    architecture = replace(STARCODER, head_groups=4, rotary=Rotary("none"), position_embeddings=48)
    compare(reference, replace(architecture, activation=activation), named)


@pytest.mark.parametrize("power", [0.0, 0.75, 1.0])
def test_the_power_of_the_softmax_scale_is_granites_multiplier(power: float) -> None:
    reference = GraniteForCausalLM(
        GraniteConfig(
            vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            intermediate_size=40, rms_norm_eps=1e-5, attention_multiplier=8**-power, attn_implementation="sdpa",
            pad_token_id=None, bos_token_id=1, eos_token_id=2,
        )
    ).eval()  # fmt: skip

    def named(model: Decoder) -> dict[str, Tensor]:
        return {
            name if name.startswith("lm_head") else f"model.{name}": p for name, p in model.named_parameters()
        }

    compare(reference, replace(SHAPE, softmax_scale_power=power), named)


# --- against the formula ----------------------------------------------------------------------------------------

FORMULAS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "gelu": lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "gelu_exact": lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))),
    "relu": lambda x: torch.where(x > 0, x, 0.0),
    "squared_relu": lambda x: torch.where(x > 0, x * x, 0.0),
    "identity": lambda x: x,
}


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", FORMULAS)
def test_feed_forwards(activation: Activation, gated: bool) -> None:
    architecture = replace(SHAPE, activation=activation, gated=gated, mlp_bias=True)
    mlp = random_model(architecture).layers["0"].mlp
    assert isinstance(mlp, OtherMLP) or (gated and activation == "silu")
    names = {name.split(".")[0] for name, _ in mlp.named_parameters()}
    assert names == {"up_proj", "down_proj"} | ({"gate_proj"} if gated else set())
    x = torch.randn(7, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weights = dict(mlp.named_parameters())

    def plain() -> Tensor:
        inner = x @ weights["up_proj.weight"].t() + weights["up_proj.bias"]
        if gated:
            inner = (
                FORMULAS[activation](x @ weights["gate_proj.weight"].t() + weights["gate_proj.bias"]) * inner
            )
        else:
            inner = FORMULAS[activation](inner)
        return inner @ weights["down_proj.weight"].t() + weights["down_proj.bias"]

    results = []
    for forward in (lambda: mlp(x), plain):
        mlp.zero_grad()
        out = forward()
        out.square().sum().backward()
        results.append([out, *(p.grad.clone() for p in weights.values() if p.grad is not None)])
    assert len(results[0]) == 1 + len(weights)
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)


def test_layer_norm_is_the_formula() -> None:
    norm = random_model(STARCODER).norm
    x = torch.randn(5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3 + 1
    centred = x - x.mean(-1, keepdim=True)
    expected = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight + norm.bias
    torch.testing.assert_close(norm(x), expected)


@pytest.mark.parametrize("norm_type", ["rms_norm", "layer_norm"])
def test_a_wide_residual_keeps_what_bf16_would_drop(norm_type: str) -> None:
    narrow = replace(SHAPE, num_layers=24, norm_type=norm_type)  # type: ignore[arg-type]
    ids, rows = random_ids(1, 16), whole_rows(1, 16)
    errors, seen = [], set()
    for architecture in (narrow, replace(narrow, full_precision_residual=True)):
        model = random_model(architecture, torch.bfloat16)
        model.layers["5"].register_forward_hook(
            lambda module, arguments, out: seen.add((arguments[0].dtype, out.dtype))
        )
        hidden = model(ids, *rows)
        assert hidden.dtype == torch.bfloat16
        exact = Decoder(narrow).double()
        exact.load_state_dict(model.state_dict())
        errors.append((hidden.double() - exact(ids, *rows)).square().mean().sqrt().item())
        model.logits(hidden).float().square().sum().backward()
        assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.bfloat16}
    assert seen == {(torch.bfloat16, torch.bfloat16), (torch.float32, torch.float32)}
    assert errors[1] < 0.7 * errors[0]


# --- every variant ----------------------------------------------------------------------------------------------

each = pytest.mark.parametrize("architecture", VARIANTS.values(), ids=VARIANTS.keys())


@each
def test_shapes_and_initial_values(architecture: Architecture) -> None:
    model = Decoder(architecture)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert shapes == architecture.parameter_shapes()
    assert architecture.parameter_count() == sum(p.numel() for p in model.parameters())
    initialize(model, 5, InitStd.for_architecture(architecture))
    for name, value in model.named_parameters():
        if value.ndim == 1:
            assert value.eq(0.0 if name.endswith("bias") else 1.0).all(), name
        else:
            output = "o_proj" in name or "down_proj" in name
            assert value.std().item() == pytest.approx(32**-0.5 / (2 if output else 1), rel=0.1), name


@each
def test_decoding_with_a_cache_and_packing_change_nothing(architecture: Architecture) -> None:
    model = random_model(architecture)
    ids, (positions, cu_seqlens) = random_ids(1, 32), whole_rows(1, 32)
    with torch.no_grad():
        expected = model(ids, positions, cu_seqlens)
        cache = KeyValueCache(architecture)
        parts = []
        for begin, end in [(0, 9), (9, 16), (16, 17), (17, 32)]:
            part = torch.tensor([[0, end - begin]], dtype=torch.int32)
            parts.append(model(ids[:, begin:end], positions[:, begin:end], part, cache))
        torch.testing.assert_close(torch.cat(parts, 1), expected)

        restarted = torch.cat([torch.arange(20), torch.arange(12)])[None]
        packed = model(ids, restarted, torch.tensor([[0, 20, 32]], dtype=torch.int32))
        alone = model(ids[:, 20:], *whole_rows(1, 12))
        torch.testing.assert_close(packed[:, 20:], alone)


@each
def test_it_learns_a_batch_by_heart(architecture: Architecture) -> None:
    model = Decoder(architecture)
    initialize(model, 0, InitStd.for_architecture(architecture))
    weights = Weights(model, torch.bfloat16)
    optimizer = Optimizer(weights.master, weight_decay=0.1, betas=(0.9, 0.95), epsilon=1e-8)
    tokens = random_ids(2, 33)
    batch = Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), *whole_rows(2, 32))
    before = {name: p.detach().clone() for name, p in weights.master.items()}
    losses = [
        train_step(
            model, weights, optimizer, batch, learning_rate=0.01, micro_batch_size=1, max_norm=1.0,
            loss_options=LossOptions(), device=torch.device("cpu"),
        ).loss
        for _ in range(12)
    ]  # fmt: skip
    assert losses[0] == pytest.approx(math.log(61), rel=0.2)
    assert losses[-1] < 0.6 * losses[0]
    assert [name for name, p in weights.master.items() if torch.equal(p, before[name])] == []


def test_windows_begin_at_their_layer() -> None:
    """A change of the first token reaches everything through the first layer, and through windows only the next four."""
    changed = random_ids(1, 20).clone()
    changed[0, 0] = (changed[0, 0] + 1) % 61

    def reached(full_attention_layers: int) -> list[bool]:
        shape = replace(SHAPE, num_layers=1, window_size=5, full_attention_layers=full_attention_layers)
        model = random_model(shape)
        difference = model(changed, *whole_rows(1, 20)) - model(random_ids(1, 20), *whole_rows(1, 20))
        return (difference[0].abs().amax(-1) > 1e-9).tolist()

    assert reached(0) == [True] * 5 + [False] * 15
    assert reached(1) == [True] * 20


def test_limits_of_initial_weights() -> None:
    limits = {"mlp_in": (-0.1, 0.05), "embedding": (None, 0.2), "qkv": (None, None)}
    std = InitStd.for_architecture(SHAPE, limits=limits)
    limited, free = Decoder(SHAPE), Decoder(SHAPE)
    initialize(limited, 1, std)
    initialize(free, 1, InitStd.for_architecture(SHAPE))
    for (name, value), other in zip(limited.named_parameters(), free.parameters(), strict=True):
        if "gate_proj" in name or "up_proj" in name:
            assert torch.equal(value, other.clamp(-0.1, 0.05))
            assert value.eq(0.05).any()
        elif "embed" in name or "lm_head" in name:
            assert torch.equal(value, other.clamp(max=0.2))
        else:
            assert torch.equal(value, other)


def test_arithmetic_of_a_shape() -> None:
    """By hand: hidden 32, 4 heads of 8 in 2 groups, feed-forward 40, 2 layers, vocabulary 61."""
    attention = 32 * 32 + 2 * 32 * 16 + 32 * 32
    assert SHAPE.matmul_flops_per_token() == 6 * (2 * (attention + 3 * 32 * 40) + 61 * 32)
    assert STARCODER.matmul_flops_per_token() == 6 * (2 * (attention + 2 * 32 * 40) + 61 * 32)
    norms, biases = 5 * 2 * 32, 2 * (32 + 16 + 16 + 32 + 40 + 32)
    assert STARCODER.parameter_count() == 61 * 32 + 2 * (attention + 2 * 32 * 40) + norms + biases
    assert replace(STARCODER, position_embeddings=9).parameter_count() == STARCODER.parameter_count() + 9 * 32
    full = 12 * 2 * 4 * 8 * 100
    assert SHAPE.attention_flops_per_token(100, causal=False) == full
    assert SHAPE.attention_flops_per_token(100, causal=True) == full // 2
    window = replace(
        SHAPE, window_size=20
    )  # 20 keys but for the first rows: 20 - 20 * 20 / 200 = 18 on average
    assert window.attention_flops_per_token(100, causal=True) == full * 18 // 100
    half = replace(window, full_attention_layers=1)
    assert half.attention_flops_per_token(100, causal=True) == full * (18 + 50) // 200
    assert half.attention_flops_per_token(100, causal=False) == full * (20 + 100) // 200
    assert window.attention_flops_per_token(10, causal=True) == SHAPE.attention_flops_per_token(
        10, causal=True
    )


def test_text_ends_with_the_last_learned_position() -> None:
    model = random_model(VARIANTS["gpt2"], torch.float32)
    assert len(list(generate(model, [1] * 30, SamplingOptions(max_new_tokens=50, temperature=0)))) == 3
    assert len(list(generate(model, [1] * 32, SamplingOptions(max_new_tokens=50, temperature=0)))) == 1
    with pytest.raises(UserError, match="the prompt has 33 tokens, the model 32 learned positions"):
        next(generate(model, [1] * 33, SamplingOptions()))
