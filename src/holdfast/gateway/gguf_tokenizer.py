"""The tokenizer that a GGUF file carries: vocabulary, merges or scores, and the *name* of a pre-tokenizer.

`tokenizer.ggml.model` is `gpt2` (byte-level BPE; `tokenizer.ggml.pre` names how text is split first) or `llama`
(SentencePiece BPE: no splitting, merges follow from the scores, unknown characters become bytes).
"""

from __future__ import annotations

from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Split

from holdfast.core.errors import ModelError
from holdfast.gateway.tokenizer import SPACE_MARK, Tokenizer, set_edge_tokens
from holdfast.models.gguf_file import read_gguf_metadata

# values of tokenizer.ggml.token_type
_CONTROL, _USER_DEFINED = 3, 4

# Parts of the expressions that published tokenizer.json files split text with.
_CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_MARKS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LEAD = r"[^\r\n\p{L}\p{N}]?"

_LLAMA3 = rf"{_CONTRACTION}|{_WORD}|\p{{N}}{{1,3}}|{_MARKS}|{_SPACES}"
_QWEN2 = rf"{_CONTRACTION}|{_WORD}|\p{{N}}|{_MARKS}|{_SPACES}"
_TEKKEN = (
    rf"{_LEAD}{_UPPER}*{_LOWER}+|{_LEAD}{_UPPER}+{_LOWER}*"
    rf"|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
)

