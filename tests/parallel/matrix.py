"""What every layout must reproduce: a few optimizer steps of one process, on packed, masked, uneven rows.

`hold(case)` runs a case on the processes of its layout and asserts, for every optimizer step: the loss, the norm of the
gradient, the whole gradient of every parameter before clipping, and every parameter after the update. What it is held
against (`reference`) is one process that shares only the decoder with the program: all rows at once, dense masked
attention, the loss as its formula is written, autograd, torch's own AdamW and clipping.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modelyard.config.adapter import Adapter, block_matrices
from modelyard.config.architecture import Architecture, Rotary
from modelyard.config.layout import Layout, Recompute
from modelyard.data.batch import Batch
from modelyard.dtypes import wide
from modelyard.model.adapter import QUANTIZED, AdaptedLinear, AdaptedWeights, is_quantized_part
from modelyard.model.compile import compile_blocks
from modelyard.model.decoder import Decoder
from modelyard.model.dropout import token_numbers
from modelyard.model.init import InitStd, initialize
from modelyard.parallel.apply import Parallel, parallelize
from modelyard.parallel.data import ShardedWeights
from modelyard.parallel.mesh import Mesh, alone
from modelyard.parallel.torch_private import local_slice
from modelyard.train.optimizer import Optimizer
from modelyard.train.step import LossOptions, train_step
from tests.parallel.processes import run_distributed

SEED = 7
WEIGHT_DECAY, BETAS, MAX_NORM = 0.1, (0.9, 0.95), 2.1
"""Of the three steps on `packed` rows two are clipped (their norms are 2.12, 2.09 and 2.18), of `long` none, of `masked` all."""

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


FROZEN: dict[str, Callable[[str], bool]] = {
    "nothing": lambda name: False,
    "all but the head": lambda name: not name.startswith("lm_head"),
    "the first half": lambda name: name.startswith(("embed", "layers.0.", "layers.1.")),
    "the last half": lambda name: not name.startswith(("embed", "layers.0.", "layers.1.")),
}
"""Which parameters are not trained, by name; halves of four layers."""


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
    compile: bool = False
    """Whether blocks go through torch.compile, with the backend that traces and changes nothing (`aot_eager`)."""
    options: LossOptions = field(default_factory=LossOptions)
    frozen: str = "nothing"
    """What keeps its values: a word of `FROZEN`."""
    adapter: Adapter | None = None
    """Trained beside a frozen base; B is not zero at the start, so that A has a gradient in every step."""
    data: str = "packed"
    """Documents of a row: `packed`: many, of 1 to 20 tokens, the further down the row the more of it masked; `long`: of
    any length, most longer than a chunk; `whole`: every row one; `masked`: as packed, and all rows but the last without
    any trained token."""

    @property
    def frozen_names(self) -> frozenset[str]:
        shapes = self.architecture.parameter_shapes()
        if self.adapter is not None and self.adapter.freeze_others:
            return frozenset(shapes) | {
                f"{m}.{part}" for m in block_matrices(self.architecture) for part in QUANTIZED
            }
        return frozenset(filter(FROZEN[self.frozen], shapes))

    @property
    def has_dropout(self) -> bool:
        return self.adapter is not None and self.adapter.dropout > 0

    @property
    def is_one_summand(self) -> bool:
        """Whether one micro-batch of one process has all the targets: nothing is added to the gradients it makes."""
        summands = self.rows // self.micro_batch_size * self.layout.context
        return self.data == "masked" or summands == 1

    @property
    def on_one_process(self) -> Case:
        """What this case computes, whatever computes it."""
        return dataclasses.replace(
            self, layout=Layout(), micro_batch_size=self.rows, recompute="none", compile=False
        )


@dataclass(frozen=True)
class Bounds:
    """Largest relative differences: of a number, or of a tensor's elements against its largest element."""

    loss: float
    norm: float
    gradient: float
    parameter: float


