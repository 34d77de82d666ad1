"""Tokenizer, sampler, data and generation."""

import numpy as np
import pytest
import torch

from rwkv_core.errors import DataError, UnknownNameError
from rwkv_core.testing import check_adapter, perturb
from rwkv_text import ByteTokenizer, CausalLM, TextConfig
from rwkv_text.baselines import ngram_bits_per_byte, xz_bits_per_byte
from rwkv_text.data import batches, documents, split_documents
from rwkv_text.sampling import Sampler
from rwkv_text.tokenizer import BOUNDARY, StreamDecoder, tokenizer

SMALL = TextConfig(dim=32, depth=2, context=16, batch_size=2, mixer_options={"head_dim": 16})


def test_the_domain_keeps_the_contract():
    check_adapter("text", SMALL, onnx=False)  # test_export.py


# tokenizer


@pytest.mark.parametrize("text", ["", "plain", "naïve 今天 🦆", "tab\tand\nline"])
def test_bytes_round_trip(text):
    tok = ByteTokenizer()
    assert tok.decode_bytes([BOUNDARY, *tok.encode(text), BOUNDARY]).decode() == text


def test_a_nul_character_is_refused():
    with pytest.raises(DataError, match="NUL character at byte 3"):
        ByteTokenizer().encode("abc\0d")


def test_an_unknown_tokenizer_lists_the_nearest():
    with pytest.raises(UnknownNameError, match="did you mean 'bytes'"):
        tokenizer("byte")


def test_streaming_never_shows_part_of_a_character():
    decoder = StreamDecoder(ByteTokenizer())
    pieces = [decoder.push(i) for i in "né🦆".encode()]
    assert pieces == ["n", "", "é", "", "", "", "🦆"]
    assert decoder.flush() == ""
    assert [decoder.push(0xF0), decoder.flush()] == ["", "\N{REPLACEMENT CHARACTER}"]


# sampler

LOGITS = np.log(np.array([0.1, 0.5, 0.15, 0.25]))


def drawn(n=4000, **settings):
    sampler = Sampler(seed=0, **settings)
    return np.bincount([sampler(LOGITS) for _ in range(n)], minlength=4) / n


def test_sampler_draws_the_softmax():
    assert np.abs(drawn() - [0.1, 0.5, 0.15, 0.25]).max() < 0.03


def test_temperature_sharpens_and_zero_is_greedy():
    expected = np.array([0.1, 0.5, 0.15, 0.25]) ** 2
    assert np.abs(drawn(temperature=0.5) - expected / expected.sum()).max() < 0.03
    assert drawn(temperature=0)[1] == 1


def test_top_p_keeps_the_token_that_crosses_it():
    assert set(np.flatnonzero(drawn(top_p=0.6))) == {1, 3}
    assert set(np.flatnonzero(drawn(top_p=0.76))) == {1, 2, 3}
    assert set(np.flatnonzero(drawn(top_p=1e-9))) == {1}


def test_top_k_keeps_the_likeliest():
    assert set(np.flatnonzero(drawn(top_k=2))) == {1, 3}
    assert set(np.flatnonzero(drawn(top_k=9))) == {0, 1, 2, 3}


def test_top_p_comes_before_temperature():
    # at temperature 3 alone, top-p 0.7 would need a third token
    assert set(np.flatnonzero(drawn(top_p=0.7, temperature=3))) == {1, 3}


def test_a_seed_repeats_and_none_does_not():
    def first(seed):
        sampler = Sampler(seed=seed)
        return [sampler(LOGITS) for _ in range(40)]

    assert first(3) == first(3)
    assert first(None) != first(None)


@pytest.mark.parametrize("bad", [{"temperature": -1}, {"top_p": 0}, {"top_p": 1.1}, {"top_k": -1}])
def test_settings_outside_their_range_are_refused(bad):
    with pytest.raises(ValueError, match=rf"{next(iter(bad))} must be .*got"):
        Sampler(**bad)


def test_nan_logits_are_refused():
    with pytest.raises(ValueError, match="not numbers"):
        Sampler()(np.array([0.0, np.nan]))


# data


def test_every_tenth_document_is_held_out_whole():
    learned, held_out = (split_documents("pydoc", split) for split in ("train", "eval"))
    everything = list(documents("pydoc").values())
    assert held_out == everything[::10]
    assert len(learned) + len(held_out) == len(everything) > 70


