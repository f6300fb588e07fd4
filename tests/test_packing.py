"""The token tree's builder: what is forwarded, what is scored, who owns it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastalign.packing import Segment, conversation, group, pack, pair, sequences, split_by_tokens


def test_pack_group_forwards_the_prompt_once():
    packed = pack(group([1, 2, 3], [[4, 5], [6]]))
    assert packed.input_ids.tolist() == [1, 2, 3, 4, 5, 6]
    assert packed.position_ids.tolist() == [0, 1, 2, 3, 4, 3]
    assert packed.parent.tolist() == [-1, 0, 0]
    assert packed.rows.tolist() == [2, 3, 2], "the prompt's last row predicts the first token of each child"
    assert packed.targets.tolist() == [4, 5, 6]
    assert packed.cu_targets.tolist() == [0, 2, 3]
    assert packed.cu_groups.tolist() == [0, 2]


def test_pack_conversation_never_scores_the_first_token_of_a_root():
    packed = pack(conversation([7, 8, 9], True))
    assert packed.rows.tolist() == [0, 1]
    assert packed.targets.tolist() == [8, 9]
    masked = pack(conversation([7, 8, 9], [True, False, True]))
    assert masked.rows.tolist() == [1]
    assert masked.targets.tolist() == [9]


def test_pack_empty_completion_owns_nothing_and_keeps_its_place():
    packed = pack([group([1, 2], [[], [3]]), pair([4], [5], [])])
    assert packed.cu_targets.tolist() == [0, 0, 1, 2, 2]
    assert packed.cu_groups.tolist() == [0, 2, 4]


def test_pack_child_of_an_empty_segment_is_predicted_by_its_grandparent():
    packed = pack(Segment([1, 2], children=(Segment([], children=(Segment([3], scored=True),)),)))
    assert packed.rows.tolist() == [1]
    assert packed.position_ids.tolist() == [0, 1, 2]


def test_pack_shared_scored_token_counts_once():
    root = Segment([1], children=(Segment([2, 3], True, (Segment([4], True), Segment([5], True))),))
    packed = pack(root)
    assert packed.targets.tolist() == [2, 3, 4, 5]
    assert packed.cu_targets.tolist() == [0, 3, 4], "the first leaf owns the shared tokens"
    assert packed.rows.tolist() == [0, 1, 2, 2]


def test_pack_weights_are_none_when_uniform():
    assert pack(conversation([1, 2])).weights is None
    assert pack(conversation([1, 2, 3], weight=0.5)).weights.tolist() == [0.5, 0.5]
    assert pack(conversation([1, 2, 3], weight=[9, 1, 2])).weights.tolist() == [1, 2]


def test_pack_reports_bad_input():
    with pytest.raises(ValueError, match="at least one token"):
        pack([])
    with pytest.raises(ValueError, match="got -3 at position 1"):
        pack(conversation([1, -3]))
    with pytest.raises(ValueError, match="expected 2, got 1"):
        Segment([1, 2], [True])
    with pytest.raises(ValueError, match="one mask a completion"):
        group([1], [[2], [3]], [[True]])


def test_pack_deep_chain_needs_no_recursion():
    node = Segment([1], True)
    for _ in range(900):
        node = Segment([1], True, (node,))
    assert pack(node).num_tokens == 901


ids = st.lists(st.integers(0, 50), max_size=5)


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.tuples(st.lists(st.integers(0, 50), min_size=1, max_size=6), st.lists(ids, min_size=1, max_size=4)), min_size=1, max_size=5)
)
def test_pack_rows_predict_targets_on_every_path(groups):
    packed = pack([group(prompt, completions) for prompt, completions in groups])
    expected = [(prompt + c, len(prompt), c) for prompt, completions in groups for c in completions]
    assert sequences(packed) == [path for path, _, _ in expected]
    for b, (path, start, completion) in enumerate(expected):
        span = slice(packed.cu_targets[b], packed.cu_targets[b + 1])
        assert packed.targets[span].tolist() == completion
        rows = packed.rows[span]
        assert packed.position_ids[rows].tolist() == list(range(start - 1, start - 1 + len(completion)))
        assert packed.input_ids[rows].tolist() == path[start - 1 : -1] if completion else True
    assert torch.equal(packed.sequence_of_targets().bincount(minlength=len(expected)), torch.tensor([len(c) for _, _, c in expected]))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=20), st.integers(1, 40))
def test_split_by_tokens_keeps_every_tree_and_the_budget(sizes, budget):
    trees = [conversation([1] * n) for n in sizes]
    bins = split_by_tokens(trees, budget)
    assert sorted(i for members in bins for i in members) == list(range(len(sizes)))
    assert all(sum(sizes[i] for i in members) <= budget or len(members) == 1 for members in bins)
