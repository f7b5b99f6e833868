"""What a model keeps of its teacher: perplexity, KL divergence, and recall of facts by length and depth."""

from hylo.evaluate.evaluate import evaluate, evaluate_model, evaluate_models, print_results

__all__ = ["evaluate", "evaluate_model", "evaluate_models", "print_results"]
