from __future__ import annotations

from bench.au import ACTION_UNITS, EXPRESSION_UNITS, expression_ids
from bench.au.codebook import OFFICIAL, SYMMETRIC
from bench.dataset import EXPRESSIONS


def test_every_expression_is_coded():
    assert set(EXPRESSION_UNITS) == set(EXPRESSIONS)
    assert [len(EXPRESSION_UNITS[name]) for name in EXPRESSIONS] == [0, 3, 5, 8, 9, 6, 5]


def test_action_units_have_distinct_facs_numbers_and_a_drawing_each():
    assert [unit.id for unit in ACTION_UNITS] == list(range(20))
    assert len({unit.facs for unit in ACTION_UNITS}) == len(OFFICIAL) == len(SYMMETRIC) == 20


def test_happiness_is_the_duchenne_smile():
    assert {ACTION_UNITS[i].facs for i in EXPRESSION_UNITS["happiness"]} == {6, 12, 25}


def test_class_names_are_found_in_any_case_and_as_adjectives():
    names = ["Neutral", "HAPPY", "surprised", " Fearful", "angry", "disgusted", "sad"]
    assert expression_ids(names).tolist() == expression_ids(EXPRESSIONS).tolist() == list(range(7))


def test_classes_outside_of_the_codebook_have_no_id():
    assert expression_ids(["contempt", "happiness", "other"]).tolist() == [-1, 1, -1]
