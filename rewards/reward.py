"""What a reward function is, how it is found, and what becomes of what it returns.

Two signatures, told apart by the names of the parameters:

    def polite(completion: str, answer, *, bonus: float = 1.0) -> float | None      one completion a call
    def polite(prompts, completions, completion_ids=None, **columns) -> list        a whole group a call (TRL's)

One rule for parameters: **keyword-only ones are options** (set in the config), **all others are inputs**. Inputs are

    completion      str, the generated text                      completions     list[str] (batch signature)
    prompt          str, exactly what the engine continued       prompts         list[str]
    completion_ids  token ids, the end-of-sequence one included  completion_ids  list of such lists
    truncated       bool, cut off by the length limit            truncated       list[bool]
    any other name  the dataset column of that name, as a list of equal entries in the batch signature

and `**columns` receives every column that is not named. TRL's own extras (`trainer_state`, `log_extra`, `log_metric`)
are accepted and lead nowhere. Where the dataset has chat messages in a column `prompt`, the batch signature gets what
TRL passes: those messages as prompts, and `[{"role": "assistant", "content": text}]` as each completion.
Coroutine functions are awaited.

A class may stand in for a function: `__init__` takes the options, `__call__` the inputs. `prepare()`, if it has one,
loads what is heavy, once in each process that scores. With `state_dict()` and `load_state_dict(state)` it is called
group by group in the order of a step (whose number it may name as the input `step`), and its state (plain JSON) is part
of the checkpoint. `pool = True` puts it into the pool of reward models (`rewards.pool`).

A call returns a number; None says "I do not judge this one" (abstain); a mapping gives several components at once,
`name/key` each (number or list, as the signature). An exception, NaN, infinity or anything else is an error. None of
these is ever taken for 0.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from core.errors import UserError, nearest
from core.registry import Registry, check_options, options_of
from core.schema import Score

rewards = Registry("reward")

Column = str
"""The type of an option that names a column of the data: a run whose data lacks it is refused."""

Folder = str
"""The type of an option that names a model: a folder here, or a name on the hub."""

Scores = Score | dict[str, Score]  # a mapping where the function returned one
DETAIL_LIMIT = 500  # characters of an exception that are kept


def _ignore(*args: object, **kwargs: object) -> None:
    """Stands in for TRL's loggers."""


_TRL_EXTRAS: dict[str, Any] = {"trainer_state": None, "log_extra": _ignore, "log_metric": _ignore}
# Inputs that are not columns of the data.
_OWN = {"completion", "completions", "prompt", "prompts", "completion_ids", "truncated", *_TRL_EXTRAS}


@dataclass(frozen=True)
class Samples:
    """The completions of one prompt as reward functions see them. Lists have one entry per completion.

    >>> Samples("2+3?", {"answer": "5"}, ["5"], [[11, 2]], [False]).columns["answer"]
    '5'
    """

    prompt: str
    columns: Mapping[str, Any]
    completions: list[str]
    completion_ids: list[list[int]]
    truncated: list[bool]
    step: int = 0  # of the optimiser step that the group is scored for; known to rewards with state only


