"""Group Relative Policy Optimization (DeepSeekMath section 4.1; R1 section 2.1).

A step:

1. The policy answers P questions G times each, by our own engine.
2. Rules reward the answers; a completion's advantage is its reward above its group's mean.
3. The completions, in minibatches, each make one ordinary training step, ``epochs`` times (mu).

The state is that of every training step; the reference policy, where the objective has a KL term,
is part of the optimizer's.
"""

import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float

from deepseek_jax import distributed, sharding
from deepseek_jax.checkpoint import claim_run_directory
from deepseek_jax.config import ModelConfig
from deepseek_jax.convert.sidecars import copy_sidecars
from deepseek_jax.data.chat import ChatTemplate
from deepseek_jax.data.prompts import Prompter, PromptStyle
from deepseek_jax.data.tasks import (
    MixedStream,
    Split,
    Task,
    TaskStream,
    open_tasks,
    read_jsonl,
    split,
)
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.evaluate import solve
from deepseek_jax.generate import Engine, EngineConfig, Sampling
from deepseek_jax.model.transformer import DeepSeekV3
from deepseek_jax.report import LossMonitor, Progress, plot_rewards, read_metrics
from deepseek_jax.rewards import RewardSum, Term
from deepseek_jax.rewards.verifiers import verifier
from deepseek_jax.train.logprobs import make_scorer, policy_output
from deepseek_jax.train.loop import (
    LoopConfig,
    OpenRun,
    divide_batch,
    jit_step,
    stop_requests,
    stopped_at,
)
from deepseek_jax.train.losses import LossParts
from deepseek_jax.train.objective import ObjectiveConfig, StepTotals, policy_loss, step_totals
from deepseek_jax.train.optim import (
    OptimConfig,
    bias_speed,
    constant_rate,
    keep_reference,
    learning_rate,
    make_optimizer,
    reference_params,
    refreshed_reference,
)
from deepseek_jax.train.reward_terms import RewardConfig
from deepseek_jax.train.rollout import (
    Collected,
    CompletionLog,
    RolloutConfig,
    Sampler,
    to_rows,
    transcript,
)
from deepseek_jax.train.run import (
    MAY_CHANGE,
    RunConfig,
    check_vocabulary,
    first_state,
    identity,
    load_weights,
    model_of,
    open_run,
)
from deepseek_jax.train.sft import in_mtp
from deepseek_jax.train.step import (
    LossFn,
    Metrics,
    abstract_state,
    make_train_step,
)
from deepseek_jax.types import Params, Rollout, TrainState, UserError

_MAY_CHANGE = (*MAY_CHANGE, "show_every", "eval_tasks", "eval_samples", "rollout.slots")

_ON_POLICY = (
    "about the loss: with one update per rollout every ratio of probabilities is 1 and the "
    "advantages of a group sum to 0, so a loss near 0 is right (the gradient is not 0); watch "
    "the reward."
)

GRPO_OPTIM = constant_rate(3e-6)  # R1-Zero's


