"""Dialects of records, and tool conversations through chat templates of several families' shapes."""

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fastalign.data import BadRecord, Record, load_records, normalize, parse_dataset_map, sft_examples
from fastalign.data.dialects import as_prompt, read_transcript

GSM8K = Path(__file__).resolve().parents[2] / "shared/data/gsm8k"

CHATML = (
    "{%- if tools -%}<|im_start|>system\nTools: {{ tools | tojson }}<|im_end|>\n{% endif -%}"
    "{%- for m in messages -%}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{%- for c in m.tool_calls or [] -%}{{ c.function | tojson }}{%- endfor -%}<|im_end|>\n{% endfor -%}"
    "{%- if add_generation_prompt -%}<|im_start|>assistant\n{% endif -%}"
)
LLAMA = (
    "<|begin|>{%- if tools -%}<|start_header|>system<|end_header|>\n\nTools: {{ tools | tojson }}<|eot|>{%- endif -%}"
    "{%- for m in messages -%}{{ '<|start_header|>' + ('ipython' if m.role == 'tool' else m.role) + '<|end_header|>\n\n' }}"
    "{%- if 'tool_calls' in m -%}{%- if m.tool_calls | length != 1 -%}{{ raise_exception('one tool call at a time') }}{%- endif -%}"
    '{"name": "{{ m.tool_calls[0].function.name }}", "parameters": {{ m.tool_calls[0].function.arguments | tojson }}}'
    "{%- elif m.role == 'tool' -%}{{ m.content | tojson }}{%- else -%}{{ m.content | trim }}{%- endif -%}<|eot|>{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|start_header|>assistant<|end_header|>\n\n{% endif -%}"
)
MISTRAL = (
    "{%- set last = messages | selectattr('role', 'equalto', 'user') | list | last -%}<|begin|>"
    "{%- for m in messages -%}{%- if m.role == 'user' -%}"
    "{%- if tools and m == last -%}[AVAILABLE_TOOLS] {{ tools | tojson }}[/AVAILABLE_TOOLS]{%- endif -%}[INST] {{ m.content }}[/INST]"
    "{%- elif m.tool_calls -%}[TOOL_CALLS] [{%- for c in m.tool_calls -%}{{ c.function | tojson }}"
    "{{ ', ' if not loop.last }}{%- endfor -%}]<|eos|>"
    "{%- elif m.role == 'tool' -%}[TOOL_RESULTS] {{ m.content | tojson }}[/TOOL_RESULTS]"
    "{%- else -%}{{ ' ' + m.content }}<|eos|>{%- endif -%}{%- endfor -%}"
)
QWEN = (
    "{%- if tools -%}<|im_start|>system\n# Tools\n<tools>{%- for t in tools -%}\n{{ t | tojson }}{%- endfor -%}"
    "\n</tools><|im_end|>\n{% endif -%}"
    "{%- for m in messages -%}{%- if m.role == 'tool' -%}"
    "{%- if messages[loop.index0 - 1].role != 'tool' -%}<|im_start|>user{%- endif -%}"
    "{{ '\n' }}<tool_response>\n{{ m.content }}\n</tool_response>"
    "{%- if loop.last or messages[loop.index0 + 1].role != 'tool' -%}<|im_end|>\n{% endif -%}"
    "{%- else -%}<|im_start|>{{ m.role }}{{ '\n' + m.content if m.content or not m.tool_calls }}"
    "{%- for c in m.tool_calls or [] -%}{{ '\n' }}<tool_call>\n"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>{%- endfor -%}<|im_end|>\n'
    "{% endif -%}{%- endfor -%}{%- if add_generation_prompt -%}<|im_start|>assistant\n{% endif -%}"
)
SPECIAL = ("<|begin|>", "<|start_header|>", "<|end_header|>", "<|eot|>", "<|im_start|>", "<|im_end|>", "<|eos|>")
SPECIAL += ("[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]")

