from __future__ import annotations

import pytest
import torch

from modelyard.config.architecture import Architecture
from modelyard.model.decoder import Decoder
from modelyard.model.init import InitStd, initial_tensor, initialize, key

ARCHITECTURE = Architecture(256, 64, 2, 4, 2, 16, 96, qkv_bias=True)


def weights(seed: int, architecture: Architecture = ARCHITECTURE) -> dict[str, torch.Tensor]:
    model = Decoder(architecture)
    initialize(model, seed, InitStd.for_architecture(architecture))
    return dict(model.state_dict())


def test_golden_values() -> None:
    """These numbers may never change: runs are compared across versions by their seed."""
    first = weights(1234)
    assert key(1234, "init", "embed_tokens.weight") == GOLDEN_KEY
    for name, expected in GOLDEN.items():
        assert first[name].flatten()[:3].tolist() == pytest.approx(expected, abs=1e-6), name


GOLDEN_KEY = 1_256_930_506_566_050_212
GOLDEN: dict[str, list[float]] = {
    "embed_tokens.weight": [-0.269361, -0.0496401, 0.1198721],
    "layers.1.mlp.down_proj.weight": [-0.0949057, 0.0482986, 0.0059505],
}


def test_same_seed_same_weights_whatever_the_global_generator() -> None:
    first = weights(7)
    torch.manual_seed(99)
    second = weights(7)
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = weights(8)
    assert not torch.equal(first["embed_tokens.weight"], other["embed_tokens.weight"])


def test_a_parameter_depends_on_no_other() -> None:
    deeper = Architecture(256, 64, 3, 4, 2, 16, 96, tie_word_embeddings=True)
    std = InitStd.for_architecture(ARCHITECTURE)
    model = Decoder(deeper)
    initialize(model, 3, std)
    expected = weights(3)
    for name, value in model.state_dict().items():
        if name in expected:
            assert torch.equal(value, expected[name])


def test_standard_deviations() -> None:
    values = weights(5)
    base = 64**-0.5
    for name, value in values.items():
        if name.endswith(("layernorm.weight", "norm.weight")):
            assert value.eq(1).all()
        elif name.endswith(".bias"):
            assert value.eq(0).all()
        else:
            expected = base / 2 if "o_proj" in name or "down_proj" in name else base  # sqrt(2 * 2 layers) = 2
            assert value.std().item() == pytest.approx(expected, rel=0.05), name
            assert value.mean().abs().item() < 0.1 * expected


def test_given_deviations_win_and_base_is_the_default_of_the_others() -> None:
    std = InitStd.for_architecture(ARCHITECTURE, base=0.02, mlp_out=0.5, embedding=1.0)
    assert std == InitStd(embedding=1.0, qkv=0.02, attention_output=0.01, mlp_in=0.02, mlp_out=0.5)


def test_other_dtypes_hold_the_same_draw() -> None:
    model = Decoder(ARCHITECTURE).to(torch.float64)
    initialize(model, 7, InitStd.for_architecture(ARCHITECTURE))
    single = weights(7)
    assert all(torch.equal(value.float(), single[name]) for name, value in model.state_dict().items())


def test_a_slice_of_the_full_tensor_is_what_a_shard_holds() -> None:
    std = InitStd.for_architecture(ARCHITECTURE)
    full = initial_tensor("layers.0.mlp.up_proj.weight", (96, 64), std, seed=7)
    assert torch.equal(full, weights(7)["layers.0.mlp.up_proj.weight"])
