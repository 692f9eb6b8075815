"""One rank of the learner: groups in, one step of the method, new weights out.

    learner = Learner(config, resolve(config.method))
    result = learner.step(groups, version=0)          # result.metrics, result.advantages
    learner.export(dict)                              # full tensors by Hugging Face name
    learner.save(folder); learner.load(folder)

A step: collate -> passes without gradient (old, reference ...) -> advantages of the whole step -> per minibatch:
normalise, micro-batches forward and backward, clip, optimiser. It runs alone in a process (tests, the quickstart's
warm start) or as one of N ranks under `learner.pool`; then every rank holds all rows and computes its share of the
micro-batches. It knows no method by name: `method.needs` says which passes to make, `algos` does the rest.
"""

from __future__ import annotations

import hashlib
import json
import math
import resource
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from algos.batch import Batch
from algos.loss import advantages, late, loss, normalise, remember
from algos.method import Method
from core.config import LoraConfig, RunConfig
from core.errors import UserError
from core.schema import Group, Mixture
from learner import checkpoint
from learner.collate import Micro, Sequences, collate, split
from learner.flops import peak
from learner.gram import gradients, gram, pulls
from learner.logprobs import divergences, hidden_gradients, sum_of_squares, tempered
from learner.meter import Meter
from learner.metrics import Report, Totals, over_ranks
from learner.mixture import mixed, reference_kl
from learner.model import Policy, Reader, as_published, handed_over, load_policy, local, named_tensors
from learner.offload import saved_elsewhere
from learner.optim import Optimizer, schedule
from learner.ranks import Ranks
from learner.token_model import ROLES, load_companions

Result = TypeVar("Result")

# What a method may need: what this learner computes, and what groups, rewards and actors bring along.
SUPPLIED = {"old", "early_old", "ref", "entropy", "entropy_grad", "late", "rollout", "versions", "components"}
SUPPLIED |= {"demonstrations", "preferences", "greedy", "answers", "baselines", "bootstrap", "critic", "values"}
SUPPLIED |= {"credit", "token_scores", "sum_pi_sq", "tempered", "divergence"}

PLAIN = Mixture()

Says = Callable[..., tuple[Tensor, ...]]
"""(micro, reader or nothing) -> numbers [M]: a model, or the policy without its adapters."""


@dataclass(frozen=True)
class StepResult:
    """What a step tells the driver. Every rank returns the same.

    metrics: name -> number; `learner.metrics.METRICS` says what each of the learner's own means.
    advantages: per group, per completion: the mean advantage over its trained tokens; NaN where nothing was trained.
    kl: of each completion to the reference, in the order of the rows; none without a reference.
    """

    metrics: dict[str, float]
    advantages: list[list[float]]
    kl: list[float] | None = None


