from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

from modelyard.errors import UserError
from modelyard.generate.sample import SamplingOptions, choose, generate
from tests.model.families import FAMILIES, in_dtype, ours, reference_model

GREEDY = SamplingOptions(max_new_tokens=40, temperature=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_is_token_equal_to_transformers(family: str, dtype: torch.dtype) -> None:
    reference = in_dtype(reference_model(family, hidden_size=64, vocab_size=300), dtype)
    model = ours(reference).to(dtype)
    model.rotary_dtype = dtype  # as transformers
    prompt = torch.randint(3, 300, (1, 11), generator=torch.Generator().manual_seed(0))
    options = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = reference.generate(prompt, attention_mask=torch.ones_like(prompt), **options)[0, 11:].tolist()
    assert len(set(expected)) > 5
    assert list(generate(model, prompt[0].tolist(), GREEDY)) == expected


def test_stops_after_a_stop_token() -> None:
    model = ours(reference_model("llama-2"))
    free = list(generate(model, [3, 4], GREEDY))
    stop = free[7]
    stopped = list(generate(model, [3, 4], GREEDY, stop_ids={stop}))
    assert stopped == free[: free.index(stop) + 1]


def test_a_seed_is_a_text() -> None:
    model = ours(reference_model("llama-2"))
    first, second, other = (
        list(generate(model, [3, 4], SamplingOptions(max_new_tokens=30, seed=seed))) for seed in (5, 5, 6)
    )
    assert first == second
    assert first != other


def draws(logits: list[float], **options: float) -> Counter[int]:
    generator = torch.Generator().manual_seed(0)
    sampling = SamplingOptions(**options)  # type: ignore[arg-type]
    return Counter(choose(torch.tensor(logits), sampling, generator) for _ in range(2000))


LOGITS = [math.log(x) for x in (0.4, 0.3, 0.2, 0.1)]


def test_temperature() -> None:
    assert draws(LOGITS, temperature=0) == {0: 2000}
    counts = draws(LOGITS)
    for token, probability in enumerate((0.4, 0.3, 0.2, 0.1)):
        assert counts[token] / 2000 == pytest.approx(probability, abs=0.04)
    sharp = draws(LOGITS, temperature=0.5)  # squares: 16, 9, 4, 1 of 30
    assert sharp[0] / 2000 == pytest.approx(16 / 30, abs=0.04)
    assert sharp[3] / 2000 == pytest.approx(1 / 30, abs=0.02)


@pytest.mark.parametrize(
    ("options", "tokens"),
    [
        ({"top_k": 1}, {0}),
        ({"top_k": 2}, {0, 1}),
        ({"top_k": 99}, {0, 1, 2, 3}),
        ({"top_p": 0.39}, {0}),
        ({"top_p": 0.69}, {0, 1}),
        ({"top_p": 0.71}, {0, 1, 2}),
        ({"top_p": 1.0}, {0, 1, 2, 3}),
        ({"top_k": 2, "top_p": 0.5}, {0}),  # 0.4 of 0.7 is past 0.5 already
    ],
)
def test_only_the_likeliest(options: dict[str, float], tokens: set[int]) -> None:
    assert set(draws(LOGITS, **options)) == tokens


def test_every_option_out_of_range_is_named() -> None:
    with pytest.raises(UserError) as caught:
        SamplingOptions(max_new_tokens=0, temperature=-1.0, top_k=0, top_p=1.5)
    assert caught.value.problems == [
        "max_new_tokens must be at least 1, not 0",
        "temperature must be 0 or more, not -1.0",
        "top_k must be at least 1, not 0",
        "top_p must be above 0 and at most 1, not 1.5",
    ]


def test_prompts_that_cannot_be() -> None:
    model = ours(reference_model("llama-2"))
    with pytest.raises(UserError, match="at least one token"):
        next(generate(model, [], GREEDY))
    with pytest.raises(UserError, match="has token 97, the model's vocabulary ends at 96"):
        next(generate(model, [5, 97], GREEDY))
