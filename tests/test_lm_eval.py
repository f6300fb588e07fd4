"""Likelihoods against plain transformers in fp64, and the lm_eval adapter on a task of its own where lm_eval is installed."""

import builtins
import importlib
import sys
from types import SimpleNamespace

import pytest
import torch
from tiny_models import llama
from tiny_server import byte_model, byte_tokenizer, make_engine

from fastalign.evaluation.likelihoods import Likelihoods
from fastalign.generation import SamplingParams


@pytest.fixture(scope="module")
def engine():
    return make_engine(byte_model())


@pytest.fixture(scope="module")
def plain():
    return llama(vocab_size=259, max_position_embeddings=192).double().eval()


def ids_of(text):
    return byte_tokenizer()(text, add_special_tokens=False).input_ids


def expected(plain, context, rest):
    """(log-probability, is greedy) by one padded-free forward pass in fp64."""
    with torch.no_grad():
        logp = plain(torch.tensor([[*context, *rest]])).logits[0].log_softmax(-1)
    rows = logp[len(context) - 1 : -1]
    return rows.gather(1, torch.tensor(rest)[:, None]).sum().item(), rows.argmax(1).tolist() == rest


def test_continuations_have_plain_log_probs(engine, plain):
    likelihoods = Likelihoods(engine)
    pairs = [("The sky is", " blue"), ("The sky is", " green"), ("The sky is ", "up"), ("", "alone"), ("x", "y")]
    split = [("The sky is", " blue"), ("The sky is", " green"), ("The sky is", " up"), (None, "alone"), ("x", "y")]
    for (logp, greedy), (context, rest) in zip(likelihoods.continuations(pairs), split, strict=True):
        wanted = expected(plain, [1] if context is None else ids_of(context), ids_of(rest))
        assert logp == pytest.approx(wanted[0], abs=1e-4)
        assert greedy == wanted[1]


def test_greedy_continuations_are_known_as_such(engine):
    begin = ids_of("Once")
    out = engine.generate([begin], SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True))[0].outputs[0].token_ids
    other = [*out[:2], (out[2] + 1) % 259]
    likelihoods = Likelihoods(engine)
    assert [greedy for _, greedy in likelihoods._score([(begin, out), (begin, other)])] == [True, False]


def test_a_long_context_loses_its_beginning(engine, plain, caplog):
    (found,) = Likelihoods(engine, max_length=20).continuations([("a" * 10 + "b" * 17, "end")])
    assert found[0] == pytest.approx(expected(plain, ids_of("b" * 17), ids_of("end"))[0], abs=1e-4)
    assert "cut from the left to the 20 tokens" in caplog.text


@pytest.mark.parametrize("length", [1, 6, 7, 8, 13, 20])
def test_rolling_windows_predict_each_token_once_with_the_widest_context(engine, plain, length):
    likelihoods = Likelihoods(engine, max_length=8)
    ids = ids_of("abcdefghijklmnopqrstuvwxyz"[:length])
    windows = list(likelihoods.windows(ids))
    assert [token for _, rest in windows for token in rest] == ids
    assert all(len(context) + len(rest) <= 8 for context, rest in windows)
    assert len(windows) == 1 or sum(map(len, windows[-1])) == 8
    (found,) = likelihoods.texts(["abcdefghijklmnopqrstuvwxyz"[:length]])
    assert found == pytest.approx(sum(expected(plain, *window)[0] for window in windows), abs=1e-4)


def test_a_begin_token_is_put_in_front_once(engine):
    likelihoods = Likelihoods(engine, add_bos_token=True)
    assert likelihoods.encode("ab") == [1, *ids_of("ab")]
    assert likelihoods.encode("<s>ab") == [1, *ids_of("ab")]
    assert likelihoods.encode_pair("ab ", "c") == ([1, *ids_of("ab")], ids_of(" c"))
    assert Likelihoods(engine).encode_pair("", "<s>c") == ([1], ids_of("c"))


def test_limits_are_checked(engine):
    with pytest.raises(ValueError, match="max_length must be between 2 and the model's 192, got 200"):
        Likelihoods(engine, max_length=200)


def test_a_missing_lm_eval_is_told(monkeypatch):
    monkeypatch.delitem(sys.modules, "fastalign.integrations.lm_eval", raising=False)
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.partition(".")[0] == "lm_eval" and not (args and args[-1]):
            raise ModuleNotFoundError("No module named 'lm_eval'", name="lm_eval")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'fastalign\[eval\]'"):
        importlib.import_module("fastalign.integrations.lm_eval")


@pytest.fixture
def adapter(engine):
    pytest.importorskip("lm_eval")
    from fastalign.integrations.lm_eval import FastalignLM

    return FastalignLM(engine=engine, max_gen_toks=6)


def request(*args):
    return SimpleNamespace(args=args)


def test_the_harness_finds_the_model_by_name(adapter):
    from lm_eval.api.registry import get_model

    assert get_model("fastalign") is type(adapter)
    assert get_model("hf").__name__ == "HFLM"
    with pytest.raises(ValueError, match="expected a model, as in --model_args pretrained=FOLDER"):
        type(adapter)()


def test_generate_until_stops_and_samples_as_asked(adapter, engine, caplog):
    greedy = engine.generate([ids_of("Once")], SamplingParams(temperature=0.0, max_tokens=6))[0].outputs[0].text
    (text,) = adapter.generate_until([request("Once", {"until": ["\n\n"], "do_sample": False, "temperature": 0.7})], disable_tqdm=True)
    assert text == greedy
    (cut,) = adapter.generate_until([request("Once", {"until": greedy[2], "num_beams": 4})], disable_tqdm=True)
    assert cut == greedy[: greedy.index(greedy[2])]
    assert "num_beams=4 is not read" in caplog.text
    sampled = adapter.generate_until([request("Once", {"temperature": 1.0, "max_gen_toks": 12})] * 3, disable_tqdm=True)
    assert len(set(sampled)) == 3
    assert adapter.generate_until([request("z" * 500, {"max_gen_toks": 4})], disable_tqdm=True)[0] is not None


def test_chats_go_through_the_template(adapter):
    talk = [{"role": "user", "content": "q"}]
    assert adapter.apply_chat_template(talk) == "<user>q\n<assistant>"
    assert adapter.chat_template(True) == byte_tokenizer().chat_template
    assert adapter.chat_template(False) is None


def test_the_harness_evaluates_a_task(adapter, plain):
    """A multiple-choice task made here: the accuracy is that of plain log-probs."""
    import datasets
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.evaluator import evaluate

    rows = [{"question": f"{a}+1=", "choices": [str(a), str(a + 1), str(a + 2)], "label": 1} for a in range(1, 8)]

    class Sums(ConfigurableTask):
        def download(self, *args, **kwargs):
            self.dataset = {"test": datasets.Dataset.from_list(rows)}

    config = {"task": "sums", "dataset_path": "none", "output_type": "multiple_choice", "test_split": "test", "target_delimiter": ""}
    config |= {"doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}", "doc_to_target": "label"}
    task = Sums(config=config | {"metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]})
    found = evaluate(lm=adapter, task_dict={"sums": task}, bootstrap_iters=0)
    right = 0
    for row in rows:
        scores = [expected(plain, ids_of(row["question"]), ids_of(choice))[0] for choice in row["choices"]]
        right += max(range(3), key=scores.__getitem__) == 1
    assert found["results"]["sums"]["acc,none"] == pytest.approx(right / len(rows))
