"""An agent of ``l3env/ServingRequests-v0``: a score for every request it is shown, and two knobs beside the scores.

    python -m l3env.experiments.learning.requests_agent train --out runs/requests-agent --generations 20 --seed 0
    python -m l3env.experiments.learning.requests_agent evaluate --out runs/requests-agent-grid --seeds 3

One set of weights for all machines, traces and loads. A score is a weighted sum of what a row says of its request
(``ROW``), with weights that shift with the pressure, squashed into [0, 1]: the same weights for every row, so the
order of rows does not matter. The knobs (``KNOBS_BESIDE``) are weighted sums of what the global state says (``BUDGET``,
``SHARE``). CMA-ES finds the weights on the training windows, on tasks as those of ``evolve``; all candidates serve the
same requests in one batched environment. Evaluation serves whole evaluation windows, every replica's share, and keeps
its rows in ``OUT``. Both go on where they were interrupted.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from l3env.choices import SubBatching
from l3env.envs.observe.observer import FEATURES
from l3env.envs.observe.requests import REQUEST_FEATURES
from l3env.envs.requests import ServingRequestsVectorEnv
from l3env.errors import L3EnvError
from l3env.experiments.learning.cells import (
    TRAINING_WINDOW,
    Cell,
    Job,
    append_store,
    read_store,
    requests,
    run_jobs,
    tables_of,
)
from l3env.experiments.learning.evolve import UTILIZATIONS, Task, begun, keep, log_generation, losses_of, tasks_of
from l3env.experiments.learning.grid import MODELS, SYSTEMS, TRACES, grid_cells
from l3env.experiments.learning.iqm import interquartile_mean, interval
from l3env.experiments.train.windows import in_window
from l3env.files import write_text
from l3env.runs.driver import replica_shares, warm_up

FILE = Path(__file__).parents[1] / "data" / "requests-agent.json"

ROW = ("one", "prefilling", "decoding", "late", "slack", "work", "kv", "emitted")
"""What a row says: 1; whether its prompt is under way, or done; 4 if it misses its TTFT; its slack, -1 to 1;
logarithms of what is left of its prefill over the TTFT SLO, and of its KV over what is free; what it emitted."""

BUDGET = ("one", "fits", "pressure", "ahead", "late", "idle")
"""What log2 of the prefill budget over USUAL_TOKENS follows from: 1; the same of the tokens with which an iteration
lasts as long as the mean TBT SLO; the pressure; how far the decoding requests are ahead, how many of them were late,
whether there are none."""

SHARE = ("one", "balance", "prompt", "held", "need")
"""What HBM's share of the KV, over a half, follows from: 1; how much busier the PIM side was than the GPU; log of the
mean prompt; how much of the HBM pool is held; log of the KV that what arrives needs, over that pool."""

BUDGETS = tuple(round(2.0 ** (k / 2)) for k in range(12, 26))  # tokens, half an octave apart
SHARES = tuple(k / 16 for k in range(17))
KNOBS_BESIDE = {"prefill_budget_tokens": BUDGETS, "hbm_share_frac": SHARES}
FIXED = {"prefill_in_order": True, "sub_batching": SubBatching.ADAPTIVE}

HEADS = {"score": ROW, "pressed": ROW, "budget": BUDGET, "share": SHARE}
GENES = tuple(f"{head}.{name}" for head, names in HEADS.items() for name in names)
SCORES = tuple(name for name in GENES if name.startswith(("score", "pressed")))
START = {"score.late": -2.5, "score.work": -1.0}
"""Shortest work first, late ones last; USUAL_TOKENS an iteration, half of the KV in HBM."""

VARIANTS = {
    "all": GENES,
    "scores": (*SCORES, "budget.one", "share.one"),
    "knobs": tuple(name for name in GENES if name not in SCORES),
}
"""What is searched: everything; scores and fixed knobs; the knobs, under the scores of START."""

VISIBLE = 128
SPREAD = 0.1  # standard deviation of the first generation
INTERVAL_S = 1.0  # scores and knobs are given anew at every arrival, finish and preemption, at the latest after this
STRETCH_REQUESTS = {"azure": 1000, "mooncake": 300, "openr1": 150, "splice": 600}  # of a task, by how a trace begins

STATE = (
    "waiting_work",
    "prefill_left_work",
    "next_one_batch",
    "next_with_512",
    "ahead",
    "late_share",
    "prompt_mean",
    "decoding_0_count",
    "decoding_1_count",
    "gpu_0_share",
    "gpu_1_share",
    "pim_0_share",
    "pim_1_share",
    "kv_hbm_share",
    "memory_load",
    "hbm_capacity",
    "pim_capacity",
)
STATE_COLUMNS = [[name for name, _ in FEATURES].index(name) for name in STATE]
COLUMNS = [name for name, _ in REQUEST_FEATURES]
USUAL_TOKENS = 362  # where the search begins
LOG_BUDGETS = np.log2(np.array(BUDGETS) / USUAL_TOKENS)
AGENT, FIXED_ORDER = "requests-agent", "its knobs, fixed order"
CONSTANTS = ("best-constant", "best-constant-in-order")
SHOWN = ("system", "model", "trace", "policy", "seed", "slo_attainment_frac", "wall_s")
LEAST = 1e-4  # of a share whose odds are taken

Row = dict[str, Any]
err = Console(stderr=True)


class Agent:
    """One candidate an environment, or the same for all.

    Args:
        weights: (E or 1, len(GENES)) in the order of GENES.
    """

    def __init__(self, weights: NDArray[np.float64]) -> None:
        ends = np.cumsum([len(names) for names in HEADS.values()])[:-1]
        self.score, self.pressed, self.budget, self.share = np.split(np.atleast_2d(weights), ends, axis=1)

    def act(self, obs: Any, mask: NDArray[np.bool_]) -> NDArray[Any]:
        """(E, 2 K + 2) scores and knobs; 0 where there is no request."""
        rows = obs["requests"]
        state = dict(zip(STATE, obs["state"].T[STATE_COLUMNS].astype(np.float64), strict=True))
        pressure = np.log1p(4 * odds(state["waiting_work"]) + odds(state["prefill_left_work"]))
        weights = self.score + pressure[:, None] * self.pressed
        which, place = np.nonzero(mask[:, : rows.shape[1]])
        actions = np.zeros((len(rows), rows.shape[1] + len(KNOBS_BESIDE)), np.float32)
        values = (row_inputs(rows[which, place]) * weights[which]).sum(axis=1)
        actions[which, place] = 0.5 + 0.5 * squashed(values)  # nobody is held back
        actions[:, -2] = entries(LOG_BUDGETS, (budget_inputs(state, pressure) * self.budget).sum(axis=1))
        actions[:, -1] = entries(np.array(SHARES), 0.5 + (share_inputs(state) * self.share).sum(axis=1))
        return actions


def squashed(value: NDArray[np.float64]) -> NDArray[np.float64]:
    """(-inf, inf) -> (-1, 1)."""
    return value / (1 + np.abs(value))


def odds(share: NDArray[np.float64]) -> NDArray[np.float64]:
    """What was squashed, in units of its scale: x / (x + 1) -> x."""
    inside = np.minimum(np.maximum(share, LEAST), 1 - LEAST)
    return inside / (1 - inside)


def row_inputs(rows: NDArray[np.float32]) -> NDArray[np.float64]:
    """(M, features) rows -> (M, len(ROW))."""
    value = dict(zip(COLUMNS, rows.T.astype(np.float64), strict=True))
    parts = {
        "one": value["present"],
        "prefilling": value["prefilling"],
        "decoding": value["running"] - value["prefilling"],
        "late": 4 * value["late"],
        "slack": 2 * value["slack"] - 1,
        "work": np.log(odds(value["prefill_work"])),
        "kv": np.log(odds(value["kv_over_free"])),
        "emitted": value["emitted"],
    }
    return np.array([parts[name] for name in ROW]).T


def budget_inputs(state: Mapping[str, NDArray[np.float64]], pressure: NDArray[np.float64]) -> NDArray[np.float64]:
    """(E,) each -> (E, len(BUDGET))."""
    now, more = odds(state["next_one_batch"]), odds(state["next_with_512"])
    fits = 512 * (1 - now) / np.maximum(more - now, LEAST)
    parts = {
        "one": np.ones(len(pressure)),
        "fits": np.log2(np.minimum(np.maximum(fits, BUDGETS[0]), BUDGETS[-1]) / USUAL_TOKENS),
        "pressure": pressure,
        "ahead": 2 * state["ahead"] - 1,
        "late": state["late_share"],
        "idle": 1.0 * (state["decoding_0_count"] + state["decoding_1_count"] == 0),
    }
    return np.array([parts[name] for name in BUDGET]).T


def share_inputs(state: Mapping[str, NDArray[np.float64]]) -> NDArray[np.float64]:
    """(E,) each -> (E, len(SHARE))."""
    busy = {side: state[f"{side}_0_share"] + state[f"{side}_1_share"] for side in ("gpu", "pim")}
    parts = {
        "one": np.ones(len(state["prompt_mean"])),
        "balance": busy["pim"] - busy["gpu"],
        "prompt": np.log(odds(state["prompt_mean"])),
        "held": state["kv_hbm_share"],
        "need": np.log(odds(state["memory_load"]) * (1 + odds(state["pim_capacity"]) / odds(state["hbm_capacity"]))),
    }
    return np.array([parts[name] for name in SHARE]).T


def entries(levels: NDArray[np.float64], wanted: NDArray[np.float64]) -> NDArray[np.float64]:
    """(E,) action entries that stand for the levels (evenly spaced) nearest to what is wanted."""
    place = np.rint((wanted - levels[0]) / (levels[-1] - levels[0]) * (len(levels) - 1))
    return 2 * (np.minimum(np.maximum(place, 0), len(levels) - 1) + 0.5) / len(levels) - 1


def weights_of(values: Mapping[str, float]) -> NDArray[np.float64]:
    """(len(GENES),) from their names; those left out are 0. Raises L3EnvError for a name there is not."""
    if unknown := sorted(set(values) - set(GENES)):
        raise L3EnvError(f"requests agent: unknown weights {', '.join(unknown)}; expected some of {', '.join(GENES)}")
    return np.array([float(values.get(name, 0.0)) for name in GENES])


def read_agent(path: Path = FILE) -> NDArray[np.float64]:
    """(len(GENES),) weights in a file that the search wrote. Raises L3EnvError for what is wrong with it."""
    try:
        values = {str(name): float(value) for name, value in json.loads(path.read_text("utf-8"))["weights"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise L3EnvError(f"{path}: expected JSON with an object 'weights' of numbers: {error!r}") from None
    return weights_of(values)


def with_fixed_order(weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """The same knobs under the scores of START: shortest work first, late ones last."""
    return np.where([name in SCORES for name in GENES], weights_of(START), weights)


def environment(num_envs: int, **kwargs: Any) -> ServingRequestsVectorEnv:
    """As the agent expects it. Its reward is minus the time in the system, which decides between equal candidates."""
    settings: dict[str, Any] = {"visible": VISIBLE, "show": "deadline", "knobs": FIXED, "action_knobs": KNOBS_BESIDE}
    return ServingRequestsVectorEnv(
        num_envs, decision="event", interval_s=INTERVAL_S, reward="latency", **settings | kwargs
    )


def serve(
    envs: ServingRequestsVectorEnv, agent: Agent, options: dict[str, Any], seed: int = 0
) -> tuple[NDArray[np.object_], NDArray[np.float64]]:
    """Every environment serves the same episode once; (metrics, mean time in the system (s)), (E,) each."""
    metrics, present_s = np.full(envs.num_envs, None, dtype=object), np.zeros(envs.num_envs)
    going = np.ones(envs.num_envs, bool)
    obs, infos = envs.reset(seed=[seed] * envs.num_envs, options=options)
    while going.any():
        obs, rewards, terminated, _, infos = envs.step(agent.act(obs, infos["action_mask"]))
        present_s -= np.where(going, rewards, 0.0)
        for e in np.flatnonzero(terminated & going):
            metrics[e] = infos["final_info"]["metrics"][e]
        going &= ~terminated
    return metrics, present_s


@functools.cache
def training_envs(system: str, model: str, trace: str, num_envs: int) -> ServingRequestsVectorEnv:
    """Over stretches of a training window."""
    count = next((count for name, count in STRETCH_REQUESTS.items() if trace.startswith(name)), 300)
    where = {"system": system, "model": model, "trace": in_window(trace, TRAINING_WINDOW)}
    return environment(num_envs, episode_requests=count, **where)


def try_out(task: Task, candidates: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(P, genes) -> (share of requests that met their SLO, mean time in the system (s)), (P,) each."""
    cell = task.cell
    envs = training_envs(cell.system, cell.model, cell.trace, len(candidates))
    seed = int(task.begin_frac * 2**31)  # draws where the stretch begins, and the replica
    metrics, present_s = serve(envs, Agent(candidates), {"utilization": cell.utilization}, seed)
    return np.array([each["slo_attainment_frac"] for each in metrics]), present_s


