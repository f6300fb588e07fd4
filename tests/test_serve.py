"""The server: OpenAI's shapes, the engine's numbers, and clients that come in hundreds, go away, or ask for nonsense."""

import asyncio
import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

import httpx2 as httpx
from tiny_server import byte_model, byte_tokenizer, make_engine, serving

from fastalign import cli
from fastalign.generation import AsyncEngine, SamplingParams
from fastalign.models.load import load_tokenizer
from fastalign.recipes import serve as recipe
from fastalign.recipes.setup import Loaded
from fastalign.serving.app import create_app
from fastalign.serving.tokens import TokenNames

ROOT = Path(__file__).resolve().parents[1]
STORIES = ROOT.parent / "shared" / "models" / "stories260k"
CHAT = [{"role": "user", "content": "hi"}]


@pytest.fixture(autouse=True)
def _one_thread():
    """The engine's thread and the event loop share two cores with whatever else runs there."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model():
    return byte_model()


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="module")
def server(model):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with serving(AsyncEngine(make_engine(model), max_waiting=1000)) as running:
        yield running
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def client(server):
    with httpx.Client(base_url=server.url, timeout=60) as connection:
        yield connection


@pytest.fixture
def post(client):
    def send(path="/v1/completions", **body):
        answer = client.post(path, json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    return send


def offline(model, prompts, **params):
    return make_engine(model).generate(prompts, SamplingParams(**params))


def events(lines):
    """The objects of a stream of server-sent events, which must end with [DONE]."""
    data = [line.removeprefix("data: ") for line in lines if line]
    assert data[-1] == "[DONE]"
    return [json.loads(text) for text in data[:-1]]


def streamed(client, path="/v1/completions", **body):
    with client.stream("POST", path, json={**body, "stream": True}) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        return events(answer.iter_lines())


def idle(server):
    """Waits until nothing runs and holds blocks (the engine's thread frees them a moment later), and says how many are taken then."""
    give_up = time.monotonic() + 20
    while (server.engine.num_live or server.engine.engine.num_used_blocks) and time.monotonic() < give_up:
        time.sleep(0.005)
    return server.engine.engine.num_used_blocks


# --- completions --------------------------------------------------------------------------------------------------------


def test_serve_completion_is_what_generate_gives(model, post):
    prompts = ["hello", "the quick brown fox"]
    answer = post(prompt=prompts, n=3, max_tokens=20, seed=5, temperature=0.8, top_p=0.9, model="tiny", user="me")
    wanted = offline(model, prompts, n=3, max_tokens=20, seed=5, temperature=0.8, top_p=0.9)
    outputs = [out for output in wanted for out in output.outputs]
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    assert [choice["text"] for choice in answer["choices"]] == [out.text for out in outputs]
    assert [choice["finish_reason"] for choice in answer["choices"]] == [out.finish_reason for out in outputs]
    drawn = sum(len(out.token_ids) for out in outputs)
    prompt_tokens = sum(len(output.prompt_token_ids) for output in wanted)
    assert answer["usage"] == {"prompt_tokens": prompt_tokens, "completion_tokens": drawn, "total_tokens": prompt_tokens + drawn}
    assert (answer["object"], answer["model"]) == ("text_completion", "tiny")
    assert answer["id"].startswith("cmpl-")


def test_serve_defaults_are_openais(model, post):
    answer = post(prompt="hello", seed=1, temperature=None, stop=None, n=None, logit_bias=None, suffix=None, best_of=1, ignore_eos=True)
    assert answer["usage"]["completion_tokens"] == 16
    assert answer["choices"][0]["text"] == offline(model, ["hello"], max_tokens=16, seed=1, ignore_eos=True)[0].outputs[0].text
    negative, same = (post(prompt="hello", seed=seed, max_tokens=9)["choices"] for seed in (-1, 2**64 - 1))
    assert negative == same


def test_serve_token_ids_in_and_out(model, post):
    ids = [70, 80, 90]
    answer = post(prompt=ids, max_tokens=6, seed=2, return_token_ids=True)
    assert answer["choices"][0]["token_ids"] == offline(model, [ids], max_tokens=6, seed=2)[0].outputs[0].token_ids
    assert answer["choices"][0]["prompt_token_ids"] == ids
    two = post(prompt=[ids, [70]], max_tokens=6, seed=2, return_token_ids=True)
    assert [choice["prompt_token_ids"] for choice in two["choices"]] == [ids, [70]]
    assert two["choices"][0]["token_ids"] == answer["choices"][0]["token_ids"]


def test_serve_without_a_seed_draws_afresh(post):
    assert len({post(prompt="hello", max_tokens=12)["choices"][0]["text"] for _ in range(3)}) == 3


def test_serve_stream_is_the_whole_in_pieces(client, post):
    body = {"prompt": ["hello", "you"], "n": 2, "max_tokens": 30, "seed": 3, "logprobs": 2, "return_token_ids": True}
    chunks = streamed(client, **body, stream_options={"include_usage": True})
    whole = post(**body)
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == whole["usage"]
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert len({chunk["id"] for chunk in chunks}) == 1
    for choice in whole["choices"]:
        mine = [piece for chunk in chunks for piece in chunk["choices"] if piece["index"] == choice["index"]]
        assert "".join(piece["text"] for piece in mine) == choice["text"]
        assert [piece["finish_reason"] for piece in mine] == [None] * (len(mine) - 1) + [choice["finish_reason"]]
        assert [token for piece in mine for token in piece["token_ids"]] == choice["token_ids"]
        for name, values in choice["logprobs"].items():
            assert [value for piece in mine for value in piece["logprobs"][name]] == values
        assert len(mine) > 5


def test_serve_stop_strings_across_tokens(model, client, post):
    free = offline(model, ["hello"], max_tokens=120, seed=9, ignore_eos=True)[0].outputs[0].text
    stop = next(free[i : i + 3] for i in range(15, len(free)) if "\ufffd" not in free[i : i + 3])
    body = {"prompt": "hello", "max_tokens": 120, "seed": 9, "ignore_eos": True, "stop": [stop, "nowhere to be found"]}
    for choice in (post(**body)["choices"][0], _together(streamed(client, **body))):
        assert choice["text"] == free[: free.index(stop)]
        assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)


