"""What the GRPO recipes share: sizes, imitation, reinforcement, the judge's table, time and files.

A recipe says which questions are asked, what is imitated, and how an answer is judged. Everything
of a run lies below one directory; ``Report`` keeps what is worth taking away in four files.
"""

import contextlib
import dataclasses
import json
import os
import signal
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax

from deepseek_jax import sharding
from deepseek_jax.checkpoint import load_params
from deepseek_jax.checkpoint.files import write_json, write_json_lines
from deepseek_jax.config import FLOAT32, ModelConfig, Precision
from deepseek_jax.data.pipeline import DataConfig
from deepseek_jax.data.prompts import Prompter
from deepseek_jax.data.tasks import Split, Task, open_tasks, split
from deepseek_jax.data.tokenizer import Tokenizer, train_bpe
from deepseek_jax.evaluate import solve
from deepseek_jax.generate import Engine, EngineConfig, Sampling
from deepseek_jax.model.transformer import DeepSeekV3, sharded_params
from deepseek_jax.presets import preset
from deepseek_jax.report import Progress, plot_runs, read_metrics, summary_table
from deepseek_jax.rewards import Reward, Term
from deepseek_jax.train.grpo import GRPO_OPTIM, GrpoConfig, grpo, longest_prompt
from deepseek_jax.train.loop import LoopConfig
from deepseek_jax.train.objective import ObjectiveConfig
from deepseek_jax.train.optim import OptimConfig
from deepseek_jax.train.pretrain import PretrainConfig, pretrain
from deepseek_jax.train.reward_terms import RewardConfig
from deepseek_jax.train.rollout import RolloutConfig

HELD_OUT = 0.05
SAMPLES = 4  # k of pass@k
Hardware = Literal["cpu", "gpu"]


@dataclass(frozen=True)
class Size:
    """Of the model, and of what is done at a time."""

    model: ModelConfig
    precision: Precision
    prompts: int
    """P, questions of a GRPO step."""
    group_size: int
    """G, completions of each."""
    micro_batch: int
    """Completions at a time in the training half of a step."""
    imitated_rows: int
    """Rows of 256 tokens in a step of imitation."""
    imitation_lr: float
    lr: float
    """GRPO's at the start; it falls to a tenth."""
    judged: int
    """Held-out questions of each kind."""


_BYTES = preset("tiny").replace(vocab_size=266, num_nextn_predict_layers=0)  # no merges

# 2.1M parameters; two cores, minutes.
CPU = Size(_BYTES, FLOAT32, 32, 8, 256, 16, 2e-3, 5e-4, 500)

# 24.1M parameters, 7.5M active. A model of this size leaves an H100 waiting for launches, so what
# counts is rows per launch: 2048 completions at a time. BF16, and widths that are multiples of
# 64: what the grouped matmul's kernel for Hopper takes; heads of 64, which cuDNN's attention has
# for long. A wider model moves further at the same rate: 5e-4 of a width of 128 is 1.7e-4 of 384.
GPU = Size(
    _BYTES.replace(
        hidden_size=384,
        num_hidden_layers=5,
        num_attention_heads=8,
        q_lora_rank=192,
        kv_lora_rank=128,
        qk_nope_head_dim=32,
        qk_rope_head_dim=32,
        v_head_dim=64,
        intermediate_size=1024,
        moe_intermediate_size=256,
        initializer_range=0.03,
    ),
    Precision(),
    128,
    16,
    1024,
    64,
    1e-3,
    2e-4,
    256,
)

SIZES: dict[Hardware, Size] = {"cpu": CPU, "gpu": GPU}


