import json
import re

import pytest

from deepseek_jax.data.tasks import (
    MixedStream,
    Task,
    TaskStream,
    addition,
    addition_demonstration,
    addition_working,
    content_hash,
    open_tasks,
    read_jsonl,
    reasoning_gym,
    split,
)
from deepseek_jax.rewards import Completion
from deepseek_jax.rewards.puzzles import reward_for
from deepseek_jax.types import UserError


def write(path, *lines):
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines))
    return str(path)


def test_jsonl(tmp_path):
    path = write(
        tmp_path / "a.jsonl",
        {"prompt": "1+1=", "answer": "2", "level": 3},
        "",
        {"prompt": "2+2=", "answer": 4},
        {"answer": {"tests": [{"stdin": "", "stdout": "x"}]}, "prompt": "Print x."},
    )
    tasks = open_tasks(path)
    assert tasks[0] == Task("1+1=", "2", {"level": 3})
    assert tasks[1] == Task("2+2=", "4")
    assert json.loads(tasks[2].answer)["tests"][0]["stdout"] == "x"


GOOD = {"prompt": "p", "answer": "a"}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "not a JSON object"),
        ({"answer": "a"}, '"prompt"'),
        ({"prompt": "", "answer": "a"}, '"prompt"'),
        ({"prompt": 3, "answer": "a"}, '"prompt"'),
        ({"prompt": "p"}, '"answer"'),
        ({"prompt": "p", "answer": None}, '"answer"'),
    ],
)
def test_a_bad_line_is_named(tmp_path, bad, message):
    path = write(tmp_path / "a.jsonl", GOOD, "", bad, GOOD)
    with pytest.raises(UserError, match="line 3") as error:
        open_tasks(path)
    assert message in str(error.value)


def test_files_that_hold_nothing(tmp_path):
    for source in (write(tmp_path / "a.jsonl", ""), f"{tmp_path}/none.jsonl", str(tmp_path)):
        with pytest.raises(UserError):
            open_tasks(source)


# --- addition ---------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["add:", "add:x", "add:0", "add:16", "add:-1"])
def test_digits_out_of_range(source):
    with pytest.raises(UserError, match="digits"):
        open_tasks(source)


@pytest.mark.parametrize("digits", [1, 2, 3, 10, 15])
def test_sums_are_right_and_differ(digits):
    tasks = addition(digits, size=300, seed=1)
    assert len({task.prompt for task in tasks}) == len(tasks) == min(300, 10 ** (2 * digits))
    for task in tasks:
        a, b = task.prompt.removesuffix("=").split("+")
        assert len(a) == len(b) == digits
        assert int(a) + int(b) == int(task.answer)
        assert addition_working(int(a), int(b))[1] == task.answer
    assert tasks == addition(digits, size=300, seed=1)
    assert tasks != addition(digits, size=300, seed=2)


def test_all_pairs_once():
    assert len({task.prompt for task in addition(1, size=1000)}) == 100


def test_working():
    assert addition_working(47, 85) == ("7+5+0=12;4+8+1=13;0+0+1=01", "132")
    assert addition_working(47, 85, carries=False) == ("7+5+0=12;4+8+0=12;0+0+0=00", "22")
    assert addition_working(11, 22) == addition_working(11, 22, carries=False)
    assert addition_working(50, 50, carries=False)[1] == "0"


def test_most_demonstrations_drop_carries_and_imitating_them_is_mostly_wrong():
    tasks = addition(3, size=3000)
    shown = [addition_demonstration(task, wrong_share=0.8) for task in tasks]
    assert shown == [addition_demonstration(task, wrong_share=0.8) for task in tasks]
    reward = reward_for("add:3")
    right = [
        reward(t.prompt, Completion(s, 9), t.answer) for t, s in zip(tasks, shown, strict=True)
    ]
    # Without carries a sum is right where there are none: 0.55 * 0.55 * 36/81 of them.
    carryless = 0.55 * 0.55 * 36 / 81
    assert sum(right) / len(right) == pytest.approx(0.2 + 0.8 * carryless, abs=0.03)
    always = [addition_demonstration(task, wrong_share=1.0) for task in tasks]
    right = [
        reward(t.prompt, Completion(s, 9), t.answer) for t, s in zip(tasks, always, strict=True)
    ]
    assert sum(right) / len(right) == pytest.approx(carryless, abs=0.03)
    never = [addition_demonstration(task, wrong_share=0.0) for task in tasks]
    assert all(reward("", Completion(s, 9), t.answer) for t, s in zip(tasks, never, strict=True))
    padded = [addition_demonstration(task, wrong_share=0.0, padded=True) for task in tasks]
    assert all(reward("", Completion(s, 9), t.answer) for t, s in zip(tasks, padded, strict=True))
    assert all(re.search(r"<answer>\d{4}</answer>$", text) for text in padded)


# --- reasoning-gym ----------------------------------------------------------------------------


