"""Conversations: ids as the template renders them, and masks that are exact in token ids."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fastalign.data import BadRecord, DataError, Record, prompt_examples, sft_examples

CHATML = (
    "{%- for m in messages -%}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor -%}"
    "{%- if add_generation_prompt -%}<|im_start|>assistant\n{% endif -%}"
)
MARKED = (
    "{%- if tools -%}<|im_start|>tools\n{{ tools | length }}<|im_end|>\n{% endif -%}"
    "{%- for m in messages -%}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor -%}"
    "{%- if add_generation_prompt -%}<|im_start|>assistant\n{% endif -%}"
)
USER, HI, BYE = {"role": "user", "content": "Add 1 and 2"}, {"role": "assistant", "content": "3"}, {"role": "assistant", "content": "Bye!"}
CHAT = [USER, HI, {"role": "user", "content": "Thanks"}, BYE]


def make_tokenizer(template: str = "", merges: tuple[tuple[str, str], ...] = ()) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer: one token a byte, unless `merges` say otherwise."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {c: i for i, c in enumerate([*alphabet, *("".join(m) for m in merges)])}
    core = Tokenizer(models.BPE(vocabulary, list(merges)))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(t, special=True) for t in ("<|im_start|>", "<|im_end|>", "<|end|>")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|end|>")
    tokenizer.chat_template = template or None
    return tokenizer


def encode(record: dict, template: str = CHATML, **options) -> tuple[list[str], list[str]]:
    """The whole sequence, and its scored runs as texts."""
    tokenizer = make_tokenizer(template, options.pop("merges", ()))
    segment = sft_examples([Record(record, "chat.jsonl", 3)], tokenizer, **{"max_length": 500, **options}).segments[0]
    runs, previous = [], False
    for token, scored in zip(segment.ids, segment.scored, strict=True):
        if scored and not previous:
            runs.append([])
        if scored:
            runs[-1].append(token)
        previous = scored
    return tokenizer.decode(segment.ids), [tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["prefixes", "marks"])
def test_messages_score_every_assistant_turn_with_its_end(template):
    text, runs = encode({"messages": CHAT}, template)
    assert text == (
        "<|im_start|>user\nAdd 1 and 2<|im_end|>\n<|im_start|>assistant\n3<|im_end|>\n"
        "<|im_start|>user\nThanks<|im_end|>\n<|im_start|>assistant\nBye!<|im_end|>\n"
    )
    assert runs == ["3<|im_end|>", "Bye!<|im_end|>"], "the newline after the end of turn is never generated"


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["prefixes", "marks"])
def test_messages_mask_is_exact_token_by_token(template):
    tokenizer = make_tokenizer(template)
    segment = sft_examples([Record({"messages": [USER, HI]}, "c", 1)], tokenizer, max_length=100).segments[0]
    expected = tokenizer("<|im_start|>user\nAdd 1 and 2<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
    answer = tokenizer("3<|im_end|>")["input_ids"]
    assert list(segment.ids) == expected + answer + tokenizer("\n")["input_ids"]
    assert list(segment.scored) == [False] * len(expected) + [True] * len(answer) + [False]


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["prefixes", "marks"])
def test_conversational_prompt_completion_scores_the_completion_alone(template):
    record = {"prompt": CHAT[:3], "completion": [BYE]}
    text, runs = encode(record, template)
    assert text.count("<|im_start|>") == 4
    assert runs == ["Bye!<|im_end|>"], "the assistant's turn inside the prompt is given, not learnt"


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["prefixes", "marks"])
def test_conversational_completion_never_scores_what_a_tool_wrote(template):
    tool = {"role": "tool", "content": "result 7"}
    _, runs = encode({"prompt": [USER], "completion": [HI, tool, BYE]}, template)
    assert runs == ["3<|im_end|>", "Bye!<|im_end|>"]


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["prefixes", "marks"])
def test_generation_prompt_is_a_prefix_of_what_is_trained(template):
    tokenizer = make_tokenizer(template)
    trained = sft_examples([Record({"prompt": [USER], "completion": [HI]}, "c", 1)], tokenizer, max_length=100).segments[0]
    prompt = prompt_examples([Record({"prompt": [USER], "answer": "3"}, "c", 1)], tokenizer)[0]
    assert list(trained.ids[: len(prompt.ids)]) == prompt.ids
    assert trained.scored.index(True) == len(prompt.ids)
    assert prompt.prompt == [USER]
    assert prompt.columns == {"answer": "3"}


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.text(min_size=1), st.text(min_size=1).filter(str.strip)), min_size=1, max_size=4), st.booleans())
def test_any_conversation_is_scored_exactly(turns, marked):
    """The scored runs are, byte by byte, what the assistant said."""
    turns = [[text.encode("utf-8", "ignore").decode() + "." for text in turn] for turn in turns]
    chat = [m for q, a in turns for m in ({"role": "user", "content": q}, {"role": "assistant", "content": a})]
    _, runs = encode({"messages": chat}, MARKED if marked else CHATML, max_length=100_000)
    assert runs == [a + "<|im_end|>" for _, a in turns]


def test_system_prompt_is_put_before_conversations_that_have_none():
    text, _ = encode({"messages": CHAT}, system_prompt="Be brief")
    assert text.startswith("<|im_start|>system\nBe brief<|im_end|>\n<|im_start|>user")
    own = [{"role": "system", "content": "Own"}, *CHAT]
    assert "Be brief" not in encode({"messages": own}, system_prompt="Be brief")[0]
    prompt = prompt_examples([Record({"prompt": [USER]}, "c", 1)], make_tokenizer(CHATML), system_prompt="Be brief")[0]
    assert prompt.prompt[0] == {"role": "system", "content": "Be brief"}


def test_system_prompt_with_a_plain_prompt_is_an_error():
    with pytest.raises(DataError, match="--system_prompt needs conversations"):
        prompt_examples([Record({"prompt": "Hi"}, "c", 1)], make_tokenizer(CHATML), system_prompt="Be brief")


def test_tools_and_template_arguments_reach_the_template():
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    assert encode({"messages": CHAT, "tools": tools}, MARKED)[0].startswith("<|im_start|>tools\n1<|im_end|>")
    assert encode({"messages": CHAT, "tools": '[{"name": "a"}, {"name": "b"}]'}, MARKED)[0].startswith("<|im_start|>tools\n2")
    text, _ = encode({"messages": CHAT, "chat_template_kwargs": {"style": "terse"}}, "{{ style }}" + CHATML)
    assert text.startswith("terse")


def test_messages_as_json_text_are_read():
    _, runs = encode({"messages": '[{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]'})
    assert runs == ["A<|im_end|>"]


def test_text_parts_are_read_as_content():
    template = CHATML.replace("{{ m.content }}", "{{ m.content if m.content is string else m.content[0].text }}")
    _, runs = encode({"messages": [USER, {"role": "assistant", "content": [{"type": "text", "text": "3"}]}]}, template)
    assert runs == ["3<|im_end|>"]


def test_last_assistant_message_of_a_prompt_is_continued():
    tokenizer = make_tokenizer(CHATML)
    prompt = prompt_examples([Record({"prompt": [USER, {"role": "assistant", "content": "The sum"}]}, "c", 1)], tokenizer)[0]
    assert tokenizer.decode(prompt.ids).endswith("<|im_start|>assistant\nThe sum")


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["prefixes", "marks"])
def test_merge_across_the_boundary_is_reported_not_guessed(template):
    """The answer begins with a newline, which the tokenizer merges with the header's: generation would never see that token."""
    record = {"messages": [USER, {"role": "assistant", "content": "\nNo"}]}
    with pytest.raises(BadRecord, match=r"chat\.jsonl:3: the beginning of .* is no boundary in token ids") as caught:
        encode(record, template, merges=(("Ċ", "Ċ"),))
    assert caught.value.reason == "no exact mask"


