"""The audit is green for what a run can leave behind, killed anywhere, and finds each thing that must not happen."""

import argparse
import hashlib
import json
import re
from dataclasses import replace

import pytest

from alignlab.audit import audit, audit_run, summary
from alignlab.ledger import Ledger, read_ledger
from alignlab.payloads import Payloads, pack_rollout, pack_scores, pack_step
from core.errors import UserError
from core.schema import Completion, Group, Mixture, Prompt, group_id

BEGIN = {
    "attempt": 0, "seed": 0, "prompts": 2, "group_size": 2, "steps": 2, "max_staleness": 1, "deterministic": False,
    "from_step": 0, "offset": 0, "reason": "start", "max_age": None,
}  # fmt: skip


def rollout(group, version=0, tokens=3):
    """Two completions, of `tokens` - 1 tokens and of one."""
    lengths = (tokens - 1, 1)
    each = tuple(Completion((7,) * n, (-0.5,) * n, (version,) * n, "x" * n, "stop") for n in lengths)
    return Group(group_id(0, group), Prompt(group, "2+3?", (5,)), each)


class Story:
    """Writes the files of a run as a run does. P is 2, G is 2, a group has 3 tokens.

    edit: what is written in the place of a record, as a list; for what must not happen.
    """

    def __init__(self, folder, edit=lambda record: [record], after=lambda: None):
        self.folder, self.edit, self.after = folder, edit, after
        self.store = Payloads(folder / "payloads")
        (folder / "rollouts").mkdir(parents=True, exist_ok=True)
        self.ledger = Ledger.open(folder / "ledger.jsonl")
        self.groups = {}  # ordinal -> as sampled
        self.state = {}  # of the coordinator, for manifests

    def say(self, kind, **fields):
        self.ledger.append(self.edit({"kind": kind, **fields}))
        self.after()

    def begin(self, **changes):
        self.say("begin", **{**BEGIN, **changes})

    def admit(self, *groups, version=0):
        for group in groups:
            self.say("admitted", group=group, version=version)

    def lease(self, group, actor="a", incarnation=0, attempt=0):
        self.say("leased", group=group, actor=actor, incarnation=incarnation, attempt=attempt)

    def done(self, group, actor="a", incarnation=0, attempt=0, version=0, tokens=3):
        self.groups[group] = rollout(group, version, tokens)
        payload = self.store.put(pack_rollout(self.groups[group]))
        lease = {"actor": actor, "incarnation": incarnation, "attempt": attempt}
        self.say("done", group=group, **lease, payload=payload, tokens=tokens, oldest=version)

    def reuse(self, group):
        payload = self.store.put(pack_rollout(self.groups[group]))
        self.say("reused", group=group, payload=payload, tokens=3, oldest=self.groups[group].completions[0].versions[0])

    def score(self, *groups):
        for group in groups:
            self.say("scored", group=group, payload=self.store.put(self.scores(group)))

    def scores(self, group):
        return pack_scores(self.groups[group])

    def sample(self, *groups, version=0):
        """The usual way up to the scores."""
        for group in groups:
            self.lease(group)
        for group in groups:
            self.done(group, version=version)
            self.score(group)

    def train(self, step, *groups, masked=0):
        self.say("batched", step=step, groups=list(groups))
        payload = self.store.put(pack_step([self.groups[g] for g in groups], Mixture()))
        self.say("trained", step=step, groups=list(groups), payload=payload, tokens=3 * len(groups), masked=masked)

    def publish(self, version, digest=None):
        self.say("published", version=version, digest=digest or f"w{version}", loaded=["a"], stale={})

    def write(self, step, *groups):
        """The rollouts and the metrics of a step."""
        rows = [{"ordinal": group, "sample": sample} for group in groups for sample in (0, 1)]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (self.folder / "rollouts" / f"step-{step + 1:06d}.jsonl").write_text(lines)
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": step + 1, "time/step": 1.0}) + "\n")
            file.write(json.dumps({"step": step + 1, "eval/gsm8k/accuracy": 0.5}) + "\n")

    def step(self, step, *groups):
        self.train(step, *groups)
        self.publish(step + 1)
        self.write(step, *groups)

    def checkpoint(self, step, next_ordinal, owed, **changes):
        offset = self.ledger.sync()
        coordinator = {"version": step, "next_ordinal": next_ordinal, "owed": owed, **changes}
        folder = self.folder / "checkpoints" / f"step-{step:06d}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "run.json").write_text(json.dumps({"ledger_offset": offset, "coordinator": coordinator}))
        self.say("checkpoint", step=step, offset=offset)
        return offset

    def forget_after(self, step):
        """What a resumed run does with the files of steps that it does again."""
        for path in (self.folder / "rollouts").glob("*"):
            if int(path.stem[-6:]) > step:
                path.unlink()
        metrics = self.folder / "metrics.jsonl"
        lines = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
        metrics.write_text("".join(line for line in lines if json.loads(line)["step"] <= step))


