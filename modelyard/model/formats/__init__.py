"""Weights between our logical names and other programs' folders."""

from modelyard.model.formats.huggingface import HuggingFaceModel, export_huggingface, open_huggingface
from modelyard.model.formats.source import (
    WeightSource,
    fit_problems,
    load_adapted,
    load_decoder,
    load_weights,
)

__all__ = [
    "HuggingFaceModel",
    "WeightSource",
    "export_huggingface",
    "fit_problems",
    "load_adapted",
    "load_decoder",
    "load_weights",
    "open_huggingface",
]
