"""Generation: an engine over token ids, and what makes text of it."""

from deepseek_jax.generate.engine import Completion, Engine, EngineConfig, Request, Sampling
from deepseek_jax.generate.text import TextTokenizer, complete, completion_text, text_request

__all__ = [
    "Completion",
    "Engine",
    "EngineConfig",
    "Request",
    "Sampling",
    "TextTokenizer",
    "complete",
    "completion_text",
    "text_request",
]
