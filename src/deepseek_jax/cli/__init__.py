"""``deepseek-jax``: the command line. Every option is a field of a dataclass."""

import contextlib
import errno
import hashlib
import os
import platform
import re
import select
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Generic, Literal

import jax
import tyro
from jax.experimental.compilation_cache import compilation_cache
from rich.console import Console

from deepseek_jax import distributed
from deepseek_jax.checkpoint.run_directory import read_run
from deepseek_jax.cli.evaluate import EvalConfig, evaluate
from deepseek_jax.cli.generate import ChatConfig, GenerateConfig, chat, generate
from deepseek_jax.cli.harness import HarnessConfig, harness
from deepseek_jax.cli.rejection import RejectionSampleConfig, rejection_sample
from deepseek_jax.config import ModelConfig
from deepseek_jax.convert import check_hf, convert_to_hf, convert_to_orbax
from deepseek_jax.convert.to_hf import SHARD_SIZE
from deepseek_jax.lifeline import say
from deepseek_jax.plan.command import PlanConfig, plan
from deepseek_jax.presets import PRESETS, preset
from deepseek_jax.train.grpo import GrpoConfig, grpo
from deepseek_jax.train.pretrain import PretrainConfig, pretrain
from deepseek_jax.train.reward_model import RewardModelConfig, train_reward_model
from deepseek_jax.train.run import Config, stored_config
from deepseek_jax.train.sft import SftConfig, sft
from deepseek_jax.types import UserError


def _read_model(words: list[str]) -> ModelConfig:
    """A preset's name, or the path of a config.json, of the folder that holds it, or of a run."""
    (word,) = words
    path = Path(word)
    if word in PRESETS:
        return preset(word)
    if not path.exists():
        raise UserError(
            f"no preset {word!r}; choose from {', '.join(PRESETS)}, or name a config.json that "
            "exists."
        )
    if (path / "run.json").exists():
        return ModelConfig.from_hf(read_run(path)["model"])
    return ModelConfig.from_hf(path / "config.json" if path.is_dir() else path)


def _model_name(config: ModelConfig) -> list[str]:
    names = [name for name, known in PRESETS.items() if known == config]
    return names[:1] or ["custom"]


_REGISTRY = tyro.constructors.ConstructorRegistry()


@_REGISTRY.primitive_rule
def _model_rule(info: tyro.constructors.PrimitiveTypeInfo) -> Any:
    if info.type is not ModelConfig:
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="{" + ",".join(PRESETS) + "} or config.json",
        instance_from_str=_read_model,
        is_instance=lambda value: isinstance(value, ModelConfig),
        str_from_instance=_model_name,
    )


def _convert(
    paths: Annotated[
        tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE TARGET")
    ] = (),
    check: Path | None = None,
    dtype: Literal["fp32", "bf16", "fp8"] | None = None,
    shard_size: int | None = None,
    scale_fmt: Literal["ue8m0"] | None = None,
    workers: int = 4,
) -> None:
    """Convert between a Hugging Face folder and a run directory, whichever SOURCE is.

    Args:
        paths: Two of them; SOURCE stays as it is.
        check: Instead: read the headers of this Hugging Face folder and report what is amiss.
        dtype: Of the result's matrices; to a run directory, default as stored (FP8 as BF16); to
            Hugging Face, default bf16.
        shard_size: To Hugging Face: bytes of a safetensors file, default 5 GB.
        scale_fmt: To Hugging Face: scales of fp8 as powers of two, as V3.1 has them.
        workers: Chunks in the making at a time.
    """
    only_to_hf = {"--shard-size": shard_size, "--scale-fmt": scale_fmt}
    given = [name for name, value in only_to_hf.items() if value is not None]
    if check is not None:
        if paths or dtype or given:
            raise UserError(
                "--check DIR converts nothing; leave out SOURCE, TARGET and what describes a "
                "result (--dtype, --shard-size, --scale-fmt)."
            )
        report = check_hf(check)
        Console().print(report)
        if not report.ok:
            raise UserError(f"{check} is not complete; see the list above.")
        return
    if len(paths) != 2:
        raise UserError("convert takes SOURCE and TARGET, two paths, or --check DIR.")
    if (shard_size is not None and shard_size < 1) or workers < 1:
        raise UserError("shard_size and workers must be at least 1.")
    jax.config.update("jax_platforms", "cpu")  # nothing is computed: an accelerator stays free
    source, target = paths
    if (source / "run.json").exists():
        if scale_fmt is not None and dtype != "fp8":
            raise UserError("--scale-fmt says how the scales of FP8 are written; add --dtype fp8.")
        convert_to_hf(
            source,
            target,
            dtype=dtype or "bf16",
            shard_size=SHARD_SIZE if shard_size is None else shard_size,
            scale_fmt=scale_fmt,
            workers=workers,
            progress=True,
        )
    else:
        if given and source.is_dir():
            raise UserError(
                f"{' and '.join(given)} are for a Hugging Face folder, and {target} becomes a run "
                "directory; leave them out."
            )
        ours: Any = {"fp32": "float32", "bf16": "bfloat16", "fp8": "fp8", None: None}[dtype]
        convert_to_orbax(source, target, dtype=ours, workers=workers, progress=True)
    Console().print(f"wrote {target}", markup=False, highlight=False)


