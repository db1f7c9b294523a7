"""The command line: the whole job on a tiny checkpoint; every bad input ends in one sentence and
exit code 2."""

import json
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import processors

# isort: off
from conftest import LLAMA, TEXT, kind_of, random_ids, random_model
import bench
import ffn2moe
from model import MoESpec, encode, generate, load_model, make_ffn, perplexity, read_ids

@pytest.fixture
def argv(checkpoint, text):
    tokens = ["--calib-tokens", "512", "--eval-tokens", "640", "--window", "128", "--dense", "0"]
    return ["--model", str(checkpoint), "--calib", str(text), "--eval", str(text), *tokens]

@pytest.mark.parametrize("method, experts", [("joint", "S3A1E8"), ("paper", "S3A3E8")])
def test_the_main_job(method, experts, argv, checkpoint, tmp_path, capsys):
    out, table = tmp_path / "out", tmp_path / "new/table.json"
    tokenizer = ffn2moe.Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    bos = tokenizer.id_to_token(7)  # begins the text, the prompt and every window
    tokenizer.post_processor = processors.TemplateProcessing(f"{bos}:0 $A:0", None, [(bos, 7)])
    tokenizer.save(str(checkpoint / "tokenizer.json"))
    argv += ["--dense", "auto", "--k-act", "6", "--method", method]
    template = checkpoint / "chat_template.jinja"  # small files are carried along
    template.write_text("{{ messages }}")
    assert ffn2moe.main([*argv, "--out", str(out), "--json", str(table)]) == 0
    printed, result = capsys.readouterr(), json.loads(table.read_text())
    dense, tokenizer = load_model(checkpoint)
    loaded, _ = load_model(out)
    ids = encode(tokenizer, TEXT)[:640]
    assert result["dense_perplexity"] == pytest.approx(perplexity(dense, ids, 128), rel=1e-6)
    assert result["moe_perplexity"] == pytest.approx(perplexity(loaded, ids, 128), rel=1e-6)
    assert result["moe_perplexity"] != result["dense_perplexity"]
    ffn, router = 3 * 32 * 64, {"joint": 5 * 32, "paper": 5 * 2 * 32}[method]
    active = {"joint": ffn + 2 * (ffn / 2 + router), "paper": 3 * (3 / 4 * ffn + router)}[method]
    assert result["moe_ffn_parameters"] == active and result["dense_ffn_parameters"] == 3 * ffn
    assert result["dense_parameters"] - result["moe_parameters"] == 3 * ffn - active
    lines = {line.split()[0]: line.split()[-1] for line in result["table"].splitlines() if line}
    ratio = result["moe_perplexity"] / result["dense_perplexity"]
    assert lines["perplexity"] == f"{ratio:.2f}x"
    for what in ("prefill,", "decode,"):
        times = (result[f"{side}_{what[:-1]}_ms"] for side in ("dense", "moe"))
        speedup = next(times) / next(times)
        assert result[f"{what[:-1]}_speedup"] == speedup and lines[what] == f"{speedup:.2f}x"
    assert result["dense"] in ({"0", "1", "2"} if method == "joint" else {"none"})
    settings = {"experts": experts, "method": method, "window": 128}
    settings |= {"seed": 0, "calib_tokens": 512, "eval_tokens": 640, "dtype": "float32"}
    assert settings.items() <= result.items() and result["conversion_seconds"] > 0
    prompt = encode(tokenizer, "The capital of France is")
    continued = " ".join(tokenizer.decode(prompt + generate(loaded, prompt, 24)).split())
    for expected in (f"MoE {experts}", f"{result['moe_perplexity']:.2f}", continued):
        assert expected in printed.out
    assert "converting" in printed.err and "3/3" in printed.err
    assert (out / template.name).read_text() == "{{ messages }}"
    # A model that can be a standard checkpoint is one; a note says why another is not.
    assert kind_of(out) == {"joint": "qwen2_moe", "paper": "ffn2moe"}[method]
    assert ("note: " in printed.err) == (method == "paper")
    # The checkpoint is evaluated as it is; where --experts says so, its experts are split.
    again = ["--model", str(out), *argv[2:], "--json", str(table)]
    assert ffn2moe.main(again) == 0 and "is an MoE already" in capsys.readouterr().err
    second = json.loads(table.read_text())
    assert "dense_perplexity" not in second and second["experts"] is None
    assert second["moe_perplexity"] == result["moe_perplexity"]
    assert ffn2moe.main([*again, "--experts", "S1A1E4"]) == 0
    assert "MoE of MoEs" in capsys.readouterr().out
    third = json.loads(table.read_text())
    assert third["dense_perplexity"] == second["moe_perplexity"] != third["moe_perplexity"]

def test_seed_picks_the_calibration_windows_and_all_text_is_evaluated(argv, tmp_path):
    found = []
    argv += ["--eval-tokens", "0", "--experts", "S1A1E8", "--json", str(tmp_path / "t.json")]
    argv += ["--out", str(tmp_path / "out"), "--force"]  # it replaces what the last one wrote
    for seed in ("0", "0", "1"):
        assert ffn2moe.main([*argv, "--seed", seed]) == 0
        found.append(json.loads((tmp_path / "t.json").read_text()))
    first, same, other = (result["moe_perplexity"] for result in found)
    assert first == same != other
    model, tokenizer = load_model(argv[1])
    whole = perplexity(model, tokenizer.encode(TEXT).ids, 128)
    assert found[0]["dense_perplexity"] == pytest.approx(whole, rel=1e-6)

