"""The parameters of one process in the groups that it gathers and reduces together (FSDP's): blocks, embedding, the rest."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from math import prod

from modelyard.config.adapter import MODULES, Quantization, is_adapter_parameter
from modelyard.parallel.cuts import cut_shape
from modelyard.plan.workload import Workload

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Parameter:
    """One parameter of a process, as tensor parallelism left it, before ZeRO shares it."""

    name: str
    shape: Shape
    trained: bool
    width: int
    """Bytes of a number that is computed with."""
    master_width: int
    """Bytes of a number that is kept; as `width` where there is no second copy."""

    @cached_property
    def count(self) -> int:
        return prod(self.shape)

    @cached_property
    def module(self) -> str:
        """The last part of the name of the module that it is of: `q_proj`."""
        return self.name.split(".")[-2]

    def shard(self, processes: int) -> int:
        """Numbers that each of so many processes keeps: rows are dealt out, the last process's filled up."""
        rows = self.shape[0] if self.shape else 1
        return -(-rows // processes) * (self.count // rows)


@dataclass(frozen=True)
class Unit:
    """Parameters that are gathered and reduced together."""

    name: str
    parameters: tuple[Parameter, ...]

    @cached_property
    def trained(self) -> tuple[Parameter, ...]:
        return tuple(parameter for parameter in self.parameters if parameter.trained)

    @cached_property
    def made(self) -> Mapping[str, tuple[int, int]]:
        """Bytes of the gradients of each module, in the dtype to compute with and in the one that they are summed in."""
        found: dict[str, tuple[int, int]] = {}
        for p in self.trained:
            narrow, wide = found.get(p.module, (0, 0))
            found[p.module] = narrow + p.count * p.width, wide + p.count * p.master_width
        return found

    def kept(self, processes: int) -> int:
        """Bytes of what one of `processes` keeps of the weights."""
        return sum(p.shard(processes) * p.master_width for p in self.parameters)

    def gathered(self, processes: int) -> int:
        """Bytes of the whole unit as it is computed with, filled up so that `processes` can share it."""
        return self._sizes(processes)[0]

    @cached_property
    def gradient(self) -> int:
        """Bytes of the gradients as the backward makes them."""
        return sum(p.count * p.width for p in self.trained)

    def wide_gradient(self, processes: int = 1) -> int:
        """Bytes of the gradients in the dtype that they are summed in, filled up so that `processes` can share them."""
        return self._sizes(processes)[1]

    @cached_property
    def _found(self) -> dict[int, tuple[int, int]]:
        return {}

    def _sizes(self, processes: int) -> tuple[int, int]:
        """Both of the above; a replay asks for them again and again."""
        if processes not in self._found:
            gathered = sum(p.shard(processes) * processes * p.width for p in self.parameters)
            wide = sum(p.shard(processes) * processes * p.master_width for p in self.trained)
            self._found[processes] = gathered, wide
        return self._found[processes]


def units_of(workload: Workload, place: int) -> list[list[Unit]]:
    """Of each stage of the process at `place` along the pipeline: the embedding, if it is a group, each block, the rest."""
    return [_units_of_stage(workload, stage) for stage in workload.stages_at(place)]


@lru_cache(maxsize=256)
def _units_of_stage(workload: Workload, stage: int) -> list[Unit]:
    shape, layers = workload.architecture, workload.stage_layers[stage]
    is_first, is_last = stage == 0, stage == workload.layout.stages - 1
    tied = shape.tie_word_embeddings
    everything = parameters_of(workload)
    # All blocks have one shape, that of the first.
    block = [p for p in everything if p.name.startswith("layers.0.")]
    units = []
    rest = [p for p in everything if is_last and p.name.split(".")[0] in ("norm", "lm_head")]
    for p in everything:
        if p.name == "embed_tokens.weight" and (is_first or (is_last and tied)):
            if tied:
                rest.insert(0, p)
            else:
                units.append(Unit("embedding", (p,)))
        elif p.name == "embed_positions.weight" and is_first:
            rest.insert(0, p)
    for layer in layers:
        units.append(Unit(f"layers.{layer}", tuple(_of_layer(p, layer, workload) for p in block)))
    return [*units, Unit(f"rest of stage {stage}", tuple(rest))]


def _of_layer(parameter: Parameter, layer: int, workload: Workload) -> Parameter:
    """A parameter of the first block, in another one; which of a layer's are trained may differ."""
    name = parameter.name.replace("layers.0.", f"layers.{layer}.")
    if name.endswith(("_codes", "_scales", "_range")):  # of a quantized matrix: never trained
        return replace(parameter, name=name)
    return replace(parameter, name=name, trained=name not in workload.frozen)


@lru_cache(maxsize=256)
def parameters_of(workload: Workload) -> tuple[Parameter, ...]:
    """All parameters that are not of the second block or a later one, as tensor parallelism cuts them."""
    shape, adapter = workload.architecture, workload.adapter
    shapes = dict(shape.parameter_shapes())
    if adapter is not None:
        shapes |= adapter.shapes(shape)
    alone = adapter is not None and adapter.freeze_others
    found = []
    for name, whole in shapes.items():
        if name.startswith("layers.") and not name.startswith("layers.0."):
            continue
        trained = name not in workload.frozen
        narrow = alone and not trained and not is_adapter_parameter(name)
        master = workload.width if narrow else workload.master_width
        quantization = adapter.quantization if adapter is not None else None
        if quantization is not None and narrow and name.split(".")[-2] in MODULES and len(whole) == 2:
            parts: Iterable[tuple[str, Shape, int]] = _quantized(name, whole, quantization, workload)
        else:
            parts = [(name, whole, master)]
        for part, size, width in parts:
            cut = cut_shape(part, size, workload.layout.tensor)
            own = width if part != name else workload.width
            found.append(Parameter(part, cut, trained, own, width))
    return tuple(found)


def _quantized(
    name: str, shape: Shape, how: Quantization, workload: Workload
) -> Iterator[tuple[str, Shape, int]]:
    """What stands in the place of a matrix in NF4 (`modelyard.model.nf4.Quantized`): name, shape, bytes of a number."""
    rows, columns = shape
    yield f"{name}_codes", (rows, columns // 2), 1
    yield f"{name}_scales", (rows, columns // how.block), 1 if how.double else workload.master_width
    if how.double:
        yield f"{name}_range", (rows, 2), workload.master_width
