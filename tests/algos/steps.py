"""A step with every field that a method may read, small enough to look at: 3 prompts, 9 rows, up to 6 tokens."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from algos.batch import Batch
from algos.loss import LossOutput, advantages, late, loss, normalise, remember
from algos.method import PIECES, Method
from algos.methods import methods, resolve

CONTEXT = {"max_tokens": 8}
ROWS = {name: resolve(name, context=CONTEXT) for name in methods}


def parts_of(method: Method) -> set[tuple[str, str]]:
    """(piece, part) of everything that the method is made of."""
    chosen = {piece: getattr(method, piece) for piece in PIECES}
    several = {piece: parts if isinstance(parts, tuple) else (parts,) for piece, parts in chosen.items()}
    return {(piece, part.name) for piece, parts in several.items() for part in parts if part}


def others() -> dict[str, Method]:
    """A method for each registered part that no row has."""
    used = {pair for method in ROWS.values() for pair in parts_of(method)}
    left = [(piece, part) for piece in PIECES for part in PIECES[piece].registry if (piece, part) not in used]
    beside = {"memory": {"entropy": "bonus", "kl": {"coef": 0.04}}}
    return {f"{piece}/{part}": resolve({piece: part, **beside.get(piece, {})}, context=CONTEXT) for piece, part in left}


RUNNABLE = ROWS | others()

GROUP = torch.tensor([0, 1, 0, 1, 2, 0, 1, 2, 2])
REWARDS = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0, 1.0]).double()
MASK = torch.tensor(
    [
        [1, 1, 1, 1, 1, 0],
        [1, 0, 1, 1, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 1, 1],
        [1, 0, 0, 1, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
    ]
).bool()


def step(method: Method, spread: float = 0.3, dtype: torch.dtype = torch.float64, **changes: Tensor) -> Batch:
    """The step; log-probabilities of the four policies lie `spread` apart."""
    draw = torch.Generator().manual_seed(7)

    def random(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=draw, dtype=torch.float64).to(dtype)

    base = -0.3 - 2 * random(9, 6)
    fields = {
        "old_logprobs": base,
        "rollout_logprobs": base + spread * (random(9, 6) - 0.5),
        "ref_logprobs": base + spread * (random(9, 6) - 0.5),
        "entropy": random(9, 6),
        "values": random(9, 6),
        "token_scores": 4 * random(9, 6) - 2,
        "sum_pi_sq": random(9, 6),
        "given_advantages": random(9, 6) - 0.5,
        "given_weights": random(9, 6),
        "greedy_rewards": random(9),
        "baselines": random(9),
        "bootstrap": random(9),
        "answers": torch.tensor([0, 1, 2, 0, 0, 1, 1, 2, 0]),
        "versions": torch.full((9, 6), 3),
        "truncated": torch.tensor([0, 0, 0, 0, 0, 0, 1, 0, 0]).bool(),
        "tempered_logprobs": base * 0.9,
        "divergence": random(3, 6)[GROUP],
        "prompts": tuple(f"prompt {g}" for g in GROUP.tolist()),
        "version": 5,
        "seed": 11,
    }
    batch = Batch(mask=MASK, group=GROUP, rewards=REWARDS, **fields)
    batch = replace(batch, **changes)
    return replace(batch, rewards=torch.stack([batch.rewards] * 2, 1)) if "components" in method.needs else batch


def current(batch: Batch, spread: float = 0.3) -> Tensor:
    """Log-probabilities of the policy while it is updated."""
    draw = torch.Generator().manual_seed(8)
    noise = torch.rand(batch.mask.shape, generator=draw, dtype=torch.float64)
    return (batch.old_logprobs + spread * (noise - 0.5)).to(batch.old_logprobs.dtype).detach()


def ready(method: Method, batch: Batch, logprobs: Tensor) -> Batch:
    """Through `remember`, `advantages` and `normalise` (or `late`)."""
    batch, _ = remember(method, batch, [{} for _ in method.memory])
    batch = advantages(method, batch)
    return late(method, batch, logprobs) if "late" in method.needs else normalise(method, batch)


def extras(method: Method, logprobs: Tensor) -> dict[str, Tensor]:
    """The other arguments of `loss` that the method needs."""
    needed = {"entropy_grad": "entropy", "critic": "values", "credit": "token_scores"}
    return {name: logprobs.detach() * 0 + 0.5 for need, name in needed.items() if need in method.needs}


def run(method: Method, batch: Batch, logprobs: Tensor) -> tuple[LossOutput, Tensor]:
    """The loss of the whole step and its gradient with respect to the log-probabilities."""
    logprobs = logprobs.clone().requires_grad_()
    batch = ready(method, batch, logprobs)
    output = loss(method, batch, logprobs, **extras(method, logprobs))
    output.loss.backward()
    return output, logprobs.grad
