"""What comes out of a payload equals what went in, and a file that does not hold what its name says is not used."""

import hashlib
import math
import os
import struct
from dataclasses import replace
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from uuid import UUID

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alignlab import plain as plain_module
from alignlab.payloads import (
    Corrupt,
    Missing,
    Payloads,
    pack_rollout,
    pack_scores,
    pack_step,
    rollout_facts,
    scored_group,
    step_groups,
    unpack_rollout,
    with_scores,
    with_step,
)
from alignlab.plain import plain, restored
from core.errors import UserError
from core.schema import Completion, Group, Mixture, Prompt, Score


def same(a, b):
    """Equal to the last bit and of the same type, all the way down; any NaN equals any other."""
    if type(a) is not type(b):
        return False
    if isinstance(a, float):
        return struct.pack("<d", a) == struct.pack("<d", b) or (math.isnan(a) and math.isnan(b))
    if isinstance(a, Group | Completion | Prompt | Score | Mixture):
        return all(same(getattr(a, name), getattr(b, name)) for name in type(a).__dataclass_fields__)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, np.ndarray | np.generic):
        return (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
    return a == b


# ---------------------------------------------------------------- any group
numbers = st.floats(allow_nan=True, allow_infinity=True)
texts = st.text(st.characters(), max_size=8)  # half surrogate pairs too
names = st.text(min_size=1, max_size=4)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | numbers | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
other_values = (
    st.binary(max_size=5)
    | st.dates()
    | st.datetimes(timezones=st.none() | st.just(UTC) | st.just(timezone(timedelta(hours=5, minutes=30))))
    | st.times()
    | st.timedeltas()
    | st.decimals(allow_nan=False)
    | st.uuids()
)
values = st.recursive(
    json_values | other_values,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(texts | st.integers() | st.just("$"), inner, max_size=3)
    ),
    max_leaves=6,
)


@st.composite
def completions(draw, sampled=True):
    count = draw(st.integers(0, 6))
    ids = tuple(draw(st.lists(st.integers(0, 2**31 - 1), min_size=count, max_size=count)))
    count = count if sampled else 0
    logprobs = tuple(draw(st.lists(numbers, min_size=count, max_size=count)))
    versions = tuple(draw(st.lists(st.integers(0, 3), min_size=count, max_size=count)))
    return Completion(ids, logprobs, versions, draw(texts), draw(st.sampled_from(["stop", "length", "abort"])))


prompts = st.builds(
    Prompt,
    st.integers(0, 2**40),
    texts,
    st.lists(st.integers(0, 2**31 - 1), max_size=3).map(tuple),
    st.dictionaries(texts, values, max_size=3),
)


@st.composite
def rollouts(draw, greedy=True):
    each = st.lists(completions(sampled=draw(st.booleans())), max_size=3).map(tuple)
    group = Group(draw(names), draw(prompts), draw(each), draw(st.integers(0, 9)), draw(texts))
    if greedy and draw(st.booleans()):
        group = replace(group, greedy=replace(draw(rollouts(greedy=False)), prompt=group.prompt))
    return group


scores = st.builds(lambda value, detail: Score("ok", value, detail), st.floats(-1e300, 1e300), texts) | st.builds(
    lambda status, detail: Score(status, math.nan, detail), st.sampled_from(["abstain", "timeout", "error"]), texts
)


@st.composite
def scored(draw, group):
    """The group and its greedy completion with everything that rewards say."""
    size = len(group.completions)
    each = st.lists(numbers, min_size=size, max_size=size).map(tuple)
    tables = {
        "components": st.dictionaries(names, st.lists(scores, min_size=size, max_size=size).map(tuple), max_size=3),
        "references": st.dictionaries(names, st.lists(numbers, max_size=4).map(tuple), max_size=2),
        "columns": st.dictionaries(names, each, max_size=2),
        "weights": st.dictionaries(names, each, max_size=2),
        "totals": st.just(()) | each,
        "answers": st.just(()) | st.lists(texts, min_size=size, max_size=size).map(tuple),
    }
    filled = {name: draw(strategy) for name, strategy in tables.items()}
    return replace(group, **filled, greedy=None if group.greedy is None else draw(scored(group.greedy)))


mixtures = st.builds(Mixture, apart=st.booleans(), task=numbers, sharpness=st.none() | numbers, kl_coef=numbers)


