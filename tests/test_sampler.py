"""The sampler: its random numbers, its distribution, its truncation, and what it says of rows it cannot draw from."""

import os

import pytest
import torch

from fastalign.ops.backend import native, use_backend
from fastalign.ops.sampling import philox, sample, uniform


def draw(logits, u, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, softcap=None):
    n = len(logits)
    columns = [torch.full((n,), temperature), torch.full((n,), top_k), torch.full((n,), top_p), torch.full((n,), min_p)]
    return sample(logits, u, *columns, logit_softcap=softcap)


def kept_probabilities(logits, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """The truncated distribution by its definition, one row at a time, fp64: (probabilities [V], kept mass)."""
    p = torch.softmax(logits.double() / temperature, -1)
    left = p.clone()
    if top_k:
        left[p < p.sort(descending=True).values[min(top_k, len(p)) - 1]] = 0
    if top_p < 1:
        order = left.sort(descending=True).values
        cumulative = order.cumsum(0) / order.sum()
        left[left < order[int((cumulative < top_p).sum())]] = 0
    left[p < min_p * p.max()] = 0
    return left / left.sum(), float(left.sum())


@pytest.mark.parametrize(
    "counter, key, expected",
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_known_answers(counter, key, expected):
    words = philox(tuple(torch.tensor([c]) for c in counter), tuple(torch.tensor([k]) for k in key))
    assert [int(w) for w in words] == expected


def test_uniform_native_is_the_reference():
    if native() is None:
        pytest.skip("the native module is not built")
    generator = torch.Generator().manual_seed(0)
    keys = [torch.randint(-(2**63), 2**63 - 1, (500,), generator=generator) for _ in range(2)]
    keys += [torch.randint(0, 2**31, (500,), generator=generator) for _ in range(2)]
    with use_backend("native"):
        ours = uniform(*keys)
    with use_backend("reference"):
        assert torch.equal(ours, uniform(*keys))


def test_uniform_is_uniform_and_differs_in_every_part_of_its_key(backend):
    n = 20000
    zeros, counts = torch.zeros(n, dtype=torch.int64), torch.arange(n)
    runs = [uniform(*(counts if part == i else zeros for i in range(4))) for part in range(4)]
    for u in runs:
        assert float(u.min()) >= 0
        assert float(u.max()) < 1
        bins = torch.histc(u, 100, 0, 1)
        chi2 = float(((bins - n / 100) ** 2 / (n / 100)).sum())
        assert chi2 < 160  # 99 degrees of freedom: p < 1e-4 above
    for i in range(4):
        for j in range(i):
            assert not torch.equal(runs[i], runs[j])


CASES = [
    {},
    {"temperature": 0.7},
    {"temperature": 1.6},
    {"top_k": 1},
    {"top_k": 5},
    {"top_p": 0.8},
    {"top_p": 0.05},
    {"min_p": 0.1},
    {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_sample_follows_the_distribution(backend, case, dtype):
    generator = torch.Generator().manual_seed(1)
    logits = (torch.randn(700, generator=generator) * 2).to(dtype)
    wanted, mass = kept_probabilities(logits, **case)
    n = 4000
    stratified = (torch.arange(n) + torch.rand(n, generator=generator)) / n  # an exact inverse CDF gives counts within 1 of n p
    tokens, kept = draw(logits.expand(n, -1), stratified.double(), **case)
    torch.testing.assert_close(kept.double(), torch.full((n,), mass, dtype=torch.float64), rtol=1e-5, atol=0)
    counts = torch.bincount(tokens, minlength=700)
    assert bool((counts[wanted == 0] == 0).all())
    assert float((counts - wanted * n).abs().max()) < 3


@pytest.mark.parametrize("case", [{}, {"temperature": 0.8}, {"top_k": 8}, {"top_p": 0.9}, {"min_p": 0.05}], ids=str)
def test_sample_chi_square_with_counter_based_uniforms(backend, case):
    logits = torch.randn(64, generator=torch.Generator().manual_seed(2))
    n = 16000
    zeros = torch.zeros(n, dtype=torch.int64)
    u = uniform(zeros + 7, zeros + 3, torch.arange(n) % 8, torch.arange(n) // 8)
    tokens, _ = draw(logits.expand(n, -1), u, **case)
    expected = kept_probabilities(logits, **case)[0] * n
    seen = torch.bincount(tokens, minlength=64).double()
    assert bool((seen[expected == 0] == 0).all())
    live = expected > 0
    chi2 = float(((seen - expected)[live] ** 2 / expected[live]).sum())
    freedom = int(live.sum()) - 1
    assert chi2 < freedom + 4.5 * (2 * freedom) ** 0.5 + 8


@pytest.mark.parametrize("vocab", [1, 7, 511, 512, 513, 4099, 50257])
def test_sample_native_equals_reference(vocab):
    if native() is None:
        pytest.skip("the native module is not built")
    generator = torch.Generator().manual_seed(vocab)
    n = 48
    logits = torch.randn(n, vocab, generator=generator) * torch.rand(n, 1, generator=generator) * 8
    columns = [
        torch.rand(n, generator=generator) * 1.5 * (torch.rand(n, generator=generator) > 0.2),
        torch.randint(0, 60, (n,), generator=generator),
        1 - torch.rand(n, generator=generator) * (torch.rand(n, generator=generator) > 0.3),
        torch.rand(n, generator=generator) * 0.2 * (torch.rand(n, generator=generator) > 0.5),
    ]
    u = torch.rand(n, generator=generator, dtype=torch.float64)
    with use_backend("native"):
        tokens, kept = sample(logits, u, *columns)
    with use_backend("reference"):
        wanted, mass = sample(logits, u, *columns)
    assert torch.equal(tokens, wanted)
    torch.testing.assert_close(kept, mass, rtol=1e-5, atol=0)


def test_sample_keeps_ties_at_the_border(backend):
    logits = torch.tensor([[0.0, 1.0, 1.0, 1.0, -1.0]])
    u = torch.linspace(0, 1, 31, dtype=torch.float64)[:-1]
    tokens, kept = draw(logits.expand(30, -1), u, top_k=2)
    assert sorted(set(tokens.tolist())) == [1, 2, 3]
    assert float(kept[0]) < 1


def test_sample_kept_mass_is_one_when_nothing_is_cut(backend):
    logits = torch.randn(16, 1000, generator=torch.Generator().manual_seed(3))
    u = torch.rand(16, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    tokens, kept = draw(logits, u, top_k=5000, min_p=1e-30)
    assert bool((kept == 1).all())
    assert torch.equal(tokens, draw(logits, u)[0])


def test_sample_greedy_takes_the_first_of_equals(backend):
    logits = torch.zeros(3, 100)
    logits[0, 70] = logits[0, 40] = 2.0
    logits[1, 99] = 1.0
    tokens, kept = draw(logits, torch.full((3,), 0.99, dtype=torch.float64), temperature=0.0, top_k=3, top_p=0.5)
    assert tokens.tolist() == [40, 99, 0]
    assert kept.tolist() == [1.0] * 3


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_sample_never_draws_minus_infinity(backend, softcap):
    logits = torch.full((64, 600), -torch.inf)
    logits[:, 77] = logits[:, 599] = -3.0
    tokens, _ = draw(logits, torch.linspace(0, 1 - 1e-12, 64, dtype=torch.float64), softcap=softcap)
    assert sorted(set(tokens.tolist())) == [77, 599]


def test_sample_softcap_is_the_capped_distribution(backend):
    logits = torch.randn(64, 400, generator=torch.Generator().manual_seed(5)) * 10
    u = torch.rand(64, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    capped = torch.tanh(logits.double() / 4) * 4
    wanted = torch.searchsorted(torch.softmax(capped, 1).cumsum(1), u[:, None], right=True)[:, 0]
    tokens, _ = draw(logits, u, softcap=4.0)
    assert int((tokens != wanted).sum()) == 0


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_sample_marks_rows_that_are_not_finite(backend, poison, temperature):
    logits = torch.zeros(3, 50)
    logits[1, 49] = poison
    logits[2] = -torch.inf
    tokens, kept = draw(logits, torch.full((3,), 0.5, dtype=torch.float64), temperature=temperature)
    assert int(tokens[0]) >= 0
    assert tokens[1:].tolist() == [-1, -1]
    assert bool(kept[1:].isnan().all())


def test_sample_extreme_uniforms_stay_in_the_vocabulary(backend):
    logits = torch.randn(2, 3000, generator=torch.Generator().manual_seed(7)) * 30
    tokens, _ = draw(logits, torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64))
    assert bool(((tokens >= 0) & (tokens < 3000)).all())


def test_sample_rows_do_not_depend_on_each_other(backend):
    generator = torch.Generator().manual_seed(8)
    logits = torch.randn(40, 2000, generator=generator)
    u = torch.rand(40, dtype=torch.float64, generator=generator)
    together = draw(logits, u, top_p=0.9)
    for i in range(40):
        alone = draw(logits[i : i + 1], u[i : i + 1], top_p=0.9)
        assert int(alone[0]) == int(together[0][i])
        assert float(alone[1]) == float(together[1][i])


def test_sample_names_a_column_of_the_wrong_size(backend):
    with pytest.raises(ValueError, match=r"uniforms must be \[2\]"):
        draw(torch.zeros(2, 5), torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize("backend", ["reference", "native", "triton"])
def test_sample_reads_columns_with_gaps(backend):
    if backend == "native" and native() is None:
        pytest.skip("the native module is not built")
    if backend == "triton":
        pytest.importorskip("triton")
        if os.environ.get("TRITON_INTERPRET") != "1":
            pytest.skip("Triton compiles here")
    logits, u = torch.randn(6, 50), torch.rand(12, dtype=torch.float64)[::2]
    columns = [torch.tensor(x) for x in (0.7, 20, 0.9, 0.01)]
    keys = [torch.arange(12)[::2] + i for i in range(4)]
    with use_backend(backend):
        tokens, kept = sample(logits, u, *(c.expand(6) for c in columns))
        wanted, wanted_kept = sample(logits, u.clone(), *(c.repeat(6) for c in columns))
        assert torch.equal(uniform(*keys), uniform(*(k.clone() for k in keys)))
    assert torch.equal(tokens, wanted)
    assert torch.equal(kept, wanted_kept)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("kept", [{}, {"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.5}])
@pytest.mark.parametrize("temperature", [1e-3, 1e-6, 1e-20, 1e-39])
def test_a_tiny_temperature_takes_the_most_probable_token(temperature, kept, softcap):
    """x / T - max / T in one rounding can be above 0 there, and a weight above 1 was written past the histogram's end."""
    generator = torch.Generator().manual_seed(1)
    logits = 4 * torch.randn(64, 5003, generator=generator)
    tokens, mass = draw(logits, torch.rand(64, generator=generator, dtype=torch.float64), temperature=temperature, softcap=softcap, **kept)
    capped = softcap * torch.tanh(logits / softcap) if softcap else logits
    room = 20 * temperature + (2e-6 if softcap else 0.0)  # what the soft-cap's own rounding can turn round
    assert (capped.gather(1, tokens[:, None])[:, 0] >= capped.max(1).values - room).all()
    assert (mass <= 1).all()
