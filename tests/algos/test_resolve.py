"""From what a user writes to a method: rows, changes, modifiers, mistakes."""

from __future__ import annotations

import subprocess
import sys

import pytest

from algos.method import PIECES
from algos.methods import MODIFIERS, ROWS, methods, resolve
from core.errors import UserError
from tests.algos.steps import CONTEXT, RUNNABLE, current, run, step


def test_a_name_a_mapping_and_the_parts_alone_say_the_same():
    spec = {"advantage": {"group": {"scale": "none"}}, "surrogate": {"dro": {"beta": 0.5}}}
    assert resolve("dro").pieces() == resolve({"row": "dro"}).pieces() == resolve(spec).pieces()


def test_options_of_the_rows_own_part_are_merged_and_another_part_replaces():
    changed = resolve({"row": "dapo", "surrogate": {"ppo_clip": {"high": 0.3}}})
    assert dict(changed.surrogate.options) == {"low": 0.2, "high": 0.3, "dual": 10.0}
    assert dict(resolve({"row": "dapo", "surrogate": {"cispo": {"high": 3.0}}}).surrogate.options) == {"high": 3.0}


def test_none_removes_a_piece_and_the_plain_part_may_leave_out_its_name():
    assert resolve({"row": "grpo", "kl": "none"}).kl is None
    assert resolve({"row": "grpo", "kl": None}).kl is None
    assert resolve({"row": "grpo", "kl": {"coef": 0.01}}).kl.options["coef"] == 0.01


def test_hyphens_are_as_good_as_underscores():
    assert resolve({"aggregation": "seq-mean-token-mean"}).aggregation.name == "seq_mean_token_mean"


def test_max_tokens_of_a_row_is_filled_in_by_the_run():
    assert resolve("dr_grpo", context=CONTEXT).aggregation.options["length_constant"] == 8
    method = resolve("dr_grpo")
    with pytest.raises(ValueError, match="max_tokens is not known here"):
        run(method, step(method), current(step(method)))
    assert resolve("dapo", context=CONTEXT).shaping[0].options["max_length"] == 8


def test_modifiers_stack_on_every_row():
    for row in (row for row in ROWS if methods[row].data == "rollouts"):
        spec = {"row": row, "modifiers": ["drop_truncated", {"top_entropy": {"fraction": 0.4}}, "opsm", "m2po"]}
        method = resolve(spec, context=CONTEXT)
        names = [weight.name for weight in method.token_weight]
        assert names[-2:] == ["top_entropy", "opsm"] and method.drop_truncated
        batch = step(method)
        output, gradient = run(method, batch, current(batch))
        assert output.loss.isfinite() and gradient.isfinite().all()


def test_modifiers_take_options_and_name_themselves():
    method = resolve({"row": "dapo", "modifiers": [{"tis": {"high": 3.0}}]})
    assert dict(method.correction.options) == {"level": "token", "high": 3.0} and method.modifiers == ("tis",)
    assert {"early_old", "rollout"} <= method.needs


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("grop", "there is no method 'grop'; did you mean 'grpo'"),
        ({"row": "dapo", "surrogat": "cispo"}, "unknown key 'surrogat'; did you mean 'surrogate'"),
        ({"surrogate": "ppo_clp"}, "surrogate: there is no surrogate 'ppo_clp'; did you mean 'ppo_clip'"),
        ({"surrogate": {"ppo_clip": {"hihg": 1}}}, "surrogate.ppo_clip.hihg: unknown option"),
        ({"surrogate": {"ppo_clip": {"high": "wide"}}}, "surrogate.ppo_clip.high"),
        ({"surrogate": ["ppo_clip"]}, "takes one surrogate, got a list"),
        ({"surrogate": "none"}, "surrogate: cannot be none"),
        ({"row": "dapo", "modifiers": ["tiss"]}, "there is no modifier 'tiss'; did you mean 'tis'"),
        ({"row": "dapo", "modifiers": ["tis", "icepop"]}, "correction is already truncate"),
        ({"numerator": "ref"}, "numerator: got 'ref'; allowed: old, logp"),
        ({}, "empty; name a row or give pieces"),
        ({"aggregation": "seq_mean_token_sum_norm"}, "length_constant: field required"),
        ({"surrogate": {"ppo_clip": {"high": 0.3, "dual": 1.2}}}, r"dual 1.2 must exceed 1 \+ high = 1.3"),
        ({"row": "rloo", "kl": {"coef": 0.1}}, "KL is in the reward .* and in the loss"),
        ({"shaping": ["kl_token"]}, "group does not read; use kl_sequence"),
        ({"advantage": "returns", "shaping": ["kl_token", "clip"]}, "must come after shaping of rewards"),
        ({"surrogate": "nft"}, "surrogate nft needs rewards of 0 and 1"),
        ({"row": "nft", "shaping": ["overlong"]}, "surrogate nft needs rewards of 0 and 1"),
        ({"row": "bypass_ppo", "modifiers": ["tis"]}, "already is the correction"),
        ({"row": "rloo", "modifiers": ["loglinear"]}, "reads it before the loss"),
        ({"row": "gdpo", "shaping": ["overlong"]}, "one outcome advantage per component"),
        ({"row": "drpo", "whiten": "token"}, "computed late"),
        ({"row": "copo", "whiten": "token"}, "several channels"),
        ({"row": "reinforce_pp", "whiten": "sequence"}, "needs one advantage per row"),
        ({"kl": {"mode": "token_men"}}, "kl mode 'token_men': did you mean 'token_mean'"),
        ({"kl": {"coeff": 0.1}}, "there is no KL penalty 'coeff'; .*in_loss"),
    ],
)
def test_mistakes_are_explained(spec, says):
    with pytest.raises(UserError, match=says) as caught:
        resolve(spec, where="method")
    assert str(caught.value).startswith("method")


