"""Copies of the same weights: that every change of their bits shows, and that training makes none."""

from __future__ import annotations

import struct
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from modelyard.config.layout import Layout
from modelyard.parallel import replicas
from modelyard.parallel.mesh import Mesh
from modelyard.parallel.replicas import Along, copied, differing, digest, hashes, holders, odd_ones
from modelyard.parallel.torch_private import local_slice
from modelyard.train.step import train_step
from tests.parallel.cases import STARCODER, TIED, UNEVEN, layout_of
from tests.parallel.matrix import LEARNING_RATE, Case, build, local_batch, make_optimizer
from tests.parallel.processes import run_distributed

CPU = torch.device("cpu")


def bits(tensor: Tensor) -> int:
    return hashes({"it": tensor})["it"]


def multipliers(level: int) -> list[int]:
    return replicas._multipliers(level, CPU).tolist()


def by_hand(words: list[int], level: int = 0) -> int:
    """The sum of products modulo 2^64, chunk by chunk, in Python's numbers; as torch's signed ones."""
    table = multipliers(level)
    sums = []
    for begin in range(0, len(words), len(table)):
        total = sum(word * m for word, m in zip(words[begin : begin + len(table)], table, strict=False))
        sums.append((total + 2**63) % 2**64 - 2**63)
    return sums[0] if len(sums) == 1 else by_hand(sums, level + 1)


def test_the_number_is_the_sum_of_words_times_multipliers() -> None:
    values = [1.0, -0.0, 3e38, float("nan"), -2.5]
    assert bits(torch.tensor(values)) == by_hand(list(struct.unpack("<5i", struct.pack("<5f", *values))))
    doubles = torch.tensor(values, dtype=torch.float64)
    assert bits(doubles) == by_hand(list(struct.unpack("<10i", struct.pack("<5d", *values))))
    chunk = len(multipliers(0))
    assert chunk == 32768
    long = torch.randn(2 * chunk + 5, generator=torch.Generator().manual_seed(0))
    assert bits(long) == by_hand(long.view(torch.int32).tolist())
    assert bits(long.view(-1, 3)) == bits(long)
    assert all(m % 2 for level in (0, 1) for m in multipliers(level))
    assert hashes({}) == {}
    assert hashes({"none": torch.empty(0), "one": torch.zeros(())}) == {"none": 0, "one": 0}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.uint8])
def test_narrow_tensors_of_any_length_and_place(dtype: torch.dtype) -> None:
    """Zeros fill the last word; where in its storage a tensor begins makes no difference."""
    values = torch.arange(1, 24).to(dtype)
    for begin in range(3):
        for end in range(begin + 1, 12):
            part = values[begin:end]
            raw = part.contiguous().view(torch.uint8).numpy().tobytes()
            raw += bytes(-len(raw) % 4)
            assert bits(part) == by_hand(list(struct.unpack(f"<{len(raw) // 4}i", raw))), (begin, end)


def test_every_change_of_bits_shows() -> None:
    chunk = len(multipliers(0))
    true = torch.randn(2 * chunk + 5, generator=torch.Generator().manual_seed(0))
    true[7], true[11] = 0.0, -true[10]
    seen = {bits(true)}

    def changed(change: Any) -> None:
        copy = true.clone()
        change(copy)
        assert not torch.equal(copy.view(torch.int32), true.view(torch.int32))
        seen.add(bits(copy))

    def flip(at: int, bit: int) -> Any:
        return lambda x: x.view(torch.int32)[at].bitwise_xor_(-(2**31) if bit == 31 else 1 << bit)

    def swap(i: int, j: int) -> Any:
        def change(x: Tensor) -> None:
            x[i], x[j] = true[j], true[i]

        return change

    def signs(*places: int) -> Any:
        def change(x: Tensor) -> None:
            x[list(places)] *= -1

        return change

    changes = [flip(at, bit) for at in (0, chunk, 2 * chunk + 4) for bit in range(32)]
    changes += [signs(7)]  # zero has one, too
    # Sums modulo 2^32, or with one multiplier for several places, would not see these.
    changes += [signs(0, at) for at in (1, 2, chunk, 2 * chunk)] + [signs(0, 1, 2, 3)]
    changes += [
        swap(10, 11),
        swap(0, 1),
        swap(0, chunk),
        swap(5, 5 + chunk),
        swap(1, chunk),
        swap(2, 2 * chunk),
    ]
    changes += [lambda x: x.copy_(true.roll(1)), lambda x: x.copy_(true.flip(0))]
    for change in changes:
        changed(change)
    assert len(seen) == 1 + len(changes)


def test_who_holds_the_same() -> None:
    assert holders(Layout(replicate=2, shard=2), ("replicate",)) == [[0, 2], [1, 3]]
    # (replicate, pipeline, tensor): 0 = 000, 1 = 001, 2 = 010, 3 = 011, 4 = 100 …
    layout = Layout(replicate=2, pipeline=2, tensor=2)
    assert holders(layout, ("tensor",)) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert holders(layout, ("replicate", "tensor")) == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert holders(layout, ("replicate", "pipeline")) == [[0, 2, 4, 6], [1, 3, 5, 7]]

    found: list[dict[Along, str]] = [{("replicate",): word} for word in "abab"]
    assert differing(Layout(replicate=2, shard=2), found) == {}
    found[3] = {("replicate",): "c"}
    assert differing(Layout(replicate=2, shard=2), found) == {("replicate",): [{1: "b", 3: "c"}]}
    # the processes between the first stage and the last have no copy
    ends: list[dict[Along, str]] = [{("pipeline",): "a"}, {}, {}, {("pipeline",): "b"}]
    assert differing(Layout(pipeline=4), ends) == {("pipeline",): [{0: "a", 3: "b"}]}


