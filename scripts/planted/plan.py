"""The plan of a planted model: its shape, and how often its neurons fire.

The statistics are published in arXiv 2312.11514 v3 (sections 3 and 4, and appendix) for OPT-6.7B. Per token 10 % of the
neurons are predicted and 3.3 % fire. The predictor misses 5 % of those that fire. The union of four tokens' predicted
sets is 24 % of the neurons, and 2.4 % of the neurons are new per token. 1.56 % of the neurons fire in the first layer,
2.66 % in the middle one and 5.36 % in the last.

A neuron's predicted share is drawn from a Beta distribution; tokens are independent given the share. With
Beta(0.153, 1.377), 2.2 % of the neurons are new after four tokens, with Beta(0.222, 2.002) 2.7 %. The distribution used
lies between the two.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

PREDICTED_MEAN = 0.10
BETA_A = 0.188
BETA_B = BETA_A * (1 - PREDICTED_MEAN) / PREDICTED_MEAN
FIRING_FIRST, FIRING_MIDDLE, FIRING_LAST = 0.0156, 0.0266, 0.0536
FALSE_NEGATIVES = 0.05
BUSIEST_SHARE = 0.8  # "the neurons that make 80 % of the activations"
PUBLISHED = {
    "predicted": 0.10,
    "firing": 0.033,
    "false_negatives": 0.05,
    "false_positives": 0.07,
    "union_4": 0.24,
    "new_per_token": 0.024,
    "skew": 0.17,  # share of the neurons that make 80 % of the activations
}
_QUADRATURE = 400
_SHARES_MIN = 1e-7  # the least share: its threshold is five deviations out, and no token of a run exceeds it


@dataclass(frozen=True)
class Shape:
    """Sizes of a planted model. `family` is transformers' model_type."""

    family: str
    hidden_size: int
    ffn_size: int
    layers: int
    heads: int
    vocabulary: int
    context_tokens: int = 2048

    @property
    def rank(self) -> int:
        """The rank of the predictors: 128 at hidden size 4096, as in the paper, and in proportion below."""
        return max(32, self.hidden_size // 32)

    def config(self, dtype: str) -> dict[str, Any]:
        """The content of config.json."""
        shared: dict[str, Any] = {
            "model_type": self.family,
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "max_position_embeddings": self.context_tokens,
            "vocab_size": self.vocabulary,
            "dtype": dtype,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": 1,
        }
        if self.family == "opt":
            own = {"ffn_dim": self.ffn_size, "word_embed_proj_dim": self.hidden_size, "activation_function": "relu"}
            return shared | own | {"architectures": ["OPTForCausalLM"], "tie_word_embeddings": True}
        own = {"intermediate_size": self.ffn_size, "num_key_value_heads": self.heads, "hidden_act": "relu"}
        return shared | own | {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}


SHAPES = {
    "opt-1.3b": Shape("opt", 2048, 8192, 24, 32, 50272),
    "opt-6.7b": Shape("opt", 4096, 16384, 32, 32, 50272),
    "llama-7b": Shape("llama", 4096, 11008, 32, 32, 32000),
    "llama-1.3b": Shape("llama", 2048, 5504, 24, 16, 32000),
    "opt-tiny": Shape("opt", 256, 1024, 4, 4, 2048, 512),
    "opt-wide": Shape("opt", 2048, 2048, 2, 16, 2048, 512),  # few layers with bundles of two blocks
    "llama-tiny": Shape("llama", 256, 1024, 4, 4, 2048, 512),
}


@dataclass(frozen=True)
class LayerPlan:
    """One layer's plan: [neurons] shares of the tokens, and how much of a neuron's input its predictor sees.

    Attributes:
        predicted, firing: [neurons] float64.
        correlation: between the predictor's score and the neuron's input, both of unit variance.
    """

    predicted: NDArray[np.float64]
    firing: NDArray[np.float64]
    correlation: float


def plan_layer(shape: Shape, layer: int, random: np.random.Generator) -> LayerPlan:
    """Draws the shares of a layer's neurons. Solves for the correlation at which FALSE_NEGATIVES are missed."""
    predicted = _stratified_beta(shape.ffn_size, random)
    firing = predicted * (firing_mean(layer, shape.layers) / PREDICTED_MEAN)
    return LayerPlan(predicted, firing, _correlation(predicted, firing))


def firing_mean(layer: int, layers: int) -> float:
    """The share of neurons that fire in `layer`. The curve meets the three published layers and the mean of 3.3 %."""
    depth = layer / max(1, layers - 1)
    if depth <= 0.5:
        return FIRING_FIRST + 2 * depth * (FIRING_MIDDLE - FIRING_FIRST)
    return FIRING_MIDDLE + sqrt(2 * depth - 1) * (FIRING_LAST - FIRING_MIDDLE)


def new_share(predicted: NDArray[np.float64], window: int) -> float:
    """The share of neurons that a token wants and none of the `window` tokens before it."""
    return float((predicted * (1 - predicted) ** window).mean())


def union_share(predicted: NDArray[np.float64], tokens: int) -> float:
    """The share of neurons that at least one of `tokens` tokens wants."""
    return float((1 - (1 - predicted) ** tokens).mean())


def skew_share(predicted: NDArray[np.float64]) -> float:
    """The share of neurons, the busiest first, that make BUSIEST_SHARE of all activations."""
    made = np.cumsum(np.sort(predicted)[::-1])
    return float((np.searchsorted(made, BUSIEST_SHARE * made[-1]) + 1) / len(predicted))


def _stratified_beta(count: int, random: np.random.Generator) -> NDArray[np.float64]:
    """`count` draws in random order: every 64th of many sorted draws, so they follow the distribution evenly."""
    many = np.sort(random.beta(BETA_A, BETA_B, count * 64))[32::64]
    return random.permutation(np.clip(many, _SHARES_MIN, 1 - 1e-4))


def normal_quantile(shares: NDArray[np.float64]) -> NDArray[np.float64]:
    """The values above which the standard normal distribution has `shares` of its mass."""
    quantile: NDArray[np.float64] = -torch.special.ndtri(torch.from_numpy(shares)).numpy()
    return quantile


def _correlation(predicted: NDArray[np.float64], firing: NDArray[np.float64]) -> float:
    """Finds the correlation by bisection: the higher it is, the less the predictor misses."""
    some = np.argsort(predicted)[:: max(1, len(predicted) // 256)]
    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        missed = _missed(predicted[some], firing[some], middle)
        low, high = (middle, high) if missed > FALSE_NEGATIVES else (low, middle)
    return high


def _missed(predicted: NDArray[np.float64], firing: NDArray[np.float64], correlation: float) -> float:
    """The share of firings that the predictor misses: an integral over its score, from far below to its threshold."""
    predictor_at, fires_at = normal_quantile(predicted)[:, None], normal_quantile(firing)[:, None]
    steps = (np.arange(_QUADRATURE) + 0.5) / _QUADRATURE
    score = -8 + steps * (predictor_at + 8)  # [neurons, steps]
    density = np.exp(-0.5 * score**2) / sqrt(2 * np.pi)
    noise = max(1e-6, sqrt(1 - correlation**2))
    fires = torch.special.ndtr(torch.from_numpy((correlation * score - fires_at) / noise)).numpy()
    missed = (density * fires).sum(axis=1) * (predictor_at[:, 0] + 8) / _QUADRATURE
    return float(missed.sum() / firing.sum())
