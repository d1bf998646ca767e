"""Pipeline parallelism: every schedule is the run of one process, and communicates what its docstring says."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from modelyard.config.layout import Layout, Schedule
from modelyard.data.batch import Batch
from modelyard.model.decoder import Decoder
from modelyard.model.init import InitStd, initialize
from modelyard.parallel.apply import Parallel, parallelize
from modelyard.parallel.data import EMBEDDING, ShardedWeights
from modelyard.parallel.mesh import Mesh, alone
from modelyard.parallel.pipeline import Pipeline
from modelyard.parallel.torch_private import local_tensor
from modelyard.train.phases import untimed
from modelyard.train.scores import score_sums
from modelyard.train.step import LossOptions, accumulate, micro_batches
from tests.parallel.matrix import TINY, Case, build, distributed, global_batch, hold
from tests.parallel.processes import run_distributed

TIED = dataclasses.replace(TINY, tie_word_embeddings=True)
SCHEDULES: dict[Schedule, int] = {"gpipe": 1, "1f1b": 1, "interleaved": 2, "zero_bubble": 2, "zbv": 2}


def pipeline(schedule: Schedule, processes: int = 2, **others: Any) -> Layout:
    return Layout(pipeline=processes, schedule=schedule, stages_per_process=SCHEDULES[schedule], **others)


def _each(function: Callable[[Case], Any]) -> Callable[[list[Case]], list[Any]]:
    """The same in the same processes for several cases: starting them is what takes long."""
    return lambda cases: [function(case) for case in cases]


# --- the run of one process -------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["1f1b", "zero_bubble"])
def test_a_schedule_computes_what_one_process_does(schedule: Schedule) -> None:
    hold(Case(pipeline(schedule), micro_batch_size=1, options=LossOptions(z_loss=1e-3)))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_tied_embeddings_get_the_gradients_of_both_ends(schedule: Schedule) -> None:
    """`hold` compares what both processes have to the bit. Here with micro-batches without any target, too."""
    hold(Case(pipeline(schedule), architecture=TIED, micro_batch_size=1, data="masked"))


def test_four_stages() -> None:
    hold(Case(pipeline("1f1b", 4), architecture=TIED), twice=True)


def test_a_zero_bubble_with_one_stage_a_process() -> None:
    hold(Case(Layout(pipeline=2, schedule="zero_bubble", stages_per_process=1)))


@pytest.mark.skipif(
    torch.__version__ < "2.12", reason="torch 2.11 adds up the gradients of a node's several outputs"
)
def test_the_half_of_the_backward_that_makes_weight_gradients_may_touch_outputs_of_blocks() -> None:
    """FSDP's hooks on them then run in the middle of it, which here compiled blocks bring about: one node from input to
    output. (In a run `training.compile` is refused with this schedule.)"""
    hold(Case(pipeline("zbv"), compile=True, steps=1))


@pytest.mark.parametrize(
    ("schedule", "zero_stage"),
    [("zbv", 1), ("1f1b", 2), ("zero_bubble", 2), ("gpipe", 3), ("zbv", 3)],
)
def test_a_zero_stage_inside_stages(schedule: Schedule, zero_stage: int) -> None:
    layout = pipeline(schedule, shard=2, zero_stage=zero_stage)
    # The head's matrix, which the plain loss reads again in its backward, must still be there.
    options = LossOptions("torch", z_loss=1e-3)
    hold(Case(layout, architecture=TIED, micro_batch_size=1, options=options, steps=2))


def test_a_residual_stream_that_is_wider_than_the_weights() -> None:
    wide = dataclasses.replace(TIED, full_precision_residual=True)
    hold(Case(pipeline("zbv"), architecture=wide, dtype=torch.bfloat16, steps=1))


@pytest.mark.parametrize("schedule", ["1f1b", "zbv"])
def test_bf16_gradients_are_summed_wide_as_without_a_pipeline(schedule: Schedule) -> None:
    run_distributed(_same_bits_as_without_a_pipeline, 2, pipeline(schedule))


def _same_bits_as_without_a_pipeline(layout: Layout) -> None:
    case = Case(layout, micro_batch_size=1, steps=1, dtype=torch.bfloat16)
    trace = distributed(case)
    # One process, the same micro-batches, each gradient added in fp32. The head's is not narrowed on its way there.
    run = build(dataclasses.replace(case, layout=Layout()), alone())
    assert isinstance(run.model, Decoder)
    parts = list(micro_batches(global_batch(case, 0), 1, torch.device("cpu")))
    accumulate(run.model, run.weights, parts, case.options, untimed)
    for name, gradient in trace.gradients[0].items():
        if name != "lm_head.weight":
            expected = run.weights.master[name].grad
            assert expected is not None
            assert torch.equal(gradient, expected / trace.targets[0]), name


def test_the_second_copy_on_the_same_process_stays_equal() -> None:
    for equal, places in run_distributed(_twins, 2, Case(pipeline("zbv"), architecture=TIED)):
        assert equal
        assert places in ([], [EMBEDDING])


def _twins(case: Case) -> tuple[bool, list[str]]:
    runs: list[Parallel] = []
    original = Pipeline.__init__

    def remember(self: Pipeline, models: Any, mesh: Mesh, dtype: torch.dtype) -> None:
        runs.append(models)  # type: ignore[arg-type]
        original(self, models, mesh, dtype)

    Pipeline.__init__ = remember  # type: ignore[method-assign]
    trace = distributed(case)
    first, second = (dict(model.named_parameters()) for model in runs[0])
    shared = sorted(first.keys() & second.keys())
    for name in shared:
        assert not torch.equal(trace.initial[name], trace.parameters[-1][name]), "it was trained"
    return all(
        torch.equal(local_tensor(second[name].detach()), trace.parameters[-1][name]) for name in shared
    ), shared


def test_a_second_copy_is_neither_counted_nor_saved() -> None:
    answers = run_distributed(_copies, 2, Case(pipeline("1f1b"), architecture=TIED))
    assert answers == [(frozenset(), 1.0), (frozenset({EMBEDDING}), 0.0)]
    assert run_distributed(_copies, 2, Case(pipeline("zbv"), architecture=TIED))[0] == (frozenset(), 1.0)


def _copies(case: Case) -> tuple[frozenset[str], float]:
    weights = build(case, Mesh(case.layout, torch.device("cpu"))).weights
    assert isinstance(weights, ShardedWeights)
    for name, parameter in weights.master.items():
        parameter.grad = torch.zeros_like(parameter)
        if name == EMBEDDING:
            parameter.grad[0, 0] = 1.0
    return weights.copies, float(weights.square_norm())


# --- frozen layers ----------------------------------------------------------------------------------------------


def test_frozen_layers_have_no_gradient_and_pass_on_the_others() -> None:
    names = TINY.parameter_shapes()
    first_stages = ("embed_tokens", "layers.0.", "layers.1.")
    some = [
        frozenset(name for name in names if name.startswith(first_stages)),
        frozenset(name for name in names if not name.startswith("layers.1.")),
    ]
    run_distributed(_all_frozen, 2, [Case(pipeline(schedule)) for schedule in ("1f1b", "zbv")], some)


def _all_frozen(cases: list[Case], some: list[frozenset[str]]) -> None:
    for case in cases:
        for frozen in some:
            _frozen(case, frozen)


def _frozen(case: Case, frozen: frozenset[str]) -> None:
    def train(mesh: Mesh) -> Parallel:
        run = parallelize(
            case.architecture,
            mesh,
            compute_dtype=case.dtype,
            recompute="none",
            compile=False,
            sequence_length=case.sequence_length,
            fill=lambda model, write: initialize(
                model, 7, InitStd.for_architecture(case.architecture), write=write
            ),
            frozen=frozen,
        )
        parts = list(micro_batches(global_batch(case, 0), 2, mesh.device))
        if isinstance(run.model, Decoder):
            accumulate(run.model, run.weights, parts, case.options, untimed)
        else:
            run.model.accumulate(run.weights, parts, case.options, untimed)
        run.weights.finish_gradients()
        run.weights.square_norm()
        return run

    expected, got = (train(mesh).weights.master for mesh in (alone(), Mesh(case.layout, torch.device("cpu"))))
    for name, parameter in got.items():
        theirs = expected[name].grad
        if theirs is None:
            assert name in frozen
            assert parameter.grad is None
        else:
            assert parameter.grad is not None, name
            torch.testing.assert_close(parameter.grad, theirs, rtol=1e-10, atol=1e-12, msg=name)


# --- without gradients ------------------------------------------------------------------------------------------


def test_a_forward_pass_alone() -> None:
    cases = [
        Case(pipeline(schedule), architecture=architecture)
        for schedule, architecture in (("1f1b", TIED), ("interleaved", TINY), ("zbv", TIED))
    ]
    answers = run_distributed(_each(_forward), 2, cases)
    for case, *got in zip(cases, *answers, strict=True):
        expected = build(dataclasses.replace(case, layout=Layout()), alone()).model
        assert isinstance(expected, Decoder)
        with torch.no_grad():
            parts = _uneven_parts(case)
            losses = [float(score_sums(expected, part, LossOptions(z_loss=0.1))[0, 0]) for part in parts]
            ids = torch.tensor([TEXT])
            hidden = expected(ids, torch.arange(len(TEXT))[None], torch.tensor([[0, len(TEXT)]]))
            logits = expected.logits(hidden)[0, -1].tolist()
        assert sum(loss for loss, _ in got) == pytest.approx(sum(losses), rel=1e-12)
        assert 0.0 in [loss for loss, _ in got], "one process has the loss"
        for _, theirs in got:
            assert theirs == pytest.approx(logits, rel=1e-10)


@pytest.mark.parametrize(
    "layout",
    [
        pipeline("1f1b", tensor=2, sequence_parallel=True),
        pipeline("zbv", tensor=2),
        pipeline("1f1b", context=2),
    ],
    ids=["sequence", "tensor", "context"],
)
def test_a_text_of_any_length_in_any_layout(layout: Layout) -> None:
    """Of 7 tokens, which no two processes can share evenly."""
    expected = build(Case(Layout()), alone()).model
    assert isinstance(expected, Decoder)
    with torch.no_grad():
        hidden = expected(torch.tensor([TEXT]), torch.arange(len(TEXT))[None], torch.tensor([[0, len(TEXT)]]))
        logits = expected.logits(hidden)[0, -1].tolist()
    for got in run_distributed(_text, 4, Case(layout)):
        assert got == pytest.approx(logits, rel=1e-10)


def _text(case: Case) -> list[float]:
    run = build(case, Mesh(case.layout, torch.device("cpu")))
    assert isinstance(run.model, Pipeline)
    return run.model.last_logits(TEXT).tolist()


TEXT = [3, 1, 4, 1, 5, 9, 2]


def _uneven_parts(case: Case) -> list[Batch]:
    batch = global_batch(case, 0)
    return [batch.rows(0, 3), batch.rows(3, 6), batch.rows(6, 8)]


def _forward(case: Case) -> tuple[float, list[float]]:
    run = build(case, Mesh(case.layout, torch.device("cpu")))
    assert isinstance(run.model, Pipeline)
    loss = run.model.score_sums(_uneven_parts(case), LossOptions(z_loss=0.1))[0, 0]
    logits = run.model.last_logits(TEXT)
    assert not logits.requires_grad
    run.release()
    assert all(p.grad is None for p in run.weights.master.values())
    return float(loss), logits.tolist()


def test_training_goes_on_after_a_forward_pass_alone() -> None:
    """With weights from before a step an evaluation after it would compute with the old ones."""
    losses = run_distributed(_evaluate_between_steps, 2, Case(pipeline("interleaved"), steps=1))
    assert losses[0] == (0.0, 0.0)
    before, after = losses[1]
    assert before - after > 0.01 * before


def _evaluate_between_steps(case: Case) -> tuple[float, float]:
    run = build(case, Mesh(case.layout, torch.device("cpu")))
    assert isinstance(run.model, Pipeline)
    parts = list(micro_batches(global_batch(case, 0), 2, torch.device("cpu")))
    before = float(run.model.score_sums(parts, case.options)[0, 0])
    run.release()
    run.model.accumulate(run.weights, parts, case.options, untimed)
    run.weights.finish_gradients()
    with torch.no_grad():
        for parameter in run.weights.master.values():
            assert parameter.grad is not None
            parameter -= 1e-3 * parameter.grad
    run.weights.publish()
    return before, float(run.model.score_sums(parts, case.options)[0, 0])


def test_micro_batches_of_several_shapes_are_refused() -> None:
    run_distributed(_uneven_step, 2, Case(pipeline("1f1b")))


def _uneven_step(case: Case) -> None:
    run = build(case, Mesh(case.layout, torch.device("cpu")))
    assert isinstance(run.model, Pipeline)
    with pytest.raises(ValueError, match=r"must have one shape, got .*2, 32.*3, 32"):
        run.model.accumulate(run.weights, _uneven_parts(case), case.options, untimed)


# --- what is communicated ---------------------------------------------------------------------------------------


class _Counted(TorchDispatchMode):
    """The messages and collectives of this process, by torch's names for them."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.counts[func.__name__.split(".")[0].strip("_")] += 1
        return func(*args, **(kwargs or {}))