@settings(max_examples=60, deadline=None)
@given(rollouts())
def test_a_rollout_comes_back_as_it_was(group):
    assert same(unpack_rollout(pack_rollout(group)), group)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_scores_come_back_on_the_rollout_that_they_are_of(data):
    rollout = data.draw(rollouts())
    group = data.draw(scored(rollout))
    packed = pack_scores(group)
    assert same(with_scores(rollout, packed), group)
    assert scored_group(packed) == group.id


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_step_comes_back_from_its_rollouts_whatever_scores_they_have(data):
    plain_groups = data.draw(st.lists(rollouts(), max_size=3))
    groups, mixture = [data.draw(scored(group)) for group in plain_groups], data.draw(mixtures)
    other = [data.draw(scored(group)) for group in plain_groups]  # those of before the weights were known, say
    packed = pack_step(groups, mixture)
    for start in (plain_groups, other):
        assert same(with_step(start, packed), (groups, mixture))
    assert step_groups(packed) == [group.id for group in groups]


@settings(max_examples=60, deadline=None)
@given(rollouts())
def test_a_demonstration_or_anything_else_with_totals_keeps_them(group):
    group = replace(group, totals=(1.0, 0.0), answers=("a", "b"))
    assert same(unpack_rollout(pack_rollout(group)), group)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_equal_things_have_equal_bytes(data):
    group = data.draw(scored(data.draw(rollouts())))
    for pack in (pack_rollout, pack_scores, lambda g: pack_step([g, g], Mixture())):
        assert pack(group) == pack(unpack_rollout(pack_rollout(group)))


def example(ordinal=7, greedy=True):
    """Two completions of 3 and 2 tokens; with the greedy one, 6 tokens, the oldest of version 4."""
    prompt = Prompt(ordinal, "2+3?", (5, 9), {"answer": "5"})
    one = Completion((11, 12, 2), (-0.1, -0.2, -0.3), (5, 5, 6), "5.", "stop")
    two = Completion((11, 13), (-0.1, -math.inf), (4, 5), "5", "length")
    last = Group(f"g{ordinal}", prompt, (Completion((2,), (0.0,), (6,), "", "stop"),))
    return Group(f"g{ordinal}", prompt, (one, two), 1, "actor-0", greedy=last if greedy else None)


def test_the_facts_of_a_rollout_are_those_of_all_its_tokens():
    group = example()
    assert rollout_facts(pack_rollout(group)) == ("g7", 7, 6, 4, 6)
    assert group.tokens == 6
    assert rollout_facts(pack_rollout(replace(group, completions=(), greedy=None))) == ("g7", 7, 0, None, None)


def test_bytes_are_the_same_in_every_process_and_after_every_change_of_this_code():
    # A fixed number: with another one, payloads of a run that is resumed would be kept twice.
    digest = hashlib.sha256(pack_rollout(example())).hexdigest()
    assert digest == "133c5a2dcda9a081aecbcbbf8d221af802c8e634d0dde6033498859c881a800d"


def test_a_prompt_is_kept_once_for_its_greedy_completion():
    back = unpack_rollout(pack_rollout(example()))
    assert back.greedy.prompt is back.prompt
    assert pack_rollout(example()).count(b'"answer"') == 1


def test_payloads_of_another_group_or_kind_are_refused():
    rollout, scores = pack_rollout(example()), pack_scores(example())
    with pytest.raises(ValueError, match="of kind rollout, not scores"):
        with_scores(example(), rollout)
    with pytest.raises(ValueError, match="of kind scores, not rollout"):
        unpack_rollout(scores)
    with pytest.raises(ValueError, match="of group g7 and its greedy completion, not of group g8"):
        with_scores(example(8), scores)
    with pytest.raises(ValueError, match="of group g7 and its greedy completion, not of group g7"):
        with_scores(example(greedy=False), scores)
    with pytest.raises(ValueError, match="of 1 groups, not of 2"):
        with_step([example(), example(8)], pack_step([example()], Mixture()))


# ---------------------------------------------------------------- columns
@pytest.mark.parametrize(
    "value",
    [
        {"a": [1, 2.5, None, True, "x", {"b": []}]},
        10**300,
        -0.0,
        math.nan,
        (1, (2, [3])),
        {1: "a", (2, 3): "b", None: "c"},
        {"$": ["date", "not one"]},
        b"\x00\xff",
        datetime(2024, 5, 1, 12, 30, 0, 17, tzinfo=timezone(timedelta(hours=-3))),
        date(2024, 5, 1),
        time(23, 59, 59, 999999),
        timedelta(days=-1, microseconds=1),
        Decimal("1.10"),
        UUID(int=7),
        np.float64(0.1),
        np.float16(0.1),
        np.int64(7),
        np.bool_(True),
        np.str_("ä"),
        np.datetime64("2024-05-01T12:00:00.000000001"),
        np.arange(6, dtype=np.int16).reshape(2, 3),
        np.zeros((0, 3)),
        np.array(5),
        np.array(["a", "bc"]),
    ],
    ids=repr,
)
def test_a_column_keeps_its_value_and_its_type(value):
    group = replace(example(greedy=False), prompt=Prompt(7, "", (), {"x": value}))
    assert same(unpack_rollout(pack_rollout(group)).prompt.columns["x"], value)


