from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaForCausalLM

from modelyard.config.architecture import Architecture
from modelyard.errors import UserError
from modelyard.model.cache import KeyValueCache
from modelyard.model.decoder import Decoder
from modelyard.model.formats import load_decoder, open_huggingface
from modelyard.model.init import InitStd, initialize
from tests.model.families import FAMILIES, named_weights, ours, reference_model, whole_rows

SMALL = Architecture(
    vocab_size=61,
    hidden_size=32,
    num_layers=2,
    num_attention_heads=4,
    head_groups=2,
    head_size=8,
    ffn_hidden_size=40,
)


def small_model(dtype: torch.dtype = torch.float32, **options: object) -> Decoder:
    model = Decoder(SMALL, **options)  # type: ignore[arg-type]
    initialize(model, 0, InitStd.for_architecture(SMALL))
    return model.to(dtype)


def random_ids(rows: int, length: int, vocabulary: int) -> torch.Tensor:
    return torch.randint(vocabulary, (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_equal_transformers(family: str) -> None:
    reference = reference_model(family)
    model = ours(reference)
    ids = random_ids(2, 50, 97)
    labels = random_ids(2, 51, 97)[:, 1:]
    positions, cu_seqlens = whole_rows(2, 50)

    expected = reference(ids).logits
    logits = model.logits(model(ids, positions, cu_seqlens))
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)

    for output in (logits, expected):
        F.cross_entropy(output.flatten(0, 1), labels.flatten()).backward()
    weights = named_weights(reference)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, weights[name].grad, atol=1e-4, rtol=1e-4, msg=name)


def test_real_weights(shared_data: Path) -> None:
    folder = shared_data / "weights" / "stories260K"
    published = json.loads((folder / "reference.json").read_text())
    opened = open_huggingface(folder / "hf")
    model = load_decoder(opened.weights, opened.architecture, where=folder)
    ids = torch.tensor([published["probe_ids"]])
    logits = model.logits(model(ids, *whole_rows(1, ids.shape[1])))
    torch.testing.assert_close(
        logits[0, -1, :16], torch.tensor(published["probe_logits_last_first16"]), atol=1e-4, rtol=0
    )
    assert logits[0, -1].argmax().item() == published["probe_logits_last_argmax"]
    ids = torch.tensor([published["greedy_ids"]])
    reference = LlamaForCausalLM.from_pretrained(folder / "hf")
    logits, expected = model.logits(model(ids, *whole_rows(1, ids.shape[1]))), reference(ids).logits
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    for output in (logits, expected):
        F.cross_entropy(output[0, :-1], ids[0, 1:]).backward()
    for name, weight in named_weights(reference).items():
        torch.testing.assert_close(
            model.get_parameter(name).grad, weight.grad, atol=1e-4, rtol=1e-4, msg=name
        )


def test_parameters_have_the_logical_names_and_shapes() -> None:
    for name in FAMILIES:
        model = ours(reference_model(name))
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        assert shapes == model.architecture.parameter_shapes()


def test_building_on_the_meta_device_allocates_nothing() -> None:
    with torch.device("meta"):
        model = Decoder(SMALL)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not list(model.buffers())
    model.to_empty(device="cpu")
    initialize(model, 0, InitStd.for_architecture(SMALL))
    ids, (positions, cu_seqlens) = random_ids(1, 9, 61), whole_rows(1, 9)
    assert torch.equal(model(ids, positions, cu_seqlens), small_model()(ids, positions, cu_seqlens))


LENGTHS = (5, 1, 9, 17)  # of documents packed into one row of 32


def packed() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """ids, positions and cu_seqlens (padded) of two rows: four documents, and one."""
    positions = torch.stack([torch.cat([torch.arange(n) for n in LENGTHS]), torch.arange(32)])
    cu_seqlens = torch.tensor([[0, 5, 6, 15, 32, 32], [0, 32, 32, 32, 32, 32]], dtype=torch.int32)
    return random_ids(2, 32, 61), positions, cu_seqlens


