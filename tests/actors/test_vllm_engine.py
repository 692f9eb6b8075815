"""The real vLLM engine, against transformers as the oracle. All tests share one engine in this process."""

from __future__ import annotations

import copy
import gc
import itertools
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from actors.engine import EngineSpec, Rejected
from actors.weights import Broadcast, Checksum, Interrupted, Refused, layout, snapshot
from core.schema import Completion, Group, GroupRequest, Prompt, Sampling
from tests.tiny import tiny_policy

pytestmark = pytest.mark.real
TOLERANCE = 1e-3  # nats; float32 on both sides
PROMPT = (2, 272, 14, 294, 32, 3)  # <|user|>12+34=<|assistant|>
VERSIONS = itertools.count(1)


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return tiny_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="module")
def model(policy):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def engine(policy):
    environment = dict(os.environ)  # vLLM sets LD_PRELOAD and more, which is not meant for the tests that follow
    from actors.vllm_engine import make

    engine = make(EngineSpec(model=str(policy), max_model_len=256, max_num_seqs=64, kv_cache_gib=0.25))
    yield engine
    engine.close()
    os.environ.clear()
    os.environ.update(environment)


def request(name: str, seeds=range(4), prompt=PROMPT, **sampling) -> GroupRequest:
    return GroupRequest(name, Prompt(0, "", tuple(prompt)), tuple(seeds), Sampling(**{"max_tokens": 24, **sampling}))


def generate(engine, *requests: GroupRequest) -> dict[str, Group]:
    for each in requests:
        engine.add(each)
    return drain(engine)


def drain(engine) -> dict[str, Group]:
    groups = []
    while sum(engine.unfinished()):
        groups += engine.step()
    return {group.id: group for group in groups}


def oracle(model, prompt, completion: Completion, temperature: float = 1.0) -> torch.Tensor:
    """Log-probabilities [tokens, vocabulary] before each token of the completion, by transformers."""
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *completion.token_ids]])).logits[0]
    return (logits[len(prompt) - 1 : -1].double() / temperature).log_softmax(-1)


def worst(model, group: Group, temperature: float = 1.0) -> float:
    """The largest difference between the engine's and the oracle's log-probabilities of the sampled tokens."""
    differences = []
    for c in group.completions:
        want = oracle(model, group.prompt.token_ids, c, temperature).gather(-1, torch.tensor(c.token_ids)[:, None])[
            :, 0
        ]
        differences.append((want - torch.tensor(c.rollout_logprobs)).abs().max().item())
    return max(differences)


def changed(model, scale: float = 0.03):
    """Another policy of the same shape."""
    other, noise = copy.deepcopy(model), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=noise) * scale)
    return other


def weights_of(model, version: int | None = None):
    return snapshot(model.named_parameters(), next(VERSIONS) if version is None else version, "float32")


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_are_those_of_the_distribution_that_was_sampled_from(engine, model, temperature):
    engine.update_weights(weights_of(model))
    group = generate(engine, request("a", seeds=range(8), temperature=temperature))["a"]
    assert worst(model, group, temperature) < TOLERANCE
    assert worst(model, group, temperature * 2) > 100 * TOLERANCE  # so the temperature does matter


def test_truncated_sampling_has_the_logprobs_of_the_truncated_distribution(engine):
    group = generate(engine, request("a", top_k=1), request("b", top_k=2))
    assert (
        max(abs(p) for c in group["a"].completions for p in c.rollout_logprobs) < 1e-6
    )  # one candidate: probability 1
    assert min(p for c in group["b"].completions for p in c.rollout_logprobs) > -12


def test_greedy_takes_the_likeliest_token_and_reports_its_probability_at_temperature_1(engine, model):
    engine.update_weights(weights_of(model))
    group = generate(engine, request("a", seeds=(1, 2), temperature=0.0))["a"]
    first, second = group.completions
    assert first.token_ids == second.token_ids
    assert tuple(oracle(model, PROMPT, first).argmax(-1).tolist()) == first.token_ids
    assert worst(model, group) < TOLERANCE


