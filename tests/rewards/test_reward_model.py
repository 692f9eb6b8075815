"""A reward model scores what it was trained to read: texts, padding, guards, and the mean of several (WARM)."""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from core.budget import by_budget
from core.errors import UserError
from core.registry import options_text
from rewards.reward import Samples, bind
from rewards.reward_model import check_agreement, load_classifier, read_scores, reward_model
from rewards.reward_text import Reading, read_reading, without_start
from rewards.warm import average, average_folders
from tests.tiny import PAD, tiny_policy, tiny_tokenizer
from tests.tiny_classifiers import changed, tiny_decoder, tiny_encoder

QUESTIONS = ["what is the colour of the sky", "help me", "help me", "1 2 3 4 5 6 7 8 9", "what"]
ANSWERS = ["blue", "go away and help you", "please thanks", "red " * 20, ""]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    return tiny_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def decoder(tmp_path_factory) -> Path:
    return tiny_decoder(tmp_path_factory.mktemp("decoder"))


@pytest.fixture
def copied(tmp_path, encoder, decoder):
    """A copy of one of the two, to be spoilt."""
    folders = {"encoder": encoder, "decoder": decoder}
    return lambda name: shutil.copytree(folders[name], tmp_path / name)


def ready(folder: Path, **options) -> reward_model:
    made = reward_model(path=str(folder), device="cpu", **options)
    made.prepare()
    return made


def refusal(folder: Path, **options) -> str:
    with pytest.raises(UserError) as error:
        ready(folder, **options)
    return str(error.value)


# ---------------------------------------------------------------- scores
@pytest.mark.parametrize("kind", ["encoder", "decoder"])
@pytest.mark.parametrize("budget", [1, 60, 10_000])
def test_a_score_does_not_depend_on_its_batch(kind, budget, request) -> None:
    folder = request.getfixturevalue(kind)
    made = ready(folder, batch_tokens=budget)
    together = made(QUESTIONS, ANSWERS)
    alone = [made([question], [answer])[0] for question, answer in zip(QUESTIONS, ANSWERS, strict=True)]
    assert together == pytest.approx(alone, abs=1e-5)
    assert len({round(score, 3) for score in together}) == 5  # the model does tell them apart


