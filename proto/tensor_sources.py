"""What a TensorSource describes: a tensor that is put together from slices of a checkpoint's tensors.

The client does so with torch's tensors, and with tensors that hold no elements (flashclient.tensors). The import does
so with numpy's arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from weightd_proto.weightd_pb2 import TensorSource

Join = Callable[[list[Any], int], Any]  # tensors, dimension


def gather(source: TensorSource, tensors: Mapping[str, Any], stack: Join, concatenate: Join) -> Any:
    """The elements of a source.

    Args:
        tensors: the whole tensors of the checkpoint that it needs, all of one kind.
        stack, concatenate: of that kind: torch.stack and torch.cat, or np.stack and np.concatenate.
    """

    def part(of: TensorSource) -> Any:
        return gather(of, tensors, stack, concatenate)

    match source.WhichOneof("of"):
        case "concatenated":
            joined = source.concatenated
            return (stack if joined.stacked else concatenate)([part(of) for of in joined.parts], joined.dim)
        case "slice":
            cut = source.slice
            return part(cut.of)[(slice(None),) * cut.dim + (slice(cut.begin, cut.end, cut.step),)]
        case "transposed":
            return part(source.transposed.of).swapaxes(source.transposed.dim0, source.transposed.dim1)
    return tensors[source.tensor]


def tensor_names(source: TensorSource) -> list[str]:
    """The names of the tensors that a source needs, each once."""
    match source.WhichOneof("of"):
        case "concatenated":
            return list(dict.fromkeys(name for part in source.concatenated.parts for name in tensor_names(part)))
        case "slice":
            return tensor_names(source.slice.of)
        case "transposed":
            return tensor_names(source.transposed.of)
    return [source.tensor]
