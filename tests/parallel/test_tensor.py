"""Tensor parallelism: who has which part, what is sent, the loss over split words, and the same run as one process."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from modelyard.config.layout import Layout
from modelyard.generate.sample import next_logits
from modelyard.loss.cross_entropy import linear_cross_entropy, token_scores
from modelyard.model.cache import KeyValueCache
from modelyard.model.decoder import Decoder
from modelyard.model.init import InitStd, initialize
from modelyard.parallel import collectives
from modelyard.parallel.mesh import Mesh
from modelyard.parallel.tensor import Words, apply_tensor, range_of
from modelyard.parallel.torch_private import local_tensor
from modelyard.train.step import LossOptions, accumulate
from tests.parallel.cases import STARCODER, TIED
from tests.parallel.matrix import SEED, TINY, Case, build, hold, local_batch
from tests.parallel.processes import run_distributed

CPU = torch.device("cpu")
FOUR_GROUPS = dataclasses.replace(TINY, head_groups=4)


def layout(tensor: int = 2, *, sequence: bool = False, shard: int = 1, zero: int = 1) -> Layout:
    return Layout(shard=shard, tensor=tensor, sequence_parallel=sequence, zero_stage=zero)  # type: ignore[arg-type]


# --- who has which part -----------------------------------------------------------------------------------------

PARTS = {
    "embed_tokens.weight": ((64, 16), (32, 16)),
    "embed_positions.weight": ((32, 16), (32, 16)),
    "layers.3.input_layernorm.bias": ((16,), (16,)),
    "layers.3.self_attn.q_proj.weight": ((16, 16), (8, 16)),
    "layers.3.self_attn.k_proj.weight": ((8, 16), (4, 16)),
    "layers.3.self_attn.v_proj.bias": ((8,), (4,)),
    "layers.3.self_attn.o_proj.weight": ((16, 16), (16, 8)),
    "layers.3.self_attn.o_proj.bias": ((16,), (16,)),
    "layers.3.mlp.up_proj.weight": ((24, 16), (12, 16)),
    "layers.3.mlp.up_proj.bias": ((24,), (12,)),
    "layers.3.mlp.down_proj.weight": ((16, 24), (16, 12)),
    "layers.3.mlp.down_proj.bias": ((16,), (16,)),
    "norm.weight": ((16,), (16,)),
    "lm_head.weight": ((64, 16), (32, 16)),
}
"""Whole shape and the part's, of the decoder with every kind of parameter."""


def _parts() -> None:
    mesh = Mesh(layout(), CPU)
    with torch.device("meta"):
        model, plain = Decoder(STARCODER), Decoder(STARCODER)
    apply_tensor(model, mesh)
    parameters = dict(model.named_parameters())
    assert list(parameters) == [name for name, _ in plain.named_parameters()]
    for name, (whole, part) in PARTS.items():
        assert (parameters[name].shape, local_tensor(parameters[name]).shape) == (whole, part), name
    assert range_of(64, mesh) == (range(32), range(32, 64))[mesh.place("tensor")]
    for changes, problem in (
        ({"vocab_size": 65}, "65 cannot be shared evenly by 2"),
        ({"head_groups": 1}, "1 cannot be shared evenly by 2"),
        ({"ffn_hidden_size": 25}, r"layers.0.mlp.gate_proj.weight \[25, 16\] cannot be shared evenly by 2"),
    ):
        with torch.device("meta"):
            odd = Decoder(dataclasses.replace(TINY, **changes))
        with pytest.raises(ValueError, match=problem):
            apply_tensor(odd, mesh)


def test_every_parameter_is_cut_where_it_should_be() -> None:
    run_distributed(_parts, 2)


# --- the loss over split words ----------------------------------------------------------------------------------

BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}


