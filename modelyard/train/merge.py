"""`modelyard merge`: an adapter and its base as one model, which is compared with them before it is said to be written.

The comparison goes block by block, so that of each model one block is in memory at a time, whatever its size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from modelyard.config.adapter import Adapter, is_adapter_parameter
from modelyard.config.architecture import Architecture
from modelyard.errors import RunFailed, UserError
from modelyard.model.adapter import adapt, adapter_off
from modelyard.model.decoder import Decoder
from modelyard.model.formats import WeightSource, export_huggingface, open_huggingface
from modelyard.model.formats.merged import MergedWeights, TypedWeights
from modelyard.model.formats.tokenizer_files import has_tokenizer
from modelyard.train.build import compute_device
from modelyard.train.export import named_tokenizer, refuse_existing
from modelyard.train.models_on_disk import open_model
from modelyard.train.weights import DTYPES

Onto = Literal["original", "dequantized"]

BOUNDS = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 3e-2, torch.bfloat16: 2e-1}
"""How far logits of the written model may be from those of base and adapter, as a share of the largest logit, by the type
that is written. Merged and not yet rounded it is the first of these whatever is written."""

_RANDOM_TOKENS = 256
_TEXT = (
    "The yard builds a ship from the keel up: timber, frames, planking, a mast and sails. In 1628 one sank within sight of "
    "its harbour, for nobody had asked whether it would float before it was launched."
)


@dataclass(frozen=True)
class Comparison:
    """Logits of base and adapter against those of the merged model, on the same tokens."""

    tokens: int
    largest: float
    """Largest magnitude of a logit of base and adapter."""
    effect: float
    """Largest difference that the adapter makes to the base's logits."""
    merged: float
    """Largest difference that merging makes, in fp32."""
    written: float
    """Largest difference of what was written."""
    agreement: float
    """Share of the tokens after which both find the same token likeliest."""


def merge(
    source: Path,
    destination: Path,
    *,
    base: Path | None,
    onto: Onto | None,
    family: str | None,
    dtype: str | None,
    tokenizer_folder: Path | None,
) -> int:
    """Write W + scale * B A for every adapted matrix, and the rest of the base, as a Hugging Face folder.

    Computed in fp32 and rounded once to `dtype` (None: each tensor's type in the base). The folder is opened again and its
    logits compared with those of base and adapter; it appears at `destination` only where they agree.

    Raises:
        UserError: there is no adapter, it does not belong to the base, or was trained on a quantised base and `onto` is not
            given; the destination exists or cannot be written.
        RunFailed: the logits differ by more than `BOUNDS`.
    """
    refuse_existing(destination)
    tokenizer_folder = named_tokenizer(tokenizer_folder)
    model = open_model(source, base=base)
    if (adapted := model.adapted) is None:
        raise UserError(
            f"{source} is no adapter but a whole model: there is nothing to merge (`modelyard convert` writes it in another "
            "form)"
        )
    onto = _onto(source, destination, adapted.adapter, onto)
    below = adapted.base if onto == "original" else adapted.trained_on
    merged = MergedWeights(below, adapted.weights, adapted.adapter)
    tokenizer_folder = tokenizer_folder or model.tokenizer_folder
    documents = _documents(model.architecture, tokenizer_folder)
    lines: list[str] = []

    def check(folder: Path) -> None:
        written = open_huggingface(folder).weights
        found = compare(
            model.architecture, below, adapted.adapter, adapted.weights, merged, written, documents
        )
        narrowest = max((written.dtype(name) for name in written.names()), key=BOUNDS.__getitem__)
        lines.extend(_verdict(found, narrowest, destination))

    export_huggingface(
        TypedWeights(merged, adapted.base) if dtype is None else merged,
        destination,
        architecture=model.architecture,
        family=family or model.family,
        dtype=DTYPES[dtype] if dtype else None,
        tokenizer_folder=tokenizer_folder,
        reference_folder=model.reference_folder,
        check=check,
    )
    print("\n".join(lines))
    place = "the base beside it" if adapted.base_path is None else str(adapted.base_path)
    how = {"original": "", "dequantized": ", quantised and made numbers again"}[onto]
    print(f"wrote {destination} ({model.folder} merged into {place}{how})")
    return 0


def _onto(source: Path, destination: Path, adapter: Adapter, onto: Onto | None) -> Onto:
    """What to merge into. Raises UserError where that has to be said and is not, or there is no such thing."""
    if adapter.quantization is None:
        if onto == "dequantized":
            raise UserError(
                f"--onto dequantized: {source} was trained on a base that was not quantised; leave --onto out"
            )
        return "original"
    if onto is None:
        command = f"modelyard merge {source} --to {destination} --onto"
        raise UserError(
            f"{source} was trained on a quantised base: write `{command} original` to merge it into the base's own weights, "
            f"or `{command} dequantized` for those that it was trained with"
        )
    return onto


# --- comparison -------------------------------------------------------------------------------------------------


