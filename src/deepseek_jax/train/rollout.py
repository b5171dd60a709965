"""Rollouts: questions asked of the policy, its completions judged, and the rows to learn from."""

import dataclasses
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from deepseek_jax import distributed
from deepseek_jax.data.prompts import Prompter
from deepseek_jax.data.tasks import MixedStream, Task, TaskStream
from deepseek_jax.generate import Completion, Engine, Sampling, completion_text, text_request
from deepseek_jax.rewards import Completion as Said
from deepseek_jax.rewards import (
    RewardReport,
    RewardSum,
    Sample,
)
from deepseek_jax.rewards.total import term_means
from deepseek_jax.train.objective import Scale, group_advantages, has_spread
from deepseek_jax.types import Batch, Rollout, UserError


@dataclass(frozen=True)
class RolloutConfig:
    """How the policy is sampled; the numbers are R1-Zero's (section 2.1 and appendix B).

    But for the length: its completions have up to 32,768 tokens, later 65,536.
    """

    prompts: int = 32
    """P, questions per step."""
    group_size: int = 16
    """G, completions of each."""
    sampling: Sampling = field(default_factory=lambda: Sampling(1024, temperature=1.0, top_p=1.0))
    refills: int = 0
    """Dynamic sampling (DAPO section 3.2): ask further questions instead of those whose rewards
    are all equal, at most so many times a step; 0: off."""
    truncated: Literal["score", "fail", "mask"] = "score"
    """Completions cut off at ``max_new_tokens`` are scored as they are, get no reward above 0, or
    teach nothing (DAPO's overlong filtering)."""
    keep_routing: bool = False
    """Repeat the sampler's choices of experts in training (V3.2 section 3.1)."""
    keep_sampling_mask: bool = False
    """Train on the distribution that top-k, top-p and min-p left to the sampler (V3.2 section
    3.1)."""
    slots: int = 64
    """Completions generated at a time."""

    def __post_init__(self) -> None:
        """Refuse groups that teach nothing, and what the engine does not report."""
        how = self.sampling
        cut = how.top_p < 1 or how.min_p > 0
        checks = [
            (self.prompts < 1, f"prompts={self.prompts} must be at least 1."),
            (
                self.group_size < 2,
                f"group_size={self.group_size} must be at least 2: an advantage compares the "
                "completions of a prompt with one another.",
            ),
            (self.refills < 0, f"refills={self.refills} must not be negative (0 is off)."),
            (
                how.temperature == 0,
                "temperature=0 makes all completions of a prompt the same; choose one above 0.",
            ),
            (
                self.keep_sampling_mask and cut and not how.top_k,
                "keep_sampling_mask repeats for each token which ones the sampler could have "
                "drawn, top_k at most; sample with top_k above 0 beside top_p or min_p.",
            ),
        ]
        for failed, message in checks:
            if failed:
                raise UserError(message)

    @property
    def rows(self) -> int:
        """Completions of a step."""
        return self.prompts * self.group_size


class Group(NamedTuple):
    """A question and what the policy said to it, G times."""

    task: Task
    prompt: list[int]
    completions: list[Completion]
    samples: list[Sample]
    rewards_G: Float[np.ndarray, "G"]
    """Total, as learnt from."""
    terms_KG: Float[np.ndarray, "K G"]
    """Each reward's own, unweighted; NaN where it does not judge."""

    @property
    def spread(self) -> bool:
        """Whether there is anything to learn: equal rewards have no advantages."""
        return bool(has_spread(self.rewards_G[None])[0])


class Collected(NamedTuple):
    """A step's completions."""

    groups: list[Group]
    """P of them."""
    metrics: dict[str, float]
    """Over all that were asked, those left out by dynamic sampling too."""