def search(out: Path, variant: str, generations: int, population: int, seed: int, seconds: float) -> None:
    """Runs, or goes on, until the generations are done or the time is up."""
    out.mkdir(parents=True, exist_ok=True)
    kept = out / "search.pkl"
    start = weights_of(START)
    searched = np.array([GENES.index(name) for name in VARIANTS[variant]])
    strategy = begun(kept, start[searched], SPREAD, population, seed)
    config = {"variant": variant, "seed": seed, "population": population, "training_window": TRAINING_WINDOW}
    config |= {"systems": SYSTEMS, "models": MODELS, "traces": TRACES, "utilizations": UTILIZATIONS}
    config |= {"visible": VISIBLE, "interval_s": INTERVAL_S, "stretch_requests": STRETCH_REQUESTS}
    begin_s = time.monotonic()
    while strategy.countiter < generations and time.monotonic() - begin_s < seconds:
        tasks = tasks_of(strategy.countiter, seed)
        asked = strategy.ask()
        tried = np.tile(start, (population + 1, 1))
        tried[:, searched] = [*asked, strategy.mean]
        met, present_s = (np.array(each) for each in zip(*(try_out(task, tried) for task in tasks), strict=True))
        strategy.tell(asked, losses_of(met[:, :-1], present_s[:, :-1]))
        keep(kept, strategy)
        found = start.copy()
        found[searched] = strategy.mean
        write_agent(out / "requests-agent.json", found, config | {"generations": int(strategy.countiter)})
        log_generation(out, strategy, met, begin_s)