@dataclass(frozen=True)
class Reward:
    """A reward function with its options bound and its signature understood; made by `bind`."""

    function: Callable[..., Any]
    batch: bool  # a whole group a call
    inputs: tuple[str, ...]  # names of the inputs
    required: tuple[str, ...]  # those without a default
    everything: bool  # takes **columns
    options: tuple[str, ...]  # names of all options
    columns: tuple[str, ...] = ()  # columns that the data must have
    hidden: tuple[str, ...] = ()  # options of a user's function that the config leaves at their defaults
    prepare: Callable[[], None] | None = None
    """Called once in a scoring process before the first completion (imports, models); not counted as scoring time."""
    pool: bool = False  # scored in the pool of reward models
    keeper: Any = None  # the object whose state goes from group to group, in the order of the steps

    def needs(self, name: str) -> bool:
        """Whether the input `name` reaches the function."""
        return name in self.inputs or (self.everything and (self.batch or name not in ("completion_ids", "truncated")))

    def score_one(self, samples: Samples, index: int) -> Scores:
        """Score completion `index` (per-completion signature). Never raises."""
        own = {
            "completion": samples.completions[index],
            "prompt": samples.prompt,
            "completion_ids": samples.completion_ids[index] if samples.completion_ids else None,
            "truncated": samples.truncated[index],
            **self._step(samples),
        }
        try:
            return as_scores(self._call(samples.columns, own, samples.columns))
        except BaseException as error:  # user code may raise anything, SystemExit included
            return failed(error)

    def score_all(self, samples: Samples) -> list[Scores]:
        """Score the whole group in one call (batch signature). Never raises."""
        return self.score_groups([samples])[0]

    def score_groups(self, groups: Sequence[Samples]) -> list[list[Scores]]:
        """Score the completions of several prompts in one call (batch signature); if it fails, group by group.

        Never raises.
        """
        sizes = [len(samples.completions) for samples in groups]
        try:
            scores = self._score_rows(groups, sum(sizes))
        except BaseException as error:
            if len(groups) > 1:
                return [self.score_all(samples) for samples in groups]
            return [[failed(error)] * sizes[0]]
        rest = iter(scores)
        return [[next(rest) for _ in range(size)] for size in sizes]

    def _score_rows(self, groups: Sequence[Samples], count: int) -> list[Scores]:
        chats = [_trl_texts(samples) for samples in groups]
        names = dict.fromkeys(name for samples in groups for name in samples.columns)
        columns = {n: [g.columns.get(n) for g in groups for _ in g.completions] for n in names}
        own = {
            "completions": [text for _, texts in chats for text in texts],
            "prompts": [prompt for prompt, texts in chats for _ in texts],
            "completion_ids": [ids for g in groups for ids in g.completion_ids],
            **self._step(groups[0]),
            **_TRL_EXTRAS,
        }
        # TRL hands everything over by keyword, so a function may look for its prompts in **kwargs too.
        rest = {**columns, **own}
        truncated = [cut for g in groups for cut in g.truncated]
        return as_columns(self._call(columns, {**own, "truncated": truncated}, rest), count)

    def _step(self, samples: Samples) -> dict[str, int]:
        return {} if self.keeper is None else {"step": samples.step}

    def _call(self, columns: Mapping[str, Any], own: Mapping[str, Any], rest: Mapping[str, Any]) -> Any:
        """Call with the named inputs, ours before the dataset's, and with `rest` where the function takes **columns."""
        taken = [name for name in self.hidden if name in columns]
        if taken:
            # Left alone, `def f(completion, *, answer=None)` would silently never see the column `answer`.
            raise TypeError(
                f"parameter '{taken[0]}' is keyword-only, so it is an option, but the data has a column of that name; "
                f"put it before the * to receive the column, or set the option in the config"
            )
        available = {**columns, **own}
        missing = [name for name in self.required if name not in available]
        if missing:
            raise LookupError(f"the data has no column '{missing[0]}'; {nearest(missing[0], columns)}")
        arguments = {name: available[name] for name in self.inputs if name in available}
        if self.everything:
            arguments = {name: value for name, value in rest.items() if name not in self.options} | arguments
        result = self.function(**arguments)
        return asyncio.run(_await(result)) if inspect.isawaitable(result) else result


