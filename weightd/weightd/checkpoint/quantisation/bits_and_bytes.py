"""bitsandbytes, 4 bits (nf4) and 8.

nf4     NAME of U8 [values / 2, 1], two numbers in a byte, the upper half first. NAME.absmax has the greatest
        magnitude of each 64 values, in row-major order: F32, or of U8 (double quantised): then it is
        nested_quant_map[absmax] * nested_absmax[block of 256] + nested_offset.
        NAME.quant_state.bitsandbytes__nf4 is JSON with shape and offset.
8 bits  NAME.weight of I8 and NAME.SCB of F32, the greatest magnitude of a row, for which 127 stands.
        NAME.weight_format of U8, if it is there, is 0: rows lie one after the other. Older versions wrote orders of
        single processors, too (col32, col_turing, col_ampere), which are refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from weightd.checkpoint.quantisation.scales import QuantisedTensors, misfit, scaled, small_values
from weightd.disk.tensors import BlockScales, NestedScales, SourceTensor
from weightd.errors import CheckpointError
from weightd_proto.encodings import NF4_NUMBERS, PACKED_NF4, plain

Named = Iterator[tuple[str, SourceTensor]]

STATE = ".quant_state.bitsandbytes__"
NF4 = "nf4"
ABSMAX, MAP = ".absmax", ".quant_map"
NESTED_ABSMAX, NESTED_MAP = ".nested_absmax", ".nested_quant_map"
ROWS, FORMAT = ".SCB", ".weight_format"
STATE_BYTES_MAX = 1 << 16
F32_MAX = float(np.finfo(np.float32).max)


def bits_and_bytes(q: QuantisedTensors) -> Named:
    """The tensors of a checkpoint that bitsandbytes has quantised. CheckpointError for fp4."""
    states = {name.partition(STATE)[0]: name for name in q.tensors if STATE in name}
    sides = {module + end for module in states for end in (ABSMAX, MAP, NESTED_ABSMAX, NESTED_MAP)}
    for name, tensor in q.tensors.items():
        module = name.removesuffix(".weight")
        if name in states:
            yield name, _of_four_bits(q, name, tensor, states[name])
        elif tensor.dtype == "I8" and module + ROWS in q.tensors:
            _require_rows(q, module, tensor)
            matrix = scaled(tensor, q.tensors[module + ROWS], q.dtype)
            assert matrix.scales is not None
            yield name, replace(matrix, scales=replace(matrix.scales, divisor=127.0))
        elif module != name and module + ROWS in q.tensors:
            raise CheckpointError(
                f"{name} is {tensor.dtype} in {tensor.path}, but has scales, {module + ROWS}: download it again"
            )
        elif STATE not in name and name not in sides and not name.endswith((ROWS, FORMAT)):
            yield name, tensor


def _require_rows(q: QuantisedTensors, module: str, tensor: SourceTensor) -> None:
    order = q.tensors.get(module + FORMAT)
    if order is None or (order.encoding == plain("U8") and order.elements == 1 and not small_values(order).any()):
        return
    raise CheckpointError(
        f"{tensor.name} in {tensor.path} is in the order of one processor, by {order.name}: save it with a newer "
        "bitsandbytes, or import the unquantised checkpoint"
    )


def _of_four_bits(q: QuantisedTensors, name: str, tensor: SourceTensor, state_name: str) -> SourceTensor:
    kind, state = state_name.partition(STATE)[2], _state(q.tensors[state_name])
    if kind != NF4:
        raise CheckpointError(
            f"{name} in {tensor.path} is bitsandbytes' {kind}, read is {NF4}: import the unquantised checkpoint"
        )
    rows, columns, size = _sizes(state)
    if not rows or tensor.dtype != "U8" or 2 * tensor.elements != rows * columns:
        raise CheckpointError(
            f"{name} has shape {list(tensor.shape)} of {tensor.dtype} in {tensor.path}, which is no matrix "
            f"{state.get('shape')} of {NF4} in blocks of {state.get('blocksize')}"
        )
    if columns % size:
        raise CheckpointError(
            f"{name} in {tensor.path} has rows of {columns}, which are not whole blocks of {size}: import the "
            "unquantised checkpoint"
        )
    numbers = q.need(name + MAP, tensor)
    if numbers.encoding != plain("F32") or not np.array_equal(small_values(numbers), np.array(NF4_NUMBERS, np.float32)):
        raise CheckpointError(f"{numbers.name} in {numbers.path} are not the numbers of {NF4}: download the file again")
    matrix = replace(tensor, shape=(rows, columns), encoding=PACKED_NF4)
    greatest = q.need(name + ABSMAX, tensor)
    if greatest.elements * size != matrix.elements or greatest.encoding not in (plain("F32"), plain("U8")):
        raise misfit(greatest, matrix)
    of_rows = replace(greatest, shape=(rows, columns // size))
    nested = _nested(q, name, greatest, state) if greatest.dtype == "U8" else None
    return replace(matrix, scales=BlockScales(of_rows, 1, size, rows, q.dtype, nested=nested))


def _sizes(state: dict[str, Any]) -> tuple[int, int, int]:
    """Rows, columns, and values of a block; zeros if they are not known."""
    shape = state.get("shape")
    sizes = [*(shape if isinstance(shape, list) else []), state.get("blocksize")]
    if len(sizes) != 3 or not all(type(size) is int and size > 0 for size in sizes):
        return 0, 0, 0
    rows, columns, size = (int(size) for size in sizes)
    return rows, columns, size


def _nested(q: QuantisedTensors, name: str, greatest: SourceTensor, state: dict[str, Any]) -> NestedScales:
    numbers, factors = q.need(name + NESTED_MAP, greatest), q.need(name + NESTED_ABSMAX, greatest)
    size, offset = state.get("nested_blocksize"), state.get("nested_offset")
    known = numbers.encoding == factors.encoding == plain("F32") and numbers.elements == 256
    if not known or type(size) is not int or size <= 0 or factors.elements != -(-greatest.elements // size):
        raise misfit(factors, greatest)
    if not isinstance(offset, int | float) or not abs(offset) <= F32_MAX:
        raise CheckpointError(f"{name} has nested_offset = {offset!r} in {greatest.path}: download the file again")
    return NestedScales(small_values(numbers).tobytes(), small_values(factors).tobytes(), size, float(offset))


def _state(tensor: SourceTensor) -> dict[str, Any]:
    try:
        read = json.loads(small_values(tensor).tobytes()) if tensor.elements <= STATE_BYTES_MAX else None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{tensor.name} in {tensor.path} is not JSON: download the file again") from error
    if not isinstance(read, dict):
        raise CheckpointError(f"{tensor.name} in {tensor.path} does not hold a JSON object: download the file again")
    return read
