"""Reward for programs that pass tests.

The expected results never enter the sandbox: the program sees inputs alone, and what it answers
is compared here. So it cannot forge a verdict by printing one, ending early with status 0,
patching ``assert`` or reading the tests; it must answer right.
"""

import ast
import functools
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from deepseek_jax.rewards import code_harness
from deepseek_jax.rewards.answers import extract_answer, split_thinking
from deepseek_jax.rewards.sandbox import Run, Sandbox
from deepseek_jax.rewards.types import Completion
from deepseek_jax.types import UserError

_FENCE = re.compile(r"^```[ \t]*(?:python|py|python3)?[ \t]*\n(.*?)^```[ \t]*$", re.S | re.M)

_HARNESS = Path(code_harness.__file__).read_text(encoding="utf-8")


class InputOutput(NamedTuple):
    """The program reads one, and must write the other."""

    stdin: str
    stdout: str


class Call(NamedTuple):
    """An expression, and the value it must have."""

    expression: str
    expected: Any
    """As ``code_harness.encode`` writes it."""


class CodeReward:
    """1 if the completion's program passes every test of the reference; else 0.

    The program is the one fenced block outside the thinking (in ``<answer>``, if there is one);
    several are none. The reference is JSON, either ``{"tests": [{"stdin": "1 2", "stdout":
    "3"}]}``, compared but for white space at the ends of lines and of the text, or ``{"asserts":
    ["assert add(1, 2) == 3"]}``, comparing an expression with a literal.

    Args:
        sandbox: where programs run; it bounds each run.
        longest: characters of a program, beyond which it is not run.
    """

    def __init__(self, sandbox: Sandbox, *, longest: int = 100_000):
        self._sandbox = sandbox
        self._longest = longest
        self.deadline_s = sandbox.limits.wall_s  # of one test

    def __call__(self, prompt: str, completion: Completion, reference: str) -> float:
        """The reward.

        Raises:
            UserError: The reference holds no tests that can be read.
        """
        tests = read_tests(reference)
        program = extract_program(prompt, completion.text)
        if program is None or len(program) > self._longest:
            return 0.0
        calls = [test for test in tests if isinstance(test, Call)]
        if calls and not self._calls_pass(program, calls):
            return 0.0
        return float(
            all(
                self._answers(program, test) for test in tests if isinstance(test, InputOutput)
            )  # stops at the first failure
        )

    def _answers(self, program: str, test: InputOutput) -> bool:
        run = self._sandbox.run({"solution.py": program}, test.stdin)
        return run.status == 0 and _lines(_text(run)) == _lines(test.stdout)

    def _calls_pass(self, program: str, calls: list[Call]) -> bool:
        files = {
            "harness.py": _HARNESS,
            "solution.py": program,
            "expressions.json": json.dumps([call.expression for call in calls]),
        }
        run = self._sandbox.run(files)
        try:
            results = json.loads(run.output)
            return run.status == 0 and results == [call.expected for call in calls]
        except (ValueError, RecursionError):
            return False


def extract_program(prompt: str, text: str) -> str | None:
    """The one fenced block outside the thinking, or None."""
    parts = split_thinking(prompt, text)
    if parts is None:
        return None
    rest = parts[1]
    if "<answer>" in rest:
        rest = extract_answer(prompt, text) or ""
        if "```" not in rest:
            return rest or None
    blocks = _FENCE.findall(rest + "\n")
    return blocks[0] if len(blocks) == 1 and rest.count("```") == 2 else None


@functools.lru_cache(maxsize=4096)
def read_tests(reference: str) -> tuple[InputOutput | Call, ...]:
    """The tests of a reference (see ``CodeReward``).

    Raises:
        UserError: It holds none, or one that cannot be read.
    """
    try:
        found = json.loads(reference)
        tests = [InputOutput(test["stdin"], test["stdout"]) for test in found.get("tests", [])]
        asserts = [_read_assert(text) for text in found.get("asserts", [])]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"the tests {reference[:100]!r} cannot be read ({error!r}); write them as "
            '{"tests": [{"stdin": ..., "stdout": ...}]} or {"asserts": [...]}.'
        ) from error
    if not tests and not asserts:
        raise UserError(f"the reference {reference[:100]!r} holds no tests.")
    return (*tests, *asserts)


def _read_assert(text: str) -> Call:
    """``assert expression == literal``.

    Another form would have to be judged where the program can reach it.
    """
    try:
        (statement,) = ast.parse(text.strip()).body
    except (SyntaxError, ValueError):
        statement = None
    if isinstance(statement, ast.Assert):
        test = statement.test
        if isinstance(test, ast.Compare) and [type(op) for op in test.ops] == [ast.Eq]:
            try:
                expected = code_harness.encode(ast.literal_eval(test.comparators[0]))
                return Call(ast.unparse(test.left), json.loads(json.dumps(expected)))
            except (ValueError, TypeError):
                pass
    raise UserError(f"the test {text[:100]!r} is not of the form `assert expression == literal`.")


def _text(run: Run) -> str:
    return run.output.decode(errors="replace")


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]