def bind(fn: str, options: Mapping[str, Any], where: str, beside: tuple[str, ...] = ()) -> Reward:
    """The reward called `fn` (a registered name, or `file.py:function`) with `options` checked and filled in.

    `beside`: names that the config keeps for itself. Raises UserError, naming `where`, for an unknown
    name, a missing file or function, a signature that is neither of the two, an unknown, ill-typed or missing option.
    """
    users = ":" in fn
    made = load_function(fn, where) if users else rewards.find(fn, where)
    parameters = _call_parameters(made, fn, where)
    batch = _is_batch(parameters, fn, where)
    inputs = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    own_options = tuple(options_of(made))
    required = tuple(p.name for p in inputs if p.default is p.empty)
    naming = [p for p in options_of(made).values() if p.annotation in ("Column", "reward.Column")]
    _check_names(fn, options, own_options, [p.name for p in inputs], where, beside)
    function = functools.partial(made, **check_options(made, options, where))
    keeper, call_options = None, own_options
    if isinstance(made, type):
        function, call_options = _instance(function, where), ()  # its options are no arguments of the call
        keeper = function if hasattr(function, "state_dict") and hasattr(function, "load_state_dict") else None
    if keeper is not None and getattr(made, "pool", False):
        raise UserError(
            f"{where}: '{fn}' has a state and pool = True, but the pool keeps no states; drop one of the two"
        )
    return Reward(
        function=function,
        batch=batch,
        inputs=tuple(p.name for p in inputs),
        required=required,
        columns=(
            *(name for name in required if name not in _OWN and not (name == "step" and keeper is not None)),
            *(options.get(p.name, p.default) for p in naming),
            *getattr(function, "reads", ()),  # of an object that knows its columns only from its options
        ),
        everything=any(p.kind is p.VAR_KEYWORD for p in parameters),
        options=call_options,
        hidden=tuple(n for n in call_options if users and n not in options and n not in _TRL_EXTRAS),
        prepare=getattr(function if isinstance(made, type) else made, "prepare", None),
        pool=bool(getattr(made, "pool", False)),
        keeper=keeper,
    )


def _instance(make: Callable[[], Any], where: str) -> Any:
    """The object of a class reward. What its __init__ raises is the user's to mend."""
    try:
        return make()
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    except Exception as error:
        raise UserError(f"{where}: {describe_error(error)}") from error


def _check_names(
    fn: str, given: Mapping[str, Any], known: Sequence[str], inputs: Sequence[str], where: str, beside: Sequence[str]
) -> None:
    """Raise UserError for an option that does not exist, or that the config could never set."""
    for name in beside:
        if name in known:
            raise UserError(
                f"{where}: '{fn}' has an option '{name}', a word the config needs itself; rename the option"
            )
    for name in given:
        if name in inputs:
            raise UserError(f"{where}.{name}: '{name}' of '{fn}' is an input; put it after a * to make it an option")
        if name not in known:
            allowed = nearest(name, (*beside, *known)) if beside or known else "it takes no options"
            raise UserError(f"{where}.{name}: unknown option of '{fn}'; {allowed}")


def load_function(fn: str, where: str) -> Callable[..., Any]:
    """The function behind `path/to/file.py:name`, the path relative to the working directory. Raises UserError.

    Only that file is loaded; its folder joins the end of the import path, so that it may import its neighbours.
    """
    file, _, name = fn.rpartition(":")
    path = Path(file).expanduser().resolve()
    if not path.is_file():
        beside = [p.name for p in path.parent.glob("*.py")] if path.parent.is_dir() else []
        hint = f"; {nearest(path.name, beside)}" if beside else ""
        raise UserError(f"{where}: '{fn}' names the file {path}, which does not exist{hint}")
    try:
        module = _load_module(path)
    except (Exception, SystemExit) as error:
        raise UserError(f"{where}: {path} cannot be loaded: {describe_error(error)}") from error
    function = getattr(module, name, None)
    if not callable(function):
        own = [
            k
            for k, v in vars(module).items()
            if inspect.isroutine(v) and getattr(v, "__module__", "") == module.__name__
        ]
        raise UserError(
            f"{where}: {path} has no function '{name}'; {nearest(name, own) if own else 'it has none at all'}"
        )
    return function


