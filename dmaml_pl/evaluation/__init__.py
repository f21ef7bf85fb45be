"""Meta-testing: adaptation curves, confidence intervals, and reports."""
