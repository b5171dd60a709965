"""The data of supervised fine-tuning: from ``ConversationConfig`` to batches of packed samples.

V3 section 5.1: several samples share a row and are invisible to one another. A sample is never
cut in two.
"""

import hashlib
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import grain
import numpy as np
from jaxtyping import Int64

from deepseek_jax.data.chat import ChatTemplate, TrainOn
from deepseek_jax.data.conversations import Conversation, Conversations
from deepseek_jax.data.packing import (
    PACKED_TOGETHER,
    PackSamples,
    Row,
    Sample,
    fill_row,
    pack_samples,
    padding_row,
    rows_to_batch,
)
from deepseek_jax.data.pipeline import NO_THREADS, EvalBatch, SameData, target_bytes
from deepseek_jax.data.shuffle import shuffled
from deepseek_jax.data.sources import Concatenated, Selected, list_files
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.types import Batch, UserError

ROW = 4096  # tokens, where nothing else is said
_CACHED_TOKENS = 64_000_000  # 512 MB of ids and weights kept per process


@dataclass(frozen=True)
class ConversationConfig:
    """What to learn from, and how it becomes rows of tokens.

    Attributes:
        data: Files, directories, globs of conversations, .jsonl or .parquet.
        weights: Of each entry of ``data``, its share of the conversations seen; none: every
            conversation once an epoch.
        held_out: Conversations to evaluate on instead of a share of the data.
        held_out_fraction: Share of the data kept for evaluation, chosen by the prompt's content.
        seq_len: Tokens in a row (T); default: 4096, or the model's context if that is shorter.
        train_on: The assistant's turns to learn: all, or the last of a conversation.
        too_long: A conversation longer than a row, or cut off in generation, is an error, is left
            out, or is cut off.
        shuffle: Visit the conversations in a new random order each epoch.
        data_seed: Of the order, not of the split.
        streams: Parts of the data that as many processes can read; 0: as many as start the run.
    """

    data: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    held_out: tuple[str, ...] = ()
    held_out_fraction: float = 0.02
    seq_len: int | None = None
    train_on: TrainOn = "all"
    too_long: Literal["error", "drop", "cut"] = "error"
    shuffle: bool = True
    data_seed: int = 0
    streams: int = 0

    def __post_init__(self):
        if self.seq_len is not None and self.seq_len < 1:
            raise UserError(f"seq_len must be at least 1, not {self.seq_len}.")
        if not 0 < self.held_out_fraction < 1:
            raise UserError(
                "held_out_fraction is a share between 0 and 1, both excluded, not "
                f"{self.held_out_fraction}."
            )
        if self.weights and (len(self.weights) != len(self.data) or min(self.weights) <= 0):
            raise UserError(
                f"{len(self.data)} entries of data have the weights {list(self.weights)}: give "
                "one above 0 to each, or none."
            )

    @property
    def row_tokens(self) -> int:
        """T, whoever has said it."""
        return self.seq_len or ROW


class Survey(NamedTuple):
    """What one pass over the conversations to learn from has found."""

    conversations: int
    samples: int
    tokens: int
    trained: int
    """Tokens to learn."""
    dropped: int
    """Conversations left out because they are too long."""
    cut: int
    """Conversations without their end."""
    rows: int
    """Rows of an epoch."""

    def __str__(self) -> str:
        policy = f"; {self.dropped:,} too long, left out" if self.dropped else ""
        policy += f"; {self.cut:,} too long, cut off" if self.cut else ""
        return (
            f"{self.conversations:,} conversations in {self.rows:,} rows: {self.tokens:,} tokens, "
            f"{self.trained:,} of them to learn{policy}"
        )


