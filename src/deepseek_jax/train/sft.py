"""Supervised fine-tuning on conversations (V3 section 5.1; R1 section 2.3.1)."""

import dataclasses
import functools
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import jax
from jax.sharding import Mesh

from deepseek_jax import sharding
from deepseek_jax.checkpoint import claim_run_directory
from deepseek_jax.checkpoint.files import local_path
from deepseek_jax.checkpoint.run_directory import read_run
from deepseek_jax.config import ModelConfig
from deepseek_jax.convert.sidecars import copy_sidecars
from deepseek_jax.data import chat
from deepseek_jax.data.chat import ChatTemplate
from deepseek_jax.data.sft import ROW, ConversationConfig, SftData, Survey, epoch_steps
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.generate import Sampling, complete
from deepseek_jax.model.transformer import DeepSeekV3
from deepseek_jax.report import Progress, show_rows, summary_table
from deepseek_jax.train.distill import DistillConfig, distillation_loss, with_teacher
from deepseek_jax.train.loop import Evaluation, Outcome, divide_batch
from deepseek_jax.train.lora import LoraConfig, adapter_of, place_adapter
from deepseek_jax.train.losses import pretrain_loss
from deepseek_jax.train.optim import OptimConfig, learning_rate, make_optimizer, mtp_weight
from deepseek_jax.train.run import (
    MAY_CHANGE,
    Course,
    RunConfig,
    Trainee,
    all_of,
    check_vocabulary,
    draw,
    first_state,
    identity,
    load_weights,
    model_of,
    run,
)
from deepseek_jax.types import Params, TrainState, UserError

_MAY_CHANGE = (*MAY_CHANGE, "samples", "sample_tokens", "inspect")

# V3 section 5.1: two epochs, and a cosine from 5e-6 to 1e-6. Lambda of the MTP loss as at the end
# of pretraining.
SFT_EPOCHS = 2.0
SFT_OPTIM = OptimConfig(
    peak_lr=5e-6,
    min_lr=1e-6,
    final_lr=1e-6,
    warmup_steps=0,
    constant_until=0.0,
    cosine_until=1.0,
    min_until=1.0,
    mtp_weight=0.1,
    mtp_weight_final=0.1,
)


