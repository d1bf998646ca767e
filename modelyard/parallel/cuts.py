"""How tensor-parallel processes cut each parameter. Names and arithmetic only, so that plans need no torch."""

from __future__ import annotations

BY_ROWS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
BY_COLUMNS = ("o_proj", "down_proj")
BY_WORDS = ("embed_tokens", "lm_head")


def cut_along(module: str, parameter: str) -> int | None:
    """The dimension along which a parameter of a module (both by name) is cut; None: every process has it whole.

    Of an adapter B is cut where its matrix is cut by rows, A where that is cut by columns.
    """
    kind = module.rpartition(".")[2]
    if kind in BY_ROWS or kind in BY_WORDS:
        return None if parameter == "lora_A" else 0
    by_columns = ("weight", "weight_codes", "weight_scales", "lora_A")
    return 1 if kind in BY_COLUMNS and parameter in by_columns else None


def cut_shape(name: str, shape: tuple[int, ...], processes: int) -> tuple[int, ...]:
    """What each of `processes` has of a parameter, by its logical name and full shape."""
    dimension = cut_along(*name.rsplit(".", 1))
    if dimension is None or processes == 1:
        return shape
    return tuple(size // processes if d == dimension else size for d, size in enumerate(shape))