TOOLS = [{"type": "function", "function": {"name": "add", "description": "adds", "parameters": {"type": "object", "properties": {}}}}]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
WITH_TOOLS = [
    {"role": "user", "content": "Add 1 and 2"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "name": "add", "content": "3"},
    {"role": "assistant", "content": "It is 3."},
]
CALLED = '{"name": "add", "arguments": {"a": 1, "b": 2}}'
FAMILIES = {
    "chatml": (CHATML, [CALLED + "<|im_end|>", "It is 3.<|im_end|>"]),
    "llama": (LLAMA, ['{"name": "add", "parameters": {"a": 1, "b": 2}}<|eot|>', "It is 3.<|eot|>"]),
    "mistral": (MISTRAL, ["[TOOL_CALLS] [" + CALLED + "]<|eos|>", " It is 3.<|eos|>"]),
    "qwen": (QWEN, ["<tool_call>\n" + CALLED + "\n</tool_call><|im_end|>", "It is 3.<|im_end|>"]),
}


def tokenizer_of(template: str) -> PreTrainedTokenizerFast:
    """One token a byte, the templates' control words one token each."""
    core = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(t, special=True) for t in SPECIAL])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|eos|>")
    tokenizer.chat_template = template
    return tokenizer


def encode(record: dict, template: str) -> tuple[list[int], list[str], PreTrainedTokenizerFast]:
    """The ids, the texts of the scored runs, and the tokenizer."""
    tokenizer = tokenizer_of(template)
    segment = sft_examples([Record(record, "d.jsonl", 7)], tokenizer, max_length=2000).segments[0]
    runs: list[list[int]] = []
    before = False
    for token, scored in zip(segment.ids, segment.scored, strict=True):
        if scored:
            runs = [*runs, [token]] if not before else [*runs[:-1], [*runs[-1], token]]
        before = scored
    return list(segment.ids), [tokenizer.decode(run) for run in runs], tokenizer


@pytest.mark.parametrize("family", FAMILIES)
def test_tool_conversation_scores_calls_and_answers_alone(family):
    template, expected = FAMILIES[family]
    ids, runs, tokenizer = encode({"messages": WITH_TOOLS, "tools": TOOLS}, template)
    assert runs == expected
    whole = tokenizer.apply_chat_template(WITH_TOOLS, tools=TOOLS, tokenize=False)
    assert ids == tokenizer(whole, add_special_tokens=False)["input_ids"]
    assert "adds" in whole, "the tools reach the template"


@pytest.mark.parametrize("family", FAMILIES)
def test_tool_conversation_is_the_same_from_json_and_from_tables(family):
    """Arguments as JSON text (OpenAI), messages and tools as JSON text, and null entries as parquet fills them in."""
    template, _ = FAMILIES[family]
    expected = encode({"messages": WITH_TOOLS, "tools": TOOLS}, template)[:2]
    called = {"id": None, "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": 2}'}}
    openai = [WITH_TOOLS[0], {"role": "assistant", "content": None, "tool_calls": [called]}, *WITH_TOOLS[2:]]
    filled = [{"name": None, "tool_calls": None, **message} for message in openai]
    for messages in (openai, filled, json.dumps(filled)):
        assert encode({"messages": messages, "tools": json.dumps(TOOLS)}, template)[:2] == expected


@pytest.mark.parametrize("family", ["chatml", "mistral", "qwen"])
def test_two_calls_and_two_results_in_a_row(family):
    second = {"type": "function", "function": {"name": "mul", "arguments": {"a": 4}}}
    results = [{"role": "tool", "content": "3"}, {"role": "tool", "content": "8"}]
    messages = [WITH_TOOLS[0], {"role": "assistant", "content": "", "tool_calls": [CALL, second]}, *results, WITH_TOOLS[3]]
    _, runs, _ = encode({"messages": messages, "tools": TOOLS}, FAMILIES[family][0])
    assert len(runs) == 2
    assert CALLED in runs[0]
    assert '{"name": "mul", "arguments": {"a": 4}}' in runs[0]
    assert "8" not in runs[1]


def test_template_that_moves_the_tools_behind_an_earlier_answer_is_reported():
    """Mistral's shape puts the tools before the last question, so an earlier answer was generated behind other ids."""
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}, *WITH_TOOLS]
    with pytest.raises(BadRecord, match="no boundary in token ids"):
        encode({"messages": messages, "tools": TOOLS}, MISTRAL)
    assert encode({"messages": messages}, MISTRAL)[1][0] == " Hello<|eos|>", "without tools nothing moves"


