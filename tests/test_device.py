"""Devices that are there, and half precision where it is faster."""

import pytest
import torch
from common import refused

from enhance_lib.toolbox.device import autocast, half_dtype, layout, pick_device

CPU = torch.device('cpu')


def test_the_cpu_is_always_there():
    assert pick_device('cpu') == pick_device(CPU) == CPU
    assert isinstance(pick_device(), torch.device)


@pytest.mark.parametrize(
    'name', ['gpu', '', 'cuda:99', 'xpu:7', 'hpu', 'meta', 'cpu\n', -1, 3.5, [], 'x' * 999]
)
def test_a_device_that_is_not_there_is_refused(name):
    with refused('There is no device', 'There are: cpu'):
        pick_device(name)


def test_cuda_is_refused_where_there_is_none(monkeypatch):
    def empty(*args, device=None, **kwargs):
        raise RuntimeError('Found no NVIDIA driver\non your system.')

    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: False)
    assert pick_device() == CPU
    monkeypatch.setattr(torch, 'empty', empty)
    with refused("'cuda'", 'There are: cpu.'):
        pick_device('cuda')
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    with refused("'cuda:3'", 'There are: cpu, cuda.'):
        pick_device('cuda:3')


def test_the_fastest_device_is_chosen(monkeypatch):
    asked = []

    def empty(*args, device):
        asked.append(device.type)
        return torch.zeros(1)

    monkeypatch.setattr(torch, 'empty', empty)
    for cuda, mps, best in [(1, 1, 'cuda'), (1, 0, 'cuda'), (0, 1, 'mps'), (0, 0, 'cpu')]:
        monkeypatch.setattr(torch.cuda, 'is_available', lambda there=cuda: bool(there))
        monkeypatch.setattr(torch.backends.mps, 'is_available', lambda there=mps: bool(there))
        assert pick_device().type == best
    assert asked == ['cuda', 'cuda', 'mps', 'cpu']  # each was tried out


def pretend_cpu(monkeypatch, avx=False, amx=False):
    monkeypatch.setattr(torch.cpu, '_is_avx512_bf16_supported', lambda: avx, raising=False)
    monkeypatch.setattr(torch.cpu, '_is_amx_tile_supported', lambda: amx, raising=False)


def test_half_precision_only_where_it_is_faster(monkeypatch):
    for avx, amx in [(True, False), (False, True), (True, True)]:
        pretend_cpu(monkeypatch, avx, amx)
        assert half_dtype(CPU) == torch.bfloat16
    pretend_cpu(monkeypatch)
    assert half_dtype(CPU) is None
    monkeypatch.delattr(torch.cpu, '_is_avx512_bf16_supported')  # another version of torch
    monkeypatch.delattr(torch.cpu, '_is_amx_tile_supported')
    assert half_dtype(CPU) is None
    assert half_dtype(torch.device('mps')) is None


@pytest.mark.parametrize(
    'capability, dtype',
    [
        ((7, 5), torch.float16),
        ((6, 1), torch.float16),
        ((8, 0), torch.bfloat16),
        ((8, 9), torch.bfloat16),
        ((10, 0), torch.bfloat16),
    ],
)
def test_half_precision_on_a_pretended_gpu(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: capability)
    assert half_dtype(torch.device('cuda')) == dtype


def test_autocast_computes_in_half_only_inside(monkeypatch):
    pretend_cpu(monkeypatch, avx=True)
    x = torch.ones(2, 2)
    with autocast(CPU):
        assert (x @ x).dtype == torch.bfloat16
    with autocast(CPU, enabled=False):
        assert (x @ x).dtype == torch.float32
    assert (x @ x).dtype == torch.float32
    with torch.autocast('cpu', torch.bfloat16), autocast(CPU, enabled=False):
        assert (x @ x).dtype == torch.float32
    pretend_cpu(monkeypatch)
    with autocast(CPU):
        assert (x @ x).dtype == torch.float32


def test_apple_keeps_the_layout_that_computes_right_gradients():
    found = [layout(torch.device(name)) for name in ('cpu', 'cuda', 'mps')]
    assert found == [torch.channels_last, torch.channels_last, torch.contiguous_format]
