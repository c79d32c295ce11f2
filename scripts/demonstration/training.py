"""One training run of a small OPT: fixed seed, fixed order of the data, resumable, sparse on purpose.

The learning rate warms up, stays, and falls to zero over the last part (warm-up, stable, decay: arXiv 2404.06395,
section 4). A run can be resumed with another number of `steps` before the decay has begun: the result is the same as
if it had been started with that number.

ReLU makes most layers sparse by itself, but not the first one. So each layer's mean activation is added to the loss
(L1, arXiv 2402.13516, section 3.2), with a factor that grows while more neurons fire than the target and shrinks
while fewer do.
"""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional
from transformers import OPTForCausalLM, PreTrainedTokenizerFast

SEED = 20
WARM_UP_STEPS = 200
DECAY_SHARE = 0.25
WEIGHT_DECAY = 0.1
GRADIENT_NORM_MAX = 1.0
# The factor changes by at most this much per step, so that it changes more slowly than the network reacts.
PENALTY_RATE = 0.003
PENALTY_MIN, PENALTY_MAX = 1e-3, 0.5
FIRING_MEMORY = 0.95
SAID_EVERY_STEPS = 25


@dataclass(frozen=True)
class Plan:
    """The settings of a run. The result depends on them and on the data."""

    steps: int
    batch_rows: int
    context_tokens: int
    learning_rate: float
    firing_target: float
    workers: int


class FiringPenalty:
    """The L1 term: hooks on the activations, one factor per layer that follows the share of neurons that fire."""

    def __init__(self, model: OPTForCausalLM, target: float) -> None:
        self.target = target
        layers = model.model.decoder.layers
        self.factors = torch.full((len(layers),), PENALTY_MIN)
        self.firing = torch.full((len(layers),), target)
        self._means: dict[int, Tensor] = {}
        self._shares: dict[int, Tensor] = {}
        for index, layer in enumerate(layers):
            # transformers shares one activation module among layers of some versions: fc2 is each layer's own.
            layer.fc2.register_forward_pre_hook(lambda _, inputs, index=index: self._see(index, inputs[0]))

    def _see(self, index: int, activations: Tensor) -> None:
        self._means[index] = activations.mean(dtype=torch.float32)
        self._shares[index] = (activations.detach() > 0).float().mean()

    def term(self) -> Tensor:
        """The penalty of the last forward pass."""
        means = torch.stack([self._means[index] for index in range(len(self.factors))])
        return (self.factors.to(means.device) * means).sum()

    def shares(self) -> Tensor:
        """The share of neurons [layers] that fired in the last forward pass."""
        return torch.stack([self._shares[index] for index in range(len(self.factors))]).cpu()

    def adapt(self, shares: Tensor) -> None:
        """Changes the factors for the next step. `shares`: the shares of the neurons that fired in this step."""
        self.firing = FIRING_MEMORY * self.firing + (1 - FIRING_MEMORY) * shares
        excess = ((self.firing - self.target) / self.target).clamp(-1, 1)
        self.factors = (self.factors * torch.exp(PENALTY_RATE * excess)).clamp(PENALTY_MIN, PENALTY_MAX)


def learning_rate(step: int, plan: Plan) -> float:
    decay_steps = max(1, int(plan.steps * DECAY_SHARE))
    left_steps = plan.steps - step
    return plan.learning_rate * min(1.0, (step + 1) / WARM_UP_STEPS, left_steps / decay_steps)


def batch(tokens: Tensor, step: int, plan: Plan) -> Tensor:
    """The rows [batch_rows, context_tokens] of one step: every window once per epoch, in an order of that epoch."""
    windows = len(tokens) // plan.context_tokens - 1
    chosen = []
    for number in range(step * plan.batch_rows, (step + 1) * plan.batch_rows):
        epoch, place = divmod(number, windows)
        generator = torch.Generator().manual_seed(SEED + epoch)
        shift = int(torch.randint(plan.context_tokens, (1,), generator=generator))
        start = shift + int(_order(windows, epoch)[place]) * plan.context_tokens
        chosen.append(tokens[start : start + plan.context_tokens])
    return torch.stack(chosen).long()


_orders: dict[tuple[int, int], Tensor] = {}


def _order(windows: int, epoch: int) -> Tensor:
    if (windows, epoch) not in _orders:
        _orders[windows, epoch] = torch.randperm(windows, generator=torch.Generator().manual_seed(SEED + epoch))
    return _orders[windows, epoch]