def whole(folder, **options):
    """Two steps of two groups, all four admitted at once: the plainest run that finishes."""
    story = Story(folder, **options)
    story.begin()
    story.say("actor", actor="a", incarnation=0, state="serving", reason="")
    story.publish(0)
    story.admit(0, 1, 2, 3)
    story.sample(0, 1, 2, 3)
    story.step(0, 0, 1)
    counts = {"counts": {"trained": 2, "admitted": 2}, "tokens": {"trained": 6, "generated": 6}}
    story.checkpoint(1, 4, {2: 0, 3: 0}, **counts)
    story.step(1, 2, 3)
    story.say("end", step=2, reason="finished")
    return story


def eventful(folder, **options):
    """Everything that may happen, in three steps: losses, late results, drops, three resumes. 8 groups of 3 tokens.

    begin 0 | 0..3 admitted; 0, 1 trained in step 0 | checkpoint 1: 2 done, 3 leased | 4 admitted, 5 dropped,
    2, 3 trained in step 1 | kill | begin 1 at checkpoint 1: 2 and 3 reused, 4 sampled anew | step 1 | checkpoint 2 |
    kill | begin 2 at checkpoint 1, checkpoint 2 is damaged | 2, 3 reused again ...
    """
    story = Story(folder, **options)
    steps = {"steps": 3}
    story.begin(**steps)
    story.publish(0)
    story.admit(0, 1, 2, 3)
    story.lease(0)
    story.lease(1)
    story.say("actor", actor="a", incarnation=0, state="dead", reason="killed")
    for group in (0, 1):
        story.say("returned", group=group, actor="a", incarnation=0, attempt=0, reason="killed")
        story.lease(group, "b", attempt=1)
    story.say("refused", group=0, actor="a", incarnation=0, attempt=0, tokens=3, reason="not the current lease")
    for group in (0, 1):
        story.done(group, "b", attempt=1)
        story.score(group)
    story.lease(2, "b")
    story.done(2, "b")
    story.lease(3, "b")
    story.step(0, 0, 1)
    counts = {"trained": 2, "refused": 1, "retried": 2, "admitted": 2}
    first = story.checkpoint(1, 4, {2: 0, 3: 0}, counts=counts, tokens={"trained": 6, "refused": 3})
    story.score(2)
    story.admit(4, 5, version=1)
    story.done(3, "b")
    story.score(3)
    story.lease(5, "b")
    story.done(5, "b", version=1)
    story.score(5)
    story.say("dropped", group=5, reason="filter equal", tokens=3)
    story.lease(4, "b")
    story.step(1, 2, 3)  # killed here: 15 tokens in it, of groups 0, 1, 2, 3 and 5, and 3 refused
    # The next attempt finds all payloads; 4 had none yet.
    story.begin(attempt=1, from_step=1, offset=first, reason="resume", **steps)
    story.forget_after(1)
    story.publish(1)
    for group in (2, 3):
        story.admit(group, version=1)
        story.reuse(group)
        story.score(group)
    story.admit(4, 5, version=1)
    story.sample(4, version=1)  # 3 tokens more
    story.step(1, 2, 3)
    counts = {**counts, "trained": 4}
    story.checkpoint(2, 6, {4: 1, 5: 1}, counts=counts, tokens={"trained": 12, "refused": 3})
    # The third one finds checkpoint 2 damaged and goes on from 1 again; of group 3 the payload is lost.
    (folder / "checkpoints" / "step-000002").rename(folder / "checkpoints" / "corrupt-step-000002")
    story.begin(attempt=2, from_step=1, offset=first, reason="resume", **steps)
    story.forget_after(1)
    story.publish(1, "w1")
    story.admit(2, 3, 4, 5, version=1)
    story.reuse(2)
    story.sample(3, version=1)  # 3 more
    story.reuse(4)
    story.score(2, 4)
    story.lease(5)
    story.done(5, version=1)  # 3 more
    story.score(5)
    story.say("dropped", group=5, reason="filter equal", tokens=3)
    story.admit(6, version=1)
    story.lease(6)
    story.train(1, 2, 3, masked=1)
    story.publish(2, "other weights than those of the undone step 1")
    story.write(1, 2, 3)
    counts = {**counts, "trained": 4, "dropped/filter equal": 1}
    tokens = {"trained": 11, "masked": 1, "refused": 3, "dropped": 3}
    second = story.checkpoint(2, 7, {4: 1, 6: 1}, counts=counts, tokens=tokens)
    # The learner was lost and started again within the process: nothing is undone but the leases.
    offset = story.ledger.sync()
    assert offset > second
    story.begin(attempt=3, from_step=2, offset=second, reason="learner lost", **steps)
    story.admit(4, 6, version=2)
    story.reuse(4)
    story.score(4)
    story.lease(6, attempt=1)
    story.say("refused", group=6, actor="a", incarnation=0, attempt=0, tokens=3, reason="not the current lease")
    story.done(6, attempt=1, version=2)  # 6 more with the refused one
    story.score(6)
    story.say("pruned", payloads=["00" * 32], reason="payloads.max_bytes")
    story.step(2, 4, 6)
    story.say("end", step=3, reason="finished")
    return story


