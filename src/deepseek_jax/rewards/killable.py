"""A function in a process of its own, killed when it takes too long.

Threads cannot be stopped, and signals are not delivered while C code computes; a process can be
killed. It is started once and serves call after call, so that what it imports is paid for once.
"""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deepseek_jax.types import UserError

_WORKER = Path(__file__).with_name("killable_worker.py")
_START_S = 60.0  # imports included
_LONGEST_REPLY = 1_000_000


class Hung(Exception):
    """A call passed its deadline; its process was killed."""


class Failed(Exception):
    """A call raised, or its process died."""


class _Broken(Failed):
    """The process can serve no more."""


class Killable:
    """Calls a function of JSON values in another process, with a deadline on every call.

    Args:
        function: importable by its module and name, so neither a lambda nor a closure.
        deadline_s: for one call.
        memory_bytes: address space of the process.

    The process inherits the environment but no open file, and dies with this one. It is no
    sandbox: it keeps accidents in, not attacks (``sandbox`` does).
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        deadline_s: float | int = 5.0,
        memory_bytes: int = 4 * 2**30,
    ):
        if "." in function.__qualname__ or function.__module__ == "__main__":
            raise UserError(
                f"{function.__qualname__} of {function.__module__} cannot run in another process: "
                "move it to the top level of a module that can be imported."
            )
        self.deadline_s = float(deadline_s)
        self.restarts = 0
        self._name = (function.__module__, function.__qualname__)
        self._memory = memory_bytes
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def __call__(self, *args: Any) -> Any:
        """The function's value.

        Raises:
            Hung: It took longer than the deadline.
            Failed: It raised.
        """
        with self._lock:
            process = self._running()
            try:
                return self._call(process, args, self.deadline_s)
            except BaseException as error:  # a late answer must not be taken for the next one's
                if isinstance(error, _Broken) or not isinstance(error, Failed):
                    self._stop()
                raise

    def close(self) -> None:
        """End the process."""
        with self._lock:
            self._stop()

    def __enter__(self) -> "Killable":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_process", None) is not None:
            self._stop()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            process = self._process = subprocess.Popen(
                [sys.executable, "-P", str(_WORKER), str(self._memory)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                # Modules are found where this process finds them.
                env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                start_new_session=True,
            )
            try:
                self._call(process, self._name, _START_S)
            except BaseException:
                self._stop()
                raise
        return self._process

    def _call(self, process: subprocess.Popen[bytes], message: Any, deadline_s: float) -> Any:
        assert process.stdin is not None
        assert process.stdout is not None
        fds = (process.stdin.fileno(), process.stdout.fileno())
        reply = _exchange(*fds, json.dumps(message).encode() + b"\n", deadline_s)
        value, error = json.loads(reply)
        if error is not None:
            raise Failed(error)
        return value

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        self.restarts += 1
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


def _exchange(write_fd: int, read_fd: int, message: bytes, deadline_s: float) -> bytes:
    """Send a line, and wait for one."""
    end = time.monotonic() + deadline_s
    os.set_blocking(write_fd, False)
    reply = b""
    while not reply.endswith(b"\n"):
        writable = [write_fd] if message else []
        wait = max(end - time.monotonic(), 0)
        readable, writable, _ = select.select([read_fd], writable, [], wait)
        if not readable and not writable:
            raise Hung(f"no answer within {deadline_s:g} s")
        if writable:
            try:
                message = message[os.write(write_fd, message) :]
            except BrokenPipeError:
                raise _Broken("its process died") from None
        if readable:
            data = os.read(read_fd, 65536)
            reply += data
            if not data or len(reply) > _LONGEST_REPLY:
                raise _Broken("its process died" if not data else "its answer is too long")
    return reply
