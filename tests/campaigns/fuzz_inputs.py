"""Damaged and hostile files for whatever reads files: read or refused in one line, within bounded memory, and nothing
is written anywhere.

Kinds: a trace file of each format, specs (TOML, and a model's ``config.json``), studies (YAML, and ``config.json``),
the settings of a training run.
"""

from __future__ import annotations

import os
import random
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from l3env.errors import MOST_CHARACTERS, L3EnvError
from l3env.machine import specs
from l3env.machine.specs.load import PRESET_DIR
from l3env.machine.tables import compile_tables
from l3env.runs.grid import Grid
from l3env.runs.store import read_config
from l3env.traces import catalog
from tests.campaigns.memory import most_held_bytes
from tests.traces.test_traces_mutated import FILES, SPLICES, mutated, own_files

DEPTHS = (50, 200, 700, 900, *range(930, 1010, 3), 3000, 100_000)
WORDS = [  # of TOML and YAML
    *(
        b"\t",
        b"  ",
        b"- ",
        b"# ",
        b": ",
        b"= ",
        b"[[a]]\n",
        b"[sources]\n",
        b"base = 'x'\n",
        b"inf",
        b"true",
        b"'",
        b'"""',
    ),
    *(
        b"&a ",
        b"*a",
        b"<<: *a",
        b"!!int ",
        b"!!float ",
        b"!!bool ",
        b"!!timestamp ",
        b"!!set ",
        b"? ",
        b"--- ",
        b"|\n",
        b"~",
    ),
    *(
        b"2001-99-99",
        b"0x",
        b"1_0",
        b"-.inf",
        b".nan",
        b"1e999",
        b"9" * 5000,
        b"../../x.toml",
        b"/etc/passwd",
        b"a.toml?x=1",
    ),
]
STUDY = b"""policies: [fcfs, "sarathi?prefill_budget_tokens=512"]
systems: [l3-dgx-a100]
models: llama-3-8b
traces: ["profile:azure-conv-2023?n=20"]
loads: [0.5, 1.0]
seeds: 2
slo: {ttft_scale: 5.0, tbt_scale: 5, form: mean-tbt}
prefix_cache: off
"""
TRAINING = b"""algo: ppo
systems: [l3-dgx-a100]
models: [llama-3-8b]
traces: ["profile:azure-conv-2023"]
utilization: [0.5, 1.5]
total_steps: 1000
env: {knobs: [order]}
hyperparams: {learning_rate: 0.0003}
"""
HUGGING_FACE = b"""{"model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
"num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256, "torch_dtype": "bfloat16",
"max_position_embeddings": 8192, "tie_word_embeddings": false}
"""


@dataclass(frozen=True)
class Kind:
    """Files of one kind: what they look like undamaged, what reads them (a path, and the try's number)."""

    name: str
    suffix: str
    originals: tuple[bytes, ...]
    load: Callable[[Path, int], object]
    words: list[bytes] = field(default_factory=lambda: SPLICES)


def trace_kinds(folder: Path) -> Iterator[Kind]:
    for name, data in {**FILES, **own_files(folder)}.items():
        chosen = name.partition(".")[0]

        def load(path: Path, number: int, chosen: str = chosen) -> object:
            return catalog.resolve(f"{path}?format={chosen}" if number % 2 else str(path))

        yield Kind(name, ".tar" if name == "servegen" else ".jsonl" if data.startswith(b"{") else ".x", (data,), load)


def spec_kinds() -> Iterator[Kind]:
    for kind in sorted(each.name for each in PRESET_DIR.iterdir() if each.is_dir()):
        files = tuple(path.read_bytes() for path in sorted((PRESET_DIR / kind).glob("*.toml")))
        if not files or kind not in specs.KINDS:
            continue

        def load(path: Path, number: int, kind: str = kind) -> object:
            spec = specs.named(kind, str(path))
            if kind == "system" and number % 20 == 0:
                return compile_tables(spec, specs.load("model/llama-3-8b"))
            if kind == "model" and number % 20 == 0:
                return compile_tables(specs.load("system/l3-dgx-a100"), spec)
            return spec

        yield Kind(f"{kind} TOML", ".toml", files, load, SPLICES + WORDS)
    yield Kind("model config.json", ".json", (HUGGING_FACE,), lambda path, _: specs.named("model", f"hf:{path}"))


def study_kinds(folder: Path) -> Iterator[Kind]:
    def study(path: Path, number: int) -> object:
        grid = Grid.from_yaml(path)
        return [cell.key for cell in grid.cells()] if grid.seeds_count < 10_000 else grid

    def config(path: Path, number: int) -> object:
        return Grid.from_json(read_config(path))

    yield Kind("study YAML", ".yaml", (STUDY,), study, SPLICES + WORDS)
    whole = folder / "whole.yaml"
    whole.write_bytes(STUDY)
    import json

    yield Kind("study config.json", ".json", (json.dumps(Grid.from_yaml(whole).to_json()).encode(),), config)
    try:
        from l3env.experiments.train.config import TrainConfig
    except ModuleNotFoundError:  # the extra is not installed
        return
    yield Kind("training YAML", ".yml", (TRAINING,), lambda path, _: TrainConfig.from_yaml(path), SPLICES + WORDS)


