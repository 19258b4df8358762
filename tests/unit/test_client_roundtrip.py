"""Training state goes to bytes and comes back bit for bit."""

from __future__ import annotations

import copy
import gc
import mmap
import random
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from snapshotd.wire.v1 import segment_pb2
from snapshotd_client import apply as apply_module
from snapshotd_client import capture
from snapshotd_client.errors import InexactRestore, StateMismatch, UnsupportedState
from snapshotd_client.exact import same_bits
from snapshotd_client.predicting import predict_image_bytes


def image_of(states, values=None, step=1):
    plan = capture.plan("job", 0, 1, step, states, values or {})
    image = bytearray(b"\xff" * plan.image_bytes)
    plan.write(memoryview(image))
    return image, plan.manifest_bytes


def put_back(image, states, **changes):
    data, manifest_bytes = image
    arguments = {"job": "job", "world": 1, "shard": 0} | changes
    # Read-only, as the segment is mapped.
    return apply_module.apply(memoryview(bytes(data)), manifest_bytes, states=states, **arguments)


class Holder:
    """The plainest Stateful: gives and takes one object."""

    def __init__(self, content=None):
        self.content = content

    def state_dict(self):
        return {"content": self.content}

    def load_state_dict(self, state):
        self.content = state["content"]


def through(content):
    fresh = Holder()
    put_back(image_of({"h": Holder(content)}), {"h": fresh})
    return fresh.content


DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn,
    torch.float8_e5m2, torch.complex32, torch.complex64, torch.complex128, torch.bool, torch.uint8,
    torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64,
]  # fmt: skip


def bits(dtype, *shape):
    count = int(np.prod(shape, dtype=int))
    if dtype == torch.bool:
        return torch.tensor([i % 3 == 0 for i in range(count)], dtype=dtype).reshape(shape)
    raw = np.random.default_rng(7).integers(0, 256, count * dtype.itemsize, dtype=np.uint8)
    return (
        torch.from_numpy(raw).view(dtype).reshape(shape)
        if count
        else torch.empty(shape, dtype=dtype)
    )


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (5,), (0, 3), (2, 3, 4)], ids=str)
def test_every_dtype_and_shape_comes_back(dtype, shape):
    tensor = bits(dtype, *shape)
    assert same_bits(through(tensor), tensor)
    target = torch.zeros(shape, dtype=dtype)
    before = target.data_ptr()
    put_back(image_of({"t": tensor}), {"t": target})
    assert same_bits(target, tensor)
    assert target.data_ptr() == before


def as_param(t):
    return nn.Parameter(t.clone(), requires_grad=False)


VIEWS = {
    "transposed": lambda b: b.t(),
    "strided": lambda b: b[::2, 1::3],
    "expanded": lambda b: b[:1].expand(4, 6),
    "scalar": lambda b: b[1, 2],
    "offset": lambda b: b[2:],
    "diagonal": lambda b: b.diagonal(),
    "windows": lambda b: b.reshape(-1).unfold(0, 4, 2),
    "conjugated": lambda b: torch.complex(b, b + 1).conj(),
    "negative": lambda b: torch.complex(b, b + 1).conj().imag,
    "parameter": as_param,
    "channels last": lambda b: b.reshape(1, 2, 3, 4).to(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("view", VIEWS)
def test_views_come_back(view):
    tensor = VIEWS[view](torch.arange(24.0).reshape(4, 6))
    found = through(tensor)
    assert same_bits(found, tensor)
    assert found.stride() == tensor.stride()
    assert (found.is_conj(), found.is_neg()) == (tensor.is_conj(), tensor.is_neg())
    assert type(found) is type(tensor)
    # In place: a live tensor of the same kind, other values.
    target = VIEWS[view](torch.full((4, 6), -1.0))
    put_back(image_of({"t": tensor}), {"t": target})
    assert same_bits(target, tensor)


def test_a_small_view_of_a_huge_storage_is_small():
    huge = torch.zeros(1_000_000)
    image, _ = image_of({"t": huge[10:20]})
    assert len(image) < 20_000


def test_an_in_place_view_leaves_its_neighbours_alone():
    saved = torch.arange(24.0).reshape(4, 6)
    live = torch.full((4, 6), -1.0)
    put_back(image_of({"t": saved[:, ::2]}), {"t": live[:, ::2]})
    assert live[:, ::2].equal(saved[:, ::2])
    assert (live[:, 1::2] == -1).all()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 24)), min_size=1, max_size=6))
