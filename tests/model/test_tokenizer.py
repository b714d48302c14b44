"""Text to tokens and back, streaming without half characters, and chat templates as transformers renders them."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from deepseek_ops.model.checkpoint import UnsafePath
from deepseek_ops.model.tiny import tiny_config, write_tiny
from deepseek_ops.model.tokenizer import ByteTokenizer, ChatTemplate, Tokenizer, TokenizerError

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
TEXTS = [
    "plain words, and   spaces",
    "naïve café – Größe",
    "東京は日本の首都です。",
    "🙂👩‍👩‍👧‍👦🏳️‍🌈 family",
    "\n\ttabs\r\nand lines\n",
    "ﷺ𝔘𝔫𝔦𝔠𝔬𝔡𝔢 \U0010ffff",
    "",
]

# In the manner of a chat model's template: a system part, turns between markers, a switch for reasoning, tools as JSON.
TEMPLATE = """
{%- if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif -%}
{%- set ns = namespace(system='') -%}
{%- for message in messages %}
    {%- if message.role == 'system' %}{% set ns.system = message.content %}{% endif %}
{%- endfor -%}
{{ bos_token }}{{ ns.system }}
{%- for message in messages %}
    {%- if message['role'] == 'system' %}{% continue %}{% endif %}
    {%- if message['role'] not in ['user', 'assistant'] %}
        {{- raise_exception('no such role: ' + message['role']) }}
    {%- endif %}
    {%- if message['role'] == 'user' %}{{ '<|User|>' + message['content'] | trim }}{% endif %}
    {%- if message['role'] == 'assistant' %}{{ '<|Assistant|>' + message['content'] + eos_token }}{% endif %}
{%- endfor -%}
{%- if tools %}{{ tools | tojson(indent=2) }}{% endif %}
{%- if add_generation_prompt %}{{ '<|Assistant|>' }}{% if thinking %}<think>{% else %}</think>{% endif %}{% endif %}
"""
CHATS: list[list[dict[str, str]]] = [
    [{"role": "user", "content": "Hello <b>& 'you'</b> "}],
    [{"role": "system", "content": "Be brief.\n"}, {"role": "user", "content": "東京?"}],
    [
        {"role": "user", "content": "1"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "3"},
    ],
]


@pytest.fixture(scope="module")
def backend() -> tokenizers.Tokenizer:
    """A byte-level BPE tokenizer as DeepSeek's, with few merges, so that most characters take several tokens."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=[BOS, EOS])
    backend.train_from_iterator(["words and spaces in plain words"] * 10, trainer)
    return backend


@pytest.fixture
def folder(tmp_path: Path, backend: tokenizers.Tokenizer) -> Path:
    backend.save(str(tmp_path / "tokenizer.json"))
    settings = {
        "bos_token": {"content": BOS, "lstrip": False},
        "eos_token": EOS,
        "add_bos_token": True,
        "chat_template": TEMPLATE,
        "tokenizer_class": "LlamaTokenizerFast",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    return tmp_path


def open_tokenizer(folder: Path) -> Tokenizer:
    tokenizer = Tokenizer.from_folder(folder)
    assert isinstance(tokenizer, Tokenizer)
    return tokenizer


# ------------------------------------------------------------------------------------------------------ text and tokens


@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_back_from_its_tokens_whole_and_streamed(text: str, folder: Path) -> None:
    tokenizer = open_tokenizer(folder)
    ids = tokenizer.encode(text)
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids) == text
    pieces = list(tokenizer.decode_stream(ids))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert all(pieces)


@pytest.mark.parametrize("text", TEXTS)
def test_bytes_come_back_whole_and_streamed(text: str) -> None:
    tokenizer = ByteTokenizer(tiny_config("v3"))
    ids = tokenizer.encode(text)
    assert ids == [256, *text.encode()]
    assert tokenizer.decode(ids) == text
    pieces = list(tokenizer.decode_stream(ids))
    assert pieces == list(text)


