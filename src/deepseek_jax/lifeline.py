"""A TCP connection from every process of a run to the first, so that all end when one does.

The kernel closes a connection with its process, however that ends: a death is known at once, and
without heartbeats that a long compilation could delay. A process that gives up sends its reason
before it goes. The first process passes both on to the others.
"""

import contextlib
import json
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

from deepseek_jax.types import UserError

_KEY = "deepseek_jax/lifeline"
_GRACE_S = 2.0  # what looks like an error here may be the echo of a death that is on its way
_LAST_WORDS_S = 5.0
_LOST = (
    "is gone without a word: killed, out of memory, or its machine is down; "
    "continue from the last checkpoint with --resume."
)


@runtime_checkable
class Lifeline(Protocol):
    """This process's part in it."""

    def close(self) -> None:
        """The orderly end, after a barrier: nobody is missed from here on."""
        ...

    def give_up(self, status: int, reason: str, tell: Callable[[], None]) -> None:
        """Ends all processes, this one included. See ``distributed.give_up``."""
        ...


def connect(index: int, count: int, client: Any, host: str, timeout_s: float | int) -> Lifeline:
    """Connects this process; returns once it is done, in the first process once all are.

    Args:
        index: of this process.
        count: of all processes.
        client: of JAX's coordination service, through which the port is made known.
        host: of the first process.
        timeout_s: for the others to arrive.

    Raises:
        UserError: the network does not let them.
    """
    if index == 0:
        first = _First(count)
        client.key_value_set(_KEY, json.dumps([first.port, first.token]))
        first.wait_for_all(timeout_s)
        return first
    port, token = json.loads(client.blocking_key_value_get(_KEY, int(timeout_s * 1000)))
    try:
        connection = socket.create_connection((host, port), timeout=60)
    except OSError as error:
        raise UserError(
            f"process {index} cannot reach process 0 at {host}, TCP port {port} ({error}); open "
            "the ports between the hosts."
        ) from error
    return _Other(index, count, connection, token)


class _End(NamedTuple):
    """Why a run ends before its time."""

    process: int
    status: int
    reason: str


class _Lines:
    """Messages, a line of JSON each, out of the pieces that TCP delivers."""

    def __init__(self):
        self._rest = b""

    def feed(self, data: bytes) -> list[dict[str, Any]]:
        *lines, self._rest = (self._rest + data).split(b"\n")
        messages = [json.loads(line) for line in lines]
        if not all(isinstance(message, dict) for message in messages):
            raise ValueError("not a message of ours")
        return messages


class _Peer:
    """The first process's end of a connection."""

    def __init__(self, connection: socket.socket):
        self.connection = connection
        self.lines = _Lines()
        self.host = ""
        self.process: int | None = None  # until it has shown the token
        self.gone = False