def test_template_that_rewrites_earlier_turns_names_the_remedy():
    """As templates do that strip the thoughts of earlier turns: no prefix of the conversation is one of its ids."""
    stripping = CHATML.replace("{{ m.content }}", "{{ m.content if loop.last else m.content.split('</think>')[-1] }}")
    thinking = {"role": "assistant", "content": "<think>1+2</think>3"}
    with pytest.raises(BadRecord, match=r"the end of message 1 is no boundary.*use a chat template with \{% generation %\}"):
        encode({"messages": [USER, thinking, USER, BYE]}, stripping)
    marked = stripping.replace("{{ m.content", "{% generation %}{{ m.content").replace("<|im_end|>", "<|im_end|>{% endgeneration %}", 1)
    assert encode({"messages": [USER, thinking, USER, BYE]}, marked)[1]


def test_conversation_that_begins_with_the_assistant():
    chat = [BYE, USER, HI]
    with pytest.raises(BadRecord, match="cannot begin with the assistant"):
        encode({"messages": chat})
    assert encode({"messages": chat}, MARKED)[1] == ["Bye!<|im_end|>", "3<|im_end|>"]


@pytest.mark.parametrize(
    "messages, message, reason",
    [
        ([], "expected at least one message", "empty messages"),
        ("hello", "expected a list of", "wrong type"),
        ("[oops", "invalid JSON", "invalid JSON"),
        ([{"role": "user"}, HI], r"messages\[0\]: expected text in 'content', got NoneType", "wrong type"),
        ([USER, {"role": "assistant", "content": 3}], r"messages\[1\]: expected text in 'content', got int 3", "wrong type"),
        ([USER, "3"], r"messages\[1\]: expected \{role, content\}", "wrong type"),
        ([USER], r"expected a message of the assistant to learn, got roles \['user'\]", "empty completion"),
        ([USER, {"role": "assistant", "content": " "}], "message 1: expected the assistant to say something", "empty completion"),
    ],
)
def test_bad_messages_are_reported_with_their_line(messages, message, reason):
    with pytest.raises(BadRecord, match=message) as caught:
        encode({"messages": messages})
    assert str(caught.value).startswith("chat.jsonl:3: ")
    assert caught.value.reason == reason


def test_template_refusal_is_a_bad_record():
    refusing = "{% if messages[0].role != 'user' %}{{ raise_exception('must begin with user') }}{% endif %}" + CHATML
    with pytest.raises(BadRecord, match=r"chat\.jsonl:3: the chat template refuses these messages: must begin with user"):
        encode({"messages": [{"role": "system", "content": "x"}, *CHAT]}, refusing)


def test_missing_template_is_an_error_even_where_bad_records_are_skipped():
    with pytest.raises(DataError, match="no chat template; give one with --chat_template") as caught:
        encode({"messages": CHAT}, "", on_bad_record="skip")
    assert not isinstance(caught.value, BadRecord)
