"""What every layout must reproduce: a few optimizer steps of one process, on packed, masked, uneven rows."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import torch
from torch import Tensor

from modelyard.config.architecture import Architecture, Rotary
from modelyard.config.layout import Layout, Recompute
from modelyard.data.batch import Batch
from modelyard.model.decoder import Decoder
from modelyard.model.init import InitStd
from modelyard.parallel.apply import Parallel, parallelize
from modelyard.parallel.mesh import Mesh, alone
from modelyard.train.optimizer import Optimizer
from modelyard.train.step import LossOptions, train_step
from modelyard.train.weights import Weights

TINY = Architecture(
    vocab_size=64,
    hidden_size=16,
    num_layers=4,
    num_attention_heads=4,
    head_groups=2,
    head_size=4,
    ffn_hidden_size=24,
    tie_word_embeddings=False,
    norm_epsilon=1e-5,
    activation="silu",
    qkv_bias=True,
    output_bias=False,
    mlp_bias=False,
    rotary=Rotary(),
    window_size=None,
    max_position_embeddings=64,
)
"""Four layers, so that four stages have one each; biases where Qwen 2 has them."""


@dataclass(frozen=True)
class Case:
    """One row: a layout, and what is trained in it."""

    layout: Layout
    rows: int = 8
    """Rows of the global batch."""
    micro_batch_size: int = 2
    """Rows of a micro-batch in the layout; the one process takes all rows of the batch at once."""
    sequence_length: int = 32
    steps: int = 3
    architecture: Architecture = TINY
    dtype: torch.dtype = torch.float64
    recompute: Recompute = "none"
    options: LossOptions = field(default_factory=LossOptions)
    data: str = "packed"
    """`packed`: documents of many lengths, some masked; `masked`: all rows but the last without any trained token."""


@dataclass
class Trace:
    """What a run of a case leaves: for every step its numbers and every gradient, and the weights at its end."""

    losses: list[float]
    norms: list[float]
    targets: list[int]
    gradients: list[dict[str, Tensor]]
    parameters: list[dict[str, Tensor]]


def global_batch(case: Case, step: int) -> Batch:
    """Rows of random tokens in documents of 1 to 20 tokens; labels shifted inside documents, some stretches masked."""
    generator = torch.Generator().manual_seed(1000 + step)
    rows, length = case.rows, case.sequence_length

    def random(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    ids = random(0, case.architecture.vocab_size, rows, length)
    labels = torch.full_like(ids, -100)
    positions = torch.zeros_like(ids)
    boundaries = []
    for row in range(rows):
        begin, ends = 0, [0]
        while begin < length:
            end = min(length, begin + int(random(1, 21, 1)))
            positions[row, begin:end] = torch.arange(end - begin)
            labels[row, begin : end - 1] = ids[row, begin + 1 : end]
            ends.append(end)
            begin = end
        boundaries.append(ends)
        masked = int(random(0, length, 1))
        labels[row, masked : masked + 3 * row] = -100  # the further down, the fewer targets
        if case.data == "masked" and row < rows - 1:
            labels[row] = -100
    width = max(map(len, boundaries))
    cu_seqlens = torch.tensor(
        [ends + [length] * (width - len(ends)) for ends in boundaries], dtype=torch.int32
    )
    return Batch(ids, labels, positions, cu_seqlens)


def _train(case: Case, run: Parallel, batches: list[Batch], micro_batch_size: int) -> Trace:
    optimizer = Optimizer(run.weights.master, weight_decay=0.1, betas=(0.9, 0.95), epsilon=1e-8)
    trace = Trace([], [], [], [], [])
    publish = run.weights.publish
    for batch in batches:
        seen: dict[str, Tensor] = {}

        def keep(seen: dict[str, Tensor] = seen) -> None:
            # The gradient after division and clipping, as the optimizer had it.
            seen.update(
                {name: p.grad.clone() for name, p in run.weights.master.items() if p.grad is not None}
            )
            publish()

        run.weights.publish = keep  # type: ignore[method-assign]
        result = train_step(
            run.model,
            run.weights,
            optimizer,
            run.local(batch),
            learning_rate=1e-2,
            micro_batch_size=micro_batch_size,
            max_norm=0.5,
            loss_options=case.options,
            device=run.mesh.device,
            mesh=run.mesh,
        )
        assert result.skipped is None, result.skipped
        trace.losses.append(result.loss)
        trace.norms.append(result.grad_norm)
        trace.targets.append(result.targets)
        trace.gradients.append(run.whole(seen))
        trace.parameters.append(
            run.whole({name: p.detach().clone() for name, p in run.weights.master.items()})
        )
    return trace


def reference(case: Case) -> Trace:
    """The case on one process, without FSDP, all rows at once."""
    plain = dataclasses.replace(case, layout=Layout(), recompute="none")
    run = build(plain, alone())
    assert isinstance(run.weights, Weights)
    return _train(plain, run, [global_batch(case, step) for step in range(case.steps)], case.rows)


def distributed(case: Case) -> Trace:
    """The case in its layout; called by every process."""
    run = build(case, Mesh(case.layout, torch.device("cpu")))
    rows = case.rows // case.layout.data
    first = run.mesh.share * rows
    batches = []
    for step in range(case.steps):
        batch = global_batch(case, step)
        batches.append(
            Batch(
                *(
                    t[first : first + rows]
                    for t in (batch.input_ids, batch.labels, batch.positions, batch.cu_seqlens)
                )
            )
        )
    return _train(case, run, batches, case.micro_batch_size)


def build(case: Case, mesh: Mesh) -> Parallel:
    std = InitStd.for_architecture(case.architecture)
    return parallelize(
        case.architecture,
        mesh,
        compute_dtype=case.dtype,
        recompute=case.recompute,
        compile=False,
        sequence_length=case.sequence_length,
        micro_batches=case.rows // case.layout.data // case.micro_batch_size,
        loss_options=case.options,
        fill=lambda model, write: initialize_part(model, std, write),
    )


def initialize_part(model, std, write) -> None:  # type: ignore[no-untyped-def]
    from modelyard.model.init import initialize

    initialize(model, 7, std, write=write)


def compare(case: Case, gradient_bound: float = 1e-10) -> dict[str, float]:
    """Run the case in every process and hold it against one process; the largest relative differences.

    Raises AssertionError naming step, tensor and difference.
    """
    wanted, got = reference(case), distributed(case)
    assert got.targets == wanted.targets, (got.targets, wanted.targets)
    worst = {"loss": 0.0, "norm": 0.0, "gradient": 0.0, "parameter": 0.0}

    def check(kind: str, where: str, difference: float, scale: float) -> None:
        relative = difference / max(scale, 1e-30)
        worst[kind] = max(worst[kind], relative)
        assert relative <= gradient_bound, f"{where}: differs by {relative:.3g} (allowed {gradient_bound:g})"

    for step in range(case.steps):
        check(
            "loss",
            f"step {step}: loss",
            abs(got.losses[step] - wanted.losses[step]),
            abs(wanted.losses[step]),
        )
        check("norm", f"step {step}: norm", abs(got.norms[step] - wanted.norms[step]), wanted.norms[step])
        for kind, mine, theirs in (
            ("gradient", got.gradients[step], wanted.gradients[step]),
            ("parameter", got.parameters[step], wanted.parameters[step]),
        ):
            assert mine.keys() <= theirs.keys(), mine.keys() - theirs.keys()
            for name, tensor in mine.items():
                reference_tensor = theirs[name]
                assert tensor.shape == reference_tensor.shape, (name, tensor.shape, reference_tensor.shape)
                difference = float((tensor - reference_tensor).abs().max())
                check(kind, f"step {step}: {kind} of {name}", difference, float(reference_tensor.abs().max()))
    return worst
