"""Sampling from a model over its latent cache: one prefill, then one token at a time."""

import functools
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from deepseek_jax.model.transformer import DeepSeekV3, decode_step, init_cache
from deepseek_jax.types import Params, UserError


@functools.partial(jax.jit, static_argnames=("model", "max_new_tokens", "temperature", "top_p"))
def _generate(
    model: DeepSeekV3,
    params: Params,
    router_bias_LE: jax.Array,
    prompts_BT: jax.Array,
    key: jax.Array,
    *,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
) -> jax.Array:
    B, T = prompts_BT.shape
    cache = init_cache(model.config, B, T + max_new_tokens, model.precision.compute_dtype)
    decode = functools.partial(decode_step, model, params, router_bias_LE)
    logits, cache = decode(prompts_BT, cache)

    def next_token(carry, key):
        logits_BV, cache = carry
        token_B = sample(logits_BV, key, temperature=temperature, top_p=top_p)
        logits, cache = decode(token_B[:, None], cache)
        return (logits[:, -1], cache), token_B

    keys = jax.random.split(key, max_new_tokens)
    _, tokens_TB = jax.lax.scan(next_token, (logits[:, -1], cache), keys)
    return tokens_TB.T


def generate(
    model: DeepSeekV3,
    params: Params,
    router_bias_LE: Float[Array, "L E"],
    prompts_BT: Int[Array, "B T"],
    key: PRNGKeyArray,
    *,
    max_new_tokens: int,
    temperature: float | int = 0.6,
    top_p: float | int = 0.95,
) -> Int[Array, "B N"]:
    """Continue prompts of one length by ``max_new_tokens`` tokens each.

    The defaults are R1's. Temperature 0 takes the likeliest token. Tokens after an
    end-of-sequence are for the caller to cut.

    Raises:
        UserError: for an empty prompt, an id outside the vocabulary, or a sequence longer than
            the model's ``max_position_embeddings``.
    """
    config = model.config
    B, T = prompts_BT.shape
    if B == 0 or T == 0:
        raise UserError("the prompt is empty; give at least one token (for instance BOS).")
    if not 0 <= int(prompts_BT.min()) <= int(prompts_BT.max()) < config.vocab_size:
        raise UserError(f"a prompt has an id outside the vocabulary of {config.vocab_size}.")
    if T + max_new_tokens > config.max_position_embeddings:
        raise UserError(
            f"{T} prompt tokens and {max_new_tokens} new ones exceed the model's "
            f"max_position_embeddings={config.max_position_embeddings}."
        )
    return _generate(
        model,
        params,
        router_bias_LE,
        prompts_BT,
        key,
        max_new_tokens=max_new_tokens,
        temperature=float(temperature),
        top_p=float(top_p),
    )


@runtime_checkable
class TextTokenizer(Protocol):
    """What ``continue_text`` asks of a tokenizer (``data.tokenizer.Tokenizer`` is one)."""

    bos_id: int | None
    eos_id: int | None

    def encode(self, text: str) -> list[int]:
        """Ids of a text."""
        ...

    def decode(self, ids: list[int]) -> str:
        """The text of ids."""
        ...


def continue_text(
    model: DeepSeekV3,
    params: Params,
    router_bias_LE: Float[Array, "L E"],
    tokenizer: TextTokenizer,
    prompt: str,
    *,
    seed: int = 0,
    max_new_tokens: int = 200,
    temperature: float | int = 0.6,
    top_p: float | int = 0.95,
) -> str:
    """What the model says after ``prompt``, up to the end-of-sequence token. See ``generate``."""
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    ids_1N = generate(
        model,
        params,
        router_bias_LE,
        jnp.asarray([bos + tokenizer.encode(prompt)], jnp.int32),
        jax.random.key(seed),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
    )
    ids = np.asarray(ids_1N[0]).tolist()
    if tokenizer.eos_id in ids:
        ids = ids[: ids.index(tokenizer.eos_id)]
    return tokenizer.decode(ids)


def sample(
    logits_BV: Float[Array, "B V"],
    key: PRNGKeyArray,
    *,
    temperature: float | int,
    top_p: float | int,
) -> Int[Array, "B"]:
    """One token per row from softmax(logits / temperature), cut to its nucleus.

    The nucleus is the smallest set of likeliest tokens whose probability reaches ``top_p``
    (Holtzman et al., 2020).
    """
    if temperature == 0:
        return jnp.argmax(logits_BV, axis=-1)
    logits_BV = logits_BV.astype(jnp.float32) / temperature
    if top_p < 1:
        sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
        probs_BV = jax.nn.softmax(sorted_BV, axis=-1)
        before_BV = jnp.cumsum(probs_BV, axis=-1) - probs_BV
        kept_B = jnp.maximum((before_BV < top_p).sum(-1), 1)
        least_B1 = jnp.take_along_axis(sorted_BV, kept_B[:, None] - 1, axis=-1)
        logits_BV = jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)
    return jax.random.categorical(key, logits_BV)
