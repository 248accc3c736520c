"""Imports zexpert from the folder that a wheel was unpacked into, and runs the layer.

For `make test-cuda-build`: a wheel with CUDA must serve a PyTorch without it.

Usage: python tests/python/check_wheel.py FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path


def main() -> None:
    folder = Path(sys.argv[1]).resolve()
    sys.path.insert(0, str(folder))
    import torch

    import zexpert

    assert Path(zexpert.__file__).is_relative_to(folder), f"imported {zexpert.__file__}, not the wheel's"
    info = zexpert.build_info()
    assert (folder / "zexpert/lib/libzexpert_cuda.so").exists(), "the wheel has no CUDA library"
    assert info["cuda_archs"] == ["8.0", "9.0a", "10.0+PTX"], info["cuda_archs"]
    if torch.version.cuda is None:
        assert info["cuda_library"].startswith("not loaded: PyTorch"), info["cuda_library"]
    layer = zexpert.FusedMoE(8, 3, 16, 8, zero_expert_type="identity", zero_expert_num=4)
    hidden_states = torch.randn(5, 16)
    router_logits = torch.full((5, 12), -100.0)
    router_logits[:, 8:] = 0.0
    torch.testing.assert_close(layer(hidden_states, router_logits), 0.75 * hidden_states)
    print(f"{folder.name}: zexpert {info['version']} runs under PyTorch {torch.__version__}; {info['cuda_library']}")


if __name__ == "__main__":
    main()
