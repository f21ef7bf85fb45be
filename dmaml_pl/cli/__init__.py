"""The command line of trainings: LightningCLI, what is checked before, and what is told of mistakes."""
