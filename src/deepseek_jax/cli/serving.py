"""What `generate`, `chat` and `eval` share: a model from a folder, its options, streamed text."""

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
from jax.sharding import Mesh
from rich.console import Console
from rich.style import Style
from rich.text import Text

from deepseek_jax.checkpoint import load_params
from deepseek_jax.checkpoint.files import local_path
from deepseek_jax.checkpoint.run_directory import read_run
from deepseek_jax.config import Dtype, ModelConfig, Precision
from deepseek_jax.convert import fp8_params, load_hf
from deepseek_jax.convert.folder import HFFolder
from deepseek_jax.data.chat import ChatTemplate
from deepseek_jax.data.tokenizer import END_THINK, THINK, Tokenizer
from deepseek_jax.generate import Engine, EngineConfig, Sampling
from deepseek_jax.model.layers import fp8_kernels
from deepseek_jax.model.transformer import DeepSeekV3, logical_axes, sharded_params
from deepseek_jax.sharding import make_mesh, param_shardings, sharding
from deepseek_jax.types import Params, UserError


@dataclass(frozen=True)
class ServingConfig:
    """A model, and how it is to speak."""

    run: Path | None = None
    """A run directory (`pretrain`, `sft`, `convert`)."""
    hf: Path | None = None
    """Instead: a Hugging Face folder of the family, as it is."""
    compute: Dtype = "bfloat16"
    """Number format of matmuls and of the weights; float32 is faster on CPUs."""
    weights: Literal["compute", "fp8"] = "compute"
    """fp8: keep the weights of a checkpoint in FP8 as they are, at a byte each, and multiply in
    FP8 where there are kernels for it; compute: multiply them out when they are loaded."""
    mesh: str = "data=-1"
    """Devices that slots, weights and experts are divided over, as in data=2,expert=4; the axes
    are data, fsdp, expert, context and tensor, and -1 fills one."""
    sampling: Sampling = field(default_factory=Sampling)
    slots: int = 8
    """Texts at a time."""
    drafts: int = 0
    """Tokens drafted at a time by the multi-token prediction modules; 0: no speculation."""
    fp8_cache: bool = False
    """Keep the latent cache in FP8."""
    max_length: int | None = None
    """Tokens of a prompt and its completion; default: as the prompts and max-new-tokens need."""

    def __post_init__(self) -> None:
        """Refuse to guess which model is meant, and to leave no room for a text."""
        if (self.hf is None) == (self.run is None):
            raise UserError("give the model as --hf DIR or --run DIR, one of the two.")
        if self.max_length is not None and self.max_length < 1:
            raise UserError(f"max_length={self.max_length} must be at least 1.")


