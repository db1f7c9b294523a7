"""The method: each step against brute force, a closed form or the official code's own outputs."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

# isort: off
from conftest import CONFIGS, LLAMA, MOES, SHARED, random_ffn, random_ids, random_model, refused
import ffn2moe
from ffn2moe import balanced_assignment
from model import FFN, Decoder, MoE, Split, perplexity

SPLIT = Split.parse("S2A2E8")  # of 48 neurons: 12 are shared, 6 are in each of 6 experts

# --- Balanced assignment

def brute_force_cost(cost, capacity) -> float:
    slots = [b for b, room in enumerate(capacity) for _ in range(room)]
    orders = set(itertools.permutations(slots))
    return min(sum(cost[i, b] for i, b in enumerate(order)) for order in orders)

CAPACITIES = [(2, 2, 2), (1, 2, 4), (0, 3, 3), (7,), (3, 1, 1, 2), (1, 0, 5, 1), (0, 6), (0, 0, 4)]

@pytest.mark.parametrize("capacity", CAPACITIES)
def test_assignment_equals_brute_force(capacity):
    random = np.random.default_rng(0)
    for _ in range(10):
        real = random.random((sum(capacity), len(capacity)))
        one_bin_is_cheapest = real - 5 * (np.arange(len(capacity)) == 0)
        ties = np.floor(3 * real)
        for cost in (real, ties, 0 * real, one_bin_is_cheapest, -1000 * real**3):
            before = cost.copy()
            result = balanced_assignment(cost, capacity)
            assert (cost == before).all()  # prices are added to a copy
            assert np.bincount(result, minlength=len(capacity)).tolist() == list(capacity)
            expected = brute_force_cost(cost, capacity)
            found = cost[np.arange(len(cost)), result].sum()
            assert found == pytest.approx(expected, abs=1e-9)

@pytest.mark.parametrize("n, k, skew", [(500, 4, 0.0), (3000, 9, 1.0), (10000, 16, 3.0)])
@pytest.mark.parametrize("ties", [False, True])
def test_assignment_at_size_has_an_optimality_certificate(n, k, skew, ties):
    """It is optimal exactly if no cycle of moves between bins lowers its cost (Klein 1967)."""
    random = np.random.default_rng(1)
    cost = random.random((n, k)) + skew * random.random((1, k)) * random.pareto(2, (n, 1))
    cost = np.floor(4 * cost) if ties else cost
    capacity = np.full(k, n // k)
    capacity[1] = 0
    capacity[0] += n - capacity.sum()
    result = balanced_assignment(cost, capacity)
    assert (np.bincount(result, minlength=k) == capacity).all()
    distance = np.full((k, k), np.inf)
    for a in set(range(k)) - {1}:  # bin 1 is empty
        distance[a] = (cost[result == a] - cost[result == a, a, None]).min(axis=0)
    for b in range(k):  # Floyd-Warshall
        distance = np.minimum(distance, distance[:, b, None] + distance[None, b])
    assert distance.diagonal().min() >= -1e-9

def test_assignment_bears_costs_that_forbid_and_rejects_what_it_cannot_do():
    cost = np.array([[0, 1, 5], [0, 1e13, 1e13], [1e13, 0, 1]])
    assert balanced_assignment(cost, [1, 1, 1]).tolist() == [1, 0, 2]
    assert len(balanced_assignment(np.zeros((0, 3)), [0, 0, 0])) == 0
    for capacity in ([2, 3], [4], [5, -1]):
        with pytest.raises(ValueError, match="capacities"):
            balanced_assignment(np.zeros((4, 2)), capacity)
    with pytest.raises(ValueError, match="finite"):
        balanced_assignment(np.array([[np.nan, 1.0]]), [1, 0])

# --- Activation pattern, partition, router

def test_partition_is_the_cheapest_and_complete():
    """On 12 neurons all balanced partitions can be tried."""
    torch.manual_seed(3)
    markers = torch.rand(200, 12) < torch.linspace(0.9, 0.05, 12)
    bin_of, representatives = ffn2moe.partition_neurons(markers, Split.parse("S1A1E4"))
    shared, routed = ffn2moe.members(bin_of, 3)
    order = markers.sum(0).argsort(descending=True, stable=True)
    assert set(shared.tolist()) == set(order[:3].tolist()) and (bin_of[shared] == 0).all()
    assert (bin_of[routed] == torch.tensor([[1], [2], [3]])).all()
    assert sorted(shared.tolist() + routed.flatten().tolist()) == list(range(12))
    rest, seeds = markers[:, order[3:]], markers[:, order[3:6]]
    cost = (rest[:, :, None] != seeds[:, None, :]).sum(dim=0).numpy()  # [9, 3]
    found = cost[np.arange(9), bin_of[order[3:]].numpy() - 1].sum()
    assert found == brute_force_cost(cost, [3, 3, 3])
    for group, representative in zip(routed, representatives, strict=True):
        mean = markers[:, group].double().mean(1, keepdim=True)
        far = (markers[:, group].double() - mean).abs().sum(dim=0)
        assert far[group == representative].item() == pytest.approx(far.min().item())

@pytest.mark.parametrize("name", ["small", "s3a3e8", "s2a2e16"])
def test_official_fixtures(name):
    # The large ones are not in the repository.
    folder = Path(__file__).parent if name == "small" else SHARED / "reference"
    file = folder / f"official_{name}.npz"
    if not file.exists():
        pytest.skip("outputs of the official code are not here")
    official = {key: torch.from_numpy(value) for key, value in np.load(file).items()}
    split = Split(int(official["S"]), int(official["A"]), int(official["E"]))
    x, gate, up = official["x"], official["gate"], official["up"]
    ffn = FFN(torch.cat([gate, up]), official["down"])
    markers = ffn2moe.neuron_markers(ffn, x, int(official["K"]))
    rates = ffn2moe.activation_rates(markers)
    assert torch.equal(rates, official["rates"])
    _, rest = ffn2moe.split_shared(rates, split)
    assert torch.equal(rest[: split.routed], official["seeds"])
    bin_of, representatives = ffn2moe.partition_neurons(markers, split)
    shared, routed = ffn2moe.members(bin_of, split.routed)
    numbers = torch.arange(1, 1 + split.routed)
    assert set(shared.tolist()) == set(official["shared"].tolist())
    assert (bin_of[routed] == numbers[:, None]).all()  # all experts have equally many
    assert torch.equal(bin_of[representatives], numbers)
    expert = bin_of[rest] - 1
    cost = ffn2moe.l1_distances(markers[:, rest], markers[:, official["seeds"]].float())
    # With ties another optimum may be found.
    assert cost.gather(1, expert[:, None]).sum() == official["assignment_cost"]
    # From the official groups on, everything must agree.
    routed = official["routed"]
    expert = (rest[:, None, None] == routed).any(dim=2).float().argmax(dim=1)
    found = ffn2moe.representative_neurons(markers[:, rest], expert, split.routed)
    assert torch.equal(rest[found], official["representatives"])
    bin_of = torch.zeros(len(gate), dtype=torch.long)
    bin_of[routed] = numbers[:, None]
    moe = ffn2moe.build_moe(ffn, bin_of, ffn2moe.analytical_router(ffn, rest[found]), split)
    assert torch.equal(moe.route(x)[0].sort().values, official["topk_experts"].sort().values)
    assert torch.allclose(moe(x), official["moe_out"], rtol=1e-5, atol=1e-3)  # values up to 1,700
    assert torch.allclose(ffn(x), official["dense_out"], rtol=1e-5, atol=1e-3)

# --- The layer

def paper_moe(split: str):
    ffn, x = random_ffn(), torch.randn(50, 16, dtype=torch.float64)
    markers = ffn2moe.neuron_markers(ffn, x, 5)
    bin_of, representatives = ffn2moe.partition_neurons(markers, Split.parse(split))
    moe = ffn2moe.paper_layer(ffn, x, Split.parse(split), k_act=5)
    assert torch.equal(moe.bin_of, bin_of)
    return ffn, moe, bin_of, representatives, x

@pytest.mark.parametrize("split", ["S1A1E4", "S3A3E8", "S2A2E16", "S4A4E8", "S1A1E2"])
def test_the_layer_runs_the_experts_of_highest_score(split):
    """Token by token and neuron by neuron, from the dense weights and the partition alone."""
    ffn, moe, bin_of, representatives, x = paper_moe(split)
    gate, up, down = ffn.gate_proj, ffn.up_proj, ffn.down_proj
    split = Split.parse(split)
    expected = torch.zeros_like(x)
    for t, token in enumerate(x):
        g, u = gate[representatives], up[representatives]
        score = F.silu(g @ token / g.norm(dim=1)) * (u @ token) / u.norm(dim=1)
        chosen = score.abs().argsort()[-split.active :]
        for i in range(48):
            if bin_of[i] == 0 or bin_of[i] - 1 in chosen:
                expected[t] += F.silu(token @ gate[i]) * (token @ up[i]) * down[:, i]
    assert torch.allclose(moe(x), expected, rtol=0, atol=1e-12)

def test_bias_moves_the_choice_and_scale_the_weight():
    _, moe, _, _, x = paper_moe("S1A1E4")
    before, weights = moe.route(x)
    assert (weights == 1).all()
    p = (F.silu(x @ moe.router_gate.T) * (x @ moe.router_up.T)).abs().softmax(-1)
    moe.router_scale = torch.nn.Parameter(torch.tensor([0.5, -1.0, 2.0]))
    chosen, weights = moe.route(x)
    assert torch.equal(chosen, before)  # u weighs, it does not select
    assert torch.allclose(weights, 1 + (p * moe.router_scale).gather(1, chosen), atol=1e-6)
    moe.router_bias = torch.nn.Parameter(torch.tensor([0.0, 2.0, 0.0]))  # p <= 1: expert 1 must win
    assert (moe.route(x)[0] == 1).all()
    # Weights that sum to 1 come from p without the bias
    moe = ffn2moe.joint_layer(random_ffn(), x, Split.parse("S2A2E8"))
    p = moe.router_weight.mul_(50).matmul(x.T).T.softmax(-1)
    moe.router_bias = torch.nn.Parameter(2 * torch.eye(6)[:2].sum(dim=0))
    chosen, weights = moe.route(x)
    assert (chosen < 2).all()
    assert torch.allclose(weights, (p / p[:, :2].sum(dim=1)[:, None]).gather(1, chosen))

# --- The joint method

def joint_case():
    ffn, x = random_ffn(dtype=torch.float32), torch.randn(400, 16)
    return ffn, x, ffn2moe.partition_and_router(ffn, x, SPLIT)[0]

def test_a_few_huge_neurons_do_not_switch_ridge_off():
    """Two of 40 neurons are huge for one token: the others are fitted as well as without it."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 40, generator=generator)
    y = x @ torch.randn(40, 8, generator=generator)
    x[0, :2], y[0] = 1e5, 0
    w = ffn2moe.ridge_solver(x.T @ x, 1e-3)(x.T @ y)
    alone = torch.linalg.lstsq(x[1:, 2:].double(), y[1:].double()).solution
    assert (w[2:].double() - alone).norm() / alone.norm() < 0.02

