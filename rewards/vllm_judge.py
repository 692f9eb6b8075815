"""The engine of a judge: vLLM in this process, prompts in, replies out."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Ask:
    """One question to a judge."""

    prompt: str
    temperature: float
    seed: int


Engine = Callable[[Sequence[Ask]], "list[str | None]"]
"""Replies, in order; none where there is none: the prompt did not fit, or max_tokens cut the reply off."""


class VLLMJudge:
    """An `Engine` on a vLLM of its own. vLLM reads its environment once: this must be the first to import it."""

    def __init__(
        self,
        path: str,
        *,
        revision: str | None,
        chat: bool,
        max_tokens: int,
        max_model_len: int,
        kv_cache_gib: float,
        gpu_memory_utilization: float,
    ) -> None:
        import torch

        cpu = not torch.cuda.is_available()
        _prepare_environment(cpu)
        from transformers import AutoConfig
        from vllm import LLM

        text = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False).get_text_config()
        self.longest = min(max_model_len, getattr(text, "max_position_embeddings", None) or max_model_len)
        self.chat, self.max_tokens = chat, max_tokens
        self._llm = LLM(
            model=path,
            revision=revision,
            trust_remote_code=False,
            load_format="safetensors",
            max_model_len=self.longest,
            gpu_memory_utilization=gpu_memory_utilization,
            kv_cache_memory_bytes=int(kv_cache_gib * 2**30) if cpu else None,
            enforce_eager=cpu,
            enable_prefix_caching=True,  # all prompts of a judge begin with its rubric
            # A prompt cut between two steps makes vLLM rewind the sample's generator, which a CPU generator cannot do.
            enable_chunked_prefill=False if cpu else None,
            max_num_batched_tokens=max(4096, self.longest) if cpu else None,
            # An executor of its own process would outlive a kill of this one.
            distributed_executor_backend="uni",
        )
        self._tokenizer: Any = self._llm.get_tokenizer()

    def special_tokens(self) -> list[str]:
        """What the judge's tokenizer reads as more than text."""
        return list(self._tokenizer.all_special_tokens)

    def __call__(self, asks: Sequence[Ask]) -> list[str | None]:
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        encoded = [self._encode(ask.prompt) for ask in asks]
        fits = [i for i, ids in enumerate(encoded) if len(ids) + self.max_tokens <= self.longest]
        params = [
            SamplingParams(temperature=asks[i].temperature, seed=asks[i].seed, max_tokens=self.max_tokens) for i in fits
        ]
        prompts = [TokensPrompt(prompt_token_ids=encoded[i]) for i in fits]
        replies: list[str | None] = [None] * len(asks)
        for i, output in zip(fits, self._llm.generate(prompts, params, use_tqdm=False) if fits else (), strict=True):
            reply = output.outputs[0]
            # A reply that was cut off may end in a score that its thinking only considered.
            replies[i] = reply.text if reply.finish_reason == "stop" else None
        return replies

    def _encode(self, prompt: str) -> list[int]:
        if not self.chat:
            return list(self._tokenizer.encode(prompt))
        turn = [{"role": "user", "content": prompt}]
        text = self._tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        return list(self._tokenizer.encode(text, add_special_tokens=False))  # the template has put them in


def _prepare_environment(cpu: bool) -> None:
    """Set what vLLM and torch read when vLLM is imported."""
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine lives and dies with this process
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
    }
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # it would overrule kv_cache_gib
    if cpu:
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # else it takes the cores of the actors' engines
        os.environ["TORCHDYNAMO_DISABLE"] = "1"  # else the first request waits for a compiler
