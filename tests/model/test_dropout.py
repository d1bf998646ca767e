"""Dropout by a hash: its values, that they are as good as drawn, and that a decoder finds the same ones again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import get_args

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from modelyard.config.adapter import MODULES, Adapter
from modelyard.config.layout import Recompute
from modelyard.model.adapter import AdaptedLinear, adapt, adapter_off
from modelyard.model.compile import compile_blocks
from modelyard.model.decoder import Decoder
from modelyard.model.dropout import dropped_product, keep_mask, token_numbers, token_words
from modelyard.model.init import key
from modelyard.model.offload import Offload
from modelyard.model.recompute import recompute_blocks
from tests.model.copies import Late
from tests.model.test_adapter import LORA, SHAPE, rows

# --- values -----------------------------------------------------------------------------------------------------


def by_hand(number: int, block: int, matrix: str, feature: int) -> int:
    """The hash of one input in Python's integers, from its description."""

    def unsigned(x: int) -> int:
        return x & 0xFFFFFFFF

    def signed(x: int) -> int:
        return unsigned(x) - 2**32 if unsigned(x) >= 2**31 else unsigned(x)

    def mixed(x: int) -> int:
        x = unsigned(x)
        x = unsigned((x ^ x >> 16) * 0x21F0AAAD)
        x = unsigned((x ^ x >> 15) * 0xD35A2D97)
        return x ^ x >> 15

    def constants(*what: str | int) -> tuple[int, int]:
        given = key(0, "dropout", *what)
        return unsigned(unsigned(given) - 2**31), unsigned(unsigned(given >> 31) - 2**31)

    low, high = unsigned(number), unsigned(number >> 32)
    one, other = constants("block", block)
    a = mixed(mixed(low ^ one) ^ high)
    b = mixed(mixed(high ^ other) ^ low) | 1
    one, other = constants("matrix", matrix)
    c = mixed(mixed(feature ^ one) ^ other)
    # From here on shifts bring the sign along.
    h = signed((a ^ c) * b)
    h = signed((h ^ h >> 16) * 0xD35A2D97)
    return h ^ h >> 15


@pytest.mark.parametrize("p", [0.05, 0.5])
def test_an_input_is_left_out_where_its_hash_is_below_p(p: float) -> None:
    numbers = torch.tensor([0, 1, 2**31 - 1, 2**31, 2**32, 2**32 + 1, key(1, "x") >> 1, 2**62])
    for block, matrix, first in ((0, "q_proj", 0), (0, "down_proj", 0), (7, "q_proj", 100)):
        mask = keep_mask(token_words(numbers, block), matrix, first, 50, p)
        expected = [
            [by_hand(n, block, matrix, first + f) / 2**31 >= p for f in range(50)] for n in numbers.tolist()
        ]
        assert mask.tolist() == expected
        assert 0 < mask.sum() < mask.numel()


def test_values_never_change() -> None:
    """A run that goes on under a later version leaves out what it would have."""
    hashes = [249653336, 1445591692, 1382706730, 211564539]
    assert [by_hand(5, 1, "up_proj", feature) for feature in range(4)] == hashes
    mask = keep_mask(token_words(torch.arange(3), 2), "v_proj", 0, 24, 0.25)
    assert ["".join(map(str, row)) for row in mask.int().tolist()] == [
        "001010101111111001111100",
        "111111111111111101011011",
        "001011111111110011100111",
    ]
    first = 1437123998127726295 + 2 * 4
    assert token_numbers(3, 2, 2, 4).tolist() == [[first + i for i in row] for row in (range(4), range(4, 8))]


