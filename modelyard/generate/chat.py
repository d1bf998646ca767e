"""Conversations to answers: a chat format around `generate`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from modelyard.chat.conversation import Conversation, Message
from modelyard.chat.families import Family
from modelyard.chat.tokens import tokenize_conversation
from modelyard.config.architecture import Architecture
from modelyard.data.tokenizer import Tokenizer
from modelyard.errors import UserError
from modelyard.generate.sample import SamplingOptions, Speaker, generate
from modelyard.generate.text import Piece, pieces, refuse_another_tokenizer, stop_ids
from modelyard.model.decoder import Decoder


@dataclass(frozen=True)
class Answer:
    message: Message
    """What was said, tool calls as such."""
    text: str
    """The same as it was written: special tokens written out, but not the one that ended it."""
    token_ids: list[int]
    """The new tokens, with the one that ended the answer where one did."""
    stopped: bool
    """Whether the model ended the answer by itself."""


def room(architecture: Architecture, tokens: int) -> int | None:
    """For how many new tokens the model has positions after a prompt of so many; None: for any number.

    Raises UserError where there is none at all.
    """
    positions = architecture.max_position_embeddings
    if positions is not None and tokens >= positions:
        raise UserError(
            f"the conversation has {tokens:,} tokens, and the model was made for {positions:,}, answer included"
        )
    return None if positions is None else positions - tokens


class ChatModel:
    """A model with its tokenizer and the format in which it was taught conversations."""

    def __init__(self, model: Decoder | Speaker, tokenizer: Tokenizer, family: Family):
        """The tokenizer's folder may be a model's, and then says what ends a text (generation_config.json).

        Raises UserError where the tokenizer is another model's.
        """
        self.model, self.tokenizer, self.family = model, tokenizer, family
        folder = tokenizer.folder
        refuse_another_tokenizer(folder, tokenizer.vocab_size, model.architecture.vocab_size)
        ends = (tokenizer.backend.token_to_id(text) for text in family.stops)
        end_id = None if tokenizer.eos is None else tokenizer.eos.id
        self.stop_ids = frozenset({end for end in ends if end is not None} | stop_ids(folder, end_id))

    @property
    def stops(self) -> list[str]:
        """The tokens that end an answer, as they are written."""
        return [self.tokenizer.backend.id_to_token(token) or str(token) for token in sorted(self.stop_ids)]

    def prompt_ids(self, conversation: Conversation) -> list[int]:
        """What the model reads before it answers: the tokens that training would have before an answer at this place.

        Raises ConversationError where the format cannot hold the conversation.
        """
        ids: list[int] = tokenize_conversation(
            conversation, self.family, self.tokenizer, answer=True
        ).ids.tolist()
        return ids

    def stream(self, conversation: Conversation, options: SamplingOptions) -> Iterator[Piece]:
        """Yield each token of the answer with the text that it completes; special tokens are written out, the one that
        ends the answer has no text. `finish` makes an answer of them.

        The answer ends with the model's last position at the latest. Raises ConversationError where the format cannot hold
        the conversation, UserError where it is too long.
        """
        prompt = self.prompt_ids(conversation)
        limit = room(self.model.architecture, len(prompt))
        if limit is not None:
            options = replace(options, max_new_tokens=min(options.max_new_tokens, limit))
        return pieces(prompt, generate(self.model, prompt, options, stop_ids=self.stop_ids), self._decode)

    def answer(self, conversation: Conversation, options: SamplingOptions) -> Answer:
        return self.finish(list(self.stream(conversation, options)))

    def finish(self, made: Sequence[Piece]) -> Answer:
        """The answer of these pieces, all of one or its beginning."""
        text = "".join(piece.text for piece in made)
        token_ids = [piece.token_id for piece in made]
        stopped = bool(token_ids) and token_ids[-1] in self.stop_ids
        return Answer(self.family.parse(text), text, token_ids, stopped)

    def _decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode([token for token in ids if token not in self.stop_ids])
