"""The verb `check`: the resolved plan, one rendered prompt, one completion scored by every component. Starts nothing
but the scoring process."""

from __future__ import annotations

import asyncio
from pathlib import Path

from alignlab.balance import balance, said
from alignlab.plan import Plan, describe, load_tokenizer, make_plan, shown
from alignlab.sources import prompt_stream
from core.config import RunConfig
from core.errors import UserError
from core.schema import Completion, Group, Prompt


def check(config: RunConfig, run: Path | None = None) -> str:
    """The report as text. Raises UserError for whatever would stop the run at its start.

    run: one that was measured, whose pools are judged; none is the run of this config, if it has begun.
    """
    plan = make_plan(config)
    config = plan.config
    prompts = prompt_stream(config.data, load_tokenizer(config.model), config.seed, plan.rows)
    prompt = prompts[0]
    lines = [describe(plan), f"data      {len(prompts)} prompts, {prompts.too_long} left out as too long", ""]
    lines += [f"the first prompt ({len(prompt.token_ids)} tokens):", _indent(prompt.text), ""]
    if plan.demonstrations:
        lines += ["its demonstration:", _indent(str(prompt.columns[config.data.completion_column or ""]))]
        if config.data.rejected_column is not None:
            lines += ["preferred to:", _indent(str(prompt.columns[config.data.rejected_column]))]
    else:
        text = _sample_answer(prompt)
        lines += ["a made-up completion:", _indent(text), "", "what each component says of it:"]
        lines += asyncio.run(_scores(plan, prompt, text))
    return "\n".join(
        [*lines, *_measured(Path(config.output_dir) / config.name if run is None else run, run is not None)]
    )


def _measured(run: Path, named: bool) -> list[str]:
    """Which pool a run has waited for. Raises UserError where a run that was `named` does not say it."""
    found = balance(run)
    if found is None and named:
        raise UserError(f"--run: the files of {run} do not say how long its parts take; it needs actors and 4 steps")
    return [] if found is None else ["", f"as {shown(run.absolute())} was measured:", *map(_indent, said(found))]


def _sample_answer(prompt: Prompt) -> str:
    answer = prompt.columns.get("answer")
    return "I do not know." if answer is None else f"The answer is \\boxed{{{answer}}}."


async def _scores(plan: Plan, prompt: Prompt, text: str) -> list[str]:
    from rewards.composer import Composer

    composer = Composer(plan.config.rewards)
    try:
        completion = Completion(tuple(range(len(text.split()))), (), (), text, "stop")
        group = await composer.score(Group("check", prompt, (completion,)))
    finally:
        await composer.close()
    rows = [
        f"  {name:<20} {score.status:<8} {score.value:.4g}  {score.detail}".rstrip()
        for name, (score,) in group.components.items()
    ]
    later = [n for n, c in composer.components.items() if c.columns(group.components)[0] not in group.columns]
    rows += [f"  {name:<20} is scored in the run only: it has a state" for name in later]
    return [*rows, f"  {'total':<20} {'':<8} {group.totals[0]:.4g}"]


def _indent(text: str) -> str:
    return "\n".join("  | " + line for line in text.splitlines())
