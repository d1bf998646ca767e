"""Cross-entropy of the output layer, straight from hidden states, summed over the trained tokens.

For a token with logits s (already scaled) and label y: logsumexp(s) - s[y] + z_loss * logsumexp(s)^2.

`torch` is the formula as written, with all logits at once in fp32. `fused` takes chunks of tokens and makes each
chunk's gradients while its logits are there, so that [tokens, vocabulary] never exists; its backward only scales.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from modelyard import kernels
from modelyard.device import on_gpu
from modelyard.dtypes import wide
from modelyard.loss.vocabulary import Vocabulary, find, log_sum_and_target

IGNORED = -100


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    implementation: str = "auto",
    z_loss: float = 0.0,
    logits_scale: float = 1.0,
    gradient_scale: float = 1.0,
    vocabulary: Vocabulary | None = None,
    weight_gradient_to: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """The loss summed over tokens whose label is not -100: a scalar in fp32 (fp64 for fp64 inputs).

    `implementation` is `auto`, `fused` or `torch`.
    hidden [tokens, hidden], weight [vocabulary, hidden], labels int64 [tokens]. Gradients of hidden and weight have
    their dtypes; the weight's is summed in fp32 or wider first. `fused` frees its gradients in the backward, which
    can therefore run once. `auto` is `fused`: the faster one at every size measured, and the smaller.
    Gradients are those of `gradient_scale` times the loss that is returned. The factor comes in while they are wide: in fp16
    most of the logits' gradients are too small for the dtype without it, and a factor on the loss would come too late.
    With a `vocabulary` the weight is this process's part of the head. The loss is that of all words, the same on each of
    the processes; the gradient of hidden is what this part gives, and theirs are to be summed.
    `weight_gradient_to` is given the weight's gradient as `fused` summed it, in fp32 or wider, during the backward;
    autograd, which would narrow it to the weight's dtype, then sees none. `torch` has no such sum and ignores it.
    """
    if implementation == "torch":
        loss = _losses(_wide_logits(hidden, weight, logits_scale), labels, z_loss, vocabulary).sum()
        if gradient_scale != 1.0 and loss.requires_grad:
            loss.register_hook(lambda gradient: gradient * gradient_scale)
        return loss
    if implementation not in ("auto", "fused"):
        raise ValueError(f"unknown cross-entropy implementation {implementation!r}")
    with_gradients = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    if not with_gradients:
        return token_scores(
            hidden, weight, labels, z_loss=z_loss, logits_scale=logits_scale, vocabulary=vocabulary
        ).losses.sum()
    return _Fused.apply(
        hidden, weight, labels, z_loss, logits_scale, gradient_scale, vocabulary, weight_gradient_to
    )


class TokenScores(NamedTuple):
    """How well each token's label was foreseen."""

    losses: Tensor
    """[tokens] in fp32 or wider; 0 where the label is -100."""
    hits: Tensor
    """Bool [tokens]: whether no word is likelier than the label, and none before it in the vocabulary is as likely: what
    `argmax` says. False where the label is -100."""


