"""``deepseek-jax``: the command line. Every option is a field of a dataclass."""

import contextlib
import errno
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from deepseek_jax.config import PRESETS, ModelConfig, preset
from deepseek_jax.train.pretrain import PretrainConfig, pretrain
from deepseek_jax.types import UserError

Config = TypeVar("Config")


def _read_model(words: list[str]) -> ModelConfig:
    """A preset's name, or the path of a config.json or of the folder that holds it."""
    (word,) = words
    path = Path(word)
    if word not in PRESETS and path.exists():
        return ModelConfig.from_hf(path / "config.json" if path.is_dir() else path)
    return preset(word)


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


def _pretrain(config: Annotated[PretrainConfig, tyro.conf.arg(name="")]) -> None:
    """Train a language model from text."""
    pretrain(config)


def main(args: list[str] | None = None) -> None:
    """The ``deepseek-jax`` command."""
    with _bad_input_is_a_sentence(), _REGISTRY:
        tyro.extras.subcommand_cli_from_dict(
            {"pretrain": _pretrain},
            prog="deepseek-jax",
            description="DeepSeek-V3 and R1 in JAX.",
            args=args,
            config=(tyro.conf.OmitArgPrefixes,),
        )


def run_recipe(stage: Callable[[Config], Any], default: Config) -> None:
    """Run a stage with a recipe's configuration; the command line may change any field of it."""
    with _bad_input_is_a_sentence(), _REGISTRY:
        config = tyro.cli(type(default), default=default, config=(tyro.conf.OmitArgPrefixes,))
        stage(config)


@contextlib.contextmanager
def _bad_input_is_a_sentence() -> Iterator[None]:
    """Bad input ends the program with one sentence on stderr and exit status 2."""
    try:
        yield
    except UserError as error:
        sys.exit(_fail(str(error)))
    except OSError as error:
        # Only what the user can mend becomes a sentence; a bug keeps its traceback.
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        sys.exit(_fail(f"{error.filename or 'a file'}: {error.strerror}."))


def _fail(message: str) -> int:
    print(f"deepseek-jax: {message.rstrip('.')}.", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
