import dataclasses
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from modelyard.config.architecture import Architecture
from modelyard.data.batch import Batch
from modelyard.loss import cross_entropy
from modelyard.model.decoder import Decoder
from modelyard.model.init import InitStd, initialize
from modelyard.train import step as step_module
from modelyard.train.optimizer import Optimizer
from modelyard.train.step import LossOptions, StepResult, train_step
from modelyard.train.weights import Weights

SHAPE = Architecture(37, 16, 2, 4, 2, 4, 24)


class Setup:
    def __init__(self, dtype: torch.dtype = torch.float64, shape: Architecture = SHAPE):
        self.model = Decoder(shape)
        initialize(self.model, 0, InitStd.for_architecture(shape))
        self.weights = Weights(self.model, dtype)
        self.optimizer = Optimizer(self.weights.master, weight_decay=0.1, betas=(0.9, 0.95), epsilon=1e-8)

    def step(self, batch: Batch, micro_batch_size: int = 2, max_norm: float = 1.0) -> StepResult:
        return train_step(
            self.model,
            self.weights,
            self.optimizer,
            batch,
            learning_rate=0.01,
            micro_batch_size=micro_batch_size,
            max_norm=max_norm,
            loss_options=LossOptions(),
            device=torch.device("cpu"),
        )

    def parameters(self) -> list[torch.Tensor]:
        return [p.detach().clone() for p in self.weights.master.values()]


