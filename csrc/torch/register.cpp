// Nothing but the list of ops that have a CUDA kernel. Schemas, fakes and references are in deepseek_ops/*.py.