@dataclass(frozen=True)
class Recipe:
    """One policy: what it is asked, what it imitates first, and who judges it."""

    name: str
    size: Size
    questions: tuple[Task, ...]
    """Each says in ``fields`` what ``kind`` it is of; the judge's table has a row per kind."""
    max_new_tokens: int
    judge: Reward
    """Written apart from the rewards."""
    rewards: RewardConfig
    imitation_steps: int
    steps: int
    prompt: str = "47+85="

    @property
    def tasks(self) -> Split:
        """To learn from and held out, by the hash of the question, whatever the seed."""
        return split(self.questions, HELD_OUT)

    @property
    def kinds(self) -> list[str]:
        """Of questions."""
        return sorted({task.fields["kind"] for task in self.questions})


# --- imitation, reinforcement -----------------------------------------------------------------


def imitate(
    recipe: Recipe,
    out: Path,
    texts: Iterable[str],
    seed: int,
    init: Path | None = None,
    steps: int | None = None,
) -> bool:
    """Train on texts, from random weights or further; False if stopped early (and saved)."""
    data = out.with_name(out.name + "_texts.jsonl")
    data.parent.mkdir(parents=True, exist_ok=True)
    write_json_lines(data, ({"text": text} for text in texts))
    tokenizer = out.with_name("tokenizer.json")
    if not tokenizer.exists():
        train_bpe(["0123456789"], 266).save(tokenizer)
    size, steps = recipe.size, steps or recipe.imitation_steps
    config = PretrainConfig(
        out=out,
        init=init,
        model=size.model,
        precision=size.precision,
        data=DataConfig(
            source=(str(data),),
            tokenizer=tokenizer,
            seq_len=256,
            fim_rate=0.0,
            mask_documents=True,
            held_out_fraction=0.02,
            seed=seed,
        ),
        loop=LoopConfig(
            steps=steps,
            batch_size=size.imitated_rows,
            eval_every=0,
            save_every=steps,
            init_seed=seed,
        ),
        optim=OptimConfig(
            peak_lr=size.imitation_lr,
            min_lr=size.imitation_lr / 10,
            final_lr=size.imitation_lr / 10,
        ),
        prompt=recipe.prompt,
        sample_tokens=0,
    )
    return pretrain(config) is not None


def reinforce(
    recipe: Recipe,
    out: Path,
    init: Path,
    seed: int,
    terms: Sequence[Term] | None = None,
    rewards: RewardConfig | None = None,
) -> bool:
    """GRPO; False if stopped early (and saved). By default for what the recipe says."""
    size = recipe.size
    questions = out.with_name(f"{recipe.name}_questions.jsonl")
    if not questions.exists():
        lines = ({"prompt": t.prompt, "answer": t.answer, **t.fields} for t in recipe.questions)
        write_json_lines(questions, lines)
    config = GrpoConfig(
        out=out,
        init=init,
        precision=size.precision,
        tasks=str(questions),
        task_seed=seed,
        held_out_fraction=HELD_OUT,
        prompt_style="plain",
        rewards=rewards or recipe.rewards,
        rollout=RolloutConfig(
            prompts=size.prompts,
            group_size=size.group_size,
            sampling=Sampling(recipe.max_new_tokens, temperature=1.0, top_p=1.0, seed=seed),
            slots=size.prompts * size.group_size,
        ),
        objective=ObjectiveConfig(kl_coef=0.0),
        loop=LoopConfig(
            steps=recipe.steps,
            batch_size=size.prompts * size.group_size,
            micro_batch=size.micro_batch,
            eval_every=10,
            save_every=recipe.steps,
        ),
        optim=dataclasses.replace(
            GRPO_OPTIM,
            constant_until=0.0,
            peak_lr=size.lr,
            min_lr=size.lr / 10,
            final_lr=size.lr / 10,
        ),
        eval_tasks=200,
        show_every=20,
    )
    return grpo(config, terms) is not None


# --- judgement --------------------------------------------------------------------------------


