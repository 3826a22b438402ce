"""Networks to compare photos with: layers, activations, weights from files; timm offline."""

import pytest
import torch
from by_hand import batch
from torch import nn
from torch.nn import functional as F

from enhance_lib.toolbox.errors import EnhanceError
from enhance_lib.toolbox.features import LAYERS, feature_extractor


@pytest.mark.parametrize('name', LAYERS)
def test_the_default_layers_end_a_stage(name):
    "After each comes a pooling, or the end; all of them in order."
    from torchvision.models import get_model

    layers = get_model(name).features
    for i in LAYERS[name]:
        pooled = i + 1 == len(layers) or isinstance(layers[i + 1], nn.MaxPool2d)
        assert pooled and not isinstance(layers[i], nn.MaxPool2d)


def test_features_before_the_activation_are_what_the_activation_gets():
    before, after = (
        feature_extractor('vgg16', (3, 8), flag, weights='random') for flag in (True, False)
    )
    x = batch(1, 3, 48, 48)
    for b, a in zip(before(x), after(x), strict=True):
        assert float(b.min()) < 0
        torch.testing.assert_close(F.relu(b), a)


def test_weights_of_vgg_from_a_file(tmp_path):
    "Against torchvision's own network."
    from torchvision.models import vgg16

    whole = vgg16()
    torch.save(whole.state_dict(), tmp_path / 'vgg16.pth')
    net = feature_extractor('vgg16', (3,), weights=tmp_path / 'vgg16.pth')
    x = batch(1, 3, 32, 32)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    normal = (x - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(net(x)[0], whole.eval().features[:4](normal))


def test_the_environment_names_the_weights_of_squeezenet_only(monkeypatch):
    asked = []

    def load(name, weights, named_in):
        asked.append((name, weights))
        raise EnhanceError('enough')

    monkeypatch.setattr('enhance_lib.toolbox.features.load_pretrained', load)
    monkeypatch.setenv('ENHANCE_FEATURES', 'squeezenet.pth')
    for name in ('squeezenet1_1', 'vgg16'):
        with pytest.raises(EnhanceError, match='enough'):
            feature_extractor(name)
    assert asked == [('squeezenet1_1', 'squeezenet.pth'), ('vgg16', 'download')]


@pytest.mark.parametrize(
    'arguments, words',
    [
        (('vgg61',), "'vgg61'.*vgg16"),
        (('resnet10tt',), "'resnet10tt'.*resnet10t"),
        (('squeezenet1_1', (13,)), 'layers 0 to 12'),
        (('squeezenet1_1', (-1,)), 'layers 0 to 12'),
        (('squeezenet1_1', (1.5,)), 'layers 0 to 12'),
        (('squeezenet1_1', ()), 'layers 0 to 12'),
        (('squeezenet1_1', (12, 1)), 'shallow to deep'),
        (('squeezenet1_1', (4, 4)), 'each once'),
        (('resnet10t', (3, 1)), 'shallow to deep'),
        (('squeezenet1_1', (4,), True), 'Layer 4.*Fire'),
        (('resnet10t', None, True), 'before_activation'),
        (('resnet10t', (7,)), 'resnet10t'),
        (('vit_tiny_patch16_224', (99,)), 'vit_tiny'),
    ],
)
def test_a_network_or_layer_that_is_not_there(arguments, words):
    left = (None, False)[len(arguments) - 1 :]
    options = dict(zip(('network', 'layers', 'before_activation'), (*arguments, *left)))
    with pytest.raises(EnhanceError, match=words):
        feature_extractor(**options, weights='random')


# timm


def test_stages_of_timm_are_normalized_as_it_was_trained():
    import timm

    net = feature_extractor('resnet10t', (1, 3), weights='random')
    config = timm.data.resolve_model_data_config(timm.create_model('resnet10t'))
    x = batch(1, 3, 64, 64)
    mean, std = (torch.tensor(config[k]).view(1, 3, 1, 1) for k in ('mean', 'std'))
    with torch.no_grad():
        for told, wanted in zip(net(x), net.layers((x - mean) / std), strict=True):
            torch.testing.assert_close(told, wanted)
    assert [f.shape[2] for f in net(x)] == [16, 4]
    assert not net.train().layers.training
    assert all(not p.requires_grad for p in net.parameters())


def test_weights_of_timm_from_a_file(tmp_path):
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(5)
    whole = timm.create_model('resnet10t', pretrained=False)
    save_file(whole.state_dict(), tmp_path / 'resnet.safetensors')
    net = feature_extractor('resnet10t', (0,), weights=tmp_path / 'resnet.safetensors')
    assert torch.equal(net.layers.state_dict()['conv1.0.weight'], whole.conv1[0].weight)


def test_timm_without_a_network_or_file(monkeypatch, tmp_path):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    monkeypatch.setenv('HF_HOME', str(tmp_path))
    with pytest.raises(EnhanceError, match='timm cannot give resnet10t'):
        feature_extractor('resnet10t')
    with pytest.raises(EnhanceError, match='resnet10t'):
        feature_extractor('resnet10t', weights=tmp_path / 'nowhere.safetensors')