def test_overlapping_slices_stay_aliases(slices):
    base = torch.arange(64, dtype=torch.int16)
    views = [base[a : a + n] for a, n in slices]
    found = through(views)
    for view, back in zip(views, found, strict=True):
        assert same_bits(view, back)
    for i, (a, n) in enumerate(slices):
        for j, (b, k) in enumerate(slices):
            if n and k and max(a, b) < min(a + n, b + k):
                same = found[i].untyped_storage().data_ptr()
                assert same == found[j].untyped_storage().data_ptr()
                assert found[i].data_ptr() - found[j].data_ptr() == (a - b) * 2


def test_views_of_one_storage_in_two_dtypes():
    base = torch.arange(32, dtype=torch.uint8)
    narrow, wide = base[3:9], base.view(torch.int64)[1:3]
    back_narrow, back_wide = through((narrow, wide))
    assert same_bits(back_narrow, narrow)
    assert same_bits(back_wide, wide)
    back_wide.zero_()
    assert back_narrow.tolist() == [3, 4, 5, 6, 7, 0]


def test_one_object_twice_stays_one_object():
    tensor = torch.ones(3)
    a, b = through([tensor, {"again": tensor}])
    assert a is b["again"]


def test_parameters_stay_parameters_and_requires_grad_stays():
    frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    leaf = torch.ones(2, requires_grad=True)
    p, f, t, result = through([nn.Parameter(torch.ones(2)), frozen, leaf, leaf * 2])
    assert isinstance(p, nn.Parameter)
    assert p.requires_grad
    assert isinstance(f, nn.Parameter)
    assert not f.requires_grad
    assert t.requires_grad
    assert not result.requires_grad


class Tagged(torch.Tensor):
    pass


class Opaque:
    def __init__(self):
        self.inside = torch.arange(3)
        self.tagged = torch.ones(2).as_subclass(Tagged)


def test_tensors_inside_opaque_objects():
    found = through(Opaque())
    assert found.inside.tolist() == [0, 1, 2]
    assert type(found.tagged) is Tagged


def test_a_wrapper_subclass_comes_back():
    from torch.testing._internal.two_tensor import TwoTensor

    found = through(TwoTensor(torch.ones(3), torch.full((3,), 2.0)))
    assert type(found) is TwoTensor
    assert found.a.tolist() == [1, 1, 1]
    assert found.b.tolist() == [2, 2, 2]


def test_values_come_back_in_memory_of_their_own():
    model = nn.Linear(2, 2)
    values = {"tokens": 7, "name": "x", "weight": model.weight, "array": np.arange(3), "none": None}
    found = put_back(image_of({"model": model}, values), {"model": model})
    assert (found["tokens"], found["name"], found["none"]) == (7, "x", None)
    assert found["array"].tolist() == [0, 1, 2]
    assert found["weight"].equal(model.weight)
    assert found["weight"].data_ptr() != model.weight.data_ptr()


def test_the_image_is_let_go():
    tensor = torch.arange(4.0)
    model = nn.Linear(2, 2)
    opt = torch.optim.AdamW(model.parameters())
    model(torch.ones(2)).sum().backward()
    opt.step()
    states = {"m": model, "o": opt, "h": Holder(tensor)}
    image, manifest_bytes = image_of(states, {"v": tensor})
    mapping = mmap.mmap(-1, len(image))
    mapping[:] = bytes(image)
    view = memoryview(mapping)
    gc.disable()
    try:
        apply_module.apply(view, manifest_bytes, job="job", world=1, shard=0, states=states)
        view.release()
        mapping.close()
    finally:
        gc.enable()


def test_equal_state_gives_equal_bytes_and_disturbs_nothing():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    states = {"model": model, "opt": torch.optim.SGD(model.parameters(), momentum=0.9)}
    before = (random.getstate(), torch.get_rng_state(), [p._version for p in model.parameters()])
    first, second = image_of(states), image_of(states)
    assert first == second
    assert random.getstate() == before[0]
    assert torch.get_rng_state().equal(before[1])
    assert [p._version for p in model.parameters()] == before[2]


def test_the_layout_is_as_the_contract_says():
    image, manifest_bytes = image_of({"t": torch.ones(3), "u": torch.ones(3, dtype=torch.int8)})
    manifest = segment_pb2.Manifest.FromString(bytes(image[:manifest_bytes]))
    end = manifest_bytes
    for extent in [*manifest.extents, manifest.skeleton]:
        assert extent.image_offset % 64 == 0
        assert not any(image[end : extent.image_offset])
        end = extent.image_offset + extent.bytes
    assert end == len(image)
    assert [t.name for t in manifest.tensors][:2] == ["t", "u"]


