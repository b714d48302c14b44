"""DeepSeek-V2, -V3, -R1 and -V3.1 for inference, in a few short files on top of the package's ops.

    model = load_model("DeepSeek-V2-Lite")
    for token_id in generate(model, prompt_ids, max_new_tokens=100):
        ...

`config` reads the checkpoint's config, `checkpoint` its tensors, `loading` builds a model from both. `transformer` is
the model: `attention` (MLA), `moe` (gate, experts), `linear` (FP8 or not), over the paged latent `cache`; `mtp` is its
drafting module. `generate` samples from it.
"""

from .cache import Batch, CacheFullError, PagedLatentCache
from .config import ConfigError, DeepseekConfig
from .generate import BatchGeneration, Generation, generate, generate_batch
from .loading import load_model
from .transformer import DeepseekModel

__all__ = [
    "Batch",
    "BatchGeneration",
    "CacheFullError",
    "ConfigError",
    "DeepseekConfig",
    "DeepseekModel",
    "Generation",
    "PagedLatentCache",
    "generate",
    "generate_batch",
    "load_model",
]
