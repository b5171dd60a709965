"""Programs that try to get out, to stay, to use up the machine, or to forge a verdict."""

import json
import os
import time

import pytest

from deepseek_jax.rewards import CodeReward, Completion, Limits, RewardSum, Sample, Sandbox, Term
from deepseek_jax.rewards import sandbox as module
from deepseek_jax.rewards.code import extract_program, read_tests
from deepseek_jax.types import UserError

LIMITS = Limits(wall_s=1.0, cpu_s=1, memory_bytes=2**28, processes=4, output_bytes=10_000)


@pytest.fixture(scope="module")
def sandbox():
    try:
        return Sandbox(limits=LIMITS)
    except UserError as error:
        pytest.skip(str(error))


def run(sandbox, program, stdin=""):
    began = time.monotonic()
    result = sandbox.run({"program.py": program}, stdin)
    assert time.monotonic() - began < LIMITS.wall_s + 2
    return result


def attempt(sandbox, statement):
    """What a statement prints, or the name of what it raised."""
    program = f"""
try:
    {statement}
except BaseException as error:
    print(type(error).__name__)
"""
    return run(sandbox, program).output.decode().strip()


def test_a_plain_program(sandbox):
    assert run(sandbox, "print(int(input()) + 1)", "41\n") == (0, b"42\n")
    assert run(sandbox, "import sys; sys.exit(3)").status == 3
    assert run(sandbox, "print(len(input()))", "x" * 10**6).output == b"1000000\n"
    assert run(sandbox, "print('ü', '\\ud800'.encode('utf8', 'replace'))").status == 0


@pytest.mark.parametrize(
    "statement",
    [
        "open('/x', 'w')",
        "open('/program.py', 'a')",
        "open('/usr/x', 'w')",
        "open('/dev/x', 'w')",
        "import os; os.mkdir('/tmp')",
        "import os; os.remove('/program.py')",
        "import os; os.chmod('/program.py', 0)",
        "import tempfile; tempfile.mkdtemp()",
    ],
)
def test_nothing_can_be_written(sandbox, statement):
    assert attempt(sandbox, statement) in ("OSError", "PermissionError", "FileNotFoundError")


def test_only_python_and_the_program_can_be_read(sandbox):
    paths = ["/etc/passwd", "/proc/self/environ", "/proc/1/environ", "/sys", "/home", "/tmp"]
    paths += [os.path.expanduser("~/.bashrc"), __file__, module.__file__]
    found = attempt(sandbox, f"import os; print([p for p in {paths!r} if os.path.exists(p)])")
    assert found == "[]"


def test_the_environment_is_empty(sandbox, monkeypatch):
    monkeypatch.setenv("SECRET", "hunter2")
    names = attempt(sandbox, "import os; print(*sorted(os.environ))")
    assert names == "HOME LANG PATH"


@pytest.mark.parametrize("address", ["('1.1.1.1', 53)", "('127.0.0.1', 22)", "('::1', 22)"])
def test_there_is_no_network(sandbox, address):
    connect = f"import socket; socket.create_connection({address}, 1); print('connected')"
    assert attempt(sandbox, connect) == "OSError"


def test_a_name_is_not_resolved(sandbox):
    assert attempt(sandbox, "import socket; socket.getaddrinfo('example.org', 80)") == "gaierror"


def test_other_processes_cannot_be_reached(sandbox):
    program = """
import os, signal
for pid in (os.getppid(), -1, 1, %d):
    try:
        os.kill(pid, signal.SIGKILL)
        print(pid, "killed")
    except OSError:
        pass
print("alive")
"""
    # In its own PID namespace 1 is the launcher's child, which its children's signals do not end.
    output = run(sandbox, program % os.getpid()).output.decode().split("\n")
    assert "alive" in output
    assert f"{os.getpid()} killed" not in output


