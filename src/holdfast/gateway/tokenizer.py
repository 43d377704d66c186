"""Text to tokens and back, over the `tokenizers` library.

Encoding is the library's. Decoding is a table of bytes per token: a token's bytes do not depend on its
neighbours, so a stream of tokens is a stream of bytes and its text is exact at every cut. (The library's own
SentencePiece decoder replaces *every* byte of a run of byte tokens when one of them is wrong, which no stream
can do; for valid text the two agree.)
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

from holdfast.core.errors import ModelError

SPACE_MARK = "▁"


class Tokenizer:
    """One model's tokenizer, its special tokens by role, and its chat template."""

    def __init__(
        self, backend: tokenizers.Tokenizer, *, special_tokens: dict[str, str], chat_template: str | None, source: str
    ) -> None:
        """`special_tokens`: text by role (`bos_token`, `eos_token`, …). `source` names the files in errors."""
        self._backend = backend
        self.special_tokens = special_tokens
        self.chat_template = chat_template
        self._special_ids = frozenset(
            token_id for token_id, token in backend.get_added_tokens_decoder().items() if token.special
        )
        self._to_bytes, self._strips_space = _decoding(backend, source)
        self._bytes: dict[int, bytes] = {}

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; special tokens written out in it are recognised."""
        # the batch form, because only it lets other threads run meanwhile
        return self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of a whole sequence; bytes that are not UTF-8 become U+FFFD."""
        skipped = self._special_ids if skip_special_tokens else frozenset()
        data = b"".join(self.token_bytes(i) for i in token_ids if i not in skipped)
        if self._strips_space:
            data = data.removeprefix(b" ")
        return data.decode("utf-8", "replace")

    def decode_parts(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> list[str]:
        """The characters that each token completes; joined, they are `decode` of all (save for an unfinished
        character at the end, which is no token's)."""
        utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        skipped = self._special_ids if skip_special_tokens else frozenset()
        parts = ["" if i in skipped else utf8.decode(self.token_bytes(i)) for i in token_ids]
        first = next((index for index, part in enumerate(parts) if part), None)
        if self._strips_space and first is not None:
            parts[first] = parts[first].removeprefix(" ")
        return parts

    def token_bytes(self, token_id: int) -> bytes:
        """What a token adds to the text. Empty for ids the vocabulary does not name (padding of the model's)."""
        data = self._bytes.get(token_id)
        if data is None:
            token = self._backend.id_to_token(token_id)
            data = self._bytes[token_id] = b"" if token is None else self._to_bytes(token)
        return data

    def token_text(self, token_id: int) -> str:
        """One token as the API shows it: its text, or `bytes:\\xf0\\x9f` when it is not UTF-8 by itself."""
        data = self.token_bytes(token_id)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special_ids


def load_tokenizer(path: str) -> Tokenizer:
    """The tokenizer of a Hugging Face folder or a .gguf file.

    Raises `ModelError` naming the file when there is none, or one of a kind that is not supported.
    """
    if path.endswith(".gguf"):
        # here and not above: a folder's tokenizer does not need the gguf library
        from holdfast.gateway.gguf_tokenizer import load_gguf_tokenizer  # noqa: PLC0415

        return load_gguf_tokenizer(path)
    folder = Path(path)
    config = _read_json(folder / "tokenizer_config.json")
    special = _special_tokens(_read_json(folder / "special_tokens_map.json") | config)
    if (folder / "tokenizer.json").is_file():
        source = str(folder / "tokenizer.json")
        backend = _read_backend(source)
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        source = str(folder / "vocab.json")
        backend = _gpt2_backend(folder, config, special)
    elif (folder / "tokenizer.model").is_file():
        raise ModelError(f"{folder / 'tokenizer.model'}: SentencePiece files are not read; tokenizer.json is needed")
    else:
        raise ModelError(f"{folder}: no tokenizer.json, and no vocab.json with merges.txt")
    return Tokenizer(backend, special_tokens=special, chat_template=_folder_template(folder, config), source=source)


def byte_level_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes (Radford et al. 2019, `bytes_to_unicode`)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    stand_ins = {chr(byte): byte for byte in printable}
    return stand_ins | {chr(256 + n): byte for n, byte in enumerate(others)}


def _decoding(backend: tokenizers.Tokenizer, source: str) -> tuple[Callable[[str], bytes], bool]:
    """How a token becomes bytes, and whether the decoder drops one leading space of a whole text."""
    state: dict[str, Any] = json.loads(backend.decoder.__getstate__()) if backend.decoder else {}
    parts = state["decoders"] if state.get("type") == "Sequence" else [state]
    kinds = [part.get("type") for part in parts]
    if "ByteLevel" in kinds:
        return _byte_level_decoding(), False
    if set(kinds) <= {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}:
        strips = any(
            (part["type"] == "Strip" and part["content"] == " " and part["start"] > 0)
            or (part["type"] == "Metaspace" and part["prepend_scheme"] != "never")
            for part in parts
        )
        return _sentencepiece_bytes, strips
    raise ModelError(f"{source}: decoder {kinds} is not supported; ByteLevel and SentencePiece's are")


def _byte_level_decoding() -> Callable[[str], bytes]:
    alphabet = byte_level_alphabet()

    def to_bytes(token: str) -> bytes:
        try:
            return bytes([alphabet[char] for char in token])
        except KeyError:  # an added token is plain text
            return token.encode()

    return to_bytes


def _sentencepiece_bytes(token: str) -> bytes:
    """`▁` is a space; `<0x0A>` is a byte."""
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return bytes([int(token[3:5], 16)])
        except ValueError:
            pass  # a token that only looks like a byte, `<0xyz>`, is text
    return token.replace(SPACE_MARK, " ").encode()


def _read_backend(path: str) -> tokenizers.Tokenizer:
    try:
        backend = tokenizers.Tokenizer.from_file(path)
    except Exception as error:
        raise ModelError(f"{path}: {error}") from error
    backend.no_truncation()  # left over from fine-tuning in many files
    backend.no_padding()
    return backend


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a file, or {} when there is no such file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ModelError(f"{path}: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: expected an object")
    return value


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """`bos_token` and the like: plain strings, or objects with a `content`."""
    texts = {
        role: value["content"] if isinstance(value, dict) and "content" in value else value
        for role, value in config.items()
        if role.endswith("_token") and not role.startswith("add_")
    }
    return {role: text for role, text in texts.items() if isinstance(text, str)}


def _gpt2_backend(folder: Path, config: dict[str, Any], special: dict[str, str]) -> tokenizers.Tokenizer:
    """Byte-level BPE from vocab.json and merges.txt, as GPT-2 and OPT ship it."""
    try:
        model = models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    except Exception as error:
        raise ModelError(f"{folder / 'vocab.json'}: {error}") from error
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=bool(config.get("add_prefix_space", False)))
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special.values()])
    if config.get("add_bos_token") and "bos_token" in special:
        set_edge_tokens(backend, bos=special["bos_token"], eos=None)
    return backend


def set_edge_tokens(backend: tokenizers.Tokenizer, *, bos: str | None, eos: str | None) -> None:
    """Make `add_special_tokens` put these around a text."""
    edges = [token for token in (bos, eos) if token is not None]
    template = ([bos] if bos is not None else []) + ["$A"] + ([eos] if eos is not None else [])
    backend.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(token, backend.token_to_id(token)) for token in edges]
    )


class _NamedTemplate(msgspec.Struct):
    name: str
    template: str


def _folder_template(folder: Path, config: dict[str, Any]) -> str | None:
    """The chat template; of several, the one named `default`. A .jinja file wins over tokenizer_config.json."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except ValueError as error:
            raise ModelError(f"{file}: {error}") from error
    try:
        template = msgspec.convert(config.get("chat_template"), str | list[_NamedTemplate] | None)
    except msgspec.ValidationError as error:
        raise ModelError(f"{folder / 'tokenizer_config.json'}: chat_template: {error}") from error
    if isinstance(template, list):
        return next((each.template for each in template if each.name == "default"), None)
    return template
