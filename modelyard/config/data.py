"""The `data` section: where the tokens are, how datasets are combined and in which order they are read.

Dataset types are small and compose: a `blended` of a `slice` of a `concatenated` of `memmap` stores is written
as it is said. Relative paths are relative to the working directory, inside a dataset file to that file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, field_validator, model_validator
from pydantic_core import PydanticCustomError

from modelyard.config.base import Section
from modelyard.errors import did_you_mean

REFUSED_DATASET_TYPES = {
    "fim": "fill-in-the-middle datasets are not supported yet",
    "streaming": "Redis streams are not supported",
    "legacy": "write data.datasets instead of data.format/path/split",
    "test_slow": "it is a test helper of another program",
}
"""Dataset types that the guides' program knows and this one does not, and what to do about each."""


def _kind(value: Any) -> Any:
    # A plain `discriminator="type"` is refused by pydantic, because Section has a validator before every field.
    return value.get("type") if isinstance(value, dict) else getattr(value, "type", None)


def _check_kind(value: Any) -> Any:
    kind = _kind(value)
    if isinstance(kind, str) and kind in REFUSED_DATASET_TYPES:
        raise PydanticCustomError(
            "dataset_type_refused",
            "dataset type '{kind}' cannot be used: {reason}",
            {"kind": kind, "reason": REFUSED_DATASET_TYPES[kind]},
        )
    if not isinstance(kind, str) or kind not in DATASET_TYPES:
        what = f"unknown dataset type {kind!r}" if kind else "a dataset needs a type"
        hint = did_you_mean(str(kind), DATASET_TYPES)
        raise PydanticCustomError(
            "dataset_type_unknown",
            "{what} (one of {types}){hint}",
            {"what": what, "types": ", ".join(DATASET_TYPES), "hint": hint},
        )
    return value


class SamplingConfig(Section):
    """In which order documents are read."""

    seed: int = Field(default=784569, ge=0)
    """Key of the order: the same seed gives the same rows, whatever the number of processes. No unit; default 784569."""
    shuffle: Literal["epoch", "full", "skip_first_epoch", "disabled"] = "epoch"
    """`epoch`: every epoch in its own order; `full`: the epochs of the run mixed together; `skip_first_epoch`: the first
    epoch as stored (for data that is already shuffled); `disabled`: always as stored. Default epoch."""
    gpu: bool = True
    """Accepted from older configs, without effect: the order never depends on the hardware. Default true."""

    @field_validator("shuffle", mode="before")
    @classmethod
    def _refuse_legacy(cls, value: Any) -> Any:
        if value == "legacy":
            raise PydanticCustomError(
                "shuffle_legacy", "shuffle: legacy (Megatron's order) is not supported: use epoch"
            )
        return value


class FileDataset(Section):
    """A YAML file that holds one dataset, as `modelyard prepare` writes it."""

    type: Literal["file"]
    """`file`."""
    path: Path
    """The YAML file. Paths inside it are relative to it."""


class MemmapDataset(Section):
    """Prepared tokens: a token store, or what another program has prepared."""

    type: Literal["memmap"]
    """`memmap`."""
    path: Path
    """Folder of a token store; or the common part of a `.bin`/`.idx` pair's names, or a `.fast_llm_dataset` file."""
    num_documents: int | None = Field(default=None, ge=0)
    """Checked against the store when given. Unit: documents; default null (not checked)."""
    num_tokens: int | None = Field(default=None, ge=0)
    """Checked against the store when given. Unit: tokens; default null (not checked)."""


class ConcatenatedMemmapDataset(Section):
    """All the prepared files of a folder, one after the other: the older spelling of `concatenated`."""

    type: Literal["concatenated_memmap"]
    """`concatenated_memmap`."""
    path: Path
    """The folder. Its `index.txt` names the files (without ending), one a line; without one, all `*.idx` in the order of
    their names."""


class ConcatenatedDataset(Section):
    """Datasets one after the other, shuffled as one."""

    type: Literal["concatenated"]
    """`concatenated`."""
    name: str = "concatenated"
    """How messages call it. Default concatenated."""
    datasets: list[DatasetConfig] = Field(min_length=1)
    """The parts, in order; none of them blended or sampled."""


