"""The command line: the whole job on a tiny checkpoint, and every bad input ending in one sentence and exit code 2."""

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import LLAMA, TEXT

import ffn2moe
import model as lm

ROOT = Path(ffn2moe.__file__).parent


@pytest.fixture
def argv(checkpoint, text):
    tokens = ["--calib-tokens", "512", "--eval-tokens", "640", "--window", "128"]
    return ["--model", str(checkpoint), "--calib", str(text), "--eval", str(text), *tokens, "--dense", "0"]


@pytest.mark.parametrize("method, experts, dense_layers", [("joint", "S2A2E8", "0"), ("paper", "S3A3E8", "none")])
def test_the_main_job(method, experts, dense_layers, argv, checkpoint, tmp_path, capsys):
    argv[-1] = dense_layers
    out, table, plots = tmp_path / "out", tmp_path / "new/table.json", tmp_path / "out/plots"
    assert ffn2moe.main([*argv, "--out", str(out), "--json", str(table), "--plot", str(plots), "--k-act", "6", "--method", method]) == 0
    printed = capsys.readouterr()
    result = json.loads(table.read_text())
    dense, tokenizer = lm.load_model(checkpoint)
    ids = torch.tensor(tokenizer.encode(TEXT).ids)
    assert result["dense_perplexity"] == pytest.approx(lm.perplexity(dense, ids[:640], 128), rel=1e-6)
    loaded, _ = lm.load_model(out)
    assert result["moe_perplexity"] == pytest.approx(lm.perplexity(loaded, ids[:640], 128), rel=1e-6)
    assert result["moe_perplexity"] != result["dense_perplexity"]
    assert result["experts"] == experts and result["dense"] == dense_layers
    assert (result["active_ffn_parameters"], result["active_parameters"]) == lm.active_parameters(loaded)
    assert result["active_ffn_fraction"] == result["active_ffn_parameters"] / lm.active_parameters(dense)[0]
    assert result["conversion_seconds"] > 0
    assert result["prefill_speedup"] == result["dense_prefill_ms"] / result["moe_prefill_ms"] > 0
    assert result["decode_speedup"] == result["dense_decode_ms"] / result["moe_decode_ms"] > 0
    settings = {"method": method, "k_act": 6, "seed": 0, "calib_tokens": 512, "eval_tokens": 640, "window": 128, "dtype": "float32"}
    assert settings.items() <= result.items()
    prompt = tokenizer.encode("The capital of France is").ids
    continued = " ".join(tokenizer.decode(prompt + lm.generate(loaded, prompt, 24)).split())
    for expected in ("dense", f"MoE {experts}", f"{result['moe_perplexity']:.2f}", continued):
        assert expected in printed.out
    assert "converting" in printed.err and "3/3" in printed.err
    for name in ("activation_rates.png", "expert_load.png"):
        image = (plots / name).read_bytes()
        width, height = struct.unpack(">II", image[16:24])
        assert image[:4] == b"\x89PNG" and width > 300 and height > 200
    # The checkpoint is evaluated as it is.
    again = tmp_path / "again.json"
    assert ffn2moe.main([*argv[2:], "--model", str(out), "--json", str(again)]) == 0
    again = json.loads(again.read_text())
    assert again["moe_perplexity"] == result["moe_perplexity"] and again["dense_perplexity"] is None
    assert again["active_ffn_fraction"] == result["active_ffn_fraction"]


def test_seed_picks_the_calibration_windows_and_all_text_is_evaluated(argv, tmp_path):
    results = []
    for seed in ("0", "0", "1"):
        extra = ["--seed", seed, "--eval-tokens", "0", "--json", str(tmp_path / "t.json"), "--experts", "S1A1E8"]
        assert ffn2moe.main([*argv, *extra]) == 0
        results.append(json.loads((tmp_path / "t.json").read_text()))
    for result in results:
        for name in [name for name in result if name.endswith(("_seconds", "_ms", "_speedup"))]:
            result.pop(name)
    assert results[0] == results[1] and results[0]["moe_perplexity"] != results[2]["moe_perplexity"]
    assert results[0]["eval_tokens"] > 2000


