"""Training and evaluation of process reward models: data, metrics, the trainer and its entry points."""
