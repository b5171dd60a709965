"""What a step costs before it is run.

Two floors: ``flops`` is arithmetic on a configuration, which training uses too; the rest compiles
the real step for a topology (``deepseek-jax plan``) and stands above training.
"""

from deepseek_jax.plan.flops import training_flops_per_token

__all__ = ["training_flops_per_token"]