def _together(chunks):
    pieces = [piece for chunk in chunks for piece in chunk["choices"]]
    return {**pieces[-1], "text": "".join(piece["text"] for piece in pieces)}


def test_serve_logprobs_of_completions(model, post):
    text, (output,) = "hé!", offline(model, ["hé!"], max_tokens=8, seed=4, top_logprobs=3, ignore_eos=True)
    choice = post(prompt=text, max_tokens=8, seed=4, logprobs=3, echo=True, ignore_eos=True)["choices"][0]
    out, logprobs = output.outputs[0], choice["logprobs"]
    scores = make_engine(model).score([output.prompt_token_ids], top_logprobs=3)[0]
    assert choice["text"] == text + out.text
    assert logprobs["tokens"][:4] == ["h", "bytes:\\xc3", "bytes:\\xa9", "!"]
    assert logprobs["text_offset"][:5] == [0, 1, 1, 2, 3]
    assert logprobs["token_logprobs"] == scores.logprobs + out.raw_logprobs
    assert logprobs["top_logprobs"][0] is None
    for row, token, value in list(zip(logprobs["top_logprobs"], logprobs["tokens"], logprobs["token_logprobs"], strict=True))[1:]:
        assert row[token] == value
        assert 3 <= len(row) <= 4
        assert list(row.values())[:3] == sorted(row.values(), reverse=True)[:3]
    assert list(logprobs["top_logprobs"][-1].values())[:3] == [value for _, value in out.top_logprobs[-1]]