def _loss(dtype: torch.dtype, size: int) -> None:
    mesh = Mesh(layout(size), CPU)
    words = range_of(24, mesh)
    own = slice(words.start, words.stop)
    vocabulary = Words(words.start, mesh)
    generator = torch.Generator().manual_seed(3)
    tokens = 23
    hidden = torch.randn(tokens, 6, dtype=torch.float64, generator=generator).to(dtype)
    weight = torch.randn(24, 6, dtype=torch.float64, generator=generator).to(dtype)
    some = torch.randint(0, 24, (tokens,), generator=generator)
    some[::5] = -100
    # Words of one process only; none at all; logits so far apart that the other part's exponentials are 0.
    for case, labels, factor in (
        ("some", some, 1.0),
        ("the first words", torch.full_like(some, 1), 1.0),
        ("the last word", torch.full_like(some, 23), 1.0),
        ("none", torch.full_like(some, -100), 1.0),
        ("far apart", some, 300.0),
    ):
        for implementation, z_loss, scale in (
            ("torch", 0.0, 1.0),
            ("fused", 0.0, 1.0),
            ("fused", 1e-2, 0.5),
            ("torch", 1e-2, 0.5),
        ):
            options: dict[str, Any] = {"z_loss": z_loss, "logits_scale": scale}
            x = (hidden * factor).requires_grad_()
            w = weight.clone().requires_grad_()
            wide = x.detach().double().requires_grad_(), w.detach().double().requires_grad_()
            wanted = linear_cross_entropy(*wide, labels, implementation="torch", **options)
            gradients = torch.autograd.grad(wanted, wide)

            mine = w.detach()[own].clone().requires_grad_()
            with mock.patch("modelyard.loss.cross_entropy._chunk_rows", return_value=4):
                loss = linear_cross_entropy(
                    x, mine, labels, implementation=implementation, vocabulary=vocabulary, **options
                )
            x_gradient, own_gradient = torch.autograd.grad(loss, (x, mine))
            x_total = x_gradient.double()
            vocabulary.sum_(x_total)
            with mock.patch("modelyard.loss.cross_entropy._chunk_rows", return_value=4):
                losses, hits = token_scores(
                    x.detach(), mine, labels, implementation=implementation, vocabulary=vocabulary, **options
                )
            everyone = loss.detach().clone()
            vocabulary.max_(everyone)
            where = f"{case}, {implementation}, {options}"
            assert everyone == loss, where  # the same bits on all processes
            bound = BOUNDS[dtype]
            for name, ours, theirs in (
                ("loss", loss.double(), wanted),
                ("losses", losses.sum().double(), wanted),
                ("hidden", x_total, gradients[0]),
                ("weight", own_gradient.double(), gradients[1][own]),
            ):
                difference = float((ours - theirs).abs().max())
                largest = float((gradients[1] if name == "weight" else theirs).abs().max())
                assert difference <= bound * max(largest, 1e-3), f"{where}: {name} differs by {difference}"
            if case == "none":
                assert loss == 0
                assert not own_gradient.any()
            assert losses[labels == -100].abs().sum() == 0
            if dtype != torch.bfloat16:  # whose logits tie where the wide ones do not
                logits = wide[0].detach() @ wide[1].detach().T
                assert hits.tolist() == (logits.argmax(-1) == labels).tolist(), where


@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.float64, 2), (torch.float64, 3), (torch.float32, 2), (torch.bfloat16, 2)]
)
def test_the_loss_over_split_words_is_the_loss(dtype: torch.dtype, size: int) -> None:
    run_distributed(_loss, size, dtype, size)


def _loss_by_hand() -> None:
    mesh = Mesh(layout(), CPU)
    rank = mesh.place("tensor")
    # Logits 0, ln 2, ln 3, ln 6 of which each process has two: probabilities 1/12, 2/12, 3/12, 6/12.
    weight = torch.tensor([[1.0], [2.0], [3.0], [6.0]], dtype=torch.float64).log()[2 * rank : 2 * rank + 2]
    hidden = torch.ones(2, 1, dtype=torch.float64)
    labels = torch.tensor([1, 3])
    for implementation in ("torch", "fused"):
        own = weight.clone().requires_grad_()
        loss = linear_cross_entropy(
            hidden, own, labels, implementation=implementation, vocabulary=Words(2 * rank, mesh)
        )
        assert loss.item() == pytest.approx(math.log(6) + math.log(2), abs=1e-15)
        loss.backward()
        assert own.grad is not None
        # Both tokens give the probabilities; each label takes 1 from its own.
        wanted = [[2 / 12, 4 / 12 - 1], [6 / 12, 12 / 12 - 1]][rank]
        assert own.grad[:, 0].tolist() == pytest.approx(wanted, abs=1e-15)


