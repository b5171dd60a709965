"""A LoRA adapter over its base, merged as it is read: neither is ever in memory as a whole."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from deepseek_jax.convert.fp8 import E4M3
from deepseek_jax.model.layers import LORA_A, low_rank
from deepseek_jax.types import UserError


def adapted_paths(names: Iterable[str]) -> list[tuple[str, ...]]:
    """The paths of the matrices that an adapter with leaves of these names changes."""
    return [tuple(name.removesuffix(LORA_A).split("/")) for name in names if name.endswith(LORA_A)]


class Merged:
    """W + scale A B; slicing reads and multiplies what the slice needs."""

    def __init__(self, base: Any, a: Any, b: Any, scale: float):
        if np.dtype(base.dtype) == E4M3:
            raise UserError("the base of the adapter is in FP8; convert it to bfloat16 and merge.")
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
        return np.asarray(self._base[index], np.float32) + product
