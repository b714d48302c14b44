"""Text to token ids and back: the checkpoint's own `tokenizer.json` and chat template, or plain bytes without one.

The chat template is a program from a stranger: it runs in jinja2's immutable sandbox, with nothing but the functions
that templates expect.
"""

from __future__ import annotations

import codecs
import json
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import jinja2
import tokenizers
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from .checkpoint import default_blobs_root, find_file
from .config import CheckpointError, ConfigError, DeepseekConfig, open_regular, parse_json

__all__ = ["ByteTokenizer", "ChatTemplate", "Tokenizer", "TokenizerError"]

log = logging.getLogger(__name__)

MAX_TOKENIZER_BYTES: Final = 256 << 20
MAX_TOKENIZER_CONFIG_BYTES: Final = 8 << 20
MAX_TEMPLATE_BYTES: Final = 1 << 20


class TokenizerError(CheckpointError):
    """A tokenizer or chat template that cannot be read or run."""


# ---------------------------------------------------------------------------------------------------------- tokenizer


class Tokenizer:
    """A `tokenizers` tokenizer with what its configuration says about the beginning and end of text.

    `Tokenizer.from_folder` opens a checkpoint's; without a `tokenizer.json` it gives a `ByteTokenizer`.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        bos_token: str | None = None,
        eos_token: str | None = None,
        add_bos_token: bool = True,
        chat_template: ChatTemplate | None = None,
    ) -> None:
        self._backend = backend
        self.add_bos_token = add_bos_token
        self.chat_template = chat_template
        self.bos_token_id = None if bos_token is None else backend.token_to_id(bos_token)
        self.eos_token_id = None if eos_token is None else backend.token_to_id(eos_token)

    @staticmethod
    def from_folder(folder: str | os.PathLike[str], config: DeepseekConfig | None = None) -> Tokenizer | ByteTokenizer:
        """Opens the tokenizer of a checkpoint.

        Args:
            folder: the checkpoint's.
            config: the model's, read from the folder by default; only the fallback to bytes asks it.

        Raises:
            TokenizerError: a file is broken, or there is none and the vocabulary is too small for bytes.
            CheckpointError: a link leads out of the folder.
        """
        folder = Path(folder).resolve()
        if not os.path.lexists(folder / "tokenizer.json"):
            return ByteTokenizer(DeepseekConfig.from_json(folder) if config is None else config)
        text = _read(folder, "tokenizer.json", MAX_TOKENIZER_BYTES)
        try:
            backend = tokenizers.Tokenizer.from_str(text.decode("utf-8"))
        except Exception as error:  # the library raises bare Exception
            raise TokenizerError(f"tokenizer.json: {error}") from None
        settings: dict[str, Any] = {}
        if os.path.lexists(folder / "tokenizer_config.json"):
            raw = _read(folder, "tokenizer_config.json", MAX_TOKENIZER_CONFIG_BYTES)
            try:
                settings = parse_json(raw, max_containers=100_000)
            except ConfigError as error:
                raise TokenizerError(f"tokenizer_config.json: {error}") from None
        bos, eos = _content(settings.get("bos_token")), _content(settings.get("eos_token"))
        return Tokenizer(
            backend,
            bos_token=bos,
            eos_token=eos,
            add_bos_token=settings.get("add_bos_token", True) is not False,
            chat_template=_find_template(folder, settings, bos, eos),
        )

    @property
    def vocab_size(self) -> int:
        return self._backend.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text, with the begin-of-text token before it if the tokenizer's settings ask for one."""
        ids = self._backend.encode(text, add_special_tokens=False).ids
        bos = self.bos_token_id
        return list(ids) if not self.add_bos_token or bos is None or ids[:1] == [bos] else [bos, *ids]

    def encode_chat(self, messages: Sequence[dict[str, Any]], *, think: bool = False) -> list[int]:
        """Token ids of a conversation, up to where the assistant's answer begins.

        Args:
            messages: `{"role": "system" | "user" | "assistant", "content": text}`, in order.
            think: ask models that can (V3.1) to reason first.

        Raises:
            TokenizerError: there is no chat template, or it fails.
        """
        if self.chat_template is None:
            raise TokenizerError("this checkpoint has no chat template: use raw text")
        text = self.chat_template.render(messages, add_generation_prompt=True, thinking=think, enable_thinking=think)
        return list(self._backend.encode(text, add_special_tokens=False).ids)  # templates write the begin token

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, special tokens left out."""
        return self._backend.decode(list(ids), skip_special_tokens=True)

    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        """The text piece by piece as `ids` come, never with half a character.

        A token may begin a character of several bytes that only the next ones complete: such text is held back. The
        few tokens before it are decoded again each time, since the text of a token depends on its neighbours.
        """
        context: list[int] = []  # tokens printed last
        pending: list[int] = []  # tokens not printed yet
        for token in ids:
            pending.append(token)
            before = self.decode(context)
            text = self.decode(context + pending)
            # A character has at most four bytes: what is still broken after so many tokens stays so.
            if len(text) > len(before) and (not text.endswith("\ufffd") or len(pending) > 4):
                yield text[len(before) :]
                context, pending = pending, []
        if pending and (rest := self.decode(context + pending)[len(self.decode(context)) :]):
            yield rest


class ByteTokenizer:
    """Bytes as token ids 0 to 255, for checkpoints without a tokenizer; ids from 256 on have no text.

    Raises:
        TokenizerError: the vocabulary is smaller than that.
    """

    chat_template: ChatTemplate | None = None

    def __init__(self, config: DeepseekConfig) -> None:
        if config.vocab_size < 256:
            raise TokenizerError(
                f"there is no tokenizer.json, and a vocabulary of {config.vocab_size} is too small for plain bytes"
            )
        log.info("no tokenizer.json in the checkpoint: token ids are taken for bytes")
        self.vocab_size = config.vocab_size
        is_special = config.bos_token_id is not None and config.bos_token_id >= 256
        self.bos_token_id = config.bos_token_id if is_special else None
        self.eos_token_id: int | None = next((i for i in config.stop_token_ids if i >= 256), None)

    def encode(self, text: str) -> list[int]:
        """The text's UTF-8 bytes, after the begin-of-text token if the config has one above 255."""
        begin = [] if self.bos_token_id is None else [self.bos_token_id]
        return begin + list(text.encode("utf-8", errors="replace"))

    def encode_chat(self, messages: Sequence[dict[str, Any]], *, think: bool = False) -> list[int]:
        raise TokenizerError("this checkpoint has no tokenizer and so no chat template: use raw text")

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")

    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        """As `Tokenizer.decode_stream`."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for token in ids:
            if token < 256 and (text := decoder.decode(bytes([token]))):
                yield text
        if rest := decoder.decode(b"", final=True):
            yield rest


def _read(folder: Path, name: str, max_bytes: int) -> bytes:
    path = find_file(folder, name, default_blobs_root(folder))
    try:
        with open_regular(path) as stream:
            data = stream.read(max_bytes + 1)
    except OSError as error:
        raise TokenizerError(f"{name}: {error.strerror}") from None
    if len(data) > max_bytes:
        raise TokenizerError(f"{name}: more than {max_bytes} bytes")
    return data


def _content(token: Any) -> str | None:
    """A special token as tokenizer_config.json has it: a string, or an object with its `content`."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


