"""The World vocabulary: read strictly, found where it lies, exact in both directions."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_core.errors import DataError, UnknownNameError
from rwkv_text import TextConfig
from rwkv_text.tokenizer import BOUNDARY, ByteTokenizer, StreamDecoder, tokenizer
from rwkv_text.vocabulary import kind_of, package_file
from rwkv_text.world import WorldTokenizer
from rwkv_text.world_file import read_tokens

FILE = "rwkv_vocab_v20230424.txt"
# prefixes without the token between them, parts of characters, a token that spans two words
LONGER = [
    "ab", "abcde", "bc", "cdefgh", " the", " the end", "\n\n", "'\"", "今天", "é", "🦆",
    "今".encode()[:2], "今".encode()[1:], "🦆".encode()[:3], b"\xff\xfe", b"b\xff",
]  # fmt: skip
TOKENS = [bytes([b]) for b in range(256)] + [
    t if isinstance(t, bytes) else t.encode() for t in LONGER
]


LISTED = [*(chr(b) if b < 128 else bytes([b]) for b in range(256)), *LONGER]


def written(end="\n"):
    """Return a vocabulary file of LISTED: ids count from 1."""
    sizes = [len(t if isinstance(t, bytes) else t.encode()) for t in LISTED]
    lines = [f"{i} {t!r} {n}{end}" for i, (t, n) in enumerate(zip(LISTED, sizes, strict=True), 1)]
    return "".join(lines).encode()


SMALL = WorldTokenizer(written())
needs_package = pytest.mark.skipif(package_file() is None, reason="pyrwkv-tokenizer is absent")


@pytest.fixture
def vocabulary(tmp_path):
    path = tmp_path / "somewhere" / FILE
    path.parent.mkdir()
    path.write_bytes(written())
    return path


@pytest.fixture
def no_package(monkeypatch):
    """Hide pyrwkv-tokenizer."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n: None if n == "pyrwkv_tokenizer" else find_spec(n)
    )


# World: the published vocabulary

VECTORS = [
    (
        "Today is a beautiful day. 今天是美好的一天。",
        "33520 4600 332 59219 21509 47 33 10381 11639 13091 15597 11685 14734 10250 11639 10080",
    ),
    ("The Eiffel tower is in the city of", "6699 304 25740 109 39990 4600 4596 22590 30449 4706"),
    (
        "I'll 'd test блабла 以下は、]) -> <|endoftext|><|padding|> int",
        "74 5229 274 101 32223 5092 27980 2795 27980 33 10399 10258 10139 10079 1682 3463 295 125 "
        "25258 7588 2318 125 790 125 49520 125 63 21888",
    ),
    ("\n\n", "261"),
    ("User: hi\n\nAssistant:", "24281 59 4571 261 5585 41693 59"),
]


def check_vectors(tok):
    for text, ids in VECTORS:
        assert tok.encode(text) == [int(i) for i in ids.split()], text
        assert tok.decode_bytes(tok.encode(text)).decode() == text


@pytest.mark.shared
def test_published_ids_from_the_file(shared_data, no_package):
    tok = tokenizer(str(shared_data / "blinkdl" / FILE))
    assert tok.encode("x") == tok.encode_bytes(b"x")
    check_vectors(tok)
    lengths = tok.byte_lengths()
    assert (tok.vocab_size, len(lengths), np.count_nonzero(lengths)) == (65536, 65536, 65529)
    assert (lengths[0], lengths.max(), lengths[65529]) == (0, 128, 128)
    assert not lengths[65530:].any()
    assert tok.decode_bytes(range(1, 257)) == bytes(range(256))


@needs_package
def test_published_ids_from_the_package():
    tok = tokenizer("world")
    assert type(tok._package).__module__ == "pyrwkv_tokenizer"
    check_vectors(tok)


@needs_package
@pytest.mark.shared
def test_the_package_holds_the_published_file(shared_data):
    assert package_file().read_bytes() == (shared_data / "blinkdl" / FILE).read_bytes()


