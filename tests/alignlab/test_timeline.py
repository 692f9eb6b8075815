"""Where the time of a run went: spans worked out by hand, and those of a real loop against its metrics."""

import argparse
import functools
import gzip
import json
from itertools import pairwise

import pytest

from alignlab.ledger import read_ledger
from alignlab.profile import profile, write_timeline
from alignlab.report_curves import STEP
from alignlab.timeline import Span, spans, trace
from core.errors import UserError
from tests.rig import HashLearner, PickyEngine, Rig, run_config


def lease(kind, group, time, attempt=0, **fields):
    return {"kind": kind, "group": group, "actor": "actor-0", "attempt": attempt, "time": time, **fields}


RECORDS = [
    {"kind": "begin", "time": 0.0},
    lease("leased", 0, 1.0),
    lease("leased", 1, 2.0),
    lease("done", 1, 4.0, tokens=7),
    {"kind": "scored", "group": 1, "time": 4.5},
    lease("leased", 2, 4.0),
    lease("returned", 0, 5.0, reason="killed"),
    {"kind": "batched", "step": 0, "time": 6.0},
    {"kind": "trained", "step": 0, "time": 10.0},
    {"kind": "published", "version": 1, "loaded": ["actor-0"], "time": 10.5},
    {"kind": "checkpoint", "step": 1, "time": 14.0},
    {"kind": "batched", "step": 1, "time": 15.0},
    {"kind": "trained", "step": 1, "time": 16.0},
    {"kind": "published", "version": 2, "loaded": [], "time": 17.0},
    lease("leased", 3, 17.0),
    lease("done", 2, 18.0, tokens=3),
    {"kind": "begin", "time": 20.0},
]
FIRST = {"time/wait_groups": 5.0, "time/weigh": 0.25, "time/keep": 0.25, "time/train": 3.5, "time/publish": 0.5}
FIRST |= {
    "time/learner": 3.0,
    "time/learner_collate": 0.5,
    "time/learner_gradients": 2.0,
    "time/learner_optimizer": 0.5,
}
SECOND = {"time/wait_groups": 1.0, "time/train": 1.0, "time/publish": 1.0, "time/write": 0.5, "time/checkpoint": 1.0}
ROWS = [
    {"step": 1, "time": 12.0, "time/eval": 0.75},
    {"step": 1, "time": 12.0, "time/step": 10.0, **FIRST},
    {"step": 2, "time": 17.5, "time/step": 3.0, **SECOND},
]


def of(process, track, found):
    return [(s.name, s.start, s.end) for s in found if (s.process, s.track) == (process, track)]


def test_spans_are_what_ledger_and_metrics_say():
    found = spans(RECORDS, ROWS)
    assert of("driver", "loop", found) == [
        ("step 1", 1.0, 10.5),
        ("wait groups", 1.0, 6.0),
        ("weigh", 6.0, 6.25),
        ("keep", 6.25, 6.5),
        ("train", 6.5, 10.0),
        ("publish", 10.0, 10.5),
        ("evaluate", 11.25, 12.0),
        ("write", 12.0, 12.5),
        ("checkpoint", 13.0, 14.0),
        ("step 2", 14.0, 17.0),
        ("wait groups", 14.0, 15.0),
        ("train", 15.0, 16.0),
        ("publish", 16.0, 17.0),
    ]
    assert of("learner", "steps", found)[:4] == [
        ("step 1", 7.0, 10.0),
        ("collate", 7.0, 7.5),
        ("gradients", 7.5, 9.5),
        ("optimizer", 9.5, 10.0),
    ]
    assert of("actor-0", "samples", found) == [("samples", 1.0, 18.0)]
    assert of("actor-0", "weights", found) == [("version 1", 10.0, 10.5)]
    # Group 2 has the lane of group 1, whose end is its start; group 3 was never heard of again.
    assert of("actor-0", "groups 1", found) == [("group 0", 1.0, 5.0), ("group 3", 17.0, 18.0)]
    assert of("actor-0", "groups 2", found) == [("group 1", 2.0, 4.0), ("group 2", 4.0, 18.0)]
    assert of("rewards", "groups 1", found) == [("group 1", 4.0, 4.5)]
    ended = {s.name: s.about for s in found if s.track.startswith("groups") and s.process == "actor-0"}
    assert ended["group 0"]["reason"] == "killed" and ended["group 1"]["tokens"] == 7
    assert ended["group 3"]["ended"] == "with the attempt"


