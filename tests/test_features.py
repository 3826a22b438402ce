"""Networks that look at photos: taps, frozen weights, files that are none, downloads that fail."""

import hashlib
import http.server
import io
import os
import pickle
import threading
from contextlib import contextmanager

import pytest
import torch
from beside import SHARED
from by_hand import MEAN, STD, batch
from common import noise, one_line
from torch import nn

from enhance_lib.applications.scoreboard import _load_lpips, lpips
from enhance_lib.measure import feature_distance
from enhance_lib.toolbox.errors import EnhanceError
from enhance_lib.toolbox.features import FeatureNet, _load_net, feature_net, measuring_net
from enhance_lib.toolbox.show import Budget

SQUEEZENET = SHARED / 'pretrained' / 'squeezenet1_1.pth'


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    "No test finds a network kept by another test or by the user, and none goes to the web."
    from torchvision.models import SqueezeNet1_1_Weights

    row = SqueezeNet1_1_Weights.IMAGENET1K_V1.value
    name = row.url.rsplit('/')[-1]
    monkeypatch.setattr(row, 'url', f'http://127.0.0.1:9/{name}')  # where nobody answers
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch'))
    monkeypatch.setenv('no_proxy', '127.0.0.1')
    monkeypatch.delenv('ENHANCE_FEATURES', raising=False)
    forget()
    yield
    forget()


def forget():
    _load_net.cache_clear()
    _load_lpips.cache_clear()


@pytest.fixture(scope='session')
def squeezenet(tmp_path_factory):
    "A file of SqueezeNet 1.1 in torchvision's layout: the trained one, or else one with noise."
    if SQUEEZENET.exists():
        return SQUEEZENET
    from torchvision.models import squeezenet1_1

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        path = tmp_path_factory.mktemp('made') / 'squeezenet1_1.pth'
        torch.save(squeezenet1_1().state_dict(), path)
    return path


def normal(x):
    "As the network gets it."
    mean, std = (torch.tensor(v, dtype=torch.float32).view(3, 1, 1) for v in (MEAN, STD))
    return (x - mean) / std


# The network


def test_the_network_is_frozen():
    net = feature_net('random')
    around = nn.Sequential(nn.Conv2d(3, 3, 1), net)
    assert list(net.parameters()) and not any(p.requires_grad for p in net.parameters())
    for call in (net.train, net.eval, around.train, lambda: net.train(True)):
        call()
        assert not any(m.training for m in net.modules())
    assert around.train().training and around[0].training  # the rest of the model does train
    dropped = FeatureNet(nn.Sequential(nn.Conv2d(3, 3, 1), nn.Dropout(0.9)), (1,)).train()
    x = batch(1, 3, 4, 4)
    assert torch.equal(dropped(x)[0], dropped(x)[0])


def test_gradients_pass_through_the_network_to_the_picture():
    net = feature_net('random')
    before = [p.clone() for p in net.parameters()]
    x = batch(1, 3, 40, 40).requires_grad_()
    features = net(x)
    assert len(features) == 7 and [f.shape[1] for f in features] == [
        64,
        128,
        256,
        384,
        384,
        512,
        512,
    ]
    sum(f.square().mean() for f in features).backward()
    assert x.grad.isfinite().all() and x.grad.abs().max() > 0
    assert all(p.grad is None for p in net.parameters())
    assert all(torch.equal(p, q) for p, q in zip(before, net.parameters()))


def test_taps_are_where_they_should_be():
    "After which layer, and the layers behind the last are left out."
    layers = nn.Sequential(*(nn.Conv2d(3, c, 1) for c in (3, 3, 3)), nn.Conv2d(3, 5, 1))
    net = FeatureNet(layers, (0, 2))
    x = batch(2, 3, 4, 5)
    first, third = net(x)
    assert len(net.layers) == 3
    torch.testing.assert_close(first, layers[0](normal(x)))
    torch.testing.assert_close(third, layers[:3](normal(x)))


def features(net):
    return net(batch(1, 3, 48, 48))


def same_features(a, b):
    return all(torch.equal(x, y) for x, y in zip(features(a), features(b), strict=True))


def test_random_weights_are_always_the_same_and_take_no_luck_from_others():
    torch.manual_seed(5)
    expected = torch.rand(4)
    torch.manual_seed(5)
    a = feature_net('random')
    assert torch.equal(torch.rand(4), expected)
    forget()
    torch.manual_seed(6)
    b = feature_net('random')
    assert a is not b and same_features(a, b)
    assert feature_net('random') is b  # kept, not made again


def test_making_the_network_leaves_the_luck_of_gpus_alone(monkeypatch):
    seeds = []
    monkeypatch.setattr(torch.cuda, 'manual_seed_all', seeds.append)
    feature_net('random')
    assert seeds == []


