# SPDX-License-Identifier: Apache-2.0
import pytest

from vllm_longspec.options import (
    AUTO_LEVELS,
    LongSpecOptions,
    count_verified_nodes,
    parse_copy_length,
    parse_tree_shape,
)
from vllm_longspec.tree.shape import MAX_NODES, TreeShape

VOCAB_SIZE = 1000


def test_default_shape():
    shape = parse_tree_shape({}, VOCAB_SIZE)
    assert shape.levels == (4, 16, 16, 16, 16)
    assert (shape.num_nodes, shape.num_rows, shape.max_depth, shape.max_width) == (68, 69, 5, 16)
    assert [shape.width(depth) for depth in range(6)] == [1, 4, 16, 16, 16, 16]


@pytest.mark.parametrize("options", [{"tree_shape": [2, 4, 4]}, {"tree_shape": (2, 4, 4), "gamma": None}])
def test_tree_shape(options):
    assert parse_tree_shape(options, VOCAB_SIZE) == TreeShape((2, 4, 4))


@pytest.mark.parametrize("options", [{"tree_shape": ["2", "4", "4"]}, {"tree_shape": (2, " 4", "04")}])
def test_integers_may_be_written_as_strings(options):
    assert parse_tree_shape(options, VOCAB_SIZE) == TreeShape((2, 4, 4))
    assert parse_tree_shape({"gamma": "3"}, VOCAB_SIZE) == TreeShape((1, 1, 1))


def test_gamma_is_a_chain():
    assert parse_tree_shape({"gamma": 3}, VOCAB_SIZE) == parse_tree_shape({"tree_shape": [1, 1, 1]}, VOCAB_SIZE)


def test_the_bound_of_shapes_that_are_chosen():
    assert parse_tree_shape({"tree_shape": "auto"}, VOCAB_SIZE) == TreeShape(AUTO_LEVELS)
    assert TreeShape(AUTO_LEVELS).num_nodes <= MAX_NODES


def test_widest_shapes():
    assert parse_tree_shape({"tree_shape": [3, 9, 27]}, 3).num_nodes == 39
    assert parse_tree_shape({"tree_shape": [MAX_NODES]}, VOCAB_SIZE).num_nodes == MAX_NODES
    assert parse_tree_shape({"gamma": MAX_NODES}, VOCAB_SIZE).max_depth == MAX_NODES


@pytest.mark.parametrize(
    ("options", "vocab_size", "said"),
    [
        ({"tree_shape": []}, VOCAB_SIZE, ["tree_shape is empty", "leave it out"]),
        ({"tree_shape": [4, 0]}, VOCAB_SIZE, ["tree_shape", "got 0 in [4, 0]"]),
        ({"tree_shape": [4, -1]}, VOCAB_SIZE, ["tree_shape", "got -1"]),
        ({"tree_shape": [4, 16.0]}, VOCAB_SIZE, ["tree_shape", "got 16.0"]),
        ({"tree_shape": [True, 4]}, VOCAB_SIZE, ["tree_shape", "got True"]),
        ({"tree_shape": ["four", 16]}, VOCAB_SIZE, ["tree_shape", "got 'four' in ['four', 16]"]),
        ({"tree_shape": ["2", ""]}, VOCAB_SIZE, ["tree_shape", "got ''"]),
        ({"tree_shape": ["2", "0"]}, VOCAB_SIZE, ["tree_shape", "got 0 in ['2', '0']"]),
        ({"tree_shape": ["2", "-4"]}, VOCAB_SIZE, ["tree_shape", "got '-4'"]),
        ({"tree_shape": ["2.0"]}, VOCAB_SIZE, ["tree_shape", "got '2.0'"]),
        ({"tree_shape": ["1_0"]}, VOCAB_SIZE, ["tree_shape", "got '1_0'"]),
        ({"tree_shape": ["٤"]}, VOCAB_SIZE, ["tree_shape", "got '٤'"]),
        ({"tree_shape": ["9" * 30]}, VOCAB_SIZE, ["tree_shape", "at most 255"]),
        ({"tree_shape": ["9" * 5000]}, VOCAB_SIZE, ["tree_shape must hold positive integers only"]),
        ({"tree_shape": "2,4"}, VOCAB_SIZE, ["tree_shape must be a list", "got '2,4'"]),
        ({"tree_shape": [None]}, VOCAB_SIZE, ["tree_shape", "got None"]),
        ({"tree_shape": 4}, VOCAB_SIZE, ["tree_shape must be a list", "got 4", "for example"]),
        ({"tree_shape": "4 16"}, VOCAB_SIZE, ["tree_shape must be a list", "got '4 16'"]),
        ({"tree_shape": {"4": 16}}, VOCAB_SIZE, ["tree_shape must be a list"]),
        ({"tree_shape": [4]}, 3, ["4 nodes at level 1", "at most 3", "narrow level 1"]),
        ({"tree_shape": [2, 7]}, 3, ["7 nodes at level 2", "at most 6", "narrow level 2"]),
        ({"tree_shape": [1, 255]}, VOCAB_SIZE, ["256 nodes", "at most 255"]),
        ({}, 3, ["4 nodes at level 1", "at most 3"]),
        ({"gamma": 0}, VOCAB_SIZE, ["gamma must be a positive integer", "got 0"]),
        ({"gamma": -2}, VOCAB_SIZE, ["gamma", "got -2"]),
        ({"gamma": 2.0}, VOCAB_SIZE, ["gamma", "got 2.0"]),
        ({"gamma": True}, VOCAB_SIZE, ["gamma", "got True"]),
        ({"gamma": "five"}, VOCAB_SIZE, ["gamma", "got 'five'"]),
        ({"gamma": ["5"]}, VOCAB_SIZE, ["gamma", "got ['5']"]),
        ({"gamma": 256}, VOCAB_SIZE, ["gamma is 256", "at most 255"]),
        ({"gamma": 4, "tree_shape": [1, 1]}, VOCAB_SIZE, ["tree_shape and gamma are mutually exclusive"]),
    ],
)
def test_wrong_shapes_are_refused_in_one_line(options, vocab_size, said):
    with pytest.raises(ValueError) as error:
        parse_tree_shape(options, vocab_size)
    message = str(error.value)
    assert "\n" not in message
    for part in said:
        assert part in message


