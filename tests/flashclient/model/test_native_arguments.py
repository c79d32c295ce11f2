"""Arguments of the native kernels: any of them gives a right result or an exception, and no access out of bounds.

Each argument is checked where it enters (client/native/array_arguments.h, readable_memory.h).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from flashclient import _native
from flashclient._native import (
    Attention,
    CellSource,
    CellWalk,
    ExpertStep,
    Ffn,
    FfnSum,
    LentMemory,
    Linear,
    LowRankPredictor,
    PredictStep,
    SignPredictor,
    Window,
    Workers,
    copy_bundles,
)
from weightd import _native as _weightd_native
from weightd_proto.encodings import plain

WORKERS = Workers(2)
HIDDEN, NEURONS = 8, 6
REFUSED = (TypeError, ValueError, IndexError, OverflowError, MemoryError, RuntimeError)
KINDS = ("plain", "plain", "plain", "strided", "backwards", "transposed", "skewed", "fixed", "repeated", "odd")
DTYPES = ("float32", "float64", "uint16", "uint32", "uint64", "int8", "uint8", "int64", "float16", "bool")

bundles = np.random.default_rng(0).standard_normal((NEURONS, 3 * HIDDEN)).astype(np.float32)
bundles.flags.writeable = False
before, lent = bundles.copy(), LentMemory(bundles)
WRONG_ADDRESSES = [1, 2**64 - 1, 2**63, bundles.ctypes.data + 1, bundles.ctypes.data + bundles.nbytes]
right_addresses = bundles.ctypes.data + np.arange(NEURONS, dtype=np.uint64) * np.uint64(bundles[0].nbytes)


def skewed(shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
    """An array at an address that is not aligned to its elements."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.zeros(size + 1, np.uint8)[1:].view(dtype).reshape(shape)


@st.composite
def arrays(draw: st.DrawFn) -> Any:
    """An array of any shape, dtype and strides, perhaps read-only, empty or at an odd address; or None."""
    shape = tuple(draw(st.lists(st.sampled_from([0, 1, 2, 3, 4, 6, 8, 9, 16, 17, 24]), max_size=4)))
    dtype = draw(st.sampled_from(DTYPES))
    kind = draw(st.sampled_from(KINDS))
    if kind == "odd":
        return draw(st.sampled_from([None, 0, -1, 2**64, 2**63, "x", b"xxxxxxxx", [1.0], 1e300, object()]))
    if kind == "skewed":
        return skewed(shape, dtype)
    made: NDArray[Any] = np.zeros(shape, dtype)
    if dtype == "uint64" and draw(st.booleans()):
        made[...] = draw(st.sampled_from(WRONG_ADDRESSES))
    elif dtype in ("uint32", "uint16"):
        made[...] = draw(st.sampled_from([0, 1, 5, 6, 2**16 - 1]))
    if kind == "strided":
        return np.repeat(made, 2, axis=-1)[..., ::2] if made.ndim else made
    if kind == "backwards":
        return made[..., ::-1] if made.ndim else made
    if kind == "transposed":
        return made.T
    if kind == "repeated":
        return np.broadcast_to(made, (3, *shape))
    made.flags.writeable = kind != "fixed"
    return made


BORDERS = [2**16, 2**31, 2**32 - 1, 2**32, 2**63, 2**64 - 1, 2**64]
numbers = st.sampled_from([0, 1, 2, 8, 16, 17, *BORDERS, -1, 1.5, None, "8"])
out, products = np.zeros((1, 3, 2, 8), np.float32), np.zeros((2, 9), np.float32)
x, h, y = np.zeros((2, HIDDEN), np.float32), np.zeros((NEURONS, 2), np.float32), np.zeros((2, HIDDEN), np.float32)
rows = np.zeros((1, 2, 3, 8), np.float32)
biases = np.zeros((2, NEURONS), np.float32)
ones, index = np.ones(NEURONS, np.uint16), np.arange(NEURONS, dtype=np.uint32)
ffn = Ffn(WORKERS, [plain("F32")] * 3, HIDDEN, "silu")
bf16 = Ffn(WORKERS, [plain("BF16")] * 3, HIDDEN, "silu")
low_rank_arrays = (np.ones((2, 8), np.float32), np.ones((9, 2), np.float32), np.ones(9, np.float32))
low_rank = LowRankPredictor(WORKERS, "F32", *low_rank_arrays)
sign_arrays = (np.zeros((9, 1), np.uint8), HIDDEN, np.zeros(9, np.int32))
sign = SignPredictor(WORKERS, *sign_arrays)
shape = _weightd_native.BundleShape.make([plain("F32")] * 3, HIDDEN, 96, 1, 96)

