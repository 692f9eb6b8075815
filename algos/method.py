"""What a method is: a choice of parts for every piece of the objective, checked when it is resolved.

    loss = aggregate( token_weight * correction * surrogate(ratio, advantage) ) + kl - entropy bonus

A spec gives a piece by name (`surrogate: cispo`), with options (`surrogate: {cispo: {high: 3}}`), or as `none`. Pieces
marked `many` take a list. The name of a piece's plain part may be left out (`kl: {coef: 0.01}`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from algos import coupled, critic, shaping
from algos.advantages import advantages, combinations, whitenings
from algos.aggregation import aggregations, partitions
from algos.corrections import corrections, proximals, rejections
from algos.entropy import entropy_terms
from algos.filters import filters
from algos.kl import penalties
from algos.memory import fills, memories
from algos.parts import Part
from algos.ratios import ratios
from algos.statistics import companion
from algos.surrogates import surrogates
from algos.token_weights import credit_losses, token_weights
from core.errors import UserError, nearest
from core.registry import Registry, check_options, options_of

assert coupled and critic  # imported because they register advantages


@dataclass(frozen=True)
class Piece:
    """A place in the objective, and the functions that fit there."""

    registry: Registry
    about: str
    many: bool = False
    default: str | None = None
    plain: str | None = None  # part whose options may be given without its name


@dataclass(frozen=True)
class Row:
    """A published method (or a modifier) and where it comes from."""

    about: str
    spec: Mapping[str, Any]
    source: str
    confidence: str
    deviations: str = ""  # where we differ from the publication, and why


PIECES = {
    "memory": Piece(memories, "what is kept from step to step, in the checkpoint", many=True),
    "filter": Piece(filters, "which groups are worth training on (the rollout loop may ask for more)"),
    "shaping": Piece(shaping.shapings, "changes of the reward before the advantage, in order", many=True),
    "combine": Piece(combinations, "how several reward components become one advantage"),
    "advantage": Piece(advantages, "how good a completion was", default="group"),
    "whiten": Piece(whitenings, "standardise advantages over the step"),
    "proximal": Piece(proximals, "a stand-in for the old policy's forward pass"),
    "correction": Piece(corrections, "weight for the mismatch of rollout and learner"),
    "reject": Piece(rejections, "positions to leave out for their mismatch; all rules must keep them", many=True),
    "ratio": Piece(ratios, "level and anchor of the importance ratio", default="token"),
    "surrogate": Piece(surrogates, "trust-region rule", default="ppo_clip"),
    "token_weight": Piece(token_weights, "factors on the token loss; all multiply", many=True),
    "kl": Piece(penalties, "KL penalty in the loss", plain="in_loss"),
    "aggregation": Piece(aggregations, "from tokens to a scalar", default="token_mean"),
    "partition": Piece(partitions, "separate denominators for kinds of rows", plain="sign"),
    "entropy": Piece(entropy_terms, "entropy bonus", plain="bonus"),
    "value": Piece(critic.value_losses, "loss of the critic", plain="squared"),
    "credit": Piece(credit_losses, "loss of the token reward model", plain="outcome"),
}

SETTINGS: dict[str, tuple[Any, ...]] = {  # first value: the default
    "drop_truncated": (False, True),  # truncated rows lose their tokens in the loss, not in the advantage
    "numerator": ("old", "logp"),  # of correction and reject: the old policy, or the detached current one
    "denominator": ("original", "kept"),  # counts before or after rejection
    "data": ("rollouts", "demonstrations", "preferences"),  # who made the completions
}

_NEEDS = {
    **{"old_logprobs": "old", "rollout_logprobs": "rollout", "behaviour_logprobs": "rollout", "ref_logprobs": "ref"},
    **{"entropy": "entropy", "values": "values", "greedy_rewards": "greedy", "baselines": "baselines"},
    **{"answers": "answers", "token_scores": "token_scores", "sum_pi_sq": "sum_pi_sq", "bootstrap": "bootstrap"},
    **{"versions": "versions", "given_advantages": "given", "given_weights": "given", "components": "components"},
    **{"old_values": "values", "logprobs": "late", "tempered_logprobs": "tempered", "divergence": "divergence"},
}


@dataclass(frozen=True)
class Method:
    """A resolved method: what the learner executes, without knowing its name."""

    name: str
    advantage: Part
    ratio: Part
    surrogate: Part
    aggregation: Part
    filter: Part | None = None
    shaping: tuple[Part, ...] = ()
    combine: Part | None = None
    whiten: Part | None = None
    proximal: Part | None = None
    correction: Part | None = None
    reject: tuple[Part, ...] = ()
    token_weight: tuple[Part, ...] = ()
    kl: Part | None = None
    partition: Part | None = None
    entropy: Part | None = None
    value: Part | None = None
    credit: Part | None = None
    memory: tuple[Part, ...] = ()
    drop_truncated: bool = False
    numerator: str = "old"
    denominator: str = "original"
    data: str = "rollouts"
    modifiers: tuple[str, ...] = field(default=())

    @cached_property
    def needs(self) -> frozenset[str]:
        """What the learner and the actors must supply.

        old: batch.old_logprobs, the policy before this step. early_old: `advantages` reads it; without early_old, a
        step that is a single update may leave old_logprobs None (it equals the current one).
        rollout, ref, values, token_scores: the fields of that name. entropy: batch.entropy, read by `advantages`.
        entropy_grad, critic, credit: the arguments `entropy`, `values`, `token_scores` of `loss`. late: call `late`
        instead of `normalise`. tempered: log-probs at batch.tempering, which a memory fills. components: rewards [B, R]
        instead of totals. demonstrations: train on given completions; preferences: of which two make a pair.
        greedy, answers, sum_pi_sq, divergence, baselines, bootstrap, versions, given: the fields of that name.
        """
        judges = tuple(part for part in (self.correction, *self.reject) if part)
        readers = (*self.memory, *self.early_parts, *judges)
        filled = {field for part in self.memory for field in fills[part.name]}
        read = {name for part in readers for name in part.inputs} - filled
        names = {_NEEDS[name] for name in read if name in _NEEDS}
        compare = any("numerator_logprobs" in part.inputs for part in judges)
        if "old" in names or (compare and self.numerator == "old"):
            names |= {"old", "early_old"}
        if self.reads_ratio:
            names.add(self.ratio.option("anchor"))
        if self.kl and self.kl.option("anchor") == "ref":
            names.add("ref")
        if self.kl and (self.kl.option("anchor") == "old" or self.kl.option("gradient") in ("k2_is", "ratio")):
            names.add("old")
        if self.proximal:
            names -= {"old", "early_old"}
        if self.late:
            names.add("late")
        extra = {"entropy_grad": self.entropy, "critic": self.value, "values": self.value, "credit": self.credit}
        names |= {name for name, part in extra.items() if part}
        given = {"demonstrations": {"demonstrations"}, "preferences": {"demonstrations", "preferences"}}
        return frozenset(names | given.get(self.data, set()))

    @property
    def early_parts(self) -> tuple[Part, ...]:
        """Parts that `advantages` or `late` call."""
        single = (self.filter, self.advantage, self.combine, self.whiten, self.proximal)
        return (*(part for part in single if part), *self.shaping, *self.token_weight, *self.statistics)

    @property
    def statistics(self) -> tuple[Part, ...]:
        """Companions of the parts that read numbers of the whole minibatch."""
        found = (companion(part) for part in (self.advantage, self.ratio, self.surrogate, self.entropy))
        return tuple(part for part in found if part)

    @property
    def reads_ratio(self) -> bool:
        """The surrogate compares with an anchor."""
        return bool({"ratio", "delta", "anchor_logprobs"} & set(self.surrogate.inputs))

    @property
    def late(self) -> bool:
        """Something depends on current log-probabilities beyond the surrogate."""
        return any("logprobs" in part.inputs for part in self.early_parts) or self.late_correction or self.hinged

    @property
    def late_advantage(self) -> bool:
        """The advantage depends on current log-probabilities."""
        return "logprobs" in self.advantage.inputs

    @property
    def late_correction(self) -> bool:
        """The correction depends on current log-probabilities."""
        return bool(self.correction or self.reject) and (self.numerator == "logp" or self.proximal is not None)

    @property
    def hinged(self) -> bool:
        """The coefficient of the KL term depends on the KL of the minibatch."""
        return self.kl is not None and self.kl.option("hinge") is not None

    def pieces(self) -> dict[str, str]:
        """What differs from `none`, as text: for listings and resolved configs."""
        shown = {}
        for name in PIECES:
            chosen = getattr(self, name)
            if chosen and (name != "ratio" or self.reads_ratio):
                shown[name] = " + ".join(map(str, chosen)) if PIECES[name].many else str(chosen)
        settings = {
            name: getattr(self, name) for name, allowed in SETTINGS.items() if getattr(self, name) != allowed[0]
        }
        return shown | {name: str(value) for name, value in settings.items()}


# What an advantage may read that is a number of the total reward, and not of a component.
_OF_TOTALS = {"greedy_rewards", "baselines", "values", "token_rewards", "given_advantages"}


def apart(method: Method, *, whiten: bool = True, by_std: bool = True, sharpness: float | None = None) -> Method:
    """The method with an advantage of each reward component on its own, joined afterwards (`normalise_then_sum`).

    by_std False divides by nothing; sharpness takes the soft minimum instead of the sum. Raises UserError for a method
    whose advantage compares with a number of the total reward, or has no division to leave out.
    """
    advantage = method.advantage
    if read := sorted(_OF_TOTALS & set(advantage.inputs)):
        raise UserError(
            f"rewards.weighting: this policy takes the advantage of each component on its own, but that of method "
            f"'{method.name}' reads {', '.join(read)}, which is known of the total only; use a policy that sums first "
            "(static, gradient, cv ...), or another method"
        )
    options = {} if sharpness is None else {"reduce": "softmin", "sharpness": sharpness}
    combine = Part("normalise_then_sum", combinations["normalise_then_sum"], options)
    white = (method.whiten or Part("sequence", whitenings["sequence"], {})) if whiten else None
    if not by_std:
        if "scale" not in options_of(advantage.function):
            raise UserError(
                f"method: '{method.name}' has the advantage '{advantage.name}', which is not divided by a spread; "
                "leave by_std: false out of the weighting, or choose the advantage `group`"
            )
        advantage = Part(advantage.name, advantage.function, {**advantage.options, "scale": "none"})
    return replace(method, combine=combine, whiten=white, advantage=advantage)


Choice = tuple[str, dict[str, Any]]
Spec = dict[str, Any]
"""Piece -> list of choices, setting -> value."""


def parse(spec: Mapping[str, Any], where: str) -> Spec:
    """A spec with every piece as a list of (name, options); raises UserError for unknown pieces and parts."""
    parsed: Spec = {}
    for key, value in spec.items():
        if key in SETTINGS:
            if value not in SETTINGS[key]:
                raise UserError(f"{where}.{key}: got {value!r}; allowed: {', '.join(map(str, SETTINGS[key]))}")
            parsed[key] = value
        elif key in PIECES:
            parsed[key] = _choices(PIECES[key], value, f"{where}.{key}")
        else:
            raise UserError(f"{where}: unknown key '{key}'; {nearest(key, [*PIECES, *SETTINGS, 'row', 'modifiers'])}")
    return parsed


def merge(base: Spec, changes: Spec) -> Spec:
    """`base` with `changes`: options of the same part are merged, another part replaces, a list replaces."""
    merged = dict(base)
    for key, value in changes.items():
        if key in PIECES and not PIECES[key].many and value and base.get(key) and value[0][0] == base[key][0][0]:
            value = [(value[0][0], {**base[key][0][1], **value[0][1]})]
        merged[key] = value
    return merged


def build(name: str, spec: Spec, where: str, context: Mapping[str, float], modifiers: Sequence[str] = ()) -> Method:
    """The method of a parsed spec; raises UserError for unknown options. `checks` looks at combinations."""
    fields: dict[str, Any] = {}
    for key, piece in PIECES.items():
        choices = spec.get(key, [(piece.default, {})] if piece.default else [])
        parts = tuple(_bind(piece, choice, f"{where}.{key}", context) for choice in choices)
        fields[key] = parts if piece.many else (parts[0] if parts else None)
        if piece.default and not parts:
            raise UserError(f"{where}.{key}: cannot be none; {nearest(piece.default, piece.registry)}")
    fields |= {key: spec.get(key, allowed[0]) for key, allowed in SETTINGS.items()}
    return Method(name=name, **fields, modifiers=tuple(modifiers))


def _choices(piece: Piece, value: Any, where: str) -> list[Choice]:
    if value is None or value == "none":
        return []
    if isinstance(value, (list, tuple)):
        if not piece.many:
            raise UserError(f"{where}: takes one {piece.registry.kind}, got a list; {nearest('', piece.registry)}")
        return [choice for item in value for choice in _choices(piece, item, where)]
    if isinstance(value, str):
        return [_known(piece, value, {}, where)]
    if not isinstance(value, Mapping):
        raise UserError(f"{where}: expected a name or {{name: options}}, got {value!r}; {nearest('', piece.registry)}")
    if piece.plain and set(value) <= set(options_of(piece.registry[piece.plain])):
        return [(piece.plain, dict(value))]
    if len(value) != 1:
        raise UserError(f"{where}: expected one {{name: options}}, got keys {', '.join(map(str, value))}")
    name, options = next(iter(value.items()))
    name, _ = _known(piece, name, {}, where)
    if not isinstance(options, (Mapping, type(None))):
        raise UserError(f"{where}.{name}: expected options, got {options!r}")
    return [(name, dict(options or {}))]


def _known(piece: Piece, name: str, options: dict[str, Any], where: str) -> Choice:
    name = str(name).replace("-", "_")
    piece.registry.find(name, where)
    return name, options


def _bind(piece: Piece, choice: Choice, where: str, context: Mapping[str, float]) -> Part:
    name, options = choice
    function = piece.registry.find(name, where)
    chosen = check_options(function, options, f"{where}.{name}")
    defaults = {option: p.default for option, p in options_of(function).items() if p.default is not p.empty}
    symbols = {o: v for o, v in (defaults | chosen).items() if isinstance(v, str) and v in context}
    return Part(name, function, chosen | {option: context[symbol] for option, symbol in symbols.items()})
