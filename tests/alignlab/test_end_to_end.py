"""Whole runs on real parts: Ray, vLLM actors, FSDP2 learner ranks, scoring processes. Small, but nothing is faked."""

import contextlib
import gzip
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from safetensors.torch import load_file

from alignlab.audit import audit
from tests.tiny import tiny_policy

pytestmark = pytest.mark.real
ALIGNLAB = [sys.executable, "-m", "alignlab.cli"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a policy, some problems and a reward of the user's own: what a run needs."""
    home = tmp_path_factory.mktemp("home")
    tiny_policy(home / "policy")
    rows = [{"question": f"{a} + {b}?", "answer": str(a + b)} for a in range(8) for b in range(8)]
    (home / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (home / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:6]))
    # A random policy solves nothing, so the reward is one that it can earn: many different tokens.
    (home / "my_rewards.py").write_text(
        "def varied(completion_ids):\n    return len(set(completion_ids)) / 16 - 0.5 * (completion_ids[0] % 2)\n"
        "class Rare:\n"
        "    'Whether the first token is seen for the first time.'\n"
        "    def __init__(self): self.seen = []\n"
        "    def __call__(self, completion_ids):\n"
        "        new = completion_ids[0] not in self.seen\n"
        "        self.seen.append(completion_ids[0])\n"
        "        return float(new)\n"
        "    def state_dict(self): return {'seen': self.seen}\n"
        "    def load_state_dict(self, state): self.seen = state['seen']\n"
    )
    return home


def config(home, name, **changes):
    tree = {
        "name": name,
        "steps": 3,
        "method": {"row": "grpo", "kl": "none"},
        "model": {"path": "policy"},
        "data": {"path": "problems.jsonl", "max_prompt_tokens": 32},
        "rollout": {"prompts": 4, "group_size": 4, "max_tokens": 12},
        "actors": {"kv_cache_gib": 0.1, "max_num_seqs": 32},
        "rewards": {
            "components": {
                "varied": {"fn": "my_rewards.py:varied", "shape": ["meanstd"]},
                "math_answer": {"weight": 0.5},
                "rare": {"fn": "my_rewards.py:Rare", "weight": 0.25},
                "tokens": {"per": 12},
            },
            # Multipliers, a violation, a KL to the reference and states go from step to step and through checkpoints.
            "weighting": {
                "policy": "lagrange",
                "kind": "projected",
                "thresholds": {"tokens": 0.5},
                "senses": {"tokens": "<="},
                "kl_budget": 0.0,
                "lr": 0.5,
                "proportional": 1.0,
            },
        },
        "learner": {"optimizer": {"lr": 1e-4}},
    }
    for path, value in changes.items():
        at = tree
        *parents, last = path.split("__")
        for key in parents:
            at = at.setdefault(key, {})
        at[last] = value
    path = home / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def environment():
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def train(home, path, *arguments):
    done = subprocess.run(
        [*ALIGNLAB, "train", path.name, *arguments],
        cwd=home, env=environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    assert audit(home / "runs" / path.stem).problems == []
    return done.stdout


def weights(home, name, step):
    return load_file(home / "runs" / name / "checkpoints" / f"step-{step:06d}" / "model" / "model.safetensors")


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def plain(home):
    """One rank, one actor: what all the others are compared with. Its folder."""
    changes = {"checkpoint": {"every": 1, "keep": 3}, "eval__benchmarks": ["few.jsonl"], "profile": True}
    changes["cluster__pin_cores"] = True
    path = config(home, "plain", steps=4, **changes)
    train(home, path)
    return home / "runs" / "plain"


def test_a_run_leaves_everything_behind(plain):
    assert {"config.yaml", "environment.json", "metrics.jsonl", "tensorboard", "rollouts", "evals", "logs"} <= {
        p.name for p in plain.iterdir()
    }
    steps = [row for row in rows(plain / "metrics.jsonl") if "reward/total" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4]
    expected = "reward/varied reward/math_answer completion/length_mean policy/entropy policy/clip_low optim/grad_norm"
    for name in [*expected.split(), "rollout/tokens_per_second", "time/train", "time/publish"]:
        assert steps[0][name] is not None, name
    assert steps[-1]["policy/mismatch_kl"] < 1e-6  # the engine's log-probs are the learner's
    rollouts = rows(plain / "rollouts" / "step-000001.jsonl")
    assert len(rollouts) == 16
    for row in rollouts:
        assert row["weights"] == {"varied": 1.0, "math_answer": 0.5, "rare": 0.25, "tokens": 0.0}
        assert row["total"] == pytest.approx(sum(row["weights"][n] * row["columns"][n] for n in row["weights"]))
        assert row["versions"] == [0] and row["actor"] == "actor-0"
    summary = json.loads((plain / "evals" / "step-000004" / "few.summary.json").read_text())
    assert summary["result"]["problems"] == 6 and summary["version"] == 4
    kept = sorted(p.name for p in (plain / "checkpoints").glob("step-*"))
    assert kept == ["step-000002", "step-000003", "step-000004"]


def test_the_third_step_is_profiled_in_every_process(plain):
    folder = plain / "profile" / "step-000003"
    assert {path.name for path in folder.iterdir()} == {"learner-0.json.gz", "learner-0.txt", "timeline.json.gz"}
    traces = [json.loads(gzip.decompress(path.read_bytes()))["traceEvents"] for path in sorted(folder.glob("*.gz"))]
    operators, spans = ([event for event in trace if event.get("ph") == "X"] for trace in traces)
    step = next(row for row in rows(plain / "metrics.jsonl") if row["step"] == 3 and "time/step" in row)
    lasted = {name: [e["dur"] / 1e6 for e in spans if e["name"] == name] for name in ("train", "gradients")}
    assert lasted["train"][-1] == pytest.approx(step["time/train"], abs=0.01) and len(lasted["train"]) == 3
    assert lasted["gradients"][-1] == pytest.approx(step["time/learner_gradients"], abs=0.01)
    whole = sum(step[f"time/learner_{name}"] for name in ("gradients", "optimizer"))  # one is inside the other
    assert sum(e["dur"] / 1e6 for e in operators if e["name"] == "gradients") == pytest.approx(whole, abs=0.05)
    assert 0 < step["learner/mfu"] < 1.5 and step["learner/flops"] > 0


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core for both")
def test_actor_and_learner_keep_to_cores_of_their_own(plain):
    told = {log.name: log.read_text() for log in (plain / "logs").glob("*.log")}
    cores = [line for text in told.values() for line in text.splitlines() if line.startswith("cores: ")]
    claimed = [line for line in cores if "none are free" not in line]  # another run on this machine may have them
    assert len(cores) == 2 and len(set(claimed)) == len(claimed)


def test_tensorboard_reads_the_run(plain):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(plain / "tensorboard"))
    board.Reload()
    assert [point.step for point in board.Scalars("reward/varied")] == [1, 2, 3, 4]