def test_what_is_kept_is_scaled() -> None:
    words = token_words(torch.arange(300), 0)
    mask = keep_mask(words, "o_proj", 3, 500, 0.2)
    generator = torch.Generator().manual_seed(0)
    x, a, weight = (
        torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()
        for shape in ((300, 500), (7, 500), (300, 7))
    )
    low = dropped_product(x, a, words, "o_proj", 3, 0.2)
    expected = (x * mask * 1.25) @ a.t()
    torch.testing.assert_close(low, expected)
    got = torch.autograd.grad((low * weight).sum(), (x, a))
    for ours, theirs in zip(got, torch.autograd.grad((expected * weight).sum(), (x, a)), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_only_the_inputs_are_kept_for_the_backward() -> None:
    x, a = torch.randn(8, 16, requires_grad=True), torch.randn(2, 16, requires_grad=True)
    words, kept = token_words(torch.arange(8), 0), list[int]()

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        dropped_product(x, a, words, "q_proj", 0, 0.1)
    assert kept == [x.data_ptr(), a.data_ptr(), words.data_ptr()]


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_the_same_inputs_are_left_out(backend: str) -> None:
    torch._dynamo.reset()
    words = token_words(token_numbers(1, 0, 2, 32).flatten(), 4)
    x = torch.randn(64, 96, generator=torch.Generator().manual_seed(0)).requires_grad_()
    every = torch.eye(96, requires_grad=True)  # so that each input shows
    compiled = torch.compile(dropped_product, fullgraph=True, dynamic=False, backend=backend)
    results = []
    for function in (dropped_product, compiled):
        y = function(x, every, words, "up_proj", 5, 0.5)
        results.append((y, *torch.autograd.grad((y * x.detach()).sum(), (x, every))))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected)
        assert torch.equal(ours != 0, expected != 0)


# --- as good as drawn -------------------------------------------------------------------------------------------

TOKENS, FEATURES = 4096, 1024


def share(left_out: Tensor, p: float) -> float:
    """How far the share of what is left out is from p, in standard deviations of one that is drawn."""
    return float(left_out.double().mean() - p) / (p * (1 - p) / left_out.numel()) ** 0.5


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_a_share_p_is_left_out(p: float) -> None:
    worst = 0.0
    for block, matrix in ((0, "q_proj"), (1, "q_proj"), (31, "gate_proj"), (31, "down_proj")):
        numbers = token_numbers(block, 100 * block, TOKENS // 256, 256).flatten()
        left_out = ~keep_mask(token_words(numbers, block), matrix, 0, FEATURES, p)
        worst = max(worst, abs(share(left_out, p)))
        for dimension in (0, 1):  # of every feature and every token, too
            rates = left_out.double().mean(dimension)
            z = (rates - p) / (p * (1 - p) / left_out.shape[dimension]) ** 0.5
            assert abs(float(z.std()) - 1) < 0.08
    assert worst < 4


def test_neither_neighbours_nor_pairs_of_tokens_or_features_go_together() -> None:
    p = 0.1
    numbers = token_numbers(9, 5, TOKENS // 256, 256).flatten()
    d = ((~keep_mask(token_words(numbers, 3), "k_proj", 0, FEATURES, p)).double() - p) / (p * (1 - p)) ** 0.5

    def correlation(a: Tensor, b: Tensor) -> float:
        return abs(float((a * b).mean())) * a.numel() ** 0.5

    for step in (1, 2, 256):
        assert correlation(d[:-step], d[step:]) < 4
        assert correlation(d[:, :-step], d[:, step:]) < 4
        assert correlation(d[:-step, :-step], d[step:, step:]) < 4
    for one in (d[:1000], d.t()):
        table = one @ one.t() / one.shape[1] ** 0.5
        pairs = table[~torch.eye(len(one), dtype=torch.bool)]
        assert abs(float(pairs.std()) - 1) < 0.02
        assert float(pairs.abs().max()) < 7


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 10},
        {"row": 7},  # another batch
        {"block": 4},
        {"matrix": "v_proj"},
        {"first": FEATURES},
    ],
    ids=str,
)
def test_other_seeds_steps_blocks_matrices_and_features_leave_out_others(
    change: dict[str, int | str],
) -> None:
    def left_out(
        seed: int = 9, row: int = 5, block: int = 3, matrix: str = "k_proj", first: int = 0
    ) -> Tensor:
        numbers = token_numbers(seed, row, 2, 256).flatten()
        return ~keep_mask(token_words(numbers, block), matrix, first, FEATURES, 0.1)

    both = left_out() & left_out(**change)  # type: ignore[arg-type]
    assert abs(share(both, 0.01)) < 4


# --- in a decoder -----------------------------------------------------------------------------------------------

ADAPTER = replace(LORA, dropout=0.3)


def build(
    recompute: Recompute = "none",
    offload: Offload | None = None,
    *,
    adapter: Adapter = ADAPTER,
    layers: int = SHAPE.num_layers,
) -> Decoder:
    model = Decoder(replace(SHAPE, num_layers=layers))
    generator = torch.Generator().manual_seed(1)
    adapt(model, adapter, torch.float32)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15)
            parameter.requires_grad_("lora" in name)
    recompute_blocks(model, recompute, offload)
    return model


