"""`modelyard average`: one model out of several of the same shape, as Llama 3 does at the end of annealing and after each
post-training stage (arXiv 2407.21783, sections 3.4.3 and 4.1.5; B. T. Polyak and A. B. Juditsky, 1992).

The result is a checkpoint of weights alone, `tokenizer/` in it, whose state.json has in place of a run's progress:

    family      the Hugging Face family that `convert` writes by default
    averaged    what it was made of: folder, share, iteration and checksums of each source, in the order they were named
"""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import reduce
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

import modelyard
from modelyard.config.adapter_files import PEFT_CONFIG
from modelyard.config.architecture import Architecture
from modelyard.data.tokenizer_difference import tokenizer_difference
from modelyard.errors import UserError, missing_path
from modelyard.files import MANIFEST, complete_or_absent, numbered_folders, sha256, write_json
from modelyard.model.formats.source import fit_problems
from modelyard.model.formats.tokenizer_files import copy_tokenizer
from modelyard.train.checkpoint import FORMAT_VERSION, Checkpoint, write_weights
from modelyard.train.export import refuse_existing
from modelyard.train.models_on_disk import OpenModel, open_model
from modelyard.train.resume import flatten

_AT_ONCE = 1 << 18
"""Values that are added at a time: they stay in the cache, and need no second tensor in fp64."""
_DESCRIBE = ("config.json", PEFT_CONFIG)
"""Files that say what the weights beside them are."""
_EXACT = 1 << 29
"""A number of fp32 has 24 bits: times a whole number below this it has at most the 53 of fp64, and is exact."""


@dataclass(frozen=True)
class Source:
    """A model that is averaged."""

    model: OpenModel
    share: Fraction
    """Of the average; the shares of all sources make 1."""

    @property
    def checkpoint(self) -> Checkpoint | None:
        return self.model.checkpoint

    @property
    def iteration(self) -> int | None:
        return self.checkpoint.iteration if self.checkpoint else None


class AveragedWeights:
    """The weighted mean of several sources of weights, of which each tensor is computed when it is asked for.

    Summed in fp64, divided once, rounded once to fp32 (fp64 where a source has it). The sum does not depend on the order in
    which the sources are named: it goes by their folders' names. Shares are multiplied by the least number that makes them
    whole (weights 0.1, 0.3 are 1, 3), so that no product of a weight in fp32 or narrower is rounded; what is equal in all
    sources comes out as it is.
    """

    def __init__(self, sources: Sequence[Source]):
        whole = math.lcm(*(source.share.denominator for source in sources))
        factors = [
            float(source.share * whole) if whole < _EXACT else float(source.share) for source in sources
        ]
        self._divisor = float(whole) if whole < _EXACT else 1.0
        terms = [(source.model, factor) for source, factor in zip(sources, factors, strict=True)]
        self._terms = sorted(terms, key=lambda term: (str(term[0].folder.resolve()), term[1]))
        self._shapes = sources[0].model.architecture.parameter_shapes()

    def names(self) -> list[str]:
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        own = (model.weights.dtype(name) for model, _ in self._terms)
        return reduce(torch.promote_types, own, torch.float32)

    def load(self, name: str) -> Tensor:
        """One parameter, full, on the CPU. Raises UserError where a source's has NaN or infinite values."""
        # Added to -0.0 everything stays as it is, 0.0 and -0.0 too.
        total = torch.full(self._shapes[name], -0.0, dtype=torch.float64)
        for model, factor in self._terms:
            wrong = _add(total.view(-1), model.weights.load(name).reshape(-1), factor)
            if wrong:
                raise UserError(
                    f"{model.folder}: '{name}' has {wrong:,} of {total.numel():,} values that are NaN or infinite; leave this "
                    "one out"
                )
        return total.div_(self._divisor).to(self.dtype(name))


def _add(total: Tensor, values: Tensor, factor: float) -> int:
    """Add `factor` times `values` [n] to `total` [n], fp64; how many values are not finite."""
    wrong = 0
    for begin in range(0, values.numel(), _AT_ONCE):
        part = values[begin : begin + _AT_ONCE]
        if not all(math.isfinite(extreme) for extreme in part.aminmax()):
            wrong += part.numel() - int(part.isfinite().sum())
        total[begin : begin + _AT_ONCE].add_(part.to(torch.float64), alpha=factor)
    return wrong


