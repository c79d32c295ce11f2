"""What commands import is light, and afterwards everything is there."""

from __future__ import annotations

import json
import subprocess
import sys

PROGRAM = """
import json, sys
from flashclient.commands.quick_imports import _read_once, quick_imports
with quick_imports():
    from transformers import LlamaConfig, LlamaForCausalLM
    from flashclient.client import FlashClient
import torch
from transformers.utils import import_utils, is_scipy_available
config = LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
made = LlamaForCausalLM(config).generate(torch.tensor([[5]]), max_new_tokens=2, eos_token_id=None, pad_token_id=0)
heavy = [name for name in ("torch._dynamo", "torch.distributed.tensor", "scipy", "sympy") if name in sys.modules]
models = import_utils.__file__.replace("utils/import_utils.py", "models/__init__.py")
same = _read_once(import_utils)(models) == import_utils.define_import_structure(models)
doubled = torch.compile(lambda x: 2 * x, backend="eager")(torch.ones(1)).item()
print(json.dumps([heavy, same, made.shape[1], doubled, torch.compiler.disable.__module__, is_scipy_available()]))
"""


def test_only_what_is_used_is_imported() -> None:
    done = subprocess.run([sys.executable, "-P", "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [[], True, 3, 2.0, "torch.compiler", True]
