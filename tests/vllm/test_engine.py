# SPDX-License-Identifier: Apache-2.0
"""zexpert in vLLM's engine on the CPU: a small random LongCat-Flash generates what it generates in transformers."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import LongcatFlashConfig, LongcatFlashForCausalLM, PreTrainedTokenizerFast

import zexpert
from hub_layout import hub_tensors, write

VOCABULARY, NEW_TOKENS = 256, 12

#: vLLM's attention for this model on CPUs needs these two ranks. Its own RMSNorm on CPUs is wrong for views with gaps.
SIZES = {"kv_lora_rank": 512, "qk_rope_head_dim": 64}
OPTIONS: dict[str, Any] = {
    "dtype": "float32",
    "skip_tokenizer_init": True,
    "max_model_len": 2048,
    "gpu_memory_utilization": 0.1,  # of the machine's memory
    "attention_backend": "CPU_MLA",
    "compilation_config": {"custom_ops": ["none"]},
    "enforce_eager": True,
}
ENVIRONMENT = {
    "ZEXPERT_VLLM": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else ranks need a memory node each
    "VLLM_NO_USAGE_STATS": "1",
}


class Served(NamedTuple):
    """A model on disk, and what transformers generates with it."""

    folder: Path
    prompts: list[list[int]]
    generated: list[list[int]]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    config = LongcatFlashConfig(
        vocab_size=VOCABULARY, hidden_size=64, num_layers=2, num_attention_heads=2, ffn_hidden_size=64, q_lora_rank=32,
        qk_nope_head_dim=32, v_head_dim=32, head_dim=64, n_routed_experts=8, zero_expert_num=4, moe_topk=4,
        expert_ffn_hidden_size=32, max_position_embeddings=4096, bos_token_id=None, eos_token_id=None,
        # What transformers does not read and vLLM does.
        zero_expert_type="identity", mla_scale_q_lora=True, mla_scale_kv_lora=True,
        architectures=["LongcatFlashForCausalLM"], **SIZES,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LongcatFlashForCausalLM(config).eval()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "norm" not in name and "inv_freq" not in name:
                tensor.normal_(std=0.02 if "bias" in name else tensor.shape[-1] ** -0.5)
    model.config.dtype = torch.float32
    folder = write(tmp_path_factory.mktemp("served") / "hub", model.config, hub_tensors(model))
    vocabulary = {f"t{token}": token for token in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="t0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="t0").save_pretrained(folder)

    lengths = [2, 3, 5, 8, 13, 16, 17, 31, 32, 33, 64, 65, 100, 127, 200, 256, 300, 511, 900, 1500]
    prompts = [torch.randint(VOCABULARY, (length,)).tolist() for length in lengths]
    return Served(folder, prompts, [generate(model, prompt) for prompt in prompts])


def generate(model: Any, prompt: list[int]) -> list[int]:
    tokens = torch.tensor([prompt])
    settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    generated: list[int] = model.generate(tokens, attention_mask=torch.ones_like(tokens), **settings)[0].tolist()
    return generated[len(prompt) :]


def run_engine(served: Served, tmp_path: Path, **options: Any) -> tuple[list[list[int]], str]:
    """The tokens that vLLM generates, and its log."""
    task = {"options": {"model": str(served.folder), **OPTIONS, **options}, "prompts": served.prompts}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "run_engine.py"), str(tmp_path / "tokens.json")],
        input=json.dumps({**task, "new_tokens": NEW_TOKENS}),
        capture_output=True, text=True, check=False, timeout=500, env={**os.environ, **ENVIRONMENT},
    )  # fmt: skip
    log = done.stdout + done.stderr
    assert done.returncode == 0, log[-6000:]
    return json.loads((tmp_path / "tokens.json").read_text()), log


@pytest.mark.parametrize(
    "options",
    [{"max_num_batched_tokens": 256}, {"max_num_batched_tokens": 256, "tensor_parallel_size": 2}],
    ids=["chunked prefill", "tensor parallel"],
)
def test_generates_what_transformers_generates(served: Served, tmp_path: Path, options: dict[str, Any]) -> None:
    tokens, log = run_engine(served, tmp_path, **options)
    assert tokens == served.generated
    assert f"zexpert {zexpert.__version__} routes zero experts of vLLM 0.32.0" in log
    assert (
        "zexpert: routing only of layers with 8 experts and 4 zero experts; vLLM computes the experts, because" in log
    )


@pytest.fixture
def server(served: Served, tmp_path: Path) -> Iterator[str]:
    """The address of a server that is ready."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = {name: value for name, value in OPTIONS.items() if not isinstance(value, bool)}
    options |= {"model": served.folder, "served_model_name": "tiny", "host": "127.0.0.1", "port": port}
    options |= {"max_num_seqs": 64, "max_num_batched_tokens": 256}
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--enforce-eager"]
    for name, value in options.items():
        command += [f"--{name.replace('_', '-')}", json.dumps(value) if isinstance(value, dict) else str(value)]
    log = tmp_path / "server.log"
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, **ENVIRONMENT})
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 300
        while not is_ready(address):
            assert process.poll() is None, log.read_text()[-6000:]
            assert time.monotonic() < deadline, log.read_text()[-6000:]
            time.sleep(1)
        yield address
    finally:
        process.terminate()
        process.wait(60)


def is_ready(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def test_server_under_64_requests_at_a_time(served: Served, server: str) -> None:
    def ask(number: int) -> list[int]:
        body = {
            "model": "tiny", "prompt": served.prompts[number % len(served.prompts)], "max_tokens": NEW_TOKENS,
            "temperature": 0, "ignore_eos": True, "return_token_ids": True,
        }  # fmt: skip
        request = urllib.request.Request(
            f"{server}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=300) as answer:
            tokens: list[int] = json.load(answer)["choices"][0]["token_ids"]
            return tokens

    with ThreadPoolExecutor(64) as pool:
        answers = list(pool.map(ask, range(64)))
    assert answers == [served.generated[number % len(served.prompts)] for number in range(64)]