def _hits_by_hand() -> None:
    mesh = Mesh(layout(3), CPU)
    rank = mesh.place("tensor")
    # The words of three processes, two of each. Of equal ones `argmax` takes the first of all.
    table = {
        (0.0, 1.0, 2.0, 3.0, 1.0, 0.0): 3,
        (3.0, 1.0, 3.0, 3.0, 1.0, 0.0): 0,
        (0.0, 1.0, 0.0, 3.0, 3.0, 3.0): 3,
        (0.0, 1.0, 0.0, 1.0, 2.0, 2.0): 4,
        (0.0, 3.0, 0.0, 1.0, 2.0, 3.0): 1,
        (-1.0, -1.0, -1.0, -1.0, -1.0, -1.0): 0,
    }
    logits = torch.tensor(list(table))
    # The head's rows, where hidden states are one-hot.
    own = logits[:, 2 * rank : 2 * rank + 2].T.contiguous()
    vocabulary = Words(2 * rank, mesh)
    for implementation in ("torch", "fused"):
        for label in range(6):
            labels = torch.full((6,), label)
            scores = token_scores(
                torch.eye(6), own, labels, implementation=implementation, vocabulary=vocabulary
            )
            hits = [first == label for first in table.values()]
            assert scores.hits.tolist() == hits, (implementation, label)


def test_the_likeliest_of_split_words_is_that_of_argmax() -> None:
    run_distributed(_hits_by_hand, 3)


def test_the_loss_over_split_words_by_hand() -> None:
    run_distributed(_loss_by_hand, 2)


# --- what is sent, and what is there ----------------------------------------------------------------------------