def test_a_network_first_used_in_inference_mode_still_gives_gradients():
    with torch.inference_mode():
        feature_net('random')
    x = batch(1, 3, 40, 40).requires_grad_()
    sum(f.sum() for f in feature_net('random')(x)).backward()
    assert x.grad.abs().max() > 0


# Files


def test_a_file_of_weights_is_used(squeezenet, monkeypatch):
    "Against torchvision's own network with these weights, up to each tap."
    from torchvision.models import squeezenet1_1

    whole = squeezenet1_1()
    whole.load_state_dict(torch.load(squeezenet, weights_only=True))
    named = feature_net(squeezenet)
    x = batch(1, 3, 48, 48)
    with torch.no_grad():
        for tap, found in zip((1, 4, 7, 9, 10, 11, 12), named(x), strict=True):
            torch.testing.assert_close(found, whole.eval().features[: tap + 1](normal(x)))
    assert not same_features(named, feature_net('random'))
    monkeypatch.setenv('ENHANCE_FEATURES', str(squeezenet))
    assert feature_net() is feature_net(str(squeezenet))
    assert not same_features(feature_net('random'), named)  # what is asked for comes first


class Trap:
    "A pickle that makes a folder when it is opened carelessly."

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize('save', [torch.save, None], ids=['torch', 'pickle'])
def test_a_file_that_would_run_code_does_not(save, tmp_path):
    file, mark = tmp_path / 'weights.pth', tmp_path / 'ran'
    if save:
        save(Trap(mark), file)
    else:
        file.write_bytes(pickle.dumps(Trap(mark), protocol=2))
        pickle.loads(file.read_bytes())
        mark.rmdir()  # the trap works
    with pytest.raises(EnhanceError) as error:
        feature_net(file)
    assert not mark.exists()
    assert 'weights.pth' in one_line(error) and 'SqueezeNet' in one_line(error)


def wrong_file(kind, squeezenet):
    "The bytes of a file that is not the weights of SqueezeNet 1.1."
    if kind == 'truncated':
        return squeezenet.read_bytes()[:1_000_000]
    if kind in (plain := {'text': b'hello, this is no network\n', 'page': b'<!DOCTYPE html>'}):
        return plain[kind]
    state = torch.load(squeezenet, weights_only=True)
    file = io.BytesIO()
    torch.save(
        {
            'other keys': {'layer.weight': torch.ones(2)},
            'other sizes': {k: v[:1] for k, v in state.items()},
            'one key less': dict(list(state.items())[1:]),
            'list': [1, 2],
            'tensor': torch.ones(3),
        }[kind],
        file,
    )
    return file.getvalue()


@pytest.mark.parametrize(
    'kind', 'truncated,text,page,list,tensor,other keys,other sizes,one key less'.split(',')
)
@pytest.mark.parametrize('how', ['argument', 'environment'])
def test_a_wrong_file_of_weights(kind, how, squeezenet, tmp_path, monkeypatch):
    file = tmp_path / 'weights.pth'
    file.write_bytes(wrong_file(kind, squeezenet))
    if how == 'environment':
        monkeypatch.setenv('ENHANCE_FEATURES', str(file))
    with pytest.raises(EnhanceError) as error:
        feature_net(file if how == 'argument' else None)
    message = one_line(error)
    assert str(file) in message and 'SqueezeNet' in message and 'ENHANCE_FEATURES' in message


def test_an_empty_file_of_weights(tmp_path):
    file = tmp_path / 'weights.pth'
    file.write_bytes(b'')
    with pytest.raises(EnhanceError):
        feature_net(file)


def test_a_missing_file_of_weights(tmp_path, monkeypatch):
    monkeypatch.setenv('ENHANCE_FEATURES', str(tmp_path / 'nowhere.pth'))
    for call in (feature_net, lambda: distance_by_default(noise((32, 32)))):
        with pytest.raises(EnhanceError, match='ENHANCE_FEATURES') as error:
            call()
        assert 'nowhere.pth' in one_line(error)
    with pytest.raises(EnhanceError):
        feature_net(tmp_path)  # a folder


def distance_by_default(photo):
    return feature_distance(photo, photo)


def test_only_a_smoke_run_does_without_the_network(monkeypatch, squeezenet, tmp_path, capsys):
    assert same_features(measuring_net(Budget('smoke')), feature_net('random'))
    assert 'Markdown' in capsys.readouterr().out  # it says so
    for name in ('lesson', 'full'):
        with pytest.raises(EnhanceError, match='ENHANCE_FEATURES'):
            measuring_net(Budget(name))
    monkeypatch.setenv('ENHANCE_FEATURES', str(squeezenet))
    for name in Budget.names:
        assert measuring_net(Budget(name)) is feature_net(squeezenet)
    assert 'Markdown' not in capsys.readouterr().out


# Downloads


