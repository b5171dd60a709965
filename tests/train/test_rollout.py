"""Rollouts without a model: an engine that says what it is told."""

import json

import numpy as np
import pytest

from deepseek_jax.data.prompts import Prompter
from deepseek_jax.data.tasks import Task, TaskStream
from deepseek_jax.data.tokenizer import train_bpe
from deepseek_jax.evaluate import solve
from deepseek_jax.generate import Completion, Engine, Sampling
from deepseek_jax.rewards import RewardSum, Term
from deepseek_jax.train.reward_terms import RewardConfig
from deepseek_jax.train.rollout import (
    CompletionLog,
    RolloutConfig,
    Sampler,
    to_rows,
    transcript,
)

LIMIT = 5
TOKENIZER = train_bpe(["0123456789+="], 266)
TASKS = [Task(f"{i}+{i}=", str(2 * i)) for i in range(8)]
# The reward is the digit said last; a 9 is worth nothing.
DIGIT = Term("accuracy", 1.0, lambda prompt, said, answer: int(said.text[-1]) % 9)


class Parrot(Engine):
    """Answers the questions ``0+0=``, ``1+1=``, ... with the digits that are its script's."""

    def __init__(self, script):
        self.script, self.seeds = script, []

    def generate(self, requests):
        done = []
        for i, request in enumerate(requests):
            self.seeds.append(request.sampling.seed)
            question = TOKENIZER.decode(request.prompt, skip_special=True)
            for j in range(request.samples):
                digit = self.script[int(question[0])][j]
                text = "7" * (LIMIT - 1) + digit if digit == "9" else digit
                tokens = TOKENIZER.encode(text)
                finish = "length" if digit == "9" else "stop"
                tokens += [] if digit == "9" else [TOKENIZER.eos_id]
                count = len(request.prompt) + len(tokens) - 1
                logp = -np.arange(1, len(tokens) + 1, dtype=np.float32)
                experts = np.arange(count)[None, :, None] + np.array([[[0]], [[100]]])
                done.append(
                    Completion(i, j, tokens, finish, logp, logp, experts, None, np.zeros(1))
                )
        return reversed(done)


def sampler(script, **changes):
    how = RolloutConfig(
        **{
            "prompts": 2,
            "group_size": 2,
            "sampling": Sampling(LIMIT, temperature=1.0, top_p=1.0),
            **changes,
        }
    )
    stream = TaskStream(TASKS)
    return Sampler(how, Parrot(script), Prompter("plain", TOKENIZER), stream, RewardSum([DIGIT]))


def asked(stream_of, count):
    return [int(task.prompt[0]) for task in TaskStream(TASKS).take(count)][stream_of:]


def test_rows_are_prompt_and_completion():
    order = asked(0, 2)
    one = sampler({order[0]: "13", order[1]: "29"}, keep_routing=True)
    rollout = to_rows(one.collect(0), one.config, "none", 12)
    batch = rollout.batch
    first = [TOKENIZER.bos_id, *TOKENIZER.encode(f"{order[0]}+{order[0]}=1"), TOKENIZER.eos_id]
    assert batch.tokens_BT[0, :6].tolist() == first[:-1]
    assert batch.targets_BT[0, :6].tolist() == first[1:]
    # The last token of the prompt predicts the first of the completion.
    assert batch.loss_weights_BT[0].tolist() == [0, 0, 0, 0, 1, 1, *[0] * 6]
    assert batch.positions_BT[0].tolist() == [*range(6), *[0] * 6]
    assert batch.segment_ids_BT[0].tolist() == [1] * 6 + [0] * 6
    assert rollout.sampler_logp_BT[0].tolist() == [0, 0, 0, 0, -1, -2, *[0] * 6]
    assert rollout.experts_BTLK[0, :6, :, 0].tolist() == [[t, 100 + t] for t in range(6)]
    assert (rollout.experts_BTLK[0, 6:] == -1).all()
    np.testing.assert_allclose(rollout.advantages_B, [-1, 1, 1, -1])
    assert batch.loss_weights_BT[3].sum() == LIMIT  # cut off: every token counts, there is no end


def test_truncated_completions_can_be_masked():
    order = asked(0, 2)
    script = {order[0]: "13", order[1]: "29"}
    masked = sampler(script, truncated="mask")
    weights_BT = to_rows(masked.collect(0), masked.config, "none", 12).batch.loss_weights_BT
    assert weights_BT.sum(1).tolist() == [2, 2, 2, 0]