def _load_module(path: Path) -> ModuleType:
    # The name is derived from the path, so that two files of one name do not meet in sys.modules.
    name = f"user_rewards_{hashlib.blake2b(str(path).encode(), digest_size=6).hexdigest()}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError("not a Python file (its name must end in .py)")
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _call_parameters(made: Any, fn: str, where: str) -> list[inspect.Parameter]:
    """The parameters of a call, without `self`; raises UserError where there are none to be read."""
    if isinstance(made, type) and not any("__call__" in vars(kind) for kind in made.__mro__):
        raise UserError(f"{where}: the class '{fn}' has no __call__; give it __call__(self, completion, ...) -> float")
    try:
        parameters = list(inspect.signature(made.__call__ if isinstance(made, type) else made).parameters.values())
    except (TypeError, ValueError):
        raise UserError(f"{where}: '{fn}' has no signature that can be read; wrap it in a plain function") from None
    return parameters[1:] if isinstance(made, type) else parameters


def _is_batch(parameters: Sequence[inspect.Parameter], fn: str, where: str) -> bool:
    """Which of the two signatures it is; raises UserError when it is neither."""
    only = [p.name for p in parameters if p.kind is p.POSITIONAL_ONLY]
    if only:
        raise UserError(f"{where}: '{fn}' takes '{only[0]}' by position only; inputs are passed by name, so drop the /")
    inputs = {p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD}
    batch = bool(inputs & {"completions", "prompts"})
    if batch and inputs & {"completion", "prompt"}:
        raise UserError(
            f"{where}: '{fn}' names both one completion and many; "
            f"take either `completion` (one a call) or `completions` (a group a call)"
        )
    if not batch and not inputs & {"completion", "completion_ids", "prompt"}:
        signature = f"{fn.rpartition(':')[2]}({', '.join(p.name for p in parameters)})"
        raise UserError(
            f"{where}: '{fn}' is {signature}, which takes no completion; a reward names `completion` (one a call, a "
            f"string) or `completions` (a group a call, a list), before any *"
        )
    return batch


def _trl_texts(samples: Samples) -> tuple[Any, list[Any]]:
    """Prompt and completions as TRL passes them: chat messages where the dataset's `prompt` is chat messages."""
    chat = samples.columns.get("prompt")
    if isinstance(chat, list) and chat and all(isinstance(m, Mapping) and "role" in m for m in chat):
        return chat, [[{"role": "assistant", "content": text}] for text in samples.completions]
    return samples.prompt, list(samples.completions)


async def _await(result: Any) -> Any:
    return await result


def as_scores(result: Any) -> Scores:
    """What one completion got, from what a per-completion function returned. Raises TypeError or ValueError."""
    if isinstance(result, Mapping):
        return {str(key): as_score(value) for key, value in _not_empty(result).items()}
    return as_score(result)


def as_score(value: Any) -> Score:
    """None -> abstain; a finite number -> ok; NaN and infinity -> error; anything else raises TypeError."""
    if value is None:
        return Score("abstain")
    if isinstance(value, Score):
        return value
    if isinstance(value, (str, bytes)):
        raise TypeError(f"returned {type(value).__name__} {value[:40]!r} where a number or None is expected")
    number = float(value)
    return Score("ok", number) if math.isfinite(number) else Score("error", detail=f"invalid: returned {number}")


def as_columns(result: Any, count: int) -> list[Scores]:
    """What each completion got, from what a batch function returned: a list, or a mapping of lists."""
    if isinstance(result, Mapping):
        columns = {str(key): _column(values, count) for key, values in _not_empty(result).items()}
        return [{key: values[i] for key, values in columns.items()} for i in range(count)]
    return list(_column(result, count))


def _not_empty(result: Mapping[Any, Any]) -> Mapping[Any, Any]:
    if not result:
        raise ValueError("returned an empty mapping")
    return result


def _column(values: Any, count: int) -> Sequence[Score]:
    scores = [as_score(value) for value in values]
    if len(scores) != count:
        raise ValueError(f"returned {len(scores)} values for {count} completions")
    return scores


def failed(error: BaseException) -> Score:
    """An exception of a reward function, as data."""
    return Score("error", detail=describe_error(error))


def describe_error(error: BaseException) -> str:
    """`Type: message`, one bounded string, even when the message itself cannot be made."""
    try:
        return f"{type(error).__name__}: {error}"[:DETAIL_LIMIT]
    except Exception:
        return type(error).__name__