def test_serve_text_offsets_point_into_the_text(post):
    choice = post(prompt="ab", max_tokens=40, seed=8, logprobs=0, echo=True)["choices"][0]
    for token, offset in zip(choice["logprobs"]["tokens"], choice["logprobs"]["text_offset"], strict=True):
        if not token.startswith("bytes:"):
            assert choice["text"][offset : offset + 1] == token or choice["text"][offset] == "\ufffd"


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_serve_loglikelihood_as_evaluation_harnesses_ask_for_it(model, post, max_tokens):
    """A batch of contexts with their continuations, as token ids; the continuation's log-prob, and whether it is greedy."""
    contexts, continuations = [[70, 71, 72], [80] * 40], [[73, 74], [81]]
    greedy = make_engine(model).generate(contexts, SamplingParams(temperature=0.0, max_tokens=2))[0].outputs[0].token_ids
    contexts, continuations = [*contexts, contexts[0]], [*continuations, greedy]
    prompts = [context + rest for context, rest in zip(contexts, continuations, strict=True)]
    answer = post(prompt=prompts, echo=True, max_tokens=max_tokens, logprobs=1, temperature=0, seed=1234)
    found = []
    for choice, context, prompt in zip(answer["choices"], contexts, prompts, strict=True):
        values, tops = choice["logprobs"]["token_logprobs"], choice["logprobs"]["top_logprobs"]
        assert len(values) == len(tops) == len(prompt) + max_tokens
        part = slice(len(context), len(prompt))
        found.append((values[part], all(value == max(top.values()) for value, top in zip(values[part], tops[part], strict=True))))
    wanted = [score.logprobs[len(context) :] for score, context in zip(make_engine(model).score(prompts), contexts, strict=True)]
    assert [values for values, _ in found] == wanted
    assert found[2][1]
    assert not found[0][1]
    assert answer["usage"]["completion_tokens"] == 3 * max_tokens


def test_serve_echo_streams(client, post):
    body = {"prompt": "hello", "n": 2, "max_tokens": 4, "seed": 1, "echo": True, "logprobs": 1}
    chunks, whole = streamed(client, **body), post(**body)
    for choice in whole["choices"]:
        assert choice["text"].startswith("hello")
        mine = [piece for chunk in chunks for piece in chunk["choices"] if piece["index"] == choice["index"]]
        assert "".join(piece["text"] for piece in mine) == choice["text"]
        assert [value for piece in mine for value in piece["logprobs"]["token_logprobs"]] == choice["logprobs"]["token_logprobs"]
    assert [piece["text"] for chunk in streamed(client, prompt="hi", max_tokens=0, echo=True) for piece in chunk["choices"]] == ["hi", ""]


def test_serve_extensions_reach_the_engine(model, post, tokenizer):
    fields = {"top_k": 5, "min_p": 0.02, "min_tokens": 3, "ignore_eos": True, "stop_token_ids": [200], "max_tokens": 9, "seed": 6}
    choice = post(prompt="hello", priority=-3, timeout=60.0, return_token_ids=True, **fields)["choices"][0]
    assert choice["token_ids"] == offline(model, ["hello"], **fields)[0].outputs[0].token_ids
    forced = post(prompt="hello", logit_bias={"70": 100}, max_tokens=4, temperature=0, return_token_ids=True)["choices"][0]
    assert forced["token_ids"] == [70] * 4
    varied = post(prompt="hello", logit_bias={"70": 12, "71": 11}, frequency_penalty=2, max_tokens=6, temperature=0, return_token_ids=True)
    assert set(varied["choices"][0]["token_ids"]) > {70}
    late = post(prompt="hello", max_tokens=180, timeout=0.001, ignore_eos=True)["choices"][0]
    assert (late["finish_reason"], late["stop_reason"]) == ("abort", "timeout")


# --- chat ---------------------------------------------------------------------------------------------------------------


def test_serve_chat_is_generate_of_the_template(model, post, tokenizer):
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]},
    ]
    prompt = "<system>be brief\n<user>hi\n<assistant>"
    answer = post("/v1/chat/completions", messages=messages, max_completion_tokens=10, max_tokens=3, seed=7, n=2)
    wanted = offline(model, [prompt], max_tokens=10, seed=7, n=2)[0]
    assert [c["message"] for c in answer["choices"]] == [
        {"role": "assistant", "content": out.text, "refusal": None} for out in wanted.outputs
    ]
    assert answer["usage"]["prompt_tokens"] == len(prompt)
    assert answer["object"] == "chat.completion"


def test_serve_chat_fills_the_context_by_default(post):
    answer = post("/v1/chat/completions", messages=CHAT, seed=0, ignore_eos=True)
    assert answer["usage"]["total_tokens"] == 192
    assert answer["choices"][0]["finish_reason"] == "length"