@torch.no_grad()
def token_scores(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    implementation: str = "auto",
    z_loss: float = 0.0,
    logits_scale: float = 1.0,
    vocabulary: Vocabulary | None = None,
) -> TokenScores:
    """Each token's loss, and whether its label is the likeliest word, without gradients.

    Takes what `linear_cross_entropy` takes. `torch` has all logits at once (with a `vocabulary`: of all processes), `fused`
    those of a chunk of tokens.
    """
    if implementation == "torch":
        logits = _wide_logits(hidden, weight, logits_scale)
        losses = _losses(logits, labels, z_loss, vocabulary)
        words = logits if vocabulary is None else vocabulary.gather(logits)
        return TokenScores(losses, words.argmax(-1) == labels)
    if implementation not in ("auto", "fused"):
        raise ValueError(f"unknown cross-entropy implementation {implementation!r}")
    losses = hidden.new_zeros(labels.shape, dtype=wide(hidden.dtype))
    hits = torch.zeros_like(labels, dtype=torch.bool)
    rows = _trained_rows(labels)
    step, block = min(_chunk_rows(weight), max(len(rows), 1)), _block_rows(weight, vocabulary)
    buffer = hidden.new_empty((step, weight.shape[0]))  # as in `_Fused`
    for chunk in rows.split(step):
        logits = torch.mm(hidden[chunk], weight.t(), out=buffer[: len(chunk)])
        parts = [
            _scores(words, targets, losses.dtype, logits_scale, z_loss, vocabulary)
            for words, targets in zip(logits.split(block), labels[chunk, None].split(block), strict=True)
        ]
        losses[chunk] = torch.cat([loss for loss, _ in parts])
        hits[chunk] = torch.cat([hit for _, hit in parts])
    return TokenScores(losses, hits)


def _wide_logits(hidden: Tensor, weight: Tensor, logits_scale: float) -> Tensor:
    logits = F.linear(hidden, weight).to(wide(hidden.dtype))
    return logits if logits_scale == 1.0 else logits * logits_scale


def _losses(logits: Tensor, labels: Tensor, z_loss: float, vocabulary: Vocabulary | None) -> Tensor:
    targets = labels.clamp_min(0)
    if vocabulary is None:
        lse = logits.logsumexp(-1)
        target = logits.gather(-1, targets[:, None])[:, 0]
    else:
        lse, target = log_sum_and_target(logits, targets, vocabulary)
    losses = lse - target
    if z_loss:
        losses = losses + z_loss * lse.square()
    return losses.where(labels != IGNORED, 0.0)


def _trained_rows(labels: Tensor) -> Tensor:
    return (labels != IGNORED).nonzero().flatten()


