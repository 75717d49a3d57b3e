"""Every frozen cell by name. Groups that need the least compilation are CORE."""

from __future__ import annotations

from typing import Any

from l3env import Budget, Knobs, Order, PimForm, Slo, SubBatching, Victim
from l3env.choices import Eviction
from l3env.policies.placement import AdaptivePlacement
from l3env.policies.rmaxts import RMaxTS
from tests.frozen.kinds import Compared, Env, Figure, Frozen, Pairs, Reactive, Search, Served, Traces
from tests.frozen.served import Keeper, Scripted

CORE = (
    "pairs/", "sub-batching/", "knob/", "order/", "victim/", "memory/", "slo/", "latent/", "guess/", "trace/",
    "search/", "compare/", "policy/", "published/",
)  # fmt: skip
SYSTEMS = (
    "cpu-offload-dgx-a100", "cpu-offload-dgx-h100", "cpu-offload-dgx-h200", "gpu-dgx-a100", "gpu-dgx-h100",
    "gpu-dgx-h200", "h800-ep144-decode", "h800-ep32-prefill", "h800-ep320-decode", "hbm-pim-dgx-a100",
    "hbm-pim-ext-dgx-a100", "l3-dgx-a100", "l3-dgx-h100", "l3-dgx-h200", "l3-h800-ep144-decode",
    "l3-h800-ep32-prefill", "l3-h800-ep320-decode", "rank-pim-dgx-a100",
)  # fmt: skip
MODELS = (
    "deepseek-prover-v1.5-7b", "deepseek-v3", "gpt-175b", "gpt-89b", "llama-2-7b", "llama-3-70b", "llama-3-8b",
    "opt-66b", "qwen-72b",
)  # fmt: skip
A100, H100, L3, H200, EP144 = "gpu-dgx-a100", "gpu-dgx-h100", "l3-dgx-a100", "l3-dgx-h200", "l3-h800-ep144-decode"
GPT, L7, L8, L70, V3 = "gpt-175b", "llama-2-7b", "llama-3-8b", "llama-3-70b", "deepseek-v3"
QWEN, PROVER = "qwen-72b", "deepseek-prover-v1.5-7b"
SARATHI = {"prefill_budget_tokens": 512, "budget_counts_decodes": True}
SMALL_GPU = {"system__gpu__hbm_bytes": 20e9, "tp": 1}  # memory runs over
TIGHT_GPU = {"system__gpu__hbm_bytes": 18.5e9, "tp": 1}
SMALL_L3 = {"system__pim__capacity_bytes": 24e9, "tp": 8}

Cells = dict[str, Frozen]


def all_cells() -> Cells:
    """Every cell by name."""
    cells: Cells = {f"pairs/{system}": Pairs(system, MODELS) for system in SYSTEMS}
    groups = (
        sub_batching, knobs, memory, prefixes, slos, guessing, policies, published, planned, reactive, environments,
        many, of_requests, the_rest,
    )  # fmt: skip
    for group in groups:
        cells |= group()
    return cells


def sub_batching() -> Cells:
    crowd, usual = ("crowd", 1500), ("reasoning", 120)
    machines = {(L3, GPT): usual, (H200, V3): usual, ("l3-dgx-h100", L70): usual}
    machines |= {("hbm-pim-ext-dgx-a100", QWEN): usual, (EP144, V3): crowd}
    return {
        f"sub-batching/{mode.name.lower()}/{system}+{model}": Served(
            system,
            model,
            {"prefill_budget_tokens": Budget.ALIGN_WHEN_FULL, "sub_batching": mode, "hbm_share_frac": 0.1},
            *served,
        )
        for mode in SubBatching
        for (system, model), served in machines.items()
    }


