"""The R1 recipe: its world, its judge, and the chain stopped and continued."""

import json
import random
import shutil

import pytest

from deepseek_jax.rewards import Completion
from deepseek_jax.types import UserError
from experiments.r1 import judge, recipe
from experiments.r1.setting import Setting, Stopped
from experiments.r1.text import base_text, demonstrations, reply, working, world


def test_no_text_holds_what_is_held_out():
    known = world(2)
    sums = {tuple(sorted((task.fields["a"], task.fields["b"]))) for task in known.held_out}
    for task in known.train:
        assert tuple(sorted((task.fields["a"], task.fields["b"]))) not in sums
    held = {task.prompt for task in (*known.held_out, *known.held_out_requests)}
    shown = [page["text"] for page in base_text(known, 2, 2000, seed=0)]
    shown += [record["prompt"] for record in demonstrations(known, 2, 100, seed=0)]
    assert not any(text.startswith(prompt) for text in shown for prompt in held)


def test_working_by_hand():
    assert working(47, 85, ["en", "zh"]) == ("one 7+5+0=12 十 4+8+1=13", "132")
    assert working(47, 85, ["en"] * 2, carries=False)[1] == "122"
    long = "one 7+5+0=12, write 2 and carry 1; ten 4+8+1=13, write 13."
    assert working(47, 85, ["en"] * 2, long=True) == (long, "132")
    rng = random.Random(0)
    for _ in range(50):
        a, b = rng.randint(10, 99), rng.randint(10, 99)
        assert working(a, b, ["en"] * 2)[1] == str(a + b)


@pytest.mark.parametrize(
    ("said", "right"),
    [
        ("<think>easy</think><answer>132</answer>", 1),
        ("<think>\neasy\n</think>\n\n<answer>132</answer>", 1),
        ("<think>easy</think><answer>133</answer>", 0),
        ("<think>easy</think><answer>132</answer> ", 0),
        ("<think>easy</think><answer>132</answer><answer>132</answer>", 0),
        ("<think></think><answer>132</answer>", 0),
        ("<think><answer>132</answer></think>", 0),
        ("<think>easy</think><answer>१३२</answer>", 0),
        ("132", 0),
    ],
)
def test_the_judge_of_sums(said, right):
    assert judge.right("<｜User｜>47+85=<｜Assistant｜>", Completion(said, 9), "") == right


def test_the_judge_of_requests_and_of_language():
    known = world(2)
    rng = random.Random(0)
    kind = 0
    for task in known.requests:
        thought, said = reply(task, rng)
        text = f"<think>{thought}</think><answer>{said}</answer>"
        kind += judge.kind(task.prompt, Completion(text, 9), "")
    assert 0.15 < kind / len(known.requests) < 0.45
    friend = "<think>x</think><answer>Thank you, that was kind.</answer>"
    assert judge.kind("Thank Ada.", Completion(friend, 9), "") == 1
    assert judge.kind("Greet Ada.", Completion(friend, 9), "") == 0
    assert judge.english("<think>one 1+2=3 十个</think><answer>no</answer>") == 1 / 3


@pytest.mark.slow
def test_the_chain_goes_on_where_it_stopped(tmp_path, monkeypatch):
    """Stopped between stages, within one, and with a run that saved nothing: one report."""
    setting = Setting(out=tmp_path / "r1", quick=True, judged=4)
    monkeypatch.chdir(tmp_path)
    done = []
    real = recipe.stages

    def counted(stop_before: str):
        def stages(known):
            def wrap(stage):
                def run(s):
                    if stage.name == stop_before:
                        raise Stopped(stage.name)
                    done.append(stage.name)
                    return stage.run(s)

                return stage._replace(run=run)

            return [wrap(stage) for stage in real(known)]

        monkeypatch.setattr(recipe, "stages", stages)

    counted("cold_start")
    with pytest.raises(Stopped):
        recipe.run(setting)
    # As if killed after training, before it was judged: continued, not begun anew.
    (setting.out / "figures/zero.json").unlink()
    steps = (setting.out / "zero/metrics.jsonl").read_text()
    # As if killed before the first checkpoint.
    (setting.out / "cold_start").mkdir()
    shutil.copy(setting.out / "zero/run.json", setting.out / "cold_start")
    counted("none")
    report = recipe.run(setting)
    assert done[:4] == ["base", "zero", "zero", "cold_start"]
    assert len(done) == len(set(done)) + 1 == 11
    assert (setting.out / "zero/metrics.jsonl").read_text().startswith(steps.split("\n")[0])
    page = report.read_text()
    figures = json.loads((setting.out / "figures/scenarios.json").read_text())
    assert f"{figures['greedy']:.1%}" in page
    assert all((setting.out / name).exists() for name in ("r1_stages.png", "r1_curves.png"))
    recipe.run(setting)
    assert len(done) == 11  # nothing is repeated
    with pytest.raises(UserError, match="another setting"):
        recipe.run(Setting(out=setting.out, seed=1, quick=True, judged=4))
