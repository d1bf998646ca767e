"""The keys and values of the tokens so far, for decoding one sequence."""

from __future__ import annotations

from torch import Tensor

from modelyard.config.architecture import Architecture

_CHUNK = 256  # tokens: small models decode short texts, long ones double their room each time


class LayerCache:
    """One layer's keys and values: [tokens, groups, head_size] each, in buffers that grow by doubling."""

    def __init__(self) -> None:
        self.length = 0
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add new tokens; all keys and values so far, [tokens, groups, head_size] each."""
        end = self.length + k.shape[0]
        self._keys = self._with_room(self._keys, k, end)
        self._values = self._with_room(self._values, v, end)
        self._keys[self.length : end] = k
        self._values[self.length : end] = v
        self.length = end
        return self._keys[:end], self._values[:end]

    def _with_room(self, buffer: Tensor | None, new: Tensor, end: int) -> Tensor:
        if buffer is not None and buffer.shape[0] >= end:
            return buffer
        capacity = max(_CHUNK, 2 * (0 if buffer is None else buffer.shape[0]), end)
        grown = new.new_empty((capacity, *new.shape[1:]))
        if buffer is not None:
            grown[: self.length] = buffer[: self.length]
        return grown


class KeyValueCache:
    """A cache for one sequence; give it to `Decoder.forward` with the tokens that follow what it holds."""

    def __init__(self, architecture: Architecture):
        self.layers = [LayerCache() for _ in range(architecture.num_layers)]

    @property
    def length(self) -> int:
        """Tokens held."""
        return self.layers[0].length
