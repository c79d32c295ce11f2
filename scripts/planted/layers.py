"""Layers of a planted model: random weights around FFNs whose firing follows a plan.

An FFN's input x is a normalised residual stream, nearly Gaussian with unit variance per coordinate. For each layer a
subspace of low rank is drawn, and for each neuron a unit direction v in it. The neuron's row is

    correlation * (v through the subspace) + sqrt(1 - correlation^2) * noise

So row . x has unit variance. The predictor sees only the score v . (subspace x), which correlates with row . x as
planned. Thresholds on both give the planned shares of firing and predicted neurons. In OPT, fc1's bias is a neuron's
threshold. Llama has no bias, so one coordinate has the same positive value in every embedding, and no layer adds to it.
The gate row's weight for this coordinate is the threshold.

Attention and FFN add little to the embeddings, so tokens stay independent and x keeps its distribution through all
layers. The thresholds are still set on measurements: random tokens are run through the layers that are written. The
resulting shares are measured on other tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import sqrt

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from planted.plan import LayerPlan, Shape, normal_quantile, plan_layer
from planted.shares import Shares, shares_of

ADDED = 0.05  # standard deviation, per coordinate, of the output of one attention or FFN; that of embeddings is 1
OF_POSITION_IDS = 0.1  # standard deviation, per coordinate, of OPT's embeddings of position ids
SEQUENCE_TOKENS = 256  # tokens in each sequence of the sample
SEQUENCES = 5  # sequences in the sample: thresholds are set on all but the last, and checked on the last
BANK_NUMBERS = (1 << 24) + 43  # odd, so rows that reuse the same numbers have them in other columns
SLICE_ROWS = 1024  # rows made at a time: bounds the memory of fp32 copies
ROPE_THETA = 10000.0
NORM_EPSILON = {"opt": 1e-5, "llama": 1e-6}
TOKENS_SPECIAL = 16  # token ids below this one are never drawn


class Noise:
    """Makes Gaussian matrices cheaply. Each takes consecutive numbers of one bank, from a random place on."""

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._bank = torch.randn(BANK_NUMBERS, generator=self._generator)
        self._dtype = dtype

    def matrix(self, rows: int, columns: int, deviation: float) -> Tensor:
        """A matrix [rows, columns] in the model's dtype."""
        matrix = torch.empty(rows * columns, dtype=self._dtype)
        place = int(torch.randint(BANK_NUMBERS, (), generator=self._generator))
        filled = 0
        while filled < len(matrix):
            piece = self._bank[place : place + len(matrix) - filled]
            matrix[filled : filled + len(piece)] = piece * deviation
            filled, place = filled + len(piece), 0
        return matrix.view(rows, columns)


@dataclass(frozen=True)
class LowRankPredictor:
    """The predictor of one layer. A neuron is predicted where output . (input . x) + bias > 0."""

    input: Tensor  # [rank, hidden_size]
    output: Tensor  # [neurons, rank]
    bias: Tensor  # [neurons] fp32


@dataclass(frozen=True)
class Measured:
    """The plan of a layer, and the shares measured on the sequence on which no threshold was set."""

    plan: LayerPlan
    shares: Shares
    neuron_firing: NDArray[np.float32]  # [neurons], over all sequences
    neuron_predicted: NDArray[np.float32]


@dataclass(frozen=True)
class PlantedLayer:
    """A layer: its tensors by their names within the layer, its predictor, and what was measured."""

    tensors: dict[str, Tensor]
    predictor: LowRankPredictor
    measured: Measured


