"""Checkpoints: what comes back is what was saved, or the previous one, or a clear sentence."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from deepseek_jax.checkpoint import Checkpointer, claim_run_directory, load_params
from deepseek_jax.checkpoint.files import newest_intact
from deepseek_jax.types import TrainState, UserError


def make_state(seed: int = 0, *, vocabulary: int = 64, dtype=jnp.bfloat16) -> TrainState:
    """A state with every kind of leaf: all bit patterns of a random integer are fair game."""
    rng = np.random.default_rng(seed)

    def bits(shape, dtype):
        width = jnp.dtype(dtype).itemsize
        raw = rng.integers(0, 2 ** (8 * width), size=shape, dtype=f"uint{8 * width}")
        return jnp.asarray(raw.view(dtype))

    params = {
        "embed": {"weight": bits((vocabulary, 16), dtype)},
        "layers": {"wq_a": bits((4, 16, 8), jnp.float32), "norm": bits((4, 16), dtype)},
    }
    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.masked(
            optax.scale_by_adam(), {"embed": True, "layers": {"wq_a": True, "norm": False}}
        ),
        optax.scale_by_schedule(optax.constant_schedule(1.0)),
    )
    opt_state = jax.tree.map(lambda leaf: bits(leaf.shape, leaf.dtype), tx.init(params))
    return TrainState(jnp.int32(seed), params, opt_state, bits((3, 8), jnp.float32))


def abstract(state, sharding=None):
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), state
    )


def assert_same_bits(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def save(checkpointer, step, state=None, **changes):
    arguments = {"data_state": b"\x00\xffdata", "rng": jax.random.key(step), "extra": {"n": step}}
    state = make_state(step) if state is None else state
    checkpointer.save(step, state, **(arguments | changes))


def run_with(directory: Path, *steps: int) -> Path:
    claim_run_directory(directory, {"model": {"vocab_size": 64}}, resume=False)
    with Checkpointer(directory, keep_last=len(steps)) as checkpointer:
        for step in steps:
            save(checkpointer, step)
    return directory


def steps_in(directory: Path) -> list[int]:
    return sorted(int(path.name) for path in (directory / "checkpoints").iterdir())


def restore(directory: Path, state=None):
    with Checkpointer(directory) as checkpointer:
        return checkpointer.restore_latest(abstract(make_state() if state is None else state))


def files_of(step: Path) -> list[Path]:
    return sorted(path for path in step.glob("*/**/*") if path.is_file() and path.stat().st_size)


# --- round trips ------------------------------------------------------------------------------


@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 2**31 - 1),
    dtype=st.sampled_from([jnp.bfloat16, jnp.float16, jnp.float32]),
    data_state=st.binary(max_size=50) | st.dictionaries(st.text(), st.integers() | st.text()),
    extra=st.dictionaries(st.text(), st.floats(allow_nan=False) | st.lists(st.integers())),
    typed=st.booleans(),
)
def test_what_comes_back_is_what_was_saved_bit_for_bit(
    tmp_path_factory, seed, dtype, data_state, extra, typed
):
    directory = tmp_path_factory.mktemp("run")
    state = make_state(seed, dtype=dtype)
    rng = jax.random.key(seed) if typed else jax.random.PRNGKey(seed)
    with Checkpointer(directory) as checkpointer:
        checkpointer.save(7, state, data_state=data_state, rng=rng, extra=extra)
        checkpointer.wait()
        back = checkpointer.restore_latest(abstract(state))
    assert back is not None
    assert (back.step, back.data_states, back.extra) == (7, [data_state], extra)
    assert_same_bits(back.state, state)
    assert back.rng.dtype == rng.dtype
    assert (jax.random.bits(back.rng) == jax.random.bits(rng)).all()


def test_keys_of_any_implementation_and_shape_come_back(tmp_path):
    rng = jax.random.split(jax.random.key(3, impl="rbg"), (2, 3))
    with Checkpointer(tmp_path) as checkpointer:
        save(checkpointer, 1, rng=rng)
        checkpointer.wait()
        back = checkpointer.restore_latest(abstract(make_state())).rng
    assert back.dtype == rng.dtype
    assert (jax.random.key_data(back) == jax.random.key_data(rng)).all()


def mesh(*shape: int) -> Mesh:
    devices = np.array(jax.devices()[: int(np.prod(shape))]).reshape(shape)
    return Mesh(devices, ("data", "expert")[: len(shape)])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (NamedSharding(mesh(8), PartitionSpec("data")), NamedSharding(mesh(2, 4), PartitionSpec())),
        (
            NamedSharding(mesh(2, 4), PartitionSpec("expert", "data")),
            NamedSharding(mesh(4, 2), PartitionSpec(None, "data")),
        ),
        (NamedSharding(mesh(4), PartitionSpec("data")), None),
        (None, NamedSharding(mesh(2, 2), PartitionSpec(("data", "expert")))),
    ],
)
def test_restores_on_another_mesh(tmp_path, old, new):
    def place(leaf, sharding):
        whole = sharding is None or leaf.ndim < 2 or leaf.shape[0] % 8
        spec = PartitionSpec() if whole else sharding.spec
        return None if sharding is None else NamedSharding(sharding.mesh, spec)

    state = make_state(1)
    if old is not None:
        state = jax.tree.map(lambda leaf: jax.device_put(leaf, place(leaf, old)), state)
    wanted = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place(leaf, new)), state
    )
    with Checkpointer(tmp_path) as checkpointer:
        save(checkpointer, 1, state)
        checkpointer.wait()
        back = checkpointer.restore_latest(wanted).state
    assert_same_bits(back, state)
    if new is not None:
        same = []
        jax.tree.map(lambda leaf, spec: same.append(leaf.sharding == spec.sharding), back, wanted)
        assert all(same)


def test_buffers_may_be_donated_as_soon_as_save_returns(tmp_path):
    @jax.jit
    def fill(value):
        return jnp.full((1 << 21,), value, jnp.float32)

    overwrite = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
    with Checkpointer(tmp_path, keep_last=1) as checkpointer:
        for step in range(1, 6):
            weight = fill(step)
            state = TrainState(jnp.int32(step), {"w": weight}, (), jnp.zeros((1, 1)))
            save(checkpointer, step, state)
            overwrite(weight).block_until_ready()
            checkpointer.wait()
            wanted = TrainState(
                jax.ShapeDtypeStruct((), jnp.int32),
                {"w": jax.ShapeDtypeStruct((1 << 21,), jnp.float32)},
                (),
                jax.ShapeDtypeStruct((1, 1), jnp.float32),
            )
            back = checkpointer.restore_latest(wanted).state.params["w"]
            assert (back == step).all()


def test_save_does_not_wait_for_the_disk(tmp_path, monkeypatch):
    from deepseek_jax.checkpoint import checkpointer as module

    write, began = module.write_checksums, time.monotonic()
    monkeypatch.setattr(module, "write_checksums", lambda path: (time.sleep(2), write(path)))
    with Checkpointer(tmp_path) as checkpointer:
        save(checkpointer, 1)
        assert time.monotonic() - began < 1.5
        assert not (tmp_path / "checkpoints/1").exists()
        checkpointer.wait()
        assert (tmp_path / "checkpoints/1").exists()
        checkpointer.close()  # closing twice is harmless


def test_nothing_saved_yet_is_none(tmp_path):
    assert restore(tmp_path) is None


def test_keeps_the_last_and_every_mth(tmp_path):
    with Checkpointer(tmp_path, keep_last=2, keep_every=4) as checkpointer:
        for step in range(1, 12):
            save(checkpointer, step)
    assert steps_in(tmp_path) == [4, 8, 10, 11]
    with Checkpointer(tmp_path, keep_last=1) as checkpointer:  # also after a restart
        save(checkpointer, 12)
    assert steps_in(tmp_path) == [12]


def test_a_step_saved_twice_is_saved_once(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        save(checkpointer, 1, extra={"first": True})
        save(checkpointer, 1, extra={"first": False})
    assert restore(tmp_path).extra == {"first": True}


def test_there_is_no_pickle(tmp_path):
    run_with(tmp_path, 1)
    assert not [path for path in files_of(tmp_path / "checkpoints/1") if path.suffix == ".pkl"]
    for path in files_of(tmp_path / "checkpoints/1"):
        assert not path.read_bytes().startswith((b"\x80\x04", b"\x80\x05")), path


# --- damage -----------------------------------------------------------------------------------


def truncate(path: Path):
    os.truncate(path, path.stat().st_size - 1)


def flip_a_bit(path: Path):
    content = bytearray(path.read_bytes())
    content[random.Random(path.name).randrange(len(content))] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("harm", [truncate, flip_a_bit, Path.unlink])
def test_damage_to_any_file_is_noticed(tmp_path, harm):
    run_with(tmp_path, 1)
    steps = tmp_path / "checkpoints"
    files = files_of(steps / "1")
    assert {path.relative_to(steps / "1").parts[0] for path in files} == {
        "model",
        "optimizer",
        "host",
    }
    for victim in files:
        whole = victim.read_bytes()
        harm(victim)
        with pytest.raises(UserError, match=victim.name):
            newest_intact(steps)
        victim.write_bytes(whole)
    assert newest_intact(steps) == (1, {})


@pytest.mark.parametrize("harm", [truncate, flip_a_bit, Path.unlink])
def test_a_damaged_checkpoint_is_reported_and_the_previous_one_used(tmp_path, caplog, harm):
    run_with(tmp_path, 1, 2)
    victim = max(files_of(tmp_path / "checkpoints/2"), key=lambda path: path.stat().st_size)
    harm(victim)
    back = restore(tmp_path)
    assert back.step == 1
    assert_same_bits(back.state, make_state(1))
    (line,) = [record.message for record in caplog.records if "damaged" in record.message]
    assert "step 2" in line
    assert victim.name in line
    assert (tmp_path / "damaged-step-2").exists()
    with Checkpointer(tmp_path) as checkpointer:  # and the step can be written again
        save(checkpointer, 2)
    assert restore(tmp_path).step == 2


@pytest.mark.parametrize("content", ["", "{", "[]", '{"files": {}}', '{"files": 3}', None])
def test_unreadable_checksums_mean_a_damaged_checkpoint(tmp_path, content):
    run_with(tmp_path, 1, 2)
    checksums = tmp_path / "checkpoints/2/checksums.json"
    checksums.unlink() if content is None else checksums.write_text(content)
    assert load_params(tmp_path)[1].tobytes() == make_state(1).router_bias_LE.tobytes()
    assert restore(tmp_path).step == 1


def test_the_same_step_may_be_damaged_twice(tmp_path):
    run_with(tmp_path, 1)
    for _ in range(3):
        with Checkpointer(tmp_path) as checkpointer:
            save(checkpointer, 2)
        truncate(files_of(tmp_path / "checkpoints/2")[0])
        assert restore(tmp_path).step == 1
    assert len(list(tmp_path.glob("damaged-step-2*"))) == 3


def test_orbax_notes_on_a_step_are_not_needed(tmp_path):
    run_with(tmp_path, 1)
    for path in (tmp_path / "checkpoints/1").iterdir():
        if path.is_file() and path.name != "checksums.json":
            path.write_bytes(b"\x00garbage")
    assert restore(tmp_path).step == 1
    with Checkpointer(tmp_path) as checkpointer:
        save(checkpointer, 2)
    assert restore(tmp_path).step == 2


def test_if_all_are_damaged_nothing_is_touched(tmp_path):
    run_with(tmp_path, 1, 2)
    for step in (1, 2):
        truncate(files_of(tmp_path / f"checkpoints/{step}")[0])
    with pytest.raises(UserError, match=r"no checkpoint .* is intact .*step 2: .*step 1: "):
        restore(tmp_path)
    assert steps_in(tmp_path) == [1, 2]


def test_two_do_not_write_to_one_directory(tmp_path):
    """The second would remove the step that the first is writing, and end its run."""
    unfinished = tmp_path / "checkpoints/5.orbax-checkpoint-tmp"
    with Checkpointer(tmp_path) as checkpointer:
        save(checkpointer, 1)
        unfinished.mkdir()
        with pytest.raises(UserError, match="is in use by another process; wait for it to end"):
            Checkpointer(tmp_path)
        assert unfinished.exists()
    assert restore(tmp_path).step == 1
    assert not unfinished.exists()


KILLED = """
    import sys, jax, jax.numpy as jnp
    from deepseek_jax.checkpoint import Checkpointer
    from deepseek_jax.types import TrainState

    checkpointer = Checkpointer(sys.argv[1], keep_last=2)
    print("ready", flush=True)
    for step in range(int(sys.argv[2]), 10**6):
        value = {f"w{i}": jnp.full((50_000,), step + i, jnp.float32) for i in range(4)}
        state = TrainState(jnp.int32(step), value, (value,), jnp.full((2, 2), float(step)))
        checkpointer.save(step, state, data_state=b"%d" % step, rng=jax.random.PRNGKey(step))
