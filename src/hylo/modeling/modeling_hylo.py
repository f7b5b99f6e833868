"""What transformers reads in a hylo model's directory with trust_remote_code=True: the classes of the package."""

try:
    from hylo import HyloConfig, HyloForCausalLM, HyloModel
except ModuleNotFoundError as error:
    raise ImportError(
        f"This model runs with the Python package hylo ({error}): install it, or write a directory that needs no "
        "package, `hylo export DIR OUT --portable`, where it is installed."
    ) from error

__all__ = ["HyloConfig", "HyloForCausalLM", "HyloModel"]
