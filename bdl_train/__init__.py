"""bdl_train: distributed training of Bayesian ensembles of PyTorch networks."""

__version__ = "0.1.0"
