"""A registry explains itself and refuses what its functions do not know."""

from dataclasses import dataclass

import pytest

from core.errors import UserError
from core.registry import Registry, check_options


@pytest.fixture
def clips():
    clips = Registry("surrogate")

    @clips
    def cispo(ratio, advantage, *, high: float = 4.0, low: float | None = None, span: tuple[float, float] = (0, 1)):
        """Clip the weight, keep the gradient.

        More.
        """
        return ratio, advantage, high, low, span

    @clips
    def plain(ratio):
        """No options."""

    return clips


def test_listing_comes_from_the_function(clips):
    assert clips.describe()[0] == (
        "cispo",
        "high=4.0, low=None, span=(0, 1)",
        "Clip the weight, keep the gradient.",
    )


def test_bind_fills_options_and_takes_a_list_for_a_tuple(clips):
    assert clips.bind("cispo", {"high": 2, "span": [1, 2]}, "method")(0, 0) == (0, 0, 2.0, None, (1.0, 2.0))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("cisop", {}, "method: there is no surrogate 'cisop'; did you mean 'cispo'?"),
        ("cispo", {"hihg": 1.0}, "method.hihg: unknown option of 'cispo'; did you mean 'high'?"),
        ("cispo", {"high": "4"}, "method.high: input should be a valid number, got '4'"),
        ("cispo", {"high": True}, "method.high: input should be a valid number, got True"),
        ("plain", {"x": 1}, "method.x: unknown option of 'plain'; it takes no options"),
    ],
)
def test_mistakes_are_explained(clips, name, options, message):
    with pytest.raises(UserError) as error:
        clips.bind(name, options, "method")
    assert message in str(error.value)


def test_a_name_is_registered_once(clips):
    with pytest.raises(ValueError, match="registered twice"):
        clips(clips["cispo"])


def defined(source):
    """The object called `it` of a user's file."""
    names = {}
    exec("from __future__ import annotations\n" + source, names)
    return names["it"]


def test_only_the_types_of_options_need_to_exist():
    it = defined("def it(completion: Missing, *, low: float = 0.0) -> Missing: ...")
    assert check_options(it, {"low": 1}, "where") == {"low": 1.0}
    with pytest.raises(UserError, match=r"where.low: .*valid number, got 'x'"):
        check_options(it, {"low": "x"}, "where")


@pytest.mark.parametrize("annotation", ["Missing", "list[", "1 / 0"])
def test_a_type_that_cannot_be_read_names_the_function(annotation):
    it = defined(f"def it(completion, *, low: {annotation!r} = 0.0): ...")
    with pytest.raises(UserError, match=r"where: the types of the options of 'it' cannot be read \(\w+Error: "):
        check_options(it, {}, "where")


def test_a_callable_object_has_options_too():
    @dataclass
    class Judge:  # as a dataclass with `eq`, it cannot be hashed
        scale: float = 1.0

        def __call__(self, completion, *, low: float = 0.0): ...

    assert check_options(Judge(), {"low": 2}, "where") == {"low": 2.0}
    with pytest.raises(UserError, match=r"where.lwo: unknown option of 'Judge'; did you mean 'low'"):
        check_options(Judge(), {"lwo": 2}, "where")
