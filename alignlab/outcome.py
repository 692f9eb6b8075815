"""What a simulated run has shown, as numbers and as text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from alignlab.world import World

STATES = ("waiting", "leased", "done", "scored", "batched")
BAR = 40  # characters of the whole
SHOWN = 0.001  # a smaller share has no line of its own


@dataclass(frozen=True)
class Outcome:
    """Shares in 0 .. 1, seconds of the virtual clock; `Handling` alone is measured on the real one."""

    actors: int
    steps: int
    seconds: float
    steps_per_hour: float  # between the first and the last publication
    learner_idle: float
    actors_idle: float  # without anything to decode
    sequences: float  # that a working actor decodes at once, mean
    tokens_per_second: float  # of trained and masked tokens
    ages: dict[int, float]  # share of the trained tokens by steps since their weights
    masked: float
    refused: float  # shares of all tokens that were sampled: late results, ...
    lost: float  # what actors did not finish, ...
    dropped: float  # groups that were replaced
    losses: int  # actors
    recovery_mean: float  # seconds from the loss of an actor until its groups are done
    recovery_max: float
    groups: dict[str, float]  # by state, mean over time
    most: dict[str, int]
    slots: int
    records: int  # lines of the ledger

    @property
    def age_mean(self) -> float:
        """Steps between a token's weights and its step."""
        return sum(age * share for age, share in self.ages.items())

    @property
    def waste(self) -> float:
        """Share of the sampled tokens that no step sees."""
        return self.refused + self.lost + self.dropped


@dataclass(frozen=True)
class Handling:
    """Real seconds of `Coordinator.step`: events in one second, and how long one takes."""

    events: int
    per_second: float
    p50: float
    p99: float
    longest: float


def handling(world: World) -> Handling:
    """What the coordinator has cost."""
    times = sorted(world.handling)
    count = len(times)
    return Handling(count, count / sum(times), times[count // 2], times[int(0.99 * (count - 1))], times[-1])


def outcome(world: World, actors: int) -> Outcome:
    """The numbers of a run that has ended."""
    ages = sum((step.ages for step in world.steps), Counter())
    trained = ages.total()
    tokens = world.coordinator.token_tally()
    sampled = max(tokens["generated"] + world.lost_tokens, 1)
    slots = (world.coordinator.max_staleness + 1) * world.coordinator.prompts
    return Outcome(
        actors=actors,
        steps=len(world.steps),
        seconds=world.wall,
        steps_per_hour=pace([step.time for step in world.steps]),
        learner_idle=1 - world.learning / max(world.now, 1e-9),
        actors_idle=1 - world.busy / max(world.alive, 1e-9),
        sequences=world.decoded / max(world.busy, 1e-9),
        tokens_per_second=trained / max(world.wall, 1e-9),
        ages={age: ages[age] / trained for age in sorted(ages)},
        masked=sum(step.masked for step in world.steps) / max(trained, 1),
        refused=tokens["refused"] / sampled,
        lost=world.lost_tokens / sampled,
        dropped=tokens["dropped"] / sampled,
        losses=world.losses,
        recovery_mean=sum(world.recoveries) / max(len(world.recoveries), 1),
        recovery_max=max(world.recoveries, default=0.0),
        groups={state: _mean([tally[state] for tally in world.tallies]) for state in STATES},
        most={state: max((tally[state] for tally in world.tallies), default=0) for state in STATES},
        slots=slots,
        records=world.records,
    )


def pace(times: Sequence[float]) -> float:
    """Steps in an hour, from the seconds at which their versions were published; 0 for fewer than two."""
    return 3600 * (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else 0.0


def page(o: Outcome, h: Handling, max_token_age: int | None) -> str:
    """One run in detail."""
    bound = "no max_token_age" if max_token_age is None else f"older than max_token_age {max_token_age}"
    in_use = sum(o.groups.values())
    wasted = f"refused {o.refused:.1%}, lost {o.lost:.1%}, dropped {o.dropped:.1%} of all tokens"
    queues = ", ".join(f"{state} {o.groups[state]:.1f} (most {o.most[state]})" for state in STATES)
    lines = [
        ("steps/h", f"{o.steps_per_hour:.1f}", f"{o.steps} steps in {o.seconds:.0f} s"),
        ("learner idle", f"{o.learner_idle:.1%}", ""),
        ("actors idle", f"{o.actors_idle:.1%}", f"{o.sequences:.1f} sequences at once while at work"),
        ("tokens/s", f"{o.tokens_per_second:.0f}", "of completions that steps were given"),
        ("masked", f"{o.masked:.1%}", bound),
        ("waste", f"{o.waste:.1%}", wasted),
        ("slots", f"{in_use:.1f}", f"of {o.slots} in use: {queues}"),
    ]  # fmt: skip
    if o.losses:
        done = f"their groups were done after {o.recovery_mean:.1f} s, {o.recovery_max:.1f} s at most"
        lines.append(("losses", str(o.losses), done))
    lines.append(("age of tokens", f"{o.age_mean:.2f}", "steps between weights and training, mean"))
    text = [f"{name:<14}{value:>10}  {note}".rstrip() for name, value, note in lines]
    shown = {age: share for age, share in o.ages.items() if share >= SHOWN}
    text += [f"{age:>13} {share:>10.1%}  {'#' * round(BAR * share)}".rstrip() for age, share in shown.items()]
    if len(shown) < len(o.ages):
        text.append(f"{f'up to {max(o.ages)}':>13} {1 - sum(shown.values()):>10.2%}")
    return "\n".join([*text, "", _cost(o, h)])


def _cost(o: Outcome, h: Handling) -> str:
    return (
        f"coordinator: {h.events} events, {h.events / max(o.seconds, 1e-9):.1f} a simulated second; it handles "
        f"{h.per_second:.0f} a second (median {1e6 * h.p50:.0f} us, p99 {1e6 * h.p99:.0f} us, longest "
        f"{1e3 * h.longest:.1f} ms); ledger: {o.records / max(o.seconds, 1e-9):.1f} records a simulated second"
    )


COLUMNS = (
    "actors", "steps/h", "tokens/s", "learner idle", "actors idle", "mean age", "oldest", "masked", "waste",
    "waiting", "slots in use", "records/s", "events/s handled", "p99 us",
)  # fmt: skip


def row(o: Outcome, h: Handling) -> str:
    """One run as a row under COLUMNS."""
    cells: list[Any] = [
        o.actors, f"{o.steps_per_hour:.1f}", f"{o.tokens_per_second:.0f}", f"{o.learner_idle:.1%}",
        f"{o.actors_idle:.1%}", f"{o.age_mean:.2f}", max(o.ages, default=0), f"{o.masked:.1%}", f"{o.waste:.1%}",
        f"{o.groups['waiting']:.0f}", f"{sum(o.groups.values()):.0f} / {o.slots}",
        f"{o.records / max(o.seconds, 1e-9):.1f}", f"{h.per_second:.0f}", f"{1e6 * h.p99:.0f}",
    ]  # fmt: skip
    return "| " + " | ".join(map(str, cells)) + " |"


def heads() -> str:
    """The two lines above the rows."""
    return "| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|"


def _mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / max(len(numbers), 1)
