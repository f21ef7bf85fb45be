"""Policies of reinforcement learning: networks whose output is a distribution of actions, and what they are trained by."""
