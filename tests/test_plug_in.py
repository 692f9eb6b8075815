"""Every block of 'Plug in a reward' in docs/rewards.md does what the page says: the code there is run as it stands."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from core.config import RewardsConfig
from core.loading import parse_config
from core.schema import Completion, Group, Prompt, Score
from rewards.composer import Composer
from rewards.judge import judge
from rewards.vllm_judge import Ask
from tests.rewards.test_judge import taught
from tests.tiny_classifiers import tiny_encoder

PAGE = (Path(__file__).parents[1] / "docs" / "rewards.md").read_text(encoding="utf-8")
SECTION = PAGE[PAGE.index("## Plug in a reward") : PAGE.index("## What becomes of a result")]


def part(title: str) -> dict[str, list[str]]:
    """The blocks of one part of the section, by their kind."""
    text = SECTION.split(f"### {title}\n")[1].split("\n### ")[0]
    found: dict[str, list[str]] = {}
    for kind, block in re.findall(r"^```(\w+)\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        found.setdefault(kind, []).append(block)
    return found


def settings(block: str) -> RewardsConfig:
    return RewardsConfig(**yaml.safe_load(block)["rewards"])


def group(*texts: str, **columns: Any) -> Group:
    completions = tuple(Completion((1,) * len(t), (), (), t, "stop") for t in texts)
    return Group("g", Prompt(0, "Q?", (1,), {"answer": "5", "question": "what is 2 + 3", **columns}), completions)


def scored(config: RewardsConfig, *groups: Group, steps: int = 1) -> list[Group]:
    async def run() -> list[Group]:
        composer = Composer(config)
        try:
            found = [await composer.score(g) for g in groups]
            return composer.weigh(await composer.columns(found, 0))[0]
        finally:
            await composer.close()

    return asyncio.run(asyncio.wait_for(run(), 120))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_function(here: Path) -> None:
    blocks = part("A function")
    (here / "my_rewards.py").write_text(blocks["python"][0])
    (found,) = scored(settings(blocks["yaml"][0]), group(r"\boxed{5}, please", r"\boxed{4}"))
    assert found.components["polite"] == (Score("ok", 0.5), Score("ok", 0.0))
    assert found.totals == pytest.approx((1.1, 0.0))


def test_a_function_in_the_signature_of_trl(here: Path) -> None:
    body = "    return [float(len(ids)) for ids in completion_ids]\n"
    (here / "my_rewards.py").write_text(part("A function")["python"][1].replace(" ...\n", "\n" + body))
    (found,) = scored(RewardsConfig(components={"f": {"fn": "my_rewards.py:f"}}), group("aa", "b"))
    assert found.totals == (2.0, 1.0)


def test_a_class_with_state(here: Path) -> None:
    (here / "my_rewards.py").write_text(part("A class, with state")["python"][0])
    config = RewardsConfig(components={"surprise": {"fn": "my_rewards.py:Surprise", "cap": 4.0}})
    first, second = scored(config, group("aa", "bbbb"), group("c" * 9))
    # 2 tokens are no surprise, 4 are 2 more than the mean of 2, 9 are 6 more than that of 3: at most 4.
    assert first.totals == (0.0, 2.0) and second.totals == (4.0,)


def test_a_constraint() -> None:
    config = settings(part("A constraint")["yaml"][0])
    composer = Composer(config, steps=4)
    rows = group(r"\boxed{5}" + "x" * 39, r"\boxed{5}" + "x" * 15)  # 48 and 24 tokens: 1.5 times the ceiling on average
    said = {"math_answer": (1.0, 1.0), "tokens": (2.0, 1.0), "boxed": (1.0, 1.0)}
    rows = replace(rows, components={n: tuple(Score("ok", v) for v in vs) for n, vs in said.items()})
    weights = []
    for step in range(3):
        (found,), mixture = composer.weigh(asyncio.run(composer.columns([rows], step, scored=True)))
        metrics = composer.learn()
        weights.append(found.weights["tokens"][0])
    # Ascent of 0.15 x 0.5 a step, and 30 times the violation, of which a step takes in one half: 0.25, then 0.375.
    assert weights == pytest.approx([0.0, -(0.075 + 30 * 0.25), -(0.15 + 30 * 0.375)]) and mixture.apart
    assert metrics["weighting/measured/tokens"] == 1.5 and metrics["weighting/threshold/tokens"] == 1.0
    assert found.weights["boxed"][0] == 0.0  # kept


def asked_of_the_judge(folder: Path) -> str:
    """What the judge of the page is asked of the first completion of the test."""
    asked: list[str] = []
    made = judge(path=str(folder), low=1, high=5)

    def engine(asks: Sequence[Ask]) -> list[str | None]:
        asked.extend(ask.prompt for ask in asks)
        return [None] * len(asks)

    made.engine = engine
    made(["Q?"], ["five"], question=["what is 2 + 3"])
    return asked[0]


@pytest.mark.real
def test_a_reward_model_and_a_judge(here: Path) -> None:
    """Both blocks as they stand, on tiny models in the places that they name, in the pool of reward models."""
    import ray

    from rewards.pool import ModelPool

    for seed in (0, 1):
        tiny_encoder(here / f"build/reward-models/polite-{seed}", seed=seed)
    (here / "build/smollm2").mkdir()
    (here / "build/smollm2/config.json").write_text("{}")
    taught(here / "build/smollm2", [asked_of_the_judge(here / "build/smollm2")], "Good.\nScore: 4")
    models, judged = (yaml.safe_load(part(title)["yaml"][0])["rewards"] for title in ("A reward model", "A judge"))
    entries = models["components"] | judged["components"]
    entries["clear"] |= {"max_model_len": 1024, "max_tokens": 32, "kv_cache_gib": 0.25}  # what a tiny model has
    tree = {"name": "t", "steps": 1, "model": {"path": "m"}, "data": {"path": "d"}, "output_dir": str(here)}
    config = parse_config({**tree, "rewards": {**models, "components": entries}}, "test")

    async def run() -> Group:
        pool = ModelPool(config, here / "logs")
        composer = Composer(config.rewards, models=pool)
        try:
            await pool.start()
            found = await composer.score(group("five", "please go away"))
            return composer.weigh(await composer.columns([found], 0))[0][0]
        finally:
            await composer.close()
            await pool.close()

    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    try:
        found = asyncio.run(asyncio.wait_for(run(), 300))
    finally:
        ray.shutdown()
    assert [s.status for s in found.components["polite_a"]] == ["ok", "ok"]
    a, b = found.columns["polite_a"], found.columns["polite_b"]
    assert sum(a) == pytest.approx(0, abs=1e-9) and a != (0.0, 0.0)  # standardised
    for i in range(2):
        mean, variance = (a[i] + b[i]) / 2, ((a[i] - b[i]) / 2) ** 2
        assert found.columns["polite"][i] == pytest.approx(mean - 0.5 * variance)
    assert found.components["clear"][0] == Score("ok", 0.75)  # 4 on a scale from 1 to 5
    assert set(found.weights) == {"math_answer", "polite", "clear"}
