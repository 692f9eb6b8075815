"""The command `alignlab` and its verbs. Heavy libraries are loaded by the verb that needs them."""

from __future__ import annotations

import argparse
import os
import select
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import TypeAlias

Verbs: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

EXAMPLES = """examples:
  alignlab check configs/gsm8k-smollm2.yaml                    what would happen, without starting anything
  alignlab train configs/gsm8k-smollm2.yaml learner.optimizer.lr=3e-6 steps=20
  alignlab train configs/gsm8k-smollm2.yaml --resume           go on from the newest checkpoint
  alignlab eval runs/gsm8k-smollm2 --benchmarks gsm8k,math500 --data DIR --limit 100
  alignlab ls                                                  names of methods, parts, rewards, weightings ...
  alignlab ls rewards                                          names, options, one line each
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 1 the run failed, 2 the user can mend it, 130 stopped by Ctrl-C, 141 the reader left."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    # argparse takes key=value only before the first option; people write them anywhere.
    if any(word.startswith("-") or "=" not in word for word in rest) or (rest and not hasattr(arguments, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.overrides += rest
    from core.errors import UserError

    try:
        code = arguments.run(arguments)
        sys.stdout.flush()  # here a reader that has gone is noticed, not when Python ends
        return code
    except UserError as error:
        print(f"alignlab {arguments.verb}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"alignlab {arguments.verb}: stopped at once", file=sys.stderr)
        return 130
    except BrokenPipeError:
        if not _reader_left():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # where the rest goes when Python ends
        return 141  # as the shell says it of a program that SIGPIPE ended


def _reader_left() -> bool:
    """Whether nobody reads what we print any more (`alignlab ls methods | head`)."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="alignlab",
        description="Align language models: distributed RL runs, composed rewards, math benchmarks.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for add in (_add_train, _add_eval, _add_check, _add_ls, _add_report, _add_rescore, _add_grade):
        add(verbs)
    for add in (_add_audit, _add_replay, _add_profile, _add_simulate, _add_drain, _add_fit_reward, _add_fit_thresholds):
        add(verbs)
    return parser


def _add_train(verbs: Verbs) -> None:
    verb = _verb(
        verbs, "train", "run a config to its last step", _train, "alignlab train configs/quickstart.yaml steps=20"
    )
    _config_arguments(verb)
    verb.add_argument("--resume", action="store_true", help="go on from the run's newest checkpoint")


def _add_eval(verbs: Verbs) -> None:
    verb = _verb(
        verbs, "eval", "evaluate a policy on benchmarks", _eval,
        "alignlab eval runs/quickstart --benchmarks gsm8k,math500 --data DIR --limit 100",
    )  # fmt: skip
    verb.add_argument("model", help="a run's folder, a checkpoint, a Hugging Face folder, or a hub name")
    verb.add_argument(
        "--benchmarks", required=True, help="names from `alignlab ls benchmarks` or JSONL files, by comma"
    )
    verb.add_argument("--data", help="folder with the benchmarks' JSONL files (without it: the hub)")
    verb.add_argument("--limit", type=int, help="problems per benchmark (default: all)")
    verb.add_argument("--samples", type=int, default=1, help="k: completions per problem (default: 1)")
    verb.add_argument("--temperature", type=float, help="default: 0 (greedy) for one sample, 1 for more")
    verb.add_argument("--max-tokens", type=int, help="longest completion (default: the benchmark's)")
    verb.add_argument("--template", help="user message, {prompt} is the question (default: the run's or benchmark's)")
    verb.add_argument("--out", help="where results go (default: the run's evals/, or evals/MODEL)")
    verb.add_argument("--seed", type=int, default=0, help="seed of the samples (default: 0)")
    verb.add_argument("overrides", nargs="*", metavar="key=value", help="options of the actors, e.g. actors.count=2")


def _add_report(verbs: Verbs) -> None:
    verb = _verb(
        verbs, "report", "one HTML page from the files of one run or several", _report,
        "alignlab report runs/quickstart",
    )  # fmt: skip
    verb.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs")
    verb.add_argument("--out", help="the page (default: report.html in the run's folder, or beside several)")


