"""A quantised GGUF file with plain numbers: those that an import with the same --dtype stores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, LlamaFileType
from gguf.quants import dequantize, quantize
from planted.shards import new_folder

BYTES_MAX = 1 << 30  # of the file, which is written from memory
OF_HEADER = "GGUF."  # what the writer counts itself
FILE_TYPE = "general.file_type"


def write_plain_gguf(source: Path, target: Path) -> None:
    """Writes `source` with BF16 instead of quantised tensors to `target`, whose folder appears when it is complete.

    Raises:
        OSError: the folder exists, or the disk is too small.
    """
    reader: Any = GGUFReader(source)
    with new_folder(target.parent, BYTES_MAX) as folder:
        writer = GGUFWriter(folder / target.name, reader.fields["general.architecture"].contents())
        for name, field in reader.fields.items():
            if name.startswith(OF_HEADER) or name in ("general.architecture", FILE_TYPE):
                continue
            of_elements = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=of_elements)
        writer.add_file_type(LlamaFileType.MOSTLY_BF16)
        for tensor in reader.tensors:
            values, kind = tensor.data, tensor.tensor_type
            if kind != GGMLQuantizationType.F32:
                kind = GGMLQuantizationType.BF16
                values = quantize(dequantize(tensor.data, tensor.tensor_type), kind)
            writer.add_tensor(tensor.name, values, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
