"""lm-evaluation-harness on client.model: a local task, offline, against log-likelihoods computed by transformers."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import make_checkpoint, make_tokenizer
from daemon import serving
from repository import ROOT
from transformers import AutoModelForCausalLM

from weightd import cli

SCRIPT = ROOT / "scripts/evaluate_with_harness.py"
TASK = """
task: completions
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}]
"""

pytestmark = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="extra `eval` is not installed")


def write_task(folder: Path) -> list[dict[str, object]]:
    random = np.random.default_rng(0)
    words = ["here", "then", "the", "other", "rest", "tree"]
    documents: list[dict[str, object]] = [
        {"prompt": " ".join(random.choice(words, 4)), "choices": words[:3], "answer": index % 3} for index in range(12)
    ]
    (folder / "documents.jsonl").write_text("\n".join(map(json.dumps, documents)))
    (folder / "completions.yaml").write_text(TASK.format(file=folder / "documents.jsonl"))
    return documents


def accuracy(checkpoint: Path, documents: list[dict[str, object]]) -> float:
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    tokenizer = make_tokenizer()

    def likelihood(prompt: str, choice: str) -> float:
        begin, ids = len(tokenizer(prompt).input_ids), torch.tensor([tokenizer(f"{prompt} {choice}").input_ids])
        with torch.no_grad():
            logs = model(input_ids=ids).logits[0].log_softmax(1)
        return float(sum(logs[place - 1, ids[0, place]] for place in range(begin, ids.shape[1])))

    right = 0
    for document in documents:
        prompt, choices = str(document["prompt"]), document["choices"]
        assert isinstance(choices, list)
        found = int(np.argmax([likelihood(prompt, choice) for choice in choices]))
        right += found == document["answer"]
    return right / len(documents)


@pytest.mark.slow
def test_a_local_task_gives_the_accuracy_of_transformers(tmp_path: Path) -> None:
    checkpoint = make_checkpoint("opt", tmp_path / "tiny")
    documents = write_task(tmp_path)
    store = tmp_path / "store"
    assert cli.main(["import", str(checkpoint), "--store", str(store)]) == 0
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    with serving(store) as daemon:
        command = [sys.executable, str(SCRIPT), "tiny", "--address", daemon.address, "--tasks", "completions", "--json"]
        done = subprocess.run(
            [*command, "--include-path", str(tmp_path)],
            env=os.environ | offline,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["completions"]["acc,none"] == pytest.approx(accuracy(checkpoint, documents))
