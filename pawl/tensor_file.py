"""Safetensors files, read without trusting them: what they say they hold is checked against what is there.

The format: eight bytes with the header's length, the header as JSON (for every tensor its type, shape and place), and
the tensors' bytes. Nothing in it can run, but a header may lie, or be no header at all.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from pawl.errors import BadAdapter

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 32 * 1024**2
"""A mixture of 256 experts in 61 layers, adapted everywhere, needs 14 MB."""
METADATA = "__metadata__"
ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
"""The types that adapters are trained and served in."""
EXPONENT = {"F32": 0x7F800000, "F16": 0x7C00, "BF16": 0x7F80}
"""The bits that are all set in what is infinite or not a number (IEEE 754; BF16 is the upper half of an F32)."""
FOREIGN_MAGIC = {b"PK\x03\x04": "a zip archive, such as torch.save writes", b"\x80": "a pickle"}
CHUNK_ITEMS = 1 << 20


class Tensor(NamedTuple):
    """One tensor of a file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    """Its first byte, counted from the beginning of the file."""
    end: int


def read_tensors(file: BinaryIO, n_bytes: int) -> list[Tensor]:
    """What a safetensors file of `n_bytes` holds, in the order of the bytes, which it fills without a gap.

    Raises:
        BadAdapter: it is something else, or its header does not fit its contents.
    """
    start = file.read(LENGTH_BYTES)
    length = int.from_bytes(start, "little")
    if length > MAX_HEADER_BYTES and (foreign := _foreign(start)):
        raise BadAdapter(f"the weights are {foreign} under the name of safetensors")
    if length > MAX_HEADER_BYTES:
        raise BadAdapter(f"the weights' header is {length} bytes long, {MAX_HEADER_BYTES} at most are read")
    if len(start) < LENGTH_BYTES or LENGTH_BYTES + length > n_bytes:
        raise BadAdapter("the weights end before their header does")
    tensors = [_tensor(name, entry, LENGTH_BYTES + length) for name, entry in _header(file.read(length)).items()]
    tensors.sort(key=lambda tensor: (tensor.start, tensor.end))
    _check_places(tensors, LENGTH_BYTES + length, n_bytes)
    return tensors


def check_finite(file: BinaryIO, tensors: Sequence[Tensor]) -> None:
    """Make sure that every value is a finite number.

    Raises:
        BadAdapter: names the first tensor where one is not.
    """
    for tensor in tensors:
        file.seek(tensor.start)
        if any(bool((chunk & EXPONENT[tensor.dtype] == EXPONENT[tensor.dtype]).any()) for chunk in _bits(file, tensor)):
            raise BadAdapter(f"{tensor.name} has values that are infinite or not a number")


def _bits(file: BinaryIO, tensor: Tensor) -> Iterator[np.ndarray[Any, np.dtype[np.unsignedinteger[Any]]]]:
    n_left = tensor.end - tensor.start
    item = ITEM_BYTES[tensor.dtype]
    while n_left and (read := file.read(min(n_left, CHUNK_ITEMS * item))):
        n_left -= len(read)
        yield np.frombuffer(read, dtype=f"<u{item}")


def _foreign(start: bytes) -> str | None:
    return next((what for magic, what in FOREIGN_MAGIC.items() if start.startswith(magic)), None)


def _header(text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text, object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as exc:
        raise BadAdapter("the weights' header is not JSON") from exc
    if not isinstance(header, dict):
        raise BadAdapter("the weights' header is not a JSON object")
    return {name: entry for name, entry in header.items() if name != METADATA}


def _without_repeats(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise BadAdapter("the weights' header names something twice")
    return found


def _tensor(name: str, entry: Any, data_start: int) -> Tensor:
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(start), int(end)]}:
            pass
        case _:
            raise BadAdapter(f"the weights' header does not describe {name!r}")
    if dtype not in ITEM_BYTES:
        raise BadAdapter(f"{name} is of type {dtype}; adapters are {', '.join(ITEM_BYTES)}")
    if not all(type(size) is int and size > 0 for size in shape):
        raise BadAdapter(f"{name} has the shape {shape}")
    if end - start != math.prod(shape) * ITEM_BYTES[dtype]:
        raise BadAdapter(f"{name} has {end - start} bytes, which is not its shape {shape}")
    return Tensor(name, dtype, tuple(shape), data_start + start, data_start + end)


def _check_places(tensors: Sequence[Tensor], data_start: int, n_bytes: int) -> None:
    ends = [data_start, *(tensor.end for tensor in tensors)]
    for tensor, before in zip(tensors, ends, strict=False):
        if tensor.start != before:
            raise BadAdapter(f"{tensor.name} overlaps another tensor, or leaves bytes that belong to none")
    if ends[-1] != n_bytes:
        raise BadAdapter(f"the weights should end at byte {ends[-1]}, the file has {n_bytes}")


def by_name(tensors: Sequence[Tensor]) -> Mapping[str, Tensor]:
    """The tensors by their names, which a header cannot repeat."""
    return {tensor.name: tensor for tensor in tensors}
