"""Tiny checkpoints that the tests make: random weights, a byte-level BPE tokenizer, the usual three files."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

sys.path.insert(0, str(Path(__file__).parent.parent))
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # kernels.py, where triton is installed
import model as lm

torch.set_num_threads(1)  # the tensors are tiny
SHARED = Path(__file__).parent.parent.parent / "shared"  # outputs of the official code and WikiText-2, where present

TEXT = "".join(f"The {a} {b} of {n} is a {c}, and it's {n * n}.\n" for n, (a, b, c) in enumerate(
    (a, b, c) for a in ("red", "old", "naïve") for b in ("house", "river", "cat") for c in ("story", "number", "song")
)) * 12  # fmt: skip

LLAMA = {
    "model_type": "llama", "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "eos_token_id": 299,
}  # fmt: skip
LLAMA3_ROPE = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64
}
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


def random_model(raw: dict, seed=0, dtype=torch.float32) -> lm.Decoder:
    """A decoder with weights large enough that every part of it matters to the logits."""
    model = lm.Decoder(lm.parse_config(raw))
    random = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=random)
        p.data = 1 + 0.3 * noise if "norm" in name else 0.3 * noise if p.dim() == 1 else noise * 1.5 / p.shape[-1] ** 0.5
    return model.to(dtype).eval().requires_grad_(False)


def checkpoint_tensors(model: lm.Decoder) -> dict[str, torch.Tensor]:
    """The parameters of a dense model by the names that Hugging Face gives them; gate and up are views of one parameter."""
    tensors = {}
    for name, t in model.state_dict().items():
        if name.endswith("mlp.gate_up_proj"):
            stem, q = name.removesuffix("gate_up_proj"), model.config.intermediate_size
            tensors |= {stem + "gate_proj.weight": t[:q], stem + "up_proj.weight": t[q:]}
        else:
            tensors[name + ".weight" if name.endswith("mlp.down_proj") else name] = t
    return tensors


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=299, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.add_special_tokens(["<end>"])
    return tokenizer


def write_checkpoint(path: Path, model: lm.Decoder, tokenizer: Tokenizer, raw: dict) -> Path:
    """What Hugging Face would have written, without our save_model."""
    path.mkdir(parents=True, exist_ok=True)
    tensors = checkpoint_tensors(model).items()
    save_file({n if n.startswith("lm_head") else "model." + n: t.clone() for n, t in tensors}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(raw))
    tokenizer.save(str(path / "tokenizer.json"))
    return path


@pytest.fixture
def checkpoint(tmp_path, tokenizer) -> Path:
    return write_checkpoint(tmp_path / "tiny", random_model(LLAMA), tokenizer, LLAMA)


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path