def knobs() -> Cells:
    """Chunked prefill with one knob changed; queue orders under overload."""
    changed: dict[str, dict[str, Any]] = {
        "budget-unlimited": {"prefill_budget_tokens": Budget.UNLIMITED},
        "budget-align": {"prefill_budget_tokens": Budget.ALIGN},
        "budget-align-when-full": {"prefill_budget_tokens": Budget.ALIGN_WHEN_FULL},
        "prefill-first": {"prefill_first": True},
        "in-order": {"prefill_in_order": True},
        "admit-1": {"admit_max_count": 1},
        "hbm-share-all": {"hbm_share_frac": 1.0},
        "hbm-share-some": {"hbm_share_frac": 0.25},
    }
    cells: Cells = {f"knob/{name}/l3": Served(L3, GPT, {**SARATHI, **each}) for name, each in changed.items()}
    for name in ("prefill-first", "in-order", "admit-1"):
        cells[f"knob/{name}/gpu"] = Served(A100, L70, {**SARATHI, **changed[name]}, "long", 100)
    for order in Order:
        if order not in (Order.BY_SCORE, Order.SHORTEST_PREDICTED_HOPELESS_LAST):  # these need scores, predictions
            policy = {**SARATHI, "order": order}
            cells[f"order/{order.name.lower()}"] = Served(H100, L8, policy, "plain", 200, 5.0, changes={"tp": 8})
    return cells


def memory() -> Cells:
    """Pools that run over."""
    cells: Cells = {}
    for victim in Victim:
        if victim != Victim.LOWEST_SCORE:
            policy = {**SARATHI, "victim": victim, "headroom_frac": 0.0}
            cells[f"victim/{victim.name.lower()}"] = Served(A100, L8, policy, "reasoning", 320, 6.0, changes=SMALL_GPU)
    full = {"prefill_budget_tokens": Budget.ALIGN_WHEN_FULL, "headroom_frac": 0.0}
    mha = {"prefill_budget_tokens": Budget.ALIGN, "hbm_share_frac": 0.3}
    headroom = {**SARATHI, "headroom_frac": 0.3}
    return cells | {
        "memory/l3-full": Served(L3, L8, full, "reasoning", 200, 5.0, changes=SMALL_L3),
        "memory/l3-full-mha": Served(L3, L7, mha, "at-once", 200, changes=SMALL_L3),
        "memory/headroom": Served(L3, L8, headroom, "reasoning", 200, 5.0, changes=SMALL_L3),
        "memory/rejected": Served(A100, L7, SARATHI, "long", 80, changes=SMALL_GPU),
    }


def prefixes() -> Cells:
    """Every rule of the prefix cache, with little memory and with much; clients and environments with it."""
    tight = {"system__gpu__hbm_bytes": 19e9, "tp": 1}
    cells: Cells = {}
    for rule in ("lru", "lfu", "tree", "score"):
        policy: Any = (lambda: Keeper("keeper", Knobs(**SARATHI))) if rule == "score" else SARATHI
        cells[f"prefix/{rule}/gpu-tight"] = Served(
            A100, L8, policy, "chats", 160, 0.8, prefix_cache=rule, changes=tight
        )
        cells[f"prefix/{rule}/l3"] = Served(L3, L8, policy, "chats", 160, 0.8, prefix_cache=rule)
    share, tree = {**SARATHI, "hbm_share_frac": 0.4}, {**SARATHI, "eviction": Eviction.TREE}
    chats = {"kind": "chats", "fixed_rate": 3.0}
    tree_env = {"system": L3, "model": L8, "prefix_cache": "tree", "trace": "profile:azure-conv-2023?n=1200"}
    return cells | {
        "prefix/lru/l3-hbm-share": Served(L3, QWEN, share, "chats", 160, 0.9, prefix_cache="lru"),
        "prefix/knob-changes-rule": Served(A100, L8, tree, "chats", 160, 0.8, prefix_cache="lru", changes=tight),
        "prefix/off": Served(L3, L8, SARATHI, "chats", 160, 0.8),
        "prefix/reactive/chains": Reactive(A100, L8, "sarathi", prefix_cache="lru"),
        "prefix/reactive/prover": Reactive(A100, PROVER, "fcfs", {"gamma": 1.0, "rewarded": False}, "lru", replicas=2),
        "prefix/env/one-lfu": Env(0, 80, {"system": A100, "model": L8, "prefix_cache": "lfu"}, **chats),
        "prefix/env/many-tree": Env(6, 40, tree_env, **chats),
    }


