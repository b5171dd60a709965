"""Runs beside a program in the sandbox and says what expressions are there. Standard library alone.

What they ought to be is not known here.
"""

import json
import os
from typing import Any


def encode(value: Any) -> Any:
    """A value of Python's literals as JSON, the kinds of containers kept apart.

    Raises:
        TypeError: It is none of them.
    """
    kind = type(value)
    if value is None or kind in (bool, int, float, str):
        return value
    if kind is bytes:
        return {"bytes": value.hex()}
    if kind in (list, tuple):
        return {kind.__name__: [encode(x) for x in value]}
    if kind in (set, frozenset):
        return {"set": sorted((encode(x) for x in value), key=json.dumps)}
    if kind is dict:
        pairs = ([encode(k), encode(v)] for k, v in value.items())
        return {"dict": sorted(pairs, key=json.dumps)}
    raise TypeError(kind.__name__)


def main() -> None:
    """Write the values of all expressions, in the namespace of the program, as one JSON list."""
    with open("expressions.json", encoding="utf-8") as file:
        expressions = json.load(file)
    answers = os.dup(1)  # what the program prints goes nowhere
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    space: dict[str, Any] = {"__name__": "solution"}
    with open("solution.py", encoding="utf-8") as file:
        exec(compile(file.read(), "solution.py", "exec"), space)
    results = []
    for expression in expressions:
        try:
            results.append(encode(eval(expression, space)))
        except Exception as error:
            results.append({"raised": type(error).__name__})
    text = json.dumps(results).encode()
    while text:
        text = text[os.write(answers, text) :]


if __name__ == "__main__":
    main()