def test_a_step_that_was_undone_has_the_spans_of_the_ledger_alone():
    redone = [{**r, "time": r["time"] + 20} for r in RECORDS if r["kind"] in ("batched", "trained", "published")]
    late = [{**row, "time": row["time"] + 20} for row in ROWS]
    driver = of("driver", "loop", spans([*RECORDS, *redone], late))
    assert driver[:3] == [("step 1", 6.0, 10.5), ("train", 6.0, 10.0), ("publish", 10.0, 10.5)]
    assert ("wait groups", 21.0, 26.0) in driver


def test_a_trace_names_its_processes_and_counts_microseconds():
    events = trace([Span("a", "x", "one", 100.0, 100.5), Span("a", "y", "two", 100.25, 101.0, {"n": 1})])["traceEvents"]
    assert [e["args"]["name"] for e in events if e["ph"] == "M"] == ["a", "x", "y"]
    assert [(e["name"], e["ts"], e["dur"], e["pid"], e["tid"], e["args"]) for e in events if e["ph"] == "X"] == [
        ("one", 0.0, 500_000.0, 1, 1, {}),
        ("two", 250_000.0, 750_000.0, 1, 2, {"n": 1}),
    ]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A free-running run of six steps of 50 ms; generation takes longer, and the third step is profiled."""
    config = run_config(
        tmp_path_factory.mktemp("rig"), steps=6, rollout={"prompts": 4, "max_staleness": 1}, profile=True
    )
    engine = functools.partial(PickyEngine, latency=0.01)
    rig = Rig(config, lambda config: HashLearner(config, seconds=0.05), make=engine)
    assert rig.run() == 6
    return rig.folder


def rows_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_the_parts_of_a_step_sum_to_it(run):
    for row in rows_of(run):
        assert sum(row[name] for name in STEP) == pytest.approx(row["time/step"], abs=0.02)
        assert row["time/train"] >= 0.05 and min(row[name] for name in STEP) >= 0
    assert all(row["time/write"] > 0 for row in rows_of(run)[1:]) and "time/checkpoint" in rows_of(run)[3]


def test_the_timeline_of_a_run_nests_and_lasts_as_long_as_its_metrics_say(run):
    found = spans([record for _, record in read_ledger(run / "ledger.jsonl")], rows_of(run))
    assert {s.process for s in found} == {"driver", "learner", "actor-0", "actor-1", "rewards"}
    tracks = {(s.process, s.track): [] for s in found}
    for span in found:
        tracks[span.process, span.track].append(span)
    for track in tracks.values():
        above = []
        for span in track:  # each lies after the one before it, or within
            while above and above[-1].end <= span.start:
                above.pop()
            assert span.start <= span.end and (not above or span.end <= above[-1].end)
            above.append(span)
    for name, metric in {"train": "time/train", "wait groups": "time/wait_groups"}.items():
        lasted = [s.end - s.start for s in tracks["driver", "loop"] if s.name == name]
        assert lasted == pytest.approx([row[metric] for row in rows_of(run)], abs=0.003)
    groups = [s for s in found if s.process.startswith("actor") and s.track.startswith("groups")]
    assert sorted(int(s.name.split()[1]) for s in groups) == list(range(24))


def test_the_profiled_step_has_a_timeline_of_what_came_before_it(run):
    (folder,) = (run / "profile").iterdir()
    assert folder.name == "step-000003"
    events = json.loads(gzip.decompress((folder / "timeline.json.gz").read_bytes()))["traceEvents"]
    steps = [e for e in events if e["name"].startswith("step ")]
    assert {e["name"] for e in steps} == {"step 1", "step 2", "step 3"} and all(e["ph"] == "X" for e in steps)


def test_the_verb_makes_a_timeline_of_any_run_and_says_what_is_none(run, tmp_path, capsys):
    assert profile(argparse.Namespace(folder=str(run), out=None)) == 0
    said = capsys.readouterr().out
    assert "timeline.json.gz" in said and "step-000003" in said
    events = json.loads(gzip.decompress((run / "profile" / "timeline.json.gz").read_bytes()))["traceEvents"]
    starts = [e["ts"] for e in events if e["name"].startswith("step ") and e["pid"] == 1]
    assert len(starts) == 6 and all(a < b for a, b in pairwise(starts))
    with pytest.raises(UserError, match="no such ledger"):
        write_timeline(tmp_path, tmp_path / "t.json.gz")
