"""From a posterior predictive to scores that people can read."""