def slos() -> Cells:
    forms = {
        "mean-tbt": {"form": "mean-tbt", "tbt_scale": 2.0},
        "p99-gap": {"form": "p99-gap", "tbt_scale": 3.0},
        "token-deadlines": {"form": "token-deadlines", "tbt_scale": 2.0},
        "absolute": {"ttft_s": 1.0, "tbt_s": 0.08},
    }
    return {
        f"slo/{name}/{policy}": Served(L3, GPT, policy, slo=slo)
        for name, slo in forms.items()
        for policy in ("edf", "l3-model")
    }


def guessing() -> Cells:
    """A latent as it is stored and decompressed, one token a step and a guessed one with it."""
    machines = {"h200": (H200, "plain", 100), "ep144": (EP144, "crowd", 1500)}
    machines["ep32"] = ("l3-h800-ep32-prefill", "plain", 400)
    cells: Cells = {}
    for name, (system, kind, count) in machines.items():
        for form in PimForm:
            for guess in (False, True):
                policy = {"prefill_budget_tokens": 1024, "pim_form": form, "multi_token": guess, "hbm_share_frac": 0.1}
                cell = f"latent/{name}/{form.name.lower()}/{'guess' if guess else 'one'}"
                cells[cell] = Served(system, V3, policy, kind, count)
    half = {"model__draft_acceptance_frac": 0.5}
    return cells | {
        "guess/acceptance-half": Served("gpu-dgx-h200", V3, SARATHI, changes=half),
        "guess/ep144-gpu": Served("h800-ep144-decode", V3, SARATHI, "crowd", 2000),
        "guess/ep320-gpu": Served("h800-ep320-decode", V3, SARATHI, "crowd", 1500),
        "guess/ep32-prefill-gpu": Served("h800-ep32-prefill", V3, {"prefill_budget_tokens": 8192}, "long", 200),
    }


def policies() -> Cells:
    """Every built-in policy, on GPUs + DIMM-PIM and on GPUs."""
    built_in = (
        "best-constant-global", "adaptive-placement", "edf", "fcfs", "fill-capacity", "hybrid-greedy", "l3-model",
        "learned-ppo", "request-score", "oracle-srtf", "random", "sarathi", "sjf-prompt", "srtf-predicted",
    )  # fmt: skip
    group = {"request-score": "scored", "learned-ppo": "seen"}
    cells: Cells = {
        f"policy/{name}/l3": Served(L3, L70, name, count=80) for name in ("best-constant", "best-constant-in-order")
    }
    for name in built_in:
        cells[f"{group.get(name, 'policy')}/{name}/l3"] = Served(L3, L70, name)
        cells[f"{group.get(name, 'policy')}/{name}/gpu"] = Served(H100, L70, name, "plain", 150, 1.1)
    for name in ("learned-ppo", "request-score", "adaptive-placement", "l3-model", "srtf-predicted"):
        kind = "short" if name == "adaptive-placement" else "plain"
        cells[f"{group.get(name, 'policy')}/{name}/h200-v3"] = Served(H200, V3, name, kind, 60)
    guessing_too = Served(H200, V3, lambda: AdaptivePlacement(multi_token=True), "reasoning", 120)
    return cells | {
        "policy/adaptive-placement/gpt": Served(L3, GPT, "adaptive-placement", "reasoning", 120),
        "policy/adaptive-placement/multi-token": guessing_too,
        "scored/request-score/ep144": Served(EP144, V3, "request-score", "crowd", 1500),
        "scored/reactive/request-score": Reactive(L3, L8, "request-score"),
        "seen/reactive/learned-ppo": Reactive(L3, L8, "learned-ppo"),
    }


