"""Evaluate models: samples, rewards, perplexity, benchmarks, and win rates against another model."""