@needs_package
def test_the_package_encodes_every_token_as_the_trie_does():
    tok = tokenizer("world")
    for i in range(1, 65530):
        token = tok.decode_bytes([i])
        assert tok.encode_bytes(token) == [i]
        try:
            text = token.decode()
        except UnicodeDecodeError:
            continue
        assert tok.encode(text) == [i]


def spelled(i):
    """Return a token of the package's vocabulary as text, without parts of characters."""
    return tokenizer("world").decode_bytes([i]).decode(errors="ignore")


@needs_package
@settings(deadline=None, max_examples=300)
@given(st.lists(st.integers(1, 65529).map(spelled) | st.text(max_size=4)).map("".join))
def test_the_package_equals_the_trie_on_any_text(text):
    """The package takes str alone; on bytes the next test holds the trie to a plain search."""
    tok = tokenizer("world")
    assert tok.encode(text) == tok.encode_bytes(text.encode())


# World: what longest match means

pieces = st.sampled_from(TOKENS[256:]) | st.sampled_from([b"a", b"abc", b"abcd", b" th"])
any_bytes = st.lists(pieces | st.binary(max_size=3)).map(b"".join) | st.binary()
any_text = st.text() | st.text("abcde the\n今天é🦆'\"", min_size=5)


@settings(deadline=None, max_examples=400)
@given(any_bytes)
def test_any_bytes_are_cut_into_the_longest_tokens(data):
    expected, at = [], 0
    while at < len(data):
        fitting = [i for i, t in enumerate(TOKENS, 1) if data.startswith(t, at)]
        expected.append(max(fitting, key=lambda i: len(TOKENS[i - 1])))
        at += len(TOKENS[expected[-1] - 1])
    ids = SMALL.encode_bytes(data)
    assert ids == expected
    assert SMALL.decode_bytes(ids) == data
    assert SMALL.byte_lengths()[ids].sum() == len(data)


def test_ids_are_those_of_the_file():
    assert SMALL.encode("abcd the ends") == [
        257, *(1 + b for b in b"cd"), 262, *(1 + b for b in b"s")
    ]  # fmt: skip
    assert SMALL.encode("\0") == [1]
    assert SMALL.encode("") == []
    assert SMALL.decode_bytes([BOUNDARY, 265, BOUNDARY]).decode() == "今天"


@given(any_text)
def test_any_text_comes_back(text):
    assert SMALL.decode_bytes(SMALL.encode(text)).decode() == text


# decoding as it comes


@settings(deadline=None)
@given(any_text, st.sampled_from(["bytes", "small"]))
def test_streaming_equals_decoding_at_once_and_breaks_no_character(text, which):
    text = text.replace("\0", "").replace("\N{REPLACEMENT CHARACTER}", "")
    tok = {"bytes": ByteTokenizer(), "small": SMALL}[which]
    byte_by_byte = [1 + b if which == "small" else b for b in text.encode()]
    for ids in (tok.encode(text), byte_by_byte):
        decoder, shown = StreamDecoder(tok), ""
        for i in ids:
            shown += decoder.push(i)
            assert text.startswith(shown)
        assert shown == text
        assert decoder.flush() == ""


@given(st.lists(st.integers(0, len(TOKENS))))
def test_streaming_of_any_ids_equals_decoding_at_once(ids):
    decoder = StreamDecoder(SMALL)
    streamed = "".join(map(decoder.push, ids)) + decoder.flush()
    assert streamed == SMALL.decode_bytes(ids).decode(errors="replace")


# bad input


@pytest.mark.parametrize("bad", [-1, len(TOKENS) + 1, 65530, 65536, np.int64(10**12)])
def test_an_id_outside_the_vocabulary_is_refused(bad):
    with pytest.raises(DataError, match=rf"token id {bad} is outside the vocabulary of 272 tokens"):
        SMALL.decode_bytes([5, bad])


@pytest.mark.parametrize("bad", [-1, 256])
def test_an_id_that_is_no_byte_is_refused(bad):
    with pytest.raises(DataError, match=rf"token id {bad} is no byte; expected 0 to 255"):
        ByteTokenizer().decode_bytes([5, bad])