def write_agent(path: Path, weights: NDArray[np.float64], config: Mapping[str, object]) -> None:
    """As ``read_agent`` reads it."""
    command = shlex.join(["python", "-m", "l3env.experiments.learning.requests_agent", *sys.argv[1:]])
    named = {name: round(float(value), 4) for name, value in zip(GENES, weights, strict=True)}
    write_text(path, json.dumps({"weights": named, "config": config, "command": command}, indent=2) + "\n")


def run_cell(cell: Cell, agents: Mapping[str, NDArray[np.float64]], seed: int) -> list[Row]:
    """Serves a cell's evaluation window, the replicas one after the other, each with what ``run_policy`` deals it."""
    workload = requests(cell, cell.window, seed)
    shares = [rows for rows in replica_shares(workload, tables_of(cell.system, cell.model).replicas_count) if rows.size]
    where = {"system": cell.system, "model": cell.model, "trace": in_window(cell.trace, cell.window), "seed": seed}
    start_s = time.perf_counter()
    envs, agent = environment(len(agents), episode_requests=None, **where), Agent(np.array(list(agents.values())))
    parts = [serve(envs, agent, {"workload": workload.select(rows)})[0] for rows in shares]
    wall_s = (time.perf_counter() - start_s) / len(agents)
    return [row_of(cell, seed, name, own) | {"wall_s": wall_s} for name, *own in zip(agents, *parts, strict=True)]


