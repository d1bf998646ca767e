"""The mistakes of `mutants.py`: each an exact replacement in one file of the program."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Mutant:
    name: str
    """The mistake, as a reviewer would say it."""
    file: str
    """Below `modelyard/`."""
    old: str
    """What is replaced; it occurs once in the file."""
    new: str
    shows_in: tuple[str, ...] = ()
    """Features (`tests.parallel.cases.features`) of the rows to be tried first."""

    def put_into(self, tree: Path) -> None:
        """Change the file of the tree. Raises ValueError where the place is not there, or not the only one."""
        path = tree / "modelyard" / self.file
        text = path.read_text(encoding="utf-8")
        if text.count(self.old) != 1:
            raise ValueError(f"{self.name}: found {text.count(self.old)} times in {self.file}: {self.old!r}")
        path.write_text(text.replace(self.old, self.new), encoding="utf-8")


STEP = [
    Mutant(
        "gradients are not divided by the number of targets",
        "train/step.py",
        "factor=clip / divisor",
        "factor=clip",
        ("shard",),
    ),
    Mutant(
        "divided by this process's targets, not by all",
        "train/step.py",
        "factor=clip / divisor",
        "factor=clip / max(batch.num_targets, 1)",
        ("shard",),
    ),
    Mutant(
        "the loss is this process's mean",
        "train/step.py",
        "mean_loss = totals.loss / max(totals.targets, 1)",
        "mean_loss = float(loss) / max(batch.num_targets, 1)",
        ("shard",),
    ),
    Mutant(
        "clipping by the norm of this process's part",
        "train/step.py",
        "clip = min(1.0, max_norm / (grad_norm + 1e-6))",
        "clip = min(1.0, max_norm / (float(weights.square_norm()) ** 0.5 / targets + 1e-6))",
        ("shard",),
    ),
    Mutant(
        "the last micro-batch's gradients are not reduced",
        "train/step.py",
        "weights.before_backward(last=index == len(parts))",
        "weights.before_backward(last=index == len(parts) - 1)",
        ("no pipeline", "shard", "zero 1", "accumulation"),
    ),
    Mutant(
        "where the head alone is trained, FSDP never ends its backward",
        "train/step.py",
        "            weights.finish_backward(model)\n",
        "            pass\n",
        ("no pipeline", "head alone"),
    ),
    Mutant(
        "the weights are not published after the step",
        "train/step.py",
        "        weights.publish(but=optimizer.published)\n",
        "",
        ("tied", "pipeline zbv"),
    ),
]
DATA = [
    Mutant(
        "FSDP averages gradients instead of summing them",
        "parallel/data.py",
        "module.set_gradient_divide_factor(1.0)\n        module.set_force_sum_reduction_for_comms(True)",
        "pass",
        ("shard",),
    ),
    Mutant(
        "gradients are reduced in bf16",
        "parallel/data.py",
        "reduce_dtype=master",
        "reduce_dtype=compute_dtype",
        ("shard", "bf16"),
    ),
    Mutant(
        "copies count several times in the norm",
        "parallel/data.py",
        "1 / (replicas * (",
        "1 / ((",
        ("replicate",),
    ),
    Mutant(
        "a tensor-parallel norm weight counts several times in the norm",
        "parallel/data.py",
        "(tensor if _same_on_tensor_ranks(p) else 1)",
        "1",
        ("tensor",),
    ),
    Mutant(
        "the second copy of tied embeddings counts in the norm",
        "parallel/data.py",
        "0.0 if name in self.copies else",
        "",
        ("pipeline 1f1b", "tied"),
    ),
    Mutant(
        "tied embeddings: the stages do not add each other's gradient",
        "parallel/data.py",
        "own.copy_(sent + received)",
        "own.copy_(sent)",
        ("pipeline 1f1b", "tied"),
    ),
    Mutant(
        "tied embeddings: one stage takes the other's gradient instead of the sum",
        "parallel/data.py",
        "own.copy_(sent + received)",
        "own.copy_(received)",
        ("pipeline 1f1b", "tied"),
    ),
    Mutant(
        "tied embeddings of a V: the second copy's gradient is lost",
        "parallel/data.py",
        "local_tensor(gradient).add_(local_tensor(twin.grad))",
        "pass",
        ("pipeline zbv", "tied"),
    ),
    Mutant(
        "tied embeddings of a V: the second copy is not refreshed",
        "parallel/data.py",
        "local_tensor(twin).copy_(self.master[name])",
        "pass",
        ("pipeline zbv", "tied"),
    ),
    Mutant(
        "weights stay gathered after the step's last backward",
        "parallel/data.py",
        "unit.set_reshard_after_backward(last)",
        "unit.set_reshard_after_backward(False)",
        ("no pipeline", "shard", "zero 1"),
    ),
    Mutant(
        "every process starts with the first one's part",
        "parallel/data.py",
        "full = full[local_slice(parameter)]",
        "full = full[tuple(slice(0, length) for length in local_tensor(parameter).shape)]",
        ("shard",),
    ),
    Mutant(
        "sequence parallel: a norm's gradient is of its own tokens alone",
        "parallel/data.py",
        "of_tokens = self._mesh.layout.sequence_parallel",
        "of_tokens = False",
        ("tensor with sequence",),
    ),
    Mutant(
        "without sequence parallel a norm's gradient is summed all the same",
        "parallel/data.py",
        "of_tokens = self._mesh.layout.sequence_parallel",
        "of_tokens = True",
        ("tensor",),
    ),
    Mutant(
        "an adapter's gradient is of each process's own part of the matrix alone",
        "parallel/data.py",
        "(of_tokens or is_adapter_parameter(name))",
        "of_tokens",
        ("adapter", "tensor"),
    ),
    Mutant(
        "what B gives is added by every process that has a summand",
        "parallel/cuts.py",
        'by_columns = ("weight", "weight_codes", "weight_scales", "lora_A")',
        'by_columns = ("weight", "weight_codes", "weight_scales")',
        ("adapter", "tensor"),
    ),
    Mutant(
        "DoRA: a row's length is that of the part that is here",
        "parallel/tensor.py",
        "return self.stream.total(squares)",
        "return squares",
        ("dora", "tensor"),
    ),
    Mutant(
        "DoRA: the length of a row has a gradient",
        "model/adapter.py",
        "    @torch.no_grad()\n    def _lengths",
        "    def _lengths",
        ("dora",),
    ),
    Mutant(
        "an adapter's factor is left out of the gradient of what A gives",
        "model/adapter.py",
        "torch.mm(gradient, b).mul_(ctx.scale)",
        "torch.mm(gradient, b)",
        ("adapter",),
    ),
    Mutant(
        "quantized matrices are trained",
        "parallel/apply.py",
        "parameter.requires_grad_(name not in frozen and not is_quantized_part(name))",
        "parameter.requires_grad_(name not in frozen)",
        ("nf4",),
    ),
    Mutant(
        "copies of the shards never exchange gradients",
        "parallel/mesh.py",
        'self._root["replicate", "weights"] if self.layout.replicate > 1 else self._weights',
        "self._weights",
        ("replicate",),
    ),
    Mutant(
        "copies of the shards train on the same rows",
        "parallel/mesh.py",
        'self.place("replicate") * self.layout.shard + self.place("shard")',
        'self.place("shard")',
        ("replicate",),
    ),
    Mutant(
        "the loss is counted by every tensor-parallel process",
        "parallel/mesh.py",
        'return self.place("pipeline") == last and self.place("tensor") == 0',
        'return self.place("pipeline") == last',
        ("tensor",),
    ),
    Mutant(
        "targets are counted by every stage",
        "parallel/mesh.py",
        'return self.place("pipeline") == 0 and self.place("tensor") == 0',
        'return self.place("tensor") == 0',
        ("pipeline 1f1b",),
    ),
    Mutant(
        "one process draws its weights from another seed",
        "model/init.py",
        'key(seed, "init", name)',
        'key(seed + (__import__("os").environ.get("RANK") == "1"), "init", name)',
        ("shard",),
    ),
]
CONTEXT = [
    Mutant(
        "a process's two chunks are swapped",
        "parallel/context.py",
        "torch.cat([chunks[first], chunks[second]], 1)",
        "torch.cat([chunks[second], chunks[first]], 1)",
        ("context",),
    ),
    Mutant(
        "chunks are dealt in order, keys as if they were not",
        "parallel/context.py",
        "first, second = chunks_of(mesh.place",
        "first, second = (lambda place, _: (2 * place, 2 * place + 1))(mesh.place",
        ("context",),
    ),
    Mutant(
        "labels are made after the cut: none at a chunk's end",
        "parallel/context.py",
        "cut(batch.labels)",
        "cut(batch.labels.index_fill(1, torch.arange(length - 1, batch.labels.shape[1], length), -100))",
        ("context",),
    ),
    Mutant(
        "labels are shifted once more",
        "parallel/context.py",
        "cut(batch.labels)",
        "cut(batch.labels.roll(-1, 1))",
        ("context",),
    ),
    Mutant(
        "rotary positions count from 0 in each process",
        "parallel/context.py",
        "cut(batch.positions)",
        "torch.arange(2 * length).expand(len(batch), -1).contiguous()",
        ("context",),
    ),
    Mutant(
        "a document begins where its chunk begins",
        "parallel/context.py",
        "lengths = last - begins\n",
        "begins = torch.where(last - first < last - begins, first, begins)\n    lengths = last - begins\n",
        ("context", "long data"),
    ),
    Mutant(
        "documents are forgotten: queries see the row from its begin",
        "parallel/context.py",
        "lengths = last - begins\n",
        "begins = begins * 0\n    lengths = last - begins\n",
        ("context",),
    ),
    Mutant(
        "gradients of keys and values stay where they were made",
        "parallel/context.py",
        "reduce_scatter_into(own, gathered, ctx.group)",
        "own.copy_(gathered.chunk(dist.get_world_size(ctx.group))[dist.get_rank(ctx.group)])",
        ("context",),
    ),
    Mutant(
        "the window is forgotten over gathered keys",
        "parallel/context.py",
        "max_q, max_k, window=window",
        "max_q, max_k, window=None",
        ("context", "window"),
    ),
    Mutant(
        "FSDP reduces over `shard` and not over `context`",
        "parallel/mesh.py",
        'flattened(self._root, ("shard", "context"), "weights")',
        'flattened(self._root, ("shard",), "weights")',
        ("context",),
    ),
]
TENSOR = [
    Mutant(
        "o and down: summands are not summed",
        "parallel/collectives.py",
        "return _run(_all_reduce, summand, group)",
        "return summand.clone()",
        ("tensor",),
    ),
    Mutant(
        "the gradient of a matrix's input is not summed",
        "parallel/collectives.py",
        "return _run(_all_reduce, gradients[0], ctx.group), None",
        "return gradients[0], None",
        ("tensor",),
    ),
    Mutant(
        "the gradient of a sum is summed again",
        "parallel/collectives.py",
        "        return _run(_all_reduce, summand, group)\n\n    @staticmethod\n    @once_differentiable\n"
        "    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:\n"
        "        return gradients[0], None",
        "        ctx.group = group\n        return _run(_all_reduce, summand, group)\n\n    @staticmethod\n"
        "    @once_differentiable\n"
        "    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:\n"
        "        return _run(_all_reduce, gradients[0], ctx.group), None",
        ("tensor",),
    ),
    Mutant(
        "sequence parallel: gradients of gathered tokens are not summed",
        "parallel/collectives.py",
        "return _run(_reduce_scatter, gradients[0], ctx.group), None",
        "return gradients[0].chunk(ctx.group.size)[dist.get_rank(_groups[ctx.group.name])], None",
        ("tensor with sequence",),
    ),
    Mutant(
        "sequence parallel: the gradient of a scattered sum reaches its own tokens alone",
        "parallel/collectives.py",
        "return _run(_all_gather, gradients[0], ctx.group), None",
        "return torch.cat([gradients[0] * (n == dist.get_rank(_groups[ctx.group.name])) "
        "for n in range(ctx.group.size)]), None",
        ("tensor with sequence",),
    ),
    Mutant(
        "the bias of o and down is added by every process",
        "parallel/tensor.py",
        "total = self.stream.summed(F.linear(x, local(self.weight)))\n"
        "        return total if self.bias is None else total + local(self.bias)  # once, not with each summand",
        "bias = None if self.bias is None else local(self.bias)\n"
        "        return self.stream.summed(F.linear(x, local(self.weight), bias))",
        ("tensor", "biases"),
    ),
    Mutant(
        "every process takes its words for the first ones, in the loss",
        "parallel/tensor.py",
        "model.vocabulary = Words(words.start, mesh)",
        "model.vocabulary = Words(0, mesh)",
        ("tensor",),
    ),
    Mutant(
        "every process takes its words for the first ones, in the embedding",
        "parallel/tensor.py",
        "find(ids, weight.shape[0], self.stream.first_word)",
        "find(ids, weight.shape[0], 0)",
        ("tensor",),
    ),
    Mutant(
        "words of other processes are embedded as one of one's own",
        "parallel/tensor.py",
        "F.embedding(places, weight).where(own[:, None], 0.0)",
        "F.embedding(places, weight)",
        ("tensor",),
    ),
    Mutant(
        "the loss: each process subtracts its own highest logit",
        "loss/vocabulary.py",
        "    vocabulary.max_(highest)\n",
        "",
        ("tensor",),
    ),
    Mutant(
        "the loss: sums of exponentials are not summed",
        "loss/vocabulary.py",
        "        vocabulary.sum_(total)\n",
        "",
        ("tensor", "torch loss"),
    ),
    Mutant(
        "sequence parallel: learned positions of the first tokens for all",
        "parallel/tensor.py",
        "self.stream.own(positions)",
        "positions.chunk(self.stream.group.size)[0] if self.stream.is_split else positions",
        ("tensor with sequence", "biases"),
    ),
]
PIPELINE = [
    Mutant(
        "two stages are swapped",
        "parallel/apply.py",
        "split[stage] for stage in stages_of",
        "split[{1: 2, 2: 1}.get(stage, stage)] for stage in stages_of",
        ("pipeline interleaved",),
    ),
    Mutant(
        "gradients are divided by the number of micro-batches",
        "parallel/pipeline.py",
        '"scale_grads": False',
        '"scale_grads": True',
        ("pipeline 1f1b",),
    ),
    Mutant(
        "every micro-batch has the first one's documents",
        "parallel/pipeline.py",
        "output = decoder(inputs, part.positions, part.cu_seqlens,",
        "output = decoder(inputs, part.positions, run.parts[0].cu_seqlens,",
        ("pipeline 1f1b",),
    ),
    Mutant(
        "the loss of the last micro-batch alone",
        "parallel/pipeline.py",
        "run.loss += loss.detach()",
        "run.loss.copy_(loss.detach())",
        ("pipeline 1f1b",),
    ),
    Mutant(
        "gradients of the step's last backward are not reduced",
        "parallel/pipeline.py",
        "reduce, reshard = last_backward or zero_stage >= 2,",
        "reduce, reshard = not last_backward,",
        ("pipeline 1f1b", "shard"),
    ),
    Mutant(
        "a split backward: gradients of the weights are not added up",
        "parallel/pipeline.py",
        "        finish_backward(root)  # and what was expected\n",
        "",
        ("pipeline zero_bubble", "shard"),
    ),
    Mutant(
        "a split backward in bf16: gradients of both dtypes are reduced together",
        "parallel/pipeline.py",
        "        if reduce:\n",
        "        if False:\n",
        ("pipeline zero_bubble", "bf16"),
    ),
    Mutant(
        "what a frozen first stage gathered stays",
        "parallel/pipeline.py",
        "            if is_frozen:",
        "            if False:",
        ("pipeline 1f1b", "frozen"),
    ),
    Mutant(
        "tied embeddings: copies are never summed",
        "parallel/pipeline.py",
        "        weights.sum_copies()\n",
        "",
        ("pipeline 1f1b", "tied"),
    ),
    Mutant(
        "a V: the loss is looked for on the last process",
        "parallel/mesh.py",
        "last = process_of(self.layout.stages - 1, self.layout)",
        "last = self.layout.pipeline - 1",
        ("pipeline zbv",),
    ),
]
RECOMPUTE = [
    Mutant(
        "a recomputed block forgets where documents begin",
        "model/recompute.py",
        "return checkpoint(forward, x, context, use_reentrant=False, preserve_rng_state=False)",
        "return checkpoint(forward, x, context._replace(rotary=None), use_reentrant=False, "
        "preserve_rng_state=False)",
        ("recompute full",),
    ),
    Mutant(
        "what is made again lacks its first token",
        "model/recompute.py",
        "self._output = self._function(*self._inputs)",
        "self._output = self._function(*self._inputs)\n                self._output[0].zero_()",
        ("recompute selective",),
    ),
]
DROPOUT = [
    Mutant(
        "left out: every process takes its rows for the first ones",
        "model/decoder.py",
        "token_words(context.numbers, self.layer)",
        "token_words(context.numbers - context.numbers[0], self.layer)",
        ("dropout", "shard"),
    ),
    Mutant(
        "left out: tokens of a context are numbered from its own first one",
        "parallel/context.py",
        "None if batch.numbers is None else cut(batch.numbers)",
        "None if batch.numbers is None else batch.numbers[:, : 2 * length]",
        ("dropout", "context"),
    ),
    Mutant(
        "left out: every process takes its features for the first ones",
        "parallel/tensor.py",
        "return self.stream.place * features",
        "return 0",
        ("dropout", "tensor"),
    ),
    Mutant(
        "left out: every micro-batch has the first one's tokens",
        "parallel/pipeline.py",
        "numbers=part.numbers)",
        "numbers=run.parts[0].numbers)",
        ("dropout", "pipeline 1f1b"),
    ),
    Mutant(
        "left out: stages count their blocks from 0",
        "model/decoder.py",
        "Block(architecture, layer) for layer in layers",
        "Block(architecture, layer - layers.start) for layer in layers",
        ("dropout", "pipeline 1f1b"),
    ),
]
# Mistakes that only show where two features meet.
TOGETHER = [
    Mutant(
        "each micro-batch weighs the same, however many targets it has",
        "train/step.py",
        "loss.backward()",
        "(loss * (parts[0].num_targets / max(micro_batch.num_targets, 1))).backward()",
        ("shard", "accumulation"),
    ),
    Mutant(
        "no backward where a micro-batch has no targets, though others wait for it",
        "train/step.py",
        "loss.backward()",
        "if micro_batch.num_targets:\n            loss.backward()",
        ("no pipeline", "shard", "zero 1", "masked data"),
    ),
    Mutant(
        "norm: a norm weight's copies and its tensor-parallel twins are not both counted",
        "parallel/data.py",
        "1 / (replicas * (tensor if _same_on_tensor_ranks(p) else 1))",
        "1 / max(replicas, tensor if _same_on_tensor_ranks(p) else 1)",
        ("replicate", "tensor"),
    ),
    Mutant(
        "tied embeddings are not summed under tensor parallelism",
        "parallel/data.py",
        "        for name in self._shared:\n",
        '        for name in self._shared if self._mesh.size("tensor") == 1 else ():\n',
        ("pipeline 1f1b", "tensor", "tied"),
    ),
    Mutant(
        "tied embeddings are not summed by the second copy of the model",
        "parallel/data.py",
        "        for name in self._shared:\n",
        '        for name in self._shared if self._mesh.place("replicate") == 0 else ():\n',
        ("pipeline interleaved", "replicate", "tied"),
    ),
    Mutant(
        "sequence parallel under a pipeline: norms' gradients are not summed",
        "parallel/data.py",
        "of_tokens = self._mesh.layout.sequence_parallel",
        'of_tokens = self._mesh.size("pipeline") == 1 and self._mesh.layout.sequence_parallel',
        ("pipeline 1f1b", "tensor with sequence"),
    ),
    Mutant(
        "contexts and copies together: gradients are halved",
        "parallel/data.py",
        "module.set_gradient_divide_factor(1.0)",
        "module.set_gradient_divide_factor(2.0 if mesh.layout.replicate > 1 < mesh.layout.context else 1.0)",
        ("context", "replicate"),
    ),
    Mutant(
        "offloaded gradients of ZeRO 3 are halved",
        "parallel/data.py",
        "module.set_gradient_divide_factor(1.0)",
        "module.set_gradient_divide_factor(2.0 if mesh.layout.offload and stage == 3 else 1.0)",
        ("offload", "zero 3"),
    ),
    Mutant(
        "rows are dealt without a look at copies where there is a pipeline",
        "parallel/mesh.py",
        'return self.place("replicate") * self.layout.shard + self.place("shard")',
        'copies = self.layout.pipeline == 1\n        return self.place("replicate") * self.layout.shard * copies '
        '+ self.place("shard")',
        ("replicate", "pipeline 1f1b"),
    ),
    Mutant(
        "the window is forgotten over gathered keys where heads are shared",
        "parallel/context.py",
        "max_q, max_k, window=window",
        "max_q, max_k, window=window if k.shape[1] > 1 else None",
        ("context", "tensor with sequence", "window"),
    ),
    Mutant(
        "stages after the first count rotary positions from 0",
        "parallel/pipeline.py",
        "output = decoder(inputs, part.positions, part.cu_seqlens,",
        "where = part.positions if decoder.is_first else torch.arange(part.positions.shape[1]).expand_as(part.positions)\n"
        "        output = decoder(inputs, where, part.cu_seqlens,",
        ("pipeline 1f1b", "context"),
    ),
    Mutant(
        "the last stage of a pipeline takes its words for the first ones",
        "parallel/tensor.py",
        "model.vocabulary = Words(words.start, mesh)",
        "model.vocabulary = Words(words.start if model.is_first else 0, mesh)",
        ("pipeline 1f1b", "tensor"),
    ),
    Mutant(
        "compiled, the input's gradient is not summed",
        "parallel/collectives.py",
        "        collective = _OPERATORS[collective]\n",
        "        operator = _OPERATORS[collective]\n"
        "        collective = (lambda t, g, s: t.clone()) if collective is _all_reduce else operator\n",
        ("compile", "tensor"),
    ),
    Mutant(
        "the z-loss takes each process's own sum of exponentials",
        "loss/cross_entropy.py",
        "lse.square()\n        coefficient.mul_",
        "lse.square() * (0.5 if vocabulary is not None else 1)\n        coefficient.mul_",
        ("z-loss", "tensor"),
    ),
    Mutant(
        "a recomputed block among contexts does without rotary positions",
        "model/recompute.py",
        "        # No randomness in a block: there is no generator to put back.\n",
        '        if type(context.attend).__name__ == "GatheredAttention":\n'
        "            context = context._replace(rotary=None)\n",
        ("recompute full", "context"),
    ),
]
MUTANTS: list[Mutant] = [*STEP, *DATA, *CONTEXT, *TENSOR, *PIPELINE, *RECOMPUTE, *DROPOUT, *TOGETHER]
