"""Real traces where there are some: ``L3ENV_TRACE_DIR``, then ``../shared/traces``."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

AZURE_CODE = "azure-2023/AzureLLMInferenceTrace_code.csv"
AZURE_CONV = "azure-2023/AzureLLMInferenceTrace_conv.first60pct.csv"
MOONCAKE = "mooncake/conversation_trace.first60pct.jsonl.gz"
SYNTHETIC = "mooncake/synthetic_trace.jsonl.gz"
BURST = "burstgpt/BurstGPT_1.first400.csv"
ARXIV = "vidur/arxiv_summarization_stats_llama2_tokenizer_filtered_v2.csv"
SHAREGPT = "sarathi-serve/sharegpt_8k_filtered_stats_llama2_tokenizer.csv"
SESSIONS = "kv-cache-tester/sessions_part_a.tar.gz"
DEEPSEEK = "servegen/reason_deepseek-r1.tar.gz"
IMAGES = "servegen/multimodal_mm-image.tar.gz"
RATES = "servegen/language_rates_only.tar.gz"

NEXT_DOOR = Path(__file__).resolve().parents[3] / "shared" / "traces"
FOLDERS = [Path(os.environ["L3ENV_TRACE_DIR"])] if "L3ENV_TRACE_DIR" in os.environ else []
FOLDERS.append(NEXT_DOOR)


def real(file: str) -> Path:
    """The real file, or a skip that says where it was looked for."""
    for folder in FOLDERS:
        if (folder / file).exists():
            return folder / file
    pytest.skip(f"no real trace {file} in L3ENV_TRACE_DIR or ../shared/traces")