class Sampler:
    """Asks questions, by an engine, and has the answers judged.

    All randomness comes from (seed, step, how many were asked before in this step), so where the
    stream of tasks is, is all the state there is.
    """

    def __init__(
        self,
        config: RolloutConfig,
        engine: Engine,
        prompter: Prompter,
        stream: TaskStream | MixedStream,
        rewards: RewardSum,
    ):
        self.config, self.engine, self.prompter = config, engine, prompter
        self.stream, self.rewards = stream, rewards

    def collect(self, step: int) -> Collected:
        """P groups; with ``refills``, as many as can be had of those that differ in reward."""
        config, began = self.config, time.perf_counter()
        groups: list[Group] = []
        equal: list[Group] = []
        reports: list[RewardReport] = []
        for _ in range(1 + config.refills):
            tasks = self.stream.take(config.prompts - len(groups))
            asked, report = self._ask(tasks, step, len(groups) + len(equal))
            reports.append(report)
            for group in asked:
                (groups if group.spread or not config.refills else equal).append(group)
            if len(groups) == config.prompts:
                break
        every = groups + equal
        # What is missing is filled with groups that teach nothing: sizes stay what is compiled for.
        groups = every[: config.prompts]
        return Collected(groups, self._metrics(every, reports, time.perf_counter() - began))

    def _ask(
        self, tasks: Sequence[Task], step: int, before: int
    ) -> tuple[list[Group], RewardReport]:
        config, tokenizer = self.config, self.prompter.tokenizer
        requests = []
        for i, task in enumerate(tasks):
            sampling = _seeded(config.sampling, step, before + i)
            ids = self.prompter.ids(task.prompt)
            requests.append(text_request(tokenizer, ids, sampling, samples=config.group_size))
        found = {(done.request, done.sample): done for done in self.engine.generate(requests)}
        completions, samples = [], []
        for i, task in enumerate(tasks):
            for j in range(config.group_size):
                done = found[i, j]
                text = completion_text(tokenizer, done)
                said = Said(text, len(done.tokens), done.finish == "length")
                completions.append(done)
                asked = self.prompter.text(task.prompt)
                samples.append(Sample(asked, said, task.answer, task.general))
        report = self._judge(samples)
        if config.truncated == "fail":
            cut_B = np.array([sample.completion.truncated for sample in samples])
            total_B = np.where(cut_B, np.minimum(report.total_B, 0.0), report.total_B)
            report = report._replace(total_B=total_B)
        groups = []
        for i, (task, request) in enumerate(zip(tasks, requests, strict=True)):
            own = slice(i * config.group_size, (i + 1) * config.group_size)
            groups.append(
                Group(
                    task,
                    list(request.prompt),
                    completions[own],
                    samples[own],
                    report.total_B[own],
                    report.rewards_KB[:, own],
                )
            )
        return groups, report

    def _judge(self, samples: list[Sample]) -> RewardReport:
        """By the first process: what is bounded in time may end otherwise in another."""

        def report() -> bytes:
            found = self.rewards(samples)
            values = (x.tolist() if isinstance(x, np.ndarray) else x for x in found)
            return json.dumps(list(values)).encode()

        total, each, raised, hung, names, error = json.loads(distributed.from_first(report))
        total_B, rewards_KB, raised_K, hung_K = map(np.array, (total, each, raised, hung))
        return RewardReport(total_B, rewards_KB, raised_K, hung_K, tuple(names), error)

    def _metrics(
        self, groups: list[Group], reports: list[RewardReport], seconds: float
    ) -> dict[str, float]:
        samples = [sample.completion for group in groups for sample in group.samples]
        rewards_PG = np.stack([group.rewards_G for group in groups])
        terms_KB = np.concatenate([group.terms_KG for group in groups], 1)
        tokens_B = np.array([said.num_tokens for said in samples])
        names = reports[0].names
        failed = sum(int((r.raised_K + r.hung_K).sum()) for r in reports)
        return {
            "reward": float(rewards_PG.mean()),
            **term_means(names, terms_KB),
            "reward_failures": float(failed),
            "reward_spread": float(rewards_PG.std(1).mean()),
            "groups_without_spread": float(1 - np.mean([group.spread for group in groups])),
            "groups_asked": float(len(groups)),
            "completion_tokens": float(tokens_B.mean()),
            "completion_tokens_max": float(tokens_B.max()),
            "truncated": float(np.mean([said.truncated for said in samples])),
            "generate_s": seconds,
            "generate_tokens_per_s": float(tokens_B.sum()) / seconds,
        }


def _seeded(sampling: Sampling, step: int, index: int) -> Sampling:
    entropy = np.random.SeedSequence((sampling.seed, step, index)).generate_state(1)[0]
    return dataclasses.replace(sampling, seed=int(entropy) >> 1)


