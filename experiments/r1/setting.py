"""Sizes of the chain, and what its stages share."""

import dataclasses
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepseek_jax.config import FLOAT32, ModelConfig
from deepseek_jax.data.pipeline import DataConfig
from deepseek_jax.data.sft import ConversationConfig
from deepseek_jax.generate import Sampling
from deepseek_jax.presets import preset
from deepseek_jax.train.grpo import GRPO_OPTIM, GrpoConfig
from deepseek_jax.train.loop import LoopConfig
from deepseek_jax.train.objective import ObjectiveConfig
from deepseek_jax.train.optim import OptimConfig
from deepseek_jax.train.pretrain import PretrainConfig
from deepseek_jax.train.reward_terms import RewardConfig
from deepseek_jax.train.rollout import RolloutConfig
from deepseek_jax.train.run import StageConfig
from deepseek_jax.train.sft import SFT_OPTIM, SftConfig
from experiments.r1.text import HELD_OUT

MODEL = preset("tiny").replace(vocab_size=266, num_nextn_predict_layers=0)  # bytes, no merges
STUDENT = MODEL.replace(
    hidden_size=96,
    q_lora_rank=48,
    kv_lora_rank=48,
    qk_nope_head_dim=32,
    v_head_dim=48,
    intermediate_size=256,
    moe_intermediate_size=64,
    n_routed_experts=8,
)


@dataclass(frozen=True)
class Setting:
    """One chain; with ``quick`` one of minutes, which shows that it runs and nothing else."""

    out: Path = Path("out/r1")
    seed: int = 0
    """Of weights, order and sampling; which prompts are held out does not change."""
    quick: bool = False
    """One-digit sums, a smaller model, few steps."""
    digits: int = 2
    pages: int = 24_000
    base_steps: int = 600
    zero_steps: int = 40
    demonstrations: int = 200
    cold_epochs: int = 10
    tuning_epochs: int = 2
    """Of SFT on a model's own answers, stages 4 and 6."""
    tuning_held_out: float = 0.02
    """Share of conversations that SFT evaluates on; of a quick chain's few dozen it is none."""
    reasoning_steps: int = 25
    sampled_tasks: int = 1000
    """Training sums that stages 4 and 6 ask, ``samples`` times each."""
    samples: int = 4
    replies: int = 500
    """General conversations of stage 4, written by the same rule as the base's."""
    scenario_steps: int = 20
    prompts: int = 24
    group_size: int = 8
    judged: int = 200
    """Held-out sums of the table; five answers to each."""

    def scaled(self) -> "Setting":
        """What ``quick`` asks for."""
        small = {"pages": 2000, "base_steps": 250, "demonstrations": 80, "sampled_tasks": 40}
        small |= {"cold_epochs": 60, "replies": 100, "tuning_epochs": 20}
        small |= {"tuning_held_out": 0.2}
        few = dict.fromkeys(("zero_steps", "reasoning_steps", "scenario_steps"), 2)
        return dataclasses.replace(self, digits=1, **small, **few) if self.quick else self

    @property
    def model(self) -> ModelConfig:
        """The policy's."""
        return STUDENT if self.quick else MODEL

    @property
    def max_new_tokens(self) -> int:
        """The longest demonstration, with room to ramble."""
        return 48 + 28 * self.digits

    def file(self, name: str) -> Path:
        """A data file of the chain."""
        return self.out / "data" / f"{name}.jsonl"


def pretraining(s: Setting, name: str, model: ModelConfig) -> PretrainConfig:
    """The base's text, from random weights."""
    return PretrainConfig(
        out=s.out / name,
        model=model,
        precision=FLOAT32,
        data=DataConfig(
            source=(str(s.file("text")),),
            seq_len=256,
            fim_rate=0.0,
            mask_documents=True,
            held_out_fraction=0.02,
            seed=s.seed,
        ),
        loop=LoopConfig(
            steps=s.base_steps, batch_size=16, eval_every=0, save_every=100, init_seed=s.seed
        ),
        optim=OptimConfig(peak_lr=3e-3, min_lr=3e-4, final_lr=3e-4),
        prompt="47+85=",
        sample_tokens=60,
    )


def tuning(
    s: Setting, name: str, init: str, data: tuple[str, ...], epochs: float, **changes: Any
) -> SftConfig:
    """SFT from the run ``init`` on files of conversations; cosine to a tenth, as R1's."""
    return SftConfig(
        out=s.out / name,
        init=s.out / init,
        precision=FLOAT32,
        epochs=float(epochs),
        conversations=ConversationConfig(
            data=tuple(str(s.file(each)) for each in data),
            seq_len=256,
            data_seed=s.seed,
            held_out_fraction=s.tuning_held_out,
        ),
        loop=LoopConfig(batch_size=16, eval_every=0, save_every=50),
        optim=dataclasses.replace(SFT_OPTIM, peak_lr=2e-3, min_lr=2e-4, final_lr=2e-4),
        sample_tokens=s.max_new_tokens,
        **changes,
    )


def reinforcing(
    s: Setting,
    name: str,
    init: str,
    steps: int,
    rewards: RewardConfig,
    temperature: float = 1.0,
    peak_lr: float = 5e-4,
    **changes: Any,
) -> GrpoConfig:
    """GRPO from the run ``init`` on the training sums; no KL term, one update a rollout.

    What has been fine-tuned wants a lower rate than the base: see docs/r1.md.
    """
    rows = s.prompts * s.group_size
    return GrpoConfig(
        out=s.out / name,
        init=s.out / init,
        precision=FLOAT32,
        tasks=str(s.file("sums")),
        task_seed=s.seed,
        held_out_fraction=HELD_OUT,
        rewards=dataclasses.replace(rewards, verifier="numeric"),
        rollout=RolloutConfig(
            prompts=s.prompts,
            group_size=s.group_size,
            sampling=Sampling(s.max_new_tokens, temperature=temperature, top_p=1.0, seed=s.seed),
            slots=rows,
        ),
        objective=ObjectiveConfig(kl_coef=0.0),
        loop=LoopConfig(steps=steps, batch_size=rows, eval_every=0, save_every=10),
        optim=dataclasses.replace(
            GRPO_OPTIM,
            constant_until=0.0,
            peak_lr=peak_lr,
            min_lr=peak_lr / 10,
            final_lr=peak_lr / 10,
        ),
        eval_tasks=32,
        eval_samples=1,
        show_every=20,
        **changes,
    )


class Stopped(Exception):
    """A stage was asked to stop, and has saved."""


def saved(run: Path) -> bool:
    """Whether there is a checkpoint to go on from."""
    return any(path.name.isdecimal() for path in (run / "checkpoints").glob("*"))


def learn(stage: Callable[[Any], Any], config: StageConfig) -> None:
    """Run a stage, or continue the one that is there; a run without a checkpoint begins anew.

    Raises:
        Stopped: by a signal; the same call continues it.
    """
    if saved(config.out):
        config = dataclasses.replace(config, resume=True)
    else:
        shutil.rmtree(config.out, ignore_errors=True)
    if stage(config) is None:
        raise Stopped(config.out.name)