def test_a_failed_truncated_completion_earns_nothing():
    order = asked(0, 2)
    one = sampler({order[0]: "13", order[1]: "29"}, truncated="fail")
    one.rewards = RewardSum([Term("accuracy", 1.0, lambda prompt, said, answer: 1.0)])
    collected = one.collect(0)
    assert [group.rewards_G.tolist() for group in collected.groups] == [[1, 1], [1, 0]]
    assert collected.metrics["reward"] == 0.75
    assert collected.metrics["reward/accuracy"] == 1  # each term is reported as it is
    assert collected.metrics["truncated"] == 0.25


def test_an_evaluation_draws_every_task_apart():
    """With one seed for all, the same unlucky draw would come at the same token of each."""
    engine = Parrot(dict.fromkeys(range(8), "12"))
    solved = solve(engine, Prompter("plain", TOKENIZER), TASKS, DIGIT.reward, Sampling(LIMIT), 2)
    assert len(set(engine.seeds)) == len(TASKS)
    assert [[s.completion.text for s in row] for row in solved.samples] == [["1", "2"]] * 8
    assert solved.correct_Pk.tolist() == [[True, False]] * 8


def test_dynamic_sampling_asks_on_until_all_groups_differ():
    order = asked(0, 4)
    script = {order[0]: "11", order[1]: "12", order[2]: "33", order[3]: "21"}
    one = sampler(script, refills=3)
    collected = one.collect(0)
    assert [int(group.task.prompt[0]) for group in collected.groups] == [order[1], order[3]]
    assert collected.metrics["groups_asked"] == 4
    assert collected.metrics["groups_without_spread"] == 0.5
    assert len(set(one.engine.seeds)) == 4  # no question has another's randomness
    without = sampler(script).collect(0)
    assert [int(group.task.prompt[0]) for group in without.groups] == order[:2]


def test_dynamic_sampling_gives_up_and_what_fills_the_places_teaches_nothing():
    one = sampler(dict.fromkeys(range(8), "11") | {asked(0, 2)[1]: "12"}, refills=2)
    collected = one.collect(0)
    assert [group.spread for group in collected.groups] == [True, False]
    assert collected.metrics["groups_asked"] == 4  # two, and twice one
    weights_BT = to_rows(collected, one.config, "group", 12).batch.loss_weights_BT
    assert weights_BT.sum(1).tolist() == [2, 2, 0, 0]


def test_the_same_step_is_sampled_alike_and_another_one_is_not():
    script = dict.fromkeys(range(8), "12")
    seeds = []
    for step in (3, 3, 4):
        one = sampler(script)
        one.collect(step)
        seeds.append(one.engine.seeds)
    assert seeds[0] == seeds[1]
    assert not set(seeds[0]) & set(seeds[2])


def test_completions_are_logged_and_steps_made_again_replace_those_of_the_killed_run(tmp_path):
    collected = sampler(dict.fromkeys(range(8), "12")).collect(0)
    path = tmp_path / "completions.jsonl"
    log = CompletionLog(path, 0)
    for step in (1, 2):
        log.write(step, collected, ["accuracy"])
    with path.open("a") as file:
        file.write('{"step": 3, "pro')
    CompletionLog(path, 1).write(2, collected, ["accuracy"])
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1] * 4 + [2] * 4
    assert lines[1]["completion"] == "2"
    assert lines[1]["rewards"] == {"accuracy": 2}
    assert lines[1]["tokens"] == 2


def test_a_transcript_shows_the_best_and_the_worst():
    group = sampler(dict.fromkeys(range(8), "12")).collect(0).groups[0]
    shown = transcript(group).splitlines()
    assert [line.split()[:2] for line in shown[1:]] == [["reward", "2:"], ["reward", "1:"]]


@pytest.mark.parametrize("weight", [0.0, 2.0])
def test_accuracy_and_format_are_reported_at_any_weight(weight):
    config = RewardConfig(accuracy_weight=weight, language="en", overlong_buffer=2)
    terms = config.terms("add:2", 10)
    assert [term.name for term in terms] == ["accuracy", "format", "language", "overlong"]
    assert terms[0].weight == weight