BOUNDS = {
    torch.float64: Bounds(1e-10, 1e-10, 1e-10, 1e-10),
    # Sums in another order, 2^-24 each; the epsilon of `EPSILON` keeps the optimizer from multiplying that.
    torch.float32: Bounds(1e-5, 1e-5, 1e-5, 1e-4),
    # Elements of 8 bits, against the largest of their tensor: measured over data, contexts and copies up to 8e-4, 1e-2,
    # 1e-1 and 8e-2 (the first gradient 4e-2; then some weights round to the neighbour, which is 2^-8 away). What no
    # such bound can see, sums made in bf16 on the way, `_summed_wide` does.
    torch.bfloat16: Bounds(2e-3, 2e-2, 2e-1, 2e-1),
}
EPSILON = {torch.float64: 1e-8, torch.float32: 1e-2, torch.bfloat16: 1e-2}
LEARNING_RATE = {torch.float64: 1e-2, torch.float32: 1e-3, torch.bfloat16: 1e-3}
"""Adam divides a gradient by its own size: where that is rounding noise alone (1e-8 of the largest in fp32), an epsilon
of 1e-8 makes a full step of either sign out of it, and the next gradients differ by 1e-4. With these, they do not."""


Place = tuple[slice, ...]
"""Which part of a whole tensor a process has."""


@dataclass
class Trace:
    """What a run of a case leaves: its first weights, and for every step its numbers, gradients and weights after it.

    Tensors are this process's parts of the whole ones; no message is sent to compare them.
    """

    initial: dict[str, Tensor]
    places: dict[str, Place]
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    """Of the mean loss, before clipping."""
    summed_wide: bool = True
    """Whether the sums over tokens that these were made from have more bits than bf16 has."""
    parameters: list[dict[str, Tensor]] = field(default_factory=list)
    final: dict[str, Tensor] = field(default_factory=dict)
    """The last of `parameters`, each one whole."""


def global_batch(case: Case, step: int) -> Batch:
    """Rows of random tokens in documents; labels shifted inside documents, some stretches masked."""
    generator = torch.Generator().manual_seed(1000 + step)
    rows, length = case.rows, case.sequence_length
    longest = {"packed": 20, "masked": 20, "long": 2 * length, "whole": length}[case.data]

    def random(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    ids = random(0, case.architecture.vocab_size, rows, length)
    labels = torch.full_like(ids, -100)
    positions = torch.zeros_like(ids)
    boundaries = []
    for row in range(rows):
        begin, ends = 0, [0]
        while begin < length:
            end = length if case.data == "whole" else min(length, begin + int(random(1, longest + 1, 1)))
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
    numbers = token_numbers(SEED, step * rows, rows, length) if case.has_dropout else None
    return Batch(ids, labels, positions, cu_seqlens, None, numbers)


# --- the truth --------------------------------------------------------------------------------------------------


def reference(case: Case) -> Trace:
    """The case on one process; made once for all layouts of it."""
    return _reference(case.on_one_process)


@lru_cache(maxsize=64)
def _reference(case: Case) -> Trace:
    if case.dtype != torch.float64 or case.has_dropout:
        # Where roundings are part of the result, the truth for many processes is what one process of the program does.
        return _train(case, build(case, alone()), [global_batch(case, step) for step in range(case.steps)])
    if case.adapter is not None:
        parameters, effective = _adapted(case)
    else:
        parameters = dict(_drawn(case).named_parameters())
        effective = None
    with torch.device("meta"):
        model = Decoder(case.architecture, backend="dense").to(case.dtype)
    trace = Trace(_copies(parameters), {name: (slice(None),) * p.dim() for name, p in parameters.items()})
    for name in case.frozen_names & parameters.keys():
        parameters[name].requires_grad_(False)
    trained = [p for p in parameters.values() if p.requires_grad]
    matrices = [p for p in trained if p.dim() >= 2]
    vectors = [p for p in trained if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}],
        lr=LEARNING_RATE[case.dtype],
        betas=BETAS,
        eps=EPSILON[case.dtype],
        foreach=False,
        fused=False,
    )
    for step in range(case.steps):
        batch = global_batch(case, step)
        values = parameters if effective is None else effective()
        head = "embed_tokens.weight" if case.architecture.tie_word_embeddings else "lm_head.weight"
        inputs = (batch.input_ids, batch.positions, batch.cu_seqlens)
        hidden = torch.func.functional_call(model, values, inputs)
        logits = (hidden @ values[head].t()).flatten(0, 1) * case.architecture.logits_scale
        labels = batch.labels.flatten()
        loss = F.cross_entropy(logits, labels, ignore_index=-100)
        loss = loss + case.options.z_loss * logits[labels != -100].logsumexp(-1).square().mean()
        loss.backward()
        trace.losses.append(loss.item())
        trace.targets.append(int((labels != -100).sum()))
        trace.gradients.append(_gradients(parameters))
        trace.norms.append(float(nn.utils.clip_grad_norm_(trained, MAX_NORM)))
        optimizer.step()
        optimizer.zero_grad()
        trace.parameters.append(_copies(parameters))
    return trace


