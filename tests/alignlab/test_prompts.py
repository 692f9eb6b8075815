"""The prompt stream: order from (seed, position) alone, columns checked, long prompts left out and counted."""

import json

import pytest

from alignlab.prompts import PromptStream, read_rows
from core.config import DataConfig
from core.errors import UserError


class Letters:
    """A tokenizer of single characters with a chat template that can be read."""

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        return "".join(f"<{m['role']}>{m['content']}" for m in messages) + "<assistant>"

    def __call__(self, texts, add_special_tokens):
        return {"input_ids": [[ord(letter) for letter in text] for text in texts]}


ROWS = [{"question": f"{i}+{i}?", "answer": str(2 * i)} for i in range(10)]


def stream(rows=ROWS, seed=0, **data):
    return PromptStream(DataConfig(path="x.jsonl", **data), Letters(), seed, rows)


def test_a_prompt_is_rendered_and_keeps_its_row():
    prompt = stream(shuffle=False, system="Be brief.", template="Q: {prompt} ({answer})")[3]
    assert prompt.text == "<system>Be brief.<user>Q: 3+3? (6)<assistant>"
    assert prompt.token_ids == tuple(map(ord, prompt.text))
    assert prompt.columns["answer"] == "6" and prompt.ordinal == 3


def test_messages_and_bare_text():
    rows = [{"question": [{"role": "user", "content": "Hi {x}"}]}]
    assert stream(rows)[0].text == "<user>Hi {x}<assistant>"
    assert stream(chat_template=False, shuffle=False)[1].text == "1+1?"


def test_every_pass_has_an_order_of_its_own_that_the_seed_decides():
    passes = [[stream(seed=1)[n].text for n in range(k, k + 10)] for k in (0, 10)]
    assert sorted(passes[0]) == sorted(passes[1]) and passes[0] != passes[1]
    assert passes[0] != [stream(seed=2)[n].text for n in range(10)]
    late = stream(seed=1)  # asking out of order changes nothing
    assert late[17].text == passes[1][7] and late[2].text == passes[0][2]


def test_long_prompts_are_left_out_and_counted():
    rows = [*ROWS, {"question": "x" * 100, "answer": "0"}]
    some = stream(rows, max_prompt_tokens=30)
    assert (len(some), some.too_long) == (10, 1)
    with pytest.raises(UserError, match=r"none of the 10 prompts .* the shortest has 21 tokens"):
        stream(max_prompt_tokens=5)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            {"prompt_column": "questoin"},
            "data.prompt_column: x.jsonl, row 1: no column 'questoin'; did you mean 'question'",
        ),
        ({"template": "{prompt} {hint}"}, "data.template {hint}: x.jsonl, row 1: no column 'hint'"),
        ({"template": "\\boxed{"}, "a literal brace is written twice"),
        ({"template": "{prompt} \\boxed{}"}, "{} names no column; {column} stands for a column, a literal brace is"),
        ({"template": "{prompt} \\boxed{42}"}, "{42} names no column"),
        ({"template": "{prompt} {answer:.2f}"}, "cannot be filled from x.jsonl, row 1: Unknown format code"),
        ({"template": "{prompt} {answer.x}"}, "cannot be filled from x.jsonl, row 1: 'str' object has no attribute"),
        ({"completion_column": "c"}, "data.completion_column: x.jsonl, row 1: no column 'c'"),
    ],
)
def test_wrong_columns_are_refused(data, message):
    with pytest.raises(UserError) as error:
        stream(**data)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"answer": "1"}, "data.prompt_column: x.jsonl, row 11: no column 'question'"),
        ({"question": None}, "row 11: column 'question' holds None; it must be a text, or chat messages"),
        ({"question": 7}, "column 'question' holds 7"),
        ({"question": []}, "column 'question' holds []"),
        ({"question": [{"role": "user"}]}, "column 'question' holds [{'role': 'user'}]"),
        ({"question": "?", "answer": None, "said": "x", "value": 1}, "data.template {answer}: x.jsonl, row 11"),
        ({"question": "?", "answer": "1", "said": ["x"], "value": 1}, "data.completion_column: x.jsonl, row 11"),
        ({"question": "?", "answer": "1", "said": "x", "value": "1"}, "data.baseline_column: x.jsonl, row 11"),
    ],
)
def test_every_row_is_looked_at(row, message):
    rows = [{**good, "said": "x", "value": 0.5} for good in ROWS]
    with pytest.raises(UserError) as error:
        stream([*rows, row], template="{prompt} {answer}", completion_column="said", baseline_column="value")
    assert message in str(error.value)


@pytest.mark.parametrize(
    "problem",
    [ValueError("chat_template is not set and\nhere is a page of advice"), RuntimeError("System role not supported")],
)
def test_a_tokenizer_that_cannot_chat_is_a_users_mistake(problem):
    class Base(Letters):
        def apply_chat_template(self, *arguments, **options):
            raise problem

    with pytest.raises(UserError, match=r"\(system, user\); .* set data.chat_template=false") as error:
        PromptStream(DataConfig(path="x.jsonl", system="Be brief."), Base(), 0, ROWS)
    assert "advice" not in str(error.value)
    bare = PromptStream(DataConfig(path="x.jsonl", chat_template=False, shuffle=False), Base(), 0, ROWS)
    assert bare[0].text == "0+0?"


def test_broken_files_name_the_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n{broken\n")
    assert len(read_rows(str(path), limit=1)) == 1
    with pytest.raises(UserError, match=r"rows.jsonl:2: not valid JSON"):
        read_rows(str(path))
    with pytest.raises(UserError, match=r"did you mean '.*rows.jsonl'"):
        read_rows(str(tmp_path / "row.jsonl"))
    path.write_bytes(json.dumps(ROWS[0]).encode() + b'\n{"question": "\xff"}\n')
    with pytest.raises(UserError, match=r"rows.jsonl:2: not UTF-8 text"):
        read_rows(str(path))
    path.write_text("\ufeff" + json.dumps(ROWS[0]) + "\n\n[1]\n")
    assert read_rows(str(path), limit=1) == [ROWS[0]]
    with pytest.raises(UserError, match=r"rows.jsonl:3: a row is a JSON object, not list"):
        read_rows(str(path))
    path.write_text("")
    with pytest.raises(UserError, match="no rows"):
        read_rows(str(path))
