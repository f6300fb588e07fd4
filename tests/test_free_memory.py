"""How much memory is free: a container's limit counts, not the machine alone."""

from __future__ import annotations

import pytest
from tiny_models import llama

from fastalign.generation import free_memory
from fastalign.generation.free_memory import free_bytes, limit_left, machine_left


def group(folder, limit, used, stat="inactive_file 0"):
    folder.mkdir()
    (folder / "limit").write_text(limit + "\n")
    (folder / "used").write_text(used + "\n")
    (folder / "memory.stat").write_text(stat + "\n")
    return limit_left(folder, "limit", "used")


def test_files_that_can_be_dropped_are_free(tmp_path):
    assert group(tmp_path / "a", "1000", "700", "anon 5\ninactive_file 100\nfile 300") == 400
    assert group(tmp_path / "b", "1000", "1200") == 0
    assert group(tmp_path / "c", "1000", "500", "total_inactive_file 7\ninactive_file 3") == 507


def test_no_limit_is_no_number(tmp_path):
    assert group(tmp_path / "a", "max", "700") is None
    assert group(tmp_path / "b", "?", "700") is None
    assert limit_left(tmp_path / "nowhere", "limit", "used") is None


@pytest.mark.parametrize("left", [123, None])
def test_the_smaller_one_counts(monkeypatch, left):
    monkeypatch.setattr(free_memory, "limit_left", lambda *_: left)
    found = free_bytes(llama())
    assert found == 123 if left else 0 < found <= 2 * machine_left()
