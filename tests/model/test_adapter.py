"""Adapters against PEFT on the same weights, and what an adapted decoder promises."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from modelyard.config.adapter import MODULES, Adapter, Quantization
from modelyard.config.architecture import Architecture
from modelyard.model.adapter import AdaptedLinear, AdaptedWeights, adapt, adapter_off, is_quantized_part
from modelyard.model.decoder import Decoder
from modelyard.model.formats.huggingface import huggingface_name
from modelyard.model.init import DrawnWeights, InitStd
from modelyard.model.nf4 import dequantize, quantize
from modelyard.parallel.apply import Parallel, parallelize
from modelyard.parallel.mesh import alone
from tests.model.families import ours, reference_model

SHAPE = Architecture(
    vocab_size=50,
    hidden_size=64,
    num_layers=2,
    num_attention_heads=4,
    head_groups=2,
    head_size=16,
    ffn_hidden_size=128,
    qkv_bias=True,
)
LORA = Adapter(rank=4, alpha=8.0, modules=MODULES)
NF4 = Quantization(16)


class InMemory:
    """A source of weights."""

    def __init__(self, tensors: dict[str, Tensor]):
        self._tensors = tensors

    def load(self, name: str) -> Tensor:
        return self._tensors[name]


def drawn(architecture: Architecture) -> dict[str, Tensor]:
    source = DrawnWeights(architecture, InitStd.for_architecture(architecture), 5, torch.device("cpu"))
    return {name: source.load(name) for name in source.names()}


def adapted(
    base: dict[str, Tensor],
    architecture: Architecture,
    adapter: Adapter,
    *,
    first: dict[str, Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Parallel:
    weights: Any = AdaptedWeights(
        InMemory(base),  # type: ignore[arg-type]
        adapter,
        seed=1,
        dtype=dtype,
        device=torch.device("cpu"),
        first=None if first is None else InMemory(first),  # type: ignore[arg-type]
    )
    run = parallelize(
        architecture,
        alone(),
        compute_dtype=dtype,
        recompute="none",
        compile=False,
        sequence_length=16,
        fill=weights.fill,
        frozen=frozenset(architecture.parameter_shapes()) if adapter.freeze_others else frozenset(),
        adapter=adapter,
    )
    run.weights.publish()
    return run


def random_adapter(
    adapter: Adapter, architecture: Architecture, base: dict[str, Tensor]
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    found = {}
    for name, shape in adapter.shapes(architecture).items():
        found[name] = torch.randn(shape, generator=generator) * 0.1
        if name.endswith("lora_magnitude"):
            lengths = base[name.replace("lora_magnitude", "weight")].norm(dim=1)
            found[name] = lengths * (1 + found[name])
    return found


def rows(vocabulary: int) -> tuple[Tensor, Tensor, Tensor]:
    """ids, positions and boundaries of two rows of one document each."""
    ids = torch.randint(0, vocabulary, (2, 12), generator=torch.Generator().manual_seed(4))
    return ids, torch.arange(12).repeat(2, 1), torch.tensor([[0, 12], [0, 12]], dtype=torch.int32)


# --- against PEFT -----------------------------------------------------------------------------------------------

THEIR_PART = {
    "lora_A": "lora_A.default.weight",
    "lora_B": "lora_B.default.weight",
    "lora_magnitude": "lora_magnitude_vector.default.weight",
}


def peft_of(
    reference: Any, adapter: Adapter, family: str, first: dict[str, Tensor]
) -> tuple[Any, dict[str, str]]:
    """The reference with PEFT's adapter of these values, and the name of each of our parameters there."""
    peft = pytest.importorskip("peft")
    modules = {huggingface_name(f"x.mlp.{m}.", family).split(".")[-2] for m in adapter.modules}
    config = peft.LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        target_modules=sorted(modules),
        use_rslora=adapter.rank_stabilized,
        use_dora=adapter.dora,
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(reference, config)
    theirs = dict(model.named_parameters())
    names = {}
    with torch.no_grad():
        for name, value in first.items():
            matrix, _, part = name.rpartition(".")
            names[name] = f"base_model.model.{huggingface_name(matrix + '.', family)}{THEIR_PART[part]}"
            theirs[names[name]].copy_(value)
    assert {name for name, p in theirs.items() if p.requires_grad} == set(names.values())
    return model, names