def _drawn(case: Case) -> Decoder:
    """The first weights of the decoder without an adapter."""
    with torch.device("meta"):
        model = Decoder(case.architecture).to(case.dtype)
    model.to_empty(device="cpu")
    initialize(model, SEED, _std(case))
    return model


class _InMemory:
    """A source of weights."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        self._tensors = tensors

    def load(self, name: str) -> Tensor:
        return self._tensors[name]


def adapted_weights(case: Case) -> AdaptedWeights:
    """What fills the case's adapted decoder: A and B drawn anew, magnitudes near the lengths of rows."""
    assert case.adapter is not None
    base = {name: p.detach() for name, p in _drawn(case).named_parameters()}
    own = {}
    for name, shape in case.adapter.shapes(case.architecture).items():
        generator = torch.Generator().manual_seed(int.from_bytes(name.encode(), "little") % 2**31)
        drawn = torch.empty(shape, dtype=wide(case.dtype)).normal_(0, 0.1, generator=generator)
        if name.endswith("lora_magnitude"):
            drawn = base[name.replace("lora_magnitude", "weight")].norm(dim=1) * (1 + 0.1 * drawn)
        own[name] = drawn
    sources: Any = _InMemory(base), _InMemory(own)
    return AdaptedWeights(
        sources[0], case.adapter, seed=SEED, dtype=case.dtype, device=torch.device("cpu"), first=sources[1]
    )


def _adapted(case: Case) -> tuple[dict[str, nn.Parameter], Callable[[], dict[str, Tensor]]]:
    """The parameters of an adapted decoder, and the weights that a plain one has to have to compute the same: every adapter
    multiplied out, with a gradient."""
    adapter = case.adapter
    assert adapter is not None
    model = build(case, alone()).models[0]
    parameters = {name: nn.Parameter(p.detach().clone()) for name, p in model.named_parameters()}
    own = adapter.shapes(case.architecture)
    matrices = {
        name: module.matrix(case.dtype)
        for name, module in model.named_modules()
        if isinstance(module, AdaptedLinear)
    }

    def effective() -> dict[str, Tensor]:
        values: dict[str, Tensor] = {
            n: p for n, p in parameters.items() if n in case.architecture.parameter_shapes()
        }
        for name, base in matrices.items():
            weight = parameters.get(f"{name}.weight", base)
            if f"{name}.lora_A" in own:
                weight = weight + adapter.scale * parameters[f"{name}.lora_B"] @ parameters[f"{name}.lora_A"]
            if f"{name}.lora_magnitude" in own:
                lengths = weight.detach().square().sum(1).sqrt()
                weight = (parameters[f"{name}.lora_magnitude"] / lengths)[:, None] * weight
            values[f"{name}.weight"] = weight
        return values

    return parameters, effective


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def _gradients(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}


# --- a layout ---------------------------------------------------------------------------------------------------


def _std(case: Case) -> InitStd:
    return InitStd.for_architecture(case.architecture)


def build(case: Case, mesh: Mesh) -> Parallel:
    """The case's model in the layout of `mesh`, as the program makes it."""
    fill: Any = lambda model, write: initialize(model, SEED, _std(case), write=write)  # noqa: E731
    if case.adapter is not None:
        fill = adapted_weights(case).fill
    with mock.patch("modelyard.parallel.apply.compile_blocks", partial(compile_blocks, backend="aot_eager")):
        return parallelize(
            case.architecture,
            mesh,
            compute_dtype=case.dtype,
            recompute=case.recompute,
            compile=case.compile,
            sequence_length=case.sequence_length,
            fill=fill,
            frozen=case.frozen_names,
            adapter=case.adapter,
        )


def local_batch(case: Case, run: Parallel, step: int) -> Batch:
    """What this process trains on."""
    rows = case.rows // case.layout.data
    first = run.mesh.share * rows
    batch = global_batch(case, step)
    tensors = (batch.input_ids, batch.labels, batch.positions, batch.cu_seqlens, batch.kinds, batch.numbers)
    return run.local(Batch(*(t if t is None else t[first : first + rows] for t in tensors)))  # type: ignore[arg-type]


