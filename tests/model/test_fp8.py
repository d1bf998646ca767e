"""Products in fp8: scales by hand, the bounds of rounding, torch's own product beside the twin, gradients, layouts."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from modelyard.config.layout import Layout, Recompute
from modelyard.model.compile import compile_blocks
from modelyard.model.decoder import Decoder
from modelyard.model.fp8 import E4M3, E5M2, Fp8Linear, Scaling, obstacle, product, quantize, use_fp8
from modelyard.model.init import InitStd, initialize
from modelyard.model.recompute import recompute_blocks
from modelyard.parallel.apply import Parallel, parallelize
from modelyard.parallel.mesh import Mesh, alone
from modelyard.parallel.torch_private import local_tensor
from modelyard.train.step import LossOptions, accumulate
from tests.model.test_decoder import SMALL, packed
from tests.parallel.matrix import TINY, Case, local_batch
from tests.parallel.processes import run_distributed

SCALINGS: tuple[Scaling, ...] = ("tensorwise", "rowwise")
CPU = torch.device("cpu")


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def distance(ours: Tensor, theirs: Tensor) -> float:
    ours, theirs = ours.detach().double(), theirs.detach().double()
    return float((ours - theirs).norm() / theirs.norm())


# --- scales and rounding ----------------------------------------------------------------------------------------


def test_scales_of_a_tensor_by_hand() -> None:
    values, scale = quantize(torch.tensor([[1.0, -896.0], [2.2, 0.0]]), E4M3, None)
    assert scale == 2  # 896 / 448
    # 0.5, -448, 1.1 -> 1.125 (three bits after the point: 1, 1.125, ...), 0
    assert values.float().tolist() == [[0.5, -448.0], [1.125, 0.0]]
    values, scale = quantize(torch.tensor([[7168.0, 0.3]]), E5M2, None)
    assert scale == 0.125  # 7168 / 57344
    assert values.float().tolist() == [[57344.0, 2.5]]  # 2.4 between 2 and 2.5: two bits
    third = quantize(torch.tensor([[3.0]]), E4M3, None)[1]
    assert third == torch.tensor(3.0) / 448


def test_scales_of_rows_are_powers_of_two() -> None:
    x = torch.tensor([[448.0, 1.0], [449.0, 1.0], [3.0, -1.0], [2.0**-60, 0.0], [0.0, 0.0]])
    values, scale = quantize(x, E4M3, 1)
    # 3 / 448 is between 2^-8 and 2^-7; 2^-60 / 448 between 2^-69 and 2^-68.
    assert scale.flatten().tolist() == [1.0, 2.0, 2.0**-7, 2.0**-68, 2.0**-126]
    assert values.float().tolist() == [
        [448.0, 1.0],
        [224.0, 0.5],  # 224.5, where numbers are 16 apart
        [384.0, -128.0],
        [256.0, 0.0],
        [0.0, 0.0],
    ]
    assert quantize(x[:3], E4M3, 0)[1].tolist() == [[2.0, 2.0**-8]]  # 449, and 1 / 448 up to 1 / 256


@pytest.mark.parametrize(
    ("dtype", "half_step", "least"), [(E4M3, 2.0**-4, 2.0**-10), (E5M2, 2.0**-3, 2.0**-17)]
)
def test_rounding_is_no_worse_than_the_format(dtype: torch.dtype, half_step: float, least: float) -> None:
    # Magnitudes over many powers of two; below the normal numbers steps have one size (`least` is half of it).
    x = randn(64, 64) * 10.0 ** randn(64, 64, seed=1)
    for along in (None, 0, 1):
        values, scale = quantize(x, dtype, along)
        error = (values.float() * scale - x).abs()
        assert bool((error <= torch.maximum(x.abs() * half_step, scale * least) * (1 + 1e-6)).all())
        assert bool((error > 0).any())
        # The largest of whatever shares a scale is there up to rounding, and nothing is beyond the format.
        assert bool(values.float().isfinite().all())


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_seen(scaling: Scaling, bad: float) -> None:
    x, weight = randn(16, 32, dtype=torch.bfloat16), randn(16, 32, seed=1, dtype=torch.bfloat16)
    x[3, 5] = bad
    for emulated in (True, False):
        if not emulated and not can_multiply(scaling):
            continue
        y = product(x, weight, scaling, (E4M3, E4M3), emulated=emulated)
        assert bool(y[3].isnan().all())
        # With a scale for each row the others are as they were.
        assert bool(y[0].isfinite().all()) == (scaling == "rowwise")
        # As the weight's gradient sums it: along that column.
        z = product(weight.t(), x.t(), scaling, (E4M3, E4M3), emulated=emulated)
        assert bool(z[:, 5].isnan().all())
    for along in (None, 0, 1):
        assert not quantize(x, E4M3, along)[1].isfinite().all()
    layer = _layer(32, 16, scaling)
    x[3, 5] = 0
    x.requires_grad_()
    gradient = randn(16, 16, seed=2, dtype=torch.bfloat16)
    gradient[1, 2] = bad
    layer(x).backward(gradient)
    assert x.grad is not None
    assert layer.weight.grad is not None
    assert bool(x.grad[1].isnan().all())
    assert bool(layer.weight.grad[2].isnan().all())


@pytest.mark.parametrize("scaling", SCALINGS)
def test_zeros_stay_zeros(scaling: Scaling) -> None:
    x = randn(16, 32)
    x[2] = 0
    y = product(x, randn(16, 32, seed=1), scaling, (E4M3, E4M3))
    assert not y[2].any()
    assert bool(y[3].all())
    assert not product(torch.zeros(16, 32), randn(16, 32), scaling, (E5M2, E4M3)).any()


# --- the twin ---------------------------------------------------------------------------------------------------


def can_multiply(scaling: Scaling) -> bool:
    """Whether torch itself multiplies fp8 here: on CPUs rows have scales from 2.13 on."""
    try:
        product(torch.ones(16, 16), torch.ones(16, 16), scaling, (E4M3, E4M3), emulated=False)
    except (RuntimeError, NotImplementedError, AssertionError):
        return False
    return True


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_twin_is_torchs_product(scaling: Scaling, dtype: torch.dtype) -> None:
    if not can_multiply(scaling):
        pytest.skip(f"torch {torch.__version__} does not multiply {scaling} on this CPU")
    x, weight = randn(16, 48, dtype=dtype), randn(32, 48, seed=1, dtype=dtype)
    gradient = randn(16, 32, seed=2, dtype=dtype)
    first = E5M2 if scaling == "tensorwise" else E4M3
    # As in the layer: y, x's gradient (a transposed operand), the weight's gradient (two).
    for a, b, format in (
        (x, weight, E4M3),
        (gradient, weight.t(), first),
        (gradient.t(), x.t(), first),
    ):
        ours = product(a, b, scaling, (format, E4M3), emulated=True)
        theirs = product(a, b, scaling, (format, E4M3), emulated=False)
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        # Another order of sums in fp32; in bf16 a rounding may fall to the other side.
        assert distance(ours, theirs) < (1e-6 if dtype == torch.float32 else 1e-3)


# --- a layer ----------------------------------------------------------------------------------------------------


def _layer(inputs: int, outputs: int, scaling: Scaling, *, bias: bool = False) -> Fp8Linear:
    layer = nn.Linear(inputs, outputs, bias=bias, dtype=torch.bfloat16)
    with torch.no_grad():
        layer.weight.copy_(randn(outputs, inputs, seed=5) * inputs**-0.5)
    layer.__class__ = Fp8Linear
    assert isinstance(layer, Fp8Linear)
    layer.scaling = scaling
    return layer


@pytest.mark.parametrize("scaling", SCALINGS)
def test_a_layer_is_near_the_exact_one(scaling: Scaling) -> None:
    layer = _layer(64, 32, scaling, bias=True)
    x = randn(48, 64, dtype=torch.bfloat16).requires_grad_()
    gradient = randn(48, 32, seed=3, dtype=torch.bfloat16)
    y = layer(x)
    y.backward(gradient)
    assert x.grad is not None
    weight, bias = layer.weight, layer.bias
    wide = weight.detach().double()
    found = {
        "y": (y, x.detach().double() @ wide.t() + bias.detach().double()),
        "x": (x.grad, gradient.double() @ wide),
        "weight": (weight.grad, gradient.double().t() @ x.detach().double()),
    }
    for name, (ours, exact) in found.items():
        assert ours is not None
        # Two operands rounded by at most 1/16 (e5m2: 1/8) each: on average a third of that. And no better than fp8.
        assert 0.01 < distance(ours, exact) < 0.08, name
    # Exactly the products of the recipe.
    first = E5M2 if scaling == "tensorwise" else E4M3
    assert torch.equal(x.grad, product(gradient, weight.detach().t(), scaling, (first, E4M3)))
    assert weight.grad is not None
    assert torch.equal(weight.grad, product(gradient.t(), x.detach().t(), scaling, (first, E4M3)))
    assert bias.grad is not None
    torch.testing.assert_close(bias.grad.double(), gradient.double().sum(0), atol=0.02, rtol=0.01)
    with torch.no_grad():  # as the exported model computes
        assert torch.equal(layer(x), nn.functional.linear(x, weight, bias))


def test_only_what_is_asked_for_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[tuple[int, int]] = []

    def count(a: Tensor, b: Tensor, *rest: Any, **options: Any) -> Tensor:
        computed.append((a.shape[0], b.shape[0]))
        return product(a, b, *rest, **options)

    monkeypatch.setattr("modelyard.model.fp8.product", count)
    for frozen in (True, False):
        computed.clear()
        layer = _layer(32, 16, "rowwise")
        layer.weight.requires_grad_(not frozen)
        x = randn(48, 32, dtype=torch.bfloat16).requires_grad_(frozen)
        layer(x).sum().backward()
        assert (layer.weight.grad is None, x.grad is None) == (frozen, not frozen)
        assert computed == [(48, 16), (48, 32) if frozen else (16, 32)]


# --- a model ----------------------------------------------------------------------------------------------------

WIDE = dataclasses.replace(TINY, hidden_size=64, head_size=16, ffn_hidden_size=96, num_layers=2)


def _model(scaling: Scaling | None) -> Decoder:
    torch._dynamo.reset()
    model = Decoder(SMALL)
    initialize(model, 0, InitStd.for_architecture(SMALL))
    model.to(torch.bfloat16)
    if scaling is not None:
        use_fp8(model, scaling)
    return model


def _gradients(model: Decoder) -> dict[str, Tensor]:
    hidden = model(*packed())
    (hidden * randn(*hidden.shape, seed=9).to(hidden.dtype)).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_the_seven_matrices_of_a_block_and_no_others() -> None:
    model = _model("rowwise")
    kinds = {name: type(module) for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert sorted(name.removeprefix("layers.0.") for name, kind in kinds.items() if kind is Fp8Linear and ".0." in name) == [
        "mlp.down_proj", "mlp.gate_proj", "mlp.up_proj",
        "self_attn.k_proj", "self_attn.o_proj", "self_attn.q_proj", "self_attn.v_proj",
    ]  # fmt: skip
    assert [name for name, kind in kinds.items() if kind is not Fp8Linear] == ["lm_head"]


@pytest.mark.parametrize("scaling", SCALINGS)
def test_recomputed_activations_give_the_same_bits(scaling: Scaling) -> None:
    expected = _gradients(_model(scaling))
    plain = _gradients(_model(None))
    name = "layers.0.mlp.up_proj.weight"
    assert 0.01 < distance(expected[name], plain[name]) < 0.5
    modes: tuple[Recompute, ...] = ("selective", "full")
    for mode in modes:
        model = _model(scaling)
        recompute_blocks(model, mode)
        for name, gradient in _gradients(model).items():
            assert torch.equal(gradient, expected[name]), (mode, name)


@pytest.mark.parametrize(
    ("scaling", "mode"),
    [pytest.param("tensorwise", "none", marks=pytest.mark.slow), ("rowwise", "selective")],
)
def test_compiled_blocks_have_no_graph_breaks(scaling: Scaling, mode: Recompute) -> None:
    expected = _gradients(_model(scaling))
    model = _model(scaling)
    recompute_blocks(model, mode)
    compile_blocks(model, backend="aot_eager")  # with fullgraph: a break is an error
    for name, gradient in _gradients(model).items():
        assert distance(gradient, expected[name]) < 0.02, name


# --- layouts ----------------------------------------------------------------------------------------------------


def _run(case: Case, mesh: Mesh, scaling: Scaling, dtype: torch.dtype = torch.bfloat16) -> Parallel:
    std = InitStd.for_architecture(case.architecture)
    return parallelize(
        case.architecture,
        mesh,
        compute_dtype=dtype,
        recompute=case.recompute,
        compile=False,
        sequence_length=case.sequence_length,
        fill=lambda model, write: initialize(model, 3, std, write=write),
        fp8=scaling,
    )


def _accumulated(case: Case, mesh: Mesh, scaling: Scaling) -> tuple[float, dict[str, Tensor]]:
    """Loss and whole gradients of one batch."""
    run = _run(case, mesh, scaling)
    run.weights.publish()
    batch = local_batch(case, run, 0)
    parts = [batch.rows(i, i + case.micro_batch_size) for i in range(0, len(batch), case.micro_batch_size)]
    quiet: Any = lambda phase: None  # noqa: E731
    if isinstance(run.model, Decoder):
        loss = accumulate(run.model, run.weights, parts, LossOptions(), quiet)
    else:
        loss = run.model.accumulate(run.weights, parts, LossOptions(), quiet)
    run.weights.finish_gradients()
    own = {n: p.grad for n, p in run.weights.master.items() if p.grad is not None}
    total = mesh.total(loss, run.weights.square_norm(), batch.num_targets, notice=False, abandon=False)
    return total.loss / total.targets, run.whole(own)


def _held(case: Case, scaling: Scaling, bounds: dict[str, float]) -> None:
    loss, gradients = _accumulated(case, Mesh(case.layout, CPU), scaling)
    truth, whole = _accumulated(
        dataclasses.replace(case, layout=Layout(), recompute="none"), alone(CPU), scaling
    )
    assert abs(loss / truth - 1) < bounds["loss"]
    assert gradients
    for name, gradient in gradients.items():
        assert distance(gradient, whole[name]) < bounds["gradient"], (name, distance(gradient, whole[name]))


LAYOUTS = {
    "zero 3": (Layout(shard=2, zero_stage=3), "full"),
    "1f1b": (Layout(pipeline=2), "selective"),
    "zbv": (Layout(pipeline=2, schedule="zbv", stages_per_process=2), "none"),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_without_split_matrices_compute_the_same(name: str) -> None:
    shape = dataclasses.replace(WIDE, num_layers=4) if name == "zbv" else WIDE
    layout, recompute = LAYOUTS[name]
    case = Case(layout, rows=4, micro_batch_size=1, architecture=shape, recompute=recompute)  # type: ignore[arg-type]
    # The same products on the same numbers: only sums of gradients may be made in another order.
    run_distributed(_held, layout.world, case, "tensorwise", {"loss": 1e-6, "gradient": 1e-5})


def _rows_of_one_layer() -> None:
    """The first products by rows see what one process sees: their results are its, up to the order of sums."""
    case = Case(Layout(tensor=2), architecture=WIDE)
    mesh = Mesh(case.layout, CPU)
    split, whole = (_run(case, m, "rowwise", torch.float32) for m in (mesh, alone(CPU)))
    for run in (split, whole):
        run.weights.publish()
    place, x = mesh.place("tensor"), randn(32, 64)
    for key in ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj", "mlp.up_proj"):
        ours, theirs = (run.models[0].get_submodule(f"layers.0.{key}") for run in (split, whole))
        assert type(ours) is type(theirs) is Fp8Linear
        y, expected = ours(x), theirs(x).chunk(2, -1)[place]
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)
        gradient = randn(32, expected.shape[1], seed=place)
        y.backward(gradient)
        full = torch.zeros(32, 2 * expected.shape[1])
        full.chunk(2, -1)[place].copy_(gradient)
        # The weight's gradient: scales for each feature, all tokens.
        exact = torch.autograd.grad(theirs(x), theirs.weight, full)[0].chunk(2)[place]
        assert ours.weight.grad is not None
        torch.testing.assert_close(local_tensor(ours.weight.grad), exact, rtol=1e-5, atol=1e-5)


def test_matrices_cut_by_rows_have_the_scales_of_whole_ones() -> None:
    run_distributed(_rows_of_one_layer, 2)


@pytest.mark.parametrize("sequence", [False, True])
def test_tensor_parallel_processes_scale_what_they_have(sequence: bool) -> None:
    case = Case(Layout(tensor=2, sequence_parallel=sequence), rows=2, micro_batch_size=2, architecture=WIDE)
    # Scales of o and down, and of x's gradients, are those of parts: apart by the rounding of fp8, not more.
    run_distributed(_held, 2, case, "rowwise", {"loss": 0.01, "gradient": 0.2})


# --- devices ----------------------------------------------------------------------------------------------------


@pytest.fixture
def capability(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """What the GPU that is not here says it can do: the last of the list."""
    said: list[tuple[int, int]] = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: said[-1])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "an old one")
    return said


def test_gpus_before_ada_are_told_apart(capability: list[tuple[int, int]]) -> None:
    assert obstacle(CPU) is None
    for able in ((8, 9), (9, 0), (10, 0)):
        capability.append(able)
        assert obstacle(torch.device("cuda", 0)) is None
    capability.append((8, 0))
    assert (obstacle(torch.device("cuda", 0)) or "").endswith("and this is an old one")
