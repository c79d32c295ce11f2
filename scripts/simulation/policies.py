"""Replacement policies that the pool's own is compared with. Each counts the hits of a trace in a pool of `slots`.

LRU; LFU with all uses counted, also of cells that are not in the pool; W-TinyLFU (Einziger et al., ACM Transactions on
Storage 13(4), 2017); S3-FIFO (Yang et al., SOSP 2023); and Belady's, which knows the future and is the bound.
"""

from __future__ import annotations

import heapq
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Cells = NDArray[np.uint32]
Use = Callable[[int], bool]  # a cell is needed: whether it was in the pool

SAMPLE_USES_PER_SLOT = 10  # W-TinyLFU halves its counts after this many
WINDOW_SHARE = 0.01  # of W-TinyLFU's slots
PROTECTED_SHARE = 0.8  # of its main part
SMALL_SHARE = 0.1  # of S3-FIFO's slots
FREQUENCY_MAX = 3  # of S3-FIFO's counters


class Policy(Protocol):
    def __call__(self, cells: Cells, slots: int) -> NDArray[np.bool_]:
        """Which of the uses in `cells`, in order, were hits."""


def _played(make: Callable[[int], Use]) -> Policy:
    def play(cells: Cells, slots: int) -> NDArray[np.bool_]:
        use = make(slots)
        return np.fromiter((use(cell) for cell in cells.tolist()), np.bool_, len(cells))

    return play


def _lru(slots: int) -> Use:
    held: OrderedDict[int, None] = OrderedDict()

    def use(cell: int) -> bool:
        hit = cell in held
        held[cell] = None
        held.move_to_end(cell)
        if len(held) > slots:
            held.popitem(last=False)
        return hit

    return use


def _lfu(slots: int) -> Use:
    uses: Counter[int] = Counter()
    held: set[int] = set()
    order: list[tuple[int, int, int]] = []  # (uses, time, cell); outdated entries are skipped
    time = 0

    def use(cell: int) -> bool:
        nonlocal time
        time += 1
        hit = cell in held
        uses[cell] += 1
        if not hit and len(held) >= slots:
            while True:
                count, _, victim = heapq.heappop(order)
                if victim in held and uses[victim] == count:
                    held.remove(victim)
                    break
        held.add(cell)
        heapq.heappush(order, (uses[cell], time, cell))
        return hit

    return use


def _w_tiny_lfu(slots: int) -> Use:
    window: OrderedDict[int, None] = OrderedDict()
    probation: OrderedDict[int, None] = OrderedDict()
    protected: OrderedDict[int, None] = OrderedDict()
    window_max = max(1, round(slots * WINDOW_SHARE))
    main_max = slots - window_max
    protected_max = round(main_max * PROTECTED_SHARE)
    counts: Counter[int] = Counter()
    seen = 0

    def admit(candidate: int) -> None:
        if len(probation) + len(protected) < main_max:
            probation[candidate] = None
            return
        if main_max == 0:
            return
        victim = next(iter(probation or protected))
        if counts[candidate] > counts[victim]:
            (probation if victim in probation else protected).pop(victim)
            probation[candidate] = None

    def use(cell: int) -> bool:
        nonlocal seen
        counts[cell] += 1
        seen += 1
        if seen >= SAMPLE_USES_PER_SLOT * slots:
            seen //= 2
            for key in counts:
                counts[key] //= 2
        if cell in window:
            window.move_to_end(cell)
            return True
        if cell in protected:
            protected.move_to_end(cell)
            return True
        if cell in probation:
            del probation[cell]
            protected[cell] = None
            if len(protected) > protected_max:
                probation[protected.popitem(last=False)[0]] = None
            return True
        window[cell] = None
        if len(window) > window_max:
            admit(window.popitem(last=False)[0])
        return False

    return use


def _s3_fifo(slots: int) -> Use:
    small: deque[int] = deque()
    main: deque[int] = deque()
    ghost: OrderedDict[int, None] = OrderedDict()
    frequency: dict[int, int] = {}  # of the cells in `small` and `main`
    small_max = max(1, round(slots * SMALL_SHARE))

    def evict_main() -> None:
        while main:
            cell = main.popleft()
            if frequency[cell] == 0:
                del frequency[cell]
                return
            frequency[cell] -= 1
            main.append(cell)

    def evict_small() -> None:
        while small:
            cell = small.popleft()
            if frequency[cell] > 1:
                frequency[cell] = 0
                main.append(cell)
                continue
            del frequency[cell]
            ghost[cell] = None
            if len(ghost) > slots - small_max:
                ghost.popitem(last=False)
            return

    def use(cell: int) -> bool:
        if cell in frequency:
            frequency[cell] = min(FREQUENCY_MAX, frequency[cell] + 1)
            return True
        while len(frequency) >= slots:
            if len(small) >= small_max or not main:
                evict_small()
            else:
                evict_main()
        remembered = cell in ghost
        if remembered:
            del ghost[cell]
        (main if remembered else small).append(cell)
        frequency[cell] = 0
        return False

    return use


def _belady(cells: Cells, slots: int) -> NDArray[np.bool_]:
    uses = cells.tolist()
    never = len(uses)
    upcoming = [never] * len(uses)  # by use: when its cell is needed next
    last: dict[int, int] = {}
    for at in range(len(uses) - 1, -1, -1):
        upcoming[at] = last.get(uses[at], never)
        last[uses[at]] = at
    held: dict[int, int] = {}  # cell -> its next use
    furthest: list[tuple[int, int]] = []  # (-next use, cell); outdated entries are skipped
    hits = np.zeros(len(uses), np.bool_)
    for at, cell in enumerate(uses):
        hits[at] = cell in held
        held[cell] = upcoming[at]
        heapq.heappush(furthest, (-upcoming[at], cell))
        if len(held) > slots:
            while True:
                when, victim = heapq.heappop(furthest)
                if held.get(victim) == -when:
                    del held[victim]
                    break
    return hits


POLICIES: dict[str, Policy] = {
    "LRU": _played(_lru),
    "frequency": _played(_lfu),
    "W-TinyLFU": _played(_w_tiny_lfu),
    "S3-FIFO": _played(_s3_fifo),
    "Belady": _belady,
}