def _chunk_rows(weight: Tensor) -> int:
    """Tokens whose logits are alive at once.

    A chunk should stay near the cache, but each one reads the weight and writes its gradient whole: at 256 tokens and
    more that costs under a tenth of the products (measured: vocabulary 4,096 to 128,256, hidden 512, two cores).
    """
    elements = 1 << 27 if on_gpu(weight) else 1 << 24
    return max(256, elements // weight.shape[0])


def _block_rows(weight: Tensor, vocabulary: Vocabulary | None) -> int:
    """Tokens whose softmax is made at once: about 1 MiB of fp32 on a CPU (half the time of a pass over a whole chunk
    at a time, measured at vocabulary 32,000); on a GPU the whole chunk.

    With a `vocabulary`, too: what is asked of other processes is asked for a whole chunk, as messages cost more than the
    cache saves.
    """
    if on_gpu(weight) or vocabulary is not None:
        return _chunk_rows(weight)
    return max(1, (1 << 18) // weight.shape[0])


def _softmax(
    logits: Tensor, highest: Tensor, target: Tensor, vocabulary: Vocabulary | None, *beside: Tensor
) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """Turn a block of logits into exp(logit - highest), in place, and sum over it what the loss needs.

    logits [rows, vocabulary] in fp32 or wider, highest [rows, 1]: the highest of each row (of all processes); target
    [rows, 1]. Returns where the targets are among these words; whether they are there (None: all are); and, of all
    processes, [rows, 1] each: the sum of the exponentials, the target's logit, and the sums of what is `beside`.
    """
    own = None
    if vocabulary is not None:
        target, own = find(target, logits.shape[1], vocabulary.begin)
    label_logits = logits.gather(-1, target)
    sums = [logits.sub_(highest).exp_().sum(-1, keepdim=True), label_logits, *beside]
    if vocabulary is not None and own is not None:
        sums[1] = label_logits.where(own, 0.0)
        together = torch.stack(sums)
        vocabulary.sum_(together)
        sums = list(together)
    return target, own, sums


def _scores(
    logits: Tensor,
    target: Tensor,
    dtype: torch.dtype,
    logits_scale: float,
    z_loss: float,
    vocabulary: Vocabulary | None,
) -> tuple[Tensor, Tensor]:
    """`token_scores` of a block of logits [rows, vocabulary], which are overwritten; target [rows, 1], each a word."""
    logits = logits.to(dtype)
    if logits_scale != 1.0:
        logits.mul_(logits_scale)
    highest, word = logits.max(-1, keepdim=True)  # of equal ones the first
    if vocabulary is None:
        _, _, (normaliser, label_logits) = _softmax(logits, highest, target, None)
        hits = word == target
    else:
        here = highest.clone()
        vocabulary.max_(highest)
        # Whether words of this process come before the target and are as likely as any.
        before = (here == highest) & (word + vocabulary.begin < target)
        _, _, (normaliser, label_logits, before) = _softmax(logits, highest, target, vocabulary, before)
        hits = (label_logits == highest) & (before == 0)
    lse = normaliser.log_().add_(highest)
    losses = lse - label_logits
    if z_loss:
        losses += z_loss * lse.square()
    return losses[:, 0], hits[:, 0]


def _exponentials(
    logits: Tensor,
    target: Tensor,
    coefficient: Tensor,
    logits_scale: float,
    gradient_scale: float,
    z_loss: float,
    vocabulary: Vocabulary | None,
) -> Tensor:
    """Turn a block of logits into its gradient, in place; returns each token's loss [rows], in `coefficient`'s dtype.

    logits [rows, vocabulary], target [rows, 1]; fills coefficient [rows, 1]. The gradient by the scaled logits is
    coefficient * logits afterwards where the logits have the dtype of the coefficient; where theirs is narrower, the
    coefficient is multiplied in already.
    """
    if vocabulary is None and kernels.available(logits):
        from modelyard.kernels.cross_entropy import softmax_gradient_

        coefficient.fill_(1.0)  # multiplied in whatever the dtype
        return softmax_gradient_(
            logits,
            target[:, 0],
            logits_scale=logits_scale,
            gradient_scale=gradient_scale,
            z_loss=z_loss,
        )
    wide_logits = logits.to(coefficient.dtype)
    if logits_scale != 1.0:
        wide_logits.mul_(logits_scale)
    highest = wide_logits.amax(-1, keepdim=True)
    if vocabulary is not None:
        vocabulary.max_(highest)
    target, own, (normaliser, label_logits) = _softmax(wide_logits, highest, target, vocabulary)
    exponentials = wide_logits
    lse = normaliser.log().add_(highest)
    losses = lse - label_logits
    torch.reciprocal(normaliser, out=coefficient)
    if z_loss:
        losses += z_loss * lse.square()
        coefficient.mul_(lse.mul_(2 * z_loss).add_(1))
    if gradient_scale != 1.0:
        coefficient.mul_(gradient_scale)
    # With the scale s in both: coefficient * exponentials - s * one_hot = coefficient * (exponentials - s * one_hot / coefficient)
    is_narrow = logits.dtype != coefficient.dtype
    label = torch.full_like(coefficient, -gradient_scale) if is_narrow else -gradient_scale / coefficient
    label = label if own is None else label.where(own, 0.0)
    if is_narrow:
        logits.copy_(exponentials.mul_(coefficient).scatter_add_(-1, target, label))
    else:
        exponentials.scatter_add_(-1, target, label)
    return losses[:, 0]


def _add_narrow_product(total: Tensor, a: Tensor, b: Tensor, *, first: bool) -> None:
    """total += a @ b (the `first` time: =) where `total` is wider than the product's dtype.

    On a CPU in stretches of rows: a sum of two dtypes casts the whole product first, which costs twice the sum's time
    and, at the size of the head, its memory. A GPU adds both as they are.
    """
    rows = total.shape[0] if on_gpu(total) else max(256, (1 << 20) // total.shape[1])
    for part, a_part in zip(total.split(rows), a.split(rows), strict=True):
        product = a_part @ b
        if first:
            part.copy_(product)
        else:
            part.add_(product)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        z_loss: float,
        logits_scale: float,
        gradient_scale: float,
        vocabulary: Vocabulary | None,
        weight_gradient_to: Callable[[Tensor], None] | None,
    ) -> Tensor:
        dtype = wide(hidden.dtype)
        rows = _trained_rows(labels)
        everything = rows.numel() == labels.numel()
        x, y = (hidden, labels) if everything else (hidden[rows], labels[rows])
        need_x, need_weight = ctx.needs_input_grad[:2]
        x_gradient = torch.empty_like(x) if need_x else None
        weight_gradient = torch.empty_like(weight, dtype=dtype) if need_weight else None
        losses = torch.empty(y.shape, dtype=dtype, device=x.device)

        step = min(_chunk_rows(weight), max(len(y), 1))
        buffer = x.new_empty((step, weight.shape[0]))  # written again by every chunk: fresh pages cost more
        for begin in range(0, len(y), step):
            chunk, target = x[begin : begin + step], y[begin : begin + step, None]
            logits = torch.mm(chunk, weight.t(), out=buffer[: len(chunk)])
            # The products want many tokens at once, the softmax few: its passes then find their block in the cache.
            coefficient = chunk.new_empty((len(chunk), 1), dtype=dtype)
            block = _block_rows(weight, vocabulary)
            for first in range(0, len(chunk), block):
                part = slice(first, first + block)
                losses[begin : begin + step][part] = _exponentials(
                    logits[part],
                    target[part],
                    coefficient[part],
                    logits_scale,
                    gradient_scale,
                    z_loss,
                    vocabulary,
                )
            # d loss / d logits = coefficient * what the block holds now. In fp32 the factor goes to the narrow side of
            # both products, sparing a pass over the vocabulary; a narrow dtype needs that pass for its cast anyway
            # and the small numbers for its range, and has had it.
            if hidden.dtype == dtype:
                if x_gradient is not None:
                    torch.mm(logits, weight, out=x_gradient[begin : begin + step]).mul_(coefficient)
                if weight_gradient is not None:
                    # beta 0: the first chunk writes, so that no pass is spent on zeros
                    weight_gradient.addmm_(logits.t(), chunk * coefficient, beta=0 if begin == 0 else 1)
            else:
                if x_gradient is not None:
                    torch.mm(logits, weight, out=x_gradient[begin : begin + step])
                if weight_gradient is not None:
                    _add_narrow_product(weight_gradient, logits.t(), chunk, first=begin == 0)

        if weight_gradient is not None and not len(y):
            weight_gradient.zero_()
        if x_gradient is not None and not everything:
            x_gradient = torch.zeros_like(hidden).index_copy_(0, rows, x_gradient)
        ctx.gradients = [x_gradient, weight_gradient]
        ctx.logits_scale, ctx.weight_dtype = logits_scale, weight.dtype
        ctx.weight_gradient_to = weight_gradient_to
        return losses.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the fused cross-entropy's gradients are already used; its backward runs once")
        # Handed over, not copied: autograd may then keep the tensor itself as the parameter's gradient.
        (x_gradient, weight_gradient), ctx.gradients = ctx.gradients, None
        factor = gradients[0] * ctx.logits_scale
        if factor.is_cuda or factor.item() != 1.0:  # on CUDA, asking would wait for the device
            for gradient in (x_gradient, weight_gradient):
                if gradient is not None:
                    gradient.mul_(factor)
        if weight_gradient is not None and ctx.weight_gradient_to is not None:
            ctx.weight_gradient_to(weight_gradient)
            weight_gradient = None
        elif weight_gradient is not None:
            weight_gradient = weight_gradient.to(ctx.weight_dtype)
        return x_gradient, weight_gradient, None, None, None, None, None, None
