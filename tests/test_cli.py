"""The command: every verb, help that teaches, nearest names, errors without tracebacks."""

import json
import shlex
import subprocess
import sys

import pytest

from rwkv_core import checkpoint
from rwkv_core.cli import main
from rwkv_text import TextConfig

VERBS = [
    "list", "info", "train", "eval", "generate", "export", "verify", "run", "bench", "convert",
    "demo", "doctor",
]  # fmt: skip
TINY = [
    f"--set={a}"
    for a in (
        "task.dim=32", "task.depth=2", "task.context=16", "task.batch_size=2",
        "task.mixer_options.head_dim=16", "train.steps=3", "train.threads=1",
    )
]  # fmt: skip


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("To be, or not to be, that is the question. " * 20)
    return str(path)


@pytest.fixture
def saved(tmp_path, text):
    config = TextConfig(dim=32, depth=2, data=text, context=16, mixer_options={"head_dim": 16})
    return str(checkpoint.save(checkpoint.build("text", config), tmp_path / "model"))


def run(capsys, *argv):
    """Return (status, stdout, stderr) of one command."""
    try:
        status = main(argv)
    except SystemExit as exit_:
        status = exit_.code
    out = capsys.readouterr()
    return status, out.out, out.err


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(capsys, verb):
    status, out, _ = run(capsys, verb, "--help")
    assert status == 0
    assert f"usage: rwkv {verb}" in out


def test_help_lists_every_verb(capsys):
    for argv in ([], ["--help"]):
        status, out, _ = run(capsys, *argv)
        assert status == 0
        assert all(f"\n    {verb} " in out for verb in VERBS)