class Learner:
    """Policy, what is trained beside it, optimisers, the method's memory and the step counter of one rank."""

    def __init__(
        self,
        config: RunConfig,
        method: Method,
        *,
        ranks: Ranks | None = None,
        skipped: Path | None = None,
        reference: bool = False,
    ) -> None:
        """Load the policy, and the reference if `method.needs` it or the rewards do (`reference`).

        `ranks` None is one rank without a process group.

        skipped: folder below which the batch of an update with a non-finite loss or gradient is written
        (`step-N/`); None keeps no record. Raises UserError when the model cannot be loaded.
        """
        if missing := sorted(method.needs - SUPPLIED):
            raise UserError(f"method: '{method.name}' needs {', '.join(missing)}, which this learner does not supply")
        self.config, self.method, self.skipped = config, method, skipped
        self.ranks = ranks or Ranks()
        lora = config.model.lora
        self.policy = self._load(config.model.path, config.learner.activation_checkpointing, lora)
        self.reference: Says | None = None
        if "ref" in method.needs or reference:
            own = config.model.reference or (None if lora else config.model.path)
            self.reference = self._load(own).requires_grad_(False) if own else self.policy.without_adapters
        # Away from a GPU; a CPU has no other place.
        self._away = torch.device("cpu") if self.ranks.device.type == "cuda" else None
        self.optimiser = Optimizer(
            config.learner.optimizer,
            self.policy.hf.named_parameters(),
            self.policy.block_parameters(),
            away=self._away if "optimizer" in config.learner.offload else None,
        )
        self.companions = load_companions(config, method.needs, self.ranks)
        self.taught = [field for need, (field, _) in ROLES.items() if need in method.needs]  # the others stay frozen
        self._memory: list[dict[str, Any]] = [{} for _ in method.memory]
        self._steps_done = 0
        self._meter = Meter(self.ranks.device)

    @property
    def steps_done(self) -> int:
        """Steps behind the present weights, those of the loaded checkpoint included."""
        return self._steps_done

    # --- a step -----------------------------------------------------------------------------------------------------

    def step(self, groups: Sequence[Group], version: int, mixture: Mixture = PLAIN) -> StepResult:
        """One step of the method on `groups` (the same list on every rank). `version`: the weights' present version.

        mixture: how the groups' columns become advantages. Groups of demonstrations have no rollout_logprobs, versions
        or totals.
        """
        self._meter.begin()
        if self.ranks.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        method, batch, sequences = self._before(groups, version, mixture)
        totals, factor = Totals(), self._factor()
        given = torch.full((len(batch.group),), math.nan, dtype=torch.float64, device=self.ranks.device)
        for number, rows in enumerate(self._minibatches(batch.group)):
            index, tokens = torch.tensor(rows, device=self.ranks.device), sequences.rows(rows)
            minibatch = replace(batch.rows(index), moved=number > 0)
            if number == 0 and "early_old" not in self.method.needs:
                # The weights are still the old ones. Saying so makes the ratio exactly 1; two passes that pack the rows
                # differently agree only to rounding, and a sign(ratio - 1) in a loss would turn that into a gradient.
                minibatch = replace(minibatch, old_logprobs=None)
            minibatch = self._prepared(method, minibatch, tokens, totals)
            given[index] = _advantage(minibatch)
            with self._meter("gradients"):
                self._update(minibatch, tokens, factor, totals, groups)
        self._steps_done += 1
        if self._moves_reference and self._steps_done % self.config.model.reference_every == 0:
            self._move_reference()
        each = iter(given.tolist())
        kl = reference_kl(batch)
        return StepResult(
            self._metrics(totals, batch, factor),
            [[next(each) for _ in g.completions] for g in groups],
            None if kl is None else kl.tolist(),
        )

    def gram(self, groups: Sequence[Group]) -> tuple[list[list[float]], float]:
        """Inner products [K, K] of the gradients of the groups' columns (`learner.gram`), and the learning rate."""
        batch, sequences = collate(groups, self.ranks.device, apart=True)
        pull, width = pulls(batch), self.policy.hf.config.hidden_size
        read = ((micro, self.policy(micro, hidden_gradients)) for micro in self._share(sequences))
        with torch.no_grad():
            parts = (
                (torch.tensor(m.rows, device=pull.device)[m.row], m.step, slopes, hidden)
                for m, (slopes, hidden) in read
                if m.rows
            )
            whole = self.ranks.sum(gradients(pull, parts, width))
        return gram(whole), self.config.learner.optimizer.lr * self._factor()

    def _factor(self) -> float:
        """What the schedule makes of the learning rate in this step."""
        options = self.config.learner.optimizer
        return schedule(options.schedule, self._steps_done, self.config.steps, options.warmup_steps)

    def logprobs(self, groups: Sequence[Group]) -> tuple[Tensor, Batch]:
        """Log-probs [B, T] of the groups' completions under the present weights, and the batch they are laid out in."""
        batch, sequences = collate(groups, self.ranks.device)
        return self._without_gradient(self.policy, sequences, batch)[0], batch

    def _before(self, groups: Sequence[Group], version: int, mixture: Mixture) -> tuple[Method, Batch, Sequences]:
        """The step's batch with everything that is computed before its first update, and the method as it is mixed."""
        accuracy, baseline = self.config.rewards.accuracy, self.config.data.baseline_column
        columns = mixture.apart or "components" in self.method.needs
        batch, sequences = collate(groups, self.ranks.device, columns, baseline, accuracy)
        age = self.config.rollout.token_age
        batch = self._measured(replace(batch, version=version, max_age=age, seed=self._seed("method")), sequences)
        batch, self._memory = remember(self.method, batch, self._memory)
        if "tempered" in self.method.needs:
            assert batch.tempering is not None  # checked with the method: a memory fills it
            hot, _ = self._without_gradient(self.policy, sequences, batch, tempered(batch.tempering))
            batch = replace(batch, tempered_logprobs=hot)
        method, batch = mixed(self.method, batch, mixture)
        return method, advantages(method, batch), sequences

    def _measured(self, batch: Batch, sequences: Sequences) -> Batch:
        """The batch with what passes without gradient say of it: old, reference and what else the method needs."""
        needs, updates = self.method.needs, self.config.learner.epochs * self.config.learner.minibatches
        found: dict[str, Tensor | None] = {}
        # With a single update the old log-probs are those of the update's own forward pass: no pass is spent on them.
        wanted = "early_old" in needs or ("old" in needs and updates > 1)
        if wanted and "entropy" not in needs and self._engine_stands_in(batch):
            found["old_logprobs"] = batch.rollout_logprobs
        elif wanted or "entropy" in needs:
            found["old_logprobs"], found["entropy"] = self._without_gradient(self.policy, sequences, batch)
        if self.reference is not None:
            found["ref_logprobs"], _ = self._without_gradient(self.reference, sequences, batch)
        for field, companion in self.companions.items():
            (found[field],) = self._without_gradient(companion.model, sequences, batch)
        if "sum_pi_sq" in needs:
            (found["sum_pi_sq"],) = self._without_gradient(self.policy, sequences, batch, sum_of_squares)
        if "divergence" in needs:
            found["divergence"] = self._divergence(sequences, batch)
        if "bootstrap" in needs:  # also of truncated completions: the state after the last token is never read
            found["bootstrap"] = torch.zeros(len(batch.group), device=self.ranks.device)
        return replace(batch, **found)  # type: ignore[arg-type]

    def _engine_stands_in(self, batch: Batch) -> bool:
        """Whether the engine's log-probs are taken for the learner's own before this step."""
        return self.config.learner.old_logprobs == "rollout" and batch.rollout_logprobs is not None

    @property
    def _moves_reference(self) -> bool:
        return self.reference is not None and self.config.model.reference_every > 0

    @torch.no_grad()
    def _move_reference(self) -> None:
        """ref <- (1 - share) ref + share policy; both are sharded alike, so every rank moves its own parts."""
        assert isinstance(self.reference, Policy)  # a reference without weights of its own is refused with the config
        for (_, ours), (_, theirs) in zip(named_tensors(self.policy.hf), named_tensors(self.reference.hf), strict=True):
            local(theirs).lerp_(local(ours).to(theirs.dtype), self.config.model.reference_share)

    def _minibatches(self, group: Tensor) -> Iterator[list[int]]:
        """Rows of each update: per epoch the groups in a new order, in `minibatches` parts as equal as they can be."""
        rows_of: dict[int, list[int]] = {}
        for row, number in enumerate(group.tolist()):
            rows_of.setdefault(number, []).append(row)
        options = self.config.learner
        for epoch in range(options.epochs):
            generator = torch.Generator().manual_seed(self._seed(f"order/{epoch}"))
            order = torch.randperm(len(rows_of), generator=generator).tensor_split(options.minibatches)
            groups = list(rows_of.values())
            yield from ([r for i in part.tolist() for r in groups[i]] for part in order if len(part))

    def _prepared(self, method: Method, minibatch: Batch, sequences: Sequences, totals: Totals) -> Batch:
        """The minibatch with its denominators and, for methods that are late, what depends on current log-probs."""
        if "late" not in method.needs:
            return normalise(method, minibatch)
        logprobs, _ = self._without_gradient(self.policy, sequences, minibatch)
        known, minibatch = minibatch.metrics, late(method, minibatch, logprobs)
        totals.add({name: pair for name, pair in minibatch.metrics.items() if known.get(name) is not pair})
        return minibatch

    def _update(
        self, minibatch: Batch, sequences: Sequences, factor: float, totals: Totals, groups: Sequence[Group]
    ) -> None:
        """One optimiser step on a minibatch, or none where there is nothing to train or nothing finite."""
        width = minibatch.mask.shape[1]
        # Filtered and rejected rows are in no term of the loss, so the model need not read them again.
        assert minibatch.loss_mask is not None  # `normalise` has set it
        trained = minibatch.loss_mask.any(1).tolist()
        totals.add({"optim/empty": (float(not any(trained)), 1.0)})
        if not any(trained):
            return
        value = torch.zeros((), dtype=torch.float64, device=self.ranks.device)
        for micro in self._share(sequences.only(trained)):
            with saved_elsewhere(self._away if "activations" in self.config.learner.offload else None):
                logprobs, entropy = self.policy(micro)
            given = {field: self.companions[field].model(micro)[0] for field in self.taught}
            if not micro.rows:
                # A pass of its own for a rank without work: FSDP2's collectives need every rank in every pass.
                (sum(x.sum() for x in (logprobs, *given.values())) * 0).backward()
                continue
            output = loss(
                self.method,
                minibatch.rows(torch.tensor(micro.rows, device=self.ranks.device)),
                micro.rectangle(logprobs, width),
                micro.rectangle(entropy, width),
                **{field: micro.rectangle(x, width) for field, x in given.items()},
            )
            for model in (self.policy, *(self.companions[field].model for field in given)):
                self._meter.count(model.hf, micro, gradient=True)
            # FSDP2 averages gradients over the ranks; parts are to be summed.
            (output.loss * self.ranks.world).backward()
            value += output.loss.detach()
            totals.add(output.metrics)
            totals.add({"learner/tokens": (micro.tokens.numel(), 1)})
        with self._meter("optimizer"):
            numbers = [int(g) for g in minibatch.group.unique()]
            self._apply(self.ranks.sum(value).item(), factor, totals, numbers, groups)

    def _apply(self, value: float, factor: float, totals: Totals, numbers: list[int], groups: Sequence[Group]) -> None:
        """Clip and step, unless the loss or a gradient is not finite: then keep the batch and leave the weights."""
        companions = self.companions.values()
        norm, *others = (o.clip().item() for o in (self.optimiser, *(c.optimiser for c in companions)))
        finite = all(map(math.isfinite, (value, norm, *others)))
        if finite:
            for companion in companions:
                companion.optimiser.step(factor)
            if self._steps_done >= max((c.warmup_steps for c in companions), default=0):
                self.optimiser.step(factor)
            totals.add({"policy/loss": (value, 1.0), "optim/grad_norm": (norm, 1.0)})
        else:
            self._record(value, norm, [groups[n] for n in numbers])
        totals.add({"optim/skipped": (float(not finite), 1.0)})
        for optimiser in (self.optimiser, *(c.optimiser for c in companions)):
            optimiser.clear()

    def _record(self, value: float, norm: float, groups: Sequence[Group]) -> None:
        """The batch of a skipped update, to be looked at: `step-N/groups.jsonl` and `step-N/why.json`."""
        if self.skipped is None or self.ranks.rank:
            return
        folder = self.skipped / f"step-{self._steps_done}"
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "groups.jsonl").open("a") as file:
            file.writelines(json.dumps(asdict(group), default=str) + "\n" for group in groups)
        (folder / "why.json").write_text(json.dumps({"loss": str(value), "grad_norm": str(norm)}))

    # --- passes -----------------------------------------------------------------------------------------------------

    def _share(self, sequences: Sequences, whole_groups: bool = False) -> Iterator[Micro]:
        """This rank's micro-batches; every rank gets the same number, some of them may have no rows."""
        hidden, share = self.policy.hf.config.hidden_size, self.policy.shares_prompts
        budget = self.config.learner.token_budget
        shares = split(sequences, hidden, budget, self.ranks.world, share, whole_groups)
        for rows in shares[self.ranks.rank :: self.ranks.world]:
            yield Micro.of(sequences, rows, self.ranks.device, share)

    @torch.no_grad()
    def _without_gradient(self, model: Says, sequences: Sequences, batch: Batch, *read: Reader) -> list[Tensor]:
        """What `model` says of all rows, each [B, T] on every rank, 0 outside the completions.

        A policy says log-probs and entropies, or what `read` makes of it.
        """
        return self._gathered(model, batch, ((micro, model(micro, *read)) for micro in self._share(sequences)))

    @torch.no_grad()
    def _divergence(self, sequences: Sequences, batch: Batch) -> Tensor:
        """How far the policy's distributions within a group are apart, [B, T]; a group's rows are read together."""

        def said(micro: Micro) -> tuple[Tensor, ...]:
            numbers = [sequences.groups[r] for r in micro.rows]
            groups = torch.tensor(numbers, device=self.ranks.device)
            return self.policy(micro, divergences(micro.row, micro.step, groups, Counter(sequences.groups)))

        answers = ((micro, said(micro)) for micro in self._share(sequences, whole_groups=True))
        (found,) = self._gathered(self.policy, batch, answers)
        return found

    def _gathered(self, model: Says, batch: Batch, answers: Iterable[tuple[Micro, tuple[Tensor, ...]]]) -> list[Tensor]:
        """A model's answers to all micro-batches of all ranks as rectangles [B, T]."""
        hf = getattr(model, "hf", self.policy.hf)  # the policy without its adapters is not a model of its own
        rows, width = batch.mask.shape
        found: list[Tensor] = []
        with self._meter("passes"):
            for micro, values in answers:
                self._meter.count(hf, micro)
                found = found or [torch.zeros(rows, width, device=self.ranks.device) for _ in values]
                for rectangle, value in zip(found, values, strict=True):
                    if micro.rows:
                        rectangle[micro.rows] = micro.rectangle(value, width)
            # Each cell is filled by one rank and zero on the others, so the sum is exact and the same bits everywhere.
            return [self.ranks.sum(rectangle) for rectangle in found]

    # --- numbers ----------------------------------------------------------------------------------------------------

    def _seed(self, purpose: str) -> int:
        """A seed that depends on the run's seed, the step and the purpose, and on nothing else."""
        text = f"learner/{purpose}/{self.config.seed}/{self._steps_done}"
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") % 2**63

    def _metrics(self, totals: Totals, batch: Batch, factor: float) -> dict[str, float]:
        """The step's metrics over all ranks; the method's own of the whole step come from `batch.metrics`."""
        spent = self._meter.end()
        best = peak(self.ranks.device, getattr(torch, self.config.model.dtype))
        reports = self.ranks.gather(Report(totals.numbers(), spent, self._peak_memory(), best))
        return {"optim/lr": self.config.learner.optimizer.lr * factor, **over_ranks(reports, batch.metrics)}

    def _peak_memory(self) -> float:
        if self.ranks.device.type == "cuda":
            return torch.cuda.max_memory_allocated() / 2**30
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts KiB

    # --- weights and files ------------------------------------------------------------------------------------------

    def export(self, visit: Callable[[Iterator[tuple[str, Tensor]]], Result]) -> Result | None:
        """Full float32 tensors by Hugging Face name, gathered one at a time; tied weights once. Of LoRA the adapters.

        Every rank calls it; rank 0 calls `visit(iterator)` and returns what it returns, the others return None.
        """
        hf = self.policy.hf
        gathered = handed_over(hf)
        published = (item for name, whole in gathered for item in as_published(hf, name, whole).items())
        try:
            return visit(published) if self.ranks.rank == 0 else None
        finally:
            # Each gather is a collective: what the visitor left, or never wanted, is still gathered with the others.
            for _ in gathered:
                pass

    def save(self, folder: Path) -> None:
        """Write the trainer's state to `folder`/trainer, a Hugging Face model to `folder`/model, adapters also to
        `folder`/adapter, and fsync all.

        `folder` exists and is the caller's to rename. Every rank calls it.
        """
        model, dtype = self.config.model, getattr(torch, self.config.model.dtype)
        checkpoint.save_model(folder / "model", self.policy.hf, model.path, dtype, self.ranks)
        if model.lora is not None:
            checkpoint.save_adapter(folder / "adapter", self.policy.hf, self.ranks)
        counters = {"steps_done": self._steps_done, "memory": self._memory}
        checkpoint.save_trainer(folder / "trainer", self._trained(), counters, self.ranks)

    def load(self, folder: Path) -> None:
        """Continue from what `save` wrote, bit-equal. Every rank calls it. Raises UserError when it does not fit."""
        counters = checkpoint.load_trainer(folder / "trainer", self._trained(), self.ranks)
        self._steps_done, self._memory = counters["steps_done"], counters["memory"]

    def _trained(self) -> checkpoint.Trained:
        companions = {f"{field}/": (c.model.hf, c.optimiser) for field, c in self.companions.items()}
        moving = self.reference if self._moves_reference else None
        reference = {"reference/": (moving.hf, None)} if isinstance(moving, Policy) else {}
        return {"": (self.policy.hf, self.optimiser), **companions, **reference}

    def _load(self, path: str, checkpointing: bool = False, lora: LoraConfig | None = None) -> Policy:
        return load_policy(
            self.config.model,
            path,
            self.ranks,
            temperature=self.config.rollout.temperature,
            chunk=self.config.learner.logprob_chunk,
            checkpointing=checkpointing,
            compiled=self.config.learner.compile,
            lora=lora,
            seed=self.config.seed,
        )


def _advantage(minibatch: Batch) -> Tensor:
    """Mean advantage of each row over its trained tokens, channels weighted, [B]; NaN where nothing is trained."""
    trained = minibatch.loss_mask
    assert trained is not None  # `normalise` has set it
    counts = trained.sum(1)
    total = torch.zeros(len(counts), dtype=torch.float64, device=counts.device)
    for channel in minibatch.channels:
        total += channel.weight * channel.advantages.where(trained, 0.0).sum(1)
    return (total / counts).where(counts > 0, math.nan)
