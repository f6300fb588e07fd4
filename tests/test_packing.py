"""The token tree's builder: what is forwarded, what is scored, who owns it."""

import random

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


def filled(generator, num_bins, budget):
    """Sizes that fill `num_bins` micro-batches to the last token, shuffled: the fewest that can be."""
    sizes = []
    for _ in range(num_bins):
        left = budget
        while left:
            size = min(left, generator.randint(1, budget))
            sizes.append(size)
            left -= size
    generator.shuffle(sizes)
    return sizes


@pytest.mark.parametrize("budget", [7, 60, 1000])
@pytest.mark.parametrize("num_bins", [1, 9, 120])
def test_split_by_tokens_needs_few_micro_batches(budget, num_bins):
    """At most 11/9 of the fewest and one (Johnson et al. 1974, for many); at most one is half empty, or it would have taken another in."""
    for seed in range(5):
        sizes = filled(random.Random(seed), num_bins, budget)
        bins = split_by_tokens([conversation([1] * n) for n in sizes], budget)
        used = [sum(sizes[i] for i in members) for members in bins]
        assert max(used) <= budget
        assert num_bins <= len(bins) <= 11 / 9 * num_bins + 1
        assert sum(2 * tokens <= budget for tokens in used) <= 1


def best_fit_decreasing(sizes, budget):
    """Tokens of each micro-batch, by the definition written out: the largest first, each where it leaves the least room."""
    used: list[int] = []
    for size in sorted(sizes, reverse=True):
        fits = [b for b, tokens in enumerate(used) if tokens + size <= budget]
        if fits:
            best = max(fits, key=lambda b: used[b])
            used[best] += size
        else:
            used.append(size)
    return used


def test_split_by_tokens_has_as_many_as_best_fit_decreasing_and_none_larger():
    generator = random.Random(3)
    for budget in (5, 40, 200, 1000):
        sizes = [generator.randint(1, int(1.2 * budget)) for _ in range(300)]
        used = best_fit_decreasing(sizes, budget)
        trees = [conversation([1] * n) for n in sizes]
        bins = split_by_tokens(trees, budget)
        assert len(bins) == len(used)
        assert max(sum(sizes[i] for i in members) for members in bins) <= max(used)
        assert split_by_tokens(trees, budget) == bins, "the same cut every time"
        assert all(members == sorted(members) for members in bins)


def test_split_by_tokens_makes_them_alike():
    sizes = [529, 530, 524, 531, 526, 528, 527, 525]  # 4,220 tokens: not seven groups and one
    bins = split_by_tokens([conversation([1] * n) for n in sizes], 4096)
    assert [len(members) for members in bins] == [4, 4]
    assert all(abs(sum(sizes[i] for i in members) - 2110) < 8 for members in bins)
    assert sorted(map(len, split_by_tokens([conversation([1] * n) for n in (90, 5, 5, 5)], 60))) == [1, 3]


@pytest.mark.parametrize("sizes", [(5, 5, 4, 4, 3, 3, 3), (7, 7, 6, 6, 5, 5, 4, 4, 4)])
def test_split_by_tokens_keeps_the_budget_where_they_cannot_be_alike(sizes):
    """Where each to the smallest would go over the budget (as here, at Graham's bound) best fit's cut stays."""
    for budget in range(max(sizes), sum(sizes) + 1):
        bins = split_by_tokens([conversation([1] * n) for n in sizes], budget)
        assert len(bins) == len(best_fit_decreasing(sizes, budget))
        assert all(sum(sizes[i] for i in members) <= budget for members in bins)


def test_split_by_tokens_of_empty_trees_and_of_none():
    assert split_by_tokens([], 4) == []
    trees = [conversation([1] * n) for n in (0, 4, 0, 9)]
    bins = split_by_tokens(trees, 4)
    assert sorted(i for members in bins for i in members) == [0, 1, 2, 3]
    assert [3] in bins
    with pytest.raises(ValueError, match="max_tokens must be >= 1, got 0"):
        split_by_tokens(trees, 0)


def test_split_by_tokens_takes_a_hundred_thousand_trees():
    """Quadratic, this would take minutes: 100,000 trees in some 33,000 micro-batches."""
    generator = random.Random(0)
    shapes = [conversation([1] * n) for n in range(1, 1025)]
    trees = [shapes[generator.randint(400, 1000)] for _ in range(100_000)]
    bins = split_by_tokens(trees, 2100)
    assert sum(map(len, bins)) == 100_000
    total = sum(tree.num_tokens for tree in trees)
    assert len(bins) <= 11 / 9 * -(-total // 2100) + 1


def test_a_last_token_that_nobody_reads_is_not_forwarded():
    trees = [group([5, 6], [[7, 8, 9], [3], []]), conversation([1, 2, 4]), conversation([8])]
    whole, short = pack(trees), pack(trees, forward_last=False)
    assert short.input_ids.tolist() == [5, 6, 7, 8, 1, 2, 8]
    assert short.cu_seqlens.tolist() == [0, 2, 4, 4, 4, 6, 7]
    assert short.position_ids.tolist() == [0, 1, 2, 3, 0, 1, 0]
    for name in ("targets", "cu_targets", "cu_groups", "parent"):
        assert torch.equal(getattr(short, name), getattr(whole, name)), name
    predicted_by = [packed.input_ids[packed.rows].tolist() for packed in (whole, short)]
    assert predicted_by[0] == predicted_by[1] == [6, 7, 8, 6, 1, 2]
