"""The tokenizer of the Pile models: ids of the package, bytes of our own."""

import json
import shutil
import unicodedata

import pytest
import rwkv_export
from hypothesis import given, settings
from hypothesis import strategies as st

import rwkv_text
from rwkv_core import checkpoint
from rwkv_core.errors import DataError
from rwkv_core.testing import perturb
from rwkv_text import TextConfig
from rwkv_text.tokenizer import BOUNDARY, StreamDecoder, tokenizer

SENTENCES = [
    "Receptance Weighted Key Value, a recurrent network.",
    "The end of the line:\n    indented, and naïve 今天是美好的一天 🦆🦆",
    "if x == 1:\n        return [y for y in range(10)]",
]
PILE = "20B_tokenizer.json"


def bpe(specials=("<|endoftext|>", "<|padding|>"), spaces=(8, 4, 2)):
    """Return a tokenizer.json with the parts that 20B has: specials first, runs of spaces last."""
    tokenizers = pytest.importorskip("tokenizers", reason="the package tokenizers is absent")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.normalizer = tokenizers.normalizers.NFC()
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.train_from_iterator(
        SENTENCES * 9,
        tokenizers.trainers.BpeTrainer(
            vocab_size=400, min_frequency=1, special_tokens=list(specials), show_progress=False,
            initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        ),
    )  # fmt: skip
    made.add_tokens([tokenizers.AddedToken(" " * n, normalized=True) for n in spaces])
    return made


@pytest.fixture(scope="module")
def pile(tmp_path_factory):
    path = tmp_path_factory.mktemp("pile") / PILE
    bpe().save(str(path))
    return path


def test_20b_encodes_as_the_package_and_decodes_to_bytes(pile):
    reference, tok = bpe(), tokenizer("20B", beside=pile)
    assert tok.vocab_size == reference.get_vocab_size() == len(tok.byte_lengths()) > 300
    assert tok.byte_lengths()[0] == 0
    assert (tok.byte_lengths()[1:] > 0).all()
    for text in [*SENTENCES, "", " " * 19, "é今🦆\t\x7f", "a<|padding|>b"]:
        ids = tok.encode(text)
        assert ids == reference.encode(text).ids
        assert tok.decode_bytes([BOUNDARY, *ids, BOUNDARY]).decode() == text
        assert tok.byte_lengths()[ids].sum() == len(text.encode())
    assert len(tok.encode(" " * 8)) == 1
    assert tok.decode_bytes(tok.encode("<|padding|>")) == b"<|padding|>"


def test_20b_tokens_are_the_bytes_they_stand_for(pile):
    tok = tokenizer("20B", beside=pile)
    single = {tok.decode_bytes([i]) for i in range(1, tok.vocab_size)}
    assert {bytes([b]) for b in range(256)} <= single
    parts = [tok.decode_bytes([i]) for i in tok.encode("🦅")]
    assert b"".join(parts) == "🦅".encode()
    assert len(parts) > 1


@given(text=st.text() | st.text("The end\n今天é🦆  ", min_size=5))
@settings(deadline=None)
def test_20b_streams_any_text(pile_tokenizer, text):
    tok, text = pile_tokenizer, unicodedata.normalize("NFC", text).replace("\ufffd", "")
    decoder = StreamDecoder(tok)
    streamed = [decoder.push(i) for i in tok.encode(text)]
    assert "".join(streamed) == text
    assert decoder.flush() == ""


@pytest.fixture(scope="module")
def pile_tokenizer(pile):
    return tokenizer(str(pile))


def test_20b_refuses_its_boundary_in_a_text(pile_tokenizer):
    with pytest.raises(DataError, match=r"holds <\|endoftext\|> at character 4; that is the docum"):
        pile_tokenizer.encode("one <|endoftext|> two")
    with pytest.raises(DataError, match="half a surrogate pair"):
        pile_tokenizer.encode("\udc80")


@pytest.mark.parametrize("bad", [-1, 420, 50277])
def test_20b_refuses_an_id_outside(pile_tokenizer, bad):
    with pytest.raises(DataError, match=rf"token id {bad} is outside the vocabulary of \d+ tokens"):
        pile_tokenizer.decode_bytes([bad])


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (b"", "is damaged or no tokenizer.json"),
        (b"{", "is damaged or no tokenizer.json"),
        (b"[1]", "is damaged or no tokenizer.json"),
        (b"\xff\xfe{}", "is damaged or no tokenizer.json"),
        (b'{"model": {"type": "BPE"}}', "is damaged or no tokenizer.json"),
    ],
)
def test_a_file_that_is_no_tokenizer_is_refused(tmp_path, content, error):
    pytest.importorskip("tokenizers", reason="the package tokenizers is absent")
    (tmp_path / PILE).write_bytes(content)
    with pytest.raises(DataError, match=error):
        tokenizer("20B", beside=tmp_path)


def test_a_cut_tokenizer_is_refused(pile, tmp_path):
    content = pile.read_bytes()
    for cut in range(1, len(content), len(content) // 50):
        (tmp_path / PILE).write_bytes(content[:cut])
        with pytest.raises(DataError, match=r"is damaged or no tokenizer\.json"):
            tokenizer("20B", beside=tmp_path)


def test_a_panic_of_the_package_is_a_data_error(tmp_path):
    spoiled = json.loads(bpe().to_str())
    spoiled["model"]["continuing_subword_prefix"] = "#" * 99
    (tmp_path / PILE).write_text(json.dumps(spoiled))
    with pytest.raises(DataError, match=r"is damaged or no tokenizer\.json: range .* out of range"):
        tokenizer("20B", beside=tmp_path)


def test_a_tokenizer_of_another_kind_is_refused(tmp_path):
    bpe(specials=()).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match=r"id 0 is '!'; expected a special token"):
        tokenizer("20B", beside=tmp_path)
    words = json.loads(bpe().to_str())
    words["model"] = {
        "type": "WordLevel",
        "vocab": {"<|endoftext|>": 0, "▁the": 1},
        "unk_token": "",
    }
    words["added_tokens"] = words["added_tokens"][:1]
    (tmp_path / "tokenizer.json").write_text(json.dumps(words))
    with pytest.raises(DataError, match="token 1 is '▁the', and '▁' stands for no byte"):
        tokenizer("20B", beside=tmp_path)


def test_20b_without_its_package_names_the_extra(pile, run_python):
    code = f"""
from rwkv_core.errors import RWKVError
from rwkv_text.tokenizer import tokenizer
try:
    tokenizer({str(pile)!r})
except RWKVError as error:
    print(error)
"""
    printed = run_python(code, block=("torch", "tokenizers"))
    assert "needs the package tokenizers: pip install 'rwkv-toolkit[pile]'" in printed


@pytest.mark.slow
def test_a_20b_model_is_saved_exported_and_run_with_its_tokenizer(pile, tmp_path):
    config = TextConfig(
        dim=16, depth=1, vocab_size=420, tokenizer=str(pile), mixer_options={"head_dim": 16}
    )
    model = checkpoint.build("text", config)
    perturb(model)
    greedy = {"max_tokens": 12, "temperature": 0.0}
    expected = model.generate("The end", **greedy)
    loaded = rwkv_text.load(checkpoint.save(model, tmp_path / "model"))
    assert loaded.config.tokenizer == str(tmp_path / "model" / PILE)
    rwkv_export.export(loaded, tmp_path / "onnx", steps=(1, 4))
    shutil.rmtree(tmp_path / "model")
    assert rwkv_export.load(tmp_path / "onnx").generate("The end", **greedy) == expected
