"""Stage 4: rejection sampling, then SFT of the base on what is kept (R1 section 2.3.3)."""

import json
from typing import Any

from deepseek_jax.cli.rejection import RejectionSampleConfig, rejection_sample
from deepseek_jax.generate import Sampling
from deepseek_jax.rejection import RejectionConfig
from deepseek_jax.train.sft import sft
from experiments.r1.setting import Setting, learn, tuning


def samples_of(s: Setting, run: str, name: str) -> None:
    """The good answers of a run to training sums, as the data file ``name``."""
    if s.file(name).exists():
        return
    rejection_sample(
        RejectionSampleConfig(
            run=s.out / run,
            compute="float32",
            tasks=str(s.file("sums")),
            verifier="numeric",
            limit=s.sampled_tasks,
            samples=s.samples,
            sampling=Sampling(s.max_new_tokens, temperature=1.0, top_p=1.0, seed=s.seed),
            slots=128,
            rejection=RejectionConfig(language="en", longest=s.max_new_tokens - 8, keep=2),
            out=s.file(name),
        )
    )


def rejection(s: Setting) -> dict[str, Any]:
    """Epochs from the base, two as in the paper, with general conversations beside them."""
    samples_of(s, "reasoning", "kept")
    learn(sft, tuning(s, "rejection", "base", ("kept", "replies"), s.tuning_epochs))
    return {"sifted": json.loads(s.file("kept").with_suffix(".counts.json").read_text())}
