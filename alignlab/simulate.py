"""The verb `simulate`: the real coordinator among thousands of virtual actors, under a virtual clock.

    alignlab simulate --run runs/quickstart --actors 1,8,64
    alignlab simulate --length-mean 2000 --tokens-per-second 60,3000 --train-seconds 40 --actors 256 --prompts 512

Lengths and durations come from a run that was measured, or are said. Without a run, the numbers of the loop (prompts,
max_staleness, window ...) are those of a config, if one is named. An option that is said goes before both.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.errors import UserError

if TYPE_CHECKING:
    from alignlab.workload import Wave, Workload
    from alignlab.world import World
    from core.config import RolloutConfig, RunConfig

FOREVER = 10**9  # steps, or tokens
NEEDED = ("length_mean", "tokens_per_second", "train_seconds")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `alignlab simulate`."""
    parser.add_argument("config", nargs="?", help="a YAML file, for the numbers of the loop")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to it, or to the run's config")
    parser.add_argument(
        "--run", dest="measured", metavar="RUN", help="folder of a run whose lengths and durations are taken"
    )
    _loop_arguments(parser.add_argument_group("the loop"))
    _time_arguments(parser.add_argument_group("lengths (tokens) and durations (seconds)"))
    _trouble_arguments(parser.add_argument_group("actors that come and go"))


def _loop_arguments(group: Any) -> None:
    count, amount = _number(int, 1), _number(float, 0)
    group.add_argument("--actors", type=_counts, metavar="N[,N...]", help="several: a row for each")
    group.add_argument("--prompts", type=count, help="P: prompts per step")
    group.add_argument("--prompts-per-actor", type=count, help="P in proportion to the actors")
    group.add_argument("--group-size", type=count, help="G: completions of each prompt (not with --run)")
    group.add_argument("--steps", type=count, help="end after so many (default: the config's, else one hour)")
    group.add_argument("--hours", type=amount, help="end after so many")
    group.add_argument("--max-staleness", type=_number(int, 0), help="S: (S + 1) x P groups are under way")
    group.add_argument("--window", type=_number(int, 0), help="versions within which a group is trained")
    group.add_argument("--max-token-age", type=_number(int, 0), help="older tokens are masked")
    group.add_argument("--capacity", type=count, help="groups that one actor may hold")
    group.add_argument("--deterministic", action="store_true", default=None, help="as rollout.deterministic")
    group.add_argument("--seed", type=_number(int, 0), help="of lengths and losses; the same run for the same seed")


def _time_arguments(group: Any) -> None:
    count, amount = _number(int, 1), _number(float, 0)
    group.add_argument("--length-mean", type=_number(float, 1), help="of completions, which are log-normal")
    group.add_argument("--length-sigma", type=amount, help="of their logarithm (default: 0.8)")
    group.add_argument("--max-tokens", type=count, help="where completions are cut off (default: the config's)")
    group.add_argument(
        "--tokens-per-second", type=_speeds, metavar="ONE[,ALL]",
        help="of one sequence alone, and of a whole actor that decodes --sequences (default: ONE for each of them)",
    )  # fmt: skip
    group.add_argument("--sequences", type=count, help="that an actor decodes at once (actors.max_num_seqs)")
    group.add_argument("--train-seconds", type=amount, help="of a step of mean length, in proportion to its tokens")
    group.add_argument("--publish-seconds", type=amount, help="until the actors serve new weights; they stand still")
    group.add_argument("--score-seconds", type=amount, help="rewards of one group, on one of the scorers")
    group.add_argument("--scorers", type=count, help="groups that are scored at once (rewards.workers)")
    group.add_argument("--cores", type=_number(int, 0), help="shared by all processes; 0: each has its own")


def _trouble_arguments(group: Any) -> None:
    amount, share = _number(float, 0), _number(float, 0, 1)
    group.add_argument("--slow-share", type=share, default=0.0, help="share of actors that are slow")
    group.add_argument("--slow-factor", type=_number(float, 1), default=2.0, help="how much slower (default: 2)")
    group.add_argument("--mtbf", type=amount, metavar="HOURS", help="mean time between the losses of one actor")
    group.add_argument("--restart-seconds", type=amount, default=60.0, help="until a lost actor is back (default: 60)")
    group.add_argument("--joins", type=_join, action="append", default=[], metavar="N@HOURS", help="N more actors")
    group.add_argument(
        "--preempt", type=_wave, action="append", default=[], metavar="SHARE@HOURS[:NOTICE]",
        help="a share of the actors goes for good; NOTICE seconds to finish what they hold, lost at once without",
    )  # fmt: skip