@dataclass(frozen=True)
class GrpoConfig(RunConfig):
    """A run of reinforcement learning. ``loop.batch_size`` completions make an optimizer step."""

    stage: ClassVar[str] = "grpo"
    out: Path = Path("out/grpo")
    tasks: str = ""
    """JSON lines with `prompt` and `answer`, or tasks to generate: add:3, rg:chain_sum."""
    num_tasks: int = 10_000
    """Tasks to generate."""
    task_seed: int = 0
    """Of what is generated, and of the order."""
    held_out_fraction: float = 0.05
    """Share of the tasks kept for evaluation, chosen by content."""
    general: Path | None = None
    """Further prompts, JSON lines with `prompt`, that have no right answer: judged by
    ``reward_model`` (R1 section 2.3.4)."""
    general_share: float = 0.5
    """Their share of the questions."""
    prompt_style: PromptStyle = "r1_zero"
    rewards: RewardConfig = field(default_factory=RewardConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    epochs: int = 1
    """mu: passes over the completions of a step."""
    refresh_every: int = 400
    """Steps after which the policy becomes the reference; 0: never. R1's 400 (appendix B) are
    updates, as a step is here; where a step makes several, divide by their number."""
    eval_tasks: int = 128
    """Held-out tasks of an evaluation."""
    eval_samples: int = 4
    """k of pass@k: attempts at each, drawn as in training; and one that is greedy."""
    show_every: int = 10
    """Steps between two transcripts on the console."""
    loop: LoopConfig = field(
        default_factory=lambda: LoopConfig(batch_size=512, eval_every=50, save_every=50)
    )
    optim: OptimConfig = GRPO_OPTIM

    def __post_init__(self) -> None:
        """Refuse what leaves nothing to learn from, or something over."""
        if not self.tasks and not self.resume:  # a resumed run has its own
            raise UserError("name the questions with --tasks: a .jsonl file, add:3, rg:chain_sum.")
        if min(self.epochs, self.eval_tasks, self.eval_samples, self.show_every) < 1:
            raise UserError("epochs, eval_tasks, eval_samples and show_every must be at least 1.")
        if not 0 < self.general_share < 1:
            raise UserError(f"general_share={self.general_share} must lie between 0 and 1.")
        size, rows = self.loop.batch_size, self.rollout.rows
        if rows % size:
            raise UserError(
                f"prompts={self.rollout.prompts} times group_size={self.rollout.group_size} are "
                f"{rows} completions, which batch_size={size} does not divide."
            )
        if self.loop.first_batch_size is not None:
            raise UserError("GRPO has no batch-size ramp; leave first_batch_size out.")

    @property
    def minibatches(self) -> int:
        """Optimizer steps in one pass over the completions of a step."""
        return self.rollout.rows // self.loop.batch_size

    @property
    def updates(self) -> int:
        """Optimizer steps of the run."""
        return self.loop.total_steps * self.epochs * self.minibatches


class GrpoResult(NamedTuple):
    """What a finished run has to show."""

    state: TrainState
    before: dict[str, float]
    """Held-out figures of the weights it began with; empty if the run was continued."""
    after: dict[str, float]


def grpo(config: GrpoConfig, terms: Sequence[Term] | None = None) -> GrpoResult | None:
    """Run, or continue, reinforcement learning; None if it was interrupted (and saved).

    Leaves in ``config.out`` what fine-tuning does, with ``completions.jsonl`` and ``rewards.png``.

    Args:
        config: of the run.
        terms: rewards instead of those that ``config.rewards`` names; one is named "accuracy".

    Raises:
        UserError: for bad input, see ``types.UserError``.
    """
    source = config.out if config.resume else config.init
    if source is None:
        raise UserError("GRPO starts from a policy: name a run or a folder with --init.")
    model_config = model_of(source)
    mesh = sharding.make_mesh(config.mesh)
    config.parallel.check_rows(config.loop.rows // sharding.batch_shards(mesh))
    tokenizer = Tokenizer.load(source / "tokenizer.json")
    check_vocabulary(tokenizer, model_config)
    chat = config.prompt_style == "chat"
    template = ChatTemplate.load(source, tokenizer) if chat else None
    prompter = Prompter(config.prompt_style, tokenizer, template)
    found = open_tasks(config.tasks, size=config.num_tasks, seed=config.task_seed)
    tasks = split(found, config.held_out_fraction)
    general = [] if config.general is None else read_jsonl(config.general, answer_field=None)
    if terms is None:
        terms = config.rewards.terms(config.tasks, config.rollout.sampling.max_new_tokens)
        terms += config.rewards.learned(config.mesh, config.precision)
        if bool(general) != (config.rewards.reward_model is not None):
            raise UserError(
                "--general PROMPTS and --reward-model RUN go together: give both, or none."
            )
    learning_rate(config.optim, config.updates)  # complains now of what cannot be
    claim = functools.partial(
        claim_run_directory,
        config.out,
        identity(config, model_config),
        resume=config.resume,
        may_change=_MAY_CHANGE,
    )
    claim(dry_run=True)
    with jax.set_mesh(mesh):
        trainer = _Trainer(config, model_config, mesh, prompter, tasks, general, terms)
        with open_run(config, config.loop, trainer.abstract, trainer.fresh_state, claim) as opened:
            if jax.process_index() == 0:
                copy_sidecars(source, config.out)
            result = trainer.learn(opened)
    if result is not None and jax.process_index() == 0:
        plot_rewards(read_metrics(config.out / "metrics.jsonl"), config.out / "rewards.png")
    return result


# --- the algorithm ---------------------------------------------------------------------------


class _Trainer:
    """What is compiled and opened once for a run."""

    def __init__(
        self,
        config: GrpoConfig,
        model_config: ModelConfig,
        mesh: Mesh,
        prompter: Prompter,
        tasks: Split,
        general: list[Task],
        terms: Sequence[Term],
    ):
        self.config, self.mesh, self.prompter, self.tasks = config, mesh, prompter, tasks
        self.general = general
        self.model = DeepSeekV3(
            model_config, config.precision, config.remat, config.parallel, whole_rows=True
        )
        # The policy does without the MTP modules: they stay as they are.
        parts = [make_optimizer(config.optim, config.updates, in_mtp)]
        self.beta = config.objective.resolved().kl_coef
        self.tx = optax.chain(*parts, *([keep_reference()] if self.beta else []))
        self.abstract = abstract_state(self.model, self.tx, mesh)
        self.score = make_scorer(self.model, config.rollout.sampling.temperature)
        self.rewards, self.names = RewardSum(terms), [term.name for term in terms]
        self.verifier = verifier(config.rewards.verifier, config.tasks)
        self.longest = longest_prompt(prompter, [*tasks.train, *tasks.held_out, *general])
        limit = model_config.max_position_embeddings
        self.engine_length = self.longest + config.rollout.sampling.max_new_tokens
        if self.engine_length > limit:
            raise UserError(
                f"prompts of up to {self.longest} tokens and max_new_tokens="
                f"{config.rollout.sampling.max_new_tokens} exceed the model's context of {limit}; "
                "lower max_new_tokens, or put the questions more briefly (prompt_style)."
            )
        parts_T = 8 * sharding.sequence_shards(mesh)
        self.length = -(-(self.engine_length - 1) // parts_T) * parts_T
        self.feed = divide_batch(
            config.loop.rows,
            self.length,
            mesh,
            option=config.loop.rows_option,
            resume=config.resume,
        )
        self.lr = learning_rate(config.optim, config.updates)
        self.step = make_train_step(
            self.model,
            self.tx,
            make_loss(self.model, config),
            bias_speed(config.optim, config.updates),
            totals_of=rollout_totals,
        )

    def fresh_state(self, abstract: TrainState) -> TrainState:
        """The policy to begin with."""
        assert self.config.init is not None
        weights = load_weights(self.config.init, self.model, self.mesh)
        return first_state(*weights, self.tx, abstract)

    def learn(self, opened: OpenRun) -> GrpoResult | None:
        """All steps, and an evaluation before and after."""
        config, loop = self.config, self.config.loop
        state, saver, writer, restored = opened
        first = opened.step
        stream = self.stream()
        monitor = LossMonitor(max_consecutive=loop.max_skips, max_total=loop.max_total_skips)
        if restored is not None:
            stream.set_state(restored.data_states[0])
            monitor.load(restored.extra["monitor"])
        engine = self._engine(state)
        sampler = Sampler(config.rollout, engine, self.prompter, stream, self.rewards)
        train_step = jit_step(self.step, state, self.model)
        log = CompletionLog(config.out / "completions.jsonl", first)

        def save() -> None:
            extra = {"monitor": monitor.state()}
            data, key = stream.get_state(), jax.random.key(config.rollout.sampling.seed)
            saver.save(step, state, data_state=data, rng=key, extra=extra)

        def evaluate() -> dict[str, float]:
            figures = self.evaluate(engine, state)
            writer.write(step, figures)
            shown = ", ".join(f"{k.removeprefix('eval_')} {v:.3g}" for k, v in figures.items())
            progress.print(f"step {step}, held out: {shown}")
            return figures

        step = saved = first
        with stop_requests() as stop, Progress(loop.total_steps, initial=first) as progress:
            progress.print(self._announcement(first))
            before = {} if restored else evaluate()
            while step < loop.total_steps and not (stop() or distributed.stop_agreed(step)):
                engine.update(state.params, state.router_bias_LE)
                collected = sampler.collect(step)
                began, history = time.perf_counter(), []
                for minibatch in self.minibatches(collected, state, step):
                    # Ratios are clipped: a loss is no spike for being large.
                    state, metrics = train_step(state, minibatch, np.float32(np.inf))
                    history.append(metrics)
                line = collected.metrics | self._line(jax.device_get(history), state, began)
                step += 1
                if self.beta and config.refresh_every and step % config.refresh_every == 0:
                    state = refresh_reference(state)
                log.write(step, collected, self.names)
                skipped = bool(line["skipped"])
                writer.write(step, line | {"skipped": monitor.skipped + skipped})
                if monitor.observe(step, line["loss"], skipped=skipped):
                    progress.print(f"step {step}: an update was skipped, loss {line['loss']:.4g}")
                rate = line["generate_tokens_per_s"]
                progress.update(step, reward=line["reward"], tokens_per_s=rate)
                if step % config.show_every == 0 or step == first + 1:
                    progress.print(f"step {step}\n{transcript(collected.groups[0])}")
                if step == first + 1 and config.epochs * config.minibatches == 1:
                    progress.print(_ON_POLICY)
                due = loop.eval_every and step % loop.eval_every == 0
                if due and step < loop.total_steps:
                    evaluate()
                if step % loop.save_every == 0:
                    save()
                    saved = step
            if step > saved:
                save()
            saver.wait()
            if step < loop.total_steps:
                progress.print(stopped_at(step))
                return None
            return GrpoResult(state, before, evaluate())

    def minibatches(self, collected: Collected, state: TrainState, step: int) -> list[Rollout]:
        """A step's optimizer updates, in order, on the mesh and with all log-probabilities.

        A completion stays in its minibatch in every epoch, so what is computed of it stays too.
        """
        config, feed = self.config, self.feed
        scale = config.objective.resolved().scale
        whole = to_rows(collected, config.rollout, scale, self.length)
        rng = np.random.default_rng((config.rollout.sampling.seed, step))
        order_UAB = rng.permutation(config.rollout.rows).reshape(
            config.minibatches, -1, config.loop.rows
        )
        ready = []
        for rows_AB in order_UAB:
            micro = [feed.own(jax.tree.map(lambda x, r=r: x[r], whole)) for r in rows_AB]
            rollout = feed.place(micro)
            # With one update per rollout, the policy that is updated is the one that sampled.
            if config.epochs * config.minibatches > 1:
                old = self.score(state.params, state.router_bias_LE, rollout)
                rollout = rollout._replace(old_logp_BT=old.logp_ABT)
            if self.beta:
                # The reference is another policy: it chooses its experts itself.
                reference = reference_params(state.opt_state)
                own = rollout._replace(experts_BTLK=None)
                ref = self.score(reference, state.router_bias_LE, own)
                rollout = rollout._replace(ref_logp_BT=ref.logp_ABT)
            ready.append(rollout)
        return [ready[i] for _ in range(config.epochs) for i in rng.permutation(len(ready))]

    def stream(self) -> TaskStream | MixedStream:
        """The questions of the run, in order."""
        share, seed = self.config.general_share, self.config.task_seed
        reasoning = TaskStream(self.tasks.train, seed=seed)
        if not self.general:
            return reasoning
        return MixedStream([reasoning, TaskStream(self.general, seed=seed)], [1 - share, share])

    def evaluate(self, engine: Engine, state: TrainState) -> dict[str, float]:
        """On tasks held out: greedily, and k times at the temperature of training."""
        config, how = self.config, self.config.rollout.sampling
        engine.update(state.params, state.router_bias_LE)
        tasks = self.tasks.held_out[: config.eval_tasks]
        greedy = Sampling(how.max_new_tokens, temperature=0.0, top_p=1.0)
        once = solve(engine, self.prompter, tasks, self.verifier, greedy).scalars()
        k = config.eval_samples
        drawn = solve(engine, self.prompter, tasks, self.verifier, how, k).scalars()
        return {
            "eval_greedy": once["pass@1"],
            "eval_greedy_truncated": once["truncated"],
            **{f"eval_{name}": value for name, value in drawn.items()},
        }

    def _engine(self, state: TrainState) -> Engine:
        rollout = self.config.rollout
        sizes = EngineConfig(
            slots=rollout.slots,
            max_length=self.engine_length,
            lanes=min(rollout.slots, max(8, rollout.slots // rollout.group_size)),
            prefill_chunk=min(256, self.longest),
            keep_routing=rollout.keep_routing,
            keep_top_k=rollout.sampling.top_k if rollout.keep_sampling_mask else 0,
        )
        return Engine(self.model, state.params, state.router_bias_LE, sizes)

    def _line(self, history: list[Metrics], state: TrainState, began: float) -> dict[str, float]:
        """What a step's updates say, on average; how many were skipped is a sum."""
        seconds = time.perf_counter() - began
        names = [name for name in history[0] if name != "load_LE"]
        line = {name: float(np.mean([metrics[name] for metrics in history])) for name in names}
        tokens = self.length * self.config.rollout.rows * self.config.epochs
        return line | {
            "skipped": float(np.sum([metrics["skipped"] for metrics in history])),
            "train_s": seconds,
            "train_tokens_per_s": tokens / seconds,
            "learning_rate": float(self.lr(max(int(state.step) - 1, 0))),
        }

    def _announcement(self, step: int) -> str:
        config = self.config
        return (
            f"{config.rollout.prompts} questions x {config.rollout.group_size} completions a step, "
            f"{config.epochs * config.minibatches} updates; {len(self.tasks.train)} tasks, "
            f"{len(self.tasks.held_out)} held out; "
            + (f"resuming at step {step}" if step else f"output in {config.out}")
        )


def make_loss(model: DeepSeekV3, config: GrpoConfig) -> LossFn:
    """The objective on a ``Rollout``, for ``make_train_step``.

    No balance loss: it would pull at the policy where all rewards are equal.
    """
    how, objective = config.rollout.sampling, config.objective

    def loss_fn(
        params: Params, bias_LE: Array, rollout: Rollout, totals: StepTotals, step: Array
    ) -> tuple[Float[Array, ""], LossParts]:
        said = policy_output(
            model,
            params,
            bias_LE,
            rollout.batch,
            temperature=how.temperature,
            kept_BTX=rollout.kept_BTX,
            experts_BTLK=rollout.experts_BTLK,
        )
        loss, metrics = policy_loss(said.logp_BT, rollout, totals, objective, how.max_new_tokens)
        entropy = (said.entropy_BT * (rollout.batch.loss_weights_BT > 0)).sum()
        entropy = sharding.psum(entropy, "batch", "sequence") / jax.numpy.maximum(totals.tokens, 1)
        return loss, LossParts(metrics | {"entropy": entropy}, said.load_LE)

    return loss_fn


def rollout_totals(rollout: Rollout) -> StepTotals:
    """What the shares of a rollout's micro-batches are divided by. Per device."""
    return step_totals(rollout.batch.loss_weights_BT)


@functools.partial(jax.jit, donate_argnums=0)
def refresh_reference(state: TrainState) -> TrainState:
    """The policy as it is now becomes the reference (R1 appendix B)."""
    return state._replace(opt_state=refreshed_reference(state.opt_state, state.params))


def longest_prompt(prompter: Prompter, tasks: Sequence[Task]) -> int:
    """In tokens, of all tasks: every row has room for it, so that nothing is compiled twice."""
    return max(len(prompter.ids(task.prompt)) for task in tasks)
