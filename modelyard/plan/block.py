"""What the decoder's parts take and give back in a forward and a backward, operation by operation; for `modelyard.plan.memory`.

Sizes are those of `modelyard.model` as it runs eagerly: what an operation keeps for its backward, what it needs meanwhile, and
what Python's names keep alive. A compiler fuses what lies between matrix products; of it only what is kept is counted.
"""

from __future__ import annotations

from typing import Protocol

from modelyard.plan.units import Parameter, Unit, parameters_of
from modelyard.plan.workload import Workload


class Held(Protocol):
    """Where it is counted."""

    def take(self, kind: str, *sizes: int) -> None: ...

    def give(self, kind: str, *sizes: int) -> None: ...


class Made(Protocol):
    """Told that the gradients of a module's parameters are there; `summed`: in the masters' dtype."""

    def __call__(self, unit: Unit, module: str, *, summed: bool = False) -> None: ...


KEPT, USED, LOSS = "activations", "working space", "loss"


class Block:
    """The embedding, a block, and the head, of one micro-batch of one process."""

    def __init__(self, workload: Workload, held: Held, made: Made):
        shape, layout = workload.architecture, workload.layout
        self.workload, self.held, self.made = workload, held, made
        self.mode = workload.recompute
        tokens, narrow, wide = workload.tokens, workload.width, workload.master_width
        self.splits, self.exchanges = layout.sequence_parallel, layout.tensor > 1
        own = tokens // layout.tensor if self.splits else tokens
        self.is_mixed = narrow != wide
        stream_width = wide if shape.full_precision_residual else narrow
        self.stream = own * shape.hidden_size * stream_width
        """Bytes of the residual stream, [own tokens, hidden]; so are all below."""
        self.wide_stream = own * shape.hidden_size * wide
        self.stream_is_cast = stream_width != wide
        self.normed = own * shape.hidden_size * narrow
        self.whole = tokens * shape.hidden_size * narrow
        """[tokens, hidden]: what the matrices take and give."""
        self.inverse = own * wide
        self.query = tokens * shape.num_attention_heads * shape.head_size // layout.tensor * narrow
        self.key = tokens * shape.head_groups * shape.head_size // layout.tensor * narrow
        self.seen = self.key * keys_seen(workload) // tokens
        """Of the keys that attention sees: with contexts more than are this process's own."""
        self.index = 8 * keys_seen(workload) if layout.context > 1 else 0
        self.log_sums = tokens * shape.num_attention_heads // layout.tensor * 4
        self.inner = tokens * shape.ffn_hidden_size // layout.tensor * narrow
        self.rotates = shape.rotary.type != "none"
        self.table = tokens * shape.head_size * wide if self.rotates else 0
        self.vocabulary = shape.vocab_size // layout.tensor
        self.labels = tokens * 8
        trained = _trained_modules(workload)
        self.keeps_first = bool(trained & {"q_proj", "k_proj", "v_proj"})
        """Whether the first norm's result is kept: a frozen matrix does not ask for what went into it."""
        self.keeps_second = bool(trained & {"gate_proj", "up_proj"})
        self.keeps_product = "down_proj" in trained
        outputs = {
            "q_proj": self.query,
            "k_proj": self.key,
            "v_proj": self.key,
            "o_proj": self.whole,
            "gate_proj": self.inner,
            "up_proj": self.inner,
            "down_proj": self.whole,
        }
        adapter = workload.adapter
        dora = adapter.modules if adapter is not None and adapter.dora else ()
        self.unscaled = sum(outputs[module] for module in dora)
        """What matrices give before DoRA brings it to its length; kept for the gradient of that."""
        self.kept_of_rms = self.inverse if shape.norm_type == "rms_norm" else 2 * self.inverse

    # --- embedding --------------------------------------------------------------------------------------------------

    def begin(self, *, embeds: bool) -> None:
        """The first block's input, which another process may have sent, and what all blocks of a forward share."""
        if embeds:
            if self.exchanges:  # the rows of this process's words, zeros elsewhere, their sum
                self._briefly(self.whole, self.whole)
                self._briefly(self.whole, self.normed)
            self.held.take(KEPT, self.stream)
        self.held.take(KEPT, self.table, self.index)

    def embed_backward(self, embedding: Unit | None) -> None:
        """From the gradient of the first block's input."""
        held = self.held
        if self.exchanges:
            gathered = self.whole if self.splits else 0
            held.take(USED, gathered)
            held.give(USED, self.stream if self.splits else 0)
            held.take(USED, self.whole)  # of other processes' words it is set to 0
            held.give(USED, gathered or self.stream)
        if embedding is not None:
            self.made(embedding, "embed_tokens")
        held.give(USED, self.whole if self.exchanges else self.stream)

    @property
    def kept(self) -> int:
        """Between its forward and its backward."""
        if self.mode == "full":
            return self.stream
        cheap = 0
        if self.mode == "none":
            cheap = (self.keeps_first + self.keeps_second) * self.whole + self.keeps_product * self.inner
        attention = 2 * self.query + 2 * self.seen + self.log_sums
        return (
            2 * (self.stream + self.kept_of_rms)
            + attention
            + sum(self._inner_parts[:-1])
            + cheap
            + self.unscaled
        )

    @property
    def gradients_of_outputs(self) -> int:
        """Of norms and matrix products: what a backward of the inputs keeps of a block, beside what the forward kept."""
        gated = self.workload.architecture.gated
        return 4 * self.whole + self.query + 2 * self.key + self.inner * (2 if gated else 1)

    # --- a block's forward ------------------------------------------------------------------------------------------

    def forward(self, *, again: bool = False, for_backward: bool = True) -> None:
        """From the stream that is there to the next one. `again`: in the backward, all is kept and the last sum left out;
        without `for_backward` nothing is kept, not even the stream that came in."""
        held = self.held
        full = (self.mode == "full" and not again) or not for_backward
        selective = self.mode == "selective" and for_backward
        self._norm(full=full)
        held.take(KEPT, self.query, self.key, self.key)
        self._rotate()
        if full or selective or not self.keeps_first:
            held.give(KEPT, self.whole)
        self._attend(full=full)
        self._summed()
        held.take(KEPT, self.stream)
        held.give(USED, self._sum)
        self._norm(full=full)
        held.take(KEPT, *self._inner_parts)
        held.take(KEPT, 0 if full else self.unscaled)
        if full:
            held.give(KEPT, *self._inner_parts[:-1])
        if again:
            held.give(KEPT, *self._not_kept)
            return
        self._summed()
        held.take(KEPT, self.stream)
        held.give(USED, self._sum)
        if selective:
            held.give(KEPT, self.whole, self.inner)
        elif not full:
            held.give(KEPT, *self._not_kept)
        elif full:
            # The names of a running block: q, k, v, what attention gave, the stream between, the second norm, the product.
            held.give(
                KEPT, self.query, 2 * self.seen, self.query, self.stream, self.whole, self._inner_parts[-1]
            )
        if not for_backward:
            held.give(KEPT, self.stream)

    @property
    def _not_kept(self) -> tuple[int, int]:
        """Of the feed-forward, what frozen matrices do not ask for: what goes into the first ones and into the last."""
        return 0 if self.keeps_second else self.whole, 0 if self.keeps_product else self.inner

    @property
    def _inner_parts(self) -> tuple[int, ...]:
        """What a feed-forward makes before its last product; that product's input comes last."""
        gated = self.workload.architecture.gated
        return (self.inner,) * (3 if gated else 2)

    def _norm(self, *, full: bool) -> None:
        """The second operand of the products that follow, [tokens, hidden]."""
        held = self.held
        if not self.workload.compiled and self.workload.architecture.norm_type == "rms_norm":
            cast = self.wide_stream if self.stream_is_cast else 0
            narrowed = self.normed if self.is_mixed else 0
            self._briefly(cast, self.wide_stream)
            self._briefly(cast, self.inverse, self.wide_stream, narrowed)
        held.take(KEPT, self.normed, 0 if full else self.kept_of_rms)
        if self.splits:
            held.take(KEPT, self.whole)
            held.give(KEPT, self.normed)

    def _rotate(self) -> None:
        """q, then k: both old ones are there until both are done."""
        held = self.held
        if not self.rotates:
            return
        factor = self.workload.master_width // self.workload.width if self.is_mixed else 0
        for size in (self.query, self.key):
            if self.workload.compiled:
                held.take(USED, size)
                continue
            wide = size * (factor or 1)
            held.take(USED, size * factor, wide, wide // 2)
            held.give(USED, size * factor, wide // 2)
            if self.is_mixed:
                held.take(USED, size)
                held.give(USED, wide)
        held.give(USED, self.query, self.key)

    def _attend(self, *, full: bool) -> None:
        held = self.held
        if self.workload.layout.context > 1:
            # Keys and values together, of all processes; those that this one's documents have are taken out.
            own, everyone = 2 * self.key, 2 * self.key * self.workload.layout.context
            held.take(USED, own, everyone)
            held.take(KEPT, 2 * self.seen)
            held.give(USED, own, everyone)
            if not full:  # those of a running block have names
                held.give(KEPT, 2 * self.key)
        held.take(KEPT, self.query, 0 if full else self.log_sums)

    @property
    def _sum(self) -> int:
        return self.normed if self.splits else self.whole

    def _summed(self) -> None:
        """What o or down gives, summed over the processes that share it; it is in use then."""
        held = self.held
        held.take(USED, self.whole)
        if self.exchanges:
            held.take(USED, self._sum)
            held.give(USED, self.whole)

    # --- a block's backward -----------------------------------------------------------------------------------------

    def backward(self, unit: Unit) -> None:
        """From the gradient of the block's output, in use, to that of its input, in its place."""
        held, selective = self.held, self.mode == "selective"
        if self.mode == "full":
            self.forward(again=True)
        gradient = self._gathered_gradient()
        product = self.inner if self.keeps_product else 0
        if selective:
            held.take(KEPT, product)
        self.made(unit, "down_proj")
        held.take(USED, self.inner)
        held.give(KEPT, product)
        held.give(USED, gradient)
        self._activation_backward()
        if selective and self.keeps_second:
            self._norm(full=True)
        gated = self.workload.architecture.gated
        for number, module in enumerate(("up_proj", "gate_proj")[: 2 if gated else 1]):
            self.made(unit, module)
            self._input_gradient(first=number == 0, after=self.inner)
        held.give(KEPT, self.whole if self.keeps_second else 0)
        self._norm_backward(unit, "post_attention_layernorm")
        gradient = self._gathered_gradient()
        self.made(unit, "o_proj")
        held.take(USED, self.query)
        held.give(USED, gradient)
        self._attend_backward()
        self._rotate_backward()
        if selective and self.keeps_first:
            self._norm(full=True)
        for number, (module, size) in enumerate(
            (("v_proj", self.key), ("k_proj", self.key), ("q_proj", self.query))
        ):
            self.made(unit, module)
            self._input_gradient(first=number == 0, after=size)
        held.give(KEPT, self.whole if self.keeps_first else 0, self.unscaled)
        self._norm_backward(unit, "input_layernorm")

    def _gathered_gradient(self) -> int:
        """The stream's gradient, of all tokens that the matrices saw; bytes of what was taken for it."""
        taken = self.whole if self.splits else 0
        if self.stream_is_wide and not taken:
            taken = self.whole
        self.held.take(USED, taken)
        return taken

    @property
    def stream_is_wide(self) -> bool:
        return self.stream > self.normed

    def _activation_backward(self) -> None:
        """From the gradient of the product to those of gate and up (or of up alone)."""
        held = self.held
        if not self.workload.architecture.gated:
            held.take(USED, self.inner)
            held.give(USED, self.inner)
            held.give(KEPT, self.inner)
            return
        between = 0 if self.workload.compiled else self.inner
        held.take(USED, self.inner, between, self.inner)
        held.give(USED, between, self.inner)
        held.give(KEPT, self.inner, self.inner)

    def _input_gradient(self, *, first: bool, after: int) -> None:
        """A product's gradient of its input, added to those before; what it was made from goes."""
        held = self.held
        held.take(USED, self.whole)
        held.give(USED, after)
        if not first:
            held.take(USED, self.whole)
            held.give(USED, self.whole, self.whole)

    def _norm_backward(self, unit: Unit, module: str) -> None:
        """From the gradient of what the norm gave to the stream's, to which it is added."""
        held = self.held
        given = self.whole
        if self.exchanges:
            held.take(USED, self._sum)
            held.give(USED, self.whole)
            given = self._sum
        wide = self.wide_stream
        if self.workload.compiled:
            held.take(USED, self.stream)
        else:
            casts = (wide if self.stream_is_cast else 0, wide if self.is_mixed else 0)
            held.take(USED, *casts, wide)
            self.made(unit, module)
            if self.stream_is_cast:
                held.take(USED, self.stream)
                held.give(USED, wide)
            held.give(USED, *casts)
        if self.workload.compiled:
            self.made(unit, module)
        held.give(USED, given)
        held.give(KEPT, self.stream, self.kept_of_rms)
        held.take(USED, self.stream)
        held.give(USED, self.stream, self.stream)

    def _attend_backward(self) -> None:
        held = self.held
        held.take(USED, self.query, 2 * self.seen)
        held.give(USED, self.query)
        held.give(KEPT, self.query, self.query, self.log_sums, 2 * self.seen)
        if self.workload.layout.context > 1:
            own, everyone = 2 * self.key, 2 * self.key * self.workload.layout.context
            held.take(USED, everyone, own)
            held.give(USED, everyone, 2 * self.seen)

    def _rotate_backward(self) -> None:
        if not self.rotates or self.workload.compiled:
            return
        held = self.held
        factor = self.workload.master_width // self.workload.width if self.is_mixed else 0
        for size in (self.key, self.query):
            wide = size * (factor or 1)
            held.take(USED, size * factor, self.table // 2, wide, wide // 2)
            held.give(USED, size * factor, self.table // 2, wide // 2)
            if self.is_mixed:
                held.take(USED, size)
                held.give(USED, wide)
            held.give(USED, size)

    # --- head -------------------------------------------------------------------------------------------------------

    def last_norm(self) -> None:
        """What goes to the head."""
        self._norm(full=False)

    def head(self, head: Parameter, *, in_backward: bool = False) -> None:
        """The last norm and the loss, whose gradients are made at once, by the `head`'s matrix if that is trained.
        `in_backward`: the norm's forward was long ago."""
        held, work = self.held, self.workload
        if not in_backward:
            self.last_norm()
        logits = work.tokens * self.vocabulary
        if work.cross_entropy == "torch":
            # As computed, as wide, and the exponentials that logsumexp's backward makes again.
            held.take(LOSS, logits * work.width if self.is_mixed else 0, logits * work.master_width)
            return
        matrix = head.count * head.width
        rows = min(max(256, (1 << (27 if work.on_gpu else 24)) // self.vocabulary), work.tokens)
        block = rows if work.on_gpu or self.exchanges else min(rows, max(1, (1 << 18) // self.vocabulary))
        losses = work.tokens * work.master_width
        held.take(LOSS, self.whole, self._wide(head))
        buffer = rows * self.vocabulary * work.width
        held.take(USED, self.labels, losses, buffer)
        if self.is_mixed:
            self._briefly(block * self.vocabulary * work.master_width)
            stretch = max(256 * work.architecture.hidden_size, 1 << 20) * work.width
            self._briefly((matrix if work.on_gpu else min(matrix, stretch)) if head.trained else 0)
        elif head.trained:
            self._briefly(rows * work.architecture.hidden_size * work.width)
        held.give(USED, self.labels, losses, buffer)

    def _wide(self, head: Parameter) -> int:
        """Bytes of the head's gradient as it is summed."""
        return head.count * self.workload.master_width if head.trained else 0

    def head_backward(self, unit: Unit, head: Parameter, *, in_backward: bool = False) -> None:
        """From the loss to the gradient of the stream behind the last block."""
        held, work = self.held, self.workload
        self.made(unit, head.module, summed=work.cross_entropy != "torch")
        if work.cross_entropy == "torch":
            logits = work.tokens * self.vocabulary
            wide = logits * work.master_width
            self._briefly(wide, wide)
            held.take(USED, self.whole)
            held.give(LOSS, logits * work.width if self.is_mixed else 0, wide)
        else:
            held.give(LOSS, self._wide(head), self.whole)
            held.take(USED, self.whole)
        if in_backward:  # the norm's result, else a name in the loop over micro-batches
            held.give(KEPT, self.whole)
        self._last_norm_backward(unit)

    def _last_norm_backward(self, unit: Unit) -> None:
        self.held.take(USED, self.stream)  # stands for the stream's gradient, to which nothing is added here
        self._norm_backward(unit, "norm")

    def _briefly(self, *sizes: int) -> None:
        self.held.take(USED, *sizes)
        self.held.give(USED, *sizes)


def _trained_modules(workload: Workload) -> set[str]:
    """Modules of a block of which something is trained."""
    found = {p.module for p in parameters_of(workload) if p.trained and p.name.startswith("layers.")}
    if workload.frozen and workload.adapter is None:
        # Layers may differ; what one has trained is counted for all that a backward goes through.
        whole = set(workload.architecture.parameter_shapes()) - workload.frozen
        found |= {name.split(".")[-2] for name in whole if name.startswith("layers.")}
    return found


def keys_seen(workload: Workload) -> int:
    """Keys of all segments of a micro-batch on one process: with contexts those of each document up to its last query in
    each chunk. Of the process that sees most, documents all of one length."""
    context, length = workload.layout.context, workload.sequence_length
    if context == 1:
        return workload.tokens
    document = round(min(workload.document_length or length, length))
    chunk = length // (2 * context)

    def seen(number: int) -> int:
        begin, end = number * chunk, (number + 1) * chunk
        first, last = begin // document, (end - 1) // document
        return sum(min(end, (d + 1) * document) - d * document for d in range(first, last + 1))

    most = max(seen(place) + seen(2 * context - 1 - place) for place in range(context))
    return workload.micro_rows * most
