"""How a stage is judged: on held-out prompts, by rules that share no code with the rewards."""

import re
from pathlib import Path
from typing import Any

import numpy as np

from deepseek_jax.checkpoint import load_params
from deepseek_jax.checkpoint.run_directory import read_run
from deepseek_jax.config import FLOAT32, ModelConfig
from deepseek_jax.data.chat import ChatTemplate
from deepseek_jax.data.prompts import Prompter, PromptStyle
from deepseek_jax.data.tasks import Task
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.evaluate import Solved, solve
from deepseek_jax.generate import Engine, EngineConfig, Sampling
from deepseek_jax.model.transformer import DeepSeekV3
from deepseek_jax.rewards import Completion
from experiments.r1.text import KIND, World

FORM = re.compile(r"<think>\s*([^<>]*[^<>\s])\s*</think>\s*<answer>([^<>]+)</answer>")


def right(prompt: str, said: Completion, answer: str) -> float:
    """1 for the sum, in digits alone, in the right form and nothing beside it."""
    match = FORM.fullmatch(said.text)
    question = re.search(r"([0-9]+)\+([0-9]+)=", prompt)
    if match is None or question is None or not re.fullmatch("[0-9]+", match[2]):
        return 0.0
    return float(int(match[2]) == int(question[1]) + int(question[2]))


def kind(prompt: str, said: Completion, answer: str) -> float:
    """1 for the kind words that suit the request.

    This is what "people prefer" here. The reward model never sees the rule, only pairs.
    """
    match = FORM.fullmatch(said.text)
    request = re.search(r"(\w+) (\w+)\.", prompt)
    if match is None or request is None:
        return 0.0
    return float(match[2] == KIND[request[1]])


def english(text: str) -> float:
    """Share of the thinking's words that are English: runs of two Latin letters and more."""
    thought = text.partition("</think>")[0].replace("<think>", "")
    latin = len(re.findall("[A-Za-z]{2,}", thought))
    other = len(re.findall("[\u4e00-\u9fff]", thought))
    return latin / max(latin + other, 1)


class Judge:
    """A stage's weights, ready to be asked.

    Args:
        run: The stage's directory.
        style: How it is asked.
        max_new_tokens: Of an answer.
    """

    def __init__(self, run: Path, style: PromptStyle, max_new_tokens: int):
        params, bias, _ = load_params(run)
        tokenizer = Tokenizer.load(run / "tokenizer.json")
        template = ChatTemplate.load(run, tokenizer) if style == "chat" else None
        self.prompter = Prompter(style, tokenizer, template)
        model = DeepSeekV3(ModelConfig.from_hf(read_run(run)["model"]), FLOAT32)
        sizes = EngineConfig(slots=64, max_length=24 + max_new_tokens, lanes=16, prefill_chunk=24)
        self.engine = Engine(model, params, bias, sizes)
        self.max_new_tokens = max_new_tokens

    def ask(self, tasks: list[Task], temperature: float, samples: int, seed: int = 0) -> Solved:
        """Attempts at sums, or at requests if these are what ``tasks`` are."""
        how = Sampling(self.max_new_tokens, temperature=temperature, top_p=1.0, seed=seed)
        rule = kind if tasks[0].general else right
        return solve(self.engine, self.prompter, tasks, rule, how, samples)


def figures(judge: Judge, known: World, count: int) -> dict[str, Any]:
    """Everything of a stage that the report shows; rates in [0, 1], lengths in tokens."""
    tasks = known.held_out[:count]
    greedy, drawn = judge.ask(tasks, 0.0, 1), judge.ask(tasks, 1.0, 4)
    requests = judge.ask(known.held_out_requests, 1.0, 4)
    said = [sample.completion.text for row in drawn.samples for sample in row]
    scores = drawn.scalars()
    return {
        "greedy": greedy.scalars()["pass@1"],
        "pass@1": scores["pass@1"],
        "pass@4": scores["pass@4"],
        "form": float(np.mean([FORM.fullmatch(text) is not None for text in said])),
        "english": float(np.mean([english(text) for text in said])),
        "truncated": scores["truncated"],
        "tokens": scores["tokens"],
        "no spread": scores["groups_without_spread"],
        "kind": requests.scalars()["pass@1"],
        "transcripts": [
            {"prompt": task.prompt, "said": solved.samples[i][0].completion.text}
            for solved, of in ((greedy, tasks), (requests, known.held_out_requests))
            for i, task in enumerate(of[:2])
        ],
    }