def test_text_streams_as_soon_as_its_characters_are_complete(folder: Path) -> None:
    tokenizer = open_tokenizer(folder)
    ids = tokenizer.encode("a 日本 🙂 b")
    complete = [n for n in range(len(ids) + 1) if not tokenizer.decode(ids[:n]).endswith("\ufffd")]
    consumed: list[int] = []

    def feed() -> Iterator[int]:
        for token in ids:
            consumed.append(token)
            yield token

    printed, printed_at = "", []
    for piece in tokenizer.decode_stream(feed()):
        printed += piece
        printed_at.append(len(consumed))
        assert printed == tokenizer.decode(consumed)
    assert printed_at == [n for n in complete if n > 1]  # the first token, the begin of text, has no text


def test_bytes_that_are_no_text_are_shown_as_such_and_hold_nothing_up(folder: Path) -> None:
    tokenizer = open_tokenizer(folder)
    broken = [token for byte in b"\xff" * 12 + b"ok" if (token := _byte_token(tokenizer, byte)) is not None]
    assert len(broken) == 14
    consumed: list[int] = []

    def feed() -> Iterator[int]:
        for token in broken:
            consumed.append(token)
            yield token

    pieces = tokenizer.decode_stream(feed())
    first = next(pieces)
    assert len(consumed) <= 5
    assert first + "".join(pieces) == "\ufffd" * 12 + "ok"
    text = "".join(ByteTokenizer(tiny_config("v3")).decode_stream([0xFF, 0xE6, 0x41, 300, 0x97]))
    assert text == "\ufffd\ufffdA\ufffd"


