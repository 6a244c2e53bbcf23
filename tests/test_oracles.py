"""The two oracles against each other, with trees of their own: nothing of the library but the description."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from networks import Model, models
from oracles import Descent, Structure, balanced_scale, flat_loss, modulo_trees


@given(
    models(zeros=False),
    st.booleans(),
    st.sampled_from([(0.0, False), (0.9, False), (0.9, True)]),
    st.sampled_from([0.0, 0.1]),
)
def test_enumeration_equals_autograd(
    model: Model, balanced: bool, momentum: tuple[float, bool], weight_decay: float
) -> None:
    structure = Structure(model.net, *modulo_trees(model.net))
    w = structure.pack(model.params)
    assert np.linalg.matrix_rank(structure.counts) == model.net.num_basis_paths == structure.counts.shape[1]
    k = structure.reference_scale(w, balanced_scale(structure, w) if balanced else np.ones(model.net.num_units))
    first = Descent(structure, k, None, *momentum, weight_decay)
    second = Descent(structure, k, flat_loss(model, structure), *momentum, weight_decay)
    w1 = w2 = w
    for lr in (0.02, 0.05, 0.01):
        w1 = first.step(w1, structure.pack(model.gradients(structure.unpack(w1))), lr)
        w2 = second.step(w2, w2, lr)
        np.testing.assert_allclose(w1, w2, rtol=1e-9, atol=1e-9 * np.abs(w2).max())
    assert (w1[structure.free] == w[structure.free]).all()
    assert first.clamped == second.clamped
