"""The parts of a step outside of the blocks: embedding, head and loss, gradients, optimizer. Arithmetic only."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from modelyard.plan.communication import loss_chunk
from modelyard.plan.part import BLOCK, Part, Phase, Share


class Ends(Share):
    """Of one process."""

    def all(self) -> Iterator[Part]:
        if self.is_first:
            yield from self._embedding()
        if self.is_last:
            yield from self._head()
        yield from self._gradients()
        yield from self._optimizer()

    def _embedding(self) -> Iterator[Part]:
        width, hidden = self.width, self.shape.hidden_size
        rows = self.tokens * hidden * width
        yield Part("embedding", "forward", "memory", 1, 0, 2 * rows, 2 * rows, size=rows)
        if "embed_tokens.weight" not in self.workload.frozen:
            table = self.words * hidden * width
            # A gradient of all words, zeros but for those that are there.
            yield Part(
                "embedding", "backward", "memory", 1, 0, 2 * rows, 3 * rows + table, calls=2, size=table
            )

    def _head(self) -> Iterator[Part]:
        """The head's three products, and the softmax of its logits, a chunk of tokens after the other."""
        workload, shape = self.workload, self.shape
        hidden, logits = shape.hidden_size, self.tokens * self.words
        name = "embed_tokens.weight" if shape.tie_word_embeddings else "lm_head.weight"
        trained = int(name not in workload.frozen)
        fused = workload.cross_entropy != "torch"
        rows = loss_chunk(workload)
        chunks = -(-self.tokens // rows)
        whole, rest = divmod(self.tokens, rows)
        for here, times in ((rows, whole), (rest, int(rest > 0))):
            yield self._product("head", "forward", "output", times, (here, self.words, hidden))
            phase: Phase = "forward" if fused else "backward"
            yield self._product("head", phase, "input gradient", times, (here, hidden, self.words))
            own = (self.words, hidden, here)
            yield self._product("head", phase, "weight gradient", trained * times, own)
        # max, minus it, exponential, sum: six reads and writes in fp32; narrow logits are cast before and scaled and cast
        # after. The formula as written has log-softmax and its backward beside them.
        passes: float = 6 * self.wide if fused else 12 * self.wide
        if self.is_narrow:
            passes += 2 * (self.width + self.wide) + 2 * self.wide
        cached = fused and not workload.on_gpu
        yield Part(
            "loss",
            "forward",
            "memory",
            1,
            bytes=2 * self.width * logits,
            moved=passes * logits,
            calls=10 * (logits * 4 / BLOCK if cached else chunks),
            exponentials=logits,
            size=BLOCK if cached else logits * 4 / chunks,
        )
        matrix = self.words * hidden
        if trained and fused:
            # The sum over chunks, in fp32; on a GPU the whole is scaled once more.
            more = chunks - 1
            each = (2 * self.width + 2 * self.wide) if self.is_narrow else 2 * self.wide
            moved = matrix * (more * each + (2 * self.wide if workload.on_gpu else 0))
            moved += matrix * (self.width + self.wide) * self.is_narrow * (self.layout.world > 1)
            yield Part("head", "forward", "memory", 1, 0, 0, moved, calls=chunks, size=matrix * self.wide)

    # --- once gradients are there ---------------------------------------------------------------------------------

    def _gradients(self) -> Iterator[Part]:
        """What becomes of each micro-batch's gradients, and copies of what is gathered."""
        layout, count = self.layout, self.workload.micro_batches
        trained = sum(p.count * times for p, times in self.parameters if p.trained)
        tensors = sum(times for p, times in self.parameters if p.trained)
        narrow, size = self.is_narrow, float(trained) * self.wide / max(tensors, 1)
        # The first micro-batch's are cast or taken as they are, the others added.
        first = self.width + self.wide if narrow else 0
        later = self.width + 2 * self.wide if narrow else 3 * self.wide
        if layout.world == 1:
            moved: float = trained * (first + (count - 1) * later)
            yield Part(
                "gradient accumulation",
                "backward",
                "memory",
                1,
                bytes=moved,
                moved=moved,
                calls=tensors * count,
                size=size,
                per_step=True,
            )
            return
        shards = layout.shard * layout.context
        reduced = count if layout.zero_stage > 1 else 1
        # Into the buffer that is reduced, and the part that comes back onto what is there.
        moved = reduced * trained * (self.width + self.wide + 3 * self.wide / shards)
        moved += (count - reduced) * trained * later
        yield Part(
            "gradient accumulation",
            "backward",
            "memory",
            1,
            bytes=count * trained * self.width,
            moved=moved,
            calls=self.units * count * 3,
            size=size,
            per_step=True,
        )
        every = sum(p.count * p.width * times for p, times in self.parameters)
        gathers = 2 * count if layout.zero_stage == 3 else 1
        kept = sum(p.shard(shards) * p.master_width * times for p, times in self.parameters)
        moved = gathers * (2 * every + kept + every / shards)
        yield Part(
            "gathered weights",
            "forward",
            "memory",
            1,
            bytes=gathers * every,
            moved=moved,
            calls=self.units * gathers * 3,
            size=every / self.units,
            per_step=True,
        )

    def _optimizer(self) -> Iterator[Part]:
        """Norm of the gradient, its scale, AdamW, and the cast of the new weights."""
        layout, workload, wide = self.layout, self.workload, self.wide
        shards = layout.shard * layout.context
        own = float(sum(p.shard(shards) * times for p, times in self.parameters if p.trained))
        tensors = sum(times for p, times in self.parameters if p.trained)
        size = own * wide / max(tensors, 1)
        yield Part(
            "gradient norm and scale",
            "optimizer",
            "memory",
            1,
            bytes=own * wide,
            moved=3 * own * wide,
            calls=2 * tensors,
            size=size,
            per_step=True,
        )
        update = Part("optimizer", "optimizer", "update", 1, size=size, per_step=True)
        if workload.optimizer_state == "8bit":
            # Read 8 + 2 bytes, write 4 + 2; made wide and narrowed again in about twenty passes.
            yield replace(update, kind="memory", bytes=16 * own, moved=100 * own, calls=40 * tensors)
        else:
            yield replace(update, bytes=7 * own * wide, moved=7 * own * wide, calls=tensors)
        if self.is_narrow and layout.world == 1:
            copies = own * (wide + self.width)
            yield Part(
                "publish",
                "optimizer",
                "memory",
                1,
                bytes=own * self.width,
                moved=copies,
                calls=tensors,
                size=size,
                per_step=True,
            )
