"""safetensors files against the safetensors library: what one writes the other reads, and what is broken is named."""

import json
import re
import weakref

import bits
import ml_dtypes
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from searchr1_jax.models import tensor_files

DTYPES = [np.float32, ml_dtypes.bfloat16, np.float16, np.float64]
INDEX = "model.safetensors.index.json"


def some(dtype=np.float32):
    """Three tensors of 24, 5 and 12 entries, of any bits whatever: negative zero, infinities and NaN among them."""
    rng, dtype = np.random.default_rng(0), np.dtype(dtype)
    shapes = {"b.matrix": (4, 6), "a.vector": (5,), "c.cube": (2, 3, 2)}
    return {
        name: np.frombuffer(rng.bytes(int(np.prod(shape)) * dtype.itemsize), dtype).reshape(shape)
        for name, shape in shapes.items()
    }


def write(directory, tensors, *, max_shard_bytes=10**9):
    """Writes arrays; returns the names in the order in which they were asked for."""
    asked = []

    def produce(name):
        asked.append(name)
        return tensors[name]

    promised = [(name, value.shape, value.dtype) for name, value in tensors.items()]
    tensor_files.write(directory, promised, produce, max_shard_bytes=max_shard_bytes)
    return asked


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_library_reads_what_we_write(tmp_path, dtype):
    write(tmp_path, some(dtype))
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    bits.assert_equal(bits.stored(tmp_path), some(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_we_read_what_the_library_writes(tmp_path, dtype):
    safetensors_numpy.save_file(some(dtype), tmp_path / "any name.safetensors", metadata={"format": "pt"})
    found = tensor_files.find(tmp_path)
    bits.assert_equal({name: tensor.view() for name, tensor in found.items()}, some(dtype))


def test_what_is_produced_is_cast_to_what_was_promised_and_may_lie_anyhow_in_memory(tmp_path):
    value = np.arange(6, dtype=np.float64).reshape(2, 3).T  # strided, of another dtype
    tensor_files.write(tmp_path, [("x", (3, 2), np.float32)], lambda name: value, max_shard_bytes=100)
    (stored,) = safetensors_numpy.load_file(tmp_path / "model.safetensors").values()
    assert stored.dtype == np.float32
    np.testing.assert_array_equal(stored, [[0, 3], [1, 4], [2, 5]])


def test_tensors_are_asked_for_once_and_in_order(tmp_path):
    assert write(tmp_path, some(), max_shard_bytes=100) == ["b.matrix", "a.vector", "c.cube"]


def test_a_tensor_is_let_go_before_the_next_is_asked_for(tmp_path):
    alive, most = set(), []

    def produce(name):
        made = np.empty(1000, np.float32)
        alive.add(name)
        weakref.finalize(made, alive.discard, name)
        most.append(len(alive))
        return made

    promised = [(str(i), (1000,), np.float32) for i in range(5)]
    tensor_files.write(tmp_path, promised, produce, max_shard_bytes=10**9)
    assert most == [1] * 5


def test_a_view_reads_only_what_is_indexed(tmp_path):
    """The bytes behind the index may change after the view was made; what was not indexed is never fetched."""
    write(tmp_path, some())
    stored = tensor_files.find(tmp_path)["b.matrix"]
    view = stored.view((2, 2, 6))
    assert isinstance(view, np.memmap) and not view.flags.writeable
    with open(stored.file, "r+b") as file:
        file.seek(stored.offset + 12 * 4)  # the second half
        file.write(np.full(12, 7, np.float32).tobytes())
    np.testing.assert_array_equal(view[0], some()["b.matrix"][:2])
    np.testing.assert_array_equal(view[1], 7)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])  # as stored, and cast
@pytest.mark.parametrize(
    "index",
    [
        (slice(None), slice(None)),
        (slice(1, 3), slice(None)),
        (slice(1, 3), slice(0, 6)),
        (slice(0, 4), slice(2, 5)),
        (slice(3, 4), slice(5, 6)),
    ],
)
def test_a_slice_is_read_into_an_array(tmp_path, dtype, index):
    write(tmp_path, some())
    tensor = tensor_files.find(tmp_path)["b.matrix"]
    expected = some()["b.matrix"][index].astype(dtype)
    out = np.zeros_like(expected)
    tensor.read_into(out, (4, 6), index)
    np.testing.assert_array_equal(out, expected)


def test_a_file_cut_short_after_it_was_found_is_named(tmp_path):
    write(tmp_path, some())
    tensor = tensor_files.find(tmp_path)["c.cube"]
    tensor.file.write_bytes(tensor.file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"{re.escape(str(tensor.file))} was cut short"):
        tensor.read_into(np.empty((2, 6), np.float32), (2, 6), (slice(None), slice(None)))