def distributed(case: Case) -> Trace:
    """The case in its layout; called by every process."""
    run = build(case, Mesh(case.layout, torch.device("cpu")))
    return _train(case, run, [local_batch(case, run, step) for step in range(case.steps)])


def make_optimizer(case: Case, run: Parallel) -> Optimizer:
    return Optimizer(
        run.weights.master,
        weight_decay=WEIGHT_DECAY,
        betas=BETAS,
        epsilon=EPSILON[case.dtype],
        scales=dict.fromkeys(case.frozen_names, 0.0),
    )


def _train(case: Case, run: Parallel, batches: list[Batch]) -> Trace:
    weights = run.weights
    at_rest = {id(p) for model in run.models for p in model.parameters()}
    optimizer = make_optimizer(case, run)
    trace = Trace(
        _copies(weights.master),
        {
            name: local_slice(weights.sharded[name])
            if isinstance(weights, ShardedWeights)
            else (slice(None),) * p.dim()
            for name, p in weights.master.items()
        },
    )
    for batch in batches:
        sums: dict[str, Tensor] = {}
        finish = weights.finish_gradients

        def keep(sums: dict[str, Tensor] = sums, finish: Callable[[], None] = finish) -> None:
            finish()
            sums.update(_gradients(weights.master))

        with mock.patch.object(weights, "finish_gradients", keep):
            result = train_step(
                run.model,
                weights,
                optimizer,
                batch,
                learning_rate=LEARNING_RATE[case.dtype],
                micro_batch_size=case.micro_batch_size,
                max_norm=MAX_NORM,
                loss_options=case.options,
                device=run.mesh.device,
                mesh=run.mesh,
            )
        assert result.skipped is None, result.skipped
        left = [name for model in run.models for name, p in model.named_parameters() if id(p) not in at_rest]
        assert not left, f"still gathered after the step: {left}"
        trace.losses.append(result.loss)
        trace.norms.append(result.grad_norm)
        trace.targets.append(result.targets)
        trace.gradients.append({name: g / result.targets for name, g in sums.items()})
        trace.summed_wide &= case.is_one_summand or _summed_wide(sums)
        trace.parameters.append(_copies(weights.master))
    trace.final = run.whole(trace.parameters[-1])
    return trace


def _summed_wide(gradients: Mapping[str, Tensor]) -> bool:
    """Whether much of each matrix's gradient has more bits than bf16 has. Sums that are made in bf16, wherever on their
    way, have none; of those in fp32 over several micro-batches or processes nine elements in ten have, of the embedding's
    (whose rows few tokens add to) half. Zeros tell nothing: words that did not occur, activations that are off."""
    matrices = [g[g != 0] for g in gradients.values() if g.dim() == 2]
    return all(float((g != g.bfloat16()).float().mean()) > 0.25 for g in matrices if g.numel())


# --- held together ----------------------------------------------------------------------------------------------


@dataclass
class Answer:
    """What one process found."""

    worst: dict[str, float]
    """Kind (`loss`, `norm`, `gradient`, `parameter`) → largest relative difference."""
    parameters: dict[str, str]
    """Name → digest of its value after the last step; the names are those that this process has a part of."""
    numbers: list[float]
    """Losses and norms."""