def planned() -> Cells:
    """Policies that write plans, and the planner."""
    return {
        "planned/l3/l3": Served(L3, L70, "l3", count=80),
        "planned/l3/hbm-pim": Served("hbm-pim-dgx-a100", L8, "l3", "short", 60),
        "planned/scripted/l3": Served(L3, L8, Scripted, count=120, changes={"tp": 8}),
        "planned/scripted/gpu": Served(A100, L8, Scripted, count=120, changes={"tp": 1}),
        "planner/rmaxts/l3": Served(L3, L70, lambda: RMaxTS(64), "short", 70, 1.0),
        "planner/rmaxts/gpu": Served(A100, L8, lambda: RMaxTS(48, gamma=1.0, intrinsic=False), "short", 70, 1.0),
    }


def reactive() -> Cells:
    deadlines = {"form": "token-deadlines"}
    single = {"mode": "single-pass"}
    return {
        "reactive/chains/sarathi": Reactive(L3, L8, "sarathi"),
        "reactive/chains/srtf": Reactive(H100, L8, "srtf-predicted", slo=deadlines),
        "reactive/prover/rmaxts": Reactive(L3, PROVER, "l3-model", {}, replicas=2),
        "reactive/prover/single-pass": Reactive("hbm-pim-dgx-a100", PROVER, "srtf-predicted", single, replicas=2),
    }


PUBLISHED = (
    "sjf-plain", "edf-plain", "ssjf", "trtllm-no-evict", "trtllm-max-utilization", "orca", "vllm-lcf",
    "vllm-cost-aware", "lightllm", "past-future", "sglang-ratio", "mc-sf", "sarathi-slo", "niyama", "fastserve",
    "vllm-ltr", "trail", "lars", "apt-serve", "andes", "s3",
)  # fmt: skip


def published() -> Cells:
    """Policies of papers and engines where memory runs over."""
    return {f"published/{name}/gpu": Served(A100, L8, name, "at-once", 120, changes=TIGHT_GPU) for name in PUBLISHED}


MORE_KNOBS = [
    "admit_max_count", "prefill_budget_tokens", "hbm_share_frac", "sub_batching", "pim_form", "multi_token",
    "prefill_in_order",
]  # fmt: skip


def environments() -> Cells:
    """One environment alone: kinds of machines, decisions, rewards, forms of the SLO."""
    decodes = "dolphin-short?n=4000&arrivals=poisson&rate=60"
    code = "profile:azure-code-2023?n=1500&rate=60"
    made: dict[str, tuple[int, dict[str, Any]]] = {
        "l3-gpt": (80, {"system": L3, "model": GPT, "episode_requests": 150}),
        "gpu-latency": (80, {"system": H100, "model": L70, "reward": "latency", "episode_requests": 100, "load": 4.0}),
        "ext-event": (
            120,
            {"system": "hbm-pim-ext-dgx-a100", "model": QWEN, "decision": "event", "reward": "throughput"}
            | {"predictor": "srtf-predicted", "slo_form": "token-deadlines", "episode_requests": 60},
        ),
        "v3-more-knobs": (
            100,
            {"system": H200, "model": V3, "action_knobs": MORE_KNOBS, "reward": "energy", "slo_form": "p99-gap"}
            | {"episode_requests": 100, "load": 3.0},
        ),
        "ep144": (
            80,
            {"system": EP144, "model": V3, "reward": "slo-violations", "trace": decodes, "episode_requests": 60},
        ),
        "ep144-gpu": (80, {"system": "h800-ep144-decode", "model": V3, "trace": decodes, "episode_requests": 60}),
        "ep32-prefill": (60, {"system": "h800-ep32-prefill", "model": V3, "trace": code, "episode_requests": 80}),
        "iteration": (
            120,
            {"system": "rank-pim-dgx-a100", "model": L8, "decision": "iteration", "episode_requests": 40},
        ),
        "cpu-offload": (60, {"system": "cpu-offload-dgx-h100", "model": "opt-66b", "episode_requests": 60}),
    }
    return {f"env/one/{name}": Env(0, steps, each) for name, (steps, each) in made.items()}


