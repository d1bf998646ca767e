from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from modelyard.errors import UserError
from modelyard.generate import text as text_module
from modelyard.generate.text import Generator, SamplingOptions
from modelyard.model.decoder import Decoder
from modelyard.model.formats import load_decoder, open_huggingface
from tests.model.families import ours, reference_model

CORPUS = ["the ship left the yard at dawn", "a yard builds ships, ships sail — naïve façade 🚢"]
GREEDY = SamplingOptions(max_new_tokens=24, temperature=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random tied Llama whose tokenizer has single bytes and few merges, as transformers saves it."""
    path = tmp_path_factory.mktemp("model")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"])
    backend.train_from_iterator(CORPUS, trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>").save_pretrained(path)
    reference = reference_model("smollm2-tied", vocab_size=280, bos_token_id=0, eos_token_id=1)
    reference.save_pretrained(path)
    return path


def load(folder: Path) -> Generator:
    opened = open_huggingface(folder)
    return Generator(load_decoder(opened.weights, opened.architecture, where=folder), folder)


@pytest.mark.parametrize("prompt", ["the ship", "naïve 🚢", ""])
def test_tokens_and_text_equal_transformers(folder: Path, prompt: str) -> None:
    completion = load(folder).complete(prompt, GREEDY)

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    inputs = tokenizer(prompt, return_tensors="pt")
    expected = model.generate(**inputs, max_new_tokens=24, do_sample=False)[0]
    assert completion.token_ids == expected[inputs["input_ids"].shape[1] :].tolist()
    whole = tokenizer.decode(expected, skip_special_tokens=True)
    assert prompt + completion.text == whole


def test_pieces_are_whole_characters_and_join_to_the_text(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = load(folder)
    wanted = generator.tokenizer("a 🚢 façade 🚢🚢", add_special_tokens=False)["input_ids"]
    monkeypatch.setattr(text_module, "generate", lambda *arguments, **options: iter(wanted))
    pieces = list(generator.stream("x", GREEDY))
    assert [piece.token_id for piece in pieces] == wanted
    assert "".join(piece.text for piece in pieces) == "a 🚢 façade 🚢🚢"
    assert not any("\ufffd" in piece.text for piece in pieces)
    assert len([piece for piece in pieces if piece.text]) > 5

    # cut off inside a character: what there is of it comes at the end, marked
    monkeypatch.setattr(text_module, "generate", lambda *arguments, **options: iter(wanted[:-1]))
    cut = list(generator.stream("x", GREEDY))
    assert [piece.token_id for piece in cut] == wanted[:-1]
    assert "".join(piece.text for piece in cut).startswith("a 🚢 façade 🚢")
    assert cut[-1].text.endswith("\ufffd")


def test_the_stop_token_is_a_token_but_no_text(folder: Path, tmp_path: Path) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    free = load(folder).complete("the ship", GREEDY)
    stop = free.token_ids[5]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, stop]}))
    generator = load(tmp_path)
    assert generator.stop_ids == {1, stop}
    stopped = generator.complete("the ship", GREEDY)
    assert stopped.token_ids == free.token_ids[: free.token_ids.index(stop) + 1]
    assert free.text.startswith(stopped.text.rstrip("\ufffd"))


def test_without_begin_of_sequence_an_empty_prompt_starts_from_the_separator(tmp_path: Path) -> None:
    backend = Tokenizer(models.WordLevel({"[unk]": 0, "end": 1, "ship": 2}, unk_token="[unk]"))
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="end").save_pretrained(tmp_path)
    model = ours(reference_model("llama-2"))
    generator = Generator(model, tmp_path)
    assert generator.encode("") == [1]
    assert generator.stop_ids == {1}
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(tmp_path / "bare")
    with pytest.raises(UserError, match="the prompt cannot be empty"):
        Generator(model, tmp_path / "bare").encode("")


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no usable tokenizer in"):
        Generator(ours(reference_model("llama-2")), tmp_path)


def test_real_weights_write_the_published_text(shared_data: Path) -> None:
    folder = shared_data / "weights" / "stories260K"
    published = json.loads((folder / "reference.json").read_text())
    generator = load(folder / "hf")
    assert isinstance(generator.model, Decoder)
    completion = generator.complete("", SamplingOptions(max_new_tokens=256, temperature=0))
    assert completion.token_ids == published["greedy_ids"][1:]
    assert published["greedy_text"].startswith(completion.text.lstrip())
    # a tokenizer that drops the first space of what it decodes: prompt and text still join
    begun = generator.complete("Once upon a", SamplingOptions(max_new_tokens=40, temperature=0))
    assert published["greedy_text"].startswith("Once upon a" + begun.text)