def row_of(cell: Cell, seed: int, name: str, parts: Sequence[Mapping[str, float]]) -> Row:
    """A run's row from the metrics of its replicas."""
    row: Row = {"system": cell.system, "model": cell.model, "trace": cell.trace, "utilization": cell.utilization}
    row |= {"policy": name, "seed": seed}
    row |= {each: sum(part[each] for part in parts) for each in ("requests_count", "finished_count")}
    met = sum(part["slo_attainment_frac"] * part["requests_count"] for part in parts)
    row |= {"slo_attainment_frac": met / row["requests_count"]}
    return row | {"makespan_s": max(part["makespan_s"] for part in parts)}


def evaluate(
    cells: Sequence[Cell], agents: Mapping[str, NDArray[np.float64]], seeds_count: int, out: Path, workers: int
) -> list[Row]:
    """All agents and the tuned constants on the same requests; rows are kept as they come."""
    store, rows = out / "agents.jsonl", []
    done = read_store(store)
    for seed, cell in itertools.product(range(seeds_count), cells):
        keys = {name: json.dumps([*cell.key, seed, name, weights.tolist()]) for name, weights in agents.items()}
        if wanted := {name: agents[name] for name, key in keys.items() if key not in done}:
            for row in run_cell(cell, wanted, seed):
                done[keys[row["policy"]]] = [row]
                append_store(store, keys[row["policy"]], [row])
                err.print({each: row[each] for each in SHOWN}, highlight=False)
        rows += [row for key in keys.values() for row in done[key]]
    jobs = [Job(cell, name, (name,), seeds_count) for cell in cells for name in CONSTANTS]
    return rows + run_jobs(jobs, out / "rows.jsonl", workers=workers)


