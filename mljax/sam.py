"""Sharpness-aware minimisation: where the gradient is taken, and its cheaper forms.

All trees here are those of one network: nested dicts like its parameters. Norms and
products are over all of its arrays together. How `step.make_train_step` uses them:

full: the gradient g at the weights w leads to `ascend`(w, g), and the gradient there
    updates w. Two passes over the batch. Foret et al., "Sharpness-Aware Minimization"
    (2021), algorithm 1, arXiv 2010.01412; adaptive: Kwon et al., "ASAM" (2021),
    arXiv 2102.11600.
every k-th step: only steps 0, k, 2k, ... are full, and keep what SAM adds to the plain
    gradient, `apart`; the others take one pass and add it again, `reuse`. Liu et al.,
    "Towards Efficient and Scalable Sharpness-Aware Minimization" (2022), algorithm 1
    (LookSAM), arXiv 2203.02714. The norms are the paper's, over the whole network.
on every n-th image: the first pass sees a part of the batch, the second all of it.
momentum: one pass, at `look_ahead`(w, v). Becker et al., "Momentum-SAM" (2024),
    algorithm 1, arXiv 2401.12033.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

PyTree = Any

_TINY = 1e-12  # added to norms that may be 0


def ascend(params: PyTree, grads: PyTree, rho: float, adaptive: bool) -> PyTree:
    """The worst point near `params`: w + e, SAM's equation 2 (ASAM's with T = |w|).

    e = rho g / (|g| + 1e-12), or e = rho w^2 g / (| |w| g | + 1e-12).
    """
    if adaptive:
        scaled = jax.tree.map(lambda w, g: jnp.abs(w) * g, params, grads)
        step = rho / (optax.tree.norm(scaled) + _TINY)
        return jax.tree.map(lambda w, g: w + step * w**2 * g, params, grads)
    return _add(params, grads, rho / (optax.tree.norm(grads) + _TINY))


def look_ahead(params: PyTree, momentum: PyTree, rho: float) -> PyTree:
    """Momentum-SAM's point near `params`: w - rho v / (|v| + 1e-12).

    v is the optimiser's running sum (or average) of gradients. Mind the sign, which is
    the paper's: SAM adds the gradient, here v is subtracted. An update is -lr * v, so
    this point lies ahead, where the last update went and the next one goes. Nesterov's
    momentum takes its gradient there as well, at the distance lr * mu * |v|; a fixed
    rho reaches farther, beyond what the next step will reach, to where the loss has
    begun to rise again if the minimum along the way is a sharp one. At the first step v
    is 0, and so is the perturbation. The paper writes this for SGD; of Adam v is its
    first moment here.

    The paper keeps the perturbed weights and takes the perturbation off before the
    update; here the weights are the plain ones and it is put on before the pass, which
    gives the same numbers.
    """
    return _add(params, momentum, -rho / (optax.tree.norm(momentum) + _TINY))


def apart(sam_grads: PyTree, grads: PyTree) -> PyTree:
    """What of SAM's gradient is at a right angle to the plain one: LookSAM's g_v.

    g_v = g_s - (g_s . u) u with u = g / (|g| + 1e-12), which is the paper's
    g_s - |g_s| cos(theta) g / |g|.
    """
    size = optax.tree.norm(grads) + _TINY
    unit = jax.tree.map(lambda g: g / size, grads)
    return _add(sam_grads, unit, -optax.tree.vdot(sam_grads, unit))


def reuse(grads: PyTree, kept: PyTree, alpha: float) -> PyTree:
    """A gradient with SAM's direction of an earlier step, LookSAM's g_s in between.

    g + alpha |g| / (|g_v| + 1e-12) g_v; just g while there is no direction yet, which
    happens where the first steps were not finite.
    """
    scale = alpha * optax.tree.norm(grads) / (optax.tree.norm(kept) + _TINY)
    return _add(grads, kept, scale)


def is_full(step: int, every: int) -> bool:
    """Whether step number `step`, counted from 1, is a full one of every so many."""
    return (step - 1) % every == 0


def _add(a: PyTree, b: PyTree, scale: Any) -> PyTree:
    return jax.tree.map(lambda x, y: x + scale * y, a, b)
