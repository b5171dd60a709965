"""Text in and out of the engine: stop strings, and the end of a sequence."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from jaxtyping import Array, Float

from deepseek_jax.generate.engine import Completion, Engine, EngineConfig, Request, Sampling
from deepseek_jax.model.transformer import DeepSeekV3
from deepseek_jax.types import Params, UserError


@runtime_checkable
class TextTokenizer(Protocol):
    """What generation asks of a tokenizer (``data.tokenizer.Tokenizer`` is one)."""

    bos_id: int | None
    eos_id: int | None

    def encode(self, text: str) -> list[int]:
        """Ids of a text."""
        ...

    def decode(self, ids: list[int]) -> str:
        """The text of ids."""
        ...


def text_request(
    tokenizer: TextTokenizer,
    prompt: str | Sequence[int],
    sampling: Sampling,
    *,
    samples: int = 1,
    stop: Sequence[str] = (),
) -> Request:
    """A request that ends at the end-of-sequence token or where a string of ``stop`` appears.

    A prompt in text gets the begin-of-sequence token; one in ids is taken as it is.
    """
    if isinstance(prompt, str):
        bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        prompt = bos + tokenizer.encode(prompt)
    if "" in stop:
        raise UserError("a stop string is empty; every text contains it.")
    ends = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    stopped = _StopStrings(tokenizer, tuple(stop)) if stop else None
    return Request(prompt, sampling, samples, ends, stopped)


class _StopStrings:
    """How many tokens to keep: up to the first that completes a stop string.

    Strings may begin and end within tokens and span several, so text is what is searched.
    """

    def __init__(self, tokenizer: TextTokenizer, strings: tuple[str, ...]):
        self.tokenizer, self.strings = tokenizer, strings

    def __call__(self, tokens: list[int]) -> int | None:
        def contained(count: int) -> bool:
            text = self.tokenizer.decode(tokens[:count])
            return any(string in text for string in self.strings)

        if not contained(len(tokens)):
            return None
        low, high = 0, len(tokens)  # a prefix of more tokens contains what a shorter one does
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if contained(middle) else (middle, high)
        return high


def completion_text(
    tokenizer: TextTokenizer, completion: Completion, stop: Sequence[str] = ()
) -> str:
    """The text of a completion, without the end-of-sequence token or the stop string."""
    tokens = completion.tokens
    if tokens and tokens[-1] == tokenizer.eos_id:
        tokens = tokens[:-1]
    text = tokenizer.decode(tokens)
    return text[: min((text.index(s) for s in stop if s in text), default=len(text))]


def complete(
    model: DeepSeekV3,
    params: Params,
    router_bias_LE: Float[Array, "L E"],
    tokenizer: TextTokenizer,
    prompts: Sequence[str | Sequence[int]],
    sampling: Sampling,
    *,
    slots: int = 32,
) -> list[str]:
    """What the model says after each prompt, up to the end-of-sequence token."""
    requests = [text_request(tokenizer, prompt, sampling) for prompt in prompts]
    longest = max((len(request.prompt) for request in requests), default=1)
    room = min(longest + sampling.max_new_tokens, model.config.max_position_embeddings)
    rows = max(1, min(slots, len(prompts)))
    chunk = min(256, longest)
    config = EngineConfig(rows, room, lanes=min(rows, 8), prefill_chunk=max(1, chunk))
    done = Engine(model, params, router_bias_LE, config).generate(requests)
    texts = {one.request: completion_text(tokenizer, one) for one in done}
    return [texts[i] for i in range(len(prompts))]
