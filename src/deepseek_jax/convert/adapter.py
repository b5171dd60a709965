"""A LoRA adapter over its base, merged as it is read: neither is ever in memory as a whole."""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from deepseek_jax.convert.table import BLOCK_SIZE
from deepseek_jax.model.layers import low_rank
from deepseek_jax.sharding import LORA_A


def adapted_paths(names: Iterable[str]) -> list[tuple[str, ...]]:
    """The paths of the matrices that an adapter with leaves of these names changes."""
    return [tuple(name.removesuffix(LORA_A).split("/")) for name in names if name.endswith(LORA_A)]


class Merged:
    """W + scale A B; slicing reads and multiplies what the slice needs.

    ``blocks`` are the scales of W where it is in FP8, ``[*lead, blocks, blocks]``.
    """

    def __init__(self, base: Any, a: Any, b: Any, scale: float, blocks: np.ndarray | None = None):
        self._blocks = blocks
        self._base, self._a, self._b, self._scale = base, a[...], b[...], scale
        self.shape, self.dtype = tuple(base.shape), np.dtype(np.float32)
        self.chunk = getattr(base, "chunk", None)
        self._split = self._a.ndim - 1
        self._lead = self._a.ndim + self._b.ndim - len(self.shape) - 2

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        whole = (slice(None),)
        a = self._a[index[: self._split] + whole]
        b = self._b[index[: self._lead] + whole + index[self._split :]]
        product = low_rank(a, np.float32(self._scale) * b, len(self.shape))
        base = np.asarray(self._base[index], np.float32)
        if self._blocks is not None:
            rows, columns = (
                np.arange(math.prod(shape)).reshape(shape)[own].ravel() // BLOCK_SIZE
                for shape, own in (
                    (self.shape[self._lead : self._split], index[self._lead : self._split]),
                    (self.shape[self._split :], index[self._split :]),
                )
            )
            each = self._blocks[index[: self._lead]][..., rows[:, None], columns]
            base = (base.reshape(each.shape) * each).reshape(base.shape)
        return base + product