def train(
    model: OPTForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    tokens: Tensor,
    plan: Plan,
    folder: Path,
    save_every_s: float,
    teacher: OPTForCausalLM | None = None,
    worker: int = 0,
) -> None:
    """Trains `model` in place on `tokens` [n]. `folder` holds the latest state, from which a killed run continues.

    With several workers each calls this in a process of its own, with an initialised process group, and all hold the
    same weights after each step. Two processes of one thread wait for each other once per step. Two threads of one
    process would do so in every operation, which on a busy machine halves the speed.
    """
    penalty = FiringPenalty(model, plan.firing_target)
    optimizer = _optimizer(model, plan)
    step = _resume(model, optimizer, penalty, folder)
    saved = said = time.monotonic()
    said_step = step
    model.train()
    while step < plan.steps:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, plan)
        rows = batch(tokens, step, plan)[worker :: plan.workers].to(model.device)
        loss = _step(model, optimizer, penalty, rows, teacher, plan.workers)
        step += 1
        if worker == 0 and step % SAID_EVERY_STEPS == 0:
            rate = (step - said_step) * plan.batch_rows * plan.context_tokens / (time.monotonic() - said)
            shares = " ".join(f"{share:.3f}" for share in penalty.firing.tolist())
            clock = time.strftime("%H:%M:%S")
            print(f"{clock} step {step} loss {loss:.3f} tokens/s {rate:.0f} firing {shares}", flush=True)
            said, said_step = time.monotonic(), step
        if worker == 0 and (time.monotonic() - saved > save_every_s or step == plan.steps):
            _save(model, tokenizer, optimizer, penalty, {"step": step, **asdict(plan)}, folder)
            saved = time.monotonic()


def _optimizer(model: nn.Module, plan: Plan) -> torch.optim.AdamW:
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=plan.learning_rate, betas=(0.9, 0.95), fused=True)


def _step(
    model: OPTForCausalLM,
    optimizer: torch.optim.AdamW,
    penalty: FiringPenalty,
    rows: Tensor,
    teacher: OPTForCausalLM | None,
    workers: int,
) -> float:
    with torch.autocast(rows.device.type, torch.bfloat16):
        logits = model(input_ids=rows, use_cache=False).logits[:, :-1].flatten(0, 1)
    loss = functional.cross_entropy(logits.float(), rows[:, 1:].flatten())
    (loss + _imitation(logits, rows, teacher) + penalty.term()).backward()  # type: ignore[no-untyped-call]
    shares = _averaged(model, penalty.shares(), workers)
    penalty.adapt(shares)
    nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_NORM_MAX)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(loss.detach())


def _averaged(model: nn.Module, shares: Tensor, workers: int) -> Tensor:
    """Replaces the gradients by their mean over the workers. Returns the mean of `shares`."""
    if workers == 1:
        return shares
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    flat = torch.cat([shares, *(gradient.flatten() for gradient in gradients)]) / workers
    distributed.all_reduce(flat)
    mean_shares, *means = torch.split(flat, [len(shares), *(gradient.numel() for gradient in gradients)])
    for gradient, mean in zip(gradients, means, strict=True):
        gradient.copy_(mean.view_as(gradient))
    return mean_shares


def _imitation(logits: Tensor, rows: Tensor, teacher: OPTForCausalLM | None) -> Tensor:
    """The distance of the draft's distribution from its teacher's. It decides how many of its tokens are accepted."""
    if teacher is None:
        return logits.new_zeros(())
    with torch.no_grad(), torch.autocast(rows.device.type, torch.bfloat16):
        wanted = teacher(input_ids=rows, use_cache=False).logits[:, :-1].flatten(0, 1)
    return functional.kl_div(
        functional.log_softmax(logits.float(), -1),
        functional.log_softmax(wanted.float(), -1),
        reduction="batchmean",
        log_target=True,
    )


def _save(
    model: OPTForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    optimizer: torch.optim.AdamW,
    penalty: FiringPenalty,
    told: dict[str, Any],
    folder: Path,
) -> None:
    """Replaces `folder` in one step, so that a kill leaves the old state or the new one."""
    new, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    shutil.rmtree(new, ignore_errors=True)
    model.save_pretrained(new)
    tokenizer.save_pretrained(new)
    torch.save(
        {"optimizer": optimizer.state_dict(), "factors": penalty.factors, "firing": penalty.firing}, new / "training.pt"
    )
    (new / "training.json").write_text(json.dumps(told))
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _resume(model: OPTForCausalLM, optimizer: torch.optim.AdamW, penalty: FiringPenalty, folder: Path) -> int:
    """Loads the state in `folder`, if there is one. Returns the step to continue from."""
    if not (folder / "training.json").exists():
        return 0
    model.load_state_dict(OPTForCausalLM.from_pretrained(folder).state_dict())
    state = torch.load(folder / "training.pt", weights_only=True)
    optimizer.load_state_dict(state["optimizer"])
    penalty.factors, penalty.firing = state["factors"], state["firing"]
    return int(json.loads((folder / "training.json").read_text())["step"])