def test_a_call_that_the_template_refuses_is_a_bad_record():
    messages = [WITH_TOOLS[0], {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]}]
    with pytest.raises(BadRecord, match=r"d\.jsonl:7: the chat template refuses these messages: one tool call at a time"):
        encode({"messages": messages}, LLAMA)


# ShareGPT


def test_sharegpt_becomes_messages():
    turns = [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    record = normalize(Record({"id": 3, "conversations": turns}, "d.jsonl", 2))
    assert record == {
        "id": 3,
        "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
    }
    assert record.where == "d.jsonl:2"
    assert normalize(Record({"conversations": json.dumps(turns)}, "d", 1)) == {"messages": record["messages"]}
    assert normalize(Record({"messages": turns[1:], "system": "s"}, "d", 1)) == {"messages": record["messages"]}
    ours = record["messages"]
    assert normalize(Record({"conversations": ours}, "d", 1)) == {"messages": ours}


def test_sharegpt_tool_turns_are_scored_as_messages_are():
    turns = [
        {"from": "human", "value": "Add 1 and 2"},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1, "b": 2}}'},
        {"from": "observation", "value": "3"},
        {"from": "gpt", "value": "It is 3."},
    ]
    for template, expected in FAMILIES.values():
        assert encode({"conversations": turns, "tools": json.dumps(TOOLS)}, template)[1] == expected


def test_sharegpt_preferences_become_a_prompt_and_messages():
    record = {"conversations": [{"from": "human", "value": "q"}], "chosen": {"from": "gpt", "value": "yes"}, "rejected": "no"}
    assert normalize(Record(record, "d", 1)) == {
        "prompt": [{"role": "user", "content": "q"}],
        "chosen": [{"role": "assistant", "content": "yes"}],
        "rejected": [{"role": "assistant", "content": "no"}],
    }