def test_reasoning_gym():
    pytest.importorskip("reasoning_gym")
    tasks = open_tasks("rg:chain_sum,max_terms=3,max_digits=1", size=200, seed=0)
    assert len({task.prompt for task in tasks}) == len(tasks)
    assert len(tasks) < 200  # repeated questions are one
    for task in tasks:
        expression = task.prompt.rpartition(":")[2].strip(" =").replace(" ", "")
        assert expression.count("+") + expression.count("-") <= 3
    countdown = open_tasks("rg:countdown", size=3)[0]
    assert set(json.loads(countdown.answer)) == {"numbers", "target"}
    for source in ("rg:nope", "rg:chain_sum,nope=1", "rg:chain_sum,max_terms=0", "rg:gcd,x"):
        with pytest.raises(UserError):
            open_tasks(source, size=3)


def test_without_reasoning_gym_the_remedy_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"reasoning-gym; install it by `pip install -e '\.\[rl\]'`"
    ):
        reasoning_gym("chain_sum", size=3)


@pytest.mark.parametrize("name", ["chain_sum", "number_sorting", "spell_backward", "word_sorting"])
def test_its_own_answers_pass_our_rewards_and_others_do_not(name):
    pytest.importorskip("reasoning_gym")
    tasks = reasoning_gym(name, size=30)
    reward = reward_for(f"rg:{name}")
    for task, other in zip(tasks, tasks[1:] + tasks[:1], strict=True):
        completion = Completion(f"<answer>{task.answer}</answer>", 9)
        assert reward(task.prompt, completion, task.answer) == 1
        assert reward(task.prompt, completion, other.answer) == (task.answer == other.answer)


# --- split and order --------------------------------------------------------------------------


def test_the_split_goes_by_content_alone():
    tasks = addition(3, size=2000, seed=0)
    train, held_out = split(tasks, 0.1)
    assert len(train) + len(held_out) == 2000
    assert 150 < len(held_out) < 250
    assert not {t.prompt for t in train} & {t.prompt for t in held_out}
    again = split(addition(3, size=2000, seed=1)[::-1], 0.1)
    assert not {t.prompt for t in train} & {t.prompt for t in again.held_out}
    assert not {t.prompt for t in held_out} & {t.prompt for t in again.train}
    copies = split([*tasks, *tasks], 0.1)
    assert len(copies.held_out) == 2 * len(held_out)


def test_the_hash_is_the_same_everywhere():
    assert content_hash("1+1=") == 0x189074F32786FE9F
    assert content_hash("\ud800") != content_hash("?")


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 1e-9, 1 - 1e-9])
def test_a_side_must_not_be_empty(fraction):
    with pytest.raises(UserError):
        split(addition(2, size=20), fraction)


def test_the_stream_visits_all_each_epoch_and_resumes_anywhere():
    tasks = addition(2, size=7)
    stream = TaskStream(tasks, seed=3)
    epochs = [stream.take(7) for _ in range(3)]
    assert all(sorted(epoch) == sorted(tasks) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    flat = [task for epoch in epochs for task in epoch]
    for stop in range(15):
        first = TaskStream(tasks, seed=3)
        first.take(stop)
        state = json.loads(json.dumps(first.get_state()))
        second = TaskStream(tasks, seed=3)
        second.set_state(state)
        assert second.take(6) == flat[stop : stop + 6]


def test_a_state_of_other_tasks_is_refused():
    state = TaskStream(addition(2, size=7), seed=3).get_state()
    for other in (TaskStream(addition(2, size=8), seed=3), TaskStream(addition(2, size=7), seed=4)):
        with pytest.raises(UserError, match="began with"):
            other.set_state(state)
    with pytest.raises(UserError, match="no tasks"):
        TaskStream([])


def test_streams_are_mixed_in_their_shares_and_resume_anywhere():
    sums = addition(2, size=7)
    general = [Task(f"Greet {name}.", "", general=True) for name in "ABC"]

    def stream(shares=(3.0, 1.0)):
        return MixedStream([TaskStream(sums, seed=3), TaskStream(general, seed=3)], shares)

    flat = stream().take(40)
    for count in range(41):
        assert abs(sum(task.general for task in flat[:count]) - count / 4) < 1
    for stop in (0, 1, 5, 17):
        first = stream()
        first.take(stop)
        second = stream()
        second.set_state(json.loads(json.dumps(first.get_state())))
        assert second.take(6) == flat[stop : stop + 6]
    for state in (stream().get_state(), TaskStream(sums).get_state()):
        with pytest.raises(UserError, match="shares"):
            stream((1.0, 1.0)).set_state(state)
    with pytest.raises(UserError, match="share above 0"):
        stream((1.0, 0.0))


def test_prompts_without_answers_are_general(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "Greet Ada.", "id": 3}\n')
    assert read_jsonl(path, answer_field=None) == [Task("Greet Ada.", "", {"id": 3}, True)]
    with pytest.raises(UserError, match='nothing under "answer"'):
        read_jsonl(path)
