"""Runs programs that nobody has read: what a policy wrote, rewarded for passing tests by any means.

With ``isolation="namespaces"`` (Linux; by root, or by a user who may create user namespaces) a
program

* sees no network but a loopback that is down, no process but its own, no environment;
* finds in its file system Python, the system's libraries, its own source and nothing else, all
  read-only, with neither ``/proc`` nor a place to write to;
* is a user that owns nothing, without capabilities and without a way to regain any;
* is limited in wall-clock and CPU time, memory of each process, number of processes, open files
  and output; and is killed with all its offspring at the end, or with this process if that dies.

It is no virtual machine. The kernel is shared, and no filter narrows the system calls, so a hole
in the kernel is a way out. Memory is bounded for each process, not for all of them together, and
time is shared: others on the machine feel a busy program until its time is over.

``isolation="limits"`` is for machines whose kernel or container refuses namespaces. It has the
same limits, and writes no byte to any file, but **the program can read what this user can read,
delete and truncate what this user can, connect to the network, kill this user's processes, and
leave processes behind; run by root it is not limited in their number**.
"""

import contextlib
import itertools
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Literal, NamedTuple

from deepseek_jax.types import UserError

_LAUNCHER = Path(__file__).with_name("sandbox_launcher.py")
_SYSTEM = ("/lib", "/lib64", "/lib32", "/usr", "/etc/ld.so.cache", "/dev/null", "/dev/urandom")
_ENVIRONMENT = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "HOME": "/"}
_USERS = itertools.cycle(range(1_900_000_000, 1_900_100_000))


class Limits(NamedTuple):
    """Of one run."""

    wall_s: float = 5.0
    cpu_s: int = 4
    memory_bytes: int = 512 * 2**20
    """Address space of each process."""
    processes: int = 8
    """At one time, threads included."""
    output_bytes: int = 2**20


class Run(NamedTuple):
    """How a program ended."""

    status: int | None
    """Exit status, 128 + n after signal n; None if it was killed for time or output."""
    output: bytes
    """What it wrote to its standard output."""


class Sandbox:
    """Runs Python programs one by one.

    Args:
        isolation: See the module. Nothing weaker is ever used in its place.
        limits: Of each run.

    Raises:
        UserError: This machine does not offer the isolation.
    """

    def __init__(
        self,
        *,
        isolation: Literal["namespaces", "limits"] = "namespaces",
        limits: Limits = Limits(),  # noqa: B008 (immutable)
    ):
        if sys.platform != "linux":
            raise UserError("programs are run in a sandbox on Linux alone; leave out code rewards.")
        self.limits = limits
        self._isolated = isolation == "namespaces"
        self._python = os.path.realpath(sys.executable)
        prefix = os.path.realpath(sys.base_prefix)
        inside_usr = prefix == "/usr" or prefix.startswith("/usr/")
        readable = [*_SYSTEM] if inside_usr else [*_SYSTEM, prefix]
        self._readable = [path for path in readable if os.path.lexists(path)]
        try:
            works = self.run({"program.py": "print(6 * 7)"}).output == b"42\n"
            reason = "the program did not answer"
        except OSError as error:
            works, reason = False, str(error)
        if not works:
            raise UserError(
                f"this machine does not let programs be isolated by {isolation} ({reason}): allow "
                "user namespaces, run the container with --security-opt seccomp=unconfined or "
                '--cap-add SYS_ADMIN, or accept isolation="limits", which protects little.'
            )

    def run(self, files: dict[str, str], stdin: str = "") -> Run:
        """Run the first of ``files`` (name, text) with the others beside it.

        Raises:
            OSError: The sandbox could not be built.
        """
        payload = json.dumps({"files": files, "stdin": stdin})
        with tempfile.TemporaryDirectory(prefix="sandbox-") as tree:
            os.chmod(tree, 0o755)
            report, report_there = os.pipe()
            try:
                process = self._start(tree, next(iter(files)), payload, report_there)
                os.close(report_there)
                run = self._watch(process)
                ready = os.read(report, 1000).decode()
            finally:
                os.close(report)
        if ready != "ok" and run.status is not None:
            raise OSError(ready or "the launcher died")
        return run

    def _start(self, tree: str, name: str, payload: str, report: int) -> subprocess.Popen[bytes]:
        limits = {
            "CPU": self.limits.cpu_s,
            "AS": self.limits.memory_bytes,
            # Three are the launcher's where no user of its own can be had.
            "NPROC": self.limits.processes + 3,
            "FSIZE": 0,
            "NOFILE": 64,
            "CORE": 0,
        }
        where = "" if self._isolated else tree
        settings = {
            "tree": tree,
            "isolated": self._isolated,
            "readable": self._readable,
            "uid": next(_USERS),
            "limits": limits,
            "argv": [self._python, "-I", "-S", "-X", "utf8", f"{where}/{name}"],
            "environment": _ENVIRONMENT,
            "report": report,
        }
        with tempfile.TemporaryFile() as file:
            file.write(payload.encode())
            file.seek(0)
            return subprocess.Popen(
                [self._python, "-I", "-S", str(_LAUNCHER), json.dumps(settings)],
                stdin=file,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=_ENVIRONMENT,
                pass_fds=(report,),
                start_new_session=True,
            )

    def _watch(self, process: subprocess.Popen[bytes]) -> Run:
        """Its output and end; whatever happens, it is dead afterwards."""
        assert process.stdout is not None
        output, end = b"", time.monotonic() + self.limits.wall_s
        try:
            with selectors.DefaultSelector() as selector:
                selector.register(process.stdout, selectors.EVENT_READ)
                while len(output) <= self.limits.output_bytes:
                    if not selector.select(max(end - time.monotonic(), 0)):
                        return Run(None, output)
                    data = os.read(process.stdout.fileno(), 65536)
                    if not data:
                        with contextlib.suppress(subprocess.TimeoutExpired):
                            status = process.wait(max(end - time.monotonic(), 0))
                            return Run(status, output)
                        return Run(None, output)
                    output += data
            return Run(None, output[: self.limits.output_bytes])
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.stdout.close()
            process.wait()
