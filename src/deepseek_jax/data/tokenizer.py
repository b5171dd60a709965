"""Byte-level BPE, trained in DeepSeek's manner or loaded from any ``tokenizer.json``.

V3 section 4.1: byte-level BPE whose pre-tokenizer has tokens that join punctuation and line
breaks. The regular expressions and the names of the special tokens are those of the released
tokenizer, so a tokenizer trained here splits text as DeepSeek's does.
"""

import functools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np
import tokenizers
from jaxtyping import Int32
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from deepseek_jax.types import Array, UserError

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
PAD = "<｜▁pad▁｜>"
FIM_HOLE = "<｜fim▁hole｜>"
FIM_BEGIN = "<｜fim▁begin｜>"
FIM_END = "<｜fim▁end｜>"
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
THINK = "<think>"
END_THINK = "</think>"

SPECIAL_TOKENS = (
    BOS,
    EOS,
    PAD,
    THINK,
    END_THINK,
    FIM_HOLE,
    FIM_BEGIN,
    FIM_END,
    USER,
    ASSISTANT,
)
"""Ids 0, 1, 2, ... of a tokenizer trained here (the first three as in DeepSeek's)."""

_NUMBERS = r"\p{N}{1,3}"
_CJK = "[一-龥぀-ゟ゠-ヿ]+"
_WORDS = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
    r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Names that other families give to the same roles, tried in this order when no
# tokenizer_config.json lies beside the tokenizer.
_BOS_NAMES = (BOS, "<|begin_of_text|>", "<|startoftext|>", "<s>", "[BOS]", "<bos>")
_EOS_NAMES = (EOS, "<|end_of_text|>", "<|endoftext|>", "</s>", "[EOS]", "<eos>")
_PAD_NAMES = (PAD, "<pad>", "[PAD]", "<|pad|>")


