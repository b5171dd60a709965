"""The lifeline by itself; what it does between processes is in test_distributed.py."""

import json
import socket
import threading
from collections.abc import Iterator

import pytest

from deepseek_jax import lifeline
from deepseek_jax.types import UserError


class Store:
    """Stands in for JAX's coordination service."""

    def __init__(self):
        self.values: dict[str, str] = {}

    def key_value_set(self, key: str, value: str) -> None:
        self.values[key] = value

    def blocking_key_value_get(self, key: str, timeout_in_ms: int) -> str:
        return self.values[key]


@pytest.fixture
def ended(monkeypatch) -> Iterator[list[int]]:
    """Statuses with which a process would have ended."""
    statuses: list[int] = []
    monkeypatch.setattr(lifeline, "exit_now", statuses.append)
    before = set(threading.enumerate())
    yield statuses
    # One that is still on its way to ``exit_now`` would end pytest, without a word.
    for thread in set(threading.enumerate()) - before:
        thread.join(30)
        assert not thread.is_alive()


def test_all_arrive_say_goodbye_and_nobody_is_missed(ended, capsys):
    first, store = lifeline._First(3), Store()
    store.key_value_set(lifeline._KEY, json.dumps([first.port, first.token]))
    others = [lifeline.connect(i, 3, store, "localhost", 10) for i in (1, 2)]
    first.wait_for_all(10)
    for other in others:
        other.close()
    first.close()
    assert first._all_gone.is_set()
    assert not ended
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [b"", b"GET / HTTP/1.1\r\n\r\n", b"3\n", b"{}\n", b'{"token": "no", "process": 1}\n']
)
def test_a_stranger_is_shown_out(ended, capsys, words):
    first, store = lifeline._First(2), Store()
    store.key_value_set(lifeline._KEY, json.dumps([first.port, first.token]))
    with socket.create_connection(("localhost", first.port)) as stranger:
        stranger.sendall(words)
        stranger.shutdown(socket.SHUT_WR)
        stranger.settimeout(10)
        assert stranger.recv(1) == b""  # hung up
    assert not first._all_here.is_set()
    other = lifeline.connect(1, 2, store, "localhost", 10)
    first.wait_for_all(10)
    other.close()
    first.close()
    assert not ended
    assert not capsys.readouterr().err


def test_who_does_not_come_is_reported():
    with pytest.raises(UserError, match=r"not all 2 processes reached process 0 at its TCP port"):
        lifeline._First(2).wait_for_all(0.1)


def test_a_port_that_is_closed_is_reported():
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    store = Store()
    store.key_value_set(lifeline._KEY, json.dumps([port, ""]))
    with pytest.raises(UserError, match=rf"process 1 cannot reach .* TCP port {port} .*open the"):
        lifeline.connect(1, 2, store, "localhost", 10)


def test_only_the_first_reason_counts(ended, capsys):
    first, store = lifeline._First(3), Store()
    store.key_value_set(lifeline._KEY, json.dumps([first.port, first.token]))
    one, two = (lifeline.connect(i, 3, store, "localhost", 10) for i in (1, 2))
    first.wait_for_all(10)
    told: list[int] = []
    two.give_up(2, "the input is bad.", lambda: told.append(2))
    one.give_up(130, "interrupted.", lambda: told.append(1))
    first.close()
    assert told == [2]
    said = capsys.readouterr().err
    assert "process 2 of 3 (" in said
    assert "gave up: the input is bad." in said
    assert "interrupted" not in said
