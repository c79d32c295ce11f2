"""Builds transformers' own model with streamed FFNs. Its other weights are views of the resident bytes."""

from __future__ import annotations

import inspect
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import CONFIG_MAPPING, AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME

from flashclient._native import Ffn, Workers
from flashclient.errors import ModelError, some
from flashclient.kernels.decode_attention import use_decode_attention
from flashclient.kernels.decoder_layer import use_native_layers
from flashclient.kernels.dtypes import DTYPES
from flashclient.kernels.encoded_matrix import BlockRows
from flashclient.kernels.fused_attention import use_fused_attention
from flashclient.kernels.resident_conv1d import use_resident_conv1ds
from flashclient.kernels.resident_linear import use_fast_linears
from flashclient.kernels.resident_norm import use_native_norms
from flashclient.kernels.resident_router import use_native_routers
from flashclient.model.absent_weights import AbsentWeight, guard
from flashclient.model.activations import activation_of, settled
from flashclient.model.experts_ffn import ExpertsFFN
from flashclient.model.ffn import Clock, ExactFFN, ModelFFN, StreamedFFN
from flashclient.model.install import Placement, install_ffns
from flashclient.model.old_records import completed
from flashclient.model.predicted_ffn import PredictedFFN
from flashclient.model.predictor import Predictors
from flashclient.model.step import Steps
from flashclient.model.streamed_experts import StreamedExperts
from flashclient.model.tables.embedding import install_tables
from flashclient.model.tables.encoded_weights import EncodedWeight, settle_encoded_weights
from flashclient.source.bundle_source import BundleSource
from flashclient.torch_state import eager, for_good
from weightd_proto import weightd_pb2
from weightd_proto.encodings import BLOCK_FORMATS, bundle_neurons, encodings_of, formats_of, has_experts

COMPUTED_ELEMENTS_MAX = 1 << 24
FILLING = {name for name in vars(nn.init) if re.fullmatch("[a-z].*_", name)}  # transformers wraps these functions


class _UnmadeParameters(TorchFunctionMode):
    """Puts parameters on the meta device while a model is constructed, and computes its buffers.

    torch's layers allocate their weights with torch.empty. Constructing the whole model on the meta device would lose
    what models compute at construction and no checkpoint holds: rotary frequencies, Gemma's embedding scale. Some
    classes make large parameters, of experts, with torch.zeros. Parameters are not filled with random numbers: on the
    meta device that does nothing, and torch imports its compiler for it, which takes half a second.
    """

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        filled = kwargs.get("tensor", args[0] if args else None)
        if getattr(func, "__name__", None) in FILLING and isinstance(filled, Tensor) and filled.is_meta:
            return filled
        if kwargs.get("device") is None and (func is torch.empty or (func is torch.zeros and _is_large(args))):
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def _is_large(size: tuple[Any, ...]) -> bool:
    """Whether a tensor of this size is larger than what models compute at construction."""
    dimensions = size[0] if len(size) == 1 and not isinstance(size[0], int) else size
    return bool(prod(dimensions) > COMPUTED_ELEMENTS_MAX)


@dataclass(frozen=True)
class BuiltModel:
    """A model that is ready to run and holds no FFN weights.

    Attributes:
        model: transformers' own, in eval mode and without gradients.
        ffn: the object that computes all of its FFNs.
        steps: describes its forward passes; None in exact mode, which does not need it.
        record: what the weightd says of it, completed (old_records.py).
        native_layers_share: the share of its decoder layers that are native (kernels/decoder_layer.py).
        native_attention: whether all of its attention is, so that keys and values may be in int8.
    """

    model: PreTrainedModel
    ffn: ModelFFN
    steps: Steps | None
    record: weightd_pb2.Model
    native_layers_share: float
    native_attention: bool