"""


def test_kill_9_at_any_moment_leaves_a_usable_checkpoint(tmp_path):
    value = {f"w{i}": jax.ShapeDtypeStruct((50_000,), jnp.float32) for i in range(4)}
    wanted = TrainState(
        jax.ShapeDtypeStruct((), jnp.int32),
        value,
        (value,),
        jax.ShapeDtypeStruct((2, 2), jnp.float32),
    )
    newest, rng = 0, random.Random(0)
    for _ in range(5):
        child = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path), str(newest + 1)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        while not any(p.name.isdecimal() for p in (tmp_path / "checkpoints").iterdir()):
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.4))
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        back = restore(tmp_path, wanted)
        assert back is not None
        assert back.step >= newest
        assert not list(tmp_path.glob("damaged*"))  # never visible and yet incomplete
        assert back.data_states == [b"%d" % back.step]
        assert all((back.state.params[f"w{i}"] == back.step + i).all() for i in range(4))
        assert all((back.state.opt_state[0][f"w{i}"] == back.step + i).all() for i in range(4))
        newest = back.step
    assert newest > 1


# --- a state that does not fit ----------------------------------------------------------------


def test_another_vocabulary_is_named_with_both_shapes(tmp_path):
    run_with(tmp_path, 1)
    with pytest.raises(UserError) as error:
        restore(tmp_path, make_state(vocabulary=32))
    message = str(error.value)
    assert "params/embed/weight" in message
    assert "[64, 16]" in message
    assert "[32, 16]" in message
    with pytest.raises(
        UserError, match=r"params/embed/weight is \[64, 16\] .* and \[32, 16\] here"
    ):
        load_params(tmp_path, abstract(make_state(vocabulary=32).params))


def test_another_dtype_optimizer_or_tree_is_named(tmp_path):
    run_with(tmp_path, 1)
    state = make_state()
    with pytest.raises(UserError, match=r"embed/weight is bfloat16\[64, 16\] .* float32\[64, 16\]"):
        restore(tmp_path, make_state(dtype=jnp.float32))
    with pytest.raises(
        UserError, match=r"opt_state/1/inner_state/count is int32\[\] .* absent here"
    ):
        restore(tmp_path, state._replace(opt_state=()))
    more = {**state.params, "head": state.params["embed"]}
    with pytest.raises(UserError, match=r"params/head/weight is absent in the checkpoint"):
        restore(tmp_path, state._replace(params=more))


def test_states_of_all_processes_that_saved_come_back(tmp_path, monkeypatch):
    from deepseek_jax.checkpoint import checkpointer as module

    shares = [b'{"json": {"of": 0}}', b'{"json": {"of": 1}}']
    with monkeypatch.context() as patch:
        patch.setattr(
            module, "exchange", lambda message: shares if b"json" in message else [b"9" * 9]
        )
        with Checkpointer(tmp_path) as checkpointer:
            save(checkpointer, 1, data_state={"of": 0})
    assert restore(tmp_path).data_states == [{"of": 0}, {"of": 1}]


PROCESS = """
    import sys, jax
    process, port, directory = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    jax.distributed.initialize(f"localhost:{port}", 2, process)

    import jax.numpy as jnp, numpy as np
    from jax.experimental import multihost_utils
    from jax.sharding import Mesh, NamedSharding, PartitionSpec
    from deepseek_jax.checkpoint import Checkpointer, claim_run_directory
    from deepseek_jax.types import TrainState

    mesh = Mesh(np.array(jax.devices()), ("data",))
    def place(value, *spec):
        return jax.jit(lambda: value, out_shardings=NamedSharding(mesh, PartitionSpec(*spec)))()
    def state(step):
        w = jnp.arange(256.0).reshape(64, 4) + step
        return TrainState(place(jnp.int32(step)), {"w": place(w, "data")}, (place(-w, "data"),),
                          place(jnp.ones((2, 4))))

    claim_run_directory(directory, {}, resume=False)
    with jax.set_mesh(mesh), Checkpointer(directory) as checkpointer:
        for step in (1, 2):
            data = bytes(process * 5 + step)  # of another length on every process
            checkpointer.save(step, state(step), data_state=data, rng=jax.random.key(step))
        checkpointer.wait()
        if process == 0:
            victim = max(checkpointer.directory.glob("checkpoints/2/model/*1/d/*"),
                         key=lambda path: path.stat().st_size)
            victim.write_bytes(victim.read_bytes()[:-1])
        multihost_utils.sync_global_devices("damaged")
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state(0))
        back = checkpointer.restore_latest(abstract)
        assert (back.step, [len(s) for s in back.data_states]) == (1, [1, 6]), back
        for a, b in zip(jax.tree.leaves(back.state), jax.tree.leaves(state(1)), strict=True):
            for x, y in zip(a.addressable_shards, b.addressable_shards, strict=True):
                assert (np.asarray(x.data) == np.asarray(y.data)).all()
        checkpointer.save(2, state(2), data_state=b"", rng=jax.random.key(2))