def test_who_is_at_fault() -> None:
    assert odd_ones([{0: "a", 1: "a", 2: "b"}]) == ([2], True)
    assert odd_ones([{0: "a", 1: "b", 2: "b", 3: "c"}]) == ([0, 1, 2, 3], False)
    assert odd_ones([{0: "a", 1: "b", 2: "b", 3: "c", 4: "b"}]) == ([0, 3], True)
    assert odd_ones([{1: "a", 3: "b"}]) == ([1, 3], False)
    # a pair says nothing itself; that one of it is at fault elsewhere explains it
    assert odd_ones([{1: "a", 3: "b"}, {0: "x", 1: "x", 2: "x", 3: "y"}]) == ([3], True)
    assert odd_ones([{0: "a", 2: "b"}, {1: "x", 3: "y", 5: "x"}]) == ([0, 2, 3], False)
    assert odd_ones([]) == ([], True)


def gathered(value: Any) -> list[Any]:
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def trained_and_broken(case: Case) -> tuple[int, list[str]]:
    """Train two steps in the layout, compare, then change one bit of one weight in the last process that has a copy of
    another's. How many names have copies, and what is wrong."""
    run = build(case, Mesh(case.layout, CPU))
    optimizer, weights = make_optimizer(case, run), run.weights
    for step in range(2):
        train_step(
            run.model,
            weights,
            optimizer,
            local_batch(case, run, step),
            learning_rate=LEARNING_RATE[case.dtype],
            micro_batch_size=case.micro_batch_size,
            max_norm=2.0,
            loss_options=case.options,
            device=CPU,
            mesh=run.mesh,
        )
    wrong, here = [], copied(run)
    fewer = copied(run, without=("tensor",))
    along = {tuple(d for d in dimensions if d != "tensor") for dimensions in here} - {()}
    if set(fewer) != along or sum(map(len, fewer.values())) != sum(
        len(n) for d, n in here.items() if d != ("tensor",)
    ):
        wrong.append(f"without tensor: {fewer}")
    # What is the same by what this process knows, against the places of all parts.
    rank, names = dist.get_rank(), [name for names in here.values() for name in names]
    places = {name: str(local_slice(p)) for name, p in weights.sharded.items()}  # type: ignore[union-attr]
    together = {name: along for along, names in here.items() for name in names}
    everyone = gathered(places)
    for name, place in places.items():
        same = {other for other, theirs in enumerate(everyone) if theirs.get(name) == place}
        known = next((set(g) for g in holders(case.layout, together.get(name, ())) if rank in g), set())
        known = {other for other in known if name in everyone[other]}
        if weights.master[name].numel() and known != same:
            wrong.append(f"{name}: same in {same}, known in {known}")

    def found() -> dict[Any, list[dict[int, str]]]:
        state = optimizer.adamw.state
        tensors = {
            along: {
                f"{name}.{word}": tensor
                for name in names
                for word, tensor in {"": weights.master[name].detach(), **state[weights.master[name]]}.items()
                if word != "step"
            }
            for along, names in here.items()
        }
        reports = gathered({along: digest(hashes(t)) for along, t in tensors.items()})
        return differing(case.layout, reports)

    if found():
        wrong.append(f"clean, and {found()} differ")
    holding = [
        other for other, has in enumerate(gathered(any(weights.master[n].numel() for n in names))) if has
    ]
    if holding and rank == holding[-1]:
        broken = next(weights.master[name] for name in names if weights.master[name].numel())
        broken.data.view(-1).view(torch.int32)[-1] ^= 1
    named = {other for groups in found().values() for group in groups for other in group}
    if holding and holding[-1] not in named:
        wrong.append(f"a bit was changed in {holding[-1]}, and {named} differ")
    return len(names), wrong


F32, BF16 = torch.float32, torch.bfloat16
L = layout_of
QUICK = [
    Case(L(replicate=2, shard=2, zero=2, offload=True), dtype=BF16),
    Case(L(replicate=2, tensor=2), dtype=F32),
    Case(L(pipeline=2, shard=2), dtype=F32, architecture=TIED),
]
THE_REST = [
    Case(L(replicate=2, shard=2, zero=3), dtype=F32),
    Case(L(replicate=4), dtype=BF16, architecture=UNEVEN),
    Case(L(shard=2, tensor=2), dtype=F32, architecture=STARCODER),
    Case(L(tensor=2, context=2, sequence=True), dtype=BF16),
    Case(L(pipeline=2, replicate=2, schedule="interleaved"), dtype=BF16, architecture=TIED),
    Case(L(pipeline=2, tensor=2, schedule="zbv"), dtype=F32, architecture=TIED),
    Case(L(pipeline=4), dtype=F32, architecture=TIED),
    Case(L(shard=2, context=2), dtype=F32),
]


def all_trained_and_broken(cases: list[Case]) -> list[tuple[int, list[str]]]:
    return [trained_and_broken(case) for case in cases]


@pytest.mark.parametrize(
    "cases", [QUICK, pytest.param(THE_REST, marks=pytest.mark.slow)], ids=["quick", "rest"]
)
def test_training_keeps_copies_equal_and_a_changed_bit_shows(cases: list[Case]) -> None:
    answers = run_distributed(all_trained_and_broken, 4, cases)
    for number, case in enumerate(cases):
        assert [answer[number][1] for answer in answers] == [[]] * 4, case.layout
        copies = [answer[number][0] for answer in answers]
        assert (max(copies) > 0) == (case.layout != L(shard=2, context=2)), case.layout