# ---------------------------------------------------------------- what is right
def test_a_plain_run_is_green_and_its_counts_are_those_of_its_records(tmp_path):
    whole(tmp_path)
    found = audit(tmp_path)
    assert found.problems == []
    assert (found.steps, found.wanted, found.finished) == (2, 2, True)
    assert found.groups == {"admitted": 4, "trained": 4, "dropped": 0, "pending": 0}
    assert found.results == {"leased": 4, "retried": 0, "done": 4, "refused": 0, "reused": 0}
    assert found.tokens == {
        "generated": 12, "trained": 12, "masked": 0, "dropped": 0, "refused": 0, "pending": 0, "undone": 0,
    }  # fmt: skip
    assert found.payloads == {"checked": 4 + 4 + 2, "missing": 0, "pruned": 0}


def test_a_run_with_losses_drops_and_resumes_is_green_and_every_token_has_one_fate(tmp_path):
    eventful(tmp_path)
    found = audit(tmp_path)
    assert found.problems == []
    # In the lineage 0, 1 | 2, 3 | 4, 6 are trained and 5 is dropped.
    assert found.groups == {"admitted": 7, "trained": 6, "dropped": 1, "pending": 0, "dropped/filter equal": 1}
    # Sampled 5 + 1 + 2 + 1 groups of 3 tokens, and 2 x 3 refused. Trained 6 x 3, one token masked. Undone: 3 and 5 of
    # the first attempt. The 4 of the second was reused, and the 2 of the first twice: sampled once, trained once.
    assert found.tokens == {
        "generated": 33, "trained": 17, "masked": 1, "dropped": 3, "refused": 6, "pending": 0, "undone": 6,
    }  # fmt: skip
    assert [(a.from_step, a.reason) for a in found.attempts] == [
        (0, "start"), (1, "resume"), (1, "resume"), (2, "learner lost"),
    ]  # fmt: skip
    assert [a.undone for a in found.attempts][::3] == [0, 1]  # the learner's restart has undone `checkpoint` alone
    assert found.surviving == found.records - sum(a.undone for a in found.attempts)


@pytest.mark.parametrize("tell", [whole, eventful])
def test_a_run_is_green_after_each_of_its_records(tmp_path, tell):
    seen = []

    def after():
        found = audit(tmp_path)
        assert found.problems == []
        seen.append(found.groups["pending"])

    tell(tmp_path, after=after)
    assert len(seen) == len(list(read_ledger(tmp_path / "ledger.jsonl")))
    assert max(seen) == 4 and seen[-1] == 0  # (S + 1) x P slots


def test_a_half_written_line_and_the_files_of_a_step_that_is_being_written_are_no_problem(tmp_path):
    story = Story(tmp_path)
    story.begin()
    story.admit(0, 1)
    story.sample(0, 1)
    story.train(0, 0, 1)
    with (tmp_path / "ledger.jsonl").open("ab") as file:
        file.write(b'{"kind":"publ')
    assert audit(tmp_path).problems == []  # neither rollouts nor metrics yet
    story.write(0, 0, 1)
    story.write(1, 2, 3)  # of a step that is newer than the ledger was when it was read
    assert audit(tmp_path).problems == []