"""


@pytest.mark.slow
def test_two_processes_save_and_restore_together(tmp_path):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-c", textwrap.dedent(PROCESS)]
    both = [
        subprocess.Popen(
            [*command, str(process), port, str(tmp_path / "run")],
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"},
        )
        for process in (0, 1)
    ]
    errors = [process.communicate(timeout=120)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], "\n".join(errors)
    assert steps_in(tmp_path / "run") == [1, 2]
    assert (tmp_path / "run/damaged-step-2").exists()


# --- handing over -----------------------------------------------------------------------------


def test_load_params_reads_no_optimizer_state(tmp_path):
    run_with(tmp_path, 1, 2)
    shutil.rmtree(tmp_path / "checkpoints/2/optimizer")
    params, router_bias, config = load_params(tmp_path)
    assert_same_bits(params, make_state(2).params)
    assert_same_bits(router_bias, make_state(2).router_bias_LE)
    assert config == {"model": {"vocab_size": 64}}
    assert steps_in(tmp_path) == [1, 2]


def test_load_params_places_and_casts(tmp_path):
    claim_run_directory(tmp_path, {}, resume=False)
    params = {"w": jnp.arange(32, dtype=jnp.float32).reshape(8, 4)}
    with Checkpointer(tmp_path) as checkpointer:
        save(checkpointer, 1, TrainState(jnp.int32(1), params, (), jnp.zeros((1, 2))))
    sharding = NamedSharding(mesh(8), PartitionSpec("data"))
    wanted = {"w": jax.ShapeDtypeStruct((8, 4), jnp.bfloat16, sharding=sharding)}
    back, _, _ = load_params(tmp_path, wanted)
    assert back["w"].sharding == sharding
    assert_same_bits(back["w"], params["w"].astype(jnp.bfloat16))


def test_load_params_skips_a_damaged_checkpoint_but_moves_nothing(tmp_path):
    run_with(tmp_path, 1, 2)
    truncate(files_of(tmp_path / "checkpoints/2/model")[0])
    assert_same_bits(load_params(tmp_path)[0], make_state(1).params)
    assert steps_in(tmp_path) == [1, 2]


def test_load_params_without_a_run_or_a_checkpoint(tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        load_params(tmp_path / "nowhere")
    claim_run_directory(tmp_path, {}, resume=False)
    with pytest.raises(UserError, match="no checkpoint yet"):
        load_params(tmp_path)


# --- full disk --------------------------------------------------------------------------------


def test_no_room_is_seen_before_writing(tmp_path, monkeypatch):
    with Checkpointer(tmp_path) as checkpointer:
        save(checkpointer, 1)
        checkpointer.wait()
        usage = shutil.disk_usage(tmp_path)._replace(free=1000)
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "disk_usage", lambda path: usage)
            with pytest.raises(UserError) as error:
                save(checkpointer, 2)
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(make_state()))
        for part in (str(tmp_path), f"{needed:,} bytes", "1,000 free", "--resume"):
            assert part in str(error.value)
        assert steps_in(tmp_path) == [1]
        save(checkpointer, 2)  # room has been made
    assert restore(tmp_path).step == 2


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(28, "No space left on device"), "the disk is full"),
        (ValueError("RESOURCE_EXHAUSTED: write: No space left on device [source]"), "disk is full"),
        (OSError(5, "Input/output error"), r"saving step 2 .* failed .*Input/output error"),
    ],
)
def test_a_failed_save_surfaces_at_the_next_call(tmp_path, monkeypatch, caplog, error, message):
    from deepseek_jax.checkpoint import checkpointer as module

    def fail(folder):
        raise error

    with Checkpointer(tmp_path, keep_last=1) as checkpointer:
        save(checkpointer, 1)
        checkpointer.wait()
        for surface in (checkpointer.wait, lambda: save(checkpointer, 3)):
            with monkeypatch.context() as patch:
                patch.setattr(module, "write_checksums", fail)
                save(checkpointer, 2)  # returns: the failure is in the background
                with pytest.raises(UserError, match=message):
                    surface()
                assert "Traceback" not in caplog.text  # one sentence, and the cause chained to it
            assert steps_in(tmp_path) == [1]  # the previous one stays, the tmp directory goes
        assert checkpointer.restore_latest(abstract(make_state())).step == 1
        save(checkpointer, 2)
    assert steps_in(tmp_path) == [2]


def test_a_failure_on_the_way_out_does_not_hide_what_ended_the_run(tmp_path, monkeypatch, caplog):
    from deepseek_jax.checkpoint import checkpointer as module

    def fail(folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_checksums", fail)

    def interrupted():
        with Checkpointer(tmp_path) as checkpointer:
            save(checkpointer, 1)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert "the disk is full" in caplog.text
    with pytest.raises(UserError, match="the disk is full"), Checkpointer(tmp_path) as checkpointer:
        save(checkpointer, 1)


@pytest.fixture
def small_disk(tmp_path):
    directory = tmp_path / "disk"
    directory.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(directory)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting a file system is not permitted here")
    yield directory
    subprocess.run(["umount", str(directory)], check=True)


# What TensorStore could not write it reports late, to an event loop that Orbax has closed by then.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_disk_that_is_really_full(small_disk, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 2**32, 90_000, dtype=np.uint32).view(np.float32)

    def state(count):
        return TrainState(jnp.int32(1), {"w": jnp.asarray(noise[:count])}, (), jnp.zeros((1, 1)))

    with Checkpointer(small_disk) as checkpointer:
        save(checkpointer, 1, state(90_000))
        checkpointer.wait()
        (small_disk / "ballast").write_bytes(bytes(300_000))
        with pytest.raises(UserError, match=r"needs 360,\d\d\d bytes for the checkpoint of step 2"):
            save(checkpointer, 2, state(90_000))
        # The disk fills up only after the check.
        usage = shutil.disk_usage(small_disk)
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10**9))
            save(checkpointer, 2, state(90_000))
            with pytest.raises(UserError, match="the disk is full"):
                checkpointer.wait()
        assert steps_in(small_disk) == [1]
        back = checkpointer.restore_latest(abstract(state(90_000)))
        assert_same_bits(back.state, state(90_000))
        (small_disk / "ballast").unlink()
        save(checkpointer, 2, state(90_000))
        checkpointer.wait()
        assert checkpointer.restore_latest(abstract(state(90_000))).step == 2


# --- run directories --------------------------------------------------------------------------

CONFIG = {
    "model": {"vocab_size": 64, "layers": [1, 2]},
    "train": {"steps": 10, "log": {"every": 1}},
}


def test_a_fresh_directory_is_claimed_and_resumed(tmp_path):
    directory = tmp_path / "out/run"
    claim_run_directory(directory, CONFIG, resume=False)
    assert json.loads((directory / "run.json").read_text())["config"] == CONFIG
    same = {"train": CONFIG["train"], "model": {"vocab_size": 64, "layers": (1, 2)}}
    claim_run_directory(directory, same, resume=True)
    assert [path.name for path in directory.iterdir()] == ["run.json"]


def test_another_run_is_not_overwritten(tmp_path):
    claim_run_directory(tmp_path, CONFIG, resume=False)
    with pytest.raises(UserError, match=r"already holds a run.*--resume.*another output directory"):
        claim_run_directory(tmp_path, CONFIG, resume=False)
    shutil.rmtree(tmp_path)
    (tmp_path / "checkpoints/10").mkdir(parents=True)
    with pytest.raises(UserError, match="already holds a run"):
        claim_run_directory(tmp_path, CONFIG, resume=False)


def test_resume_names_the_first_field_that_contradicts(tmp_path):
    claim_run_directory(tmp_path, CONFIG, resume=False)
    changed = {"model": {"vocab_size": 65, "layers": [1, 2]}, "train": {"steps": 20}}
    with pytest.raises(UserError, match=r"model\.vocab_size = 64, this resume asks for 65"):
        claim_run_directory(tmp_path, changed, resume=True)
    changed["model"]["vocab_size"] = 64
    with pytest.raises(UserError, match=r"train\.log\.every = 1.*'absent'"):
        claim_run_directory(tmp_path, changed, resume=True, may_change=["train.steps"])
    allowed = ["train.steps", "train.log"]
    claim_run_directory(tmp_path, changed, resume=True, may_change=allowed)
    assert json.loads((tmp_path / "run.json").read_text())["config"] == changed


def test_resume_needs_a_run(tmp_path):
    with pytest.raises(UserError, match=r"holds no run.*without --resume"):
        claim_run_directory(tmp_path, CONFIG, resume=True)
    for text in ("", "{", "[]", "{}"):
        (tmp_path / "run.json").write_text(text)
        with pytest.raises(UserError, match="not readable as the record of a run"):
            claim_run_directory(tmp_path, CONFIG, resume=True)


def test_directories_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("")
    for action in (
        lambda path: claim_run_directory(path, CONFIG, resume=False),
        lambda path: Checkpointer(path),
    ):
        with pytest.raises(UserError, match="Not a directory"):
            action(tmp_path / "file/run")
        with pytest.raises(UserError, match="mount the bucket"):
            action("gs://bucket/run")