def many() -> Cells:
    """Environments side by side: mixed machines, models, traces, loads, forms of the SLO."""
    traces = ["profile:azure-conv-2023?n=600", "profile:burstgpt-1?n=600"]
    mixed = {"system": [L3, A100], "model": [L70, GPT], "trace": traces, "utilization": [0.5, 1.1]}
    mixed |= {"ttft_scale": [3.0, 8.0], "episode_requests": 40}
    guesses = {"system": [H200, "gpu-dgx-h200"], "model": V3, "action_knobs": MORE_KNOBS, "load": [1.0, 5.0]}
    cut = {"system": L3, "model": L8, "max_episode_steps": 13, "interval_s": 0.5, "load": 20.0}
    event = {"system": L3, "model": L8, "decision": "event", "predictor": "srtf-predicted", "load": 10.0}
    return {
        "env/many/mixed": Env(16, 60, mixed),
        "env/many/v3": Env(8, 50, {**guesses, "episode_requests": 40}),
        "env/many/truncated": Env(8, 50, cut),
        "env/many/event-predicted": Env(8, 60, {**event, "episode_requests": 50}),
    }


def of_requests() -> Cells:
    """The environment that scores requests, alone and side by side."""
    beside = ["prefill_budget_tokens", "hbm_share_frac", "sub_batching"]
    one = {"system": L3, "model": GPT, "episode_requests": 150, "decision": "event", "load": 2.0}
    deadline = {"system": A100, "model": L8, "show": "deadline", "visible": 8, "action_knobs": beside}
    deadline |= {"episode_requests": 150, "load": 8.0, "predictor": "srtf-predicted"}
    fixed = {"prefill_budget_tokens": 1024, "prefill_in_order": True}
    several = {"system": [L3, A100], "model": L70, "knobs": fixed, "utilization": [0.8, 1.2], "episode_requests": 40}
    guesses = {"system": H200, "model": V3, "action_knobs": beside, "load": 5.0, "episode_requests": 40}
    return {
        "env/requests/one": Env(0, 80, one, requests=True),
        "env/requests/one-deadline": Env(0, 80, deadline, requests=True),
        "env/requests/many": Env(8, 50, several, requests=True),
        "env/requests/many-v3": Env(6, 40, {**guesses, "slo_form": "token-deadlines"}, requests=True),
    }


PROFILES = (
    "arxiv-summarization", "azure-code-2023", "azure-conv-2023", "burstgpt-1", "mooncake-conversation",
    "mooncake-synthetic", "servegen-deepseek-r1", "sharegpt-8k",
)  # fmt: skip


def the_rest() -> Cells:
    """Searches, workloads by their specs, comparisons, figures."""
    profiles = tuple(f"profile:{name}?n=300" for name in PROFILES)
    short = "dolphin-short?n=200&arrivals=poisson&rate=3"
    options = ("load=2", "rate=5", "arrivals=gamma&cv=3&rate=4", "prompt_scale=0.5&output_scale=2")
    options += ("swing=0.5:2&period=60", "ramp=1:3")
    conversations, burst = "profile:azure-conv-2023?n=120", "profile:burstgpt-1?n=120"
    slo = Slo(ttft_scale=2.0, form="p99-gap")
    return {
        "search/tune/l3": Search(L3, L70, "short"),
        "search/tune/gpu": Search(A100, L8, "short"),
        "search/probe/v3": Search(H200, V3, "short", probing=True),
        "trace/profiles": Traces(profiles),
        "trace/profiles-drawn-anew": Traces(profiles, seed=2),
        "trace/synthetic": Traces(("openr1?n=200", "dolphin-r1?n=200", short, "openthoughts?n=200&max_output=2000")),
        "trace/options": Traces(tuple(f"profile:azure-conv-2023?n=400&{each}" for each in options)),
        "compare/l3": Compared(
            ("sarathi", "l3-model", "srtf-predicted"), L3, L8, conversations, {"utilization": [0.8], "seeds": 2}
        ),
        "compare/gpu-loads": Compared(("fcfs", "edf"), A100, L8, burst, {"load": [1.0, 5.0], "slo": slo}),
        "reproduce/deepseek-v3": Figure("deepseek-v3"),
    }
