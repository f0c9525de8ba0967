import pytest
import torch

from adaptrank.modules.metrics import ExactMatch, MultipleChoice, is_match


@pytest.mark.parametrize(
    ("text", "answer", "match"),
    [
        (" 12 + 7 = 19", "19", True),
        (" 12 + 7 = 18", "19", False),
        (" 12 + 7 = 19.0004", "19", True),
        ("19", "19", True),
        ("so\n#### 1,200", "1200", True),
        ("1 = 2\n#### 3", "3", True),
        ("it costs $1,200.", "1200", True),
        (" 3 apples and 4 pears", "4", True),
        (" none", "4", False),
        (" Net Income. ", "net income", True),
        ("12.5 percent", "12.5 percent", True),
        ("12.5", "12.5 percent", False),
        ("40%", "40", True),
        ("-5", "5", False),
        ("", "5", False),
        # A gold answer may be a whole solution, an equation or a query.
        ("48 + 24 = 72", "48 / 2 = 24 in May.\nIn all 48 + 24 = 72.\n#### 72", True),
        ("#### 71", "In all 48 + 24 = 72.\n#### 72", False),
        ("the box", "It is in there.\n#### The box.", True),
        (" y = 2x + 1", "y = 2x + 1", True),
        ("y = 3x + 1", "y = 2x + 1", False),
        ("SELECT * FROM t WHERE b=1", "SELECT * FROM t WHERE a=1", False),
        ("SELECT * FROM t WHERE a=1", "SELECT * FROM t WHERE a=1", True),
    ],
)
def test_is_match(text, answer, match):
    assert is_match(text, answer) is match


def test_exact_match_is_a_share():
    metric = ExactMatch()
    metric.update([" 1 + 1 = 2", "3"], ["2", "4"])
    metric.update(["5"], ["5"])
    assert metric.compute() == pytest.approx(2 / 3)


def test_multiple_choice_by_sum_and_by_character():
    scores = torch.tensor(
        [-4.0, -5.0, -3.0, -2.0, -9.0]
    )  # two examples, of three and of two choices
    group = torch.tensor([0, 0, 0, 1, 1])
    characters = torch.tensor([4, 10, 2, 1, 9])
    target = torch.tensor([2, 1])
    plain, norm = MultipleChoice(), MultipleChoice(normalize=True)
    for metric in (plain, norm):
        metric.update(scores, characters, group, target)
    assert plain.compute() == 0.5  # the third, and the first
    assert norm.compute() == 0.5  # the second (-0.5 a character), and the second (-1)
