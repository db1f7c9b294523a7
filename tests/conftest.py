"""Tiny checkpoints for the tests: random weights, a byte-level BPE tokenizer, the usual files."""

import json
import os
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

sys.path.insert(0, str(Path(__file__).parent.parent))
# AMX rounds the factors of small float32 products too, where `fast_products` allows it.
os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX512_CORE_BF16"
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # kernels.py, where triton is installed
import ffn2moe
from model import FFN, Decoder, InputError, make_ffn, parse_config

torch.set_num_threads(1)  # the tensors are tiny
# Outputs of the official code and WikiText-2, where present
SHARED = Path(__file__).parent.parent.parent / "shared"

WORDS = product(["red", "old", "naïve"], ["house", "river", "cat"], ["story", "number", "song"])
LINES = [f"The {a} {b} of {n} is a {c}, and it's {n * n}." for n, (a, b, c) in enumerate(WORDS)]
TEXT = 12 * ("\n".join(LINES) + "\n")

LLAMA = {
    "model_type": "llama", "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "eos_token_id": 299,
}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3_ROPE = LLAMA3 | {"original_max_position_embeddings": 64}
CONFIGS = {
    "llama": LLAMA,
    "llama-tied": LLAMA | {"tie_word_embeddings": True, "num_key_value_heads": 4},
    "llama-3": LLAMA | {"rope_theta": 500000.0, "rope_scaling": LLAMA3_ROPE, "head_dim": 16},
    "llama-linear-rope": LLAMA | {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "llama-bias": LLAMA | {"attention_bias": True},
    "mistral": LLAMA | {"model_type": "mistral", "sliding_window": None},
    "qwen2": LLAMA | {"model_type": "qwen2", "rope_theta": 1e6, "tie_word_embeddings": True},
    "qwen3": LLAMA | {"model_type": "qwen3", "head_dim": 12},
}
MIXTRAL = LLAMA | {"model_type": "mixtral", "num_local_experts": 5, "num_experts_per_tok": 2}
MIXTRAL |= {"sliding_window": None}
QWEN_MOE = LLAMA | {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 16}
QWEN2_MOE = QWEN_MOE | {"model_type": "qwen2_moe", "shared_expert_intermediate_size": 40}
QWEN3_MOE = QWEN_MOE | {"model_type": "qwen3_moe", "head_dim": 12}
MOES = {
    "mixtral": MIXTRAL,
    "qwen2_moe": QWEN2_MOE | {"decoder_sparse_step": 2},
    "qwen2_moe, renormalised": QWEN2_MOE | {"norm_topk_prob": True, "mlp_only_layers": [0]},
    "qwen3_moe": QWEN3_MOE,
    "qwen3_moe, renormalised": QWEN3_MOE | {"norm_topk_prob": True, "mlp_only_layers": [1]},
}

def random_model(raw: dict, seed=0, dtype=torch.float32) -> Decoder:
    """A decoder with weights so large that every part of it matters to the logits."""
    model = Decoder(parse_config(raw))
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        if "norm" in name:
            p.data = 1 + 0.3 * noise
        elif p.dim() == 1:
            p.data = 0.3 * noise
        else:
            p.data = 1.5 * noise / p.shape[-1] ** 0.5
    return model.to(dtype).eval().requires_grad_(False)

def random_ffn(hidden_size=16, intermediate_size=48, seed=0, dtype=torch.float64) -> FFN:
    torch.manual_seed(seed)
    ffn = make_ffn(hidden_size, intermediate_size).to(dtype)
    for p in ffn.parameters():
        p.uniform_(-1, 1).div_(p.shape[1] ** 0.5)
    return ffn

def random_ids(*shape: int, seed=0) -> torch.Tensor:
    return torch.randint(300, shape, generator=torch.Generator().manual_seed(seed))

def checkpoint_tensors(model: Decoder) -> dict[str, torch.Tensor]:
    """The parameters of a model that is not ours, by the names that Hugging Face gives them; many
    are views of one parameter."""
    tensors, mixtral = {}, model.config.raw["model_type"] == "mixtral"
    gate, up, down = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
    names = {"gate_up_proj": [f"{gate}.weight", f"{up}.weight"], "down_proj": [f"{down}.weight"],
             "router_weight": ["gate.weight"],
             "shared_expert_gate": ["shared_expert_gate.weight"]}  # fmt: skip
    for name, t in model.state_dict().items():
        stem, dot, last = name.rpartition(".")
        stem = stem.replace(".mlp", ".block_sparse_moe") if mixtral else stem
        experts = {stem: t}
        if t.dim() == 3:
            experts = {f"{stem}.experts.{e}": weight for e, weight in enumerate(t)}
        for expert, weight in experts.items():
            parts = names.get(last, [last])
            for part, rows in zip(parts, weight.chunk(len(parts)), strict=True):
                tensors[expert + dot + part] = rows
    return tensors

def write_checkpoint(path: Path, model: Decoder, tokenizer: Tokenizer, raw: dict) -> Path:
    """What Hugging Face would have written, without our save_model."""
    path.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, t in checkpoint_tensors(model).items():
        tensors[name if name.startswith("lm_head") else f"model.{name}"] = t.clone()
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(raw))
    tokenizer.save(str(path / "tokenizer.json"))
    return path

def refused(message: str, function, *args, **settings):
    """The call ends in an InputError, whose message this pattern matches."""
    with pytest.raises(InputError, match=message):
        function(*args, **settings)

def kind_of(path: Path) -> str:
    return json.loads((path / "config.json").read_text())["model_type"]

@pytest.fixture
def even_weights(monkeypatch):
    """The joint method's experts all run with weight 1 / A, whatever their scores."""
    monkeypatch.setattr(ffn2moe, "ROUTER_SCALE", 1e-7)

@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    tokenizer, level = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer, tokenizer.decoder = level, decoders.ByteLevel()
    letters = level.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=299, initial_alphabet=letters, show_progress=False)
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.add_special_tokens(["<end>"])
    return tokenizer

@pytest.fixture
def checkpoint(tmp_path, tokenizer) -> Path:
    return write_checkpoint(tmp_path / "tiny", random_model(LLAMA), tokenizer, LLAMA)

@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path
