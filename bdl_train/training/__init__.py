"""Training one stack with Lightning. Works without Ray, Hydra and wandb."""