def _add_audit(verbs: Verbs) -> None:
    verb = _verb(
        verbs, "audit", "recount from a run's files alone that nothing was lost or trained twice", _audit,
        "alignlab audit runs/quickstart",
    )  # fmt: skip
    verb.add_argument("folder", metavar="RUN", help="folder of a run, ended or not")


def _add_replay(verbs: Verbs) -> None:
    verb = _verb(
        verbs, "replay", "train a run's learner again on what it was given, bit for bit", _replay,
        "alignlab replay runs/quickstart",
    )  # fmt: skip
    verb.add_argument("folder", metavar="RUN", help="folder of a run")
    verb.add_argument("--from", type=int, metavar="STEP", help="checkpoint to begin with (default: the earliest)")
    verb.add_argument("--steps", type=_positive(int), help="how many (default: to the end)")


def _add_profile(verbs: Verbs) -> None:
    verb = _verb(
        verbs, "profile", "when which process of a run did what, for ui.perfetto.dev or chrome://tracing", _profile,
        "alignlab profile runs/quickstart",
    )  # fmt: skip
    verb.add_argument("folder", metavar="RUN", help="folder of a run, ended or not")
    verb.add_argument("--out", help="the trace (default: profile/timeline.json.gz in the run's folder)")


def _add_simulate(verbs: Verbs) -> None:
    from alignlab.simulate import add_arguments

    verb = _verb(
        verbs, "simulate", "what a run would do with other numbers of actors, from one that was measured", _simulate,
        "alignlab simulate --run runs/quickstart --actors 1,8,64",
    )  # fmt: skip
    add_arguments(verb)


def _add_drain(verbs: Verbs) -> None:
    verb = _verb(
        verbs, "drain", "have an actor of a running run finish what it holds and leave", _drain,
        "alignlab drain runs/quickstart actor-1",
    )  # fmt: skip
    verb.add_argument("folder", metavar="RUN", help="folder of a run that is running here")
    verb.add_argument("actor", help="name of the actor, as its log has it: actor-0 ...")


def _add_rescore(verbs: Verbs) -> None:
    verb = _verb(
        verbs, "rescore", "what other rewards would have made of a run's completions", _rescore,
        "alignlab rescore runs/quickstart --config rewards.yaml",
    )  # fmt: skip
    verb.add_argument("folder", metavar="RUN", help="folder of a run")
    verb.add_argument("--config", help="file with a rewards section, or a config (default: the run's own)")
    verb.add_argument("--out", help="file for every completion with its new total and advantage")


def _add_grade(verbs: Verbs) -> None:
    verb = _verb(
        verbs, "grade", "what the answer checker says of the rows of a file", _grade,
        "alignlab grade answers.jsonl > verdicts.jsonl",
    )  # fmt: skip
    verb.add_argument("file", help="JSONL file with the columns gold and completion")
    verb.add_argument("--out", help="where the verdicts go (default: the terminal)")
    verb.add_argument("--extract", choices=("boxed", "marked", "any"), default="marked", help="where an answer is")
    verb.add_argument("--workers", type=_positive(int), default=1, help="scoring processes (default: 1)")
    verb.add_argument("--timeout", type=_positive(float), default=10.0, help="seconds a row may take (default: 10)")


def _add_fit_reward(verbs: Verbs) -> None:
    from alignlab.reward_training import add_arguments

    verb = _verb(
        verbs, "fit-reward", "train a reward model on pairs of answers", _fit_reward,
        "alignlab fit-reward pairs.jsonl --base build/minilm --out build/reward-models/polite",
    )  # fmt: skip
    add_arguments(verb)


