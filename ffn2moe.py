"""Turn the FFNs of a pretrained Llama-style model into mixtures of experts, without training.

Sections 1 to 4, and the conversion layer by layer in 7, are "Analytical FFN-to-MoE Restructuring
via Activation Pattern Analysis" (Pei et al., ACL 2026, arXiv 2502.04416). 5 and 6 go past it.

1. Activation pattern   which neurons fire for which token
2. Shared expert        the neurons that fire most often
3. Routed experts       the other neurons, in groups of equal size that fire together
4. Analytical router    one neuron of each expert stands for it
5. Joint method         router and partition found together, and W_down fitted again
6. Which layers         those whose conversion costs least, by a closed form
7. The whole model      layer by layer; in a model that is an MoE already, expert by expert
8. Explain              the words that each expert runs for
9. Command line         perplexity and times before and after, `python ffn2moe.py --help`

`model.MoE` is the layer itself, with the router's equations. bench.py measures each step's worth.

Shapes in comments: T tokens, D hidden_size, q intermediate_size (neurons). An FFN is cut into E
slices of m = q / E neurons: S of them are the shared expert, R = E - S are routed experts, and A of
those run for each token. This is written S3A3E8 for S = 3, A = 3, E = 8.
"""

import argparse
import copy
import math
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import compress, pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn
from tqdm import tqdm

# isort: off
from kernels import swiglu, temporarily
from model import DEFAULT_MODEL, FFN, Decoder, MoE, MoESpec, Split, active_parameters
from model import as_ids, check_output, check_writable, cut_windows, encode, finite_or_none
from model import generate, has_bfloat16_units, load_model, read_ids, require, run_command
from model import save_model, split_spec, warn_if_same, window_loss, write_json

# Settings of the joint method, chosen on training text held back from calibration
SAMPLE_TOKENS = 16384  # for partition and router; the refit uses all calibration tokens
ROUTER_RIDGE = 1e-3  # penalty of the router's regression, over the median of the diagonal
HIDDEN_RIDGE = 0.3  # the same for regressions on hidden activations
ROUTER_SCALE = 2.0**-4  # the largest score: so small that experts run nearly as in the dense FFN
LEAST_GAIN = 1e-3  # a round of alternation that gains less is the last
FISHER_TOKENS = 2048  # to predict what the conversion of each layer costs

ACTIVE = 0.7  # share of all FFN neurons that run for a token, for the choice of dense layers
TOKENS_PER_NEURON = 10  # of calibration, so that the refit fits the model rather than the text
BLOCK = 1024  # tokens at a time, to need little memory

# ------------------ 1. Activation pattern: which neurons fire for which token (paper, section 3.1)