def all_kinds(folder: Path) -> list[Kind]:
    return [*trace_kinds(folder), *spec_kinds(), *study_kinds(folder)]


def damaged(kind: Kind, rng: random.Random) -> bytes:
    """Changed a little; now and then with something deep or long put into it."""
    data = rng.choice(kind.originals)
    chance = rng.random()
    if chance < 0.02:
        at, depth = rng.randrange(len(data) + 1), rng.choice(DEPTHS)
        opening, closing = rng.choice([(b"[", b"]"), (b'{"a":', b"}"), (b"{a=", b"}"), (b"{a: ", b"}"), (b"- ", b"")])
        return data[:at] + opening * depth + b"1" * rng.randrange(2) + closing * (depth * rng.randrange(2)) + data[at:]
    if chance < 0.04:
        at = rng.randrange(len(data) + 1)
        return (
            data[:at]
            + rng.choice([b"9", b"x", b" ", b"\n", b",", b'"', b"[", b"\x00"]) * 10 ** rng.randrange(3, 6)
            + data[at:]
        )
    if kind.words is not SPLICES and chance < 0.5:
        at = rng.randrange(len(data) + 1)
        data = data[:at] + rng.choice(kind.words) + data[at + rng.randrange(6) :]
    return mutated(data, rng)


WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_written: list[str] = []
_watching: list[bool] = []
CHANGES = {"os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink", "os.link", "os.truncate", "shutil.move"}
CHANGES |= {"shutil.rmtree", "subprocess.Popen", "os.system", "socket.connect", "os.exec", "os.posix_spawn"}


def _audit(event: str, args: tuple[object, ...]) -> None:
    if not _watching:
        return
    if event == "open" and isinstance(args[2], int) and args[2] & WRITES:
        _written.append(str(args[0]))
    elif event in CHANGES:
        _written.append(f"{event} {args}")


@contextmanager
def nothing_written() -> Iterator[None]:
    """Raises AssertionError where a file was opened for writing or changed, a process started, a connection opened."""
    if not hasattr(sys, "_l3env_audit"):
        sys._l3env_audit = True  # type: ignore[attr-defined]
        sys.addaudithook(_audit)
    _written.clear()
    _watching.append(True)
    try:
        yield
    finally:
        _watching.pop()
    assert not _written, _written


def since(start_s: float) -> str:
    return f"{time.perf_counter() - start_s:,.0f} s"


def try_one(kind: Kind, data: bytes, number: int, folder: Path) -> str:
    """How a file of this content ends: read, or refused with an error of one line. Raises whatever else comes."""
    path = folder / f"damaged{kind.suffix}"
    path.write_bytes(data)
    try:
        with nothing_written():
            kind.load(path, number)
        return "read"
    except L3EnvError as error:
        if len(str(error)) > MOST_CHARACTERS:
            raise AssertionError(f"an error of {len(str(error)):,} characters") from error
        return "refused"


def fuzz_kind(kind: Kind, tries: int, folder: Path, seed: int = 1) -> tuple[Counter[str], list[str]]:
    """(how often read and refused, what went wrong: one line for each sort of fault)."""
    rng = random.Random(f"{kind.name} {seed}")
    outcomes, faults = Counter[str](), {}
    for number in range(tries):
        data = damaged(kind, rng)
        try:
            outcomes[try_one(kind, data, number, folder)] += 1
        except Exception as error:
            outcomes["faults"] += 1
            trail = error.__traceback__
            while trail.tb_next is not None:
                trail = trail.tb_next
            where = f"{Path(trail.tb_frame.f_code.co_filename).name}:{trail.tb_lineno}"
            text = f"{kind.name}: {type(error).__name__} at {where}: {str(error)[:100]}"
            faults.setdefault((type(error).__name__, where), f"{text}; file begins {data[:80]!r}")
    return outcomes, list(faults.values())


def campaign(tries: int, folder: Path, seed: int = 1, names: str = "", *, say=print) -> int:
    """All kinds; returns the number of faults, having said what they were."""
    before = Path.cwd()
    os.chdir(folder)
    total: Counter[str] = Counter()
    begun_s = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for kind in all_kinds(folder):
                if names and names not in kind.name:
                    continue
                start_bytes = most_held_bytes()
                start_s = time.perf_counter()
                outcomes, faults = fuzz_kind(kind, tries, folder, seed)
                total += outcomes
                grown = (most_held_bytes() - start_bytes) / 2**20
                say(
                    f"{kind.name}: {tries:,} files, {outcomes['read']:,} read, {outcomes['refused']:,} refused, "
                    f"{outcomes['faults']:,} faults, {grown:.0f} MiB more at the peak, {since(start_s)}"
                )
                for fault in faults:
                    say(f"  {fault}")
    finally:
        os.chdir(before)
    say(
        f"in all: {total.total():,} files, {total['read']:,} read, {total['refused']:,} refused, "
        f"{total['faults']:,} faults, peak {most_held_bytes() / 2**20:.0f} MiB, {since(begun_s)}"
    )
    return total["faults"]