class PlantedModel:
    """Makes the model's tensors: call outside() first, then iterate over layers() once.

    Holds a bank of noise and a few sequences.

    Args:
        seed: the same seed gives the same model.
    """

    def __init__(self, shape: Shape, dtype: torch.dtype, seed: int) -> None:
        self.shape = shape
        self._dtype = dtype
        self._noise = Noise(seed, dtype)
        self._random = np.random.default_rng(seed)
        self._stream = torch.empty(0)  # [sequences, tokens, hidden_size] fp32: the residual stream of the sample

    def outside(self) -> dict[str, Tensor]:
        """Makes all tensors outside the layers. Starts the residual stream of the sample with the embeddings."""
        shape = self.shape
        embedding = self._noise.matrix(shape.vocabulary, shape.hidden_size, 1.0)
        ones, zeros = torch.ones(shape.hidden_size), torch.zeros(shape.hidden_size)
        ids = self._random.integers(TOKENS_SPECIAL, shape.vocabulary, (SEQUENCES, SEQUENCE_TOKENS))
        if shape.family == "llama":
            embedding[:, 0] = sqrt(shape.hidden_size) / 8
            self._stream = embedding[torch.from_numpy(ids)].float()
            head = self._noise.matrix(shape.vocabulary, shape.hidden_size, shape.hidden_size**-0.5)
            return self._typed(
                {"model.embed_tokens.weight": embedding, "lm_head.weight": head, "model.norm.weight": ones}
            )
        # OPT keeps the embedding of position id 0 in row 2.
        of_position_ids = self._noise.matrix(shape.context_tokens + 2, shape.hidden_size, OF_POSITION_IDS)
        self._stream = embedding[torch.from_numpy(ids)].float() + of_position_ids[2 : 2 + SEQUENCE_TOKENS].float()
        final = {"model.decoder.final_layer_norm.weight": ones, "model.decoder.final_layer_norm.bias": zeros}
        embeddings = {
            "model.decoder.embed_tokens.weight": embedding,
            "model.decoder.embed_positions.weight": of_position_ids,
        }
        return self._typed(embeddings | final)

    def layers(self) -> Iterator[PlantedLayer]:
        """Yields each layer. A layer is made when it is requested."""
        for index in range(self.shape.layers):
            plan = plan_layer(self.shape, index, self._random)
            attention = self._attention()
            self._attend(attention)
            tensors, predictor, measured = self._ffn(plan)
            yield PlantedLayer(self._typed(attention | tensors), predictor, measured)

    @property
    def stream(self) -> Tensor:
        """The sample's residual stream after the layers made so far."""
        return self._stream

    def _typed(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.to(self._dtype).contiguous() for name, tensor in tensors.items()}

    def _attention(self) -> dict[str, Tensor]:
        size, opt = self.shape.hidden_size, self.shape.family == "opt"
        tensors = {f"self_attn.{name}_proj.weight": self._noise.matrix(size, size, size**-0.5) for name in "qkv"}
        output = "out" if opt else "o"
        tensors[f"self_attn.{output}_proj.weight"] = self._noise.matrix(size, size, ADDED * size**-0.5)
        if not opt:
            tensors["self_attn.o_proj.weight"][0] = 0  # coordinate 0 must stay constant
        norms = ("self_attn_layer_norm", "final_layer_norm") if opt else ("input_layernorm", "post_attention_layernorm")
        tensors |= {f"{norm}.weight": torch.ones(size) for norm in norms}
        if opt:
            zeros = torch.zeros(size)
            tensors |= {f"self_attn.{name}_proj.bias": zeros for name in ("q", "k", "v", "out")}
            tensors |= {f"{norm}.bias": zeros for norm in norms}
        return tensors

    def _normalised(self) -> Tensor:
        size = (self.shape.hidden_size,)
        epsilon = NORM_EPSILON[self.shape.family]
        if self.shape.family == "opt":
            return functional.layer_norm(self._stream, size, eps=epsilon)
        return functional.rms_norm(self._stream, size, eps=epsilon)

    def _attend(self, tensors: dict[str, Tensor]) -> None:
        """Adds causal self-attention to the stream."""
        x = self._normalised()
        q, k, v = (self._heads(multiply(x, tensors[f"self_attn.{name}_proj.weight"])) for name in "qkv")
        if self.shape.family == "llama":
            q, k = rotated(q), rotated(k)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        mixed = mixed.transpose(1, 2).reshape(x.shape)
        output = "out" if self.shape.family == "opt" else "o"
        self._stream = self._stream + multiply(mixed, tensors[f"self_attn.{output}_proj.weight"])

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.shape.heads, -1).transpose(1, 2)

    def _ffn(self, plan: LayerPlan) -> tuple[dict[str, Tensor], LowRankPredictor, Measured]:
        """Makes an FFN and adds its output to the stream."""
        x = self._normalised().flatten(0, 1)  # [all tokens, hidden_size]
        subspace, directions = self._low_rank()
        rows = self._planted_rows(subspace, directions, plan.correlation)
        scores = multiply(multiply(x, subspace), directions)
        wanted_bias = thresholds(scores, plan.predicted)
        scores += wanted_bias
        inputs = multiply(x, rows)
        bias = thresholds(inputs, plan.firing)
        if self.shape.family == "opt":
            bias = bias.to(self._dtype)
            inputs += bias.float()
        else:
            rows[:, 0] = bias / x[:, 0].mean()
            inputs += x[:, :1] * rows[:, 0].float()
        measured = measure(plan, inputs > 0, scores > 0)
        tensors = self._rest_of_ffn(x, inputs.relu_(), rows, bias)
        return tensors, LowRankPredictor(subspace, directions, wanted_bias), measured

    def _rest_of_ffn(self, x: Tensor, fired: Tensor, rows: Tensor, bias: Tensor) -> dict[str, Tensor]:
        """The tensors of the FFN. Adds its output, scaled to ADDED, to the stream. fired: [tokens, neurons]."""
        size, width = self.shape.hidden_size, self.shape.ffn_size
        if self.shape.family == "opt":
            tensors = {"fc1.weight": rows, "fc1.bias": bias, "fc2.bias": torch.zeros(size)}
        else:
            up = self._noise.matrix(width, size, size**-0.5)
            fired *= multiply(x, up)
            tensors = {"mlp.gate_proj.weight": rows, "mlp.up_proj.weight": up}
        strength = fired.square().sum(dim=1).mean().sqrt().item()
        down = self._noise.matrix(size, width, ADDED / max(strength, 1e-3))
        if self.shape.family == "llama":
            down[0] = 0
        self._stream = self._stream + multiply(fired, down).view(self._stream.shape)
        return tensors | {"fc2.weight" if self.shape.family == "opt" else "mlp.down_proj.weight": down}

    def _low_rank(self) -> tuple[Tensor, Tensor]:
        """The subspace [rank, hidden_size] and each neuron's direction in it [neurons, rank], of unit length."""
        shape = self.shape
        subspace = self._noise.matrix(shape.rank, shape.hidden_size, shape.hidden_size**-0.5)
        if shape.family == "llama":
            subspace[:, 0] = 0
        directions = self._noise.matrix(shape.ffn_size, shape.rank, 1.0).float()
        return subspace, functional.normalize(directions).to(self._dtype)

    def _planted_rows(self, subspace: Tensor, directions: Tensor, correlation: float) -> Tensor:
        """The neurons' rows [neurons, hidden_size] in the model's dtype."""
        noise = sqrt((1 - correlation**2) / self.shape.hidden_size)
        rows = self._noise.matrix(self.shape.ffn_size, self.shape.hidden_size, noise)
        seen = subspace.float() * correlation
        for begin in range(0, len(rows), SLICE_ROWS):
            some = slice(begin, begin + SLICE_ROWS)
            rows[some] = torch.addmm(rows[some].float(), directions[some].float(), seen).to(self._dtype)
        if self.shape.family == "llama":
            rows[:, 0] = 0
        return rows