@pytest.mark.parametrize("tok", [ByteTokenizer(), SMALL], ids=["bytes", "world"])
def test_half_a_surrogate_pair_is_refused(tok):
    with pytest.raises(DataError, match=r"character 2 of the text is U\+D83E"):
        tok.encode("ab\ud83e")


def test_line_ends_may_be_crlf_and_the_last_may_lack():
    tokens = read_tokens(written(), "v")
    assert list(tokens.values()) == TOKENS
    assert read_tokens(written(end="\r\n"), "v") == tokens
    assert read_tokens(written()[:-1], "v") == tokens
    assert read_tokens(written(end="\r\n")[:-2], "v") == tokens


@pytest.mark.parametrize(
    ("line", "error"),
    [
        # code, in every disguise
        ("999 __import__('os').system('touch ran') 1", "expected a string or bytes literal"),
        ("999 'a'.__class__ 1", "expected a string or bytes literal, got \"'a'.__class__\""),
        ("999 'a'*9 9", "expected a string or bytes literal"),
        ("999 'x' 'y' 2", "expected a string or bytes literal"),
        ("999 f'{open(1)}' 1", "expected a string or bytes literal"),
        ("999 ['xyz'] 3", "expected a string or bytes literal"),
        ("999 12345 5", "expected a string or bytes literal, got '12345'"),
        ("999 None 4", "expected a string or bytes literal"),
        ("999 ('xyz') 3", "expected a string or bytes literal"),
        ("999 'xyz 3", "expected a string or bytes literal"),
        # literals that are none
        (r"999 '\ud800' 3", "surrogates not allowed"),
        (r"999 '\xz' 1", "truncated"),
        (r"999 '\q' 2", "invalid escape sequence"),
        ("999 b'é' 2", "bytes can only contain ASCII literal characters"),
        # lengths
        ("999 'xyz' 2", "expected the length of \"'xyz'\" in bytes, 3 and more than 0, got '2'"),
        ("999 'é今' 2", "in bytes, 5 and more than 0, got '2'"),
        ("999 'xyz' three", "in bytes, 3 and more than 0, got 'three'"),
        ("999 'xyz' -3", "in bytes, 3 and more than 0, got '-3'"),
        ("999 '' 0", "in bytes, 0 and more than 0, got '0'"),
        # ids
        ("0 'xyz' 3", "expected an id from 1 to 65535, got '0'"),
        ("-5 'xyz' 3", "expected an id from 1 to 65535, got '-5'"),
        ("1.5 'xyz' 3", "expected an id from 1 to 65535, got '1.5'"),
        ("１２３４ 'xyz' 3", "expected an id from 1 to 65535, got"),
        ("65536 'xyz' 3", "expected an id from 1 to 65535, got '65536'"),
        (f"{'9' * 5000} 'xyz' 3", "expected an id from 1 to 65535, got '999"),
        ("98 'xyz' 3", "id 98 is taken by b'a', ids must differ"),
        ("999 'a' 1", "b'a' has id 98 already, tokens must differ"),
        ("999 b'abcde' 5", "b'abcde' has id 258 already, tokens must differ"),
        # lines cut short
        ("", "expected 'id literal length', got ''"),
        ("999", "expected 'id literal length', got '999'"),
        ("999 'xyz'", "expected 'id literal length', got \"999 'xyz'\""),
        ("999 'xyz' ", "expected 'id literal length', got"),
        ("<html>", "expected 'id literal length', got '<html>'"),
    ],
)
def test_a_bad_line_is_refused_by_its_number(line, error, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("v.txt").write_bytes(written() + line.encode() + b"\n")
    with pytest.raises(DataError) as caught:
        tokenizer("v.txt")
    assert str(caught.value).startswith(f"{tmp_path / 'v.txt'}:273: ")
    assert error in str(caught.value)
    assert str(caught.value).endswith("the file is damaged or no World vocabulary: get it again")
    assert not Path("ran").exists()


def test_a_vocabulary_cut_anywhere_in_a_line_is_refused():
    content, n_refused = written(), 0
    for cut in range(len(content) - 40, len(content) - 1):
        if content[cut - 1 : cut] == b"\n" or content[cut : cut + 1] == b"\n":
            continue
        with pytest.raises(DataError, match=r"^v:27[012]: "):
            read_tokens(content[:cut], "v")
        n_refused += 1
    assert n_refused > 30


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (b"", "v: 0 tokens, none of them the byte 0x00"),
        (written() + b"\n\xff\n", "v:274: expected UTF-8, got byte 0xff"),
        (written().replace(b"98 'a' 1\n", b""), "v: 271 tokens, none of them the byte 0x61"),
        (b"\n", "v:1: expected 'id literal length', got ''"),
        (b"PK\x03\x04\x80", "v:1: expected UTF-8, got byte 0x80"),
    ],
)
def test_a_file_that_is_no_vocabulary_is_refused(content, error):
    with pytest.raises(DataError, match=error):
        read_tokens(content, "v")