class _First:
    """The first process's part: it listens to all the others."""

    def __init__(self, count: int):
        self._count = count
        self._lock = threading.Lock()
        self._end: _End | None = None
        self._leaving = False
        self._peers: list[_Peer] = []
        self._all_here, self._all_gone = threading.Event(), threading.Event()
        self._server = _listen()
        self.port = self._server.getsockname()[1]
        self.token = secrets.token_hex(16)
        threading.Thread(target=self._watch, daemon=True).start()

    def wait_for_all(self, timeout_s: float | int) -> None:
        if not self._all_here.wait(timeout_s):
            raise UserError(
                f"not all {self._count} processes reached process 0 at its TCP port {self.port}; "
                "open the ports between the hosts."
            )

    def close(self) -> None:
        self._all_gone.wait(_LAST_WORDS_S)
        self._leaving = True

    def give_up(self, status: int, reason: str, tell: Callable[[], None]) -> None:
        _let_news_arrive(status)
        if self._claim(_End(0, status, reason)):
            tell()
            self._tell_all_and_exit()
        time.sleep(2 * _LAST_WORDS_S)  # another reason came first: its thread ends this process
        exit_now(status)

    def _claim(self, end: _End) -> bool:
        """Whether this is the first reason; the later ones are its consequences."""
        with self._lock:
            if self._end is not None:
                return False
            self._end = end
            return True

    def _watch(self) -> None:
        with selectors.DefaultSelector() as selector, self._server:
            selector.register(self._server, selectors.EVENT_READ)
            while not self._leaving:
                for key, _ in selector.select(timeout=1):
                    if key.data is None:
                        peer = _Peer(_kept_alive(self._server.accept()[0]))
                        selector.register(peer.connection, selectors.EVENT_READ, peer)
                    elif not self._listen_to(key.data):
                        selector.unregister(key.data.connection)
                        key.data.connection.close()

    def _listen_to(self, peer: _Peer) -> bool:
        """Takes what a peer has sent; False if nothing more will come."""
        try:
            data = peer.connection.recv(1 << 16)
            messages = peer.lines.feed(data)
        except (OSError, ValueError):
            data, messages = b"", []
        for message in messages:
            if peer.process is None:
                if message.get("token") != self.token:
                    return False  # a stranger
                self._welcome(peer, message)
            elif "end" in message:
                end = _End(*message["end"])
                self._finish(peer, end, f"gave up: {end.reason}")
            elif "bye" in message:
                peer.gone = True
        if data:
            return True
        if peer.process is not None:
            if not peer.gone and not self._leaving:
                self._finish(peer, _End(peer.process, 1, _LOST), _LOST)
            peer.gone = True
            if self._all_here.is_set() and all(p.gone for p in self._peers):
                self._all_gone.set()
        return False

    def _welcome(self, peer: _Peer, message: dict[str, Any]) -> None:
        peer.process, peer.host = message["process"], message["host"]
        self._peers.append(peer)
        if len(self._peers) == self._count - 1:
            self._all_here.set()

    def _finish(self, peer: _Peer, end: _End, what: str) -> None:
        if self._claim(end):
            say(f"process {peer.process} of {self._count} ({peer.host}) {what}")
            # In a thread of its own: this one has to see the others go.
            threading.Thread(target=self._tell_all_and_exit, daemon=True).start()

    def _tell_all_and_exit(self) -> None:
        assert self._end is not None
        for peer in self._peers:
            with contextlib.suppress(OSError):
                _send(peer.connection, {"end": self._end})
        # The coordination service ends with this process, and JAX aborts whoever still needs it.
        self._all_gone.wait(_LAST_WORDS_S)
        exit_now(self._end.status)


class _Other:
    """The part of every process but the first."""

    def __init__(self, index: int, count: int, connection: socket.socket, token: str):
        self._index, self._count = index, count
        self._end: _End | None = None
        self._ended = threading.Event()
        self._giving_up = self._leaving = False
        self._connection = _kept_alive(connection)
        _send(connection, {"token": token, "process": index, "host": socket.gethostname()})
        threading.Thread(target=self._watch, daemon=True).start()

    def close(self) -> None:
        self._leaving = True
        with contextlib.suppress(OSError):
            _send(self._connection, {"bye": True})
            self._connection.shutdown(socket.SHUT_WR)

    def give_up(self, status: int, reason: str, tell: Callable[[], None]) -> None:
        _let_news_arrive(status)
        self._giving_up = True
        with contextlib.suppress(OSError):
            _send(self._connection, {"end": _End(self._index, status, reason)})
        self._ended.wait(2 * _LAST_WORDS_S)
        if self._end is None or self._end.process == self._index:
            tell()
        exit_now(status)

    def _watch(self) -> None:
        lines = _Lines()
        with self._connection:
            while self._end is None:
                try:
                    data = self._connection.recv(1 << 16)
                except OSError:
                    data = b""
                for message in lines.feed(data):
                    self._end = _End(*message["end"])
                if not data:
                    break
        if self._end is not None:
            self._ended.set()
            if not self._giving_up:
                exit_now(self._end.status)
        elif not self._leaving:
            say(f"process 0 of {self._count} {_LOST}")
            exit_now(1)


def _let_news_arrive(status: int) -> None:
    """An error that nobody foresaw may come of the death of a peer: a collective that failed.

    The watching thread knows of it by now, or will in a moment, and ends this process.
    """
    if status == 1:
        time.sleep(_GRACE_S)


def _listen() -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def _kept_alive(connection: socket.socket) -> socket.socket:
    """The kernel asks after the other side: a machine that has vanished is noticed in 30 s."""
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4)):
        if hasattr(socket, option):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    return connection


def _send(connection: socket.socket, message: dict[str, Any]) -> None:
    connection.sendall(json.dumps(message).encode() + b"\n")


def say(sentence: str) -> None:
    """One sentence on stderr, in the name of the program."""
    print(f"deepseek-jax: {sentence.rstrip('.')}.", file=sys.stderr, flush=True)


def exit_now(status: int) -> None:
    """Ends the process from any thread, whatever the others wait for."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)
