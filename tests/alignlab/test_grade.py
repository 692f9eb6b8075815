"""`alignlab grade`: the checker's verdicts on the rows of a file, whatever the rows hold."""

import json

import pytest

from alignlab.cli import main


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_every_row_gets_its_verdict_in_order(tmp_path, capsys):
    tower = "9" + "^{9" * 200 + "}" * 200
    file = write(
        tmp_path / "rows.jsonl",
        {"gold": "1/2", "completion": r"so \boxed{0.5}"},
        {"gold": "4", "completion": "#### 5"},
        {"gold": "4", "completion": "I do not know"},
        {"gold": None, "completion": r"\boxed{4}"},
        {"gold": "4", "completion": rf"\boxed{{{tower}}}"},
    )
    assert main(["grade", file]) == 0
    out, err = capsys.readouterr()
    verdicts = [json.loads(line) for line in out.splitlines()]
    assert [v["verdict"] for v in verdicts] == [True, False, False, None, False]
    assert [v["status"] for v in verdicts] == ["ok", "ok", "ok", "abstain", "ok"]
    assert all(v["ms"] < 10_000 for v in verdicts)
    assert "5 rows: 1 right, 3 wrong, 1 without a verdict" in err


def test_verdicts_can_go_to_a_file(tmp_path, capsys):
    file = write(tmp_path / "rows.jsonl", {"gold": "7", "completion": "7 it is"})
    assert main(["grade", file, "--out", str(tmp_path / "v.jsonl"), "--extract", "any"]) == 0
    assert json.loads((tmp_path / "v.jsonl").read_text())["verdict"] is True and capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"answer": "4", "completion": "4"}, "row 1 has no 'gold'"),
        ({"gold": "4", "completions": "4"}, "row 1 has no 'completion'; did you mean 'completions'"),
        ({"gold": "4", "completion": 4}, "row 1: 'completion' is 4, not a text"),
    ],
)
def test_a_file_of_another_form_is_refused(tmp_path, capsys, row, says):
    assert main(["grade", write(tmp_path / "rows.jsonl", row)]) == 2
    assert says in capsys.readouterr().err


def test_arguments_that_make_no_sense_are_refused_before_anything_is_graded(tmp_path, capsys):
    file = write(tmp_path / "rows.jsonl", {"gold": "4", "completion": "4"})
    assert main(["grade", file, "--out", str(tmp_path / "nowhere" / "v.jsonl")]) == 2
    assert "--out: there is no folder" in capsys.readouterr().err
    for option in ("--workers", "--timeout"):
        with pytest.raises(SystemExit) as stopped:
            main(["grade", file, option, "0"])
        assert stopped.value.code == 2 and f"argument {option}: 0 is not above 0" in capsys.readouterr().err