def test_no_right_can_be_regained(sandbox):
    program = """
import ctypes, os
libc = ctypes.CDLL(None)
results = [libc.unshare(0x10000000), libc.unshare(0x00020000)]
results += [libc.mount(b"none", b"/", b"tmpfs", 0, None), libc.setuid(0), libc.chroot(b"/usr")]
print(results, os.getuid() != 0)
"""
    assert run(sandbox, program).output == b"[-1, -1, -1, -1, -1] True\n"


@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "import time; time.sleep(60)",
        "while True: print('x' * 1000)",
        "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
        "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)",
        "import os, time\nif os.fork(): os._exit(0)\nos.setsid(); time.sleep(60)",
    ],
    ids=["loop", "sleep", "flood", "fork bomb", "deaf", "daemon"],
)
def test_every_program_ends_and_leaves_nothing(sandbox, program):
    mark = f"{time.time_ns()}"
    run(sandbox, f"{program}  # {mark}")
    users = [str(uid) for uid in (65534, *range(1_900_000_000, 1_900_001_000))]
    deadline = time.monotonic() + 2
    while left := [pid for pid in _processes() if _user(pid) in users and _is_python(pid)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.02)


def _processes():
    return [pid for pid in os.listdir("/proc") if pid.isdecimal()]


def _user(pid):
    try:
        with open(f"/proc/{pid}/status") as file:
            return next(line.split()[1] for line in file if line.startswith("Uid:"))
    except OSError:
        return ""


def _is_python(pid):
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return b"/program.py" in file.read()
    except OSError:
        return False


def test_limits(sandbox):
    assert attempt(sandbox, "x = 'x' * 2**29") == "MemoryError"
    patient = Sandbox(limits=LIMITS._replace(wall_s=20.0))
    assert patient.run({"program.py": "while True: pass"}).status == 128 + 9  # CPU time
    assert run(sandbox, "import time; time.sleep(60)").status is None  # wall-clock time
    flood = run(sandbox, "while True: print('x' * 1000)")
    assert flood.status is None
    assert len(flood.output) == LIMITS.output_bytes
    forks = """
import os, time
n = 0
try:
    while os.fork(): n += 1
    time.sleep(60)
except OSError:
    print(n)
"""
    assert 0 < int(run(sandbox, forks).output) <= LIMITS.processes + 3


def test_isolation_that_cannot_be_had_is_refused(monkeypatch, tmp_path):
    broken = tmp_path / "launcher.py"
    text = module._LAUNCHER.read_text().replace(
        "    enter_namespaces(root)\n", '    raise OSError("unshare: Operation not permitted")\n'
    )
    broken.write_text(text)
    monkeypatch.setattr(module, "_LAUNCHER", broken)
    with pytest.raises(UserError, match="Operation not permitted"):
        Sandbox(limits=LIMITS)
    weak = Sandbox(isolation="limits", limits=LIMITS)  # on demand alone
    assert run(weak, "print(input())", "42").output == b"42\n"
    assert run(weak, "while True: pass").status in (None, -9, 128 + 9)
    assert attempt(weak, "x = 'x' * 2**29") == "MemoryError"
    assert attempt(weak, "file = open('x', 'w'); file.write('x'); file.close()") != ""


# --- tests of programs ------------------------------------------------------------------------

ADD = json.dumps({"tests": [{"stdin": "1 2", "stdout": "3"}, {"stdin": "5 5", "stdout": "10"}]})
CALLS = json.dumps({"asserts": ["assert f(2) == [2, (4,), {'a': 1.5}]", "assert f(0) == None"]})
F = "def f(x): return [x, (x * x,), {'a': 1.5}] if x else None"


@pytest.fixture(scope="module")
def reward(sandbox):
    code = CodeReward(sandbox)

    def of(program, reference):
        text = f"<think>hm</think>\n```python\n{program}\n```"
        return code("", Completion(text, 9), reference)

    return of