def normalized_scores(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    """h_i(x) = silu(x^ . g^_i) * (x^ . u^_i): x [T, D]; gate, up [q, D] -> float32 [T, q].

    g_i and u_i are neuron i's rows of W_gate and W_up, and ^ scales to unit length. Without it,
    neurons with long weights would always fire. W_down plays no part.
    """
    x, gate, up = (F.normalize(t.float(), dim=-1) for t in (x, gate, up))
    return F.silu(x @ gate.T) * (x @ up.T)

def atopk_markers(scores: Tensor, k: int) -> Tensor:
    """ATopK: M[t, i] = 1 if |h_i(x_t)| is among the k largest of token t: [T, q] -> bool [T, q]."""
    top = scores.abs().topk(k, dim=-1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, top, True)

def neuron_markers(ffn: FFN, x: Tensor, k: int) -> Tensor:
    """The markers of an FFN for its inputs x [T, D]: bool [T, q], on the CPU."""
    q = ffn.down_proj.shape[1]
    require(1 <= k <= q, f"k_act = {k} is not between 1 and the {q} neurons of an FFN")
    scores = (normalized_scores(block, ffn.gate_proj, ffn.up_proj) for block in x.split(BLOCK))
    return torch.cat([atopk_markers(of_block, k).cpu() for of_block in scores])

def activation_rates(markers: Tensor) -> Tensor:
    """mu_i = mean_t M[t, i]: the share of tokens for which neuron i fires. markers [T, q] -> [q]"""
    return markers.sum(dim=0, dtype=torch.int32) / len(markers)

# ---------------------------------------------- 2. Shared expert: the neurons that fire most often

def split_shared(rates: Tensor, split: Split) -> tuple[Tensor, Tensor]:
    """The neurons of highest rate, which always run, and the others; both in falling order."""
    order = rates.argsort(descending=True, stable=True)
    num_shared = split.shared * split.slice_size(len(rates))
    return order[:num_shared], order[num_shared:]

# ----------------------------------------- 3. Routed experts: balanced k-means on the columns of M

FAR = np.int64(2**60)  # the cost where there is no path

def balanced_assignment(cost: np.ndarray, capacity: Sequence[int]) -> np.ndarray:
    """Put n items into k bins at the least total cost, exactly capacity[b] of them into bin b.

    Start with every item in its cheapest bin. While a bin has too many, the cheapest chain of moves
    takes one from it to a bin with room: a gives an item to b, b gives another one to c, and so on.
    A move costs

        move[a, b] = min over items i in a of cost[i, b] - cost[i, a].

    With chains that are shortest paths between bins, each assignment is the cheapest for its loads
    (successive shortest paths for minimum-cost flow), and the last one is optimal. That is what
    scipy's linear_sum_assignment(np.repeat(cost, capacity, axis=1)) finds with an n x n matrix.

    cost [n, k], here rounded to 2^-40 of the largest; capacity [k] -> bin of each item, int64 [n].
    Raises ValueError for costs that are not finite, and capacities that do not sum to n.
    """
    cost, capacity = np.asarray(cost, dtype=np.float64), np.asarray(capacity)
    n, k = cost.shape
    if not np.isfinite(cost).all():
        raise ValueError("costs must be finite")
    if capacity.shape != (k,) or (capacity < 0).any() or capacity.sum() != n:
        raise ValueError(f"{k} capacities must sum to the {n} items")
    if n == 0 or k == 1:
        return np.zeros(n, dtype=np.int64)
    # Sums of whole numbers are exact: rounding cannot make a circle of moves look like a gain.
    cost = np.rint(cost * (2**40 / max(np.abs(cost).max(), 1e-200))).astype(np.int64)
    add_prices(cost, capacity)
    bin_of = cost.argmin(axis=1)
    load = np.bincount(bin_of, minlength=k)
    move, mover = np.full((k, k), FAR), np.zeros((k, k), dtype=np.int64)  # the price, the item
    changed = range(k)  # bins whose moves have to be found anew: at first, all
    while (load > capacity).any():
        for a in changed:
            move[a] = FAR
            items = np.flatnonzero(bin_of == a)
            if len(items):
                prices = cost[items] - cost[items, a, None]  # [items, k]
                move[a], mover[a] = prices.min(axis=0), items[prices.argmin(axis=0)]
        chain = cheapest_chain(move, load, capacity)
        for giver, taker in pairwise(chain):
            bin_of[mover[giver, taker]] = taker
        load[chain[0]] -= 1
        load[chain[-1]] += 1
        changed = chain
    return bin_of

def add_prices(cost: np.ndarray, capacity: np.ndarray):
    """Add a price to each bin (a column of cost), in place: about capacity[b] items then prefer it.

    Capacities are fixed, so a price adds the same to every assignment, and changes no optimum. An
    item's offer is the highest price at which it still prefers the bin. The price lies between the
    last offer that gets room and the first one that does not.
    """
    for _ in range(5):  # a price moves items from and to the other bins
        for b, room in enumerate(capacity):
            next_best = np.delete(cost, b, axis=1).min(axis=1)
            offers = np.sort(next_best - cost[:, b])[::-1]  # highest first
            offers = np.concatenate(([offers[0] + 2], offers, [offers[-1] - 2]))
            # offers[0] was added above, so offers[room] is the last one that gets room
            cost[:, b] += (offers[room] + offers[room + 1]) // 2

def cheapest_chain(move: np.ndarray, load: np.ndarray, capacity: np.ndarray) -> list[int]:
    """The cheapest chain of bins from one with too many items to one with room (Bellman-Ford)."""
    k = len(move)
    distance = np.where(load > capacity, 0, FAR)
    origin = np.full(k, -1)
    for _ in range(k):
        via = distance[:, None] + move
        shortest, giver = via.min(axis=0), via.argmin(axis=0)
        better = shortest < distance
        distance[better], origin[better] = shortest[better], giver[better]
    last = np.where(load < capacity, distance, 2 * FAR).argmin()  # 2 * FAR: it has no room
    chain = [int(last)]
    while origin[chain[0]] >= 0:
        chain.insert(0, int(origin[chain[0]]))
    return chain

def l1_distances(markers: Tensor, centroids: Tensor) -> Tensor:
    """L1 distance of each column M_i to each centroid c_e: [T, n], [T, R] -> float64 [n, R]."""
    blocks = zip(markers.split(4096), centroids.split(4096))  # in float64, all of M is large
    return sum(torch.cdist(m.double().T, c.double().T, p=1) for m, c in blocks)

def group_routed(markers: Tensor, num_routed: int) -> Tensor:
    """Balanced k-means on the columns of markers [T, n], in falling order of rate -> expert [n].

    The R neurons that fire most are the seeds. Every expert gets n / R neurons, at the least total
    L1 distance to the seeds. As in the official code, there is one round.
    """
    capacity = [markers.shape[1] // num_routed] * num_routed
    cost = l1_distances(markers, markers[:, :num_routed].float())
    return torch.from_numpy(balanced_assignment(cost.numpy(), capacity))

# ----------------------------- 4. Analytical router: a representative neuron stands for its expert
#
# From here on bin_of [q] says where each neuron is: 0 in the shared expert, 1 + e in expert e.

def representative_neurons(markers: Tensor, expert: Tensor, num_routed: int) -> Tensor:
    """The member of each expert that is closest (L1) to its centroid, the mean of its members:
    markers [T, n], expert [n] -> columns of markers [R]."""
    means = [markers[:, expert == e].float().mean(dim=1) for e in range(num_routed)]
    distance = l1_distances(markers, torch.stack(means, dim=1))  # [n, R]
    outside = expert[:, None] != torch.arange(num_routed)
    return distance.masked_fill(outside, torch.inf).argmin(dim=0)

def partition_neurons(markers: Tensor, split: Split) -> tuple[Tensor, Tensor]:
    """Steps 2 to 4 for one layer: markers [T, q] -> bin_of [q], and the representatives [R]."""
    _, rest = split_shared(activation_rates(markers), split)
    expert = group_routed(markers[:, rest], split.routed)
    bin_of = torch.zeros(markers.shape[1], dtype=torch.long)
    bin_of[rest] = 1 + expert
    return bin_of, rest[representative_neurons(markers[:, rest], expert, split.routed)]

def analytical_router(ffn: FFN, representatives: Tensor) -> dict[str, Tensor]:
    """The router scores expert e with the gate and up rows of its representative neuron r:

        s_e(x) = | silu(g^_r . x) * (u^_r . x) |.

    The paper's argument: the output changes least where the experts left out contribute least; the
    L1 norm of an expert's hidden state stands for its contribution, and its most typical neuron
    for that norm. Rows of unit length make experts comparable; x is the same for all of them.
    """
    gate, up = ffn.gate_proj[representatives], ffn.up_proj[representatives]  # [R, D]
    return {
        "router_gate": F.normalize(gate.float(), dim=-1).to(gate),
        "router_up": F.normalize(up.float(), dim=-1).to(up),
    }

def members(bin_of: Tensor, num_routed: int) -> tuple[Tensor, Tensor]:
    """The neurons of the shared expert [S * m], and of each routed one [R, m], in order."""
    order = bin_of.argsort(stable=True)
    num_shared = int((bin_of == 0).sum())
    return order[:num_shared], order[num_shared:].view(num_routed, -1)

@torch.no_grad()
def build_moe(ffn: FFN, bin_of: Tensor, router: dict[str, Tensor], split: Split) -> MoE:
    """Slice an FFN into experts by bin_of [q], under a router (tensors named as in `model.MoE`).

    With a linear router, the weights of a token's experts sum to 1, as in Mixtral or Qwen2-MoE, so
    W_down of routed experts is multiplied by A (`down_scale`). Checkpoints do not hold bin_of.
    """
    gate, up, down = ffn.gate_proj, ffn.up_proj, ffn.down_proj  # [q, D], [q, D], [D, q]
    shared, routed = members(bin_of, split.routed)
    kind = "linear" if "router_weight" in router else "neurons"
    spec = split_spec(down.shape[1], split, kind)
    weights = {
        "gate_up_proj": torch.cat([gate[routed], up[routed]], dim=1),  # [R, 2m, D]
        "down_proj": down[:, routed].transpose(0, 1) * spec.down_scale,  # [R, D, m]
        **router,
    }
    if split.shared:
        weights["shared_expert.gate_up_proj"] = torch.cat([gate[shared], up[shared]])
        weights["shared_expert.down_proj"] = down[:, shared]
    with torch.device("meta"):  # allocates nothing: the slices become the parameters
        moe = MoE(gate.shape[1], spec)
    contiguous = {name: weight.contiguous() for name, weight in weights.items()}
    moe.load_state_dict(contiguous, assign=True)
    moe.bin_of = bin_of.to(gate.device)
    return moe.eval().requires_grad_(False)

def paper_layer(ffn: FFN, x: Tensor, split: Split, k_act: int = 10) -> MoE:
    """The paper's method on one FFN and its inputs x [T, D]."""
    markers = neuron_markers(ffn, x, k_act)
    bin_of, representatives = partition_neurons(markers, split)
    return build_moe(ffn, bin_of, analytical_router(ffn, representatives), split)

# ------------------- 5. Joint method: router and partition found together, and W_down fitted again
#
# The paper groups neurons by when they fire. What counts is how much of the output is lost with the
# neurons that do not run (their energy), and whether a router can predict it. A sum of energies
# treats the outputs of neurons as orthogonal; the refit corrects some of it.

def hidden(ffn: FFN, x: Tensor) -> Tensor:
    """h(x) = silu(W_gate x) * (W_up x): x [T, D] -> float32 [T, q]."""
    return swiglu(F.linear(x, ffn.gate_up_proj)).float()

def contribution_energy(h: Tensor, down: Tensor) -> Tensor:
    """The energy of neuron i is the squared length of what it adds to the output, h_i W_down[:, i]:

        c[t, i]^2 = |h_i(x_t)|^2 |W_down[:, i]|^2.    h [T, n], down [D, n] -> float32 [T, n]
    """
    return (h * down.float().norm(dim=0)).square_()

def sample_rows(rows: Tensor, n: int, seed: int = 0) -> Tensor:
    """At most n of the rows, in random order."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    return rows[order[:n].to(rows.device)]

def fast_products():
    """float32 products with factors rounded to bfloat16, where a CPU has units for that: accurate
    enough for sums over thousands of tokens, but not for perplexities and the paper's scores."""
    return temporarily(torch.backends.mkldnn.matmul, "fp32_precision", "bf16")

def calibration_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which layers run during calibration: that of their inputs x, or bfloat16 where a
    CPU has units for it, which is accurate enough."""
    faster = x.is_cpu and x.dtype == torch.float32 and has_bfloat16_units()
    return torch.bfloat16 if faster else x.dtype

def in_dtype(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A module with weights of this dtype: itself, or a copy."""
    right = all(weight.dtype == dtype for weight in module.parameters())
    return module if right else copy.deepcopy(module).to(dtype)

def check_finite(values: Tensor, what: str):
    extremes = torch.stack(values.aminmax())  # one pass, without a mask of the size of values
    require(extremes.isfinite().all(), f"{what} are not finite: choose another dtype")

def ridge_solver(xx: Tensor, strength: float) -> Callable[[Tensor], Tensor]:
    """Ridge regression by its normal equations: X'X [n, n] -> a function of X'Y [n, k] that returns

        W = argmin |X W - Y|^2 + penalty |W|^2,   penalty = strength * median(diag(X'X)).   [n, k]

    The median, because a few neurons that are huge for one token would dominate the mean; neurons
    that never run do not count in it. Each penalty also has a millionth of its diagonal, about what
    float32 can tell. If factorisation still fails, all penalties become ten times as large. Only
    the lower triangle of xx is used; xx is changed. Raises InputError for infinite sums.
    """
    check_finite(xx, "sums of a ridge regression")
    diagonal = xx.diagonal().clone()
    median = diagonal[diagonal > 0].median().nan_to_num()  # of none it is nan
    penalty = (strength * median + 1e-6 * diagonal).clamp_min(1e-30)
    for _ in range(10):
        xx.diagonal().copy_(diagonal + penalty)
        factor, failed = torch.linalg.cholesky_ex(xx)
        if not failed:
            break
        penalty *= 10
    require(not failed, "a ridge regression has no solution: choose another dtype")

    def solve(xy: Tensor) -> Tensor:
        check_finite(xy, "sums of a ridge regression")
        return torch.cholesky_solve(xy, factor)

    return solve

def expert_norms(energy: Tensor, bin_of: Tensor, num_routed: int) -> Tensor:
    """What the router predicts, sqrt(sum_{i in e} c[t, i]^2): [T, n], [n] -> [T, R]."""
    is_member = F.one_hot(bin_of, 1 + num_routed)[:, 1:]  # [n, R]
    return (energy @ is_member.to(energy)).sqrt()

def ridge_router(energy: Tensor, x: Tensor, bin_of: Tensor, num_routed: int) -> dict[str, Tensor]:
    """The router of a partition: ridge regression from the token to the root of each expert's
    energy. energy [T, n], x [T, D], bin_of [n] -> the tensors that `build_moe` takes.

    Standard MoE routers have no bias, so this one has none. The mean over experts is subtracted,
    which changes no choice and leaves more bfloat16 precision. The largest absolute score of the
    sample is ROUTER_SCALE, so weights differ by a factor of e^(2 ROUTER_SCALE) at most.
    """
    inputs = x.float()
    solve = ridge_solver(inputs.T @ inputs, ROUTER_RIDGE)
    weight = solve(inputs.T @ expert_norms(energy, bin_of, num_routed))  # [D, R]
    weight -= weight.mean(dim=1, keepdim=True)
    weight *= ROUTER_SCALE / (inputs @ weight).abs().max().clamp_min(1e-30)
    return {"router_weight": weight.T.to(x)}

def running_bins(chosen: Tensor, num_routed: int, weights: Tensor | None = None) -> Tensor:
    """Weights of the bins, float32 [T, 1 + R]: 1 for the shared one, the given weights [T, A] (1 if
    None) for the chosen experts [T, A], 0 for the others."""
    weights = torch.ones_like(chosen) if weights is None else weights
    routed = weights.new_zeros(len(chosen), num_routed, dtype=torch.float32)
    routed.scatter_(1, chosen, weights.float())
    return F.pad(routed, (1, 0), value=1.0)

def energy_in_bins(energy: Tensor, scores: Tensor, active: int) -> Tensor:
    """The energy that each neuron adds in each bin, if the top `active` experts of each token run:
    energy [T, n], scores [T, R] -> gain [n, 1 + R]."""
    runs = running_bins(scores.topk(active, dim=-1).indices, scores.shape[1])
    return (runs.T @ energy).T  # energy.T @ runs would take 8 times as long

def best_bins(gain: Tensor, capacity: Sequence[int]) -> Tensor:
    """The assignment that captures the most energy: gain [n, k] -> bin_of [n]."""
    return torch.from_numpy(balanced_assignment(-gain.cpu().numpy(), capacity)).to(gain.device)

def token_clusters(x: Tensor, num_clusters: int) -> Tensor:
    """k-means on the directions of tokens, from the first ones: x [T, D], in random order -> the
    cosine of each token with each centroid [T, clusters]."""
    x = F.normalize(x.float(), dim=-1)
    centroids = x[torch.arange(num_clusters, device=x.device) % len(x)]
    for _ in range(10):
        nearest = (x @ centroids.T).argmax(dim=-1)
        centroids = F.normalize(torch.zeros_like(centroids).index_add_(0, nearest, x), dim=-1)
    return x @ centroids.T

def first_bins(energy: Tensor, x: Tensor, capacity: Sequence[int], active: int) -> Tensor:
    """The first assignment: each expert is for one of R clusters of tokens. A token's experts are
    those of the `active` nearest clusters, and neurons go where that captures the most energy.
    energy [T, n], x [T, D], capacity [1 + R] -> bin_of [n]."""
    cosines = token_clusters(x, len(capacity) - 1)
    return best_bins(energy_in_bins(energy, cosines, active), capacity)

def alternate(energy: Tensor, x: Tensor, bin_of: Tensor, capacity: Sequence[int], active: int,
              rounds: int) -> Tensor:  # fmt: skip
    """Improve an assignment of neurons to bins by two steps in turn, each solved exactly:

        router, given the experts    ridge regression as in `ridge_router`; the top `active` run
        experts, given the router    the assignment that captures the most energy under its choices

    The shared expert is the bin that always runs: one assignment decides shared and routed at once.
    The second step never lowers the captured energy; the first minimises another loss, so it may.
    A round that gains less than LEAST_GAIN is undone, and is the last.
    energy [T, n], x [T, D], bin_of [n], capacity [1 + R] -> bin_of [n].
    """
    x, num_routed = x.float(), len(capacity) - 1
    solve = ridge_solver(x.T @ x, ROUTER_RIDGE)
    best, most = bin_of, 0.0
    for _ in range(rounds + 1):  # each judges the assignment of the one before
        scores = x @ solve(x.T @ expert_norms(energy, bin_of, num_routed))  # [T, R]
        gain = energy_in_bins(energy, scores, active)
        captured = gain.gather(1, bin_of[:, None]).sum(dtype=torch.float64).item()
        if captured <= (1 + LEAST_GAIN) * most:
            break
        best, most = bin_of, captured
        bin_of = best_bins(gain, capacity)
    return best

def unpredicted_energy(h: Tensor, down: Tensor, bin_of: Tensor) -> Tensor:
    """The energy of routed neurons that the shared neurons cannot predict.

    The refit lets the shared neurons, which always run, stand in for what they predict of a routed
    neuron i. With B the ridge regression from h_shared to h_routed, the rest is

        (h_i(x) - B_i . h_shared(x))^2 |W_down[:, i]|^2.

    h [T, q], down [D, q], bin_of [q] -> [T, routed neurons].
    """
    h_shared, h_routed = h[:, bin_of == 0], h[:, bin_of > 0]
    solve = ridge_solver(h_shared.T @ h_shared, HIDDEN_RIDGE)
    h_routed -= h_shared @ solve(h_shared.T @ h_routed)  # indexed by a mask: a copy
    return contribution_energy(h_routed, down[:, bin_of > 0])

@torch.no_grad()
@fast_products()
def partition_and_router(ffn: FFN, x: Tensor, split: Split,
                         rounds: int = 8) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """The bin of each neuron [q] and the router of the joint method, from inputs x [T, D], of which
    SAMPLE_TOKENS are used."""
    m = split.slice_size(ffn.down_proj.shape[1])
    x = sample_rows(x, SAMPLE_TOKENS)
    h = hidden(ffn, x)
    energy = contribution_energy(h, ffn.down_proj)
    check_finite(energy, "hidden activations")  # or their squares
    capacity = [split.shared * m] + [m] * split.routed
    bin_of = first_bins(energy, x, capacity, split.active)
    bin_of = alternate(energy, x, bin_of, capacity, split.active, rounds)
    # Once more among the routed neurons, by the energy that the shared ones cannot predict
    energy = unpredicted_energy(h, ffn.down_proj, bin_of)
    routed = bin_of > 0
    capacity[0] = 0  # no routed neuron becomes shared
    bin_of[routed] = alternate(energy, x, bin_of[routed], capacity, split.active, rounds)
    return bin_of, ridge_router(energy, x, bin_of[routed], split.routed)

@torch.no_grad()
@fast_products()
def refit_down(ffn: FFN, x: Tensor, running: Callable, ridge: float = HIDDEN_RIDGE) -> Tensor:
    """The least-squares W_down' for the neurons that run. It costs nothing at inference.

    running(x [t, D]) -> [t, q] is the weight of each neuron, 0 for one that does not run. With
    h~ = h * running, and W_down h(x) the output of the dense FFN,

        min over W'   sum_t |W' h~(x_t) - W_down h(x_t)|^2 + penalty |W' - W_down|^2

    is a ridge regression of what is missing, W_down (h - h~), on h~; its solution is added to
    W_down. x [T, D] is read in blocks, so that T may be large. -> float32 [D, q]
    """
    D, q = ffn.down_proj.shape
    down = ffn.down_proj.float()  # in float16, what is missing can overflow
    gram, cross = down.new_zeros(q, q), down.new_zeros(q, D)
    width = math.ceil(q / 4)
    for block in x.split(BLOCK):
        h = hidden(ffn, block)  # [t, q]
        h_running = h * running(block)
        h -= h_running
        missing = h @ down.T  # [t, D]
        for start in range(0, q, width):  # only blocks up to the diagonal: the solver needs no more
            stop = start + width
            gram[start:stop, :stop].addmm_(h_running[:, start:stop].T, h_running[:, :stop])
        cross.addmm_(h_running.T, missing)
    return down + ridge_solver(gram, ridge)(cross).T

def neuron_weights(moe: MoE, x: Tensor) -> Tensor:
    """The weight with which each neuron of the dense FFN runs in the MoE: x [t, D] -> [t, q]."""
    chosen, weights = moe.route(x)
    bins = running_bins(chosen, moe.spec.num_experts, moe.spec.down_scale * weights)
    return bins.index_select(1, moe.bin_of)

@torch.no_grad()
def refit_moe(ffn: FFN, moe: MoE, x: Tensor) -> MoE:
    """Refit, in place, the W_down of an MoE made of an FFN, under its own routing of x [T, D]."""
    down = refit_down(ffn, x, partial(neuron_weights, moe))
    shared, routed = members(moe.bin_of, moe.spec.num_experts)
    moe.down_proj.copy_(moe.spec.down_scale * down[:, routed].transpose(0, 1))
    check_finite(moe.down_proj, "refitted weights")  # the cast may have overflowed
    moe.shared_expert.down_proj.copy_(down[:, shared])
    check_finite(moe.shared_expert.down_proj, "refitted weights")
    return moe

def joint_layer(ffn: FFN, x: Tensor, split: Split, rounds: int = 8, refit: bool = True) -> MoE:
    """The joint method on one FFN and its inputs x [T, D]."""
    bin_of, router = partition_and_router(ffn, x, split, rounds)
    moe = build_moe(ffn, bin_of, router, split)
    return refit_moe(ffn, moe, x) if refit else moe

# ---------------------------------------------------------------------- 6. Which layers to convert
#
# Layers differ tenfold in what their conversion costs. Let e_t be the error of the output of an FFN
# for token t, and g_t the gradient of the log-likelihood with respect to that output. To second
# order, without interactions between tokens, the divergence from the dense model is
#
#     KL(p || p') ~= 1/2 mean_t E[(g_t . e_t)^2],
#
# with labels sampled from the model's own predictions p (the Fisher information). As e_t we take
# the output of the half of the neurons with the least energy. So nothing has to be converted, and
# one backward pass serves all layers.

@torch.no_grad()
@fast_products()
def predicted_losses(model: Decoder, windows: Tensor) -> Tensor:
    """Predicted cost of leaving out the half of each FFN with the least energy, in nats per token:
    windows [B, T] -> float64 [layers]."""
    losses = torch.zeros(len(model.layers), dtype=torch.float64)
    generator = torch.Generator(windows.device).manual_seed(0)
    dtype = calibration_dtype(model.embed_tokens.weight)
    rope = [t.to(dtype) for t in model.rope(0, windows.shape[1])]
    attentions = [in_dtype(layer.self_attn, dtype) for layer in model.layers]
    ffns = [in_dtype(layer.mlp, dtype) for layer in model.layers]
    for window in windows:
        hiddens, outputs = [], []  # of the FFN of each layer, [T, q] and [T, D]
        with torch.enable_grad():
            x = model.embed_tokens(window[None]).requires_grad_()
            for layer, attention, ffn in zip(model.layers, attentions, ffns):
                x = x + attention(layer.input_layernorm(x).to(dtype), rope)
                normed = layer.post_attention_layernorm(x)[0].to(dtype)
                hiddens.append(hidden(ffn, normed))
                outputs.append(F.linear(hiddens[-1].to(dtype), ffn.down_proj))
                x = x + outputs[-1]
            last = model.norm(x)[0]
        check_finite(last, "the last hidden states")
        gradients = torch.autograd.grad(last, outputs, label_gradient(model, last, generator))
        for i, (h, g) in enumerate(zip(hiddens, gradients)):
            down = model.layers[i].mlp.down_proj
            energy = contribution_energy(h, down).sum(dim=0)
            least = energy.argsort()[: len(energy) // 2]  # the neurons that are left out
            change = ((g.float() @ down[:, least].float()) * h[:, least]).sum(dim=1)  # g_t . e_t
            losses[i] += change.square().sum(dtype=torch.float64).item() / 2
    return losses / windows.numel()

def label_gradient(model: Decoder, x: Tensor, generator: torch.Generator) -> Tensor:
    """The gradient of sum_t log p(label_t), labels sampled from p, with respect to the last hidden
    states x [T, D]. With W [vocab_size, D] the output matrix, it is W[label_t] - p_t W."""
    gradients = []
    for block in x.detach().split(128):  # logits are large
        p = model.logits(block).float().softmax(dim=-1)
        check_finite(p, "logits")
        label = torch.multinomial(p, 1, generator=generator)[:, 0]
        gradients.append(model.head[label] - p.to(x) @ model.head)
    return torch.cat(gradients)

def choose_dense(model: Decoder, calib_ids: Tensor, split: Split, active: float) -> frozenset[int]:
    """The layers that stay dense: those whose conversion costs most, while at most the share
    `active` of all FFN neurons runs for a token. At least one is converted. calib_ids [B, T].

    Of the q_i neurons of layer i, a split runs the share s. So a dense layer adds (1 - s) q_i, and

        sum over dense layers of (1 - s) q_i <= (active - s) sum over all layers of q_i.
    """
    neurons = model.specs  # all FFNs are dense
    saved = 1 - split.share
    if saved == 0:
        return frozenset()
    length = min(512, calib_ids.shape[1])
    losses = predicted_losses(model, calib_ids[: FISHER_TOKENS // length, :length])
    check_finite(losses, "predicted losses")
    dense = set()
    room = (active - split.share + 1e-6) * sum(neurons)  # 1e-6: 0.7 - 0.5 is rounded down
    for i in losses.argsort(descending=True).tolist()[:-1]:
        if saved * neurons[i] <= room:
            dense.add(i)
            room -= saved * neurons[i]
    return frozenset(dense)

def parse_layers(text: str) -> frozenset[int]:
    """Layers written like "0-7,24-29", or "none"."""
    layers = set()
    for part in [] if text == "none" else text.split(","):
        match = re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", part)
        found = match and range(int(match[1]), int(match[2] or match[1]) + 1)
        require(found, f"layers {text!r}: expected, for example, 0-7,24-29, or none")
        layers.update(found)
    return frozenset(layers)

def format_layers(layers: Iterable[int]) -> str:
    """The inverse of `parse_layers`: {0, 1, 2, 9} -> "0-2,9"."""
    ranges = []
    for i in sorted(layers):
        if ranges and ranges[-1][1] == i - 1:
            ranges[-1][1] = i
        else:
            ranges.append([i, i])
    return ",".join(f"{a}-{b}" if a < b else f"{a}" for a, b in ranges) or "none"

# ------------------------------------------------------------------------------ 7. The whole model

METHODS = {  # ways to convert a layer, and their defaults
    "joint": SimpleNamespace(convert_layer=joint_layer, experts="S3A1E8", calib_tokens=16 * 2048),
    "paper": SimpleNamespace(convert_layer=paper_layer, experts="S3A3E8", calib_tokens=8 * 2048),
}

def convert_ffn(ffn: FFN | MoE, x: Tensor, convert_layer: Callable) -> MoE:
    """A dense FFN becomes an MoE. In an MoE, each expert does (hierarchical sparsity, section 4.4
    of the paper), on those of the tokens x [T, D] that its router sends there; on all of x, if they
    are fewer than the expert has neurons."""
    if isinstance(ffn, FFN):
        return convert_layer(ffn, x)
    chosen, _ = ffn.route(x)
    experts = []
    for e, weights in enumerate(zip(ffn.gate_up_proj, ffn.down_proj)):
        own = x[(chosen == e).any(dim=-1)]
        enough = len(own) >= ffn.spec.expert_size
        experts.append(convert_layer(FFN(*weights), own if enough else x))
    inner = experts[0].spec
    with torch.device("meta"):
        moe = MoE(x.shape[1], split_spec(ffn.spec, inner.split, inner.router))
    moe.experts = nn.ModuleList(experts)
    if ffn.spec.shared_size:
        moe.shared_expert = convert_layer(ffn.shared_expert, x)
    for name, weight in ffn.named_parameters(recurse=False):  # of the router, and the shared gate
        if not name.endswith("_proj"):
            setattr(moe, name, weight)
    return moe.eval()

def kept_layers(model: Decoder, calib_ids: Tensor, split: Split, method: str,
                dense: Iterable[int] | str, active: float | None) -> frozenset[int]:  # fmt: skip
    """The layers that `convert`, with these arguments, leaves as they are. Raises InputError if the
    split does not fit the others."""
    layers = frozenset(range(len(model.layers)))
    is_dense = model.dense_layers == layers
    choose = dense == "auto" and method == "joint" and is_dense
    if dense == "auto":  # in an MoE, the layers that are dense stay so
        kept = frozenset() if is_dense else model.dense_layers
    else:
        kept = parse_layers(dense) if isinstance(dense, str) else frozenset(dense)
    unknown = f"dense layers {format_layers(kept)}: the layers are 0 to {len(layers) - 1}"
    require(kept <= layers, unknown)
    require(kept < layers, "all layers are to stay dense: there is nothing to convert")
    for i in layers - kept:
        split_spec(model.specs[i], split)  # raises InputError for what it cannot split
    fits = choose or active is None
    require(fits, "--active is for --method joint with --dense auto, on a dense model")
    if not choose:
        return kept
    active = max(ACTIVE, split.share) if active is None else active
    wrong = f"--active {active} is not between the {split.share:.1%} that {split} runs, and 1"
    require(split.share <= active <= 1, wrong)
    return choose_dense(model, calib_ids, split, active)

@torch.no_grad()
def replace_ffns(model: Decoder, calib_ids: Tensor, replacement: Callable,
                 dense: Iterable[int] = (), progress: Callable = iter):  # fmt: skip
    """Replace the FFNs of a model in place, layer by layer, but for the layers in `dense`.

    replacement(i, ffn, x [B * T, D]) returns what replaces the FFN of layer i, given its inputs for
    calib_ids [B, T]. The layers above see its output (the paper's sequential conversion).
    """
    dense = frozenset(dense)
    x = model.embed_tokens(calib_ids)  # [B, T, D], what flows into the next layer
    dtype = calibration_dtype(x)
    rope = [t.to(dtype) for t in model.rope(0, calib_ids.shape[1])]
    last = max(frozenset(range(len(model.layers))) - dense)
    for i, layer in enumerate(progress(model.layers[: last + 1])):
        ffn_input = torch.empty_like(x)
        attention = in_dtype(layer.self_attn, dtype)
        # One sequence at a time, to need little memory; these are views, so x itself changes.
        for sequence, normed in zip(x.split(1), ffn_input.split(1)):
            sequence += attention(layer.input_layernorm(sequence).to(dtype), rope)
            normed.copy_(layer.post_attention_layernorm(sequence))
        check_finite(ffn_input, f"inputs of the FFN of layer {i}")
        if i not in dense:
            layer.mlp = replacement(i, layer.mlp, ffn_input.flatten(0, 1))
        ffn = in_dtype(layer.mlp, dtype)
        for sequence, normed in zip(x.split(1), ffn_input.split(1)):
            sequence += ffn(normed.to(dtype))

def convert(model: Decoder, calib_ids: Tensor | list[int], experts: Split | str | None = None,
            method: str = "joint", dense: Iterable[int] | str = "auto", active: float | None = None,
            k_act: int = 10, window: int = 2048, progress: Callable = iter) -> Decoder:  # fmt: skip
    """Convert the FFNs of a model, or the experts of an MoE, in place, and return the model.

    calib_ids   token ids, [B, T], or [T], which are cut into windows of length `window`
    experts     the split, such as "S3A1E8"; None: the method's default
    dense       layers that stay dense: numbers, or text like "0-7,24-29" or "none"; "auto": those
                whose conversion costs most (joint), none (paper); in an MoE, its dense layers
    active      the share of all FFN neurons that runs for a token, for "auto" (joint); None:
                ACTIVE, or more if the split runs more
    k_act       the k of ATopK (paper)
    progress    wraps the layers, as tqdm does

    Raises InputError. Whatever interrupts it, the model is then as it was.
    """
    # Tensors that are made under inference_mode can never be trained, and "auto" needs gradients
    require(not torch.is_inference_mode_enabled(), "convert outside of torch.inference_mode")
    require(method in METHODS, f"unknown method {method!r}; there are {', '.join(METHODS)}")
    split = Split.parse(experts or METHODS[method].experts)
    calib_ids = as_ids(model, calib_ids)
    if calib_ids.dim() == 1:
        calib_ids = cut_windows(model, calib_ids, window)
    require(calib_ids.numel(), "there are no calibration tokens")
    kept = kept_layers(model, calib_ids, split, method, dense, active)
    settings = {"split": split, "k_act": k_act} if method == "paper" else {"split": split}
    convert_layer = partial(METHODS[method].convert_layer, **settings)
    before = model.ffns
    try:
        replace_ffns(model, calib_ids, lambda i, ffn, x: convert_ffn(ffn, x, convert_layer),
                     kept, progress)  # fmt: skip
    except BaseException:
        model.ffns = before
        raise
    return model

# ------------------------------------------------- 8. Explain: the words that each expert runs for

@torch.no_grad()
def chosen_experts(model: Decoder, windows: Tensor, layer: int) -> Tensor:
    """The routed experts that run in a layer for each token: windows [B, T] -> [B * T, A]."""
    chosen = []

    def remember(moe: MoE, inputs: tuple):
        chosen.append(moe.route(inputs[0].flatten(0, -2))[0])

    with model.layers[layer].mlp.register_forward_pre_hook(remember):
        for window in windows:
            model.hidden_states(window[None])
    return torch.cat(chosen)

def favourite_words(words: list[str], chosen: Tensor, num_routed: int, n=8) -> list[list[str]]:
    """At most n words that choose each expert most clearly: words [T], chosen [T, A].

    p_e is the share of all tokens that choose expert e. A word that occurs c times and chooses it
    c_e times has the score z = (c_e - c p_e) / sqrt(c p_e (1 - p_e)), which has to be above 1.
    Words without letters do not count.
    """
    count = Counter(word for word in words if any(map(str.isalpha, word)))
    favourites = []
    for e in range(num_routed):
        ran = (chosen == e).any(dim=1).tolist()  # [T]
        together = Counter(compress(words, ran))
        p = min(max(1e-6, sum(ran) / len(ran)), 1 - 1e-6)
        z = Counter()
        for word, c in count.items():
            z[word] = (together[word] - c * p) / math.sqrt(c * p * (1 - p))
        favourites.append([word for word, score in z.most_common(n) if score > 1])
    return favourites

def words_of_experts(model: Decoder, tokenizer: Tokenizer, windows: Tensor,
                     layer: int) -> list[list[str]]:  # fmt: skip
    """The words that each routed expert of a layer is for, in a text: windows [B, T]."""
    words = [tokenizer.decode([i]).strip() for i in windows.flatten().tolist()]  # no special ones
    num_routed = model.layers[layer].mlp.spec.num_experts
    return favourite_words(words, chosen_experts(model, windows, layer), num_routed)

def token_text(tokenizer: Tokenizer, token: int) -> str:
    return tokenizer.decode([token], skip_special_tokens=False).strip() or "_"

def explain(model: Decoder, tokenizer: Tokenizer, ids: Tensor, windows: Tensor,
            layer: int) -> str:  # fmt: skip
    """A table of the tokens ids [T] and the routed experts that run for each in a layer, then the
    words of windows [B, T] that each expert is for."""
    words, spec = words_of_experts(model, tokenizer, windows, layer), model.layers[layer].mlp.spec
    lines = [f"Layer {layer}: {spec.active} of {len(words)} routed experts run for a token (#)", ""]
    for token, experts in zip(ids.tolist(), chosen_experts(model, ids[None], layer).tolist()):
        marks = "".join("#" if e in experts else "." for e in range(len(words)))
        lines.append(f"{token_text(tokenizer, token):>16.16}  {marks}")
    lines += ["", *(f"expert {e:>2} is for  {', '.join(one)}" for e, one in enumerate(words))]
    return "\n".join(lines)

# --------------------------------------------------------------------------------- 9. Command line

def time_in_turns(functions: dict[str, Callable], turns: int, device: str) -> dict[str, np.ndarray]:
    """Milliseconds per call, of each turn. The functions are called in turns A B A B, so that what
    slows the machine slows all of them; in each turn for about 20 ms."""

    def run(function: Callable, calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            function()
        if device != "cpu":
            torch.cuda.synchronize(device)
        return 1e3 * (time.perf_counter() - start) / calls

    calls = {}
    for name, function in functions.items():
        run(function, 1)  # it may compile, and map memory
        calls[name] = max(1, round(20 / run(function, 1)))
    times = {name: [] for name in functions}
    for _ in range(turns):
        for name, function in functions.items():
            times[name].append(run(function, calls[name]))
    return {name: np.array(ms) for name, ms in times.items()}

@torch.inference_mode()  # like no_grad, with less work for each operation
def time_model(model: Decoder, versions: dict[str, list[nn.Module]], ids: Tensor, steps: int,
               turns: int, compiled: bool = False) -> dict[str, np.ndarray]:  # fmt: skip
    """Milliseconds of each turn, for each version of all FFNs; `compiled`: by torch.compile too.

    steps = 0     of a prefill: one pass over ids [B, T], to the logits of the last token
    steps > 0     of one token: the mean over the last `steps` of ids, one at a time with a KV cache
    """
    length = ids.shape[1]
    steps = min(steps, length)
    cache = model.new_cache(*ids.shape) if steps else None
    if steps:
        model.hidden_states(ids, cache)

    def run(ffns: list[nn.Module], by_compiler: bool = False):
        with temporarily(model, "ffns", ffns), temporarily(model, "compiled", by_compiler):
            if steps == 0:
                model.logits(model.hidden_states(ids)[:, -1])
            for t in range(length - steps, length):
                model(ids[:, t : t + 1], cache, t)

    functions = {name: partial(run, ffns) for name, ffns in versions.items()}
    if compiled:
        functions |= {f"{name}, compiled": partial(run, versions[name], True) for name in versions}
    times = time_in_turns(functions, turns, str(ids.device))
    return {name: ms / max(1, steps) for name, ms in times.items()}

@torch.inference_mode()
def perplexity_and_times(model: Decoder, versions: dict[str, list[nn.Module]],
                         windows: Tensor) -> dict[str, dict[str, float]]:  # fmt: skip
    """For each version of all FFNs: the perplexity of windows [N, T], and the median milliseconds
    of a prefill of one of them (to the logits of its last token), and of decoding one token (of
    the last 16). The versions take turns at each window, as in `time_in_turns`."""
    passes = windows if len(windows) > 1 else windows.repeat(2, 1)  # the first is not timed
    losses = {name: [] for name in versions}  # of each window
    times = {name: [] for name in versions}
    for window in tqdm(passes, desc=f"perplexity, {' and '.join(versions)}", unit="window"):
        for name, ffns in versions.items():
            with temporarily(model, "ffns", ffns):
                start = time.perf_counter()
                x = model.hidden_states(window[None])[0]
                model.logits(x[-1:]).sum().item()  # waits until it is there
                times[name].append(1e3 * (time.perf_counter() - start))
                losses[name].append(window_loss(model, x, window))
    decode = time_model(model, versions, windows[:1], 16, turns=5)
    found = {}
    for name in versions:
        found[name] = {
            "perplexity": float(np.exp(np.mean(losses[name]))),
            "prefill_ms": float(np.median(times[name][1:])),
            "decode_ms": float(np.median(decode[name])),
        }
    return found

def describe(specs: list[int | MoESpec]) -> str:
    """In a word or two, what the FFNs of a model are."""
    moes = [spec for spec in specs if isinstance(spec, MoESpec)]
    if not moes:
        return "dense"
    if any(moe.inner for moe in moes):
        return "MoE of MoEs"
    if len(set(moes)) > 1:
        return "several MoEs"
    return f"MoE {moes[0].split or f'{moes[0].active} of {moes[0].num_experts}'}"

def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Convert the FFNs of a Llama-style model into mixtures of experts, without "
        "training, and compare perplexity and speed before and after. Without arguments: "
        "SmolLM2-135M-Instruct, on text that every Python carries.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    text = "a file, 'wikitext2' (from the hub) or 'manual' (the Python manual's topics)"
    splits = "; ".join(f"{name}: {method.experts}" for name, method in METHODS.items())
    dense = "layers that stay dense, as 0-7,24-29, or none; auto: those that cost most (joint)"
    add("--model", metavar="SOURCE", help="checkpoint directory, .gguf file or hub id")
    add("--calib", metavar="TEXT", default="manual", help=f"calibration text: {text}")
    add("--eval", metavar="TEXT", default="manual", help=f"evaluation text: {text}")
    add("--method", choices=METHODS, default="joint", help="joint, or as in the paper")
    add("--experts", metavar="SnAnEn", help=f"E slices per FFN, S shared, A routed; {splits}")
    add("--dense", default="auto", metavar="LAYERS", help=dense)
    add("--active", type=float, metavar="SHARE", help=f"neurons that run, for auto; else {ACTIVE}")
    add("--k-act", type=int, default=10, metavar="K", help="neurons that fire per token (paper)")
    add("--calib-tokens", type=int, metavar="N", help="calibration tokens; by method and model")
    add("--eval-tokens", type=int, default=5 * 2048, metavar="N", help="first N tokens; 0: all")
    add("--window", type=int, default=2048, metavar="N", help="tokens per sequence")
    add("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="of weights")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to run")
    add("--seed", type=int, default=0, help="picks the calibration windows")
    add("--prompt", default="The capital of France is", help="text to continue, before and after")
    add("--explain", metavar="TEXT", help="print which experts run for this text, and why, instead")
    add("--layer", type=int, metavar="N", help="layer for --explain, or the nearest MoE")
    add("--out", metavar="DIR", help="write the converted checkpoint; --model DIR loads it")
    add("--force", action="store_true", help="replace the checkpoint in an --out that is not empty")
    add("--json", metavar="FILE", help="write the final table and the settings")
    return parser.parse_args(argv)

def check_args(args: argparse.Namespace):
    """Refuse what is known to be impossible before anything is loaded."""
    in_range = args.window >= 2 and args.eval_tokens >= 0
    require(in_range, "--window must be at least 2, --eval-tokens at least 0")
    require(0 <= args.seed < 2**63, "--seed must be at least 0 and below 2**63")
    if args.out is not None:
        check_output(args.out, args.force)
    if args.json is not None:
        check_writable(args.json)
        require(args.explain is None, "--explain makes no table that --json could write")
    warn_if_same(args.calib, args.eval)

def neurons_to_fit(ffn: int | MoESpec) -> int:
    """Neurons of the largest refit in an FFN or MoE, as if it saw all tokens: a routed expert sees
    a share A / R of them."""
    if isinstance(ffn, int):
        return ffn
    return max(ffn.shared_size, ffn.expert_size * ffn.num_experts // ffn.active)

def calibration_windows(model: Decoder, ids: Tensor, args: argparse.Namespace) -> Tensor:
    """Random windows of the calibration text [T], as many as the method and the model need."""
    windows = cut_windows(model, ids, args.window)
    window, needed = windows.shape[1], 0  # needed: by the refit
    if args.method == "joint":
        needed = TOKENS_PER_NEURON * max(map(neurons_to_fit, model.specs))
    tokens = args.calib_tokens
    if tokens is None:
        tokens = max(METHODS[args.method].calib_tokens, needed + window)
    require(tokens >= window, f"--calib-tokens must be at least --window, here {window}")
    windows = sample_rows(windows, tokens // window, args.seed)
    if len(windows) < tokens // window:
        print(f"warning: {args.calib} has only {windows.numel()} of {tokens} calibration tokens",
              file=sys.stderr)  # fmt: skip
    if windows.numel() < needed:
        found = f"{windows.numel()} calibration tokens, fewer than {TOKENS_PER_NEURON} per neuron"
        print(f"warning: {found}: the refit may fit the text, not the model", file=sys.stderr)
    return windows

def describe_model(model: Decoder, tokenizer: Tokenizer, prompt: Tensor) -> dict:
    """What the final table says of a model besides perplexity and times. prompt [T]."""
    ffn_parameters, parameters = active_parameters(model)
    return {
        "name": describe(model.specs),
        "text": tokenizer.decode(prompt.tolist() + generate(model, prompt, 24)),
        "dense_layers": len(model.dense_layers),
        "ffn_parameters": ffn_parameters,
        "parameters": parameters,
    }

def run(args: argparse.Namespace) -> dict:
    """The job of the command line -> what --json writes."""
    check_args(args)
    # Everything is read and checked before the long work starts.
    model, tokenizer = load_model(args.model, args.dtype, args.device)
    eval_ids = read_ids(model, tokenizer, args.eval, "test")[: args.eval_tokens or None]
    windows = cut_windows(model, eval_ids, args.window)
    prompt = as_ids(model, encode(tokenizer, args.prompt if args.explain is None else args.explain))
    fits = 0 < len(prompt) <= model.config.max_position_embeddings
    require(fits, f"the prompt is empty or too long: {len(prompt)} tokens")
    result = vars(args) | {"model": args.model or DEFAULT_MODEL, "torch": torch.__version__}
    versions = {}  # the FFNs before and after, measured in turns
    if args.experts is not None or describe(model.specs) == "dense":
        versions["dense"] = model.ffns
        calib_ids = read_ids(model, tokenizer, args.calib, "train")
        calib = calibration_windows(model, calib_ids, args)
        start = time.perf_counter()
        convert(model, calib, args.experts, args.method, args.dense, args.active, args.k_act,
                progress=partial(tqdm, desc="converting", unit="layer"))  # fmt: skip
        result["conversion_seconds"] = time.perf_counter() - start
        result["experts"] = args.experts or METHODS[args.method].experts
        result["calib_tokens"] = calib.numel()
        result["dense"] = format_layers(model.dense_layers)
    else:
        print("the model is an MoE already; --experts would split its experts", file=sys.stderr)
    if args.out is not None:
        save_model(model, tokenizer, args.out, args.force)
    if args.explain is not None:
        moes = sorted(set(range(len(model.layers))) - model.dense_layers)
        wanted = len(model.layers) // 2 if args.layer is None else args.layer
        layer = min(moes, key=lambda i: abs(i - wanted))  # or the nearest MoE
        print(explain(model, tokenizer, prompt, windows, layer))
        return result
    versions["moe"] = model.ffns
    sides = perplexity_and_times(model, versions, windows)
    for side, ffns in versions.items():
        model.ffns = ffns
        sides[side] |= describe_model(model, tokenizer, prompt)
        result |= {f"{side}_{key}": value for key, value in sides[side].items()}
        result[f"{side}_perplexity"] = finite_or_none(sides[side]["perplexity"])
    result["table"] = final_table(sides, windows.shape[1], result.get("conversion_seconds"))
    if "dense" in sides:
        for what in ("prefill", "decode"):
            result[f"{what}_speedup"] = result[f"dense_{what}_ms"] / result[f"moe_{what}_ms"]
    print("\n" + result["table"] + (f"\n\nwrote {args.out}" if args.out is not None else ""))
    if args.json is not None:
        write_json(Path(args.json), result)
    return result

def final_table(sides: dict[str, dict], length: int, seconds: float | None) -> str:
    """Perplexity, times and parameters of the sides, with ratios (of times: the speedup); then how
    each continues the prompt."""
    rows = [
        ("perplexity", "perplexity", "{:.2f}"),
        (f"prefill, {length:,} tokens", "prefill_ms", "{:,.0f} ms"),
        ("decode, one token", "decode_ms", "{:.1f} ms"),
        ("layers with a dense FFN", "dense_layers", "{}"),
        ("active FFN parameters", "ffn_parameters", "{:,}"),
        ("active parameters", "parameters", "{:,}"),
    ]
    lines = [" " * 28 + "".join(f"{side['name']:>15}" for side in sides.values())]
    for title, key, form in rows:
        values = [side[key] for side in sides.values()]
        cells = [form.format(value) for value in values]
        if len(values) == 2 and key != "dense_layers":
            before, after = values
            cells.append(f"{before / after if key.endswith('_ms') else after / before:.2f}x")
        lines.append(f"{title:<28}" + "".join(f"{cell:>15}" for cell in cells))
    if seconds:
        lines.append(f"conversion: {seconds:.1f} seconds")
    lines += ["", *(f"{side['name']}: {' '.join(side['text'].split())}" for side in sides.values())]
    return "\n".join(lines)

def main(argv: list[str] | None = None) -> int:
    return run_command("ffn2moe", lambda: run(parse_args(argv)))

if __name__ == "__main__":
    sys.exit(main())