def _plan(config: Annotated[PlanConfig, tyro.conf.arg(name="")]) -> None:
    """Compile a training or decode step for a TPU slice that need not be there; say its cost."""
    jax.config.update("jax_platforms", "cpu")  # nothing runs: an accelerator here stays free
    plan(config)


def _generate(config: Annotated[GenerateConfig, tyro.conf.arg(name="")]) -> None:
    """Continue a text, or every prompt of a file, from a run directory or a Hugging Face folder."""
    generate(config)


def _chat(config: Annotated[ChatConfig, tyro.conf.arg(name="")]) -> None:
    """Talk to a model; /reset begins anew, /exit leaves, Ctrl-C stops an answer."""
    chat(config)


def _evaluate(config: Annotated[EvalConfig, tyro.conf.arg(name="")]) -> None:
    """Solve tasks and be judged (pass@k, maj@k), or be measured on text (bits per byte)."""
    evaluate(config)


def _harness(config: Annotated[HarnessConfig, tyro.conf.arg(name="")]) -> None:
    """Be measured on the tasks of lm-evaluation-harness (pip install -e '.[harness]')."""
    harness(config)


def _rejection_sample(
    config: Annotated[RejectionSampleConfig, tyro.conf.arg(name="")],
) -> None:
    """Keep a policy's right, readable and different answers, to fine-tune on (R1's stage 3)."""
    rejection_sample(config)


def _cache_folder() -> Path:
    # Not in the run's directory: compiled programs are code, and those directories change hands.
    # By the processor's features: on another one, XLA's programs for CPUs may not run.
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    features = platform.machine()
    with contextlib.suppress(OSError):
        features += "".join(re.findall(r"^flags.*$", Path("/proc/cpuinfo").read_text(), re.M)[:1])
    return base / "deepseek_jax" / hashlib.blake2b(features.encode(), digest_size=4).hexdigest()


@dataclass(frozen=True)
class Machine(distributed.Cluster):
    """Where the run happens."""

    compilation_cache: Path | None = field(default_factory=_cache_folder)
    """Keeps compiled programs; None: they are not kept."""


@dataclass(frozen=True)
class _Start(Generic[Config]):
    """All that the command line of a recipe says."""

    config: Config
    machine: Machine = field(default_factory=Machine)


def main(args: list[str] | None = None) -> None:
    """The ``deepseek-jax`` command."""
    words = sys.argv[1:] if args is None else args
    if words == ["--version"]:
        print(f"deepseek-jax {version('deepseek-jax')}, jax {jax.__version__}")
        return

    def command(
        config: Annotated[PretrainConfig, tyro.conf.arg(name="")],
        machine: Annotated[Machine, tyro.conf.arg(name="")] = Machine(),
    ) -> None:
        """Train a language model from text."""
        pretrain(_as_stored(config, words[1:]))

    def fine_tune(
        config: Annotated[SftConfig, tyro.conf.arg(name="")],
        machine: Annotated[Machine, tyro.conf.arg(name="")] = Machine(),
    ) -> None:
        """Fine-tune a language model on conversations."""
        sft(_as_stored(config, words[1:]))

    def reinforce(
        config: Annotated[GrpoConfig, tyro.conf.arg(name="")],
        machine: Annotated[Machine, tyro.conf.arg(name="")] = Machine(),
    ) -> None:
        """Reinforcement learning from rewards that rules give (GRPO)."""
        grpo(_as_stored(config, words[1:]))

    def reward_model(
        config: Annotated[RewardModelConfig, tyro.conf.arg(name="")],
        machine: Annotated[Machine, tyro.conf.arg(name="")] = Machine(),
    ) -> None:
        """Learn what people prefer, from pairs or grades, for `grpo --reward-model`."""
        train_reward_model(_as_stored(config, words[1:]))

    with ends_in_a_sentence(), _started(words), _REGISTRY:
        tyro.extras.subcommand_cli_from_dict(
            {
                "pretrain": command,
                "sft": fine_tune,
                "reward-model": reward_model,
                "grpo": reinforce,
                "rejection-sample": _rejection_sample,
                "convert": _convert,
                "generate": _generate,
                "chat": _chat,
                "eval": _evaluate,
                "harness": _harness,
                "plan": _plan,
            },
            prog="deepseek-jax",
            description="DeepSeek-V3 and R1 in JAX. --version says which.",
            args=words,
            config=(tyro.conf.OmitArgPrefixes,),
        )


def run_recipe(stage: Callable[[Config], Any], default: Config) -> None:
    """Run a stage with a recipe's configuration; the command line may change any field of it."""
    words = sys.argv[1:]
    with ends_in_a_sentence(), _started([default.stage, *words]), _REGISTRY:
        stage(_as_stored(_parse(default, words), words))