# 96, 20 and 48 bytes.
SHARDS = {
    164: [["b.matrix", "a.vector", "c.cube"]],
    163: [["b.matrix", "a.vector"], ["c.cube"]],
    116: [["b.matrix", "a.vector"], ["c.cube"]],
    115: [["b.matrix"], ["a.vector", "c.cube"]],
    50: [["b.matrix"], ["a.vector"], ["c.cube"]],  # what is larger than the limit has a file of its own
}


@pytest.mark.parametrize("limit", SHARDS)
def test_files_are_filled_up_to_the_limit_and_the_index_says_where_everything_is(tmp_path, limit):
    tensors, shards = some(), SHARDS[limit]
    write(tmp_path, tensors, max_shard_bytes=limit)
    n = len(shards)
    names = [f"model-0000{i}-of-0000{n}.safetensors" for i in range(1, n + 1)]
    if n == 1:
        names = ["model.safetensors"]
    for name, shard in zip(names, shards, strict=True):
        stored = safetensors_numpy.load_file(tmp_path / name)
        bits.assert_equal(stored, {key: tensors[key] for key in shard})
    if n == 1:
        assert not (tmp_path / INDEX).exists()
    else:
        assert json.loads((tmp_path / INDEX).read_text()) == {
            "metadata": {"total_size": 96 + 20 + 48},
            "weight_map": {key: name for name, shard in zip(names, shards, strict=True) for key in shard},
        }
    found = tensor_files.find(tmp_path)
    bits.assert_equal({name: tensor.view() for name, tensor in found.items()}, tensors)


def test_an_array_of_another_size_than_promised_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"x has 4 entries, \(5,\) were promised"):
        tensor_files.write(tmp_path, [("x", (5,), np.float32)], lambda name: np.zeros(4), max_shard_bytes=100)


# What is broken is named.


def refused(directory, file, said):
    with pytest.raises(ValueError, match=f"{re.escape(str(directory / file))}.*{said}"):
        tensor_files.find(directory)


def test_a_missing_shard_is_named(tmp_path):
    write(tmp_path, some(), max_shard_bytes=50)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    refused(tmp_path, INDEX, r"names \['model-00002-of-00003.safetensors'\].*fetch or export the model again")


@pytest.mark.parametrize("text", ['{"weight_map": {"a', "[]", "{}", '{"weight_map": ["a"]}'])
def test_a_broken_index_is_named(tmp_path, text):
    write(tmp_path, some(), max_shard_bytes=50)
    (tmp_path / INDEX).write_text(text)
    refused(tmp_path, INDEX, "fetch or export the model again")


@pytest.mark.parametrize("left", [0, 7, 8, 100, -1])
def test_a_truncated_file_is_named_also_among_several(tmp_path, left):
    write(tmp_path, some(), max_shard_bytes=50)
    file = tmp_path / "model-00002-of-00003.safetensors"
    file.write_bytes(file.read_bytes()[:left])
    refused(tmp_path, file.name, "truncated.*fetch or export it again")


def with_header(path, header: bytes, body: bytes = bytes(8)):
    path.write_bytes(len(header).to_bytes(8, "little") + header + body)


@pytest.mark.parametrize(
    "header",
    [
        b'{"x": {"dtype": "F32", "shape": [2], "data_',
        b"\xff\xfe\x00\x00",
        b"[1, 2]",
        b'{"x": 3}',
        b'{"x": {"dtype": "F32", "shape": [2]}}',
        b'{"x": {"dtype": "F32", "shape": 2, "data_offsets": [0, 8]}}',
        b'{"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4, 8]}}',
    ],
)
def test_a_broken_header_is_named(tmp_path, header):
    with_header(tmp_path / "model.safetensors", header)
    refused(tmp_path, "model.safetensors", "broken safetensors header.*fetch or export it again")


def test_a_tensor_whose_place_is_not_its_size_is_named(tmp_path):
    header = b'{"x": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}'
    with_header(tmp_path / "model.safetensors", header)
    refused(tmp_path, "model.safetensors", "x of .3,. float32 does not take 8 bytes")


def test_a_dtype_we_do_not_read_is_named_with_those_we_do(tmp_path):
    safetensors_numpy.save_file({"scale": np.zeros(3, np.int8)}, tmp_path / "model.safetensors")
    refused(tmp_path, "model.safetensors", "scale is I8; convert it to one of .*'F32', 'F16', 'BF16'")


def test_a_directory_without_safetensors_is_named(tmp_path):
    refused(tmp_path, "", "holds no .*safetensors; name a Hugging Face model directory")
