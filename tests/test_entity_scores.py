import random
import re

import pytest
import torch

from adaptrank.modules.entity_scores import EntityScores, entity_spans, has_entities, read_tag


def spans(text):
    return entity_spans([read_tag(tag) for tag in text.split()])


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("O O", set()),
        ("B-PER I-PER O B-LOC", {("PER", 0, 2), ("LOC", 3, 4)}),
        ("B-PER B-PER I-PER", {("PER", 0, 1), ("PER", 1, 3)}),
        ("I-PER I-PER O I-LOC", {("PER", 0, 2), ("LOC", 3, 4)}),  # IOB1
        ("I-PER B-PER", {("PER", 0, 1), ("PER", 1, 2)}),  # IOB1
        ("B-PER I-LOC", {("PER", 0, 1), ("LOC", 1, 2)}),
        ("B-PER I-PER E-PER S-PER O", {("PER", 0, 3), ("PER", 3, 4)}),  # IOBES
        ("B-PER L-PER U-LOC", {("PER", 0, 2), ("LOC", 2, 3)}),  # BILOU
        ("B-PER E-PER I-PER", {("PER", 0, 2), ("PER", 2, 3)}),
        ("PER PER O LOC", {("PER", 0, 2), ("LOC", 3, 4)}),  # IO
        ("B_PER I_PER", {("PER", 0, 2)}),
        ("B-a-b I-a-b", {("a-b", 0, 2)}),
    ],
)
def test_spans_of_a_scheme(tags, expected):
    assert spans(tags) == expected


def test_spans_of_any_bio_tags_are_those_of_a_regular_expression():
    """An entity is B or I of a kind, and then as many I of this kind as there are."""
    generator = random.Random(0)
    letters = {"O": "o", "B-X": "X", "I-X": "x", "B-Y": "Y", "I-Y": "y"}
    for _ in range(300):
        tags = [generator.choice(list(letters)) for _ in range(generator.randrange(9))]
        written = "".join(letters[tag] for tag in tags)
        expected = {
            (match[0][0].upper(), match.start(), match.end())
            for match in re.finditer("[Xx]x*|[Yy]y*", written)
        }
        assert spans(" ".join(tags)) == expected, tags


def test_scores_count_whole_entities_over_all_batches():
    names = ["O", "B-X", "I-X", "B-Y", "I-Y"]
    metric = EntityScores(names)
    # Right: one of two. The second has another end. A word without a label does not count.
    metric.update(torch.tensor([[1, 2, 0, 3, 0]]), torch.tensor([[1, 2, 0, 3, 4]]))
    metric.update(torch.tensor([[1, 0, 2]]), torch.tensor([[1, -100, 2]]))
    values = {name: float(value) for name, value in metric.compute().items()}
    assert values == pytest.approx({"precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3})
    metric.reset()
    metric.update(torch.tensor([[0, 0]]), torch.tensor([[0, 0]]))
    assert all(float(value) == 0 for value in metric.compute().values())


def test_tags_of_parts_of_speech_are_no_entities():
    assert not has_entities(["NOUN", "VERB"])
    assert has_entities(["O", "PER"])
    assert has_entities(["B-PER", "I-PER"])