def test_serve_chat_streams_role_text_and_reason(client, post):
    body = {"messages": CHAT, "max_tokens": 25, "seed": 2, "n": 2, "logprobs": True, "top_logprobs": 2}
    chunks = streamed(client, "/v1/chat/completions", **body)
    whole = post("/v1/chat/completions", **body)
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    for choice in whole["choices"]:
        mine = [piece for chunk in chunks for piece in chunk["choices"] if piece["index"] == choice["index"]]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(piece["delta"].get("content", "") for piece in mine) == choice["message"]["content"]
        assert mine[-1]["finish_reason"] == choice["finish_reason"]
        entries = [entry for piece in mine if piece["logprobs"] for entry in piece["logprobs"]["content"]]
        assert entries == choice["logprobs"]["content"]


def test_serve_chat_logprobs(model, post, tokenizer):
    params = {"max_tokens": 6, "seed": 3, "temperature": 0.7, "top_logprobs": 2}
    out = offline(model, ["<user>hi\n<assistant>"], **params)[0].outputs[0]
    choice = post("/v1/chat/completions", messages=CHAT, logprobs=True, **params)["choices"][0]
    names = TokenNames(tokenizer)
    for entry, token, value, top in zip(choice["logprobs"]["content"], out.token_ids, out.raw_logprobs, out.top_logprobs, strict=True):
        assert (bytes(entry["bytes"]), entry["logprob"]) == (names.bytes_of(token), value)
        assert [(bytes(other["bytes"]), other["logprob"]) for other in entry["top_logprobs"]] == [(names.bytes_of(t), v) for t, v in top]


def test_serve_token_names():
    ours = byte_tokenizer()
    names = TokenNames(ours)
    for text in ("aé€", " \n\x00"):
        assert b"".join(names.bytes_of(token) for token in ours(text).input_ids) == text.encode()
    assert names.text_of(2) == "</s>"
    assert names.bytes_of(100000) == b""
    if STORIES.is_dir():
        theirs = load_tokenizer(str(STORIES))
        told = b"".join(TokenNames(theirs).bytes_of(token) for token in theirs("Once € upon", add_special_tokens=False).input_ids)
        assert told == " Once € upon".encode()


# --- many clients, and clients that go ----------------------------------------------------------------------------------


def test_serve_two_hundred_streams(model, server, capsys):
    """All at once on a cache they do not fit in: none is lost, each is what the engine gives offline for its seed."""
    count, tokens = 200, 24
    prompts = [f"client {i % 7} says" for i in range(count)]
    seeds = [i % 50 for i in range(count)]
    each = [SamplingParams(max_tokens=tokens, seed=seed) for seed in seeds]
    wanted = make_engine(model).generate(prompts, each, request_ids=[0] * count)

    async def one(client, i):
        body = {"prompt": prompts[i], "seed": seeds[i], "max_tokens": tokens, "stream": True, "return_token_ids": True}
        async with client.stream("POST", "/v1/completions", json=body) as answer:
            assert answer.status_code == 200
            chunks = events([line async for line in answer.aiter_lines()])
        pieces = [piece for chunk in chunks for piece in chunk["choices"]]
        return "".join(piece["text"] for piece in pieces), [t for p in pieces for t in p["token_ids"]], pieces[-1]["finish_reason"]

    async def all_of_them():
        limits = httpx.Limits(max_connections=count)
        async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits) as client:
            return await asyncio.gather(*(one(client, i) for i in range(count)))

    start = time.perf_counter()
    results = asyncio.run(all_of_them())
    seconds = time.perf_counter() - start
    assert results == [(out.text, out.token_ids, out.finish_reason) for output in wanted for out in output.outputs]
    drawn = sum(len(ids) for _, ids, _ in results)
    with capsys.disabled():
        print(f"\n{count} streams: {seconds:.1f} s, {drawn} tokens, {drawn / seconds:.0f} tokens/s")
    assert idle(server) == 0