class _Widths(TorchDispatchMode):
    """Collects the last dimensions of all tensors that operations give."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor) and tensor.dim() == 2:
                self.found.add(tensor.shape[-1])
        return result


def _messages(case: Case) -> dict[str, int]:
    """How often each collective is called in a micro-batch; no tensor has a row of all logits."""
    run = build(case, Mesh(case.layout, CPU))
    assert isinstance(run.model, Decoder)
    counts: Counter[str] = Counter()
    send = collectives._run

    def count(collective: Any, *rest: Any) -> Tensor:
        counts[collective.__name__] += 1
        return send(collective, *rest)

    with mock.patch.object(collectives, "_run", count), _Widths() as widths:
        accumulate(run.model, run.weights, [local_batch(case, run, 0)], case.options, lambda name: None)
    assert 48 in widths.found, "the test does not see logits"
    assert 96 not in widths.found, "somebody has all logits of a token"
    return dict(counts)


@pytest.mark.parametrize(
    ("case", "counts"),
    [
        # 2 layers: embedding, and o and down of each; two norms of each, and the last. Forward and backward.
        (Case(layout(), options=LossOptions("torch")), {"_all_reduce": 10}),
        (Case(layout(sequence=True)), {"_all_gather": 10, "_reduce_scatter": 10}),
        # What is forgotten after the norms is gathered again.
        (Case(layout(sequence=True), recompute="selective"), {"_all_gather": 14, "_reduce_scatter": 10}),
    ],
    ids=["tensor", "sequence", "selective"],
)
def test_one_message_for_each_norm_and_each_sum(case: Case, counts: dict[str, int]) -> None:
    small = dataclasses.replace(TINY, num_layers=2, vocab_size=96)
    assert run_distributed(_messages, 2, dataclasses.replace(case, architecture=small)) == [counts, counts]


# --- whole logits -----------------------------------------------------------------------------------------------


def _logits(case: Case) -> None:
    run = build(case, Mesh(case.layout, CPU))
    plain = Decoder(case.architecture)
    initialize(plain, SEED, InitStd.for_architecture(case.architecture))
    plain.to(case.dtype)
    assert isinstance(run.model, Decoder)
    tokens = [5, 63, 0, 31, 32]  # five: no two processes can share them
    caches = [KeyValueCache(case.architecture) for _ in range(2)]
    for length in (3, 4, 5):  # three new tokens, then one each
        with torch.no_grad():
            wanted, ours = (
                next_logits(model, tokens[:length], cache)
                for model, cache in zip((plain, run.model), caches, strict=True)
            )
        assert ours.shape == (64,)
        torch.testing.assert_close(ours, wanted, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        hidden = torch.randn(2, 3, 16, dtype=case.dtype, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(run.model.logits(hidden), plain.logits(hidden), rtol=1e-12, atol=1e-12)
    assert not run.model.logits(hidden.requires_grad_()).requires_grad  # no gradient rather than a part of it
    if case.layout.sequence_parallel:
        ids = torch.tensor([tokens])
        with pytest.raises(ValueError, match="5 tokens cannot be shared evenly by 2"):
            run.model(ids, ids, torch.tensor([[0, 5]], dtype=torch.int32))


@pytest.mark.parametrize("sequence", [False, True])
def test_decoding_has_whole_logits_on_every_process(sequence: bool) -> None:
    run_distributed(_logits, 2, Case(layout(sequence=sequence), architecture=STARCODER if sequence else TIED))


# --- the same run as one process --------------------------------------------------------------------------------

Z = 1e-3


@pytest.mark.parametrize(
    "case",
    [
        Case(layout(), options=LossOptions("torch", Z)),
        Case(layout(), architecture=TIED, options=LossOptions("fused", Z), data="masked", micro_batch_size=1),
        Case(layout(sequence=True), architecture=TIED, options=LossOptions("torch", Z)),
        Case(layout(sequence=True), data="masked", micro_batch_size=1),
        Case(layout(), architecture=STARCODER),
        Case(layout(sequence=True), architecture=STARCODER, options=LossOptions("fused", Z)),
        Case(layout(sequence=True), recompute="selective", steps=1),
        pytest.param(Case(layout(4), architecture=FOUR_GROUPS), marks=pytest.mark.slow),
        Case(layout(4, sequence=True), architecture=FOUR_GROUPS),
        pytest.param(
            Case(layout(shard=2, zero=1, sequence=True), micro_batch_size=1, architecture=STARCODER),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            Case(layout(shard=2, zero=2), micro_batch_size=1, architecture=TIED), marks=pytest.mark.slow
        ),
        Case(layout(shard=2, zero=3, sequence=True), micro_batch_size=1),
        # In fp32 and bf16 one step: after it, small differences have grown.
        Case(layout(), dtype=torch.float32, steps=1),
        Case(layout(sequence=True), architecture=STARCODER, dtype=torch.float32, steps=1),
        Case(layout(), dtype=torch.bfloat16, steps=1),
        Case(layout(shard=2, zero=2, sequence=True), dtype=torch.bfloat16, steps=1),
        # Shards of parts that cannot be cut evenly: three rows for four processes.
        pytest.param(
            Case(
                layout(shard=4, zero=2, sequence=True),
                architecture=dataclasses.replace(TINY, ffn_hidden_size=6, hidden_size=12, num_layers=2),
                micro_batch_size=1,
            ),
            marks=pytest.mark.slow,
        ),
    ],
    ids=lambda case: ",".join(
        f"{word}"
        for word in (
            f"{case.layout.tensor}",
            "sequence" * case.layout.sequence_parallel,
            f"ZeRO {case.layout.zero_stage}" * (case.layout.shard > 1),
            "tied" * case.architecture.tie_word_embeddings,
            "biases" * case.architecture.mlp_bias,
            case.options.implementation,
            case.data,
            case.recompute,
            str(case.dtype).removeprefix("torch."),
        )
        if word
    ),
)
def test_split_matrices_train_as_whole_ones(case: Case) -> None:
    hold(case)


def _graphs(case: Case) -> int:
    from torch._dynamo.utils import counters

    torch._dynamo.reset()  # what the test before compiled came along with the fork
    counters.clear()
    run = build(case, Mesh(case.layout, CPU))
    assert isinstance(run.model, Decoder)
    accumulate(run.model, run.weights, [local_batch(case, run, 0)], case.options, lambda name: None)
    return counters["stats"]["unique_graphs"]


def test_blocks_share_their_compiled_code() -> None:
    # Ten: torch gives up after eight versions of one function. Two functions, before and after attention.
    case = Case(
        layout(sequence=True),
        architecture=dataclasses.replace(TINY, num_layers=10),
        compile=True,
        micro_batch_size=8,
    )
    assert run_distributed(_graphs, 2, case) == [2, 2]