@dataclass(frozen=True)
class SftConfig(RunConfig):
    """A run of supervised fine-tuning."""

    stage: ClassVar[str] = "sft"
    out: Path = Path("out/sft")
    inspect: bool = False
    """Show the first packed rows, token by token, and do nothing else."""
    epochs: float | None = None
    """Passes over the conversations, instead of ``steps``; neither: 2, as V3's."""
    mtp: bool = True
    """Train the MTP modules too; else they stay as they are."""
    samples: int = 2
    """Prompts held out that the model answers at every evaluation."""
    sample_tokens: int = 256
    conversations: ConversationConfig = field(default_factory=ConversationConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    optim: OptimConfig = SFT_OPTIM


class SftResult(NamedTuple):
    """What a finished run has to show."""

    outcome: Outcome
    evaluation: Evaluation
    """On everything held out."""
    params: Params
    """The whole model's."""


def sft(config: SftConfig) -> SftResult | None:
    """Run, or continue, a fine-tuning; None if it was interrupted (and saved).

    Leaves in ``config.out`` what pretraining does, with ``samples.jsonl`` for its text, and the
    chat template: the next stage, generation and export need nothing else.

    Raises:
        UserError: for bad input, see ``types.UserError``.
    """
    started = time.perf_counter()
    source = config.out if config.resume else config.init
    if source is None:
        raise UserError("fine-tuning starts from weights: name a run or a folder with --init.")
    if not (config.resume or config.epochs is None or config.loop.steps is None):
        raise UserError(
            f"epochs={config.epochs:g} and steps={config.loop.steps} both say how long the run is; "
            "give one of them."
        )
    config.lora.check(config.remat)
    model_config = model_of(source)
    config = _with_rows(config, model_config)
    data_config = config.conversations
    mesh = sharding.make_mesh(config.mesh)
    feed = divide_batch(
        config.loop.rows,
        data_config.row_tokens,
        mesh,
        option=config.loop.rows_option,
        resume=config.resume,
    )
    config.parallel.check_rows(config.loop.rows // sharding.batch_shards(mesh))
    tokenizer = Tokenizer.load(source / "tokenizer.json")
    check_vocabulary(tokenizer, model_config)
    template = ChatTemplate.load(source, tokenizer)
    data = SftData(data_config, tokenizer, template)
    survey = None if config.resume else data.survey()
    if config.inspect:
        _inspect(data, tokenizer, survey)
        return None
    config = _with_steps(config, survey)
    if config.init is not None:  # a LoRA run is nothing without it, wherever it is read from
        config = dataclasses.replace(config, init=config.init.absolute())
    learning_rate(config.schedule, config.loop.total_steps)  # complains now of what cannot be
    claim = functools.partial(
        claim_run_directory,
        config.out,
        identity(config, model_config),
        resume=config.resume,
        may_change=_MAY_CHANGE,
    )
    claim(dry_run=True)
    model = DeepSeekV3(model_config, config.precision, config.remat, config.parallel)
    tx = make_optimizer(config.schedule, config.loop.total_steps, None if config.mtp else in_mtp)
    lam = mtp_weight(config.schedule, config.loop.total_steps)

    def loss_fn(params, router_bias_LE, batch, totals, step, **frozen):
        weight = lam(step) if config.mtp else None
        params = trainee.whole(params, **frozen)
        if teacher is None:
            return pretrain_loss(model, params, router_bias_LE, batch, totals, weight)
        taught_by = (teacher, frozen["teacher"], frozen["teacher_bias"], config.distill)
        return distillation_loss(model, params, router_bias_LE, batch, totals, weight, *taught_by)

    def claim_all() -> None:
        claim()
        if jax.process_index() == 0:
            _write_files(config, source, tokenizer, template)
        with Progress(config.loop.total_steps) as console:
            console.print(str(survey) if survey else "continuing on the same conversations")

    with jax.set_mesh(mesh):
        start, trainee = _start(config, model, mesh)
        teacher = None
        if config.distill.teacher is not None:
            trainee, teacher = with_teacher(config, config.distill, trainee, mesh)
        answers = Answers(config, model_config, trainee, tokenizer, template, data)
        course = Course(
            trainee=trainee,
            tx=tx,
            loss_fn=loss_fn,
            open_stream=data.train_batches,
            streams=data_config.streams,
            eval_batches=data.eval_batches,
            seq_len=data_config.row_tokens,
            fresh_state=functools.partial(start, tx),
            claim=claim_all,
            sample=answers if config.samples else None,
        )
        done = run(config, course, mesh, feed, started)
        return done and _finish(config, trainee, answers, *done)


def in_mtp(params: Params) -> Any:
    """True for the leaves of the MTP modules."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[0].key.startswith("mtp"), params)


def _with_rows(config: SftConfig, model: ModelConfig) -> SftConfig:
    """With rows as long as is asked, or as the model's context lets them be."""
    context, talks = model.max_position_embeddings, config.conversations
    seq_len = talks.seq_len or min(ROW, context)
    if seq_len > context:
        raise UserError(f"seq_len={seq_len} exceeds the model's context of {context}; lower it.")
    return dataclasses.replace(config, conversations=dataclasses.replace(talks, seq_len=seq_len))


def _with_steps(config: SftConfig, survey: Survey | None) -> SftConfig:
    """With the steps that the epochs make, or made when the run was started."""
    if config.loop.steps is not None:
        return config
    if survey is None:
        steps = int(read_run(local_path(config.out))["loop"]["steps"])
    else:
        epochs = SFT_EPOCHS if config.epochs is None else config.epochs
        steps = epoch_steps(survey.rows, epochs, config.loop.batch_size)
    return dataclasses.replace(config, loop=dataclasses.replace(config.loop, steps=steps))


def _start(
    config: SftConfig, model: DeepSeekV3, mesh: Mesh
) -> tuple[Callable[[Any, TrainState], TrainState], Trainee]:
    """What is trained, and how its first state is made, which a run that is resumed skips."""
    init = config.init
    assert init is not None

    def loaded(tx: Any, abstract: TrainState) -> TrainState:
        return first_state(*load_weights(init, model, mesh), tx, abstract)

    if not config.lora.lora_rank:
        return loaded, all_of(model, mesh)
    base, bias_LE = load_weights(init, model, mesh, fp8=config.lora.lora_base == "fp8")

    def fresh(tx: Any, abstract: TrainState) -> TrainState:
        where = jax.tree.map(lambda x: x.sharding, abstract.params)
        adapter = place_adapter(model, config.lora, where, config.loop.init_seed)
        return first_state(adapter, bias_LE, tx, abstract)

    return fresh, adapter_of(model, config.lora, base, mesh)


def _write_files(
    config: SftConfig, source: Path, tokenizer: Tokenizer, template: ChatTemplate
) -> None:
    tokenizer.save(config.out / "tokenizer.json")
    copy_sidecars(source, config.out)
    (config.out / chat.FILE).write_text(template.source, encoding="utf-8")


def _inspect(data: SftData, tokenizer: Tokenizer, survey: Survey | None) -> None:
    batch = next(data.train_batches(2))
    with Progress(1) as console:
        console.console.print(show_rows(batch, lambda index: tokenizer.decode([index])))
        if survey is not None:
            console.print(str(survey))


class Answers:
    """What the model says to the first prompts held out; greedy. Kept in ``samples.jsonl``."""

    def __init__(
        self,
        config: SftConfig,
        model_config: ModelConfig,
        trainee: Trainee,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        data: SftData,
    ):
        self._path = config.out / "samples.jsonl"
        self._trainee, self._tokenizer = trainee, tokenizer
        self._model = trainee.model
        self._tokens = config.sample_tokens
        room = model_config.max_position_embeddings - config.sample_tokens
        prompts = ((p, template.prompt_ids(p)) for p in data.prompts(config.samples))
        self._prompts = [(prompt[-1].content, ids) for prompt, ids in prompts if len(ids) <= room]

    def __call__(self, state: TrainState, step: int) -> str:
        """The answers at this step, for the console."""
        if not self._prompts:
            return ""
        params = jax.jit(self._trainee.merged)(state.params, **self._trainee.frozen)
        shown, lines = [], self._earlier(step)
        said_all = complete(
            self._model,
            params,
            state.router_bias_LE,
            self._tokenizer,
            [ids for _, ids in self._prompts],
            Sampling(self._tokens, temperature=0.0),
        )
        for (asked, _), said in zip(self._prompts, said_all, strict=True):
            shown.append(f"> {asked}\n{said}")
            line = {"step": step, "prompt": asked, "completion": said}
            lines.append(json.dumps(line, ensure_ascii=False) + "\n")
        if jax.process_index() == 0:
            self._path.write_text("".join(lines), encoding="utf-8")
        return "\n".join(shown)

    def _earlier(self, step: int) -> list[str]:
        """Lines of steps before this one; a run that was killed makes the later ones again."""
        if not self._path.exists():
            return []
        lines = self._path.read_text(encoding="utf-8").splitlines(keepends=True)
        return [line for line in lines if json.loads(line)["step"] < step]


def _finish(
    config: SftConfig,
    trainee: Trainee,
    answers: Answers,
    outcome: Outcome,
    evaluation: Evaluation,
) -> SftResult:
    """Pictures and last answers."""
    if jax.process_index() == 0:
        draw(config.out, outcome, {})
    text = answers(outcome.state, outcome.step)
    with Progress(config.loop.total_steps) as console:
        row = {"held-out conversations": config.out.name, "nats per token": evaluation.loss}
        console.console.print(summary_table([row]))
        console.print(f"{text}\n\npictures: {config.out / 'loss.png'}")
    merged = jax.jit(trainee.merged)(outcome.state.params, **trainee.frozen)
    return SftResult(outcome, evaluation, merged)
