"""How good a model is: samples, rewards, perplexity, and how often it wins against another one."""
