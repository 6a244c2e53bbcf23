"""The description: counts, tables, reasons, errors; and that it describes what the torch function does."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import Model, mlp, models
from oracles import edges, rescaled

import gsgd

# The paper's table 6: 49-h-h-10 without biases. Its invariant ratios are H / 2m (section 3.2 says H / m).
TABLE_6 = [
    (8, 536, 16, 1.49e-2),
    (16, 1200, 32, 1.33e-2),
    (32, 2912, 64, 1.10e-2),
    (64, 7872, 128, 8.13e-3),
    (128, 23936, 256, 5.35e-3),
    (256, 80640, 512, 3.17e-3),
    (512, 292352, 1024, 1.75e-3),
    (1024, 1108992, 2048, 9.23e-4),
]


@pytest.mark.parametrize(("hidden", "weights", "units", "ratio"), TABLE_6)
def test_table_6(hidden: int, weights: int, units: int, ratio: float) -> None:
    net = gsgd.Network.sequential([(hidden, 49), (hidden, hidden), (10, hidden)])
    assert (net.num_weights, net.num_units, net.num_basis_paths) == (weights, units, weights - units)
    assert net.invariant_ratio == units / weights
    assert net.invariant_ratio / 2 == pytest.approx(ratio, rel=5e-3)


@given(models(), st.integers(0, 2**16))
def test_rescaling_a_units_edges_leaves_the_function_alone(model: Model, seed: int) -> None:
    c = np.exp(np.random.default_rng(seed).uniform(-1, 1, model.net.num_units))
    outputs, same = model.forward(model.params), model.forward(rescaled(model.net, model.params, c))
    torch.testing.assert_close(same, outputs, rtol=1e-9, atol=1e-9 * float(outputs.abs().max() + 1))


@given(models(zeros=False), st.integers(0, 2**16))
def test_every_weight_and_only_once(model: Model, seed: int) -> None:
    net = model.net
    assert net.shapes == {name: value.shape for name, value in model.params.items()}
    assert net.num_weights == sum(value.size for value in model.params.values())
    seen = {name: np.zeros(shape, int) for name, shape in net.shapes.items()}
    for block in net.blocks:
        block.view(seen[block.name])[...] += 1
        entry = int(np.random.default_rng(seed).integers(block.size))
        at = np.arange(seen[block.name].size).reshape(seen[block.name].shape)
        assert at[block.index(entry)] == block.view(at).ravel()[entry]
    assert all((count == 1).all() for count in seen.values())


def test_units_of_each_kind_of_layer() -> None:
    net = gsgd.Network()
    h = net.relu(net.conv("conv1", net.input(3), 16, kernel=(3, 3), bias="conv1.b"))
    h = net.add(h, net.conv("conv2", h, 16, kernel=(3, 3)))
    left, right = net.take(h, slice(0, 8)), net.take(h, range(15, 7, -1))
    h = net.concat(left, net.conv("conv3", right, 8, 1, groups=8), right)
    h = net.batch_norm(net.conv("conv4", h, 6, (1, 3)), "bn.w", "bn.b")
    net.output(net.dense("fc", net.flatten(net.max_pool(net.relu(h)), positions=4), 10, bias="fc.b"))
    assert net.num_units == 16 + 8 + 6
    assert net.shapes == {
        "conv1": (16, 3, 3, 3), "conv1.b": (16,), "conv2": (16, 16, 3, 3), "conv3": (8, 1, 1), "conv4": (6, 24, 1, 3),
        "bn.w": (6,), "bn.b": (6,), "fc": (10, 24), "fc.b": (10,),
    }  # fmt: skip
    assert net.num_weights == 432 + 16 + 2304 + 8 + 432 + 12 + 250
    src, dst = edges(net)
    conv3 = slice(432 + 16 + 2304, 432 + 16 + 2304 + 8)
    assert src[conv3].tolist() == list(range(15, 7, -1))
    assert dst[conv3].tolist() == list(range(16, 24))


def test_layouts_describe_the_same_edges() -> None:
    def build(layouts: tuple[str, str, str]) -> gsgd.Network:
        net = gsgd.Network()
        h = net.conv("c", net.input(2), 6, (3, 2), layout=layouts[0])
        h = net.conv("g", h, 4, (1, 3), groups=2, layout=layouts[1])
        net.output(net.dense("d", net.flatten(h, 5), 3, layout=layouts[2]))
        return net

    first, second = build(("oihw", "oihw", "oi")), build(("hwio", "iohw", "io"))
    assert second.shapes == {"c": (3, 2, 2, 6), "g": (6, 2, 1, 3), "d": (20, 3)}
    for a, b in zip(first.blocks, second.blocks, strict=True):
        assert a.extents == b.extents
        assert (a.rows == b.rows).all()
        assert (a.cols == b.cols).all()


def test_the_table() -> None:
    net = gsgd.Network()
    h = net.relu(net.dense("w1", net.input(784), 64, bias="b1"))
    h = net.pin(net.dense("w2", h, 5), "a softmax reads it")
    net.output(net.dense("w3", h, 10))
    lines = str(net).splitlines()
    assert lines[0].split() == ["parameter", "kind", "shape", "weights", "reads", "writes"]
    assert lines[2].split("  ")[0] == "w1"
    for text in ("64 x 784", "50,176", "784 pinned (network input)", "64 units"):
        assert text in lines[2]
    assert "constant" in lines[3]
    assert "5 pinned (a softmax reads it)" in lines[4]
    assert "10 pinned (network output)" in lines[5]
    assert lines[-1] == "50,610 weights (m), 64 units (H), 50,546 basis paths (m - H)"


def test_every_pinned_unit_keeps_its_reason() -> None:
    net = gsgd.Network()
    h = net.dense("w1", net.input(2, "pixels"), 3)
    h = net.add(h, net.dense("w2", net.relu(h), 3), residual="pin")
    g = net.batch_norm(net.dense("w3", h, 2), "gamma")
    n = net.batch_norm(net.dense("w4", h, 2), bias="beta")
    net.output(net.dense("w5", net.concat(net.pin(g, "sigmoid"), n), 1))
    reasons = set(net.pins.values())
    assert reasons == {
        "pixels", "residual addition", "scale lost in batch normalization", "constant", "sigmoid",
        "batch normalization without weight", "network output",
    }  # fmt: skip
    assert net.num_units == 0
    assert all(reason in str(net) for reason in reasons - {"constant"})


def test_ties_pass_a_pin_on() -> None:
    net = gsgd.Network()
    x = net.input(4)
    h = net.dense("w1", x, 4)
    net.output(net.dense("w2", net.add(net.relu(net.add(x, h)), net.dense("w3", h, 4)), 2))
    assert net.num_units == 0


@pytest.mark.parametrize(
    ("shapes", "layout"),
    [
        ({"a": (8, 3, 3, 3), "a.b": (8,), "b": (8, 1, 3, 3), "c": (5, 8 * 6), "d": (2, 5), "d.b": (2,)}, "oi"),
        ({"a": (3, 3, 3, 8), "a.b": (8,), "b": (3, 3, 1, 8), "c": (8 * 6, 5), "d": (5, 2), "d.b": (2,)}, "io"),
    ],
)
def test_sequential(shapes: dict[str, tuple[int, ...]], layout: str) -> None:
    net = gsgd.Network.sequential(shapes, layout=layout)
    assert net.shapes == shapes
    assert net.num_units == 8 + 8 + 5
    order = gsgd.Network.sequential({name: np.zeros(shape) for name, shape in shapes.items()}, layout=layout)
    assert order.shapes == shapes
    src, _ = edges(net)
    at = sum(int(np.prod(shapes[name])) for name in ("a", "a.b", "b"))
    reads = src[at : at + 240].reshape(shapes["c"])
    reads = reads[0] if layout == "oi" else reads[:, 0]
    assert (reads == (np.repeat(range(8, 16), 6) if layout == "oi" else np.tile(range(8, 16), 6))).all()


def test_sequential_names_a_list_by_place() -> None:
    assert gsgd.Network.sequential([(4, 3), (4,), (2, 4)]).shapes == {"0": (4, 3), "1": (4,), "2": (2, 4)}


def _net() -> tuple[gsgd.Network, gsgd.network.Features]:
    net = gsgd.Network()
    return net, net.dense("w1", net.input(4), 6)


def _state(net: gsgd.Network) -> str:
    other = ("nodes", "_compiled", "_numbering")
    return repr([{name: v for name, v in vars(x).items() if name not in other} for x in (net, net.nodes)])


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (lambda net, h: net.input(-1), "input: channels"),
        (lambda net, h: net.input(2.0), "input: channels"),
        (lambda net, h: net.input(2, ""), "input: reason"),
        (lambda net, h: net.dense("w1", h, 2), "'w1' is described twice"),
        (lambda net, h: net.dense("w2", h, 2, bias="w1"), "'w1' is described twice"),
        (lambda net, h: net.dense("w2", h, 2, bias="w2"), "'w2' is described twice"),
        (lambda net, h: net.dense("", h, 2), "name"),
        (lambda net, h: net.dense(3, h, 2), "name.* 3"),
        (lambda net, h: net.dense("w2", h, 2, bias=3), "name.* 3"),
        (lambda net, h: net.dense("w2", h, 0), "w2: features.* 0"),
        (lambda net, h: net.dense("w2", h, -2), "w2: features.* -2"),
        (lambda net, h: net.dense("w2", h, 2.5), r"w2: features.* 2\.5"),
        (lambda net, h: net.dense("w2", net.take(h, []), 2), "w2: features that it reads"),
        (lambda net, h: net.conv("w1", h, 4, 3), "'w1' is described twice"),
        (lambda net, h: net.conv("w2", h, 4, 3, bias="w1"), "'w1' is described twice"),
        (lambda net, h: net.conv("w2", h, 4, -1), "w2: kernel.* -1"),
        (lambda net, h: net.conv("w2", h, 4, (3, 0)), "w2: kernel.* 0"),
        (lambda net, h: net.conv("w2", h, 4, ()), "w2: kernel"),
        (lambda net, h: net.conv("w2", h, 4, 3, groups=1.0), "w2: groups"),
        (lambda net, h: net.conv("w2", h, 4, 3, layout=None), "w2: layout None"),
        (lambda net, h: net.flatten(h, 2.5), "flatten: positions"),
        (lambda net, h: net.pin(h, None), "pin: reason"),
        (lambda net, h: net.take(h, 0), "take: expected"),
        (lambda net, h: net.take(h, [6]), "take: expected.* 6 "),
        (lambda net, h: net.take(h, None), "take: expected"),
        (lambda net, h: net.concat(), "concat: expected"),
        (lambda net, h: net.batch_norm(h, "gamma", "w1"), "'w1' is described twice"),
        (lambda net, h: net.batch_norm(h, "gamma", "gamma"), "'gamma' is described twice"),
        (lambda net, h: net.without(["w1", "zz"], "unknown"), "'zz'"),
        (lambda net, h: net.without(["w1"], None), "without: reason"),
        (lambda net, h: net.dense("w2", h, 2, layout="ab"), "w2: layout 'ab'"),
        (lambda net, h: net.conv("w2", h, 4, 3, groups=4), "w2: groups=4"),
        (lambda net, h: net.conv("w2", h, 4, (1, 1, 1, 1)), "w2: kernel"),
        (lambda net, h: net.conv("w2", h, 4, 3, layout="ohwi"), "layout 'ohwi'"),
        (lambda net, h: net.conv("w2", net.flatten(h, 4), 4, 3), "w2: expected channels"),
        (lambda net, h: net.flatten(h, 0), "flatten: positions"),
        (lambda net, h: net.flatten(h, 4, "rows_first"), "order 'rows_first'"),
        (lambda net, h: net.add(h, net.take(h, [0])), r"add: .*\[6, 1\]"),
        (lambda net, h: net.add(h, h, residual="untie"), "residual 'untie'"),
        (lambda net, h: net.batch_norm(h, mode="fast"), "mode 'fast'"),
        (lambda net, h: net.batch_norm(net.features(np.arange(9, -1, -1)), mode="paper"), "'paper'"),
        (lambda net, h: net.dense("w2", _net()[1], 2), "w2: .*another network"),
        (lambda net, h: net.num_units, r"unit w1\[0\] is never read"),
        (lambda net, h: gsgd.Network.sequential([(3, 2), (4, 5)]), "1: reads 5 features.*writes 3"),
        (lambda net, h: gsgd.Network.sequential([(3,)]), "0: shape"),
        (lambda net, h: gsgd.Network.sequential([(3, 0)]), "0: shape"),
        (lambda net, h: gsgd.Network.sequential([(3, 2.5)]), "0: expected"),
        (lambda net, h: gsgd.Network.sequential([]), "at least one weight"),
        (lambda net, h: gsgd.Network.sequential([(3, 2)], layout="hw"), "layout 'hw'"),
    ],
)
def test_mistakes_are_named_and_leave_the_network_as_it_was(mistake, message: str) -> None:
    net, h = _net()
    before = _state(net)
    with pytest.raises((ValueError, TypeError), match=message):
        mistake(net, h)
    assert _state(net) == before


def test_numpys_integers_are_integers() -> None:
    net, h = _net()
    n = np.int64(3)
    h = net.flatten(net.conv("w2", h, n, n, groups=n), n)
    net.output(net.dense("w3", net.take(h, (0, 8)), n))
    assert net.shapes == {"w1": (6, 4), "w2": (3, 2, 3), "w3": (3, 2)}


def test_every_pin_has_a_label_of_its_own() -> None:
    net = gsgd.Network()
    h = net.concat(net.input(2), net.input(2))
    net.output(net.batch_norm(net.dense("w", h, 1), "gamma", "beta"))
    assert list(net.pins) == [
        "network input[0]", "network input[1]", "network input 2[0]", "network input 2[1]", "w[0]", "gamma[0]",
        "source of gamma[0]", "source of beta[0]",
    ]  # fmt: skip


def test_a_network_without_weights() -> None:
    assert gsgd.Network().invariant_ratio == 0


def test_wrong_types_are_named() -> None:
    net, _ = _net()
    with pytest.raises(TypeError, match=r"w2: .*ndarray"):
        net.dense("w2", np.zeros(4), 2)


def test_a_unit_that_nobody_writes_is_an_error() -> None:
    net = gsgd.Network()
    net.output(net.dense("w", net.features(net.nodes.new(2, "nowhere")), 1))
    with pytest.raises(ValueError, match=r"nowhere\[0\] is never written"):
        _ = net.num_units


def test_an_mlp_counts() -> None:
    assert mlp(3, 4, 2, 4, 2, bias=False).net.num_basis_paths == 26