# Names that files of our architectures carry, by how the text is split.
_NAMES = {
    "gpt-2": ("gpt-2",),
    "smollm": ("smollm", "refact", "minerva-7b"),
    "llama3": ("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "smaug-bpe"),
    "qwen2": ("qwen2", "deepseek-r1-qwen", "megrez"),
    "tekken": ("tekken",),
    "falcon": ("falcon",),
    "bloom": ("bloom",),
    "default": ("default",),
}
_SPLITTER_OF = {name: splitter for splitter, names in _NAMES.items() for name in names}
# Pieces of text that are tokens as they stand are not merged again; and a BOS where the file does not say.
_WHOLE_PIECES = {"llama3", "tekken"}
_STARTS_WITH_BOS = {"llama3", "tekken"}


def load_gguf_tokenizer(path: str) -> Tokenizer:
    """The tokenizer and chat template in a .gguf file.

    Raises `ModelError` for a missing part, a tokenizer model or a pre-tokenizer that is not supported.
    """
    metadata = read_gguf_metadata(path)
    tokens: list[str] = _required(metadata, "tokenizer.ggml.tokens", path)
    kind = _required(metadata, "tokenizer.ggml.model", path)
    if kind == "gpt2":
        backend, bos_by_default = _byte_level(metadata, tokens, path)
    elif kind == "llama":
        backend, bos_by_default = _sentencepiece(metadata, tokens, path), True
    else:
        raise ModelError(f"{path}: tokenizer.ggml.model {kind!r} is not supported; gpt2 and llama are")
    token_types = metadata.get("tokenizer.ggml.token_type", [])
    backend.add_tokens(
        [
            AddedToken(token, special=token_type == _CONTROL, normalized=False)
            for token, token_type in zip(tokens, token_types, strict=False)
            if token_type in (_CONTROL, _USER_DEFINED)
        ]
    )
    special = _special_tokens(metadata, tokens, path)
    bos = special.get("bos_token") if metadata.get("tokenizer.ggml.add_bos_token", bos_by_default) else None
    eos = special.get("eos_token") if metadata.get("tokenizer.ggml.add_eos_token", False) else None
    if bos is not None or eos is not None:
        set_edge_tokens(backend, bos=bos, eos=eos)
    return Tokenizer(
        backend, special_tokens=special, chat_template=metadata.get("tokenizer.chat_template"), source=path
    )


def _required(metadata: dict[str, Any], key: str, path: str) -> Any:
    try:
        return metadata[key]
    except KeyError:
        raise ModelError(f"{path}: no {key}; the file carries no tokenizer") from None


def _byte_level(metadata: dict[str, Any], tokens: list[str], path: str) -> tuple[tokenizers.Tokenizer, bool]:
    """The tokenizer, and whether texts start with a BOS when the file does not say."""
    pre = metadata.get("tokenizer.ggml.pre", "default")
    if pre not in _SPLITTER_OF:
        known = ", ".join(sorted(_SPLITTER_OF))
        raise ModelError(f"{path}: tokenizer.ggml.pre {pre!r} is not supported; known are {known}")
    splitter = _SPLITTER_OF[pre]
    merges = [_pair(merge, path) for merge in _required(metadata, "tokenizer.ggml.merges", path)]
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    try:
        model = models.BPE(vocab=vocabulary, merges=merges, ignore_merges=splitter in _WHOLE_PIECES)
    except Exception as error:
        raise ModelError(f"{path}: tokenizer.ggml.merges: {error}") from error
    backend = tokenizers.Tokenizer(model)
    if splitter == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = _splitter(splitter, bool(metadata.get("tokenizer.ggml.add_space_prefix", False)))
    backend.decoder = decoders.ByteLevel()
    return backend, splitter in _STARTS_WITH_BOS


def _splitter(name: str, space_prefix: bool) -> PreTokenizer:
    def split(pattern: str) -> PreTokenizer:
        return Split(Regex(pattern), "isolated")

    gpt2 = ByteLevel(add_prefix_space=space_prefix, use_regex=True)
    to_bytes = ByteLevel(add_prefix_space=space_prefix, use_regex=False)
    parts: dict[str, list[PreTokenizer]] = {
        "gpt-2": [gpt2],
        "smollm": [Digits(individual_digits=True), gpt2],
        "llama3": [split(_LLAMA3), to_bytes],
        "qwen2": [split(_QWEN2), to_bytes],
        "tekken": [split(_TEKKEN), to_bytes],
        "falcon": [pre_tokenizers.Punctuation("contiguous"), gpt2, Digits(), split("[0-9][0-9][0-9]")],
        "bloom": [split(r" ?[^(\s|[.,!?…。，、।۔،])]+"), to_bytes],
        "default": [split(r"[\p{P}$+<=>^~|]+"), gpt2, split(r"\p{N}+"), split("[0-9][0-9][0-9]")],
    }
    return pre_tokenizers.Sequence(parts[name])


def _pair(merge: str, path: str) -> tuple[str, str]:
    # the separator is the first space that is not the first character
    left, space, right = merge[1:].partition(" ")
    if not space:
        raise ModelError(f"{path}: tokenizer.ggml.merges: {merge!r} is not two tokens")
    return merge[0] + left, right


def _sentencepiece(metadata: dict[str, Any], tokens: list[str], path: str) -> tokenizers.Tokenizer:
    scores: list[float] = _required(metadata, "tokenizer.ggml.scores", path)
    if len(scores) != len(tokens):
        raise ModelError(f"{path}: {len(scores)} tokenizer.ggml.scores for {len(tokens)} tokens")
    unknown_id = metadata.get("tokenizer.ggml.unknown_token_id", 0)
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    model = models.BPE(
        vocab=vocabulary,
        merges=_merges_of(vocabulary, scores),
        unk_token=_token_at(tokens, unknown_id, "unknown_token_id", path),
        fuse_unk=True,
        byte_fallback=True,
    )
    backend = tokenizers.Tokenizer(model)
    steps: list[normalizers.Normalizer] = [normalizers.Replace(" ", SPACE_MARK)]
    ending: list[decoders.Decoder] = []
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        steps.insert(0, normalizers.Prepend(SPACE_MARK))
        ending = [decoders.Strip(" ", 1, 0)]
    backend.normalizer = normalizers.Sequence(steps)
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE_MARK, " "), decoders.ByteFallback(), decoders.Fuse(), *ending]
    )
    return backend


def _merges_of(vocabulary: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """SentencePiece joins the neighbours whose union has the best score; as a list of merges that is every
    split of every token into two tokens, best score first."""
    merges = [
        (-scores[token_id], vocabulary[token[:cut]], vocabulary[token[cut:]], token[:cut], token[cut:])
        for token, token_id in vocabulary.items()
        for cut in range(1, len(token))
        if token[:cut] in vocabulary and token[cut:] in vocabulary
    ]
    merges.sort()
    return [(left, right) for _, _, _, left, right in merges]


def _token_at(tokens: list[str], token_id: int, key: str, path: str) -> str:
    if not 0 <= token_id < len(tokens):
        raise ModelError(f"{path}: tokenizer.ggml.{key} {token_id} is not in 0 … {len(tokens) - 1}")
    return tokens[token_id]


def _special_tokens(metadata: dict[str, Any], tokens: list[str], path: str) -> dict[str, str]:
    roles = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    return {
        role: _token_at(tokens, metadata[f"tokenizer.ggml.{key}_token_id"], f"{key}_token_id", path)
        for key, role in roles.items()
        if f"tokenizer.ggml.{key}_token_id" in metadata
    }
