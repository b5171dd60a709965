"""Finding the answer of a completion, and comparing it with a reference by plain rules.

The rules are strict because a policy finds every lenient one: an answer counts only if it is the
only one outside the thinking. What is between ``<think>`` and ``</think>`` never counts, and a
thinking that is opened twice, or never closed, leaves no answer at all.
"""

import re
import unicodedata
from fractions import Fraction

from deepseek_jax.rewards.types import Completion
from deepseek_jax.types import UserError

THINK, END_THINK = "<think>", "</think>"
ANSWER, END_ANSWER = "<answer>", "</answer>"
_BOXED = "\\boxed{"

# The exponent is bounded: 1e999999999 as a fraction would not fit into memory.
_NUMBER = re.compile(
    r"""(?P<sign>[+-]?)
        (?:(?P<grouped>[0-9]{1,3}(?:,[0-9]{3})+)|(?P<plain>[0-9]+))?
        (?P<decimals>\.[0-9]+)?
        (?:[eE](?P<exponent>[+-]?[0-9]{1,3}))?
        (?:/(?P<denominator>[0-9]+))?""",
    re.VERBOSE,
)
_LONGEST_NUMBER = 200
_CHOICE = re.compile(r"\(?([A-Za-z])\)?[.:]?")


# --- extraction -------------------------------------------------------------------------------


def split_thinking(prompt: str, text: str) -> tuple[str, str] | None:
    """The thinking and the rest; None where the tags are malformed.

    A prompt that ends in ``<think>`` has opened the thinking already. Without any tag all is rest.
    """
    if prompt.rstrip().endswith(THINK):
        text = THINK + text
    opened, closed = text.count(THINK), text.count(END_THINK)
    if opened == closed == 0:
        return "", text
    if opened != 1 or closed != 1 or text.index(END_THINK) < text.index(THINK):
        return None
    before, _, rest = text.partition(THINK)
    thinking, _, after = rest.partition(END_THINK)
    return thinking, f"{before}\n{after}"


def boxed(text: str) -> list[str]:
    r"""The contents of every outermost ``\boxed{...}`` with balanced braces, in order."""
    found, at = [], 0
    while (start := text.find(_BOXED, at)) >= 0:
        first = start + len(_BOXED)
        end = _closing_brace(text, first)
        if end < 0:
            return found
        found.append(text[first:end])
        at = end + 1
    return found


def last_boxed(text: str) -> str | None:
    r"""The last ``\boxed{...}``: how worked solutions of data sets mark their reference."""
    found = boxed(text)
    return found[-1] if found else None


def extract_answer(prompt: str, text: str) -> str | None:
    r"""The one answer outside the thinking, or None.

    Either one ``<answer>...</answer>`` (if it holds a ``\boxed{}``, its content) and no box
    outside it, or, without the tag, one ``\boxed{...}``. Several answers are no answer, even if
    they agree.
    """
    parts = split_thinking(prompt, text)
    if parts is None:
        return None
    rest = parts[1]
    if ANSWER in rest or END_ANSWER in rest:
        if rest.count(ANSWER) != 1 or rest.count(END_ANSWER) != 1:
            return None
        before, _, inside_and_after = rest.partition(ANSWER)
        inside, closed, after = inside_and_after.partition(END_ANSWER)
        if not closed or _BOXED in before or _BOXED in after:
            return None
        rest = inside
        if _BOXED not in inside:
            return inside.strip() or None
    boxes = boxed(rest)
    if len(boxes) != 1 or rest.count(_BOXED) != 1:
        return None
    return boxes[0].strip() or None


def balanced(text: str) -> bool:
    """Whether every brace has its other half."""
    return _closing_brace(text + "}", 0) == len(text)


def _closing_brace(text: str, first: int) -> int:
    """Where the brace opened just before ``first`` closes; -1 if nowhere."""
    depth, escaped = 1, False
    for i in range(first, len(text)):
        if escaped:
            escaped = False
        elif text[i] == "\\":
            escaped = True
        elif text[i] == "{":
            depth += 1
        elif text[i] == "}":
            depth -= 1
            if depth == 0:
                return i
    return -1