def test_the_penalty_is_a_share_of_the_median_of_what_runs():
    """At the minimum, the gradient is zero; neurons that never run change nothing."""
    torch.manual_seed(0)
    x, y = torch.randn(200, 9, dtype=torch.float64), torch.randn(200, 3, dtype=torch.float64)
    padded = torch.cat([torch.zeros(200, 20).double(), x], dim=1)
    found = ffn2moe.ridge_solver(padded.T @ padded, 0.3)(padded.T @ y)
    gradient = x.T @ (x @ found[20:] - y) + 0.3 * (x.T @ x).diagonal().median() * found[20:]
    assert gradient.abs().max() < 1e-5 * (x.T @ y).abs().max() and not found[:20].any()
    zero = torch.zeros(2, 2)
    assert not ffn2moe.ridge_solver(zero.clone(), 0.3)(zero).any()

def test_a_singular_system_gets_a_larger_penalty_and_a_broken_one_a_sentence():
    x = torch.ones(50, 1) @ torch.rand(1, 30) * 1e3  # of rank one
    w = ffn2moe.ridge_solver(x.T @ x, 1e-12)(x.T @ x[:, :3])
    assert torch.allclose(x @ w, x[:, :3], rtol=1e-2)
    solve, infinite = ffn2moe.ridge_solver(torch.eye(3), 0.1), torch.full((3, 1), torch.inf)
    refused("sums of a ridge regression are not finite", solve, infinite)

