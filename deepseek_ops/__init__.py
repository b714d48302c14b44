"""Hand-written CUDA kernels for DeepSeek-style models as torch custom ops, each with a CPU reference.

Importing this registers `torch.ops.deepseek_ops` and gives the functions below; it starts no process, writes no
file and initialises no CUDA. `deepseek_ops.arrays` (NumPy, CuPy) needs no torch; `deepseek_ops.model` is the models.
"""

from importlib.util import find_spec

from .library import build_info

__version__: str = build_info["version"]
__all__ = ["__version__", "build_info"]

if find_spec("torch"):
    from . import activation, gemm, grouped_bf16_gemm, grouped_gemm, mla, mla_cache, moe, norm, quantize, validate
    from . import rope as rope_family  # the package's own `rope` is the op
    from .activation import *  # noqa: F403
    from .gemm import *  # noqa: F403
    from .grouped_bf16_gemm import *  # noqa: F403
    from .grouped_gemm import *  # noqa: F403
    from .mla import *  # noqa: F403
    from .mla_cache import *  # noqa: F403
    from .moe import *  # noqa: F403
    from .norm import *  # noqa: F403
    from .quantize import *  # noqa: F403
    from .rope import *  # noqa: F403
    from .validate import *  # noqa: F403

    _gemms = (gemm, grouped_gemm, grouped_bf16_gemm)
    for _family in (quantize, *_gemms, norm, rope_family, activation, moe, mla_cache, mla, validate):
        __all__ += _family.__all__