def multiply(x: Tensor, weight: Tensor) -> Tensor:
    """Multiplies x [..., columns] by weight [rows, columns] in bf16, for speed. Returns fp32."""
    return (x.to(torch.bfloat16) @ weight.to(torch.bfloat16).T).float()


def rotated(x: Tensor) -> Tensor:
    """Applies Llama's rotary embeddings. x: [sequences, heads, tokens, head_size]."""
    half = x.shape[-1] // 2
    frequencies = ROPE_THETA ** (-torch.arange(half) / half)
    angles = torch.outer(torch.arange(x.shape[2]), frequencies)  # [tokens, half]
    cosine, sine = angles.cos(), angles.sin()
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)


def thresholds(values: Tensor, shares: NDArray[np.float64]) -> Tensor:
    """[neurons] fp32 such that values + threshold is above 0 for these shares of the tokens.

    Each neuron's threshold comes from its own mean, the layer's deviation and the normal distribution. A quantile of
    its own values would be inaccurate, because a neuron may fire for one token in a thousand and the sample has only a
    few thousand. Then all thresholds are shifted by one number, so that the layer's mean share is exact.

    Args:
        values: [all tokens, neurons] fp32; the last sequence is left out.
    """
    sample = values[:-SEQUENCE_TOKENS]
    deviation = sample.var(dim=0).mean().sqrt()
    bias = -(sample.mean(dim=0) + deviation * torch.from_numpy(normal_quantile(shares)).float())
    above = (sample + bias).numpy().reshape(-1)
    place = min(len(above) - 1, round(len(above) * (1 - float(shares.mean()))))
    above.partition(place)
    return bias - float(above[place])


def measure(plan: LayerPlan, fired: Tensor, wanted: Tensor) -> Measured:
    """Counts the shares. `fired` and `wanted`: [all tokens, neurons] bool."""
    return Measured(
        plan=plan,
        shares=shares_of(fired[-SEQUENCE_TOKENS:].numpy(), wanted[-SEQUENCE_TOKENS:].numpy()),
        neuron_firing=fired.float().mean(dim=0).numpy(),
        neuron_predicted=wanted.float().mean(dim=0).numpy(),
    )
