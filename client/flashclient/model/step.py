"""Tells the FFNs of a forward pass what their inputs do not show: which tokens the rows are, and which rows count.

A pre-forward hook of the model publishes a Step. The prompt columns of a generation are exact. All other columns are
predicted, also those that assisted generation checks together with the prompt. Padding and finished rows want nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flashclient.model.predictor import ROWS_MAX
from flashclient.torch_state import eager


@dataclass(frozen=True)
class Step:
    """One forward pass. Row r, column c is token past_tokens + c of sequence r, and row r * columns + c of an FFN's x.

    Attributes:
        past_tokens: the tokens in the cache. Fewer than after the last step mean that tokens were rejected.
        exact_columns: the number of columns, from the first, that belong to the prompt of a generation.
        wants: [rows, columns], False for padding and finished rows; None where all are True.
    """

    rows: int
    columns: int
    past_tokens: int = 0
    exact_columns: int = 0
    wants: NDArray[np.bool_] | None = None

    @property
    def tokens(self) -> int:
        return self.rows * self.columns

    def predicted(self) -> Step:
        """The step of its predicted columns alone."""
        first = self.exact_columns
        wants = None if self.wants is None else self.wants[:, first:]
        return Step(self.rows, self.columns - first, self.past_tokens + first, 0, wants)

    def row_mask(self) -> int:
        """For at most 16 rows. Bit t: row t of x wants something."""
        return (1 << self.tokens) - 1 if self.wants is None else int(self.row_masks()[0])

    def row_masks(self) -> NDArray[np.uint16]:
        """[ceil(tokens / 16)]. Bit t of mask g: row 16 * g + t of x wants something."""
        wants = np.zeros((-(-self.tokens // ROWS_MAX), ROWS_MAX), np.bool_)
        wants.reshape(-1)[: self.tokens] = True if self.wants is None else self.wants.reshape(-1)
        return np.packbits(wants, axis=1, bitorder="little").view(np.dtype("<u2")).reshape(-1).astype(np.uint16)


@dataclass
class _Generation:
    """A generation under way. Passes with another cache belong to another sequence: the negative prompt of guidance.

    Attributes:
        prompt_tokens: the tokens in the cache once the prompt is computed.
        end_tokens: those that finish a row.
        cache: of its first pass; None where there is none.
        finished: [rows], so far.
    """

    prompt_tokens: int
    end_tokens: Tensor | None
    begun: bool = False
    cache: Any = None
    finished: Tensor | None = None

    def owns(self, cache: Any) -> bool:
        if not self.begun:
            self.begun, self.cache = True, cache
        return self.cache is cache

    def exact_columns(self, cache: Any, columns: int, past_tokens: int) -> int:
        """The number of prompt columns. The prompt of another sequence is what its first pass computes."""
        if self.owns(cache):
            return min(columns, max(0, self.prompt_tokens - past_tokens))
        return columns if past_tokens == 0 else 0

    def unfinished(self, inputs: Tensor | None, exact_columns: int) -> Tensor | None:
        """[rows, columns]. A row is finished from the column on that holds the token that ended it."""
        if self.end_tokens is None or inputs is None or exact_columns == inputs.shape[1]:
            return None
        ended = torch.isin(inputs, self.end_tokens)
        ended[:, :exact_columns] = False
        if self.finished is not None:
            ended[:, exact_columns] |= self.finished
        self.finished = ended.any(1)
        return ended.cumsum(1) == 0


class Steps:
    """The step under way, which publish() sets before every forward pass.

    Args:
        argument_names: of the model's forward(), in order.
        let_go: called where a sequence begins outside of a generation.
    """

    def __init__(self, argument_names: list[str], let_go: Callable[[], None]) -> None:
        self._argument_names = argument_names
        self._let_go = let_go
        self._current: Step | None = None
        self._generations: list[_Generation] = []  # each inside of the one before it

    def begin(self, prompt_tokens: int, end_tokens: list[int] | None) -> None:
        """Called when a generation begins, perhaps inside of another.

        Args:
            prompt_tokens: the tokens in the cache once the prompt is computed.
            end_tokens: those after which a row is finished; None where a row is not one sequence (beams, candidates).
        """
        self._generations.append(_Generation(prompt_tokens, torch.tensor(end_tokens) if end_tokens else None))

    def end(self) -> None:
        self._generations.pop()

    @eager
    def publish(self, _: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The pre-forward hook of the model, registered with_kwargs=True."""
        given = dict(zip(self._argument_names, args, strict=False)) | kwargs
        cache, inputs = given.get("past_key_values"), given.get("input_ids")
        shape = (given.get("inputs_embeds") if inputs is None else inputs).shape  # type: ignore[union-attr]
        rows, columns = int(shape[0]), int(shape[1])
        past_tokens = 0 if cache is None else int(cache.get_seq_length())
        exact_columns, unfinished = 0, None
        if self._generations:
            generation = self._generations[-1]
            exact_columns = generation.exact_columns(cache, columns, past_tokens)
            if generation.owns(cache):
                unfinished = generation.unfinished(inputs, exact_columns)
        elif past_tokens == 0:
            self._let_go()
        wants = _attended(given.get("attention_mask"), rows, columns)
        if unfinished is not None:
            wants = unfinished if wants is None else wants & unfinished
        if wants is not None and bool(wants.all()):
            wants = None
        numpy_wants = None if wants is None else wants.numpy()
        self._current = Step(rows, columns, past_tokens, exact_columns, numpy_wants)

    def current(self, tokens: int) -> Step:
        """The step of an FFN that is called with `tokens` rows. Outside of a forward pass they are one sequence."""
        step = self._current
        return step if step is not None and step.tokens == tokens else Step(1, tokens)


def _attended(mask: Any, rows: int, columns: int) -> Tensor | None:
    """[rows, columns] of a mask [rows, past + columns]; None where the mask has another form."""
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[0] != rows or mask.shape[1] < columns:
        return None
    return mask[:, -columns:] != 0