@contextmanager
def served(data, promised=None, status=200):
    "A server on this machine that gives `data` for any name: its address, and what was asked for."
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path.strip('/'))
            self.send_response(status)
            self.send_header('Content-Length', str(promised or len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f'http://127.0.0.1:{server.server_address[1]}', asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def point_at(monkeypatch):
    "Let torchvision look for SqueezeNet elsewhere."
    from torchvision.models import SqueezeNet1_1_Weights

    def point(url):
        monkeypatch.setattr(SqueezeNet1_1_Weights.IMAGENET1K_V1.value, 'url', url)

    return point


def hashed_name(data):
    "The name that torchvision gives a file: with the first 8 digits of its SHA-256."
    return f'squeezenet1_1-{hashlib.sha256(data).hexdigest()[:8]}.pth'


def test_the_network_is_downloaded_once(squeezenet, point_at, tmp_path):
    data = squeezenet.read_bytes()
    name = hashed_name(data)
    with served(data) as (url, asked):
        point_at(f'{url}/{name}')
        first = feature_net()
        assert same_features(first, feature_net(squeezenet))
        assert feature_net() is first
        assert (tmp_path / 'torch' / 'hub' / 'checkpoints' / name).read_bytes() == data
        forget()  # as in the next session
        assert same_features(feature_net(), feature_net(squeezenet))
        assert asked == [name]
    forget()
    assert same_features(feature_net(), first)  # and without a server
    assert distance_by_default(noise((40, 40))) == 0


def test_the_file_named_in_the_environment_spares_the_download(squeezenet, point_at, monkeypatch):
    monkeypatch.setenv('ENHANCE_FEATURES', str(squeezenet))
    with served(squeezenet.read_bytes()) as (url, asked):
        point_at(f'{url}/{hashed_name(squeezenet.read_bytes())}')
        feature_net()
        assert asked == []


@pytest.mark.parametrize('fault', ['changed', 'cut', 'page', 'broken off', 'no such page', 'down'])
def test_a_download_that_fails(fault, squeezenet, point_at, tmp_path):
    data = squeezenet.read_bytes()
    name, options = hashed_name(data), {}
    if fault == 'changed':
        wrong = data[:1000] + bytes([data[1000] ^ 1]) + data[1001:]  # one bit
    elif fault == 'cut':
        wrong = data[:100_000]
    elif fault == 'broken off':
        wrong, options = data[:100_000], {'promised': len(data)}
    else:
        wrong = b'<html>Please log in to the wireless network</html>'
    if fault == 'no such page':
        options = {'status': 404}
    with served(wrong, **options) as (url, asked):
        point_at(f'{url}/{name}')
        if fault != 'down':
            with pytest.raises(EnhanceError, match='could not be downloaded') as error:
                feature_net()
            assert asked == [name]
    if fault == 'down':
        with pytest.raises(EnhanceError, match='could not be downloaded') as error:
            feature_net()
    assert 'ENHANCE_FEATURES' in one_line(error) and 'SqueezeNet' in one_line(error)
    kept = tmp_path / 'torch' / 'hub' / 'checkpoints'
    assert [p.name for p in kept.iterdir()] == []  # nothing that would be taken for good later
    with served(data) as (url, asked):  # try again when you are online
        point_at(f'{url}/{name}')
        assert feature_net() and asked == [name]


def keep(folder, data, name='squeezenet1_1-b8a52dc0.pth'):
    "Put a file where torchvision keeps what it has downloaded."
    kept = folder / 'torch' / 'hub' / 'checkpoints'
    kept.mkdir(parents=True)
    (kept / name).write_bytes(data)


def test_the_name_that_torchvision_gives_its_file(squeezenet, tmp_path):
    keep(tmp_path, squeezenet.read_bytes())
    assert same_features(feature_net(), feature_net(squeezenet))


def feature_net_by_lpips():
    lpips(noise((32, 32)), noise((32, 32)))


@pytest.mark.parametrize(
    'load, kind',
    [
        (feature_net, 'truncated'),
        (feature_net_by_lpips, 'truncated'),
        (feature_net_by_lpips, 'other keys'),
        (feature_net, 'page'),
        (feature_net, 'text'),
        (feature_net, 'other keys'),
        (feature_net, 'list'),
        (feature_net_by_lpips, 'page'),
        (feature_net_by_lpips, 'list'),
    ],
)
def test_a_damaged_file_in_the_store_of_torch(load, kind, squeezenet, tmp_path):
    "torch checks what it downloads, but not what it has kept: so a damaged file is found here."
    keep(tmp_path, wrong_file(kind, squeezenet))
    with pytest.raises(EnhanceError):
        load()


def test_a_file_in_the_store_that_would_run_code_does_not(tmp_path):
    file, mark = io.BytesIO(), tmp_path / 'ran'
    torch.save(Trap(mark), file)
    keep(tmp_path, file.getvalue())
    try:
        feature_net()
    except Exception:
        pass  # what is raised is the matter of another test
    assert not mark.exists()
