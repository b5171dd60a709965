"""Strict rewards for generated puzzles; what an answer says is read, never run."""

import ast
import json
import re
from fractions import Fraction

from deepseek_jax.rewards.answers import exact, extract_answer, numeric, parse_number
from deepseek_jax.rewards.types import Completion, Reward
from deepseek_jax.types import UserError

_ITEM = re.compile(r"""\s*(['"]?)([^'",\[\]]+?)\1\s*""")
_EXPRESSION = re.compile(r"[0-9+\-*/() ]{1,200}")


def reward_for(source: str) -> Reward:
    """The strict reward for a source of tasks (``data.tasks.open_tasks``).

    Numbers are compared as numbers and lists item by item; any other answer exactly.
    """
    name = source.split(",")[0]
    if name.startswith("add:") or name in _NUMERIC:
        return numeric
    return {
        "rg:number_sorting": number_list,
        "rg:word_sorting": word_list,
        "rg:countdown": countdown,
    }.get(name, exact)


_NUMERIC = {
    f"rg:{name}"
    for name in (
        "basic_arithmetic",
        "chain_sum",
        "gcd",
        "lcm",
        "leg_counting",
        "letter_counting",
        "products",
    )
}


def number_list(prompt: str, completion: Completion, reference: str) -> float:
    """1 if the answer lists the reference's numbers in its order, as ``[1, 2]`` or ``1, 2``.

    Raises:
        UserError: The reference is not such a list.
    """
    expected = _numbers(reference)
    if expected is None:
        raise UserError(f"the reference {reference[:100]!r} is not a list of numbers.")
    answer = extract_answer(prompt, completion.text)
    return float(answer is not None and _numbers(answer) == expected)


def word_list(prompt: str, completion: Completion, reference: str) -> float:
    """1 if the answer lists the reference's words in its order, divided by commas; else 0.

    Raises:
        UserError: The reference is not such a list.
    """
    expected = _items(reference)
    if expected is None:
        raise UserError(f"the reference {reference[:100]!r} is not a list of words.")
    answer = extract_answer(prompt, completion.text)
    return float(answer is not None and _items(answer) == expected)


def countdown(prompt: str, completion: Completion, reference: str) -> float:
    """1 if the answer combines all given numbers, each once, by + - * / into the target; else 0.

    Args:
        prompt: the question.
        completion: whose answer is an expression, without ``=``.
        reference: as JSON, ``{"numbers": [6, 61], "target": 67}``.

    Raises:
        UserError: The reference is not that.
    """
    try:
        puzzle = json.loads(reference)
        numbers, target = sorted(map(int, puzzle["numbers"])), Fraction(puzzle["target"])
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f'the reference {reference[:100]!r} is not {{"numbers": [...], "target": ...}}.'
        ) from error
    answer = extract_answer(prompt, completion.text)
    if answer is None or not _EXPRESSION.fullmatch(answer):
        return 0.0
    used: list[int] = []
    try:
        value = _value(ast.parse(answer.strip(), mode="eval").body, used)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return 0.0
    return float(value == target and sorted(used) == numbers)


def _value(node: ast.expr, used: list[int]) -> Fraction:
    """Of an expression of whole numbers, which are added to ``used``.

    Raises:
        ValueError: It holds anything else.
    """
    if isinstance(node, ast.Constant) and type(node.value) is int:
        used.append(node.value)
        return Fraction(node.value)
    if isinstance(node, ast.BinOp):
        left, right = _value(node.left, used), _value(node.right, used)
        if isinstance(node.op, ast.Add):
            return left + right
        if isinstance(node.op, ast.Sub):
            return left - right
        if isinstance(node.op, ast.Mult):
            return left * right
        if isinstance(node.op, ast.Div):
            return left / right
    raise ValueError(ast.dump(node))


def _items(text: str) -> list[str] | None:
    """The items of ``[a, 'b']`` or ``a, b``; None if it is no flat list."""
    text = text.strip()
    if text.startswith("[") != text.endswith("]"):
        return None
    matches = [
        _ITEM.fullmatch(item) for item in text.removeprefix("[").removesuffix("]").split(",")
    ]
    items = [match[2] for match in matches if match is not None]
    return items if len(items) == len(matches) else None


def _numbers(text: str) -> list[Fraction] | None:
    values = [parse_number(item) for item in _items(text) or []]
    numbers = [value for value in values if value is not None]
    return numbers if values and len(numbers) == len(values) else None
