"""Shapes of trials: which there are in a space, and the batches they mean."""

from tune_spaces.shapes import Shape, longest_of, shape_of, shapes_of
from tune_spaces.values import Choice, Range, Space

OWN = Shape(micro_batch_size=4, gradient_accumulation_steps=2, max_length=512)


def test_a_trial_has_the_plans_shape_but_for_what_it_names() -> None:
    assert shape_of(OWN, {"r": 8, "learning_rate": 1e-3}) == OWN
    made = shape_of(OWN, {"r": 8, "micro_batch_size": 8, "max_length": 128})
    assert made == Shape(micro_batch_size=8, gradient_accumulation_steps=2, max_length=128)


def test_a_space_has_every_combination_once_and_the_plans_own_first() -> None:
    space: Space = {
        "learning_rate": Range(low=1e-4, high=1e-3),
        "micro_batch_size": Choice(values=(2, 4)),
        "max_length": Choice(values=(256, 512)),
    }
    shapes = shapes_of(OWN, space)
    assert shapes[0] == OWN
    assert {(s.micro_batch_size, s.max_length) for s in shapes} == {(2, 256), (2, 512), (4, 256), (4, 512)}
    assert len(shapes) == 4
    assert shapes_of(OWN, {"r": Choice(values=(4, 8))}) == [OWN]


def test_the_longest_length_is_the_one_all_are_compared_on() -> None:
    assert longest_of({"max_length": Choice(values=(64, 256, 128))}) == 256
    assert longest_of({"r": Choice(values=(4, 8))}) is None
    assert longest_of({"max_length": Choice(values=("long",))}) is None, "refused elsewhere"