def test_an_encoder_scores_the_pair_of_texts_as_transformers_does(encoder) -> None:
    model, tokenizer = load_classifier(str(encoder), "float32", "cpu")
    inputs = tokenizer("help me", "please thanks", return_tensors="pt")
    assert inputs["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1, 1]]
    assert ready(encoder)(["help me"], ["please thanks"]) == pytest.approx(model(**inputs).logits[0].tolist())


def test_a_decoder_scores_the_chat_template_as_transformers_does(decoder) -> None:
    model, tokenizer = load_classifier(str(decoder), "float32", "cpu")
    inputs = tokenizer("<|user|>help me<|assistant|>thanks<|end|>", return_tensors="pt")
    assert ready(decoder)(["help me"], ["thanks"]) == pytest.approx(model(**inputs).logits[0].tolist())


def test_the_question_is_the_column_else_the_prompt_as_text_or_as_messages(decoder) -> None:
    made = ready(decoder)
    (expected,) = made(["help me"], ["thanks"])
    chat = [{"role": "user", "content": "help me"}], [{"role": "assistant", "content": "thanks"}]
    assert made([chat[0]], [chat[1]]) == [expected]
    assert made(["<|user|>help me<|assistant|>"], ["thanks"], question=["help me"]) == [expected]
    other = ready(decoder, question_column="q")
    assert other(["rendered"], ["thanks"], q=["help me"]) == [expected]
    with pytest.raises(LookupError, match="no column 'q'"):
        other(["rendered"], ["thanks"], question=["help me"])


def test_the_head_stays_in_float32(copied) -> None:
    from safetensors.torch import load_file, save_file

    folder = copied("encoder")
    state = load_file(folder / "model.safetensors")
    state["classifier.bias"] += 100  # in bfloat16 the scores there are 100, 100.5, 101 ...
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    scores = ready(folder, dtype="bfloat16")(QUESTIONS, ANSWERS)
    assert scores == pytest.approx(ready(folder)(QUESTIONS, ANSWERS), abs=0.1)
    assert len(set(scores)) == 5 and any(abs(2 * score - round(2 * score)) > 0.01 for score in scores)


def test_a_score_that_is_no_number_raises_and_is_never_none(copied) -> None:
    from safetensors.torch import load_file, save_file

    folder = copied("encoder")
    state = load_file(folder / "model.safetensors")
    state["bert.embeddings.word_embeddings.weight"][4 + 5] = math.nan  # the word "is"
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    made = ready(folder)
    with pytest.raises(ValueError, match="nan to completion 1: 'sky is blue'"):
        made(["what", "what"], ["blue", "sky is blue"])
    reward = bind("reward_model", {"path": str(folder), "device": "cpu"}, "rewards.helpful")
    reward.prepare()
    (score,) = reward.score_all(Samples("what", {}, ["sky is blue"], [[1]], [False]))
    assert score.status == "error" and reward.pool


def test_options_are_the_documented_ones() -> None:
    assert options_text(reward_model) == (
        "path, backend=transformers, device=auto, dtype=float32, batch_tokens=16384, max_tokens=None, "
        "question_column=question, gpu_memory_utilization=0.9"
    )
    with pytest.raises(UserError, match=r"rewards\.helpful\.backend"):
        bind("reward_model", {"path": "x/y", "backend": "trl"}, "rewards.helpful")


def test_batches_hold_a_budget_of_padded_tokens() -> None:
    assert by_budget([3, 9, 2, 3], 9) == [[1], [0, 3, 2]]
    assert by_budget([5, 12, 5], 10) == [[1], [0, 2]] and by_budget([], 10) == []


# ---------------------------------------------------------------- what is read
def test_a_long_prompt_loses_its_start_and_the_answer_nothing(tmp_path) -> None:
    tokenizer = tiny_tokenizer(tmp_path)
    whole, short = (Reading(tokenizer, "chat", limit) for limit in (200, 16))
    prompt = [{"role": "user", "content": "bcdfghjklmpquvwx"}]
    # <|user|> 16 letters <|assistant|> 5 letters <|end|> is 24 tokens, 8 too many
    assert tokenizer.decode(whole.encode(prompt, "ABCDE")["input_ids"]) == (
        "<|user|>bcdfghjklmpquvwx<|assistant|>ABCDE<|end|>"
    )
    assert tokenizer.decode(short.encode(prompt, "ABCDE")["input_ids"]) == "<|user|>lmpquvwx<|assistant|>ABCDE<|end|>"
    # An answer that has no room even without a prompt keeps its end.
    assert tokenizer.decode(short.encode(prompt, "ABCDEFGHIJKLMNOPQRS")["input_ids"]) == (
        "<|user|><|assistant|>GHIJKLMNOPQRS<|end|>"
    )
    with pytest.raises(UserError, match="max_tokens 2 has no room"):
        Reading(tokenizer, "chat", 2).encode(prompt, "x")


def test_an_encoder_keeps_its_first_token_and_the_end_of_the_answer(encoder) -> None:
    _, tokenizer = load_classifier(str(encoder), "float32", "cpu")
    encoded = Reading(tokenizer, "pair", 8).encode([{"role": "user", "content": "1 2 3 4 5 6"}], "red blue sky")
    assert tokenizer.decode(encoded["input_ids"]) == "[CLS] 5 6 [SEP] red blue sky [SEP]"
    assert encoded["token_type_ids"] == [0, 0, 0, 0, 1, 1, 1, 1]


def test_a_character_of_several_tokens_goes_as_a_whole(tmp_path) -> None:
    tokenizer = tiny_tokenizer(tmp_path)
    assert len(tokenizer("ü")["input_ids"]) == 2
    assert [without_start(tokenizer, "üäb", count) for count in (1, 2, 3, 4, 5)] == ["äb", "äb", "äb", "b", ""]
    # <|user|> üäb <|assistant|> x <|end|> is 9 tokens; of 3 too many the first two are ü and the third begins ä
    short = Reading(tokenizer, "chat", 6).encode([{"role": "user", "content": "üäb"}], "x")
    assert tokenizer.decode(short["input_ids"]) == "<|user|>b<|assistant|>x<|end|>"


def test_a_decoder_without_template_reads_one_text_that_ends_with_the_end(tmp_path) -> None:
    tokenizer = load_classifier(str(tiny_decoder(tmp_path, template=False)), "float32", "cpu")[1]
    reading = read_reading(str(tmp_path), tokenizer, None, decoder=True)
    messages = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}]
    assert tokenizer.decode(reading.encode(messages, "yes")["input_ids"]) == "be kind\n\nhi\n\nyes<|end|>"
    assert read_reading(str(tmp_path), tokenizer, None, decoder=False).form == "pair"


