"""Benchmarks, perplexity and depth of a model, by the published protocol, the causal one, or lm-evaluation-harness."""
