# pyright: reportMissingImports=false, reportCallIssue=false
# numpyro and jax are an extra of their own.
"""Reference for the posteriors of a small network: NUTS by numpyro, an implementation that shares nothing with ours.

    pip install -e '.[reference]'
    python scripts/reference/nuts_small_network.py         # writes tests/inference/reference/nuts_small_network.npz

One hidden layer of 10 tanh units, one input, 100 rows with a gap in the middle, Gaussian noise of unknown size, N(0, 1)
on every weight; float64, 6 chains of 4,000 draws. The file holds the rows, and at 25 inputs the mean and standard
deviation of the network's output and the predictive density of y on a grid, with R-hat and effective sample size of
the outputs: tests compare methods with it (`tests/inference/test_against_nuts.py`).
"""

from pathlib import Path

import numpy as np

FILE = Path(__file__).parents[2] / "tests" / "inference" / "reference" / "nuts_small_network.npz"
HIDDEN, ROWS, CHAINS, WARMUP, DRAWS = 10, 100, 6, 1500, 4000
NOISE_MEDIAN, LOG_NOISE_STD = 0.3, 1.0


def make_rows() -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(7)
    side = np.where(random.random(ROWS) < 0.5, -1.0, 1.0)
    x = side * random.uniform(0.4, 1.6, ROWS)
    return x, np.sin(2.5 * x) + 0.2 * random.standard_normal(ROWS)


def main() -> None:
    import jax
    import numpyro
    import numpyro.distributions as dist
    from jax import numpy as jnp
    from numpyro.diagnostics import effective_sample_size, split_gelman_rubin
    from numpyro.infer import MCMC, NUTS

    numpyro.enable_x64()
    numpyro.set_host_device_count(1)
    x, y = make_rows()

    def outputs(w1: jax.Array, b1: jax.Array, w2: jax.Array, b2: jax.Array, at: jax.Array) -> jax.Array:
        return jnp.tanh(at[:, None] * w1 + b1) @ w2 + b2

    def model(x: jax.Array, y: jax.Array) -> None:
        w1 = numpyro.sample("w1", dist.Normal(0, 1).expand([HIDDEN]))
        b1 = numpyro.sample("b1", dist.Normal(0, 1).expand([HIDDEN]))
        w2 = numpyro.sample("w2", dist.Normal(0, 1).expand([HIDDEN]))
        b2 = numpyro.sample("b2", dist.Normal(0, 1))
        log_noise = numpyro.sample("log_noise", dist.Normal(np.log(NOISE_MEDIAN), LOG_NOISE_STD))
        numpyro.sample("y", dist.Normal(outputs(w1, b1, w2, b2, x), jnp.exp(log_noise)), obs=y)

    sampler = MCMC(
        NUTS(model, target_accept_prob=0.9),
        num_warmup=WARMUP,
        num_samples=DRAWS,
        num_chains=CHAINS,
        chain_method="sequential",
        progress_bar=False,
    )
    sampler.run(jax.random.PRNGKey(0), jnp.asarray(x), jnp.asarray(y))
    draws = sampler.get_samples(group_by_chain=True)
    at = np.linspace(-2.4, 2.4, 25)
    grid = np.linspace(-4, 4, 401)
    weights = [draws[name] for name in ("w1", "b1", "w2", "b2")]
    values = np.asarray(
        jax.vmap(jax.vmap(lambda *w: outputs(*w, jnp.asarray(at))))(*weights)
    )  # [chains, draws, at]
    noise = np.exp(np.asarray(draws["log_noise"]))
    density = np.zeros((len(at), len(grid)))
    for f, s in zip(values.reshape(-1, len(at)), noise.ravel(), strict=True):
        density += np.exp(-0.5 * ((grid - f[:, None]) / s) ** 2) / (s * np.sqrt(2 * np.pi))
    density /= noise.size
    rhat = max(split_gelman_rubin(values[..., i]) for i in range(len(at)))
    ess = min(effective_sample_size(values[..., i]) for i in range(len(at)))
    print(f"numpyro {numpyro.__version__}: R-hat at most {rhat:.4f}, effective draws at least {ess:.0f}")
    FILE.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        FILE,
        x=x,
        y=y,
        at=at,
        grid=grid,
        mean=values.mean((0, 1)),
        std=values.std((0, 1)),
        density=density.astype(np.float32),
        log_noise=np.array([np.log(noise).mean(), np.log(noise).std()]),
        rhat=rhat,
        ess=ess,
    )


if __name__ == "__main__":
    main()
