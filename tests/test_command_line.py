"""How every script ends: its own exit code, one line and 2 on a user's mistake, one line and 130 on Ctrl-C."""

import argparse

import pytest

from convclip.command_line import Findings, add_local_rank, add_overrides, run
from convclip.schema import UserError
from tests.conftest import REPOSITORY

# doctor tells of packages that are missing: it must start without them.
SCRIPTS = [path for folder in ("launch", "tools") for path in sorted((REPOSITORY / folder).glob("*.py"))]
SCRIPTS = [path for path in SCRIPTS if path.name != "doctor.py"]


def raises(error):
    def work(options):
        raise error

    return work


@pytest.mark.parametrize(
    ("work", "code", "line"),
    [
        (lambda options: None, 0, ""),
        (lambda options: options.code, 1, ""),
        (raises(UserError("x is wrong: do y")), 2, "tool: x is wrong: do y\n"),
        (raises(KeyboardInterrupt()), 130, "tool: interrupted, nothing was written\n"),
    ],
)
def test_exit_codes_and_their_line(work, code, line, capsys):
    assert run("tool", work, argparse.Namespace(code=1), ", nothing was written") == code
    assert capsys.readouterr() == ("", line)


def test_what_is_no_users_mistake_is_not_hidden():
    with pytest.raises(ZeroDivisionError):
        run("tool", lambda options: 1 // 0, argparse.Namespace())


def test_shared_flags():
    parser = argparse.ArgumentParser()
    add_overrides(parser)
    add_local_rank(parser)
    options = parser.parse_args(["--set", "a.b=1", "--local_rank=3", "--set", "c=2"])
    assert options.overrides == ["a.b=1", "c=2"] and options.local_rank == 3
    assert parser.parse_args([]).overrides == [] and "--local_rank" not in parser.format_help()


def test_findings_are_counted_and_the_first_of_each_kind_shown(capsys):
    assert Findings().report() == 0 and capsys.readouterr().out == "no findings\n"
    first, second = Findings(), Findings()
    first.add("cut", "a\x1b[0m\n")
    second.add("cut", "b", count=1000)
    for name in "cde":
        second.add("cut", name)
    with second.catching("refused"):
        raise UserError("f is wrong")
    first.take(second)
    assert first.report() == 1
    assert [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()[1:]] == [
        ["1,004", "cut"],
        ["a?[0m?"],
        ["b"],
        ["c"],
        ["1", "refused"],
        ["f", "is wrong"],
    ]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_no_script_ends_in_a_way_of_its_own(path):
    text = path.read_text(encoding="utf-8")
    assert "run(" in text and "from convclip.command_line import" in text
    assert not [words for words in ("except UserError", "except KeyboardInterrupt", '"--set"') if words in text]


def test_a_message_is_one_line_of_bounded_length():
    """Whatever it quotes: the beginning says where, the end what to do."""
    short = "data.csv: no column\nx: rename it"
    assert str(UserError(short)) == "data.csv: no column x: rename it"
    message = str(UserError(f"data.csv: no column {'x' * 10_000}: rename it"))
    assert len(message) == 600 and message.startswith("data.csv: no") and message.endswith("x: rename it")
