"""FP8 weights as released: E4M3 values and one float32 scale per 128x128 block (V3 section 3.3).

``W[r, c] = q[r, c] * scale[r // 128, c // 128]``; blocks at the right and lower edge are cut off
where the matrix ends. NumPy on purpose: conversion must not need an accelerator.
"""

import ml_dtypes
import numpy as np
from jaxtyping import Float

from deepseek_jax.convert.table import BLOCK_SIZE
from deepseek_jax.types import UserError

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
_MAX = float(ml_dtypes.finfo(E4M3).max)  # 448
_VALUES = np.arange(256, dtype=np.uint8).view(E4M3).astype(np.float32)


def blocks(length: int) -> int:
    """How many blocks cover this many rows or columns."""
    return -(-length // BLOCK_SIZE)


def check_scales(name: str, scale: np.ndarray) -> np.ndarray:
    """The scales as float32.

    Raises:
        UserError: for a scale that is NaN, infinite or negative.
    """
    scale = scale.astype(np.float32)
    if not np.all((scale >= 0) & (scale < np.inf)):
        raise UserError(
            f"{name} holds scales that are NaN, infinite or negative, so its weights would be too; "
            "the file is damaged: download it again."
        )
    return scale


def dequantize(
    q: Float[np.ndarray, "rows cols"],
    scale: Float[np.ndarray, "block_rows block_cols"],
    first_row: int = 0,
    first_col: int = 0,
) -> Float[np.ndarray, "rows cols"]:
    """The matrix, or the part of it that begins at this row and column, in float32.

    ``scale`` is always that of the whole matrix.
    """
    rows = np.arange(first_row, first_row + q.shape[0]) // BLOCK_SIZE
    cols = np.arange(first_col, first_col + q.shape[1]) // BLOCK_SIZE
    out = np.take(_VALUES, q.view(np.uint8))
    # By rows of blocks, so that the repeated scales never take as much room as the matrix.
    for block in range(rows[0] if len(rows) else 0, rows[-1] + 1 if len(rows) else 0):
        first, last = np.searchsorted(rows, [block, block + 1])
        out[first:last] *= scale[block, cols]
    return out


def quantize(
    w: Float[np.ndarray, "rows cols"], *, ue8m0: bool = False
) -> tuple[Float[np.ndarray, "rows cols"], Float[np.ndarray, "block_rows block_cols"]]:
    """Values and scales; ``scale = amax / 448``, or the next power of two above it (V3.1)."""
    rows, cols = w.shape
    w = w.astype(np.float32)
    column_starts = np.arange(0, cols, BLOCK_SIZE)
    q = np.empty(w.shape, E4M3)
    scale = np.empty((blocks(rows), blocks(cols)), np.float32)
    for i in range(blocks(rows)):
        band = w[i * BLOCK_SIZE : (i + 1) * BLOCK_SIZE]
        amax = np.maximum.reduceat(np.abs(band).max(axis=0), column_starts)
        # As the released kernel: a block of zeros must not divide by zero.
        scale[i] = np.maximum(amax, 1e-4) / _MAX
        if ue8m0:
            scale[i] = np.exp2(np.ceil(np.log2(scale[i])))
        repeated = np.repeat(scale[i], BLOCK_SIZE)[:cols]
        q[i * BLOCK_SIZE : (i + 1) * BLOCK_SIZE] = np.clip(band / repeated, -_MAX, _MAX)
    return q, scale