def table(rows: Sequence[Row], judged: str) -> str:
    """Goodput of each policy in each cell, and interquartile means of the ratios."""
    cells = dict.fromkeys((row["system"], row["model"], row["trace"], row["utilization"]) for row in rows)
    policies = [judged, *(name for name in dict.fromkeys(row["policy"] for row in rows) if name != judged)]
    of: dict[tuple[Any, ...], dict[str, list[float]]] = {cell: {name: [] for name in policies} for cell in cells}
    for row in rows:
        cell = row["system"], row["model"], row["trace"], row["utilization"]
        of[cell][row["policy"]].append(max(row["slo_attainment_frac"], 1 / row["requests_count"]))
    lines = [
        f"| `{judged}` over | IQM | 95 % interval | worst cell | best cell |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name in policies[1:]:
        ratios = np.array([np.divide(of[cell][judged], of[cell][name]) for cell in cells])
        low, high = interval(ratios)
        ends = ratios.mean(axis=1)
        middle = f"{interquartile_mean(ratios):.3f} | {low:.3f} to {high:.3f}"
        lines.append(f"| {name} | {middle} | {ends.min():.3f} | {ends.max():.3f} |")
    lines += ["", f"| system | model | trace | utilization | {' | '.join(policies)} |"]
    lines.append(f"|{' --- |' * 4}{' ---: |' * len(policies)}")
    for cell in cells:
        means = " | ".join(f"{np.mean(of[cell][name]):.3f}" for name in policies)
        lines.append(f"| {' | '.join(map(str, cell))} | {means} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train")
    train.add_argument("--out", type=Path, default=Path("runs/requests-agent"))
    train.add_argument("--variant", choices=VARIANTS, default="all")
    train.add_argument("--generations", type=int, default=20)
    train.add_argument("--population", type=int, default=12)
    train.add_argument("--seed", type=int, default=0)
    train.add_argument("--seconds", type=float, default=float("inf"), help="stop after the generation that reaches it")
    judge = commands.add_parser("evaluate")
    judge.add_argument("--out", type=Path, default=Path("runs/requests-agent-grid"))
    judge.add_argument("--agent", action="append", default=[], help="NAME=FILE besides the shipped one", metavar="A")
    judge.add_argument("--seeds", type=int, default=3)
    judge.add_argument("--utilizations", nargs="+", type=float, default=(0.9,))
    judge.add_argument("--workers", type=int, default=1, help="for the constants")
    given = parser.parse_args()
    warm_up()
    if given.command == "train":
        search(given.out, given.variant, given.generations, given.population, given.seed, given.seconds)
        return
    cells = grid_cells(utilizations=given.utilizations)
    files = {AGENT: FILE} | {name: Path(file) for name, _, file in (text.partition("=") for text in given.agent)}
    agents = {name: read_agent(file) for name, file in files.items()}
    agents[FIXED_ORDER] = with_fixed_order(agents[AGENT])
    text = table(evaluate(cells, agents, given.seeds, given.out, given.workers), AGENT)
    write_text(given.out / "table.md", text)
    err.print(text, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
