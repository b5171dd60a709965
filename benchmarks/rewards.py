"""What one call of each reward costs, for a completion of about 11,000 characters."""

import functools
import json
import statistics
import time
from collections.abc import Callable

from deepseek_jax import rewards
from deepseek_jax.rewards import Completion, Sample, Term
from deepseek_jax.rewards.puzzles import countdown

THINK = "<think>" + "We add the numbers 12 and 30 step by step. " * 250 + "</think>"


def median_ms(call: Callable[[], object], repeats: int = 50) -> float:
    """Of calls one after the other, the first left out."""
    call()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return 1000 * statistics.median(times)


def show(name: str, reward: rewards.Reward, text: str, reference: str, **options: int) -> None:
    """One line of the table."""
    completion = Completion(text, 3000)
    cost = median_ms(lambda: reward("", completion, reference), **options)
    print(f"{name:36} {cost:9.3f} ms")


def main() -> None:
    """Print a line per reward."""
    answer = f"{THINK}<answer>42</answer>"
    show("exact", rewards.exact, answer, "42")
    show("numeric", rewards.numeric, answer, "42")
    show("think_answer_format", rewards.think_answer_format, answer, "42")
    language = functools.partial(rewards.language_consistency, language="en")
    show("language_consistency", language, answer, "42")
    overlong = functools.partial(rewards.soft_overlong, max_tokens=4096, buffer=512)
    show("soft_overlong", overlong, answer, "42")
    puzzle = json.dumps({"numbers": [6, 61, 94, 4], "target": 309})
    show("countdown", countdown, f"{THINK}<answer>94*4-61-6</answer>", puzzle)

    total = rewards.RewardSum([Term("numeric", 1.0, rewards.numeric)])
    samples = [Sample("", Completion(answer, 3000), "42")]
    print(f"{'numeric in a RewardSum':36} {median_ms(lambda: total(samples)):9.3f} ms")

    with rewards.MathEquivalence() as equivalence:
        began = time.perf_counter()
        equivalence("", Completion("\\boxed{84/2}", 9), "42")
        print(f"{'MathEquivalence, first call':36} {1000 * (time.perf_counter() - began):9.3f} ms")
        show("MathEquivalence, same text", equivalence, f"{THINK}\\boxed{{42}}", "42")
        show("MathEquivalence, fraction", equivalence, f"{THINK}\\boxed{{\\frac{{84}}{{4}}}}", "21")
        square = f"{THINK}\\boxed{{(x+1)^2}}"
        show("MathEquivalence, polynomial", equivalence, square, "x^2+2x+1", repeats=10)

    code = rewards.CodeReward(rewards.Sandbox())
    program = "```python\nprint(sum(map(int, input().split())))\n```"
    tests = json.dumps({"tests": [{"stdin": "1 2", "stdout": "3"}]})
    show("CodeReward, one input", code, program, tests)
    asserts = json.dumps({"asserts": [f"assert f({i}) == {i + 1}" for i in range(10)]})
    show("CodeReward, ten asserts", code, "```python\ndef f(x): return x + 1\n```", asserts)


if __name__ == "__main__":
    main()