# ------------------------------------------------------------------------------------------------------ chat template


class ChatTemplate:
    """A conversation's text by the checkpoint's jinja2 template.

    Args:
        source: the template.
        tokens: names that it may use for special tokens, such as `bos_token`.

    Raises:
        TokenizerError: it is not a jinja2 template.
    """

    def __init__(self, source: str, **tokens: str | None) -> None:
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
        environment.filters["tojson"] = _tojson
        self._tokens = {name: token for name, token in tokens.items() if token is not None}
        try:
            self._template = environment.from_string(source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise TokenizerError(f"chat template: {error}") from None

    def render(self, messages: Sequence[dict[str, Any]], *, add_generation_prompt: bool = True, **names: Any) -> str:
        """The conversation's text.

        Args:
            messages: as `Tokenizer.encode_chat`.
            add_generation_prompt: end with what begins an answer of the assistant.
            names: whatever else the template asks for, such as `thinking`.

        Raises:
            TokenizerError: the template fails, or refuses the messages.
        """
        names = {"messages": list(messages), "add_generation_prompt": add_generation_prompt} | self._tokens | names
        try:
            return self._template.render(**names)
        except Exception as error:  # a template can raise anything that its expressions can
            raise TokenizerError(f"chat template: {error}") from None


def _find_template(folder: Path, settings: dict[str, Any], bos: str | None, eos: str | None) -> ChatTemplate | None:
    source = settings.get("chat_template")
    if isinstance(source, list):  # several, by name
        named = {t.get("name"): t.get("template") for t in source if isinstance(t, dict)}
        source = named.get("default")
    if os.path.lexists(folder / "chat_template.jinja"):
        source = _read(folder, "chat_template.jinja", MAX_TEMPLATE_BYTES).decode("utf-8", errors="replace")
    if source is None:
        return None
    if not isinstance(source, str):
        raise TokenizerError("tokenizer_config.json: chat_template must be a string")
    others = {key: _content(settings.get(key)) for key in ("pad_token", "unk_token")}
    return ChatTemplate(source, bos_token=bos, eos_token=eos, **others)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """Unlike jinja2's own, does not escape for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)
