"""SGLang and vLLM use our kernels of themselves: entry points that each framework calls when it starts.

A package of its own beside `deep_gemm`, whose import brings PyTorch: nothing is loaded here until a server needs it.
Reading order: `hooks.py` (how a function is replaced, and when it is not), then `sglang.py` and `vllm.py`.
"""
