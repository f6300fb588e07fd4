"""as_tree: a padded batch and its token tree predict the same tokens from the same pasts."""

import pytest
import torch

from fastalign.integrations.padded_batch import as_tree


def random_batch(draw, shared):
    """Sequences with padding on either side; groups of `shared` rows have one prompt."""
    rows, length = 6, 14
    ids = torch.randint(5, 50, (rows, length), generator=draw)
    attention, scored = torch.zeros(rows, length, dtype=torch.int64), torch.zeros(rows, length, dtype=torch.bool)
    for b in range(rows):
        left, right = (int(torch.randint(0, 4, (), generator=draw)) for _ in range(2))
        attention[b, left : length - right] = 1
        prompt = 3
        if b % shared:
            first = int(attention[b - 1].argmax())
            ids[b, left : left + prompt] = ids[b - 1, first : first + prompt]
        scored[b, left + prompt : length - right] = torch.rand(length - right - left - prompt, generator=draw) < 0.8
        scored[b, left + prompt] = True  # so that the prompt is exactly what comes before the first scored token
    return ids, attention, scored


@pytest.mark.parametrize("shared", [1, 2, 6])
@pytest.mark.parametrize("seed", range(5))
def test_padded_batch_every_scored_token_has_its_past(shared, seed):
    """The path from the root to the predicting row spells the tokens before the scored one, and counts its positions."""
    ids, attention, scored = random_batch(torch.Generator().manual_seed(seed), shared)
    tree = as_tree(ids, attention, scored[:, 1:])
    bounds, parent = tree.layout.cu_seqlens.tolist(), tree.layout.parent.tolist()
    wanted = scored[:, 1:].nonzero().tolist()
    assert len(tree.rows) == len(wanted)
    for row, (b, t) in zip(tree.rows.tolist(), wanted, strict=True):
        segment = next(s for s in range(len(parent)) if bounds[s] <= row < bounds[s + 1])
        past, stop = [], row + 1
        while segment >= 0:
            past = tree.input_ids[bounds[segment] : stop].tolist() + past
            segment = parent[segment]
            stop = bounds[segment + 1]
        assert past == ids[b, : t + 1][attention[b, : t + 1] == 1].tolist()
        assert int(tree.position_ids[row]) == len(past) - 1


def test_padded_batch_computes_each_prompt_once():
    ids, attention, scored = random_batch(torch.Generator().manual_seed(0), 6)
    tree = as_tree(ids, attention, scored[:, 1:])
    last = [int(row.nonzero()[-1]) for row in scored]
    first = [int(row.nonzero()[0]) for row in scored]
    assert len(tree.input_ids) == 3 + sum(b - a for a, b in zip(first, last, strict=True))
    assert tree.layout.parent.tolist().count(-1) == 1


def test_padded_batch_leaves_out_what_scores_nothing():
    ids, attention, scored = random_batch(torch.Generator().manual_seed(1), 1)
    scored[2] = False
    tree = as_tree(ids, attention, scored[:, 1:])
    assert len(tree.layout.parent) == 5
    scored[:] = False
    assert as_tree(ids, attention, scored[:, 1:]) is None


def test_padded_batch_names_what_is_no_sequence():
    ids, scored = torch.arange(8)[None], torch.ones(1, 7, dtype=torch.bool)
    hole = torch.tensor([[1, 1, 1, 0, 1, 1, 1, 1]])
    with pytest.raises(ValueError, match="padding inside"):
        as_tree(ids, hole, scored)
    late = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1]])
    with pytest.raises(ValueError, match="nothing before it"):
        as_tree(ids, late, scored)
