"""Text for people."""

from __future__ import annotations

from wlora_merge.text import human_bytes, nearest


def test_the_nearest_word_is_offered_only_where_one_is_near() -> None:
    assert nearest("causal-ml", ["causal-lm", "seq2seq-lm"]) == "; did you mean 'causal-lm'?"
    assert nearest("xyz", ["causal-lm"]) == ""


def test_sizes_are_written_as_a_person_reads_them() -> None:
    sizes = [0, 999, 1500, 999_960, 3_000_000, 5 * 10**9, 7 * 10**12, 7 * 10**15]
    said = ["0 bytes", "999 bytes", "1.5 kB", "1.0 MB", "3.0 MB", "5.0 GB", "7.0 TB", "7000.0 TB"]
    assert [human_bytes(n) for n in sizes] == said
