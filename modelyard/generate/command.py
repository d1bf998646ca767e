"""`modelyard generate`: prompts from the command line to text on the terminal."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from modelyard.errors import UserError, missing_path
from modelyard.generate.sample import SamplingOptions
from modelyard.generate.text import Generator
from modelyard.model.decoder import Decoder
from modelyard.model.formats import load_adapted, load_decoder
from modelyard.train.adapted import adapted_weights
from modelyard.train.build import compute_device
from modelyard.train.export import named_tokenizer
from modelyard.train.models_on_disk import OpenModel, open_model
from modelyard.train.weights import DTYPES


def generate_command(options: argparse.Namespace) -> int:
    """Continue every prompt; the text is shown as it comes, or as one JSON line a prompt. Returns the exit status."""
    prompts = [*options.prompt, *(_read_prompt(path) for path in options.prompt_file)]
    if not prompts:
        raise UserError(
            "no prompt: give --prompt TEXT or --prompt-file FILE (an empty text starts from nothing)"
        )
    sampling = sampling_options(options)
    decoder, tokenizer_folder = load_model(
        options.model, tokenizer=options.tokenizer, dtype=options.dtype, base=options.base
    )
    generator = Generator(decoder, tokenizer_folder)
    limit = decoder.architecture.max_position_embeddings
    longest = max(len(generator.encode(prompt)) for prompt in prompts) + options.max_new_tokens
    if limit is not None and longest > limit:
        print(
            f"warning: up to {longest:,} tokens are asked for, the model was made for {limit:,}",
            file=sys.stderr,
        )
    for number, prompt in enumerate(prompts):
        if options.json:
            completion = generator.complete(prompt, sampling)
            line = {"prompt": prompt, "text": completion.text, "token_ids": completion.token_ids}
            print(json.dumps(line, ensure_ascii=False), flush=True)
            continue
        print(("\n" if number else "") + prompt, end="", flush=True)
        for piece in generator.stream(prompt, sampling):
            print(piece.text, end="", flush=True)
        print(flush=True)
    return 0


def sampling_options(options: argparse.Namespace) -> SamplingOptions:
    """What the command line says of drawing. Raises UserError with everything that is out of range."""
    return SamplingOptions(
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
    )


def load_model(
    path: Path, *, tokenizer: Path | None, dtype: str | None, base: Path | None
) -> tuple[Decoder, Path]:
    """A model on disk in whatever form, ready to generate, and the folder of its tokenizer, or the one that is named.

    An adapter stays beside its base, as in training. `dtype` None: the weights' own, those of an adapter's base. `base`: what
    an adapter adapts, where it is not at the place that it names. Raises UserError where there is no model, or no tokenizer.
    """
    named = named_tokenizer(tokenizer)
    model = open_model(path, base=base)
    folder = named or model.tokenizer_folder
    if folder is None:
        raise UserError(f"{path} has no tokenizer beside it; name one with --tokenizer DIR")
    decoder = _decoder(model, DTYPES[dtype] if dtype else None)
    # The roundings of transformers, so that greedy text in bf16 is the same there and here.
    decoder.rotary_dtype = decoder.output_weight.dtype
    return decoder, folder


def _decoder(model: OpenModel, dtype: torch.dtype | None) -> Decoder:
    device = compute_device()
    if model.adapted is None:
        return load_decoder(
            model.weights, model.architecture, where=str(model.folder), dtype=dtype, device=device
        )
    dtype = dtype or model.adapted.base.dtype("embed_tokens.weight")
    adapter, weights = adapted_weights(model, dtype=dtype, device=device)
    return load_adapted(weights, adapter, model.architecture, dtype=dtype, device=device)


def _read_prompt(path: Path) -> str:
    if not path.is_file():
        raise UserError(f"prompt file {missing_path(path)}")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"prompt file {path} is not UTF-8 text ({error.reason} at byte {error.start})"
        ) from None
