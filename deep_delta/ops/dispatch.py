"""Which implementation of the delta rule runs. A backend that is named never falls back."""

from torch import Tensor

from deep_delta.ops import reference

BACKENDS = ("auto", "reference")


def resolve_backend(backend: str) -> str:
    """The backend that `backend` stands for; ValueError if this version does not have it."""
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is not available; use one of {', '.join(BACKENDS)}")
    return "reference"


def delta_rewrite(
    state: Tensor,
    direction: Tensor,
    value: Tensor,
    gate: Tensor,
    *,
    erase: bool = True,
    eps: float = 1e-5,
    backend: str = "auto",
) -> Tensor:
    """Rewrite a state along a direction: X + β k (vᵀ − kᵀX), Deep Delta Learning's eq. 2.2.

    Args:
        state: X, (..., d, d_v), floating point.
        direction: k before normalisation, (..., d); k = direction/√(‖direction‖² + ε²).
        value: the target v, (..., d_v).
        gate: β, (...), meant to lie in (0, 2): 0 keeps the state, 1 overwrites, 2 reflects.
        erase: False gives the write-only control X + β k vᵀ.
        eps: ε, in units of ‖direction‖. A zero direction leaves the state as it is.
        backend: "auto" or "reference".

    Returns:
        The new state, (..., d, d_v), in the state's dtype; computed in at least fp32.

    Raises:
        ValueError: shapes that do not fit, or a backend this version does not have.
    """
    if not state.is_floating_point():
        raise ValueError(f"the state is {state.dtype}; it must be floating point")
    if eps < 0:
        raise ValueError(f"eps is {eps}; it must not be negative")
    lead = state.shape[:-2]
    expected = {
        "direction": (direction, (*lead, state.shape[-2] if state.ndim > 1 else 0)),
        "value": (value, (*lead, state.shape[-1] if state.ndim > 1 else 0)),
        "gate": (gate, lead),
    }
    for name, (tensor, shape) in expected.items():
        if state.ndim < 2 or tensor.shape != shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}; a state of shape {tuple(state.shape)} "
                f"(..., d, d_v) needs {tuple(shape)}"
            )
    resolve_backend(backend)
    return reference.delta_rewrite(state, direction, value, gate, erase=erase, eps=eps)
