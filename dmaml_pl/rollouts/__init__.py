"""Rollouts of policies in environments: what makes the samples of reinforcement learning."""