class SftData:
    """Conversations opened, split and made into samples; nothing but their numbers stays.

    A conversation is held out when the hash of its *prompt* (every turn but the assistant's)
    falls below ``held_out_fraction``: two answers to one question are on one side. The split reads
    everything once; with ``held_out`` nothing is read before it is needed.

    Args:
        config: What to read.
        tokenizer: For the figures in bytes, and the identity of a position.
        template: Turns conversations into tokens.

    Raises:
        UserError: unreadable files, records that are no conversations, an empty side of the split.
    """

    def __init__(self, config: ConversationConfig, tokenizer: Tokenizer, template: ChatTemplate):
        self._config, self._tokenizer, self._template = config, tokenizer, template
        if not config.data:
            raise UserError("there is nothing to learn from: name files with --data.")
        self._sources = [self._open([entry]) for entry in config.data]
        if config.held_out:
            self._held_out = [self._open(config.held_out)]
        else:
            self._held_out = [side.split(config.held_out_fraction) for side in self._sources]
        for sides, name in ((self._sources, "to learn from"), (self._held_out, "held out")):
            if not sum(map(len, sides)):
                raise UserError(
                    f"no conversation is {name}: use more, another held_out_fraction, or held_out."
                )
        for entry, side in zip(config.data, self._sources, strict=True):
            if not len(side):
                raise UserError(f"{entry} holds no conversation to learn from: leave it out.")

    def _open(self, entries: Sequence[str]) -> "_Side":
        return _Side(Conversations(list_files(entries)), self._template, self._config)

    def survey(self) -> Survey:
        """Make samples of every conversation once, which also finds the bad ones.

        Raises:
            UserError: naming the line of a conversation that cannot be learnt from.
        """
        window: list[int] = []
        count = made = tokens = rows = trained = dropped = cut = 0
        total = sum(map(len, self._sources))
        for side in self._sources:
            for index in range(len(side)):
                samples, too_long = side.encode(index)
                window += [len(sample.ids) for sample in samples]
                trained += sum(int(sample.weights.sum()) for sample in samples)
                dropped += too_long and not samples
                cut += too_long and bool(samples)
                count += 1
                if count % PACKED_TOGETHER == 0 or count == total:
                    made, tokens = made + len(window), tokens + sum(window)
                    rows += len(pack_samples(window, self._config.row_tokens + 1))
                    window = []
        if not trained:
            raise UserError("the data hold no token to learn: all conversations are left out.")
        return Survey(count, made, tokens, trained, dropped, cut, rows)

    def train_batches(
        self, batch_size: int, *, stream: int = 0, streams: int = 1
    ) -> grain.DatasetIterator[Batch]:
        """Endless batches of numpy arrays [batch_size, seq_len], as ``pipeline.train_batches``."""
        config, parts = self._config, []
        for side in self._sources:
            if len(side) < streams:
                raise UserError(
                    f"{len(side)} conversations cannot feed {streams} processes: use more of them "
                    "or fewer processes."
                )
            parts.append(grain.MapDataset.range(len(side)).map(side))
        # Neighbouring seeds would share their epochs: grain shuffles epoch e with seed + e.
        seeds = np.random.SeedSequence(config.data_seed).generate_state(len(parts)).tolist()
        texts = [side.texts() for side in self._sources]
        if config.weights:
            if config.shuffle:
                parts = list(map(shuffled, parts, texts, seeds))
            parts = [part[stream::streams].repeat() for part in parts]
            samples = grain.MapDataset.mix(parts, weights=config.weights)
        else:
            samples = grain.MapDataset.concatenate(parts)
            if config.shuffle:
                samples = shuffled(samples, Concatenated(texts), seeds[0])
            samples = samples[stream::streams].repeat()
        epoch = len(range(stream, sum(map(len, self._sources)), streams))
        rows = PackSamples(samples.to_iter_dataset(NO_THREADS), self._config.row_tokens, epoch)
        batches = rows.batch(batch_size, batch_fn=_to_batch)
        return SameData(iter(batches), self._fingerprint(stream, streams))

    def eval_batches(self, batch_size: int) -> Iterator[EvalBatch]:
        """One pass over the conversations held out; missing rows are padding of weight 0."""
        each = (side(index) for side in self._held_out for index in range(len(side)))
        groups = iter(lambda: list(itertools.islice(each, PACKED_TOGETHER)), [])
        rows = (row for group in groups for row in self._pack(group))
        while group := list(itertools.islice(rows, batch_size)):
            padded = group + [padding_row(self._config.row_tokens)] * (batch_size - len(group))
            batch = _to_batch(padded)
            yield EvalBatch(batch, target_bytes(self._tokenizer, batch))

    def prompts(self, count: int) -> list[Conversation]:
        """The first conversations held out, up to their last answer."""
        found = []
        for side in self._held_out:
            for index in range(min(count - len(found), len(side))):
                turns = side.conversation(index)
                last = max(i for i, turn in enumerate(turns) if turn.role == "assistant")
                found.append(turns[:last])
        return found

    def _pack(self, lists: Sequence[list[Sample]]) -> Iterator[Row]:
        samples = [sample for each in lists for sample in each]
        packed = pack_samples([len(s.ids) for s in samples], self._config.row_tokens + 1)
        return (fill_row([samples[i] for i in row], self._config.row_tokens) for row in packed)

    def _fingerprint(self, *shard: int) -> str:
        """What a saved position means: the conversations, their order and their tokens."""
        config = self._config
        parts = (
            [side.identity() for side in self._sources],
            config.weights,
            self._config.row_tokens,
            config.train_on,
            config.too_long,
            config.shuffle and config.data_seed,
            shard,
            self._template.source,
            self._tokenizer.to_json(),
        )
        return hashlib.blake2b(repr(parts).encode(), digest_size=8).hexdigest()