def simulate(arguments: argparse.Namespace) -> int:
    """Simulate, print; 1 if the coordinator gave up. Raises UserError for what is missing or does not fit."""
    from alignlab.outcome import handling, heads, outcome, page, row

    config = _config(arguments)
    rollout = _rollout(arguments, config)
    workload, actors = _workload(arguments, config)
    counts = arguments.actors or [actors]
    steps = arguments.steps or (config.steps if config and not arguments.hours else None)
    seconds = 3600 * arguments.hours if arguments.hours else math.inf if steps else 3600.0
    if len(counts) > 1:
        print(heads(), flush=True)
    for count in counts:
        if arguments.prompts_per_actor:
            rollout = rollout.model_copy(update={"prompts": arguments.prompts_per_actor * count})
        timed = _per_step(workload, arguments.train_seconds, rollout.prompts)
        world = world_of(rollout, timed, steps, arguments.capacity, arguments.seed or 0).run(count, seconds)
        result, cost = outcome(world, count), handling(world)
        print(row(result, cost) if len(counts) > 1 else page(result, cost, rollout.token_age), flush=True)
        if world.aborted:
            print(f"alignlab simulate: the coordinator gave up: {world.aborted}", file=sys.stderr)
            return 1
    return 0


def _config(arguments: argparse.Namespace) -> RunConfig | None:
    """The run's, or the one that is named; changes to it may stand in its place on the command line."""
    from core.loading import load_config

    if arguments.config and "=" in arguments.config:
        arguments.overrides.insert(0, arguments.config)
        arguments.config = None
    if arguments.measured and arguments.config:
        raise UserError(f"--run {arguments.measured} has a config of its own; leave {arguments.config} out")
    path = str(Path(arguments.measured) / "config.yaml") if arguments.measured else arguments.config
    if path is None and arguments.overrides:
        raise UserError(f"{arguments.overrides[0]}: there is no config to change; name one, or a run with --run")
    return load_config(path, arguments.overrides) if path else None


def _workload(arguments: argparse.Namespace, config: RunConfig | None) -> tuple[Workload, int]:
    """Lengths and durations, and the number of actors unless it is said."""
    if arguments.measured:
        from alignlab.workload_fit import measure, shared_cores

        folder = Path(arguments.measured)
        assert config is not None
        cores = shared_cores(folder, config) if arguments.cores is None else arguments.cores or None
        found = measure(folder, config, cores)
        pace = f"{found.steps} steps with {found.actors} actors, {found.steps_per_hour:.1f} steps/h"
        print(f"{folder}: {pace}; its groups are fitted to {found.error:.3f} s\n{_speed(found.workload)}\n", flush=True)
        return _changed(found.workload, arguments), found.actors
    if missing := [name for name in NEEDED if getattr(arguments, name) is None]:
        names = ", ".join("--" + name.replace("_", "-") for name in missing)
        raise UserError(
            f"without --run nothing says how long things take: say {names}, or name a run that was measured"
        )
    return _changed(_by_hand(arguments, config), arguments), config.actors.count if config else 1


def _by_hand(arguments: argparse.Namespace, config: RunConfig | None) -> Workload:
    from alignlab.workload import LogNormal, Workload

    size = _said(arguments.group_size, config and config.rollout.group_size, 8)
    longest = _said(arguments.max_tokens, config and config.rollout.max_tokens, FOREVER)
    sigma = _said(arguments.length_sigma, 0.8)
    return Workload(
        LogNormal(arguments.length_mean, sigma, size, longest, arguments.seed or 0),
        decode_base=0.0,
        sequences=_said(config and config.actors.max_num_seqs, 256),
        scorers=_said(config and config.rewards.workers, 1),
        cores=arguments.cores or None,
    )


