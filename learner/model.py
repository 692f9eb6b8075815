"""The policy: a transformers causal language model that answers one question: how likely were these tokens?

Master weights are float32 and sharded with FSDP2, block by block; the forward and backward pass compute in the
model's `dtype`. The Hugging Face model keeps its own parameter names, so what is exported and saved is what vLLM loads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from core.config import ModelConfig
from core.errors import UserError
from learner import attention
from learner.collate import Micro, Sequences
from learner.logprobs import Head, token_logprobs
from learner.ranks import Ranks


class Packed(nn.Module):
    """A transformers model that reads packed rows. FSDP2 shards it as one root with a unit per block."""

    def __init__(self, hf: PreTrainedModel) -> None:
        super().__init__()
        self.hf = hf
        # Named here, because FSDP2 renames the classes of what it shards.
        kinds = set(hf._no_split_modules or ())
        self.blocks = [name for name, module in hf.named_modules() if type(module).__name__ in kinds]

    @property
    def shares_prompts(self) -> bool:
        """Whether the rows of a group may read their prompt once: our own attention can, the others cannot."""
        return self.hf.config._attn_implementation == attention.NAME

    def block_parameters(self) -> set[str]:
        """Hugging Face names of the parameters inside the blocks."""
        prefixes = tuple(f"{name}." for name in self.blocks)
        return {name for name, _ in self.hf.named_parameters() if name.startswith(prefixes)}

    def hidden(self, micro: Micro) -> Tensor:
        """The last hidden states where `micro.targets` are predicted, [M, H]."""
        # Without use_cache=False transformers makes a cache, and with a cache it no longer sees that a row is packed.
        extra = {"packing": micro.packing} if self.shares_prompts else {}
        read = self.hf.base_model(input_ids=micro.tokens, position_ids=micro.positions, use_cache=False, **extra)
        return read.last_hidden_state[0, micro.predict]


Reader = Callable[..., tuple[Tensor, ...]]
"""(hidden [M, H], weight [V, H], bias [V] or None, targets [M], head, chunk) -> numbers [M]."""


class Policy(Packed):
    """A causal language model and the head that turns hidden states into log-probs.

    The head's weight is read inside `forward`, because only there FSDP2 has gathered it.
    """

    def __init__(self, hf: PreTrainedModel, temperature: float, chunk: int) -> None:
        super().__init__(hf)
        self.head = _head(hf, temperature)
        self.chunk = chunk

    def forward(self, micro: Micro, read: Reader = token_logprobs) -> tuple[Tensor, ...]:
        """What `read` makes of `micro.targets`: log-probs and entropies at the rollout temperature, [M] float32."""
        head = self.hf.get_output_embeddings()
        bias = getattr(head, "bias", None)
        return read(self.hidden(micro), head.weight, bias, micro.targets, self.head, self.chunk)


def load_policy(
    config: ModelConfig, path: str, ranks: Ranks, *, temperature: float, chunk: int, checkpointing: bool = False
) -> Policy:
    """The model at `path` (a folder or hub name), float32, on this rank, sharded where there is something to shard.

    Raises UserError when transformers cannot load it or `_check` finds other log-probs.
    """
    policy = Policy(load_hf(AutoModelForCausalLM, config, path, "model.path", checkpointing), temperature, chunk)
    if config.attention != "flash_attention_2":  # its kernels do not run here, on CPU and in float32
        _check(policy, path)
    return shard(policy, getattr(torch, config.dtype), ranks)


def load_hf(
    kind: Any, config: ModelConfig, path: str, option: str, checkpointing: bool, **extra: Any
) -> PreTrainedModel:
    """The model at `path` as `kind` (a transformers Auto class), float32, without dropout, on CPU.

    Raises UserError, which names the `option` that holds the path, when transformers cannot load it.
    """
    try:
        # The revision is the model's; any other path is another repository.
        hf = kind.from_pretrained(
            path,
            revision=config.revision if path == config.path else None,
            dtype=torch.float32,
            attn_implementation=attention.NAME if config.attention == "sdpa" else config.attention,
            trust_remote_code=False,
            use_safetensors=True,
            **extra,
        )
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"{option}: transformers cannot load '{path}': {error}") from error
    _without_dropout(hf)
    hf.train()
    if checkpointing:
        hf.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return hf


Model = TypeVar("Model", bound=Packed)


def shard(model: Model, dtype: torch.dtype, ranks: Ranks) -> Model:
    """FSDP2 over the ranks: one unit per block, the rest (embeddings, last norm, head) is the root's own.

    One rank that computes in float32 has nothing to shard and nothing to cast. FSDP2 would only copy its parameters
    (measured on the tiny model on CPU: 0.03 s per pass, a fifth of a small step), so it stays a plain module.
    """
    if ranks.world == 1 and dtype == torch.float32:
        return model.to(ranks.device)
    mesh = ranks.mesh()
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for name in model.blocks:
        fully_shard(model.hf.get_submodule(name), mesh=mesh, mp_policy=precision)
    fully_shard(model, mesh=mesh, mp_policy=precision)
    return model.to(ranks.device)


def named_tensors(hf: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face name, parameter or persistent buffer, possibly a shard), tied weights once."""
    seen: set[int] = set()
    for name, tensor in hf.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, tensor