def figures(recipe: Recipe, folder: Path) -> list[dict[str, Any]]:
    """A row per kind of questions: held out, greedy, and ``SAMPLES`` times at temperature 1.

    The engine is GRPO's own in every size, so that its programs are compiled once.
    """
    size, tasks = recipe.size, recipe.tasks
    prompter = Prompter("plain", Tokenizer.load(folder / "tokenizer.json"))
    model = DeepSeekV3(size.model, size.precision, whole_rows=True)
    longest = longest_prompt(prompter, [*tasks.train, *tasks.held_out])
    sizes = EngineConfig(
        slots=size.prompts * size.group_size,
        max_length=longest + recipe.max_new_tokens,
        lanes=max(8, size.prompts),
        prefill_chunk=min(256, longest),
    )
    mesh = sharding.make_mesh("data=-1")
    rows = []
    with jax.set_mesh(mesh):
        params, bias_LE, _ = load_params(folder, sharded_params(model, mesh))
        engine = Engine(model, params, bias_LE, sizes)
        for kind in recipe.kinds:
            asked = [task for task in tasks.held_out if task.fields["kind"] == kind][: size.judged]
            attempt = partial(solve, engine, prompter, asked, recipe.judge)
            greedy = attempt(Sampling(recipe.max_new_tokens, temperature=0.0)).scalars()
            how = Sampling(recipe.max_new_tokens, temperature=1.0, top_p=1.0)
            drawn = attempt(how, SAMPLES).scalars()
            names = ("pass@1", f"pass@{SAMPLES}", "format", "truncated", "tokens")
            rows.append(
                {"kind": kind, "questions": len(asked), "greedy": greedy["pass@1"]}
                | {name: drawn[name] for name in names}
                | {"no spread": drawn["groups_without_spread"]}
            )
    return rows


# --- time -------------------------------------------------------------------------------------


@dataclass
class Clock:
    """How much of the time that a command may take is left."""

    seconds: float
    began: float = field(default_factory=time.perf_counter)

    @property
    def left(self) -> float:
        """In seconds."""
        return self.seconds - (time.perf_counter() - self.began)

    def seeds(self, wanted: Iterable[int]) -> Iterator[int]:
        """Each of them, as long as there is time for one more like the last."""
        took = 0.0
        for seed in wanted:
            if self.left < 0.6 * took:  # the first one has compiled for all
                print(f"no time for seed {seed}: {self.left:.0f} s left", flush=True)
                return
            before = self.left
            yield seed
            took = before - self.left

    def within(self, seconds: float, run: Callable[[], bool]) -> None:
        """Have a run stop, and save, once so many seconds are over.

        ``run`` returns whether it came to its end. Where it was stopped by somebody else, all is.
        """
        with self.stop_after(seconds) as asked:
            if not run() and not asked.is_set():
                sys.exit("stopped, and saved; nothing further is begun.")

    @contextlib.contextmanager
    def stop_after(self, seconds: float) -> Iterator[threading.Event]:
        """Ask the run in the body to stop, and save, once so many seconds are over.

        By the signal that a scheduler would send: every stage of training answers it between two
        steps. The event says whether it has been asked to.
        """
        over, asked = threading.Event(), threading.Event()

        def ask() -> None:
            wait = max(seconds, 1.0)
            while not over.wait(wait):  # again and again: before its first step no run listens
                asked.set()
                os.kill(os.getpid(), signal.SIGTERM)
                wait = 2.0

        def unheard(signum: int, _: Any) -> None:
            """Where no run listens, what is asked here must not end everything."""
            if not asked.is_set():
                sys.exit(128 + signum)

        before = signal.signal(signal.SIGTERM, unheard)
        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        try:
            yield asked
        finally:
            over.set()
            asking.join()
            signal.signal(signal.SIGTERM, before)


# --- what is taken away -----------------------------------------------------------------------


