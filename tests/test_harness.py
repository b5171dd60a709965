"""Our model in lm-evaluation-harness: its numbers are the model's own."""

from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax import DeepSeekV3, forward, init_params, init_router_bias, sharding
from deepseek_jax.cli.serving import Opened, ServingConfig
from deepseek_jax.config import FLOAT32
from deepseek_jax.data.tokenizer import train_bpe
from deepseek_jax.generate import Sampling
from deepseek_jax.types import UserError
from tests.configs import MICRO

pytest.importorskip("lm_eval")
from deepseek_jax.cli.harness_model import HarnessModel

TEXTS = ["the cat sat on the mat", "a longer text of the same kind, with more words in it"]
CONFIG = MICRO.replace(num_nextn_predict_layers=0, vocab_size=300, max_position_embeddings=64)
TOKENIZER = train_bpe(TEXTS, CONFIG.vocab_size)
OPTIONS = ServingConfig(run=Path("."), slots=3, sampling=Sampling(max_new_tokens=6))


def ready(tmp_path, devices=1):
    model = DeepSeekV3(CONFIG, FLOAT32)
    params = jax.jit(lambda key: init_params(model, key))(jax.random.key(0))
    params = jax.tree.map(lambda x: x * 3, params)  # far from uniform
    mesh = sharding.make_mesh(f"data={devices}", jax.devices()[:devices])
    return Opened(model, params, init_router_bias(CONFIG), TOKENIZER, tmp_path, mesh)


def plain(opened, ids, last):
    """Of the last tokens of a row: log-probability, and whether each is the likeliest."""
    logits = forward(CONFIG, opened.params, opened.router_bias_LE, jnp.asarray([ids[:-1]]))[0]
    logp = np.asarray(jax.nn.log_softmax(logits))[-last:]
    said = np.asarray(ids[-last:])
    return float(logp[np.arange(last), said].sum()), bool((logp.argmax(-1) == said).all())


def ask(*args):
    return SimpleNamespace(args=args)


@pytest.mark.parametrize("devices", [1, 2])
def test_loglikelihoods_are_those_of_the_forward_pass(tmp_path, devices):
    opened = ready(tmp_path, devices)
    with jax.set_mesh(opened.mesh):
        model = HarnessModel(opened, OPTIONS)
        pairs = [
            ("the cat", " sat on"),
            ("", "the mat"),
            ("a longer text", " of the same"),
            ("a", " t"),
        ]
        found = model.loglikelihood([ask(*pair) for pair in pairs])
        # A continuation that greedy decoding makes.
        prompt = model.tok_encode("the cat")
        greedy = model.generate_until([ask("the cat", {"until": [], "max_gen_toks": 3})])
    for (context, said), (logp, is_greedy) in zip(pairs, found, strict=True):
        ids = model.tok_encode(context + said)
        last = len(TOKENIZER.encode(context + said)) - len(TOKENIZER.encode(context))
        expected = plain(
            opened, ids if context else [model.prefix_token_id, *TOKENIZER.encode(said)], last
        )
        assert logp == pytest.approx(expected[0], abs=1e-3)
        assert is_greedy == expected[1]
    for _ in range(3):
        logits = forward(CONFIG, opened.params, opened.router_bias_LE, jnp.asarray([prompt]))
        prompt = [*prompt, int(logits[0, -1].argmax())]
    assert greedy == [TOKENIZER.decode(prompt[-3:])]
    assert plain(opened, prompt, 3)[1]


def test_a_text_longer_than_the_context_is_scored_in_windows(tmp_path):
    opened = ready(tmp_path)
    text = " ".join(TEXTS * 4)
    ids = TOKENIZER.encode(text)
    assert len(ids) > 2 * CONFIG.max_position_embeddings
    with jax.set_mesh(opened.mesh):
        model = HarnessModel(opened, OPTIONS)
        (total,) = model.loglikelihood_rolling([ask(text)])
        short = model.loglikelihood([ask(text, " the")])
    expected, most = 0.0, model.max_length
    whole = [model.prefix_token_id, *ids]
    for start in range(0, len(ids), most):  # the last one reaches back as far as it can
        end = min(start + most, len(ids))
        expected += plain(opened, whole[end - most : end + 1], end - start)[0]
    assert total == pytest.approx(expected, abs=1e-2)
    tail = model.tok_encode(text + " the")[-(most + 1) :]
    assert short[0][0] == pytest.approx(plain(opened, tail, 1)[0], abs=1e-3)


def test_generation_ends_before_the_stop_string(tmp_path):
    opened = ready(tmp_path)
    with jax.set_mesh(opened.mesh):
        model = HarnessModel(opened, OPTIONS)
        (whole,) = model.generate_until([ask("a longer", {"max_gen_toks": 8, "do_sample": False})])
        stop = whole[3:5]
        options = {"until": [stop], "max_gen_toks": 8}
        assert model.generate_until([ask("a longer", options)]) == [whole[: whole.index(stop)]]
        for wrong, said in (
            ({"max_gen_toks": 64}, "wants 64 new tokens"),
            ({"num_beams": 2}, "asks for num_beams"),
        ):
            with pytest.raises(UserError, match=said):
                model.generate_until([ask("a", wrong)])
