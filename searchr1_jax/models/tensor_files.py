"""safetensors files, read by slice and written tensor by tensor.

A file is the length of its header (8 bytes, little endian), the header (JSON: name → dtype, shape, place), and the
tensors one after another. The safetensors library copies a tensor twice on the way in and wants all of them in memory
on the way out; models larger than the host's memory need neither.
"""

from collections.abc import Callable, Collection, Sequence
import dataclasses
import json
import math
import os
import pathlib
from typing import Any

import ml_dtypes
import numpy as np

_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_INDEX = "model.safetensors.index.json"

Promised = tuple[str, tuple[int, ...], np.dtype]  # name, shape and dtype of a tensor to write


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """A tensor in a file, not read yet."""

    file: pathlib.Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int  # bytes from the file's beginning

    def view(self, shape: Sequence[int] | None = None) -> np.ndarray:
        """The tensor, of this shape if given, as a map of the file: only what is indexed and copied is read."""
        return np.memmap(self.file, self.dtype, "r", self.offset, tuple(shape or self.shape))

    def read_into(self, out: np.ndarray, shape: Sequence[int], index: tuple[slice, ...]) -> None:
        """Fills `out` with a slice of the tensor, seen as of this shape; casts where the dtypes differ."""
        whole = all(range(size)[cut] == range(size) for size, cut in zip(shape[1:], index[1:], strict=True))
        if self.dtype != out.dtype or not whole:
            out[...] = self.view(shape)[index]
            return
        # Whole rows lie together: one read, without the page faults of a map.
        row = math.prod(shape[1:]) * self.dtype.itemsize
        target = out.reshape(-1).view(np.uint8).data
        with open(self.file, "rb", buffering=0) as file:
            file.seek(self.offset + range(shape[0])[index[0]].start * row)
            place = 0
            while place < len(target):
                if not (count := file.readinto(target[place:])):
                    raise ValueError(f"{self.file} was cut short while it was read; fetch or export it again")
                place += count


def find(directory: pathlib.Path, *, without: Collection[str] = ()) -> dict[str, StoredTensor]:
    """All tensors of a directory, by name, `without` those that are no weights.

    Raises:
      ValueError: for a directory without safetensors, a shard that its index names and that is missing, or a file that
        is truncated or broken, by its name.
    """
    index = directory / _INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"{index} is broken ({error!r}); fetch or export the model again") from error
        missing = [name for name in names if not (directory / name).is_file()]
        if missing:
            raise ValueError(f"{index} names {missing}, not in {directory}; fetch or export the model again")
        files = [directory / name for name in names]
    else:
        files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{directory} holds no *.safetensors; name a Hugging Face model directory")
    found: dict[str, StoredTensor] = {}
    for file in files:
        found |= _header(file, without)
    return found


def _header(file: pathlib.Path, without: Collection[str]) -> dict[str, StoredTensor]:
    size, remedy = file.stat().st_size, "fetch or export it again"
    with open(file, "rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if not 0 < length <= size - 8:
            raise ValueError(f"{file} is truncated or no safetensors file ({size} bytes); {remedy}")
        try:
            header: dict[str, Any] = json.loads(opened.read(length))
            header.pop("__metadata__", None)
            entries = {name: _entry(**entry) for name, entry in header.items() if name not in without}
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"{file} has a broken safetensors header ({error!r}); {remedy}") from error
    found = {}
    for name, (stored, shape, begin, end) in entries.items():
        if 8 + length + end > size:
            raise ValueError(f"{file} is truncated: {name} ends at byte {8 + length + end} of {size}; {remedy}")
        if stored not in _DTYPES:
            raise ValueError(f"{file}: {name} is {stored}; convert it to one of {list(_DTYPES)}")
        dtype = _DTYPES[stored]
        if end - begin != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{file}: {name} of {shape} {dtype} does not take {end - begin} bytes; {remedy}")
        found[name] = StoredTensor(file=file, dtype=dtype, shape=shape, offset=8 + length + begin)
    return found


def _entry(dtype: str, shape: list[int], data_offsets: list[int]) -> tuple[str, tuple[int, ...], int, int]:
    begin, end = data_offsets
    return dtype, tuple(map(int, shape)), int(begin), int(end)


def write(
    directory: pathlib.Path, tensors: Sequence[Promised], produce: Callable[[str], np.ndarray], *, max_shard_bytes: int
) -> None:
    """Writes tensors in their order into as few files as the limit allows, and an index where there are several.

    `produce` is called once a name; its array is written and let go before the next.
    """
    shards: list[list[Promised]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(map(_bytes, [*shards[-1], tensor])) > max_shard_bytes:
            shards.append([])
        shards[-1].append(tensor)
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= {tensor[0]: name for tensor in shard}
        _write_file(directory / name, shard, produce)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(map(_bytes, tensors))}, "weight_map": weight_map}
        (directory / _INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _bytes(tensor: Promised) -> int:
    return math.prod(tensor[1]) * np.dtype(tensor[2]).itemsize


def _write_file(path: pathlib.Path, shard: list[Promised], produce: Callable[[str], np.ndarray]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape, dtype in shard:
        begin, end = end, end + _bytes((name, shape, dtype))
        header[name] = {"dtype": _NAMES[np.dtype(dtype)], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape, dtype in shard:
            value = np.ascontiguousarray(produce(name), dtype)
            if value.size != math.prod(shape):
                raise ValueError(f"{name} has {value.size} entries, {shape} were promised")
            file.write(value.reshape(-1).view(np.uint8).data)
            del value  # before the next is asked for
        file.flush()
        os.fsync(file.fileno())