@pytest.mark.parametrize("stream", [True, False])
def test_serve_a_client_that_disconnects_frees_its_blocks(model, stream):
    engine = AsyncEngine(make_engine(model))
    body = {"prompt": "hello", "n": 4, "max_tokens": 180, "ignore_eos": True, "stream": stream}
    with serving(engine) as server:

        async def scenario():
            async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
                if stream:
                    async with client.stream("POST", "/v1/completions", json=body) as answer:
                        async for _ in answer.aiter_lines():
                            break
                else:
                    task = asyncio.ensure_future(client.post("/v1/completions", json=body))
                    while not engine.num_live:
                        await asyncio.sleep(0.002)
                    task.cancel()
                    await asyncio.gather(task, return_exceptions=True)

        asyncio.run(scenario())
        assert idle(server) == 0
        assert engine.engine.stats.decoded_tokens < 4 * 170
        assert httpx.get(f"{server.url}/health").status_code == 200


def test_serve_when_full_says_come_again(model):
    engine = AsyncEngine(make_engine(model), max_waiting=2)
    held = []

    async def scenario(url):
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            first = [asyncio.ensure_future(client.post("/v1/completions", json={"prompt": "a"})) for _ in range(2)]
            while engine.num_waiting < 2:
                await asyncio.sleep(0.002)
            refused = [await client.post("/v1/completions", json={"prompt": "b", "stream": s}) for s in (True, False)]
            several = await client.post("/v1/completions", json={"prompt": ["c"] * 2})
            held[0].set()
            return [*refused, several], await asyncio.gather(*first)

    with serving(engine) as server:
        held.append(threading.Event())
        engine._thread.call(held[0].wait)
        refused, served = asyncio.run(scenario(server.url))
        assert [answer.status_code for answer in refused] == [503] * 3
        assert refused[0].headers["retry-after"] == "1"
        assert refused[0].json()["error"]["code"] == "engine_full"
        assert [answer.status_code for answer in served] == [200, 200]
        assert httpx.post(f"{server.url}/v1/completions", json={"prompt": ["c"] * 2}).status_code == 200
        too_many = httpx.post(f"{server.url}/v1/completions", json={"prompt": ["c"] * 3})
        assert (too_many.status_code, too_many.json()["error"]["param"]) == (400, "prompt"), "coming again would not help"
        assert "at most 2 prompts" in too_many.json()["error"]["message"]
        assert idle(server) == 0


def test_serve_an_engine_that_fails_tells_its_clients(model):
    engine = AsyncEngine(make_engine(model))
    inner, body = engine.engine, {"prompt": "hello", "max_tokens": 5, "seed": 0}
    with serving(engine) as server, httpx.Client(base_url=server.url, timeout=60) as client:
        step, inner.step = inner.step, lambda: 1 / 0
        whole = client.post("/v1/completions", json=body)
        assert (whole.status_code, whole.json()["error"]["code"]) == (500, "engine_failed")
        with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as answer:
            error = json.loads([line for line in answer.iter_lines() if line][-1].removeprefix("data: "))["error"]
        assert error["type"] == "server_error"
        assert "ZeroDivisionError" in error["message"]
        assert client.get("/health").json() == {"status": "ok"}
        inner.step = step
        assert (
            client.post("/v1/completions", json=body).json()["choices"][0]["text"]
            == offline(model, ["hello"], max_tokens=5, seed=0)[0].outputs[0].text
        )
        inner.step = inner.abort = lambda *_: 1 / 0  # now nothing can be cleared up
        assert client.post("/v1/completions", json=body).status_code == 500
        engine._thread.join()
        health = client.get("/health")
        assert (health.status_code, health.json()["status"]) == (503, "dead")
        assert client.post("/v1/completions", json=body).json()["error"]["code"] == "engine_failed"


def test_serve_a_sample_that_fails_is_an_error(model):
    broken = byte_model()
    with torch.no_grad():
        broken.lm_head.weight[5] = float("nan")
    with serving(AsyncEngine(make_engine(broken))) as server:
        answer = httpx.post(f"{server.url}/v1/completions", json={"prompt": "hello"})
        assert answer.status_code == 500
        assert "hold NaN" in answer.json()["error"]["message"]
        assert httpx.get(f"{server.url}/health").status_code == 200


