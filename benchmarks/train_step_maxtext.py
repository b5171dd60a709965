r"""The step of ``train_step.py`` as MaxText makes it, on the same GPU.

    python benchmarks/train_step_maxtext.py --checkout ~/maxtext --layers 3 --experts 16 \
        --vocab 16384 --batch 6 remat_policy=custom context=device

MaxText's own trainer on its synthetic data, in a process of its own, at the commit e591f30cb
(2026-08-22): cuDNN's attention, tokamax's grouped products, FP32 parameters
and second moments, BF16 first moments. What follows the options is handed to it. Its model is
named for the whole DeepSeek-V3 or V2-Lite; ours is used to count parameters, beside its, and FLOPs.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

from benchmarks.train_step import model_arguments, slice_of
from deepseek_jax.model.transformer import param_counts
from deepseek_jax.plan import training_flops_per_token

NAMES = {"v3": "deepseek3-671b", "v2_lite": "deepseek2-16b"}
WARM_UP = 4


def main() -> None:
    """Run it, read the seconds of its steps, print a line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    model_arguments(parser)
    parser.set_defaults(model="v3")
    parser.add_argument("--checkout", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=8)
    arguments, more = parser.parse_known_args()
    config = slice_of(arguments)
    source = arguments.checkout / "src"
    settings = {
        "model_name": NAMES[arguments.model],
        "override_model_config": True,
        "base_num_decoder_layers": config.num_hidden_layers,
        "first_num_dense_layers": config.first_k_dense_replace,
        "num_experts": config.n_routed_experts,
        "vocab_size": config.vocab_size,
        "routed_bias_update_rate": 0.001,
        "load_balance_loss_weight": config.aux_loss_alpha,
        "per_device_batch_size": arguments.batch,
        "max_target_length": arguments.seq,
        "mu_dtype": "bfloat16",
        "hardware": "gpu",
        "attention": "cudnn_flash_jax",
        "sparse_matmul": True,
        "megablox": False,
        "use_tokamax_gmm": True,
        "dataset_type": "synthetic",
        "steps": arguments.steps + WARM_UP,
        "run_name": "benchmark",
        "base_output_directory": "/tmp/maxtext",
        "enable_checkpointing": False,
        "enable_tensorboard": False,
        "enable_goodput_recording": False,
        "skip_jax_distributed_system": True,
    }
    paths = [str(source), os.environ.get("PYTHONPATH", "")]
    command = [sys.executable, "-m", "maxtext.trainers.pre_train.train"]
    command += [str(source / "maxtext/configs/base.yml")]
    command += [f"{name}={value}" for name, value in settings.items()] + more
    environment = os.environ | {"DECOUPLE_GCLOUD": "TRUE", "PYTHONPATH": ":".join(paths)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    log = done.stdout + done.stderr
    steps = re.findall(r"completed step: \d+, seconds: ([\d.]+).*? loss: ([\d.]+)", log)
    if len(steps) <= WARM_UP:
        sys.exit(log[-6000:])
    took = statistics.median(float(seconds) for seconds, _ in steps[WARM_UP:])
    tokens = arguments.batch * arguments.seq
    flops = training_flops_per_token(config, arguments.seq) * tokens
    counted = re.findall(r"number parameters: ([\d.]+) billion", log)
    print(
        f"MaxText {' '.join(more)}: {counted[0]}B parameters (ours "
        f"{param_counts(config).total / 1e9:.3f}B), {took * 1e3:.0f} ms a step, "
        f"{tokens / took:,.0f} tokens/s, MFU {flops / took / 989e12:.1%}; losses "
        f"{', '.join(loss for _, loss in steps[:4])}",
        flush=True,
    )


if __name__ == "__main__":
    main()
