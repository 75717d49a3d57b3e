"""What was measured for ``experiments/data/h200.csv.gz``: ``python -m l3env.experiments.gpu.plan_h200 > plan.json``.

Then, on the GPU: ``python experiments/gpu/measure.py plan.json h200.csv`` (about four minutes on an H200).
"""

from __future__ import annotations

import json
from typing import Any

from l3env.experiments.gpu.calibrate import shard_of
from l3env.experiments.gpu.measure import shard_fields
from l3env.experiments.gpu.validation import load_model

FULL = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 100, 128, 160, 192, 256, 300, 384, 512, 640, 768, 1000, 1024]
FULL += [1280, 1536, 2048, 2500, 3072, 4096, 5000, 6144, 8192]
SOME = [1, 4, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 777, 1024, 1536, 2048, 3000, 4096, 6144, 8192]
LENGTHS = (128, 256, 512, 1024, 2048, 3000, 4096, 8192, 16_384, 32_768)
DECODE = [(1, b, n) for b in (1, 2, 4, 8, 16, 32, 64, 128, 256) for n in LENGTHS if b * n <= 2**20]
DECODE_SOME = [
    (1, b, n) for b in (1, 3, 8, 24, 64, 200) for n in (200, 512, 1024, 2048, 5000, 16_384) if b * n <= 2**19
]
CHUNKS = (16, 64, 128, 256, 512, 1000, 1024, 2048, 4096, 8192)
PREFILL = [(c, 1, c + h) for c in CHUNKS for h in (0, 512, 2048, 8192, 24_576)]
PREFILL_SOME = [(c, 1, c + h) for c in (32, 200, 512, 1024, 3000, 8192) for h in (0, 1024, 6000)]
MASKS = [(c, 1, c + h) for c in (64, 256, 1024, 2048) for h in (512, 4096, 16_384)]
STACK_8B = [(1, 1, 512), (1, 1, 8192), (1, 4, 2048), (1, 16, 1024), (1, 16, 8192), (1, 32, 4096), (1, 64, 1024)]
STACK_8B += [(1, 64, 4096), (1, 128, 2048), (1, 256, 1024)]
STACK_8B += [(n, 1, n) for n in (128, 512, 1024, 2048, 4096, 8192)]
STACK_8B += [(512, 1, 4608), (2048, 1, 10_240), (128, 8, 2176)]
STACK_7B = [(1, 1, 1024), (1, 8, 2048), (1, 32, 1024), (1, 64, 3000), (256, 1, 256), (1024, 1, 1024), (3000, 1, 3000)]
STACK_7B += [(512, 1, 2560)]
MAIN = [("llama-3-8b", 1), ("llama-3-70b", 4), ("gpt-175b", 8), ("opt-66b", 2), ("llama-2-7b", 1), ("qwen-72b", 4)]
MORE = [("llama-3-8b", 2), ("llama-3-70b", 8), ("llama-3-70b", 2), ("qwen-72b", 8), ("gpt-89b", 8), ("gpt-89b", 4)]
MORE += [("opt-66b", 4), ("llama-2-7b", 2), ("gpt-175b", 4), ("qwen-72b", 2), ("llama-3-70b", 1), ("llama-2-7b", 4)]
MORE += [("opt-66b", 8)]
WIDE = ("llama-3-8b", "llama-2-7b")  # attention over the full grid
SPLIT = [("llama-3-8b", 1), ("llama-3-70b", 4), ("gpt-175b", 8), ("opt-66b", 2), ("llama-2-7b", 1)]
SPLIT += [("llama-3-70b", 8), ("qwen-72b", 2)]


def shard(name: str, tp: int) -> dict[str, Any]:
    return shard_fields(shard_of(load_model(name), name, tp))


def plan() -> dict[str, Any]:
    parts: list[dict[str, Any]] = [{"kind": "launch"}, {"kind": "copies"}]
    for name, tp in MAIN:
        parts.append({"kind": "linear", "shard": shard(name, tp), "tokens": FULL, "fp8": name == "llama-3-8b"})
    for name, tp in MORE:
        parts.append({"kind": "linear", "shard": shard(name, tp), "tokens": SOME})
    for name, tp in MAIN[:5] + MORE:
        wide = name in WIDE and tp == 1
        grid = DECODE + PREFILL if wide else DECODE_SOME + PREFILL_SOME
        backends = ["flash", "cudnn", "default"] if (name, tp) == MAIN[0] else ["flash", "cudnn"]
        parts.append({"kind": "attention", "shard": shard(name, tp), "points": grid, "backends": backends})
    for name, tp in SPLIT:
        chunks = [(c, b, n) for c, b, n in (PREFILL if name in WIDE else PREFILL_SOME) if n > c]
        parts.append({"kind": "attention", "shard": shard(name, tp), "points": chunks, "backends": ["split"]})
    own = shard("llama-3-8b", 1)
    parts.append({"kind": "attention", "shard": own, "points": MASKS, "backends": ["lower_right", "masked"]})
    parts.append({"kind": "small", "shard": own, "tokens": [1, 8, 32, 64, *(2**p for p in range(7, 14))]})
    parts.append({"kind": "stack", "shard": own, "layers": 8, "points": STACK_8B})
    parts.append({"kind": "stack", "shard": shard("llama-2-7b", 1), "layers": 8, "points": STACK_7B})
    return {"pool_bytes": 17 * 2**30, "parts": parts}


if __name__ == "__main__":
    print(json.dumps(plan()))
