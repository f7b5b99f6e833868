"""These tests run vLLM's own engine on the CPU: `make test-serve`, in an environment that `make serve-env` builds."""

import os

# Before vLLM is imported: its engine in this process, quietly, on threads that soon sleep where they wait.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_NO_USAGE_STATS"] = "1"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("GOMP_SPINCOUNT", "2000")
