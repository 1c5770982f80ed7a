"""Checkpoints: what comes back is what was saved, wherever it is restored and whatever happened in between."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import slow_decoder

from searchr1_jax.core import parallel
from searchr1_jax.models import decoder
from searchr1_jax.run import checkpoint

MODEL = slow_decoder.tiny_config(width=32)
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(), optax.add_decayed_weights(0.1))


@pytest.fixture
def open_checkpoints(tmp_path):
    """Opens the checkpoints of one directory, again and again."""
    opened = []

    def open_(keep=2):
        opened.append(checkpoint.Checkpoints(tmp_path / "checkpoints", keep=keep))
        return opened[-1]

    yield open_
    for checkpoints in opened:
        checkpoints.close()


def _state(seed=0):
    """A policy and an optimizer state of which no array is zero, on the mesh in use."""
    policy = slow_decoder.on_mesh(MODEL, slow_decoder.random_params(MODEL, seed))
    optimizer_state = jax.jit(OPTIMIZER.init)(policy)
    return {"policy": policy, "optimizer": jax.tree.map(lambda x: x + x.dtype.type(3), optimizer_state)}


def _assert_equal(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == e.dtype
        np.testing.assert_array_equal(jax.device_get(a), e)


def test_weights_optimizer_states_and_json_come_back_to_the_last_bit(laptop, open_checkpoints):
    state, extra = _state(), {"stream": {"step": 7, "seed": 0, "questions": [10, 20]}, "note": "—"}
    expected = jax.device_get(state)
    checkpoints = open_checkpoints()
    checkpoints.save(5, state, extra)
    checkpoints.close()
    restored, restored_extra = open_checkpoints().restore(5, _state(seed=1))
    _assert_equal(restored, expected)
    assert restored_extra == extra


def test_shapes_alone_tell_how_to_restore_one_tree_of_several(laptop, open_checkpoints):
    state = _state()
    checkpoints = open_checkpoints()
    checkpoints.save(1, state, {})
    checkpoints.close()
    _, shapes = decoder.abstract(decoder.Policy, MODEL)
    restored, _ = open_checkpoints().restore(1, {"policy": shapes})
    assert list(restored) == ["policy"]
    _assert_equal(restored["policy"], jax.device_get(state["policy"]))


def test_the_arrays_may_be_donated_as_soon_as_save_returns(laptop, open_checkpoints):
    state = {"a": {"x": jnp.arange(2_000_000, dtype=jnp.float32)}}
    overwrite = jax.jit(lambda x: -x, donate_argnums=0)
    checkpoints = open_checkpoints()
    checkpoints.save(1, state, {})
    # The memory is overwritten, unless the save still reads it: then JAX keeps it and donates nothing.
    assert overwrite(state["a"]["x"])[1] == -1
    checkpoints.close()
    restored, _ = open_checkpoints().restore(1, {"a": {"x": jnp.zeros(2_000_000)}})
    _assert_equal(restored, {"a": {"x": np.arange(2_000_000, dtype=np.float32)}})


def test_a_checkpoint_of_one_device_is_restored_onto_a_mesh_of_eight(laptop, open_checkpoints):
    state = _state()
    expected = jax.device_get(state)
    checkpoints = open_checkpoints()
    checkpoints.save(1, state, {})
    checkpoints.close()
    with jax.set_mesh(parallel.make_mesh(data=2, fsdp=2, tensor=2, devices=jax.devices()[:8])):
        like = _state(seed=1)
        restored, _ = open_checkpoints().restore(1, like)
        _assert_equal(restored, expected)
        for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(like), strict=True):
            assert a.sharding.is_equivalent_to(b.sharding, a.ndim)
        embedding = restored["policy"]["decoder"]["embedding"]
        assert embedding.addressable_shards[0].data.shape == (32, 16)  # of 64 x 32: vocabulary and width halved


def test_what_waits_in_host_memory_comes_back_there(laptop, open_checkpoints):
    state = _state()
    expected = jax.device_get(state)
    state["optimizer"] = parallel.in_host_memory(state["optimizer"])
    checkpoints = open_checkpoints()
    checkpoints.save(1, state, {})
    checkpoints.close()
    like = _state(seed=1)
    elsewhere, _ = open_checkpoints().restore(1, like)  # saved there, restored to the device
    like["optimizer"] = parallel.in_host_memory(like["optimizer"])
    restored, _ = open_checkpoints().restore(1, like)
    for trees, memory in ((elsewhere, jax.devices()[0].default_memory().kind), (restored, parallel.HOST_MEMORY)):
        _assert_equal(trees, expected)
        assert {x.sharding.memory_kind for x in jax.tree.leaves(trees["optimizer"])} == {memory}


def test_what_is_none_is_left_out_and_comes_back_as_none(laptop, open_checkpoints):
    checkpoints = open_checkpoints()
    checkpoints.save(1, {"policy": {"a": jnp.ones(3)}, "value": None}, {})
    checkpoints.close()
    restored, _ = open_checkpoints().restore(1, {"policy": {"a": jnp.zeros(3)}, "value": None})
    assert restored["value"] is None
    _assert_equal(restored["policy"], {"a": np.ones(3, np.float32)})


def test_only_the_newest_are_kept(laptop, open_checkpoints):
    checkpoints = open_checkpoints(keep=2)
    assert checkpoints.latest is None and checkpoints.steps == []
    for step in (2, 4, 9):
        checkpoints.save(step, {"a": {"x": jnp.full(3, step)}}, {})
    checkpoints.close()
    again = open_checkpoints(keep=2)
    assert again.latest == 9 and again.steps == [4, 9]
    assert again.restore(4, {"a": {"x": jnp.zeros(3, jnp.int32)}})[0]["a"]["x"][0] == 4


def _largest(directory):
    return max((path for path in directory.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def _flip(directory):
    path = _largest(directory / "a")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _cut(directory):
    path = _largest(directory / "a")
    path.write_bytes(path.read_bytes()[:-1])


def _empty(directory):
    shutil.rmtree(directory)
    directory.mkdir()


DAMAGE = {
    "a flipped byte": _flip,
    "a file cut short": _cut,
    "a missing file": lambda directory: _largest(directory / "a").unlink(),
    "a missing item": lambda directory: shutil.rmtree(directory / "a"),
    "a broken manifest": lambda directory: (directory / "manifest.json").write_text("{"),
    "an empty directory": _empty,
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_used(laptop, open_checkpoints, tmp_path, capsys, name):
    trees = {step: {"a": {"x": jnp.asarray(np.random.default_rng(step).random(3000, np.float32))}} for step in (1, 12)}
    checkpoints = open_checkpoints()
    for step, tree in trees.items():
        checkpoints.save(step, tree, {"step": step})
    checkpoints.close()
    directory = tmp_path / "checkpoints"
    DAMAGE[name](directory / "12")
    with pytest.raises(ValueError, match="checkpoints/12 is damaged .*; choose another --step"):
        checkpoints.check(12)
    capsys.readouterr()
    again = open_checkpoints()
    assert f"checkpoint {directory}/12 is damaged" in (said := capsys.readouterr().out) and "now 12.damaged" in said
    assert again.latest == 1 and again.steps == [1] and (directory / "12.damaged").is_dir()
    restored, extra = again.restore(1, {"a": {"x": jnp.zeros(3000)}})
    _assert_equal(restored, jax.device_get(trees[1]))
    assert extra == {"step": 1}
    again.save(12, trees[12], {"step": 12})  # which is learned once more
    again.close()
    assert open_checkpoints().latest == 12 and capsys.readouterr().out == ""
    DAMAGE[name](directory / "12")  # and comes to the same harm
    assert open_checkpoints().latest == 1 and (directory / "12.damaged1").is_dir()


def test_a_checkpoint_of_a_version_without_manifests_is_restored(laptop, open_checkpoints, tmp_path):
    checkpoints = open_checkpoints()
    checkpoints.save(1, {"a": {"x": jnp.ones(3)}}, {"step": 1})
    checkpoints.close()
    (tmp_path / "checkpoints" / "1" / "manifest.json").unlink()
    again = open_checkpoints()
    assert again.latest == 1 and again.restore(1, {"a": {"x": jnp.zeros(3)}})[1] == {"step": 1}


def test_what_a_kill_left_half_written_is_no_checkpoint_and_is_in_nobodys_way(laptop, open_checkpoints, tmp_path):
    tree = {"a": {"x": jnp.ones(3)}}
    checkpoints = open_checkpoints()
    checkpoints.save(2, tree, {})
    checkpoints.close()
    directory = tmp_path / "checkpoints"
    # Orbax writes beside the final name and renames at the end.
    shutil.copytree(directory / "2", directory / "4.orbax-checkpoint-tmp")
    shutil.rmtree(directory / "4.orbax-checkpoint-tmp" / "extra")
    again = open_checkpoints()
    assert again.latest == 2 and again.steps == [2]
    again.save(4, tree, {"saved": "again"})
    again.close()
    last = open_checkpoints()
    assert last.latest == 4 and last.restore(4, tree)[1] == {"saved": "again"}