class Report:
    """``results.json``, ``metrics.jsonl``, ``curves.png``, ``transcripts.jsonl``; after each part.

    Args:
        out: where they go.
        setting: whatever the rows depend on.
        clock: the command's.
    """

    def __init__(self, out: Path, setting: Mapping[str, Any], clock: Clock):
        self.out, self.clock, self.setting = out, clock, dict(setting)
        self.rows: list[dict[str, Any]] = []
        self.failures: list[str] = []
        self.runs: dict[str, list[dict[str, Any]]] = {}
        self.said: list[dict[str, Any]] = []
        out.mkdir(parents=True, exist_ok=True)

    def part(self, what: str, run: Callable[[], Any]) -> bool:
        """Run a part; a failure is written down and leaves the others their turn."""
        print(f"--- {what}, {self.clock.left:.0f} s left", flush=True)
        began, failed = time.perf_counter(), False
        try:
            run()
        except Exception:
            failed = True
            self.failures.append(f"{what}\n{traceback.format_exc()}")
            print(self.failures[-1], flush=True)
        print(f"--- {what} took {time.perf_counter() - began:.0f} s", flush=True)
        self.write()
        return not failed

    def judge(self, recipe: Recipe, way: str, seed: int, folder: Path, seconds: float) -> None:
        """Rows of what a run has made."""
        metrics = read_metrics(folder / "metrics.jsonl")
        steps = max((line["step"] for line in metrics), default=0)
        head = {"recipe": recipe.name, "way": way, "seed": seed, "steps": steps}
        tail: dict[str, Any] = {"seconds": seconds}
        for name in ("generate_s", "train_s", "generate_tokens_per_s", "tokens_per_s"):
            found = [line[name] for line in metrics if name in line]
            if found:
                tail[name] = statistics.median(found)
        began = time.perf_counter()
        for found in figures(recipe, folder):
            self.rows.append(head | found | tail)
            print("  ".join(f"{k} {_shown(v)}" for k, v in self.rows[-1].items()), flush=True)
        print(f"(judged in {time.perf_counter() - began:.0f} s)", flush=True)
        name = f"{recipe.name} {way} {seed}"
        self.runs[name] = metrics
        self.said += _transcripts(name, folder)

    def table(self) -> None:
        """What matters most, in the 80 columns of a console; ``results.json`` has the rest."""
        names = ("way", "seed", "steps", "kind", "greedy", "pass@1", "pass@4", "format")
        rows = [{name: row[name] for name in names if name in row} for row in self.rows]
        with Progress(1) as progress:
            progress.console.print(summary_table(rows))

    def write(self) -> None:
        """Everything so far."""
        device = jax.devices()[0].device_kind
        found = {"setting": self.setting, "device": device, "jax": jax.__version__}
        found |= {"seconds": self.clock.seconds - self.clock.left, "rows": self.rows}
        write_json(self.out / "results.json", found | {"failures": self.failures})
        lines = ({"run": name} | line for name, own in self.runs.items() for line in own)
        write_json_lines(self.out / "metrics.jsonl", lines)
        write_json_lines(self.out / "transcripts.jsonl", self.said)
        reinforced = {
            name: own for name, own in self.runs.items() if any("reward" in line for line in own)
        }
        if reinforced:
            plot_runs(reinforced, self.out / "curves.png")


def _shown(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _transcripts(name: str, folder: Path) -> Iterator[dict[str, Any]]:
    """The first completions of the first, the middle and the last step."""
    path = folder / "completions.jsonl"
    if not path.exists():
        return
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    last = max((line["step"] for line in lines), default=0)
    for step in sorted({1, (last + 1) // 2, last}):
        own = [line for line in lines if line["step"] == step]
        yield from ({"run": name} | line for line in own[:: max(1, len(own) // 12)])


# --- questions --------------------------------------------------------------------------------


def mixed(sources: Mapping[str, str], each: int) -> tuple[Task, ...]:
    """Questions of several sources in turns, as many of each; ``kind`` is the name of the source.

    One seed for all runs: which questions there are does not depend on the seed of a run, whose
    own is that of their order.
    """
    lists = []
    for kind, source in sources.items():
        tasks = open_tasks(source, size=each, seed=0)
        lists.append([t._replace(fields={**t.fields, "kind": kind}) for t in tasks])
    return tuple(task for row in zip(*lists, strict=False) for task in row)
