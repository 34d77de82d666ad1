"""The state as an object: carry, fork, mix, save, load, hash."""

import pytest
import torch

from rwkv_core.errors import CheckpointError
from rwkv_core.testing import perturb, relative_error
from rwkv_text import CausalLM, TextConfig

CONFIG = TextConfig(dim=32, depth=2, vocab_size=20, mixer_options={"head_dim": 16})


@pytest.fixture
def model():
    model = CausalLM(CONFIG).eval()
    perturb(model)
    return model


@torch.no_grad()
def test_carrying_the_state_continues_the_sequence(model):
    tokens = torch.randint(20, (2, 30))
    whole = model(tokens)
    first = model(tokens[:, :11])
    rest = model(tokens[:, 11:], first.state)
    assert relative_error(rest.logits_BTV, whole.logits_BTV[:, 11:]) < 1e-5
    assert (first.state.position, rest.state.position) == (11, 30)


@torch.no_grad()
def test_a_sequence_longer_than_any_context_works(model):
    assert model(torch.randint(20, (1, 3000))).logits_BTV.isfinite().all()


@torch.no_grad()
def test_no_tokens_keep_the_state(model):
    state = model(torch.randint(20, (1, 5))).state
    out = model(torch.empty(1, 0, dtype=torch.long).zero_(), state)
    assert out.logits_BTV.shape == (1, 0, 20)
    assert out.state.hash() == state.hash()


@torch.no_grad()
def test_saved_and_loaded_state_is_the_same(model, tmp_path):
    state = model(torch.randint(20, (1, 7))).state
    state.save(tmp_path / "chat.state")
    loaded = model.init_state().load(tmp_path / "chat.state")
    assert loaded.hash() == state.hash()
    assert loaded.position == 7
    tokens = torch.randint(20, (1, 4))
    assert torch.equal(model(tokens, loaded).logits_BTV, model(tokens, state).logits_BTV)


@torch.no_grad()
def test_fork_mix_and_hash(model):
    a = model(torch.randint(20, (1, 7))).state
    b = model(torch.randint(20, (1, 9))).state
    assert a.hash() != b.hash()
    three = a.fork(3)
    assert [t.shape[0] for t in three.layers[0]] == [3, 3, 3]
    assert torch.equal(three.layers[1].wkv_BHKV[2], a.layers[1].wkv_BHKV[0])
    half = a.mix(b, 0.5).layers[0].wkv_BHKV
    expected = (a.layers[0].wkv_BHKV + b.layers[0].wkv_BHKV) / 2
    assert relative_error(half, expected) < 1e-6


@torch.no_grad()
def test_the_state_of_another_model_is_refused(model, tmp_path):
    other = CausalLM(TextConfig(dim=32, depth=3, vocab_size=20, mixer_options={"head_dim": 16}))
    state = other.init_state()
    with pytest.raises(CheckpointError, match="state belongs to another model"):
        model(torch.randint(20, (1, 2)), state)
    state.save(tmp_path / "state")
    with pytest.raises(CheckpointError, match="belongs to another model: it has fingerprint"):
        model.init_state().load(tmp_path / "state")
    with pytest.raises(CheckpointError, match="cannot mix states of different models"):
        model.init_state().mix(state, 0.5)


def test_a_file_that_is_no_state_is_refused(model, tmp_path):
    path = tmp_path / "state"
    path.write_bytes(b"\x10\0\0\0\0\0\0\0not json at all!")
    with pytest.raises(CheckpointError, match="is not a saved state"):
        model.init_state().load(path)
    with pytest.raises(CheckpointError, match="is not a saved state"):
        model.init_state().load(tmp_path / "absent")