@pytest.mark.parametrize(("given", "verified"), [(None, 10), (1, 1), (10, 10), (11, 10), ("8", 8)])
def test_verified_nodes(given, verified):
    assert count_verified_nodes(given, TreeShape((2, 4, 4))) == verified


@pytest.mark.parametrize("given", [0, -1, 2.0, True, "eight", "8.0", "0", ["8"]])
def test_wrong_number_of_verified_nodes_is_refused(given):
    with pytest.raises(ValueError, match=r"num_speculative_tokens must be a positive integer.*all 10 nodes"):
        count_verified_nodes(given, TreeShape((2, 4, 4)))


@pytest.mark.parametrize(
    ("given", "copy_length"),
    [({}, 16), ({"copy_length": None}, 16), ({"copy_length": 0}, 0), ({"copy_length": "8"}, 8)],
)
def test_copy_length(given, copy_length):
    assert parse_copy_length(given) == copy_length
    assert parse_copy_length({"copy_length": MAX_NODES}) == MAX_NODES


@pytest.mark.parametrize("given", [-1, 2.0, True, False, "", "-1", "many", [8], 256])
def test_wrong_copy_length_is_refused_in_one_line(given):
    with pytest.raises(ValueError) as error:
        parse_copy_length({"copy_length": given})
    message = str(error.value)
    assert "\n" not in message
    for part in ("copy_length", "from 0 to 255", f"got {given!r}", "leave it out for 16"):
        assert part in message


@pytest.mark.parametrize(
    ("levels", "copy_length", "max_depth"),
    [((4, 16, 16), 0, 3), ((4, 16, 16), 2, 3), ((4, 16, 16), 16, 16), ((4, 16, 16), 200, 36), ((1, 1), 16, 2)],
)
def test_the_deepest_node_is_one_of_the_tree_or_of_a_copy(levels, copy_length, max_depth):
    assert LongSpecOptions("glide", TreeShape(levels), copy_length=copy_length).max_depth == max_depth


@pytest.mark.parametrize(
    ("levels", "num_nodes", "narrower"),
    [
        ((4, 16, 16, 16, 16), 68, (4, 16, 16, 16, 16)),
        ((4, 16, 16, 16, 16), 24, (4, 16, 16, 16, 16)),
        ((4, 16, 16, 16, 16), 15, (4, 14, 13, 12, 11)),
        ((4, 16, 16, 16, 16), 7, (4, 6, 5, 4, 3)),
        ((4, 16, 16, 16, 16), 3, (3, 2, 1)),
        ((4, 16, 16, 16, 16), 1, (1,)),
        ((1, 1, 1, 1), 3, (1, 1, 1)),
    ],
)
def test_shape_for_the_best_nodes(levels, num_nodes, narrower):
    shape = TreeShape(levels).for_best(num_nodes)
    assert shape.levels == narrower
    assert shape.num_nodes >= num_nodes


def test_levels_by_the_number_of_nodes():
    """What a number stands for that was not planned, such as one of a list that was cut, does not matter."""
    shape = TreeShape((4, 16, 16, 16, 16, 16)).with_plans({24: 4, 7: 6, 3: 3})
    assert shape.plans == ((3, 3), (7, 6), (24, 4))
    assert [shape.num_levels(number) for number in (24, 23, 7, 3, 2, 1)] == [4, 6, 6, 3, 2, 1]
    assert shape.for_best(24) == TreeShape((4, 16, 16, 16))
    assert shape.for_best(7) == TreeShape((4, 6, 5, 4, 3, 2))
    assert (shape.max_depth, shape.num_nodes) == (6, 84)
    assert str(shape) == "[4, 16, 16, 16, 16, 16] at most, levels by verified nodes {3: 3, 7: 6, 24: 4}"
    assert str(TreeShape((2, 4))) == "[2, 4]"