class Picture:
    pass


class Stamp(datetime):
    """Like pandas' Timestamp, which counts nanoseconds."""


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"image": Picture()}, r"prompt 7: columns.image is of type .*test_payloads.Picture, which a run cannot keep"),
        ({"meta": {"tags": ["a", {"b"}]}}, r"columns.meta.tags\[1\] is of type set"),
        ({"t": Stamp(2024, 5, 1)}, "columns.t is of type .*Stamp"),
        ({"o": np.array([Picture()])}, r"columns.o \(numpy object\)"),
        ({"r": np.zeros(2, dtype="i4,f4")}, "columns.r .numpy .*is of type numpy.ndarray"),
    ],
)
def test_a_column_that_cannot_be_kept_is_named(columns, said):
    with pytest.raises(UserError, match=said):
        pack_rollout(replace(example(), prompt=Prompt(7, "", (), columns)))


def test_examples_in_docstrings_are_true():
    import doctest

    assert doctest.testmod(plain_module).failed == 0
    assert restored(plain({"a": (1,)}, "row")) == {"a": (1,)}


# ---------------------------------------------------------------- files
@pytest.fixture
def store(tmp_path):
    return Payloads(tmp_path / "payloads")


def test_a_payload_is_named_by_the_digest_of_its_bytes(store):
    digest = store.put(b"abc")
    assert digest == hashlib.sha256(b"abc").hexdigest()
    assert store.path(digest) == store.folder / "ba" / f"{digest}.safetensors"  # sha256("abc") begins with ba7816bf
    assert store.get(digest) == b"abc"
    assert store.put(b"abc") == digest
    assert len(list(store.folder.rglob("*.*"))) == 1  # no temporary file, no second one
    with pytest.raises(Missing, match="does not exist"):
        store.get("00" * 32)


def test_a_torn_payload_is_put_aside_and_can_be_put_again(store):
    digest = store.put(b"abcdef")
    for torn in (b"", b"abc", b"abcdeF", b"abcdefg"):
        store.path(digest).write_bytes(torn)
        with pytest.raises(Corrupt, match=f"{len(torn)} bytes"):
            store.read(digest)
        assert store.path(digest).read_bytes() == torn  # who only reads touches nothing
        with pytest.raises(Corrupt, match="moved to"):
            store.get(digest)
        assert (store.folder / "corrupt" / f"{digest}.safetensors").read_bytes() == torn
        with pytest.raises(Missing):
            store.get(digest)
        assert store.get(store.put(b"abcdef")) == b"abcdef"
    store.path(digest).write_bytes(b"abc")
    store.put(b"abcdef")  # a torn one that nobody has read since
    assert store.get(digest) == b"abcdef"


def test_a_full_disk_leaves_nothing_of_a_payload(store, monkeypatch):
    def half(path, data):
        with path.open("wb") as file:
            file.write(data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.write_bytes", half)
        with pytest.raises(OSError, match="No space left"):
            store.put(b"abcdef")
    assert not [path for path in store.folder.rglob("*") if path.is_file()]


def test_the_oldest_go_until_the_rest_fits(store):
    a, b, c, d = (store.put(bytes([65 + i]) * 10) for i in range(4))
    told = []
    assert store.size() == 40
    assert store.prune(set(), [a, b, c], max_bytes=40, record=told.append) == []  # 40 bytes are not more than 40
    assert store.prune({b}, [a, b, c], max_bytes=25, record=told.append) == [a, c]  # b must stay, so c goes too
    assert told == [[a, c]]
    assert store.get(b) and store.get(d)
    assert store.prune(set(), [a, b], max_bytes=0) == [
        b
    ]  # what is gone already is not said again; d is nobody's to give
    assert store.get(d) == b"D" * 10


def test_what_goes_is_recorded_before_it_is_gone(store):
    a, b = store.put(b"a"), store.put(b"b")

    def killed(digests):
        assert digests == [a, b]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.prune(set(), [a, b], max_bytes=0, record=killed)
    assert store.get(a) and store.get(b)


def test_half_written_files_of_a_killed_process_go_with_the_next_prune(store):
    digest = store.put(b"abc")
    theirs = store.path(digest).with_name(f".{digest}.1.partial")
    ours = store.path(digest).with_name(f".{digest}.{os.getpid()}.partial")
    for path in (theirs, ours):
        path.write_bytes(b"ab")
    store.prune(set(), [], max_bytes=0)
    assert not theirs.exists() and ours.exists()
