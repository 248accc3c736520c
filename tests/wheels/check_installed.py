# SPDX-License-Identifier: Apache-2.0
"""Runs what a wheel must be able to do wherever it is installed: import, run, script, save, compile, differentiate.

check_wheels.py runs it with the Python of an environment that has a PyTorch and the wheel's library, without the
package of the command.

Usage: python check_installed.py SITE_PACKAGES
"""

from __future__ import annotations

import importlib.util
import io
import sys
from pathlib import Path

import torch
from torch import nn

import zexpert


def main() -> None:
    site_packages = Path(sys.argv[1]).resolve()
    assert importlib.util.find_spec("zexpert_tools") is None
    assert Path(zexpert.__file__).is_relative_to(site_packages), f"imported {zexpert.__file__}, not the wheel's"
    info = zexpert.build_info()
    has_cuda_library = (site_packages / "zexpert/lib/libzexpert_cuda.so").exists()
    if not has_cuda_library:
        assert info["cuda_library"] == "not built", info["cuda_library"]
    elif torch.version.cuda is None:
        assert info["cuda_library"].startswith("not loaded: PyTorch"), info["cuda_library"]
    else:
        assert info["cuda_library"] == "loaded", info["cuda_library"]
        assert info["cuda_archs"] == ["8.0", "9.0a", "10.0+PTX"], info["cuda_archs"]

    torch.manual_seed(0)
    layer = zexpert.FusedMoE(8, 3, 16, 8, zero_expert_type="identity", zero_expert_num=4)
    nn.init.normal_(layer.w13_weight)
    nn.init.normal_(layer.w2_weight)
    hidden_states, router_logits = torch.randn(5, 16), torch.randn(5, 12)
    only_zero_experts = torch.full((5, 12), -100.0)
    only_zero_experts[:, 8:] = 0.0
    torch.testing.assert_close(layer(hidden_states, only_zero_experts), 0.75 * hidden_states)
    layer(hidden_states, router_logits).sum().backward()
    assert layer.w2_weight.grad is not None

    with torch.no_grad():
        expected = layer(hidden_states, router_logits)
        file = io.BytesIO()
        torch.jit.save(torch.jit.script(layer), file)
        file.seek(0)
        assert torch.equal(torch.jit.load(file)(hidden_states, router_logits), expected)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(hidden_states, router_logits), expected)
        exported = torch.export.export(layer, (hidden_states, router_logits)).module()
        assert torch.equal(exported(hidden_states, router_logits), expected)
    print(f"  PyTorch {torch.__version__}: zexpert {info['version']} works; CUDA library {info['cuda_library']}")


if __name__ == "__main__":
    main()
