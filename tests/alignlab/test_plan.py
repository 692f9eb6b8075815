"""What a config names is checked before anything starts: models, data, benchmarks, room, paths."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from alignlab import benchmarks
from alignlab.cli import main
from alignlab.cluster import pools
from alignlab.plan import absolute, check_folder, describe, load_benchmarks, load_tokenizer, make_plan
from core.config import ModelConfig
from core.errors import UserError
from core.loading import dump_config, load_config, parse_config
from core.schema import Completion, Group, Prompt, Score

ROWS = [{"question": f"{i}+{i}?", "answer": str(2 * i), "said": str(2 * i), "texts": ["0"]} for i in range(4)]


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A working directory, and home, with a model of 256 positions, data, and a config of a run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr("alignlab.cluster.here", lambda: {"CPU": 2, "GPU": 0})
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy" / "config.json").write_text('{"max_position_embeddings": 256}')
    write("data.jsonl", ROWS)
    write("few.jsonl", ROWS[:2])
    tree = {"name": "r", "steps": 2, "model": {"path": "policy"}, "data": {"path": "data.jsonl"}}
    tree |= {"rollout": {"max_tokens": 100}, "rewards": {"components": {"math_answer": {}}}}
    tree["data"]["max_prompt_tokens"] = 100
    (tmp_path / "run.yaml").write_text(json.dumps(tree))
    return tmp_path


def write(path, rows):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


def plan(*overrides):
    return make_plan(load_config("run.yaml", overrides))


SFT = ("method=sft", "rewards.components={}", "data.completion_column=said")


LEARNS = ("rewards.weighting.policy=hypervolume", "eval.benchmarks=[few.jsonl]", "eval.every=1")
APART = "rewards.weighting={policy: lagrange, kind: mu, thresholds: {math_answer: 0.5}}"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rollout.max_tokens=200"], "data.max_prompt_tokens + rollout.max_tokens = 300, but policy has 256 positions"),
        (["eval.max_tokens=200"], "data.max_prompt_tokens + eval.max_tokens = 300, but policy has 256 positions"),
        (["actors.max_model_len=300"], "actors.max_model_len = 300, but policy has 256 positions"),
        (["model.reference=nowhere/at/all"], "model.reference: there is no folder nowhere/at/all"),
        (["learner.critic.path=./critic"], "learner.critic.path: there is no folder ./critic"),
        (["data.path=date.jsonl"], "data.path: cannot read date.jsonl: No such file or directory; did you mean"),
        (["data.template={prompt} \\boxed{}"], "a literal brace is written twice"),
        (["eval.benchmarks=[nope.jsonl]"], "eval.benchmarks: cannot read"),
        (["eval.benchmarks=[few.jsonl, other/few.jsonl]"], "eval.benchmarks: two are called 'few'"),
        (["eval.benchmarks=[few.jsonl]", "data.template={prompt} {said}"], "benchmark few, row 1: no column 'said'"),
        ([*SFT, "eval.benchmarks=[few.jsonl]"], "alignlab eval runs/r --benchmarks few.jsonl"),
        ([*SFT, "data.path=mixed.jsonl"], "data.completion_column: mixed.jsonl, row 5"),
        (["rewards.accuracy=math"], "rewards.accuracy: there is no component 'math'; did you mean 'math_answer'"),
        (["rewards.gold=math"], "rewards.gold: there is no component 'math'; did you mean 'math_answer'"),
        (["rewards.weighting.policy=hypervolume"], "this policy (or search) learns from evaluations"),
        ([APART, "method=ppo"], "'ppo' reads token_rewards, values, which is known of the total only"),
        ([APART, "method=remax"], "'remax' reads greedy_rewards"),
        ([f"{APART[:-1]}, kl_coef: 0.1}}", "method.kl=none"], "rewards.weighting.kl_coef: it is the coefficient"),
        (["rewards.threshold_search={gold: a/b, highest: {}}"], "this weighting policy has none; use lagrange"),
        (["rewards.components.boxed={references: answer}"], "boxed.references: data.jsonl, row 1: column"),
        (["rewards.components.tokens={references: texts}"], "'tokens' reads token ids, which the data's answers"),
        (["rewards.components.conciseness={}", "method=dapo"], "it has a state and is scored when the step"),
        (["rewards.components.conciseness={}", "method=remax"], "so greedy completions have no score of it"),
        (["rewards.components.conciseness={}", "rewards.accuracy=conciseness"], "'conciseness' is derived"),
        ([*LEARNS, "rewards.components.math_answer.shape=[minmax]"], "math_answer.shape: its statistics are empty"),
        ([*LEARNS, "rewards.components.conciseness={}"], "conciseness: it has a state, so evaluations"),
        ([*SFT, "data.sources={column: answer}"], "data.sources: nothing of a run on demonstrations"),
        (["data.sources={column: origin}"], "data.sources.column: data.jsonl, row 1: no column 'origin'"),
        ([*SFT, "data.rejected_column=said"], "data.rejected_column: method sft does not read it; leave it out"),
        ([*SFT, "method=dpo"], "data.rejected_column: method dpo reads the completion that was not chosen from it"),
        (["method=a_star_po"], "data.baseline_column: method a_star_po reads a number per prompt from it"),
        (["actors.device=cuda"], "pools: actors 1 CPU + 1 GPU, learner 1 CPU, but this machine has 0 GPU"),
        (["learner.ranks=64", "actors.count=100"], "pools: actors 100 CPU, learner 64 CPU, but this machine has 2 CPU"),
        (["data.path=bare.jsonl"], "math_answer: it reads the column 'answer', which the data has not"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_with_the_reason(home, overrides, message):
    write("bare.jsonl", [{"question": "1+1?"}])
    write("mixed.jsonl", [*ROWS, {**ROWS[0], "said": None}])
    write("few.jsonl", [{k: v for k, v in row.items() if k != "said"} for row in ROWS])
    write("other/few.jsonl", ROWS)
    with pytest.raises(UserError) as error:
        plan(*overrides)
    assert message in str(error.value)


def test_a_filter_judges_the_component_that_the_config_names(home):
    """All right, in different styles: their totals differ, and there is nothing to learn about being right."""
    one = Completion((7,), (-1.0,), (0,), "", "stop")
    scores = {"math_answer": (Score("ok", 1.0),) * 2, "style": (Score("ok", 0.0), Score("ok", 1.0))}
    group = Group("g", Prompt(0, "", (1,)), (one, one), components=scores, totals=(1.0, 2.0))
    style = "rewards.components.style={fn: length, target: 4}"
    assert plan("method=dapo", style).drop(group) is None
    assert plan("method=dapo", style, "rewards.accuracy=math_answer").drop(group) == "filter mixed"


def test_what_can_work_is_not_refused(home):
    assert plan("actors.count=2", "learner.ranks=2").rows == ROWS
    assert plan(*SFT).demonstrations
    assert plan("learner.ranks=64", "actors.device=cuda", "cluster.address=auto").config.learner.ranks == 64
    stretched = {"max_position_embeddings": 256, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}
    (home / "policy" / "config.json").write_text(json.dumps(stretched))
    assert plan("rollout.max_tokens=200").config.longest == 300


@pytest.mark.parametrize("text", ["{", "[]", '{"max_position_embeddings": [256]}'])
def test_a_broken_model_folder_is_named(home, text):
    (home / "policy" / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"policy/config.json is not the config of a model"):
        plan()


@pytest.mark.parametrize("row", [{"question": "1?"}, {"answer": "1"}, {"question": None, "answer": "1"}])
def test_a_benchmark_has_questions_and_answers(home, row):
    write("few.jsonl", [ROWS[0], row])
    with pytest.raises(UserError, match=r"eval.benchmarks: .*few.jsonl, row 2: "):
        plan("eval.benchmarks=[few.jsonl]")
    with pytest.raises(UserError, match=r"row 2: "):
        benchmarks.problems(benchmarks.find("few.jsonl"), None, None)


def test_a_benchmark_of_the_hub_has_the_columns_of_its_row(monkeypatch):
    monkeypatch.setattr("alignlab.prompts._read_hub", lambda *a: [{"problem": "1+1?", "solution": "2"}])
    (row,) = benchmarks.problems(benchmarks.find("aime24"), None, None)
    assert (row["question"], row["answer"]) == ("1+1?", "2")
    with pytest.raises(UserError, match=r"eval.benchmarks: math-ai/aime25, row 1: no column 'answer'"):
        benchmarks.problems(benchmarks.find("aime25"), None, None)


def test_a_hub_is_asked_last_and_once(home, monkeypatch):
    asked = []
    monkeypatch.setattr("alignlab.prompts._read_hub", lambda name, *a: asked.append(name) or ROWS)
    with pytest.raises(UserError, match="there is no method 'gpro'"):
        plan("data.path=somebody/sums", "method=gpro")
    assert not asked
    made = plan("data.path=somebody/sums")
    assert asked == ["somebody/sums"] == [made.config.data.path] and made.rows == ROWS


# ---------------------------------------------------------------- paths
def test_paths_of_a_plan_are_absolute_and_shown_as_given(home):
    made = plan("model.path=~/policy", "model.reference=policy", "eval.benchmarks=[~/few.jsonl]", "eval.data=.")
    config = made.config
    assert config.model.path == config.model.reference == str(home / "policy")
    assert config.data.path == str(home / "data.jsonl") and config.output_dir == str(home / "runs")
    assert config.eval.benchmarks == [str(home / "few.jsonl")] and config.eval.data == str(home)
    assert "run       r in runs/r," in describe(made) and "policy    policy (" in describe(made)
    assert str(home) not in describe(made).replace("~/", "")


def test_hub_names_stay_and_an_absolute_config_is_its_own(home, tmp_path):
    tree = {"name": "r", "steps": 1, "model": {"path": "Org/Model"}, "data": {"path": "org/data:main"}}
    config = absolute(parse_config({**tree, "eval": {"benchmarks": ["gsm8k"]}}, "test"))
    assert (config.model.path, config.data.path, config.eval.benchmarks) == ("Org/Model", "org/data:main", ["gsm8k"])
    made = plan()
    (tmp_path / "again.yaml").write_text(dump_config(made.config))
    os.chdir("/")
    assert make_plan(load_config(tmp_path / "again.yaml")).config == made.config


def test_a_model_that_is_neither_here_nor_on_the_hub_is_refused_at_once(home, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"model.path: there is no folder runs/nope, and HF_HUB_OFFLINE forbids"):
        check_folder("model.path", "runs/nope")
    (home / "hub" / "models--Org--Model").mkdir(parents=True)
    check_folder("model.path", "Org/Model")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

    def no_network(*arguments, **options):
        raise ConnectionError("no route to host")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", no_network)
    with pytest.raises(UserError, match="no folder runs/nope, and the hub does not provide it: no route to host"):
        check_folder("model.path", "runs/nope")
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *a, **b: "known")
    check_folder("model.path", "Org/Other")


def test_a_folder_without_a_tokenizer_is_named(home):
    (home / "policy" / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"model.path: policy has no tokenizer that loads: .+; a model folder holds"):
        load_tokenizer(ModelConfig(path="policy"))


def test_benchmarks_are_found_from_home(home):
    config = load_config("run.yaml", ["eval.benchmarks=[~/few.jsonl]"])
    assert len(load_benchmarks(config)["few"][1]) == 2


# ---------------------------------------------------------------- pools
def test_blocks_are_compiled_only_where_something_compiles(home, monkeypatch):
    monkeypatch.setenv("CXX", "true")  # a command that every machine has
    plan("learner.compile=true")
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match="there is no no-such-compiler here"):
        plan("learner.compile=true")
    plan("learner.compile=true", "cluster.address=auto")


def test_pools_ask_for_what_ray_is_asked_for():
    tree = {"name": "r", "steps": 1, "model": {"path": "m"}, "data": {"path": "d.jsonl"}}
    tree |= {"actors": {"count": 2, "threads": 3, "tensor_parallel": 4}, "learner": {"ranks": 5, "threads": 6}}
    config = parse_config(tree, "test")
    assert pools(config, gpus=0) == {"actors": {"CPU": 24}, "learner": {"CPU": 30}}
    assert pools(config, gpus=1) == {"actors": {"CPU": 2, "GPU": 8}, "learner": {"CPU": 30, "GPU": 5}}
    assert pools(config, gpus=0, sampling=False)["actors"]["CPU"] == 0


def test_processes_that_work_at_the_same_time_keep_to_cores_of_their_own_where_there_are_enough(home, monkeypatch):
    monkeypatch.setattr("alignlab.cluster.allowed", lambda: [4, 5])
    overlap = "rollout.max_staleness=1"
    plan = make_plan(load_config("run.yaml", [overlap]))  # an actor and a rank
    assert plan.config.cluster.pin_cores is True and "each process keeps to cores of its own" in describe(plan)
    plan = make_plan(load_config("run.yaml", [overlap, "actors.count=2"]))
    assert plan.config.cluster.pin_cores is False and "of its own" not in describe(plan)
    for changes, pinned in [
        ([], False),  # on-policy they take turns
        (["cluster.pin_cores=true"], True),
        ([overlap, "actors.count=2", "cluster.address=auto"], True),
        ([overlap, "cluster.pin_cores=false"], False),
    ]:
        assert make_plan(load_config("run.yaml", changes)).config.cluster.pin_cores is pinned, changes


# ---------------------------------------------------------------- the command
def test_mistakes_in_files_are_told_before_heavy_libraries_load(home):
    write("data.jsonl", [*ROWS, {"answer": "1"}])
    code = "import sys\nfrom alignlab.cli import main\ncode = main(['check', 'run.yaml'])\n"
    code += "print(code, sorted({'torch', 'transformers', 'ray', 'vllm'} & set(sys.modules)))"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environment)
    assert done.stdout == "2 []\n", done.stdout + done.stderr
    assert done.stderr.startswith("alignlab check: data.prompt_column: data.jsonl, row 5: no column 'question'")


def test_ls_names_everything_and_shows_what_a_method_changes(capsys):
    assert main(["ls"]) == 0
    said = capsys.readouterr().out
    for name in ("dapo", "surrogate:cispo", "math_answer", "gsm8k"):
        assert name in said
    assert main(["ls", "methods"]) == 0
    (dapo,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("dapo ")]
    assert dapo.endswith("filter mixed, shaping overlong, surrogate ppo_clip(high=0.28, dual=10)")


def test_a_reader_that_leaves_early_is_no_error():
    reading, writing = os.pipe()
    os.close(reading)
    root = Path(__file__).parents[2]
    with os.fdopen(writing, "w") as closed:
        done = subprocess.run(
            [sys.executable, "-m", "alignlab.cli", "ls", "benchmarks"],
            cwd=root, stdout=closed, stderr=subprocess.PIPE, text=True, timeout=60,
        )  # fmt: skip
    assert (done.returncode, done.stderr) == (141, "")
