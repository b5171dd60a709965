"""A small corpus on disk and a tokenizer, shared by the tests of this directory."""

import random
from pathlib import Path

import pytest

from deepseek_jax.data.tokenizer import Tokenizer, train_bpe

WORDS = "the model reads a document and learns what follows 12 6789 über 中文 ½ 🙂"


def make_texts(count: int, seed: int = 0) -> list[str]:
    """Documents of 1 to 60 words, all different."""
    rng = random.Random(seed)
    texts = (" ".join(rng.choices(WORDS.split(), k=rng.randint(1, 60))) for _ in range(count))
    return [f"{i}: {text}\n" for i, text in enumerate(texts)]


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return make_texts(60)


@pytest.fixture(scope="session")
def tokenizer(texts) -> Tokenizer:
    return train_bpe(texts, 320)


@pytest.fixture(scope="session")
def text_dir(texts, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("corpus")
    for i, text in enumerate(texts):
        (root / f"{i:03}.txt").write_text(text, encoding="utf-8")
    return root