def numbers_of(ids: Tensor, first_row: int = 0) -> Tensor:
    return token_numbers(1, first_row, *ids.shape)


def trained(model: Decoder, first_row: int = 0) -> dict[str, Tensor]:
    inputs = rows(SHAPE.vocab_size)
    hidden = model(*inputs, numbers=numbers_of(inputs[0], first_row))
    model.zero_grad()
    hidden.square().sum().backward()
    return {"hidden": hidden.detach()} | {
        n: p.grad for n, p in model.named_parameters() if p.grad is not None
    }


def assert_same(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(ours[name], tensor), name


@pytest.mark.parametrize("mode", [mode for mode in get_args(Recompute) if mode != "none"])
def test_recomputed_blocks_leave_out_the_same(mode: Recompute) -> None:
    assert_same(trained(build(mode)), trained(build()))


def test_so_do_offloaded_ones() -> None:
    assert_same(trained(build("full", Offload(Late()))), trained(build()))


def test_a_backward_after_another_forward_leaves_out_what_its_own_did() -> None:
    expected = trained(build(), 3)
    model = build("full")
    inputs = rows(SHAPE.vocab_size)
    hidden = model(*inputs, numbers=numbers_of(inputs[0], 3))
    model(*inputs, numbers=numbers_of(inputs[0], 9))
    hidden.square().sum().backward()
    assert_same(
        {n: p.grad for n, p in model.named_parameters() if p.grad is not None} | {"hidden": hidden}, expected
    )


@pytest.mark.parametrize("mode", ["none", pytest.param("selective", marks=pytest.mark.slow)])
def test_all_compiled_blocks_share_their_code_and_leave_out_the_same(mode: Recompute) -> None:
    torch._dynamo.reset()
    counters.clear()
    few = replace(ADAPTER, modules=("q_proj", "down_proj"))
    model, eager = build(mode, adapter=few, layers=4), build(mode, adapter=few, layers=4)
    compile_blocks(model, backend="aot_eager")
    for first_row in (0, 5):
        found, expected = trained(model, first_row), trained(eager, first_row)
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5, msg=name)
    # Of each of two stretches one for the first block, whose input has no gradient, and one for all the others.
    assert counters["stats"]["unique_graphs"] == 4


def test_without_numbers_nothing_is_left_out() -> None:
    model, plain = build(), build(adapter=replace(ADAPTER, dropout=0.0))
    inputs = rows(SHAPE.vocab_size)
    trained(model)
    with torch.no_grad():
        assert torch.equal(model(*inputs), plain(*inputs))
        assert not torch.equal(model(*inputs, numbers=numbers_of(inputs[0])), plain(*inputs))
        with adapter_off(model), adapter_off(plain):  # the base has no dropout
            assert torch.equal(model(*inputs, numbers=numbers_of(inputs[0])), plain(*inputs))


def test_only_what_goes_through_the_adapter_is_left_out() -> None:
    """W x + scale * B A dropout(x): as the paper's own program, and PEFT, have it."""
    layer = build().layers["1"].get_submodule("mlp.up_proj")
    assert isinstance(layer, AdaptedLinear)
    x = torch.randn(12, SHAPE.hidden_size, generator=torch.Generator().manual_seed(7))
    words = token_words(torch.arange(12), 1)
    layer.words = words
    mask = keep_mask(words, "up_proj", 0, SHAPE.hidden_size, 0.3)
    assert layer.lora_A is not None
    assert layer.lora_B is not None
    expected = x @ layer.weight.t() + 2.0 * (x * mask / 0.7) @ layer.lora_A.t() @ layer.lora_B.t()
    torch.testing.assert_close(layer(x), expected)


def test_every_adapted_matrix_of_a_block_leaves_out_inputs_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[tuple[str, int]] = []
    product: Callable[..., Tensor] = dropped_product

    def note(x: Tensor, a: Tensor, words: Tensor, matrix: str, first: int, p: float) -> Tensor:
        seen.append((matrix, int(words[0, 0])))
        assert (first, p) == (0, 0.3)
        return product(x, a, words, matrix, first, p)

    monkeypatch.setattr("modelyard.model.adapter.dropped_product", note)
    trained(build())
    assert [matrix for matrix, _ in seen] == 2 * list(MODULES)
    assert len(set(seen)) == 14
    assert len({word for _, word in seen}) == 2  # one a block
