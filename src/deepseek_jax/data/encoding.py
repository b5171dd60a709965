"""Documents -> token ids, some of them rearranged for Fill-in-Middle (V3 section 4.1)."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Int32

from deepseek_jax.data.sources import Documents
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.types import UserError

_CACHED_TOKENS = 64_000_000  # 256 MB of token ids kept per process


def split_fim(text: str, rng: np.random.Generator) -> tuple[str, str, str]:
    """Cuts ``text`` at two characters drawn uniformly: (prefix, middle, suffix)."""
    first, second = sorted(rng.integers(0, len(text) + 1, size=2).tolist())
    return text[:first], text[first:second], text[second:]


def fim_ids(text: str, tokenizer: Tokenizer, rng: np.random.Generator) -> list[int]:
    """Prefix-Suffix-Middle: ``<fim_begin> prefix <fim_hole> suffix <fim_end> middle``.

    The end-of-sentence token that follows in the paper is added with every document's.
    """
    begin, hole, end = tokenizer.fim_begin_id, tokenizer.fim_hole_id, tokenizer.fim_end_id
    if begin is None or hole is None or end is None:
        raise UserError(
            "the tokenizer has no Fill-in-Middle tokens: set `fim_rate` to 0 or use a "
            "tokenizer that has them"
        )
    prefix, middle, suffix = split_fim(text, rng)
    encode = tokenizer.encode
    return [begin, *encode(prefix), hole, *encode(suffix), end, *encode(middle)]


class DocumentEncoder:
    """Document number (counted on over the epochs) -> its token ids, begin and end included.

    The draw for Fill-in-Middle depends on (seed, document, epoch) alone, so it is the same
    whatever the order, the process or the number of restarts. Ids of documents left as they
    are stay in memory, up to 256 MB: a small corpus is tokenised once.

    Args:
        documents: The texts.
        tokenizer: Must have an end-of-sentence token, and those of Fill-in-Middle if used.
        add_bos: Begin with the begin-of-sentence token, if the tokenizer has one.
        fim_rate: Share of documents rearranged for Fill-in-Middle.
        seed: Of Fill-in-Middle.

    Raises:
        UserError: The tokenizer lacks a token that is needed.
    """

    def __init__(
        self,
        documents: Documents,
        tokenizer: Tokenizer,
        *,
        add_bos: bool = True,
        fim_rate: float = 0.0,
        seed: int = 0,
    ):
        if tokenizer.eos_id is None:
            raise UserError(
                "the tokenizer has no end-of-sentence token: name it as eos_token in a "
                "tokenizer_config.json beside the tokenizer.json"
            )
        if fim_rate > 0:
            fim_ids("", tokenizer, np.random.default_rng(0))  # complains now, not mid-run
        self._documents = documents
        self._tokenizer = tokenizer
        self._fim_rate = fim_rate
        self._seed = seed
        bos_id = tokenizer.bos_id if add_bos else None
        self._before = [] if bos_id is None else [bos_id]
        self._after = [tokenizer.eos_id]
        self._cache: dict[int, np.ndarray] = {}
        self._cached_tokens = 0

    def __call__(self, index: int, _: Any) -> Int32[np.ndarray, "n"]:
        """Token ids of document ``index % len(documents)`` in epoch ``index // len(documents)``."""
        epoch, document = divmod(index, len(self._documents))
        if self._fim_rate > 0:
            rng = np.random.default_rng((self._seed, document, epoch))
            if rng.random() < self._fim_rate:
                return self._wrap(fim_ids(self._documents[document], self._tokenizer, rng))
        ids = self._cache.get(document)
        if ids is None:
            ids = self._wrap(self._tokenizer.encode(self._documents[document]))
            if self._cached_tokens + len(ids) <= _CACHED_TOKENS:
                self._cache[document] = ids
                self._cached_tokens += len(ids)
        return ids

    def encode_all(self) -> Iterator[Int32[np.ndarray, "n"]]:
        """The token ids of every document in order, as they are, on all CPU cores."""
        for start in range(0, len(self._documents), 64):
            stop = min(start + 64, len(self._documents))
            texts = [self._documents[i] for i in range(start, stop)]
            yield from (self._wrap(ids) for ids in self._tokenizer.encode_batch(texts))

    def __getstate__(self) -> dict[str, Any]:
        # Workers build caches of their own.
        return self.__dict__ | {"_cache": {}, "_cached_tokens": 0}

    def _wrap(self, ids: list[int]) -> np.ndarray:
        return np.array([*self._before, *ids, *self._after], np.int32)
