"""Vocabulary-parallel linear_logp: two gloo processes with uneven shards against the fp64 reference and the plain op."""

from __future__ import annotations

import itertools
import math
import multiprocessing
import socket
import traceback

import pytest
import torch
import torch.distributed as dist

from fastalign.ops import reference
from fastalign.ops.linear_logp import linear_logp
from fastalign.ops.linear_parallel import vocab_parallel_linear_logp

WORLD = 2


def inputs(dtype: torch.dtype, vocab: int = 101, rows: int = 37, width: int = 19):
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(rows, width, generator=generator).to(dtype)
    weight = (torch.randn(vocab, width, generator=generator) * 0.7).to(dtype)
    bias = torch.randn(vocab, generator=generator).to(dtype)
    targets = torch.randint(vocab, (rows,), generator=generator)
    targets[::5] = -100
    upstream = torch.randn(2, rows, generator=generator)
    return hidden, weight, bias, targets, upstream


def outcome(run, hidden, weight, bias, targets, upstream):
    leaves = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
    logp, entropy = run(*leaves, targets)
    (logp * upstream[0] + entropy * upstream[1]).sum().backward()
    return [logp.detach(), entropy.detach(), *(leaf.grad for leaf in leaves)]


def shard_of(rank: int, vocab: int) -> slice:
    cut = vocab // 3
    return slice(0, cut) if rank == 0 else slice(cut, vocab)


def check(rank: int) -> None:
    for dtype, temperature, softcap in itertools.product((torch.float32, torch.bfloat16), (1.0, 0.7), (None, 4.0)):
        values = inputs(dtype)
        hidden, weight, bias, targets, upstream = values
        mine = shard_of(rank, len(weight))
        options = {"temperature": temperature, "logit_softcap": softcap, "return_entropy": True}

        def parallel(h, w, b, y, options=options):
            return vocab_parallel_linear_logp(h, w, y, bias_shard=b, **options)

        def plain(h, w, b, y, options=options):
            return linear_logp(h, w, y, bias=b, **options)

        def exact(h, w, b, y, options=options):
            return reference.linear_logp(h, w, y, bias=b, **options)

        ours = outcome(parallel, hidden, weight[mine], bias[mine], targets, upstream)
        whole = outcome(plain, *values)
        want = outcome(exact, *(v.double() for v in (hidden, weight, bias)), targets, upstream.double())
        for index, (got, single, gold) in enumerate(zip(ours, whole, want, strict=True)):
            single, gold = (t[mine] if index >= 3 else t for t in (single, gold))
            scale = gold.abs().max()
            error, allowed = (got.double() - gold).abs().max() / scale, (single.double() - gold).abs().max() / scale
            # two roundings instead of one where partial products of dL/dhidden are summed over ranks
            assert error <= 2 * allowed + 2e-6, (dtype, temperature, softcap, index, float(error), float(allowed))
    check_extremes(rank)


def check_extremes(rank: int) -> None:
    hidden, weight, bias, targets, _ = inputs(torch.float32)
    mine = shard_of(rank, len(weight))
    dead = bias.clone()
    dead[shard_of(0, len(weight))] = -math.inf  # a shard of nothing but -inf
    alive = torch.where(targets >= 0, targets.clamp(min=len(weight) // 3), targets)
    logp, entropy = vocab_parallel_linear_logp(hidden, weight[mine], alive, bias_shard=dead[mine], return_entropy=True)
    want = reference.linear_logp(hidden.double(), weight.double(), alive, bias=dead.double(), return_entropy=True)
    torch.testing.assert_close(logp.double(), want[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy.double(), want[1], rtol=1e-5, atol=1e-5)
    shifted = torch.zeros_like(bias) + 1e4  # logits of 1e4 in fp32 differ by steps of 1e-3; the plain op sees the same ones
    ours = vocab_parallel_linear_logp(hidden, weight[mine], targets, bias_shard=shifted[mine])
    torch.testing.assert_close(ours, linear_logp(hidden, weight, targets, bias=shifted), rtol=1e-6, atol=2e-6)
    nothing = torch.full_like(targets, -100)
    leaf = weight[mine].clone().requires_grad_()
    out = vocab_parallel_linear_logp(hidden, leaf, nothing)
    out.sum().backward()
    assert not out.any()
    assert not leaf.grad.any()
    with pytest.raises(ValueError, match="got 500 at row 3"):
        vocab_parallel_linear_logp(hidden, weight[mine], torch.full_like(targets, -100).index_fill(0, torch.tensor([3]), 500))
    check_empty_shard(rank)
    leaf = hidden.clone().requires_grad_()
    (first,) = torch.autograd.grad(vocab_parallel_linear_logp(leaf, weight[mine], targets).sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        first.sum().backward()


def check_empty_shard(rank: int) -> None:
    hidden, weight, _, targets, upstream = inputs(torch.float32)
    mine = slice(0, len(weight)) if rank == 0 else slice(0, 0)
    found = []
    for run, shard in ((vocab_parallel_linear_logp, mine), (linear_logp, slice(None))):
        x, w = hidden.clone().requires_grad_(), weight[shard].clone().requires_grad_()
        logp, entropy = run(x, w, targets, return_entropy=True)
        ((logp + 0.3 * entropy) * upstream).sum().backward()
        found.append((logp, entropy, x.grad, w.grad))
    for ours, want in zip(found[0][:3], found[1][:3], strict=True):
        torch.testing.assert_close(ours, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[0][3], found[1][3][mine], rtol=1e-5, atol=1e-5)


def work(rank: int, port: int, results) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORLD)
        check(rank)
        dist.destroy_process_group()
        results.put((rank, ""))
    except BaseException:
        results.put((rank, traceback.format_exc()))


def test_linear_parallel_two_processes_equal_the_whole_head():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=work, args=(rank, port, results)) for rank in range(WORLD)]
    for process in processes:
        process.start()
    try:
        failures = [text for _, text in (results.get(timeout=240) for _ in processes) if text]
    finally:
        for process in processes:
            process.join(30)
            process.kill()
    assert not failures, "\n".join(failures)


def test_linear_parallel_needs_a_group():
    hidden, weight, _, targets, _ = inputs(torch.float32)
    with pytest.raises(RuntimeError, match="no process group"):
        vocab_parallel_linear_logp(hidden, weight, targets)