def test_energy_norms_and_bins_equal_a_count_by_hand():
    ffn, x = random_ffn(dtype=torch.float32), torch.randn(30, 16)
    h, bin_of = ffn2moe.hidden(ffn, x), (torch.randperm(48) // 6 - 1).clamp_min(0)
    energy = ffn2moe.contribution_energy(h, ffn.down_proj).double()
    chosen, weights = torch.rand(30, 6).topk(2, dim=1).indices, torch.rand(30, 2)
    norms = ffn2moe.expert_norms(energy, bin_of, 6)
    runs = ffn2moe.running_bins(chosen, 6, weights)
    assert torch.equal(ffn2moe.running_bins(chosen, 6), (runs > 0).float())
    for t in range(30):
        of_bin = [0.0] * 7
        for i in range(48):
            c = (F.silu(ffn.gate_proj[i] @ x[t]) * (ffn.up_proj[i] @ x[t])) * ffn.down_proj[:, i]
            of_bin[bin_of[i]] += c.square().sum().item()
        assert norms[t].square().tolist() == pytest.approx(of_bin[1:], rel=1e-4)
        expected = {0: 1.0} | dict(zip((chosen[t] + 1).tolist(), weights[t].tolist(), strict=True))
        assert {b: w for b, w in enumerate(runs[t].tolist()) if w} == expected

def test_alternation_finds_groups_that_a_router_can_tell_apart():
    """Neurons of group e fire for inputs of kind e only, one group always: that is recovered."""
    torch.manual_seed(0)
    kind = torch.randint(4, (2000,))
    x = F.one_hot(kind, 4).float() + 0.1 * torch.randn(2000, 4)
    group = torch.arange(20)[torch.randperm(20)] % 5  # group 0 always fires
    fires = (group == 0) | (group[None] == kind[:, None] + 1)
    energy = (torch.rand(2000, 20) + 0.5) * fires
    bin_of = ffn2moe.alternate(energy, x, torch.arange(20) % 5, [4] * 5, active=1, rounds=8)
    assert (bin_of[group == 0] == 0).all()
    for g in range(1, 5):
        assert len(bin_of[group == g].unique()) == 1

def test_alternation_captures_more_in_each_round_and_ends(monkeypatch):
    torch.manual_seed(0)
    x, energy, start = torch.randn(300, 4), torch.rand(300, 20), torch.arange(20) % 5

    def after(rounds, start=start):
        return ffn2moe.alternate(energy, x, start, [4] * 5, 1, rounds)

    def captured(bin_of):  # under the router that is made for these experts
        router = ffn2moe.ridge_router(energy, x, bin_of, 4)["router_weight"]
        gain = ffn2moe.energy_in_bins(energy, x @ router.T, 1)
        return gain.gather(1, bin_of[:, None]).sum().item()

    bins, best_bins = [after(rounds) for rounds in range(20)], ffn2moe.best_bins
    assert torch.equal(bins[0], start) and not torch.equal(bins[1], start)
    energies = [captured(one) for one in bins]
    assert energies == sorted(energies) and energies[-1] > energies[0]
    end = after(1000)
    assert torch.equal(end, bins[-1])
    assert torch.equal(after(1000, end), end)  # nothing left to improve
    # If the assignment step made things worse, the assignment before it would be kept.
    monkeypatch.setattr(ffn2moe, "best_bins", lambda gain, c: best_bins(gain.max() - gain, c))
    assert torch.equal(after(1000, end), end)

def test_tokens_are_clustered_by_direction():
    x = torch.randn(60, 4) + 9 * torch.eye(4)[torch.arange(60) % 3]  # three groups of tokens
    x = x * torch.rand(60, 1).exp()  # of any length
    cosines = ffn2moe.token_clusters(x, 3)
    assert torch.equal(cosines.argmax(dim=1), torch.arange(60) % 3)
    unit = x.double() / x.double().norm(dim=1, keepdim=True)
    centroids = torch.stack([unit[e::3].sum(dim=0) for e in range(3)])
    expected = unit @ (centroids / centroids.norm(dim=1, keepdim=True)).T
    assert torch.allclose(cosines.double(), expected, atol=1e-6)
    assert ffn2moe.token_clusters(x[:2], 3).isfinite().all()  # fewer tokens than clusters

def test_first_experts_are_for_clusters_of_tokens():
    """Each group of tokens has neurons of its own, and all have the shared ones."""
    x, bin_of = 9 * torch.eye(3).repeat(20, 1) + torch.randn(60, 3), torch.arange(20) % 4
    runs = F.one_hot(1 + torch.arange(60) % 3, 4)[:, bin_of] + (bin_of == 0)
    found = ffn2moe.first_bins(torch.rand(60, 20) + 9 * runs, x, [5] * 4, 1)
    assert torch.equal(found, bin_of)

def test_partition_is_found_in_two_alternations():
    """The first decides which neurons are shared; the second moves the others, for what the shared
    ones cannot predict."""
    ffn, x = random_ffn(16, 192, dtype=torch.float32), torch.randn(400, 16)
    bin_of, _ = ffn2moe.partition_and_router(ffn, x, SPLIT)
    x = ffn2moe.sample_rows(x, ffn2moe.SAMPLE_TOKENS)
    h, capacity = ffn2moe.hidden(ffn, x), [48] + [24] * 6
    energy = (h * ffn.down_proj.norm(dim=0)) ** 2
    start = ffn2moe.first_bins(energy, x, capacity, 2)
    first = ffn2moe.alternate(energy, x, start, capacity, 2, 8)
    assert torch.equal(first == 0, bin_of == 0) and not torch.equal(first, start)
    unpredicted, routed = ffn2moe.unpredicted_energy(h, ffn.down_proj, first), first > 0
    second = ffn2moe.alternate(unpredicted, x, first[routed], [0, *capacity[1:]], 2, 8)
    assert torch.equal(second, bin_of[routed]) and not torch.equal(second, first[routed])
    assert bin_of.bincount().tolist() == capacity

def test_unpredicted_energy_is_what_least_squares_leaves(monkeypatch):
    monkeypatch.setattr(ffn2moe, "HIDDEN_RIDGE", 0.0)
    ffn, x, bin_of = joint_case()
    h, shared = ffn2moe.hidden(ffn, x).double(), bin_of == 0
    rest = h - h[:, shared] @ torch.linalg.lstsq(h[:, shared], h).solution
    expected = ((rest * ffn.down_proj.double().norm(dim=0)) ** 2)[:, ~shared]
    found = ffn2moe.unpredicted_energy(h.float(), ffn.down_proj, bin_of).double()
    assert torch.allclose(found, expected, atol=1e-4)

def test_router_is_the_ridge_optimum_up_to_what_moves_no_choice():
    ffn, x, bin_of = joint_case()
    energy = ffn2moe.unpredicted_energy(ffn2moe.hidden(ffn, x), ffn.down_proj, bin_of)
    router = ffn2moe.ridge_router(energy, x, bin_of[bin_of > 0], 6)
    norms = ffn2moe.expert_norms(energy, bin_of[bin_of > 0], 6).double()
    gram = x.double().T @ x.double()
    gram += ffn2moe.ROUTER_RIDGE * gram.diagonal().median() * torch.eye(16).double()
    scores = x.double() @ torch.linalg.solve(gram, x.double().T @ norms)
    scores -= scores.mean(dim=1, keepdim=True)
    found = (x @ router["router_weight"].T).double() / ffn2moe.ROUTER_SCALE
    assert torch.allclose(found, scores / scores.abs().max(), atol=1e-4)
    # So experts run with nearly the same weight, even for a huge input.
    x[7] *= 100
    weights = ffn2moe.joint_layer(ffn, x, SPLIT).route(x)[1]
    assert (2 * weights - 1).abs().max() < 0.07  # e^(1/16)

def test_refit_is_the_ridge_optimum(monkeypatch):
    """Its gradient is zero, beside that for half or twice the penalty; in blocks of any size."""
    ffn, x, bin_of = joint_case()
    moe = ffn2moe.joint_layer(ffn, x, SPLIT, refit=False)
    assert torch.equal(moe.bin_of, bin_of)
    best = (x @ moe.router_weight.T).topk(2)
    weights = 2 * best.values.softmax(dim=1)
    running = ffn2moe.running_bins(best.indices, 6, weights)[:, bin_of]  # [T, q]
    fitted = ffn2moe.refit_down(ffn, x, lambda block: ffn2moe.neuron_weights(moe, block)).double()
    h, old = ffn2moe.hidden(ffn, x).double(), ffn.down_proj.double()
    h_running = h * running
    penalty = ffn2moe.HIDDEN_RIDGE * h_running.square().sum(dim=0).median()

    def gradient(penalty):
        weight = fitted.clone().requires_grad_()
        missing = ((h_running @ weight.T - h @ old.T) ** 2).sum()
        (missing + penalty * ((weight - old) ** 2).sum()).backward()
        return weight.grad.norm()

    assert gradient(penalty) < 0.02 * min(gradient(penalty / 2), gradient(penalty * 2))
    before = ((moe(x) - ffn(x)) ** 2).sum()
    monkeypatch.setattr(ffn2moe, "BLOCK", 33)
    ffn2moe.refit_moe(ffn, moe, x)
    assert torch.allclose(moe(x), (h_running @ fitted.T).float(), atol=1e-4)
    assert ((moe(x) - ffn(x)) ** 2).sum() < 0.8 * before

def test_the_refit_adds_up_in_float32_whatever_the_dtype():
    """W_down (h - h~) is beyond float16 for one token; what comes out is as in float32."""
    ffn, x, bin_of = joint_case()
    ffn.down_proj.mul_(30)
    x[0] *= 100
    half = FFN(ffn.gate_up_proj.half(), ffn.down_proj.half())
    assert (ffn(x[:1]).abs() > 65504).any()

    def shared_only(block):
        return (bin_of == 0).float().expand(len(block), 48)

    found = ffn2moe.refit_down(half, x.half(), shared_only)
    expected = ffn2moe.refit_down(ffn, x, shared_only)
    assert found.isfinite().all() and (found - expected).norm() < 0.05 * expected.norm()
    half.down_proj.mul_(8000)  # times A it is beyond float16
    moe = ffn2moe.build_moe(half, bin_of, {"router_weight": torch.zeros(6, 16).half()}, SPLIT)
    fault = "refitted weights are not finite: choose another dtype"
    refused(fault, ffn2moe.refit_moe, half, moe, x.half())

def test_a_sample_is_taken_from_all_rows():
    rows = ffn2moe.sample_rows(torch.arange(1000)[:, None], 100)[:, 0]
    assert len(rows.unique()) == 100 and rows.min() < 100 and rows.max() > 900
    assert sorted(ffn2moe.sample_rows(torch.arange(50), 100).tolist()) == list(range(50))
    assert not torch.equal(ffn2moe.sample_rows(torch.arange(1000)[:, None], 100, 1)[:, 0], rows)

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_joint_beats_the_paper_where_it_can_be_seen(dtype):
    """Output error of one layer on tokens that no method has seen; each part has its share."""
    ffn, split = random_ffn(32, 128, dtype=dtype), Split.parse("S2A2E16")
    centres = 2 * torch.randn(6, 32)
    tokens = (centres[torch.randint(6, (3500,))] + torch.randn(3500, 32)).to(dtype)
    x, new = tokens[:3000], tokens[3000:]

    def error(moe):
        return ((moe(new) - ffn(new)).float() ** 2).sum().item()

    joint = error(ffn2moe.joint_layer(ffn, x, split))
    assert joint < 0.7 * error(ffn2moe.paper_layer(ffn, x, split))
    assert joint < 0.9 * error(ffn2moe.joint_layer(ffn, x, split, refit=False))
    assert joint < 0.97 * error(ffn2moe.joint_layer(ffn, x, split, rounds=0))

# --- Which layers to convert

def test_predicted_losses_are_the_fisher_form(monkeypatch):
    """g by autograd of a change of the FFN's output, e neuron by neuron; labels: the likeliest."""
    model, windows = random_model(LLAMA, dtype=torch.float64), torch.arange(60).view(2, 30)
    monkeypatch.setattr(torch, "multinomial", lambda p, n, generator: p.argmax(-1, keepdim=True))
    found = ffn2moe.predicted_losses(model, windows)
    labels = model(windows).argmax(dim=-1)
    for i, ffn in enumerate(model.ffns):
        inputs, delta = [], torch.zeros(2, 30, 32, dtype=torch.float64, requires_grad=True)

        def change(_, x, y, inputs=inputs, delta=delta):
            inputs.append(x[0].detach())
            return y + delta

        hook = ffn.register_forward_hook(change)
        logp = model(windows).log_softmax(dim=-1)
        hook.remove()
        (g,) = torch.autograd.grad(logp.gather(2, labels[..., None]).sum(), delta)
        expected = 0.0
        for x, g_window in zip(inputs[0], g, strict=True):
            h = F.silu(x @ ffn.gate_proj.T) * (x @ ffn.up_proj.T)
            energy = [(h[:, n, None] * ffn.down_proj[:, n]).square().sum() for n in range(64)]
            least = sorted(range(64), key=energy.__getitem__)[:32]
            e = sum(h[:, n, None] * ffn.down_proj[:, n] for n in least)
            expected += 0.5 * ((g_window * e).sum(dim=1) ** 2).sum().item() / 60
        assert found[i].item() == pytest.approx(expected, rel=1e-4)

def test_dense_layers_are_those_of_largest_loss_within_the_budget(monkeypatch):
    model, ids = random_model(LLAMA | {"num_hidden_layers": 8}), random_ids(2, 100)
    losses = torch.tensor([5.0, 1, 2, 8, 3, 7, 4, 6])
    monkeypatch.setattr(ffn2moe, "predicted_losses", lambda m, windows: losses[: len(m.layers)])
    dense_of = {0.75: {0, 3, 5, 7}, 0.8: {0, 3, 5, 7}, 0.5: set(), 0.1: set(), 1: {0, *range(2, 8)}}
    for active, dense in dense_of.items():
        assert ffn2moe.choose_dense(model, ids, SPLIT, active) == dense
    assert not ffn2moe.choose_dense(model, ids, Split.parse("S2A6E8"), 0.5)  # nothing is saved
    five = random_model(LLAMA | {"num_hidden_layers": 5})
    assert ffn2moe.choose_dense(five, ids, SPLIT, 0.7) == {0, 3}  # 0.7 - 0.5 is rounded down
    ffn2moe.convert(model, ids, "S2A2E8", active=0.75)
    assert {i for i, ffn in enumerate(model.specs) if ffn == 64} == {0, 3, 5, 7}
    # Of 864 neurons 648 may run: 432 do anyway, 160 more in these layers, 256 more would in layer 0
    model.ffns = [random_ffn(32, q) for q in (512, 32, 32, 32, 64, 64, 64, 64)]
    assert ffn2moe.choose_dense(model, ids, SPLIT, 0.75) == {3, 5, 7, 6, 4, 2}

def test_layers_are_written_as_ranges():
    written = {"none": set(), "3": {3}, "0-2": {0, 1, 2}, "0-1,5,7-9": {0, 1, 5, 7, 8, 9}}
    for text, layers in written.items():
        assert ffn2moe.parse_layers(text) == layers and ffn2moe.format_layers(layers) == text
    for text in ("", "1-", "a", "1,,2", "-1", "7-0"):
        refused("expected, for example", ffn2moe.parse_layers, text)

# --- The whole model

@pytest.mark.parametrize("method, tolerance", [("paper", 1e-10), ("joint", 1e-4)])
@pytest.mark.parametrize("name", [*CONFIGS, *MOES])
def test_with_all_experts_active_the_model_is_unchanged(name, method, tolerance, even_weights):
    """A dense model becomes an MoE, an MoE a mixture in two levels."""
    ids, model = random_ids(8, 128), random_model((CONFIGS | MOES)[name], dtype=torch.float64)
    expected = model(ids)
    ffn2moe.convert(model, ids, "S1A3E4", method, dense=[], k_act=4)
    splits = [module.spec.split for module in model.modules() if isinstance(module, MoE)]
    assert splits.count((1, 3, 4)) >= (9 if name in MOES else 3)
    assert torch.allclose(model(ids), expected, rtol=0, atol=tolerance)

def test_layers_are_converted_on_what_converted_layers_put_out(monkeypatch):
    monkeypatch.setattr(ffn2moe, "has_bfloat16_units", lambda: False)  # as the model itself runs
    dense, model, ids = random_model(LLAMA), random_model(LLAMA), random_ids(2, 100)
    ffn2moe.convert(model, ids, "S1A1E8", "paper", dense=iter([1]), k_act=6)
    inputs = []
    for ffn in model.ffns:
        ffn.register_forward_hook(lambda _, args, out: inputs.append(args[0].flatten(0, 1)))
    model(ids)
    for i in (0, 2):
        again = ffn2moe.paper_layer(dense.ffns[i], inputs[i], Split.parse("S1A1E8"), k_act=6)
        assert (again.bin_of == model.ffns[i].bin_of).double().mean() > 0.9  # rounding may differ
    assert model.ffns[1].down_proj.equal(dense.ffns[1].down_proj)
    whole = random_model(LLAMA)  # on the same windows, cut from a flat text
    ffn2moe.convert(whole, ids.flatten(), "S1A1E8", "paper", dense="1", k_act=6, window=100)
    assert torch.equal(whole(ids), model(ids))

def test_calibration_in_bfloat16_sees_nearly_the_same_inputs(monkeypatch):
    inputs = {}
    for units in (False, True):
        monkeypatch.setattr(ffn2moe, "has_bfloat16_units", lambda units=units: units)
        model, seen = random_model(LLAMA), []

        def keep(i, ffn, x, seen=seen):
            seen.append(x)
            return ffn

        ffn2moe.replace_ffns(model, random_ids(2, 100), keep)
        inputs[units] = torch.stack(seen)
        assert {p.dtype for p in model.parameters()} == {torch.float32}
    error = (inputs[True] - inputs[False]).norm() / inputs[False].norm()
    assert inputs[True].dtype == torch.float32 and 1e-4 < error < 0.05

def test_whatever_ends_a_conversion_leaves_the_model_as_it_was():
    """More refusals are in test_cli.py."""
    model, ids = random_model(LLAMA), random_ids(1, 100)
    before, converted = model(ids), []
    for message, change in {
        "magic": {"method": "magic"},
        "--active 75 is not": {"active": 75, "dense": "auto"},
        "no calibration tokens": {"calib_ids": ids[:0]},
        "vocabulary of 300": {"calib_ids": torch.full((1, 20), 300)},
        "20 tokens": {"calib_ids": ids[0, :20]},
    }.items():
        refused(message, ffn2moe.convert, model, **({"calib_ids": ids, "dense": "none"} | change))
        assert torch.equal(model(ids), before)
    with torch.inference_mode():
        refused("outside of torch.inference_mode", ffn2moe.convert, model, ids, dense="none")

    def stop_after_layer_0(layers):
        yield layers[0]
        converted.append(isinstance(layers[0].mlp, MoE))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ffn2moe.convert(model, ids, "S2A2E8", dense="none", progress=stop_after_layer_0)
    assert converted == [True] and torch.equal(model(ids), before)
    assert model.specs == [64] * 3

def test_a_model_that_overflows_is_refused():
    model, ids = random_model(LLAMA), random_ids(1, 100)
    model.layers[1].self_attn.o_proj.weight.fill_(float("inf"))
    refused("layer 1 are not finite", ffn2moe.convert, model, ids, dense=[])
    model = random_model(LLAMA, dtype=torch.float16)
    model.ffns[1].gate_up_proj.fill_(3e4)
    for dense, what in ("none", "hidden activations"), ("auto", "the last hidden states"):
        refused(f"{what} are not finite", ffn2moe.convert, model, ids, "S2A2E8", dense=dense)
    model = random_model(LLAMA)
    model.lm_head.weight[7].fill_(float("nan"))
    refused("logits are not finite", ffn2moe.convert, model, ids, "S2A2E8")

def test_the_default_dtype_changes_nothing():
    ids, first, second = random_ids(2, 100), random_model(LLAMA), random_model(LLAMA)
    expected = ffn2moe.convert(first, ids, "S2A2E8", dense="none")(ids)
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = Decoder(second.config)
        model.load_state_dict(second.state_dict(), assign=True)
        model.requires_grad_(False)
        found = ffn2moe.convert(model, ids, "S2A2E8", dense="none")(ids)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected)

