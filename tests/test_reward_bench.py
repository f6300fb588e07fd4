"""Pairwise accuracy on RewardBench-format files, over all and by subset."""

import json

import pytest

from fastalign.data import BadRecord, DataError, load_records
from fastalign.evaluation import reward_bench


def lengths(prompts, completions):
    """Longer is better; "none" has no score."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [None if text == "none" else float(len(text)) for text in texts]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_records(str(path))


def test_accuracy_over_all_by_subset_and_by_section(tmp_path):
    pairs = [("aaa", "a", "hep-cpp"), ("a", "aa", "hep-cpp"), ("aa", "bb", "hep-go"), ("aa", "bb", "hep-go")]
    pairs += [("aa", "b", "math-prm"), ("aaaa", "b", "xstest-should-refuse")]
    pairs += [("none", "b", "mine")]
    records = write(tmp_path / "bench.jsonl", [{"prompt": "p", "chosen": c, "rejected": r, "subset": s} for c, r, s in pairs])
    found = reward_bench(lengths, records)
    assert found.accuracy == pytest.approx((1 + 0 + 0.5 + 0.5 + 1 + 1 + 0) / 7)
    assert found.subsets == {"hep-cpp": 0.5, "hep-go": 0.5, "math-prm": 1.0, "mine": 0.0, "xstest-should-refuse": 1.0}
    assert found.sections == {"Safety": 1.0, "Reasoning": 0.75}  # math counts as much as all code
    assert (found.counts["hep-cpp"], found.num_unscored) == (2, 1)
    assert "[Reasoning]" in found.table()


@pytest.mark.parametrize("conversational", [False, True])
def test_plain_answers_become_turns_when_asked_for(tmp_path, conversational):
    seen = []

    def judge(prompts, completions):
        seen.extend(zip(prompts, completions, strict=True))
        return [1.0, 0.0]

    found = reward_bench(
        judge, write(tmp_path / "b.jsonl", [{"prompt": "p", "chosen": "c", "rejected": "r"}]), conversational=conversational
    )
    assert found.accuracy == 1.0
    turn = ([{"role": "user", "content": "p"}], [{"role": "assistant", "content": "c"}])
    assert seen[0] == (turn if conversational else ("p", "c"))


def test_missing_columns_and_empty_files_are_errors(tmp_path):
    with pytest.raises(BadRecord, match=r"b.jsonl:1: expected column 'rejected'"):
        reward_bench(lengths, write(tmp_path / "b.jsonl", [{"prompt": "p", "chosen": "c"}]))
    with pytest.raises(DataError, match="at least one record"):
        reward_bench(lengths, [])
