"""The data of a pretraining run: from ``DataConfig`` to an endless stream of ``Batch``."""

import functools
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import grain
import numpy as np
from absl import flags
from grain.experimental import WindowShuffleIterDataset

from deepseek_jax.data.corpus import Corpus, open_corpus
from deepseek_jax.data.encoding import DocumentEncoder
from deepseek_jax.data.packing import PackRows, padding_row, rows_to_batch
from deepseek_jax.data.shuffle import shuffled
from deepseek_jax.data.sources import Documents
from deepseek_jax.data.tokenizer import Tokenizer, train_bpe
from deepseek_jax.types import Batch, UserError

# Reading and tokenising happen in the calling thread: the step runs on the accelerator (or on
# the other cores) meanwhile, and `num_workers` is the way to more.
NO_THREADS = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
_TOKENIZER_SAMPLE_BYTES = 200_000_000


@dataclass(frozen=True)
class DataConfig:
    """What to train on, and how it becomes rows of tokens.

    Attributes:
        source: "stdlib" (Python's own source), or files, directories, globs of text, .jsonl,
            .parquet, .array_record.
        text_field: JSONL field or Parquet column that holds the text.
        separator: Ends a document of a plain file; none: a file is a document.
        tokenizer: A Hugging Face tokenizer.json; none trains BPE on the corpus.
        seq_len: Tokens in a row (T).
        add_bos: Begin documents with the begin-of-sentence token, if any.
        fim_rate: Share of documents rearranged for Fill-in-Middle.
        mask_documents: Documents of a row do not attend to each other (V3: do).
        held_out_fraction: Share of documents kept for evaluation, chosen by content.
        held_out_source: Documents to evaluate on instead of a share of the source.
        shuffle: Visit the documents in a new random order each epoch.
        mix_tokens: With ``shuffle``, rows within so many tokens change places too.
        seed: Of the order and of Fill-in-Middle, not of the split.
        num_workers: Processes that prepare data; 0: the trainer does it itself.
        streams: Parts of the data that as many processes can read; 0: as many as start the run.
    """

    source: tuple[str, ...] = ("stdlib",)
    text_field: str = "text"
    separator: str = ""
    tokenizer: Path | None = None
    seq_len: int = 256
    add_bos: bool = True
    fim_rate: float = 0.1
    mask_documents: bool = False
    held_out_fraction: float = 0.05
    held_out_source: tuple[str, ...] = ()
    shuffle: bool = True
    mix_tokens: int = 250_000
    seed: int = 0
    num_workers: int = 0
    streams: int = 0

    def __post_init__(self):
        if self.seq_len < 1:
            raise UserError(f"`seq_len` must be at least 1, not {self.seq_len}")
        if not 0 <= self.fim_rate <= 1:
            raise UserError(f"`fim_rate` is a share between 0 and 1, not {self.fim_rate}")
        if not 0 < self.held_out_fraction < 1:
            raise UserError(
                "`held_out_fraction` is a share between 0 and 1, both excluded, not "
                f"{self.held_out_fraction}"
            )
        for name in ("seed", "num_workers", "streams"):
            if getattr(self, name) < 0:
                raise UserError(f"`{name}` cannot be negative, but is {getattr(self, name)}")


class EvalBatch(NamedTuple):
    """A batch of held-out rows and the UTF-8 bytes that its weighted targets stand for.

    Bits per byte over a pass: sum of the weighted losses in nats, over ln 2, over the sum of
    ``num_bytes``.
    """

    batch: Batch
    num_bytes: int


def load_corpus(config: DataConfig) -> Corpus:
    """Opens and splits the documents of ``config``; reads them again only if a file changed."""
    return open_corpus(
        config.source,
        text_field=config.text_field,
        separator=config.separator,
        held_out_fraction=config.held_out_fraction,
        held_out_source=config.held_out_source,
    )


def fit_tokenizer(config: DataConfig, vocab_size: int) -> Tokenizer:
    """Trains byte-level BPE on the training documents (their first 200 MB) alone."""
    documents = load_corpus(config).train
    return train_bpe(_first_bytes(documents), vocab_size)


