"""New weights made ready beside a vLLM model that goes on sampling, then put in place between two of its steps.

For CPU workers, whose kernels want linear weights in an order of their own: packing takes as long as many steps. A
`Shadow` is the model's modules once more, without weights. They are loaded by vLLM's own loaders, layer by layer as
vLLM reloads, and packed, on whatever thread; then the model's modules take over their tensors and kernels, which moves
pointers only. Until the old ones are freed there are two sets of weights in memory.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.attention import Attention, is_deferred_attention_layer
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload.layerwise import (
    LAYERWISE_INFO,
    _get_original_loader,
    _layerwise_process,
    get_layerwise_info,
    initialize_online_processing,
)
from vllm.model_executor.model_loader.reload.meta import (
    materialize_meta_tensor,
    restore_layer_on_meta,
    to_meta_tensor,
)
from vllm.model_executor.model_loader.reload.sanitize import restore_layer_refs, sanitize_layer_refs
from vllm.model_executor.model_loader.reload.utils import get_layer_tensors

from actors.weights import check_complete


def fits(model: nn.Module) -> bool:
    """Whether a model's layers are their weights and what is packed of them: some kinds of attention keep more."""
    plain = all(type(m) is Attention for m in model.modules() if is_deferred_attention_layer(m))
    return plain and not any(module._parameters and module._buffers for module in model.modules())


class Shadow:
    """New weights for `model`, ready to take their place."""

    def __init__(self, model: nn.Module, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Load them, on any thread; `model` is only read. Raises ValueError if it has parameters without weights."""
        self._pairs = list(_twins(model).items())
        try:
            with torch.no_grad():
                self._filled = self._load(model, tensors)
                self._tie()
        finally:
            for _, twin in self._pairs:
                if info := LAYERWISE_INFO.pop(twin, None):
                    info.restore_metadata = {}, {}  # whose loaders would keep the twin for ever

    def _load(self, model: nn.Module, tensors: Iterable[tuple[str, torch.Tensor]]) -> list[tuple[nn.Module, nn.Module]]:
        """The layers that have got weights, each with its twin."""
        for live, twin in self._pairs:
            _empty(live, twin)
        loaded = self._pairs[0][1].load_weights(tensors)
        parameters = {name for name, _ in model.named_parameters()}
        check_complete(parameters, parameters if loaded is None else loaded)
        return [(live, twin) for live, twin in self._pairs if _filled(twin)]

    def _tie(self) -> None:
        """A head tied to the embedding receives no weights of its own, and yet is packed of them."""
        twins = dict(self._pairs)
        owners = {id(t): (twins[live], name) for live, _ in self._filled for name, t in live._parameters.items()}
        for live, head in self._pairs:
            if isinstance(live, ParallelLMHead) and all(live is not filled for filled, _ in self._filled):
                owner, name = owners[id(live.weight)]
                head.weight = getattr(owner, name)
                head.quant_method.process_weights_after_loading(head)
                self._filled.append((live, head))

    def take_over(self) -> None:
        """From now on the model has these weights. Between two of its steps; this is of no use afterwards."""
        for live, twin in self._filled:
            for tensor in get_layer_tensors(twin).values():
                restore_layer_refs(sanitize_layer_refs(tensor, twin), live)  # else a twin would keep itself alive
            live.__dict__.update({name: value for name, value in twin.__dict__.items() if name != "_modules"})


def _twins(model: nn.Module) -> dict[nn.Module, Any]:
    """Each module of a model and its twin: the same attributes, but tensors and modules in tables of its own."""
    twins: dict[nn.Module, Any] = {module: type(module).__new__(type(module)) for module in model.modules()}
    for live, twin in twins.items():
        tables = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
        twin.__dict__.update(live.__dict__ | {table: live.__dict__[table].copy() for table in tables})
        twin._modules |= {name: twins[child] for name, child in twin._modules.items() if child is not None}
    return twins


def _empty(live: nn.Module, twin: nn.Module) -> None:
    """Have a twin wait for the weights of its layer, as vLLM has a layer that it loads for the first time."""
    info = get_layerwise_info(twin)
    parameters, buffers = get_layerwise_info(live).restore_metadata
    info.restore_metadata = _without_values(parameters, live), _without_values(buffers, live)
    info.restore_device = torch.device("cpu")
    restore_layer_on_meta(twin, info)
    bias = live._parameters.get("bias")
    if bias is not None:  # vLLM leaves it in place and would load into the model's own
        (meta,) = _without_values({"bias": bias}, live).values()
        twin._parameters["bias"] = restore_layer_refs(  # type: ignore[assignment]  # its class is still that of `bias`
            materialize_meta_tensor(meta), twin
        )
    initialize_online_processing(twin)


def _without_values(tensors: dict[str, torch.Tensor], layer: nn.Module) -> dict[str, torch.Tensor]:
    """Tensors on the meta device that know how they are loaded, and nothing of the layer whose they were."""
    empty = {name: to_meta_tensor(tensor) for name, tensor in tensors.items()}
    for tensor in empty.values():
        if hasattr(tensor, "weight_loader"):
            tensor.weight_loader = _get_original_loader(tensor)  # a reload in place leaves its own around it
        sanitize_layer_refs(tensor, layer)
    return empty


def _filled(twin: nn.Module) -> bool:
    """Whether weights came for this layer; one that has padding is processed only now."""
    info = get_layerwise_info(twin)
    if info.can_load() and info.load_numel > 0:
        _layerwise_process(twin, info)
    return bool(get_layer_tensors(twin)) and not any(t.is_meta for t in get_layer_tensors(twin).values())