every_arrays = (np.zeros((1, HIDDEN), np.float32), np.zeros((NEURONS, 1), np.float32), np.ones(NEURONS, np.float32))
every = LowRankPredictor(WORKERS, "F32", *every_arrays)  # wants all


class Cells(CellSource):
    """Gives each cell the address of its bundle, or one that the fuzzer has chosen."""

    def __init__(self, address: Any = 0, cell: Any = 0) -> None:
        super().__init__()
        self._wrong = (cell, address)
        self._coming: list[tuple[Any, Any]] = []

    def share_slots(self) -> int:
        return NEURONS

    def lease_limit(self) -> int:
        return NEURONS

    def exchange(self, layer: int, acquire: Sequence[int], release: Sequence[int]) -> None:
        self._coming = [(cell, int(right_addresses[cell])) for cell in acquire]

    def extend(self, acquire: Sequence[int], release: Sequence[int]) -> None:
        self._coming += [(cell, int(right_addresses[cell])) for cell in acquire]

    def arrived(self) -> list[tuple[int, int]]:
        arrived = self._coming if self._wrong == (0, 0) else [self._wrong]
        self._coming = []
        return arrived

    def cancel(self) -> None: ...


def new_step(cells: Cells | None = None) -> PredictStep:
    return PredictStep(ffn, Window(cells or Cells(), 4, 1, 96, [NEURONS]), [every])


def new_experts(cells: Cells | None = None, experts: Any = 3, neurons: Any = NEURONS) -> ExpertStep:
    return ExpertStep((ffn,), CellWalk(cells or Cells(), 1, 96), [(experts, neurons)])


def add_all(addresses: Any, of_all: Any, x_rows: Any, y_rows: Any) -> None:
    every_neuron = FfnSum(bf16, x_rows, y_rows)
    every_neuron.add(addresses, of_all)
    every_neuron.finish()


def add_with_rows(addresses: Any, of_rows: Any, of_h: Any) -> None:
    every_neuron = FfnSum(bf16, x, y)
    every_neuron.add(addresses, None, of_rows, of_h)
    every_neuron.finish()


picks, weights = np.array([[0, 2], [1, 2]]), np.ones((2, 2), np.float32)
row_biases = np.zeros((len(biases), len(x), NEURONS), np.float32)
no_picks = (None, None, None, None, x, y)