@pytest.mark.parametrize(
    "turns, reason, words",
    [
        ([{"from": "humn", "value": "q"}], "unknown role", "expected 'from' to be one of human, user, gpt"),
        ([{"from": "human", "value": 3}], "wrong type", r"conversations\[0\]: expected \{from, value\}"),
        ([{"from": "human"}], "wrong type", r"conversations\[0\]: expected \{from, value\}"),
        (["q"], "wrong type", r"conversations\[0\]: expected \{from, value\}"),
        ([{"from": "human", "value": "q"}, {"from": "function_call", "value": "add(1)"}], "invalid JSON", "expected a call as JSON"),
        ([{"from": "human", "value": "q"}, {"from": "function_call", "value": "[3]"}], "wrong type", "expected a call"),
        ("[{", "invalid JSON", "column 'conversations'"),
        ([], "empty messages", "expected at least one message"),
        ([{"from": "human", "value": "q"}], "empty completion", r"got roles \['user'\]"),
    ],
)
def test_bad_sharegpt_is_reported_with_its_line(turns, reason, words):
    with pytest.raises(BadRecord, match=words) as caught:
        encode({"conversations": turns}, CHATML)
    assert str(caught.value).startswith("d.jsonl:7: ")
    assert caught.value.reason == reason
    good = Record({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, "d.jsonl", 8)
    records = [Record({"conversations": turns}, "d.jsonl", 7), good]
    found = sft_examples(records, tokenizer_of(CHATML), max_length=99, on_bad_record="skip")
    assert (found.indices, found.skipped_reasons) == ([1], {reason: 1})


# HH


HH = "\n\nHuman: Hi there\n\nAssistant: Hello!\n\nHuman: 1+1?\n\nAssistant:"


def test_transcripts_share_their_prompt():
    record = normalize(Record({"chosen": HH + " 2", "rejected": HH + " It is\n\n3."}, "hh.jsonl", 4))
    assert record["prompt"] == [
        {"role": "user", "content": "Hi there"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "1+1?"},
    ]
    assert record["chosen"] == [{"role": "assistant", "content": "2"}]
    assert record["rejected"] == [{"role": "assistant", "content": "It is\n\n3."}]
    assert record.where == "hh.jsonl:4"


def test_transcripts_that_part_early_keep_their_own_turns():
    record = normalize(Record({"chosen": HH + " 2", "rejected": HH.replace("Hello!", "Go away.") + " 3"}, "d", 1))
    assert [m["content"] for m in record["prompt"]] == ["Hi there"]
    assert [m["content"] for m in record["chosen"]] == ["Hello!", "1+1?", "2"]
    assert [m["content"] for m in record["rejected"]] == ["Go away.", "1+1?", "3"]


def test_equal_transcripts_keep_their_answers():
    record = normalize(Record({"chosen": HH + " 2", "rejected": HH + " 2"}, "d", 1))
    assert record["chosen"] == record["rejected"] == [{"role": "assistant", "content": "2"}]


def test_transcripts_that_share_nothing_are_bad():
    record = normalize(Record({"chosen": HH + " 2", "rejected": HH.replace("Hi there", "Hey") + " 3"}, "d", 1))
    assert record == {}
    assert record.error == "no shared prompt: chosen and rejected do not begin with the same turn"


def test_transcript_prompt_makes_plain_sides_messages():
    columns = {"prompt": "\n\nHuman: 1+1?\n\nAssistant:", "completion": " 2", "label": True}
    assert normalize(Record(columns, "d", 1)) == {
        "prompt": [{"role": "user", "content": "1+1?"}],
        "completion": [{"role": "assistant", "content": "2"}],
        "label": True,
    }


def test_transcript_as_completion_scores_its_last_answer():
    _, runs, _ = encode({"completion": HH + " 2"}, CHATML)
    assert runs == ["2<|im_end|>"]


ASKED = [{"role": "user", "content": "a?"}]
ANSWERED = [*ASKED, {"role": "assistant", "content": "b"}]


@pytest.mark.parametrize(
    "columns, prompt",
    [
        ({"messages": ANSWERED}, ASKED),
        ({"messages": [*ANSWERED, *ASKED]}, [*ANSWERED, *ASKED]),
        ({"messages": [*ANSWERED, {"role": "assistant", "content": "c"}]}, ASKED),
        ({"conversations": [{"from": "human", "value": "a?"}, {"from": "gpt", "value": "b"}]}, ASKED),
        ({"prompt": "\n\nHuman: a?\n\nAssistant:"}, ASKED),
        ({"prompt": "\n\nHuman: a?\n\nAssistant: b\n\nHuman: a?\n\nAssistant:"}, [*ANSWERED, *ASKED]),
        ({"chosen": "\n\nHuman: a?\n\nAssistant: b", "rejected": "\n\nHuman: a?\n\nAssistant: c"}, ASKED),
        ({"prompt": "a?"}, "a?"),
        ({"prompt": ASKED, "messages": ANSWERED}, ASKED),
        ({"messages": ANSWERED[1:]}, []),
    ],
)
def test_prompts_are_read_from_whole_conversations(columns, prompt):
    found = as_prompt(Record({**columns, "answer": "7"}, "f", 3))
    assert found["prompt"] == prompt
    assert (found["answer"], found.source, found.line) == ("7", "f", 3)


def test_prompts_of_bad_records_keep_their_reason():
    assert "martian" in as_prompt(Record({"conversations": [{"from": "martian", "value": "a"}]}, "f", 3)).error


@pytest.mark.parametrize("text", ["Human: hi", "Say:\n\nHuman: a\n\nAssistant: b", "2", None, ["x"]])
def test_other_texts_are_no_transcripts(text):
    assert read_transcript(text) is None


@pytest.mark.parametrize(
    "columns",
    [{"prompt": "q", "completion": "a"}, {"text": HH}, {"messages": WITH_TOOLS}, {"prompt": "q", "chosen": "a", "rejected": "b"}, {}],
)
def test_records_in_no_dialect_stay_as_they_are(columns):
    record = Record(columns, "d", 1)
    assert normalize(record) is record


@pytest.mark.skipif(not (GSM8K / "test.jsonl").is_file(), reason="GSM8K is not here")
def test_gsm8k_is_read_and_scored():
    columns = parse_dataset_map("question=prompt,answer=completion")
    records = load_records(str(GSM8K / "test.jsonl"), columns=columns)
    tokenizer = tokenizer_of(CHATML)
    found = sft_examples(records, tokenizer, max_length=4000)
    assert len(found.segments) == len(records) == 1319
    for record, segment in zip(records, found.segments, strict=True):
        scored = [token for token, flag in zip(segment.ids, segment.scored, strict=True) if flag]
        assert tokenizer.decode(scored) == record["completion"] + "<|eos|>"