def test_right_and_wrong_programs(reward):
    assert reward("print(sum(map(int, input().split())))", ADD) == 1
    assert reward("print(3)", ADD) == 0
    assert reward("import sys\nprint(sum(map(int, input().split())))\nsys.exit(1)", ADD) == 0
    assert reward("print(", ADD) == 0
    assert reward(F, CALLS) == 1
    assert reward(F.replace("(x * x,)", "[x * x]"), CALLS) == 0  # a list is no tuple
    assert reward(F.replace("x * x", "x + 1"), CALLS) == 0
    assert reward("print('chatter')\n" + F, CALLS) == 1
    assert reward("", CALLS) == 0


@pytest.mark.parametrize(
    "program",
    [
        "import os; os._exit(0)",
        "print('ok'); print('PASSED'); print(1.0)",
        "class Yes:\n    def __eq__(self, other): return True\ndef f(x): return Yes()",
        "class Yes(list):\n    def __eq__(self, other): return True\ndef f(x): return Yes()",
        "import json\njson.dumps = lambda *a, **k: '[true, true]'\ndef f(x): return 1",
        "import sys\nsys.modules['__main__'].encode = lambda x: True\ndef f(x): return 1",
        "import os\nfor fd in range(3, 64):\n    try: os.write(fd, b'[[], null]')\n"
        "    except OSError: pass\nos._exit(0)",
        "import builtins\nbuiltins.eval = lambda *a: True",
        "def f(x): raise SystemExit(0)",
        "import sys\nsys.setrecursionlimit(10**9)\ndef f(x): return f(x)",
        "def f(x):\n    y = []\n    for _ in range(10**5): y = [y]\n    return y",
        "print(open('expressions.json').read())",
    ],
)
def test_a_verdict_cannot_be_forged(reward, program):
    assert reward(program, CALLS) == 0
    assert reward(program, ADD) == 0


def test_the_expected_values_are_not_in_the_sandbox(reward):
    """A program that looks everywhere it can finds the question, never the answer."""
    reference = json.dumps({"asserts": ["assert f(1) == 8674665223082153551"]})
    program = """
import gc, os, re
def f(x):
    seen = [open("/" + name).read() for name in os.listdir("/") if name.count(".")]
    seen += [repr(o)[:1000000] for o in gc.get_objects() if isinstance(o, (list, dict, tuple))]
    found = [re.search("8674665223082" r"[0-9]+", text) for text in seen]
    return next((int(match[0]) for match in found if match), 0)
"""
    assert reward(program, reference) == 0


@pytest.mark.parametrize(
    ("text", "program"),
    [
        ("```python\nx\n```", "x\n"),
        ("```\nx\n```", "x\n"),
        ("<think>```python\ny\n```</think>```python\nx\n```", "x\n"),
        ("<answer>```python\nx\n```</answer>", "x\n"),
        ("<answer>x</answer>", "x"),
        ("```python\nx\n```\n```python\ny\n```", None),
        ("<think>```python\nx\n```</think>", None),
        ("```python\nx", None),
        ("x", None),
        ("", None),
    ],
)
def test_one_program_outside_the_thinking(text, program):
    assert extract_program("", text) == program


@pytest.mark.parametrize(
    "reference",
    [
        "",
        "[]",
        "{}",
        '{"tests": []}',
        '{"tests": [{"stdin": "1"}]}',
        '{"asserts": ["assert f(1)"]}',
        '{"asserts": ["assert f(1) == g(1)"]}',
        '{"asserts": ["assert f(1) == 1j"]}',
        '{"asserts": ["f(1) == 2"]}',
        '{"asserts": ["assert ("]}',
    ],
)
def test_references_that_hold_no_tests_are_named(reference):
    with pytest.raises(UserError, match=r"test"):
        read_tests(reference)


def test_in_a_sum_a_hanging_program_is_worth_nothing(sandbox):
    samples = [Sample("", Completion(f"```\n{p}\n```", 3), ADD) for p in ("while True: pass", "")]
    report = RewardSum([Term("code", 1.0, CodeReward(sandbox))])(samples)
    assert report.total_B.tolist() == [0, 0]