@for_good()
def build_model(
    record: weightd_pb2.Model,
    folder: Path,
    source: BundleSource,
    placement: Placement,
    workers: Workers,
    window: int | None = None,
) -> BuiltModel:
    """Builds the model of `record`.

    Args:
        folder: with config.json and, if there is one, generation_config.json.
        window: None for exact mode; in predict mode the number of tokens whose neurons stay leased.

    Raises:
        ModelError: the class, the activation or a dtype is unknown, or the record does not fit the class.
        CalibrationError: the predictors do not fit the model.
    """
    if not record.model_class:
        record = completed(record, AutoConfig.from_pretrained(folder, trust_remote_code=False))
    model_class = _class_of(record)
    config = _config_of(model_class, record, folder)
    attention_chosen = config._attn_implementation is not None
    if not attention_chosen and getattr(config, "attn_logit_softcapping", None):
        config._attn_implementation = "eager"  # older transformers take sdpa, which drops the cap in silence
    dtype = DTYPES[record.compute_dtype]
    with _UnmadeParameters():
        model: PreTrainedModel = model_class._from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
    model.requires_grad_(False)
    model.train(False)  # dropout would change what the checks of installed FFNs see
    tensors = resident_tensors(record, source.resident)
    record = settled(record, tensors)
    kernels = _kernels(record, workers)
    ffn, steps = _ffn_of(model, record, source, kernels, workers, window)
    install_ffns(model, record, placement, tensors, ffn)
    install_tables(model, record, source.tables)
    _assign(model, tensors, record)
    model.generation_config = read_generation_config(folder)
    use_fast_linears(model, workers)
    use_resident_conv1ds(model)
    settle_encoded_weights(model)
    use_native_norms(model, workers)
    use_native_routers(model, workers)
    native_layers = 0
    native_attention = False
    if not attention_chosen:
        attentions = use_decode_attention(model, workers)
        native_attention = 0 < attentions == use_fused_attention(model, workers)
        native_layers = use_native_layers(model, workers, StreamedFFN, StreamedExperts)
    _keep_time(model, ffn.clock)
    model.train(False)  # the modules that were added, too
    guard(model)
    layers = max(native_layers, getattr(config.get_text_config(), "num_hidden_layers", 0), 1)
    return BuiltModel(model, ffn, steps, record, native_layers / layers, native_attention)


def read_generation_config(folder: Path) -> GenerationConfig:
    """As transformers' from_pretrained(): older checkpoints have its values in config.json."""
    if (folder / GENERATION_CONFIG_NAME).exists():
        found = GenerationConfig.from_pretrained(folder)
    else:
        found = GenerationConfig.from_pretrained(folder, config_file_name=CONFIG_NAME, _from_model_config=True)
    if getattr(found, "use_mtp", None):  # in MiniMax-M2's config.json it says that there are heads, which are left out
        found.use_mtp = None
    return found


def _class_of(record: weightd_pb2.Model) -> type[PreTrainedModel]:
    """transformers' class that runs the model. Raises ModelError where there is none."""
    found = getattr(transformers, record.model_class, None)
    if not isinstance(found, type) or not issubclass(found, PreTrainedModel):
        raise ModelError(
            f"model '{record.name}' needs {record.model_class}, which transformers {transformers.__version__} does not "
            "have; upgrade transformers"
        )
    return found


def _config_of(model_class: type[PreTrainedModel], record: weightd_pb2.Model, folder: Path) -> PreTrainedConfig:
    model_type = str(PreTrainedConfig.get_config_dict(folder)[0].get("model_type"))
    config_class = model_class.config_class
    if MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type) == record.model_class:
        config_class = CONFIG_MAPPING[model_type]  # several types can be run by one class
    assert config_class is not None
    if model_type != config_class.model_type:
        raise ModelError(
            f"config.json of model '{record.name}' has model_type {model_type!r}, {record.model_class} needs "
            f"{config_class.model_type!r}"
        )
    config: PreTrainedConfig = config_class.from_pretrained(folder)
    return config


def _kernels(record: weightd_pb2.Model, workers: Workers) -> list[Ffn]:
    """By layer. Layers with the same encodings and activation share one."""
    made: dict[tuple[bytes, ...], Ffn] = {}
    kernels, neurons = [], bundle_neurons(record.bundle)
    try:
        for layer in record.layers:
            parts = encodings_of(record.bundle, layer)
            activation = activation_of(record, layer)
            key = tuple(part.SerializeToString(deterministic=True) for part in (*parts, activation))
            if key not in made:
                made[key] = Ffn(workers, parts, record.bundle.hidden_size, activation, neurons=neurons)
            kernels.append(made[key])
        return kernels
    except ValueError as error:
        formats = formats_of(record)
        raise ModelError(
            f"no kernel for the FFNs of model '{record.name}', stored as {formats}: {error}; upgrade flashclient"
        ) from error


def _ffn_of(
    model: Any,
    record: weightd_pb2.Model,
    source: BundleSource,
    kernels: list[Ffn],
    workers: Workers,
    window: int | None,
) -> tuple[ModelFFN, Steps | None]:
    hidden_size = record.bundle.hidden_size
    if has_experts(record):
        return ExpertsFFN(source, kernels, record.layers, hidden_size, Clock()), None
    exact = ExactFFN(source, kernels, hidden_size, Clock())
    return (exact, None) if window is None else _predicted(exact, kernels[0], record, model, workers, window)


