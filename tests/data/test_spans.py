"""Spans mask the tokens whose characters they touch: hand-made cases, and a character-by-character reference."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers

from modelyard.data.spans import SpanError, character_mask, token_mask
from modelyard.data.tokenizer import Tokenizer, load_tokenizer


@pytest.mark.parametrize(
    ("spans", "masked"),
    [
        ([], ""),
        ([[0, 0]], "0"),
        ([[9, 9]], "9"),
        ([[0, 9]], "0123456789"),
        ([[2, 4]], "234"),
        ([[6, 7], [1, 2]], "1267"),  # unsorted
        ([[1, 5], [3, 7]], "1234567"),  # overlapping
        ([[1, 8], [3, 4]], "12345678"),  # nested
        ([[3, 3], [3, 3], [4, 4]], "34"),  # repeated, touching
        ([[5, 4], [10, 9]], ""),  # empty
    ],
)
def test_character_mask(spans, masked):
    assert "".join(str(i) for i in np.flatnonzero(character_mask(spans, 10))) == masked


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ([[0, 10]], r"\[0, 10\] lies beyond the text, whose last character is 9"),
        ([[11, 10]], "beyond"),
        ([[-1, 3]], "negative"),
        ([[5, 3]], "reversed"),
        ([[1]], "not a pair"),
        ([[1, 2, 3]], "not a pair"),
        ([[1.0, 2.0]], "not a pair of integers"),
        ([[True, False]], "not a pair of integers"),
        (["ab"], "not a pair"),
        ([{"first": 1}], "not a pair"),
        (None, "NoneType, not a list"),
        ("12", "str, not a list"),
    ],
)
def test_bad_spans(spans, message):
    with pytest.raises(SpanError, match=message):
        character_mask(spans, 10)


@pytest.mark.parametrize(
    ("spans", "expected"),
    [
        # Tokens of "hello world": "he" [0,2) "llo" [2,5) " wor" [5,9) "ld" [9,11).
        ([], [0, 0, 0, 0]),
        ([[0, 0]], [1, 0, 0, 0]),
        ([[1, 2]], [1, 1, 0, 0]),
        ([[2, 4]], [0, 1, 0, 0]),
        ([[5, 5]], [0, 0, 1, 0]),  # the space belongs to " wor"
        ([[8, 9]], [0, 0, 1, 1]),
        ([[10, 10], [0, 1]], [1, 0, 0, 1]),
        ([[3, 2]], [0, 0, 0, 0]),
    ],
)
def test_token_mask_by_hand(spans, expected):
    offsets = [(0, 2), (2, 5), (5, 9), (9, 11)]
    assert token_mask(character_mask(spans, 11), offsets).tolist() == expected


def test_tokens_that_share_a_character_are_all_masked():
    # "a🚢b" with the ship in three byte tokens.
    offsets = [(0, 1), (1, 2), (1, 2), (1, 2), (2, 3)]
    assert token_mask(character_mask([[1, 1]], 3), offsets).tolist() == [0, 1, 1, 1, 0]
    assert token_mask(character_mask([[2, 2]], 3), offsets).tolist() == [0, 0, 0, 0, 1]


def test_unclaimed_characters_count_with_the_one_before():
    # "e" + combining accent, joined by NFC into one token that claims the "e" alone; then a dropped leading character.
    assert token_mask(character_mask([[1, 1]], 3), [(0, 1), (2, 3)]).tolist() == [1, 0]
    assert token_mask(character_mask([[0, 0]], 3), [(1, 2), (2, 3)]).tolist() == [1, 0]


def test_zero_width_tokens_count_as_the_character_they_precede():
    assert token_mask(character_mask([[0, 0]], 2), [(0, 0), (0, 1), (1, 2)]).tolist() == [1, 1, 0]
    assert token_mask(character_mask([[1, 1]], 2), [(0, 0), (0, 1), (1, 2)]).tolist() == [0, 0, 1]


def test_no_tokens():
    assert token_mask(character_mask([], 0), []).tolist() == []


def test_sentencepiece_normalizer_with_prepended_space(tmp_path):
    """Llama 2's way: "▁" in front, spaces to "▁"; its offsets still speak of the original text."""
    vocab = {piece: i for i, piece in enumerate(["<unk>", "▁", "h", "i", "y", "o", "▁h", "▁hi", "▁y", "▁yo"])}
    backend = Backend(
        models.BPE(vocab, [("▁", "h"), ("▁h", "i"), ("▁", "y"), ("▁y", "o")], unk_token="<unk>")
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Replace("▁", " ")
    tokenizer = Tokenizer(backend, folder=tmp_path, bos=None, eos=None, fingerprint="")
    (encoding,) = tokenizer.encode_batch(["hi yo hi"], offsets=True)
    assert encoding.tokens == ["▁hi", "▁yo", "▁hi"]
    mask = {
        spot: token_mask(character_mask([[spot, spot]], 8), encoding.offsets).tolist() for spot in range(8)
    }
    assert mask[0] == mask[1] == [1, 0, 0]
    assert mask[2] == mask[3] == mask[4] == [0, 1, 0]  # the space goes with the word after it
    assert mask[5] == mask[6] == mask[7] == [0, 0, 1]


BYTE_OF = {
    character: byte
    for byte, character in (
        lambda visible: (
            {b: chr(b) for b in visible}
            | {b: chr(256 + n) for n, b in enumerate(b for b in range(256) if b not in visible)}
        )
    )([*range(33, 127), *range(161, 173), *range(174, 256)]).items()
}
"""The byte-level alphabet of GPT-2, from its published rule."""


@pytest.mark.parametrize("name", ["gpt2", "llama3", "gpt-neox-20b"])
def test_against_a_byte_by_byte_reference(shared_data, name):
    """Which characters a token spells is worked out from the tokens' own bytes, without the library's offsets."""
    tokenizer = load_tokenizer(shared_data / "tokenizers" / name)
    with gzip.open(shared_data / "text" / "udhr_langid.jsonl.gz", "rt", encoding="utf-8") as file:
        texts = [json.loads(line)["text"][:400] for line in file][::6]
    texts += ["  tabs\tand   spaces\n\n\n  ", "ships 🚢👨‍👩‍👧 and 汉字仮名 naïve", "\r\n", "a"]
    added = {token.content for token in tokenizer.backend.get_added_tokens_decoder().values()}
    random = np.random.default_rng(3)
    checked = 0
    for text in texts:
        (encoding,) = tokenizer.encode_batch([text], offsets=True)
        spelled = [
            token.encode() if token in added else bytes(BYTE_OF[c] for c in token)
            for token in encoding.tokens
        ]
        if b"".join(spelled) != text.encode():
            continue  # NFC changed it; see the accent case above
        character_of_byte = [i for i, character in enumerate(text) for _ in character.encode()]
        for _ in range(5):
            edges = np.sort(random.integers(0, len(text), 2))
            spans = [[int(edges[0]), int(edges[1])], [len(text) // 2] * 2]
            inside = {i for first, last in spans for i in range(first, last + 1)}
            expected, at = [], 0
            for piece in spelled:
                expected.append(int(any(character_of_byte[b] in inside for b in range(at, at + len(piece)))))
                at += len(piece)
            assert token_mask(character_mask(spans, len(text)), encoding.offsets).tolist() == expected
            checked += 1
    assert checked > 40


def test_normalised_accents(shared_data):
    tokenizer = load_tokenizer(shared_data / "tokenizers" / "qwen2.5")
    text = "cafe\u0301 noir"  # NFC makes one character of two
    (encoding,) = tokenizer.encode_batch([text], offsets=True)
    assert encoding.tokens == ["ca", "fÃ©", "Ġnoir"]
    for spot, expected in {1: [1, 0, 0], 2: [0, 1, 0], 3: [0, 1, 0], 4: [0, 1, 0], 5: [0, 0, 1]}.items():
        assert token_mask(character_mask([[spot, spot]], len(text)), encoding.offsets).tolist() == expected