@pytest.mark.parametrize(
    ("family", "adapter"),
    [
        ("llama-3", LORA),
        ("llama-3", replace(LORA, rank=3, alpha=1.0, modules=("q_proj", "v_proj"))),
        ("qwen2", replace(LORA, rank_stabilized=True)),
        ("qwen2", replace(LORA, dora=True)),
        ("llama-biases", replace(LORA, dora=True, modules=("o_proj", "down_proj"))),
        ("starcoder2", replace(LORA, modules=("q_proj", "up_proj", "down_proj"))),
    ],
)
def test_logits_and_gradients_are_those_of_peft(family: str, adapter: Adapter) -> None:
    reference = reference_model(family)
    decoder = ours(reference)
    architecture = decoder.architecture
    base = {name: p.detach().clone() for name, p in decoder.named_parameters()}
    first = random_adapter(adapter, architecture, base)
    theirs, names = peft_of(reference, adapter, reference.config.model_type, first)
    run = adapted(base, architecture, adapter, first=first)
    model = run.models[0]
    ids, positions, boundaries = rows(architecture.vocab_size)
    weights = torch.randn(2, 12, architecture.vocab_size, generator=torch.Generator().manual_seed(6))

    logits = model.logits(model(ids, positions, boundaries))
    expected = theirs(ids).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4 * float(expected.detach().abs().max()))
    (logits * weights).sum().backward()
    (expected * weights).sum().backward()
    own, of_peft = dict(model.named_parameters()), dict(theirs.named_parameters())
    assert {name for name, p in own.items() if p.grad is not None} == set(names)
    for name, their_name in names.items():
        gradient, wanted = own[name].grad, of_peft[their_name].grad
        assert gradient is not None
        difference = float((gradient - wanted).abs().max() / wanted.abs().max())
        assert difference < 1e-4, f"{name}: {difference:.2g}"


def test_a_new_adapter_begins_as_pefts() -> None:
    """A within in^-0.5 of 0 and spread evenly, B zero: the model is the base's to the bit."""
    base = drawn(SHAPE)
    model = adapted(base, SHAPE, LORA).models[0]
    inputs = rows(SHAPE.vocab_size)
    with torch.no_grad():
        with adapter_off(model):
            expected = model(*inputs)
        assert torch.equal(model(*inputs), expected)
    a = torch.cat(
        [p.flatten() * p.shape[1] ** 0.5 for n, p in model.named_parameters() if n.endswith("lora_A")]
    )
    assert float(a.detach().abs().max()) <= 1
    assert abs(float(a.detach().var()) - 1 / 3) < 0.02  # of a uniform distribution on [-1, 1]
    again = adapted(base, SHAPE, LORA).models[0]
    for (name, one), two in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(one, two), name
        assert not name.endswith("lora_B") or not one.any(), name