def train_batches(
    config: DataConfig,
    tokenizer: Tokenizer,
    batch_size: int,
    *,
    stream: int = 0,
    streams: int = 1,
) -> grain.DatasetIterator[Batch]:
    """Endless batches of numpy arrays [batch_size, seq_len] from the training documents.

    Each epoch visits every document once, over all streams together, in a new order.
    ``get_state()`` is a JSON-serialisable dict; ``set_state`` of it, in this or in a fresh
    process with the same arguments, continues bit for bit. Call ``close()`` when done if
    ``num_workers`` is not 0.

    Args:
        config: What to read.
        tokenizer: Turns documents into ids.
        batch_size: Rows in a batch of this stream (B).
        stream: This stream among those that share the corpus.
        streams: How many share the corpus; each sees its own documents.

    Raises:
        UserError: Unusable documents or tokenizer, or fewer documents than streams.
    """
    corpus = load_corpus(config)
    if len(corpus.train) < streams:
        raise UserError(
            f"{len(corpus.train)} training documents cannot feed {streams} processes: "
            "split the documents or use fewer processes"
        )
    encoder = DocumentEncoder(
        corpus.train,
        tokenizer,
        add_bos=config.add_bos,
        fim_rate=config.fim_rate,
        seed=config.seed,
    )
    documents = grain.MapDataset.range(len(corpus.train)).map_with_index(encoder)
    if config.shuffle:
        # Neighbouring seeds would share their epochs.
        seed = int(np.random.SeedSequence(config.seed).generate_state(1)[0])
        documents = shuffled(documents, corpus.train, seed)
    documents = documents[stream::streams].repeat().to_iter_dataset(NO_THREADS)
    rows = PackRows(documents, config.seq_len)
    if config.shuffle:
        # Without this a small batch is a few pages of one document.
        window = max(1, config.mix_tokens // (config.seq_len * streams))
        rows = WindowShuffleIterDataset(rows, window_size=window, seed=config.seed)
    stack = functools.partial(rows_to_batch, mask_documents=config.mask_documents)
    batches = rows.batch(batch_size, batch_fn=stack)
    if config.num_workers:
        if not flags.FLAGS.is_parsed():  # grain's workers insist, even outside of an absl app
            flags.FLAGS.mark_as_parsed()
        batches = batches.mp_prefetch(grain.MultiprocessingOptions(config.num_workers))
    fingerprint = _fingerprint(corpus, tokenizer, config, stream, streams)
    return SameData(iter(batches), fingerprint)


def eval_batches(config: DataConfig, tokenizer: Tokenizer, batch_size: int) -> Iterator[EvalBatch]:
    """One pass over the held-out documents, in order and without Fill-in-Middle.

    Missing rows at the end are padding of weight 0. Every token but the first of the pass is a
    target once (with ``mask_documents``: but the first of each document), so with a
    begin-of-sentence token ``num_bytes`` adds up to the size of the held-out text. Processes
    that share an evaluation all make the same batches, and each feeds its rows of them.

    Args:
        config: What to read.
        tokenizer: Turns documents into ids.
        batch_size: Rows in a batch (B).

    Raises:
        UserError: Unusable documents or tokenizer.
    """
    corpus = load_corpus(config)
    encoder = DocumentEncoder(corpus.held_out, tokenizer, add_bos=config.add_bos)
    documents = grain.MapDataset.range(len(corpus.held_out)).map_with_index(encoder)
    rows = PackRows(documents.to_iter_dataset(NO_THREADS), config.seq_len)
    for group in rows.batch(batch_size, batch_fn=list):
        padded = group + [padding_row(config.seq_len)] * (batch_size - len(group))
        batch = rows_to_batch(padded, mask_documents=config.mask_documents)
        yield EvalBatch(batch, target_bytes(tokenizer, batch))


def target_bytes(tokenizer: Tokenizer, batch: Batch) -> int:
    """UTF-8 bytes of text that the targets of non-zero weight stand for."""
    sizes = tokenizer.token_bytes[np.asarray(batch.targets_BT)]
    return int(sizes[np.asarray(batch.loss_weights_BT) > 0].sum(dtype=np.int64))


class SameData(grain.DatasetIterator[Batch]):
    """Refuses to continue from a position that was saved under other data."""

    def __init__(self, parent: grain.DatasetIterator[Batch], fingerprint: str):
        super().__init__(parent)
        self._fingerprint = fingerprint

    def __next__(self) -> Batch:
        return next(self._parent)

    def get_state(self) -> dict[str, Any]:
        """The parent's position, and what data it is a position in."""
        return {"fingerprint": self._fingerprint, "parent": self._parent.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues there."""
        if state.get("fingerprint") != self._fingerprint:
            raise UserError(
                "the data are not those the checkpoint was written with (documents, tokenizer "
                "or data options differ): restore them, or start a new run "
                "from its weights"
            )
        self._parent.set_state(state["parent"])


def _first_bytes(documents: Documents) -> Iterator[str]:
    size = 0
    for index in range(len(documents)):
        if size > _TOKENIZER_SAMPLE_BYTES:
            return
        text = documents[index]
        size += len(text)
        yield text


def _fingerprint(corpus: Corpus, tokenizer: Tokenizer, config: DataConfig, *shard: int) -> str:
    """What a saved position means: the corpus, its order and its tokens."""
    parts = (
        corpus.fingerprint,
        config.held_out_fraction if not config.held_out_source else None,
        config.add_bos,
        config.fim_rate,
        config.shuffle and config.mix_tokens,
        config.seed,
        config.seq_len,
        config.num_workers,
        shard,
        hashlib.blake2b(tokenizer.to_json().encode(), digest_size=8).hexdigest(),
    )
    return hashlib.blake2b(repr(parts).encode(), digest_size=8).hexdigest()
