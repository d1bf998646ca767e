"""The tensors of a model on disk as a table: shapes, bytes, and what their values are like."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from modelyard.config.disk import size
from modelyard.errors import UserError
from modelyard.report.inspect_blocks import Heading, Inspection, Note, Table
from modelyard.report.inspect_data import Options, progress

_SECOND_MOMENT = ".exp_avg_sq"
_SLICE = 1 << 18
"""Values of a tensor that are measured at a time: they stay in the cache between the passes."""


@dataclass(frozen=True)
class Measure:
    """What the values of a tensor are like."""

    norm: float
    smallest: float
    largest: float
    nan: int
    infinite: int


def measure(tensor: torch.Tensor) -> Measure:
    """L2 norm (in fp64), extremes of the finite values, and how many are not finite. Any shape and type."""
    squares, smallest, largest, nan, infinite = 0.0, math.inf, -math.inf, 0, 0
    flat = tensor.reshape(-1)
    if not flat.is_floating_point():
        flat = flat.to(torch.float64)
    for begin in range(0, flat.numel(), _SLICE):
        values = flat[begin : begin + _SLICE]
        low, high = map(float, values.aminmax())
        if not (math.isfinite(low) and math.isfinite(high)):
            nan += int(values.isnan().sum())
            infinite += int(values.isinf().sum())
            values = values[values.isfinite()]
            if not values.numel():
                continue
            low, high = map(float, values.aminmax())
        smallest, largest = min(smallest, low), max(largest, high)
        squares += float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2
    return Measure(math.sqrt(squares), smallest, largest, nan, infinite)


Tensors = dict[str, tuple[tuple[int, ...], torch.dtype]]


def show_tensors(
    tensors: Tensors,
    load: Callable[[str], torch.Tensor],
    options: Options,
    inspection: Inspection,
    where: str,
) -> None:
    """Read every tensor, one in memory at a time; a table by kind, or of each."""
    measures = dict(_measured(tensors, load, options, inspection, where))
    groups: dict[str, list[str]] = {}
    for name in tensors:
        groups.setdefault(name if options.all_tensors else _kind(name), []).append(name)
    rows = [_tensor_row(group, members, tensors, measures, options) for group, members in groups.items()]
    title = f"{len(tensors):,} tensors" + ("" if options.all_tensors else ", by kind (--tensors lists each)")
    columns = ["tensor", "shape", "type", "bytes", "norm", "min", "max", "NaN, ∞"]
    inspection.add(Heading(title), Table(columns, rows, words=frozenset({0, 1, 2})))
    if not measures:
        inspection.add(Note("The values were not read (--scan-limit 0)."))
    inspection.values["tensors"] = {
        name: {
            "shape": list(shape),
            "dtype": _dtype(dtype),
            **{
                key: _finite(value)
                for key, value in dataclasses.asdict(measures[name]).items()
                if name in measures
            },
        }
        if name in measures
        else {"shape": list(shape), "dtype": _dtype(dtype)}
        for name, (shape, dtype) in tensors.items()
    }


def _measured(
    tensors: Tensors,
    load: Callable[[str], torch.Tensor],
    options: Options,
    inspection: Inspection,
    where: str,
) -> Iterator[tuple[str, Measure]]:
    if options.scan_limit <= 0:
        return
    total = sum(math.prod(shape) for shape, _ in tensors.values())
    with progress(where, total) as advance:
        for name, (shape, _) in tensors.items():
            try:
                found = measure(load(name))
            except (UserError, OSError, RuntimeError, EOFError, ValueError) as error:
                if not inspection.faults:
                    inspection.fault(
                        f"{where}: '{name}' cannot be read ({str(error).strip().splitlines()[0]})"
                    )
                continue
            for count, what in ((found.nan, "NaN"), (found.infinite, "infinite")):
                if count:
                    inspection.fault(
                        f"{where}: '{name}' has {count:,} of {math.prod(shape):,} values {what}: go back to an earlier checkpoint"
                    )
            if name.endswith(_SECOND_MOMENT) and found.smallest < 0:
                inspection.fault(
                    f"{where}: '{name}', a mean of squares, has negative values (down to {found.smallest:.3g}): the file is "
                    "damaged, or another program wrote it"
                )
            yield name, found
            advance(math.prod(shape))


def _kind(name: str) -> str:
    """A tensor's name without the layer's number: `model.layers.*.mlp.up_proj.weight`; of a moment, which one it is."""
    if name.startswith("optimizer."):
        return f"optimizer.*.{name.rsplit('.', 1)[1]}"
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _tensor_row(
    group: str, members: list[str], tensors: Tensors, measures: dict[str, Measure], options: Options
) -> list[str]:
    shapes = {tensors[name][0] for name in members}
    dtypes = {_dtype(tensors[name][1]) for name in members}
    count = f"{len(members):,} × " if len(members) > 1 else ""
    shape = count + (
        " × ".join(map(str, next(iter(shapes)))) or "scalar" if len(shapes) == 1 else "several shapes"
    )
    total = sum(math.prod(tensors[name][0]) * tensors[name][1].itemsize for name in members)
    row = [group, shape, "/".join(sorted(dtypes)), size(total)]
    known = [measures[name] for name in members if name in measures]
    if not known:
        return [*row, "", "", "", ""]
    norm = math.sqrt(sum(found.norm**2 for found in known))
    broken = sum(found.nan + found.infinite for found in known)
    return [
        *row,
        f"{norm:.4g}",
        f"{min(found.smallest for found in known):.3g}",
        f"{max(found.largest for found in known):.3g}",
        f"{broken:,}" if broken else "0",
    ]


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
