import gzip

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_jax.data.baselines import (
    bigram_bits_per_byte,
    fit_bigram,
    gzip_bits_per_byte,
    measure_baselines,
)
from deepseek_jax.data.pipeline import DataConfig, load_corpus


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 7), min_size=2, max_size=60))
def test_bigram_is_a_distribution(tokens):
    model = fit_bigram(np.array(tokens, np.int32), 8)
    contexts, targets = np.divmod(np.arange(64), 8)
    total = np.exp2(-model.bits(contexts, targets)).reshape(8, 8).sum(axis=1)
    np.testing.assert_allclose(total, 1, rtol=1e-12)


def test_bigram_learns_a_markov_chain():
    """On its own kind of text it comes close to the entropy of the source."""
    rng = np.random.default_rng(0)
    chain = rng.dirichlet(np.full(16, 0.3), size=16)
    tokens = [0]
    for draw in rng.random(60_000):
        tokens.append(min(15, int(np.searchsorted(np.cumsum(chain[tokens[-1]]), draw))))
    train, test = np.array(tokens[:50_000], np.int32), np.array(tokens[50_000:], np.int32)
    true_bits = -np.log2(chain[test[:-1], test[1:]]).mean()
    bits = fit_bigram(train, 16).bits(test[:-1], test[1:]).mean()
    assert true_bits - 0.01 < bits < true_bits + 0.01


def test_baselines_on_a_corpus(text_dir, tokenizer):
    config = DataConfig((str(text_dir),), seq_len=32, held_out_fraction=0.2, mix_tokens=0)
    documents = load_corpus(config).held_out
    data = "".join(documents[i] for i in range(len(documents))).encode()
    result = measure_baselines(config, tokenizer)
    assert result.held_out_bytes == len(data)
    assert result.gzip == 8 * len(gzip.compress(data, 9)) / len(data)
    assert result.gzip == gzip_bits_per_byte(documents)
    assert 0.1 < result.bigram == bigram_bits_per_byte(config, tokenizer) < 8


@pytest.mark.parametrize("seq_len", [8, 100])
def test_bigram_does_not_depend_on_the_rows(text_dir, tokenizer, seq_len):
    results = [
        bigram_bits_per_byte(
            DataConfig(source=(str(text_dir),), seq_len=n, held_out_fraction=0.2), tokenizer
        )
        for n in (seq_len, 32)
    ]
    np.testing.assert_allclose(*results, rtol=1e-12)
