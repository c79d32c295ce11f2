"""A planted mixture of experts: random weights, and routers that choose experts with published locality.

The model knows one sequence of tokens, which it is given (forced tokens). Each token of the sequence has an embedding
of its own, a random direction. Attention and experts add little to it, so each router can tell all tokens apart: its
weights W solve W x = S for the inputs x of all tokens at once, where S is high for the experts that the token should
choose. The choices of a layer are drawn so that an LRU list of experts has the hits that were measured on a real
mixture (simulation/traces.py).

There are fewer tokens than dimensions, so W has room for a random part that says nothing about the inputs which the
router sees, but much about what is added between two layers. Its size is set so that the input of the layer before
tells as much about a router's choices as in real mixtures: with it, the router guesses GUESS_PRECISION of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from math import sqrt
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from simulation.traces import expert_choices
from torch import Tensor
from torch.nn import functional

from planted.blocks import KINDS, BlockKind, BlockNoise, Matrix
from planted.layers import Noise, rotated

ADDED = 0.2  # standard deviation, per coordinate, of the output of one attention or mixture; that of embeddings is 1
# A router's logit of a chosen expert; that of the others is -MARGIN. It is small because the weights of experts are as
# inexact as logits: with 2, the rounding to 16 bit grew from layer to layer, and a third of the last layer's choices
# were others.
MARGIN = 0.25
GUESS_PRECISION = 0.85  # published for neighbouring layers: 80 to 90 %
SILU_SQUARED = 0.3556  # the mean of silu(g)^2 for a standard normal g
ROWS_MAX = 20.0  # norm of a router's rows in units of the margin, at most
NORM_EPSILON = 1e-5
TOKENS_SPECIAL = 16  # token ids below this one are not in the sequence
DTYPE = torch.float16


class Matrices(Protocol):
    """Makes random matrices [rows, columns] of a standard deviation."""

    def matrix(self, rows: int, columns: int, deviation: float) -> Any: ...


@dataclass(frozen=True)
class MixtureShape:
    """Sizes of a planted mixture, which has OLMoE's architecture and is in 16 bit."""

    hidden_size: int
    expert_size: int
    layers: int
    experts: int
    chosen: int
    heads: int
    vocabulary: int
    context_tokens: int = 2048

    architecture = "olmoe"  # its name in GGUF files
    normalises_heads = False  # queries and keys are normalised head by head

    @property
    def blocks(self) -> BlockKind | None:
        """Of a quantised model's experts."""
        return None

    @property
    def tokens_max(self) -> int:
        """The length of the sequence that the routers know."""
        return self.hidden_size * 3 // 8

    @property
    def kv_heads(self) -> int:
        return self.heads

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.heads

    def matrix_bytes(self, rows: int, columns: int) -> int:
        """Of a matrix outside the experts."""
        return rows * columns * DTYPE.itemsize

    def noise(self, seed: int) -> Matrices:
        """Makes the matrices outside the experts."""
        return Noise(seed, DTYPE)

    def expert_noise(self, outside: Matrices, seed: int) -> Matrices:
        """Makes the matrices of experts. outside: what makes the others."""
        return outside

    def config(self) -> dict[str, Any]:
        """The content of config.json."""
        return {
            "model_type": "olmoe",
            "architectures": ["OlmoeForCausalLM"],
            "hidden_size": self.hidden_size,
            "intermediate_size": self.expert_size,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads,
            "num_experts": self.experts,
            "num_experts_per_tok": self.chosen,
            "norm_topk_prob": False,
            "max_position_embeddings": self.context_tokens,
            "vocab_size": self.vocabulary,
            "rms_norm_eps": NORM_EPSILON,
            "tie_word_embeddings": False,
            "dtype": str(DTYPE).removeprefix("torch."),
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": 1,
        }

    def normalised_heads(self, x: Tensor, heads: int) -> Tensor:
        """Queries or keys [tokens, heads * head_size], normalised, as [1, heads, tokens, head_size]."""
        return in_heads(normalised(x), heads)

    def expert_weights(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The weights and numbers of the chosen experts, [tokens, chosen]. logits: [tokens, experts]."""
        weights, picks = torch.softmax(logits, dim=-1).topk(self.chosen, dim=-1)
        return weights, picks

    @property
    def expert_bytes(self) -> int:
        matrix_bytes = self.blocks.matrix_bytes if self.blocks else self.matrix_bytes
        return 3 * matrix_bytes(self.expert_size, self.hidden_size)


@dataclass(frozen=True)
class QuantisedShape(MixtureShape):
    """Sizes of a planted mixture, which has the architecture of Qwen3's mixtures and experts in blocks."""

    query_groups: int = 8  # heads that share keys and values
    head_width: int = 128
    encoding: str = "Q4_K"  # one of planted.blocks.KINDS
    all_in_blocks: bool = True  # also the matrices outside the experts

    architecture = "qwen3moe"
    normalises_heads = True

    @property
    def blocks(self) -> BlockKind:
        return KINDS[self.encoding]

    @property
    def kv_heads(self) -> int:
        return self.heads // self.query_groups

    @property
    def head_size(self) -> int:
        return self.head_width

    def matrix_bytes(self, rows: int, columns: int) -> int:
        if not self.all_in_blocks:
            return super().matrix_bytes(rows, columns)
        return self.blocks.matrix_bytes(rows, columns)

    def noise(self, seed: int) -> Matrices:
        return BlockNoise(self.blocks, seed) if self.all_in_blocks else super().noise(seed)

    def expert_noise(self, outside: Matrices, seed: int) -> Matrices:
        return outside if self.all_in_blocks else BlockNoise(self.blocks, seed)

    def normalised_heads(self, x: Tensor, heads: int) -> Tensor:
        return normalised(in_heads(x, heads))

    def expert_weights(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        weights, picks = super().expert_weights(logits)
        return weights / weights.sum(dim=-1, keepdim=True), picks


MIXTURES: Mapping[str, MixtureShape] = {
    "olmoe-1b-7b": MixtureShape(2048, 1024, 16, 64, 8, 16, 50304),
    "olmoe-tiny": MixtureShape(512, 128, 4, 16, 4, 4, 1024),
    "olmoe-1b-7b-q4_0": QuantisedShape(2048, 1024, 16, 64, 8, 16, 50304, query_groups=1, encoding="Q4_0"),
    "olmoe-tiny-q4_0": QuantisedShape(512, 128, 4, 16, 4, 4, 1024, query_groups=1, encoding="Q4_0"),
    "qwen3-30b-a3b-q4_k": QuantisedShape(2048, 768, 48, 128, 8, 32, 151936),
    "qwen3-tiny-q4_k": QuantisedShape(512, 256, 4, 16, 4, 4, 1024, query_groups=2, head_width=64),
    "gpt-oss-20b-mxfp4": QuantisedShape(
        2880, 2880, 24, 32, 4, 64, 201088, query_groups=8, head_width=64, encoding="MXFP4", all_in_blocks=False
    ),
    "gpt-oss-tiny-mxfp4": QuantisedShape(
        288, 288, 4, 16, 4, 4, 1024, query_groups=2, head_width=64, encoding="MXFP4", all_in_blocks=False
    ),
}


class PlantedMixture:
    """Makes the model's tensors: call outside() first, then iterate over layers() once.

    Attributes:
        ids: the sequence, [tokens_max] token ids, all different.
        choices: by layer, [tokens_max, chosen]: the experts that each token chooses.
        precisions: of the layers made so far, but the first: the share of a router's choices that it guesses from the
            input of the layer before.
    """

    def __init__(self, shape: MixtureShape, seed: int) -> None:
        self.shape = shape
        random = np.random.default_rng(seed)
        drawn = random.permutation(shape.vocabulary - TOKENS_SPECIAL)[: shape.tokens_max] + TOKENS_SPECIAL
        self.ids: list[int] = drawn.tolist()
        self.choices: list[NDArray[np.uint32]] = []
        self.precisions: list[float] = []
        self._seed = seed
        self._noise = shape.noise(seed)
        self._expert_noise = shape.expert_noise(self._noise, seed)
        self._stream = torch.empty(0)  # [tokens, hidden_size] fp32: the residual stream of the sequence
        self._before = torch.empty(0)  # the input of the last router

    def outside(self) -> dict[str, Matrix]:
        """All tensors outside the layers."""
        shape = self.shape
        embedding = self._noise.matrix(shape.vocabulary, shape.hidden_size, 1.0)
        self._stream = embedding[self.ids].float()
        head = self._noise.matrix(shape.vocabulary, shape.hidden_size, shape.hidden_size**-0.5)
        norm = torch.ones(shape.hidden_size, dtype=DTYPE)
        return {"model.embed_tokens.weight": embedding, "lm_head.weight": head, "model.norm.weight": norm}

    def layers(self) -> Iterator[dict[str, Matrix]]:
        """The tensors of each layer by their names within it."""
        shape = self.shape
        for layer in range(shape.layers):
            tensors = self._attention()
            self._attend(tensors)
            x = self._normalised()
            choices = expert_choices(shape.experts, shape.chosen, shape.tokens_max, 0.0, self._seed + layer)
            self.choices.append(choices)
            tensors["mlp.gate.weight"] = router = self._router(x, choices)
            yield tensors | self._experts(x, router)
            self._before = x

    def _attention(self) -> dict[str, Matrix]:
        shape, size = self.shape, self.shape.hidden_size
        heads = {"q": shape.heads, "k": shape.kv_heads, "v": shape.kv_heads}
        tensors = {
            f"self_attn.{name}_proj.weight": self._noise.matrix(count * shape.head_size, size, size**-0.5)
            for name, count in heads.items()
        }
        width = shape.heads * shape.head_size
        tensors["self_attn.o_proj.weight"] = self._noise.matrix(size, width, ADDED * width**-0.5)
        norms = {"input_layernorm": size, "post_attention_layernorm": size}
        normalised_size = shape.head_size if shape.normalises_heads else size
        norms |= dict.fromkeys(("self_attn.q_norm", "self_attn.k_norm"), normalised_size)
        return tensors | {f"{norm}.weight": torch.ones(wide, dtype=DTYPE) for norm, wide in norms.items()}

    def _normalised(self) -> Tensor:
        return normalised(self._stream)

    def _attend(self, tensors: dict[str, Matrix]) -> None:
        """Adds causal self-attention to the stream."""
        x, shape = self._normalised(), self.shape
        q, k, v = (x @ tensors[f"self_attn.{name}_proj.weight"].float().T for name in "qkv")
        q, k = shape.normalised_heads(q, shape.heads), shape.normalised_heads(k, shape.kv_heads)
        attended = functional.scaled_dot_product_attention(
            rotated(q), rotated(k), in_heads(v, shape.kv_heads), is_causal=True, enable_gqa=True
        )
        mixed = attended.transpose(1, 2).reshape(len(x), -1)
        self._stream = self._stream + mixed @ tensors["self_attn.o_proj.weight"].float().T

    def _router(self, x: Tensor, choices: NDArray[np.uint32]) -> Tensor:
        """The router's weights [experts, hidden_size]. x: its inputs for the sequence, [tokens, hidden_size]."""
        wanted = torch.full((len(x), self.shape.experts), -MARGIN)
        wanted.scatter_(1, torch.from_numpy(choices.astype(np.int64)), MARGIN)
        solve = torch.linalg.pinv(x.double()).float()  # [hidden_size, tokens]
        solved = (solve @ wanted).T
        size = self.shape.hidden_size
        random: Tensor = self._noise.matrix(self.shape.experts, size, size**-0.5).float().clone()
        random -= (solve @ (x @ random.T)).T  # it says nothing about x
        if len(self._before) == 0:
            first: Tensor = solved.to(DTYPE).contiguous()
            return first
        factor, precision = self._factor_of_random(solved, random, choices)
        self.precisions.append(precision)
        router: Tensor = (solved + factor * random).to(DTYPE).contiguous()
        return router

    def _factor_of_random(self, solved: Tensor, random: Tensor, choices: NDArray[np.uint32]) -> tuple[float, float]:
        """The factor of the random part with which GUESS_PRECISION is met, and the precision. By bisection."""
        known, unknown = self._before @ solved.T, self._before @ random.T  # [tokens, experts]
        low, high = 0.0, ROWS_MAX * MARGIN
        for _ in range(20):
            middle = (low + high) / 2
            precise = precision(known + middle * unknown, choices) > GUESS_PRECISION
            low, high = (middle, high) if precise else (low, middle)
        return high, precision(known + high * unknown, choices)

    def _experts(self, x: Tensor, router: Tensor) -> dict[str, Matrix]:
        """The tensors of the experts, by their names within the layer. Adds their output to the stream."""
        size, width = self.shape.hidden_size, self.shape.expert_size
        weights, picks = self.shape.expert_weights(x @ router.float().T)
        strength = sqrt(width * SILU_SQUARED * float(weights.square().sum(dim=1).mean()))
        tensors: dict[str, Matrix] = {}
        added = torch.zeros_like(x)
        for expert in range(self.shape.experts):
            gate, up = (self._expert_noise.matrix(width, size, size**-0.5) for _ in range(2))
            down = self._expert_noise.matrix(size, width, ADDED / strength)
            names = (f"mlp.experts.{expert}.{part}_proj.weight" for part in ("gate", "up", "down"))
            tensors |= dict(zip(names, (gate, up, down), strict=True))
            tokens, pick = torch.where(picks == expert)
            rows = x[tokens]
            hidden = functional.silu(rows @ gate.float().T) * (rows @ up.float().T)
            added[tokens] += weights[tokens, pick, None] * (hidden @ down.float().T)
        self._stream = self._stream + added
        return tensors

    def plan(self) -> dict[str, Any]:
        """What the benchmark must know about the model, once all layers are made."""
        return {
            "shape": asdict(self.shape),
            "ids": self.ids,
            "choices": [choices.tolist() for choices in self.choices],
            "guess_precision": self.precisions,
        }


def normalised(x: Tensor) -> Tensor:
    return functional.rms_norm(x, x.shape[-1:], eps=NORM_EPSILON)


def in_heads(x: Tensor, heads: int) -> Tensor:
    """[tokens, heads * head_size] as [1, heads, tokens, head_size]."""
    return x.view(1, len(x), heads, -1).transpose(1, 2)


def precision(logits: Tensor, choices: NDArray[np.uint32]) -> float:
    """The share of the experts with the highest logits that are in `choices`, [tokens, chosen]."""
    guessed = logits.topk(choices.shape[1], dim=-1).indices.numpy()
    return float((guessed[:, :, None] == choices[:, None, :]).any(axis=2).mean())