def test_serve_streams_the_log_probs_that_were_asked_for(client, post):
    body = {"prompt": "hello", "max_tokens": 40, "seed": 3, "logprobs": 0}
    whole = post(**body)["choices"][0]["logprobs"]["token_logprobs"]
    pieces = [
        choice["logprobs"]["token_logprobs"] for chunk in streamed(client, **body) for choice in chunk["choices"] if choice["logprobs"]
    ]
    assert [value for piece in pieces for value in piece] == whole


def test_serve_takes_what_clients_send_in_place_of_zero(post):
    greedy = post(prompt="hello", max_tokens=12, temperature=0)["choices"]
    for temperature in (1e-9, 5e-5):
        for kept in ({}, {"top_p": 0.9}, {"top_k": 5}):
            assert post(prompt="hello", max_tokens=12, temperature=temperature, **kept)["choices"][0]["text"] == greedy[0]["text"]


# --- errors -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path, body, status, param, words",
    [
        ("completions", {}, 400, "prompt", "prompt is required"),
        ("completions", {"prompt": []}, 400, "prompt", "expected a text, a list of token ids, or a list of either"),
        ("completions", {"prompt": [1, "a"]}, 400, "prompt", "expected a text"),
        ("completions", {"prompt": ""}, 400, "prompt", "at least one token"),
        ("completions", {"prompt": [3, 999]}, 400, "prompt", "token ids in [0, 259), got 999"),
        ("completions", {"prompt": "a" * 192}, 400, "prompt", "192 tokens, expected at most 191"),
        ("completions", {"prompt": "a" * 193, "max_tokens": 0}, 400, "prompt", "193 tokens, expected at most 192"),
        ("completions", {"prompt": "a", "model": "gpt"}, 404, "model", "'gpt' does not exist; this server has 'tiny'"),
        ("completions", {"prompt": "a", "top_p": 1.5}, 400, "top_p", "top_p: expected less than or equal to 1, got '1.5'"),
        ("completions", {"prompt": "a", "n": "2"}, 400, "n", "valid integer"),
        ("completions", {"prompt": "a", "n": 0}, 400, "n", "greater than or equal to 1"),
        ("completions", {"prompt": "a", "temperature": -1}, 400, "temperature", "greater than or equal to 0"),
        ("completions", {"prompt": "a", "stop": [""]}, 400, "stop", "a non-empty text or a list of them"),
        ("completions", {"prompt": "a", "tempreature": 1}, 400, "tempreature", "did you mean temperature?"),
        ("completions", {"prompt": "a", "stream_options": {"x": 1}}, 400, "x", "unknown field x"),
        ("completions", {"prompt": "a", "suffix": "b"}, 400, "suffix", "does not support"),
        ("completions", {"prompt": "a", "best_of": 4, "n": 2}, 400, "best_of", "samples are not ranked"),
        ("completions", {"prompt": "a", "logprobs": 21}, 400, "logprobs", "less than or equal to 20"),
        ("completions", {"prompt": "a", "min_tokens": 9, "max_tokens": 4}, 400, "min_tokens", "at most max_tokens (4)"),
        ("completions", {"prompt": "a", "logit_bias": {"x": 1}}, 400, "logit_bias", "got 'x'"),
        ("completions", {"prompt": "a", "logit_bias": {"259": 1}}, 400, "logit_bias", "got '259'"),
        ("completions", {"prompt": "a", "stop_token_ids": [259]}, 400, "stop_token_ids", "below 259, got 259"),
        ("completions", {"prompt": "a", "messages": CHAT}, 400, "messages", "unknown field messages"),
        ("completions", {"prompt": "a", "tools": []}, 400, "tools", "unknown field tools: it has no place here"),
        ("completions", {"prompt": "a", "top_k": 2**63}, 400, "top_k", "less than 2147483648"),
        (
            "chat/completions",
            {"messages": CHAT, "chat_template_kwargs": {"chat_template": "{{ 1 }}"}},
            400,
            "messages",
            "no variable of a chat",
        ),
        ("chat/completions", {"messages": CHAT, "chat_template_kwargs": {"max_length": 10**9}}, 400, "messages", "no variable of a chat"),
        ("chat/completions", {"messages": []}, 400, "messages", "at least 1 item"),
        ("chat/completions", {"messages": [{"content": "a"}]}, 400, "messages", "expected {role, content}"),
        ("chat/completions", {"messages": [{"role": "user", "content": 5}]}, 400, "messages", "expected text in 'content', got int"),
        ("chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages", "expected text"),
        ("chat/completions", {"messages": [{"role": "banned", "content": "a"}]}, 400, "messages", "no such role: banned"),
        ("chat/completions", {"messages": [{"role": "user", "content": "a" * 200}]}, 400, "messages", "expected at most 192"),
        ("chat/completions", {"messages": CHAT, "tools": [{"type": "function"}]}, 400, "tools", "does not support"),
        ("chat/completions", {"messages": CHAT, "response_format": {"type": "json_object"}}, 400, "response_format", "does not support"),
        ("chat/completions", {"messages": CHAT, "top_logprobs": 2}, 400, "top_logprobs", "together with logprobs: true"),
        ("chat/completions", {"messages": CHAT, "prompt": "a"}, 400, "prompt", "unknown field prompt"),
    ],
)
def test_serve_refuses_in_openais_words(client, path, body, status, param, words):
    for stream in (False, True):
        answer = client.post(f"/v1/{path}", json={**body, "stream": stream})
        error = answer.json()["error"]
        assert answer.status_code == status
        assert error["param"] == param
        assert words in error["message"]
        assert error["type"] == {400: "invalid_request_error", 404: "not_found_error"}[status]


