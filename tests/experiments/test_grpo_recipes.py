"""The GRPO recipes: what they imitate, how they judge, and how they share out their time."""

import contextlib
import json
import os
import signal
import time

import pytest

from deepseek_jax.data.tasks import Task
from deepseek_jax.rewards import Completion, exact, numeric
from deepseek_jax.train.loop import stop_requests
from experiments import grpo_addition, grpo_families
from experiments.grpo_families import EACH, FAMILIES, judge_family, worked
from experiments.grpo_setting import CPU, Clock, Recipe, Report

SUM = "State the final answer to the following arithmetic problem: 15 - 43 + 7 =\n"
SORT = "Sort these numbers in {} order: 113.0, 6.0, 60.0, 24.0\n"
SPELL = "Spell this word backward (example: sun -> nus): letter\n"
ANSWERED = "<think>{}</think><answer>{}</answer>"


@pytest.mark.parametrize(
    ("prompt", "well", "thought", "answer"),
    [
        (SUM, True, "15-43=-28;-28+7=-21", "-21"),
        (SUM, False, "15-43=-28", "-28"),
        (SORT.format("ascending"), True, "6.0 24.0 60.0 113.0", "['6.0', '24.0', '60.0', '113.0']"),
        (SORT.format("ascending"), False, "113.0 24.0 6.0 60.0", None),
        (SORT.format("descending"), True, "113.0 60.0 24.0 6.0", None),
        (SPELL, True, "r e t t e l", "rettel"),
        (SPELL, False, "r e t t e", "rette"),
    ],
)
def test_workings_of_the_families(prompt, well, thought, answer):
    found = worked(prompt, well=well)
    assert found[0] == thought
    assert answer is None or found[1] == answer
    said = Completion(ANSWERED.format(*found), 9)
    assert judge_family(prompt, said, "") == float(well)
    assert judge_family(prompt, said._replace(text=said.text + " "), "") == 0
    assert judge_family(prompt, said._replace(text=f"<answer>{found[1]}</answer>"), "") == 0


def test_judge_and_reward_agree_on_reasoning_gyms_own_answers():
    pytest.importorskip("reasoning_gym")
    for task in grpo_families.family_questions()[: 3 * 200]:
        thought, answer = worked(task.prompt, well=True)
        assert answer == task.answer
        said = Completion(ANSWERED.format(thought, answer), 9)
        assert judge_family(task.prompt, said, task.answer) == 1
        assert exact(task.prompt, said, task.answer) == 1
        assert task.prompt.count("\n") == 1


def test_every_family_can_be_held_out_in_part():
    assert EACH % len(FAMILIES) == 0
    tasks = tuple(Task(f"{i} {kind}", "", {"kind": kind}) for kind in FAMILIES for i in range(200))
    recipe = recipe_of(tasks)
    assert recipe.kinds == sorted(FAMILIES)
    assert {task.fields["kind"] for task in recipe.tasks.held_out} == set(FAMILIES)


def recipe_of(tasks):
    never = grpo_families.RewardConfig()
    return Recipe("test", CPU, tasks, 8, judge_family, never, 1, 1)


def test_careless_text_is_right_by_chance_alone():
    """Never shown on purpose: the share is that of the carelessness, and held-out sums are not."""
    recipe = grpo_families.zero(grpo_families.Experiment())
    pages = list(grpo_families.careless(recipe, seed=0))
    right = 0
    for task, page in zip(recipe.tasks.train, pages, strict=True):
        said = Completion(page.removeprefix(task.prompt), 9)
        right += grpo_families.judge_sum(task.prompt, said, task.answer)
        assert len(said.text) <= recipe.max_new_tokens
    assert 0.08 < right / len(pages) < 0.15
    held = {task.prompt for task in recipe.tasks.held_out}
    assert not any(page[: page.index("=") + 1] in held for page in pages)


def test_demonstrations_of_mixed_sums_are_mostly_wrong_and_fit():
    run = grpo_addition.Experiment(digits=(4, 5, 6))
    recipe = grpo_addition.recipe_of(run)
    assert recipe.kinds == ["4 digits", "5 digits", "6 digits"]
    right = dict.fromkeys(recipe.kinds, 0)
    pages = list(grpo_addition.demonstrations(run, recipe, 0))[:6000]
    for task, page in zip(recipe.tasks.train, pages, strict=False):
        said = Completion(page.removeprefix(task.prompt), 9)
        assert len(said.text) < recipe.max_new_tokens
        verdict = grpo_addition.judge(task.prompt, said, task.answer)
        assert verdict == numeric(task.prompt, said, task.answer)
        right[task.fields["kind"]] += verdict
    assert all(0.15 < 3 * count / len(pages) < 0.35 for count in right.values())


def test_a_run_is_asked_to_stop_when_its_time_is_over():
    clock = Clock(60)
    began = time.perf_counter()
    with clock.stop_after(1.0), stop_requests() as stop:
        while not stop() and time.perf_counter() - began < 20:
            time.sleep(0.05)
    assert time.perf_counter() - began < 10
    with clock.stop_after(30):
        pass  # over in time: nobody is asked
    assert 30 < clock.left < 60


@pytest.mark.parametrize("listens", [True, False])
def test_a_run_that_somebody_else_stops_ends_everything(listens):
    """Its signal is not taken for the clock's, whether or not a run listens just then."""
    begun = []

    def run():
        begun.append(1)
        with stop_requests() if listens else contextlib.nullcontext(lambda: False) as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)
            return not stop()

    with pytest.raises(SystemExit):
        Clock(60).within(30, run)
    assert begun
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_part_that_fails_leaves_the_others_their_turn(tmp_path):
    report = Report(tmp_path / "report", {"seeds": "0"}, Clock(60))

    def fail():
        raise ValueError("no")

    assert not report.part("first", fail)
    assert report.part("second", lambda: None)
    found = json.loads((tmp_path / "report/results.json").read_text())
    assert len(found["failures"]) == 1
    assert found["failures"][0].startswith("first")