class Tokenizer:
    """Text <-> token ids; decoding undoes encoding if byte-level and without a normaliser.

    Ids are ``None`` where the vocabulary lacks the token.

    Attributes:
        bos_id: Begin of sentence.
        eos_id: End of sentence.
        pad_id: Padding.
        bos_token: Name of the token that begins a sentence.
        eos_token: Name of the token that ends one.
        special_tokens: Names of all special tokens.
        fim_begin_id: Fill-in-Middle: the prefix follows.
        fim_hole_id: Fill-in-Middle: the suffix follows.
        fim_end_id: Fill-in-Middle: the middle follows.
        vocab_size: One more than the largest id, special tokens included.
    """

    def __init__(self, backend: tokenizers.Tokenizer, names: dict[str, str] | None = None):
        names = names or {}
        # In plain text the characters "<｜end▁of▁sentence｜>" are characters, not the token:
        # a document must not be able to end itself.
        backend.encode_special_tokens = True
        # A tokenizer.json may ask for either; both would falsify documents.
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        # Not the number of tokens: some vocabularies have gaps.
        self.vocab_size: int = 1 + max(backend.get_vocab(with_added_tokens=True).values())
        self.bos_id = self._first_id(names.get("bos_token"), _BOS_NAMES)
        self.eos_id = self._first_id(names.get("eos_token"), _EOS_NAMES)
        self.pad_id = self._first_id(names.get("pad_token"), _PAD_NAMES)
        self.bos_token, self.eos_token = map(self._name, (self.bos_id, self.eos_id))
        self.special_tokens = tuple(
            sorted(
                token.content
                for token in backend.get_added_tokens_decoder().values()
                if token.special
            )
        )
        self.fim_begin_id = backend.token_to_id(FIM_BEGIN)
        self.fim_hole_id = backend.token_to_id(FIM_HOLE)
        self.fim_end_id = backend.token_to_id(FIM_END)

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Reads a Hugging Face ``tokenizer.json`` (or the directory that holds it).

        A ``tokenizer_config.json`` beside it says which tokens begin, end and pad; without
        one, the usual names are tried.

        Raises:
            UserError: The file is missing, unreadable or not a tokenizer.
        """
        path = Path(path)
        if path.is_dir():
            path = path / "tokenizer.json"
        if not path.is_file():
            raise UserError(
                f"no tokenizer at {path}: give the path of a Hugging Face tokenizer.json, or of "
                "the folder that holds it"
            )
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise UserError(
                f"cannot read the tokenizer {path} ({error}): it must be a Hugging Face "
                "tokenizer.json"
            ) from error
        return cls(backend, _special_names(path.with_name("tokenizer_config.json")))

    @classmethod
    def from_json(cls, text: str) -> "Tokenizer":
        """The inverse of ``to_json``, for a tokenizer made by ``train_bpe``."""
        return cls(tokenizers.Tokenizer.from_str(text))

    def save(self, path: str | Path) -> None:
        """Writes ``tokenizer.json``, which Hugging Face libraries load as it is."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        self._backend.save(str(path))

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Token ids of ``text``, without begin or end of sentence.

        Args:
            text: Any text without lone surrogates.
            allow_special: Read the names of special tokens in the text as those tokens. For
                chat templates only; never for documents.

        Raises:
            UserError: Lone surrogates, which Python makes of bytes that are not UTF-8.
        """
        backend = self._reading_specials if allow_special else self._backend
        try:
            return backend.encode(text, add_special_tokens=False).ids
        except TypeError:
            raise UserError(
                f"a text is not Unicode (half a surrogate pair, or bytes that are not UTF-8): "
                f"{text[:60]!r}; mend it"
            ) from None

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """``encode`` of many texts, on all CPU cores."""
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[SupportsIndex] | Array, *, skip_special: bool = False) -> str:
        """Text of ``ids``; bytes that are not UTF-8 become U+FFFD.

        Args:
            ids: Token ids.
            skip_special: Leave special tokens out instead of printing their names.
        """
        return self._backend.decode(
            np.asarray(ids, np.int64).tolist(), skip_special_tokens=skip_special
        )

    def token_id(self, token: str) -> int | None:
        """Id of a token by its name, such as ``"<｜User｜>"``, or None."""
        return self._backend.token_to_id(token)

    def to_json(self) -> str:
        """The content of ``tokenizer.json``."""
        return self._backend.to_str()

    @functools.cached_property
    def token_bytes(self) -> Int32[np.ndarray, "V"]:
        """UTF-8 bytes of text that each id stands for; 0 for special tokens.

        Summed over the targets of a text it gives the text's length in bytes, the
        denominator of bits per byte. Exact for byte-level BPE; for other tokenizers a
        leading-space marker counts as one byte.
        """
        specials = self._backend.get_added_tokens_decoder()
        sizes = np.zeros(self.vocab_size, np.int32)
        byte_alphabet = set(pre_tokenizers.ByteLevel.alphabet())
        for token, index in self._backend.get_vocab(with_added_tokens=True).items():
            if index in specials:
                sizes[index] = 0 if specials[index].special else len(token.encode())
            else:
                sizes[index] = _text_bytes(token, byte_alphabet)
        return sizes

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._backend.encode_special_tokens = True  # lost by the backend's own pickling

    @functools.cached_property
    def _reading_specials(self) -> tokenizers.Tokenizer:
        # A second copy rather than a toggled flag: encode stays safe to call from threads.
        copy = tokenizers.Tokenizer.from_str(self._backend.to_str())
        copy.encode_special_tokens = False
        return copy

    def _name(self, index: int | None) -> str | None:
        return None if index is None else self._backend.id_to_token(index)

    def _first_id(self, given: str | None, usual: Sequence[str]) -> int | None:
        names = (given, *usual) if given else usual
        ids = (self._backend.token_to_id(name) for name in names)
        return next((i for i in ids if i is not None), None)


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains byte-level BPE as DeepSeek's: no normaliser, its pre-split, its special tokens.

    Ids: the special tokens first (``SPECIAL_TOKENS``), then the 256 bytes, then the merges in
    the order learnt. The same texts give the same tokenizer, whatever their order of arrival
    or the number of cores.

    Args:
        texts: The corpus; read once.
        vocab_size: Ids wanted in all. A small corpus may yield fewer: ask the result.

    Raises:
        UserError: ``vocab_size`` leaves no room for the bytes and the special tokens.
    """
    smallest = 256 + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise UserError(
            f"a vocabulary of {vocab_size} is too small: bytes and special tokens alone take "
            f"{smallest}"
        )
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_NUMBERS), "isolated"),
            pre_tokenizers.Split(Regex(_CJK), "isolated"),
            pre_tokenizers.Split(Regex(_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(backend)


def _special_names(path: Path) -> dict[str, str]:
    """Names of the begin, end and pad tokens from ``tokenizer_config.json``, where there."""
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"cannot read {path} ({error}): repair or remove it") from error
    names = {}
    for role in ("bos_token", "eos_token", "pad_token"):
        value = config.get(role)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            names[role] = value
    return names


def _text_bytes(token: str, byte_alphabet: set[str]) -> int:
    if byte_alphabet.issuperset(token):
        return len(token)  # byte-level: one character of this alphabet per byte
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return 1  # byte fallback of SentencePiece
    return len(token.replace("▁", " ").encode())