def test_a_template_that_does_not_close_the_answer_gets_the_end(tmp_path) -> None:
    tokenizer = tiny_tokenizer(tmp_path)
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'][:1] }}: {{ m['content'] }}{% endfor %}"
    ids = Reading(tokenizer, "chat", 100).encode([{"role": "user", "content": "hi"}], "yes")["input_ids"]
    assert tokenizer.decode(ids) == "u: hia: yes<|end|>"
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}<|end|>\n{% endfor %}"
    ids = Reading(tokenizer, "chat", 100).encode([{"role": "user", "content": "hi"}], "yes")["input_ids"]
    assert tokenizer.decode(ids) == "hi<|end|>\nyes<|end|>\n"


def test_another_tokenizer_than_in_training_is_refused(copied) -> None:
    folder = copied("decoder")
    made = ready(folder)
    made._reading.save(folder)
    assert ready(folder)(["a"], ["b"]) == made(["a"], ["b"])
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|user|>", ""))
    assert "makes other tokens of a text than in training" in refusal(folder)


def test_the_folder_says_how_long_a_text_may_be(copied) -> None:
    folder = copied("decoder")
    Reading(load_classifier(str(folder), "float32", "cpu")[1], "joined", 40).save(folder)
    assert (ready(folder)._reading.form, ready(folder)._reading.max_tokens) == ("joined", 40)
    assert ready(folder, max_tokens=64)._reading.max_tokens == 64
    changed(folder, "reward_model.json", form="prose")
    assert "form is one of chat, pair, joined" in refusal(folder)


