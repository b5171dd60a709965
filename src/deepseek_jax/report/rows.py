"""Packed rows for the eye: every token, whether it is learnt, and to which segment it belongs."""

from collections.abc import Callable

import numpy as np
from rich.text import Text

from deepseek_jax.types import Batch

# Two shades each, so that one token is told from the next.
_LEARNT = ("black on green3", "black on light_green")
_GIVEN = ("white on grey23", "white on grey35")


def show_rows(batch: Batch, piece: Callable[[int], str]) -> Text:
    """A batch ``[B, T]``, segment by segment: learnt tokens green, given ones grey.

    Without colours the same can be told from the marks: ``[[`` begins what is learnt and ``]]``
    ends it.

    Args:
        batch: Host arrays.
        piece: The text of a token.
    """
    text = Text()
    tokens, targets, weights, segments = (
        np.asarray(x)
        for x in (batch.tokens_BT, batch.targets_BT, batch.loss_weights_BT, batch.segment_ids_BT)
    )
    for row in range(len(tokens)):
        used = int((segments[row] > 0).sum())
        learnt = int((weights[row] > 0).sum())
        text.append(
            f"row {row + 1}: {used} of {tokens.shape[1]} positions used, {learnt} targets learnt\n",
            style="bold",
        )
        for segment in range(1, int(segments[row].max(initial=0)) + 1):
            (places,) = np.nonzero(segments[row] == segment)
            # A token's weight is that of the position before it, whose target it is.
            ids = [int(tokens[row, places[0]]), *map(int, targets[row, places])]
            marks = [0.0, *map(float, weights[row, places])]
            if marks[-1] == 0:  # the last position's target lies beyond the segment
                ids, marks = ids[:-1], marks[:-1]
            text.append(f"segment {segment}: {len(ids)} tokens, {sum(map(bool, marks))} learnt\n")
            _append(text, ids, marks, piece)
            text.append("\n")
    return text


def _append(text: Text, ids: list[int], marks: list[float], piece: Callable[[int], str]) -> None:
    before = 0.0
    for place, (index, mark) in enumerate(zip(ids, marks, strict=True)):
        if bool(mark) != bool(before):
            text.append("[[" if mark else "]]", style="dim")
        shown = piece(index).replace("\n", "\u23ce\n")
        text.append(shown, style=(_LEARNT if mark else _GIVEN)[place % 2])
        before = mark
    if before:
        text.append("]]", style="dim")
