"""What happens to a batch on the device, inside the step."""

import jax
import jax.numpy as jnp


def normalise(images: jax.Array) -> jax.Array:
    """uint8 `[batch, height, width, 3]` to float32 in [-1, 1]: x / 127.5 - 1."""
    return images.astype(jnp.float32) / 127.5 - 1.0


def random_flip(images: jax.Array, rng: jax.Array, probability: float) -> jax.Array:
    """Mirrors each image of `[batch, height, width, 3]` left to right by chance."""
    chosen = jax.random.bernoulli(rng, probability, (images.shape[0], 1, 1, 1))
    return jnp.where(chosen, images[:, :, ::-1], images)


def make_preprocess(flip: float):
    """`preprocess(images, rng)`: augment (unless `rng` is None) and normalise."""

    def preprocess(images: jax.Array, rng: jax.Array | None = None) -> jax.Array:
        if rng is not None and flip > 0:
            images = random_flip(images, rng, flip)
        return normalise(images)

    return preprocess