def _add_fit_thresholds(verbs: Verbs) -> None:
    verb = _verb(
        verbs, "fit-thresholds", "where to hold the components, from runs that were not constrained", _fit_thresholds,
        "alignlab fit-thresholds runs/a runs/b --gold reward/truth",
    )  # fmt: skip
    verb.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs, best one a component and without KL")
    verb.add_argument("--gold", required=True, help="metric that says what is good, e.g. eval/heldout/accuracy")
    verb.add_argument("--components", help="names by comma (default: all that the runs have weighed)")
    verb.add_argument("--degree", type=_positive(int), default=2, help="of the fitted surface (default: 2)")


def _add_check(verbs: Verbs) -> None:
    verb = _verb(
        verbs, "check", "print what a config would do, render a prompt, score a completion", _check,
        "alignlab check configs/quickstart.yaml",
    )  # fmt: skip
    _config_arguments(verb)
    verb.add_argument(
        "--run", dest="measured", metavar="RUN", help="a run that was measured (default: the config's own)"
    )


def _add_ls(verbs: Verbs) -> None:
    verb = _verb(verbs, "ls", "list what exists: methods, parts, rewards ...", _ls, "alignlab ls methods")
    kinds = ("methods", "parts", "rewards", "shapers", "weightings", "benchmarks")
    verb.add_argument("what", nargs="?", choices=kinds, help="without it: all names")


def _verb(
    verbs: Verbs,
    name: str,
    about: str,
    run: Callable[[argparse.Namespace], int],
    example: str,
) -> argparse.ArgumentParser:
    verb = verbs.add_parser(name, help=about, description=about, epilog=f"example: {example}")
    verb.set_defaults(run=run)
    return verb


def _positive(kind: Callable[[str], float]) -> Callable[[str], float]:
    """A number above 0, as argparse reads an argument."""

    def read(text: str) -> float:
        number = kind(text)
        if not number > 0:
            raise argparse.ArgumentTypeError(f"{text} is not above 0")
        return number

    return read


def _config_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="a YAML file, see configs/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the file, e.g. rollout.prompts=8")


def _train(arguments: argparse.Namespace) -> int:
    from core.loading import load_config

    config = load_config(arguments.config, arguments.overrides)
    from alignlab.train import train

    return train(config, resume=arguments.resume)


def _check(arguments: argparse.Namespace) -> int:
    from pathlib import Path

    from alignlab.check import check
    from core.loading import load_config

    run = Path(arguments.measured).expanduser() if arguments.measured else None
    print(check(load_config(arguments.config, arguments.overrides), run))
    print(f"\nnext: alignlab train {shlex.join([arguments.config, *arguments.overrides])}")
    return 0


def _eval(arguments: argparse.Namespace) -> int:
    from alignlab.evaluate import evaluate_model

    return evaluate_model(arguments)


def _grade(arguments: argparse.Namespace) -> int:
    from alignlab.grade import grade_file

    return grade_file(arguments)


def _rescore(arguments: argparse.Namespace) -> int:
    from alignlab.rescore import rescore

    return rescore(arguments)


def _report(arguments: argparse.Namespace) -> int:
    from alignlab.report import report

    return report(arguments)


def _audit(arguments: argparse.Namespace) -> int:
    from alignlab.audit import audit_run

    return audit_run(arguments)


def _replay(arguments: argparse.Namespace) -> int:
    from alignlab.replay import replay

    return replay(arguments)


def _profile(arguments: argparse.Namespace) -> int:
    from alignlab.profile import profile

    return profile(arguments)


def _simulate(arguments: argparse.Namespace) -> int:
    from alignlab.simulate import simulate

    return simulate(arguments)


def _drain(arguments: argparse.Namespace) -> int:
    from alignlab.run_dir import drain

    return drain(arguments)


def _fit_reward(arguments: argparse.Namespace) -> int:
    from alignlab.reward_training import fit_reward

    return fit_reward(arguments)


def _fit_thresholds(arguments: argparse.Namespace) -> int:
    from alignlab.thresholds import fit_thresholds

    return fit_thresholds(arguments)


def _ls(arguments: argparse.Namespace) -> int:
    from alignlab.listing import listing

    print(listing(arguments.what))
    return 0


if __name__ == "__main__":
    sys.exit(main())
