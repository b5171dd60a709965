"""Rewards by length, in tokens: characters would pay for rare words and foreign scripts."""

from deepseek_jax.rewards.types import Completion
from deepseek_jax.types import UserError


def soft_overlong(
    prompt: str, completion: Completion, reference: str, *, max_tokens: int, buffer: int
) -> float:
    """DAPO's soft overlong punishment (Yu et al. 2025, Eq. 13), from 0 down to -1.

    0 up to ``max_tokens - buffer`` tokens, then falling linearly to -1 at ``max_tokens``, and -1
    beyond. A completion that fills ``max_tokens`` by being cut off is at -1.

    Raises:
        UserError: The buffer is not within the limit.
    """
    if not 0 < buffer <= max_tokens:
        raise UserError(f"buffer={buffer} must lie between 1 and max_tokens={max_tokens}.")
    over = completion.num_tokens - (max_tokens - buffer)
    return -min(max(over / buffer, 0.0), 1.0)


def brevity(prompt: str, completion: Completion, reference: str, *, max_tokens: int) -> float:
    """From 1 for nothing down to 0 at ``max_tokens``; worth having beside another reward alone.

    Raises:
        UserError: The limit is not positive.
    """
    if max_tokens < 1:
        raise UserError(f"max_tokens={max_tokens} must be at least 1.")
    return 1.0 - min(completion.num_tokens / max_tokens, 1.0)