def test_what_rows_need_from_the_learner():
    assert methods["sft"].needs == {"demonstrations"}
    assert methods["grpo"].needs == {"old", "ref"}
    assert methods["bypass_ppo"].needs == {"rollout"}
    assert methods["rloo"].needs == {"old", "early_old", "ref"}
    assert methods["ppo"].needs == {"old", "early_old", "ref", "values", "critic"}
    assert methods["bypass_reinforce"].needs == {"rollout", "late"}
    assert methods["spo"].needs == {"old"}  # a memory fills its baselines
    assert methods["a_star_po"].needs == {"ref", "baselines", "late"}
    assert methods["oreal"].needs == {"token_scores", "credit", "ref"}
    assert resolve({"row": "dapo", "modifiers": ["loglinear"]}).needs == {"rollout", "versions", "late"}
    assert "entropy_grad" in resolve({"row": "dapo", "entropy": {"coef": 0.01}}).needs


@pytest.mark.parametrize("name", [name for name in RUNNABLE if "given" not in RUNNABLE[name].needs])
def test_a_method_runs_on_what_it_says_it_needs_and_nothing_else(name):
    method = RUNNABLE[name]
    batch = step(method)
    fields = {
        **{"old": "old_logprobs", "rollout": "rollout_logprobs", "ref": "ref_logprobs", "entropy": "entropy"},
        **{"values": "values", "greedy": "greedy_rewards", "answers": "answers", "token_scores": "token_scores"},
        **{"sum_pi_sq": "sum_pi_sq", "baselines": "baselines", "bootstrap": "bootstrap", "versions": "versions"},
        **{"tempered": "tempered_logprobs", "divergence": "divergence"},
    }
    absent = {field: None for need, field in fields.items() if need not in method.needs}
    bare = step(method, truncated=None, given_advantages=None, given_weights=None, **absent)
    output, _ = run(method, bare, current(batch))
    assert output.loss.isfinite()


def test_the_table_is_whole():
    published = "grpo dapo dr_grpo lite_ppo gspo gspo_token luspo gmpo cispo sapo topr vespo dppo_tv dppo_kl rloo"
    published += " reinforce_pp reinforce_pp_baseline remax ppo ngrpo bnpo nft oreal copo gdpo gpg opo maxrl passk spo"
    published += " dro decoupled_ppo bypass_ppo bypass_reinforce drpo disco gvpo a_star_po sft"
    assert set(published.split()) <= set(methods)
    assert {"tis", "icepop", "mis", "top_entropy", "opsm"} <= set(MODIFIERS)
    assert all(row.source and row.confidence and row.about.endswith(".") for row in (ROWS | MODIFIERS).values())


def test_pieces_are_listed_with_what_they_are():
    assert all(piece.about and piece.registry.describe() for piece in PIECES.values())


def test_resolving_needs_only_core_and_torch():
    code = "import sys, algos.methods; print({m.split('.')[0] for m in sys.modules} & {'vllm', 'ray', 'transformers'})"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert out.stdout.strip() == "set()"
