"""What a reward sees and what it is."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, runtime_checkable


class Completion(NamedTuple):
    """What the policy said."""

    text: str
    num_tokens: int
    """Its length as the policy counts it, the end-of-sequence token included."""
    truncated: bool = False
    """It was cut off at the length limit."""


class Sample(NamedTuple):
    """A completion and what it is judged by."""

    prompt: str
    completion: Completion
    reference: str
    """The right answer, or what else the reward compares with (tests of a program)."""
    general: bool = False
    """There is no right answer: what is wanted is what people would prefer."""


# reward(prompt, completion, reference). Parameters of a reward are bound by functools.partial.
Reward = Callable[[str, Completion, str], float]


@runtime_checkable
class BatchReward(Protocol):
    """A reward that is much cheaper for many samples at once: a model's judgement."""

    def score(self, samples: Sequence[Sample]) -> Sequence[float]:
        """The reward of each sample; NaN where the verdict could not be had."""
        ...
