"""What runs: one transformers-native model class that trains, evaluates, generates and is served."""

from hylo.modeling.configuration import MIXERS, HyloConfig
from hylo.modeling.model import HyloDecoderLayer, HyloForCausalLM, HyloModel

__all__ = ["MIXERS", "HyloConfig", "HyloDecoderLayer", "HyloForCausalLM", "HyloModel"]