def _parse(default: Config, words: list[str]) -> Config:
    kind: Any = _Start[type(default)]  # pyrefly: ignore
    start = tyro.cli(kind, default=_Start(default), args=words, config=(tyro.conf.OmitArgPrefixes,))
    return start.config


def _as_stored(config: Config, words: list[str]) -> Config:
    """With ``--resume``, what is not said on the command line is as the run was started."""
    return _parse(stored_config(config), words) if config.resume else config


# --- starting and ending ----------------------------------------------------------------------


@contextlib.contextmanager
def _started(words: list[str]) -> Iterator[None]:
    """Joins the other processes, before the rest of the command line is looked at.

    A process that then finds its input bad, because a file is missing on its host, say, can tell
    the others instead of leaving them to wait for it.
    """
    training = (["pretrain"], ["sft"], ["reward-model"], ["grpo"])
    serving = (["generate"], ["chat"], ["eval"], ["harness"], ["rejection-sample"])
    if words[:1] not in training or not {"-h", "--help"}.isdisjoint(words):
        with _compilation_cache(_cache_folder() if words[:1] in serving else None):
            yield
        return
    machine, _ = tyro.cli(Machine, args=words[1:], return_unknown_args=True)
    distributed.initialize(machine)
    with _compilation_cache(machine.compilation_cache):
        yield


@contextlib.contextmanager
def _compilation_cache(folder: Path | None) -> Iterator[None]:
    """Keeps compiled programs in ``folder``, unless JAX has been told where to keep them."""
    if folder is None or getattr(jax.config, "jax_compilation_cache_dir", None) is not None:
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if folder == _cache_folder():  # nobody asked for it
            yield
            return
        raise UserError(
            f"cannot keep compiled programs in {folder}: {error.strerror}; choose another "
            "--compilation-cache, or None."
        ) from error
    jax.config.update("jax_compilation_cache_dir", str(folder))
    try:
        yield
    finally:
        jax.config.update("jax_compilation_cache_dir", None)
        compilation_cache.reset_cache()


@contextlib.contextmanager
def ends_in_a_sentence() -> Iterator[None]:
    """What ends a command early ends all processes of its run, with a sentence and a status.

    Bad input: 2. Ctrl-C: 130. A reader of standard output that has gone (``| head``): 1, in
    silence. A bug keeps its traceback.
    """
    try:
        yield
        distributed.leave()
        print(end="", flush=True)  # at exit, a failure would only be complained of
    except SystemExit as end:
        if end.code:
            distributed.give_up(2, "its command line is not valid.", lambda: None)
        elif _unread():  # --help leaves so, its end perhaps still in the buffer
            sys.exit(1)
        raise
    except BaseException as error:
        if isinstance(error, BrokenPipeError) and _unread():
            distributed.give_up(1, "nobody reads its standard output any more.", lambda: None)
            sys.exit(1)
        status, sentence = _verdict(error)
        if sentence is None:
            first_line = next(iter(str(error).strip().splitlines()), "")
            reason = f"{type(error).__name__}: {first_line}"
            distributed.give_up(status, reason, traceback.print_exc)
            raise
        distributed.give_up(status, sentence, lambda: say(sentence))
        say(sentence)
        sys.exit(status)


def _unread() -> bool:
    """Whether nobody reads standard output any more; from then on it leads nowhere."""
    with contextlib.suppress(BrokenPipeError):
        print(end="", flush=True)  # at exit, a failure would only be complained of
    try:
        descriptor = sys.stdout.fileno()
    except (OSError, ValueError):  # none: it is captured
        return False
    poll = select.poll()
    poll.register(descriptor, 0)
    if not any(events & select.POLLERR for _, events in poll.poll(0)):
        return False
    # What is left in the buffer would be written at exit, and the failure complained of.
    os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
    return True


def _verdict(error: BaseException) -> tuple[int, str | None]:
    """Exit status and sentence; None for what only a traceback explains."""
    if isinstance(error, UserError):
        return 2, str(error)
    # Only what the user can mend becomes a sentence.
    mendable = {
        errno.ENOSPC: "make room, and repeat it (a run: with --resume)",
        errno.EDQUOT: "make room, and repeat it (a run: with --resume)",
        errno.EACCES: "check its permissions",
        errno.EROFS: "choose another place",
        errno.ENOTDIR: "choose another place",
    }
    if isinstance(error, OSError) and error.errno in mendable:
        name = error.filename or "a file that was being written"
        return 2, f"{name}: {error.strerror}; {mendable[error.errno]}."
    exhausted = "RESOURCE_EXHAUSTED: "
    on_device = isinstance(error, jax.errors.JaxRuntimeError) and str(error).startswith(exhausted)
    if on_device or isinstance(error, MemoryError):
        reason = next(iter(str(error).strip().splitlines()), "that of the host")
        return 2, (
            f"out of memory: {reason.removeprefix(exhausted).rstrip('.')}; take fewer or shorter "
            "sequences at a time (--micro-batch, --seq-len, --slots), recompute (--remat full), or "
            "divide more (--mesh)."
        )
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted; what was complete is kept."
    return 1, None