def test_a_greedy_completion_comes_beside_the_samples_if_asked_for(engine):
    both = replace(request("with", seeds=(1, 2)), greedy=True)
    groups = generate(engine, both, request("without", seeds=(1, 2)), request("alone", seeds=(0,), temperature=0.0))
    assert groups["with"].completions == groups["without"].completions
    assert groups["with"].greedy.completions == groups["alone"].completions and groups["alone"].greedy is None
    engine.add(both)
    engine.abort(["with"])
    assert engine.unfinished() == (0, 0)


def test_a_sample_depends_on_its_seed_alone(engine):
    alone = generate(engine, request("a", seeds=(5,)))["a"].completions[0]
    crowd = generate(engine, request("b", seeds=(9, 5, 7)), request("c", prompt=(*PROMPT, 20)))["b"].completions
    assert crowd[1].token_ids == alone.token_ids
    assert len({c.token_ids for c in crowd}) == 3


def test_tokens_text_and_reasons_go_together(engine):
    group = generate(engine, request("a", seeds=range(32), max_tokens=60))["a"]
    end = engine._tokenizer.eos_token_id
    assert {c.finish_reason for c in group.completions} == {"stop", "length"}
    for c in group.completions:
        assert len(c.token_ids) == len(c.rollout_logprobs) == len(c.versions)
        assert (c.token_ids[-1] == end) == (c.finish_reason == "stop") and end not in c.token_ids[:-1]
        assert (len(c.token_ids) == 60) or c.finish_reason == "stop"
        assert c.text == engine._tokenizer.decode(c.token_ids, skip_special_tokens=True) and "<|end|>" not in c.text


def test_ignoring_the_end_token_gives_every_completion_its_full_length(engine):
    group = generate(engine, request("a", seeds=range(8), max_tokens=60, ignore_eos=True))["a"]
    assert {len(c.token_ids) for c in group.completions} == {60}


def test_a_stop_string_ends_a_completion_and_stays_in_its_text(engine):
    whole = generate(engine, request("a", seeds=(3,)))["a"].completions[0]
    stop = engine._tokenizer.decode(whole.token_ids[5:8])
    cut = generate(engine, request("a", seeds=(3,), stop=(stop,)))["a"].completions[0]
    assert cut.finish_reason == "stop" and cut.text.endswith(stop)
    assert cut.token_ids == whole.token_ids[: len(cut.token_ids)] and len(cut.token_ids) <= 8


def test_new_weights_serve_at_once_with_their_version_and_digest(engine, model):
    other = changed(model)
    weights = weights_of(other)
    assert engine.update_weights(weights) == weights.digest == engine.digest
    assert engine._llm.get_weight_version() == str(weights.version)  # vLLM agrees
    group = generate(engine, request("a"))["a"]
    assert worst(other, group) < TOLERANCE < worst(model, group)
    assert {v for c in group.completions for v in c.versions} == {weights.version}