def change_config(**change):
    return lambda path: (path / "config.json").write_text(json.dumps(LLAMA | change))


def cut(name):
    return lambda path: (path / name).write_bytes((path / name).read_bytes()[:-100])


@pytest.mark.parametrize(
    "damage, extra, message",
    [
        (cut("model.safetensors"), [], "truncated"),
        (lambda path: (path / "model.safetensors").unlink(), [], "no .safetensors file"),
        (change_config(intermediate_size=65), [], "gate_proj.weight' is [64, 32]"),
        (change_config(num_hidden_layers=4), [], "layer 3"),
        (change_config(vocab_size=200), [], "embed_tokens.weight"),
        (change_config(model_type="phi"), [], "'phi'"),
        (None, ["--experts", "S3A3E7"], "not divisible by E = 7"),
        (None, ["--experts", "S6A3E8"], "S + A = 9 is more than E = 8"),
        (None, ["--experts", "S0A3E8"], "S >= 1"),
        (None, ["--experts", "S3A0E8"], "A >= 1"),
        (None, ["--experts", "three"], "S3A3E8"),
        (None, ["--k-act", "65"], "k_act = 65"),
        (None, ["--dense", "0-2"], "leave none of the 3 layers"),
        (None, ["--dense", "3"], "the model has 3"),
        (None, ["--dense", "2-"], "numbers and ranges"),
        (None, ["--active", "0"], "--active must be more than 0"),
        (None, ["--calib", "{short}"], "less than one window of 128"),
        (None, ["--eval", "{short}"], "less than one window of 128"),
        (None, ["--eval", "{none}"], "no.txt: No such file"),
        (None, ["--prompt", ""], "prompt is empty"),
        (None, ["--prompt", "\udcff"], "cannot encode"),
        (None, ["--calib-tokens", "100"], "--calib-tokens at least --window"),
        (None, ["--seed", str(2**64)], "--seed"),
        (None, ["--plot", "{short}"], "of another kind"),
        (None, ["--json", "{checkpoint}"], "of another kind"),
        (None, ["--out", "{checkpoint}"], "not empty; --force"),
        (None, ["--out", "{checkpoint}/config.json"], "not a directory"),
        (None, ["--model", "{none}"], "no such file"),
        (None, ["--model", "{short}"], "neither a checkpoint directory nor a .gguf file"),
        (None, ["--json", "{short}/table.json"], "cannot write"),
        (None, ["--device", "abacus"], "device 'abacus' is not usable"),
        (None, ["--window", "1"], "--window must be at least 2"),
    ],
)
def test_bad_input_ends_in_one_sentence(damage, extra, message, argv, checkpoint, tmp_path, capsys):
    (tmp_path / "short.txt").write_text("hello")
    places = {"short": tmp_path / "short.txt", "none": tmp_path / "no.txt", "checkpoint": checkpoint}
    if damage:
        damage(checkpoint)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    extra = ["--out", str(tmp_path / "out"), *(e.format(**places) for e in extra)]
    assert ffn2moe.main([*argv, *extra]) == 2
    complaint = capsys.readouterr().err.splitlines()[-1]
    assert complaint.startswith("ffn2moe: ") and message in complaint
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert not (tmp_path / "out").exists()


def test_tokens_outside_the_vocabulary(argv, checkpoint, tokenizer, capsys):
    tokenizer = type(tokenizer).from_str(tokenizer.to_str())
    tokenizer.add_special_tokens(["The red"])  # id 300
    tokenizer.save(str(checkpoint / "tokenizer.json"))
    assert ffn2moe.main(argv) == 2
    assert "outside the model's vocabulary of 300" in capsys.readouterr().err


def test_as_a_process(argv):
    def run(*args):
        command = [sys.executable, "ffn2moe.py", *args]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    done = run(*argv, "--k-act", "1000")
    assert done.returncode == 2 and "Traceback" not in done.stderr and "k_act = 1000" in done.stderr
    help_text = run("--help").stdout
    options = "model calib eval method experts dense active k-act calib-tokens eval-tokens window dtype device seed prompt out force json plot"
    assert all(f"--{option} " in help_text for option in options.split())
