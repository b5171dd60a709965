"""Steps that must not be applied: a loss that is not finite, or a spike."""

import math
import statistics
from collections import deque
from collections.abc import Mapping
from typing import Any, SupportsFloat

from deepseek_jax.types import UserError


class LossMonitor:
    """Decides which steps are not to be applied: loss not finite, or far above the recent ones.

    A loss is a spike if it exceeds ``median + max(min_margin, k * 1.4826 * MAD)`` of the last
    ``window`` accepted losses; MAD is the median absolute deviation, and 1.4826 makes it the
    standard deviation of a normal distribution. Median and MAD, unlike mean and deviation, are
    not moved by the outlier that they should detect. Refused losses never enter the window.

    Args:
        window: accepted losses to remember.
        warmup: accepted losses without which nothing is called a spike.
        k: spread, in robust standard deviations, that is still normal.
        min_margin: nats per token above the median that are always normal: late in training
            the spread is so small that harmless batches would exceed k of it.
        max_consecutive: stop at so many refused steps in a row (the loss is not coming back).
        max_total: stop at so many refused steps in the whole run.
    """

    def __init__(
        self,
        *,
        window: int = 128,
        warmup: int = 32,
        k: float | int = 8,
        min_margin: float | int = 1,
        max_consecutive: int = 8,
        max_total: int = 100,
    ):
        if not 1 <= warmup <= window:
            raise UserError(f"loss monitor: warmup {warmup} must be between 1 and window {window}.")
        self._accepted: deque[float] = deque(maxlen=window)
        self._warmup, self._k, self._min_margin = warmup, k, min_margin
        self._max_consecutive, self._max_total = max_consecutive, max_total
        self.consecutive = 0
        self.skipped = 0

    def threshold(self) -> float:
        """The highest loss still accepted, in nats per token; infinite during the warm-up."""
        if len(self._accepted) < self._warmup:
            return math.inf
        median = statistics.median(self._accepted)
        deviation = statistics.median(abs(loss - median) for loss in self._accepted)
        return median + max(self._min_margin, self._k * 1.4826 * deviation)

    def observe(self, step: int, loss: SupportsFloat, *, skipped: bool | None = None) -> bool:
        """Counts one step and says whether it was (or, undecided, is to be) skipped.

        Args:
            step: its number, for the message.
            loss: nats per token.
            skipped: what the device did, which saw an earlier `threshold`; None: decide here.

        Raises:
            UserError: too many steps have been skipped.
        """
        loss = float(loss)
        if skipped is None:
            skipped = not loss <= self.threshold() or not math.isfinite(loss)
        if not skipped:
            self._accepted.append(loss)
            self.consecutive = 0
            return False
        self.skipped += 1
        self.consecutive += 1
        in_a_row = self.consecutive >= self._max_consecutive
        if in_a_row or self.skipped >= self._max_total:
            option = "max_skips" if in_a_row else "max_total_skips"
            raise UserError(
                f"training diverged: step {step} has loss {loss:.4g}, and {self.consecutive} steps "
                f"in a row ({self.skipped} in all) were skipped as spikes or not finite; start "
                "another run from its last checkpoint (--init) with a lower learning rate, or go "
                f"on with --resume and a higher {option}."
            )
        return True

    def state(self) -> dict[str, Any]:
        """What `load` needs to go on exactly as before, as JSON values for the checkpoint."""
        return {
            "accepted": list(self._accepted),
            "consecutive": self.consecutive,
            "skipped": self.skipped,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Continues from the result of `state`."""
        self._accepted.clear()
        self._accepted.extend(state["accepted"])
        self.consecutive, self.skipped = state["consecutive"], state["skipped"]