# ---------------------------------------------------------------- what is refused
def test_a_folder_that_holds_no_reward_model_is_refused_before_anything_is_loaded(tmp_path, copied) -> None:
    def said(path: object) -> str:
        with pytest.raises(UserError) as error:
            reward_model(path=str(path))
        return str(error.value)

    assert "there is no folder" in said(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "no config.json" in said(tmp_path / "empty")
    policy = tiny_policy(tmp_path / "policy")
    assert "Qwen3ForCausalLM, which has no head for scores" in said(policy) and "fit-reward" in said(policy)
    folder = copied("encoder")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "no .safetensors" in said(folder)
    reward_model(path="organisation/model")  # the hub's, perhaps


def test_a_head_that_the_files_do_not_hold_is_refused(copied) -> None:
    from safetensors.torch import load_file, save_file

    folder = copied("encoder")
    state = load_file(folder / "model.safetensors")
    del state["classifier.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    assert "lack classifier.weight, which would be random numbers" in refusal(folder)
    assert load_classifier(str(folder), "float32", "cpu", new_head=True)
    del state["bert.encoder.layer.1.output.dense.bias"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"--base: the files of .* lack bert\.encoder\.layer\.1\.output\.dense\.bias, "):
        load_classifier(str(folder), "float32", "cpu", new_head=True, where="--base")


def test_a_classifier_of_two_labels_is_refused(tmp_path) -> None:
    assert "has 2 labels; a reward model has one" in refusal(tiny_encoder(tmp_path, labels=2))


def test_texts_beyond_the_positions_are_refused(encoder) -> None:
    assert "max_tokens 49" in refusal(encoder, max_tokens=49) and ready(encoder, max_tokens=48)


def test_a_pad_token_that_ends_the_texts_is_refused_and_a_missing_one_is_taken_from_the_tokenizer(tmp_path) -> None:
    folder = tiny_decoder(tmp_path / "end", pad_token_id=1)
    assert "the pad token of" in refusal(folder) and "one token early" in refusal(folder)
    plain, none = tiny_decoder(tmp_path / "plain"), tiny_decoder(tmp_path / "none", pad_token_id=None)
    assert ready(none)(QUESTIONS, ANSWERS) == pytest.approx(ready(plain)(QUESTIONS, ANSWERS), abs=1e-5)
    tokenizer = tiny_tokenizer(none)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(none)
    assert "has no pad token" in refusal(none) and PAD


def test_scores_of_vllm_that_are_not_those_of_transformers_are_refused() -> None:
    check_agreement([0.0, 1.0], [0.05, 0.95], "m")
    for other in ([0.0, 1.2], [0.5, 0.73], [0.0, math.nan]):  # 0.5 and 0.73 are the sigmoids
        with pytest.raises(UserError, match="use backend: transformers"):
            check_agreement([0.0, 1.0], other, "m")


@pytest.mark.real
@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_vllm_gives_the_same_scores(kind, request) -> None:
    folder = request.getfixturevalue(kind)
    code = (
        "import sys; from rewards.reward_model import reward_model as m\n"
        "r = m(path=sys.argv[1], backend='vllm', device='cpu'); r.prepare()\n"
        "print('scores', r(['help me', 'what is the sky'], ['thanks', 'blue and red']))"
    )
    done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    found = [float(x) for x in done.stdout.split("scores [")[1].split("]")[0].split(",")]
    assert found == pytest.approx(ready(folder)(["help me", "what is the sky"], ["thanks", "blue and red"]), abs=1e-3)


# ---------------------------------------------------------------- WARM
def test_the_mean_of_models_is_the_mean_of_their_parameters(tmp_path) -> None:
    members = [tiny_encoder(tmp_path / str(seed), seed) for seed in range(3)]
    average_folders(members, tmp_path / "mean")
    models = [load_classifier(str(folder), "float32", "cpu")[0] for folder in (*members, tmp_path / "mean")]
    for name, found in models[-1].state_dict().items():
        mean = sum(model.state_dict()[name].double() for model in models[:3]) / 3
        assert torch.equal(found, mean.to(found.dtype)), name
    assert ready(tmp_path / "mean")(QUESTIONS, ANSWERS) != ready(members[0])(QUESTIONS, ANSWERS)


def test_a_mean_by_hand_keeps_the_precision_and_whole_numbers() -> None:
    one = {"w": torch.tensor([1.0, 2.0]), "n": torch.tensor([7]), "b": torch.tensor([256.0], dtype=torch.bfloat16)}
    two = {"w": torch.tensor([3.0, 6.0]), "n": torch.tensor([7]), "b": torch.tensor([260.0], dtype=torch.bfloat16)}
    mean = average([one, two])
    assert mean["w"].tolist() == [2, 4] and mean["n"].tolist() == [7] and mean["b"].dtype == torch.bfloat16
    with pytest.raises(ValueError, match="n holds whole numbers that differ"):
        average([one, two | {"n": torch.tensor([8])}])
    with pytest.raises(ValueError, match="parameter b is not in all"):
        average([one, {"w": two["w"], "n": two["n"]}])
    with pytest.raises(ValueError, match="w has the shapes"):
        average([one, two | {"w": torch.zeros(3)}])


def test_models_that_have_no_mean_are_refused(tmp_path, encoder, decoder, copied) -> None:
    def said(*folders: Path, out: Path = tmp_path / "mean") -> str:
        with pytest.raises(UserError) as error:
            average_folders(folders, out)
        assert not (out / "model.safetensors").exists()
        return str(error.value)

    assert "two or more" in said(encoder)
    assert "only models of one architecture" in said(encoder, decoder)
    assert "holds no config.json" in said(encoder, tmp_path / "nowhere")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    assert "is not empty" in said(encoder, encoder, out=tmp_path / "full")
    other = copied("encoder")
    ready(encoder)._reading.save(other)
    assert "one way of reading" in said(encoder, other)


def test_gradients_reach_the_model_through_the_scores(encoder) -> None:
    model, tokenizer = load_classifier(str(encoder), "float32", "cpu")
    reading = read_reading(str(encoder), tokenizer, model.config, decoder=False)
    rows = [reading.encode([{"role": "user", "content": "what"}], answer) for answer in ("blue", "red and blue")]
    read_scores(model, rows).sum().backward()
    assert model.classifier.bias.grad.tolist() == [2]  # one for each text