def test_a_larger_buffer_keeps_its_rest():
    plan = capture.plan("job", 0, 1, 1, {"t": torch.ones(3)}, {})
    image = bytearray(b"\xff" * (plan.image_bytes + 10))
    plan.write(memoryview(image))
    assert image[-10:] == b"\xff" * 10


BAD = {
    "sparse": (lambda: torch.eye(2).to_sparse(), "layout"),
    "meta": (lambda: torch.empty(2, device="meta"), "meta device"),
    "nested": (lambda: torch.nested.nested_tensor([torch.ones(1)], layout=torch.jagged), "nested"),
}


@pytest.mark.parametrize("kind", BAD)
def test_unsupported_tensors_are_named(kind):
    make, why = BAD[kind]
    with pytest.raises(UnsupportedState, match=rf"h\.content\.0.*{why}"):
        image_of({"h": Holder([make()])})


def test_a_fake_tensor_is_named():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        fake = torch.ones(2)
    with pytest.raises(UnsupportedState, match="t cannot be captured: it is a fake tensor"):
        image_of({"t": fake})


def test_a_freed_storage_is_named():
    tensor = torch.ones(4)
    tensor.untyped_storage().resize_(0)
    with pytest.raises(UnsupportedState, match="holds 0 bytes of the 16"):
        image_of({"t": tensor})


def test_unsupported_objects_are_named():
    with pytest.raises(UnsupportedState, match=r"'x' is a builtins\.int"):
        capture.check_states({"x": 3})
    with pytest.raises(UnsupportedState, match="is no name"):
        capture.check_states({"<rng>": torch.ones(1)})
    with pytest.raises(UnsupportedState, match="state of h holds an object that cannot be pickled"):
        image_of({"h": Holder(lambda: 1)})


def test_a_class_that_is_gone_is_named():
    image = image_of({"h": Holder(Opaque())})
    data = bytes(image[0]).replace(b"Opaque", b"Absent")
    model = nn.Linear(1, 1)
    with pytest.raises(StateMismatch, match=r"h: .*Absent cannot be imported"):
        put_back((data, image[1]), {"h": Holder()})
    del model


def test_random_generators_continue():
    import numpy.random as np_random

    states = {"t": torch.ones(1)}
    image = image_of(states)
    drop = nn.Dropout(0.5)
    expected = (random.random(), np_random.rand(), torch.rand(3), drop(torch.ones(50)))
    found_values = put_back(image, states)
    assert found_values == {}
    found = (random.random(), np_random.rand(), torch.rand(3), drop(torch.ones(50)))
    assert found[:2] == expected[:2]
    assert all(a.equal(b) for a, b in zip(found[2:], expected[2:], strict=True))
    state = torch.get_rng_state()
    put_back(image, states, on_rng=False)
    assert torch.get_rng_state().equal(state)


def test_a_module_that_changes_what_it_loads_is_reported():
    class Rounds(nn.Linear):
        def _load_from_state_dict(self, state_dict, prefix, *rest):
            state_dict[prefix + "weight"] = state_dict[prefix + "weight"] * 2
            super()._load_from_state_dict(state_dict, prefix, *rest)

    model = Rounds(2, 2)
    with pytest.raises(InexactRestore, match=r"model\.weight differs"):
        put_back(image_of({"model": model}), {"model": model})


@pytest.mark.parametrize("factory", ["AdamW", "Adam", "SGD", "SGD momentum", "RMSprop", "Adagrad"])
def test_the_prediction_covers_the_first_snapshot(factory):
    model = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 20))
    extra = {"momentum": 0.9} if "momentum" in factory else {}
    opt = getattr(torch.optim, factory.split()[0])(model.parameters(), lr=0.1, **extra)
    states = {"model": model, "opt": opt}
    predicted = predict_image_bytes(states)
    model(torch.ones(40)).sum().backward()
    opt.step()
    actual = len(image_of(states)[0])
    assert actual <= predicted <= actual + 20_000


def test_warnings_are_left_as_they_were():
    before = list(warnings.filters)
    states = {"t": torch.ones(1)}
    put_back(image_of(states), states)
    assert warnings.filters == before
    assert copy.copy(states).keys() == states.keys()
