"""The table of models, against what is derived and proven here."""

from __future__ import annotations

import re
from pathlib import Path

import model_table
import pytest
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

TABLE = model_table.OUT.read_text()
PROVEN_MIN = 165  # of the types of transformers 5.23
MIXTURES_MIN = 50
SAMPLE_EVERY = 24  # types of the table


def run(out: Path, *types: str) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["model_table", "--out", str(out), *types])
        model_table.main()
    return out.read_text()


def rows(text: str) -> dict[str, str]:
    return {name: row for name, row in re.findall(r"^\| ([\w-]+) \| (.*) \|$", text, re.MULTILINE) if name != "Type"}


def test_rows_of_a_module_of_parts_of_experts_and_of_nothing(tmp_path: Path) -> None:
    made = rows(run(tmp_path / "table.md", "llama", "opt", "gpt_oss", "mamba"))
    assert made["llama"] == "LlamaForCausalLM | 32 module | silu | 35.8%"
    assert made["opt"] == "OPTForCausalLM | 12 parts | relu | 65.4%"
    experts = "swish:1.702, gate_max 7, up_limit 7, up_offset 1"
    assert made["gpt_oss"] == f"GptOssForCausalLM | 36 experts | {experts} | 1.9%"
    assert made["mamba"] == "no FFN of MambaForCausalLM could be recognised, so nothing of it can be streamed"


def test_the_table_counts_its_rows() -> None:
    proven = [row for row in rows(TABLE).values() if row.count("|") == 3]
    mixtures = [row for row in proven if "experts" in row]
    assert len(proven) >= PROVEN_MIN
    assert len(mixtures) >= MIXTURES_MIN
    assert f"{len(proven)} of {len(rows(TABLE))} types are proven, {len(mixtures)} of them mixtures" in TABLE.replace(
        "\n", " "
    )


def test_the_table_has_every_type() -> None:
    assert sorted(rows(TABLE)) == sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_table_is_what_is_derived_here(tmp_path: Path) -> None:
    """Some of its rows: all of them take a quarter of an hour."""
    if f"transformers {transformers.__version__}," not in TABLE:
        pytest.skip("the table is of another transformers")
    types = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)[::SAMPLE_EVERY]
    table = rows(TABLE)
    assert rows(run(tmp_path / "table.md", *types)) == {name: table[name] for name in types}