# Every native function that takes arrays, with arguments that are right; the fuzzer changes any of them.
CALLS: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "fire": (ffn.fire, (right_addresses, index, ones, biases, x, h)),
    "accumulate": (ffn.accumulate, (right_addresses, h, y)),
    "add_rows": (ffn.add_rows, (right_addresses, biases, ones[None], x, y)),
    "sum": (add_all, (right_addresses, biases, x, y)),
    "sum with rows": (add_with_rows, (right_addresses, row_biases, np.zeros((len(x), NEURONS), np.float32))),
    "multiply": (Linear(WORKERS, "F32").multiply, (np.zeros((9, HIDDEN), np.float32), x, products)),
    "multiply 16 bit": (Linear(WORKERS, "BF16").multiply, (np.zeros((9, HIDDEN), np.uint16), x, products)),
    "attend": (Attention(WORKERS, "F32").attend, (rows, rows, rows, None, True, 1.0, out)),
    "attend masked": (
        Attention(WORKERS, "F32").attend,
        (rows, rows, rows, np.ones((1, 1, 3, 3), np.bool_), False, 1.0, out),
    ),
    "predict": (low_rank.predict, (x,)),
    "predict signs": (sign.predict, (x,)),
    "low rank": (
        lambda *given: LowRankPredictor(WORKERS, "F32", *given).predict(x),
        (*low_rank_arrays, None),
    ),
    "signs": (lambda *given: SignPredictor(WORKERS, *given).predict(x), sign_arrays),
    "copy_bundles": (copy_bundles, (right_addresses, np.zeros((NEURONS, 96), np.uint8))),
    "LentMemory": (LentMemory, (bundles,)),
    "checksum": (_native.checksum, (np.zeros(8, np.uint8),)),
    "step": (lambda *given: new_step().run(*given), (0, 0, 2, 3, biases, x, y)),
    "step of a wrong source": (lambda *given: new_step(Cells(*given)).run(0, 0, 2, 3, None, x, y), (0, 0)),
    "experts": (
        lambda *given: new_experts().run(*given),
        (0, picks, weights, biases, np.zeros((3, HIDDEN), np.float32), x, y),
    ),
    "experts of a wrong source": (
        lambda *given: new_experts(Cells(*given)).run(0, picks, weights, None, None, x, y),
        (0, 0),
    ),
    "ExpertStep": (lambda *given: new_experts(Cells(), *given).run(0, *no_picks), (1, NEURONS)),
    "CellWalk": (
        lambda *given: ExpertStep((ffn,), CellWalk(Cells(), *given), [(1, NEURONS)]).run(0, *no_picks),
        (1, 96),
    ),
    "Window": (lambda *given: Window(Cells(), *given), (4, 1, 96, [NEURONS])),
    "Ffn": (
        lambda hidden: Ffn(WORKERS, [plain("F32")] * 3, hidden, "silu").accumulate(right_addresses, h, y),
        (HIDDEN,),
    ),
    "weightd checksum": (_weightd_native.checksum, (np.zeros(8, np.uint8),)),
    "weightd convert": (
        lambda source, target: _weightd_native.convert(source, "F32", target, "BF16"),
        (np.zeros(16, np.uint8), np.zeros(8, np.uint8)),
    ),
    "weightd checksum_bundles": (
        lambda *given: _weightd_native.checksum_bundles(shape, *given),
        (np.zeros(NEURONS * 96, np.uint8), np.zeros(NEURONS, np.uint64)),
    ),
    "weightd cut_bundles": (
        lambda rows, columns, first, step, cells, sums: _weightd_native.cut_bundles(
            shape,
            [(rows, "F32", False, first, step), (rows, "F32", False, 0, 1), (columns, "F32", True, first, step)],
            cells,
            sums,
        ),
        (
            np.zeros(NEURONS * 32, np.uint8),
            np.zeros(NEURONS * 32, np.uint8),
            0,
            1,
            np.zeros(NEURONS * 96, np.uint8),
            np.zeros(NEURONS, np.uint64),
        ),
    ),
    "weightd BundleShape": (
        lambda *given: _weightd_native.BundleShape.make([plain("F32")] * 3, *given),
        (HIDDEN, 96, 1, 96),
    ),
}


@pytest.mark.parametrize("call", CALLS)
def test_right_arguments_are_taken(call: str) -> None:
    function, arguments = CALLS[call]
    function(*arguments)


@settings(max_examples=25, deadline=None)
@given(st.data())
@pytest.mark.parametrize("call", CALLS)
def test_any_arguments_are_refused_or_taken(call: str, data: st.DataObject) -> None:
    function, right = CALLS[call]
    given_arguments = list(right)
    for place in data.draw(st.sets(st.integers(0, len(right) - 1), min_size=1)):
        given_arguments[place] = data.draw(numbers if isinstance(right[place], int | float) else arrays())
    with suppress(*REFUSED):
        function(*given_arguments)
    assert np.array_equal(bundles, before), "a kernel wrote where bundles lie"


@pytest.mark.parametrize("columns", [0, 3])
def test_a_step_is_of_whole_sequences(columns: int) -> None:
    with pytest.raises(ValueError, match="whole sequences of `columns` tokens"):
        new_step().run(0, 0, columns, 3, None, x, y)


def test_addresses_lead_to_memory_that_is_lent_and_nowhere_else() -> None:
    private = np.ones((1, 3 * HIDDEN), np.float32)
    address = np.array([private.ctypes.data], np.uint64)
    with pytest.raises(ValueError, match="no bundle lies at 0x"):
        copy_bundles(address, np.zeros((1, 96), np.uint8))
    one = LentMemory(private)
    copied = np.zeros((1, 96), np.uint8)
    copy_bundles(address, copied)
    assert copied.tobytes() == private.tobytes()
    for beyond in (-4, 4):  # the bundle must lie wholly within
        with pytest.raises(ValueError, match="no bundle lies at 0x"):
            copy_bundles(address + np.int64(beyond).astype(np.uint64), copied)
    with pytest.raises(ValueError, match="not aligned"):
        ffn.accumulate(right_addresses[:1] + np.uint64(1), np.ones((1, 2), np.float32), y)
    del one
    with pytest.raises(ValueError, match="no bundle lies at 0x"):
        copy_bundles(address, copied)