class Opened(NamedTuple):
    """A model ready to generate."""

    model: DeepSeekV3
    params: Params
    router_bias_LE: Any
    tokenizer: Tokenizer
    folder: Path
    mesh: Mesh

    def template(self) -> ChatTemplate:
        """How conversations are written for this model."""
        return ChatTemplate.load(self.folder, self.tokenizer)

    def rows(self, config: ServingConfig) -> int:
        """As many as slots, rounded up to what divides evenly over the mesh."""
        return -(-config.slots // self.mesh.size) * self.mesh.size

    def training_params(self) -> Params:
        """The parameters where the training step has them."""
        axes = logical_axes(self.model)
        return jax.device_put(self.params, param_shardings(self.mesh, axes, self.params))

    def engine(self, config: ServingConfig, longest_prompt: int) -> Engine:
        """An engine for prompts of at most so many tokens. To be used under ``set_mesh``."""
        most = self.model.config.max_position_embeddings
        wanted = config.max_length or longest_prompt + config.sampling.max_new_tokens
        if longest_prompt >= most:
            raise UserError(
                f"a prompt of {longest_prompt} tokens leaves no room in the model's "
                f"max_position_embeddings={most}; shorten it."
            )
        length = min(wanted, most)
        engine = Engine(
            self.model,
            self.params,
            self.router_bias_LE,
            EngineConfig(
                slots=config.slots,
                lanes=min(config.slots, 8),
                max_length=length,
                prefill_chunk=min(256, max(longest_prompt, 16)),
                drafts=config.drafts,
                cache_dtype="fp8" if config.fp8_cache else "compute",
            ),
        )
        each = engine.cache_bytes_per_token
        Console(stderr=True).print(
            f"{config.slots} slots of {length:,} tokens; latent cache {each:,} bytes a token; "
            f"weights {engine.weight_bytes / 1e9:.3g} GB",
            style="dim",
            highlight=False,
        )
        return engine


def check_out(*paths: Path | None) -> None:
    """Nothing is written over, and nothing computed that then cannot be written.

    Raises:
        UserError: there is such a file, or its folder cannot be written to.
    """
    for path in filter(None, paths):
        if path.exists():
            raise UserError(f"{path} exists; choose another --out, or remove it.")
        there = next(folder for folder in path.absolute().parents if folder.exists())
        if not there.is_dir() or not os.access(there, os.W_OK):
            raise UserError(f"cannot write {path} into {there}; choose another --out.")


@contextlib.contextmanager
def opened(config: ServingConfig) -> Iterator[Opened]:
    """Load the model on its mesh, which is set meanwhile.

    Raises:
        UserError: the folder is not there, not complete, or of another family.
    """
    devices = make_mesh(config.mesh)
    fp8 = config.weights == "fp8"
    matmuls: Any = "fp8" if fp8 and fp8_kernels() else "compute"
    precision = Precision(config.compute, config.compute, matmuls)
    folder = config.hf or config.run
    assert folder is not None
    # The tokenizer before the weights, which take longer: not every release comes with this file.
    if config.hf is not None:
        HFFolder(folder)
        tokenizer = Tokenizer.load(folder / "tokenizer.json")
        dtype = "fp8" if fp8 else config.compute
        model_config, params, bias = load_hf(folder, dtype=dtype, mesh=devices, stored=False)
    else:
        remedy = "check the path"
        if (folder / "config.json").exists():
            remedy = "a Hugging Face folder is given as --hf"
        model_config = ModelConfig.from_hf(read_run(local_path(folder), remedy)["model"])
        tokenizer = Tokenizer.load(folder / "tokenizer.json")
        model = DeepSeekV3(model_config, precision)
        abstract = sharded_params(model, devices, stored=False)
        abstract = fp8_params(model_config, abstract) if fp8 else abstract
        params, bias, _ = load_params(folder, abstract)
        bias = jax.device_put(bias, sharding(devices))
    with jax.set_mesh(devices):
        model = DeepSeekV3(model_config, precision)
        yield Opened(model, params, bias, tokenizer, folder, devices)


class Stream:
    """Prints a text as it grows; what is thought (``<think>...</think>``) dimmed.

    Args:
        console: Where to print.
        tokenizer: Makes text of tokens.
        thinking: The prompt has begun the thinking already.
    """

    def __init__(self, console: Console, tokenizer: Tokenizer, *, thinking: bool = False):
        self._console, self._tokenizer, self._thinking = console, tokenizer, thinking
        self._shown = 0

    def __call__(self, tokens: Sequence[int]) -> None:
        """Print what is new in the text of ``tokens``."""
        if tokens and tokens[-1] == self._tokenizer.eos_id:
            tokens = tokens[:-1]
        text = self._tokenizer.decode(tokens)
        # The last characters may be the first bytes of a longer one, or of a tag.
        held = min(
            (text.rfind(tag[:1]) for tag in ("<",) if _may_begin_tag(text)), default=len(text)
        )
        held = min(held, len(text.rstrip("\ufffd")))
        self._print(text, max(held, self._shown))

    def finish(self, tokens: Sequence[int]) -> str:
        """Print the rest and a line break; the whole text."""
        if tokens and tokens[-1] == self._tokenizer.eos_id:
            tokens = tokens[:-1]
        text = self._tokenizer.decode(tokens)
        self._print(text, len(text))
        self._console.print()
        return text

    def _print(self, text: str, end: int) -> None:
        while self._shown < end:
            tag = END_THINK if self._thinking else THINK
            at = text.find(tag, self._shown, end)
            stop = end if at < 0 else at + len(tag)
            dim = self._thinking or at == self._shown
            piece = Text(text[self._shown : stop], Style(dim=dim))
            self._console.print(piece, end="", soft_wrap=True)
            self._shown = stop
            if at >= 0:
                self._thinking = not self._thinking


def _may_begin_tag(text: str) -> bool:
    last = text[text.rfind("<") :] if "<" in text else ""
    return bool(last) and any(tag.startswith(last) for tag in (THINK, END_THINK))


def with_seed(sampling: Sampling, seed: int) -> Sampling:
    """The same with other randomness."""
    return dataclasses.replace(sampling, seed=seed)
