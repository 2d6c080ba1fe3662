"""Run by vLLM's interpreter: what vLLM answers for some checkpoints. Not a test; test_vllm.py starts it.

    python vllm_answers.py JOB.json ANSWERS.json

A job is {"checkpoints": [folder], "prompts": [[token]], "tokens": int, "processes": int, "dtype": str, "eager": bool};
an answer, for each checkpoint, {"tokens": [[token]], "first": [{token: logarithm of its probability}]}, or
{"error": str}.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

# Read by vLLM as it is imported.
SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}


def answers_of(job: dict[str, Any], checkpoint: str) -> dict[str, Any]:
    """The greedy tokens behind each prompt."""
    from vllm import LLM, SamplingParams

    model = LLM(
        checkpoint,
        dtype=job["dtype"],
        enforce_eager=job["eager"],
        tensor_parallel_size=job["processes"],
        max_model_len=64,
        max_num_seqs=4,
        seed=0,
    )
    prompts = [{"prompt_token_ids": prompt} for prompt in job["prompts"]]
    greedy = SamplingParams(temperature=0, max_tokens=job["tokens"], ignore_eos=True, logprobs=5)
    answers = [request.outputs[0] for request in model.generate(prompts, greedy, use_tqdm=False)]
    return {
        "tokens": [list(answer.token_ids) for answer in answers],
        "first": [{token: entry.logprob for token, entry in answer.logprobs[0].items()} for answer in answers],
    }


def main() -> None:
    """Answer the job, one checkpoint after the other."""
    from vllm.distributed import cleanup_dist_env_and_memory

    job, answers = json.loads(Path(sys.argv[1]).read_text()), {}
    for checkpoint in job["checkpoints"]:
        try:
            answers[checkpoint] = answers_of(job, checkpoint)
        except Exception as error:  # noqa: BLE001 (what vLLM raises is the answer)
            answers[checkpoint] = {"error": f"{type(error).__name__}: {error}"}
        gc.collect()
        cleanup_dist_env_and_memory()
    Path(sys.argv[2]).write_text(json.dumps(answers))


if __name__ == "__main__":
    job = json.loads(Path(sys.argv[1]).read_text())
    # In one process, what a model raises is raised to us; of several, vLLM's workers are processes of their own.
    os.environ.update(SETTINGS, VLLM_ENABLE_V1_MULTIPROCESSING="0" if job["processes"] == 1 else "1")
    main()
