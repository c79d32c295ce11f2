"""How a Fetch cuts what it was asked for into steps."""

from __future__ import annotations

import numpy as np
import pytest

from weightd.serving.fetch import _first_in_cells


@pytest.mark.parametrize(
    ("cells", "cells_max", "first"),
    [
        ([], 1, 0),
        ([5, 5, 5], 1, 3),
        ([5, 5, 6, 5], 1, 2),
        ([5, 5, 6, 5, 7], 2, 4),
        ([9, 1, 9, 2, 3], 3, 4),
        ([9, 1, 9, 2, 3], 4, 5),
    ],
)
def test_a_step_takes_bundles_of_a_few_cells(cells: list[int], cells_max: int, first: int) -> None:
    assert _first_in_cells(np.array(cells, np.uint32), cells_max) == first
