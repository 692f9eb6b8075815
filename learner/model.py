"""The policy: a transformers causal language model that answers one question: how likely were these tokens?

Master weights are float32 and sharded with FSDP2, block by block; the forward and backward pass compute in the
model's `dtype`, in which frozen weights (those beside which adapters are trained) are also kept. Names and shapes
outside are those of the Hugging Face model, so what is exported and saved is what vLLM loads.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from core.config import LoraConfig, ModelConfig
from core.errors import UserError
from learner import adapters, attention
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

    def without_adapters(self, micro: Micro, *read: Reader) -> tuple[Tensor, ...]:
        """What the policy said before it was trained: a reference that takes no memory. It leaves no gradient."""
        with torch.no_grad(), adapters.disabled(self.hf):
            return self(micro, *read)


def load_policy(
    config: ModelConfig,
    path: str,
    ranks: Ranks,
    *,
    temperature: float,
    chunk: int,
    checkpointing: bool = False,
    compiled: bool = False,
    lora: LoraConfig | None = None,
    seed: int = 0,
) -> Policy:
    """The model at `path` (a folder or hub name) on this rank, sharded where there is something to shard.

    What is trained is float32: everything, or with `lora` the adapters, which the seed draws. Raises UserError when
    transformers cannot load it or `_check` finds other log-probs.
    """
    dtype = getattr(torch, config.dtype)
    policy = Policy(load_hf(AutoModelForCausalLM, config, path, "model.path", checkpointing), temperature, chunk)
    if lora is not None:
        adapters.inject(policy.hf, lora, seed)
        _check_names(policy.hf)
    if config.attention != "flash_attention_2":  # its kernels do not run here, on CPU and in float32
        _check(policy, path)
    for frozen in (p for p in policy.parameters() if not p.requires_grad):
        frozen.data = frozen.data.to(dtype)
    if compiled:
        for name in policy.blocks:
            policy.hf.get_submodule(name).compile(dynamic=True)
    return shard(policy, dtype, ranks)


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
    # On one rank a frozen weight, which has its dtype, needs nothing of FSDP2 either.
    plain = {p for p in model.parameters() if not p.requires_grad} if ranks.world == 1 else None
    for name in model.blocks:
        fully_shard(model.hf.get_submodule(name), mesh=mesh, mp_policy=precision, ignored_params=plain)
    fully_shard(model, mesh=mesh, mp_policy=precision, ignored_params=plain)
    return model.to(ranks.device)


def named_tensors(hf: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """(name, parameter or persistent buffer, possibly a shard), tied weights once.

    Where there are adapters, the frozen weights' names have a piece in them that `adapters.plain` takes out.
    """
    seen: set[int] = set()
    for name, tensor in hf.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, tensor


def changing(hf: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Those of `named_tensors` that training changes: the adapters, or all where there are none."""
    apart = bool(adapters.pairs(hf))
    return ((name, tensor) for name, tensor in named_tensors(hf) if not apart or adapters.plain(name) is None)


def whole_tensors(hf: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face name, whole tensor), adapters merged into their matrices; one at a time, and a collective."""
    pairs = adapters.pairs(hf)
    for name, tensor in ((adapters.plain(name), tensor) for name, tensor in named_tensors(hf)):
        if name in pairs:
            a, b, scale = pairs[name]
            yield name, torch.addmm(full(tensor).float(), full(b), full(a), alpha=scale)
        elif name is not None:
            yield name, full(tensor)


def handed_over(hf: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """What engines need to know of a new version, (name, whole tensor); one at a time, and a collective.

    All tensors by their Hugging Face names. Of adapters only them: NAME.lora_A [rank, in] and NAME.lora_B [out, rank],
    NAME being that of the matrix, which is now its own value of the start + lora_B @ lora_A.
    """
    pairs = adapters.pairs(hf)
    for name, (a, b, scale) in pairs.items():
        yield f"{name}.lora_A", full(a)
        yield f"{name}.lora_B", full(b) * scale
    if not pairs:
        yield from ((name, full(tensor)) for name, tensor in named_tensors(hf))


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


def _check_names(hf: PreTrainedModel) -> None:
    """Refuse adapters of matrices that the model's files hold joined or in pieces: an engine could not place them."""
    pairs = adapters.pairs(hf)
    published = {name: list(as_published(hf, f"{name}.lora_A", pair.a.detach())) for name, pair in pairs.items()}
    known = Counter(name for names in published.values() for name in names)
    for name, names in published.items():
        if len(names) != 1 or known[names[0]] != 1:
            raise UserError(
                f"model.lora.targets: the files of {hf.name_or_path} do not hold {name} as one matrix (but as "
                f"{', '.join(n.removesuffix('.lora_A') for n in names)}); name the other linear layers"
            )


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
    vocabulary = policy.hf.get_input_embeddings().get_parameter("weight").shape[0]
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
            module.attention_dropout = 0.0  # type: ignore[assignment]  # torch knows only tensors and modules in one