class SliceDataset(Section):
    """A stretch of a dataset's documents."""

    type: Literal["slice"]
    """`slice`."""
    dataset: DatasetConfig
    """What to cut."""
    begin: float = Field(default=0.0, ge=0.0, le=1.0)
    """First document, as a fraction of the number of documents (rounded to the nearest). Default 0."""
    end: float = Field(default=1.0, ge=0.0, le=1.0)
    """One after the last document, as a fraction of the number of documents. Default 1."""

    @model_validator(mode="after")
    def _ordered(self) -> SliceDataset:
        if self.begin >= self.end:
            raise PydanticCustomError(
                "slice_empty",
                "slice is empty: begin {begin} is not below end {end}",
                {"begin": self.begin, "end": self.end},
            )
        return self


class BlendedDataset(Section):
    """Rows of several datasets in fixed proportions: over any prefix each has its share to within one row.

    Weights that are no fractions of a period below 524,288 rows are rounded to the best one.
    """

    type: Literal["blended"]
    """`blended`."""
    name: str = "blended"
    """How messages call it. Default blended."""
    datasets: list[DatasetConfig] = Field(min_length=1)
    """What to blend; each keeps its own order and its own epochs."""
    weights: list[Annotated[float, Field(ge=0.0, allow_inf_nan=False)]]
    """Share of rows of each dataset, in the order of `datasets`; only the proportions count. 0 leaves one out."""
    legacy: Literal[False] = False
    """Accepted from older configs; Megatron's way of blending (true) is not supported. Default false."""

    @model_validator(mode="after")
    def _one_weight_each(self) -> BlendedDataset:
        if len(self.weights) != len(self.datasets):
            raise PydanticCustomError(
                "blend_weights",
                "{weights} weights for {datasets} datasets: give one weight each",
                {"weights": len(self.weights), "datasets": len(self.datasets)},
            )
        if not any(self.weights):
            raise PydanticCustomError("blend_weights_zero", "all weights are 0: nothing would be read")
        return self


class SampledDataset(Section):
    """A dataset (or a whole tree of them) with its own sampling."""

    type: Literal["sampled"]
    """`sampled`."""
    dataset: DatasetConfig
    """What to read."""
    sampling: SamplingConfig = SamplingConfig()
    """Keys given here replace those of `data.sampling` for this dataset; the others are inherited."""


class RandomDataset(Section):
    """Random tokens, for trying things out and measuring; a function of the seed, nothing is stored."""

    type: Literal["random"]
    """`random`."""
    name: str = "dummy"
    """How messages call it; part of the key of its tokens. Default dummy."""
    num_documents: int = Field(default=1_000_000, ge=1)
    """Documents in an epoch. Default 1,000,000."""
    document_length: int | None = Field(default=None, ge=1)
    """Length of each document. Unit: tokens; default null (the sequence length)."""


DatasetConfig = Annotated[
    Annotated[FileDataset, Tag("file")]
    | Annotated[MemmapDataset, Tag("memmap")]
    | Annotated[ConcatenatedMemmapDataset, Tag("concatenated_memmap")]
    | Annotated[ConcatenatedDataset, Tag("concatenated")]
    | Annotated[SliceDataset, Tag("slice")]
    | Annotated[BlendedDataset, Tag("blended")]
    | Annotated[SampledDataset, Tag("sampled")]
    | Annotated[RandomDataset, Tag("random")],
    Discriminator(_kind),
    BeforeValidator(_check_kind),
]

DATASET_TYPES: dict[str, type[Section]] = {
    "file": FileDataset,
    "memmap": MemmapDataset,
    "concatenated_memmap": ConcatenatedMemmapDataset,
    "concatenated": ConcatenatedDataset,
    "slice": SliceDataset,
    "blended": BlendedDataset,
    "sampled": SampledDataset,
    "random": RandomDataset,
}

ConcatenatedDataset.model_rebuild()
SliceDataset.model_rebuild()
BlendedDataset.model_rebuild()
SampledDataset.model_rebuild()


class DataTokenizerConfig(Section):
    """The tokenizer that the data was prepared with."""

    path: Path | None = None
    """Folder or `tokenizer.json`. Default null: the tokenizer that the token store carries."""


class DataConfig(Section):
    """Datasets by name, and how they are sampled."""

    datasets: dict[str, DatasetConfig] = Field(default_factory=dict)
    """`training`, and one for each evaluator's `dataset_name`."""
    sampling: SamplingConfig = SamplingConfig()
    """Order of the documents."""
    tokenizer: DataTokenizerConfig = DataTokenizerConfig()
    """Needed only where the store's own copy is not the right one."""