def test_explain(argv, tmp_path, capsys):
    argv += ["--experts", "S1A2E8", "--explain", "The old house", "--layer"]
    assert ffn2moe.main([*argv, "2"]) == 0
    printed = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in printed if line and set(line.split()[-1]) == {"#", "."}]
    assert "".join(word for word, _ in rows) == "Theoldhouse"
    assert all(len(marks) == 7 and marks.count("#") == 2 for _, marks in rows)
    assert sum(line.startswith("expert ") for line in printed) == 7
    assert not any("perplexity" in line for line in printed)
    assert ffn2moe.main([*argv, "0"]) == 0  # which stays dense: the nearest MoE layer
    assert capsys.readouterr().out.startswith("Layer 1: 2 of 7")
    assert ffn2moe.main([*argv[:-1], "--dtype", "bfloat16", "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.startswith("Layer 1: 2 of 7")  # the middle one
    assert load_file(tmp_path / "out/model.safetensors").popitem()[1].dtype == torch.bfloat16

def test_special_tokens_are_no_words_of_experts(tokenizer):
    model = ffn2moe.convert(random_model(LLAMA), random_ids(2, 100), "S2A2E8", dense="none")
    windows = random_ids(4, 50)
    windows[:, ::5] = 299  # <end>
    favourites = ffn2moe.words_of_experts(model, tokenizer, windows, 1)
    assert any(favourites) and not any("<end>" in words for words in favourites)
    assert ffn2moe.token_text(tokenizer, 299) == "<end>"

ARGUMENTS = [
    ("--experts S3A3E7", "not divisible by E = 7"),
    ("--experts S6A3E8", "S + A = 9 is more than E = 8"),
    ("--experts S0A3E8", "S >= 1"),
    ("--experts S3A0E8", "A >= 1"),
    ("--experts three", "S3A3E8"),
    ("--k-act 65 --method paper", "k_act = 65"),
    ("--k-act 0 --method paper", "k_act = 0"),
    ("--dense 0-2", "all layers are to stay dense"),
    ("--dense 0-3", "the layers are 0 to 2"),
    ("--active 0 --dense auto", "--active 0.0 is not between"),
    ("--active 1.1 --dense auto", "--active 1.1 is not between"),
    ("--active 0.6 --dense 0", "--dense auto"),
    ("--active 0.4 --dense auto", "the 50.0% that S3A1E8 runs"),
    ("--explain x --json y", "--json could write"),
    ("--calib {short}", "less than one window of 128"),
    ("--eval {short}", "less than one window of 128"),
    ("--eval {none}", "no.txt cannot be read as UTF-8 text: [Errno 2] No such file"),
    ("--prompt=", "the prompt is empty"),
    (f"--prompt {'cat.' * 99}", "the prompt is empty or too long"),
    ("--prompt \udcff", "cannot encode"),
    ("--explain=", "the prompt is empty"),
    ("--explain \udcff", "cannot encode"),
    ("--calib-tokens 100", "--calib-tokens must be at least --window, here 128"),
    ("--out=", "not empty; --force"),
    ("--json=", "of another kind"),
    (f"--seed {2**64}", "--seed"),
    ("--window 1", "--window must be at least 2"),
    ("--json {checkpoint}", "of another kind"),
    ("--json {short}/table.json", "cannot write"),
    ("--out {checkpoint}", "not empty; --force"),
    ("--out {checkpoint}/config.json", "not a directory"),
    ("--model {none}", "no such file"),
    ("--model {short}", "neither a checkpoint directory nor a .gguf file"),
    ("--device abacus", "device 'abacus' is not usable"),
    ("--device meta", "devices are cpu, cuda and cuda:N"),
]

@pytest.mark.parametrize("extra, message", ARGUMENTS)
def test_bad_input_ends_in_one_sentence(extra, message, argv, checkpoint, tmp_path, capsys):
    """More of what is refused is in test_model.py and test_method.py."""
    (tmp_path / "short.txt").write_text("hello")
    places = {"short": tmp_path / "short.txt", "none": tmp_path / "no.txt"}
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    extra = [word.format(**places, checkpoint=checkpoint) for word in extra.split()]
    assert ffn2moe.main([*argv, "--out", str(tmp_path / "out"), *extra]) == 2
    complaint = capsys.readouterr().err.splitlines()[-1]
    assert complaint.startswith("ffn2moe: ") and message in complaint
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert not (tmp_path / "out").exists()

def test_as_a_process():
    command = [sys.executable, ffn2moe.__file__, "--window", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("ffn2moe: --window")

@pytest.mark.parametrize("command", [ffn2moe, bench, bench.train])
def test_help(command):
    with pytest.raises(SystemExit):
        command.parse_args(["--help"])

def test_each_neuron_is_calibrated_on_enough_tokens(checkpoint, monkeypatch, capsys):
    """An expert that 2 of 8 tokens choose needs four times as many."""
    model, tokenizer = load_model(checkpoint)
    ids = read_ids(model, tokenizer, "manual", "train")
    monkeypatch.setattr(ffn2moe.METHODS["joint"], "calib_tokens", 64)
    args = ffn2moe.parse_args(["--window", "64"])
    few = ffn2moe.parse_args(["--calib-tokens", "1000000"])
    ffn2moe.calibration_windows(model, ids, few)
    assert re.search(r"manual has only \d+ of 1000000 calibration", capsys.readouterr().err)
    for ffn, neurons in ((64, 64), (MoESpec(16, 8, 40, 2), 160), (MoESpec(200, 8, 40, 2), 200)):
        model.ffns = [make_ffn(32, spec) for spec in (64, ffn, 64)]
        windows = ffn2moe.calibration_windows(model, ids, args)
        assert 0 < windows.numel() - 10 * neurons <= 64