# Of 4 micro-batches. The first stage has three groups of parameters (embedding and two blocks), the last has two blocks
# and the head; in a V the first process has embedding, first block, last block and head, the second a block in each
# stage. ZeRO stage 3 gathers a block twice for each micro-batch and the head once a step.
GATHERED = {
    ("1f1b", 1): [3, 3],
    ("1f1b", 2): [3, 3],
    ("1f1b", 3): [3 * 2 * 4, 2 * 2 * 4 + 1],
    ("zbv", 1): [4, 2],
}
REDUCED = {
    ("1f1b", 1): [3, 3],
    ("1f1b", 2): [3 * 4, 3 * 4],
    ("1f1b", 3): [3 * 4, 3 * 4],
    ("zbv", 1): [4, 2],
}


def test_what_is_communicated_in_a_step() -> None:
    kinds = list(GATHERED)
    cases = [
        Case(pipeline(schedule, shard=2, zero_stage=zero_stage), micro_batch_size=1)
        for schedule, zero_stage in kinds
    ]
    for kind, *by_rank in zip(kinds, *run_distributed(_each(_count), 4, cases), strict=True):
        assert by_rank[:2] == by_rank[2:], "both shares of the rows do the same"
        for place in (0, 1):
            counts: dict[str, int] = by_rank[place]
            boundaries = 2 if kind[0] == "zbv" else 1  # between processes; the V's lowest is inside one
            assert counts == {
                "allgather_base": GATHERED[kind][place],
                "reduce_scatter_base": REDUCED[kind][place],
                "send": 4 * boundaries,
                "recv": 4 * boundaries,
            }, (kind, place)


def _count(case: Case) -> dict[str, int]:
    run = build(case, Mesh(case.layout, torch.device("cpu")))
    assert isinstance(run.model, Pipeline)
    parts = list(micro_batches(global_batch(case, 0).rows(0, 4), 1, torch.device("cpu")))
    for _ in range(2):  # the first time the schedule agrees on how it goes about it
        with _Counted() as counted:
            run.model.accumulate(run.weights, parts, case.options, untimed)
    return dict(counted.counts)
