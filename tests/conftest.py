"""Shapes and types of every public function are checked at run time in all tests."""

import atexit
import os
import shutil
import signal
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# libtpu compiles for TPUs that are not there: in several workers at a time, and without asking a
# metadata server for the slice that it is on, for which it would wait.
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
if "--xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    # Eight devices on two busy cores may wait for one another for longer than the 40 seconds
    # after which XLA takes a collective for stuck and kills the process.
    os.environ["XLA_FLAGS"] = (
        f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
        " --xla_cpu_collective_call_warn_stuck_timeout_seconds=300"
        " --xla_cpu_collective_call_terminate_timeout_seconds=600"
    )
    if os.environ["JAX_PLATFORMS"] == "cpu":
        # A test runs its programs once or twice: compiling is what takes its time.
        os.environ["XLA_FLAGS"] += (
            " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
        )

# Tests compile the same programs over and over. What one has compiled the others load, those of
# the other workers and of child processes too.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="compiled")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"

import jax
import pytest
from jaxtyping import install_import_hook

# A shell starts background jobs with Ctrl-C ignored, and some tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)

install_import_hook(["deepseek_jax", "pallas_kernels"], "beartype.beartype")


@pytest.fixture(autouse=True, scope="session")
def _no_trace_at_home(tmp_path_factory):
    """Compiled programs are kept in the user's cache by default."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True, scope="module")
def _forget_programs():
    """A worker that keeps every program it ever compiled grows to gigabytes."""
    yield
    jax.clear_caches()