def _documents(architecture: Architecture, tokenizer_folder: Path | None) -> list[list[int]]:
    """Token ids to compare with: random ones, the same each time, and with a tokenizer a text."""
    longest = min(
        _RANDOM_TOKENS,
        *(n for n in (architecture.max_position_embeddings, architecture.position_embeddings) if n),
    )
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(architecture.vocab_size, (longest,), generator=generator).tolist()
    text: list[int] = []
    if tokenizer_folder is not None and has_tokenizer(tokenizer_folder):
        from modelyard.data.tokenizer import load_tokenizer

        ids = load_tokenizer(tokenizer_folder).encode(_TEXT)
        text = [token for token in ids if token < architecture.vocab_size][:longest]
    return [document for document in (drawn, text) if document]


@torch.no_grad()
def compare(
    architecture: Architecture,
    base: WeightSource,
    adapter: Adapter,
    adapter_weights: WeightSource,
    merged: WeightSource,
    written: WeightSource,
    documents: Sequence[Sequence[int]],
) -> Comparison:
    """The logits of four models, block by block in fp32 (fp64 where a weight is): base, base with the adapter applied,
    merged, and as written. `documents` are token ids, each by itself.

    Raises RunFailed where a tensor reads back otherwise than it was to be written.
    """
    device = compute_device()
    wide = any(merged.dtype(name) == torch.float64 for name in merged.names())
    dtype = torch.float64 if wide else torch.float32
    positions = torch.cat([torch.arange(len(document)) for document in documents])[None].to(device)
    ends = [0, *accumulate(map(len, documents))]
    boundaries = torch.tensor([ends], dtype=torch.int32)
    inputs = torch.tensor([[token for document in documents for token in document]], device=device)
    applied = replace(adapter, quantization=None)

    def either(name: str) -> Tensor:
        return (adapter_weights if is_adapter_parameter(name) else base).load(name)

    def as_written(name: str) -> Tensor:
        tensor = written.load(name)
        if not torch.equal(tensor, merged.load(name).to(tensor.dtype)):
            raise RunFailed(f"'{name}' reads back otherwise than it was written; is the disk sound?")
        return tensor

    def part(layer: int, load: Callable[[str], Tensor], adapter: Adapter | None = None) -> Decoder:
        with torch.device("meta"):
            block = Decoder(architecture, layers=range(layer, layer + 1))
        if adapter is not None:
            adapt(block, adapter, dtype)
        block.to(dtype).to_empty(device=device)
        for name, parameter in block.named_parameters():
            parameter.copy_(load(name))
        return block

    def forward(block: Decoder, x: Tensor) -> Tensor:
        x = block(x, positions, boundaries)
        return block.logits(x)[0] if block.is_last else x

    def through(layer: int, load: Callable[[str], Tensor], x: Tensor) -> Tensor:
        block = part(layer, load)
        x = forward(block, x)
        block.to("meta")  # a decoder refers to itself: its memory would wait for the garbage collector
        return x

    with_adapter = without = in_fp32 = from_disk = inputs
    for layer in range(architecture.num_layers):
        block = part(layer, either, applied)
        with_adapter = forward(block, with_adapter)
        with adapter_off(block):
            without = forward(block, without)
        block.to("meta")
        in_fp32 = through(layer, merged.load, in_fp32)
        from_disk = through(layer, as_written, from_disk)

    def difference(other: Tensor) -> float:
        return float((with_adapter - other).abs().max())

    return Comparison(
        tokens=inputs.numel(),
        largest=float(with_adapter.abs().max()),
        effect=difference(without),
        merged=difference(in_fp32),
        written=difference(from_disk),
        agreement=float((with_adapter.argmax(-1) == from_disk.argmax(-1)).double().mean()),
    )


def _verdict(found: Comparison, dtype: torch.dtype, destination: Path) -> list[str]:
    """What is said of a comparison that went well. Raises RunFailed for one that did not."""
    name = str(dtype).removeprefix("torch.")
    for difference, bound, what in (
        (found.merged, BOUNDS[torch.float32], "merged in float32"),
        (found.written, BOUNDS[dtype], f"written in {name}"),
    ):
        if not difference <= bound * found.largest:  # NaN, too
            raise RunFailed(
                f"the model {what} is not base and adapter: on {found.tokens} tokens logits differ by up to {difference:.3g}, "
                f"where the largest is {found.largest:.3g} and {bound:g} of that is allowed; {destination} is not written"
            )
    lines = [
        f"compared on {found.tokens} tokens, largest logit {found.largest:.4g}: base with adapter and merged in float32 differ "
        f"by at most {found.merged:.2g}; the adapter itself makes a difference of up to {found.effect:.3g}",
        f"as written in {name}: differs by at most {found.written:.2g}, the likeliest token is the same after "
        f"{found.agreement:.1%}",
    ]
    if found.written > found.effect / 4:
        lines.append(
            f"warning: rounding to {name} makes a difference that is no small part of the adapter's own; --dtype float32 keeps "
            "it whole"
        )
    return lines
