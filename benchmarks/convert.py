"""Conversion of a synthetic checkpoint in both directions: memory, and speed beside a plain copy.

``python benchmarks/convert.py --gigabytes 8 --dir /tmp/convert`` makes a folder of random BF16
weights in V3's shape (fewer layers, half the width), then, each in a process of its own so that
peak memory is that step's alone: copies it file by file, converts it to a run directory, and
converts that back. Every step begins with an empty page cache where that is permitted, and ends
with its bytes on the disk. At the end the two folders are compared.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
import zlib
from pathlib import Path

import ml_dtypes
import numpy as np

from deepseek_jax.config import ModelConfig
from deepseek_jax.convert import convert_to_hf, convert_to_orbax
from deepseek_jax.convert.folder import HFFolder
from deepseek_jax.convert.shards import ShardWriter, TensorSpec
from deepseek_jax.convert.table import entries
from deepseek_jax.presets import preset

GB = 1e9


def model_of(gigabytes: float) -> ModelConfig:
    """Three layers and a MTP module of V3 at half its width, with as many experts as it takes."""
    config = preset("v3").replace(
        vocab_size=32_000, hidden_size=3584, num_hidden_layers=3, first_k_dense_replace=1
    )
    per_expert = 2 * 3 * config.hidden_size * config.moe_intermediate_size * 3  # 3 MoE layers
    return config.replace(n_routed_experts=max(round(gigabytes * GB / per_expert / 8), 2) * 8)


def make(folder: Path, config: ModelConfig) -> None:
    """The folder, with random weights."""
    folder.mkdir(parents=True)
    listed = list(entries(config))
    specs = {
        e.name: TensorSpec("F32" if e.path == ("router_bias",) else "BF16", e.shape) for e in listed
    }
    writer = ShardWriter(folder, specs, 5_000_000_000)
    for entry in listed:
        place = (entry.path, () if entry.row.copy else entry.lead)
        # A MTP module's embedding and head are copies: the same seed for the same array.
        random = np.random.default_rng(zlib.crc32(repr(place).encode()))
        x = random.standard_normal(entry.shape, np.float32)
        kind = np.float32 if specs[entry.name].dtype == "F32" else ml_dtypes.bfloat16
        writer.write(entry.name, 0, x.astype(kind))
    writer.finish()
    (folder / "config.json").write_text(json.dumps(config.to_hf()))


def copy(source: Path, target: Path) -> None:
    """What any program must do at the least."""
    target.mkdir()
    for file in source.iterdir():
        shutil.copyfile(file, target / file.name)
        with (target / file.name).open("rb+") as handle:
            os.fsync(handle.fileno())


STEPS = {
    "copy": copy,
    "to Orbax": lambda source, target: convert_to_orbax(source, target),
    "to Hugging Face": lambda source, target: convert_to_hf(source, target),
}


def size_of(folder: Path) -> int:
    """Bytes of all files below."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def same(a: Path, b: Path) -> bool:
    """Whether two folders hold the same tensors, bit for bit."""
    one, other = HFFolder(a), HFFolder(b)
    return one.tensors.keys() == other.tensors.keys() and all(
        np.array_equal(one.read(name).view(np.uint8), other.read(name).view(np.uint8))
        for name in one.tensors
    )


def peak_memory() -> int:
    """Bytes of this process; ``getrusage`` would count what its parent held when it forked."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def timed(step: str, source: Path, target: Path) -> dict[str, float]:
    """Run a step in a process of its own."""
    os.sync()
    subprocess.run(["sh", "-c", "echo 3 > /proc/sys/vm/drop_caches"], stderr=subprocess.DEVNULL)
    command = [sys.executable, __file__, "--step", step, str(source), str(target)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def main() -> None:
    """Print one line per step."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=8.0)
    parser.add_argument("--dir", type=Path, default=Path("/tmp/convert-benchmark"))
    parser.add_argument("--step", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        step, source, target = args.step
        start = time.perf_counter()
        STEPS[step](Path(source), Path(target))
        seconds = time.perf_counter() - start
        print(json.dumps({"seconds": seconds, "peak": peak_memory()}))
        return
    shutil.rmtree(args.dir, ignore_errors=True)
    make(args.dir / "hf", model_of(args.gigabytes))
    size = size_of(args.dir / "hf")
    print(f"{size / GB:.1f} GB of BF16 weights, {os.cpu_count()} cores")
    print(f"{'step':16} {'seconds':>8} {'GB/s':>6} {'of copy':>8} {'peak RSS':>9}")
    copy_seconds = 0.0
    sources = {"copy": "hf", "to Orbax": "hf", "to Hugging Face": "to Orbax"}
    for step, source in sources.items():
        result = timed(step, args.dir / source, args.dir / step)
        seconds = result["seconds"]
        copy_seconds = copy_seconds or seconds
        print(
            f"{step:16} {seconds:8.1f} {size / GB / seconds:6.2f} {copy_seconds / seconds:8.2f} "
            f"{result['peak'] / GB:6.2f} GB"
        )
        if step == "copy":
            shutil.rmtree(args.dir / "copy")
    print("bit-identical" if same(args.dir / "hf", args.dir / "to Hugging Face") else "DIFFERENT")
    shutil.rmtree(args.dir)


if __name__ == "__main__":
    main()