def test_a_kill_while_a_resume_takes_away_what_is_to_be_done_again_is_no_problem(tmp_path):
    story = interrupted(tmp_path, again=[2, 3])
    story.sample(2, 3, version=1)
    story.step(1, 2, 3)
    story.admit(4, 5, version=2)
    story.sample(4, 5, version=2)
    story.step(2, 4, 5)
    assert audit(tmp_path).problems == []
    story.forget_after(1)  # and no `begin`
    assert audit(tmp_path).problems == []
    story.write(2, 4, 5)  # but between steps that have theirs there is no gap
    assert audit(tmp_path).problems == [
        "step 1: rollouts/step-000002.jsonl is missing",
        "step 1: metrics.jsonl has 0 lines of it (step 2 there), not one",
    ]


def test_a_demonstration_has_tokens_without_a_version(tmp_path):
    story = Story(tmp_path)
    story.begin()
    story.admit(0)
    story.lease(0)
    plain = tuple(Completion((7,), (), (), "x", "stop") for _ in range(2))
    digest = story.store.put(pack_rollout(replace(rollout(0), completions=plain)))
    story.say("done", group=0, actor="a", incarnation=0, attempt=0, payload=digest, tokens=2, oldest=0)
    assert audit(tmp_path).problems == []


def test_what_is_pruned_may_be_missing_when_no_resume_can_need_it(tmp_path):
    story = whole(tmp_path)
    first = [
        record["payload"]
        for _, record in read_ledger(story.ledger.path)
        if record.get("group") in (0, 1) and "payload" in record
    ]
    for payload in first:
        story.store.path(payload).unlink()
    assert [p.split(":")[0] for p in audit(tmp_path).problems] == ["group 0", "group 0", "group 1", "group 1"]
    story.say("pruned", payloads=first, reason="payloads.max_bytes")
    assert audit(tmp_path).problems == []
    assert audit(tmp_path).payloads == {"checked": 6, "missing": 0, "pruned": 4}


# ---------------------------------------------------------------- what is wrong
def without(kind, **fields):
    """An edit that leaves out the records that have these fields."""
    return lambda record: [] if {"kind": kind, **fields}.items() <= record.items() else [record]


def changed(kind, changes, **fields):
    """An edit that changes the records that have these fields."""
    return lambda record: [{**record, **changes} if {"kind": kind, **fields}.items() <= record.items() else record]


def doubled(kind, **fields):
    return lambda record: [record, record] if {"kind": kind, **fields}.items() <= record.items() else [record]


LATE = {"kind": "done", "group": 0, "actor": "a", "incarnation": 0, "attempt": 0}


def late(record):
    """The result of the dead actor is accepted, and that of its lease refused."""
    if record["kind"] == "refused" and record["group"] == 0:
        return [{**LATE, "payload": pack_digest(0), "tokens": 3, "oldest": 0}]
    if record["kind"] == "done" and record["group"] == 0:
        return [
            {
                **{name: record[name] for name in ("group", "actor", "incarnation", "attempt")},
                "kind": "refused",
                "tokens": 3,
                "reason": "late",
            }
        ]
    return [record]


def pack_digest(group):
    return hashlib.sha256(pack_rollout(rollout(group))).hexdigest()


def again(record):
    """Group 0 is in the second step too."""
    return [{**record, "groups": [0, 3]}] if record.get("step") == 1 and "groups" in record else [record]


def shifted(record):
    """The second attempt goes on from the middle of a record."""
    return [{**record, "offset": record["offset"] + 1}] if record.get("reason") == "resume" else [record]


def bare(record):
    return [{name: value for name, value in record.items() if name != "tokens" or record["kind"] != "done"}]


