"""A trained network as a model of MLflow: registered, and served."""