def compare(
    case: Case, gradient_bound: float | None = None, *, wanted: Trace | None = None, twice: bool = False
) -> Answer:
    """Run the case in every process and hold it against one process; `twice`: and against itself, to the bit.

    Raises AssertionError naming step, tensor and difference. Each process compares the parameters that it has a part of:
    `hold` sees to it that together they have all.
    """
    wanted = reference(case) if wanted is None else wanted
    got = distributed(case)
    bounds = BOUNDS[case.dtype]
    if gradient_bound is not None:
        bounds = Bounds(gradient_bound, gradient_bound, gradient_bound, gradient_bound)
    worst = {"loss": 0.0, "norm": 0.0, "gradient": 0.0, "parameter": 0.0}

    def check(kind: str, what: str, difference: float, scale: float) -> None:
        relative = difference / max(scale, 1e-30)
        worst[kind] = max(worst[kind], relative)
        bound = getattr(bounds, kind)
        # Not `>`: a difference that is not a number is no agreement.
        assert relative <= bound, f"{what}: differs by {relative:.3g} (allowed {bound:g})"

    def check_tensor(kind: str, where: str, name: str, mine: Tensor, expected: Tensor, place: Place) -> None:
        part = expected[place]
        assert mine.shape == part.shape, f"{where}: {kind} of {name}: {mine.shape}, not {part.shape}"
        kept_as = case.dtype if case.adapter is not None and name in case.frozen_names else wide(case.dtype)
        assert mine.dtype == part.dtype == kept_as, f"{where}: {kind} of {name} is {mine.dtype}"
        if mine.numel():
            difference = float((mine - part).abs().max())
            check(kind, f"{where}: {kind} of {name}", difference, float(expected.abs().max()))

    assert got.summed_wide or case.dtype != torch.bfloat16, "gradients were summed in bf16"
    names = got.initial.keys()
    assert names, "no parameter here"
    assert names <= wanted.initial.keys(), names - wanted.initial.keys()
    for name, tensor in got.initial.items():
        part = wanted.initial[name][got.places[name]]
        assert torch.equal(_bits(tensor), _bits(part)), f"initial {name}: not bit-equal"
    packed = {name for name in names if is_quantized_part(name)}  # bytes, no numbers
    for step in range(case.steps):
        where = f"step {step}"
        assert got.targets[step] == wanted.targets[step], f"{where}: targets: {got.targets[step]}"
        check("loss", f"{where}: loss", abs(got.losses[step] - wanted.losses[step]), abs(wanted.losses[step]))
        for kind, ours, theirs in (
            ("gradient", got.gradients[step], wanted.gradients[step]),
            ("parameter", got.parameters[step], wanted.parameters[step]),
        ):
            here = names - case.frozen_names if kind == "gradient" else names
            assert ours.keys() == here, f"{where}: {kind}: no {sorted(here - ours.keys())}, or too many"
            for name in ours.keys() - packed:
                check_tensor(kind, where, name, ours[name], theirs[name], got.places[name])
            if kind == "gradient":
                check("norm", f"{where}: norm", abs(got.norms[step] - wanted.norms[step]), wanted.norms[step])
    for name in names & case.frozen_names:
        before, after = got.initial[name], got.parameters[-1][name]
        assert torch.equal(_bits(before), _bits(after)), f"{name} is frozen and has changed"
    assert got.final.keys() == names
    for name, tensor in got.final.items():
        if name in packed:
            assert torch.equal(_bits(tensor), _bits(wanted.initial[name])), f"gathered {name}"
            continue
        place = (slice(None),) * tensor.dim()
        check_tensor("parameter", "gathered", name, tensor, wanted.parameters[-1][name], place)
    digests = _digests(got)
    if twice:
        again = distributed(case)
        assert (again.losses, again.norms) == (got.losses, got.norms), "a second run gives other numbers"
        other = _digests(again)
        changed = [name for name, digest in digests.items() if other[name] != digest]
        assert not changed, f"a second run gives other bits: {changed}"
    return Answer(worst, digests, got.losses + got.norms)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def _digests(trace: Trace) -> dict[str, str]:
    """Digests of the whole parameters after the last step."""
    return {
        name: hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, tensor in trace.final.items()
    }


def hold(case: Case, *, twice: bool = False, timeout: float = 60.0) -> dict[str, float]:
    """Run the case on the processes of its layout; raises AssertionError unless it is the run of one process.

    Every parameter must have been compared by some process, and processes that have the same one, or the same number,
    must agree to the bit. Returns the largest relative differences by kind.
    """
    wanted = reference(case)
    work: Any = partial(compare, wanted=wanted, twice=twice)
    answers: list[Answer] = run_distributed(work, case.layout.world, case, timeout=timeout)
    seen: dict[str, str] = {}
    for rank, answer in enumerate(answers):
        assert answer.numbers == answers[0].numbers, f"rank {rank} has other losses or norms than rank 0"
        for name, digest in answer.parameters.items():
            assert seen.setdefault(name, digest) == digest, (
                f"rank {rank} has another {name} than a rank before"
            )
    missing = wanted.initial.keys() - seen.keys()
    assert not missing, f"no process has {sorted(missing)}"
    return {kind: max(answer.worst[kind] for answer in answers) for kind in answers[0].worst}