def ragged_batch() -> Batch:
    """Four rows of two documents each; unequal numbers of targets, the third row has none."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(37, (4, 13), generator=generator)
    labels = tokens[:, 1:].clone()
    labels[0, :9] = -100
    labels[2] = -100
    cu_seqlens = torch.tensor([[0, 5, 12], [0, 12, 12], [0, 3, 12], [0, 7, 12]], dtype=torch.int32)
    positions = torch.stack([torch.cat([torch.arange(n) for n in row.diff()]) for row in cu_seqlens])
    return Batch(tokens[:, :-1].contiguous(), labels, positions, cu_seqlens)


def test_step_is_the_plain_algorithm() -> None:
    """Against autograd over all rows at once, `F.cross_entropy` over all targets, torch's own clip and AdamW."""
    batch, ours, plain = ragged_batch(), Setup(), Setup()
    result = ours.step(batch)
    hidden = plain.model(batch.input_ids, batch.positions, batch.cu_seqlens)
    loss = F.cross_entropy(plain.model.logits(hidden).flatten(0, 1), batch.labels.flatten())
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(plain.model.parameters(), 1.0)
    plain.optimizer.step(0.01)
    assert result.targets == 3 + 12 + 0 + 12
    assert result.loss == pytest.approx(loss.item(), rel=1e-12)
    assert result.grad_norm == pytest.approx(norm.item(), rel=1e-12)
    assert result.grad_norm > 1.0  # so that clipping is part of the comparison
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
def test_micro_batch_size_does_not_matter(micro_batch_size: int) -> None:
    """A fully masked micro-batch (row 2 alone) included."""
    batch, whole, cut = ragged_batch(), Setup(), Setup()
    for _ in range(3):
        expected, result = whole.step(batch, 4), cut.step(batch, micro_batch_size)
        assert result.loss == pytest.approx(expected.loss, rel=1e-12)
        assert result.grad_norm == pytest.approx(expected.grad_norm, rel=1e-12)
    for a, b in zip(whole.parameters(), cut.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_clipping_can_be_off() -> None:
    clipped, free = Setup(), Setup()
    for setup, max_norm in ((clipped, 1e-3), (free, 0.0)):
        setup.step(ragged_batch(), max_norm=max_norm)
    moment = "embed_tokens.weight.exp_avg"
    ratio = clipped.optimizer.moments()[moment].norm() / free.optimizer.moments()[moment].norm()
    norm = Setup().step(ragged_batch()).grad_norm
    assert ratio.item() == pytest.approx(1e-3 / norm, rel=1e-3)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_nothing_moves_when_the_loss_is_not_finite(poison: float) -> None:
    setup, batch = Setup(), ragged_batch()
    setup.step(batch)
    healthy = setup.model.norm.weight.detach().clone()
    with torch.no_grad():
        setup.model.norm.weight[0] = poison
    parameters, moments = setup.parameters(), {k: v.clone() for k, v in setup.optimizer.moments().items()}
    result = setup.step(batch)
    assert result.skipped is not None
    assert "loss is" in result.skipped
    assert setup.optimizer.steps == 1
    for a, b in zip(setup.parameters(), parameters, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    for name, moment in setup.optimizer.moments().items():
        assert torch.equal(moment, moments[name])
    with torch.no_grad():
        setup.model.norm.weight.copy_(healthy)
    after = setup.step(batch)
    assert after.skipped is None, "gradients of the skipped step must not leak into the next one"


def test_gradient_that_is_not_finite_is_skipped_although_the_loss_is() -> None:
    setup = Setup(torch.float32)
    with torch.no_grad():  # 1e-30 in the norm's input makes the gradient overflow, not the loss
        setup.model.embed_tokens.weight.fill_(0.0)
        setup.model.embed_tokens.weight.register_hook(lambda gradient: gradient * float("inf"))
    result = setup.step(ragged_batch())
    assert result.skipped is not None
    assert "gradient norm" in result.skipped
    assert setup.optimizer.steps == 0


def test_batch_without_targets_is_skipped() -> None:
    setup, batch = Setup(), ragged_batch()
    batch.labels.fill_(-100)
    before = setup.parameters()
    result = setup.step(batch)
    assert result.skipped == "no trained token in the batch"
    assert all(torch.equal(a, b) for a, b in zip(setup.parameters(), before, strict=True))


def test_bf16_stays_near_fp32_and_its_master_moves_less_than_bf16_can_show() -> None:
    batch, exact, rounded = ragged_batch(), Setup(torch.float32), Setup(torch.bfloat16)
    for _ in range(5):
        a, b = exact.step(batch), rounded.step(batch)
        assert b.loss == pytest.approx(a.loss, rel=0.02)
    assert all(p.dtype == torch.float32 for p in rounded.weights.master.values())
    assert all(p.dtype == torch.bfloat16 for p in rounded.model.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("frozen", ["embed_tokens", "layers.0", "lm_head", "mlp", "norm"])
def test_frozen_weights_stay_and_the_others_have_the_same_gradients(frozen: str, dtype: torch.dtype) -> None:
    free, half = Setup(dtype), Setup(dtype)
    names = [name for name in half.weights.master if frozen in name]
    half.weights.freeze(names)
    half.optimizer = Optimizer(
        half.weights.master,
        weight_decay=0.1,
        betas=(0.9, 0.95),
        epsilon=1e-8,
        scales=dict.fromkeys(names, 0.0),
    )
    before = {name: p.detach().clone() for name, p in half.weights.master.items()}
    a, b = free.step(ragged_batch(), max_norm=0.0), half.step(ragged_batch(), max_norm=0.0)
    assert a.loss == b.loss
    moments, expected = half.optimizer.moments(), free.optimizer.moments()
    for name, parameter in half.weights.master.items():
        assert torch.equal(parameter, before[name]) == (name in names)
        if name not in names:
            torch.testing.assert_close(moments[f"{name}.exp_avg"], expected[f"{name}.exp_avg"])
    norms = [expected[f"{name}.exp_avg"].double().norm() / 0.1 for name in before if name not in names]
    assert b.grad_norm == pytest.approx(torch.stack(norms).norm().item(), rel=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_the_heads_wide_gradient_is_the_plain_path_but_for_its_rounding(
    tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two micro-batches in bf16, of several chunks each, the head's gradient taken past autograd and not."""
    monkeypatch.setattr(cross_entropy, "_chunk_rows", lambda weight: 4)
    shape = dataclasses.replace(SHAPE, tie_word_embeddings=tied)
    name = "embed_tokens.weight" if tied else "lm_head.weight"
    gradients: list[dict[str, torch.Tensor]] = []
    for plain in (False, True):
        if plain:
            monkeypatch.setattr(step_module, "wide_gradient_taker", lambda weights, parameter: None)
        setup = Setup(torch.bfloat16, shape)
        setup.step(ragged_batch(), max_norm=0.0)
        gradients.append(
            {key: moment for key, moment in setup.optimizer.moments().items() if "exp_avg" in key}
        )
    taken, narrowed = gradients
    for key in taken:
        if key.startswith(name):
            continue
        assert torch.equal(taken[key], narrowed[key]), key
    wide, narrow = taken[f"{name}.exp_avg"], narrowed[f"{name}.exp_avg"]
    assert not torch.equal(wide, narrow), "the plain path rounds to bf16"
    torch.testing.assert_close(wide, narrow, rtol=2**-7, atol=2**-8 * wide.abs().max().item())


def test_the_step_needs_no_pydantic() -> None:
    """The GPU script runs it where only torch is installed."""
    program = (
        "import sys; sys.modules['pydantic'] = None\n"
        "import modelyard.train.step, modelyard.model.init, modelyard.train.metrics\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