@settings(deadline=None)
@given(st.integers(0, len(written()) - 1), st.integers(0, 255))
def test_a_changed_byte_is_refused_or_read_as_what_it_says(at, byte):
    changed = bytearray(written())
    changed[at] = byte
    try:
        tokens = read_tokens(bytes(changed), "v")
    except DataError:
        return
    assert {bytes([b]) for b in range(256)} <= set(tokens.values())
    assert all(0 < i < 65536 and token for i, token in tokens.items())


# where a vocabulary is found


def test_a_path_says_what_it_is():
    assert [kind_of(n) for n in ("bytes", "world", "20B", "a/b.txt", "tokenizer.json")] == [
        "bytes", "world", "20B", "world", "20B"
    ]  # fmt: skip
    with pytest.raises(UnknownNameError, match=r"'wrld'; did you mean 'world'\? Or give the path"):
        TextConfig(tokenizer="wrld")


def test_a_vocabulary_is_found_by_path_and_beside_a_folder_or_file(vocabulary, no_package):
    (vocabulary.parent / "model.pth").touch()
    for name, beside in [
        (str(vocabulary), None),
        ("world", vocabulary.parent),
        ("world", vocabulary.parent / "model.pth"),
        (str(vocabulary), vocabulary.parents[1]),
    ]:
        assert tokenizer(name, beside=beside).encode("今天") == [265]


def test_a_vocabulary_is_read_once_and_again_when_it_changed(vocabulary):
    first = tokenizer(str(vocabulary))
    assert tokenizer("world", beside=vocabulary) is first
    vocabulary.write_bytes(written() + b"300 'new token' 9\n")
    assert tokenizer(str(vocabulary)).encode("new token") == [300]


@needs_package
def test_the_package_serves_only_where_nothing_else_is_named(vocabulary):
    assert np.count_nonzero(tokenizer("world").byte_lengths()) == 65529
    near = tokenizer("world", beside=vocabulary)
    assert np.count_nonzero(near.byte_lengths()) == 272
    assert near._package is None
    assert near.encode("今天") == [265]


@needs_package
def test_the_package_is_used_for_an_equal_file_even_with_crlf(tmp_path):
    (tmp_path / FILE).write_bytes(package_file().read_bytes().replace(b"\n", b"\r\n"))
    assert tokenizer("world", beside=tmp_path)._package is not None


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("world", r"no vocabulary rwkv_vocab_v20230424.txt found beside .*empty; pip install 'rwkv-"
                  r"toolkit\[world\]', or download .* or give its path as the tokenizer"),
        ("20B", r"no vocabulary 20B_tokenizer.json found beside .*empty; download 20B_tokenizer"),
        ("absent.txt", r"the vocabulary absent.txt is not a file; pip install .*, or download rw"),
        ("absent.json", r"the vocabulary absent.json is not a file; download 20B_tokenizer.json"),
    ],
)  # fmt: skip
def test_an_absent_vocabulary_says_how_to_get_it(name, error, no_package, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=error):
        tokenizer(name, beside=tmp_path / "empty")


def test_a_folder_in_the_place_of_a_vocabulary_is_refused(tmp_path):
    (tmp_path / "v.txt").mkdir()
    with pytest.raises(DataError, match="is not a file"):
        tokenizer(str(tmp_path / "v.txt"))