def _predicted(
    exact: ExactFFN, kernels: Ffn, record: weightd_pb2.Model, model: Any, workers: Workers, tokens: int
) -> tuple[PredictedFFN, Steps]:
    source = exact.source
    predictors = Predictors(source.predictors(), record, workers)
    steps = Steps(list(inspect.signature(model.forward).parameters), source.idle)
    model.register_forward_pre_hook(steps.publish, with_kwargs=True)
    return PredictedFFN(source, kernels, predictors, source.open_window(tokens), steps, exact, exact.clock), steps


def _keep_time(model: PreTrainedModel, clock: Clock) -> None:
    """Adds the time of the model and of its head to the clock."""
    head: torch.nn.Module | None = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if head is not None:
        head.register_forward_pre_hook(_with_plain_strides)
        _time(head, clock, "head_s")
    _time(model, clock, "forward_s")


def _time(module: torch.nn.Module, clock: Clock, name: str) -> None:
    began_s = 0.0

    @eager
    def begin(*_: object) -> None:
        nonlocal began_s
        began_s = time.perf_counter()

    @eager
    def end(*_: object) -> None:
        setattr(clock, name, getattr(clock, name) + time.perf_counter() - began_s)

    module.register_forward_pre_hook(begin)
    module.register_forward_hook(end)


def _with_plain_strides(_: torch.nn.Module, hidden_states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Copies the input of the head to contiguous memory.

    transformers passes a slice for the last token. Because of its strides torch's matmul would first copy the whole
    head, which takes a second for the 262144 rows of Gemma 3.
    """
    return tuple(tensor.clone(memory_format=torch.contiguous_format) for tensor in hidden_states)


def resident_tensors(
    record: weightd_pb2.Model, resident: NDArray[np.uint8], dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Views of the resident bytes, by name.

    Args:
        dtype: floats of another one are converted, into copies. None: all are as the import has stored them, because
            transformers keeps few tensors of some models in fp32; those in blocks are EncodedWeights.
    """
    tensors: dict[str, Tensor] = {}
    for tensor in record.resident:
        data = resident[tensor.offset_bytes : tensor.offset_bytes + tensor.size_bytes]
        if tensor.dtype in BLOCK_FORMATS:
            of_model = DTYPES[record.compute_dtype] if dtype is None else dtype
            rows = BlockRows(torch.from_numpy(data).view(tensor.shape[0], -1), tensor.dtype, tensor.shape[1], of_model)
            tensors[tensor.name] = rows.values() if dtype else EncodedWeight.of_blocks(rows, tensor.name, of_model)
            continue
        if tensor.dtype not in DTYPES:
            raise ModelError(f"tensor {tensor.name} of model '{record.name}' has unknown dtype {tensor.dtype}")
        view = _view(data, DTYPES[tensor.dtype]).view(tuple(tensor.shape))
        tensors[tensor.name] = view if dtype is None or not view.is_floating_point() else view.to(dtype)
    return tensors


def _view(data: NDArray[np.uint8], dtype: torch.dtype) -> Tensor:
    """A tensor that is not aligned to its elements is copied, because torch needs that."""
    aligned = data if data.ctypes.data % dtype.itemsize == 0 else data.copy()
    return torch.from_numpy(aligned).view(dtype)


def _assign(model: PreTrainedModel, tensors: dict[str, Tensor], record: weightd_pb2.Model) -> None:
    try:
        unfit = model.load_state_dict(tensors, strict=False, assign=True)
    except RuntimeError as error:
        shapes = str(error).splitlines()[-1].strip()
        raise ModelError(f"a tensor of model '{record.name}' does not fit its config: {shapes}") from error
    # A head in the checkpoint that differs from the embedding stays untied, whatever the config says.
    model.tie_weights(missing_keys=set(unfit.missing_keys), recompute_mapping=False)
    if unfit.unexpected_keys:
        raise ModelError(f"model '{record.name}' has tensors that its config does not: {some(unfit.unexpected_keys)}")
    state = [*model.named_parameters(), *model.named_buffers()]
    absent = {name for name, tensor in state if isinstance(tensor, AbsentWeight)}
    unmade = {name for name, tensor in state if tensor.is_meta} - absent
    # A parameter that was not assigned would be uninitialised memory; a tied one has its partner's storage by now.
    tied = set(model.all_tied_weights_keys)
    missing = sorted(unmade | (set(unfit.missing_keys) - tied - absent))
    if missing:
        raise ModelError(f"model '{record.name}' lacks tensors: {some(missing)}")