@pytest.mark.parametrize(
    ("argv", "error"),
    [
        (["trian"], "unknown command 'trian'; did you mean 'train'"),
        (["train", "--stp", "3"], "unknown argument '--stp'; did you mean '--set'"),
        (["train", "txet"], "unknown recipe 'txet'; did you mean 'text'"),
        (["train"], "which recipe? registered: "),
        (["train", "text", "--set", "train.lrr=1"], "unknown field 'train.lrr'; did you mean 'lr'"),
        (["train", "text", "--set", "task.dim=x"], "field 'task.dim' expects int, got 'x'"),
        (["train", "text", "--set", "trian.lr=1"], "unknown field 'trian'; did you mean 'train'"),
        (["train", "text", *TINY, "--set", "task.mixer=rwkv77"], "unknown mixer 'rwkv77'; did you"),
        (["train", "text", *TINY, "--set", "task.mixer_options.hd=1"], "unknown mixer option 'hd'"),
        (["train", "text", *TINY, "--data", "absent.txt"], "absent.txt does not exist"),
        (["train", "--resume", "absent"], "absent holds no run to resume"),
        (["info", "absent"], "absent is not a checkpoint folder"),
        (["eval", "absent"], "absent is not a checkpoint folder"),
        (["generate", "absent"], "absent is not a checkpoint folder"),
        (["export", "absent", "out"], "absent is not a checkpoint folder"),
        (["demo", "--mixer", "rwkv77", "--out", "new"], "unknown mixer 'rwkv77'; did you mean"),
    ],
)  # fmt: skip
def test_mistakes_get_one_clear_line(capsys, argv, error, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, err = run(capsys, *argv)
    assert status == 2
    assert error in err
    assert "Traceback" not in out + err
    assert not list(tmp_path.iterdir()), "a refused command must not leave files"


def test_list_shows_every_registered_name_and_where_it_lives(capsys):
    status, out, _ = run(capsys, "list")
    assert status == 0
    for line in (
        "rwkv7        rwkv_core.mixers.rwkv7:RWKV7",
        "text         rwkv_text.adapter:adapter",
    ):
        assert line in out


def test_print_config_is_the_run_that_would_start(capsys, text):
    status, out, _ = run(capsys, "train", "text", "--data", text, *TINY, "--print-config")
    config = json.loads(out)
    assert status == 0
    assert config["task"]["data"] == text
    assert config["task"]["mixer_options"] == {"head_dim": 16}
    assert config["train"]["steps"] == 3


def test_train_eval_export_generate_info(capsys, text, tmp_path):
    run_dir, out_dir = str(tmp_path / "run"), str(tmp_path / "out")
    status, out, err = run(capsys, "train", "text", "--data", text, "--out", run_dir, *TINY)
    assert status == 0, err
    assert "bits_per_byte" in out
    assert "step 3/3" in err
    assert run(capsys, "train", "text", "--data", text, "--out", run_dir, *TINY)[0] == 2
    longer = ["--set", "train.steps=5"]
    assert run(capsys, "train", "--resume", run_dir, *longer)[0] == 0
    assert checkpoint.find(run_dir).name == "step-0000005"

    status, out, _ = run(capsys, "eval", run_dir)
    assert status == 0
    assert "bits_per_byte" in out
    for split, error in (
        ("train", "has no end"),
        ("test", "splits 'train' and 'eval', got 'test'"),
    ):
        status, _, err = run(capsys, "eval", run_dir, "--split", split)
        assert status == 2
        assert error in err
    status, out, _ = run(capsys, "export", run_dir, out_dir, "--steps", "8")
    assert status == 0
    assert "worst disagreement" in out
    settings = ["--prompt", "To be", "--max-tokens", "20", "--seed", "1"]
    texts = [run(capsys, "generate", path, *settings)[1] for path in (run_dir, out_dir)]
    assert texts[0] == texts[1]
    assert texts[0].startswith("To be")

    assert "bytes per sequence" in run(capsys, "info", run_dir)[1]
    assert "step.onnx" in run(capsys, "info", out_dir)[1]


def test_a_damaged_run_and_a_folder_that_cannot_be_made(capsys, text, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/run.json").write_text('{"adapter": ')
    status, _, err = run(capsys, "train", "--resume", str(tmp_path / "run"))
    assert status == 2
    assert "run.json is damaged" in err
    status, _, err = run(capsys, "train", "text", "--data", text, "--out", f"{text}/run", *TINY)
    assert status == 2
    assert err.endswith("text.txt: File exists\n") or "Not a directory" in err
    assert "Traceback" not in err


def test_doctor_reports_versions_and_implementations(capsys):
    status, out, _ = run(capsys, "doctor")
    assert status == 0
    assert "torch" in out
    assert "op wkv7       reference, chunked" in out


def test_a_full_disk_is_one_line(capsys, saved, tmp_path, monkeypatch):
    import rwkv_export._export as module

    def full(*args, **settings):
        raise OSError(28, "No space left on device", "step.onnx")

    monkeypatch.setattr(module, "write_onnx", full)
    status, _, err = run(capsys, "export", saved, str(tmp_path / "out"))
    assert status == 2
    assert err == "rwkv: error: step.onnx: No space left on device\n"
    assert not (tmp_path / "out").exists()


def test_export_for_phones_does_not_quantise(capsys, saved, tmp_path):
    flags = ["--mobile", "--quantize", "int8"]
    status, _, err = run(capsys, "export", saved, str(tmp_path / "out"), *flags)
    assert status == 2
    assert "--mobile and --quantize do not go together" in err
    assert not (tmp_path / "out").exists()


def test_ctrl_c_outside_training_is_quiet(capsys, monkeypatch):
    monkeypatch.setattr(checkpoint, "load", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
    status, _, err = run(capsys, "info", "anything")
    assert (status, err) == (130, "")


def test_a_closed_pipe_is_quiet():
    # the reader closes its end before Python has started
    rwkv = f"{shlex.quote(sys.executable)} -m rwkv_core.cli list"
    command = f"set -o pipefail; {rwkv} | (exec 0<&-; sleep 3)"
    done = subprocess.run(["bash", "-c", command], capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, b"")