def test_the_checkpoint_is_an_ordinary_model_folder(plain):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = plain / "checkpoints" / "step-000004" / "model"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "1 + 1?"}], tokenize=False)
    assert torch.isfinite(model(**tokenizer(text, return_tensors="pt", return_token_type_ids=False)).logits).all()


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("two-ranks", {"learner__ranks": 2}),
        ("two-actors-small-batches", {"actors__count": 2, "learner__token_budget": 40}),
    ],
)
def test_ranks_actors_and_micro_batches_do_not_change_what_is_learned(home, plain, name, changes):
    train(home, config(home, name, **changes))
    ours = weights(home, name, 3)
    start = load_file(home / "policy" / "model.safetensors")
    for key, expected in weights(home, "plain", 3).items():
        assert (ours[key] - expected).abs().max() < 1e-5, key
        assert (expected - start[key]).abs().max() > 2e-5, f"{key} was not trained"


def test_a_killed_run_resumes_to_the_same_bits(home, plain):
    path = config(home, "killed", steps=4, checkpoint__every=2, eval__benchmarks=["few.jsonl"])
    folder = home / "runs" / "killed"
    run = subprocess.Popen(
        [*ALIGNLAB, "train", path.name], cwd=home, env=environment(), start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 200
    while not (folder / "checkpoints" / "step-000002" / "run.json").exists():
        assert run.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    kill_everything(run)
    # A torn last line, as a crash can leave it.
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "rew')
    out = train(home, path, "--resume")
    assert "going on from" in out
    a, b = (weights(home, name, 4) for name in ("plain", "killed"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    for step in (1, 2, 3, 4):  # and the same rollouts
        one, two = (rows(f / "rollouts" / f"step-{step:06d}.jsonl") for f in (plain, folder))
        assert one == two
        weighed = [row["weights"]["tokens"] for row in one]
        assert weighed[0] < 0 if step > 1 else weighed[0] == 0
    steps = [row["step"] for row in rows(folder / "metrics.jsonl") if "reward/total" in row]
    assert steps == [1, 2, 3, 4]


def kill_everything(run):
    """kill -9 of the driver and of all that it started."""
    import psutil

    family = psutil.Process(run.pid).children(recursive=True)
    os.killpg(run.pid, signal.SIGKILL)
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    run.wait()
    psutil.wait_procs(family, timeout=30)


def test_overlapped_runs_stay_within_their_window(home):
    train(home, config(home, "overlapped", steps=4, rollout__max_staleness=1, rollout__window=1, actors__count=2))
    steps = [row for row in rows(home / "runs" / "overlapped" / "metrics.jsonl") if "reward/total" in row]
    assert len(steps) == 4 and max(row["rollout/staleness_max"] for row in steps) <= 1
    ordinals = [
        row["ordinal"]
        for file in sorted((home / "runs" / "overlapped" / "rollouts").iterdir())
        for row in rows(file)
        if row["sample"] == 0
    ]
    assert sorted(ordinals) == list(range(16))  # each group once


@pytest.mark.parametrize(("method", "metric"), [("remax", "reward/total"), ("ppo", "critic/value")])
def test_methods_with_parts_of_their_own_run(home, method, metric):
    """A greedy completion from the actors; a critic on two ranks, and its checkpoint."""
    ranks = 2 if method == "ppo" else 1
    # One weighs by the agreement of the gradients, which the learner measures in each step.
    weighting = {"policy": "static" if method == "ppo" else "gradient"}
    entries = {"varied": {"fn": "my_rewards.py:varied"}, "math_answer": {}}
    changes = {"steps": 2, "checkpoint__every": 1, "learner__ranks": ranks}
    changes["rewards"] = {"components": entries, "weighting": weighting}
    path = config(home, method, method=method, **changes)
    train(home, path)
    steps = [row for row in rows(home / "runs" / method / "metrics.jsonl") if "reward/total" in row]
    assert len(steps) == 2 and all(row[metric] is not None for row in steps)
    greedy = [row["greedy_total"] for row in rows(home / "runs" / method / "rollouts" / "step-000001.jsonl")]
    assert all((value is not None) == (method == "remax") for value in greedy)


def test_a_free_running_run_is_trained_again_bit_for_bit(home):
    folder = home / "runs" / "overlapped"
    command = [*ALIGNLAB, "replay", "runs/overlapped"]
    done = subprocess.run(command, cwd=home, env=environment(), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "replay: 4 steps, losses and weights bit for bit"
    # Another loss in the metrics is another run.
    path = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    next(row for row in lines if row["step"] == 2 and "policy/loss" in row)["policy/loss"] += 1e-9
    path.write_text("".join(json.dumps(row) + "\n" for row in lines))
    done = subprocess.run(command, cwd=home, env=environment(), capture_output=True, text=True, timeout=200)
    assert done.returncode == 1 and "replay: step 2: policy/loss is" in done.stdout.splitlines()[-1]


def test_demonstrations_are_learned(home):
    demos = [{"question": f"{a} + {a}?", "completion": "the sum"} for a in range(8)]
    (home / "demos.jsonl").write_text("".join(json.dumps(row) + "\n" for row in demos))
    path = config(
        home, "sft", steps=8, method="sft", data__path="demos.jsonl", data__completion_column="completion",
        rewards={}, learner__optimizer={"lr": 3e-3},
    )  # fmt: skip
    train(home, path)
    losses = [row["policy/loss"] for row in rows(home / "runs" / "sft" / "metrics.jsonl") if "policy/loss" in row]
    assert losses[-1] < 0.5 * losses[0]


def test_pairs_are_learned(home):
    pairs = [{"question": f"{a} + {a}?", "good": "the sum", "bad": "no idea"} for a in range(8)]
    (home / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    path = config(
        home, "dpo", steps=6, method="dpo", data__path="pairs.jsonl", data__completion_column="good",
        data__rejected_column="bad", rewards={}, learner__optimizer={"lr": 1e-3},
    )  # fmt: skip
    train(home, path)
    steps = [row for row in rows(home / "runs" / "dpo" / "metrics.jsonl") if "policy/loss" in row]
    assert steps[0]["preference/margin"] == 0.0  # the policy is still the reference
    assert steps[-1]["preference/margin"] > 1.0 and steps[-1]["preference/accuracy"] == 1.0


def test_eval_of_a_run_by_command(home, plain):
    done = subprocess.run(
        [*ALIGNLAB, "eval", "runs/plain", "--benchmarks", "few.jsonl", "--samples", "2", "--limit", "4"],
        cwd=home, env=environment(), capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert "few: accuracy" in done.stdout and "(4 problems x 2)" in done.stdout
    graded = rows(home / "runs" / "plain" / "evals" / "eval-step-000004" / "few.jsonl")
    assert len(graded) == 8 and {row["status"] for row in graded} == {"ok"}


def test_ctrl_c_finishes_the_step_saves_and_says_how_to_resume(home):
    path = config(home, "interrupted", steps=500)
    run = subprocess.Popen(
        [*ALIGNLAB, "train", path.name], cwd=home, env=environment(), start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    lines = []
    for line in run.stdout:
        lines.append(line)
        if line.startswith("step   2/500"):
            run.send_signal(signal.SIGINT)
    assert run.wait(timeout=60) == 130
    out = "".join(lines)
    assert "this step is finished and saved first" in out and "--resume" in lines[-1]
    (checkpoint,) = (home / "runs" / "interrupted" / "checkpoints").glob("step-*")
    assert (checkpoint / "run.json").exists() and int(checkpoint.name[-6:]) < 500
