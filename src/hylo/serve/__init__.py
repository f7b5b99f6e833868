"""Serving in vLLM: the plugin and its model, what a server's memory holds, `hylo serve` and the latency benchmark.

vLLM finds `hylo.serve.plugin` by itself; only the modules that vLLM loads import it.
"""