def _changed(workload: Workload, arguments: argparse.Namespace) -> Workload:
    """The workload with what is said on the command line."""
    from alignlab.workload import decode_seconds

    names = ("sequences", "publish_seconds", "score_seconds", "scorers", "restart_seconds", "slow_share", "slow_factor")
    said = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    workload = replace(workload, **said, joins=tuple(arguments.joins), waves=tuple(arguments.preempt))
    if arguments.mtbf:
        workload = replace(workload, failure_seconds=3600 * arguments.mtbf)
    if arguments.tokens_per_second:
        one, full = arguments.tokens_per_second
        base, each = decode_seconds(one, full or one * workload.sequences, workload.sequences)
        if each < 0:
            raise UserError(
                f"--tokens-per-second {one:g},{full:g}: {workload.sequences} sequences together cannot be faster than "
                f"each alone ({one * workload.sequences:g}); lower the second number"
            )
        workload = replace(workload, decode_base=base, decode_each=each)
    return workload


def _per_step(workload: Workload, train_seconds: float | None, prompts: int) -> Workload:
    """--train-seconds is that of a step of mean length."""
    if train_seconds is None:
        return workload
    sample = [sum(workload.lengths[ordinal]) for ordinal in range(4096)]
    tokens = prompts * sum(sample) / len(sample)
    return replace(workload, train_seconds=0.0, train_token_seconds=train_seconds / tokens)


def _rollout(arguments: argparse.Namespace, config: RunConfig | None) -> RolloutConfig:
    """The numbers of the loop: those of the config, or the defaults, with what is said. Raises UserError."""
    import pydantic

    from core.config import RolloutConfig

    names = ("prompts", "max_staleness", "window", "max_token_age", "deterministic")
    said = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    try:
        return RolloutConfig(**{**(config.rollout.model_dump() if config else {}), **said})
    except pydantic.ValidationError as error:
        raise UserError("; ".join(problem["msg"].removeprefix("Value error, ") for problem in error.errors())) from None


def world_of(
    r: RolloutConfig, workload: Workload, steps: int | None = None, capacity: int | None = None, seed: int = 0
) -> World:
    """A world around a coordinator as a run makes it (alignlab/lab.py). None is: without end, the run's capacity."""
    from alignlab.coordinator import Coordinator
    from alignlab.world import World

    free = r.max_staleness > 0 and not r.deterministic
    room = max(1, -(-2 * workload.sequences // len(workload.lengths[0]))) if free else None
    coordinator = Coordinator(
        prompts=r.prompts,
        steps=steps or FOREVER,
        max_staleness=r.max_staleness,
        window=r.group_age,
        deterministic=r.deterministic,
        max_attempts=r.max_attempts,
        lease_seconds=r.timeout,
        capacity=_said(capacity, room),
    )
    return World(coordinator, workload, seed, r.token_age)


def _speed(w: Workload) -> str:
    parts = [
        f"decoding {1e3 * w.decode_base:.2f} ms + {1e3 * w.decode_each:.4f} ms a sequence",
        f"{1e3 * w.lease_seconds:.0f} ms before the first",
        f"scoring {1e3 * w.score_seconds:.1f} ms a group",
        f"training {w.train_seconds:.3f} s + {1e6 * w.train_token_seconds:.1f} us a token",
        f"publishing {w.publish_seconds:.3f} s",
        f"the rest of a step {w.close_seconds:.3f} s",
        f"a checkpoint {w.checkpoint_seconds:.2f} s",
        f"an evaluation {w.eval_seconds:.2f} s",
        *([f"{w.cores} cores are shared"] if w.cores else []),
    ]
    return "; ".join(parts)


def _said(*values: Any) -> Any:
    """The first that is not None."""
    return next((value for value in values if value is not None), None)


# ---------------------------------------------------------------- what is written on the command line
def _number(kind: Callable[[str], float], low: float, high: float = math.inf) -> Callable[[str], float]:
    def read(text: str) -> float:
        number = kind(text)
        if not low <= number <= high:
            limit = f"at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
            raise argparse.ArgumentTypeError(f"{text} is not {limit}")
        return number

    return read


def _counts(text: str) -> list[int]:
    return [int(_number(int, 1)(part)) for part in text.split(",")]


def _speeds(text: str) -> tuple[float, float | None]:
    one, _, full = text.partition(",")
    read = _number(float, 1e-6)
    return read(one), read(full) if full else None


def _join(text: str) -> tuple[int, float]:
    count, _, hours = text.partition("@")
    return int(_number(int, 1)(count)), 3600 * _number(float, 0)(hours)


def _wave(text: str) -> Wave:
    from alignlab.workload import Wave

    share, _, rest = text.partition("@")
    hours, _, notice = rest.partition(":")
    number = _number(float, 0)
    return Wave(_number(float, 0, 1)(share), 3600 * number(hours), number(notice) if notice else 0.0)