def test_serve_refuses_half_of_a_surrogate_pair(client):
    answer = client.post("/v1/completions", content=b'{"prompt": "a\\ud800"}', headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert "half of a surrogate pair at character 1" in answer.json()["error"]["message"]


def test_serve_refuses_what_is_no_request(client):
    headers = {"Content-Type": "application/json"}
    answers = [client.post("/v1/completions", content=content, headers=headers) for content in (b"{", b"[1]", b"\xff", b"")]
    assert [answer.status_code for answer in answers] == [400] * 4
    assert "not valid JSON" in answers[0].json()["error"]["message"]
    assert client.get("/v1/nothing").json()["error"]["message"] == "there is no GET /v1/nothing"
    assert client.get("/v1/completions").status_code == 405
    for page in ("/docs", "/redoc", "/openapi.json"):
        assert client.get(page).status_code == 404


# --- what else there is -------------------------------------------------------------------------------------------------


def test_serve_models_health_and_metrics(client, server):
    card = client.get("/v1/models").json()["data"][0]
    assert (card["id"], card["max_model_len"]) == ("tiny", 192)
    assert client.get("/v1/models/tiny").json() == card
    assert client.get("/v1/models/other").status_code == 404
    assert client.get("/health").json() == {"status": "ok"}
    client.post("/v1/completions", json={"prompt": "hello", "max_tokens": 3})
    lines = client.get("/metrics").text.splitlines()
    numbers = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert int(numbers["fastalign_completion_tokens_total"]) > 0
    assert int(numbers['fastalign_requests_total{status="200"}']) > 0
    assert numbers["fastalign_requests_live"] == "0"


def in_process(app, *calls):
    """Answers of an application without a socket."""

    async def ask():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://app") as client:
            return [await client.request(method, path, **options) for method, path, options in calls]

    return asyncio.run(ask())


def test_serve_asks_for_the_key(model):
    engine = AsyncEngine(make_engine(model))
    app = create_app(engine, name="tiny", api_key="s3cret", api_docs=True)
    good, bad = {"headers": {"Authorization": "Bearer s3cret"}}, {"headers": {"Authorization": "Bearer wrong"}}
    answers = in_process(
        app,
        ("GET", "/v1/models", {}),
        ("GET", "/v1/models", bad),
        ("GET", "/v1/models", good),
        ("GET", "/health", {}),
        ("GET", "/openapi.json", good),
        ("POST", "/v1/completions", {"content": b"{"}),
    )
    asyncio.run(engine.aclose())
    assert [answer.status_code for answer in answers] == [401, 401, 200, 200, 200, 401]
    assert answers[0].json()["error"]["code"] == "invalid_api_key"


def test_serve_without_a_chat_template_says_so(model):
    inner = make_engine(model)
    inner.tokenizer.chat_template = None
    engine = AsyncEngine(inner)
    (answer,) = in_process(create_app(engine, name="tiny"), ("POST", "/v1/chat/completions", {"json": {"messages": CHAT}}))
    asyncio.run(engine.aclose())
    assert answer.json()["error"]["code"] == "no_chat_template"


def test_serve_within_a_small_cache(model):
    """A cache smaller than the model's context is the context."""
    engine = AsyncEngine(make_engine(model, kv_cache_tokens=64))
    body = {"messages": CHAT, "ignore_eos": True}
    calls = [("POST", "/v1/chat/completions", {"json": body}), ("POST", "/v1/completions", {"json": {"prompt": "a" * 64}})]
    chat, long = in_process(create_app(engine, name="tiny"), *calls)
    asyncio.run(engine.aclose())
    assert chat.json()["usage"]["total_tokens"] == 64
    assert long.json()["error"]["code"] == "context_length_exceeded"


def test_serve_with_openais_own_client(server):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    whole = client.completions.create(model="tiny", prompt="hello", max_tokens=8, seed=1, logprobs=2, extra_body={"top_k": 9})
    pieces = client.completions.create(model="tiny", prompt="hello", max_tokens=8, seed=1, stream=True, extra_body={"top_k": 9})
    assert "".join(piece.choices[0].text for piece in pieces) == whole.choices[0].text
    chat = client.chat.completions.create(model="tiny", messages=CHAT, max_tokens=8, seed=1, logprobs=True, top_logprobs=2)
    assert len(chat.choices[0].logprobs.content) == chat.usage.completion_tokens
    stream = client.chat.completions.create(
        model="tiny", messages=CHAT, max_tokens=8, seed=1, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == chat.choices[0].message.content
    assert chunks[-1].usage == chat.usage
    assert [model.id for model in client.models.list()] == ["tiny"]
    with pytest.raises(openai.BadRequestError, match="top_p"):
        client.completions.create(model="tiny", prompt="hello", top_p=3)
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="other", prompt="hello")


# --- the command --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    byte_model().save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return str(path)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_serve_command_ends_its_streams_and_exits(folder, number):
    command = [sys.executable, "-m", "fastalign", "serve", "--model_name_or_path", folder, "--port", "0", "--served_model_name", "tiny"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        assert line.startswith("serving tiny at http://127.0.0.1:"), line + process.stderr.read()
        reasons = reasons_until(f"{line.split()[3]}/completions", lambda: process.send_signal(number))
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert len(reasons) == 16
    assert "abort" in reasons
    assert (process.returncode, out) == (0, "")
    assert "Traceback" not in err


def reasons_until(url, interrupt):
    """The finish reasons of a long stream that something interrupts after its first event."""
    body = {"prompt": "hello", "n": 16, "max_tokens": 180, "ignore_eos": True, "stream": True, "model": "tiny"}
    with httpx.stream("POST", url, json=body, timeout=60) as answer:
        lines = answer.iter_lines()
        next(lines)
        interrupt()
        return [piece["finish_reason"] for chunk in events(lines) for piece in chunk["choices"] if piece["finish_reason"]]


def test_serve_command_says_when_the_port_is_taken(folder, server, capsys):
    port = server.url.rpartition(":")[2]
    assert cli.main(["serve", "--model_name_or_path", folder, "--port", port]) == 2
    assert f"cannot listen on 127.0.0.1:{port}" in capsys.readouterr().err


def test_serve_command_says_what_is_missing(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(recipe, "find_spec", lambda name: None)
    assert cli.main(["serve", "--model_name_or_path", str(tmp_path)]) == 2
    assert "needs fastapi and uvicorn: pip install 'fastalign[serve]'" in capsys.readouterr().err
    assert cli.main(["serve"]) == 2
    assert "needs --model_name_or_path" in capsys.readouterr().err


def test_serve_flags_reach_the_engine(model, tokenizer):
    arguments = dataclasses.replace(recipe.ServeArguments(), max_num_seqs=3, kv_cache_tokens=64, prefix_caching=False)
    engine = recipe.make_engine(Loaded(model, tokenizer, torch.device("cpu")), arguments)
    assert (engine.max_num_seqs, engine.kv_cache_tokens, engine.prefix_caching, engine.max_num_batched_tokens) == (3, 64, False, 8192)
