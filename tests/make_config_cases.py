"""Writes config_cases.json: what transformers computes for a config.json with one change.

Run by hand with transformers installed; the tests read the file and need no transformers. For each
model type and change the file holds some logits of a small seeded model, or the word that our
refusal must contain. A case where we would compute something else than transformers stops the run.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch

# isort: off
from conftest import CONFIGS, LLAMA3, MIXTRAL, QWEN2_MOE, QWEN3_MOE, random_model
from conftest import write_checkpoint
from model import InputError
from tokenizers import Tokenizer, models

ABSENT = "absent"  # the change that removes a key
IDS = torch.arange(30).view(1, 30) * 7 % 300
TYPES = {kind: CONFIGS[kind] for kind in ("llama", "mistral", "qwen2", "qwen3")}
TYPES |= {"mixtral": MIXTRAL, "qwen2_moe": QWEN2_MOE, "qwen3_moe": QWEN3_MOE}
OLD = {"type": "linear", "factor": 2.0}
NEW = {"rope_type": "linear", "factor": 4.0, "rope_theta": 300.0}
FULL = ["full_attention"] * 3
SLIDING = ["full_attention", "sliding_attention", "full_attention"]
VALUES = {  # of each key, one change each
    "hidden_act": [ABSENT, None, "gelu", "relu"], "num_key_value_heads": [ABSENT, None, 1, 4],
    "head_dim": [ABSENT, None, 8, 16], "max_position_embeddings": [ABSENT, None, 29],
    "rms_norm_eps": [ABSENT, None, 0.1, 1], "rope_theta": [ABSENT, None, 100, 1e6],
    "rope_scaling": [None, {}, {"type": "default"}, {"rope_type": "default", "factor": 3.0},
                     OLD, NEW, LLAMA3, LLAMA3 | {"original_max_position_embeddings": 16},
                     {"rope_type": "yarn", "factor": 2.0}, {"rope_type": "dynamic", "factor": 2.0},
                     {"type": "linear", "rope_type": "default", "factor": 2.0},
                     {"rope_type": None, "type": "linear", "factor": 2.0}, {"type": "linear"}],
    "rope_parameters": [None, {}, NEW, {"rope_theta": 300.0}, {"rope_type": "default"},
                        LLAMA3 | {"rope_theta": 300.0}, {"rope_theta": None},
                        {"rope_theta": 300.0, "partial_rotary_factor": 0.5},
                        NEW | {"partial_rotary_factor": 0.5}, NEW | {"partial_rotary_factor": 1.0},
                        {"full_attention": NEW}],
    "partial_rotary_factor": [None, 1.0, 0.5], "tie_word_embeddings": [ABSENT, None, True, False],
    "attention_bias": [ABSENT, None, True], "qkv_bias": [None, False, True],
    "mlp_bias": [None, True, False], "sliding_window": [ABSENT, None, 10, 40, 0],
    "use_sliding_window": [None, False],
    "layer_types": [None, FULL, ["full_attention", "linear_attention", "full_attention"]],
    "is_causal": [None, False, True], "per_layer_config": [None, {"0": {"num_key_value_heads": 1}}],
    "pretraining_tp": [2], "attention_dropout": [0.5], "chunk_size_feed_forward": [8],
    "attention_chunk_size": [8], "quantization_config": [None],
}  # fmt: skip
MOE_VALUES = {
    "num_experts_per_tok": [ABSENT, None, 1], "num_experts": [ABSENT, 4],
    "num_local_experts": [ABSENT, 4], "norm_topk_prob": [ABSENT, None, True, False],
    "moe_intermediate_size": [ABSENT, 8], "shared_expert_intermediate_size": [ABSENT, 8],
    "decoder_sparse_step": [None, 0, 2], "mlp_only_layers": [None, [], [0], [-1, 7]],
    "router_jitter_noise": [0.5], "output_router_logits": [True],
}  # fmt: skip
PAIRS = [  # several keys at once
    {"rope_scaling": OLD, "rope_parameters": NEW},
    {"rope_scaling": {}, "rope_parameters": NEW},
    {"rope_scaling": None, "rope_parameters": NEW, "rope_theta": 50.0},
    {"rope_scaling": NEW, "rope_theta": 50.0},
    {"rope_parameters": LLAMA3, "original_max_position_embeddings": 16},
    {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 64},
     "original_max_position_embeddings": 16},
    {"rope_scaling": LLAMA3, "max_position_embeddings": 40},
    {"rope_parameters": {"full_attention": NEW}, "layer_types": FULL},
    {"rope_parameters": {"full_attention": NEW, "sliding_attention": {}}, "layer_types": SLIDING,
     "sliding_window": 40, "use_sliding_window": True},
    {"use_sliding_window": True, "sliding_window": 10, "max_window_layers": 1},
    {"use_sliding_window": True, "sliding_window": 10, "max_window_layers": 3},
    {"use_sliding_window": True, "sliding_window": 40, "max_window_layers": 1},
    {"use_sliding_window": True, "sliding_window": None},
    {"use_sliding_window": False, "sliding_window": 10},
    {"layer_types": SLIDING, "sliding_window": 10},
    {"layer_types": SLIDING, "sliding_window": 10, "use_sliding_window": True},
    {"layer_types": FULL, "sliding_window": 10, "use_sliding_window": True},
    {"head_dim": None, "num_key_value_heads": None},
    {"partial_rotary_factor": 0.5, "rope_scaling": OLD},
    {"num_experts": 4, "num_local_experts": 4},
    {"mlp_only_layers": [1], "decoder_sparse_step": 2},
]  # fmt: skip

def changes(raw: dict):
    is_moe = "num_experts_per_tok" in raw
    for key, values in (VALUES | MOE_VALUES if is_moe else VALUES).items():
        yield from ({key: value} for value in values if raw.get(key, ABSENT) != value)
    yield from (pair for pair in PAIRS if is_moe or not pair.keys() & MOE_VALUES.keys())

def changed(raw: dict, change: dict) -> dict:
    return {key: value for key, value in {**raw, **change}.items() if value != ABSENT}

def refused_word(change: dict, message: str) -> str:
    """The key that the refusal names: one of those changed, or of an object in their place."""
    inside = [word for value in change.values() if isinstance(value, dict) for word in value]
    words = [*change, *inside, "rope_type", "factor", "tokens are more"]
    return next((word for word in words if word in message), message)

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
    tokenizer, cases = Tokenizer(models.BPE()), {}
    for kind, raw in TYPES.items():
        cases[kind] = []
        for change in [{}, *changes(raw)]:
            with tempfile.TemporaryDirectory() as folder:
                try:
                    model = random_model(changed(raw, change))
                    ours = model(IDS)
                except InputError as error:
                    cases[kind].append([change, refused_word(change, str(error))])
                    continue
                expected = theirs(changed(raw, change), model, tokenizer, Path(folder))
            if isinstance(expected, str):
                print("NO MODEL ", kind, change, expected, file=sys.stderr)  # then we are lenient
            elif expected is None or not torch.allclose(ours, expected, atol=1e-3):
                print("DIFFERENT", kind, change, file=sys.stderr)
            else:
                logits = [round(value, 4) for value in expected[0, -1, :3].tolist()]
                cases[kind].append([change, logits])
    lines = {kind: ",\n".join(map(json.dumps, found)) for kind, found in cases.items()}
    text = ",\n".join(f'"{kind}": [\n{found}\n]' for kind, found in lines.items())
    (Path(__file__).parent / "config_cases.json").write_text("{\n" + text + "\n}\n")

if __name__ == "__main__":
    main()