def to_rows(collected: Collected, config: RolloutConfig, scale: Scale, length: int) -> Rollout:
    """One completion a row, its prompt before it; host arrays ``[P G, length]``, padded.

    Args:
        collected: the step's completions.
        config: which of them teach, and whether their routing is repeated.
        scale: of the advantages.
        length: positions of a row, at least those of the longest completion but one.
    """
    groups = collected.groups
    advantages_PG = group_advantages(np.stack([g.rewards_G for g in groups]), scale)
    N = len(groups) * config.group_size
    ids_NS = np.zeros((N, length + 1), np.int32)
    positions, segments = np.zeros((2, N, length), np.int32)
    weights, sampler = np.zeros((2, N, length), np.float32)
    first = groups[0].completions[0].experts_lTK
    experts = None
    if config.keep_routing:
        assert first is not None
        experts = np.full((N, length, first.shape[0], first.shape[2]), -1, np.int32)
    first = groups[0].completions[0].kept_TX
    kept = None if first is None else np.full((N, length, first.shape[1]), -1, np.int32)
    pairs = [(group, done) for group in groups for done in group.completions]
    for row, (group, done) in enumerate(pairs):
        ids = [*group.prompt, *done.tokens]
        own, used = slice(len(group.prompt) - 1, len(ids) - 1), len(ids) - 1
        ids_NS[row, : len(ids)] = ids
        positions[row, :used], segments[row, :used] = np.arange(used), 1
        sampler[row, own] = done.sampling_log_probs
        if kept is not None:
            assert done.kept_TX is not None
            kept[row, own] = done.kept_TX
        masked = config.truncated == "mask" and done.finish == "length"
        # A group that only fills the place of a better one does not count in means over rows.
        weights[row, own] = not masked and (group.spread or not config.refills)
        if experts is not None:
            assert done.experts_lTK is not None
            experts[row, :used] = np.moveaxis(done.experts_lTK, 0, 1)
    batch = Batch(ids_NS[:, :-1], ids_NS[:, 1:], weights, positions, segments)
    advantages_N = np.asarray(advantages_PG, np.float32).reshape(-1)
    return Rollout(
        batch, advantages_N, sampler_logp_BT=sampler, kept_BTX=kept, experts_BTLK=experts
    )


class CompletionLog:
    """Every completion with its rewards, as JSON lines; written by the first process.

    Args:
        path: the file.
        resumed: the step that the run continues from. Lines of later steps, which will be made
            again, are dropped, and so is a last line that was cut off.
    """

    def __init__(self, path: Path, resumed: int):
        self._path = path
        if jax.process_index() == 0:
            lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
            kept = [line + "\n" for line in lines if json.loads(line)["step"] <= resumed]
            path.write_text("".join(kept), encoding="utf-8")

    def write(self, step: int, collected: Collected, names: Sequence[str]) -> None:
        """The completions that ``step`` learns from."""
        if jax.process_index() != 0:
            return
        with self._path.open("a", encoding="utf-8") as file:
            for group in collected.groups:
                for i, sample in enumerate(group.samples):
                    terms = zip(names, group.terms_KG[:, i].tolist(), strict=True)
                    line: dict[str, Any] = {
                        "step": step,
                        "prompt": group.task.prompt,
                        "completion": sample.completion.text,
                        "answer": group.task.answer,
                        "reward": float(group.rewards_G[i]),
                        "rewards": {k: value for k, value in terms if not np.isnan(value)},
                        "tokens": sample.completion.num_tokens,
                        "truncated": sample.completion.truncated,
                    }
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")


def transcript(group: Group) -> str:
    """The best and the worst answer to a question, for the console."""
    order = np.argsort(-group.rewards_G, kind="stable")
    chosen = dict.fromkeys((int(order[0]), int(order[-1])))
    right = "" if group.task.general else f"    [answer {group.task.answer}]"
    lines = [group.samples[0].prompt + right]
    for i in chosen:
        said = group.samples[i].completion
        cut = " (cut off)" if said.truncated else ""
        lines.append(f"  reward {group.rewards_G[i]:.3g}: {said.text}{cut}")
    return "\n".join(lines)