WRONG = {
    "the first record is no begin": (whole, without("begin"), "the first record is of kind actor, not begin"),
    "a group was never admitted": (whole, without("admitted", group=1), "group 1: leased, and it was never admitted"),
    "a later group was never admitted": (whole, without("admitted", group=3), "group 3: leased, and it was never"),
    "a lease is missing": (whole, without("leased", group=1), "group 1: done while it is waiting"),
    "a result is missing": (whole, without("done", group=1), "group 1: scored while it is leased"),
    "scores are missing": (whole, without("scored", group=1), "group 1: batched while it is done"),
    "a batch is missing": (whole, without("batched", step=1), "step 1: trained without a batch"),
    "a training is missing": (whole, without("trained", step=0), "step 1: batched while step 0 is under way"),
    "a publication is missing": (
        whole,
        without("published", version=1),
        "step 1: batched before version 1 was published",
    ),
    "a return is missing": (eventful, without("returned", group=1), "group 1: leased while it is leased"),
    "a late result is accepted": (
        eventful,
        late,
        "group 0: a late result was accepted, a.0 attempt 0; the lease is b.0",
    ),
    "of a dead actor too": (eventful, late, "group 0: a result of a.0 was accepted after its death"),
    "the lease's own result is refused": (
        eventful,
        changed("refused", {"actor": "b", "attempt": 1}, group=0),
        "group 0: the result of its own lease was refused, b.0 attempt 1",
    ),
    "a dead actor is leased to": (
        eventful,
        changed("leased", {"actor": "a"}, group=1, attempt=1),
        "leased to a.0, which is no more",
    ),
    "an attempt's number is used twice": (
        eventful,
        changed("leased", {"attempt": 0}, group=1, attempt=1),
        "attempt 0 after attempt 0",
    ),
    "a group is admitted twice": (whole, doubled("admitted", group=1), "group 1: admitted while it is waiting"),
    "a result counts twice": (whole, doubled("done", group=1), "group 1: done while it is done"),
    "a step is trained twice": (whole, doubled("trained", step=0), "group 0: trained in step 0 and again in step 0"),
    "a group is trained in two steps": (
        whole,
        again,
        "group 0: trained in step 0 and again in step 1",
    ),
    "so another one is lost": (
        whole,
        again,
        "group 2: lost; the run has finished, and it is scored",
    ),
    "the learner was given other groups than the batch": (
        whole,
        changed("trained", {"groups": [0, 2]}, step=0),
        r"trained on groups \[0, 2\]; batched was step 0 of \[0, 1\]",
    ),
    "a batch is too small": (
        whole,
        changed("batched", {"groups": [0]}, step=0),
        "step 0: a batch of 1 groups, not of 2",
    ),
    "a batch has a group twice": (
        whole,
        changed("batched", {"groups": [0, 0]}, step=0),
        "a batch of 1 groups, not of 2",
    ),
    "a step is left out": (whole, changed("trained", {"step": 2}, step=1), "step 2: trained after 1 steps"),
    "tokens are miscounted": (
        whole,
        changed("trained", {"tokens": 7}, step=0),
        "step 0: trained on 7 tokens, 0 of them masked; its groups have 6",
    ),
    "and do not add up": (whole, changed("trained", {"tokens": 7}, step=0), r"generated 12, but trained 13 .* = 13"),
    "more is masked than trained": (whole, changed("trained", {"masked": 7}, step=0), "7 of them masked"),
    "dropped tokens are miscounted": (
        eventful,
        changed("dropped", {"tokens": 0}),
        "group 5: dropped with 0 tokens; 3 were sampled",
    ),
    "dropped without a reason": (eventful, changed("dropped", {"reason": ""}), "group 5: dropped without a reason"),
    "something is reused that was never sampled": (
        eventful,
        changed("reused", {"payload": "ab" * 32}, group=2),
        "group 2: reuses payload ab.*, which was never sampled",
    ),
    "more is reused than was sampled": (
        eventful,
        changed("reused", {"tokens": 4}, group=2),
        "group 2: reuses 4 tokens; 3 were",
    ),
    "other weights under the same version": (
        whole,
        changed("published", {"version": 0}, version=1),
        "version 0 was published with other weights than before: w1",
    ),
    "too old": (whole, changed("begin", {"max_age": 0}), "group 2: step 1 trained tokens of version 0; max_age is 0"),
    "from the future": (
        whole,
        changed("done", {"oldest": 1}, group=0),
        "group 0: sampled by version 1 when 0 steps were trained",
    ),
    "sampled by another version": (
        eventful,
        changed("begin", {"deterministic": True}),
        "group 2: deterministic, yet sampled by version 0, admitted under 1",
    ),
    "too many at once": (
        whole,
        changed("begin", {"max_staleness": 0}),
        "group 2: admitted as one of 3 groups under way; there are 2 slots",
    ),
    "published before it was trained": (
        whole,
        changed("published", {"version": 2}, version=1),
        "version 2 was published when 1 steps",
    ),
    "another seed": (eventful, changed("begin", {"seed": 1}, attempt=2), "seed was 0, is 1"),
    "a wrong place to go on from": (eventful, shifted, "where no record of the lineage ends"),
    "a wrong step to go on from": (
        eventful,
        changed("begin", {"from_step": 2}, attempt=2),
        "goes on from step 2; up to its offset 1 are trained",
    ),
    "the end is not the end": (whole, changed("end", {"step": 1}), "the end says step 1; 2 steps are trained"),
    "a field is missing": (whole, bare, "lacks something"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_must_not_happen_is_found(tmp_path, name):
    tell, edit, said = WRONG[name]
    tell(tmp_path, edit=edit)
    problems = "\n".join(audit(tmp_path).problems)
    assert re.search(said, problems), problems or "green"


def test_what_was_wrong_in_an_undone_part_has_come_to_nothing(tmp_path):
    eventful(tmp_path, edit=changed("begin", {"seed": 1}, attempt=1))
    assert audit(tmp_path).problems == []


def interrupted(folder, *, again, steps=9):
    """0 and 1 are trained, 2 and 3 under way at the checkpoint. `again`: admitted after the resume."""
    story = Story(folder)
    story.begin(steps=steps)
    story.publish(0)
    story.admit(0, 1, 2, 3)
    story.sample(0, 1)
    story.step(0, 0, 1)
    offset = story.checkpoint(1, 4, {2: 0, 3: 0})
    story.begin(attempt=1, steps=steps, from_step=1, offset=offset, reason="resume")
    story.admit(*again, version=1)
    return story


def test_a_group_that_was_under_way_at_a_resume_and_is_not_taken_up_again_is_lost(tmp_path):
    story = interrupted(tmp_path, again=[2])
    assert audit(tmp_path).problems == []  # 3 may still come
    story.admit(4, version=1)
    (problem,) = audit(tmp_path).problems
    assert problem.startswith("group 3: lost; it was under way when the run was resumed")


def test_a_group_that_is_neither_trained_nor_dropped_when_the_run_has_finished_is_lost(tmp_path):
    story = interrupted(tmp_path, again=[2, 3, 4], steps=2)
    story.sample(2, 4, version=1)
    story.lease(3)
    story.step(1, 2, 4)
    assert audit(tmp_path).problems == []
    story.say("end", step=2, reason="finished")
    (problem,) = audit(tmp_path).problems
    assert problem == "group 3: lost; the run has finished, and it is leased, neither trained nor dropped"


def test_a_run_that_was_stopped_may_have_groups_under_way_but_no_batch(tmp_path):
    story = interrupted(tmp_path, again=[2, 3])
    story.sample(2, 3, version=1)
    story.say("end", step=1, reason="stopped")
    assert audit(tmp_path).problems == [] and audit(tmp_path).groups["pending"] == 2
    story.say("batched", step=1, groups=[2, 3])
    assert audit(tmp_path).problems == [
        "group 2: batched, and the run has ended without training it",
        "group 3: batched, and the run has ended without training it",
    ]


# ---------------------------------------------------------------- the ledger as a file
def test_every_line_of_a_whole_run_is_missed_when_it_is_cut_out(tmp_path):
    whole(tmp_path)
    path = tmp_path / "ledger.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    missed = []
    for number, line in enumerate(lines):
        path.write_bytes(b"".join(lines[:number] + lines[number + 1 :]))
        if not audit(tmp_path).problems:
            missed.append(json.loads(line)["kind"])
    # Of what comes after the last checkpoint nothing depends on these; the end is taken for one that is to come.
    assert missed == ["checkpoint", "published", "end"]


def test_a_damaged_line_is_a_problem_and_what_stands_before_it_is_audited(tmp_path):
    whole(tmp_path)
    path = tmp_path / "ledger.jsonl"
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"kind":"trained","step":1', b'"kind":"trained","step":7'))
    found = audit(tmp_path)
    assert len(found.problems) == 1 and "is not as it was written" in found.problems[0]
    assert (found.steps, found.groups["pending"]) == (1, 2)


def test_a_ledger_that_has_lost_its_end_does_not_fit_its_checkpoint(tmp_path):
    whole(tmp_path)
    path = tmp_path / "ledger.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    cut = next(i for i, line in enumerate(lines) if b'"kind":"trained"' in line)
    path.write_bytes(b"".join(lines[:cut]))
    (problem,) = audit(tmp_path).problems
    assert re.fullmatch(r"checkpoint step-000001 goes on from byte \d+, and the ledger has \d+", problem)


# ---------------------------------------------------------------- the other files
def payload(story, kind, **fields):
    """The path of the payload that the one such record names."""
    (record,) = (r for _, r in read_ledger(story.ledger.path) if {"kind": kind, **fields}.items() <= r.items())
    return story.store.path(record["payload"])


@pytest.mark.parametrize(
    ("kind", "fields", "what"),
    [
        ("done", {"group": 1}, "group 1: its rollout"),
        ("scored", {"group": 2}, "group 2: its scores"),
        ("trained", {"step": 0}, "step 0: its batch"),
    ],
)
def test_a_payload_that_is_missing_or_damaged_is_named(tmp_path, kind, fields, what):
    story = whole(tmp_path)
    path = payload(story, kind, **fields)
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    (problem,) = audit(tmp_path).problems
    assert problem.startswith(f"{what} is damaged") and path.read_bytes() == data[:-1]  # nothing is moved
    path.unlink()
    assert audit(tmp_path).problems == [f"{what} is missing: payload {path.stem}"]


def test_a_payload_that_is_not_what_the_ledger_says_is_named(tmp_path):
    digest = Payloads(tmp_path / "payloads").put
    wrong = {
        "group 0: its rollout is of group 5": ("done", 0, digest(pack_rollout(rollout(5)))),
        "group 1: its rollout has 4 tokens, the oldest of version 0; the ledger says 3 and 0": (
            "done", 1, digest(pack_rollout(rollout(1, tokens=4))),
        ),
        "group 2: its rollout has tokens of version 9 and was trained in step 1": ("done", 2, digest(mixed(2))),
        "group 3: its rollout cannot be read: this payload is of kind scores": (
            "done", 3, digest(pack_scores(rollout(3))),
        ),
        "group 1: its scores is of group de0bd9167419e4a5": ("scored", 1, digest(pack_scores(rollout(0)))),
        "group 2: its scores has no payload": ("scored", 2, ""),
    }  # fmt: skip
    places = {(kind, group): digest for kind, group, digest in wrong.values()}
    whole(tmp_path, edit=lambda r: [{**r, "payload": places.get((r["kind"], r.get("group")), r.get("payload"))}])
    problems = audit(tmp_path).problems
    assert len(problems) == len(wrong)
    for said in wrong:
        assert sum(problem.startswith(said) for problem in problems) == 1, said


def mixed(group):
    """Two tokens of version 0 and one of version 9."""
    one, two = rollout(group).completions
    return pack_rollout(replace(rollout(group), completions=(one, replace(two, versions=(9,)))))


def test_a_batch_of_other_groups_than_the_ledgers_is_named(tmp_path):
    other = Payloads(tmp_path / "payloads").put(pack_step([rollout(1), rollout(0)], Mixture()))
    whole(tmp_path, edit=changed("trained", {"payload": other}, step=0))
    (problem,) = audit(tmp_path).problems
    assert problem.startswith("step 0: its batch is of other groups, or in another order")


def test_a_payload_that_is_pruned_though_a_resume_may_need_it_is_named(tmp_path):
    story = whole(tmp_path)
    path = payload(story, "done", group=2)  # trained in step 1, after checkpoint 1
    path.unlink()
    story.say("pruned", payloads=[path.stem], reason="payloads.max_bytes")
    (problem,) = audit(tmp_path).problems
    assert problem.startswith("group 2: its rollout was pruned, and a resume needs it")


def test_a_manifest_that_says_otherwise_than_the_ledger_is_named(tmp_path):
    story = whole(tmp_path)
    path = tmp_path / "checkpoints" / "step-000001" / "run.json"
    manifest = json.loads(path.read_text())
    for changes, said in [
        ({"version": 2}, "version 2; the ledger has 1"),
        ({"next_ordinal": 3}, "next_ordinal 3; the ledger has 4"),
        ({"owed": {"2": 0}}, "groups under way [2]; the ledger has [2, 3]"),
        ({"counts": {"trained": 2, "dropped/x": 1}}, "groups dropped/x 1; the ledger has 0"),
        ({"counts": {"trained": 3}}, "groups trained 3; the ledger has 2"),
        ({"tokens": {"trained": 6, "masked": 1}}, "tokens masked 1; the ledger has 0"),
    ]:
        path.write_text(json.dumps({**manifest, "coordinator": {**manifest["coordinator"], **changes}}))
        assert audit(tmp_path).problems == [f"checkpoint step-000001: {said}"]
    path.write_text(json.dumps({**manifest, "ledger_offset": manifest["ledger_offset"] + 1}))
    (problem,) = audit(tmp_path).problems
    assert "no record of the lineage ends there" in problem
    path.write_text('{"torn')
    assert audit(tmp_path).problems[0].startswith("checkpoints/step-000001/run.json cannot be read")
    path.write_text("{}")  # of a run of before there was a ledger
    assert audit(tmp_path).problems == []
    path.parent.rename(path.parent.with_name("step-000002"))
    path.parent.with_name("step-000002").joinpath("run.json").write_text(json.dumps(manifest))
    assert "1 steps are trained at its place" in audit(tmp_path).problems[0]
    assert story


def test_a_checkpoint_of_an_undone_part_is_named(tmp_path):
    eventful(tmp_path)
    checkpoints = tmp_path / "checkpoints"
    (checkpoints / "step-000002").rename(checkpoints / "newer")
    (checkpoints / "corrupt-step-000002").rename(checkpoints / "step-000002")
    (problem,) = audit(tmp_path).problems
    assert "no record of the lineage ends there" in problem


def test_rollouts_and_metrics_have_each_step_once(tmp_path):
    story = whole(tmp_path)
    rows = tmp_path / "rollouts" / "step-000001.jsonl"
    text, metrics = rows.read_text(), (tmp_path / "metrics.jsonl").read_text()
    rows.write_text(text.replace('"ordinal": 1', '"ordinal": 3'))
    assert audit(tmp_path).problems == [
        "step 0: step-000001.jsonl has groups [3] that were not trained, and lacks [1]",
    ]
    rows.write_text("".join(text.splitlines(keepends=True)[1:]))
    assert audit(tmp_path).problems == ["step 0: step-000001.jsonl has samples [1] of group 0, not 2 once each"]
    rows.unlink()
    assert audit(tmp_path).problems == ["step 0: rollouts/step-000001.jsonl is missing"]
    story.write(0, 0, 1)
    assert audit(tmp_path).problems == ["step 0: metrics.jsonl has 2 lines of it (step 1 there), not one"]
    (tmp_path / "metrics.jsonl").write_text(metrics.replace('{"step": 2, "time', '{"step": 3, "time'))
    assert audit(tmp_path).problems == [
        "step 1: metrics.jsonl has 0 lines of it (step 2 there), not one",
        "metrics or rollouts of steps that were never trained: [3]",
    ]


# ---------------------------------------------------------------- what a person sees
def test_the_last_lines_are_the_counts_and_the_verdict(tmp_path, capsys):
    eventful(tmp_path)
    assert audit_run(argparse.Namespace(folder=str(tmp_path))) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["attempt", "from", "step", "at", "byte", "undid", "why"]
    assert lines[-6].startswith("steps     3 of 3, finished; ")
    assert lines[-5:] == [
        "groups    7 admitted = 6 trained + 1 dropped + 0 pending (dropped: 1 filter equal)",
        "results   10 leases, 2 returned, 6 results, 2 refused as late, 3 reused",
        "tokens    33 generated = 17 trained + 1 masked + 3 dropped + 6 refused + 0 pending + 6 undone",
        "payloads  17 checked, 0 missing, 1 pruned",
        "audit: green",
    ]


def test_twenty_problems_are_printed_and_the_others_counted(tmp_path, capsys):
    whole(tmp_path, edit=lambda r: [r, r])
    code = audit_run(argparse.Namespace(folder=str(tmp_path)))
    lines = capsys.readouterr().out.splitlines()
    count = len(audit(tmp_path).problems)
    assert code == 1 and count > 20
    assert lines[-1] == f"audit: {count} problems" and lines[-2] == f"  ... and {count - 20} more"
    assert sum(line.startswith("  ") for line in lines[1:]) >= 21


def test_a_folder_without_a_ledger_is_the_users_mistake(tmp_path):
    whole(tmp_path / "runs" / "good")
    with pytest.raises(UserError, match=r"holds no ledger\.jsonl.*did you mean '.*good'"):
        audit(tmp_path / "runs" / "god")


def test_a_run_that_has_written_nothing_yet_is_green(tmp_path):
    ledger = Ledger.open(tmp_path / "ledger.jsonl")
    assert summary(audit(tmp_path))[-1] == "audit: green"
    ledger.append([{"kind": "begin"}])  # and one whose first record lacks everything is not
    assert "begin lacks something" in audit(tmp_path).problems[0]
