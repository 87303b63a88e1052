"""The posterior predictive: streaming statistics, mixtures, and the pass over data."""
