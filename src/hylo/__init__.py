"""Turns a pretrained Transformer into a long-context hybrid; importing it makes transformers know `hylo` models."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from hylo.modeling import HyloConfig, HyloForCausalLM, HyloModel

AutoConfig.register("hylo", HyloConfig)
AutoModel.register(HyloConfig, HyloModel)
AutoModelForCausalLM.register(HyloConfig, HyloForCausalLM)

__all__ = ["HyloConfig", "HyloForCausalLM", "HyloModel"]