@pytest.mark.parametrize("backend", ["auto", "dense"])
def test_packed_documents_are_computed_as_if_alone(backend: str) -> None:
    model = small_model(torch.float64, backend=backend)
    ids, positions, cu_seqlens = packed()
    hidden = model(ids, positions, cu_seqlens)
    begin = 0
    for length in LENGTHS:
        alone = model(ids[:1, begin : begin + length], *whole_rows(1, length))
        torch.testing.assert_close(hidden[:1, begin : begin + length], alone)
        begin += length
    torch.testing.assert_close(hidden[1:], model(ids[1:], *whole_rows(1, 32)))


@pytest.mark.parametrize("backend", ["auto", "dense"])
def test_no_gradient_crosses_a_document_boundary(backend: str) -> None:
    model = small_model(backend=backend)
    ids, positions, cu_seqlens = packed()
    embedded: list[torch.Tensor] = []

    def keep(module: nn.Module, arguments: object, output: torch.Tensor) -> torch.Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[0]

    model.embed_tokens.register_forward_hook(keep)
    hidden = model(ids, positions, cu_seqlens)
    hidden[0, 6:15].square().sum().backward()  # the third document
    gradient = embedded[0].grad
    assert gradient is not None
    assert (gradient[6:15] != 0).any(-1).all()
    assert (gradient[:6] == 0).all()
    assert (gradient[15:] == 0).all()


def test_a_nan_in_one_document_stays_there() -> None:
    model = small_model()
    with torch.no_grad():
        model.embed_tokens.weight[60] = float("nan")
    ids, positions, cu_seqlens = packed()
    ids.clamp_(max=59)[0, 8] = 60  # the third document's third token
    hidden = model(ids, positions, cu_seqlens)
    bad = hidden.isnan().any(-1)
    assert bad[0, 8:15].all()
    assert not bad[0, :6].any()
    assert not bad[0, 15:].any()
    assert not bad[1].any()


def test_decoding_with_a_cache_equals_the_whole_forward() -> None:
    model = small_model(torch.float64)
    ids, (positions, cu_seqlens) = random_ids(1, 300, 61), whole_rows(1, 300)
    expected = model(ids, positions, cu_seqlens)
    cache = KeyValueCache(SMALL)
    parts = []
    with torch.no_grad():
        for begin, end in [
            (0, 20),
            (20, 27),
            (27, 28),
            (28, 300),
        ]:  # prefill, a chunk, one token, past the room
            part = torch.tensor([[0, end - begin]], dtype=torch.int32)
            parts.append(model(ids[:, begin:end], positions[:, begin:end], part, cache))
    assert cache.length == 300
    torch.testing.assert_close(torch.cat(parts, 1), expected)


def test_every_dtype_stays_itself() -> None:
    ids, (positions, cu_seqlens) = random_ids(1, 16, 61), whole_rows(1, 16)
    exact = small_model(torch.float64)(ids, positions, cu_seqlens)
    assert exact.dtype == torch.float64
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.1)):
        hidden = small_model(dtype)(ids, positions, cu_seqlens)
        assert hidden.dtype == dtype
        torch.testing.assert_close(hidden.double(), exact, atol=tolerance, rtol=tolerance)


def test_boundaries_that_do_not_cover_a_row_are_refused() -> None:
    model = small_model()
    ids, (positions, _) = random_ids(1, 9, 61), whole_rows(1, 9)
    with pytest.raises(ValueError, match="from 0 to 9"):
        model(ids, positions, torch.tensor([[0, 8]], dtype=torch.int32))


def test_an_unknown_activation_is_refused() -> None:
    with pytest.raises(UserError, match=r"'mish' is not supported \(there are: silu, gelu, "):
        Decoder(Architecture(61, 32, 1, 4, 2, 8, 40, activation="mish"))  # type: ignore[arg-type]