def test_a_flipped_byte_is_refused_and_the_old_weights_serve_on(engine, model):
    engine.update_weights(good := weights_of(model))
    bad = weights_of(changed(model))
    embedding = bad.pieces[0].copy()
    embedding[len(embedding) // 2] ^= 1
    with pytest.raises(Refused, match="changed on the way"):
        engine.update_weights(replace(bad, pieces=(embedding, *bad.pieces[1:])))
    with pytest.raises(Refused, match="other names or shapes"):
        engine.update_weights(snapshot(list(model.named_parameters())[1:], 9, "float32"))
    with pytest.raises(Refused, match="not by nccl"):
        engine.update_weights(Broadcast(9, ()))
    assert (engine.version, engine.digest) == (good.version, good.digest)
    group = generate(engine, request("a"))["a"]
    assert worst(model, group) < TOLERANCE and {v for c in group.completions for v in c.versions} == {good.version}


def test_weights_that_change_in_flight_label_the_later_tokens(engine, model):
    engine.update_weights(before := weights_of(model))
    engine.add(request("a", seeds=(1, 2), ignore_eos=True))
    for _ in range(10):
        engine.step()
    engine.update_weights(after := weights_of(changed(model)))
    for c in drain(engine)["a"].completions:
        assert c.versions == (before.version,) * 10 + (after.version,) * 14


def test_a_prefix_cached_under_old_weights_is_not_used_under_new_ones(engine, model):
    prompt = (*PROMPT, *range(10, 180))  # longer than a cache block
    engine.update_weights(weights_of(model))
    engine.add(request("old", prompt=prompt, ignore_eos=True))
    engine.step(), engine.step()  # its prefix is cached, and held while it is in flight
    other = changed(model)
    engine.update_weights(weights_of(other))
    assert worst(other, generate(engine, request("new", prompt=prompt))["new"]) < TOLERANCE


def test_the_same_batch_after_the_same_update_is_bit_equal(engine, model):
    batch = [request(str(i), prompt=(*PROMPT, 10 + i), seeds=range(4 * i, 4 * i + 4)) for i in range(12)]
    runs = []
    for _ in range(2):
        engine.update_weights(weights_of(model, version=77))
        runs.append(generate(engine, *batch))
    assert runs[0] == runs[1]


def test_on_cpu_a_completion_does_not_depend_on_what_else_is_in_the_batch(engine):
    """What rollout.deterministic stands on: after a failure groups are sampled again in other company."""
    others = [request(f"other{i}", seeds=range(8), prompt=(*PROMPT[:-1], 10 + i, 3)) for i in range(7)]
    together, alone = generate(engine, *others, request("g"))["g"], generate(engine, request("g"))["g"]
    assert together.completions == alone.completions


def test_a_request_that_cannot_fit_is_rejected_and_one_that_nobody_wants_is_forgotten(engine):
    with pytest.raises(Rejected, match=r"need 274, but actors\.max_model_len is 256"):
        engine.add(request("long", prompt=PROMPT * 40, max_tokens=34))
    with pytest.raises(Rejected, match="request odd"):
        engine.add(request("odd", prompt=(10_000,)))  # no such token
    engine.add(request("a"))
    engine.step()
    engine.abort(["a"])
    assert engine.unfinished() == (0, 0)
    engine.add(request("b", max_tokens=60, ignore_eos=True))
    engine.step()
    second = replace(request("b"), attempt=1)  # given again after its first actor was presumed dead
    assert generate(engine, second)["b"].attempt == 1


def test_generated_tokens_count_those_in_flight(engine):
    before = engine.generated()
    engine.add(request("a", seeds=(1, 2), max_tokens=10, ignore_eos=True))
    for _ in range(4):
        engine.step()
    assert engine.generated() - before == 8
    drain(engine)
    assert engine.generated() - before == 20


def test_weights_are_prepared_beside_steps_and_change_nothing_before_they_serve(engine, model):
    engine.update_weights(before := weights_of(model))
    alone = generate(engine, request("a", seeds=range(8), max_tokens=60, ignore_eos=True))["a"]
    with ThreadPoolExecutor(1) as thread:
        engine.add(request("a", seeds=range(8), max_tokens=60, ignore_eos=True))
        other = changed(model)
        after, ready = weights_of(other), []
        for _ in range(58):
            if not ready or ready[-1].done():
                ready.append(thread.submit(engine.prepare, after))
            engine.step()
        assert len(ready) > 1 and engine.version == before.version
        engine.update_weights(ready[-1].result())
        beside = drain(engine)["a"]
    for c, d in zip(alone.completions, beside.completions, strict=True):
        assert d.versions == (before.version,) * 58 + (after.version,) * 2
        assert c.token_ids[:58] == d.token_ids[:58] and c.rollout_logprobs[:58] == d.rollout_logprobs[:58]
    assert worst(other, generate(engine, request("b"))["b"]) < TOLERANCE


def test_old_weights_are_freed_at_once(engine, model):
    """Not when Python looks for cycles: a set of weights is as large as the model."""
    from vllm._custom_ops import CPUDNNLGEMMHandler

    counts = []
    gc.collect(), gc.disable()
    try:
        for _ in range(3):
            engine.update_weights(weights_of(model))
            counts.append(sum(isinstance(each, CPUDNNLGEMMHandler) for each in gc.get_objects()))
    finally:
        gc.enable()
    assert counts[0] > 0 and len(set(counts)) == 1


def adapters(seed: int = 0) -> dict[str, torch.Tensor]:
    """Of two parameters of the policy, and its last norm as a whole."""
    draw = torch.Generator().manual_seed(seed)

    def pair(name: str, rows: int, columns: int) -> dict[str, torch.Tensor]:
        a, b = torch.randn(2, columns, generator=draw), torch.randn(rows, 2, generator=draw)
        return {f"{name}.lora_A": a * 0.1, f"{name}.lora_B": b * 0.1}

    return {
        **pair("model.layers.0.self_attn.q_proj.weight", 128, 128),
        **pair("model.layers.2.mlp.down_proj.weight", 128, 384),
        "model.norm.weight": torch.full((128,), 1.5),
    }


def with_adapters(model, given: dict[str, torch.Tensor]):
    """The policy as peft would merge it."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if name in given:
                parameter.copy_(given[name])
            elif f"{name}.lora_A" in given:
                parameter += given[f"{name}.lora_B"] @ given[f"{name}.lora_A"]
    return other


@pytest.fixture
def takes_other_names(engine, monkeypatch):
    """A run trains adapters or it does not, so an engine refuses the one after the other: not here."""
    monkeypatch.setattr(engine, "_layout", {})
    yield
    engine._layout = {}


def test_adapters_alone_make_the_same_weights_as_all_of_them_merged(engine, model, takes_other_names):
    given = adapters()
    other = with_adapters(model, given)
    weights = snapshot(given.items(), next(VERSIONS))
    assert weights.nbytes < 0.05 * weights_of(model).nbytes
    assert engine.update_weights(weights) == weights.digest
    alone = generate(engine, request("a"))["a"]
    engine._layout = {}
    engine.update_weights(weights_of(other))
    whole = generate(engine, request("a"))["a"]
    assert worst(other, alone) < TOLERANCE < worst(model, alone)
    for c, d in zip(alone.completions, whole.completions, strict=True):
        assert c.token_ids == d.token_ids and c.rollout_logprobs == pytest.approx(d.rollout_logprobs, abs=1e-5)


def test_adapters_add_to_the_models_own_weights_and_not_to_the_last_ones(engine, model, takes_other_names):
    for seed in (1, 2):
        engine.update_weights(snapshot(adapters(seed).items(), next(VERSIONS)))
    assert worst(with_adapters(model, adapters(2)), generate(engine, request("a"))["a"]) < TOLERANCE


def test_an_adapter_for_a_parameter_that_the_model_lacks_is_refused(engine, takes_other_names):
    version = engine.version
    lost = snapshot([("lm_head.weight.lora_A", torch.ones(1, 128)), ("lm_head.weight.lora_B", torch.ones(400, 1))], 3)
    with pytest.raises(Refused, match=r"an adapter for 'lm_head\.weight' which the engine's own model lacks"):
        engine.update_weights(lost)
    assert engine.version == version


def test_a_snapshot_reaches_other_processes_through_a_file(engine, model):
    """Workers in other processes read the buffer from a file; the same worker code serves both ways."""
    from actors.vllm_weights import snapshot_info

    other = changed(model)
    weights = weights_of(other)
    with snapshot_info(weights, processes=2) as info:
        assert info["snapshot"].pieces == () and os.path.getsize(info["path"]) >= weights.nbytes
        engine._update(info)
        path = info["path"]
    assert not os.path.exists(path)
    engine._llm.reset_prefix_cache()
    assert worst(other, generate(engine, request("a"))["a"]) < TOLERANCE
    engine.update_weights(weights_of(model))


def test_a_late_joiner_loads_a_snapshot_without_the_configured_transfer(engine, model):
    from actors.vllm_weights import snapshot_info

    other = changed(model)
    with snapshot_info(weights_of(other), processes=1) as info:
        engine._llm.collective_rpc("load_snapshot", args=(info,))
    engine._llm.reset_prefix_cache()
    assert worst(other, generate(engine, request("a"))["a"]) < TOLERANCE
    engine.update_weights(weights_of(model))


@pytest.fixture
def receiver(engine, monkeypatch):
    """The engine takes broadcasts; what comes over the wire is what `receiver.comes` yields."""
    from actors.vllm_nccl import NcclReceiver

    def consumer(iterator, group, src, post_unpack_func, **_):
        for part in receiver.comes:
            post_unpack_func(part)

    (worker,) = engine._llm.collective_rpc(lambda wrapper: wrapper.worker)
    receiver = NcclReceiver(None, worker.vllm_config, worker.device, worker.model_runner.get_model())
    monkeypatch.setattr(worker, "weight_transfer_engine", receiver)
    receiver.packed, receiver.model_update_group = True, SimpleNamespace(destroy=lambda: None)
    module = "vllm.distributed.weight_transfer.nccl_engine"
    monkeypatch.setattr(f"{module}.packed_nccl_broadcast_consumer", consumer)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: None)
    monkeypatch.setattr(engine, "spec", replace(engine.spec, weight_transfer="nccl"))
    return receiver


def test_a_broadcast_that_stops_halfway_is_mended_by_a_snapshot(engine, model, receiver):
    engine.update_weights(weights_of(model))
    other = changed(model)
    tensors = [(name, p.detach()) for name, p in other.named_parameters()]

    def halfway():
        cut = [name for name, _ in tensors].index("model.layers.1.self_attn.q_proj.weight") + 1
        yield tensors[:cut]  # a third of what becomes one parameter in vLLM
        raise RuntimeError("NCCL error: remote process exited")

    with pytest.raises(Refused, match="the NCCL group was not joined"):
        engine.connect("127.0.0.1", 1, rank=1, world_size=2, seconds=1.0)  # without a GPU
    assert engine.version > 0
    receiver.model_update_group = SimpleNamespace(destroy=lambda: None)
    receiver.comes = halfway()
    with pytest.raises(Interrupted, match=r"version 5 was interrupted: .*remote process exited"):
        engine.update_weights(Broadcast(5, layout(tensors)))
    assert (engine.version, engine.digest) == (-1, "")
    engine.update_weights(after := weights_of(other))
    assert engine.version == after.version and worst(other, generate(engine, request("a"))["a"]) < TOLERANCE


def test_a_broadcast_is_served_with_the_digest_of_what_came(engine, model, receiver):
    from actors.vllm_nccl import CHECKSUMS

    tensors, checksum = [(name, p.detach()) for name, p in model.named_parameters()], Checksum()
    for name, tensor in tensors:
        checksum.add(name, tensor)
    receiver.comes = [tensors[:3], tensors[3:], [(CHECKSUMS, checksum.sums())]]
    assert engine.update_weights(Broadcast(6, layout(tensors))) == checksum.digest() == engine.digest
    assert engine.version == 6 and engine._llm.get_weight_version() == "6"
    # A head tied to the embedding is packed again after a snapshot only, which matters to CPU kernels only.
    engine.update_weights(weights_of(model))
    assert worst(model, generate(engine, request("a"))["a"]) < TOLERANCE


def through(wire: torch.Tensor, part: list[tuple[str, torch.Tensor]]) -> list[tuple[str, torch.Tensor]]:
    """Tensors in the buffer in which vLLM receives one part after the other."""
    found, offset = [], 0
    for name, tensor in part:
        piece = wire[offset : offset + tensor.nbytes].view(tensor.dtype).copy_(tensor.flatten())
        found.append((name, piece.view(tensor.shape)))
        offset += tensor.nbytes
    return found


def test_broadcast_adapters_are_merged_when_all_have_come(engine, model, receiver, takes_other_names):
    from actors.vllm_nccl import CHECKSUMS

    given, checksum = adapters(), Checksum()
    for name, tensor in given.items():
        checksum.add(name, tensor)
    tensors, wire = list(given.items()), torch.empty(2**16, dtype=torch.uint8)

    def parts():
        for part in (tensors[:1], tensors[1:], [(CHECKSUMS, checksum.sums())]):  # A and B of one come apart
            yield through(wire, part)

    receiver.comes = parts()
    assert engine.update_weights(Broadcast(7, layout(tensors))) == checksum.digest()
    engine._layout = {}
    engine.update_weights(snapshot(given.items(), 8))  # packs the tied head again, see above
    assert worst(with_adapters(model, given), generate(engine, request("a"))["a"]) < TOLERANCE


def test_importing_the_folder_loads_no_heavy_library():
    import subprocess
    import sys

    heavy = "[m for m in ('vllm', 'torch', 'ray') if m in sys.modules]"
    code = f"import sys, actors.pool, actors.vllm_engine; print({heavy})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
