"""Writes config_cases.json anew: what transformers computes for a config.json with one change.

Run by hand with transformers installed; the tests read the file and need no transformers. For each
model type and change the file holds some logits of a small seeded model, or words that our refusal
must contain. For a new case, add a line [change, null], or one with those words. A case that we
refuse with other words, or that transformers cannot run or computes otherwise, stops the run, and
nothing is written.
"""

import json
import sys
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

def theirs(raw: dict, model, tokenizer, folder: Path):
    """transformers' logits, or the name of its error; None if it wants other tensors."""
    from transformers import AutoModelForCausalLM

    write_checkpoint(folder, model, tokenizer, raw)
    try:
        load = AutoModelForCausalLM.from_pretrained
        found, info = load(folder, dtype=torch.float32, output_loading_info=True)
        if info["missing_keys"] or info["mismatched_keys"] or info["unexpected_keys"]:
            return None
        with torch.no_grad():
            return found.eval()(IDS).logits
    except Exception as error:  # noqa: BLE001
        return f"{type(error).__name__}: {str(error).splitlines()[:1]}"

def main():
    tokenizer, cases = Tokenizer(models.BPE()), json.loads(FILE.read_text())
    for kind, before in cases.items():
        cases[kind] = []
        for change, word in before:
            raw = changed(TYPES[kind], change)
            with tempfile.TemporaryDirectory() as folder:
                try:
                    model = random_model(raw)
                    ours = model(IDS)
                except InputError as error:
                    if str(word) not in str(error):
                        sys.exit(f"{kind} with {change} is refused with other words: {error}")
                    cases[kind].append([change, word])
                    continue
                expected = theirs(raw, model, tokenizer, Path(folder))
            if isinstance(expected, str):
                sys.exit(f"transformers cannot run {kind} with {change}: {expected}")
            if expected is None or not torch.allclose(ours, expected, atol=1e-3):
                sys.exit(f"transformers computes something else for {kind} with {change}")
            logits = [round(value, 4) for value in expected[0, -1, :3].tolist()]
            cases[kind].append([change, logits])
    lines = {kind: ",\n".join(map(json.dumps, found)) for kind, found in cases.items()}
    text = ",\n".join(f'"{kind}": [\n{found}\n]' for kind, found in lines.items())
    FILE.write_text("{\n" + text + "\n}\n")

if __name__ == "__main__":
    main()
