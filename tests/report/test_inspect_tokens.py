"""Token ids as cells: one a token, characters of several tokens together, nothing that a terminal would act upon."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from modelyard.data.tokenizer import load_tokenizer
from modelyard.report.inspect_blocks import Cell, clean, visible_space
from modelyard.report.inspect_tokens import Vocabulary


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    """A tokenizer without merges: token b is byte b, 256 is <|end|>, 257 an added token that is not special."""
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    # By the table of GPT-2: printable bytes are themselves, the others follow from U+0100 on, in order.
    of_byte = {}
    others = iter(character for character in characters if ord(character) >= 256)
    for byte in range(256):
        printable = 33 <= byte <= 126 or 161 <= byte <= 172 or 174 <= byte <= 255
        of_byte[byte] = chr(byte) if printable else next(others)
    table = {character: byte for byte, character in of_byte.items()}
    backend = Tokenizer(BPE(vocab=table, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<|end|>", special=True)])
    backend.add_tokens([AddedToken("\n\n  ", special=False)])
    folder = tmp_path_factory.mktemp("bytes")
    backend.save(str(folder / "tokenizer.json"))
    return Vocabulary(load_tokenizer(folder))


def trained(text: str, *ids: int) -> Cell:
    return Cell(text, ids, "trained")


def test_the_bytes_of_a_character_are_one_cell(byte_level: Vocabulary) -> None:
    ids = [*"a🚢é".encode(), 256]
    assert byte_level.cells(ids, ["trained"] * 8) == [
        trained("a", 97),
        trained("🚢", 0xF0, 0x9F, 0x9A, 0xA2),
        trained("é", 0xC3, 0xA9),
        Cell("<|end|>", (256,), "trained", special=True),
    ]


def test_bytes_that_make_no_character_are_shown_as_bytes(byte_level: Vocabulary) -> None:
    ids = [0xE2, 0x82, ord("x"), 0xFF, 0xE2]
    assert [cell.text for cell in byte_level.cells(ids, ["trained"] * 5)] == [
        "<0xE2>", "<0x82>", "x", "<0xFF>", "<0xE2>",
    ]  # fmt: skip
    # A special token in the middle of a character does not wait for its end.
    assert [cell.text for cell in byte_level.cells([0xC3, 256, 0xA9], ["masked"] * 3)] == [
        "<0xC3>", "<|end|>", "<0xA9>",
    ]  # fmt: skip


def test_a_character_half_of_which_is_masked_keeps_both_kinds(byte_level: Vocabulary) -> None:
    cells = byte_level.cells(list("é".encode()), ["masked", "trained"])
    assert [(cell.text, cell.kind) for cell in cells] == [("<0xC3>", "masked"), ("<0xA9>", "trained")]
    cells = byte_level.cells(list("aé".encode()), ["trained"] * 3, [2, 2, 3])
    assert [(cell.text, cell.said) for cell in cells] == [("a", 2), ("<0xC3>", 2), ("<0xA9>", 3)]
    assert [cell.said for cell in byte_level.cells(list("é".encode()), ["trained"] * 2, [3, 3])] == [3]


def test_unknown_ids_and_no_tokenizer(byte_level: Vocabulary) -> None:
    assert byte_level.cells([5000], ["trained"]) == [Cell("⟨5000⟩", (5000,), "trained", special=True)]
    assert [cell.text for cell in Vocabulary(None).cells([7, 8], ["trained"] * 2)] == ["⟨7⟩", "⟨8⟩"]


def test_white_space_is_to_be_seen(byte_level: Vocabulary) -> None:
    cells = byte_level.cells([257, 9, 10, 13, 32], ["trained"] * 5)
    assert [cell.text for cell in cells] == ["⏎\n⏎\n··", "⇥", "⏎\n", "␍", "·"]
    assert visible_space(" word") == " word"
    assert visible_space("  word") == "··word"
    assert visible_space("a b ") == "a·b·"


def test_what_a_terminal_would_act_upon_is_shown_instead(byte_level: Vocabulary) -> None:
    assert clean("\x1b[31m\x07\x7f\x9b\u202e\u2028\ud800e") == "␛[31m␇␡\\u009b\\u202e\\u2028\\ud800e"
    assert clean("naïve 漢字\n") == "naïve 漢字\n"
    assert [cell.text for cell in byte_level.cells([27, *"\u202e".encode()], ["trained"] * 4)] == [
        "␛",
        "\\u202e",
    ]


def test_sentencepiece_tokens(tmp_path: Path) -> None:
    backend = Tokenizer(
        BPE(vocab={"▁the": 0, "s": 1, "<0xC3>": 2, "<0xA9>": 3, "<0x0A>": 4, "▁▁": 5}, merges=[])
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    backend.save(str(tmp_path / "tokenizer.json"))
    cells = Vocabulary.of_folder(tmp_path).cells([0, 1, 2, 3, 4, 5], ["trained"] * 6)
    assert cells == [
        trained(" the", 0), trained("s", 1), trained("é", 2, 3), trained("⏎\n", 4), trained("··", 5),
    ]  # fmt: skip
