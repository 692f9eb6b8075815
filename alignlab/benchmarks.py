"""The math benchmarks as rows: where the problems are, what is asked of the model, how long it may answer.

Every benchmark is graded by `rewards.math_answer`, the same function that rewards. Any JSONL file with the columns
`question` and `answer` is a benchmark too; its path is its name.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from alignlab.prompts import PROMPT, VALUE, Row, check_column, read_rows
from core.errors import UserError, nearest

BOXED = "{prompt}\nPlease reason step by step, and put your final answer within \\boxed{{}}."


@dataclass(frozen=True)
class Benchmark:
    """One benchmark. `file` is looked for in the data folder, `hub` is used where no folder is named."""

    about: str
    file: str
    hub: str  # name[:configuration] of a hub dataset
    split: str = "test"
    question: str = "question"  # columns of the hub's dataset; our files say question and answer
    answer: str = "answer"
    template: str = BOXED
    max_tokens: int = 2048


# A hub dataset that stores worked solutions keeps the answer where the checker finds it: after ####, or boxed.
benchmarks: dict[str, Benchmark] = {
    "gsm8k": Benchmark("grade-school word problems, 1319", "gsm8k_test.jsonl", "openai/gsm8k:main", max_tokens=512),
    "math500": Benchmark("competition mathematics, 500", "math500.jsonl", "HuggingFaceH4/MATH-500", question="problem"),
    "aime24": Benchmark("AIME 2024, 30", "aime24.jsonl", "math-ai/aime24", question="problem", answer="solution"),
    "aime25": Benchmark("AIME 2025, 30", "aime25.jsonl", "math-ai/aime25", question="problem"),
    "amc23": Benchmark("AMC 12 2023, 40", "amc23.jsonl", "math-ai/amc23"),
    "minerva_math": Benchmark("undergraduate quantitative, 272", "minerva_math.jsonl", "math-ai/minervamath"),
    "olympiadbench": Benchmark(
        "olympiad problems in English, 675", "olympiadbench.jsonl", "math-ai/olympiadbench", answer="final_answer"
    ),
    "svamp": Benchmark(
        "varied arithmetic, 1000",
        "svamp.jsonl",
        "ChilleD/SVAMP",
        question="question_concat",
        answer="Answer",
        max_tokens=512,
    ),
    "asdiv": Benchmark("diverse word problems, 2215", "asdiv.jsonl", "EleutherAI/asdiv", max_tokens=512),
    "mawps": Benchmark(
        "one-step word problems, 2065", "mawps.jsonl", "MU-NLPC/Calc-mawps", answer="result", max_tokens=512
    ),
}


def find(name: str) -> Benchmark:
    """The row called `name`, or one for a JSONL file of the user's. Raises UserError with the nearest name."""
    if name in benchmarks:
        return benchmarks[name]
    if name.endswith(".jsonl"):
        file = str(Path(name).expanduser().absolute())
        return Benchmark(f"problems of {name}", file=file, hub="", template="{prompt}")
    raise UserError(f"there is no benchmark '{name}'; {nearest(name, benchmarks)}; or name a JSONL file")


def problems(benchmark: Benchmark, data: str | None, limit: int | None) -> list[Row]:
    """Rows with the columns `question` and `answer` (and what else the source has). Raises UserError."""
    if data is not None or Path(benchmark.file).is_absolute():
        file = str(Path(data or "") / benchmark.file)
        return _checked(read_rows(file, limit=limit, option="eval.benchmarks"), file)
    rows = _checked(
        read_rows(benchmark.hub, benchmark.split, limit, option="eval.benchmarks"),
        benchmark.hub,
        benchmark.question,
        benchmark.answer,
    )
    return [{**row, "question": row[benchmark.question], "answer": row[benchmark.answer]} for row in rows]


def _checked(rows: list[Row], path: str, question: str = "question", answer: str = "answer") -> list[Row]:
    check_column(rows, path, "eval.benchmarks", question, PROMPT)
    check_column(rows, path, "eval.benchmarks", answer, VALUE)
    return rows
