"""Prompts of several sources: drawn by their probabilities, the same for everybody, moved by what a step says."""

import json
import math
from collections import Counter

import pytest

from alignlab.sources import advantage_signal, alignment_signal, by_source, prompt_stream
from core.config import DataConfig
from core.errors import UserError
from core.schema import Completion, Group, Prompt
from learner.collate import collate


class Tokenizer:
    def __call__(self, texts, add_special_tokens):
        return {"input_ids": [[1] * len(text) for text in texts]}


def data(**sources):
    return DataConfig(path="d.jsonl", chat_template=False, sources=sources)


ROWS = [{"question": f"{name}{i}", "source": name} for name in ("easy", "hard") for i in range(10)]


def test_sources_are_drawn_by_their_probabilities_and_every_pass_takes_each_prompt_once():
    prompts = prompt_stream(data(mixer={"init": {"easy": 0.8, "hard": 0.2}}), Tokenizer(), 0, ROWS)
    assert len(prompts) == 20
    seen = [prompts[n] for n in range(2000)]
    assert Counter(p.columns["source"] for p in seen)["easy"] / 2000 == pytest.approx(0.8, abs=0.03)
    easy = [p.text for p in seen if p.columns["source"] == "easy"]
    assert sorted(easy[:10]) == sorted(easy[10:20]) == [f"easy{i}" for i in range(10)]
    assert [p.ordinal for p in seen] == list(range(2000))
    again = prompt_stream(data(mixer={"init": {"easy": 0.8, "hard": 0.2}}), Tokenizer(), 0, ROWS)
    assert again[1999] == seen[1999] and again[5] == seen[5]  # whatever was asked for before


def test_new_probabilities_count_for_prompts_that_are_not_yet_admitted_and_survive_a_checkpoint():
    prompts = prompt_stream(data(mixer={"eta": 5.0, "beta": 1.0}), Tokenizer(), 0, ROWS)
    old = [prompts[n] for n in range(100)]
    metrics = prompts.mix({"easy": 0.0, "hard": 1.0}, 100)
    assert metrics["sources/hard"] == pytest.approx(math.exp(5) / (1 + math.exp(5)))
    assert [prompts[n] for n in range(100)] == old
    assert sum(prompts[n].columns["source"] == "hard" for n in range(100, 200)) > 95
    other = prompt_stream(data(mixer={"eta": 5.0, "beta": 1.0}), Tokenizer(), 0, ROWS)
    other.load_state_dict(json.loads(json.dumps(prompts.state_dict())))
    assert [other[n] for n in range(200)] == [prompts[n] for n in range(200)]


def group(source, totals):
    c = Completion((1,), (-1.0,), (0,), "", "stop")
    return Group("g", Prompt(0, "", (1,), {"source": source}), (c,) * len(totals), totals=totals)


def test_what_a_step_says_of_its_sources():
    groups = [group("easy", (1.0, 0.0)), group("hard", (0.5, 0.5)), group("easy", (1.0, 1.0))]
    assert advantage_signal(groups, [[1.0, -1.0], [math.nan, 0.5], [0.0, 0.0]]) == {"easy": 0.5, "hard": 0.5}
    easy, hard, _ = by_source(groups)
    assert easy.columns["easy"] == (1.0, 0.0) and all(map(math.isnan, easy.columns["hard"]))
    assert hard.columns["hard"] == (0.5, 0.5) and hard.weights == {"easy": (1.0, 1.0), "hard": (1.0, 1.0)}
    assert collate([easy, hard], apart=True)[0].rewards.shape == (4, 2)  # as the learner takes them
    # Two of three groups are easy: means are 3/2 and 3 times the sums.
    gram = [[2.0, 1.0], [1.0, 4.0]]
    assert alignment_signal(groups, gram, None) == {"easy": 1.5 * 3.0, "hard": 3.0 * 5.0}
    assert alignment_signal(groups, gram, "hard") == {"easy": 1.5 * 3 * 1.0, "hard": 9 * 4.0}
    assert alignment_signal(groups[:1], [[2.0]], "hard") == {}


def test_mistakes_are_explained():
    for sources, says in (
        ({"column": "sorce"}, "data.sources.column: .*no column 'sorce'; did you mean 'source'"),
        ({"target": "eazy"}, "data.sources.target: there is no source 'eazy'; did you mean 'easy'"),
        ({"mixer": {"name": "dgaa"}}, "data.sources.mixer: there is no source mixer 'dgaa'; did you mean 'dga'"),
        ({"mixer": {"flor": 0.1}}, "data.sources.mixer.flor: unknown option of 'dga'; did you mean 'floor'"),
    ):
        with pytest.raises(UserError, match=says):
            prompt_stream(data(**sources), Tokenizer(), 0, ROWS)