# --- What experts are for, and timing

def test_chosen_experts_are_those_of_highest_score():
    model = ffn2moe.convert(random_model(LLAMA), random_ids(2, 100), "S2A2E8", dense=[0])
    windows, moe, inputs = random_ids(2, 30), model.ffns[2], []
    found = ffn2moe.chosen_experts(model, windows, 2)
    assert not moe._forward_pre_hooks
    moe.register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, 1)))
    model(windows)
    expected = (inputs[0] @ moe.router_weight.T).argsort(dim=1)[:, -2:]
    assert torch.equal(found.sort().values, expected.sort().values)

def test_favourite_words():
    """Expert 0 runs for "cat", 1 for "dog", 2 for every other word, 3 for all, 4 for none; "12" is
    no word, and what happens once is no proof."""
    words = ["cat", "dog", "the", "12"] * 10 + ["rare"]
    chosen = torch.tensor([[e, 3] for e in [0, 1, 2, 2] * 10 + [2]])
    found = ffn2moe.favourite_words(words, chosen, 5, n=2)
    assert found == [["cat"], ["dog"], ["the"], [], []]

def test_versions_are_timed_in_turns_and_the_model_is_left_as_it_was(monkeypatch):
    model, ran = random_model(LLAMA), []
    now = model.ffns
    others = [FFN(ffn.gate_up_proj, ffn.down_proj) for ffn in now]
    for name, ffn in (("a", now[0]), ("b", others[0])):
        ffn.register_forward_hook(lambda _, x, y, name=name: ran.append((name, x[0].shape[1])))
    clock = itertools.count()  # each call takes 30 ms
    monkeypatch.setattr(ffn2moe.time, "perf_counter", lambda: 0.03 * next(clock))
    windows = torch.arange(300).view(3, 100)
    found = ffn2moe.perplexity_and_times(model, {"a": now, "b": others}, windows)
    prefills = [name for name, tokens in ran if tokens == 100]
    decoded = [name for name, tokens in ran if tokens == 1]
    # The last prefill fills the cache to decode; the first two calls of each are a warm-up.
    assert "".join(prefills) == "ab" * 3 + "a"
    assert "".join(decoded[::16]) == "aabb" + "ab" * 5 and len(decoded) == 16 * 14
    assert model.ffns == now and found["b"] == pytest.approx(found["a"])
    times = {"prefill_ms": 30, "decode_ms": 30 / 16}
    expected = times | {"perplexity": perplexity(model, windows.flatten(), 100)}
    assert found["a"] == pytest.approx(expected)
    one = ffn2moe.perplexity_and_times(model, {"a": now}, windows[:1])["a"]
    assert one == pytest.approx(times | {"perplexity": perplexity(model, windows[0], 100)})