def test_a_new_dora_is_the_base_within_rounding() -> None:
    base = drawn(SHAPE)
    model = adapted(base, SHAPE, replace(LORA, dora=True)).models[0]
    inputs = rows(SHAPE.vocab_size)
    with torch.no_grad():
        with adapter_off(model):
            expected = model(*inputs)
        torch.testing.assert_close(model(*inputs), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("quantization", [None, NF4])
def test_new_magnitudes_are_the_lengths_of_what_is_computed_with(quantization: Quantization | None) -> None:
    """Of a base in fp32 that is rounded to bf16, or to four bits, the rounded rows'."""
    base = drawn(SHAPE)
    adapter = replace(LORA, dora=True, quantization=quantization)
    run = adapted(base, SHAPE, adapter, dtype=torch.bfloat16)
    for name, magnitude in run.weights.master.items():
        if name.endswith("lora_magnitude"):
            weight = base[name.replace("lora_magnitude", "weight")]
            if quantization is None:
                used = weight.bfloat16().float()
            else:
                used = dequantize(quantize(weight, 16), torch.float32)
            assert torch.equal(magnitude, torch.linalg.vector_norm(used, dim=1)), name
            assert not torch.equal(magnitude, torch.linalg.vector_norm(weight, dim=1)), name


# --- the base ---------------------------------------------------------------------------------------------------


def test_adapter_off_is_the_base_to_the_bit_and_on_again_after() -> None:
    base = drawn(SHAPE)
    first = random_adapter(LORA, SHAPE, base)
    model = adapted(base, SHAPE, LORA, first=first).models[0]
    plain = Decoder(SHAPE)
    plain.load_state_dict(base)
    inputs = rows(SHAPE.vocab_size)
    with torch.no_grad():
        with_adapter = model(*inputs)
        with adapter_off(model):
            assert torch.equal(model(*inputs), plain(*inputs))
        assert torch.equal(model(*inputs), with_adapter)
        assert not torch.equal(with_adapter, plain(*inputs))
        with pytest.raises(RuntimeError, match="stop"), adapter_off(model):
            raise RuntimeError("stop")
        assert torch.equal(model(*inputs), with_adapter)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantization", [None, NF4])
def test_a_frozen_base_has_no_master_no_gradient_and_no_second_copy(
    dtype: torch.dtype, quantization: Quantization | None
) -> None:
    adapter = replace(LORA, quantization=quantization)
    run = adapted(drawn(SHAPE), SHAPE, adapter, dtype=dtype)
    model, own = run.models[0], adapter.shapes(SHAPE)
    # x^2, so that there is a gradient before B has moved
    model(*rows(SHAPE.vocab_size)).square().sum().backward()
    for name, parameter in model.named_parameters():
        master = run.weights.master[name]
        assert parameter.dtype == dtype, name
        if name in own:
            assert master.dtype == torch.float32
            assert master.grad is not None, name
        else:
            assert master is parameter, name
            assert master.grad is None, name


def test_beside_its_adapter_the_base_is_trained_where_it_is_wanted() -> None:
    adapter = replace(LORA, freeze_others=False)
    run = adapted(drawn(SHAPE), SHAPE, adapter)
    run.models[0](*rows(SHAPE.vocab_size)).square().sum().backward()
    missing = [n for n, p in run.models[0].named_parameters() if p.grad is None]
    assert missing == ["lm_head.weight"]  # which was not used


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("double", [False, True])
def test_a_quantized_base_computes_with_what_dequantize_gives(dtype: torch.dtype, double: bool) -> None:
    # Eight scales a row, so that they can be held as numbers of eight bytes.
    shape = replace(SHAPE, hidden_size=128, head_size=32)
    base = drawn(shape)
    adapter = replace(LORA, quantization=Quantization(16, double=double))
    first = random_adapter(adapter, shape, base)
    run = adapted(base, shape, adapter, first=first, dtype=dtype)
    model = run.models[0]
    reference = {
        name: dequantize(quantize(w.to(torch.promote_types(dtype, torch.float32)), 16, double), dtype)
        if name.endswith("_proj.weight")
        else w
        for name, w in base.items()
    }
    same = adapted(reference, shape, LORA, first=first, dtype=dtype)
    plain = same.models[0]
    inputs = rows(shape.vocab_size)
    hidden, expected = model(*inputs), plain(*inputs)
    assert torch.equal(hidden, expected)
    bytes_held = sum(p.nbytes for n, p in model.named_parameters() if is_quantized_part(n))
    weights = sum(w.numel() for n, w in base.items() if n.endswith("_proj.weight"))
    # Four bits a weight; a scale for 16 of four bytes (eight in fp64), or one byte and two numbers a row.
    scale_bytes = 1 if double else 8 if dtype == torch.float64 else 4
    rows_of_all = sum(w.shape[0] for n, w in base.items() if n.endswith("_proj.weight"))
    spans = rows_of_all * (16 if dtype == torch.float64 else 8) if double else 0
    assert bytes_held == weights // 2 + weights // 16 * scale_bytes + spans
    hidden.square().sum().backward()
    expected.square().sum().backward()
    for name in first:
        gradient, other = run.weights.master[name].grad, same.weights.master[name].grad
        assert gradient is not None
        assert other is not None
        bound = 3e-2 if dtype == torch.bfloat16 else 1e-5
        assert float((gradient - other).abs().max()) <= bound * float(other.abs().max()), name


def test_only_the_named_matrices_are_adapted() -> None:
    with torch.device("meta"):
        model = Decoder(SHAPE)
    adapt(model, replace(LORA, modules=("v_proj",)), torch.float32)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, AdaptedLinear)}
    assert len(layers) == 14
    assert {name for name, module in layers.items() if module.lora_A is not None} == {
        "layers.0.self_attn.v_proj",
        "layers.1.self_attn.v_proj",
    }