def _byte_token(tokenizer: Tokenizer, byte: int) -> int | None:
    """The token of one byte, whatever the byte; the byte-level alphabet begins at U+0100 for the unprintable ones."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    letter = chr(byte) if byte in printable else chr(256 + others.index(byte))
    return tokenizer._backend.token_to_id(letter)


def test_special_tokens_are_left_out_of_the_text_and_ids_out_of_range_do_no_harm(folder: Path) -> None:
    tokenizer = open_tokenizer(folder)
    ids = tokenizer.encode("words")
    assert tokenizer.eos_token_id is not None
    assert tokenizer.decode([*ids, tokenizer.eos_token_id, 100_000]) == "words"
    assert "".join(tokenizer.decode_stream([*ids, tokenizer.eos_token_id, 100_000])) == "words"


def test_the_begin_token_is_added_once_and_only_if_asked_for(folder: Path) -> None:
    tokenizer = open_tokenizer(folder)
    assert tokenizer.encode(BOS + "a") == tokenizer.encode("a")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"add_bos_token": False}))
    assert open_tokenizer(folder).encode("a") == tokenizer.encode("a")[1:]


def test_a_checkpoint_without_tokenizer_takes_ids_for_bytes_and_says_so_once(tmp_path: Path, caplog: Any) -> None:
    write_tiny(tmp_path, "v2-lite")
    with caplog.at_level(logging.INFO, logger="deepseek_ops"):
        tokenizer = Tokenizer.from_folder(tmp_path)
        tokenizer.encode("a")
        tokenizer.decode([97])
    assert isinstance(tokenizer, ByteTokenizer)
    assert [record.message for record in caplog.records if "bytes" in record.message] == [
        "no tokenizer.json in the checkpoint: token ids are taken for bytes"
    ]
    with pytest.raises(TokenizerError, match="no chat template"):
        tokenizer.encode_chat(CHATS[0])


def test_a_vocabulary_too_small_for_bytes_is_refused() -> None:
    with pytest.raises(TokenizerError, match="vocabulary of 255 is too small"):
        ByteTokenizer(tiny_config("v3", vocab_size=255, bos_token_id=0, eos_token_id=1))


def test_a_low_begin_token_is_a_byte_and_so_not_added() -> None:
    assert ByteTokenizer(tiny_config("v3", bos_token_id=0)).encode("a") == [97]


# ------------------------------------------------------------------------------------------------------ chat templates


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("generation", [False, True])
@pytest.mark.parametrize("chat", CHATS)
def test_a_chat_is_rendered_as_transformers_renders_it(
    chat: list[dict[str, str]], generation: bool, thinking: bool, backend: tokenizers.Tokenizer
) -> None:
    theirs = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=BOS, eos_token=EOS)
    tools = [{"type": "function", "function": {"name": "f", "description": "größer <&>", "parameters": {}}}]
    wanted = theirs.apply_chat_template(
        chat,
        chat_template=TEMPLATE,
        tokenize=False,
        add_generation_prompt=generation,
        thinking=thinking,
        tools=tools,
    )
    ours = ChatTemplate(TEMPLATE, bos_token=BOS, eos_token=EOS)
    got = ours.render(chat, add_generation_prompt=generation, thinking=thinking, tools=tools)
    assert got == wanted
    assert "<|User|>" in got


@pytest.mark.parametrize("think", [False, True])
def test_a_chat_becomes_the_tokens_of_transformers(think: bool, folder: Path, backend: tokenizers.Tokenizer) -> None:
    theirs = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=BOS, eos_token=EOS, chat_template=TEMPLATE)
    wanted = theirs.apply_chat_template(CHATS[1], add_generation_prompt=True, thinking=think, return_dict=False)
    got = open_tokenizer(folder).encode_chat(CHATS[1], think=think)
    assert got == wanted
    assert got.count(open_tokenizer(folder).bos_token_id) == 1


def test_a_template_file_goes_before_the_one_in_the_settings(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    tokenizer = open_tokenizer(folder)
    assert tokenizer.encode_chat([{"role": "user", "content": "words"}]) == tokenizer.encode("words!")[1:]


def test_of_several_templates_the_default_is_taken(folder: Path) -> None:
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["chat_template"] = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    template = open_tokenizer(folder).chat_template
    assert template is not None
    assert template.render([]) == "yes"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for %}", "chat template"),
        ("{{ messages.append(1) }}", "append"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe|undefined"),
        ("{{ messages.__init__.__globals__ }}", "unsafe|undefined"),
        ("{{ raise_exception.__globals__['os'].system('true') }}", "unsafe|undefined"),
        ("{% include '/etc/passwd' %}", "chat template"),
        ("{{ 'a' * (1 << 40) }}", "chat template"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ range(10 ** 9) | list }}", "[Rr]ange too big"),
        ("{{ " + "(" * 5000 + ")" * 5000 + " }}", "chat template"),
    ],
)
def test_a_template_that_fails_or_breaks_out_ends_in_a_typed_error(source: str, message: str) -> None:
    with pytest.raises(TokenizerError, match=message):
        ChatTemplate(source).render([{"role": "user", "content": "x"}])


def test_the_functions_that_templates_expect_are_there() -> None:
    year = ChatTemplate("{{ strftime_now('%Y') }}").render([])
    assert year.isdigit()
    assert len(year) == 4
    rendered = ChatTemplate("{{ messages | tojson }}").render([{"content": "größer <&> 'x'"}])
    assert rendered == '[{"content": "größer <&> \'x\'"}]'


# -------------------------------------------------------------------------------------------------------- broken files


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", b"{", "tokenizer.json: "),
        ("tokenizer.json", b"\xff", "tokenizer.json: "),
        ("tokenizer.json", b'{"version": "1.0"}', "tokenizer.json: "),
        ("tokenizer_config.json", b"[]", "tokenizer_config.json: .*JSON object"),
        ("tokenizer_config.json", b"\xff", "tokenizer_config.json: not UTF-8"),
        ("tokenizer_config.json", b'{"a":1,"a":2}', "given twice"),
        ("tokenizer_config.json", b'{"chat_template": 5}', "chat_template must be a string"),
        ("tokenizer_config.json", b'{"chat_template": "{% if %}"}', "chat template"),
        ("tokenizer_config.json", b'{"a":' * 200_000, "objects and arrays"),
    ],
)
def test_a_broken_tokenizer_file_is_named(name: str, content: bytes, message: str, folder: Path) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.from_folder(folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_a_tokenizer_file_that_leads_out_of_the_folder_is_not_opened(name: str, folder: Path) -> None:
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to("/etc/passwd")
    with pytest.raises(UnsafePath):
        Tokenizer.from_folder(folder)