def test_a_single_file_holds_out_its_last_tenth(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("0123456789" * 10)
    assert split_documents(str(path), "eval") == ["0123456789"]
    assert split_documents(str(path), "train") == ["0123456789" * 9]


def test_a_folder_is_read_by_file(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("b")
    (tmp_path / "sub/a.txt").write_text("a")
    (tmp_path / "c.md").write_text("not text")
    assert documents(str(tmp_path)) == {"b.txt": "b", "sub/a.txt": "a"}


def test_training_batches_are_windows_of_the_stream(tmp_path):
    path = tmp_path / "a.txt"
    text = "".join(chr(97 + i % 26) for i in range(500))
    path.write_text(text)
    config = TextConfig(data=str(path), context=20, batch_size=4)
    batch = next(batches(config, "train"))
    assert batch.tokens_BT.shape == (4, 21)
    for row in batch.tokens_BT.tolist():
        assert ByteTokenizer().decode_bytes(row).decode() in text
    assert batch.n_bytes == (batch.tokens_BT[:, 1:] != BOUNDARY).sum()


def test_evaluation_reads_each_document_once_from_boundary_to_boundary(tmp_path):
    for i in range(12):
        (tmp_path / f"{i:02}.txt").write_text(f"document {i} é")
    rows = list(batches(TextConfig(data=str(tmp_path)), "eval"))
    assert [r.tokens_BT.shape[0] for r in rows] == [1, 1]
    assert rows[1].tokens_BT[0].tolist() == [0, *"document 10 é".encode(), 0]
    assert rows[1].n_bytes == len("document 10 é".encode())


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (b"", "is empty"),
        (b" \n", "is empty"),
        (b"caf\xe9 cr\xe8me", "is not UTF-8: byte 3 is 0xe9; convert it"),
        (b"too short", "the training text has 11 tokens, one sequence needs 17"),
        (b"nul \0 " * 99, "NUL character at byte 4"),
    ],
)
def test_bad_text_is_refused(tmp_path, content, error):
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    with pytest.raises(DataError, match=error):
        next(batches(TextConfig(data=str(path), context=16), "train"))


def test_absent_text_is_refused(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        documents(str(tmp_path / "absent"))
    with pytest.raises(DataError, match=r"holds no \.txt file"):
        documents(str(tmp_path))


# model


@pytest.fixture
def model():
    model = CausalLM(SMALL)
    perturb(model)
    return model


def test_generate_is_what_the_forward_pass_predicts(model):
    text = model.generate("ab", max_tokens=12, temperature=0)
    tokens = [BOUNDARY, *b"ab"]
    for _ in range(12):
        with torch.no_grad():
            token = int(model(torch.tensor([tokens])).logits_BTV[0, -1].argmax())
        if token == BOUNDARY:
            break
        tokens.append(token)
    assert text == bytes(tokens[3:]).decode(errors="replace")
    assert model.training, "generate must leave the model's mode alone"


def test_generate_streams_repeats_by_seed_and_takes_an_empty_prompt(model):
    whole = model.generate("x", max_tokens=30, seed=1)
    assert "".join(model.generate("x", max_tokens=30, seed=1, stream=True)) == whole
    assert model.generate("x", max_tokens=30, seed=2) != whole
    assert isinstance(model.generate(max_tokens=3), str)
    assert model.generate("x", max_tokens=0) == ""


def test_batch_rows_and_batch_of_one(model):
    model.eval()
    tokens = torch.randint(1, 256, (3, 9))
    with torch.no_grad():
        together = model(tokens).logits_BTV
        alone = model(tokens[:1]).logits_BTV
    torch.testing.assert_close(alone, together[:1], atol=1e-5, rtol=1e-5)


def test_long_documents_are_evaluated_in_segments_without_a_seam(model, monkeypatch):
    from rwkv_text import adapter as module
    from rwkv_text.data import TextBatch

    batch = TextBatch(torch.randint(1, 256, (1, 40)), 39)
    with torch.no_grad():
        whole = module.adapter.loss(model, batch, torch.Generator())[0]
        monkeypatch.setattr(module, "SEGMENT", 7)
        parts = module.adapter.loss(model, batch, torch.Generator())[0]
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=1e-6)


def test_loss_is_cross_entropy_and_its_hold_on_large_logits(model):
    from rwkv_text.adapter import adapter
    from rwkv_text.data import TextBatch

    tokens = torch.randint(1, 256, (2, 10))
    logits = model(tokens[:, :-1]).logits_BTV
    ce = torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:])
    expected = ce + 0.5e-4 * logits.amax(-1).square().mean()
    loss, sums = adapter.loss(model, TextBatch(tokens, 18), torch.Generator())
    torch.testing.assert_close(loss, expected)
    assert adapter.metrics(SMALL, sums)["loss"] == pytest.approx(ce.item(), rel=1e-6)
    assert adapter.metrics(SMALL, sums)["bits_per_byte"] == pytest.approx(ce.item() / np.log(2))


# yardsticks


def test_ngram_is_a_distribution_and_learns():
    # a text the model has seen costs little, one of other letters much
    assert ngram_bits_per_byte(["abab" * 200], ["abab" * 50]) < 0.2
    assert ngram_bits_per_byte(["abab" * 200], ["xyzq" * 50]) > 8
    # with nothing learned every byte costs eight bits
    assert ngram_bits_per_byte([], ["abcd"], order=1) == pytest.approx(8 * 5 / 4)


def test_xz_is_the_command_lines_size():
    assert xz_bits_per_byte(["a" * 10000]) < 0.2