def average(
    paths: Sequence[Path],
    destination: Path,
    *,
    weights: Sequence[Fraction] | None = None,
    last: int | None = None,
) -> int:
    """`modelyard average`: write the mean of models to `destination`, a checkpoint that is complete or absent.

    Args:
        paths: checkpoints, experiments (their newest checkpoint), Hugging Face folders and adapters, of one shape.
        destination: the folder to write; it must not exist.
        weights: one for each model, whatever their sum; None: all count alike.
        last: the newest so many checkpoints of the one experiment in `paths`, oldest first.

    Returns:
        The exit status, 0.

    Raises:
        UserError: the models do not fit together or cannot be read, the weights are not one for each or all 0, the
            destination exists or cannot be written. Nothing is left of it then.
    """
    refuse_existing(destination)
    if last is not None:
        paths = _newest(paths, last)
    shares = _shares(weights, len(paths))
    sources = [Source(open_model(path), share) for path, share in zip(paths, shares, strict=True)]
    if problems := _misfits(sources):
        raise UserError(*problems)
    state, config = _description(sources)
    for model in (source.model for source in sources):
        if model.adapted is not None and model.adapted.adapter.quantization is not None:
            print(
                f"note: {model.folder} is averaged as it was trained: merged into its base quantised and made numbers again (into "
                "the base as it is: modelyard merge --onto original)"
            )
    with complete_or_absent(destination, manifest=True) as temporary:
        write_weights(temporary, AveragedWeights(sources))
        _carry_tokenizer(sources, temporary / "tokenizer")
        write_json(temporary / "state.json", state)
        (temporary / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    print(f"wrote {destination} (the average of {', '.join(map(_named, sources))})")
    return 0


def _named(source: Source) -> str:
    alike = source.share.numerator == 1
    share = f"1/{source.share.denominator}" if alike else f"{float(source.share):.4g}"
    return f"{source.model.folder}: {share}"


# --- what is averaged -------------------------------------------------------------------------------------------


def _newest(paths: Sequence[Path], count: int) -> list[Path]:
    """The newest `count` checkpoints of an experiment, or numbered folders of another place, oldest first."""
    if len(paths) != 1:
        raise UserError(f"--last {count} takes one experiment, and {len(paths)} folders are named")
    (path,) = paths
    if not path.exists():
        raise UserError(f"model {missing_path(path)}")
    directory = path / "checkpoint" if (path / "checkpoint").is_dir() else path
    found = numbered_folders(directory)
    if len(found) < count:
        there = f"it has {len(found)} ({', '.join(f.name for f in found)})" if found else "it has none"
        raise UserError(f"--last {count}: {path} does not have so many checkpoints, {there}")
    return found[-count:]


def _shares(weights: Sequence[Fraction] | None, count: int) -> list[Fraction]:
    """What each of `count` sources is of the average."""
    if weights is None:
        return [Fraction(1, count)] * count
    if len(weights) != count:
        raise UserError(
            f"--weights has {len(weights)} number{'s' * (len(weights) != 1)} for {count} model{'s' * (count != 1)}; give one "
            "for each"
        )
    total = sum(weights)
    if not total:
        raise UserError("--weights: their sum is 0; at least one has to be above 0")
    return [weight / total for weight in weights]


def _misfits(sources: Sequence[Source]) -> list[str]:
    """Why the sources cannot be averaged: shapes, tokens or weights that do not go together. One line each."""
    first, *others = (source.model for source in sources)
    problems = [
        line for s in sources for line in fit_problems(s.model.weights, s.model.architecture, s.model.folder)
    ]
    shape = _comparable(first.architecture)
    for other in others:
        theirs = _comparable(other.architecture)
        if differing := [key for key in shape if shape[key] != theirs[key]]:
            shown = ", ".join(f"{key} {theirs[key]} (there {shape[key]})" for key in differing[:4])
            more = f" and {len(differing) - 4} more" if len(differing) > 4 else ""
            problems.append(f"{other.folder} has another shape than {first.folder}: {shown}{more}")
    with_one = [
        m for m in (first, *others) if m.tokenizer_folder is not None and _tokenizer_files(m.tokenizer_folder)
    ]
    for other in with_one[1:]:
        one, two = with_one[0].tokenizer_folder, other.tokenizer_folder
        assert one is not None
        assert two is not None
        if reason := tokenizer_difference(one, two) or _other_pieces(one, two):
            problems.append(f"{other.folder} has another tokenizer than {with_one[0].folder} ({reason})")
    return problems


def _comparable(architecture: Architecture) -> dict[str, Any]:
    # The longest position is a word in exports; nothing is computed from it.
    return flatten(dataclasses.asdict(dataclasses.replace(architecture, max_position_embeddings=None)))


def _tokenizer_files(folder: Path) -> list[Path]:
    return [folder / name for name in ("tokenizer.json", "tokenizer.model") if (folder / name).is_file()]


def _other_pieces(one: Path, two: Path) -> str | None:
    """A difference between two that both have nothing but SentencePiece's file."""
    files = [_tokenizer_files(folder) for folder in (one, two)]
    if any([file.name for file in found] != ["tokenizer.model"] for found in files):
        return None
    return "their tokenizer.model differ" if sha256(files[0][0]) != sha256(files[1][0]) else None


# --- what is said of it -----------------------------------------------------------------------------------------


def _description(sources: Sequence[Source]) -> tuple[dict[str, Any], dict[str, Any]]:
    """state.json and config.yaml. The config is that of the last source that has one; where another's was different stands
    beside that source."""
    checkpoints = [source.checkpoint for source in sources if source.checkpoint is not None]
    config = checkpoints[-1].config if checkpoints else {}
    positions = [source.model.architecture.max_position_embeddings for source in sources]
    architecture = dataclasses.replace(
        sources[0].model.architecture, max_position_embeddings=max((p for p in positions if p), default=None)
    )
    return {
        "format_version": FORMAT_VERSION,
        "modelyard_version": modelyard.__version__,
        "torch_version": torch.__version__,
        "progress": {"iteration": max((checkpoint.iteration for checkpoint in checkpoints), default=0)},
        "family": sources[0].model.family,
        "averaged": [_origin(source, config) for source in sources],
        "architecture": dataclasses.asdict(architecture),
    }, config


def _origin(source: Source, config: dict[str, Any]) -> dict[str, Any]:
    folder = source.model.folder
    facts: dict[str, Any] = {"path": str(folder.resolve()), "share": str(source.share)}
    if (adapted := source.model.adapted) is not None and adapted.base_path is not None:
        facts["base"] = str(adapted.base_path.resolve())
    if (checkpoint := source.checkpoint) is None:
        described = [folder / name for name in _DESCRIBE if (folder / name).is_file()]
        files = [*described, *sorted(folder.glob("*.safetensors"))]
        return facts | {"sha256": {file.name: sha256(file) for file in files}}
    facts |= {"iteration": checkpoint.iteration, "sha256": {MANIFEST: sha256(folder / MANIFEST)}}
    if "data_fingerprint" in checkpoint.state:
        facts["data_fingerprint"] = checkpoint.state["data_fingerprint"]
    if checkpoint.is_average:
        facts["averaged"] = checkpoint.state["averaged"]
    own, shared = flatten(checkpoint.config), flatten(config)
    if own and (differing := [key for key in own.keys() | shared.keys() if own.get(key) != shared.get(key)]):
        facts["config"] = {key: own.get(key) for key in sorted(differing)}
    return facts


def _carry_tokenizer(sources: Sequence[Source], destination: Path) -> None:
    """Copy the first tokenizer there is, and what else a Hugging Face folder says of its model."""
    tokenizer = next(
        (s.model.tokenizer_folder for s in sources if s.model.tokenizer_folder is not None), None
    )
    reference = next(
        (s.model.reference_folder for s in sources if s.model.reference_folder is not None), None
    )
    if tokenizer is None and reference is None:
        return
    destination.mkdir()
    if tokenizer is not None:
        copy_tokenizer(tokenizer, destination)
    for name in ("config.json", "generation_config.json"):
        if reference is not None and (reference / name).is_file():
            shutil.copyfile(reference / name, destination / name)
