"""Writes config_cases.json anew: what transformers computes for a config.json with one change.

Run by hand with transformers installed; the tests read the file and need no transformers. For each
model type and change the file holds some logits of a small seeded model, or words that our refusal
must contain. For a new case, add a line [change, null], or one with those words. A case that we
refuse with other words, or that transformers cannot run or computes otherwise, stops the run, and
nothing is written.
"""

import json
import tempfile
from pathlib import Path

import torch

# isort: off
from conftest import CONFIGS, MIXTRAL, QWEN2_MOE, QWEN3_MOE, random_model, write_checkpoint
from model import InputError
from tokenizers import Tokenizer, models

FILE = Path(__file__).parent / "config_cases.json"
IDS = torch.arange(30).view(1, 30) * 7 % 300
TYPES = {kind: CONFIGS[kind] for kind in ("llama", "mistral", "qwen2", "qwen3")}
TYPES |= {"mixtral": MIXTRAL, "qwen2_moe": QWEN2_MOE, "qwen3_moe": QWEN3_MOE}

def changed(raw: dict, change: dict) -> dict:
    """"absent" is the change that removes a key."""
    return {key: value for key, value in {**raw, **change}.items() if value != "absent"}

def theirs(raw: dict, model, tokenizer, folder: Path) -> torch.Tensor:
    """transformers' logits. It must want the tensors that are there, and no others."""
    from transformers import AutoModelForCausalLM

    write_checkpoint(folder, model, tokenizer, raw)
    load = AutoModelForCausalLM.from_pretrained
    found, info = load(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info[f"{how}_keys"] for how in ("missing", "mismatched", "unexpected")), info
    with torch.no_grad():
        return found.eval()(IDS).logits

def main():
    tokenizer, cases = Tokenizer(models.BPE()), json.loads(FILE.read_text())
    for kind, before in cases.items():
        cases[kind] = []
        for change, word in before:
            print(kind, change)  # the last line is the case that stops the run
            raw = changed(TYPES[kind], change)
            try:
                model = random_model(raw)
                ours = model(IDS)
            except InputError as error:
                assert str(word) in str(error), f"refused with other words: {error}"
                cases[kind].append([change, word])
                continue
            with tempfile.TemporaryDirectory() as folder:
                expected = theirs(raw, model, tokenizer, Path(folder))
            assert torch.allclose(ours, expected, atol=1e-3), "transformers computes something else"
            logits = [round(value, 4) for value in expected[0, -1, :3].tolist()]
            cases[kind].append([change, logits])
    lines = {kind: ",\n".join(map(json.dumps, found)) for kind, found in cases.items()}
    text = ",\n".join(f'"{kind}": [\n{found}\n]' for kind, found in lines.items())
    FILE.write_text("{\n" + text + "\n}\n")

if __name__ == "__main__":
    main()