def as_published(hf: PreTrainedModel, name: str, whole: Tensor) -> dict[str, Tensor]:
    """A parameter under the names and in the shapes of the model's published files, which vLLM reads.

    Mostly itself; transformers keeps the experts of a mixture in one tensor that the files hold one by one.
    """
    return revert_weight_conversion(hf, {name: whole})


def full(tensor: Tensor) -> Tensor:
    """The whole of a possibly sharded tensor, detached. A collective: every rank calls it in the same order."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a possibly sharded tensor: a view of it, detached."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _head(hf: PreTrainedModel, temperature: float) -> Head:
    """What the model's config says about its logits (the names that transformers' models use)."""
    c = hf.config
    scale = (getattr(c, "logit_scale", None) or 1.0) / (getattr(c, "logits_scaling", None) or 1.0)
    return Head(temperature=temperature, softcap=getattr(c, "final_logit_softcapping", None), scale=scale)


@torch.no_grad()
def _check(policy: Policy, path: str) -> None:
    """Two short sequences with one prompt, packed, against the model's own logits of each alone.

    It finds heads that transform their logits in other ways, and layers whose state crosses packed sequences.
    """
    vocabulary = policy.hf.get_input_embeddings().weight.shape[0]
    a, b, c = (tuple(7 * i % vocabulary for i in range(first, first + 5)) for first in (1, 9, 17))
    micro = Micro.of(Sequences([a, a], [b, c], [0, 0]), [0, 1], torch.device("cpu"), policy.shares_prompts)
    ours, _ = policy(micro)
    kernel, policy.hf.config._attn_implementation = policy.hf.config._attn_implementation, "eager"
    theirs = torch.cat([_plain_logprobs(policy, a, completion) for completion in (b, c)])
    policy.hf.config._attn_implementation = kernel
    if not torch.allclose(ours, theirs, atol=1e-3, rtol=1e-3):
        raise UserError(
            f"model.path: '{path}' ({type(policy.hf).__name__}) cannot be trained on packed sequences here: log-probs "
            f"differ by {(ours - theirs).abs().max():.3g} from those of the model alone (a head or a layer of a kind "
            "that learner.model does not know)"
        )


def _plain_logprobs(policy: Policy, prompt: tuple[int, ...], completion: tuple[int, ...]) -> Tensor:
    logits = policy.hf(input_ids=torch.tensor([prompt + completion]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    logprobs = (logits.float() / policy.head.temperature).log_softmax(-1)
    return logprobs.gather(-1, torch.tensor(completion)[:, None])[:, 0]


def _without_dropout(hf: PreTrainedModel) -> None:
    """Old, current and reference log-probs must be of the same function, so there is no dropout in training either."""
    for module in hf.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