# --- numbers ----------------------------------------------------------------------------------


def parse_number(text: str) -> Fraction | None:
    """The number that the whole of ``text`` spells, exactly; None if it spells none.

    Integers, decimals, powers of ten (``1.5e3``), fractions of integers (``-3/4``), thousands in
    groups of three (``1,234``). A decimal digit of any script counts as its value (``٤٢`` and
    fullwidth digits are 42), as does the minus sign U+2212; superscripts and other numerals do
    not. No units, no percent, no words.
    """
    text = text.strip()
    if not text or len(text) > _LONGEST_NUMBER:
        return None
    text = "".join(_ascii_digit(c) for c in text).replace("−", "-")
    match = _NUMBER.fullmatch(text)
    if match is None:
        return None
    whole = match["grouped"] or match["plain"]
    if whole is None and match["decimals"] is None:
        return None
    if match["denominator"] is not None:
        if whole is None or match["decimals"] or match["exponent"]:
            return None
        if int(match["denominator"]) == 0:
            return None
        value = Fraction(int(whole.replace(",", "")), int(match["denominator"]))
    else:
        digits = (whole or "0").replace(",", "") + (match["decimals"] or "")
        value = Fraction(digits) * Fraction(10) ** int(match["exponent"] or 0)
    return -value if match["sign"] == "-" else value


def _ascii_digit(character: str) -> str:
    value = unicodedata.decimal(character, None)
    return character if value is None else str(value)


# --- rewards ----------------------------------------------------------------------------------


def exact(prompt: str, completion: Completion, reference: str) -> float:
    """1 if the answer is the reference, but for the amount of white space; else 0."""
    answer = extract_answer(prompt, completion.text)
    return float(answer is not None and answer.split() == reference.split())


def numeric(prompt: str, completion: Completion, reference: str) -> float:
    """1 if the answer is the number that the reference is (``parse_number``); else 0.

    Raises:
        UserError: The reference is not a number.
    """
    expected = parse_number(reference)
    if expected is None:
        raise UserError(f"the reference {reference!r} is not a number; compare it by `exact`.")
    answer = extract_answer(prompt, completion.text)
    return float(answer is not None and parse_number(answer) == expected)


def multiple_choice(prompt: str, completion: Completion, reference: str) -> float:
    """1 if the answer is the reference's letter, as in ``B``, ``(b)`` or ``B.``; else 0.

    Raises:
        UserError: The reference is not a letter.
    """
    expected = _CHOICE.fullmatch(reference.strip())
    if expected is None:
        raise UserError(f"the reference {reference!r} is not the letter of a choice.")
    answer = _CHOICE.fullmatch(extract_answer(prompt, completion.text) or "")
    return float(answer is not None and answer[1].upper() == expected[1].upper())


def think_answer_format(prompt: str, completion: Completion, reference: str) -> float:
    """1 for ``<think>...</think> <answer>...</answer>`` and nothing else, none empty (R1-Zero).

    The opening tag is left out if the prompt ends with it.
    """
    parts = split_thinking(prompt, completion.text)
    if parts is None or not think_format(prompt, completion, reference):
        return 0.0
    thinking, rest = parts[0], parts[1].strip()
    tags = (ANSWER, END_ANSWER)
    if any(rest.count(tag) != 1 or tag in thinking for tag in tags):
        return 0.0
    if not (rest.startswith(ANSWER) and rest.endswith(END_ANSWER)):
        return 0.0
    return float(bool(rest[len(ANSWER) : -len(END_ANSWER)].strip()))


def think_format(prompt: str, completion: Completion, reference: str) -> float:
    """1 for one thinking at the very beginning and something after it (R1's chat format)."""
    parts = split_thinking(prompt, completion.text)
    opened = prompt.rstrip().endswith(THINK) or completion.text.lstrip().startswith(THINK)
    return float(parts is not None and opened and all(part.strip() for part in parts))