class _Side:
    """Those of some conversations that are to be learnt from, or those held out, as samples.

    The samples of a small data set stay in memory: it is tokenised once.
    """

    def __init__(
        self,
        conversations: Conversations,
        template: ChatTemplate,
        config: ConversationConfig,
        indices: Int64[np.ndarray, "n"] | None = None,
    ):
        self._conversations, self._template, self._config = conversations, template, config
        self._indices = np.arange(len(conversations)) if indices is None else indices
        self._cache: dict[int, tuple[list[Sample], bool]] = {}
        self._cached_tokens = 0

    def __len__(self) -> int:
        return len(self._indices)

    def __call__(self, index: int) -> list[Sample]:
        return self.encode(index)[0]

    def encode(self, index: int) -> tuple[list[Sample], bool]:
        """The samples, and whether any was longer than a row."""
        found = self._cache.get(index)
        if found is None:
            found = self._encode(index)
            tokens = sum(len(sample.ids) for sample in found[0])
            if self._cached_tokens + tokens <= _CACHED_TOKENS:
                self._cache[index] = found
                self._cached_tokens += tokens
        return found

    def conversation(self, index: int) -> Conversation:
        return self._conversations[int(self._indices[index])]

    def texts(self) -> Any:
        """What lies where on disk, for an order that reads neighbours together."""
        parts: Any = self._conversations.parts
        return Selected(Concatenated(parts), self._indices)

    def identity(self) -> tuple[int, str]:
        """Which conversations these are."""
        digest = hashlib.blake2b(self._indices.tobytes(), digest_size=8)
        return len(self._conversations), digest.hexdigest()

    def split(self, fraction: float) -> "_Side":
        """Takes a share out, by the hash of the prompts; reads everything."""
        limit = fraction * 2.0**64
        held = [_prompt_hash(self.conversation(i)) < limit for i in range(len(self))]
        mask = np.array(held, bool)
        out = _Side(self._conversations, self._template, self._config, self._indices[mask])
        self._indices = self._indices[~mask]
        return out

    def _place(self, index: int) -> str:
        return self._conversations.place(int(self._indices[index]))

    def _encode(self, index: int) -> tuple[list[Sample], bool]:
        config, size = self._config, self._config.row_tokens + 1
        conversation = self.conversation(index)
        try:
            samples = self._template.samples(conversation, config.train_on)
        except UserError as error:
            raise UserError(f"{self._place(index)}: {error}") from error
        longest, finished = max(len(sample.ids) for sample in samples), conversation[-1].finished
        too_long = longest > size or not finished
        if too_long:
            if config.too_long == "error":
                why = (
                    f"the conversation is {longest:,} tokens long and a row has {size:,}: raise "
                    "seq_len, or say"
                    if finished
                    else "the completion was cut off when it was generated: leave it out, or say"
                )
                raise UserError(
                    f"{self._place(index)}: {why} what to do by --too-long drop or cut."
                )
            if config.too_long == "drop":
                return [], True
            if not finished:  # what was said is learnt, but not to stop there
                ids, weights = samples[-1]
                samples[-1] = Sample(ids[:-1], weights[:-1])
            samples = [Sample(s.ids[:size], s.weights[:size]) for s in samples]
        # Of a sample cut off within its question nothing is left to learn.
        kept = [sample for sample in samples if sample.weights[1:].any()]
        if not kept and not too_long:
            raise UserError(f"{self._place(index)}: no token of the conversation is to be learnt.")
        return kept, too_long


def _to_batch(rows: Sequence[Row]) -> Batch:
    return rows_to_batch(rows, mask_documents=True)


def _prompt_hash(conversation: Conversation) -> int:
    said = repr([turn[:2] for turn in conversation if turn.role != "assistant"])
    return int.from_bytes(hashlib.blake2b(said.encode(), digest_size=8).digest(), "little")


def epoch_steps(rows: int, epochs: float, batch_size: int) -> int:
    """Optimizer steps of so many epochs, rounded up."""
    return max(1, math.ceil(rows * epochs / batch_size))
