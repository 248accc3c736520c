# SPDX-License-Identifier: Apache-2.0
"""Generates greedily with vLLM's engine: reads options, prompts and the number of tokens as JSON from standard input,
writes lists of tokens as JSON to the file that is its argument."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from vllm import LLM, SamplingParams

if __name__ == "__main__":  # vLLM starts processes that import this file
    task = json.load(sys.stdin)
    sampling = SamplingParams(temperature=0, max_tokens=task["new_tokens"], ignore_eos=True, detokenize=False)
    outputs = LLM(**task["options"]).generate([{"prompt_token_ids": prompt} for prompt in task["prompts"]], sampling)
    Path(sys.argv[1]).write_text(json.dumps([list(output.outputs[0].token_ids) for output in outputs]))
