"""What a model must beat on the held-out documents: a token bigram and ``gzip -9``."""

import zlib
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int, Int32, Int64

from deepseek_jax.data.encoding import DocumentEncoder
from deepseek_jax.data.pipeline import DataConfig, eval_batches, load_corpus
from deepseek_jax.data.sources import Documents
from deepseek_jax.data.tokenizer import Tokenizer

_FITTED_TOKENS = 20_000_000


class Baselines(NamedTuple):
    """Bits per byte of the held-out text, and its size."""

    bigram: float
    gzip: float
    held_out_bytes: int


def measure_baselines(config: DataConfig, tokenizer: Tokenizer) -> Baselines:
    """Both baselines on the held-out documents of ``config``."""
    documents = load_corpus(config).held_out
    size = sum(len(documents[i].encode()) for i in range(len(documents)))
    return Baselines(bigram_bits_per_byte(config, tokenizer), gzip_bits_per_byte(documents), size)


def gzip_bits_per_byte(documents: Documents) -> float:
    """``gzip -9`` of the documents end to end: bits of the file over bytes of the text."""
    packer = zlib.compressobj(level=9, wbits=31)  # 31: a gzip header and trailer
    raw = packed = 0
    for index in range(len(documents)):
        data = documents[index].encode()
        raw += len(data)
        packed += len(packer.compress(data))
    return 8 * (packed + len(packer.flush())) / raw


def bigram_bits_per_byte(config: DataConfig, tokenizer: Tokenizer) -> float:
    """The bigram model, fitted on the training documents, on the rows of ``eval_batches``.

    It predicts the very targets that the model is evaluated on, those with weight, and their
    bits are divided by the same bytes. Fitted on the first 20 million training tokens.
    """
    model = fit_bigram(_training_tokens(config, tokenizer), tokenizer.vocab_size)
    bits, num_bytes = 0.0, 0
    for batch, size in eval_batches(config, tokenizer, batch_size=64):
        kept = np.asarray(batch.loss_weights_BT) > 0
        contexts, targets = np.asarray(batch.tokens_BT)[kept], np.asarray(batch.targets_BT)[kept]
        bits += float(model.bits(contexts, targets).sum())
        num_bytes += size
    return bits / num_bytes


class Bigram(NamedTuple):
    """Interpolated Kneser-Ney with three discounts (Chen and Goodman 1999, section 3).

    ``P(b | a) = (c(a, b) - D(c(a, b))) / c(a) + backoff(a) P1(b)``, where ``backoff(a)`` is
    what the discounts took from the pairs of a, and P1 counts contexts instead of tokens:
    ``P1(b) = (n(b) - 0.75) / n + 0.75 / n * (number of b seen) / V``, with n(b) the number of
    distinct tokens before b and n their sum. The strongest of the usual count-based bigrams.
    """

    pairs: Int64[np.ndarray, "n"]  # a * V + b of the pairs seen, sorted
    pair_counts: Float64[np.ndarray, "n"]  # already discounted
    context_counts_V: Int64[np.ndarray, "V"]
    backoff_V: Float64[np.ndarray, "V"]
    continuation_V: Float64[np.ndarray, "V"]

    def bits(
        self, contexts: Int[np.ndarray, "n"], targets: Int[np.ndarray, "n"]
    ) -> Float64[np.ndarray, "n"]:
        """-log2 P(target | context)."""
        keys = contexts.astype(np.int64) * len(self.backoff_V) + targets
        places = np.minimum(np.searchsorted(self.pairs, keys), len(self.pairs) - 1)
        together = np.where(self.pairs[places] == keys, self.pair_counts[places], 0)
        seen = together / np.maximum(self.context_counts_V[contexts], 1)
        return -np.log2(seen + self.backoff_V[contexts] * self.continuation_V[targets])


def fit_bigram(tokens: Int32[np.ndarray, "n"], vocab_size: int) -> Bigram:
    """Counts the pairs of one long sequence of tokens."""
    keys = tokens[:-1].astype(np.int64) * vocab_size + tokens[1:]
    pairs, counts = np.unique(keys, return_counts=True)
    contexts, targets = np.divmod(pairs, vocab_size)
    discounts = _discounts(counts)[np.minimum(counts, 3)]
    context_counts_V = np.bincount(tokens[:-1], minlength=vocab_size)
    taken_V = np.bincount(contexts, weights=discounts, minlength=vocab_size)
    backoff_V = np.where(context_counts_V > 0, taken_V / np.maximum(context_counts_V, 1), 1.0)
    before_V = np.bincount(targets, minlength=vocab_size)
    left_V = np.maximum(before_V - 0.75, 0)
    continuation_V = (left_V + 0.75 * (before_V > 0).sum() / vocab_size) / len(pairs)
    return Bigram(pairs, counts - discounts, context_counts_V, backoff_V, continuation_V)


def _discounts(counts: Int64[np.ndarray, "n"]) -> Float64[np.ndarray, "4"]:
    """D(0) = 0, D(1), D(2) and D(3 and more), from how many pairs were seen 1 to 4 times."""
    n1, n2, n3, n4 = (max(1, int((counts == i).sum())) for i in range(1, 5))
    y = n1 / (n1 + 2 * n2)
    raw = np.array([0.0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])
    # Too little text makes the estimates stray: never take all, nor nothing.
    return np.clip(raw, [0, 0.1, 0.1, 0.1], [0, 0.9, 1.9, 2.9])


def _training_tokens(config: DataConfig, tokenizer: Tokenizer) -> Int32[np.ndarray, "n"]:
    documents = load_corpus(config).train
    encoder = DocumentEncoder(documents, tokenizer, add_bos=config.add_bos)
    parts, count = [], 0
    for ids in encoder.encode_all():
        parts.append(ids)
        count += len(ids)
        if count > _FITTED_TOKENS:
            break
    return np.concatenate(parts)
