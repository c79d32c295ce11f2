"""The client of one row of bench_moe: it decodes the sequence of a planted mixture and measures the cost of each token.

bench_moe runs it as a process: `moe/client.py '{"address": ..., ...}'` (the fields of Task) prints one JSON object.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flashclient  # before torch, so that torch's idle threads do not spin
from flashclient.model.experts.look_ahead import Trust
from flashclient.model.streamed_experts import StreamedExperts

# isort: split
import paper.client
import torch
from benchmarks.forced_tokens import ForcedTokens
from benchmarks.processes import print_json
from paper.client import AgainFromFlash, Probe, memory_of
from torch import Tensor, nn


@dataclass(frozen=True)
class Task:
    """The work of the client. `plan` is the file that PlantedMixture.plan() was written to."""

    address: str
    model: str
    daemon_pid: int
    plan: str
    prompt_tokens: int
    new_tokens: int
    looks_ahead: bool
    fills: bool  # whether the whole sequence is computed first, which brings all experts into a pool that has room


class Picks:
    """Compares the experts that the model's routers choose with the plan.

    It has hooks, with which layers are not native. So nothing is measured while it exists.
    """

    def __init__(self, model: nn.Module, choices: list[list[list[int]]]) -> None:
        self._choices = choices
        self._position = [0] * len(choices)
        self.as_planned = self.chosen = 0
        for module in model.modules():
            if isinstance(module, StreamedExperts):
                module.register_forward_pre_hook(self._count)

    def _count(self, module: Any, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
        layer = module.streamed.layer
        for picked in inputs[1].tolist():
            self.as_planned += len({*picked} & {*self._choices[layer][self._position[layer]]})
            self.chosen += len(picked)
            self._position[layer] += 1


def run(task: Task) -> dict[str, Any]:
    """The cost of every token. The first is the prompt's. `greedy`: the tokens that the model would have chosen.

    A last prompt of all tokens shows whether their experts are as planned: they depend on no other rows.
    """
    plan = json.loads(Path(task.plan).read_text())
    ids = plan["ids"]
    probed = paper.client.Task(task.address, task.model, task.daemon_pid, task.prompt_tokens, task.new_tokens, 0)
    with flashclient.FlashClient(task.model, address=task.address, timeout_s=paper.client.TIMEOUT_S) as client:
        if not task.looks_ahead:
            Trust.pays = lambda *_: False  # type: ignore[method-assign]
        if task.fills:
            client.generate(torch.tensor([ids]), max_new_tokens=1, do_sample=False)
        probe = Probe(probed, client, AgainFromFlash(None))
        forced = Greedy(ids[task.prompt_tokens : task.prompt_tokens + task.new_tokens], probe.between)
        forced.start()
        prompt = torch.tensor([ids[: task.prompt_tokens]])
        client.generate(prompt, max_new_tokens=task.new_tokens, do_sample=False, logits_processor=[forced])
        told: dict[str, Any] = {"stats": client.stats().as_dict(), "memory": memory_of(task.daemon_pid)}
        probe.close()
        picks = Picks(client.model, plan["choices"])
        client.generate(torch.tensor([ids[: task.prompt_tokens + task.new_tokens]]), max_new_tokens=1, do_sample=False)
    told["tokens"] = [cost | {"seconds": seconds} for cost, seconds in zip(probe.costs, forced.seconds, strict=True)]
    return told | {"greedy": forced.greedy, "as_planned": picks.as_planned / picks.chosen}


class Greedy(ForcedTokens):
    """Forced tokens, and the tokens of the highest logits."""

    def __init__(self, ids: list[int], between: Any) -> None:
        super().__init__(ids, between)
        self.greedy: list[int] = []

    def __call__(self, input_ids: Tensor, scores: Any) -> Any:
        self.greedy.append(int(scores.argmax()))
        return super().__call__(input_ids, scores)


def main() -> int:
    return print_json(lambda: run(Task(**json.loads(sys.argv[1]))), "moe_client")


if __name__ == "__main__":
    sys.exit(main())
