"""The command line: the whole job on a tiny checkpoint; every bad input ends in one sentence and
exit code 2."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import LLAMA, TEXT, kind_of, random_ids, random_model
from tokenizers import processors

import ffn2moe
from model import MoESpec, generate, load_model, perplexity

JOBS = [("joint", "S2A2E8", "auto"), ("paper", "S3A3E8", "none")]

@pytest.fixture
def argv(checkpoint, text):
    tokens = ["--calib-tokens", "512", "--eval-tokens", "640", "--window", "128", "--dense", "0"]
    return ["--model", str(checkpoint), "--calib", str(text), "--eval", str(text), *tokens]

@pytest.mark.parametrize("method, experts, dense_layers", JOBS)
def test_the_main_job(method, experts, dense_layers, argv, checkpoint, tmp_path, capsys):
    out, table = tmp_path / "out", tmp_path / "new/table.json"
    argv += ["--dense", dense_layers, "--k-act", "6", "--method", method]
    template = checkpoint / "chat_template.jinja"  # small files are carried along
    template.write_text("{{ messages }}")
    assert ffn2moe.main([*argv, "--out", str(out), "--json", str(table)]) == 0
    printed, result = capsys.readouterr(), json.loads(table.read_text())
    dense, tokenizer = load_model(checkpoint)
    loaded, _ = load_model(out)
    ids = tokenizer.encode(TEXT).ids[:640]
    assert result["dense_perplexity"] == pytest.approx(perplexity(dense, ids, 128), rel=1e-6)
    assert result["moe_perplexity"] == pytest.approx(perplexity(loaded, ids, 128), rel=1e-6)
    assert result["moe_perplexity"] != result["dense_perplexity"]
    ffn, router = 3 * 32 * 64, {"joint": 6 * (32 + 2), "paper": 5 * (2 * 32 + 2)}[method]
    active = {"joint": ffn + 2 * (ffn / 2 + router), "paper": 3 * (3 / 4 * ffn + router)}[method]
    assert result["moe_ffn_parameters"] == active and result["dense_ffn_parameters"] == 3 * ffn
    assert result["dense_parameters"] - result["moe_parameters"] == 3 * ffn - active
    for what in ("prefill", "decode"):
        speedup = result[f"dense_{what}_ms"] / result[f"moe_{what}_ms"]
        assert result[f"{what}_speedup"] == speedup
    assert result["dense"] in ({"0", "1", "2"} if dense_layers == "auto" else {"none"})
    settings = {"experts": experts, "method": method, "window": 128}
    settings |= {"seed": 0, "calib_tokens": 512, "eval_tokens": 640, "dtype": "float32"}
    assert settings.items() <= result.items() and result["conversion_seconds"] > 0
    prompt = tokenizer.encode("The capital of France is").ids
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

def test_every_window_begins_with_the_token_that_begins_texts(argv, checkpoint, tmp_path):
    tokenizer = ffn2moe.Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    ids = tokenizer.encode(TEXT).ids
    bos, eos = tokenizer.id_to_token(7), "<end>"
    tokens = [(bos, 7), (eos, tokenizer.token_to_id(eos))]
    template = f"{bos}:0 $A:0 {eos}:0"
    tokenizer.post_processor = processors.TemplateProcessing(template, special_tokens=tokens)
    tokenizer.save(str(checkpoint / "tokenizer.json"))
    assert ffn2moe.main([*argv, "--json", str(tmp_path / "t.json")]) == 0
    model, _ = load_model(checkpoint)
    losses = []
    for start in range(0, 639 - 126, 127):  # 640 tokens, the first of which is the start
        window = torch.tensor([[7, *ids[start : start + 127]]])
        logits = model(window)[0, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits, window[0, 1:]).item())
    found = json.loads((tmp_path / "t.json").read_text())["dense_perplexity"]
    assert found == pytest.approx(torch.tensor(losses).mean().exp().item(), rel=1e-5)

def test_seed_picks_the_calibration_windows_and_all_text_is_evaluated(argv, tmp_path):
    found = []
    argv += ["--eval-tokens", "0", "--experts", "S1A1E8", "--json", str(tmp_path / "t.json")]
    for seed in ("0", "0", "1"):
        assert ffn2moe.main([*argv, "--seed", seed]) == 0
        found.append(json.loads((tmp_path / "t.json").read_text()))
    first, same, other = (result["moe_perplexity"] for result in found)
    assert first == same != other
    model, tokenizer = load_model(argv[1])
    whole = perplexity(model, tokenizer.encode(TEXT).ids, 128)
    assert found[0]["dense_perplexity"] == pytest.approx(whole, rel=1e-6)

def test_explain(argv, capsys):
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

def test_special_tokens_are_no_words_of_experts(tokenizer):
    model = ffn2moe.convert(random_model(LLAMA), random_ids(2, 100), "S2A2E8", dense="none")
    windows = random_ids(4, 50)
    windows[:, ::5] = 299  # <end>
    favourites = ffn2moe.words_of_experts(model, tokenizer, windows, 1)
    assert any(favourites) and not any("<end>" in words for words in favourites)
    assert ffn2moe.token_text(tokenizer, 299) == "<end>"

def change_config(**change):
    def damage(path):
        (path / "config.json").write_text(json.dumps(LLAMA | change))

    return damage

def cut_weights(path):
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])

def add_token(path):
    tokenizer = ffn2moe.Tokenizer.from_file(str(path / "tokenizer.json"))
    tokenizer.add_special_tokens(["The red"])  # id 300
    tokenizer.save(str(path / "tokenizer.json"))

DAMAGE = [
    (cut_weights, "truncated"),
    (lambda path: (path / "model.safetensors").unlink(), "no .safetensors file"),
    (change_config(intermediate_size=65), "gate_proj.weight' is [64, 32]"),
    (change_config(num_hidden_layers=4), "layer 3"),
    (change_config(vocab_size=200), "embed_tokens.weight"),
    (change_config(model_type="phi"), "'phi'"),
    (add_token, "outside the model's vocabulary of 300"),
]
ARGUMENTS = [
    ("--experts S3A3E7", "not divisible by E = 7"),
    ("--experts S6A3E8", "S + A = 9 is more than E = 8"),
    ("--experts S0A3E8", "S >= 1"),
    ("--experts S3A0E8", "A >= 1"),
    ("--experts three", "S3A3E8"),
    ("--k-act 65 --method paper", "k_act = 65"),
    ("--k-act 0 --method paper", "k_act = 0"),
    ("--dense 0-2", "some must be converted"),
    ("--dense 3", "the model has 3"),
    ("--dense 2-", "expected, for example"),
    ("--active 0", "active = 0.0 is not more than 0"),
    ("--active 0.6 --dense 0", "--dense auto"),
    ("--active 0.4 --dense auto", "runs 50.0% of each FFN"),
    ("--dense 7-0", "layers '7-0': expected"),
    ("--explain x --json y", "--json could write"),
    ("--calib {short}", "less than one window of 128"),
    ("--eval {short}", "less than one window of 128"),
    ("--eval {none}", "No such file"),
    ("--prompt=", "the prompt is empty"),
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
BAD = [(damage, "", message) for damage, message in DAMAGE]
BAD += [(None, arguments, message) for arguments, message in ARGUMENTS]

@pytest.mark.parametrize("damage, extra, message", BAD)
def test_bad_input_ends_in_one_sentence(damage, extra, message, argv, checkpoint, tmp_path, capsys):
    (tmp_path / "short.txt").write_text("hello")
    places = {"short": tmp_path / "short.txt", "none": tmp_path / "no.txt"}
    if damage:
        damage(checkpoint)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    extra = [word.format(**places, checkpoint=checkpoint) for word in extra.split()]
    assert ffn2moe.main([*argv, "--out", str(tmp_path / "out"), *extra]) == 2
    complaint = capsys.readouterr().err.splitlines()[-1]
    assert complaint.startswith("ffn2moe: ") and message in complaint
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert not (tmp_path / "out").exists()

def test_as_a_process(argv):
    command = [sys.executable, ffn2moe.__file__, *argv, "--k-act", "1000", "--method", "paper"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr and "k_act = 1000" in done.stderr

def test_what_cannot_be_shown_does_not_end_the_job(argv, tmp_path):
    command = [sys.executable, ffn2moe.__file__, *argv, "--prompt", "naïve 日本"]
    done = subprocess.run(
        [*command, "--json", tmp_path / "t.json"], capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert done.returncode == 0 and "na?ve" in done.stdout and (tmp_path / "t.json").exists()

def test_help_names_every_flag(capsys):
    with pytest.raises(SystemExit):
        ffn2moe.parse_args(["--help"])
    help_text = capsys.readouterr().out
    for option in vars(ffn2moe.parse_args([])):
        assert f"--{option.replace('_', '-')} " in help_text

def test_each_neuron_is_calibrated_on_enough_tokens(checkpoint, monkeypatch, capsys):
    """An expert that 2 of 8 tokens choose needs four times as many."""
    model, tokenizer = load_model(checkpoint)
    monkeypatch.setattr(ffn2moe.METHODS["joint"], "calib_tokens", 64)
    args = ffn2moe.parse_args(["--window", "64"])
    few = ffn2moe.parse_args(["--calib-tokens", "1000000"])
    ffn2moe.calibration_windows(model, tokenizer, few)
    assert re.search(r"manual has only \d+ of 1000000 calibration", capsys.readouterr().err)
    for ffn, neurons in ((64, 64), (MoESpec(16, 8, 40, 2), 160), (MoESpec(200, 8, 40, 2), 200)):
        model.config.ffns = [64, ffn, 64]
        windows = ffn2moe.calibration_windows(model, tokenizer, args)
        assert 0 < windows.numel() - 10 * neurons <= 64
